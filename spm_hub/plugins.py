"""Finds the plug-ins of other distributions by entry points, and imports them only when needed.

A plug-in that cannot be imported, or is not of its group's type, is ignored and remembered: `spmhub doctor` names it,
and nothing else fails because of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar

Kind = Literal["objectives", "families", "formats", "metrics", "judges"]
GROUP = "spm_hub.{}"
"""The entry-point group of a kind. objectives hold a `Method`, families a `spm_hub.Family`, formats a `spm_hub.Format`,
metrics and judges a `spm_hub.evaluation.metrics.metric.NamedMetric`; the entry point's name is that of the object."""

T = TypeVar("T")


@dataclass(frozen=True)
class Plugin:
    """One imported entry point; `value` is None if `broken` says why it cannot be used."""

    name: str
    distribution: str
    value: Any = None
    broken: str | None = None


_EXAMINED: dict[Kind, Sequence[Plugin]] = {}


def plugins(kind: Kind, expected: type[T]) -> dict[str, T]:
    """Return the working plug-ins of a kind, by name; all of that kind are imported."""
    return {plugin.name: plugin.value for plugin in examine(kind, expected) if plugin.broken is None}


def examine(kind: Kind, expected: type[object]) -> Sequence[Plugin]:
    """Return every plug-in of a kind by name, working or broken; each is imported once in a process."""
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
    # Foreign code may raise anything, and even try to end the process; that must not affect anything else.
    except (Exception, SystemExit) as error:
        return Plugin(entry.name, distribution, broken=f"{type(error).__name__}: {error}")
    if not isinstance(value, expected):
        what = f"{entry.value} is of type {type(value).__name__}, not {expected.__name__}"
        return Plugin(entry.name, distribution, broken=what)
    if (own := getattr(value, "name", "") or entry.name) != entry.name:
        return Plugin(entry.name, distribution, broken=f"{entry.value} calls itself {own!r}")
    return Plugin(entry.name, distribution, value)
