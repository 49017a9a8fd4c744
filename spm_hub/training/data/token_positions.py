"""Finds the positions of a concept's words among the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def window(tokenizer: Any, prompt: str) -> list[int]:
    """The token ids of a prompt as the text encoder reads them, special ones too, cut to its window."""
    ids: list[int] = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    return ids


def last_position(tokenizer: Any, prompt: str) -> int:
    """Return the position of the last token before the closing one; the empty prompt's is its first."""
    return max(0, len(window(tokenizer, prompt)) - 2)


def concept_positions(tokenizer: Any, prompt: str, names: Sequence[str]) -> tuple[int, ...]:
    """Return the positions of every occurrence of any of the names, ascending.

    Names beyond the tokenizer's window have none.
    """
    ids = window(tokenizer, prompt)
    found: set[int] = set()
    for name in names:
        own = [token for token in window(tokenizer, name) if token not in tokenizer.all_special_ids]
        for start in range(len(ids) - len(own) + 1):
            if own and ids[start : start + len(own)] == own:
                found.update(range(start, start + len(own)))
    return tuple(sorted(found))
