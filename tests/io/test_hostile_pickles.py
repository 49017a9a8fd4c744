"""Pickles that only hold what weights_only lets in, and still are attacks."""

import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
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


def test_a_pickle_in_front_of_a_zip_is_not_read(tmp_path: Path) -> None:
    """A zip is found by its end, but PyTorch goes by the first bytes."""
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    pickled = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x40\x00\x85R."
    (tmp_path / "both.pt").write_bytes(pickled + (tmp_path / "a.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "both.pt") as archive:
        assert archive.namelist()
    tracemalloc.start()
    with pytest.raises(AdapterFileError, match="does not begin as a zip archive"):
        pickles.read(tmp_path / "both.pt")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


class Config:
    """An object beside the tensors, as of a trainer."""


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        ({"lr": np.float64(1e-4)}, "multiarray.scalar"),
        ({"config": Config()}, "test_hostile_pickles.Config"),
        ({"folder": Path("/tmp")}, "PosixPath"),
    ],
)
def test_the_object_that_is_no_tensor_is_named(beside: dict[str, object], named: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(3)}, "hyper_parameters": beside}, tmp_path / "style.ckpt")
    with pytest.raises(AdapterFileError, match="was not loaded") as refused:
        pickles.read(tmp_path / "style.ckpt")
    told = str(refused.value)
    assert named in told
    assert told.isprintable() or told.replace("\n", "").isprintable()
    assert "two options" not in told
    assert len(told.splitlines()) == 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_checked_too(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.ones(4).to(dtype)
    torch.save({"a": tensor}, tmp_path / "a.pt")
    assert torch.equal(pickles.read(tmp_path / "a.pt")["a"].float(), torch.ones(4))
    bad = tensor.view(torch.uint8).clone()
    bad[2] = 0x7F
    torch.save({"a": bad.view(dtype)}, tmp_path / "a.pt")
    with pytest.raises(AdapterFileError, match="NaN"):
        pickles.read(tmp_path / "a.pt")
