"""Trains PEFT's LoHa, LoKr, VeRA and DoRA layers, and converts them to increments when saved.

Their change of a weight becomes a product of two thin matrices if it is one exactly (VeRA always; LoHa and LoKr if that
is the smaller file), and else the full change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, VeraConfig
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from spm_hub.adapters.increments import Dense, Increment, LowRank
from spm_hub.errors import ModelError, RecipeError
from spm_hub.models.architectures import shape_of, weight_of
from spm_hub.training.trainable.trainable import Trainable

PeftKind = Literal["loha", "lokr", "vera", "dora"]
_NAME = "spmhub_training"
# By the parts of their names: what reads the layer's input, whose learning rate may follow its width.
_READS_INPUT = ("hada_w1_b", "hada_w2_b", "lokr_w2_b", "lora_A")


class TrainablePeft(Trainable):
    """Layers of one of PEFT's kinds on the chosen modules; before training the denoiser is the base."""

    def __init__(
        self, denoiser: nn.Module, kind: PeftKind, rank: int, generator: torch.Generator, modules: Iterable[str]
    ) -> None:
        """PEFT draws the beginning of each kind, from a seed that `generator` gives.

        Raises ModelError for a denoiser that holds other PEFT layers, RecipeError for a module that PEFT has no such
        layer for.
        """
        if present := getattr(denoiser, "peft_config", None):
            raise ModelError(
                f"the denoiser already has LoRA layers ({', '.join(present)})",
                mend="call pipe.unload_lora_weights() before training",
            )
        self._denoiser, self.kind, self.paths = denoiser, kind, tuple(modules)
        by_path = dict(denoiser.named_modules())
        for path in self.paths:
            check_kind(kind, path, by_path[path])
        seed = int(torch.randint(2**31, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # What PEFT's own inject_adapter_in_model does, which it refuses to do for VeRA.
            config = _config(kind, rank, list(self.paths), seed)
            PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](denoiser, config, adapter_name=_NAME)
        by_path = dict(denoiser.named_modules())
        self._layers: dict[str, Any] = {path: by_path[path] for path in self.paths}
        self._parameters = {
            f"{path}.{name}": parameter
            for path, layer in self._layers.items()
            for name, parameter in layer.named_parameters()
            if not name.startswith("base_layer.")
        }
        for parameter in self._parameters.values():
            parameter.data = parameter.data.float()  # masters, whatever the base's dtype
            parameter.requires_grad_(True)
        if kind == "dora":
            self._measure_magnitudes()
        if kind == "vera":
            for shared in (layer := self._layers[self.paths[0]]).vera_A, layer.vera_B:  # one pair for all layers
                shared[_NAME] = shared[_NAME].float()

    def _measure_magnitudes(self) -> None:
        """Compute DoRA's magnitudes, the weights' norms, in float32; PEFT took them in the base's dtype."""
        for layer in self._layers.values():
            weight = dequantize_module_weight(layer.get_base_layer()).float()
            dora = layer.lora_magnitude_vector[_NAME]
            dora.weight.data = dora.get_weight_norm(weight, torch.zeros_like(weight), layer.scaling[_NAME]).detach()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the denoiser is the base again."""
        for layer in self._layers.values():
            layer.enable_adapters(enabled=False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(enabled=True)

    def parameters(self, lr: float, scale: bool) -> list[dict[str, Any]]:
        """Return the optimiser's groups; with `scale`, lr of input-side factors is proportional to 1 / fan-in."""
        groups = []
        for name, parameter in self._parameters.items():
            reads = scale and any(part in name for part in _READS_INPUT)
            groups.append({"params": [parameter], "lr": lr * 128 / parameter[0].numel() if reads else lr})
        return groups

    @torch.no_grad()
    def increments(self) -> dict[str, Increment]:
        """Return float32 increments on the CPU, all low-rank or all dense, whichever is smaller."""
        factors = {path: _FACTORS[self.kind](layer) for path, layer in self._layers.items()}
        thin = [pair for pair in factors.values() if pair is not None]
        numbers = sum(down.numel() + up.numel() for down, up in thin)
        shapes = {path: shape_of(layer.get_base_layer()) for path, layer in self._layers.items()}
        smaller = numbers < sum(math.prod(shape) for shape in shapes.values())
        if len(thin) == len(factors) and (smaller or self.kind == "vera"):
            return {path: _low_rank(*pair, shapes[path]) for path, pair in factors.items() if pair is not None}
        return {path: Dense(self._delta(path).float().cpu().reshape(shapes[path]).clone()) for path in self._layers}

    def project(self, projector: Tensor) -> None:
        """Change nothing: what these kinds learn is projected when it is saved."""

    @torch.no_grad()
    def conversion_error(self, increments: Mapping[str, Increment]) -> tuple[str, float]:
        """Return the kind, and the largest relative error of any module's change against PEFT's own.

        increments: those of `increments()`, maybe rounded since. PEFT's change of a weight is compared, but for DoRA,
        which has none: there it is that of the layer's output on random inputs, the base's own rounding included.
        """
        generator = torch.Generator().manual_seed(0)
        worst = 0.0
        for path, layer in self._layers.items():
            base = layer.get_base_layer()
            delta = increments[path].delta_for(torch.empty(shape_of(base))).double()
            if self.kind == "dora":
                inputs = torch.randn(2, shape_of(base)[1], *[8, 8][: delta.dim() - 2], generator=generator)
                inputs = inputs.to(dequantize_module_weight(base))
                expected = layer(inputs).double() - base(inputs).double()
                found = _output(base, inputs.double(), delta.to(inputs.device))
            else:
                expected = layer.get_delta_weight(_NAME).double().cpu()
                found = delta.reshape(expected.shape)
            if bool(expected.any()):
                worst = max(worst, float((found - expected).norm() / expected.norm()))
        return self.kind, worst

    def _delta(self, path: str) -> Tensor:
        layer = self._layers[path]
        if self.kind != "dora":
            delta: Tensor = layer.get_delta_weight(_NAME)
            return delta
        # W' = m (W + s B A) / ||W + s B A||, the norm over all but the outputs: what DoRA adds is the rest of W'.
        base = dequantize_module_weight(layer.get_base_layer()).double()
        direction = base + layer.get_delta_weight(_NAME).double().reshape(base.shape)
        magnitude = layer.lora_magnitude_vector[_NAME].weight.double().flatten()
        scale = magnitude / direction.flatten(1).norm(dim=1)
        whole: Tensor = direction * scale.view(-1, *[1] * (base.dim() - 1)) - base
        return whole

    def state(self) -> dict[str, Tensor]:
        """Return the parameters by name, for checkpoints."""
        return dict(self._parameters)

    def remove(self) -> None:
        """Restore the denoiser's own layers."""
        recurse_remove_peft_layers(self._denoiser)
        self._denoiser.__dict__.pop("peft_config", None)


def _output(module: nn.Module, inputs: Tensor, weight: Tensor) -> Tensor:
    """Return the module's output for `inputs` with `weight` in place of its own and no bias."""
    if isinstance(module, nn.Conv2d):
        output: Tensor = module._conv_forward(inputs, weight, None)
        return output
    return F.linear(inputs, weight)


def check_kind(kind: PeftKind, path: str, module: nn.Module) -> None:
    """Raise RecipeError for a module for which PEFT has no layer of this kind."""
    linear = isinstance(module, nn.Linear)
    if (kind == "vera" and not linear) or getattr(module, "groups", 1) > 1:
        raise RecipeError(
            f"increment {kind!r}: PEFT has none for {path}, a {type(module).__name__}"
            + ("" if linear or kind == "vera" else " with groups"),
            mend="--set increment.modules=esd-x, or --increment lora:4",
        )
    if kind != "vera":
        # DoRA divides by the weight's norm; LoHa and LoKr give their change the stored weight's shape.
        weight = dequantize_module_weight(module) if kind == "dora" else weight_of(module)
        if tuple(weight.shape) != shape_of(module) or (kind == "dora" and not weight.is_floating_point()):
            raise RecipeError(
                f"increment {kind!r}: PEFT cannot read the weight of {path}, which is quantised and packed",
                mend="--increment lora:4",
            )


def _config(kind: PeftKind, rank: int, modules: list[str], seed: int) -> PeftConfig:
    match kind:
        case "loha":
            return LoHaConfig(r=rank, alpha=rank, target_modules=modules)
        case "lokr":
            return LoKrConfig(r=rank, alpha=rank, target_modules=modules)
        case "vera":
            return VeraConfig(r=rank, target_modules=modules, projection_prng_key=seed)
        case "dora":
            return LoraConfig(r=rank, lora_alpha=rank, target_modules=modules, use_dora=True)


def _low_rank(down: Tensor, up: Tensor, shape: tuple[int, ...]) -> LowRank:
    """Return down (r, in * kernel), up (out, r) as the factors of a Linear or Conv2d of that shape."""
    conv = len(shape) == 4
    down, up = down.float().cpu().contiguous(), up.float().cpu().contiguous()
    return LowRank(down.reshape(len(down), *shape[1:]), up.reshape(*up.shape, *([1, 1] if conv else [])))


def _loha(layer: Any) -> tuple[Tensor, Tensor]:
    """Return (A1 B1) * (A2 B2), element-wise, as one product of rank r^2: pairs of columns and of rows."""
    a1, b1, a2, b2 = (getattr(layer, f"hada_{part}")[_NAME].detach() for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1) * layer.scaling[_NAME]
    return (b1[:, None, :] * b2[None, :, :]).flatten(0, 1), up


def _lokr(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Return w1 (x) (A B) = (w1 (x) A)(1 (x) B), of rank r times w1's columns; None if w2 is not factored."""
    if _NAME not in layer.lokr_w2_a or _NAME in layer.lokr_t2:
        return None
    w1, a, b = (getattr(layer, f"lokr_{part}")[_NAME].detach() for part in ("w1", "w2_a", "w2_b"))
    return torch.kron(torch.eye(w1.shape[1]).to(b), b), torch.kron(w1, a) * layer.scaling[_NAME]


def _vera(layer: Any) -> tuple[Tensor, Tensor]:
    """Return diag(b) B diag(d) A, with A and B cut to the layer's widths."""
    outputs, inputs = shape_of(layer.get_base_layer())
    a, b = layer.vera_A[_NAME][:, :inputs], layer.vera_B[_NAME][:outputs]
    down = layer.vera_lambda_d[_NAME].detach()[:, None] * a.to(layer.vera_lambda_d[_NAME])
    return down, layer.vera_lambda_b[_NAME].detach()[:, None] * b.to(layer.vera_lambda_b[_NAME])


_FACTORS: dict[PeftKind, Callable[[Any], tuple[Tensor, Tensor] | None]] = {
    "loha": _loha,
    "lokr": _lokr,
    "vera": _vera,
    "dora": lambda layer: None,
}
