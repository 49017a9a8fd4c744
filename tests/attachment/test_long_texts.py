"""Texts that are longer than the text encoders' windows: gates read what the encoders read, and the rest is said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from pico import pico_eraser, pico_pipeline
from pico_families import family_pipeline
from test_families import draw, eraser

from spm_hub.attachment.attachment import attach
from spm_hub.attachment.text_encoding import tokens_of
from spm_hub.models.text_window import cut_text

# 10 words fill the 12 positions of the pico CLIP, whose words are one token each; T5 reads as many as it is asked to.
LONG = "a photo of a red dog on the sunny beach by the blue church with snoopy"
READ_BY_CLIP, LOST_TO_CLIP = "a photo of a red dog on the sunny beach", "by the blue church with snoopy"


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught if "cut off" in str(one.message)]


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_of_one_window_the_rest_is_lost(name: str) -> None:
    cut = cut_text(family_pipeline(name), LONG, {})
    assert cut is not None
    assert (cut.read, cut.lost, cut.tokens, cut.window) == (READ_BY_CLIP, LOST_TO_CLIP, 18, 12)
    assert cut_text(family_pipeline(name), READ_BY_CLIP, {}) is None


def test_a_word_that_is_read_in_part_is_named_whole() -> None:
    """The pico tokenizer has no "zebra": each of its letters is a token, and two of them fit."""
    cut = cut_text(pico_pipeline(), "a dog a dog a dog a dog zebra", {})
    assert cut is not None
    assert (cut.read, cut.lost) == ("a dog a dog a dog a dog ze", "zebra")


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "pixart"])
def test_of_several_windows_the_longest_counts(name: str) -> None:
    pipe = family_pipeline(name)
    assert cut_text(pipe, LONG, {"max_sequence_length": 20}) is None
    cut = cut_text(pipe, LONG, {"max_sequence_length": 14})
    assert cut is not None
    # T5 ends a text with one token and begins it with none.
    assert (cut.lost, cut.tokens, cut.window) == ("church with snoopy", 17, 14)


def test_states_of_several_windows_are_those_of_the_whole_text() -> None:
    """Community pipelines encode a long prompt in pieces: 24 states of a window of 12."""
    assert cut_text(family_pipeline("sdxl"), LONG, {}, positions=24) is None
    assert cut_text(family_pipeline("sdxl"), LONG, {}, positions=12) is not None
    pipe = family_pipeline("sd3")
    assert cut_text(pipe, LONG, {"max_sequence_length": 14}, positions=12 + 14) is not None
    assert cut_text(pipe, LONG, {"max_sequence_length": 14}, positions=24 + 14) is None
    pipe.text_encoder_3 = None  # its states are zeros then, as many as before
    assert cut_text(pipe, LONG, {"max_sequence_length": 256}, positions=12 + 256) is not None


@pytest.mark.parametrize("gate", ["transport", "calibrated"])
def test_a_name_behind_the_window_neither_acts_nor_is_lost_in_silence(gate: Any) -> None:
    pipe = pico_pipeline()
    with attach(pipe, [pico_eraser(pipe.unet, "snoopy")], gate=gate) as erasers:
        with pytest.warns(UserWarning, match=f"has 18 tokens.* reads 12: cut off is '{LOST_TO_CLIP}'"):
            found = erasers.gates(LONG)
        assert found == erasers.gates(READ_BY_CLIP)
        assert torch.equal(draw(pipe, [LONG]), draw(pipe, [READ_BY_CLIP]))
        assert erasers.gates("snoopy")["snoopy"] == pytest.approx(1)


def test_a_name_behind_t5s_window_does_not_act() -> None:
    """T5's tokenizer would read on: the length that the call asks for counts."""
    pipe: Any = family_pipeline("flux-dev")
    text = "red " * 13 + "snoopy"
    with attach(pipe, [eraser(pipe, "snoopy", 1)], gate="transport") as erasers:
        with pytest.warns(UserWarning, match="cut off is 'snoopy'"):
            assert erasers.gates(text, max_sequence_length=14)["snoopy"] < 1
        assert erasers.gates(text, max_sequence_length=15)["snoopy"] == 1
    sets = [tokens_of(pipe, [text], (("max_sequence_length", length),))[0] for length in (14, 15)]
    assert sets[0] < sets[1]


def test_a_picture_of_a_long_prompt_says_so_once_for_each_prompt() -> None:
    pipe = pico_pipeline()
    with (
        attach(pipe, [pico_eraser(pipe.unet, "snoopy")], gate="transport"),
        warnings.catch_warnings(record=True) as all_,
    ):
        warnings.simplefilter("always")
        draw(pipe, [LONG, "a dog", f"{LONG} in a church"])
        draw(pipe, [LONG])
    assert [message.count("cut off") for message in said(all_)] == [1, 1]
    assert LOST_TO_CLIP in said(all_)[0]
    assert "in a church" in said(all_)[1]


def test_a_protected_prompt_may_be_longer_than_the_window() -> None:
    pipe = pico_pipeline()
    adapter = pico_eraser(pipe.unet, "snoopy")
    gate = adapter.manifest.gate.model_copy(update={"protected": (LONG,)})
    adapter = type(adapter)(adapter.manifest.model_copy(update={"gate": gate}), adapter.increments)
    with attach(pipe, [adapter], gate="transport") as erasers:
        with pytest.warns(UserWarning, match="cut off"):
            found = erasers.gates(LONG)
        assert found == {"snoopy": 0.0}
        assert erasers.gates(READ_BY_CLIP)["snoopy"] > 0


def test_a_concept_longer_than_the_window_is_said_when_it_is_attached() -> None:
    pipe = pico_pipeline()
    erasers = attach(pipe, [], gate="transport")
    with pytest.warns(UserWarning, match=r"the concept of .* has 18 tokens.*reads 12: cut off is 'by the blue church"):
        erasers.add(pico_eraser(pipe.unet, LONG))
    # The gate knows the part that is read.
    with warnings.catch_warnings(record=True):
        assert erasers.gates(READ_BY_CLIP) == {erasers.names[0]: pytest.approx(1)}
        assert erasers.gates(LOST_TO_CLIP)[erasers.names[0]] < 1
    erasers.detach()
