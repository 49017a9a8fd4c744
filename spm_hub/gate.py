"""Facilitated transport: how strongly each eraser acts on each prompt (SPM, arXiv 2312.16145, Eq. 10-11)."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of one call.

    texts: as given, None where only embeddings were.  tokens: for each its token ids without special ones, T(p), None
    with `texts`.  states: (prompts, tokens, d_text), the text-encoder states that the denoiser is given, e(p).
    """

    texts: tuple[str, ...] | None
    tokens: tuple[frozenset[int], ...] | None
    states: Tensor


@dataclass(frozen=True, eq=False)
class Concept:
    """What one eraser listens to: all names of its concept.

    names: the target, then its aliases.  tokens: T(c) of each.  states: (names, tokens, d_text), e(c) of each.
    """

    names: tuple[str, ...]
    tokens: tuple[frozenset[int], ...]
    states: Tensor


@dataclass(frozen=True, eq=False)
class Concepts:
    """The concepts of several erasers, as one matrix of states and one inverted index of tokens."""

    each: tuple[Concept, ...]

    def __len__(self) -> int:
        return len(self.each)

    @cached_property
    def owners(self) -> Tensor:
        """(names,): the index of the concept that each name is of."""
        return torch.tensor([index for index, concept in enumerate(self.each) for _ in concept.names], dtype=torch.long)

    @property
    def states(self) -> Tensor:
        """(names, tokens, d_text), the names of all concepts one after the other."""
        return torch.cat([concept.states for concept in self.each])

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """|T(c)| of every name."""
        return tuple(len(tokens) for concept in self.each for tokens in concept.tokens)

    def greatest(self, per_name: Tensor) -> Tensor:
        """The greatest over the names of each concept: (prompts, names) to (prompts, concepts)."""
        if per_name.shape[1] == len(self.each):
            return per_name
        owners = self.owners.expand_as(per_name)
        lowest = per_name.new_full((len(per_name), len(self.each)), -torch.inf)
        return lowest.scatter_reduce_(1, owners, per_name, "amax")

    @cached_property
    def holders(self) -> dict[int, list[int]]:
        """For every token id the names that contain it."""
        index: dict[int, list[int]] = defaultdict(list)
        for name, tokens in enumerate(tokens for concept in self.each for tokens in concept.tokens):
            for token in tokens:
                index[token].append(name)
        return dict(index)

    @cached_property
    def matrix(self) -> Tensor:
        """Unit rows of `states`, flattened, in fixed point: see `fixed_point`."""
        return fixed_point(self.states)


@runtime_checkable
class Gate(Protocol):
    """Decides the gammas of a call; any object with this method may be given to `attach(gate=...)`."""

    def gammas(self, prompts: Prompts, concepts: Concepts) -> Tensor:
        """One gamma for every prompt and eraser: (prompts, erasers), before the erasers' strength."""
        ...


@dataclass(frozen=True)
class ConstantGate:
    """The same gamma whatever the prompt; 1 is an eraser that is always fully on."""

    gamma: float

    def gammas(self, prompts: Prompts, concepts: Concepts) -> Tensor:
        return torch.full((len(prompts.states), len(concepts)), self.gamma, dtype=torch.float64)


class TransportGate:
    """gamma(p, c) = max(cos(e(p), e(c)), |T(p) & T(c)| / |T(c)|), the greatest over the names of a concept.

    The cosine is that of the flattened states (Eq. 10), T are sets of token ids without special ones (Eq. 11). Prompts
    that are known by their embeddings alone count as sharing no token.
    """

    def gammas(self, prompts: Prompts, concepts: Concepts) -> Tensor:
        return concepts.greatest(torch.maximum(similarity(prompts.states, concepts), overlap(prompts, concepts)))


def similarity(states: Tensor, concepts: Concepts) -> Tensor:
    """Cosines of flattened states, (prompts, names), float64.

    states: (prompts, tokens, d_text). Embeddings longer than the encoder's window (several windows one after the other)
    are compared window by window, and the most similar one counts.
    """
    window = concepts.each[0].states.shape[1]
    cosines = []
    for chunk in torch.split(states, window, dim=1):
        names = concepts.matrix if chunk.shape[1] == window else fixed_point(concepts.states[:, : chunk.shape[1]])
        cosines.append(fixed_point(chunk) @ names.T)
    return cosines[0] if len(cosines) == 1 else torch.stack(cosines).amax(dim=0)


def overlap(prompts: Prompts, concepts: Concepts) -> Tensor:
    """The share of each name's tokens that the prompt contains, (prompts, names), float64; 0 for unknown texts."""
    shares = torch.zeros(len(prompts.states), len(concepts.sizes), dtype=torch.float64)
    for row, tokens in enumerate(prompts.tokens or ()):
        hits = Counter(name for token in tokens for name in concepts.holders.get(token, ()))
        for name, count in hits.items():
            shares[row, name] = count / concepts.sizes[name]
    return shares


def fixed_point(states: Tensor) -> Tensor:
    """Rows of (n, tokens, d) flattened to unit length and rounded to multiples of 2^-24: (n, tokens * d), float64.

    Products of such rows are multiples of 2^-48 and no partial sum exceeds 1, so every sum of them is exact in float64
    whatever its order. A gamma is therefore the same to the last bit however many erasers share the matrix, and
    recovering one leaves the others' pictures as they would have been without it. The cosine is off by about 1e-8.
    """
    flat = states.detach().to("cpu", torch.float64).flatten(1)
    # One row at a time, as the order of a sum may depend on the number of rows.
    norms = torch.stack([row.norm() for row in flat]).clamp_min(torch.finfo(torch.float32).tiny)
    return (flat / norms[:, None]).mul_(2.0**24).round_().mul_(2.0**-24)


def token_sets(tokenizer: object, texts: Sequence[str]) -> tuple[frozenset[int], ...]:
    """T(.) of each text: the ids that the text encoder is given, without special ones."""
    assert callable(tokenizer)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ids = tokenizer(list(texts), truncation=True).input_ids
    return tuple(frozenset(row) - special for row in ids)
