"""Applies increments to modules: folded into the weights, or branched next to them.

A module with weight W and factors f (gamma times strength, one per eraser) computes with

    W' = W * prod_masks(1 - f_i * off_i) + sum_i f_i * dW_i

where the sum runs over low-rank and dense increments (arXiv 2312.16145, Eq. 9: a sum of products). The delta of a mask
depends on W, so masks multiply: a neuron that two erasers switch off is off, not negated.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from spm_hub.adapters.folding import Parts, effective_bias, fill
from spm_hub.adapters.increments import Increment
from spm_hub.attachment.branch import Stack, install, remove
from spm_hub.models.architectures import bias_of, weight_of


def foldable(module: nn.Module) -> bool:
    """Return whether folding can write into this module's weight: it is in memory and not quantised."""
    weight = weight_of(module)
    # A quantised weight of torchao or quanto reports float32, and loses precision when it is copied into.
    plain = type(weight) is nn.Parameter and not weight.is_meta
    return plain and weight.is_floating_point() and weight.element_size() >= 2


def offloaded_in_groups(denoiser: nn.Module) -> bool:
    """Return whether diffusers' group offloading manages the weights: it may discard changes to them."""
    registries = (getattr(module, "_diffusers_hook", None) for module in denoiser.modules())
    return any("group_offloading" in registry.hooks for registry in registries if registry is not None)


def kept_bytes(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of these modules' original weights, which folding keeps."""
    return sum(weight_of(module).nbytes for module in modules)


class Layers:
    """The modules that erasers change, and the factors that are in effect on them: none at first.

    Erasers act in the order of their names, so the result never depends on the order in which they were installed. Not
    thread-safe by itself.
    """

    def __init__(self) -> None:
        self._modules: dict[str, _ModuleState] = {}
        self._increments: dict[str, Mapping[str, Increment]] = {}
        self._touched = False

    def install(self, name: str, modules: Mapping[str, nn.Module], increments: Mapping[str, Increment]) -> None:
        """Register eraser `name` on its modules, by path; it acts from the next `fold` or `branch` on.

        `increments` has the same paths; one is read only when the eraser's factor is not zero.
        """
        self._increments[name] = increments
        for path, module in modules.items():
            self._modules.setdefault(path, _ModuleState(module)).users.add(name)

    def uninstall(self, name: str) -> None:
        """Remove eraser `name` and restore its modules."""
        del self._increments[name]
        for path, state in list(self._modules.items()):
            if name in state.users:
                state.users.remove(name)
                state.forget()
                if not state.users:
                    del self._modules[path]

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that an eraser changes."""
        return [state.module for state in self._modules.values()]

    def fold(self, factors: Mapping[str, float], keep_on: torch.device | None = None) -> None:
        """Write W' for one factor per eraser into the modules whose factors changed; keep the originals.

        keep_on: the device to copy the originals to. None leaves them as they are and writes W' into new memory.
        """
        self._touched = True
        active = [(name, factor) for name, factor in sorted(factors.items()) if factor != 0.0]
        for path, state in self._modules.items():
            wanted = tuple((name, factor) for name, factor in active if name in state.users)
            state.fold(wanted, self._reader(path), keep_on)

    def branch(self, factors: Mapping[str, Sequence[float]]) -> None:
        """Apply factors that differ by row: increments are stacked and their product added to the output.

        factors: by eraser, one for each row of the batch, or one for all rows.
        """
        self._touched = True
        active = [name for name, each in sorted(factors.items()) if any(factor != 0.0 for factor in each)]
        columns = torch.tensor([list(factors[name]) for name in active], dtype=torch.float64)
        for path, state in self._modules.items():
            used = [column for column, name in enumerate(active) if name in state.users]
            state.branch([active[column] for column in used], columns[used].mT if used else columns, self._reader(path))

    def restore(self) -> None:
        """Restore every module: its own class, and its weights bit for bit."""
        if self._touched:
            for state in self._modules.values():
                state.restore()
        self._touched = False

    def _reader(self, path: str) -> "_Reader":
        return lambda name: self._increments[name][path]


_Reader = Callable[[str], Increment]


class _ModuleState:
    """One module: the names of its erasers, its original weight, and the factors in effect on it."""

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
            self.restore()
            return
        remove(self.module)
        self._stack = None
        parts = [(read(name), factor) for name, factor in wanted]
        weight = weight_of(self.module)
        # If writing is interrupted, the state is neither the old one nor the new one.
        self._folded = None
        if self._written is not None and not _uses_memory_of(weight, self._written):
            # The module alone was moved or cast.
            self.restore()
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
        self.restore()
        if not names:
            return
        if self._stack is None or self._stack.names != names:
            self._stack = Stack.of(self.module, names, read)
        install(self.module, self._stack, gammas)
        self._folded = None

    def forget(self) -> None:
        """Restore the module, and drop the increments: a later eraser may have the name of an earlier one."""
        self.restore()
        self._stack = None

    def restore(self) -> None:
        remove(self.module)
        self._folded = None
        if self._kept is not None:
            _restore(weight_of(self.module), self._kept, self._written)
            self._kept = self._written = None
        bias = bias_of(self.module)
        if bias is not None and self._kept_bias is not None:
            _restore(bias, self._kept_bias, self._written_bias)
        self._kept_bias = self._written_bias = None
        self._folded = ()


def _restore(parameter: nn.Parameter, kept: Tensor, written: Tensor | None) -> None:
    """Give the parameter its original tensor; where it was moved since, the original's values."""
    if written is not None and _uses_memory_of(parameter, written) and parameter.device == kept.device:
        parameter.data = kept
    else:
        parameter.data.copy_(kept)


def _uses_memory_of(parameter: nn.Parameter, written: Tensor) -> bool:
    return parameter.device == written.device and parameter.data_ptr() == written.data_ptr()
