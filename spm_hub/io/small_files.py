"""Reads small files of a folder that may be a stranger's: no devices, and nothing large."""

import errno
import os
import stat
from pathlib import Path


def read_small(path: Path, largest: int, *, follow: bool = False) -> bytes:
    """Return the content of a plain file of at most `largest` bytes.

    follow: read what a symbolic link leads to, as in the Hub's cache.
    Raises OSError: FileNotFoundError without such a file, ELOOP for a symbolic link unless `follow`, EINVAL for a
    device or pipe, and EFBIG for a larger file, of which nothing is read.
    """
    if not follow and path.is_symlink():
        raise OSError(errno.ELOOP, "it is a symbolic link", str(path))
    # Without blocking: a pipe would wait for a writer for ever.
    no_link = 0 if follow else getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, os.O_RDONLY | no_link | getattr(os, "O_NONBLOCK", 0))
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "it is no plain file", str(path))
        if about.st_size > largest:
            raise OSError(errno.EFBIG, f"it has {about.st_size} bytes, at most {largest} are read", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(largest)
    finally:
        os.close(descriptor)
