"""Reads and writes safetensors files: checks a header before allocating, verifies and adds hashes."""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Never

from spm_hub.errors import GET_AGAIN, AdapterFileError, NotFoundError, RegistryError
from spm_hub.io import first_bytes
from spm_hub.io import untrusted_json as untrusted
from spm_hub.io.wording import quoted

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 8 * 2**20
"""Far above any adapter's header (SDXL at all layers: 0.4 MB), far below what would hurt to parse."""

MAX_TENSORS = 20_000
"""A pipeline in one file has 3,000, a LoRA of all layers of FLUX.1 fewer; checking 100,000 takes seconds."""

MAPPED_FROM = 64 * 2**20
"""Bytes from which a file may be mapped. A smaller one is read: what changes it afterwards then has no effect."""

HEADER_UNFOLDS = 18
"""Times the length of the text; one of nothing but the smallest tensors under the shortest names takes 14."""

MANIFEST_KEY = "spmhub.manifest"
PAYLOAD_HASH_KEY = "modelspec.hash_sha256"
HEADER_HASH_KEY = "spmhub.header_sha256"

_BYTES_OF = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    **{f"{kind}{bits}": f"{word}{bits}" for kind, word in (("U", "uint"), ("I", "int")) for bits in (16, 32, 64)},
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
_NAME_OF = {f"torch.{name}": dtype for dtype, name in _TORCH_NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor in the header.

    start, end: bytes, counted from the beginning of the payload.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    size: int
    """Bytes of the JSON text; the payload begins 8 bytes after them."""


def read_header(path: Path) -> Header:
    """Read and check the header of `path`, without torch and without touching the tensors.

    Raises AdapterFileError when the file is no safetensors file or truncated, or its header contradicts itself or the
    file's size.
    """
    with _open(path) as file:
        return _parse_header(path, file, os.fstat(file.fileno()).st_size)


def read_tensors(path: Path, *, mapped: bool = False) -> tuple[Header, dict[str, "Tensor"], str]:
    """Read a whole file: its header, its tensors by key, and the sha256 of all its bytes.

    mapped: leave the bytes of a large file (`MAPPED_FROM`) to the operating system, which may drop them from memory and
    read them again; it must then never be written in place (ours are replaced as a whole).
    Verifies the hashes in the header, if it is one of ours, and that every number is finite.
    Raises AdapterFileError naming the offending key.
    """

    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        header = _parse_header(path, file, size)
        data: mmap.mmap | bytearray
        if mapped and size >= MAPPED_FROM:
            # A private copy on write: torch wants memory that could be written to, the file never is.
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        else:
            data = bytearray(size)
            file.seek(0)
            file.readinto(data)
    with memoryview(data) as whole:
        _verify_hashes(path, header, whole[8 + header.size :])
        sha256 = hashlib.sha256(whole).hexdigest()
    tensors = {key: _view(data, 8 + header.size, entry) for key, entry in header.entries.items()}
    for key, tensor in tensors.items():
        if bad := _count_bad(tensor):
            what = "NaN or infinite" if tensor.is_floating_point() else "neither 0 nor 1"
            _refuse(path, f"{key} holds {bad} of {tensor.numel()} numbers that are {what}")
    return header, tensors, sha256


def _count_bad(tensor: "Tensor") -> int:
    """Count the values that are no numbers: NaN or infinite ones.

    In a boolean tensor, any byte but 0 and 1.
    """
    import torch

    if not tensor.numel():  # thousands of these have to be read in no time
        return 0
    if tensor.dtype is torch.bool:
        return int((tensor.view(torch.uint8) > 1).sum())
    if not tensor.is_floating_point():
        return 0
    # torch cannot ask this of eight bits.
    finite = torch.isfinite(tensor if tensor.element_size() > 1 else tensor.half())
    return 0 if finite.all() else tensor.numel() - int(finite.sum())


def empty_like(entry: Entry) -> "Tensor":
    """Return a tensor without numbers, on the meta device, of an entry's dtype and shape."""
    import torch

    return torch.empty(entry.shape, dtype=getattr(torch, _TORCH_NAMES[entry.dtype]), device="meta")


def _view(data: mmap.mmap | bytearray, payload: int, entry: Entry) -> "Tensor":
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[entry.dtype])
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    offset = payload + entry.start
    if offset % dtype.itemsize:
        raw = torch.frombuffer(data, dtype=torch.uint8, count=entry.end - entry.start, offset=offset).clone()
        return raw.view(dtype).view(entry.shape)
    return torch.frombuffer(data, dtype=dtype, count=math.prod(entry.shape), offset=offset).view(entry.shape)


