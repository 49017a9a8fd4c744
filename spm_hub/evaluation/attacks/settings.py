"""The attacks by name and their settings, checked before anything is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from spm_hub.errors import UsageError, nearest

if TYPE_CHECKING:
    from spm_hub.evaluation.attacks.attack import Attack

READS = MappingProxyType({
    "unlearndiff": ("tokens", "iterations", "tries"),
    "p4d-n": ("tokens", "iterations", "tries", "token_free", "adaptive"),
    "p4d-k": ("every", "iterations", "tries", "adaptive"),
    "ring-a-bell": ("tokens", "iterations", "tries"),
    "pez": ("tokens", "iterations", "tries", "token_free"),
    "cce": ("tokens", "iterations", "tries"),
    "noise": ("tries",),
    "completion": ("tries",),
    "random": ("tokens", "tries", "token_free"),
    "seeds": ("tries",),
})  # fmt: skip
"""The attacks by name, and the settings that each of them has."""
ATTACKS = tuple(READS)
CONTROLS = ("random", "seeds")
_OLD_NAME = "p4d"


@dataclass(frozen=True)
class AttackSettings:
    """An attack by name, and its settings; None means the paper's own.

    tokens: adversarial tokens, for cce the embeddings of the learnt word.
    every: for p4d-k, a token in front and after every so many words of the prompt.
    iterations: steps of the search before each of the `tries` that are drawn and judged.
    token_free: search no token of the concept's names.  adaptive: factor of the gate's score in the loss.
    """

    name: str
    tokens: int | None = None
    every: int | None = None
    iterations: int | None = None
    tries: int | None = None
    token_free: bool = False
    adaptive: float = 0.0

    def attack(self, kind: str) -> Attack:
        """Return the attack on a concept of this kind ("nsfw", "style", "other")."""
        from spm_hub.evaluation.attacks.searches import (
            completion,
            inversion,
            noise_probing,
            p4d,
            pez,
            random_tokens,
            ring_a_bell,
            seed_search,
            unlearndiff,
        )

        few = 5 if kind == "nsfw" else 3
        makers: dict[str, Callable[..., Any]] = {
            "unlearndiff": unlearndiff.UnlearnDiffAtk,
            "p4d-n": p4d.P4D,
            "p4d-k": p4d.P4D,
            "ring-a-bell": ring_a_bell.RingABell,
            "pez": pez.PEZ,
            "cce": inversion.ConceptInversion,
            "noise": noise_probing.NoiseProbing,
            "completion": completion.Completion,
            "random": random_tokens.RandomTokens,
            "seeds": seed_search.SeedSearch,
        }
        usual: dict[str, dict[str, Any]] = {
            "unlearndiff": {"tokens": few}, "p4d-k": {"every": 3}, "random": {"tokens": few},
            "cce": {"initial": {"nsfw": "person", "style": "art"}.get(kind, "thing")},
        }  # fmt: skip
        given = {name: getattr(self, name) for name in READS[self.name]}
        chosen = usual.get(self.name, {}) | {name: value for name, value in given.items() if value is not None}
        named_otherwise = {"unlearndiff": "timesteps", "noise": "most"}
        if "tries" in chosen and self.name in named_otherwise:
            chosen[named_otherwise[self.name]] = chosen.pop("tries")
        made: Attack = makers[self.name](**chosen)
        return made


def attacks_named(names: str, **given: Any) -> tuple[AttackSettings, ...]:
    """Return the settings of attacks "a,b,c"; each takes those of `given` that it has.

    Raises UsageError for an unknown name, and for a setting that none of them has.
    """
    wanted = [_current(name.strip(), given) for name in names.split(",")]
    for name in wanted:
        if name not in READS:
            close = nearest(name, ATTACKS)
            raise UsageError(
                f"unknown attack {name!r}; known: {', '.join(ATTACKS)}", mend=f"--with {(*close, *ATTACKS)[0]}"
            )
    for setting, value in given.items():
        if value not in (None, False, 0.0) and not any(setting in READS[name] for name in wanted):
            having = [name for name in ATTACKS if setting in READS[name]]
            raise UsageError(
                f"--{setting.replace('_', '-')} was given as {value}, but no attack of --with {names} has it; "
                f"those that have: {', '.join(having)}",
                mend=f"--with {having[0]}",
            )
    return tuple(
        AttackSettings(name, **{setting: value for setting, value in given.items() if setting in READS[name]})
        for name in dict.fromkeys(wanted)
    )


def _current(name: str, given: dict[str, Any]) -> str:
    """Return today's name of an attack: "p4d" was one name for both kinds."""
    if name != _OLD_NAME:
        return name
    return "p4d-n" if given.get("every") is None else "p4d-k"
