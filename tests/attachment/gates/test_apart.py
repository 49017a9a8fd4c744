"""Texts that are encoded in one call have the states that they have alone, whatever the text encoder does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import spm_hub
from spm_hub.attachment.gates.apart import encode_apart
from spm_hub.attachment.text_encoding import encode_together

GROUPS = [[f"word {number}", "x" * (number % 5)] for number in range(50)]


class Encoder:
    """An encoder of its own for every flaw; it counts its calls."""

    def __init__(self, flaw: str = "") -> None:
        self.flaw, self.calls = flaw, list[int]()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.calls.append(len(texts))
        each = [torch.tensor([float(byte) for byte in text.encode().ljust(8)]) for text in texts]
        if self.flaw == "grows with the text":
            each = [torch.tensor([float(byte) for byte in f"<{text}>".encode()]) for text in texts]
        if self.flaw == "depends on the rows":
            each = [one + 2.0**-12 * len(texts) for one in each]
        return torch.nn.utils.rnn.pad_sequence(each, batch_first=True)[..., None]


@pytest.mark.parametrize("flaw", ["", "grows with the text", "depends on the rows"])
def test_each_group_has_the_states_of_a_call_of_its_own(flaw: str) -> None:
    encoder = Encoder(flaw)
    found = list(encode_apart(encoder, GROUPS))
    calls = len(encoder.calls)
    assert [one.tolist() for one in found] == [encoder(group).tolist() for group in GROUPS]
    # 50 groups of two: two calls of at most 64 texts, each with its last group alone, and the empty text.
    assert calls == (5 if not flaw else 1 + 50 + 1)


def test_long_texts_share_a_call_with_fewer_others() -> None:
    sizes: list[int] = []

    def encode(texts: Sequence[str]) -> Tensor:
        sizes.append(len(texts))
        return torch.zeros(len(texts), 512, 2)

    list(encode_apart(encode, [[str(number)] for number in range(20)]))
    assert max(sizes) == 9, "9 x 512 states are at most 64 x 77"


def test_one_group_is_encoded_by_itself() -> None:
    encoder = Encoder()
    (found,) = encode_apart(encoder, [["a", "b"]])
    assert encoder.calls == [2]
    assert found.shape == (2, 8, 1)


def test_the_sketchbooks_encoder_gives_the_bits_of_one_text_at_a_time() -> None:
    pipe: Any = spm_hub.load_pipeline("sketchbook")
    texts = [f"a photo of thing {number} and {'more ' * (number % 4)}" for number in range(70)]
    calls: list[int] = []

    def encode(some: Sequence[str]) -> Tensor:
        calls.append(len(some))
        return encode_together(pipe, type(pipe), some)

    found = torch.cat(list(encode_apart(encode, [[text] for text in texts])))
    assert torch.equal(found, torch.cat([encode_together(pipe, type(pipe), [text]) for text in texts]))
