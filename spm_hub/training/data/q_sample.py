"""Makes x_t by adding noise to pictures of the concept: q(x_t | x_0) with t uniform.

SepME, arXiv 2402.05947.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spm_hub.io.progress import phase
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.batch import Batch
from spm_hub.training.data.prompts import PromptMaker
from spm_hub.training.data.sampling import (
    denoise,
    generator_for,
    initial_sigma,
    neutral_prompts,
    scale_model_input,
    teacher_batch,
    trained_prompt,
)
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.trainable.trainable import Trainable

_TIMES = 999
"""Steps of the schedule that t is drawn from: as fine as the thousand that models are trained on."""


class QSampleSource:
    """Adds noise of random times to pictures that the base draws of the concept, and predicts there.

    x_0 is the latent that a picture is decoded from. SepME encodes the decoded picture again, which adds the
    autoencoder's error and nothing else. Each picture keeps the prompt that it was drawn for.
    """

    def __init__(
        self, base: TeacherModel, recipe: RecipeFields, maker: PromptMaker, anchors: AnchorSource, trainable: Trainable
    ) -> None:
        self._base, self._recipe, self._maker, self._anchors, self._trainable = base, recipe, maker, anchors, trainable
        self._scheduler = base.scheduler(base.steps(_TIMES))
        self._drawn: tuple[int, tuple[str, ...], Tensor] | None = None

    @torch.no_grad()
    def pictures(self, index: int) -> tuple[tuple[str, ...], Tensor]:
        """The index-th group of pictures: their prompts, and their latents (count, *latent_shape)."""
        if self._drawn is None or self._drawn[0] != index:
            base, recipe, source = self._base, self._recipe, self._recipe.x_t
            base.forget()  # a resumed run encodes these prompts in one batch, as the undisturbed one has to
            generator = generator_for(recipe.seed, 0, index)
            count = source.trajectories
            prompts = tuple(trained_prompt(recipe, self._maker, generator) for _ in range(count))
            picks = torch.randint(len(source.guidance), (count,), generator=generator)
            guidance = torch.tensor(source.guidance)[picks].to(base.device)
            drawn = prompts if source.driver == "concept" else neutral_prompts(recipe, self._maker, prompts)
            given = base.encode(drawn).under(guidance)
            empty = base.encode([source.unconditional])[0].expand(count).under(guidance)
            scheduler = base.scheduler(base.steps(source.steps))
            latents = base.noise(count, generator) * initial_sigma(scheduler)
            with self._trainable.frozen(), phase("drawing pictures to learn from") as move:
                latents = denoise(base, scheduler, len(scheduler.timesteps), latents, empty, given, guidance, move)
            self._drawn = index, prompts, latents
        return self._drawn[1:]

    @torch.no_grad()
    def batch(self, step: int) -> Batch:
        """Return the rows of training step `step`.

        They are a function of the recipe and `step` alone, so that a resumed run goes on exactly.
        """
        base, recipe = self._base, self._recipe
        index = step // -(-recipe.steps // min(recipe.x_t.chunks, recipe.steps))
        drawn_for, pictures = self.pictures(index)
        generator = generator_for(recipe.seed, 1, step)
        size = recipe.batch_size
        base.forget()
        rows = torch.randint(len(pictures), (size,), generator=generator)
        moments = torch.randint(len(self._scheduler.timesteps), (size,), generator=generator)
        noise = base.noise(size, generator)
        chosen = pictures[rows.to(pictures.device)]
        latents, times = add_noise(self._scheduler, chosen, noise, moments)
        prompts = tuple(drawn_for[row] for row in rows.tolist())
        guidance = torch.full((size,), recipe.x_t.guidance[0], device=base.device)
        neutral_states = base.encode(neutral_prompts(recipe, self._maker, prompts)).under(guidance)
        batch = teacher_batch(
            base, recipe, self._anchors, self._trainable, generator,
            latents, times, noise, prompts, neutral_states, guidance,
        )  # fmt: skip
        return replace(batch, truth=true_prediction(self._scheduler, chosen, noise, times))


def add_noise(scheduler: Any, pictures: Tensor, noise: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return q(x_t | x_0), scaled for the denoiser, and the times (n,).

    moments: (n,), indices into the scheduler's timesteps.
    Diffusion: sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; a flow: (1 - sigma_t) x_0 + sigma_t noise.
    """
    times = scheduler.timesteps.to(pictures.device)[moments.to(pictures.device)]
    if not hasattr(scheduler, "alphas_cumprod"):
        sigma = scheduler.sigmas[moments].to(pictures).view(-1, *[1] * (pictures.dim() - 1))
        return (1 - sigma) * pictures + sigma * noise, times
    latents = scheduler.add_noise(pictures, noise, times)
    return scale_model_input(scheduler, latents, times), times


def true_prediction(scheduler: Any, pictures: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return what a denoiser is trained to predict for pictures x_0 with noise.

    That is the noise itself; with "v_prediction" sqrt(abar_t) noise - sqrt(1 - abar_t) x_0, with "sample" x_0; of a
    flow, noise - x_0.  times: (n,), as of `add_noise`.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        return noise - pictures
    match scheduler.config.get("prediction_type", "epsilon"):
        case "v_prediction":
            kept = scheduler.alphas_cumprod.to(pictures)[times.long()].view(-1, *[1] * (pictures.dim() - 1))
            velocity: Tensor = kept.sqrt() * noise - (1 - kept).sqrt() * pictures
            return velocity
        case "sample":
            return pictures
        case _:
            return noise
