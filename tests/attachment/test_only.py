"""Erasers that are chosen for each prompt: every row is as a pipeline with these erasers alone draws it."""

import numpy as np
import pytest
import torch
from pico import pico_eraser, pico_pipeline

from spm_hub.attachment.attachment import attach
from spm_hub.errors import NotFoundError, UsageError

PROMPTS = ["snoopy on the beach", "a dog", "mickey mouse", "a church"]
CHOSEN = [["snoopy"], [], {"mickey": 0.5}, {"mickey": 2.0, "snoopy": 1.0}]


@pytest.fixture(scope="module")
def pipe():
    return pico_pipeline()


@pytest.fixture(scope="module")
def adapters(pipe):
    return [pico_eraser(pipe.unet, name, seed) for seed, name in enumerate(("snoopy", "mickey", "pikachu"), start=1)]


def draw(pipe, prompts, seeds, images=1):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        prompts, generator=generators, num_inference_steps=3, num_images_per_prompt=images, output_type="np"
    ).images


def alone(pipe, adapters, prompt, chosen, seeds):
    """The pictures of a pipeline to which only the chosen erasers are attached."""
    strength = dict(chosen) if isinstance(chosen, dict) else None
    with attach(pipe, [one for one in adapters if one.name in chosen], strength=strength):
        return draw(pipe, prompt, seeds, len(seeds))


@pytest.mark.parametrize("images", [1, 2])
def test_each_row_has_its_own_erasers(pipe, adapters, images):
    seeds = list(range(len(PROMPTS) * images))
    with attach(pipe, adapters) as erasers, erasers.only(CHOSEN):
        together = draw(pipe, PROMPTS, seeds, images)
        assert erasers.last_gammas["pikachu"] == [0.0] * len(PROMPTS)
        assert [gamma > 0 for gamma in erasers.last_gammas["mickey"]] == [False, False, True, True]
    for row, (prompt, chosen) in enumerate(zip(PROMPTS, CHOSEN, strict=True)):
        part = slice(row * images, (row + 1) * images)
        wanted = alone(pipe, adapters, prompt, chosen, seeds[part])
        np.testing.assert_allclose(together[part], wanted, atol=2e-5)
    # The bound would see a mixed row: what other erasers make of the same prompt differs by far more.
    assert abs(alone(pipe, adapters, PROMPTS[0], ["mickey"], [0])[0] - together[0]).max() > 1e-3


def test_one_prompt_is_bit_for_bit_as_alone(pipe, adapters):
    bare = draw(pipe, PROMPTS[0], [5])
    with attach(pipe, adapters) as erasers:
        every = draw(pipe, PROMPTS[0], [5])
        with erasers.only([["snoopy"]]):
            chosen = draw(pipe, PROMPTS[0], [5])
        with erasers.only([[]]):
            assert (draw(pipe, PROMPTS[0], [5]) == bare).all()
        assert (draw(pipe, PROMPTS[0], [5]) == every).all()
    assert (chosen == alone(pipe, adapters, PROMPTS[0], ["snoopy"], [5])).all()


def test_wrong_choices_change_nothing(pipe, adapters):
    with attach(pipe, adapters) as erasers:
        every = draw(pipe, PROMPTS[0], [5])
        with pytest.raises(NotFoundError, match="no eraser 'snopy'"), erasers.only([["snopy"]]):
            pass
        with pytest.raises(UsageError, match="not a list"), erasers.only("snoopy"):
            pass
        with pytest.raises(UsageError, match="finite"), erasers.only([{"snoopy": float("nan")}]):
            pass
        with pytest.raises(UsageError, match="chosen for 1 prompt, and this call has 2"), erasers.only([["snoopy"]]):
            draw(pipe, PROMPTS[:2], [5, 6])
        assert (draw(pipe, PROMPTS[0], [5]) == every).all()
