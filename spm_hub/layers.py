"""The numeric kernel of an attachment: increments in effect on modules, folded into weights or branched beside them.

For a module with weight W and row factors f (gamma times strength, one per eraser) what is computed is

    W' = W * prod_masks(1 - f_i * off_i) + sum_i f_i * dW_i

where the sum runs over low-rank and dense increments (arXiv 2312.16145, Eq. 9: a sum of products). A mask's delta is a
function of W, and masks multiply: a neuron that two erasers switch off is off, not negated.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spm_hub.architectures import bias_of, weight_of
from spm_hub.increments import Dense, Increment, LowRank, Mask


def effective(
    weight: Tensor, bias: Tensor | None, parts: Iterable[tuple[Increment, float]]
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a module under `parts`, pairs of an increment and its factor: new tensors.

    Sums are accumulated in float32 (float64 for float64 weights) and rounded once to the dtype of `weight`. The result
    is a function of `parts` in their order, and the bias is returned as it is where no part changes it.
    """
    accumulator = torch.promote_types(weight.dtype, torch.float32)
    total = weight.detach().to(accumulator, copy=True, memory_format=torch.contiguous_format)
    rows = total.view(total.shape[0], -1)
    bias_total = None if bias is None else bias.detach().to(accumulator, copy=True)
    changes_bias = False
    parts = list(parts)
    for increment, factor in parts:
        if isinstance(increment, Mask):
            scale = _mask_scale(increment, factor).to(total)
            total.mul_(scale.view(_along(increment.dim, total.dim())))
            if increment.dim == 0 and bias_total is not None:
                bias_total.mul_(scale)
                changes_bias = True
    pairs = [(increment, factor) for increment, factor in parts if isinstance(increment, LowRank)]
    if pairs:
        up = torch.cat([increment.up.flatten(1).to(rows) * factor for increment, factor in pairs], dim=1)
        down = torch.cat([increment.down.flatten(1).to(rows) for increment, _ in pairs])
        rows.addmm_(up, down)
    for increment, factor in parts:
        if isinstance(increment, Dense):
            total.add_(increment.delta.to(total).view_as(total), alpha=factor)
            if increment.delta_bias is not None and bias_total is not None:
                bias_total.add_(increment.delta_bias.to(bias_total), alpha=factor)
                changes_bias = True
    if bias is None or bias_total is None or not changes_bias:
        return total.to(weight.dtype), bias
    return total.to(weight.dtype), bias_total.to(bias.dtype)


def foldable(module: nn.Module) -> bool:
    """Whether a sum can be written into this module's weight: it is there, and not quantised."""
    weight = weight_of(module)
    return weight.is_floating_point() and weight.element_size() >= 2 and not weight.is_meta


class Layers:
    """The modules that erasers change, and what is in effect on them; bare at first. Not thread-safe by itself.

    Erasers act in the order of their names, so what is in effect never depends on the order they came in.
    """

    def __init__(self) -> None:
        self._sites: dict[str, _Site] = {}

    def install(self, name: str, modules: Mapping[str, tuple[nn.Module, Increment]]) -> None:
        """Make eraser `name` known on its modules, by path; it takes effect with the next `fold` or `branch`."""
        for path, (module, increment) in modules.items():
            site = self._sites.setdefault(path, _Site(module))
            site.increments = dict(sorted({**site.increments, name: increment}.items()))

    def uninstall(self, name: str) -> None:
        """Take eraser `name` away: its modules are bare afterwards."""
        for path, site in list(self._sites.items()):
            if site.increments.pop(name, None) is not None:
                site.bare()
            if not site.increments:
                del self._sites[path]

    def fold(self, factors: Mapping[str, float], keep_on: torch.device | None = None) -> None:
        """Write W' for one factor per eraser into the modules whose factors changed; originals are kept.

        `keep_on` is the device for the originals, None for that of the weights.
        """
        for site in self._sites.values():
            site.fold(factors, keep_on)

    def branch(self, factors: Mapping[str, Sequence[float]]) -> None:
        """Let each row of the batch have its own factors: one stacked pair of skinny products beside each module."""
        for site in self._sites.values():
            site.branch(factors)

    def bare(self) -> None:
        """Put every module back as it was: weights bit for bit, no hook."""
        for site in self._sites.values():
            site.bare()

    def foldable(self) -> bool:
        """Whether every module can be folded into."""
        return all(foldable(site.module) for site in self._sites.values())


