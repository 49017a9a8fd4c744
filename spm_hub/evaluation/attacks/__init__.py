"""Attacks on erasers: searches for prompts, embeddings or noise that bring an erased concept back.

Importing this package imports no torch. Example:

report = attacks.run(pipe, [eraser], cases, judge, attacks.UnlearnDiffAtk(), gate="transport")
report.before, report.asr, report.interval
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spm_hub.evaluation.attacks.attack import Attack, AttackTarget
    from spm_hub.evaluation.attacks.outcome import Case, Judge, Outcome, Report, Threat, wilson
    from spm_hub.evaluation.attacks.running import run, run_all, run_gates
    from spm_hub.evaluation.attacks.searches.completion import Completion
    from spm_hub.evaluation.attacks.searches.inversion import ConceptInversion
    from spm_hub.evaluation.attacks.searches.noise_probing import NoiseProbing
    from spm_hub.evaluation.attacks.searches.p4d import P4D
    from spm_hub.evaluation.attacks.searches.pez import PEZ
    from spm_hub.evaluation.attacks.searches.random_tokens import RandomTokens
    from spm_hub.evaluation.attacks.searches.ring_a_bell import RingABell
    from spm_hub.evaluation.attacks.searches.seed_search import SeedSearch
    from spm_hub.evaluation.attacks.searches.unlearndiff import UnlearnDiffAtk
    from spm_hub.evaluation.attacks.settings import AttackSettings, attacks_named
    from spm_hub.evaluation.attacks.tries import AttackDrawingOptions, Try

__all__ = [
    "P4D",
    "PEZ",
    "Attack",
    "AttackDrawingOptions",
    "AttackSettings",
    "AttackTarget",
    "Case",
    "Completion",
    "ConceptInversion",
    "Judge",
    "NoiseProbing",
    "Outcome",
    "RandomTokens",
    "Report",
    "RingABell",
    "SeedSearch",
    "Threat",
    "Try",
    "UnlearnDiffAtk",
    "attacks_named",
    "run",
    "run_all",
    "run_gates",
    "wilson",
]

_MODULES = {
    **dict.fromkeys(("Case", "Judge", "Outcome", "Report", "Threat", "wilson"), ".outcome"),
    **dict.fromkeys(("Attack", "AttackTarget"), ".attack"),
    **dict.fromkeys(("AttackSettings", "attacks_named"), ".settings"),
    **dict.fromkeys(("AttackDrawingOptions", "Try"), ".tries"),
    **dict.fromkeys(("run", "run_all", "run_gates"), ".running"),
    "Completion": ".searches.completion",
    "ConceptInversion": ".searches.inversion",
    "NoiseProbing": ".searches.noise_probing",
    "P4D": ".searches.p4d",
    "PEZ": ".searches.pez",
    "RandomTokens": ".searches.random_tokens",
    "RingABell": ".searches.ring_a_bell",
    "SeedSearch": ".searches.seed_search",
    "UnlearnDiffAtk": ".searches.unlearndiff",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
