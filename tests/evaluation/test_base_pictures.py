"""Pictures of a base without erasers are drawn once, and again where anything that decides them is another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from pico import pico_pipeline
from PIL import Image

from spm_hub.evaluation import base_pictures
from spm_hub.evaluation.base_pictures import base_key, kept_or_drawn


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "spm-hub" / "base-pictures"


class Artist:
    """Draws noise, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> list[Image.Image]:
        self.asked += 1
        dice = np.random.default_rng(self.asked)
        return [Image.fromarray(dice.integers(0, 256, (8, 12, 3), dtype=np.uint8)) for _ in range(3)]


def pixels(pictures: list[Image.Image]) -> list[bytes]:
    return [picture.tobytes() for picture in pictures]


def test_a_second_evaluation_has_the_same_pixels_without_drawing(cache: Path) -> None:
    artist = Artist()
    first = kept_or_drawn(base_key(pico_pipeline()), ["prompts", 25], 3, artist)
    again = kept_or_drawn(base_key(pico_pipeline()), ["prompts", 25], 3, artist)
    assert (artist.asked, pixels(again)) == (1, pixels(first))
    assert [picture.size for picture in again] == [(12, 8)] * 3


def one_weight(pipe: Any) -> None:
    with torch.no_grad():
        next(pipe.unet.parameters()).view(-1)[5] += 2.0**-20


def scheduler(pipe: Any) -> None:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.02)


def precision(pipe: Any) -> None:
    pipe.vae.to(torch.bfloat16)


@pytest.mark.parametrize("change", [one_weight, scheduler, precision])
def test_another_base_is_drawn_anew(cache: Path, change: Callable[[Any], None]) -> None:
    artist, pipe = Artist(), pico_pipeline()
    kept_or_drawn(base_key(pipe), [1], 3, artist)
    change(pipe)
    kept_or_drawn(base_key(pipe), [1], 3, artist)
    kept_or_drawn(base_key(pico_pipeline()), [2], 3, artist)
    assert artist.asked == 3


def test_a_damaged_file_is_drawn_anew_and_old_ones_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artist, pipe = Artist(), pico_pipeline()
    kept_or_drawn(base_key(pipe), [0], 3, artist)
    (path,) = cache.iterdir()
    for damage in (b"", path.read_bytes()[:-30], path.read_bytes().replace(b"IDAT", b"IDXX")):
        path.write_bytes(damage)
        kept_or_drawn(base_key(pipe), [0], 3, artist)
    assert artist.asked == 4
    monkeypatch.setattr(base_pictures, "_MOST_BYTES", 2 * path.stat().st_size + 100)
    for number in range(1, 4):
        kept_or_drawn(base_key(pipe), [number], 3, artist)
    assert len(list(cache.iterdir())) == 2
    assert not path.exists()
    monkeypatch.setattr(base_pictures, "_MOST_FILES", 1)
    kept_or_drawn(base_key(pipe), [8], 3, artist)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(base_pictures, "_MOST_BYTES", 100)
    kept_or_drawn(base_key(pipe), [9], 3, artist)
    assert list(cache.iterdir()) == []


def test_weights_that_are_elsewhere_are_not_hashed(cache: Path) -> None:
    artist, pipe = Artist(), pico_pipeline()
    pipe.vae.to("meta")
    kept_or_drawn(base_key(pipe), [0], 3, artist)
    kept_or_drawn(base_key(pipe), [0], 3, artist)
    assert artist.asked == 2
    assert not cache.exists()
