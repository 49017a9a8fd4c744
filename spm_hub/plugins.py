"""What other distributions add to spm-hub, by entry points: found by name, imported only when it is needed.

A plug-in that cannot be imported, or is not what its group holds, is left out and remembered: `spmhub doctor` names it,
and nothing else fails for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar

Kind = Literal["objectives", "families", "formats"]
GROUP = "spm_hub.{}"
"""Of a kind: objectives hold a `training.methods.Method`, families an `architectures.Family`, formats a
`formats.parts.Format`; the entry point's name is the method's, the family's or the format's."""

T = TypeVar("T")


@dataclass(frozen=True)
class Plugin:
    """One entry point, imported: `value` is what it stands for, None where `broken` says why there is nothing."""

    name: str
    distribution: str
    value: Any = None
    broken: str | None = None


_EXAMINED: dict[Kind, Sequence[Plugin]] = {}


def plugins(kind: Kind, expected: type[T]) -> dict[str, T]:
    """The working plug-ins of a kind, by name; all of that kind are imported."""
    return {plugin.name: plugin.value for plugin in examine(kind, expected) if plugin.broken is None}


def examine(kind: Kind, expected: type[object]) -> Sequence[Plugin]:
    """Every plug-in of a kind by name, working or broken; each is imported once in a process."""
    if kind not in _EXAMINED:
        found = sorted(entry_points(group=GROUP.format(kind)), key=lambda entry: entry.name)
        names = [entry.name for entry in found]
        _EXAMINED[kind] = [_imported(entry, expected, twice=names.count(entry.name) > 1) for entry in found]
    return _EXAMINED[kind]


def _imported(entry: EntryPoint, expected: type[object], *, twice: bool) -> Plugin:
    distribution = entry.dist.name if entry.dist is not None else entry.value
    if twice:
        return Plugin(entry.name, distribution, broken="several distributions give this name")
    try:
        value = entry.load()
    # It is somebody else's code: whatever it raises, an attempt to end the process included, is its own affair.
    except (Exception, SystemExit) as error:
        return Plugin(entry.name, distribution, broken=f"{type(error).__name__}: {error}")
    if not isinstance(value, expected):
        what = f"{entry.value} is of type {type(value).__name__}, not {expected.__name__}"
        return Plugin(entry.name, distribution, broken=what)
    if (own := getattr(value, "name", "") or entry.name) != entry.name:
        return Plugin(entry.name, distribution, broken=f"{entry.value} calls itself {own!r}")
    return Plugin(entry.name, distribution, value)
