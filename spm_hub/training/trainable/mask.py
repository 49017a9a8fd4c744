"""Trainable masks: one logit for each neuron, which switches the neuron on or off.

During training a neuron may be in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spm_hub.adapters.increments import Mask, spread, without_no_op_masks
from spm_hub.errors import RecipeError
from spm_hub.models.architectures import body_of, family_of
from spm_hub.training.recipe.schema import MaskGroup, Masks
from spm_hub.training.trainable.trainable import Trainable

TEMPERATURE = 0.83
LOW, HIGH = -0.1, 1.1
"""The interval to which the concrete distribution is stretched before it is clamped to [0, 1]."""


@dataclass(frozen=True)
class Place:
    """A row of neurons in a Linear: `width` entries of dimension `dim` for each neuron, out of `total`."""

    path: str
    dim: Literal[0, 1]
    width: int
    total: int


@dataclass(frozen=True)
class Neurons:
    """`count` neurons (or heads), each switched at all of `places` at once."""

    count: int
    places: tuple[Place, ...]


def neurons(denoiser: nn.Module, groups: Sequence[MaskGroup]) -> dict[str, Neurons]:
    """Return the rows of neurons of these groups by their module, in the denoiser's own order.

    ff: values after a feed-forward's activation, columns of its last layer.  attn: heads, columns of to_out and
    to_add_out, in FLUX's single blocks of proj_out.  norm: outputs of norm1_context, rows of its linear (arXiv
    2507.13386).  linear: outputs of every Linear in attention and feed-forwards, as released for U-Nets.
    Raises RecipeError for a group that the denoiser does not have.
    """
    modules = dict(body_of(denoiser).named_modules())
    found: dict[str, Neurons] = {}
    for group in groups:
        of_group = {path: row for path, module in modules.items() if (row := _FINDERS[group](path, module, modules))}
        if not of_group:
            there = [name for name, find in _FINDERS.items() if any(find(p, m, modules) for p, m in modules.items())]
            raise RecipeError(
                f"recipe key masks.groups: {type(body_of(denoiser)).__name__} ({family_of(denoiser).name}) has no "
                f"neurons of group {group!r}",
                mend=f"--set masks.groups=[{', '.join(name for name in there if name != 'linear')}]",
            )
        found |= of_group
    return found


def _feed_forward(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> Neurons | None:
    last = modules.get(f"{path}.net.2")
    if not path.rpartition(".")[2].startswith("ff") or not isinstance(last, nn.Linear):
        return None
    return Neurons(last.in_features, (Place(f"{path}.net.2", 1, 1, last.in_features),))


def _heads(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> Neurons | None:
    queries, count = modules.get(f"{path}.to_q"), getattr(module, "heads", None)
    if not isinstance(queries, nn.Linear) or not isinstance(count, int):
        return None
    outputs = [f"{path}.to_out.0", f"{path}.to_add_out"]
    if outputs[0] not in modules:
        outputs = [f"{path.rpartition('.')[0]}.proj_out"]  # of FLUX's single blocks, which takes the heads first
    places = tuple(
        Place(output, 1, queries.out_features // count, layer.in_features)
        for output in outputs
        if isinstance(layer := modules.get(output), nn.Linear)
    )
    return Neurons(count, places) if places else None


def _norm(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> Neurons | None:
    layer = modules.get(f"{path}.linear")
    if not path.endswith("norm1_context") or not isinstance(layer, nn.Linear):
        return None
    return Neurons(layer.out_features, (Place(f"{path}.linear", 0, 1, layer.out_features),))


def _linear(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> Neurons | None:
    inside = any(part.startswith(("attn", "ff")) for part in path.split("."))
    if not inside or not isinstance(module, nn.Linear):
        return None
    return Neurons(module.out_features, (Place(path, 0, 1, module.out_features),))


_FINDERS: dict[MaskGroup, Callable[[str, nn.Module, Mapping[str, nn.Module]], Neurons | None]] = {
    "ff": _feed_forward,
    "norm": _norm,
    "attn": _heads,
    "linear": _linear,
}


def hard_concrete(logits: Tensor, u: Tensor, epsilon: float = 0.0) -> Tensor:
    """Return a sample (n,) of the mask, in [0, 1], for uniform u (n,) in [0, 1].

    s = clamp(stretch(sigma((log u - log(1 - u) + logits) / 0.83))), stretched to [-0.1, 1.1]: zero and one have
    probability of their own (Louizos et al., arXiv 1712.01312). With `epsilon` the logarithms are of u + epsilon and
    1 - u + epsilon.
    """
    noise = torch.log(u + epsilon) - torch.log(1 - u + epsilon)
    return (torch.sigmoid((noise + logits) / TEMPERATURE) * (HIGH - LOW) + LOW).clamp(0, 1)


def expected_on(logits: Tensor) -> Tensor:
    """Return P(s > 0) of every neuron, (n,); the sum is the mask's expected L0 norm (arXiv 1712.01312)."""
    shift: Tensor = logits.new_tensor(-LOW / HIGH).log() * TEMPERATURE
    return torch.sigmoid(logits - shift)


