"""Pickles that only hold what weights_only lets in, and still are attacks."""

import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from spm_hub.adapters.formats import minimalist
from spm_hub.errors import AdapterFileError
from spm_hub.io import pickles


def with_pickle(path: Path, pickled: bytes) -> Path:
    """A file as torch.save writes it, but for the pickle in it."""
    torch.save({"a": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    return path


@pytest.mark.parametrize(
    "made", [b"builtins\nbytearray", b"__builtin__\nbytearray", b"torch\nTensor", b"torch\nFloatTensor"]
)
def test_memory_is_not_made_of_a_number(made: bytes, tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.pt", b"\x80\x02c" + made + b"\n\x8a\x05\x00\x00\x00\x40\x00\x85R.")
    tracemalloc.start()
    with pytest.raises(AdapterFileError, match="not loaded"):
        pickles.read(path)
    # Under this name it was once read as another format's, past all checks.
    with pytest.raises(AdapterFileError, match="not loaded"):
        minimalist.read_masks([path.rename(tmp_path / "ff.pt")])
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_lists_of_lists_of_the_same_lists(tmp_path: Path) -> None:
    lists = b"".join(b"]q" + bytes([n + 1]) + b"(" + (b"h" + bytes([n])) * 10 + b"e" for n in range(12))
    path = with_pickle(tmp_path / "a.pt", b"\x80\x02]q\x00" + lists + b".")
    started = time.process_time()
    with pytest.raises(AdapterFileError, match="without end"):
        pickles.read(path)
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    "pickled", [b"", b".", b"\x80\x02", b"\x80\xff.", b"(" * 10_000, b"\x80\x02c\n\nR.", b"\x80\x02h\x07."]
)
def test_pickles_that_are_none(pickled: bytes, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError):
        pickles.read(with_pickle(tmp_path / "a.pt", pickled))
