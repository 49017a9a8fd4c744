"""R.A.C.E.: erasing not a concept's text states alone, but all within an adversary's reach of them.

Kim et al., R.A.C.E.: Robust Adversarial Concept Erasure for Secure Text-to-Image Diffusion Model, ECCV 2024,
arXiv 2405.16341.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from spm_hub.errors import RecipeError
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.data.batch import Batch
from spm_hub.training.data.sampling import generator_for
from spm_hub.training.recipe.schema import Adversary

_STREAM = 5  # of `generator_for`
_STRIDE = 0.25  # of epsilon, for one sign step


def worst_states(
    states: Tensor, harm: Callable[[Tensor], Tensor], reach: Tensor, steps: int, generator: torch.Generator
) -> Tensor:
    """e(c) + delta*, delta* = argmin of harm over |delta|_inf <= reach, by projected sign descent.

    states: e(c), (n, tokens, d_text).  harm: of n states, (n,).  reach: (n, 1, 1).
    It begins at a random delta; each row stays within its own smallest and largest number.
    """
    lowest, highest = states.amin(dim=(1, 2), keepdim=True), states.amax(dim=(1, 2), keepdim=True)

    def within(moved: Tensor) -> Tensor:
        delta = torch.minimum(torch.maximum(moved - states, -reach), reach)
        return torch.minimum(torch.maximum(states + delta, lowest), highest)

    start = torch.rand(states.shape, generator=generator, dtype=torch.float64) * 2 - 1
    found = within(states + start.to(states) * reach)
    for _ in range(steps):
        found = found.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(harm(found).sum(), found)
        found = within(found.detach() - _STRIDE * reach * gradient.sign())
    return found.detach()


def check_goal(recipe: Adversary, predicts: str) -> None:
    """Raises RecipeError where the adversary is to aim at noise that a model does not predict."""
    if recipe.goal == "noise" and predicts != "epsilon":
        raise RecipeError(
            f"recipe key adversary.goal: 'noise' is for models that predict it; this one predicts {predicts}",
            mend="--set adversary.goal=concept",
        )


class Attacker:
    """The adversary of a running training: harms its batches, whatever objective they go to."""

    def __init__(self, recipe: Adversary, base: TeacherModel, seed: int) -> None:
        """Raises RecipeError where the model does not predict the noise that the adversary is to aim at."""
        check_goal(recipe, str(base.pipe.scheduler.config.get("prediction_type", "a flow")))
        self._recipe, self._base, self._seed = recipe, base, seed

    def attacked(self, batch: Batch, step: int) -> Batch:
        """Return the batch with e(c) + delta* for e(c) in its target rows; the targets stay those of e(c).

        delta* = argmin over |delta|_inf <= epsilon of || n - eps(x_t, e(c) + delta, t) ||^2, or of the 1-norm with norm
        "l1", at the one timestep of each row; n is the initial noise or, with goal "concept", the base's prediction for
        the concept. A row whose trajectory the concept did not lead has the second goal in any case: its noise belongs
        to another picture.
        """
        led = batch.led.view(-1, *[1] * (batch.noise.dim() - 1)) & (self._recipe.goal == "noise")
        goal = torch.where(led, batch.noise, batch.concept)

        def harm(states: Tensor) -> Tensor:
            moved = replace(batch.states, states=states)
            prediction = self._base.predict(batch.latents, batch.times, moved)
            away = goal - prediction
            return (away.abs() if self._recipe.norm == "l1" else away.pow(2)).flatten(1).mean(dim=1)

        states = batch.states.states
        reach = torch.full((len(states), 1, 1), self._recipe.epsilon, dtype=states.dtype, device=states.device)
        if self._recipe.unit == "rms":
            reach = reach * states.pow(2).mean(dim=(1, 2), keepdim=True).sqrt()
        found = worst_states(states, harm, reach, self._recipe.steps, generator_for(self._seed, _STREAM, step))
        return replace(batch, states=replace(batch.states, states=found))


def drift(now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    """Return sum_p mean|p - p_start| over all trained tensors p, by name.

    The regularised variant adds it to the loss.
    """
    return torch.stack([(parameter - start[name]).abs().mean() for name, parameter in now.items()]).sum()
