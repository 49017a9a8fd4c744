"""Keeps the pictures that a base draws without erasers, for the evaluations of several erasers."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from PIL import Image
from torch import nn

from spm_hub.errors import RegistryError
from spm_hub.io.atomic import write_atomic
from spm_hub.io.environment import user_folder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_MOST_BYTES, _MOST_FILES = 2**30, 2000
"""So much is kept, the latest. Each new file has all others looked through, so that their number is bounded too."""


def kept_or_drawn(
    base: str | None, how: Sequence[object], count: int, draw: Callable[[], list[Image.Image]]
) -> list[Image.Image]:
    """Return the pictures of an earlier call with the same base and settings, or draw and keep them.

    base: its `base_key`.  how: the settings that the pictures depend on.  count: of the pictures.
    """
    if base is None:
        return draw()
    key = hashlib.sha256(f"{base} {list(how)!r}".encode()).hexdigest()[:32]
    path = user_folder("cache") / "base-pictures" / f"{key}.zip"
    found = _read(path, count)
    if found is None:
        found = draw()
        _keep(path, found)
    return found


def base_key(pipe: DiffusionPipeline) -> str | None:
    """Return a hash of all of a base that decides its pictures; None where weights have no values here.

    pipe: as it was loaded, without erasers.
    """
    digest = hashlib.sha256()
    parts: list[object] = [type(pipe).__name__, *(f"{name} {version(name)}" for name in ("torch", "diffusers"))]
    for name, part in sorted(pipe.components.items()):
        config = getattr(part, "config", None)
        parts += [name, type(part).__name__, str(getattr(part, "device", "")), str(config)]
        if isinstance(part, nn.Module):
            for key, value in part.state_dict().items():
                if value.is_meta:
                    return None
                parts.append((key, tuple(value.shape), str(value.dtype)))
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(repr(parts).encode())
    return digest.hexdigest()


def _read(path: Path, count: int) -> list[Image.Image] | None:
    """Return kept pictures; None without a whole file of them."""
    try:
        with zipfile.ZipFile(path) as file:
            found: list[Image.Image] = [Image.open(io.BytesIO(file.read(f"{number}.png"))) for number in range(count)]
        for picture in found:
            picture.load()
        os.utime(path)
    except (OSError, KeyError, ValueError, SyntaxError, zipfile.BadZipFile):
        return None
    return found


def _keep(path: Path, pictures: Sequence[Image.Image]) -> None:
    """Write pictures into one file; delete the files that were not used for longest if there are too many."""

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for number, picture in enumerate(pictures):
                png = io.BytesIO()
                picture.save(png, format="PNG")
                archive.writestr(f"{number}.png", png.getvalue())

    with suppress(RegistryError, OSError):  # without room in the cache, they are drawn again next time
        write_atomic(path, write)
        kept = sorted(path.parent.glob("*.zip"), key=lambda one: one.stat().st_mtime_ns, reverse=True)
        sizes = accumulate(one.stat().st_size for one in kept)
        for number, (old, whole) in enumerate(zip(kept, sizes, strict=True)):
            if whole > _MOST_BYTES or number >= _MOST_FILES:
                old.unlink()
