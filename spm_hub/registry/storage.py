"""A registry's folder as several processes share it: written under one lock, and whole or not at all whoever is killed.

An eraser is one file in each of `SUFFIXES`' folders. They cannot be renamed in one step, nor can several erasers, so a
change is written down first (the journal); whoever holds the lock next finishes what its writer was killed over.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from spm_hub.adapters.manifest import NAME, Manifest
from spm_hub.errors import RegistryError, SpmHubError
from spm_hub.io.atomic import Content, rename, staged, sync_folder, write_atomic

ADAPTERS, MANIFESTS, SIGNATURES = "adapters", "manifests", "signatures"
# In the order in which they come and, backwards, go: what has an adapter file is listed, so that one comes last.
SUFFIXES = {SIGNATURES: ".sig", MANIFESTS: ".json", ADAPTERS: ".safetensors"}

MAX_BYTES = 64 * 2**30
"""Of an adapter file: FLUX, twelve billion parameters changed in float32, has 48."""

STATE = ".spmhub"
"""Folder of the lock and the journal inside a registry."""

SECONDS_TO_WAIT = 600.0
"""Above what the largest increments take to be copied; whoever holds the lock longer is stuck, not working."""

RESERVED = frozenset({"schema"})
"""Names of no eraser: manifests/schema.json is the JSON Schema of manifests."""

_JOURNAL = "journal.json"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def place(root: Path, folder: str, name: str) -> Path:
    """Where the part of the eraser `name` that belongs into `folder` is kept."""
    return root / folder / f"{name}{SUFFIXES[folder]}"


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Be the registry's only writer, waiting for the others; the system releases the lock of a killed process.

    Not to be nested. Raises RegistryError when the folder cannot be written, or another writer never ends.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(root / STATE / "lock", timeout=SECONDS_TO_WAIT, poll_interval=0.01)
    if (root / STATE).is_symlink():
        # A stranger's registry could have its lock and journal written, and deleted, anywhere.
        raise RegistryError(
            f"the registry {root} is not written to: {root / STATE} is a symbolic link", mend=f"rm {root / STATE}"
        )
    try:
        (root / STATE).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RegistryError(
            f"another process has been writing to {root} for {SECONDS_TO_WAIT:.0f} seconds",
            mend=f"end that process (fuser {lock.lock_file})",
        ) from error
    except OSError as error:
        raise RegistryError(
            f"the registry {root} cannot be written: {error.filename or root}: {error.strerror or error}",
            mend=f"chmod u+w {root}, or name another registry with --registry DIR",
        ) from error
    try:
        _recover(root)
        yield
    finally:
        lock.release()


def is_shared(root: Path) -> bool:
    """Whether another process may be writing there: somebody has, and so may this one."""
    return os.access(root / STATE, os.W_OK) and not (root / STATE).is_symlink()


def change(root: Path, erasers: Mapping[str, Mapping[str, Content]]) -> None:
    """Give each of these erasers the parts named here, by folder, and no other; none at all removes it.

    All of them or none. Only inside `writing`. Raises RegistryError; what was there is untouched unless the system
    refuses between two renames.
    """
    contents = {
        place(root, folder, name): parts[folder]
        for name, parts in erasers.items()
        for folder in SUFFIXES
        if folder in parts
    }
    with staged(contents) as temporaries:
        coming = {
            name: {folder: temporaries[place(root, folder, name)].name for folder in SUFFIXES if folder in parts}
            for name, parts in erasers.items()
        }
        journal = root / STATE / _JOURNAL
        write_atomic(journal, json.dumps(coming).encode())
        try:
            _finish(root, coming)
        except KeyboardInterrupt:
            # The temporary files go with this block, so nobody could finish it later.
            _finish(root, coming)
            raise
        finally:
            journal.unlink(missing_ok=True)


@dataclass(frozen=True)
class Leftover:
    """A file that belongs to no eraser."""

    path: Path
    bytes: int


def leftovers(root: Path) -> Iterator[Leftover]:
    """Files that belong to no eraser: a killed writer's, and manifests and signatures whose adapter file is gone.

    Only inside `writing`, where every temporary file is a dead writer's. What other programs keep in folders of these
    names is not listed, and nothing where one of them is a link to elsewhere.
    """
    if _has_links(root):
        return
    found = [path for folder in (STATE, *SUFFIXES) for path in (root / folder).glob(".*.tmp")]
    found = [path for path in found if _TEMPORARY.fullmatch(path.name)]
    for folder, is_ours in ((MANIFESTS, _is_manifest), (SIGNATURES, _is_signature)):
        found += [
            path
            for path in (root / folder).glob(f"*{SUFFIXES[folder]}")
            if path.stem not in RESERVED and not place(root, ADAPTERS, path.stem).exists() and is_ours(path)
        ]
    yield from (Leftover(path, path.lstat().st_size) for path in sorted(found))


def delete(path: Path) -> None:
    """Remove a file for good, if it is there. Raises RegistryError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RegistryError(f"cannot remove {path}: {error.strerror}", mend=f"chmod u+w {path.parent}") from error
    sync_folder(path.parent)


def _has_links(root: Path) -> bool:
    """Whether files of the registry lie elsewhere: they are read, but what nobody asks for is not done to them.

    A stranger may have made the link, so that a journal of his would delete the files of whoever uses his registry.
    """
    return any((root / folder).is_symlink() for folder in SUFFIXES)


def _is_manifest(path: Path) -> bool:
    try:
        Manifest.read(path)
    except SpmHubError:
        return False
    return True


def _is_signature(path: Path) -> bool:
    with suppress(OSError), open(path, "rb") as file:
        return b"sigstore" in file.read(200)
    return False


def _finish(root: Path, coming: Mapping[str, Mapping[str, str]]) -> None:
    """The renames and deletions of a change, as far as they have not happened yet."""
    for name, parts in coming.items():
        rename(
            {
                place(root, folder, name): root / folder / parts[folder]
                for folder in SUFFIXES
                if folder in parts and (root / folder / parts[folder]).exists()
            }
        )
        for folder in reversed(SUFFIXES):
            if folder not in parts:
                delete(place(root, folder, name))


def _is_change(name: str, parts: Mapping[str, str]) -> bool:
    """Whether these are temporary files of the eraser `name`, as `change` makes them."""
    return re.fullmatch(NAME, name) is not None and all(
        folder in SUFFIXES and _TEMPORARY.fullmatch(file) and file.startswith(f".{name}{SUFFIXES[folder]}.")
        for folder, file in parts.items()
    )


def _recover(root: Path) -> None:
    """Finish the change that a killed writer has left in the journal."""
    journal = root / STATE / _JOURNAL
    if not journal.is_file():
        return
    with suppress(RegistryError, OSError, ValueError, AttributeError, TypeError, RecursionError):
        coming = json.loads(journal.read_bytes())
        # A registry may be a stranger's folder: its journal names files of that registry or is no journal.
        if not _has_links(root) and all(_is_change(name, parts) for name, parts in coming.items()):
            _finish(root, coming)
    journal.unlink(missing_ok=True)
