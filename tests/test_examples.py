"""The examples run as they are, on the sketchbook, with fewer steps of sampling and training."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from documents import ROOT, shorten

LONGEST = 40
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def attached(folder: Path, said: str) -> None:
    assert "snoopy in a meadow: snoopy 1.00" in said
    assert "every weight is what it was: True" in said
    assert len(list(folder.glob("*.png"))) == 3


def composed(folder: Path, said: str) -> None:
    assert "attached: snoopy, spongebob" in said
    lines = [line for line in said.splitlines() if line.endswith((": True", ": False"))]
    assert [line.rpartition(": ")[2] for line in lines] == ["True"] * 3


def converted(folder: Path, said: str) -> None:
    made = folder / "converted"
    assert "is of the format peft" in said
    assert (made / "adapters" / "from-a-lora.safetensors").is_file()
    assert (made / "pytorch_lora_weights.safetensors").is_file()
    assert (made / "by-diffusers.png").is_file()


def served(folder: Path, said: str) -> None:
    answers = eval(said.strip().splitlines()[-1], {})
    assert len(answers) == 4
    assert answers[0] in ({}, {"snoopy": 1.0})


def trained(folder: Path, said: str) -> None:
    assert (folder / "my-erasers" / "adapters" / "church.safetensors").is_file()
    assert "a church in a meadow {'church': 1.0}" in said
    assert "side by side: pictures/grid.png" in said
    assert len(list((folder / "pictures").glob("*.png"))) == 5


CHECKS: dict[str, Callable[[Path, str], None]] = {
    "attach": attached,
    "compose_and_recover": composed,
    "convert_a_lora": converted,
    "serve": served,
    "train_and_apply": trained,
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_examples(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("adapters", "manifests"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for variable in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("SPMHUB_REGISTRY", str(tmp_path))  # as in the clone, whose registry this is a copy of
    shorten(monkeypatch)
    runpy.run_path(str(script), run_name="__main__")
    CHECKS[script.stem](tmp_path, capsys.readouterr().out)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_examples_are_short(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= LONGEST


def test_every_example_has_a_check() -> None:
    assert {script.stem for script in SCRIPTS} == set(CHECKS)
