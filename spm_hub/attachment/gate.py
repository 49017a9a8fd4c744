"""Facilitated transport: how strongly each eraser acts on each prompt (SPM, arXiv 2312.16145, Eq. 10-11)."""

from collections import Counter
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from spm_hub.attachment.concept_index import WAY, Concepts, fixed_point


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of one call.

    texts: as given, None where only embeddings were.  tokens: T(p) of each, as `token_sets` has it, None with `texts`.
    states: (prompts, tokens, d_text), the text-encoder states that the denoiser is given, e(p).
    """

    texts: tuple[str, ...] | None
    tokens: tuple[frozenset[int], ...] | None
    states: Tensor


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

    The cosine is that of the flattened states (Eq. 10), T are sets of token ids without special ones (Eq. 11), and of
    the ways to cut a text the one counts in which they share most. Prompts that are known by their embeddings alone
    count as sharing no token.
    """

    def gammas(self, prompts: Prompts, concepts: Concepts) -> Tensor:
        return concepts.greatest(torch.maximum(similarity(prompts.states, concepts), overlap(prompts, concepts)))


def similarity(states: Tensor, concepts: Concepts) -> Tensor:
    """Cosines of flattened states, (prompts, names), float64.

    states: (prompts, tokens, d_text). Embeddings longer than the encoder's window (several windows one after the other)
    are compared window by window, and the most similar one counts.
    """
    if concepts.varying:
        rows = fixed_point(states)
        shared = ((names, min(names.shape[1], rows.shape[1])) for names in concepts.units)
        return torch.cat([rows[:, :both] @ names[:, :both].T for names, both in shared], dim=1)
    tokens, width = concepts.each[0].shape
    chunks = [(chunk.shape[1], fixed_point(chunk)) for chunk in torch.split(states, tokens, dim=1)]
    found = []
    for names in concepts.units:
        cosines = []
        for length, chunk in chunks:
            # Of the last window there may be less: it is compared with as much of the names.
            there = names if length == tokens else fixed_point(names.view(-1, tokens, width)[:, :length])
            cosines.append(chunk @ there.T)
        found.append(cosines[0] if len(cosines) == 1 else torch.stack(cosines).amax(dim=0))
    # Rounded to fixed point, a vector may be longer than 1 by 1e-7; no gamma is.
    return torch.cat(found, dim=1).clamp_(-1.0, 1.0)


def overlap(prompts: Prompts, concepts: Concepts) -> Tensor:
    """The share of each name's tokens that the prompt contains, (prompts, names), float64; 0 for unknown texts.

    The greatest over the ways that both are cut in.
    """
    shares = torch.zeros(len(prompts.states), len(concepts.owners), dtype=torch.float64)
    for row, tokens in enumerate(prompts.tokens or ()):
        hits = Counter((name, token // WAY) for token in tokens for name in concepts.holders.get(token, ()))
        greatest: dict[int, float] = {}
        for (name, way), count in hits.items():
            greatest[name] = max(greatest.get(name, 0.0), count / concepts.sizes[name, way])
        found = torch.tensor(list(greatest.values()), dtype=torch.float64)
        shares[row, torch.tensor(list(greatest), dtype=torch.long)] = found
    return shares
