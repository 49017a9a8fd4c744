"""Keeps rows of numbers in a temporary file instead of in memory."""

import os
import tempfile
import weakref
from typing import Any

import torch
from torch import Tensor


class SpillFile:
    """A temporary file without a name, for rows of one width that would take too much memory.

    The 77 x 768 states that SD1.5's text encoder gives for a name are 236 kB, while a rank-1 eraser has 1.7 MB. The
    operating system caches as much of the file as it has room for, and deletes it when the process ends. A forked
    process reads the rows of its parent and writes into a file of its own. Not thread-safe by itself.
    """

    def __init__(self) -> None:
        self._width = 0
        self._open()

    def _open(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open for as long as this object exists
        self._free: list[int] = []
        self._end = 0
        self._process = os.getpid()
        weakref.finalize(self, self._file.close)

    def put(self, rows: Tensor) -> "SpilledRows":
        """Write rows (n, width), float32; their place is reused once the returned object is gone.

        Raises OSError where the file cannot be written in full.
        """
        self._width = self._width or rows.shape[1]
        assert rows.shape[1] == self._width, "all rows of a spill file have one width"
        if self._process != os.getpid():
            self._open()
        spilled = SpilledRows(self, self._file, [self._next_offset() for _ in rows])
        for offset, row in zip(spilled.offsets, rows, strict=True):
            self._file.seek(offset)
            written = self._file.write(row.numpy().data)
            if written != row.nbytes:
                raise OSError(f"{written} of {row.nbytes} bytes were written to the temporary folder")
        return spilled

    def read(self, file: Any, offsets: list[int]) -> Tensor:
        """Return the rows at these byte offsets of `file`: (offsets, width), float32."""
        rows = torch.empty(len(offsets), self._width)
        for offset, row in zip(offsets, rows, strict=True):
            if hasattr(os, "preadv"):
                # Forked processes share the position in a file: `seek` in one of them would move the other's.
                os.preadv(file.fileno(), [row.numpy().data], offset)
            else:
                file.seek(offset)
                file.readinto(row.numpy().data)
        return rows

    def release(self, file: Any, offsets: list[int]) -> None:
        """Reuse the place of the rows at these offsets."""
        if file is self._file and self._process == os.getpid():
            self._free += offsets

    def _next_offset(self) -> int:
        if self._free:
            return self._free.pop()
        self._end += 4 * self._width
        return self._end - 4 * self._width


class SpilledRows:
    """Some rows of a `SpillFile`; the file reuses their place when this object is gone."""

    def __init__(self, spill_file: SpillFile, file: Any, offsets: list[int]) -> None:
        self._spill_file, self._file, self.offsets = spill_file, file, offsets
        weakref.finalize(self, spill_file.release, file, offsets)

    def read(self) -> Tensor:
        """Return the rows: (n, width), float32."""
        return self._spill_file.read(self._file, self.offsets)