class TrainableMask(Trainable):
    """Float32 logits, one for each neuron; samples of the mask multiply the neurons' values.

    Hooks do this, and do nothing until a sample is drawn. The denoiser's own parameters do not change.
    """

    def __init__(self, denoiser: nn.Module, recipe: Masks) -> None:
        """Raises RecipeError for a group that the denoiser does not have."""
        self._recipe = recipe
        self._rows = neurons(denoiser, recipe.groups)
        self._logits = {
            name: nn.Parameter(torch.full((row.count,), recipe.init, device=next(denoiser.parameters()).device))
            for name, row in self._rows.items()
        }
        self._factors: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        body = body_of(denoiser)
        for row in self._rows.values():
            for place in row.places:
                self._hooks.append(self._put_on(body.get_submodule(place.path), place))

    def _put_on(self, module: nn.Module, place: Place) -> RemovableHandle:
        def inputs(module: nn.Module, args: tuple[Any, ...]) -> Any:
            factor = self._factors.get(place.path)
            return None if factor is None else (args[0] * factor.to(args[0].dtype), *args[1:])

        def outputs(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
            factor = self._factors.get(place.path)
            return None if factor is None else output * factor.to(output.dtype)

        return module.register_forward_pre_hook(inputs) if place.dim == 1 else module.register_forward_hook(outputs)

    def draw(self, generator: torch.Generator) -> None:
        """Put a sample of the masks in effect; the same generator gives the same sample."""
        for name, row in self._rows.items():
            logits = self._logits[name]
            u = torch.rand(row.count, generator=generator).to(logits.device)
            sample = hard_concrete(logits, u, self._recipe.epsilon)
            for place in row.places:
                self._factors[place.path] = spread(sample, place.width, place.total)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the denoiser is the base again."""
        factors, self._factors = self._factors, {}
        try:
            yield
        finally:
            self._factors = factors

    def on(self) -> Tensor:
        """Return the expected share of neurons that are on: the masks' L0 norm over their number."""
        return torch.cat([expected_on(logits) for logits in self._logits.values()]).mean()

    def kept(self) -> float:
        """Return the share of neurons that stay on when the masks are saved."""
        kept = torch.cat([logits.detach() > 0 for logits in self._logits.values()])
        return float(kept.float().mean())

    def parameters(self, lr: float, scale: bool) -> list[dict[str, Any]]:
        """Return one parameter group for the optimiser; there is no fan-in to scale by."""
        return [{"params": list(self._logits.values()), "lr": lr}]

    def increments(self) -> dict[str, Mask]:
        """Return the masks, which keep neurons with logits above zero; masks that keep all are left out."""
        return without_no_op_masks(
            {
                place.path: Mask(spread(self._logits[name].detach().cpu() > 0, place.width, place.total), place.dim)
                for name, row in self._rows.items()
                for place in row.places
            }
        )

    def state(self) -> dict[str, Tensor]:
        """Return the logits by name, for checkpoints."""
        return dict(self._logits)

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
