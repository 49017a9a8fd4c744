"""Samples under guidance, picks prompts for a batch, and predicts with the frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spm_hub.io.progress import ProgressCallback, no_progress
from spm_hub.training.conditioning import Conditioning
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.batch import Batch
from spm_hub.training.data.prompts import PromptMaker
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.trainable.trainable import Trainable

if TYPE_CHECKING:  # programs that make erasers of text states have no diffusers
    from spm_hub.training.base_model import TeacherModel


def generator_for(seed: int, stream: int, index: int) -> torch.Generator:
    """Return an independent generator for the index-th use of a stream.

    A resumed run therefore needs no saved random state.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + index) * 7 + stream)


def trained_prompt(recipe: RecipeFields, maker: PromptMaker, generator: torch.Generator) -> str:
    """Return a prompt for the student: a sentence of the concept, its bare name, or `erase_from`."""
    if recipe.erase_from is not None:
        return recipe.erase_from
    if recipe.adversary.keywords:
        return maker.names[int(torch.randint(len(maker.names), (), generator=generator))]
    return maker.target(generator) if recipe.templates else recipe.target


def neutral_prompts(recipe: RecipeFields, maker: PromptMaker, prompts: Sequence[str]) -> list[str]:
    """Return, for each prompt that is trained on, the prompt without the concept."""
    return [
        maker.without(prompt, recipe.surrogate) if recipe.objective.paired else recipe.surrogate for prompt in prompts
    ]


def less_concept(whole: Tensor, concept: Tensor, neutral: Tensor) -> Tensor:
    """Return the prediction of a prompt less its concept: eps*(Y) - (eps*(X) - eps*(c0)).

    In place of eps*(c0) it turns any objective's target into that of "erase X from Y", eps*(Y) - eta (eps*(X) -
    eps*(c0)) in ESD's newer convention.
    """
    return whole - (concept - neutral)


def initial_sigma(scheduler: Any) -> float:
    """Return the standard deviation of the first noise; flow schedulers do not state theirs, which is 1."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def scale_model_input(scheduler: Any, latents: Tensor, time: Tensor) -> Tensor:
    """Return the latents, scaled for the denoiser at `time`."""
    if not hasattr(scheduler, "scale_model_input"):
        return latents
    model_input: Tensor = scheduler.scale_model_input(latents, time)
    return model_input


def denoise(
    base: TeacherModel,
    scheduler: Any,
    steps: int,
    latents: Tensor,
    empty: Conditioning,
    given: Conditioning,
    guidance: Tensor,
    progress: ProgressCallback = no_progress,
) -> Tensor:
    """Return latents (n, *latent_shape) after the first `steps` steps, under guidance (n,)."""
    both = Conditioning.cat([empty, given])
    for done, time in enumerate(scheduler.timesteps[:steps], start=1):
        model_input = torch.cat([scale_model_input(scheduler, latents, time)] * 2)
        without, guided = base.predict(model_input, time.expand(len(model_input)), both).chunk(2)
        latents = scheduler.step(base.guide(without, guided, guidance), time, latents).prev_sample
        progress(done, steps)
    return latents


def teacher_batch(
    base: TeacherModel,
    recipe: RecipeFields,
    anchors: AnchorSource,
    trainable: Trainable,
    generator: torch.Generator,
    latents: Tensor,
    times: Tensor,
    noise: Tensor,
    prompts: tuple[str, ...],
    neutral_states: Conditioning,
    guidance: Tensor,
) -> Batch:
    """Return a batch at these latents (n, *latent_shape) and times (n,), with newly drawn anchors.

    The frozen base predicts for all of its rows.
    """
    size, per = len(latents), recipe.anchoring.per_target if recipe.anchoring.weight > 0 else 0
    led = (guidance > 0) & (recipe.x_t.driver == "concept")
    if recipe.x_t.guidance_embedding is not None:
        guidance = torch.full_like(guidance, recipe.x_t.guidance_embedding)
    neutral_states = neutral_states.under(guidance)
    states = base.encode(prompts).under(guidance)
    if recipe.anchoring.source == "surrogate" and per:
        # Concept Ablation's prior: the picture's own sentence, with the surrogate in the concept's place.
        anchor_states = neutral_states[torch.arange(size).repeat_interleave(per).to(base.device)]
    else:
        anchor_states = anchors.draw(size * per, generator) if per else states[:0]
    anchor_states = anchor_states.under(guidance.repeat_interleave(per))
    anchor_latents, anchor_times = latents.repeat_interleave(per, dim=0), times.repeat_interleave(per)
    teacher = [states, neutral_states]
    # The target of `erase_from`, or the prompt to push away from; a recipe has one of them at most.
    further = recipe.objective.positive if recipe.erase_from is None else recipe.target
    if further is not None:
        teacher.append(base.encode([further])[0].expand(size).under(guidance))
    every = Conditioning.cat([*teacher, anchor_states])
    inputs = torch.cat([*[latents] * len(teacher), anchor_latents])
    with trainable.frozen():
        concept, neutral, *rest, kept = base.predict(
            inputs, torch.cat([*[times] * len(teacher), anchor_times]), every
        ).split([*[size] * len(teacher), size * per])
    if recipe.erase_from is not None:
        neutral = less_concept(concept, rest[0], neutral)
    return Batch(
        latents, times, noise, led, prompts, states, neutral_states, concept, neutral,
        anchor_latents, anchor_times, anchor_states, kept,
        positive=rest[0] if recipe.objective.positive is not None else None,
    )  # fmt: skip
