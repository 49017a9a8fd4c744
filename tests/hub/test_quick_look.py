"""The quick look: what it says of erasers whose effect on neighbours is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from pico import pico_eraser, pico_pipeline
from pico_families import family_pipeline

from spm_hub import attach
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import Increment, LowRank
from spm_hub.adapters.manifest import GateDefaults
from spm_hub.evaluation.sketchbook import probe
from spm_hub.hub.making import quick_look
from spm_hub.hub.making.names import nearest, others
from spm_hub.hub.making.quick_look import Look, look, looked
from spm_hub.hub.making.recognition import OthersRecognised, Recognition, named, recognised
from spm_hub.models.loading import load_pipeline
from spm_hub.registry.registry import Registry
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.verdict import (
    OTHERS_RECOGNISED,
    QUICK_LOOK,
    RECOGNISED,
    are_few,
    still_recognised,
    verdict,
)


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
    assert all(0.5 < change < 2 for change in seen.gated.values())
    assert seen.lost == list(seen.gated)
    assert "are lost" in seen.describe()


def test_under_a_gate_that_is_shut_for_them_neighbours_stay_to_the_bit() -> None:
    pipe = pico_pipeline()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    scheduler = pipe.scheduler
    seen = look(pipe, pico_eraser(pipe.unet, gate=GateDefaults(kind="calibrated")))
    still = {name for name, change in seen.gated.items() if change == 0}
    assert still, "the calibrated gate leaves most names alone"
    assert seen.own > 0.1
    assert pipe.scheduler is scheduler
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())


def test_an_eraser_of_nothing_is_said_to_change_hardly_anything() -> None:
    pipe = pico_pipeline()
    seen = look(pipe, scaled(pico_eraser(pipe.unet), 1e-6))
    assert seen.own < 1e-3
    assert "snoopy's own picture hardly changes" in seen.describe()


def test_an_eraser_of_nothing_is_not_enough_and_a_shipped_one_is() -> None:
    pipe = load_pipeline("sketchbook", device="cpu")
    adapter = Registry(Path(__file__).parents[2]).get("snoopy").load()
    nothing, words = looked(pipe, scaled(adapter, 1e-6))
    row = still_recognised(nothing.manifest)
    assert row is not None
    assert (row.metric, row.samples, row.gate) == (RECOGNISED, 20, "always")
    assert row.value >= 0.8
    assert row.reference is not None
    assert row.reference >= 0.8
    kept = next(one for one in nothing.manifest.evaluation if one.metric == OTHERS_RECOGNISED)
    assert (kept.value, kept.gate) == (1.0, "always"), "an eraser of nothing costs no name"
    assert kept.samples >= 8
    seen = f"{20 * row.value:.0f} of 20 pictures"
    assert f"the base still recognises snoopy in {seen} with the eraser fully on" in words
    assert verdict(nothing.manifest).endswith(f", and the base still recognises it in {seen}")
    with attach(pipe, [adapter], gate="always", progress=False):
        _, erased = quick_look._drawn(pipe, [], quick_look._sentences(pipe, [("snoopy",)] * 5, "character"))
    assert recognised(TeacherModel(pipe), erased, "snoopy", [""], seed=1) == [False] * 5


def test_the_base_and_the_probe_agree_on_what_its_pictures_show() -> None:
    """Pictures of snoopy and of no prompt; the probe is a classifier that was trained on drawings alone."""
    pipe = load_pipeline("sketchbook", device="cpu")
    _, latents = quick_look._drawn(pipe, [], ["snoopy"] * 6 + [""] * 6)
    pictures = pipe.image_processor.postprocess(
        pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0].detach(), output_type="pil"
    )
    by_probe = [reading.subject == "snoopy" for reading in probe().read(pictures)]
    assert by_probe == [True] * 6 + [False] * 6
    assert recognised(TeacherModel(pipe), latents, "snoopy", [""], seed=1) == by_probe


def test_the_base_is_asked_about_different_sentences_with_the_concept() -> None:
    names = [("snoopy", "beagle")] * 20
    texts = quick_look._sentences(load_pipeline("sketchbook", device="cpu"), names, "character")
    assert len(set(texts)) > 10
    assert all("snoopy" in text or "beagle" in text for text in texts)
    assert "snoopy" in texts
    few = quick_look._sentences(pico_pipeline(), names, "character")
    assert set(few) < set(texts), "twelve tokens do not hold the longest"


def test_a_concept_that_the_base_does_not_know_is_unclear() -> None:
    assert (
        Recognition(9, 20, 3, 8).describe("flurb") == "the base recognises flurb in 3 of 8 pictures of its own: unclear"
    )
    assert not Recognition(9, 20, 3, 8).is_still_there
    seen = [Recognition(erased, 20, 8, 8).describe("snoopy") for erased in (0, 1, 2)]
    assert [one.removesuffix(" with the eraser fully on") for one in seen] == [
        "the base recognises snoopy in none of 20 pictures",
        "the base recognises snoopy in 1 of 20 pictures",
        "the base still recognises snoopy in 2 of 20 pictures",
    ]


def test_a_picture_of_the_surrogate_is_not_the_concept() -> None:
    """A cat explains a picture better than no prompt does, and "a dog" better than "a cat"."""
    pipe = load_pipeline("sketchbook", device="cpu")
    (_, latents), base = quick_look._drawn(pipe, [], ["a dog"] * 4), TeacherModel(pipe)
    assert not any(recognised(base, latents, "a cat", ["", "a dog"], seed=1))


def test_a_look_is_kept_in_the_manifest_and_a_failing_one_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    adapter = pico_eraser(pipe.unet)
    seen, words = looked(pipe, adapter)
    rows = [one for one in seen.manifest.evaluation if one.protocol == QUICK_LOOK]
    assert next(one.subject for one in rows) == "snoopy"
    assert len(rows) == 2 + 4 + any(one.metric == OTHERS_RECOGNISED for one in rows)
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
    near = nearest(pipe, ["snoopy"], "character", 4)
    assert len(set(near)) == 4
    assert quick_look.why_not(pipe) is None
    (pictures,) = quick_look._drawn(pipe, near)
    assert pictures.isfinite().all()
    assert len(recognised(TeacherModel(pipe), pictures, "snoopy", [""], seed=0)) == 4
    assert len(named(TeacherModel(pipe), pictures, near, [""], seed=0)) == 4


def test_the_nearest_names_are_of_the_concepts_own_kind_and_known_to_the_base() -> None:
    pipe = load_pipeline("sketchbook", device="cpu")
    assert set(nearest(pipe, ["van gogh"], "style", 4)) == {"andy warhol", "caravaggio", "picasso", "rembrandt"}
    near = nearest(pipe, ["snoopy"], "character", 4)
    assert "mickey" in near
    assert not {"snoopy", "tower", "dress"} & set(near), "these are no words of its captions"
    assert len(set(nearest(pipe, ["nudity"], "nsfw", 4))) == 4, "it knows no other people, but other words"


def test_other_names_are_further_ones_and_reproducible() -> None:
    pipe = load_pipeline("sketchbook", device="cpu")
    near = nearest(pipe, ["snoopy"], "character", 4)
    first, second = (others(pipe, ["snoopy"], "character", near, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second
    assert len({*first, *near}) == 12
    assert "snoopy" not in first
    everything = others(pipe, ["snoopy"], "character", near, 10_000, torch.Generator().manual_seed(3))
    assert set(first) < set(everything)
    assert {"teal", "with"} < set(everything), "more names than it knows: all words of its captions are among them"
    assert not {"teal", "with"} & {*near, *first}


def test_the_base_tells_the_subjects_of_its_pictures_apart() -> None:
    """Every picture under its own name, and then all under the next one's."""
    pipe = load_pipeline("sketchbook", device="cpu")
    names = ["dog", "church", "mickey", "apple", "car"]
    (_, latents), base = quick_look._drawn(pipe, [], names), TeacherModel(pipe)
    assert named(base, latents, names, [""], seed=1) == [True] * 5
    assert named(base, latents.roll(1, 0), names, [""], seed=1) == [False] * 5


def test_an_eraser_of_everything_costs_the_other_names() -> None:
    pipe = load_pipeline("sketchbook", device="cpu")
    lost = look(pipe, scaled(Registry(Path(__file__).parents[2]).get("snoopy").load(), 40.0)).others
    assert lost.known >= 8
    assert are_few(lost.kept, lost.known)
    assert f"only {lost.kept} of {lost.known} other names" in lost.describe()


def test_names_are_counted_that_the_base_knew_before() -> None:
    seen = OthersRecognised.of([True, True, False, True, True, True], [True, False, True, True, True, True])
    assert seen == OthersRecognised(kept=4, known=5)
    assert seen.describe() == "without a gate the base would recognise 4 of 5 other names"
    assert OthersRecognised(0, 5).describe().endswith("recognise only 0 of 5 other names: keep its gate")
    assert "too few other names" in OthersRecognised(0, 3).describe()
