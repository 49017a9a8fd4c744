"""File formats of an installed package: one of two files with a writer, and one that needs its base."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import test_cli
import torch
from pico import pico_pipeline, target_modules
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from test_cli import Spmhub
from test_plugins import install
from torch import Tensor

import spm_hub
from spm_hub import plugins
from spm_hub.adapters.increments import LowRank
from spm_hub.errors import AdapterFileError, CompatibilityError, UsageError

spmhub = test_cli.spmhub

MODULE = """
import spm_hub
from spm_hub.adapters.formats.format import About, Writer
from spm_hub.adapters.increments import Dense, LowRank
from spm_hub.errors import AdapterFileError
from spm_hub.io.safetensors_file import encode, read_tensors

HALVES = ("down.safetensors", "up.safetensors")


def in_halves(source):
    return {file.name for file in source.files}.issuperset(HALVES)


def read_halves(source):
    down, up = (read_tensors(source.path / name)[1] for name in HALVES)
    if lonely := sorted(down.keys() ^ up.keys()):
        raise AdapterFileError(f"{source.path}: {lonely[0]} is in one of the two files only", mend="copy both again")
    return {path: LowRank(down[path], up[path]) for path in down}


def describe_halves(source):
    note = source.path / "concept.txt"
    concept = note.read_text().strip() if note.is_file() else None
    return About(concept=concept, files=tuple(source.path / name for name in HALVES))


def write_halves(manifest, increments, base):
    return {
        "down.safetensors": encode({path: one.down for path, one in increments.items()}, {}),
        "up.safetensors": encode({path: one.up for path, one in increments.items()}, {}),
        "concept.txt": manifest.concept.target.encode(),
    }


def is_scaled(source):
    return bool(source.tensors) and all(key.startswith("rows of ") for key in source.tensors)


def read_scaled(source):
    weights, found = source.base.tensors, {}
    for count, (key, rows) in enumerate(source.tensors.items()):
        source.progress(count + 1, len(source.tensors))
        path = key.removeprefix("rows of ")
        weight = weights.get(f"{path}.weight")
        if weight is None or len(weight) != len(rows):
            raise AdapterFileError(f"{source.place}: the model has no {len(rows)} rows at {path}", mend="--model M")
        found[path] = Dense((rows - 1).reshape(-1, *[1] * (weight.dim() - 1)) * weight)
    return found


halves = spm_hub.Format(
    "halves", "two files, one for each factor", in_halves, read_halves, Writer(("low_rank",), write_halves, suffix=""),
    describe=describe_halves,
)
scaled = spm_hub.Format("scaled", "one number for each row of a weight", is_scaled, read_scaled, needs_base=True)
"""
POINTS = "[spm_hub.formats]\nhalves = other_formats:halves\nscaled = other_formats:scaled\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    install(tmp_path / "site", "other-formats", POINTS, other_formats=MODULE)
    return tmp_path / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(plugins, "_EXAMINED", {})
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "other_formats", raising=False)


@pytest.fixture
def pipe() -> Any:
    return pico_pipeline()


def pairs_of(pipe: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A low-rank pair for two modules, by dotted path."""
    random = torch.Generator().manual_seed(0)
    found = {}
    for path, module in sorted(target_modules(pipe.unet).items())[:2]:
        out, width, *kernel = module.weight.shape
        found[path] = (
            torch.randn(2, width, *kernel, generator=random),
            torch.randn(out, 2, *[1] * len(kernel), generator=random),
        )
    return found


def two_files(folder: Path, pairs: dict[str, tuple[Tensor, Tensor]]) -> Path:
    folder.mkdir()
    save_file({path: down for path, (down, _) in pairs.items()}, folder / "down.safetensors")
    save_file({path: up for path, (_, up) in pairs.items()}, folder / "up.safetensors")
    (folder / "concept.txt").write_text("charlie brown\n")
    return folder


def scaled_file(file: Path, pipe: Any) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    rows = {
        path: torch.rand(len(module.weight), generator=random)
        for path, module in sorted(target_modules(pipe.unet).items())[:2]
    }
    save_file({f"rows of {path}": one for path, one in rows.items()}, file)
    return rows


@pytest.mark.usefixtures("installed")
def test_a_format_of_two_files_is_read_and_written(pipe: Any, tmp_path: Path) -> None:
    pairs = pairs_of(pipe)
    folder = two_files(tmp_path / "brown", pairs)
    done = spm_hub.convert(folder, family="sd1")
    assert (done.read_as, done.written_as, done.files) == ("halves", None, ())
    assert (done.adapter.name, done.adapter.manifest.concept.target) == ("brown", "charlie brown")
    record = done.adapter.manifest.recipe["converted"]
    assert isinstance(record, dict)
    assert (record["format"], record["file"]) == ("halves", "brown")
    assert done.adapter.increments.keys() == pairs.keys()
    for path, (down, up) in pairs.items():
        one = done.adapter.increments[path]
        assert isinstance(one, LowRank)
        assert torch.equal(one.down, down)
        assert torch.equal(one.up, up)
    again = spm_hub.convert(done.adapter, to="halves", out=tmp_path / "again")
    assert {file.name for file in again.files} == {"concept.txt", "down.safetensors", "up.safetensors"}
    assert {file.parent for file in again.files} == {tmp_path / "again"}
    for name in ("down.safetensors", "up.safetensors"):
        written, before = load_tensors(tmp_path / "again" / name), load_tensors(folder / name)
        assert written.keys() == before.keys()
        assert all(torch.equal(written[key], before[key]) for key in before)
    kept = spm_hub.convert(folder, family="sd1", keep=True, registry=tmp_path / "registry")
    assert kept.files == (tmp_path / "registry" / "adapters" / "brown.safetensors",)
    loaded = spm_hub.load("charlie brown", registry=tmp_path / "registry")
    assert (loaded.name, loaded.manifest.recipe) == ("brown", kept.adapter.manifest.recipe)


