"""Runs an attack on erasers and returns its success rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from spm_hub.adapters.adapter import Adapter
from spm_hub.errors import UsageError
from spm_hub.evaluation.attacks.attack import Attack, AttackTarget
from spm_hub.evaluation.attacks.outcome import Case, Judge, Outcome, Report
from spm_hub.evaluation.attacks.victim import AttackDrawingOptions, Victim, draw


def run(
    pipe: Any,
    adapters: Sequence[Adapter],
    cases: Sequence[Case],
    judge: Judge,
    attack: Attack,
    *,
    drawing: AttackDrawingOptions | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Report:
    """Attack `adapters` on `pipe`, which is restored at the end.

    cases: prompts for the concept; those for which the base model does not draw it are left out.
    judge: decides for each picture whether it shows the concept.
    options: those of `attach`, so that the attack meets the gates of the deployed pipeline.
    progress: called with the gradient steps done and their total.
    Raises UsageError if there is no case, a case is repeated, or the base model draws the concept in none.
    """
    if not cases:
        raise UsageError("there is no case to attack", mend="give at least one prompt for the concept")
    if len(set(cases)) != len(cases):
        raise UsageError(f"{len(cases)} cases, only {len(set(cases))} of them different", mend="give each case once")
    drawing = drawing or AttackDrawingOptions()
    victim = Victim(pipe)
    pictures, latents = draw(pipe, cases, drawing)
    shown = [bool(seen) for seen in judge(pictures)]
    able = [case for case, seen in zip(cases, shown, strict=True) if seen]
    if not able:
        raise UsageError(
            f"the judge sees the concept in none of the base's {len(cases)} pictures: nothing to bring back",
            mend="other prompts, or another judge",
        )
    concept = latents[torch.tensor(shown, device=latents.device)]
    found: dict[Case, str] = {}
    tried = dict.fromkeys(able, 0)
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        progress(done, attack.steps)

    with victim.attach(adapters, **options):
        first = judge(draw(pipe, able, drawing)[0])
        before = dict(zip(able, map(bool, first), strict=True))
        left = [case for case in able if not before[case]]
        aims = concept[torch.tensor([not before[case] for case in able], device=concept.device)]
        target = AttackTarget(victim, left, aims, torch.Generator().manual_seed(seed), on_step)
        for prompts in attack.rounds(target) if left else ():
            asked = [Case(prompt, case.seed) for case, prompt in prompts.items()]
            for (case, prompt), seen in zip(prompts.items(), judge(draw(pipe, asked, drawing)[0]), strict=True):
                tried[case] += 1
                if seen:
                    found[case] = prompt
                    left.remove(case)
    progress(attack.steps, attack.steps)
    return Report(tuple(Outcome(case, before[case], found.get(case), tried[case]) for case in able), len(cases))
