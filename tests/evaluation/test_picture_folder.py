"""Pictures of runs in one folder: nothing that is there is ever replaced."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from PIL import Image

from spm_hub.errors import RegistryError
from spm_hub.evaluation.pictures import DrawingOptions, PictureFolder, PromptPictures, read_prompts, save
from spm_hub.hub.card import read_pairs
from spm_hub.io import atomic

PROMPTS = ["snoopy", "snoopy", "葛飾北斎", "北斎", "x" * 300, "x" * 299 + "y", "../../up", "CON", "a/b\\c:d*?"]


def shown(prompts: list[str], shade: int) -> list[PromptPictures]:
    pictures = {name: (Image.new("RGB", (4, 4), (shade, at, 0)),) for at, name in enumerate(("without", "with"))}
    return [PromptPictures(prompt, {"snoopy": 1.0}, pictures) for prompt in prompts]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_long_and_foreign_prompts_and_later_runs_have_files_of_their_own(tmp_path: Path) -> None:
    out, before = tmp_path / "Bilder – 絵", dict[str, bytes]()
    out.mkdir()
    (out / "grid.png").write_bytes(b"somebody's own")
    (out / "03-holiday.png").write_bytes(b"somebody's own")
    for run in range(3):
        before = contents(out)
        made = save(
            shown(PROMPTS, run), out, DrawingOptions(), title="snoopy", grid=True, described={"adapters": ["snoopy"]}
        )
        after = contents(out)
        assert {name: after[name] for name in before} == before, "nothing was replaced"
        paths = [path for group in made.values() for path in group]
        assert len(paths) == len(set(paths)) == 2 * len(PROMPTS) + 1 == len(after) - len(before)
        assert {path.name for path in paths} == after.keys() - before.keys()
        assert all(path.parent == out for path in paths)
    assert {"grid.png", "grid-2.png", "grid-3.png", "grid-4.png"} <= after.keys()
    read = [pair for pair in read_pairs(out, "snoopy") if pair.prompt == PROMPTS[4]]
    assert len(read) == 3
    assert len({pair.without for pair in read} | {pair.with_ for pair in read}) == 6


def test_two_runs_at_once_take_no_name_from_each_other(tmp_path: Path) -> None:
    folders = [PictureFolder(tmp_path, DrawingOptions(), {}) for _ in range(2)]
    for index in range(3):
        for run, folder in enumerate(folders):
            folder.keep(index, shown(["snoopy"], run)[0])
    paths = [path for folder in folders for group in folder.files.values() for path in group]
    assert len(set(paths)) == 12 == len(list(tmp_path.iterdir()))
    assert {Image.open(path).getpixel((0, 0))[0] for path in folders[0].files["with"]} == {0}


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_replaces_none(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links on this file system")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    atomic.write_new(tmp_path / "a", b"1")
    with pytest.raises(FileExistsError):
        atomic.write_new(tmp_path / "a", b"2")
    assert contents(tmp_path) == {"a": b"1"}
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RegistryError):
        atomic.write_new(tmp_path / "file" / "a", b"2")


def test_a_file_of_prompts_from_windows(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("snoopy\r\nKäthe\r\n".encode("utf-8-sig"))
    assert read_prompts(tmp_path / "prompts.txt") == ["snoopy", "Käthe"]
