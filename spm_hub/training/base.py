"""The base model as training sees it: prompts to text states, noisy latents to the denoiser's raw prediction.

Losses compare raw predictions (noise, v or velocity, whatever the model was trained to give), so nothing here depends
on which.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from spm_hub.architectures import denoiser_of


class BaseModel:
    """A pipeline's text encoder, denoiser and schedule; the denoiser may carry trainable increments."""

    def __init__(self, pipe: DiffusionPipeline, resolution: int | None = None) -> None:
        # diffusers leaves what it hands out untyped.
        self.pipe: Any = pipe
        self.denoiser: nn.Module = denoiser_of(pipe)
        config: Any = self.denoiser.config
        parameter = next(self.denoiser.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        side = int(config.sample_size) if resolution is None else resolution // int(self.pipe.vae_scale_factor)
        self.latent_shape = (int(config.in_channels), side, side)
        self._states: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text states (n, tokens, d_text), as the pipeline's own `encode_prompt` gives them."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._states]
        for start in range(0, len(missing), 64):
            part = missing[start : start + 64]
            states = self.pipe.encode_prompt(
                prompt=list(part), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )[0]
            self._states.update(zip(part, states, strict=True))
        return torch.stack([self._states[prompt] for prompt in prompts])

    def forget(self) -> None:
        """Drops cached text states; a long training draws new prompts for ever."""
        self._states.clear()

    def scheduler(self, steps: int) -> Any:
        """A fresh scheduler set to `steps`.

        It is DDIM on the model's own noise schedule, as DDIM has no memory between steps.
        """
        own = self.pipe.scheduler
        scheduler = DDIMScheduler.from_config(own.config) if "beta_schedule" in own.config else copy.deepcopy(own)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Standard normal latents (count, channels, height, width).

        They are drawn on the CPU, so that a seed means the same anywhere.
        """
        return torch.randn((count, *self.latent_shape), generator=generator).to(self.device)

    def predict(self, latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
        """The denoiser's raw prediction for latents (n, c, h, w), times (n,), states (n, tokens, d); float32."""
        output = self.denoiser(latents.to(self.dtype), times, encoder_hidden_states=states.to(self.dtype))
        prediction: Tensor = output.sample.float()
        return prediction
