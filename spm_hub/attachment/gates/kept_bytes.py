"""Keeps many small results in one file of the user's cache, each under a key."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

_MOST_BYTES = 2**28
"""A larger file is begun anew."""
_AT_ONCE = 500
"""Keys of one query; older versions of SQLite take 999."""


class KeptBytes:
    """A file of bytes by key, for several processes at once; empty where it cannot be read or written."""

    def __init__(self, path: Path) -> None:
        """path: of the file, which need not exist."""
        self._path = path

    def get(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes kept under these keys, by key; nothing for the others."""
        found: dict[str, bytes] = {}
        if self._path.is_file():
            with self._quietly(), closing(sqlite3.connect(self._path)) as file:
                for start in range(0, len(keys), _AT_ONCE):
                    some = keys[start : start + _AT_ONCE]
                    marks = ", ".join("?" * len(some))
                    found.update(file.execute(f"SELECT key, value FROM kept WHERE key IN ({marks})", some))
        return found

    def put(self, values: Mapping[str, bytes]) -> None:
        """Keep values under their keys, all or none."""
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.is_file() and self._path.stat().st_size > _MOST_BYTES:
                self._path.unlink()
        with self._quietly(), closing(sqlite3.connect(self._path)) as file, file:
            file.execute("CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID")
            file.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", values.items())

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """End a block quietly where the file cannot be used, and delete a damaged one."""
        try:
            yield
        except sqlite3.OperationalError:
            return  # locked, or in a folder that cannot be written: the result is computed again next time
        except sqlite3.DatabaseError:
            with suppress(OSError):
                self._path.unlink()
