"""Forward diffusion of a picture, and what a perfect denoiser would say of it, for whatever a model predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from spm_hub.training.base_model import BaseModel

_STEPS = 999  # the schedule is taken this fine: a thousandth step of one with an offset lies outside of it


class Noising:
    """The schedule of a base model, learnt from its pipeline while no erasers are attached to it."""

    def __init__(self, base: BaseModel) -> None:
        self._device, self._scheduler = base.device, base.scheduler(base.steps(_STEPS))

    def times(self, count: int) -> list[Tensor]:
        """`count` of the schedule's timesteps, evenly spread, from little noise to much, the ends left out."""
        every = self._scheduler.timesteps.flip(0)
        places = (torch.arange(count) + 0.5) * len(every) / count
        return [every[int(place)] for place in places]

    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) of the schedule's timesteps, each as likely as any other."""
        every: Tensor = self._scheduler.timesteps
        return every[torch.randint(len(every), (count,), generator=generator).to(every.device)]

    def noised(self, pictures: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """x_t of x_0 = `pictures` (n, *latent_shape) at times (n,), and what the model was trained to predict there.

        That is the noise n, v = alpha n - sigma x_0, or a flow's n - x_0.
        """
        scheduler, times = self._scheduler, times.to(self._device)
        if not hasattr(scheduler, "alphas_cumprod"):
            return scheduler.scale_noise(pictures, times, noise), noise - pictures
        x_t = scheduler.add_noise(pictures, noise, times.long())
        if scheduler.config.prediction_type == "v_prediction":
            return x_t, scheduler.get_velocity(pictures, noise, times.long())
        return x_t, noise
