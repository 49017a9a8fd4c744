"""Prompts for several encoders, negative prompts, replaced prompts: the gammas of each and the rows they act on."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from pico import TEXT_WIDTH, pico_pipeline
from pico_families import family_pipeline, unet
from test_families import apart, draw, eraser
from torch import Tensor

import spm_hub
from spm_hub.attachment.gates.concept_index import ConceptIndex
from spm_hub.attachment.gates.gate import Explanation, GatedEraser, Prompts, TextEncoder, TransportGate, similarity
from spm_hub.attachment.text_encoding import encode, encoder_settings, tokens_by_position
from spm_hub.errors import UsageError
from spm_hub.models.architectures import denoiser_of

PROMPTS = ["snoopy", "a dog on the beach", "mickey mouse", ""]


class RecordingGate:
    """The transport gate; records its prompts, its concepts and its gammas."""

    def __init__(self) -> None:
        self.prompts: list[Prompts] = []
        self.concepts: list[ConceptIndex] = []
        self.gammas_given: list[Tensor] = []

    def gammas(self, prompts: Prompts, concepts: ConceptIndex) -> Tensor:
        self.prompts.append(prompts)
        self.concepts.append(concepts)
        self.gammas_given.append(TransportGate().gammas(prompts, concepts))
        return self.gammas_given[-1]


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux-dev"])
def test_words_for_another_encoder_are_words_of_the_prompt(name: str) -> None:
    pipe: Any = family_pipeline(name)
    gate = RecordingGate()
    with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1)], gate=gate):
        draw(pipe, ["a dog", "a cat"], prompt_2=["a photo of snoopy", "a cat"])
        draw(pipe, ["a dog"], prompt_2="snoopy")
    assert gate.gammas_given[0][0].item() == 1 > gate.gammas_given[0][1].item()
    assert gate.gammas_given[1].item() == 1
    assert gate.prompts[0].texts == ("a dog\na photo of snoopy", "a cat")


def test_a_protected_prompt_with_another_encoders_prompt_is_not_protected() -> None:
    pipe: Any = family_pipeline("flux-dev")
    adapter = eraser(pipe, "snoopy", 1)
    safe = adapter.manifest.gate.model_copy(update={"protected": ("a dog",)})
    adapter = replace(adapter, manifest=adapter.manifest.model_copy(update={"gate": safe}))
    bare = draw(pipe, ["a dog"]), draw(pipe, ["a dog"], prompt_2="snoopy")
    with spm_hub.attach(pipe, [adapter]):
        assert torch.equal(draw(pipe, ["a dog"]), bare[0])
        assert torch.equal(draw(pipe, ["a dog"], prompt_2="a dog"), bare[0])
        assert apart(draw(pipe, ["a dog"], prompt_2="snoopy"), bare[1]) > 1e-2


class RecordedCalls:
    """The inputs and outputs of a denoiser's calls."""

    def __init__(self, pipe: Any) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
        denoiser_of(pipe).register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor]) -> None:
        self.calls.append((args, kwargs, output[0]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "fold", "branch"])
@pytest.mark.parametrize("name", ["flux-dev", "qwen-image"])
def test_negative_prompts_in_a_call_of_their_own_follow_the_option_rows(name: str, mode: Any) -> None:
    pipe, twin = family_pipeline(name), family_pipeline(name)
    # The last one is its own negative prompt: the two calls are distinguished all the same.
    prompts = ["snoopy", "snoopy"] if mode == "fold" else ["snoopy", "a dog", ""]
    options: dict[str, Any] = {"negative_prompt": [""] * len(prompts), "true_cfg_scale": 2.0, "max_sequence_length": 16}
    for rows in ("conditional", "both"):
        with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1)], rows=rows, mode=mode):
            heard = RecordedCalls(pipe)
            draw(pipe, prompts, **options)
        assert len(heard.calls) == 4
        for step, (_, kwargs, output) in enumerate(heard.calls):
            with torch.no_grad():
                bare = denoiser_of(twin)(**kwargs)[0]
            negative = step % 2 == 1
            if negative and rows == "conditional":
                assert torch.equal(output, bare)
            else:
                assert apart(output, bare) > 1e-2
        denoiser_of(pipe)._forward_hooks.clear()
    with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1)], rows="conditional"):
        together = draw(pipe, prompts, **options)
        for row, prompt in enumerate(prompts):
            assert apart(together[row], draw(pipe, [prompt], **options | {"negative_prompt": ""})[0]) <= 1e-5


