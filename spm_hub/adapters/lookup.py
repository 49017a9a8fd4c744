"""Looks adapters up by name; rejects duplicate and unknown names."""

import shlex
from collections.abc import Iterable, Mapping, Sequence

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import slug
from spm_hub.errors import NotFoundError, UsageError, nearest


def check_names(adapters: Sequence[Adapter], strength: Iterable[str] = ()) -> None:
    """Refuse adapters that no pipeline can take together, before a pipeline is loaded.

    Raises UsageError for an adapter twice and for two of one name, NotFoundError for a strength of none of them.
    """
    given: dict[str, Adapter] = {}
    for adapter in adapters:
        if adapter.name in given:
            raise duplicate_error(given[adapter.name], adapter)
        given[adapter.name] = adapter
    for name in strength:
        find_name(name, given)


def duplicate_error(one: Adapter, other: Adapter) -> UsageError:
    """Return the error for two adapters of one name, or for one adapter given twice."""
    in_file = other.source.endswith(".safetensors")
    if one is other or (in_file and one.source == other.source):
        return UsageError(f"adapter {other.name} ({other.source}) is attached twice", mend="name it once")
    return UsageError(
        f"two adapters are named {other.name}: {one.source} and {other.source}",
        mend=f"name it once if they are the same; else spmhub convert {shlex.quote(other.source)} --name "
        f"{other.name}-2, and attach that one"
        if in_file
        else "give one of them another name in its manifest",
    )


def find_name(name: str, names: Iterable[str]) -> str:
    """Return the one of these eraser names that `name` is, or that its concept ("van gogh") makes.

    Raises NotFoundError if there is none.
    """
    names = tuple(names)
    if name in names:
        return name
    if not isinstance(name, str):
        raise NotFoundError(f"{name!r} is no eraser's name; there are: {', '.join(names) or 'none'}")
    if name.strip() and (written := slug(name)) in names:
        return written
    meant = nearest(name, names)
    raise NotFoundError(
        f"there is no eraser {name!r} among these: {', '.join(names) or 'none'}",
        mend=f"{meant[0]!r}" if meant else None,
    )


def resolve_names(strength: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Return the numbers by the names of these erasers.

    Raises NotFoundError for a name of none of them, UsageError for one named twice.
    """
    names, found = tuple(names), dict[str, float]()
    for given, value in strength.items():
        if (name := find_name(given, names)) in found:
            raise UsageError(f"strength names {name!r} twice: {found[name]} and {value}")
        found[name] = value
    return found
