"""The validated arguments of `attach`, and the settings of each eraser that follow from them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from torch import nn

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import Increment
from spm_hub.adapters.lookup import find_name
from spm_hub.adapters.manifest import GammaLaw, GateName, factor_of
from spm_hub.attachment.gates.calibrated import CalibratedGate
from spm_hub.attachment.gates.evidence import EvidenceGate
from spm_hub.attachment.gates.gate import ConstantGate, Gate, PreparingGate, TransportGate, UnknownConceptGate
from spm_hub.errors import NotFoundError, UsageError

Rows = Literal["both", "conditional"]
Mode = Literal["auto", "fold", "branch"]
GateChoice = GateName | float | Gate | PreparingGate

Gammas = dict[str, list[float]]
"""The gammas of each eraser, by name: one for each prompt."""
Choice = tuple[Mapping[str, float | None], ...]
"""The erasers that act on each prompt of a call: their strengths by name, None for the one that they have."""

_NAMED: Mapping[GateName, Gate | PreparingGate] = {
    "calibrated": CalibratedGate(), "transport": TransportGate(), "always": ConstantGate(1.0),
    "evidence": EvidenceGate(),
}  # fmt: skip
"""The gates that have a name. Erasers that share a gate are asked about together, hence one object each."""

_ALWAYS_OPEN = UnknownConceptGate()


@dataclass(frozen=True)
class Options:
    """The arguments of `attach`; construction validates them. Raises UsageError."""

    gate: GateChoice | None
    strength: Mapping[str, float] | float | None
    rows: Rows | None
    mode: Mode
    memory_budget: int | None
    increment_budget: int | None
    threshold: float | None
    top_k: int | None
    law: GammaLaw | None = None

    def __post_init__(self) -> None:
        _one_of("rows", self.rows, (None, *get_args(Rows)))
        _one_of("mode", self.mode, get_args(Mode))
        _one_of("law", self.law, (None, *get_args(GammaLaw)))
        for key in ("memory_budget", "increment_budget"):
            _whole(key, getattr(self, key), 0, "a whole number of bytes, or None for no limit")
        _whole("top_k", self.top_k, 1, "the number of erasers that may act on a prompt, at least 1, or None for all")
        if self.threshold is not None:
            finite("threshold", self.threshold)
        if isinstance(self.strength, Mapping):
            for name, value in self.strength.items():
                finite(f"strength[{name!r}]", value)
        elif self.strength is not None:
            finite("strength", self.strength)
        if isinstance(self.gate, str):
            _one_of("gate", self.gate, get_args(GateName))
        elif isinstance(self.gate, Real):
            finite("gate", self.gate)
        elif self.gate is not None and not isinstance(self.gate, Gate | PreparingGate):
            raise UsageError(
                f"gate is {self.gate!r}; it is one of {', '.join(map(repr, get_args(GateName)))}, a number, or "
                "has a method gammas() or prepare()"
            )

    def eraser(self, adapter: Adapter, modules: Mapping[str, tuple[nn.Module, str]]) -> "Eraser":
        """Return the eraser of an adapter on its modules, with these options or else its manifest's settings.

        modules: by path, each module and the adapter's name for it (`compatibility.resolve_modules`).
        """
        default = adapter.manifest.gate
        gate = adapter.manifest.default_gate if self.gate is None else self.gate
        if isinstance(gate, str):
            gate = _NAMED[gate]
        elif not isinstance(gate, Gate | PreparingGate):
            gate = ConstantGate(float(gate))
        if adapter.manifest.concept.target is None and not isinstance(gate, ConstantGate):
            gate = _ALWAYS_OPEN
        given = self.strength.get(adapter.name) if isinstance(self.strength, Mapping) else self.strength
        strength = default.strength if given is None else float(given)
        increments = adapter.increments
        if any(path != name for path, (_, name) in modules.items()):
            increments = {path: increments[name] for path, (_, name) in modules.items()}
        only = {path: module for path, (module, _) in modules.items()}
        return Eraser(adapter, only, increments, gate, strength, self.rows or default.rows, self.law or default.law)

    def select(self, gammas: Gammas) -> Gammas:
        """Apply `threshold` and `top_k`: return the gammas with those of all other erasers set to 0.

        Of the gammas that reach `threshold`, the `top_k` greatest of each prompt are kept; among equal ones, those of
        the first names in alphabetical order.
        """
        threshold, top_k = self.threshold, self.top_k
        if threshold is None and top_k is None:
            return gammas
        chosen: Gammas = {name: [0.0] * len(each) for name, each in gammas.items()}
        for prompt in range(max(map(len, gammas.values()), default=0)):
            left = [
                (-each[prompt], name) for name, each in gammas.items() if threshold is None or each[prompt] >= threshold
            ]
            for gamma, name in sorted(left)[:top_k]:
                chosen[name][prompt] = -gamma
        return chosen


def choice_of(chosen: Sequence[Iterable[str] | Mapping[str, float | None]], names: Iterable[str]) -> Choice:
    """Return what a caller chose for each prompt, by the erasers' own names.

    Raises NotFoundError for a name of none of `names`, UsageError for a strength that is no finite number.
    """
    known, found = tuple(names), []
    for one in chosen:
        if isinstance(one, str):
            raise UsageError(f"{one!r} is not a list of erasers' names", mend=f"only([[{one!r}]]), a list a prompt")
        strengths = one if isinstance(one, Mapping) else dict.fromkeys(one)
        for name, value in strengths.items():
            if value is not None:
                finite(f"strength[{name!r}]", value)
        found.append({find_name(name, known): value for name, value in strengths.items()})
    return tuple(found)


@dataclass(eq=False)
class Eraser:
    """One adapter on one denoiser: by path, its modules and their increments; and how it is gated."""

    adapter: Adapter
    modules: Mapping[str, nn.Module]
    increments: Mapping[str, Increment]
    gate: Gate | PreparingGate
    strength: float
    rows: Rows
    law: GammaLaw

    def factor(self, gamma: float = 1.0) -> float:
        """Return the factor of the change of the weights at a gamma."""
        return factor_of(self.law, gamma, self.strength)

    def __str__(self) -> str:
        match self.gate:
            case EvidenceGate():
                gate = "evidence"
            case CalibratedGate():
                gate = "calibrated"
            case TransportGate():
                gate = "transport"
            case UnknownConceptGate():
                gate = "always, as its concept is unknown"
            case ConstantGate(gamma):
                gate = "always" if gamma == 1 else f"gamma {gamma:g}"
            case _:
                gate = type(self.gate).__name__
        law = ", gamma squared" if self.law == "squared" else ""
        return f"{self.adapter.name} ({gate}, strength {self.strength:g}{law}, rows {self.rows!r})"


def finite(key: str, value: object) -> None:
    """Raise UsageError unless the argument `key` is a finite number."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise UsageError(f"{key} is {value!r}; it has to be a finite number", mend=f"{key} = 1.0")