def test_an_encoder_that_gives_longer_texts_more_states() -> None:
    pipe: Any = family_pipeline("qwen-image")
    names = ["snoopy", "a painting by van gogh", "mickey mouse"]
    gate = RecordingGate()
    with torch.no_grad():
        encoded = {text: pipe.encode_prompt(text)[0][0].double() for text in (*names, *PROMPTS)}
    assert len({len(states) for states in encoded.values()}) > 2
    with spm_hub.attach(pipe, [eraser(pipe, name, seed) for seed, name in enumerate(names)], gate=gate) as erasers:
        together = draw(pipe, PROMPTS, max_sequence_length=64)
        single = [draw(pipe, [prompt], max_sequence_length=64) for prompt in PROMPTS]
        assert erasers.gates("mickey mouse")["mickey-mouse"] == pytest.approx(1, abs=1e-6)
    assert apart(together, torch.cat(single)) <= 1e-5
    found = similarity(gate.prompts[0].states, gate.concepts[0])
    for row, prompt in enumerate(PROMPTS):
        for column, name in enumerate(names):
            one, other = encoded[prompt], encoded[name]
            both = min(len(one), len(other))
            cosine = float((one[:both] * other[:both]).sum() / one.norm() / other.norm())
            assert float(found[row, column]) == pytest.approx(cosine, abs=1e-6)
    # One eraser alone, whose name is as long as one of the prompts but not as the batch.
    with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1)], gate=gate):
        draw(pipe, PROMPTS, max_sequence_length=64)
        draw(pipe, ["a dog on the beach"], max_sequence_length=64)
    assert float(gate.gammas_given[-1]) == pytest.approx(float(gate.gammas_given[-2][1]), abs=1e-6)


def test_a_processor_in_place_of_a_tokenizer_and_settings_of_several_numbers() -> None:
    pipe: Any = family_pipeline("flux-2")
    gate = RecordingGate()
    options = {"text_encoder_out_layers": (1, 2, 3), "max_sequence_length": 64}
    with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1), eraser(pipe, "dog", 2)], gate=gate):
        together = draw(pipe, ["snoopy", "a dog"], **options)
        single = [draw(pipe, [prompt], **options) for prompt in ("snoopy", "a dog")]
    assert apart(together, torch.cat(single)) <= 1e-5
    assert float(similarity(gate.prompts[0].states, gate.concepts[0])[0, 0]) == pytest.approx(1, abs=1e-6)
    assert gate.gammas_given[0][1, 1] == 1 > gate.gammas_given[0][0, 1]


@pytest.mark.parametrize("name", ["flux-dev", "sd3"])
def test_a_word_that_only_the_longer_of_two_encoders_reads(name: str) -> None:
    pipe: Any = family_pipeline(name)
    with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1)]) as erasers:
        long = "red " * 12 + "snoopy"
        assert erasers.gates(long)["snoopy"] == 1
        assert erasers.gates("red " * 13)["snoopy"] < 1
        if name == "sd3":
            pipe.text_encoder_3 = None
            assert erasers.gates(long)["snoopy"] < 1, "nobody reads it now"


@pytest.mark.parametrize("name", ["qwen-image", "pixart"])
def test_a_name_in_the_middle_of_a_sentence_and_in_capitals(name: str) -> None:
    pipe: Any = family_pipeline(name)
    with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1)]) as erasers:
        for prompt in ("a photo of snoopy", "a photo of SNOOPY", "snoopy on the beach"):
            assert erasers.gates(prompt)["snoopy"] == 1
        assert erasers.gates("a photo of the church")["snoopy"] < 1


