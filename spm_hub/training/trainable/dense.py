"""Trainable increments of whole weights: float32 deltas of the weights and biases of chosen modules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import Dense, Increment, LowRank
from spm_hub.errors import ModelError
from spm_hub.models.architectures import bias_of, weight_of
from spm_hub.training.trainable.trainable import Trainable, misfit


class TrainableWeights(Trainable):
    """Modules that add a delta to their weight, and to their bias if they have one, as they run.

    The deltas are kept outside the modules, so that the denoiser's own parameters do not change.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """Raises ModelError for a module whose weight is quantised, or whose `forward` was replaced."""
        self._modules = dict(modules)
        self.paths = tuple(modules)
        self._enabled = True
        self.install()

    @abstractmethod
    def delta(self, path: str) -> Tensor:
        """Return the delta of the weight at `path`: float32, of its shape, with gradient."""

    def delta_bias(self, path: str) -> Tensor | None:
        """Return the delta of the bias at `path`; None if it is not trained."""
        return None

    def install(self) -> None:
        """Put the deltas in effect. Raises ModelError as the constructor does."""
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
        """Return the changes of all weights and biases, with gradient."""
        biases = (self.delta_bias(path) for path in self.paths)
        return [*(self.delta(path) for path in self.paths), *(bias for bias in biases if bias is not None)]

    def remove(self) -> None:
        """Restore the modules' own `forward`."""
        for module in self._modules.values():
            module.__dict__.pop("forward", None)


class TrainableDense(TrainableWeights):
    """Full float32 deltas, zero at first, of weights and biases.

    They are masters: a base in half precision would round most small steps away.
    """

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

    def parameters(self, lr: float, scale: bool) -> list[dict[str, Any]]:
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
        """Multiply every delta by `projector` (d_text, d_text), and set the biases to zero."""
        for delta in self._deltas.values():
            delta.copy_(delta @ projector.to(delta))
        for bias in self._biases.values():
            bias.zero_()

    def start_values(self, path: str, increment: Increment, start: Adapter) -> dict[str, Tensor]:
        """Return the delta, and the bias's if there is one, of a dense or a low-rank increment."""
        delta = self._deltas[path]
        if isinstance(increment, LowRank) and increment.weight_shape == tuple(delta.shape):
            return {f"{path}.delta": increment.delta_for(delta.detach().cpu())}
        if not isinstance(increment, Dense) or increment.delta.shape != delta.shape:
            raise misfit(start, path, f"a {increment.kind} increment", f"a dense {tuple(delta.shape)}", None)
        if increment.delta_bias is None:
            return {f"{path}.delta": increment.delta}
        if path not in self._biases:
            raise misfit(start, path, "a change of the bias", "weights only", None)
        return {f"{path}.delta": increment.delta, f"{path}.delta_bias": increment.delta_bias}


def zeros(shape: torch.Size | tuple[int, ...], module: nn.Module) -> nn.Parameter:
    """Return a float32 parameter of zeros on the device of the module's weight."""
    return nn.Parameter(torch.zeros(shape, device=weight_of(module).device))


def _added(base: Tensor, delta: Tensor) -> Tensor:
    return (base.float() + delta).to(base.dtype)
