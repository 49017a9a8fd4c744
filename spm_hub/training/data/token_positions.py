"""Where a concept's words stand among the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def window(tokenizer: Any, prompt: str) -> list[int]:
    """The token ids of a prompt as the text encoder reads them, special ones too, cut to its window."""
    ids: list[int] = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    return ids


def last_position(tokenizer: Any, prompt: str) -> int:
    """Of the last token before the closing one; the empty prompt has its first."""
    return max(0, len(window(tokenizer, prompt)) - 2)


def concept_positions(tokenizer: Any, prompt: str, names: Sequence[str]) -> tuple[int, ...]:
    """The positions of every occurrence of any of the names, ascending; none where the window ends before the first."""
    ids = window(tokenizer, prompt)
    found: set[int] = set()
    for name in names:
        own = [token for token in window(tokenizer, name) if token not in tokenizer.all_special_ids]
        for start in range(len(ids) - len(own) + 1):
            if own and ids[start : start + len(own)] == own:
                found.update(range(start, start + len(own)))
    return tuple(sorted(found))
