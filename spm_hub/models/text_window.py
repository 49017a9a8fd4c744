"""Finds the part of a text that a pipeline's text encoders read: they cut at the end of a window."""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SUFFIXES = ("", "_2", "_3", "_4")
"""The endings of a pipeline's attributes text_encoder* and tokenizer*."""

WINDOW = "max_sequence_length"
"""The argument of a pipeline's call that says how many tokens its language models read; CLIP's number is fixed."""

_MOST = 10**6
"""A tokenizer with a greater `model_max_length` does not know its encoder's window."""


@dataclass(frozen=True)
class Cut:
    """A text that is longer than all windows of a pipeline's text encoders.

    read: its beginning, which at least one encoder reads.  lost: the rest, from the first word on that none reads
    whole.  tokens, window: the length of the text and of the window in which most of it is read, both with the tokens
    that begin and end a text.
    """

    text: str
    read: str
    lost: str
    tokens: int
    window: int

    def describe(self, what: str) -> str:
        """Say in words which part is cut. what: the role of the text, such as "the prompt"."""
        return (
            f"{what} {textwrap.shorten(self.text, 60, placeholder=' ...')!r} has {self.tokens} tokens, and the text "
            f"encoder reads {self.window}: cut off is {textwrap.shorten(self.lost, 300, placeholder=' ...')!r}"
        )


def cut_text(pipe: Any, text: str, settings: Mapping[str, Any], positions: int | None = None) -> Cut | None:
    """Return which part of a text no encoder of the pipeline reads; None if one reads all of it.

    settings: arguments of the call that encodes it.  positions: the number of its text-encoder states where it is
    known; more of them than one window has show a pipeline that reads a long text in several windows.
    """
    # A token is at least a byte of the text; two more are around it.
    found = [(tokenizer, window_of(tokenizer, settings)) for _, _, tokenizer in tokenizers_of(pipe)]
    if not found or any(window is None or len(text.encode()) + 2 <= window for _, window in found):
        return None
    windows = [window for _, window in found if window is not None]
    if positions is not None and reads_whole(pipe, settings, positions):
        return None
    cuts = [_cut(pipe, tokenizer, text, window) for (tokenizer, _), window in zip(found, windows, strict=True)]
    most: Cut | None = None
    for cut in cuts:
        if cut is None:
            return None
        most = cut if most is None or len(cut.lost) < len(most.lost) else most
    return most


def tokenizers_of(pipe: Any) -> Iterator[tuple[int, str, Any]]:
    """Yield the position, the suffix and the tokenizer of every text encoder that is loaded."""
    for position, suffix in enumerate(SUFFIXES):
        tokenizer = getattr(pipe, f"tokenizer{suffix}", None)
        # FLUX.2 has a processor for pictures and texts there, whose attribute the tokenizer is.
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if tokenizer is None or getattr(pipe, f"text_encoder{suffix}", tokenizer) is None:
            continue
        if position and type(tokenizer).__name__ == "ByT5Tokenizer":
            continue  # HunyuanImage's second tokenizer gives bytes, which any longer text shares with any name.
        yield position, suffix, tokenizer


def window_of(tokenizer: Any, settings: Mapping[str, Any]) -> int | None:
    """Return how many tokens the encoder behind a tokenizer reads; None if it is not known."""
    given = None if _is_clip(tokenizer) else settings.get(WINDOW)
    length = given or getattr(tokenizer, "model_max_length", None)
    return length if isinstance(length, int) and length <= _MOST else None


def reads_whole(pipe: Any, settings: Mapping[str, Any], positions: int) -> bool:
    """Return whether so many text-encoder states are more than one window of each encoder has."""
    windows = [(window_of(tokenizer, settings), _is_clip(tokenizer)) for _, _, tokenizer in tokenizers_of(pipe)]
    # SD3 puts CLIP's states and T5's one after the other, zeros in place of a missing T5's; two CLIPs share positions.
    clip, other = (
        max((length or _MOST for length, one in windows if one is kind), default=0) for kind in (True, False)
    )
    return positions > clip + max(other, settings.get(WINDOW) or 0)


def _is_clip(tokenizer: Any) -> bool:
    return "CLIP" in type(tokenizer).__name__


def _cut(pipe: Any, tokenizer: Any, text: str, window: int) -> Cut | None:
    convert = getattr(pipe, "maybe_convert_prompt", None)
    given = text if convert is None else convert(text, tokenizer)  # textual inversions of several tokens
    tokens = len(tokenizer(given, truncation=True, max_length=_MOST).input_ids)  # without it tokenizers warn
    if tokens <= window:
        return None
    fast = getattr(tokenizer, "is_fast", False)
    kept = tokenizer(given, truncation=True, max_length=window, return_offsets_mapping=fast)
    if "offset_mapping" in kept:
        read = given[: max(end for _, end in kept.offset_mapping)]
    else:
        read = tokenizer.decode(kept.input_ids, skip_special_tokens=True)
    return Cut(text, read, given[_word_at(given, len(read)) :].strip(), tokens, window)


def _word_at(text: str, position: int) -> int:
    """Return where the word begins that a position is in the middle of; else the position itself."""
    start = position
    while 0 < start < len(text) and text[start - 1].isalnum() and text[start].isalnum():
        start -= 1
    return start
