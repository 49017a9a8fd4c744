"""Small files of a folder that may be a stranger's: never links, devices, pipes or anything large."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from pico import pico_eraser, pico_pipeline
from safetensors.torch import save_file

from spm_hub.adapters.adapter import load_file
from spm_hub.errors import AdapterFileError, RecipeError, RegistryError
from spm_hub.io import safetensors_file
from spm_hub.io.safetensors_file import MAX_TENSORS, read_header
from spm_hub.io.small_files import read_small
from spm_hub.registry import lockfile, storage
from spm_hub.registry.registry import Registry
from spm_hub.training.recipe.recipe import Recipe


@pytest.mark.parametrize("kind", ["link", "link to a device", "pipe", "folder", "large"])
def test_only_small_plain_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / lockfile.LOCK_NAME
    (tmp_path / "elsewhere").write_text("{}")
    match kind:
        case "link":
            path.symlink_to(tmp_path / "elsewhere")
        case "link to a device":
            path.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            with open(path, "wb") as file:
                file.truncate(lockfile.MAX_BYTES + 1)
    tracemalloc.start()
    with pytest.raises(OSError, match=lockfile.LOCK_NAME):
        read_small(path, lockfile.MAX_BYTES)
    with pytest.raises(RegistryError, match=lockfile.LOCK_NAME):
        lockfile.read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_small_plain_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert read_small(tmp_path / "a", 3) == b"abc"
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / "b", 3)


@pytest.mark.parametrize("folder", storage.SUFFIXES)
def test_nothing_is_written_through_a_link(folder: str, tmp_path: Path) -> None:
    owned = Registry(tmp_path / "owned")
    eraser = pico_eraser(pico_pipeline().unet)
    owned.add(eraser)
    (owned.root / folder).mkdir(exist_ok=True)
    made = Registry(tmp_path / "strange")
    made.root.mkdir()
    for name in storage.SUFFIXES:
        target = owned.root if name == folder else made.root / "own"
        (target / name).mkdir(parents=True, exist_ok=True)
        if name == folder:
            (made.root / name).symlink_to(target / name)
        else:
            (made.root / name).mkdir()
    before = {path: path.read_bytes() for path in owned.root.rglob("*") if path.is_file()}
    with pytest.raises(RegistryError, match="is a symbolic link"):
        made.add(eraser, replace=True)
    assert {path: path.read_bytes() for path in owned.root.rglob("*") if path.is_file()} == before


def test_a_journal_is_not_read_through_a_link(tmp_path: Path) -> None:
    made = Registry(tmp_path / "registry")
    eraser = pico_eraser(pico_pipeline().unet)
    made.add(eraser)
    (made.root / storage.STATE / "journal.json").symlink_to("/dev/zero")
    made.add(eraser, replace=True)
    assert [entry.name for entry in made.entries()] == ["snoopy"]


@pytest.mark.parametrize("count", [MAX_TENSORS, MAX_TENSORS + 1, 100_000])
def test_headers_of_very_many_tensors_cost_little(count: int, tmp_path: Path) -> None:
    text = json.dumps({f"{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(count))
    started = time.process_time()
    if count > MAX_TENSORS:
        with pytest.raises(AdapterFileError, match=f"names {count} tensors"):
            read_header(path)
    else:
        assert len(read_header(path).entries) == count
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize("change", ["overwritten", "cut"])
def test_a_change_after_the_check_has_no_effect(change: str, tmp_path: Path) -> None:
    """A mapped file would change under its reader, or end the process where it was cut."""
    eraser = pico_eraser(pico_pipeline().unet)
    path = tmp_path / "x.safetensors"
    eraser.save(path)
    loaded = load_file(path, lazy=True)
    first = next(iter(loaded.increments))
    before = loaded.increments[first].tensors()["up"].clone()
    with open(path, "r+b") as file:
        if change == "cut":
            file.truncate(100)
        else:
            file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded.increments[first].tensors()["up"], before)
    assert before.any()


def test_large_files_are_still_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "x.safetensors")
    maps: list[int] = []
    real = safetensors_file.mmap.mmap
    monkeypatch.setattr(safetensors_file.mmap, "mmap", lambda *args, **kw: maps.append(args[1]) or real(*args, **kw))
    for limit, expected in ((10**9, 0), (100, 1)):
        monkeypatch.setattr(safetensors_file, "MAPPED_FROM", limit)
        _, tensors, _ = safetensors_file.read_tensors(tmp_path / "x.safetensors", mapped=True)
        assert torch.equal(tensors["a"], torch.ones(1000))
        assert len(maps) == expected


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in ("ab", "bc", "cd", "de", "ef", "fg", "gh", "hi")
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB + "target: snoopy\naliases: *i\n",
        "target: &name snoopy\n",
        "target: snoopy\naliases: &list [snoopy dog]\n",
        "base: &b {x: 1}\ntarget: snoopy\n<<: *b\n",
        "target: *nothing\n",
    ],
)
def test_recipes_have_no_anchors(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(RecipeError, match="it has an anchor") as refused:
        Recipe.plan(tmp_path / "recipe.yaml")
    assert len(str(refused.value)) < 1000
    with pytest.raises(RecipeError, match="it has an anchor"):
        Recipe.make(target="snoopy").with_set("aliases=&a [x]")
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize("key", ["seed", "kind", "steps", ""])
def test_integers_of_more_digits_than_python_writes_are_a_sentence(key: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"target: snoopy\n{key or '? '}{': ' if key else ''}0x{'f' * 5000}\n")
    with pytest.raises(RecipeError, match="an integer of 20000 bits") as refused:
        Recipe.plan(tmp_path / "recipe.yaml")
    assert len(str(refused.value)) < 1000
    if key in ("seed", "kind"):
        with pytest.raises(RecipeError, match="an integer of 20000 bits"):
            Recipe.make(target="snoopy", **{key: 16**5000 - 1})
