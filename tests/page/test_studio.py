"""What visitors of the page share: each sees the pictures of a pipeline with their own erasers."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pico import pico_eraser, pico_pipeline

from spm_hub.attachment.attachment import attach
from spm_hub.errors import NotFoundError, UsageError
from spm_hub.models.base_choice import BaseChoice
from spm_hub.page import markup
from spm_hub.page.studio import Studio, checked_number, in_words
from spm_hub.registry.registry import Registry
from spm_hub.serving.requests import Limits

STEPS = 3


def adapter(name):
    return pico_eraser(pico_pipeline().unet, name, seed=sum(map(ord, name)))


@pytest.fixture
def studio(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    kept = Registry(tmp_path / "registry")
    for name in ("snoopy", "mickey"):
        kept.add(adapter(name))
    studio = Studio({"pico": BaseChoice("pico", pipe=pico_pipeline())}, Limits(16, steps=9), registry=kept.root)
    yield studio
    studio.close()


def reference(prompt, names, seed=0):
    pipe = pico_pipeline()
    with attach(pipe, [adapter(name) for name in names]):
        made = pipe(prompt, generator=torch.Generator().manual_seed(seed), num_inference_steps=STEPS)
    return np.asarray(made.images[0]).astype(int)


def last(studio, prompt, sets, seed=0):
    *_, frame = studio.draw("pico", prompt, sets, seed=seed, steps=STEPS)
    return [np.asarray(picture).astype(int) for picture in frame.pictures]


def test_visitors_at_once_see_their_own_erasers(studio):
    asked = [("snoopy", {"snoopy": 1.0}), ("mickey", {"mickey": 1.0}), ("snoopy", {"mickey": 1.0, "snoopy": 1.0})] * 2
    with ThreadPoolExecutor(6) as visitors:
        found = list(visitors.map(lambda one: last(studio, one[0], [{}, one[1]]), asked))
    for (prompt, chosen), (without, with_) in zip(asked, found, strict=True):
        assert abs(without - reference(prompt, [])).max() <= 1
        assert abs(with_ - reference(prompt, list(chosen))).max() <= 1


def test_pictures_emerge_step_by_step(studio):
    frames = list(studio.draw("pico", "snoopy", [{}, {"snoopy": 1.0}], seed=1, steps=STEPS))
    assert [frame.step for frame in frames[:-1]] == [0, 1, 2, 3]
    assert frames[0].pictures == (None, None)
    assert all(picture is not None for frame in frames[1:] for picture in frame.pictures)
    assert set(frames[-1].drawn[1].gammas) == {"snoopy"}
    why = markup.gammas(studio.explain("pico", "snoopy <b>", ["snoopy"]), {"snoopy": 1.0})
    assert "snoopy" in why
    assert "<b>" not in why


def test_a_newer_version_of_an_eraser_is_used(studio):
    before = last(studio, "snoopy", [{"snoopy": 1.0}])[0]
    newer = pico_eraser(pico_pipeline().unet, "snoopy", seed=99)
    studio.lend("pico", newer)
    assert abs(last(studio, "snoopy", [{"snoopy": 1.0}])[0] - before).max() > 1
    studio.take_back("pico", "snoopy")
    assert (last(studio, "snoopy", [{"snoopy": 1.0}])[0] == before).all(), "the registry's again"


def test_mistakes_in_words(studio):
    for prompt, names, steps, kind in (
        (" ", [], STEPS, UsageError),
        ("x" * 2001, [], STEPS, UsageError),
        ("a dog", [], 10, UsageError),
        ("a dog", ["snopy"], STEPS, NotFoundError),
    ):
        with pytest.raises(kind) as caught:
            list(studio.draw("pico", prompt, [dict.fromkeys(names, 1.0)], seed=0, steps=steps))
        assert "\n" not in in_words(caught.value)
    for value in (None, 1.5, -1, 11, float("nan"), "3"):
        with pytest.raises(UsageError, match="whole number from 0 to 10"):
            checked_number("Seed", value, 0, 10)
    assert studio.similarity("snoopy", "snoopy") == pytest.approx(1.0)
    assert abs(studio.similarity("snoopy", "mickey")) < 0.5
    assert "Measured" in markup.report(studio.manifest("snoopy")) or "Nothing was measured" in markup.report(
        studio.manifest("snoopy")
    )


def test_losses_are_drawn_where_they_are():
    assert markup.curve((), 10) == ""
    drawn = markup.curve(((1, "er<ase", 4.0), (1, "anchor", 0.0), (5, "er<ase", 1.0), (10, "er<ase", 2.0)), 10)
    assert re.findall(r"points='([^']*)'", drawn) == ["0.1000,0.0000 0.5000,0.7500 1.0000,0.5000", "0.1000,1.0000"]
    assert "er&lt;ase 2<" in drawn
    assert "<ase" not in drawn


def test_strengths_are_those_that_the_page_offers():
    strengths = pytest.importorskip("spm_hub.page.strengths", reason='needs pip install "spm-hub[ui]"')
    assert strengths.of(["snoopy", "mickey"], {"mickey": 0.5, "gone": 2}) == {"snoopy": 1.0, "mickey": 0.5}
    assert strengths.of([], None) == {}
    for value in (-0.1, 3.1, float("nan"), float("inf"), "1", None):
        with pytest.raises(UsageError, match="a number from 0 to 3"):
            strengths.of(["snoopy"], {"snoopy": value})
