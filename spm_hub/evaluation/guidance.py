"""Baselines that erase by guidance alone, while a picture is drawn: Safe Latent Diffusion, and the negative prompt.

Nothing is trained, saved or attached, and whoever holds the model leaves them out: they stand in tables beside erasers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from spm_hub.errors import UsageError, nearest
from spm_hub.models.architectures import denoiser_of, family_of


@dataclass(frozen=True)
class SafetyGuidance:
    """Safe Latent Diffusion's hyper-parameters (Schramowski et al., CVPR 2023, arXiv 2211.05105).

    scale: s_S, how hard guidance turns away.  threshold: lambda, how far a latent may be from the concept to be turned.
    warmup: delta as a share of the denoising steps, before which nothing is turned (the paper's steps, of 50).
    momentum: s_m, the share of the momentum that is added.  memory: beta_m, of the momentum itself.
    """

    scale: float
    threshold: float
    warmup: float
    momentum: float
    memory: float

    def __post_init__(self) -> None:
        if self.scale <= 0 or not 0 <= self.warmup <= 1 or not 0 <= self.memory < 1 or self.momentum < 0:
            raise UsageError(f"{self} is impossible: scale > 0, warmup and memory shares, momentum >= 0")

    @classmethod
    def named(cls, level: str) -> SafetyGuidance:
        """One of the paper's four: weak, medium, strong, max. Raises UsageError."""
        if level not in LEVELS:
            close = nearest(level, LEVELS)
            raise UsageError(
                f"unknown level of safety guidance {level!r}; "
                + (f"did you mean {close[0]}?" if close else f"known: {', '.join(LEVELS)}")
            )
        return LEVELS[level]

    def turned(
        self, given: Tensor, empty: Tensor, concept: Tensor, momentum: Tensor, *, warm: bool
    ) -> tuple[Tensor, Tensor]:
        """What guidance is to take for the prompt's prediction at this step, and the momentum for the next.

        given, empty, concept: predictions for the prompt, for no prompt and for what is to be avoided, all (n, ...).
        The paper's Eq. 3, gamma(z, c_p, c_S) leaves the picture by s_g (given - empty - gamma): as much as s_g times
        (given - gamma) - empty. Eq. 6: the element-wise scale of gamma; Eq. 7 and 8: momentum, which also gathers while
        nothing is turned yet.
        """
        apart = given - concept
        scale = (apart.abs() * self.scale).clamp(max=1.0).where(apart < self.threshold, 0.0)
        away = (concept - empty) * scale + self.momentum * momentum
        following = self.memory * momentum + (1 - self.memory) * away
        return (given - away if warm else given), following


LEVELS: dict[str, SafetyGuidance] = {
    # diffusers' own weak one has 20.
    "weak": SafetyGuidance(scale=200, threshold=0.0, warmup=15 / 50, momentum=0.0, memory=0.0),
    "medium": SafetyGuidance(scale=1000, threshold=0.01, warmup=10 / 50, momentum=0.3, memory=0.4),
    "strong": SafetyGuidance(scale=2000, threshold=0.025, warmup=7 / 50, momentum=0.5, memory=0.7),
    "max": SafetyGuidance(scale=5000, threshold=1.0, warmup=0.0, momentum=0.5, memory=0.7),
}


@contextmanager
def safe_latent_diffusion(
    pipe: DiffusionPipeline, concept: str, guidance: SafetyGuidance | str = "medium"
) -> Iterator[None]:
    """Inside, every call of the pipeline is guided away from `concept`, at the cost of a third row in the denoiser.

    For Stable Diffusion 1 and 2 under classifier-free guidance, without erasers attached. The pipeline is left as it
    was. Raises UsageError: for another family, an unknown level, an empty concept, or a call without guidance.
    """
    denoiser = _guidable(pipe, concept)
    settings = SafetyGuidance.named(guidance) if isinstance(guidance, str) else guidance
    handed: Any = pipe  # diffusers leaves what it hands out untyped
    encode, forward = handed.encode_prompt, denoiser.forward
    state: dict[str, Any] = {}

    def encoding(*args: Any, **kwargs: Any) -> Any:
        # Every call of the pipeline begins here: what the last one left is forgotten.
        states, _ = encode(concept, handed._execution_device, 1, False)
        state.update(concept=states, step=0, momentum=0.0)
        return encode(*args, **kwargs)

    def guided(sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        if not handed.do_classifier_free_guidance:
            raise UsageError("safety guidance is a part of classifier-free guidance", mend="guidance_scale=7.5")
        rows = len(sample) // 2
        avoided = state["concept"].to(encoder_hidden_states).expand(rows, -1, -1)
        output = forward(
            torch.cat([sample, sample[rows:]]), timestep, torch.cat([encoder_hidden_states, avoided]), **kwargs
        )
        empty, given, unsafe = output[0].chunk(3)
        warm = state["step"] >= round(settings.warmup * handed._num_timesteps)
        momentum = torch.zeros_like(given) + state["momentum"]
        turned, state["momentum"] = settings.turned(given, empty, unsafe, momentum, warm=warm)
        state["step"] += 1
        return (torch.cat([empty, turned]),)

    with _replaced(handed, "encode_prompt", encoding), _replaced(denoiser, "forward", guided):
        yield


@contextmanager
def negative_prompt(pipe: DiffusionPipeline, concept: str) -> Iterator[None]:
    """Inside, `concept` takes the place of the empty prompt in every call that gives no negative prompt of its own.

    For Stable Diffusion 1 and 2 under classifier-free guidance. The pipeline is left as it was. Raises UsageError: for
    another family, an empty concept, or a call without guidance.
    """
    _guidable(pipe, concept)
    handed: Any = pipe
    encode = handed.encode_prompt

    def encoding(
        prompt: Any, device: Any, num_images_per_prompt: int, do_classifier_free_guidance: bool,
        negative_prompt: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not do_classifier_free_guidance:
            raise UsageError("a negative prompt is a part of classifier-free guidance", mend="guidance_scale=7.5")
        if negative_prompt is None and kwargs.get("negative_prompt_embeds") is None:
            count = 1 if isinstance(prompt, str) else len(kwargs["prompt_embeds"] if prompt is None else prompt)
            negative_prompt = concept if isinstance(prompt, str) else [concept] * count
        return encode(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt, **kwargs
        )  # fmt: skip

    with _replaced(handed, "encode_prompt", encoding):
        yield


def _guidable(pipe: DiffusionPipeline, concept: str) -> nn.Module:
    if not concept.strip():
        raise UsageError("the concept is empty: there is nothing to guide away from")
    denoiser = denoiser_of(pipe)
    family = family_of(denoiser).name
    if family not in ("sd1", "sd2"):
        raise UsageError(f"guidance as a baseline works on Stable Diffusion 1 and 2, not on {family}")
    return denoiser


@contextmanager
def _replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    before = owner.__dict__.get(name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
