"""A DDIM sampler with more noise than DDIM's, or that starts in the middle of the schedule."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from spm_hub.errors import ModelError


class ProbingSampler(DDIMScheduler):  # type: ignore[misc]
    """DDIM (arXiv 2010.02502, Eq. 12) at any eta, with its noise times `variance`.

    x_{t-1} = sqrt(a_{t-1}) x_0 + sqrt(|1 - a_{t-1} - sigma_t^2|) e + variance sigma_t z, with a the cumulated alphas,
    e and x_0 as predicted, sigma_t = eta sigma_t(1), and z standard normal. For eta above 1 the value under the root
    may be negative; the absolute value is that of the authors of noise-based probing (arXiv 2505.17013).
    start: number of steps that are left out at the beginning of the schedule.
    until: number of the step after which drawing stops; None for the last one.
    """

    eta: float
    variance: float
    start: int
    until: int | None

    @classmethod
    def of(cls, own: Any, *, eta: float = 0.0, variance: float = 1.0, start: int = 0, until: int | None = None) -> Self:
        """Make the sampler on the schedule of a pipeline's scheduler. Raises ModelError for flows."""
        if "beta_schedule" not in own.config or str(own.config.get("prediction_type", "")).startswith("flow"):
            raise ModelError(
                f"{type(own).__name__} has no diffusion schedule, so that its noise cannot be changed",
                mend="another attack, or a Stable Diffusion 1, 2 or XL checkpoint",
            )
        made: Self = cls.from_config(own.config, clip_sample=False)
        made.eta, made.variance, made.start, made.until = eta, variance, start, until
        return made

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Set the timesteps as DDIM does, without those before `start` and from `until` on."""
        super().set_timesteps(num_inference_steps, device)
        every: Any = vars(self)["timesteps"]
        self.timesteps = every[self.start : self.until]

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *_: Any,
        generator: Any = None,
        return_dict: bool = True,
        **__: Any,
    ) -> Any:
        """Return x_{t-1} and the predicted x_0, as DDIMScheduler.step does.

        Its arguments eta, use_clipped_model_output and variance_noise are not used.
        """
        clean = super().step(model_output, timestep, sample, eta=0.0).pred_original_sample
        before = int(timestep) - self.config.num_train_timesteps // self.num_inference_steps
        # Numbers of Python, so that a model in half precision does not round them.
        kept = float(self.alphas_cumprod[int(timestep)])
        kept_before = float(self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod)
        noise = (sample - math.sqrt(kept) * clean) / math.sqrt(1 - kept)
        sigma = self.eta * math.sqrt((1 - kept_before) / (1 - kept) * (1 - kept / kept_before))
        result = math.sqrt(kept_before) * clean + math.sqrt(abs(1 - kept_before - sigma**2)) * noise
        if self.eta:
            fresh = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            result = result + self.variance * sigma * torch.as_tensor(fresh)
        return DDIMSchedulerOutput(result, clean) if return_dict else (result, clean)