@pytest.mark.parametrize("ready", [False, True], ids=["encoded in the callback", "encoded before"])
@pytest.mark.parametrize("name", ["sd1", "flux-dev"])
def test_prompts_that_are_replaced_in_the_middle_of_a_picture(name: str, ready: bool) -> None:
    pipe, twin = family_pipeline(name), family_pipeline(name)
    options: dict[str, Any] = {"max_sequence_length": 16} if name == "flux-dev" else {}

    def encoded(words: str) -> Tensor:
        with torch.no_grad():
            if name == "sd1":
                return torch.cat(pipe.encode_prompt(words, "cpu", 1, True)[::-1])
            states: Tensor = pipe.encode_prompt(words, **options)[0]
            return states

    dog, snoopy = encoded("a dog"), encoded("snoopy")

    def put(pipeline: Any, step: int, time: object, tensors: dict[str, Any]) -> dict[str, Any]:
        """The second step's, and back again."""
        return {"prompt_embeds": dog if step else snoopy if ready else encoded("a photo of snoopy")}

    # The dog is far enough to be spared, by this threshold.
    with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1)], rows="conditional", threshold=0.999):
        heard = RecordedCalls(pipe)
        draw(
            pipe, ["a dog"], num_inference_steps=3, callback_on_step_end=put,
            callback_on_step_end_tensor_inputs=["prompt_embeds"], **options,
        )  # fmt: skip
    assert len(heard.calls) == 3
    for (args, kwargs, output), erased in zip(heard.calls, (False, True, False), strict=True):
        with torch.no_grad():
            bare = denoiser_of(twin)(*args, **kwargs)[0]
        assert (apart(output[-1:], bare[-1:]) > 1e-2) == erased
        if name == "sd1":
            assert apart(output[:1], bare[:1]) <= 1e-5, "the unconditional row is spared"


def test_text_encoders_are_enough_where_the_pipeline_can_encode_with_them() -> None:
    pipe: Any = family_pipeline("sdxl")
    narrow = unet(
        cross_attention_dim=TEXT_WIDTH, transformer_layers_per_block=(1, 2), addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
    )  # fmt: skip
    pipe.register_modules(unet=narrow.requires_grad_(False), text_encoder=None, tokenizer=None)
    gate = RecordingGate()
    with warnings.catch_warnings(), spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1)], gate=gate):
        warnings.simplefilter("error", UserWarning)
        draw(pipe, ["a photo of snoopy"])
    assert gate.gammas_given[0].item() == 1


def test_a_pipeline_that_cannot_encode_is_fully_on_and_says_so() -> None:
    pipe, twin = family_pipeline("flux-dev"), family_pipeline("flux-dev")
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt("a dog", max_sequence_length=16)
    pipe.register_modules(text_encoder_2=None, tokenizer_2=None)
    with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1)]) as erasers:
        with pytest.warns(UserWarning, match="fully on"):
            drawn = pipe(
                prompt_embeds=embeds, pooled_prompt_embeds=pooled, generator=torch.Generator().manual_seed(7),
                height=16, width=16, guidance_scale=2.0, num_inference_steps=2, output_type="latent",
            ).images  # fmt: skip
        with pytest.raises(UsageError, match="cannot encode 'a dog'"):
            erasers.gates("a dog")
    with spm_hub.attach(twin, [eraser(twin, "snoopy", 1)], gate="always"):
        assert torch.equal(drawn, draw(twin, ["a dog"]))


