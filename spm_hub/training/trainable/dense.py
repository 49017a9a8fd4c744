"""Trainable increments of whole weights: float32 deltas beside the weights and biases of the chosen modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spm_hub.adapters.increments import Dense, LowRank
from spm_hub.errors import ModelError
from spm_hub.models.architectures import bias_of, weight_of


class WeightInjection(ABC):
    """Modules that add a delta to their weights, and to their biases where there is one, as they run.

    They live beside the modules, not in them, so that the denoiser's own parameters stay all it has.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """Raises ModelError for a module whose weight is quantised, or that something else has taken over."""
        self._modules = dict(modules)
        self.paths = tuple(modules)
        self._enabled = True
        self.install()

    @abstractmethod
    def delta(self, path: str) -> Tensor:
        """Float32, shaped like the weight at `path`; with gradient."""

    def delta_bias(self, path: str) -> Tensor | None:
        """The same of the bias; None where it is not trained."""
        return None

    @abstractmethod
    def groups(self, lr: float, scale: bool) -> list[dict[str, Any]]:
        """Parameters for the optimiser; with `scale`, a weight's lr is proportional to 1 / fan-in."""

    @abstractmethod
    def increments(self) -> dict[str, Dense] | dict[str, LowRank]:
        """What has been trained so far, as float32 on the CPU."""

    @abstractmethod
    def state(self) -> dict[str, nn.Parameter]:
        """Named parameters, for checkpoints."""

    def install(self) -> None:
        """Puts the deltas in effect. Raises ModelError as the constructor does."""
        for path, module in self._modules.items():
            if not weight_of(module).is_floating_point() or "forward" in module.__dict__:
                raise ModelError(
                    f"{path}: a dense increment cannot be trained on {type(module).__name__}, quantised or offloaded",
                    mend="--increment lora:4, or load the model in float16 on one device",
                )
        for path, module in self._modules.items():
            module.forward = self._running(path, module)

    def _running(self, path: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        product: Callable[..., Tensor] = module._conv_forward if isinstance(module, nn.Conv2d) else F.linear

        def forward(x: Tensor) -> Tensor:
            weight, bias = weight_of(module), bias_of(module)
            if not self._enabled:
                return product(x, weight, bias)
            delta_bias = self.delta_bias(path)
            return product(
                x,
                _added(weight, self.delta(path)),
                bias if bias is None or delta_bias is None else _added(bias, delta_bias),
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

    def deltas(self) -> list[Tensor]:
        """The changes of all weights and biases, with gradient."""
        biases = (self.delta_bias(path) for path in self.paths)
        return [*(self.delta(path) for path in self.paths), *(bias for bias in biases if bias is not None)]

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for key, parameter in self.state().items():
                parameter.copy_(state[key])

    def remove(self) -> None:
        """Gives the modules their own weights and ways back."""
        for module in self._modules.values():
            module.__dict__.pop("forward", None)


class DenseInjection(WeightInjection):
    """Full deltas, zero at first. They are masters: a base in half precision would round most small steps away."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._deltas = {path: zeros(weight_of(module).shape, module) for path, module in modules.items()}
        self._biases = {
            path: zeros(bias.shape, module) for path, module in modules.items() if (bias := bias_of(module)) is not None
        }
        super().__init__(modules)

    def delta(self, path: str) -> Tensor:
        return self._deltas[path]

    def delta_bias(self, path: str) -> Tensor | None:
        return self._biases.get(path)

    def groups(self, lr: float, scale: bool) -> list[dict[str, Any]]:
        weights = [{"params": [d], "lr": lr * 128 / d[0].numel() if scale else lr} for d in self._deltas.values()]
        return [*weights, {"params": list(self._biases.values()), "lr": lr}] if self._biases else weights

    def increments(self) -> dict[str, Dense]:
        found: dict[str, Dense] = {}
        for path, delta in self._deltas.items():
            bias = self._biases.get(path)
            found[path] = Dense(
                delta.detach().cpu().clone(), None if bias is None else bias.detach().cpu().clone()
            )  # fmt: skip
        return found

    def state(self) -> dict[str, nn.Parameter]:
        return {
            **{f"{path}.delta": delta for path, delta in self._deltas.items()},
            **{f"{path}.delta_bias": delta for path, delta in self._biases.items()},
        }

    @torch.no_grad()
    def project(self, projector: Tensor) -> None:
        """Takes out of every delta what `projector` (d_text, d_text) takes out of the states; biases go to zero."""
        for delta in self._deltas.values():
            delta.copy_(delta @ projector.to(delta))
        for bias in self._biases.values():
            bias.zero_()


def zeros(shape: torch.Size | tuple[int, ...], module: nn.Module) -> nn.Parameter:
    """A float32 parameter where the module's weight is."""
    return nn.Parameter(torch.zeros(shape, device=weight_of(module).device))


def _added(base: Tensor, delta: Tensor) -> Tensor:
    return (base.float() + delta).to(base.dtype)
