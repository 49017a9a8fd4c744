"""Erasers side by side are told apart by name: what that forbids, before anything is attached."""

import shlex
from collections.abc import Iterable, Sequence

import torch

from spm_hub.adapter import Adapter
from spm_hub.errors import NotFoundError, UsageError, nearest


def check_names(adapters: Sequence[Adapter], strength: Iterable[str] = ()) -> None:
    """What `attach` would refuse whatever the pipeline, for whoever has yet to load one.

    Raises UsageError for an adapter twice and for two of one name, NotFoundError for a strength of none of them.
    """
    by_name: dict[str, Adapter] = {}
    for adapter in adapters:
        if adapter.name in by_name:
            raise namesakes(by_name[adapter.name], adapter)
        by_name[adapter.name] = adapter
    for name in strength:
        known(name, by_name)


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


def known(name: str, names: Iterable[str]) -> None:
    """Raises NotFoundError for a name that is none of those attached."""
    names = tuple(names)
    if name not in names:
        meant = nearest(name, names)
        raise NotFoundError(
            f"no eraser {name!r} is attached; attached are: {', '.join(names) or 'none'}",
            mend=f"{meant[0]!r}" if meant else None,
        )
