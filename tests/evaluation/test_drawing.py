"""Drawing pictures: overflowing latents, and folders that cannot be written."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

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


def test_ctrl_c_leaves_the_pictures_that_were_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pico_pipeline()
    pico_eraser(pipe.unet).save(tmp_path / "snoopy.safetensors")
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", lambda *_, **__: pipe)
    drawn: list[str] = []

    def draw(pipe: object, prompt: str, *_: object) -> tuple[Image.Image, ...]:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(prompt)
        return (Image.new("RGB", (8, 8)),)

    monkeypatch.setattr("spm_hub.evaluation.pictures.draw", draw)
    out = tmp_path / "pictures"
    prompts = [word for prompt in ("a", "b", "c") for word in ("-p", prompt)]
    done = CliRunner().invoke(app, ["apply", "-a", str(tmp_path / "snoopy.safetensors"), *prompts, "--out", str(out)])
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
