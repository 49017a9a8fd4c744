"""Erasers side by side are told apart by name: what that forbids, before anything is attached."""

import shlex
from collections.abc import Iterable, Mapping, Sequence

import torch

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import slug
from spm_hub.errors import NotFoundError, UsageError, nearest


def check_names(adapters: Sequence[Adapter], strength: Iterable[str] = ()) -> None:
    """What `attach` would refuse whatever the pipeline, for whoever has yet to load one.

    Raises UsageError for an adapter twice and for two of one name, NotFoundError for a strength of none of them.
    """
    given: dict[str, Adapter] = {}
    for adapter in adapters:
        if adapter.name in given:
            raise namesakes(given[adapter.name], adapter)
        given[adapter.name] = adapter
    for name in strength:
        named(name, given)


def namesakes(one: Adapter, other: Adapter) -> UsageError:
    """Why these two cannot be attached together."""
    if _same(one, other):
        return UsageError(f"adapter {other.name} ({other.source}) is attached twice", mend="name it once")
    in_file = other.source.endswith(".safetensors")
    return UsageError(
        f"two adapters are named {other.name}: {one.source} and {other.source}",
        mend=f"spmhub convert {shlex.quote(other.source)} --name {other.name}-2, and attach that one"
        if in_file
        else "give one of them another name in its manifest",
    )


def _same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters hold the same increments."""
    if one is other:
        return True
    mine, theirs = (
        {(path, part): tensor for path, inc in adapter.increments.items() for part, tensor in inc.tensors().items()}
        for adapter in (one, other)
    )
    return mine.keys() == theirs.keys() and all(
        tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]) for key, tensor in mine.items()
    )


def named(name: str, names: Iterable[str]) -> str:
    """Which of these erasers is meant: by its name, or by its concept as people write it ("van gogh").

    Raises NotFoundError for none of them.
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


def by_name(strength: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Numbers by the names of these erasers. Raises NotFoundError for none of them, UsageError for one named twice."""
    names, found = tuple(names), dict[str, float]()
    for given, value in strength.items():
        if (name := named(given, names)) in found:
            raise UsageError(f"strength names {name!r} twice: {found[name]} and {value}")
        found[name] = value
    return found
