"""The loop that trains masks: draws pictures under sampled masks and back-propagates their errors.

Zhang et al., Minimalist Concept Erasure in Generative Models, ICML 2025, arXiv 2507.13386.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spm_hub.io.progress import phase
from spm_hub.training.conditioning import Conditioning
from spm_hub.training.data.sampling import generator_for, initial_sigma, scale_model_input
from spm_hub.training.loop.backprop_through_sampling import Step, back_propagate, sample_latents
from spm_hub.training.loop.checkpoint import restore, tensors_of
from spm_hub.training.loop.interrupts import delay_interrupts
from spm_hub.training.loop.prediction_run import nothing_to_erase
from spm_hub.training.loop.run import Run, Task
from spm_hub.training.trainable.mask import TrainableMask

_DRAWN_AT_ONCE = 8  # pictures, while goals are drawn
_SET, _ORDER, _MASKS = 3, 4, 5  # streams of `generator_for`
_MEMORY = 0.9  # of the running mean of the erase loss, per step


@dataclass(frozen=True)
class PictureSet:
    """The training set, n rows that alternate: a prompt of the concept, one of anything else.

    prompts: n.  concept: (n,) bool.  noise, goals: (n, *latent_shape), the beginning of a picture and its goal.
    distance: the mean MSE between the base's pictures of the concept's prompts and their goals.
    """

    prompts: list[str]
    concept: Tensor
    noise: Tensor
    goals: Tensor
    distance: float


class MaskRun(Run):
    """The state that training changes: the masks' logits and the optimiser."""

    def __init__(self, task: Task) -> None:
        """Mask the groups of the recipe's `masks`. Raises RecipeError for a group that is not there."""
        self.recipe = recipe = task.recipe
        self._base = base = task.base
        self._maker = task.prompts
        self.masks = self.trainable = TrainableMask(base.denoiser, recipe.masks)
        self._scheduler = base.scheduler(recipe.x_t.steps)
        lr = recipe.optimiser.lr
        self._optimiser = torch.optim.AdamW(
            self.masks.parameters(lr, recipe.optimiser.scale_lr), lr=lr, weight_decay=recipe.optimiser.weight_decay
        )
        self._left: float | None = None  # the running mean of the erase loss

    @property
    def reached(self) -> float | None:
        """The share of the distance from the concept's pictures to their goals that is gone."""
        return None if self._left is None else 1 - self._left**0.5

    @cached_property
    def pictures(self) -> PictureSet:
        """Drawn by the frozen base, a function of the recipe alone."""
        recipe, base = self.recipe, self._base
        generator = generator_for(recipe.seed, _SET, 0)
        prompts, wanted = [], []
        for _ in range(recipe.masks.prompts):
            sentence = self._maker.target(generator) if recipe.templates else recipe.target
            other = self._maker.anchor(generator)
            prompts += [sentence, other]
            wanted += [self._maker.without(sentence, recipe.surrogate), other]
        noise = base.noise(len(prompts), generator) * initial_sigma(self._scheduler)
        concept = torch.arange(len(prompts), device=base.device) % 2 == 0
        goals, first = self._drawn(wanted, noise), self._drawn(prompts[::2], noise[::2])
        distance = float((first - goals[::2]).pow(2).mean())
        if distance == 0:
            raise nothing_to_erase(recipe)
        return PictureSet(prompts, concept, noise, goals, distance)

    def _drawn(self, prompts: list[str], noise: Tensor) -> Tensor:
        """Return the latents z_0 that the base draws from `noise`."""
        parts: list[Tensor] = []
        with self.masks.frozen(), phase("drawing pictures to learn from") as move:
            for start in range(0, len(prompts), _DRAWN_AT_ONCE):
                rows = slice(start, start + _DRAWN_AT_ONCE)
                self._base.forget()
                parts.append(sample_latents(self.denoising(prompts[rows]), noise[rows], self.recipe.x_t.steps)[-1])
                move(min(start + _DRAWN_AT_ONCE, len(prompts)), len(prompts))
        return torch.cat(parts)

    def denoising(self, prompts: list[str], masks: int | None = None) -> Step:
        """Return a step of the base's own sampling under the recipe's guidance.

        masks: the number of the first sample of the masks to draw under; None for the base itself.
        """
        base, scheduler, count = self._base, self._scheduler, len(prompts)
        guidance = torch.full((count,), self.recipe.x_t.guidance[0], device=base.device)
        given = base.encode(prompts).under(guidance)
        # Where the prompt alone drives, nothing has to be said of the empty one.
        alone = base.family.distilled or self.recipe.x_t.guidance[0] == 1
        both = given if alone else Conditioning.cat([base.encode([""])[0].expand(count).under(guidance), given])

        def step(index: int, latents: Tensor) -> Tensor:
            if masks is not None:
                self.masks.draw(generator_for(self.recipe.seed, _MASKS, masks + index))
            if hasattr(scheduler, "_step_index"):
                scheduler._step_index = index  # it counts its calls, which come backwards too
            time = scheduler.timesteps[index]
            model_input = scale_model_input(scheduler, latents, time)
            prediction = base.predict(torch.cat([model_input] * (len(both) // count)), time.expand(len(both)), both)
            if not alone:
                prediction = base.guide(prediction[:count], prediction[count:], guidance)
            after: Tensor = scheduler.step(prediction, time, latents).prev_sample
            return after

        return step

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns the losses as shares of the distance the erasure has to go."""
        recipe = self.recipe
        passes, size, steps = recipe.masks.accumulate, recipe.batch_size, recipe.x_t.steps
        pictures = self.pictures
        for group in self._optimiser.param_groups:
            group["lr"] = recipe.optimiser.lr * recipe.learning_rate(step)
        self._optimiser.zero_grad(set_to_none=True)
        erase = keep = 0.0
        for number in range(step * passes, (step + 1) * passes):
            rows = self._rows(number * size, size)
            self._base.forget()
            step_of = self.denoising([pictures.prompts[row] for row in rows], masks=number * steps)
            latents = sample_latents(step_of, pictures.noise[rows], steps)
            drawn = latents[-1].clone().requires_grad_()
            to_erase, to_keep = final_latent_losses(drawn, pictures.goals[rows], pictures.concept[rows])
            loss = (to_erase + recipe.masks.beta * to_keep) / (size * passes * pictures.distance)
            (gradient,) = torch.autograd.grad(loss, drawn)
            back_propagate(step_of, latents, gradient)
            erase, keep = erase + float(to_erase.detach()), keep + float(to_keep.detach())
        (recipe.masks.l0 * self.masks.on()).backward()
        share = 2 / (size * passes * pictures.distance)
        with delay_interrupts():
            self._optimiser.step()
            before = erase * share if self._left is None else self._left
            self._left = _MEMORY * before + (1 - _MEMORY) * erase * share
            self.taken = step + 1
        return {"erase": erase * share, "keep": keep * share, "on": self.masks.kept()}

    def _rows(self, start: int, count: int) -> list[int]:
        """Rows `start` to `start + count` of the set gone through again and again, each time in another order.

        A prompt of the concept and one of anything else still alternate.
        """
        rows: list[int] = []
        whole = len(self.pictures.prompts)
        for position in range(start, start + count):
            generator = generator_for(self.recipe.seed, _ORDER, position // whole)
            order = torch.randperm(whole // 2, generator=generator)
            rows.append(2 * int(order[position % whole // 2]) + position % 2)
        return rows

    def tensors(self) -> dict[str, Tensor]:
        tensors = tensors_of(self.masks, self._optimiser)
        if self._left is not None:
            tensors["left"] = torch.tensor(self._left, dtype=torch.float64)
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        restore(self.masks, self._optimiser, tensors)
        self._left = float(tensors["left"])


def final_latent_losses(drawn: Tensor, goals: Tensor, concept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses `erase` and `keep`, each summed over its rows; the loss is erase + beta * keep.

    drawn z_0, goals: (n, *latent_shape).  concept: (n,) bool, which rows are prompts of the concept.

    erase: MSE(z_0(c), goal); the goal is the base's picture of the same noise without the concept.  keep:
    MSE(z_0(n), z_0*(n)) of the other prompts; z_0* is the base's own picture.
    """
    each = (drawn - goals).pow(2).flatten(1).mean(1)
    return each[concept].sum(), each[~concept].sum()
