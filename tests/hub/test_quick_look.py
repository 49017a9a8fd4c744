"""The quick look: what it says of erasers whose effect on neighbours is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from pico import pico_eraser, pico_pipeline
from pico_families import family_pipeline

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import Increment, LowRank
from spm_hub.adapters.manifest import GateDefaults
from spm_hub.hub.making import quick_look
from spm_hub.hub.making.quick_look import PROTOCOL, Look, look, looked, neighbours
from spm_hub.models.loading import load_pipeline


def scaled(adapter: Adapter, by: float) -> Adapter:
    increments: Mapping[str, Increment] = {
        path: LowRank(one.down, by * one.up) for path, one in adapter.increments.items() if isinstance(one, LowRank)
    }
    return Adapter(adapter.manifest, increments)


def test_an_eraser_that_changes_every_prompt_alike_loses_its_neighbours() -> None:
    """A random increment knows no concept: fully on, it changes neighbours as much as the concept."""
    pipe = pico_pipeline()
    seen = look(pipe, pico_eraser(pipe.unet, gate=GateDefaults(kind="always")))
    assert len(seen.gated) == 4
    assert "snoopy" not in seen.gated
    assert seen.gated == pytest.approx(seen.full)
    assert all(0.5 < change < 2 for change in seen.full.values())
    assert seen.lost == list(seen.gated)
    assert "are lost" in seen.describe()


def test_under_a_gate_that_is_shut_for_them_neighbours_stay_to_the_bit() -> None:
    pipe = pico_pipeline()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    scheduler = pipe.scheduler
    seen = look(pipe, pico_eraser(pipe.unet, gate=GateDefaults(kind="calibrated")))
    still = {name for name, change in seen.gated.items() if change == 0}
    assert still, "the calibrated gate leaves most names alone"
    assert min(seen.full.values()) > 0.1
    assert pipe.scheduler is scheduler
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())


def test_an_eraser_of_nothing_is_said_to_change_hardly_anything() -> None:
    pipe = pico_pipeline()
    seen = look(pipe, scaled(pico_eraser(pipe.unet), 1e-6))
    assert seen.own < 1e-3
    assert "snoopy's own picture hardly changes" in seen.describe()


def test_a_look_is_kept_in_the_manifest_and_a_failing_one_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    adapter = pico_eraser(pipe.unet)
    seen, words = looked(pipe, adapter)
    rows = [one for one in seen.manifest.evaluation if one.protocol == PROTOCOL]
    assert next(one.subject for one in rows) == "snoopy"
    assert len(rows) == 1 + 2 * 4
    assert words.startswith("snoopy: a quick look: ")

    def out_of_memory(*args: object) -> Look:
        raise RuntimeError("out of memory: tried to allocate a lot\nmore lines")

    monkeypatch.setattr(quick_look, "look", out_of_memory)
    assert looked(pipe, adapter) == (
        adapter, "snoopy: no quick look, as out of memory: tried to allocate a lot; see spmhub apply --compare"
    )  # fmt: skip


@pytest.mark.parametrize("family", ["sdxl", "flux-schnell", "pixart"])
def test_every_family_is_looked_at(family: str) -> None:
    pipe = family_pipeline(family)
    near = neighbours(pipe, ["snoopy"], "character")
    assert len(set(near)) == 4
    assert quick_look.why_not(pipe) is None
    assert quick_look._drawn(pipe, near).isfinite().all()


def test_the_nearest_names_are_of_the_concepts_own_kind() -> None:
    from spm_hub.training.data.prompts import Words

    pipe = load_pipeline("sketchbook", device="cpu")
    words = Words.load()
    assert set(neighbours(pipe, ["van gogh"], "style")) <= set(words.artists) - {"van gogh"}
    assert not {"snoopy"} & set(neighbours(pipe, ["snoopy"], "character"))
