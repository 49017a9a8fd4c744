"""Where a checkpoint is baked to and from, and strengths that no weight could hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pico import pico_eraser, pico_pipeline
from typer.testing import CliRunner

from spm_hub.adapters.baking import bake, read_provenance
from spm_hub.cli.app import app
from spm_hub.errors import RegistryError, UsageError


def test_only_a_checkpoint_is_ever_replaced_by_one(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    registry = tmp_path / "adapters"
    registry.mkdir()
    (registry / "snoopy.safetensors").write_bytes(b"somebody's eraser")
    with pytest.raises(RegistryError, match="is no checkpoint"):
        bake(pipe, [pico_eraser(pipe.unet)], registry, replace=True)
    assert (registry / "snoopy.safetensors").read_bytes() == b"somebody's eraser"
    (tmp_path / "empty").mkdir()
    for place in ("empty", "empty", "new"):
        bake(pipe, [pico_eraser(pipe.unet)], tmp_path / place, replace=True)
    with pytest.raises(RegistryError, match="or add --force"):
        bake(pipe, [pico_eraser(pipe.unet)], tmp_path / "new")


def test_nothing_is_baked_on_top_of_what_was_baked(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    bake(pipe, [pico_eraser(pipe.unet, "mickey")], tmp_path / "safe", base="mine")
    before = {path: path.read_bytes() for path in (tmp_path / "safe").rglob("*") if path.is_file()}
    baked = StableDiffusionPipeline.from_pretrained(tmp_path / "safe", local_files_only=True)
    for out in ("safe", "other"):
        with pytest.raises(UsageError, match="holds mickey already") as caught:
            bake(baked, [pico_eraser(pipe.unet)], tmp_path / out, replace=True)
        assert caught.value.mend == "spmhub bake --model mine --adapters mickey,snoopy --out DIR, all at once"
    assert {path: path.read_bytes() for path in (tmp_path / "safe").rglob("*") if path.is_file()} == before
    assert not (tmp_path / "other").exists()
    assert [eraser.name for eraser in read_provenance(tmp_path / "safe").erasers] == ["mickey"]


def test_the_command_too_leaves_a_baked_base_alone(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    bake(pipe, [pico_eraser(pipe.unet, "mickey")], tmp_path / "safe", base="mine")
    pico_eraser(pipe.unet).save(tmp_path / "snoopy.safetensors")
    given = ["--model", str(tmp_path / "safe"), "-a", str(tmp_path / "snoopy.safetensors")]
    done = CliRunner().invoke(app, ["bake", *given, "--out", str(tmp_path / "safe"), "--force"])
    assert done.exit_code == 2, done.output
    assert "holds mickey already" in " ".join(done.stderr.split())


def test_strengths_beyond_what_weights_can_hold_are_refused(tmp_path: Path) -> None:
    pipe = pico_pipeline().to(torch.float16)
    eraser = pico_eraser(pipe.unet)
    with pytest.raises(UsageError, match=r"under snoopy at 1e\+06 are beyond what float16 holds"):
        bake(pipe, [eraser], tmp_path / "out", strength=1e6)
    assert not (tmp_path / "out").exists()
