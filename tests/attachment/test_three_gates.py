"""Every gate on five families: mixed batches, embeddings, threads, independence of other erasers, exact recovery."""

from __future__ import annotations

import threading
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from pico_families import family_pipeline
from test_families import apart, draw, eraser
from torch import Tensor

import spm_hub
from spm_hub.attachment.gates.evaluation import Gammas
from spm_hub.errors import SpmHubError
from spm_hub.models.architectures import denoiser_of

pytestmark = pytest.mark.usefixtures("small_bank")

GATES = ("transport", "calibrated", "always")
FAMILIES = ("sd1", "sdxl", "flux-dev", "sd3", "qwen-image")
PROMPTS = ("snoopy", "a painting by van gogh", "the price of eggs went up")


@cache
def pipeline(name: str) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    """A family's pipeline, its denoiser's weights, and what it draws of each prompt without an eraser."""
    pipe: Any = family_pipeline(name)
    weights = {key: value.clone() for key, value in denoiser_of(pipe).state_dict().items()}
    return pipe, weights, [draw(pipe, [prompt]) for prompt in PROMPTS]


def embeddings(name: str, pipe: Any, prompt: str) -> dict[str, Tensor]:
    """What a pipeline takes in place of a prompt's text."""
    match name:
        case "sd1":
            keys, found = ("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(prompt, "cpu", 1, True)
        case "sdxl":
            keys = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
            found = pipe.encode_prompt(prompt)
        case "sd3":
            keys = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
            found = pipe.encode_prompt(prompt, None, None, max_sequence_length=16)
        case "flux-dev":
            keys = ("prompt_embeds", "pooled_prompt_embeds")
            found = pipe.encode_prompt(prompt, None, max_sequence_length=16)[:2]
        case _:
            keys, found = ("prompt_embeds", "prompt_embeds_mask"), pipe.encode_prompt(prompt)
    return {key: value for key, value in zip(keys, found, strict=True) if value is not None}


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gate_on_a_family(name: str, gate: Any, request: pytest.FixtureRequest) -> None:
    pipe, weights, bare = pipeline(name)
    snoopy, van_gogh = eraser(pipe, "snoopy", 1), eraser(pipe, "van gogh", 2)
    both = spm_hub.attach(pipe, [snoopy, van_gogh], gate=gate, progress=False)
    request.addfinalizer(both.detach)
    gammas = [both.gates(prompt) for prompt in PROMPTS]
    assert gammas[0]["snoopy"] == gammas[1]["van-gogh"] == 1
    single = [draw(pipe, [prompt]) for prompt in PROMPTS]
    assert apart(draw(pipe, list(PROMPTS)), torch.cat(single)) <= 1e-5
    quiet = [not any(each.values()) for each in gammas]
    assert quiet == [False, False, gate == "calibrated"]
    for each, drawn, without in zip(quiet, single, bare, strict=True):
        assert torch.equal(drawn, without) == each
    both.recover("snoopy")
    assert [both.gates(prompt) for prompt in PROMPTS] == [{"van-gogh": one["van-gogh"]} for one in gammas]
    only = [draw(pipe, [prompt]) for prompt in PROMPTS]
    both.detach()
    with spm_hub.attach(pipe, [van_gogh], gate=gate, progress=False) as alone:
        assert [alone.gates(prompt) for prompt in PROMPTS] == [{"van-gogh": one["van-gogh"]} for one in gammas]
        assert all(torch.equal(draw(pipe, [prompt]), one) for prompt, one in zip(PROMPTS, only, strict=True))
    assert torch.equal(draw(pipe, [PROMPTS[0]]), bare[0])
    after = denoiser_of(pipe).state_dict()
    assert all(torch.equal(weights[key], after[key]) for key in weights)


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_alone_are_gated_by_their_states(name: str, gate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _, bare = pipeline(name)
    with torch.no_grad():
        given = embeddings(name, pipe, PROMPTS[1])
    assert apart(draw(pipe, [PROMPTS[1]], prompt=None, **given), bare[1]) <= 1e-6, "the same picture as from the text"
    van_gogh = eraser(pipe, "van gogh", 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with spm_hub.attach(pipe, [van_gogh], gate=gate, progress=False) as erasers:
            ask, asked = erasers._gates.ask, []

            def recorded(*arguments: Any) -> Gammas:
                asked.append(ask(*arguments))
                return asked[-1]

            monkeypatch.setattr(erasers._gates, "ask", recorded)
            drawn = draw(pipe, [PROMPTS[1]], prompt=None, **given)
            ((gamma,),) = (one["van-gogh"] for one in asked)
            assert gamma <= erasers.gates(PROMPTS[1])["van-gogh"] == 1
    said = sum("only prompt_embeds are known" in str(one.message) for one in caught)
    assert (said == 1, gamma == 1) == ((False, True) if gate == "always" else (True, gamma == 1))
    with spm_hub.attach(pipe, [van_gogh], gate=gamma) as erasers:
        assert torch.equal(draw(pipe, [PROMPTS[1]], prompt=None, **given), drawn)


@pytest.mark.parametrize("gate", GATES)
def test_threads_that_draw_at_once_each_get_their_own_gammas(gate: Any) -> None:
    pipe, _, _ = pipeline("sd1")
    found: dict[str, Tensor] = {}
    with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1), eraser(pipe, "van gogh", 2)], gate=gate, progress=False):
        threads = [
            threading.Thread(target=lambda prompt=prompt: found.update({prompt: draw(pipe, [prompt])}))
            for prompt in PROMPTS
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert all(torch.equal(found[prompt], draw(pipe, [prompt])) for prompt in PROMPTS)


@pytest.mark.parametrize("gate", ["transport", "calibrated"])
def test_a_pipeline_without_a_tokenizer_is_fully_on_and_says_so(gate: Any) -> None:
    pipe: Any = family_pipeline("sd1")
    with torch.no_grad():
        given = embeddings("sd1", pipe, PROMPTS[2])
    pipe.tokenizer = pipe.text_encoder = None
    snoopy = eraser(pipe, "snoopy", 1)
    with spm_hub.attach(pipe, [snoopy], gate="always"):
        fully = draw(pipe, [PROMPTS[2]], prompt=None, **given)
    with spm_hub.attach(pipe, [snoopy], gate=gate, progress=False) as erasers:
        with pytest.warns(UserWarning, match="every eraser without a constant gate is fully on"):
            assert torch.equal(draw(pipe, [PROMPTS[2]], prompt=None, **given), fully)
        with pytest.raises(SpmHubError, match="cannot encode") as caught:
            erasers.gates("a dog")
    assert 'gate="always"' in str(caught.value)
