"""Trainable full increments: a float32 delta beside every weight and bias of the chosen modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spm_hub.architectures import bias_of, weight_of
from spm_hub.errors import ModelError
from spm_hub.increments import Dense


class DenseInjection:
    """Float32 deltas, zero at first, that the modules add to their weights and biases as they run.

    The deltas are masters: a base in half precision would round most steps of a small learning rate away. They live
    beside the modules, not in them, so that the denoiser's own parameters stay all it has.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """Raises ModelError for a module whose weight is quantised, or that something else has taken over."""
        for path, module in modules.items():
            if not weight_of(module).is_floating_point() or "forward" in module.__dict__:
                raise ModelError(
                    f"{path}: a dense increment cannot be trained on {type(module).__name__}, quantised or offloaded",
                    mend="--increment lora:4, or load the model in float16 on one device",
                )
        self._modules = dict(modules)
        self.paths = tuple(modules)
        self._enabled = True
        self._deltas = {path: _zeros(weight_of(module)) for path, module in modules.items()}
        self._biases = {path: _zeros(bias) for path, module in modules.items() if (bias := bias_of(module)) is not None}
        for path, module in modules.items():
            module.forward = self._running(path, module)

    def _running(self, path: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        delta, delta_bias = self._deltas[path], self._biases.get(path)
        product: Callable[..., Tensor] = module._conv_forward if isinstance(module, nn.Conv2d) else F.linear

        def forward(x: Tensor) -> Tensor:
            weight, bias = weight_of(module), bias_of(module)
            if not self._enabled:
                return product(x, weight, bias)
            return product(
                x, _added(weight, delta), bias if bias is None or delta_bias is None else _added(bias, delta_bias)
            )

        return forward

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the denoiser is the base again."""
        self._enabled = False
        try:
            yield
        finally:
            self._enabled = True

    def groups(self, lr: float, scale: bool) -> list[dict[str, Any]]:
        """Parameters for the optimiser; with `scale`, a weight's lr is proportional to 1 / fan-in."""
        weights = [{"params": [d], "lr": lr * 128 / d[0].numel() if scale else lr} for d in self._deltas.values()]
        return [*weights, {"params": list(self._biases.values()), "lr": lr}] if self._biases else weights

    def increments(self) -> dict[str, Dense]:
        """What has been trained so far, as float32 on the CPU."""
        found: dict[str, Dense] = {}
        for path, delta in self._deltas.items():
            bias = self._biases.get(path)
            found[path] = Dense(
                delta.detach().cpu().clone(), None if bias is None else bias.detach().cpu().clone()
            )  # fmt: skip
        return found

    def state(self) -> dict[str, Tensor]:
        """Named parameters, for checkpoints."""
        return {
            **{f"{path}.delta": delta for path, delta in self._deltas.items()},
            **{f"{path}.delta_bias": delta for path, delta in self._biases.items()},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for key, parameter in self.state().items():
                parameter.copy_(state[key])

    def remove(self) -> None:
        """Gives the modules their own weights and ways back."""
        for module in self._modules.values():
            module.__dict__.pop("forward", None)


def _zeros(like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.zeros(like.shape, device=like.device))


def _added(base: Tensor, delta: Tensor) -> Tensor:
    return (base.float() + delta).to(base.dtype)
