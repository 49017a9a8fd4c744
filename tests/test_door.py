"""The public door: the five lines of Python that everything else is behind."""

from pathlib import Path

import pytest
import torch
from pico import pico_pipeline

import spm_hub
from spm_hub.adapter import increment_info
from spm_hub.errors import RecipeError, UsageError
from spm_hub.hub.registry import Registry
from spm_hub.increments import Increment, LowRank
from spm_hub.manifest import Base, Concept

MODULE = "mid_block.attentions.0.proj_in"


def test_names_paths_and_adapters_are_attached_alike(tmp_path: Path) -> None:
    pipe = pico_pipeline()
    weight = pipe.unet.get_submodule(MODULE).weight
    random = torch.Generator().manual_seed(0)
    adapters = []
    for name in ("snoopy", "mickey", "nudity"):
        down = torch.randn(1, *weight.shape[1:], generator=random)
        increments: dict[str, Increment] = {
            MODULE: LowRank(down, torch.randn(weight.shape[0], 1, 1, 1, generator=random))
        }
        manifest = spm_hub.Manifest(
            name=name,
            concept=Concept(target=name),
            increment=increment_info(increments),
            base=Base(family="sd1", id="pico", fingerprint=""),
            recipe={},
        )
        adapters.append(spm_hub.Adapter(manifest, increments))
    Registry(tmp_path).add(adapters[0])
    adapters[1].save(tmp_path / "alone.safetensors")
    before = weight.clone()
    with spm_hub.attach(
        pipe, ["snoopy", tmp_path / "alone.safetensors", adapters[2]], registry=tmp_path, gate="always", mode="fold"
    ) as erasers:
        assert set(erasers.names) == {"snoopy", "mickey", "nudity"}
        assert set(erasers.gates("a dog").values()) == {1.0}
    assert torch.equal(pipe.unet.get_submodule(MODULE).weight, before)
    with spm_hub.attach(pipe, "snoopy", registry=tmp_path) as erasers:
        assert list(erasers.names) == ["snoopy"]


@pytest.mark.parametrize("concept", ["", "  "])
def test_an_empty_concept(concept: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        spm_hub.train(concept)


def test_an_unknown_key_or_method() -> None:
    with pytest.raises(RecipeError, match="step"):
        spm_hub.train("snoopy", stepz=3)
    with pytest.raises(RecipeError, match="method"):
        spm_hub.train("snoopy", method="spn")


def test_an_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = spm_hub.nothing