@pytest.mark.parametrize("change", ["replaced", "written", "lora"])
def test_concepts_are_encoded_again_by_other_text_encoders(change: str) -> None:
    pipe: Any = family_pipeline("sd1")
    other = pico_pipeline(seed=3)
    with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1)]) as erasers:
        erasers.gates("snoopy")
        if change == "replaced":
            pipe.text_encoder = other.text_encoder
        elif change == "written":
            pipe.text_encoder.load_state_dict(other.text_encoder.state_dict())
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                config = LoraConfig(r=2, lora_alpha=40, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
                pipe.text_encoder.add_adapter(config)
        found = erasers.gates("a dog")
    with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1)]) as fresh:
        assert fresh.gates("a dog") == found


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_the_token_at_a_position_is_the_one_whose_state_changes_with_it(name: str) -> None:
    pipe: Any = family_pipeline(name)
    settings = encoder_settings(type(pipe), {})
    one, other = (encode(pipe, type(pipe), f"snoopy {word} beach", settings)[0] for word in ("beagle", "church"))
    # CLIP is causal: the states before the word that differs are the same.
    (first, *_) = (one != other).any(-1).nonzero().flatten().tolist()
    tokens = tokens_by_position(pipe, "snoopy beagle beach", len(one), settings)
    assert len(tokens) == len(one)
    assert tokens[first] == "beagle"
    assert tokens[:5] == ["(start)", "snoopy", "beagle", "beach", "(end)"]
    assert set(tokens[5:]) == {"(padding)"}
    cut = tokens_by_position(pipe, "beach " * 50, len(one), settings)
    assert (len(cut), cut[-2:]) == (len(one), ["beach", "(end)"])


def test_tokens_are_those_of_the_encoder_that_the_denoiser_reads() -> None:
    pipe: Any = family_pipeline("flux-dev")
    for length in (512, 300):
        settings = encoder_settings(type(pipe), {"max_sequence_length": length})
        tokens = tokens_by_position(pipe, "snoopy beagle beach", length, settings)
        assert tokens[:4] == ["snoopy", "beagle", "beach", "(end)"], "T5 has no token at the start"
        assert len(tokens) == length


@pytest.mark.parametrize("name", ["sd3", "qwen-image", "flux-2"])
def test_states_that_are_not_those_of_one_padded_text_have_no_tokens(name: str) -> None:
    pipe: Any = family_pipeline(name)
    layers = {"text_encoder_out_layers": (1, 2)} if name == "flux-2" else {}
    settings = encoder_settings(type(pipe), layers)
    length = encode(pipe, type(pipe), "snoopy beagle beach", settings).shape[1]
    assert tokens_by_position(pipe, "snoopy beagle beach", length, settings) == []


class PointingGate:
    """Explains every gamma by the state at one position, and tells how many texts it has read."""

    def prepare(self, encoder: TextEncoder, erasers: list[GatedEraser]) -> PointingGate:
        self.count = len(erasers)
        encoder.progress(1, 2)
        return self

    def gammas(self, prompts: Prompts) -> Tensor:
        return torch.ones(len(prompts.states), self.count)

    def explain(self, prompts: Prompts) -> list[Explanation]:
        return [Explanation(1.0, "state", "shown", 2)] * self.count


@pytest.mark.parametrize(("name", "token"), [("sd1", "beagle"), ("flux-dev", "beach"), ("sd3", "")])
def test_explanations_have_the_token_at_their_position(name: str, token: str) -> None:
    pipe: Any = family_pipeline(name)
    with spm_hub.attach(pipe, [eraser(pipe, "snoopy", 1)], gate=PointingGate()) as erasers:
        (found,) = erasers.explain("snoopy beagle beach").values()
    assert (found.position, found.token, found.shown) == (2, token, "shown")


def test_a_gate_that_encodes_for_long_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, int]] = []
    pipe: Any = family_pipeline("sd1")
    gate, adapters = PointingGate(), [eraser(pipe, "snoopy", 1)]
    with spm_hub.attach(pipe, adapters, gate=gate, progress=lambda done, total, _: moved.append((done, total))) as one:
        one.gates("a dog")
    assert moved == [], "it did not take a second"
    seconds = iter(range(100))
    monkeypatch.setattr("spm_hub.io.progress.time.monotonic", lambda: float(next(seconds)))
    with spm_hub.attach(pipe, adapters, gate=gate, progress=lambda done, total, _: moved.append((done, total))) as one:
        one.gates("a dog")
    assert moved == [(1, 2)]
