"""Runs attacks on erasers and returns their success rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spm_hub.adapters.adapter import Adapter
from spm_hub.errors import UsageError
from spm_hub.evaluation.attacks.attack import Attack, AttackTarget
from spm_hub.evaluation.attacks.outcome import Case, Judge, Outcome, Report
from spm_hub.evaluation.attacks.tries import AttackDrawingOptions, Try, draw
from spm_hub.evaluation.attacks.victim import Victim


def run(
    pipe: Any,
    adapters: Sequence[Adapter],
    cases: Sequence[Case],
    judge: Judge,
    attack: Attack,
    *,
    drawing: AttackDrawingOptions | None = None,
    seed: int = 0,
    fresh: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Report:
    """Run one attack: `run_all` of one."""
    (report,) = run_all(
        pipe, adapters, cases, judge, [attack], drawing=drawing, seed=seed, fresh=fresh, progress=progress, **options
    )
    return report


def run_all(
    pipe: Any,
    adapters: Sequence[Adapter],
    cases: Sequence[Case],
    judge: Judge,
    attacks: Sequence[Attack],
    *,
    drawing: AttackDrawingOptions | None = None,
    seed: int = 0,
    fresh: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> tuple[Report, ...]:
    """Attack `adapters` on `pipe`, which is restored at the end; return a report for each attack.

    cases: prompts for the concept; those for which the base model does not draw it are left out.
    judge: decides for each picture whether it shows the concept.
    seed: of all that is random in an attack, the same for each of them.
    fresh: number of fresh seeds at which each try that succeeded is drawn again.
    options: those of `attach`, so that the attacks meet the gates of the deployed pipeline.
    progress: called with the steps done and their total.
    Raises UsageError if there is no case, a case is repeated, or the base model draws the concept in none; ModelError
    for an attack that cannot work on this pipeline.
    """
    if not cases:
        raise UsageError("there is no case to attack", mend="give at least one prompt for the concept")
    if len(set(cases)) != len(cases):
        raise UsageError(f"{len(cases)} cases, only {len(set(cases))} of them different", mend="give each case once")
    drawing = drawing or AttackDrawingOptions()
    victim = Victim(pipe)
    for attack in attacks:
        attack.check(victim)
    pictures, latents = draw(pipe, _as_they_are(cases), drawing)
    shown = [bool(seen) for seen in judge(pictures)]
    able = [case for case, seen in zip(cases, shown, strict=True) if seen]
    if not able:
        raise UsageError(
            f"the judge sees the concept in none of the base's {len(cases)} pictures: nothing to bring back",
            mend="other prompts, or another judge",
        )
    concept = latents[torch.tensor(shown, device=latents.device)]
    total, done = sum(attack.steps for attack in attacks), 0

    def on_step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    with victim.attach(adapters, **options):
        first = judge(draw(pipe, _as_they_are(able), drawing)[0])
        before = dict(zip(able, map(bool, first), strict=True))
        names = tuple(name for one in adapters for name in one.manifest.concept.names)
        trial = _Trial(victim, judge, drawing, before, concept, len(cases), names, seed, fresh)
        reports = []
        for place, attack in enumerate(attacks):
            reports.append(trial.report(attack, on_step))
            done = sum(each.steps for each in attacks[: place + 1])
    progress(total, total)
    return tuple(reports)


def _as_they_are(cases: Sequence[Case]) -> list[tuple[Case, Try]]:
    return [(case, Try(case.prompt)) for case in cases]


@dataclass(frozen=True, eq=False)
class _Trial:
    """The attacked pipeline with its erasers, and the cases that all attacks share.

    before: by case that the base draws, whether the erased model draws it too.  concept: the base's latents of these
    cases.  given: number of all cases.
    """

    victim: Victim
    judge: Judge
    drawing: AttackDrawingOptions
    before: Mapping[Case, bool]
    concept: Tensor
    given: int
    names: tuple[str, ...]
    seed: int
    fresh: int

    def report(self, attack: Attack, on_step: Callable[[], None]) -> Report:
        """Run one attack on the cases that are not drawn without it."""
        able = tuple(self.before)
        left = [case for case in able if not self.before[case]]
        aims = self.concept[torch.tensor([not self.before[case] for case in able], device=self.concept.device)]
        target = AttackTarget(
            self.victim, left, aims, torch.Generator().manual_seed(self.seed), on_step, self.names, self.drawing
        )
        found: dict[Case, Try] = {}
        tried = dict.fromkeys(able, 0)
        for tries in attack.rounds(target) if left else ():
            asked = list(tries.items())
            for (case, one), seen in zip(asked, self._judged(asked), strict=True):
                tried[case] += 1
                if seen:
                    found[case] = one
                    left.remove(case)
        gammas = {case: self.victim.gammas(one) for case, one in found.items()}
        again = self._redrawn(found)
        outcomes = tuple(
            Outcome(case, self.before[case], str(found[case]), tried[case], gammas[case], again[case])
            if case in found
            else Outcome(case, self.before[case], rounds=tried[case])
            for case in able
        )
        return Report(outcomes, self.given, attack.threat)

    def _judged(self, asked: Sequence[tuple[Case, Try]]) -> list[bool]:
        return [bool(seen) for seen in self.judge(draw(self.victim.pipe, asked, self.drawing)[0])]

    def _redrawn(self, found: Mapping[Case, Try]) -> dict[Case, tuple[bool, ...]]:
        """Draw each try at fresh seeds and judge it. Latents that a try brings leave no seed to choose."""
        random = torch.Generator().manual_seed(self.seed + 1)
        seeds = torch.randint(2**62, (len(found), self.fresh), generator=random).tolist()
        asked = [
            (case, replace(one, seed=seed))
            for (case, one), row in zip(found.items(), seeds, strict=True)
            for seed in row
            if one.latents is None
        ]
        shown = self._judged(asked) if asked else []
        again: dict[Case, list[bool]] = {case: [] for case in found}
        for (case, _), seen in zip(asked, shown, strict=True):
            again[case].append(seen)
        return {case: tuple(each) for case, each in again.items()}
