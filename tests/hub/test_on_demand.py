"""Erasers that need not exist before they are wanted: `attach(pipe, erase=...)` and `spmhub apply --erase`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import test_cli
import torch
from pico import pico_eraser, pico_pipeline

import spm_hub
from spm_hub.adapters.manifest import Base
from spm_hub.errors import UsageError
from spm_hub.models.architectures import fingerprint_of
from spm_hub.registry.registry import Registry
from spm_hub.training import trainer

spmhub = test_cli.spmhub


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """An empty registry to keep new erasers in, whose folder does not exist yet."""
    monkeypatch.delenv("SPMHUB_REGISTRY", raising=False)
    monkeypatch.chdir(tmp_path)
    return Registry(tmp_path / "mine")


def no_training(*args: Any, **given: Any) -> Any:
    pytest.fail("computed an eraser that the registry has")


def test_what_no_registry_has_is_computed_kept_and_found_the_next_time(
    mine: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "spm_hub")
    pipe = pico_pipeline(text_width=64)
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    plain = pipe("snoopy", num_inference_steps=2, output_type="latent", generator=torch.manual_seed(0)).images
    with spm_hub.attach(pipe, erase=["van  gogh", "snoopy"], registry=mine.root) as erasers:
        assert list(erasers) == ["van-gogh", "snoopy"]
        erased = pipe("snoopy", num_inference_steps=2, output_type="latent", generator=torch.manual_seed(0)).images
    assert float((erased - plain).abs().max()) > 1e-3
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())
    assert "no registry had an eraser of 'van gogh', 'snoopy' for " in caplog.text
    assert f"kept in {mine.root}" in caplog.text
    kept = {entry.name: entry for entry in mine.entries()}
    assert set(kept) == {"snoopy", "van-gogh"}
    manifest = kept["van-gogh"].read_manifest()
    assert manifest.base.fingerprint == fingerprint_of(pipe.unet)
    assert (manifest.concept.target, manifest.concept.kind) == ("van gogh", "style")
    monkeypatch.setattr(trainer, "train_together", no_training)
    with spm_hub.attach(pipe, erase="Snoopy", registry=mine.root) as erasers:
        assert list(erasers) == ["snoopy"]
    assert "'Snoopy': snoopy, " in caplog.text


def test_an_eraser_of_another_model_is_not_taken_and_keeps_its_name(
    mine: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = mine.add(pico_eraser(pico_pipeline(channels=(8, 16)).unet, "snoopy")).adapter_path.read_bytes()
    pipe = pico_pipeline(text_width=64)
    with spm_hub.attach(pipe, erase=["snoopy"], registry=mine.root) as erasers:
        (name,) = erasers
    assert name.startswith("snoopy-")
    assert mine.get(name).read_manifest().name == name
    assert (mine.root / "adapters" / "snoopy.safetensors").read_bytes() == other
    monkeypatch.setattr(trainer, "train_together", no_training)
    with spm_hub.attach(pipe, erase=["snoopy"], registry=mine.root) as erasers:
        assert list(erasers) == [name]


def test_an_eraser_that_fits_is_taken_whatever_its_method_and_in_any_spelling(
    mine: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "train_together", no_training)
    pipe = pico_pipeline()
    eraser = pico_eraser(pipe.unet, "nudity", aliases=["nude"])
    base = Base(family="sd1", id="elsewhere", fingerprint=fingerprint_of(pipe.unet))
    fitting = eraser.manifest.model_copy(update={"base": base})
    mine.add(spm_hub.Adapter(fitting, eraser.increments))
    with spm_hub.attach(pipe, erase=["Nudity", "nudity"], registry=mine.root) as erasers:
        assert list(erasers) == ["nudity"]


def test_an_alias_of_anybodys_eraser_is_not_taken_for_the_concept(mine: Registry) -> None:
    pipe = pico_pipeline(text_width=64)
    squatter = pico_eraser(pipe.unet, "sharper-hands", aliases=["nudity"])
    base = Base(family="sd1", id="elsewhere", fingerprint=fingerprint_of(pipe.unet))
    mine.add(spm_hub.Adapter(squatter.manifest.model_copy(update={"base": base}), squatter.increments))
    with spm_hub.attach(pipe, erase=["nudity"], registry=mine.root) as erasers:
        assert list(erasers) == ["nudity"]


def test_what_cannot_be_done_is_refused_and_nothing_is_kept(mine: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    with pytest.raises(UsageError, match=r"one of the concepts to erase is empty"):
        spm_hub.attach(pipe, erase=["snoopy", " "], registry=mine.root)
    with (
        spm_hub.attach(pipe, pico_eraser(pipe.unet, "dog")),
        pytest.raises(UsageError, match=r"(?s)has erasers attached.*detach\(\) first"),
    ):
        spm_hub.attach(pipe, erase=["snoopy"], registry=mine.root)
    monkeypatch.setenv("SPMHUB_REQUIRE_SIGNATURE", str(mine.root.parent / "key.pem"))
    with pytest.raises(UsageError, match=r"(?s)asks for signatures.*spmhub train snoopy --method instant"):
        spm_hub.attach(pipe, erase=["snoopy"], registry=mine.root)
    assert not mine.entries()


def test_the_command_draws_without_concepts_that_nobody_trained(spmhub: test_cli.Spmhub, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    given = ("apply", "--erase", "hot dog, clock", "--registry", str(kept), "--out", str(tmp_path / "pictures"))
    done = spmhub(*given, "--prompt", "a clock", "--steps", "1", "--json")
    assert done.code == 0, done.err
    (shown,) = json.loads(done.out)["gates"]
    assert set(shown["gates"]) == {"hot-dog", "clock"}
    assert shown["gates"]["clock"] == 1
    assert {entry.name for entry in Registry(kept).entries()} == {"hot-dog", "clock"}
    assert "no registry had an eraser of 'hot dog', 'clock' for sketchbook" in " ".join(done.err.split())


def test_an_unknown_name_is_offered_to_be_made(spmhub: test_cli.Spmhub) -> None:
    done = spmhub("apply", "--adapters", "grumpy cat", "--prompt", "a cat")
    assert done.code == 2
    assert "--erase 'grumpy cat', which makes one for this model now" in " ".join(done.err.split())
    none = spmhub("apply", "--prompt", "a cat")
    assert none.code == 2
    assert "no eraser is named" in none.err