def kept_bytes(modules: Mapping[str, tuple[nn.Module, Iterable[Increment]]]) -> int:
    """Bytes that the originals of these modules take while they are folded into."""
    total = 0
    for module, increments in modules.values():
        total += weight_of(module).nbytes
        bias = bias_of(module)
        if bias is not None and any(_touches_bias(increment) for increment in increments):
            total += bias.nbytes
    return total


class _Site:
    """One module, the increments that target it, and what is in effect on it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.increments: dict[str, Increment] = {}
        self._kept: tuple[Tensor, Tensor | None] | None = None
        self._folded: tuple[tuple[str, float], ...] | None = ()
        self._stack: _Stack | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def fold(self, factors: Mapping[str, float], keep_on: torch.device | None) -> None:
        wanted = tuple((name, factors[name]) for name in self.increments if factors[name] != 0.0)
        if self._hook is None and wanted == self._folded:
            return
        if not wanted:
            self.bare()
            return
        self._unhook()
        self._stack = None
        weight, bias = weight_of(self.module), bias_of(self.module)
        if self._kept is None:
            changed_bias = bias if any(map(_touches_bias, self.increments.values())) else None
            self._kept = _copy(weight, keep_on), None if changed_bias is None else _copy(changed_bias, keep_on)
        kept_weight, kept_bias = (None if kept is None else kept.to(weight.device) for kept in self._kept)
        assert kept_weight is not None
        new_weight, new_bias = effective(
            kept_weight, kept_bias, ((self.increments[name], factor) for name, factor in wanted)
        )
        # Whatever interrupts the writing, nobody takes half of it for either state.
        self._folded = None
        weight.copy_(new_weight)
        if bias is not None and new_bias is not None:
            bias.copy_(new_bias)
        self._folded = wanted

    def branch(self, factors: Mapping[str, Sequence[float]]) -> None:
        self.bare()
        active = [name for name in self.increments if any(factor != 0.0 for factor in factors[name])]
        if not active:
            self._stack = None
            return
        if self._stack is None or self._stack.names != active:
            self._stack = _Stack.of(self.module, {name: self.increments[name] for name in active})
        gammas = torch.tensor([list(factors[name]) for name in active], dtype=torch.float64).T
        self._hook = self.module.register_forward_hook(_RowEffect(self._stack, gammas))

    def bare(self) -> None:
        self._unhook()
        if self._kept is not None:
            self._folded = None
            bias = bias_of(self.module)
            weight_of(self.module).copy_(self._kept[0])
            if bias is not None and self._kept[1] is not None:
                bias.copy_(self._kept[1])
            self._kept = None
        self._folded = ()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


@dataclass(frozen=True, eq=False)
class _Stack:
    """The increments of several erasers on one module, in its dtype and on its device.

    down: (sum of ranks, in[, kh, kw]), up: (out, sum of ranks[, 1, 1]), None without low-rank increments;
    owners: for each rank, each dense increment and each mask the index of its eraser in `names`.
    """

    names: list[str]
    down: Tensor | None
    up: Tensor | None
    rank_owners: list[int]
    dense: list[tuple[int, Dense]]
    masks: list[tuple[int, Mask]]

    @classmethod
    def of(cls, module: nn.Module, increments: Mapping[str, Increment]) -> "_Stack":
        weight = weight_of(module)
        like = weight if foldable(module) else weight.new_empty(0, dtype=torch.get_default_dtype())
        pairs: list[tuple[int, LowRank]] = []
        dense: list[tuple[int, Dense]] = []
        masks: list[tuple[int, Mask]] = []
        for owner, increment in enumerate(increments.values()):
            if isinstance(increment, Mask):
                masks.append((owner, increment.to(device=weight.device)))
            elif isinstance(increment, Dense):
                shaped = Dense(increment.delta.view(weight.shape), increment.delta_bias)
                dense.append((owner, shaped.to(dtype=like.dtype, device=weight.device)))
            elif isinstance(module, nn.Conv2d) and module.groups > 1:
                # A grouped convolution has no skinny form: each group would need its own columns of `up`.
                dense.append((owner, Dense(increment.delta_for(weight)).to(dtype=like.dtype, device=weight.device)))
            else:
                pairs.append((owner, increment))
        down = up = None
        if pairs:
            down = torch.cat([pair.down.to(like).view(pair.rank, *weight.shape[1:]) for _, pair in pairs])
            up = torch.cat([pair.up.flatten(1).to(like) for _, pair in pairs], dim=1)
            up = up.view(*up.shape, *[1] * (weight.dim() - 2))
        rank_owners = [owner for owner, pair in pairs for _ in range(pair.rank)]
        return cls(list(increments), down, up, rank_owners, dense, masks)


class _RowEffect:
    """Forward hook that adds to a module's output what its erasers do to each row of the batch.

    gammas: (rows, erasers of the stack).
    """

    def __init__(self, stack: _Stack, gammas: Tensor) -> None:
        self._stack = stack
        self._gammas = gammas
        self._by_batch: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, stack = args[0], self._stack
        gammas = self._aligned(x)
        channels = 1 if isinstance(module, nn.Conv2d) else x.dim() - 1
        if stack.masks:
            output = self._masked(module, x, output, gammas, channels)
        if stack.down is not None and stack.up is not None:
            inner = _product(module, x, stack.down) * _spread(gammas[:, stack.rank_owners], x.dim(), channels)
            output = output + (
                F.conv2d(inner, stack.up) if isinstance(module, nn.Conv2d) else F.linear(inner, stack.up)
            )
        for owner, dense in stack.dense:
            gamma = gammas[:, owner, None]
            output = output + _product(module, x * _spread(gamma, x.dim(), channels), dense.delta)
            if dense.delta_bias is not None:
                output = output + _spread(gamma * dense.delta_bias, output.dim(), channels)
        return output

    def _masked(self, module: nn.Module, x: Tensor, output: Tensor, gammas: Tensor, channels: int) -> Tensor:
        scales: dict[int, Tensor] = {}
        for owner, mask in self._stack.masks:
            scale = 1 - gammas[:, owner, None] * (~mask.keep).to(gammas)
            scales[mask.dim] = scales[mask.dim] * scale if mask.dim in scales else scale
        if 1 in scales:
            # The columns of a grouped convolution stand for one channel of every group.
            off = (scales[1] - 1).repeat(1, getattr(module, "groups", 1))
            output = output + _product(module, x * _spread(off, x.dim(), channels), weight_of(module))
        if 0 in scales:
            output = output * _spread(scales[0], output.dim(), channels)
        return output

    def _aligned(self, x: Tensor) -> Tensor:
        """Gammas for the rows that this module sees: (len(x), erasers)."""
        key = len(x), x.device, x.dtype
        if key not in self._by_batch:
            rows = len(self._gammas)
            if len(x) % rows == 0:
                # A video model folds its frames into the batch, the frames of a row side by side.
                aligned = self._gammas.repeat_interleave(len(x) // rows, dim=0)
            else:
                # Rows that are shared by the batch serve the one that is erased most: never silently off.
                aligned = self._gammas.amax(dim=0, keepdim=True).expand(len(x), -1)
            self._by_batch[key] = aligned.to(x)
        return self._by_batch[key]


def _product(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What `module` would give with another weight and no bias."""
    if isinstance(module, nn.Conv2d):
        product: Tensor = module._conv_forward(x, weight, None)
        return product
    return F.linear(x, weight)


def _spread(values: Tensor, dims: int, channels: int) -> Tensor:
    """(rows, channels) broadcast against a tensor of `dims` dimensions whose channels are dimension `channels`."""
    shape = [1] * dims
    shape[0], shape[channels] = values.shape
    return values.view(shape)


def _along(dim: int, dims: int) -> list[int]:
    return [-1 if index == dim else 1 for index in range(dims)]


def _mask_scale(mask: Mask, factor: float) -> Tensor:
    """1 where the mask keeps, 1 - factor where it switches off; float64."""
    return 1 - factor * (~mask.keep).double()


def _touches_bias(increment: Increment) -> bool:
    if isinstance(increment, Mask):
        return increment.dim == 0
    return isinstance(increment, Dense) and increment.delta_bias is not None


def _copy(tensor: Tensor, device: torch.device | None) -> Tensor:
    return tensor.detach().to(tensor.device if device is None else device, copy=True)
