"""The evidence gate on small pipelines: what it asks the denoiser, and what it leaves as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import pico_eraser, pico_pipeline
from pico_families import family_pipeline
from test_families import draw, eraser
from torch import Tensor

from spm_hub.attachment.attachment import attach
from spm_hub.attachment.gates import evidence
from spm_hub.attachment.gates.evidence import SURE_SHARE, EvidenceGate, PreparedEvidenceGate, shares_of_effect
from spm_hub.attachment.pipeline_hooks import _timestep_at

pytestmark = pytest.mark.usefixtures("small_bank")

OTHER = "a dog"


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the text part see nothing, so that all gammas are the denoiser's evidence."""

    def nothing(self: PreparedEvidenceGate, prompts: Any) -> Tensor:
        return torch.zeros(len(prompts.states), self._of_text._erasers)

    monkeypatch.setattr(PreparedEvidenceGate, "gammas", nothing)


@pytest.fixture
def pipe() -> Any:
    return pico_pipeline()


def sketch(pipe: Any, prompts: list[str], **options: Any) -> Tensor:
    count = len(prompts) * options.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    drawn: Tensor = pipe(
        prompts, generator=generators, **{"num_inference_steps": 2, "output_type": "latent", **options}
    ).images
    return drawn


def effects(pipe: Any, adapter: Any, prompt: str, timestep: int) -> Tensor:
    """What an eraser changes in the prediction for a prompt on the gate's noise, with nothing but the gate "always"."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    with torch.no_grad():
        bare = pipe.unet(noise, timestep, encoder_hidden_states=states).sample
        with attach(pipe, [adapter], gate="always"):
            return (bare - pipe.unet(noise, timestep, encoder_hidden_states=states).sample).double()


@given(st.floats(-2, 2), st.integers(0, 2**20))
@settings(max_examples=20, deadline=None)
def test_a_share_is_the_length_along_the_effect_on_the_name(share: float, seed: int) -> None:
    on_name, across = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    flat = on_name.flatten(1)
    across = across.flatten(1)
    across = across - (across * flat).sum(1, keepdim=True) / flat.square().sum(1, keepdim=True) * flat
    found = shares_of_effect((share * flat + 7 * across).view_as(on_name), on_name)
    torch.testing.assert_close(found, torch.full((3,), share, dtype=torch.float64), rtol=0, atol=1e-9)


def test_an_eraser_that_does_nothing_to_the_name_gives_no_evidence() -> None:
    assert shares_of_effect(torch.ones(2, 4), torch.zeros(2, 4)).tolist() == [0, 0]


@pytest.mark.usefixtures("blind")
def test_the_share_is_that_of_predictions_made_by_hand(pipe: Any) -> None:
    adapter = pico_eraser(pipe.unet)
    e, d, everywhere = (effects(pipe, adapter, prompt, 500).flatten() for prompt in (OTHER, "snoopy", ""))
    expected = float((e - everywhere) @ (d - everywhere) / ((d - everywhere) @ (d - everywhere)))
    for mode, options in (
        ("auto", {}), ("branch", {"guidance_scale": 1.0}), ("fold", {"num_images_per_prompt": 2}),
    ):  # fmt: skip
        with attach(pipe, [adapter], gate="evidence", mode=mode) as erasers:
            sketch(pipe, [OTHER], **options)
            ((found,),) = erasers.last_evidence.values()
        assert found.share == pytest.approx(expected, abs=1e-4)
        assert found.gamma == (expected >= SURE_SHARE)


@pytest.mark.usefixtures("blind")
def test_a_prompt_without_evidence_is_drawn_as_ever_and_one_with_it_as_always(pipe: Any) -> None:
    adapter = pico_eraser(pipe.unet)
    weights = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    others = ["a dog", "church", "van gogh", "a cat and a dog", "mickey"]
    with attach(pipe, [adapter], gate="evidence") as erasers:
        sketch(pipe, others)
        share, other = min((one.share, text) for one, text in zip(erasers.last_evidence["snoopy"], others, strict=True))
    assert share < 1 - 1e-3
    # Random erasers change any prompt: the bar is set between this prompt and the name.
    gate = EvidenceGate(sure=(1 + share) / 2, least_share=math.inf, least_shown=math.inf)
    bare = [sketch(pipe, [prompt]) for prompt in (other, "snoopy")]
    with attach(pipe, [adapter], gate="always"):
        always = sketch(pipe, ["snoopy"])
    assert not torch.equal(always, bare[1])
    with attach(pipe, [adapter, pico_eraser(pipe.unet, "cat", seed=2)], gate=gate) as erasers:
        erasers.recover("cat")
        assert torch.equal(sketch(pipe, [other]), bare[0])
        assert torch.equal(sketch(pipe, ["snoopy"]), always)
        mixed = sketch(pipe, [other, "snoopy"])
        assert [one.gamma for one in erasers.last_evidence["snoopy"]] == [0, 1]
        torch.testing.assert_close(mixed[:1], bare[0], rtol=0, atol=1e-4)
        assert erasers.gates("snoopy") == {"snoopy": 0}, "gates speak of the text alone"
        assert "denoiser" in erasers.explain(other)["snoopy"].shown
    after = pipe.unet.state_dict()
    assert all(torch.equal(weights[key], after[key]) for key in weights)


@pytest.mark.usefixtures("blind")
def test_prompts_that_a_callback_replaces_are_asked_about(pipe: Any) -> None:
    with attach(pipe, [pico_eraser(pipe.unet)], gate="evidence") as erasers:
        states, negative = pipe.encode_prompt("snoopy", "cpu", 1, True)

        def replace(*_: Any) -> dict[str, Tensor]:
            return {"prompt_embeds": torch.cat([negative, states])}

        sketch(pipe, [OTHER], callback_on_step_end=replace, callback_on_step_end_tensor_inputs=["prompt_embeds"])
        assert erasers.last_evidence["snoopy"][0].share == pytest.approx(1, abs=1e-5)


def test_the_denoiser_is_asked_once_a_picture_and_only_where_the_text_leaves_room(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "LEAST_EFFECT", -math.inf)
    rows: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    with attach(pipe, [pico_eraser(pipe.unet)], gate="evidence") as erasers:
        sketch(pipe, [OTHER])
        watched, rows[:] = list(rows), []
        assert list(erasers.last_evidence) == ["snoopy"]
        sketch(pipe, ["snoopy"])
        assert erasers.last_evidence == {}
        named, rows[:] = list(rows), []
        erasers.strength["snoopy"] = 0.0
        sketch(pipe, [OTHER])
    handle.remove()
    # At four timesteps, for the empty prompt and the name; random weights leave no doubt that asks for more.
    looked = [1] * 8
    assert (watched, named, rows) == ([1] * 6 + [2] * 2 + looked, [2] * 2, [2] * 2)


@pytest.mark.usefixtures("blind")
def test_a_question_that_fails_leaves_the_weights_as_they_were(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    for mode in ("fold", "branch"):
        with attach(pipe, [pico_eraser(pipe.unet)], gate="evidence", mode=mode):
            with monkeypatch.context() as patch:
                patch.setattr("spm_hub.attachment.watch.prompt_check.shares_of_effect", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    sketch(pipe, [OTHER])
            assert all(torch.equal(weights[key], value) for key, value in pipe.unet.state_dict().items())
            sketch(pipe, [OTHER])
        assert all(torch.equal(weights[key], value) for key, value in pipe.unet.state_dict().items())


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("blind")
def test_a_denoiser_that_caches_steps_is_not_asked(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = sketch(pipe, ["snoopy"])
    monkeypatch.setattr(type(pipe.unet), "is_cache_enabled", True, raising=False)
    with attach(pipe, [pico_eraser(pipe.unet)], gate="evidence") as erasers:
        with pytest.warns(UserWarning, match="gated by the text alone"):
            drawn = sketch(pipe, ["snoopy"])
        assert erasers.last_evidence == {}
    assert torch.equal(drawn, bare)


@pytest.mark.slow
@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("name", ["sdxl", "flux-schnell", "sd3", "qwen-image", "pixart"])
def test_the_name_itself_is_drawn_as_by_the_gate_always(name: str) -> None:
    pipe: Any = family_pipeline(name)
    bare, adapter = draw(pipe, ["snoopy"]), eraser(pipe, "snoopy", 1)
    with attach(pipe, [adapter], gate="always"):
        always = draw(pipe, ["snoopy"])
    with attach(pipe, [adapter], gate="evidence", progress=False) as erasers:
        drawn = draw(pipe, ["snoopy"])
        assert [one.gamma for one in erasers.last_evidence["snoopy"]] == [1]
        assert erasers.last_evidence["snoopy"][0].share == pytest.approx(1, abs=1e-3)
    assert torch.equal(drawn, always)
    assert not torch.equal(drawn, bare)
    assert torch.equal(draw(pipe, ["snoopy"]), bare)


@pytest.mark.parametrize(
    ("timestep", "middle"),
    [
        (torch.tensor(981), torch.tensor(500)), (torch.tensor([1, 1]), torch.tensor([500, 500])), (981, 500), (1, 500),
        (torch.tensor([1000.0]), torch.tensor([500.0])), (torch.tensor([1.0, 0.4]), torch.tensor([0.5, 0.5])),
        (0.9, 0.5),
    ],
)  # fmt: skip
def test_the_middle_is_of_the_timesteps_that_a_denoiser_counts(timestep: Any, middle: Any) -> None:
    found = _timestep_at(0.5, timestep)
    assert type(found) is type(middle)
    torch.testing.assert_close(found, middle, rtol=0, atol=0)
