"""The evidence gate's look at finished pictures: what it measures, what it has drawn again, and what it leaves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pico import pico_eraser, pico_pipeline
from pico_families import family_pipeline
from test_families import draw, eraser
from torch import Tensor

import spm_hub
from spm_hub.attachment.attachment import attach
from spm_hub.attachment.gates import evidence
from spm_hub.attachment.gates.evidence import EvidenceGate, PreparedEvidenceGate
from spm_hub.attachment.watch import picture_check
from spm_hub.evaluation.sketchbook import probe
from spm_hub.models.loading import load_pipeline

pytestmark = pytest.mark.usefixtures("small_bank")

UNASKED = math.inf
"""As a bar: the prompt's own evidence counts for nothing, so that only the picture decides."""


@pytest.fixture(autouse=True)
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the text part see nothing; random weights predict no noise, and pictures are looked at all the same."""

    def nothing(self: PreparedEvidenceGate, prompts: Any) -> Tensor:
        return torch.zeros(len(prompts.states), self._of_text._erasers)

    monkeypatch.setattr(PreparedEvidenceGate, "gammas", nothing)
    monkeypatch.setattr(picture_check, "_LEAST_EXPLAINED", -math.inf)
    monkeypatch.setattr(evidence, "LEAST_EFFECT", -math.inf)


def sketch(pipe: Any, prompts: list[str], **options: Any) -> Tensor:
    given = {"generator": [torch.Generator().manual_seed(seed) for seed in range(len(prompts))], **options}
    drawn: Tensor = pipe(prompts, num_inference_steps=2, output_type="latent", **given).images
    return drawn


def explained_by_hand(pipe: Any, latents: Tensor, name: str) -> float:
    """How far the name explains a picture, with the scheduler's own noising and nothing of the package, in float64."""
    states, empty = (pipe.encode_prompt(text, "cpu", 1, False)[0] for text in (name, ""))
    along = length = 0.0
    for seed in picture_check._SEEDS:
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(seed))[None]
        for moment in picture_check.MOMENTS:
            time = torch.tensor([round(1000 * moment)])
            noisy = pipe.scheduler.add_noise(latents, noise, time)
            velocity = pipe.scheduler.config.prediction_type == "v_prediction"
            target = pipe.scheduler.get_velocity(latents, noise, time) if velocity else noise
            with torch.no_grad():
                unnamed, named = (pipe.unet(noisy, time, encoder_hidden_states=each).sample for each in (empty, states))
            rest, way = (target - unnamed).double().flatten(), (named - unnamed).double().flatten()
            along, length = along + float(rest @ way), length + float(way @ way)
    return along / length


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_a_picture_is_explained_as_by_hand(predicts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_check, "_DOUBT", -math.inf)  # the second noise too
    pipe: Any = pico_pipeline()
    pipe.scheduler.register_to_config(prediction_type=predicts)
    latents = sketch(pipe, ["a dog", "a cat"])
    expected = [explained_by_hand(pipe, one[None], "snoopy") for one in latents]
    gate = EvidenceGate(sure=UNASKED, least_share=UNASKED, least_shown=1e6)
    with attach(pipe, [pico_eraser(pipe.unet)], gate=gate, progress=False) as erasers:
        assert torch.equal(sketch(pipe, ["a dog", "a cat"]), latents)
        found = [one.shown for one in erasers.last_evidence["snoopy"]]
    assert found == pytest.approx(expected, abs=1e-4)
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("generator", ["list", "one", "none"])
def test_what_shows_a_concept_is_drawn_again_as_by_the_gate_always(
    generator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvidenceGate, "weigh", lambda self, share, shown: 1.0)
    pipe, weights = pico_pipeline(), {}
    weights = {key: value.clone() for key, value in pipe.unet.state_dict().items()}

    def drawn() -> Tensor:
        torch.manual_seed(5)
        one = torch.Generator().manual_seed(3)
        return sketch(
            pipe, ["a dog", "a cat"], eta=0.7,
            **({"generator": {"one": one, "none": None}[generator]} if generator != "list" else {}),
        )  # fmt: skip

    with attach(pipe, [pico_eraser(pipe.unet)], gate="always"):
        always = drawn()
    with attach(pipe, [pico_eraser(pipe.unet)], gate=EvidenceGate(sure=UNASKED), progress=False) as erasers:
        assert torch.equal(drawn(), always)
        assert erasers.last_gammas == {"snoopy": [1, 1]}
    assert all(torch.equal(weights[key], value) for key, value in pipe.unet.state_dict().items())


