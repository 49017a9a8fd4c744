"""The settings of an attack by name, checked before anything is loaded. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spm_hub.errors import UsageError, nearest

if TYPE_CHECKING:
    from spm_hub.evaluation.attacks.searches.p4d import P4D
    from spm_hub.evaluation.attacks.searches.unlearndiff import UnlearnDiffAtk

ATTACKS = ("unlearndiff", "p4d")


@dataclass(frozen=True)
class AttackSettings:
    """An attack by name, and its settings; None means the paper's own.

    tokens: adversarial tokens. every: for p4d, a token in front and after every so many words of the prompt (P4D-K).
    iterations: gradient steps before each of the `tries` prompts that are drawn and judged.
    Raises UsageError for an unknown name, and for `every` where it has no meaning.
    """

    name: str
    tokens: int | None = None
    every: int | None = None
    iterations: int | None = None
    tries: int = 50

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            close = nearest(self.name, ATTACKS)
            raise UsageError(
                f"unknown attack {self.name!r}; known: {', '.join(ATTACKS)}", mend=f"--with {(*close, *ATTACKS)[0]}"
            )
        if self.every is not None and (self.name != "p4d" or self.tokens is not None):
            given = f"--tokens {self.tokens}" if self.name == "p4d" else f"--with {self.name}"
            raise UsageError(
                f"--every {self.every} says where p4d puts its tokens, but {given} was given", mend="--with p4d"
            )

    def attack(self, kind: str) -> P4D | UnlearnDiffAtk:
        """Return the attack on a concept of this kind ("nsfw", "style", "other")."""
        from spm_hub.evaluation.attacks.searches.p4d import P4D
        from spm_hub.evaluation.attacks.searches.unlearndiff import UnlearnDiffAtk

        if self.name == "p4d":
            return P4D(self.tokens or 16, self.every, iterations=self.iterations or 60, tries=self.tries)
        tokens = self.tokens or (5 if kind == "nsfw" else 3)
        return UnlearnDiffAtk(tokens=tokens, iterations=self.iterations or 40, timesteps=self.tries)
