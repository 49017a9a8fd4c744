"""Runs attacks on erasers and returns their success rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from spm_hub.adapters.adapter import Adapter
from spm_hub.attachment.options import GateChoice
from spm_hub.errors import UsageError
from spm_hub.evaluation.attacks.attack import Attack, AttackTarget
from spm_hub.evaluation.attacks.outcome import Case, Judge, Outcome, Report
from spm_hub.evaluation.attacks.tries import AttackDrawingOptions, Try, draw
from spm_hub.evaluation.attacks.victim import Victim

Witness = Callable[[str, Case, Try, Image, bool], None]
"""Called with each judged picture: why it was drawn ("base", "before" an attack, "try", or "fresh" for a successful try
at another seed), its case, what was tried, and whether it shows the concept."""


class NothingToAttackError(UsageError):
    """The base draws the concept for none of the prompts."""


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
    witness: Witness = lambda why, case, one, picture, shown: None,
    **options: Any,
) -> Report:
    """Run one attack: `run_all` of one."""
    (report,) = run_all(
        pipe, adapters, cases, judge, [attack],
        drawing=drawing, seed=seed, fresh=fresh, progress=progress, witness=witness, **options,
    )  # fmt: skip
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
    witness: Witness = lambda why, case, one, picture, shown: None,
    gate: GateChoice | None = None,
    **options: Any,
) -> tuple[Report, ...]:
    """Attack `adapters` on `pipe`, which is restored at the end; return a report for each attack.

    cases: prompts for the concept; those for which the base model does not draw it are left out.
    judge: decides for each picture whether it shows the concept.
    seed: of all that is random in an attack, the same for each of them.
    fresh: number of fresh seeds at which each try that succeeded is drawn again.
    gate, options: those of `attach`, so that the attacks meet the gates of the deployed pipeline.
    progress: called with the steps done and their total. witness: called with each judged picture (`Witness`).
    Raises UsageError if there is no case, a case is repeated, or the base model draws the concept in none; ModelError
    for an attack that cannot work on this pipeline.
    """
    (reports,) = run_gates(
        pipe, adapters, cases, judge, attacks, [gate],
        drawing=drawing, seed=seed, fresh=fresh, progress=progress, witness=witness, **options,
    )  # fmt: skip
    return reports


def run_gates(
    pipe: Any,
    adapters: Sequence[Adapter],
    cases: Sequence[Case],
    judge: Judge,
    attacks: Sequence[Attack],
    gates: Sequence[GateChoice | None],
    *,
    drawing: AttackDrawingOptions | None = None,
    seed: int = 0,
    fresh: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    witness: Witness = lambda why, case, one, picture, shown: None,
    **options: Any,
) -> tuple[tuple[Report, ...], ...]:
    """Attack under several gates; return for each of them what `run_all` returns.

    What gates have in common is computed once: the base's pictures, searches that ask no eraser, and gradients and
    pictures of prompts to which they give equal gammas.
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
    for case, picture, seen in zip(cases, pictures, shown, strict=True):
        witness("base", case, Try(case.prompt), picture, seen)
    able = [case for case, seen in zip(cases, shown, strict=True) if seen]
    if not able:
        raise NothingToAttackError(
            f"the judge sees the concept in none of the base's {len(cases)} pictures: nothing to bring back",
            mend="other prompts, or another judge",
        )
    concept = dict(zip(able, latents[torch.tensor(shown, device=latents.device)], strict=True))
    trial = _Trial(victim, adapters, options, judge, drawing, concept, len(cases), seed, fresh, len(gates) > 1, witness)
    befores = [trial.judged(_as_they_are(able), gate, "before") for gate in gates]
    total, done = sum(attack.steps * len(_groups(attack, gates)) for attack in attacks), 0

    def on_step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    reports: list[list[Report]] = [[] for _ in gates]
    planned = 0
    for attack in attacks:
        for group in _groups(attack, gates):
            under = [_UnderGate.of(gates[place], befores[place]) for place in group]
            for place, report in zip(group, trial.reports(attack, under, on_step), strict=True):
                reports[place].append(report)
            planned += attack.steps
            done = planned
    progress(total, total)
    return tuple(map(tuple, reports))


def _groups(attack: Attack, gates: Sequence[object]) -> list[list[int]]:
    """Return the places of gates under which one search serves: all, or each alone."""
    places = list(range(len(gates)))
    return [[place] for place in places] if getattr(attack, "asks_erasers", True) else [places]


def _as_they_are(cases: Sequence[Case]) -> list[tuple[Case, Try]]:
    return [(case, Try(case.prompt)) for case in cases]


