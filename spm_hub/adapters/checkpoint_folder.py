"""Folders of diffusers checkpoints: replaces a folder as a whole, and overwrites single weights in it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spm_hub.errors import ModelError, RegistryError
from spm_hub.io.atomic import write_atomic
from spm_hub.io.safetensors_file import empty_like, read_header


class FolderWeights:
    """The tensors of one model folder, sharded or not, which are read and overwritten by their keys."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of = {
            key: file for file in sorted(folder.glob("*.safetensors")) for key in read_header(file).entries
        }

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all weights by their keys; reads the files' headers only."""
        headers = [read_header(file) for file in dict.fromkeys(self._file_of.values())]
        return {key: entry.shape for header in headers for key, entry in header.entries.items()}

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of these tensors. Raises ModelError for one that the folder does not have."""
        found: dict[str, Tensor] = {}
        for file, its_keys in self._by_file(keys).items():
            with safe_open(file, framework="pt") as tensors:
                # Cloned, because these are views of the file that `write` changes.
                found |= {key: tensors.get_tensor(key).clone() for key in its_keys}
        return found

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the bytes of these tensors in place.

        dtype and shape, and with them the layout of the file, stay as they are; ModelError for other ones.
        """
        for path, keys in self._by_file(tensors).items():
            header = read_header(path)
            with path.open("r+b") as file:
                for key in keys:
                    tensor, held = tensors[key], empty_like(header.entries[key])
                    if (tensor.dtype, tensor.shape) != (held.dtype, held.shape):
                        raise ModelError(
                            f"{path}: {key} is {held.dtype} of {tuple(held.shape)}, the new value is "
                            f"{tensor.dtype} of {tuple(tensor.shape)}",
                            mend="bake the checkpoint again",
                        )
                    file.seek(8 + header.size + header.entries[key].start)
                    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    def _by_file(self, keys: Iterable[str]) -> dict[Path, list[str]]:
        files: dict[Path, list[str]] = {}
        for key in keys:
            if key not in self:
                raise ModelError(f"{self._folder} has no weight {key}", mend="bake the checkpoint again")
            files.setdefault(self._file_of[key], []).append(key)
        return files


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden sibling of `out` that replaces it, as a whole, if the block ends without an error."""
    # The folder itself and not a link to it; "." has no name before that.
    out = out.resolve()
    token = secrets.token_hex(4)
    stage, old = (out.parent / f".{out.name}.{token}.{what}" for what in ("tmp", "old"))
    try:
        stage.mkdir(parents=True)
        yield stage
        _sync(stage)
        try:
            if out.exists():
                out.rename(old)
            stage.rename(out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RegistryError(
            f"cannot write {out}: {reason}; nothing was changed", mend="free some space, or name another --out"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def clone_folder(source: Path, target: Path, rewritten: tuple[Path, ...]) -> None:
    """Copy a folder.

    Files outside `rewritten` never change, so they become hard links if the disk supports these.
    Raises ModelError for a symbolic link inside of it, which may be a stranger's and name any file of this machine.
    """
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        copy = target / relative
        if file.is_dir() and not file.is_symlink():
            copy.mkdir(parents=True, exist_ok=True)
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        changes = any(relative.is_relative_to(part) for part in rewritten)
        if changes and file.is_symlink():
            raise ModelError(f"{file} is a symbolic link; nothing was changed", mend="bake the checkpoint again")
        if not changes:
            try:
                os.link(file, copy)
                continue
            except OSError:
                pass  # another file system, or one without links: a copy does as well
        shutil.copy2(file, copy)


def forget_places(folder: Path) -> None:
    """Remove from the configurations the paths on this machine that diffusers read them from."""
    for file in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(file.read_bytes())
        if config.pop("_name_or_path", None) is not None:
            write_atomic(file, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
