"""The tokens of one tokenizer, their embeddings, and the text that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spm_hub.errors import UsageError

NOWHERE = 2**31
"""A token position beyond the context window of every text encoder."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer, and the text encoders that read its tokens.

    arguments: those of `encode_prompt` whose text these encoders read ("prompt", "prompt_2", ...).
    """

    tokenizer: Any
    encoders: tuple[nn.Module, ...]
    arguments: tuple[str, ...]

    def searchable(self, without: Sequence[str] = (), *, printable: bool = False) -> Tensor:
        """Return the ids of the tokens that a user can type: those that decode and encode to themselves.

        The rest of the vocabulary is word fragments that need a following token, and special tokens.
        without: texts, none of whose tokens are returned.  printable: leave control characters out.
        """
        special = set(self.tokenizer.all_special_ids)
        ids = [token for token in sorted(self.tokenizer.get_vocab().values()) if token not in special]
        texts = [self._word(token) for token in ids]
        read = self.tokenizer(texts, add_special_tokens=False).input_ids
        kept = [token for token, again in zip(ids, read, strict=True) if again == [token]]
        if without:
            written = [form for text in without for form in (text, text.lower(), text.title(), text.upper())]
            left_out = {token for row in self.tokenizer(written, add_special_tokens=False).input_ids for token in row}
            kept = [token for token in kept if token not in left_out]
        if printable:
            kept = [token for token in kept if self._word(token).isprintable()]
        return torch.tensor(kept)

    def check_room(self, tokens: int, prompts: Sequence[str]) -> None:
        """Raise UsageError if `tokens` would push a part of a prompt out of the text encoder's window.

        The end of a prompt that is too long without them is ignored anyway and does not count.
        """
        window = self.tokenizer.model_max_length
        for prompt in prompts:
            taken = len(self.tokenizer(prompt).input_ids)
            room = window - (taken if taken <= window else len(self.tokenizer("").input_ids))
            if tokens > room:
                raise UsageError(
                    f"{tokens} tokens before {prompt!r} leave no room for it in the text encoder's window of {window} "
                    "tokens: the result of such an attack would say nothing about the eraser",
                    mend=f"--tokens {room}" if room else "use shorter prompts",
                )

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, special tokens not counted."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def words(self, tokens: Tensor) -> list[str]:
        """Return these tokens (k,) as a user would type them."""
        return [self._word(token) for token in tokens.tolist()]

    def _word(self, token: int) -> str:
        """Return one token as a user would type it, decoded once: searches write the same ones over and over."""
        if token not in self._decoded:
            self._decoded[token] = self.tokenizer.decode([token]).strip()
        return self._decoded[token]

    def write(self, tokens: Tensor, prompts: Sequence[str]) -> list[str]:
        """Write tokens (n, k) before n prompts."""
        return [" ".join([*self.words(row), prompt]).strip() for row, prompt in zip(tokens, prompts, strict=True)]

    @cached_property
    def _decoded(self) -> dict[int, str]:
        """The words decoded so far, by token."""
        return {}

    @cached_property
    def table(self) -> Tensor:
        """The text encoders' token embeddings (vocabulary, d), concatenated along d."""
        embeddings: list[Any] = [encoder.get_input_embeddings() for encoder in self.encoders]  # type: ignore[operator]
        tables = [module.weight.detach() for module in embeddings]
        return torch.cat([table[: len(self.tokenizer)].float() for table in tables], dim=1)


def nearest_by_angle(points: Tensor, units: Tensor) -> Tensor:
    """Return for each point the index of the unit vector at the least angle: (n,).

    points: (n, d).  units: (m, d).
    """
    return (F.normalize(points.detach(), dim=1) @ units.T).argmax(dim=1)
