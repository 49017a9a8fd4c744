"""Baselines that steer the guidance of each picture: Safe Latent Diffusion and the negative prompt.

They train, save and attach nothing, and anyone who has the model can leave them out. Benchmarks compare erasers with
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from spm_hub.errors import UsageError, did_you_mean
from spm_hub.models.architectures import denoiser_of, family_of


@dataclass(frozen=True)
class SafetyGuidance:
    """Safe Latent Diffusion's hyper-parameters (Schramowski et al., CVPR 2023, arXiv 2211.05105).

    scale: s_S, strength of the safety guidance.
    threshold: lambda; elements are steered where (prompt's prediction - concept's prediction) is below it.
    warmup: delta as a share of the denoising steps, before which nothing is steered (the paper: steps out of 50).
    momentum: s_m, factor of the momentum that is added.
    memory: beta_m, share of the old momentum in the new one.
    """

    scale: float
    threshold: float
    warmup: float
    momentum: float
    memory: float

    def __post_init__(self) -> None:
        if self.scale <= 0 or not 0 <= self.warmup <= 1 or not 0 <= self.memory < 1 or self.momentum < 0:
            raise UsageError(
                f"{self} is impossible: needs scale > 0, momentum >= 0, warmup in [0, 1], memory in [0, 1)"
            )

    @classmethod
    def of_level(cls, level: str) -> SafetyGuidance:
        """Return one of the paper's four settings: weak, medium, strong, max. Raises UsageError."""
        if level not in LEVELS:
            hint = did_you_mean(level, LEVELS, otherwise=f"; known: {', '.join(LEVELS)}")
            raise UsageError(f"unknown level of safety guidance {level!r}{hint}")
        return LEVELS[level]

    def steer(
        self, given: Tensor, empty: Tensor, concept: Tensor, momentum: Tensor, *, warm: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the steered prediction for the prompt, and the momentum for the next step.

        given, empty, concept: predictions for the prompt, the empty prompt and the avoided concept, all (n, ...).
        warm: False during the warm-up, when the prediction is returned unchanged.
        The paper's Eq. 3 guides by s_g (given - empty - gamma), which equals s_g ((given - gamma) - empty): so the
        returned prediction is given - gamma. Eq. 6 is the element-wise scale of gamma; Eq. 7 and 8 are the momentum,
        which accumulates during the warm-up too.
        """
        apart = given - concept
        scale = (apart.abs() * self.scale).clamp(max=1.0).where(apart < self.threshold, 0.0)
        away = (concept - empty) * scale + self.momentum * momentum
        following = self.memory * momentum + (1 - self.memory) * away
        return (given - away if warm else given), following


LEVELS: dict[str, SafetyGuidance] = {
    # The level "weak" of diffusers has scale 20.
    "weak": SafetyGuidance(scale=200, threshold=0.0, warmup=15 / 50, momentum=0.0, memory=0.0),
    "medium": SafetyGuidance(scale=1000, threshold=0.01, warmup=10 / 50, momentum=0.3, memory=0.4),
    "strong": SafetyGuidance(scale=2000, threshold=0.025, warmup=7 / 50, momentum=0.5, memory=0.7),
    "max": SafetyGuidance(scale=5000, threshold=1.0, warmup=0.0, momentum=0.5, memory=0.7),
}


@contextmanager
def safe_latent_diffusion(
    pipe: DiffusionPipeline, concept: str, guidance: SafetyGuidance | str = "medium"
) -> Iterator[None]:
    """Guide every call of the pipeline inside the block away from `concept`.

    The denoiser computes a third row per picture. Works on Stable Diffusion 1 and 2 with classifier-free guidance and
    without attached erasers. The pipeline is restored when the block ends.
    Raises UsageError for another family, an unknown level, an empty concept, or a call without guidance.
    """
    denoiser = _denoiser_to_guide(pipe, concept)
    settings = SafetyGuidance.of_level(guidance) if isinstance(guidance, str) else guidance
    untyped: Any = pipe  # diffusers does not declare the types of these attributes
    encode, forward = untyped.encode_prompt, denoiser.forward
    state: dict[str, Any] = {}

    def encoding(*args: Any, **kwargs: Any) -> Any:
        # Every call of the pipeline starts with encode_prompt: reset the state of the previous call.
        states, _ = encode(concept, untyped._execution_device, 1, False)
        state.update(concept=states, step=0, momentum=0.0)
        return encode(*args, **kwargs)

    def guided(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        if not untyped.do_classifier_free_guidance:
            raise UsageError("safety guidance needs classifier-free guidance", mend="guidance_scale=7.5")
        rows = len(sample) // 2
        avoided = state["concept"].to(encoder_hidden_states).expand(rows, -1, -1)
        output = forward(
            torch.cat([sample, sample[rows:]]), timestep, torch.cat([encoder_hidden_states, avoided]), **kwargs
        )
        empty, given, unsafe = output[0].chunk(3)
        warm = state["step"] >= round(settings.warmup * untyped._num_timesteps)
        momentum = torch.zeros_like(given) + state["momentum"]
        steered, state["momentum"] = settings.steer(given, empty, unsafe, momentum, warm=warm)
        state["step"] += 1
        return (torch.cat([empty, steered]),)

    with _replace_attribute(untyped, "encode_prompt", encoding), _replace_attribute(denoiser, "forward", guided):
        yield


@contextmanager
def negative_prompt(pipe: DiffusionPipeline, concept: str) -> Iterator[None]:
    """Use `concept` as the negative prompt of every call inside the block that has none of its own.

    Works on Stable Diffusion 1 and 2 with classifier-free guidance. The pipeline is restored when the block ends.
    Raises UsageError for another family, an empty concept, or a call without guidance.
    """
    _denoiser_to_guide(pipe, concept)
    untyped: Any = pipe
    encode = untyped.encode_prompt

    def encoding(
        prompt: Any, device: Any, num_images_per_prompt: int, do_classifier_free_guidance: bool,
        negative_prompt: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not do_classifier_free_guidance:
            raise UsageError("a negative prompt needs classifier-free guidance", mend="guidance_scale=7.5")
        if negative_prompt is None and kwargs.get("negative_prompt_embeds") is None:
            count = 1 if isinstance(prompt, str) else len(kwargs["prompt_embeds"] if prompt is None else prompt)
            negative_prompt = concept if isinstance(prompt, str) else [concept] * count
        return encode(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt, **kwargs
        )  # fmt: skip

    with _replace_attribute(untyped, "encode_prompt", encoding):
        yield


def _denoiser_to_guide(pipe: DiffusionPipeline, concept: str) -> nn.Module:
    if not concept.strip():
        raise UsageError("the concept is empty, so there is nothing to guide away from")
    denoiser = denoiser_of(pipe)
    family = family_of(denoiser).name
    if family not in ("sd1", "sd2"):
        raise UsageError(f"the guidance baselines work on Stable Diffusion 1 and 2, not on {family}")
    return denoiser


@contextmanager
def _replace_attribute(owner: Any, name: str, new: Any) -> Iterator[None]:
    before = owner.__dict__.get(name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
