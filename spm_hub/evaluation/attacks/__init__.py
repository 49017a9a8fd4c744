"""Attacks on erasers: searches for prompts that bring an erased concept back.

Importing this package imports no torch. Example:

report = attacks.run(pipe, [eraser], cases, judge, attacks.UnlearnDiffAtk(), gate="transport")
report.before, report.asr
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spm_hub.evaluation.attacks.attack import Attack, AttackTarget
    from spm_hub.evaluation.attacks.outcome import Case, Judge, Outcome, Report
    from spm_hub.evaluation.attacks.searches.p4d import P4D
    from spm_hub.evaluation.attacks.running import run
    from spm_hub.evaluation.attacks.settings import AttackSettings
    from spm_hub.evaluation.attacks.searches.unlearndiff import UnlearnDiffAtk
    from spm_hub.evaluation.attacks.victim import AttackDrawingOptions

__all__ = [
    "P4D",
    "Attack",
    "AttackDrawingOptions",
    "AttackSettings",
    "AttackTarget",
    "Case",
    "Judge",
    "Outcome",
    "Report",
    "UnlearnDiffAtk",
    "run",
]

_MODULES = {
    **dict.fromkeys(("Case", "Judge", "Outcome", "Report"), ".outcome"),
    **dict.fromkeys(("Attack", "AttackTarget"), ".attack"),
    "AttackSettings": ".settings",
    "AttackDrawingOptions": ".victim",
    "P4D": ".searches.p4d",
    "UnlearnDiffAtk": ".searches.unlearndiff",
    "run": ".running",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
