"""Writes files atomically: a file is either written completely or left untouched.

The new content is written to a temporary file in the same folder, synced, and renamed over the old one.
"""

import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from spm_hub.errors import RegistryError
from spm_hub.io.wording import quoted

Content = bytes | Callable[[BinaryIO], None]


def write_atomic(path: Path, data: Content) -> None:
    """Write one file atomically; see `write_together`."""
    write_together({path: data})


def write_new(path: Path, data: Content) -> None:
    """Write one file atomically, where there is none yet.

    Raises FileExistsError if there is one, also one that another process has just written; RegistryError as
    `write_atomic` does.
    """
    with staged({path: data}) as temporaries, _refused(path, apart_from=(FileExistsError,)):
        try:
            os.link(temporaries[path], path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links, as on many USB sticks
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            os.replace(temporaries[path], path)
    sync_folder(path.parent)


def write_together(files: Mapping[Path, Content]) -> None:
    """Write files that belong together, in the order given.

    files: the content by path, as bytes or as a function that fills the open file.
    Every file is complete and synced on disk before the first one is renamed into place, so a full disk or an error in
    a content function leaves all old files as they were and no temporary file behind.

    Raises RegistryError if the operating system refuses (no space, no permission, a folder in the way).
    """
    with staged(files) as temporaries:
        rename(temporaries)


@contextmanager
def staged(files: Mapping[Path, Content]) -> Iterator[dict[Path, Path]]:
    """Yield a temporary file for each path, complete and synced, by that path, for `rename`.

    Files that were not renamed by the end of the block are removed. Raises RegistryError, with nothing left behind.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            with _refused(path):
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
                path.parent.mkdir(parents=True, exist_ok=True)
                temporaries[path] = _stage(path, content)
        yield temporaries
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def rename(temporaries: Mapping[Path, Path]) -> None:
    """Move staged files to their paths, in the order given, durably. Raises RegistryError."""
    for path, temporary in temporaries.items():
        with _refused(path):
            os.replace(temporary, path)
    for folder in {path.parent for path in temporaries}:
        sync_folder(folder)


@contextmanager
def _refused(path: Path, apart_from: tuple[type[OSError], ...] = ()) -> Iterator[None]:
    try:
        yield
    except apart_from:
        raise
    except OSError as error:
        raise RegistryError(f"cannot write {path}: {error.strerror or error}", mend=_mend(error, path)) from error


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or into which no file can be written.

    It makes no folder. Raises RegistryError.
    """
    with _refused(folder):
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass


def temporary_of(path: Path, token: str) -> Path:
    """Return the path at which `path` is staged: hidden, in the same folder."""
    return path.with_name(f".{path.name}.{token}.tmp")


def _stage(path: Path, content: Content) -> Path:
    """Write `content` to a new hidden file next to `path` and return it; on failure nothing is left."""
    temporary = temporary_of(path, secrets.token_hex(4))
    # open("xb") and not tempfile: the file must end up with the user's umask, not with mode 0600.
    try:
        with open(temporary, "xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync_folder(folder: Path) -> None:
    """Make the renames themselves durable; platforms that cannot open a folder have nothing to sync."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)


def _mend(error: OSError, path: Path) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return (
                f"free some space on the disk of {path.parent} and run the command again; no file was left half written"
            )
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"chmod u+w {quoted(path.parent)}, or name another folder"
        case _:
            return "name another folder"
