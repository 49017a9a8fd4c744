"""An index of concepts: one is found without reading every manifest of a registry.

The index is a file in the registry's state folder. It counts while the folders of erasers and manifests have the times
of change that it was made at: every change by this program renames a file into them. What it finds is read again, and
where it finds nothing all manifests are: a manifest that an editor wrote in place is missed only beside another eraser
of the same concept.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from spm_hub.errors import RegistryError
from spm_hub.io.atomic import write_atomic
from spm_hub.io.small_files import read_small
from spm_hub.registry import storage

_FILE = "concepts.tsv"
_MOST_BYTES = 16 * 2**20
_SETTLED = 10**9
"""Nanoseconds without a change after which the folders' times tell every further one: clocks of files tick slowly."""


def candidates(root: Path, plain: str) -> tuple[str, ...] | None:
    """Return the erasers that the index has under a name; None without an index that counts.

    plain: the name, as `plain_name` spells it.
    """
    try:
        kept = read_small(root / storage.STATE / _FILE, _MOST_BYTES)
        if not kept.startswith(_heading(root).encode()):
            return None
        return tuple(_line_of(kept, plain.encode()).decode().split("\t")[1:])
    except (OSError, ValueError):
        return None


def _line_of(kept: bytes, plain: bytes) -> bytes:
    """Return the line of an index that begins with a name; empty without one."""
    # A search by halves, as even looking through thousands of lines takes longer than reading a few manifests.
    low, high = kept.index(b"\n") + 1, len(kept)
    while low < high:
        start = kept.rfind(b"\n", 0, (low + high) // 2) + 1
        line = kept[start : kept.index(b"\n", start)]
        there = line.partition(b"\t")[0]
        if there == plain:
            return line
        low, high = (start + len(line) + 1, high) if there < plain else (low, start)
    return b""


def keep(root: Path, names: Mapping[str, list[str]], begun: int) -> None:
    """Write the index, where the registry can be written and nothing has changed lately.

    names: of erasers, by what they are called, as `plain_name` spells it.  begun: when they began to be read, in
    nanoseconds since 1970.
    """
    with suppress(OSError, RegistryError):  # without an index all manifests are read
        heading, latest = _heading(root), max(_changed(root))
        if storage.is_shared(root) and latest < begun - _SETTLED:
            lines = sorted((plain.encode(), "\t".join(several).encode()) for plain, several in names.items())
            text = b"".join(plain + b"\t" + several + b"\n" for plain, several in lines)
            write_atomic(root / storage.STATE / _FILE, heading.encode() + text)


def _heading(root: Path) -> str:
    """Return the first line of an index of the folders as they are now. Raises OSError."""
    return f"sorted, of folders changed at {_changed(root)}\n"


def _changed(root: Path) -> list[int]:
    """Return when the folders of erasers and manifests last changed. Raises OSError."""
    return [(root / folder).stat().st_mtime_ns for folder in (storage.ADAPTERS, storage.MANIFESTS)]
