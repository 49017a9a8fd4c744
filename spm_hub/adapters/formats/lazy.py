"""Increments that stay in their file until one is needed, so that thousands of erasers cost little."""

import threading
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from spm_hub.adapters.formats import fused_names
from spm_hub.adapters.formats.lora_config import scaling_in
from spm_hub.adapters.formats.module_names import flat
from spm_hub.adapters.formats.reading import read_increments
from spm_hub.adapters.increments import Increment, check_effect
from spm_hub.errors import AdapterFileError
from spm_hub.io.safetensors_file import Entry, Header, empty_like, read_tensors

_Layout = frozenset[tuple[str, str, tuple[int, ...]]]
_ANY_FILE = "a file of this layout"


class StoredIncrements(Mapping[str, Increment]):
    """The increments of a file, by module path.

    outline: the same without numbers, on the meta device; one object for all files of one layout.
    The file is read, or mapped into memory if it is large, and checked whole (hashes, finite numbers) when an increment
    is first asked for.
    sha256: the file's hash in its manifest, None without one.  modules: the dotted paths in the manifest.
    Reading raises AdapterFileError if the file was altered or replaced since.
    """

    def __init__(self, path: Path, header: Header, sha256: str | None, modules: tuple[str, ...]) -> None:
        self._path, self._sha256, self._modules = path, sha256, modules
        try:
            self._layout, self.outline = _outline(_layout(header), modules)
        except AdapterFileError as error:
            # The cached outline knows the layout, but not the file.
            raise AdapterFileError(error.message.replace(_ANY_FILE, str(path), 1), mend=error.mend) from error
        self._lock = threading.Lock()
        self._read: Mapping[str, Increment] | None = None

    @property
    def nbytes(self) -> int:
        """The number of bytes in memory now."""
        read = self._read
        return 0 if read is None else sum(increment.nbytes for increment in read.values())

    def release(self) -> None:
        """Give the memory back; the next access reads the file again."""
        self._read = None

    def __getitem__(self, module: str) -> Increment:
        with self._lock:
            if self._read is None:
                self._read = self._all()
            return self._read[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)

    def _all(self) -> Mapping[str, Increment]:
        header, tensors, sha256 = read_tensors(self._path, mapped=True)
        if _layout(header) != self._layout or self._sha256 not in (None, sha256):
            raise AdapterFileError(
                f"{self._path} was replaced after it was attached: its sha256 is {sha256}, expected was "
                f"{self._sha256 or 'a file with other tensors'}",
                mend="detach, and attach it again",
            )
        scaling = scaling_in(header.metadata, self._path)
        increments = read_increments(self._path, tensors, scaling)
        check_effect(increments, self._path)
        return with_dots(increments, self._modules)


def with_dots(increments: Mapping[str, Increment], modules: tuple[str, ...]) -> dict[str, Increment]:
    """Return the increments under the dotted paths in `modules`; a file may keep these with . as _ only.

    Rows of a fused weight that belong to a module which is not in `modules` are padding, and left out.
    """
    dotted = {flat(module): module for module in modules}
    found = {dotted.get(flat(name), name): increment for name, increment in increments.items()}
    padding = {path for path in found.keys() - set(modules) if set(modules).intersection(fused_names.together(path))}
    return {path: increment for path, increment in found.items() if path not in padding}


def _layout(header: Header) -> _Layout:
    return frozenset((key, entry.dtype, entry.shape) for key, entry in header.entries.items())


# Files of one layout differ in their numbers only, so thousands of them share one outline.
@lru_cache(maxsize=64)
def _outline(layout: _Layout, modules: tuple[str, ...]) -> tuple[_Layout, Mapping[str, Increment]]:
    tensors = {key: empty_like(Entry(dtype, shape, 0, 0)) for key, dtype, shape in sorted(layout)}
    return layout, MappingProxyType(with_dots(read_increments(Path(_ANY_FILE), tensors), modules))
