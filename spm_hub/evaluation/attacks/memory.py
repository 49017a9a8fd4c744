"""Remembers computed rows of tensors, so that searches under several gates share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

_MOST_BYTES = 2**28


class Memory:
    """Rows by key; it forgets all of them before it outgrows `most_bytes`."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._rows: dict[bytes, Tensor] = {}
        self._most_bytes, self._bytes = most_bytes, 0

    def rows(self, keys: Sequence[bytes], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """Return one row for each key, (keys, ...).

        compute: returns the rows of some of the keys, given by their places; called for those that are not known.
        """
        missing = [place for place, key in enumerate(keys) if key not in self._rows]
        found = {place: self._rows[key] for place, key in enumerate(keys) if key in self._rows}
        for place, row in zip(missing, compute(missing), strict=True) if missing else ():
            found[place] = row
            self._keep(keys[place], row)
        return torch.stack([found[place] for place in range(len(keys))])

    def _keep(self, key: bytes, row: Tensor) -> None:
        size = row.numel() * row.element_size()
        if self._bytes + size > self._most_bytes:
            self._rows.clear()
            self._bytes = 0
        self._rows[key] = row.clone()  # a view would keep the whole batch
        self._bytes += size


def key_of(*parts: object) -> bytes:
    """Return a digest of tensors and of whatever else has a repr that says all of it."""
    digest = blake2b(digest_size=16)
    for part in parts:
        content = part.float().cpu().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()
