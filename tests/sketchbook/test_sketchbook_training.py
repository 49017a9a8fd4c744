"""The sketchbook's training script: killed while it writes, it goes on to the same files when it is run again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, ResNetForImageClassification

from spm_hub.sketchbook import train

pytestmark = pytest.mark.slow

SMALLEST = ["--drawings", "24", "--probe-steps", "1", "--base-steps", "0", "--chalk-steps", "0"]


class KilledError(BaseException):
    """Replaces SIGKILL: our code does not catch it."""


def digest(folder: Path) -> dict[str, str]:
    """Every file that the script wrote with its sha256, less how long the stages took and where files were read."""

    def content(file: Path) -> bytes:
        if file.name != "config.json":
            return file.read_bytes()
        known = json.loads(file.read_bytes())
        known.pop("_name_or_path", None)
        return json.dumps(known).encode()

    return {
        str(file.relative_to(folder)): hashlib.sha256(content(file)).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "seconds.json"
    }


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, str]]:
    """The script with hardly any drawings, whose networks stay as they were made."""
    for stage in ("train_clip", "train_vae", "train_decoder"):
        monkeypatch.setattr(train, stage, lambda *_: None)

    def call(out: Path) -> dict[str, str]:
        monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), *SMALLEST])
        train.main()
        return digest(out)

    return call


WRITERS: tuple[tuple[Any, str], ...] = (
    (safetensors.torch, "save_file"),
    (CLIPModel, "save_pretrained"),
    (ResNetForImageClassification, "save_pretrained"),
    (AutoencoderKL, "save_pretrained"),
)


def test_killed_at_any_file_it_goes_on_to_the_same_files(
    run: Callable[[Path], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = run(tmp_path / "whole"), tmp_path / "killed"
    for owner, name in WRITERS:
        write = getattr(owner, name)

        def dying(*given: Any, write: Any = write, **options: Any) -> None:
            """Leave half of the file, as a kill in the middle of writing does."""
            write(*given, **options)
            place = next(Path(one) for one in given if isinstance(one, str | Path))
            file = place if place.is_file() else max(place.rglob("*.json"), key=lambda file: file.stat().st_mtime_ns)
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            raise KilledError

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, dying)
            with pytest.raises(KilledError):
                run(out)
    assert run(out) == whole
    assert not any(path.name.endswith(".tmp") for path in out.iterdir())
