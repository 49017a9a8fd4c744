"""The numeric kernel of an attachment: increments in effect on modules, folded into weights or branched beside them.

For a module with weight W and row factors f (gamma times strength, one per eraser) what is computed is

    W' = W * prod_masks(1 - f_i * off_i) + sum_i f_i * dW_i

where the sum runs over low-rank and dense increments (arXiv 2312.16145, Eq. 9: a sum of products). A mask's delta is a
function of W, and masks multiply: a neuron that two erasers switch off is off, not negated.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from spm_hub.adapters.folding import Parts, effective_bias, fill
from spm_hub.adapters.increments import Increment
from spm_hub.attachment.branch import Stack, put_beside, take_away
from spm_hub.models.architectures import bias_of, weight_of


def foldable(module: nn.Module) -> bool:
    """Whether a sum can be written into this module's weight: it is there, and not quantised."""
    weight = weight_of(module)
    # Of torchao and quanto a quantised weight calls itself a float32 one, and loses what is copied into it.
    plain = type(weight) is nn.Parameter and not weight.is_meta
    return plain and weight.is_floating_point() and weight.element_size() >= 2


def offloaded_in_groups(denoiser: nn.Module) -> bool:
    """Whether diffusers' group offloading looks after the weights: whatever is written into them it may throw away."""
    registries = (getattr(module, "_diffusers_hook", None) for module in denoiser.modules())
    return any("group_offloading" in registry.hooks for registry in registries if registry is not None)


def kept_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes that the originals of these modules' weights take while they are folded into."""
    return sum(weight_of(module).nbytes for module in modules)


class Layers:
    """The modules that erasers change, and what is in effect on them; bare at first. Not thread-safe by itself.

    Erasers act in the order of their names, so what is in effect never depends on the order they came in.
    """

    def __init__(self) -> None:
        self._sites: dict[str, _Site] = {}
        self._increments: dict[str, Mapping[str, Increment]] = {}
        self._touched = False

    def install(self, name: str, modules: Mapping[str, nn.Module], increments: Mapping[str, Increment]) -> None:
        """Make eraser `name` known on its modules, by path; it takes effect with the next `fold` or `branch`.

        `increments` has the same paths; one is read only when the eraser's factor is not zero.
        """
        self._increments[name] = increments
        for path, module in modules.items():
            self._sites.setdefault(path, _Site(module)).users.add(name)

    def uninstall(self, name: str) -> None:
        """Take eraser `name` away: its modules are bare afterwards."""
        del self._increments[name]
        for path, site in list(self._sites.items()):
            if name in site.users:
                site.users.remove(name)
                site.forget()
                if not site.users:
                    del self._sites[path]

    @property
    def modules(self) -> list[nn.Module]:
        """Every module that an eraser changes."""
        return [site.module for site in self._sites.values()]

    def fold(self, factors: Mapping[str, float], keep_on: torch.device | None = None) -> None:
        """Write W' for one factor per eraser into the modules whose factors changed; originals are kept.

        `keep_on` is the device for the originals, None for where they are: then W' takes new memory, and the originals
        are not touched at all.
        """
        self._touched = True
        active = [(name, factor) for name, factor in sorted(factors.items()) if factor != 0.0]
        for path, site in self._sites.items():
            wanted = tuple((name, factor) for name, factor in active if name in site.users)
            site.fold(wanted, self._reader(path), keep_on)

    def branch(self, factors: Mapping[str, Sequence[float]]) -> None:
        """Let each row of the batch have its own factors: one stacked pair of skinny products beside each module."""
        self._touched = True
        active = [name for name, each in sorted(factors.items()) if any(factor != 0.0 for factor in each)]
        columns = torch.tensor([list(factors[name]) for name in active], dtype=torch.float64)
        for path, site in self._sites.items():
            used = [column for column, name in enumerate(active) if name in site.users]
            site.branch([active[column] for column in used], columns[used].mT if used else columns, self._reader(path))

    def bare(self) -> None:
        """Put every module back as it was: its own class, weights bit for bit."""
        if self._touched:
            for site in self._sites.values():
                site.bare()
        self._touched = False

    def _reader(self, path: str) -> "_Reader":
        return lambda name: self._increments[name][path]


_Reader = Callable[[str], Increment]


class _Site:
    """One module, the names of the erasers that change it, and what is in effect on it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.users: set[str] = set()
        self._kept: Tensor | None = None
        self._kept_bias: Tensor | None = None
        self._written: Tensor | None = None
        self._written_bias: Tensor | None = None
        self._folded: tuple[tuple[str, float], ...] | None = ()
        self._stack: Stack | None = None

    def fold(self, wanted: tuple[tuple[str, float], ...], read: _Reader, keep_on: torch.device | None) -> None:
        if wanted == self._folded:
            return
        if not wanted:
            self.bare()
            return
        take_away(self.module)
        self._stack = None
        parts = [(read(name), factor) for name, factor in wanted]
        weight = weight_of(self.module)
        # Whatever interrupts the writing, nobody takes half of it for either state.
        self._folded = None
        if self._written is not None and not _lies_in(weight, self._written):
            # The module was moved or cast by itself.
            self.bare()
            self._folded = None
        if self._kept is None:
            self._kept = weight.data if keep_on is None else weight.data.to(keep_on, copy=True)
            self._written = torch.empty_like(weight.data) if keep_on is None else None
        target = weight.data if self._written is None else self._written
        fill(target, self._kept.to(weight.device), parts)
        weight.data = target
        self._fold_bias(parts)
        self._folded = wanted

    def _fold_bias(self, parts: Parts) -> None:
        bias = bias_of(self.module)
        if bias is None:
            return
        original = bias.data if self._kept_bias is None else self._kept_bias.to(bias.device)
        new = effective_bias(original, parts)
        if new is not original:
            self._kept_bias = original
        bias.data = self._written_bias = new

    def branch(self, names: list[str], gammas: Tensor, read: _Reader) -> None:
        self.bare()
        if not names:
            return
        if self._stack is None or self._stack.names != names:
            self._stack = Stack.of(self.module, names, read)
        put_beside(self.module, self._stack, gammas)
        self._folded = None

    def forget(self) -> None:
        """Bare, and nothing is kept of an eraser that another may come under the name of."""
        self.bare()
        self._stack = None

    def bare(self) -> None:
        take_away(self.module)
        self._folded = None
        if self._kept is not None:
            _put_back(weight_of(self.module), self._kept, self._written)
            self._kept = self._written = None
        bias = bias_of(self.module)
        if bias is not None and self._kept_bias is not None:
            _put_back(bias, self._kept_bias, self._written_bias)
        self._kept_bias = self._written_bias = None
        self._folded = ()


def _put_back(parameter: nn.Parameter, kept: Tensor, written: Tensor | None) -> None:
    """The original itself, untouched all along; where the parameter was moved since, its numbers."""
    if written is not None and _lies_in(parameter, written) and parameter.device == kept.device:
        parameter.data = kept
    else:
        parameter.data.copy_(kept)


def _lies_in(parameter: nn.Parameter, written: Tensor) -> bool:
    return parameter.device == written.device and parameter.data_ptr() == written.data_ptr()
