"""The encoded names of the erasers' concepts: one matrix of states, and an index by token."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spm_hub.attachment.gates.spill_file import SpilledRows, SpillFile

WAY = 2**32
"""More than any token's id. A token of the n-th way to cut a text into tokens counts as its id plus n * WAY."""


class EncodedConcept:
    """The names of one eraser's concept, and what the pipeline's tokenizers and text encoder make of each.

    names: the target, then its aliases.  tokens: T(c) of each name (`text_encoding.token_sets`).  shape: of the states
    of one name, (tokens, d_text).
    """

    def __init__(
        self,
        names: tuple[str, ...],
        tokens: tuple[frozenset[int], ...],
        states: Tensor,
        spill_file: SpillFile | None = None,
    ) -> None:
        """Keep the states, (names, tokens, d_text), in memory, or in `spill_file` rounded by `fixed_point`."""
        self.names, self.tokens = names, tokens
        self.shape = states.shape[1:]
        self._kept: Tensor | SpilledRows = states
        if spill_file is not None:
            self._lengths = states.detach().to("cpu", torch.float64).flatten(1).norm(dim=1).float()
            # Multiples of 2^-24 up to 1 have 24 bits: float32 stores them exactly.
            self._kept = spill_file.put(fixed_point(states).float())

    @property
    def states(self) -> Tensor:
        """e(c) of each name: (names, tokens, d_text), to 2^-24 of their length where they are spilled."""
        if isinstance(self._kept, Tensor):
            return self._kept
        scaled: Tensor = self._kept.read() * self._lengths[:, None]
        return scaled.view(-1, *self.shape)

    @property
    def units(self) -> Tensor:
        """The `fixed_point` of the states: (names, tokens * d_text), float64."""
        return fixed_point(self._kept) if isinstance(self._kept, Tensor) else self._kept.read().double()

    @property
    def spilled(self) -> bool:
        """True if the states are in a spill file."""
        return isinstance(self._kept, SpilledRows)


@dataclass(frozen=True, eq=False)
class ConceptIndex:
    """The concepts of several erasers, as one matrix of states and one inverted index of tokens.

    varying: whether the text encoder gives a longer text more states (Qwen-Image). Those of a shorter one then count as
    followed by zeros, as in a padded batch.
    """

    each: tuple[EncodedConcept, ...]
    varying: bool = False

    def __len__(self) -> int:
        return len(self.each)

    @cached_property
    def owners(self) -> Tensor:
        """The index of the concept of each name: (names,), int64."""
        return torch.tensor([index for index, concept in enumerate(self.each) for _ in concept.names], dtype=torch.long)

    @property
    def states(self) -> Tensor:
        """The states of the names of all concepts, one after the other: (names, tokens, d_text)."""
        return pad_sequence([states for concept in self.each for states in concept.states], batch_first=True)

    @cached_property
    def sizes(self) -> Counter[tuple[int, int]]:
        """|T(c)| by the index of the name and by the way in which it is cut into tokens."""
        every = enumerate(tokens for concept in self.each for tokens in concept.tokens)
        return Counter((name, token // WAY) for name, tokens in every for token in tokens)

    def greatest(self, per_name: Tensor) -> Tensor:
        """Return the maximum over the names of each concept: (prompts, names) to (prompts, concepts)."""
        if per_name.shape[1] == len(self.each):
            return per_name
        owners = self.owners.expand_as(per_name)
        lowest = per_name.new_full((len(per_name), len(self.each)), -torch.inf)
        return lowest.scatter_reduce_(1, owners, per_name, "amax")

    @cached_property
    def names_by_token(self) -> dict[int, list[int]]:
        """The indices of the names that contain a token, by token."""
        index: dict[int, list[int]] = defaultdict(list)
        for name, tokens in enumerate(tokens for concept in self.each for tokens in concept.tokens):
            for token in tokens:
                index[token].append(name)
        return dict(index)

    @property
    def units(self) -> Iterator[Tensor]:
        """The `fixed_point` of the states of all names, in order: matrices (some names, tokens * d_text).

        One matrix if all states are in memory and of one shape, otherwise one for each concept.
        """
        if self._matrix is None:
            yield from (concept.units for concept in self.each)
        else:
            yield self._matrix

    @cached_property
    def _matrix(self) -> Tensor | None:
        if any(concept.spilled or concept.shape != self.each[0].shape for concept in self.each):
            return None
        return fixed_point(self.states)


def fixed_point(states: Tensor) -> Tensor:
    """Scale each of n states to unit length and round it to multiples of 2^-24.

    states: (n, tokens, d_text); returns (n, tokens * d_text), float64. Products of such rows are multiples of 2^-48 and
    no partial sum exceeds 1, so float64 adds them exactly in any order. A gamma is therefore the same to the last bit
    however many erasers share the matrix, and recovering one leaves the others' pictures as they would have been
    without it. The cosine is off by about 1e-8.
    """
    flat = states.detach().to("cpu", torch.float64).flatten(1)
    # One row at a time, as the order of a sum may depend on the number of rows.
    norms = torch.stack([row.norm() for row in flat]).clamp_min(torch.finfo(torch.float32).tiny)
    return (flat / norms[:, None]).mul_(2.0**24).round_().mul_(2.0**-24)