def _whole(key: str, value: object, least: int, what: str) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise UsageError(f"{key} is {value!r}; it is {what}")


def _one_of(key: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise UsageError(
            f"{key} is {value!r}; it is one of {', '.join(map(repr, allowed))}", mend=f"{key} = {allowed[-1]!r}"
        )


class Strength(MutableMapping[str, float]):
    """The factor of each attached eraser's gamma, by name; `del` restores the manifest's strength."""

    def __init__(self, erasers: Mapping[str, Eraser], write: Callable[[str, float], None]) -> None:
        """Use `write(name, value)` to change a strength."""
        self._erasers, self._write = erasers, write

    def __getitem__(self, name: str) -> float:
        with suppress(NotFoundError):  # the mapping raises KeyError below, which its other methods rely on
            name = find_name(name, self._erasers)
        return self._erasers[name].strength

    def __setitem__(self, name: str, value: float) -> None:
        finite(f"strength[{name!r}]", value)
        self._write(name, float(value))

    def __delitem__(self, name: str) -> None:
        name = find_name(name, self._erasers)
        self[name] = self._erasers[name].adapter.manifest.gate.strength

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._erasers))  # others may be added meanwhile

    def __len__(self) -> int:
        return len(self._erasers)

    def __repr__(self) -> str:
        return f"Strength({dict(self)})"
