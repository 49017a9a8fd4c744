"""Trainable low-rank layers inside a denoiser, added and removed by PEFT."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import Increment, LowRank
from spm_hub.errors import ModelError
from spm_hub.models.architectures import targets, weight_of
from spm_hub.training.trainable.trainable import Trainable, misfit

_NAME = "spmhub_training"


class TrainableLowRank(Trainable):
    """Rank-r layers on every targeted module of a denoiser.

    `up` starts at zero, so that the denoiser is the base before training.
    """

    def __init__(
        self, denoiser: nn.Module, rank: int, generator: torch.Generator, modules: Iterable[str] | None = None
    ) -> None:
        """Add layers to `modules`, by default SPM's targets.

        `down` starts as in SPM: kaiming_uniform(a = sqrt 5), drawn from `generator`.
        """
        if present := getattr(denoiser, "peft_config", None):
            raise ModelError(
                f"the denoiser already has LoRA layers ({', '.join(present)})",
                mend="call pipe.unload_lora_weights() before training",
            )
        self._denoiser = denoiser
        self.paths = tuple(targets(denoiser) if modules is None else modules)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(self.paths), init_lora_weights=True)
        # By PEFT itself: some of diffusers' denoisers (PixArt's) lack the methods it has for adapters.
        with torch.random.fork_rng(devices=[]):  # PEFT draws its own beginning, which is replaced below
            inject_adapter_in_model(config, denoiser, adapter_name=_NAME)
        modules = dict(denoiser.named_modules())
        self.downs: dict[str, nn.Parameter] = {p: weight_of(modules[p].lora_A[_NAME]) for p in self.paths}
        self.ups: dict[str, nn.Parameter] = {p: weight_of(modules[p].lora_B[_NAME]) for p in self.paths}
        with torch.no_grad():
            for down, up in zip(self.downs.values(), self.ups.values(), strict=True):
                bound = 1 / math.sqrt(down[0].numel())
                down.data = (torch.rand(down.shape, generator=generator) * 2 - 1).mul_(bound).to(down.device)
                up.data = torch.zeros(up.shape, device=up.device)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the denoiser is the base again."""
        layers = [module for module in self._denoiser.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer.enable_adapters(enabled=False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(enabled=True)

    def parameters(self, lr: float, scale: bool) -> list[dict[str, Any]]:
        """Return the optimiser's groups; with `scale`, the lr of `down` is proportional to 1 / fan-in."""
        downs = [{"params": [d], "lr": lr * _fan_in_factor(d) if scale else lr} for d in self.downs.values()]
        return [*downs, {"params": list(self.ups.values()), "lr": lr}]

    def increments(self) -> dict[str, LowRank]:
        """Return the increments trained so far, as float32 on the CPU."""
        return {
            path: LowRank(
                self.downs[path].detach().float().cpu().clone(), self.ups[path].detach().float().cpu().clone()
            )
            for path in self.paths
        }

    def deltas(self) -> list[Tensor]:
        """Return the changes of all weights, with gradient; those of convolutions are flattened."""
        return [self.ups[path].flatten(1) @ self.downs[path].flatten(1) for path in self.paths]

    @torch.no_grad()
    def project(self, projector: Tensor) -> None:
        """Multiply every `down` by `projector` (d_text, d_text); the ranks stay."""
        for down in self.downs.values():
            down.copy_(down @ projector.to(down))

    def state(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, for checkpoints."""
        return {f"{path}.{part}": parameter for path in self.paths for part, parameter in self._parts(path)}

    def start_values(self, path: str, increment: Increment, start: Adapter) -> dict[str, Tensor]:
        """Return both factors of a low-rank increment; ranks beyond its own stay zero."""
        if not isinstance(increment, LowRank):
            raise misfit(start, path, f"a {increment.kind} increment", "low_rank ones", "--increment dense")
        down, up = self.downs[path].detach().clone(), self.ups[path].detach().clone()
        rank, shape = increment.rank, (len(up), *down.shape[1:])
        if rank > len(down) or increment.weight_shape != shape:
            has = f"rank {rank} for a weight {increment.weight_shape}"
            raise misfit(start, path, has, f"rank {len(down)} for {shape}", f"--increment lora:{rank}")
        down[:rank] = increment.down.view_as(down[:rank])
        up[:, :rank] = increment.up.view_as(up[:, :rank])
        return {f"{path}.down": down, f"{path}.up": up}

    def _parts(self, path: str) -> tuple[tuple[str, nn.Parameter], ...]:
        return ("down", self.downs[path]), ("up", self.ups[path])

    def remove(self) -> None:
        """Restore the denoiser's own layers."""
        recurse_remove_peft_layers(self._denoiser)
        self._denoiser.__dict__.pop("peft_config", None)


def _fan_in_factor(down: nn.Parameter) -> float:
    """Return 128 / fan-in: Adam moves every entry by about lr, so `down @ x` moves by lr x fan-in."""
    return 128 / down[0].numel()
