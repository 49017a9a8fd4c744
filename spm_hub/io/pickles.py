"""Reads PyTorch's pickles for an explicit conversion: tensors and plain containers, and never code."""

import itertools
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spm_hub.errors import AdapterFileError, NotFoundError, RegistryError
from spm_hub.io import first_bytes
from spm_hub.io.wording import quoted

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")

_MOST_ENTRIES = 100_000
_ALLOCATES = re.compile(r"(builtins|__builtin__) bytearray|torch \w*Tensor")
_ASK = "ask its author for a safetensors file"


def read(path: Path) -> Any:
    """Return the content of a pickle: tensors on the CPU, in dictionaries and lists.

    Raises AdapterFileError for anything else in it, for NaN or infinite numbers, and for a file that would need more
    memory than it has bytes.
    """
    _check_archive(path)
    try:
        # Opened here: by its name PyTorch would take a file for another format.
        with open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    # Whatever a damaged file makes the reader raise, the answer is the same.
    except Exception as error:
        raise AdapterFileError(
            f"{path} holds more than tensors, or is damaged, and was not loaded: {_reason(error)}", mend=_ASK
        ) from error
    found = list(_tensors(path, content, "", frozenset(), itertools.count()))
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in found)
    if total > 2 * path.stat().st_size:
        raise AdapterFileError(
            f"{path}: its tensors claim {total} bytes, the file has {path.stat().st_size}", mend=_ASK
        )
    for key, tensor in found:
        # torch cannot ask this of eight bits.
        wide = tensor.half() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
        if tensor.is_floating_point() and not torch.isfinite(wide).all():
            raise AdapterFileError(f"{path}: {key} holds numbers that are NaN or infinite", mend=_ASK)
    return content


def _check_archive(path: Path) -> None:
    """Refuse a file that unpacks to more than its size.

    Since PyTorch 1.6 a pickle is a zip whose members are stored uncompressed; a larger one is an attack. A zip is found
    by its end, but PyTorch decides by the first bytes, and would read another pickle before it.
    """
    kind = first_bytes.kind_of(path)
    if kind is not None and kind not in (first_bytes.TORCH, first_bytes.PICKLE):
        raise AdapterFileError(f"{path} is {kind.about}", mend=kind.mend)
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise zipfile.BadZipFile("it does not begin as a zip archive")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if unpacked > 2 * path.stat().st_size or len(members) > _MOST_ENTRIES:
                raise AdapterFileError(f"{path} unpacks to more than it is; it was not loaded", mend=_ASK)
            _check_calls(path, archive)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise AdapterFileError(
            f"{path} is no file of PyTorch's (of 1.6 or later), or truncated: {error}", mend=_ASK
        ) from error
    except OSError as error:
        raise RegistryError(f"cannot read {path}: {error.strerror}", mend=f"chmod u+r {quoted(path)}") from error


def _reason(error: Exception) -> str:
    """Return why PyTorch refused a pickle: the object that is no tensor, or the first line of its text."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if named := re.search(r"[Uu]nsupported (?:global|class): (?:GLOBAL )?([\w.]+)", text):
        return f"it needs {named[1]}, which is no tensor"
    if named := re.search(r"(?:Trying to|can only) (?:load|build) .{0,200}", text):
        return named[0]
    lines = [line.strip() for line in text.splitlines() if line.strip() and "weights_only" not in line]
    plain = [line for line in lines if "two options" not in line and "Weights only load failed" not in line]
    return (plain[0] if plain else type(error).__name__)[:200]


def _check_calls(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse the calls that weights_only permits although they allocate memory from a mere number."""
    for member in archive.infolist():
        if not member.filename.endswith("data.pkl"):
            continue
        for opcode, argument, _ in pickletools.genops(archive.read(member)):
            if opcode.name == "GLOBAL" and _ALLOCATES.fullmatch(str(argument)):
                raise AdapterFileError(f"{path} calls {argument}, and was not loaded", mend=_ASK)


def _tensors(
    path: Path, content: Any, key: str, holders: frozenset[int], steps: Iterator[int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors with the keys that lead to them.

    Raises AdapterFileError for a container that holds itself, or the same ones over and over.
    """
    if isinstance(content, Tensor):
        if content.layout is not torch.strided or content.is_quantized:
            raise AdapterFileError(f"{path}: {key} is no plain tensor")
        yield key, content
    elif isinstance(content, dict | list | tuple):
        if id(content) in holders or len(holders) > 16 or next(steps) > _MOST_ENTRIES:
            raise AdapterFileError(f"{path}: {key} is nested without end")
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for name, value in items:
            yield from _tensors(path, value, f"{key}.{name}".lstrip("."), holders | {id(content)}, steps)
