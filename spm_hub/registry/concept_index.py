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
        kept = read_small(root / storage.STATE / _FILE, _MOST_BYTES).decode()
        if not kept.startswith(_heading(root)):
            return None
    except (OSError, ValueError):
        return None
    # One line is looked for, as reading thousands of them takes longer than a few manifests.
    _, found, after = kept.partition(f"\n{plain}\t")
    return tuple(after.partition("\n")[0].split("\t")) if found else ()


def keep(root: Path, names: Mapping[str, list[str]], begun: int) -> None:
    """Write the index, where the registry can be written and nothing has changed lately.

    names: of erasers, by what they are called, as `plain_name` spells it.  begun: when they began to be read, in
    nanoseconds since 1970.
    """
    with suppress(OSError, RegistryError):  # without an index all manifests are read
        heading, latest = _heading(root), max(_changed(root))
        if storage.is_shared(root) and latest < begun - _SETTLED:
            lines = ["\t".join((plain, *several)) for plain, several in names.items()]
            write_atomic(root / storage.STATE / _FILE, (heading + "\n".join(("", *lines, ""))).encode())


def _heading(root: Path) -> str:
    """Return the first line of an index of the folders as they are now. Raises OSError."""
    return f"changed {_changed(root)}\n"


def _changed(root: Path) -> list[int]:
    """Return when the folders of erasers and manifests last changed. Raises OSError."""
    return [(root / folder).stat().st_mtime_ns for folder in (storage.ADAPTERS, storage.MANIFESTS)]
