"""Looks adapters up by name; rejects duplicate and unknown names."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import slug
from spm_hub.errors import NotFoundError, UsageError, nearest

V = TypeVar("V")


def check_names(adapters: Sequence[Adapter], strength: Iterable[str] = ()) -> None:
    """Refuse adapters that no pipeline can take together, before a pipeline is loaded.

    Raises UsageError for an adapter twice, be it under two names, and for two of one name; NotFoundError for a strength
    of none of them.
    """
    given: dict[str, Adapter] = {}
    contents: dict[str, Adapter] = {}
    for adapter in adapters:
        if adapter.name in given:
            raise duplicate_error(given[adapter.name], adapter)
        given[adapter.name] = adapter
        refuse_same_change(contents.setdefault(adapter.content, adapter), adapter)
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


def refuse_same_change(one: Adapter, other: Adapter) -> None:
    """Raise UsageError if `other` is `one` under another name: the same increments for the same concept."""
    same = one is not other and one.content and one.content == other.content
    target = one.manifest.concept.target
    if same and target == other.manifest.concept.target:
        raise UsageError(
            f"{other.name} ({other.source}) is {one.name} ({one.source}) under another name: the two make the same "
            f"change{f' for {target!r}' if target else ''}, and together would make it twice",
            mend=f"name one of them; if twice is meant, --strength {one.name}=2",
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


def resolve_names(given: Mapping[str, V], names: Iterable[str], argument: str) -> dict[str, V]:
    """Return the values of an argument by the names of these erasers.

    Raises NotFoundError for a name of none of them, UsageError for one named twice.
    """
    names, found = tuple(names), dict[str, V]()
    for key, value in given.items():
        if (name := find_name(key, names)) in found:
            raise UsageError(f"{argument} names {name!r} twice: {found[name]} and {value}")
        found[name] = value
    return found


def with_concepts(adapters: Sequence[Adapter], concept: Mapping[str, str] | str | None) -> list[Adapter]:
    """Return the adapters with the concepts that a caller gives them: of the only one, or by name.

    A given concept outranks the file's own. Raises UsageError, and NotFoundError for a name of none of them.
    """
    if concept is None:
        return list(adapters)
    if isinstance(concept, str):
        if len(adapters) != 1:
            raise UsageError(
                f"concept is {concept!r}, and there are {len(adapters)} erasers: it has to say whose it is",
                mend=f"concept={{{adapters[0].name if adapters else 'NAME'!r}: {concept!r}}}",
            )
        concept = {adapters[0].name: concept}
    by_name = resolve_names(concept, [adapter.name for adapter in adapters], "concept")
    for name, value in by_name.items():
        if not isinstance(value, str):
            raise UsageError(f"concept[{name!r}] is {value!r}; it is a concept's name", mend='concept="van gogh"')
    return [adapter.with_concept(by_name[adapter.name]) if adapter.name in by_name else adapter for adapter in adapters]


def remark_on_unknown_concepts(adapters: Sequence[Adapter]) -> str:
    """Say of erasers whose concepts are unknown what follows from that, and how to name them."""
    first = adapters[0]
    names = ", ".join(adapter.name for adapter in adapters[:3])
    if len(adapters) > 3:
        names += f" and {len(adapters) - 3} more"
    acts = "names no concept, so it acts" if len(adapters) == 1 else "name no concepts, so they act"
    file = first.source if first.source.endswith(".safetensors") else first.name
    return (
        f"{names} {acts} fully on every prompt; to have a gate, say which concept it is: "
        f"spmhub convert {shlex.quote(file)} --concept NAME, or in Python attach(..., concept=...) or "
        "adapter.with_concept(...)"
    )