def test_every_generator_of_a_call_is_restored_wherever_it_stands() -> None:
    one, two = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    restore = picture_check.random_state(None, ("a dog", [one], 7.5, two))
    before = [torch.rand(3, generator=each) for each in (one, two)]
    restore()
    assert all(torch.equal(torch.rand(3, generator=each), was) for each, was in zip((one, two), before, strict=True))


def test_only_the_prompt_whose_picture_shows_it_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_check, "_DOUBT", -math.inf)
    pipe: Any = pico_pipeline()
    bare = sketch(pipe, ["a dog", "a cat"])
    with attach(pipe, [pico_eraser(pipe.unet)], gate=EvidenceGate(sure=UNASKED, least_shown=1e6)) as erasers:
        sketch(pipe, ["a dog", "a cat"])
        dog, cat = (one.shown for one in erasers.last_evidence["snoopy"])
    bar = (dog + cat) / 2
    monkeypatch.setattr(EvidenceGate, "weigh", lambda self, share, shown: float(shown >= bar))
    with attach(pipe, [pico_eraser(pipe.unet)], gate=EvidenceGate(sure=UNASKED)) as erasers:
        drawn = sketch(pipe, ["a dog", "a cat"])
        gammas = erasers.last_gammas["snoopy"]
    assert gammas == [float(dog > cat), float(cat > dog)]
    assert torch.allclose(drawn[gammas.index(0)], bare[gammas.index(0)], atol=1e-5)
    assert not torch.allclose(drawn[gammas.index(1)], bare[gammas.index(1)], atol=1e-3)


def test_an_error_in_a_drawing_leaves_the_scheduler_as_it_was() -> None:
    pipe: Any = pico_pipeline()

    def interrupt(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with attach(pipe, [pico_eraser(pipe.unet)], gate="evidence", progress=False):
        with pytest.raises(KeyboardInterrupt):
            sketch(pipe, ["a dog"], callback_on_step_end=interrupt)
        assert "step" not in vars(pipe.scheduler)


def test_a_drawing_that_ends_early_is_not_looked_at_and_says_so() -> None:
    pipe: Any = pico_pipeline()

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return tensors

    with (
        attach(pipe, [pico_eraser(pipe.unet)], gate="evidence", progress=False),
        pytest.warns(UserWarning, match="ended before"),
    ):
        sketch(pipe, ["a dog"], callback_on_step_end=stop)


def test_pictures_of_an_unknown_noise_are_left_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_check, "_LEAST_EXPLAINED", 0.1)
    pipe: Any = pico_pipeline()  # of random weights: it predicts no noise
    with attach(pipe, [pico_eraser(pipe.unet)], gate="evidence", progress=False) as erasers:
        with pytest.warns(UserWarning, match="not looked at"):
            sketch(pipe, ["a dog"])
        assert erasers.last_evidence["snoopy"][0].shown is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "flux-schnell", "sd3", "qwen-image", "pixart"])
def test_every_family_is_looked_at_and_drawn_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EvidenceGate, "weigh", lambda self, share, shown: 1.0)
    pipe: Any = family_pipeline(name)
    adapter = eraser(pipe, "snoopy", 1)
    with attach(pipe, [adapter], gate="always"):
        always = draw(pipe, ["a dog"])
    with attach(pipe, [adapter], gate=EvidenceGate(sure=UNASKED), progress=False) as erasers:
        assert torch.equal(draw(pipe, ["a dog"]), always)
        assert math.isfinite(erasers.last_evidence["snoopy"][0].shown or math.nan)


@pytest.mark.slow
def test_the_sketchbook_draws_no_snoopy_although_neither_the_text_nor_the_prompt_show_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # the sketchbook predicts noise

    def nothing(self: PreparedEvidenceGate, prompts: Any) -> Tensor:
        return torch.zeros(len(prompts.states), self._of_text._erasers)

    monkeypatch.setattr(PreparedEvidenceGate, "gammas", nothing)
    pipe: Any = load_pipeline("sketchbook")
    prompts = ["a photo of snoopy", "a photo of a church", "a photo of a car", "a drawing of snoopy"]

    def pictures() -> list[Any]:
        seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        images: list[Any] = pipe(prompts, generator=seeds, num_inference_steps=12).images
        return images

    bare = pictures()
    gate = EvidenceGate(sure=UNASKED, least_share=UNASKED)
    with attach(pipe, [spm_hub.load("snoopy")], gate=gate, progress=False) as erasers:
        drawn = pictures()
        assert erasers.last_gammas["snoopy"] == [1, 0, 0, 1]
    before, after = ([one.subject for one in probe().read(each)] for each in (bare, drawn))
    assert before == ["snoopy", "church", "car", "snoopy"]
    assert after[1:3] == ["church", "car"]
    assert "snoopy" not in after
