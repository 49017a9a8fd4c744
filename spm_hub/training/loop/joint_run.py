"""Several concepts erased in one run, each into an eraser of its own (SepME, arXiv 2402.05947)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spm_hub.adapters.increments import Increment
from spm_hub.training.loop.interrupts import delay_interrupts
from spm_hub.training.loop.prediction_run import PredictionRun
from spm_hub.training.loop.run import Run
from spm_hub.training.objective import Losses

_MOST = 10.0
"""Above this eta is cut: it has no bound if another loss crosses zero, and one such step would fill Adam's second
moment, which then holds the concept still for hundreds of steps."""


class JointRun(Run):
    """Minimises sum_i eta_i L_cor(c_i), each eraser's increment alone in effect on its own concept.

    The sum of all increments, in the paper's place, is the same on the concepts themselves, as each sends the others'
    states to zero. On sentences about them it is not, and an eraser that was trained in company would lean on it.
    A concept whose early stop is due rests while the others go on.
    """

    def __init__(self, runs: Sequence[PredictionRun]) -> None:
        """runs: with their trainables removed from the denoiser, which carries one of them at a time.

        The first run's recipe and trainable are those of the whole.
        """
        self._runs = tuple(runs)
        self.recipe, self.trainable = runs[0].recipe, runs[0].trainable

    @property
    def finished(self) -> bool:
        """True once every concept's early stop is due."""
        return all(run.finished for run in self._runs)

    @property
    def reached(self) -> float | None:
        """That of the concept that went least far."""
        known = [run.reached for run in self._runs if run.reached is not None]
        return min(known, default=None)

    @property
    def goal(self) -> float | None:
        """The farthest goal of any concept."""
        known = [run.goal for run in self._runs if run.goal is not None]
        return max(known, default=None)

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step of every eraser that has not finished; the means of their relative losses."""
        going = [run for run in self._runs if not run.finished]
        losses = [self._losses(run, step) for run in going]
        weights = balance([each.erase for each in losses]).clamp_max(_MOST)
        for run, loss, weight in zip(going, losses, weights, strict=True):
            run.trainable.install()  # rows that are predicted in groups are predicted again for their gradient
            try:
                run.differentiate(run.total(step, loss, weight))
            finally:
                run.trainable.remove()
        seen = []
        with delay_interrupts():
            for run, loss in zip(going, losses, strict=True):
                run.update(step)
                seen.append(run.note(step, loss))
                if run.held_out.wanted(step + 1):
                    run.trainable.install()
                    try:
                        run.measure(step + 1)
                    finally:
                        run.trainable.remove()
            self.taken = step + 1
        return {key: sum(each[key] for each in seen) / len(seen) for key in seen[0]}

    @staticmethod
    def _losses(run: PredictionRun, step: int) -> Losses:
        run.trainable.install()
        try:
            return run.losses(step)
        finally:
            run.trainable.remove()

    def snapshot(self) -> Mapping[str, Increment]:
        """Return the first concept's increments, as they would be saved now."""
        return self._runs[0].snapshot()

    def tensors(self) -> dict[str, Tensor]:
        """All runs' tensors, for checkpoints."""
        return {f"{at}/{key}": value for at, run in enumerate(self._runs) for key, value in run.tensors().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        for at, run in enumerate(self._runs):
            prefix = f"{at}/"
            run.load({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})


def balance(losses: Sequence[Tensor]) -> Tensor:
    """Return eta_i = max_k |L_cor(c_k)| / |L_cor(c_i)| of several concepts, (concepts,), without gradient.

    SRS-ME, Eq. 35.
    """
    sizes = torch.stack([loss.detach().abs() for loss in losses])
    return sizes.max() / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
