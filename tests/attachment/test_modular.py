"""Diffusers' modular pipelines, and pipelines whose prompts no gate can know."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxModularPipeline, StableDiffusionXLModularPipeline
from diffusers.modular_pipelines import ModularPipelineBlocks, PipelineState
from pico import pico_eraser, pico_pipeline
from pico_families import family_pipeline
from test_families import apart, eraser
from topologies import Bare

import spm_hub
from spm_hub.attachment.attachment import attach
from spm_hub.attachment.gates.evidence import EvidenceGate
from spm_hub.attachment.watch import picture_check
from spm_hub.errors import UsageError

MODULAR = {"sdxl": StableDiffusionXLModularPipeline, "flux-dev": FluxModularPipeline}
SETTINGS: dict[str, dict[str, Any]] = {"sdxl": {}, "flux-dev": {"max_sequence_length": 16}}
pytestmark = pytest.mark.filterwarnings("error:spm_hub")


def modular(name: str, pipe: DiffusionPipeline, blocks: Any = None) -> Any:
    made = MODULAR[name](blocks=blocks)
    known = made.components
    made.update_components(**{key: part for key, part in pipe.components.items() if key in known and part is not None})
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, prompt: Any, **options: Any) -> torch.Tensor:
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output": "latents"} | options
    latents: torch.Tensor = pipe(prompt=prompt, generator=torch.Generator().manual_seed(1), **options)
    return latents


@pytest.mark.parametrize("name", MODULAR)
def test_a_dog_is_drawn_with_the_gamma_that_gates_says(name: str) -> None:
    base, settings = family_pipeline(name), SETTINGS[name]
    pipe, adapter = modular(name, base), eraser(base, "snoopy", 1)
    bare = draw(pipe, "a dog", **settings)
    erasers = attach(pipe, [adapter], gate="transport")
    gamma = erasers.gates("a dog", **settings)["snoopy"]
    assert 0 < gamma < 0.99
    one = draw(pipe, "a dog", **settings)
    several = draw(pipe, ["a dog", "snoopy"], num_images_per_prompt=2, **settings)
    state = pipe(prompt="snoopy", num_inference_steps=1, height=16, width=16, output_type="latent", **settings)
    again = draw(pipe, "a dog", state=state, latents=None, **settings)
    erasers.detach()
    assert type(state) is PipelineState
    assert type(pipe) is MODULAR[name]
    assert torch.equal(draw(pipe, "a dog", **settings), bare)
    twin = modular(name, family_pipeline(name))
    with attach(twin, [adapter], gate=gamma):
        assert torch.equal(one, draw(twin, "a dog", **settings))
        assert torch.equal(again, draw(twin, "a dog", state=state, latents=None, **settings))
        expected = draw(twin, ["a dog", "snoopy"], num_images_per_prompt=2, **settings)
        assert apart(several[:2], expected[:2]) <= 1e-5
    with attach(twin, [adapter], gate="always"):
        expected = draw(twin, ["a dog", "snoopy"], num_images_per_prompt=2, **settings)
        assert apart(several[2:], expected[2:]) <= 1e-5
        assert apart(several[:2], expected[:2]) > 1e-3
    assert apart(one, bare) > 1e-3


@pytest.mark.parametrize("negative", ["a cat", None])
def test_negative_prompts_of_a_modular_pipeline_follow_the_option_rows(negative: str | None) -> None:
    base = family_pipeline("sdxl")
    pipe, adapter = modular("sdxl", base), eraser(base, "snoopy", 1)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    path = next(iter(adapter.increments))
    module = base.unet.get_submodule(path)
    weight = module.weight.clone()
    module.register_forward_hook(lambda layer, args, output: seen.append((args[0], output)))
    with attach(pipe, [adapter], gate="always", rows="conditional"):
        draw(pipe, "snoopy", negative_prompt=negative)
    moved = [
        float((output - torch.nn.functional.linear(given, weight, module.bias)).abs().max()) for given, output in seen
    ]
    assert len(moved) == 4  # two steps, each with a call for the prompt and one for the negative prompt
    assert min(moved[0::2]) > 1e-3
    assert max(moved[1::2]) <= 1e-6


@pytest.mark.parametrize("name", MODULAR)
def test_apply_draws_with_a_modular_pipeline_and_training_refuses_it(name: str, tmp_path: Path) -> None:
    base = family_pipeline(name)
    pipe, adapter = modular(name, base), eraser(base, "snoopy", 1)
    drawn = spm_hub.apply([adapter], ["a dog"], pipe=pipe, steps=2, number=2, seed=5, gate="transport", progress=False)
    gamma = drawn.gammas[0]["snoopy"]
    assert 0 < gamma < 1

    def by_hand() -> list[bytes]:
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        settings = {"num_inference_steps": 2, "num_images_per_prompt": 2, "generator": generators}
        return [picture.tobytes() for picture in pipe(prompt="a dog", output="images", **settings)]

    assert [picture.tobytes() for picture in drawn.without[0]] == by_hand()
    with attach(pipe, [adapter], gate=gamma):
        assert [picture.tobytes() for picture in drawn.with_erasers[0]] == by_hand()
    for refused in (
        lambda: spm_hub.train("snoopy", pipe=pipe, progress=False),
        lambda: spm_hub.attach(pipe, erase=["snoopy"], registry=tmp_path),
    ):
        with pytest.raises(UsageError, match="is a modular pipeline: erasers attach to it, but training"):
            refused()


def test_a_modular_pipeline_next_to_an_ordinary_one() -> None:
    base = family_pipeline("flux-dev")
    pipe, adapter, settings = modular("flux-dev", base), eraser(base, "snoopy", 1), SETTINGS["flux-dev"]
    with attach(pipe, [adapter], gate="transport"):
        expected = draw(pipe, "a dog", **settings)
    with attach(base, [adapter], gate="transport") as erasers:
        erasers.also(pipe)
        assert torch.equal(draw(pipe, "a dog", **settings), expected)


def test_a_modular_pipeline_without_its_text_encoder_is_said_at_once() -> None:
    """The usual way to spare memory: prompts are encoded by another pipeline, which is gone when this one draws."""
    base = family_pipeline("flux-dev")
    blocks = MODULAR["flux-dev"]().blocks
    blocks.sub_blocks.pop("text_encoder")
    pipe, adapter, settings = modular("flux-dev", base, blocks), eraser(base, "snoopy", 1), SETTINGS["flux-dev"]
    states, pooled, _ = base.encode_prompt("a dog", None, **settings)
    with pytest.warns(UserWarning, match="FluxModularPipeline encodes texts in a way that the gates do not know"):
        erasers = attach(pipe, [adapter], gate="transport")
    given = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
    with pytest.warns(UserWarning, match="unknown: every eraser without a constant gate is fully on"):
        found = draw(pipe, None, **given)
    erasers.detach()
    with attach(pipe, [adapter], gate="always"):
        assert torch.equal(draw(pipe, None, **given), found)


class PictureTextBlock(ModularPipelineBlocks):
    """A custom block that needs a picture to encode a prompt, as editing pipelines have."""

    @property
    def inputs(self) -> list[Any]:
        from diffusers.modular_pipelines import InputParam

        return [InputParam("prompt", required=True), InputParam("image", required=True)]

    @property
    def intermediate_outputs(self) -> list[Any]:
        from diffusers.modular_pipelines import OutputParam

        return [OutputParam("prompt_embeds")]

    def __call__(self, components: Any, state: PipelineState) -> Any:
        self.get_block_state(state)
        raise AssertionError("no picture is given")


def test_a_block_that_needs_more_than_a_prompt_is_said_at_once() -> None:
    base = family_pipeline("flux-dev")
    blocks = MODULAR["flux-dev"]().blocks
    blocks.sub_blocks["text_encoder"] = PictureTextBlock()
    pipe = modular("flux-dev", base, blocks)
    with pytest.warns(UserWarning, match="cannot encode ''.*image.*fully on"):
        attach(pipe, [eraser(base, "snoopy", 1)], gate="transport").detach()


class OwnPipeline(DiffusionPipeline):
    """A custom pipeline that encodes its prompt in its own call."""

    def __init__(self, unet: Any, text_encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer)

    @torch.no_grad()
    def __call__(self, prompt: str) -> torch.Tensor:
        ids = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        drawn: torch.Tensor = self.unet(noise, 500, encoder_hidden_states=self.text_encoder(ids)[0]).sample
        return drawn


def test_a_custom_pipeline_with_an_encoding_of_its_own_is_said_at_once() -> None:
    base = pico_pipeline()
    pipe, adapter = OwnPipeline(base.unet, base.text_encoder, base.tokenizer), pico_eraser(base.unet, "snoopy")
    with pytest.warns(UserWarning, match="OwnPipeline encodes texts in a way.*no encode_prompt.*is fully on"):
        erasers = attach(pipe, [adapter], gate="transport")
    with pytest.warns(UserWarning, match="prompts of this call"):
        found = pipe("a dog")
    erasers.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(pipe, [adapter], gate="always"):
            assert torch.equal(pipe("a dog"), found)
        with attach(pipe, []) as empty, pytest.warns(UserWarning, match="no encode_prompt"):
            empty.add(adapter)
        attach(Bare(base.unet), [adapter], gate=0.5).detach()


@pytest.mark.parametrize("name", MODULAR)
def test_finished_pictures_of_a_modular_pipeline_are_looked_at_and_drawn_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_check, "_LEAST_EXPLAINED", -math.inf)  # random weights predict no noise
    monkeypatch.setattr(EvidenceGate, "may_rise", lambda self, one: one.gamma < 1)
    monkeypatch.setattr(EvidenceGate, "weigh", lambda self, share, shown: 1.0)
    base = family_pipeline(name)
    pipe, adapter = modular(name, base), eraser(base, "snoopy", 1)
    with attach(pipe, [adapter], gate="always"):
        always = draw(pipe, "a dog", **SETTINGS[name])
    with attach(pipe, [adapter], gate=EvidenceGate(sure=math.inf), progress=False) as erasers:
        assert torch.equal(draw(pipe, "a dog", **SETTINGS[name]), always)
        assert math.isfinite(erasers.last_evidence["snoopy"][0].shown or math.nan)
