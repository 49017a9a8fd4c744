"""Draws x_t from samplings of the model being erased, as SPM's and ESD's papers do."""

from __future__ import annotations

import torch

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


class StudentSource:
    """The paper's x_t: the model being erased samples from noise to a random step.

    It does so under guidance, with the target prompt. The timestep handed to the denoiser is the latent's own (the
    released code's is 33-42 steps noisier).
    """

    def __init__(
        self, base: TeacherModel, recipe: RecipeFields, maker: PromptMaker, anchors: AnchorSource, trainable: Trainable
    ) -> None:
        self._base, self._recipe, self._maker, self._anchors, self._trainable = base, recipe, maker, anchors, trainable

    @torch.no_grad()
    def batch(self, step: int) -> Batch:
        base, recipe = self._base, self._recipe
        generator = generator_for(recipe.seed, 1, step)
        size = recipe.batch_size
        base.forget()
        prompts = tuple(trained_prompt(recipe, self._maker, generator) for _ in range(size))
        guidance = torch.full((size,), recipe.x_t.guidance[0], device=base.device)
        states = base.encode(prompts).under(guidance)
        empty = base.encode([recipe.x_t.unconditional])[0].expand(size).under(guidance)
        neutral_states = base.encode(neutral_prompts(recipe, self._maker, prompts)).under(guidance)
        scheduler = base.scheduler(base.steps(recipe.x_t.steps))
        reached = int(torch.randint(len(scheduler.timesteps), (), generator=generator))
        noise = base.noise(size, generator)
        latents = noise * initial_sigma(scheduler)
        given = states if recipe.x_t.driver == "concept" else neutral_states
        latents = denoise(base, scheduler, reached, latents, empty, given, guidance)
        time = scheduler.timesteps[reached]
        return teacher_batch(
            base, recipe, self._anchors, self._trainable, generator,
            scale_model_input(scheduler, latents, time), time.expand(size), noise, prompts, neutral_states, guidance,
        )  # fmt: skip
