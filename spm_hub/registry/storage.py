"""Writes a registry's folder safely: one writer at a time, and every change completely or not at all.

An eraser has one file in each folder of `SUFFIXES`. Several files cannot be renamed in one step, so a change is first
written to a journal. If its writer is killed, the next process that takes the lock finishes the change.
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
from spm_hub.io.small_files import read_small
from spm_hub.io.wording import quoted

ADAPTERS, MANIFESTS, SIGNATURES = "adapters", "manifests", "signatures"
# Files are written in this order and deleted in the reverse one: an eraser is listed once its adapter file exists.
SUFFIXES = {SIGNATURES: ".sig", MANIFESTS: ".json", ADAPTERS: ".safetensors"}

MAX_BYTES = 64 * 2**30
"""Largest adapter file: 64 GiB. All twelve billion parameters of FLUX in float32 need 48 GB."""

STATE = ".spmhub"
"""Folder inside a registry for the lock and the journal."""

SECONDS_TO_WAIT = 600.0
"""Longer than the largest adapter takes to copy; a process that keeps the lock for longer is stuck."""

RESERVED = frozenset({"schema"})
"""Names of our own files: manifests/schema.json is the JSON Schema of manifests."""

_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
"""Names that Windows has devices under, with any ending; a registry may be carried there."""

_JOURNAL = "journal.json"
_LARGEST_JOURNAL = 2**20
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def part_path(root: Path, folder: str, name: str) -> Path:
    """Return the path of the file of eraser `name` in `folder` (ADAPTERS, MANIFESTS or SIGNATURES)."""
    return root / folder / f"{name}{SUFFIXES[folder]}"


def is_reserved(name: str) -> bool:
    """Return whether no eraser may have this name: our own files have it, or Windows' devices."""
    return name in RESERVED or _DEVICES.fullmatch(name) is not None


@contextmanager
def write_lock(root: Path) -> Iterator[None]:
    """Wait for the registry's lock and keep it during the block; finish a killed writer's change first.

    The system releases the lock of a killed process. Do not nest. Raises RegistryError if the folder cannot be written
    or another process keeps the lock for longer than SECONDS_TO_WAIT.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(root / STATE / "lock", timeout=SECONDS_TO_WAIT, poll_interval=0.01)
    if (root / STATE).is_symlink():
        # With a link there, somebody else's registry could make us write and delete files anywhere.
        raise RegistryError(
            f"the registry {root} cannot be written: {root / STATE} is a symbolic link",
            mend=f"rm {quoted(root / STATE)}",
        )
    try:
        (root / STATE).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RegistryError(
            f"another process has been writing to {root} for {SECONDS_TO_WAIT:.0f} seconds",
            mend=f"end that process (fuser {quoted(lock.lock_file)})",
        ) from error
    except OSError as error:
        raise RegistryError(
            f"the registry {root} cannot be written: {error.filename or root}: {error.strerror or error}",
            mend=f"chmod u+w {quoted(root)}, or name another registry with --registry DIR",
        ) from error
    try:
        _recover(root)
        yield
    finally:
        lock.release()


def is_shared(root: Path) -> bool:
    """Return True if another process may be writing there: the lock folder exists and can be written."""
    return os.access(root / STATE, os.W_OK) and not (root / STATE).is_symlink()


def change(root: Path, erasers: Mapping[str, Mapping[str, Content]]) -> None:
    """Replace each eraser's files by the given parts, by folder; one without parts is deleted.

    Changes all erasers or none. Call it under `write_lock`. Raises RegistryError; nothing has changed then, unless the
    system fails between two renames.
    """
    if (link := next((root / folder for folder in SUFFIXES if (root / folder).is_symlink()), None)) is not None:
        # A stranger's registry could name any folder of the user's own.
        raise RegistryError(
            f"the registry {root} cannot be written: {link} is a symbolic link",
            mend=f"rm {quoted(link)}, or name another registry with --registry DIR",
        )
    contents = {
        part_path(root, folder, name): parts[folder]
        for name, parts in erasers.items()
        for folder in SUFFIXES
        if folder in parts
    }
    with staged(contents) as temporaries:
        coming = {
            name: {folder: temporaries[part_path(root, folder, name)].name for folder in SUFFIXES if folder in parts}
            for name, parts in erasers.items()
        }
        journal = root / STATE / _JOURNAL
        write_atomic(journal, json.dumps(coming).encode())
        try:
            _finish(root, coming)
        except KeyboardInterrupt:
            # The temporary files are deleted with this block, so no later process could finish the change.
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
    """Yield temporary files of killed writers, and manifests and signatures without an adapter file.

    Call it under `write_lock`, where every temporary file is one of a killed process. Files of other programs are not
    listed, and none at all if one of the folders is a symbolic link.
    """
    if _has_links(root):
        return
    found = [path for folder in (STATE, *SUFFIXES) for path in (root / folder).glob(".*.tmp")]
    found = [path for path in found if _TEMPORARY.fullmatch(path.name)]
    for folder, is_ours in ((MANIFESTS, _is_manifest), (SIGNATURES, _is_signature)):
        found += [
            path
            for path in (root / folder).glob(f"*{SUFFIXES[folder]}")
            if path.stem not in RESERVED and not part_path(root, ADAPTERS, path.stem).exists() and is_ours(path)
        ]
    yield from (Leftover(path, path.lstat().st_size) for path in sorted(found))


def delete(path: Path) -> None:
    """Delete a file if it exists, and flush its folder to disk. Raises RegistryError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RegistryError(
            f"cannot remove {path}: {error.strerror}", mend=f"chmod u+w {quoted(path.parent)}"
        ) from error
    sync_folder(path.parent)


def _has_links(root: Path) -> bool:
    """Return True if one of the registry's folders is a symbolic link.

    Files behind a link are read, but never deleted without a request: somebody else's registry could contain a link and
    a journal that delete the user's own files.
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
    """Do those renames and deletions of a change that have not been done yet."""
    for name, parts in coming.items():
        rename(
            {
                part_path(root, folder, name): root / folder / parts[folder]
                for folder in SUFFIXES
                if folder in parts and (root / folder / parts[folder]).exists()
            }
        )
        for folder in reversed(SUFFIXES):
            if folder not in parts:
                delete(part_path(root, folder, name))


def _is_journal_record(name: str, parts: Mapping[str, str]) -> bool:
    """Return True if `parts` are temporary files of the eraser `name`, as `change` makes them."""
    return re.fullmatch(NAME, name) is not None and all(
        folder in SUFFIXES and _TEMPORARY.fullmatch(file) and file.startswith(f".{name}{SUFFIXES[folder]}.")
        for folder, file in parts.items()
    )


def _recover(root: Path) -> None:
    """Finish the change that a killed writer has left in the journal, if there is one."""
    journal = root / STATE / _JOURNAL
    if not journal.is_file() and not journal.is_symlink():
        return
    with suppress(RegistryError, OSError, ValueError, AttributeError, TypeError, RecursionError):
        coming = json.loads(read_small(journal, _LARGEST_JOURNAL))
        # The folder may be somebody else's: a journal that names any other file is ignored.
        if not _has_links(root) and all(_is_journal_record(name, parts) for name, parts in coming.items()):
            _finish(root, coming)
    journal.unlink(missing_ok=True)
