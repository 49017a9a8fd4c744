"""Adds noise to pictures and returns the model's training target: noise, velocity or flow."""

from __future__ import annotations

import torch
from torch import Tensor

from spm_hub.training.base_model import TeacherModel

_STEPS = 999  # with 1000 steps, a schedule with an offset would have a timestep outside its range


class Noising:
    """The noise schedule of a base model; create it while no erasers are attached."""

    def __init__(self, base: TeacherModel) -> None:
        self._device, self._scheduler = base.device, base.scheduler(base.steps(_STEPS))

    def times(self, count: int) -> list[Tensor]:
        """Return `count` evenly spaced timesteps, from little noise to much, without the two ends."""
        every = self._scheduler.timesteps.flip(0)
        places = (torch.arange(count) + 0.5) * len(every) / count
        return [every[int(place)] for place in places]

    def random_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw (count,) of the schedule's timesteps, uniformly at random."""
        every: Tensor = self._scheduler.timesteps
        return every[torch.randint(len(every), (count,), generator=generator).to(every.device)]

    def add_noise(self, pictures: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t at `times` (n,) of x_0 = `pictures` (n, *latent_shape), and the training target.

        The target is the noise n, v = alpha n - sigma x_0, or a flow's n - x_0.
        """
        scheduler, times = self._scheduler, times.to(self._device)
        if not hasattr(scheduler, "alphas_cumprod"):
            return scheduler.scale_noise(pictures, times, noise), noise - pictures
        x_t = scheduler.add_noise(pictures, noise, times.long())
        if scheduler.config.prediction_type == "v_prediction":
            return x_t, scheduler.get_velocity(pictures, noise, times.long())
        return x_t, noise
