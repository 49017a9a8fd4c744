"""Files that are either wholly written or not touched: written beside, synced, then renamed over the old one."""

import errno
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from spm_hub.errors import RegistryError

Content = bytes | Callable[[BinaryIO], None]


def write_atomic(path: Path, data: Content) -> None:
    """Write one file atomically; see `write_together`."""
    write_together({path: data})


def write_together(files: Mapping[Path, Content]) -> None:
    """Write files that belong together, in the order given; content is bytes or a function that fills the open file.

    Every file is complete and synced on disk before the first one is renamed into place, so a full disk or an error in
    a content function leaves all old files as they were and no temporary file behind.

    Raises RegistryError when the operating system refuses (no space, no permission, a folder in the way).
    """
    staged: dict[Path, Path] = {}
    current = next(iter(files))
    try:
        for current, content in files.items():
            if current.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(current))
            current.parent.mkdir(parents=True, exist_ok=True)
            staged[current] = _stage(current, content)
        for current, temporary in staged.items():
            os.replace(temporary, current)
        for folder in {path.parent for path in files}:
            _sync_folder(folder)
    except OSError as error:
        raise RegistryError(f"cannot write {current}: {error.strerror or error}", mend=_mend(error, current)) from error
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _stage(path: Path, content: Content) -> Path:
    """Write `content` to a new hidden file beside `path` and return it; nothing is left when that fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
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


def _sync_folder(folder: Path) -> None:
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
            return f"free some space on the disk of {path.parent} and run the command again (nothing was changed)"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"chmod u+w {path.parent}, or name another folder"
        case _:
            return "name another folder"