@dataclass(frozen=True)
class Image:
    """A file to be written: its bytes depend on tensors and metadata only, not on order, clock or process."""

    head: bytes
    tensors: tuple["Tensor", ...]

    @property
    def nbytes(self) -> int:
        return len(self.head) + sum(tensor.nbytes for tensor in self.tensors)

    @property
    def sha256(self) -> str:
        """The hash of the whole file."""
        return _digest(self._chunks())

    def write_to(self, file: BinaryIO) -> None:
        for chunk in self._chunks():
            file.write(chunk)

    def _chunks(self) -> Iterator[memoryview]:
        yield memoryview(self.head)
        yield from map(_bytes_of, self.tensors)


def encode(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> Image:
    """Lay out a safetensors file; adds the hashes of the payload and of the header to `metadata`."""
    # Widest first keeps every tensor aligned to its own width; then by name, so that the order is the content's alone.
    keys = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    payload = tuple(tensors[key].detach().cpu().contiguous() for key in keys)
    described: dict[str, Any] = {}
    position = 0
    for key, tensor in zip(keys, payload, strict=True):
        end = position + tensor.nbytes
        described[key] = {
            "dtype": _NAME_OF[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    # 0x is how modelspec 1.0.1 writes a hash.
    described["__metadata__"] = {**metadata, PAYLOAD_HASH_KEY: "0x" + _digest(map(_bytes_of, payload))}
    described["__metadata__"][HEADER_HASH_KEY] = _header_digest(described)
    text = json.dumps(described, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Image(len(text).to_bytes(8, "little") + text, payload)


def _bytes_of(tensor: "Tensor") -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(chunks: Iterator[memoryview]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _header_digest(described: Mapping[str, Any]) -> str:
    """Return the sha256 of the header without this hash itself.

    modelspec's hash covers the tensors only, not their names and shapes, nor the manifest.
    """
    metadata = {key: value for key, value in described["__metadata__"].items() if key != HEADER_HASH_KEY}
    canonical = json.dumps({**described, "__metadata__": metadata}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _open(path: Path) -> BufferedReader:
    if path.exists() and not path.is_file():
        _refuse(path, "it is not a file")
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file", mend="spmhub list") from error
    except OSError as error:
        raise RegistryError(f"cannot read {path}: {error.strerror}", mend=f"chmod u+r {quoted(path)}") from error


def _parse_header(path: Path, file: BinaryIO, file_bytes: int) -> Header:
    """Parse and check a header.

    Every length is compared with the file's before it is used, so nothing is allocated on a header's word.
    """
    start = file.read(first_bytes.LONGEST)
    kind = first_bytes.recognise(start, file_bytes)
    if kind is first_bytes.TORCH:
        kind = first_bytes.kind_of(path)  # only the end of a zip archive says whose it is
    if kind is not None and kind is not first_bytes.SAFETENSORS:
        _refuse(path, f"it is {kind.about}", kind.mend)
    if file_bytes < 8:
        _refuse(path, f"it ends after {file_bytes} bytes, before the length of its header")
    size = int.from_bytes(start[:8], "little")
    if size > file_bytes - 8:
        _refuse(path, f"its header claims {size} bytes, the file has {file_bytes - 8} after the length")
    if size > MAX_HEADER_BYTES:
        _refuse(path, f"its header claims {size} bytes, no adapter needs more than {MAX_HEADER_BYTES}")
    file.seek(8)
    try:
        described = untrusted.parse(file.read(size), unfolds=HEADER_UNFOLDS)
    except ValueError as error:
        _refuse(path, f"its header is not JSON as safetensors writes it: {error}")
    if not isinstance(described, dict):
        _refuse(path, "its header is not a JSON object")
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "__metadata__ in its header is not a map of strings")
    if len(described) > MAX_TENSORS:
        _refuse(path, f"its header names {len(described)} tensors, no adapter or model has more than {MAX_TENSORS}")
    entries = {key: _parse_entry(path, key, entry) for key, entry in described.items()}
    _check_layout(path, entries, file_bytes - 8 - size)
    return Header(metadata, entries, size)


def _parse_entry(path: Path, key: str, entry: Any) -> Entry:
    if len(key) > untrusted.MAX_NAME_LENGTH or not key.isprintable():
        _refuse(path, f"{key[:80]!r} ({len(key)} characters) is no name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"{key}: not a tensor's entry of dtype, shape and data_offsets: {str(entry)[:120]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BYTES_OF:
        _refuse(path, f"{key}: unknown dtype {str(dtype)[:120]!r}", "ask its author for a float16 version")
    for field, numbers, length in (("shape", shape, range(9)), ("data_offsets", offsets, range(2, 3))):
        if not (isinstance(numbers, list) and len(numbers) in length and all(map(_is_count, numbers))):
            _refuse(path, f"{key}: {field} is {str(numbers)[:120]}")
    needed = math.prod(shape) * _BYTES_OF[dtype]
    if needed != offsets[1] - offsets[0]:
        _refuse(
            path, f"{key}: {dtype} {shape} needs {needed} bytes, its offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _is_count(number: object) -> bool:
    # Not isinstance: True is an int too. 2**63 bounds the arithmetic that follows, whatever the header claims.
    return type(number) is int and 0 <= number < 2**63


def _check_layout(path: Path, entries: Mapping[str, Entry], payload_bytes: int) -> None:
    """Refuse tensors that do not cover the payload from end to end, without overlap or gap."""
    position, before = 0, "the header"
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            what = "overlaps" if entry.start < position else "leaves a gap after"
            _refuse(path, f"{key} begins at byte {entry.start} and {what} {before}, which ends at {position}")
        position, before = entry.end, key
    if position != payload_bytes:
        what = "truncated" if position > payload_bytes else "followed by foreign bytes"
        _refuse(path, f"it is {what}: its tensors end at byte {position}, the file has {payload_bytes} bytes for them")


def _verify_hashes(path: Path, header: Header, payload: memoryview) -> None:
    # Our own files always carry both; should a flipped bit have renamed one of the keys, the other still betrays it.
    # In files of other programs modelspec's hash outlives the tensors that it was of: merging tools copy headers.
    if MANIFEST_KEY not in header.metadata and HEADER_HASH_KEY not in header.metadata:
        return
    stored = header.metadata.get(PAYLOAD_HASH_KEY, "").removeprefix("0x")
    if stored and stored != (actual := hashlib.sha256(payload).hexdigest()):
        _refuse(path, f"its tensors were altered: {PAYLOAD_HASH_KEY} is {stored}, their sha256 is {actual}")
    described: dict[str, Any] = {"__metadata__": dict(header.metadata)}
    for key, entry in header.entries.items():
        described[key] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.end],
        }
    stored, actual = header.metadata.get(HEADER_HASH_KEY, "absent"), _header_digest(described)
    if stored != actual:
        _refuse(path, f"its header was altered: {HEADER_HASH_KEY} is {stored}, its sha256 is {actual}")


def _refuse(path: Path, what: str, mend: str = GET_AGAIN) -> Never:
    raise AdapterFileError(f"{path}: {what}", mend=mend)
