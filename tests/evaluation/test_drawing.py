"""Drawing pictures: overflowing latents, and folders that cannot be written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pico import pico_eraser, pico_pipeline
from pico_families import family_pipeline
from PIL import Image
from typer.testing import CliRunner

from spm_hub.attachment.attachment import attach
from spm_hub.cli.app import app
from spm_hub.errors import RegistryError, UsageError
from spm_hub.evaluation.pictures import DrawingOptions, PromptPictures, show
from spm_hub.evaluation.sketchbook import DetectionCase, paint
from spm_hub.evaluation.step_callback import StepCallback
from spm_hub.io.atomic import check_writable


def test_a_picture_of_numbers_that_overflow_is_an_error_and_not_black() -> None:
    """A black picture would pass for an erased one."""
    pipe = pico_pipeline()
    drawing = DrawingOptions(steps=2)
    show(pipe, [pico_eraser(pipe.unet)], ["snoopy"], drawing, strength={"snoopy": 2.0})
    with pytest.raises(UsageError, match="produced NaN or infinite latents for 'snoopy'"):
        show(pipe, [pico_eraser(pipe.unet)], ["snoopy"], drawing, strength={"snoopy": 1e38}, compare=False)
    show(pipe, [pico_eraser(pipe.unet)], ["snoopy"], drawing)


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux-schnell", "pixart"])
def test_steps_are_counted_and_overflow_is_found_in_every_family(family: str) -> None:
    """PixArt's pipelines have an older callback than all others."""
    pipe = family_pipeline(family)
    # Its resolutions are 256 and more, unless they may be any.
    small = {"use_resolution_binning": False} if family == "pixart" else {}
    steps: list[tuple[int, int]] = []
    for attached in (False, True):
        with attach(pipe, []) if attached else nullcontext():
            steps.clear()
            callback = StepCallback(pipe, lambda step, total: steps.append((step, total)))
            drawn = pipe("snoopy", num_inference_steps=2, output_type="latent", **callback.options, **small).images
            assert steps == [(1, 2), (2, 2)]
            assert torch.equal(callback.latents, drawn)
    callback.check("snoopy")
    callback.latents = callback.latents / 0.0
    with pytest.raises(UsageError, match="produced NaN or infinite latents for 'snoopy'"):
        callback.check("snoopy")


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RegistryError, match="cannot write"):
        check_writable(tmp_path / "taken" / "pictures")
    check_writable(tmp_path / "new" / "pictures")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    out = str(tmp_path / "taken" / "pictures")
    done = CliRunner().invoke(app, ["apply", "-a", "snoopy", "-a", "mickey", "-p", "a dog", "--out", out])
    assert done.exit_code in (1, 2)
    assert "cannot write" in done.stderr


def test_what_was_drawn_before_the_end_is_handed_out_at_once() -> None:
    pipe = pico_pipeline()
    seen: list[tuple[int, str, float]] = []

    def each(index: int, shown: PromptPictures) -> None:
        (condition,) = shown.pictures
        seen.append((index, condition, round(shown.gates["snoopy"], 6)))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show(pipe, [pico_eraser(pipe.unet)], ["snoopy", "a dog"], DrawingOptions(steps=1), each=each)
    with attach(pipe, [pico_eraser(pipe.unet)]) as erasers:
        gates = [round(erasers.gates(prompt)["snoopy"], 6) for prompt in ("snoopy", "a dog")]
    assert seen == [(0, "without", gates[0]), (1, "without", gates[1]), (0, "with", gates[0])]


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_a_batch_draws_the_pictures_of_one_prompt_at_a_time(strength: float) -> None:
    pipe = pico_pipeline()
    eraser = pico_eraser(pipe.unet)
    prompts = [f"{word} {place}" for word in ("snoopy", "a dog", "a cat") for place in ("house", "on the beach", "")]
    prompts = [prompt.strip() for prompt in prompts]
    drawing = DrawingOptions(seed=5, number=2, steps=3)
    progress: list[tuple[int, int]] = []
    calls: list[int] = []
    watched = pipe.scheduler.set_timesteps

    def set_timesteps(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return watched(*given, **named)

    pipe.scheduler.set_timesteps = set_timesteps
    shown = show(pipe, [eraser], prompts, drawing, strength=strength, progress=lambda *one: progress.append(one))
    assert len(calls) == 2 * 3, "nine prompts of two pictures are calls of 8, 8 and 2 pictures for each condition"
    assert progress[-1] == (2 * 9 * 3, 2 * 9 * 3)
    assert progress == sorted(progress)
    assert len({round(one.gates["snoopy"], 3) for one in shown}) > 2, "the prompts of a batch have gammas of their own"
    for one in shown:
        for condition in ("without", "with"):
            with attach(pipe, [eraser] if condition == "with" else [], strength=strength):
                alone = pipe(
                    one.prompt, num_inference_steps=3, num_images_per_prompt=2,
                    generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
                ).images  # fmt: skip
            for picture, expected in zip(one.pictures[condition], alone, strict=True):
                apart = np.abs(np.asarray(picture, dtype=int) - np.asarray(expected, dtype=int))
                assert apart.max() <= 1, "by rounding alone"
            assert np.asarray(alone[0]).tobytes() != np.asarray(alone[1]).tobytes()


def test_the_prompt_whose_numbers_overflow_is_named() -> None:
    pipe = pico_pipeline()
    callback = StepCallback(pipe)
    callback.latents = torch.zeros(6, 4, 8, 8)
    callback.check("a", "b", "c")
    callback.latents[3, 0, 0, 0] = torch.inf
    with pytest.raises(UsageError, match="latents for 'b'"):
        callback.check("a", "b", "c")


def test_one_factor_for_all_rows_is_one_prompt_at_a_time() -> None:
    pipe = pico_pipeline()
    shown = show(pipe, [pico_eraser(pipe.unet)], ["snoopy", "a dog"], DrawingOptions(steps=1), mode="fold")
    assert [one.prompt for one in shown] == ["snoopy", "a dog"]


def test_ctrl_c_leaves_the_pictures_that_were_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    pico_eraser(pipe.unet).save(tmp_path / "snoopy.safetensors")
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", lambda *_, **__: pipe)
    drawn: list[str] = []

    def draw(pipe: object, batch: Sequence[str], *_: object) -> list[tuple[Image.Image, ...]]:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.extend(batch)
        return [(Image.new("RGB", (8, 8)),)]

    monkeypatch.setattr("spm_hub.evaluation.pictures.draw", draw)
    out = tmp_path / "pictures"
    prompts = [word for prompt in ("a", "b", "c") for word in ("-p", prompt)]
    command = ["apply", "-a", str(tmp_path / "snoopy.safetensors"), *prompts, "--out", str(out), "--at-once", "1"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 130
    assert sorted(path.name for path in out.iterdir()) == ["00-a-0-with.png", "01-b-0-with.png"]


def test_pictures_that_are_counted_are_no_black_ones_either() -> None:
    """Counted, they would prove an erasure that did not happen."""
    pipe, wanted = pico_pipeline(), [DetectionCase("subject", "snoopy", "snoopy", 0)]
    with (
        attach(pipe, [pico_eraser(pipe.unet)], strength=1e38),
        pytest.raises(UsageError, match="NaN or infinite latents"),
    ):
        paint(pipe, wanted, steps=2)
    assert len(paint(pipe, wanted, steps=2)) == 1