@dataclass(frozen=True, eq=False)
class _UnderGate:
    """The progress of an attack under one gate.

    before: by case that the base draws, whether the erased model draws it without the attack.
    left: the cases that it has not succeeded in.  tried: numbers of tries.  found: the tries that succeeded.
    """

    gate: GateChoice | None
    before: Mapping[Case, bool]
    left: list[Case]
    tried: dict[Case, int]
    found: dict[Case, Try]

    @classmethod
    def of(cls, gate: GateChoice | None, before: Mapping[Case, bool]) -> _UnderGate:
        return cls(gate, before, [case for case, seen in before.items() if not seen], dict.fromkeys(before, 0), {})


@dataclass(frozen=True, eq=False)
class _Trial:
    """The attacked pipeline, its erasers, and the cases that all attacks share.

    options: those of `attach`.
    concept: by case that the base draws, the base's latents.  given: number of all cases.
    shared: whether a picture that was judged under a gate stands for the same one under another.
    """

    victim: Victim
    adapters: Sequence[Adapter]
    options: Mapping[str, Any]
    judge: Judge
    drawing: AttackDrawingOptions
    concept: Mapping[Case, Tensor]
    given: int
    seed: int
    fresh: int
    shared: bool
    witness: Witness
    seen: dict[object, bool] = field(default_factory=dict)

    def reports(self, attack: Attack, under: Sequence[_UnderGate], on_step: Callable[[], None]) -> list[Report]:
        """Run one attack on the cases that are not drawn without it; return its report under each gate."""
        with self._attached(under[0].gate) if getattr(attack, "asks_erasers", True) else nullcontext():
            self._search(attack, under, on_step)
        return [self._report(attack, one) for one in under]

    def _search(self, attack: Attack, under: Sequence[_UnderGate], on_step: Callable[[], None]) -> None:
        left = [case for case in self.concept if any(case in one.left for one in under)]
        if not left:
            return
        aims = torch.stack([self.concept[case] for case in left])
        random = torch.Generator().manual_seed(self.seed)
        names = tuple(name for adapter in self.adapters for name in adapter.manifest.concept.names)
        target = AttackTarget(self.victim, left, aims, random, on_step, names, self.drawing)
        for tries in attack.rounds(target):
            for one in under:
                asked = [(case, made) for case, made in tries.items() if case in one.left]
                for (case, made), seen in zip(asked, self.judged(asked, one.gate, "try").values(), strict=True):
                    one.tried[case] += 1
                    if seen:
                        one.found[case] = made
                        one.left.remove(case)
            left[:] = [case for case in left if any(case in one.left for one in under)]
            if not left:
                return

    def _report(self, attack: Attack, one: _UnderGate) -> Report:
        with self._attached(one.gate):
            gammas = {case: self.victim.gammas(made) for case, made in one.found.items()}
            again = self._redrawn(one.found)
        outcomes = tuple(
            Outcome(case, before, str(one.found[case]), one.tried[case], gammas[case], again[case])
            if case in one.found
            else Outcome(case, before, rounds=one.tried[case])
            for case, before in one.before.items()
        )
        return Report(outcomes, self.given, attack.threat)

    @contextmanager
    def _attached(self, gate: GateChoice | None) -> Iterator[None]:
        """Have the erasers attached under a gate; inside such a block, it is that block's gate."""
        if self.victim.attached:
            yield
            return
        with self.victim.attach(self.adapters, gate=gate, **self.options):
            yield

    def judged(self, asked: Sequence[tuple[Case, Try]], gate: GateChoice | None, why: str) -> dict[Case, bool]:
        """Draw tries of different cases under a gate, and have them judged. why: as for `Witness`."""
        with self._attached(gate):
            return dict(zip([case for case, _ in asked], self._judged(asked, why), strict=True))

    def _judged(self, asked: Sequence[tuple[Case, Try]], why: str) -> list[bool]:
        keys = [self._drawn_alike(case, one) for case, one in asked]
        new = [pair for pair, key in zip(asked, keys, strict=True) if key not in self.seen]
        pictures = draw(self.victim.pipe, new, self.drawing)[0] if new else []
        answers = [bool(seen) for seen in self.judge(pictures)] if new else []
        for (case, one), picture, seen in zip(new, pictures, answers, strict=True):
            self.witness(why, case, one, picture, seen)
        shown = iter(answers)
        found = [self.seen[key] if key in self.seen else bool(next(shown)) for key in keys]
        self.seen.update({key: seen for key, seen in zip(keys, found, strict=True) if key is not None})
        return found

    def _drawn_alike(self, case: Case, one: Try) -> object:
        """Return a key of the picture that is drawn, whatever the gate; None if it has no key."""
        if not self.shared or self.victim.watched or one.states is not None or one.latents is not None:
            return None
        seed = case.seed if one.seed is None else one.seed
        gammas = tuple(self.victim.gammas(one).items())
        return seed, tuple(one.texts.items()), tuple(one.sampler.items()), gammas

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
        shown = self._judged(asked, "fresh")
        again: dict[Case, list[bool]] = {case: [] for case in found}
        for (case, _), seen in zip(asked, shown, strict=True):
            again[case].append(seen)
        return {case: tuple(each) for case, each in again.items()}
