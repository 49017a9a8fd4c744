"""What a caller may ask of an attachment, checked, and what that means for each eraser."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, get_args

from torch import nn

from spm_hub.adapter import Adapter
from spm_hub.calls import Settings
from spm_hub.errors import UsageError
from spm_hub.gate import Concept, ConstantGate, Gate, TransportGate
from spm_hub.increments import Increment

Rows = Literal["both", "conditional"]
Mode = Literal["auto", "fold", "branch"]
GateChoice = Literal["transport", "always"] | float | Gate

_TRANSPORT = TransportGate()
_ALWAYS = ConstantGate(1.0)


@dataclass(frozen=True)
class Options:
    """The arguments of `attach`, checked."""

    gate: GateChoice | None
    strength: Mapping[str, float] | float | None
    rows: Rows | None
    mode: Mode
    memory_budget: int | None

    def __post_init__(self) -> None:
        _one_of("rows", self.rows, (None, *get_args(Rows)))
        _one_of("mode", self.mode, get_args(Mode))
        budget = self.memory_budget
        if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 0):
            raise UsageError(f"memory_budget is {budget!r}; it is a number of bytes, or None for no limit")
        if isinstance(self.strength, Mapping):
            for name, value in self.strength.items():
                finite(f"strength[{name!r}]", value)
        elif self.strength is not None:
            finite("strength", self.strength)
        if isinstance(self.gate, str):
            _one_of("gate", self.gate, ("transport", "always"))
        elif isinstance(self.gate, Real):
            finite("gate", self.gate)
        elif self.gate is not None and not isinstance(self.gate, Gate):
            raise UsageError(f'gate is {self.gate!r}; it is "transport", "always", a number, or has a method gammas()')

    def eraser(self, adapter: Adapter, targets: Mapping[str, tuple[nn.Module, Increment]]) -> "Eraser":
        """An adapter under these options, and under its manifest's where they are silent."""
        default = adapter.manifest.gate
        gate = default.kind if self.gate is None else self.gate
        if isinstance(gate, str):
            gate = _TRANSPORT if gate == "transport" else _ALWAYS
        elif not isinstance(gate, Gate):
            gate = ConstantGate(float(gate))
        given = self.strength.get(adapter.name) if isinstance(self.strength, Mapping) else self.strength
        strength = default.strength if given is None else float(given)
        return Eraser(adapter, targets, gate, strength, self.rows or default.rows)


@dataclass(eq=False)
class Eraser:
    """An adapter on this pipeline: the modules it changes, and how it is gated."""

    adapter: Adapter
    targets: Mapping[str, tuple[nn.Module, Increment]]
    gate: Gate
    strength: float
    rows: Rows
    concepts: dict[Settings, Concept] = field(default_factory=dict)


def finite(key: str, value: object) -> None:
    """Raise UsageError unless `value` is a finite number; `key` names it."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise UsageError(f"{key} is {value!r}; it has to be a finite number", mend=f"{key} = 1.0")


def _one_of(key: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise UsageError(f"{key} is {value!r}; it is one of {', '.join(map(repr, allowed))}")