@pytest.mark.usefixtures("installed")
def test_a_broken_source_of_two_files_is_refused_in_words(pipe: Any, tmp_path: Path) -> None:
    folder = two_files(tmp_path / "brown", pairs_of(pipe))
    whole = (folder / "up.safetensors").read_bytes()
    (folder / "up.safetensors").write_bytes(whole[:-8])
    with pytest.raises(AdapterFileError, match=r"up\.safetensors: it is truncated"):
        spm_hub.convert(folder, family="sd1")
    first, *_ = load_tensors(folder / "down.safetensors")
    save_file({first: torch.ones(4, 2)}, folder / "up.safetensors")
    with pytest.raises(AdapterFileError, match="in one of the two files only"):
        spm_hub.convert(folder, family="sd1")
    (folder / "up.safetensors").unlink()
    with pytest.raises(AdapterFileError, match="halves \\(two files, one for each factor\\)"):
        spm_hub.convert(folder, family="sd1")
    dense = spm_hub.convert(two_files(tmp_path / "other", pairs_of(pipe)), pipe=pipe, to="esd", out=tmp_path / "x")
    with pytest.raises(UsageError, match="halves files cannot hold"):
        spm_hub.convert(dense.files[0], pipe=pipe, to="halves", out=tmp_path / "y")
    assert not (tmp_path / "y").exists()


@pytest.mark.usefixtures("installed")
def test_a_format_that_needs_its_base_gets_it(pipe: Any, tmp_path: Path) -> None:
    rows = scaled_file(tmp_path / "dim.safetensors", pipe)
    with pytest.raises(UsageError, match=r"scaled \(one number for each row of a weight\)") as refused:
        spm_hub.convert(tmp_path / "dim.safetensors")
    assert refused.value.mend == f"spmhub convert {tmp_path / 'dim.safetensors'} --model M, that base"
    steps: list[tuple[int, int]] = []
    done = spm_hub.convert(
        tmp_path / "dim.safetensors", pipe=pipe, progress=lambda step, total, info: steps.append((step, total))
    )
    assert (done.read_as, done.adapter.manifest.increment.kind, steps) == ("scaled", "dense", [(1, 2), (2, 2)])
    for path, factors in rows.items():
        weight = pipe.unet.get_submodule(path).weight
        shape = [-1] + [1] * (weight.dim() - 1)
        found = weight + done.adapter.increments[path].delta_for(weight)
        torch.testing.assert_close(found, weight * factors.reshape(shape), rtol=1e-6, atol=1e-6)
    with pytest.raises(UsageError, match="no format 'scaled' is written"):
        spm_hub.convert(done.adapter, to="scaled", out=tmp_path / "x")
    save_file({"rows of nowhere": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(AdapterFileError, match="no 3 rows at nowhere"):
        spm_hub.convert(tmp_path / "other.safetensors", pipe=pipe)
    with pytest.raises(CompatibilityError):
        spm_hub.convert(done.adapter, pipe=pico_pipeline(channels=(8, 16)), to="lycoris", out=tmp_path / "x")


@pytest.mark.usefixtures("installed")
def test_the_command_converts_lists_and_refuses(
    spmhub: Spmhub, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained(tmp_path / "model")
    two_files(tmp_path / "brown", pairs_of(pipe))
    scaled_file(tmp_path / "dim.safetensors", pipe)
    registry = ("--registry", str(tmp_path / "registry"))
    done = spmhub("convert", "brown", "--base", "sd1", "--json", *registry)
    assert (done.code, json.loads(done.out)["read_as"]) == (0, "halves"), done.err
    done = spmhub("convert", "dim.safetensors", "--model", "model", "--json", *registry)
    assert (done.code, json.loads(done.out)["read_as"]) == (0, "scaled"), done.err
    done = spmhub("convert", "charlie brown", "--to", "halves", "--json", *registry)
    assert (done.code, Path(json.loads(done.out)["files"][0]).parts[0]) == (0, "brown-halves"), done.err
    refused = spmhub("convert", "dim.safetensors", *registry)
    assert refused.code == 2
    assert "--model M" in refused.err
    (tmp_path / "brown" / "down.safetensors").write_bytes(b"nonsense")
    refused = spmhub("convert", "brown", "--base", "sd1", "--force", *registry)
    assert refused.code == 1
    assert "down.safetensors" in refused.err
    listed = spmhub("convert", "brown", "--to", "no-such")
    assert "halves" in listed.err
    assert "scaled" not in listed.err, "it is read only"
    found = {one["subject"]: one["status"] for one in json.loads(spmhub("doctor", "--json").out)}
    assert found["plug-in halves"] == found["plug-in scaled"] == "ok"
