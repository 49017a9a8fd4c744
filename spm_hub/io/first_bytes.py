"""Recognises a file by its first bytes; its name may end in anything."""

import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from spm_hub.errors import NotFoundError, RegistryError
from spm_hub.io.wording import quoted

LONGEST = 512
"""The number of first bytes that decide."""

_DOWNLOAD = "open its page, log in there if it asks for it, and download the file itself again"
_ASK = "ask its author for a safetensors file"
_UNPACK = "unpack it, and give the file that is in it"
_PICTURE = "give the model's file, not its preview"
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "git lfs pull"),
    (b"GGUF", "a quantised GGUF file", "fetch its .safetensors version"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"\x89PNG\r\n\x1a\n", "a picture (PNG)", _PICTURE),
    (b"\xff\xd8\xff", "a picture (JPEG)", _PICTURE),
    (b"GIF8", "a picture (GIF)", _PICTURE),
    (b"%PDF-", "a PDF document", _DOWNLOAD),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, of Keras or TensorFlow", _ASK),
    (b"\x93NUMPY", "an array of numpy", _ASK),
)
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|!--|html|head|body|script)", re.IGNORECASE)
_XML = re.compile(rb"(\xef\xbb\xbf)?\s*<(\?xml|error)", re.IGNORECASE)
_JSON = re.compile(rb"(\xef\xbb\xbf)?\s*[\[{]\s*[\"\[{\]}]")


@dataclass(frozen=True)
class Kind:
    """A kind of file. about: in words, with an article.  mend: advice where another file is wanted."""

    about: str
    mend: str


SAFETENSORS = Kind("a safetensors file", "give it a name that ends in .safetensors")
TORCH = Kind("a zip archive of PyTorch's (a pickle); pickles can run code and are never loaded", _ASK)
PICKLE = Kind("a pickle; pickles can run code and are never loaded", _ASK)
EMPTY = Kind("an empty file", "download it again")
ZEROS = Kind("a file that begins with zeros, as an interrupted download leaves it", "download it again")


def kind_of(path: Path) -> Kind | None:
    """Return what the file at `path` is, or None if its first bytes say nothing.

    Raises NotFoundError and RegistryError for a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(LONGEST)
            size = file.seek(0, 2)
        found = recognise(start, size)
        if found is TORCH and not _is_torch(path):
            return Kind("a zip archive", _UNPACK)
        return found
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise RegistryError(f"cannot read {path}: {error.strerror}", mend=f"chmod u+r {quoted(path)}") from error


def recognise(start: bytes, size: int) -> Kind | None:
    """Return what a file of `size` bytes is that begins with `start`, up to `LONGEST` of them."""
    if size == 0:
        return EMPTY
    # First: the length of an honest header may begin with the same bytes as another kind of file.
    if int.from_bytes(start[:8], "little") <= size - 8 and start[8:9] == b"{":
        return SAFETENSORS
    if not any(start):
        return ZEROS
    if start.startswith(b"\x1f\x8b") and (text := _text_kind(_unzipped(start))) is not None:
        return Kind(f"{text.about}, packed with gzip", text.mend)
    for magic, about, mend in _OTHERS:
        if start.startswith(magic):
            return Kind(about, mend)
    if start.startswith(b"PK\x03\x04"):
        return TORCH
    if re.match(rb"\x80[\x02-\x05]", start):
        return PICKLE
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return Kind("a picture (WebP)", _PICTURE)
    if start[257:262] == b"ustar":
        return Kind("a tar archive", _UNPACK)
    return _text_kind(start)


def _text_kind(start: bytes) -> Kind | None:
    """Return the kind of a text that begins with these bytes, None if they are no text."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        start = start.decode("utf-16", errors="ignore").encode()
    if _PAGE.match(start):
        return Kind("a web page", _DOWNLOAD)
    if _XML.match(start):
        return Kind("an XML document, as a server answers with an error", _DOWNLOAD)
    if _JSON.match(start):
        return Kind(f"JSON text, as a server answers with an error: {_excerpt(start)}", _DOWNLOAD)
    if len(start) > 2 and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start):
        return Kind(f"plain text: {_excerpt(start)}", _DOWNLOAD)
    return None


def _unzipped(start: bytes) -> bytes:
    """Return the beginning of what a gzip archive holds, nothing if it is damaged."""
    try:
        return zlib.decompressobj(wbits=31).decompress(start, LONGEST)
    except zlib.error:
        return b""


def _is_torch(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist()[:100_000])
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        # Truncated: the list is at the end. The reader of pickles says so.
        return True


def _excerpt(start: bytes) -> str:
    text = "".join(one if one.isprintable() else " " for one in start[:100].decode(errors="replace"))
    return f"{text.strip()[:80]!r}"
