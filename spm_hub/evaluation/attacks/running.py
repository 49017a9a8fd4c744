"""An attack from its first picture to its success rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from spm_hub.adapters.adapter import Adapter
from spm_hub.errors import UsageError
from spm_hub.evaluation.attacks.outcome import Case, Judge, Outcome, Report
from spm_hub.evaluation.attacks.victim import Drawing, Victim, draw


class Attack(Protocol):
    """What every attack is: an iterator over rounds of prompts to try."""

    @property
    def steps(self) -> int:
        """Gradient steps in all, for progress."""

    def rounds(
        self,
        victim: Victim,
        cases: list[Case],
        pictures: Tensor,
        generator: torch.Generator,
        stepped: Callable[[], None],
    ) -> Iterator[dict[Case, str]]:
        """Yields prompts to try for the cases left; those that succeed are taken out of `cases` in between."""


def run(
    pipe: Any,
    adapters: Sequence[Adapter],
    cases: Sequence[Case],
    judge: Judge,
    attack: Attack,
    *,
    drawing: Drawing | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Report:
    """Attack `adapters` on `pipe`, which is left as it was.

    cases: prompts for the concept; those in which the base itself does not draw it are left out.
    judge: says of pictures whether the concept is in them.  options: those of `attach`, so that the attacker meets
    the gates that are deployed.  progress: is told gradient steps done and in all.
    Raises UsageError where there is no case, or the base draws the concept in none.
    """
    if len(set(cases)) != len(cases) or not cases:
        raise UsageError(f"{len(cases)} cases, {len(set(cases))} of them different: nothing to attack, or one twice")
    drawing = drawing or Drawing()
    victim = Victim(pipe)
    pictures, latents = draw(pipe, cases, drawing)
    shown = [bool(seen) for seen in judge(pictures)]
    able = [case for case, seen in zip(cases, shown, strict=True) if seen]
    if not able:
        raise UsageError(
            f"the judge sees the concept in none of the base's {len(cases)} pictures: there is nothing to bring back",
            mend="other prompts, or another judge",
        )
    concept = latents[torch.tensor(shown, device=latents.device)]
    found: dict[Case, str] = {}
    tried = dict.fromkeys(able, 0)
    done = 0

    def stepped() -> None:
        nonlocal done
        done += 1
        progress(done, attack.steps)

    with victim.attached(adapters, **options):
        first = judge(draw(pipe, able, drawing)[0])
        before = dict(zip(able, map(bool, first), strict=True))
        left = [case for case in able if not before[case]]
        aims = concept[torch.tensor([not before[case] for case in able], device=concept.device)]
        generator = torch.Generator().manual_seed(seed)
        for prompts in attack.rounds(victim, left, aims, generator, stepped) if left else ():
            asked = [Case(prompt, case.seed) for case, prompt in prompts.items()]
            for (case, prompt), seen in zip(prompts.items(), judge(draw(pipe, asked, drawing)[0]), strict=True):
                tried[case] += 1
                if seen:
                    found[case] = prompt
                    left.remove(case)
    progress(attack.steps, attack.steps)
    return Report(tuple(Outcome(case, before[case], found.get(case), tried[case]) for case in able), len(cases))
