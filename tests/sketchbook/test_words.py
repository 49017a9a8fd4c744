"""The sketchbook knows the words of its captions, and says which words of a prompt it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spm_hub.evaluation.sketchbook import cases, remark_on_words
from spm_hub.models.base_choice import BaseChoice
from spm_hub.sketchbook.world import drawings, unknown_words


def test_no_word_of_a_caption_or_of_a_measured_prompt_is_unknown() -> None:
    captions = [caption for *_, caption in drawings(200, torch.Generator().manual_seed(3))]
    assert {word for text in captions for word in unknown_words(text)} == set()
    # The sentences of `spmhub eval` are others than those of the training, on purpose.
    assert {word for case in cases(samples=10) for word in unknown_words(case.prompt)} <= {"meadow"}


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("Snoopy at the beach by Van Gogh", ()),
        ("a dragon and a dog, fighting", ("dragon", "fighting")),
        ("snoopy's 2 castles", ("castles",)),
        ("葛飾北斎", ("葛飾北斎",)),
        ("", ()),
    ],
)
def test_unknown_words_are_named_once_in_order(prompt: str, unknown: tuple[str, ...]) -> None:
    assert unknown_words(f"{prompt} {prompt}") == unknown


def test_the_remark_is_about_the_sketchbook_alone(tmp_path: Path) -> None:
    remark = remark_on_words(BaseChoice("sketchbook"), ["a dragon", "a dragon and a castle"])
    assert remark is not None
    assert "does not know these words: dragon, castle." in remark
    assert "draws only: snoopy, mickey," in remark
    assert remark_on_words(BaseChoice("sketchbook"), ["a dog"]) is None
    assert remark_on_words(BaseChoice("sd-v1-4"), ["a dragon"]) is None
