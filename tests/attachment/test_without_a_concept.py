"""An eraser whose file names no concept is never silently off: it acts on every prompt, and says so once."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from pico import pico_eraser, pico_pipeline

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import Concept, GateDefaults
from spm_hub.attachment import attach
from spm_hub.errors import UsageError


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pico_pipeline()


def nameless(pipe: Any, name: str = "step-10", gate: GateDefaults | None = None) -> Adapter:
    adapter = pico_eraser(pipe.unet, name, gate=gate or GateDefaults())
    return replace(adapter, manifest=adapter.manifest.model_copy(update={"concept": Concept(target=None)}))


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught if "no concept" in str(one.message)]


def latents(pipe: Any, prompt: str) -> torch.Tensor:
    found: torch.Tensor = pipe(
        prompt, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(1)
    ).images
    return found


@pytest.mark.parametrize("gate", [None, "calibrated", "transport"])
def test_without_a_concept_it_acts_as_if_always_on_and_says_so_once(pipe: Any, gate: Any) -> None:
    with attach(pipe, [pico_eraser(pipe.unet, "step-10")], gate="always"):
        fully = [latents(pipe, prompt) for prompt in ("step-10", "a dog")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with attach(pipe, [nameless(pipe)], gate=gate) as erasers:
            assert erasers.gates("step-10") == erasers.gates("a dog") == {"step-10": 1.0}
            assert erasers.explain("a dog")["step-10"].term == "unknown"
            drawn = [latents(pipe, prompt) for prompt in ("step-10", "a dog")]
            assert "step-10 (always, as its concept is unknown" in repr(erasers)
    assert all(torch.equal(one, other) for one, other in zip(drawn, fully, strict=True))
    (remark,) = said(caught)
    assert "spmhub convert step-10 --concept NAME" in remark
    assert "attach(..., concept=...)" in remark


@pytest.mark.parametrize("gate", ["always", 0.25])
def test_a_constant_gate_needs_no_concept(pipe: Any, gate: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with attach(pipe, [nameless(pipe)], gate=gate) as erasers:
            assert erasers.gates("a dog") == {"step-10": 1.0 if gate == "always" else gate}
    assert said(caught) == []


def test_a_given_concept_is_gated(pipe: Any) -> None:
    transport = GateDefaults(kind="transport")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with attach(pipe, [nameless(pipe, gate=transport)], concept="snoopy") as erasers:
            given = [erasers.gates(prompt)["step-10"] for prompt in ("snoopy", "a dog")]
        with attach(pipe, [pico_eraser(pipe.unet, "snoopy")], gate="transport") as erasers:
            assert given == [erasers.gates(prompt)["snoopy"] for prompt in ("snoopy", "a dog")]
    assert given[0] == 1 > given[1]
    assert said(caught) == []


def test_one_that_is_added_says_so_too_and_the_others_keep_their_gates(pipe: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with attach(pipe, [pico_eraser(pipe.unet, "snoopy")], gate="transport") as erasers:
            alone = erasers.gates("a dog")
            erasers.add(nameless(pipe))
            assert erasers.gates("a dog") == {**alone, "step-10": 1.0}
    assert len(said(caught)) == 1


def test_one_concept_for_two_erasers_is_refused_before_anything_changes(pipe: Any) -> None:
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    with pytest.raises(UsageError, match="whose it is"):
        attach(pipe, [nameless(pipe), nameless(pipe, "other")], concept="snoopy")
    assert all(torch.equal(before[key], value) for key, value in pipe.unet.state_dict().items())
    attach(pipe, []).detach()
