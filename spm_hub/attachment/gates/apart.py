"""Encodes many texts in few calls, with the states that each would have in a call of its own."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Encode = Callable[[Sequence[str]], Tensor]
"""Gives the states of texts that are encoded as one batch: (texts, tokens, d_text)."""

_ROWS, _TOKENS = 64, 64 * 77
"""The most texts of a call, and the most states: T5's texts are long."""


def encode_apart(encode: Encode, groups: Sequence[Sequence[str]]) -> Iterator[Tensor]:
    """Yield the states of each group of texts, bit for bit as `encode` gives them for the group alone.

    The states of a text may depend in the last bit on how many texts share its call, and gammas must not depend on
    which other erasers are attached. Several groups therefore share a call only as long as the last group of the call
    has the same states alone, and a short text has as many states as a long one.
    """
    if len(groups) < 2:
        yield from (encode(group) for group in groups)
        return
    length = encode([""]).shape[1]
    together = True
    for call in _calls(groups, max(1, min(_ROWS, _TOKENS // length))):
        alone = encode(call[-1])
        if together and len(call) > 1:
            several = encode([text for group in call for text in group]).split([len(group) for group in call])
            together = alone.shape[1] == length and torch.equal(several[-1], alone)
            if together:
                yield from several
                continue
        yield from (encode(group) for group in call[:-1])
        yield alone


def _calls(groups: Sequence[Sequence[str]], rows: int) -> Iterator[list[Sequence[str]]]:
    """Yield groups that have so many texts together, or else one group."""
    call: list[Sequence[str]] = []
    for group in groups:
        if call and sum(map(len, call)) + len(group) > rows:
            yield call
            call = []
        call.append(group)
    yield call
