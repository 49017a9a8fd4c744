"""Further pipelines of an attached denoiser: a second pass, inpainting, img2img, each gated by its own prompts."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from pico import pico_eraser, pico_pipeline, pico_text_encoder
from pico_families import family_pipeline
from test_families import apart, draw, eraser

from spm_hub.attachment.attachment import attach
from spm_hub.errors import UsageError

# The class that a second pass of each family has; PixArt has one class alone.
SECOND = {
    "sd2": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux-dev": "FluxImg2ImgPipeline",
    "pixart": "PixArtSigmaPipeline",
    "qwen-image": "QwenImageImg2ImgPipeline",
}


def picture(seed: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.rand(1, channels, 16, 16, generator=torch.Generator().manual_seed(seed))


def second(pipe: Any, name: str) -> Any:
    parts = pipe.components | ({"requires_safety_checker": False} if "safety_checker" in pipe.components else {})
    other = getattr(diffusers, name)(**parts)
    other.set_progress_bar_config(disable=True)
    if hasattr(pipe, "prompt_template_encode"):
        other.prompt_template_encode = pipe.prompt_template_encode
        other.prompt_template_encode_start_idx = pipe.prompt_template_encode_start_idx
    return other


def given(name: str) -> dict[str, Any]:
    if name == "PixArtSigmaPipeline":
        return {}
    mask = {"mask_image": (picture(2, 1) > 0.5).float()} if "Inpaint" in name else {}
    return {"image": picture(), "strength": 1.0, **mask}


@pytest.mark.parametrize("name", SECOND)
def test_a_second_pipeline_of_every_family_draws_with_the_gammas_of_its_own_prompt(name: str) -> None:
    pipe: Any = family_pipeline(name)
    kind, settings = SECOND[name], {} if name == "sd2" or name == "sdxl" else {"max_sequence_length": 16}
    adapters = [eraser(pipe, "snoopy", 1), eraser(pipe, "church", 2)]
    other = second(pipe, kind)
    bare = draw(other, ["a dog by the church"], **given(kind))
    erasers = attach(pipe, adapters, gate="transport")
    erasers.also(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        draw(pipe, ["snoopy"])
        found = draw(other, ["a dog by the church"], **given(kind))
    gammas = erasers.gates("a dog by the church", **settings)
    assert gammas["snoopy"] < gammas["church"] == pytest.approx(1)
    erasers.detach()
    assert torch.equal(draw(other, ["a dog by the church"], **given(kind)), bare)
    # The same gammas, given as strengths of a constant gate, on a pipeline of other parts.
    twin = second(family_pipeline(name), kind)
    with attach(twin, adapters, gate="always", strength=gammas):
        assert apart(found, draw(twin, ["a dog by the church"], **given(kind))) <= 1e-5
    assert apart(found, bare) > 1e-3


def paint(pipe: Any, prompt: Any, **options: Any) -> torch.Tensor:
    options = {
        "generator": torch.Generator().manual_seed(3),
        "num_inference_steps": 2,
        "output_type": "latent",
    } | options
    latents: torch.Tensor = pipe(prompt, **options).images
    return latents


def test_a_pipeline_made_from_an_attached_one_is_gated_until_detach() -> None:
    pipe = pico_pipeline()
    before = {key: weight.clone() for key, weight in pipe.unet.state_dict().items()}
    adapters = [pico_eraser(pipe.unet, "snoopy", seed=1), pico_eraser(pipe.unet, "mickey", seed=2)]
    erasers = attach(pipe, adapters, gate="transport")
    made = StableDiffusionInpaintPipeline.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    options = given("Inpaint")
    erasers.also(made)
    erasers.also(made)  # a second time changes nothing
    both = paint(made, "snoopy", **options)
    erasers.recover("mickey")
    alone = paint(made, "snoopy", **options)
    erasers.detach()
    assert type(made) is StableDiffusionInpaintPipeline
    assert not [key for key in (*vars(made), *vars(pipe), *vars(pipe.unet)) if "spm_hub" in key]
    bare = paint(made, "snoopy", **options)
    assert all(torch.equal(before[key], weight) for key, weight in pipe.unet.state_dict().items())
    twin = StableDiffusionInpaintPipeline(**pico_pipeline().components, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(paint(twin, "snoopy", **options), bare)
    with attach(twin, adapters, gate="transport") as others:
        assert torch.equal(paint(twin, "snoopy", **options), both)
        others.recover("mickey")
        assert torch.equal(paint(twin, "snoopy", **options), alone)


def test_a_pipeline_with_text_encoders_of_its_own_is_gated_by_what_they_give() -> None:
    pipe = pico_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        encoder = pico_text_encoder(pipe.tokenizer).eval()
    parts = {**pipe.components, "text_encoder": encoder, "requires_safety_checker": False}
    other, options = StableDiffusionImg2ImgPipeline(**parts), given("Img2Img")
    other.set_progress_bar_config(disable=True)
    adapter = pico_eraser(pipe.unet, "snoopy")
    with attach(other, [adapter], gate="transport"):
        expected = paint(other, "a dog", **options)
    with attach(pipe, [adapter], gate="transport") as erasers:
        erasers.also(other)
        assert torch.equal(paint(other, "a dog", **options), expected)
        other.text_encoder = pipe.text_encoder
        changed = paint(other, "a dog", **options)
    with attach(other, [adapter], gate="transport"):
        assert torch.equal(paint(other, "a dog", **options), changed)
    assert not torch.equal(changed, expected)


def test_threads_that_draw_with_two_pipelines_of_one_denoiser() -> None:
    pipe = pico_pipeline()
    other, options = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False), given("Img2Img")
    for each in (pipe, other):
        each.set_progress_bar_config(disable=True)
    pictures: list[torch.Tensor] = []
    with attach(pipe, [pico_eraser(pipe.unet, "snoopy")], gate="transport") as erasers:
        erasers.also(other)
        jobs = [lambda: paint(pipe, "snoopy"), lambda: paint(other, "a dog", **options)]
        expected = [job() for job in jobs]

        def run(turn: int) -> None:
            pictures.append(jobs[turn % 2]())
            assert torch.equal(pictures[-1], expected[turn % 2])

        threads = [threading.Thread(target=run, args=(turn,)) for turn in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        # In the middle of the other's picture.
        within = lambda *_: torch.equal(paint(other, "a dog", **options), expected[1]) and {}  # noqa: E731
        assert torch.equal(paint(pipe, "snoopy", callback_on_step_end=within), expected[0])
    assert len(pictures) == 6
    assert sum(torch.equal(one, expected[0]) for one in pictures) == 3


def test_a_second_pipeline_may_go_away() -> None:
    pipe = pico_pipeline()
    erasers = attach(pipe, [pico_eraser(pipe.unet, "snoopy")], gate="transport")
    before = paint(pipe, "a dog")
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    erasers.also(other)
    paint(other, "snoopy", **given("Img2Img"))
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    assert torch.equal(paint(pipe, "a dog"), before)
    erasers.detach()
    assert torch.equal(paint(pipe, "a dog"), paint(pico_pipeline(), "a dog"))


@pytest.mark.parametrize(("gate", "warned"), [("transport", 1), ("calibrated", 1), (0.3, 0), ("always", 0)])
def test_an_unknown_pipeline_is_said_once_unless_its_prompts_do_not_matter(gate: Any, warned: int) -> None:
    pipe = pico_pipeline()
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with attach(pipe, [pico_eraser(pipe.unet, "snoopy")], gate=gate), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            paint(other, "a dog", **given("Img2Img"))
    messages = [str(one.message) for one in said if "spm_hub" in str(one.message)]
    assert len(messages) == warned
    assert all("erasers.also(pipe)" in message and "fully on" in message for message in messages)


def test_a_pipeline_made_of_the_attached_ones_class_has_its_own_class_afterwards() -> None:
    pipe = pico_pipeline()
    erasers = attach(pipe, [pico_eraser(pipe.unet, "snoopy")], gate="transport")
    twin = type(pipe)(**pipe.components, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    expected = paint(pipe, "a dog")
    erasers.also(twin)
    assert torch.equal(paint(twin, "a dog"), expected)
    erasers.detach()
    assert type(twin) is type(pico_pipeline())


def test_pipelines_that_cannot_be_gated_along_are_refused() -> None:
    pipe, stranger = pico_pipeline(), pico_pipeline()
    adapter = pico_eraser(pipe.unet, "snoopy")
    with attach(pipe, [adapter], gate="transport") as erasers:
        with pytest.raises(UsageError, match="another denoiser"):
            erasers.also(stranger)
        assert not [key for key in vars(stranger) if "spm_hub" in key]
        with pytest.raises(UsageError, match="not its UNet2DConditionModel"):
            erasers.also(pipe.unet)
        with attach(stranger, [adapter]), pytest.raises(UsageError, match="another attachment"):
            erasers.also(stranger)
        other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        with pytest.raises(UsageError, match="already has erasers") as refused:
            attach(other, [adapter])
        assert "erasers.also(pipe)" in str(refused.value.mend)
        erasers.also(other)
        other.unet = stranger.unet
        with pytest.raises(UsageError, match="denoiser was replaced"):
            paint(other, "a dog", **given("Img2Img"))
    with pytest.raises(UsageError, match="detached"):
        erasers.also(other)
