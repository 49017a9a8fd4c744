"""Gates decide how strongly each eraser acts on each prompt.

The gate of SPM is facilitated transport (arXiv 2312.16145, Eq. 10-11).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from spm_hub.adapters.increments import Increment
from spm_hub.attachment.gates.concept_index import WAY, ConceptIndex, fixed_point
from spm_hub.io.progress import ProgressCallback, no_progress


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of one call.

    texts: as given to the pipeline; None where it was given embeddings only.  tokens: T(p) of each prompt
    (`text_encoding.token_sets`); None where `texts` is.  states: e(p), the text-encoder states that the denoiser
    receives, (prompts, tokens, d_text).  read: the beginning of each text that fits into a text encoder's window; None
    where that is all of every text. A gate is given these as `texts`, so that it reads what the encoders read.  cut:
    says in words what does not fit.
    """

    texts: tuple[str, ...] | None
    tokens: tuple[frozenset[int], ...] | None
    states: Tensor
    read: tuple[str, ...] | None = None
    cut: tuple[str, ...] = ()

    def as_read(self) -> "Prompts":
        """Return these prompts with the parts of their texts that the encoders read, as a gate is given them."""
        return self if self.read is None else replace(self, texts=self.read, read=None)


@runtime_checkable
class Gate(Protocol):
    """Computes the gammas of a call; `attach(gate=...)` takes any object with this method."""

    def gammas(self, prompts: Prompts, concepts: ConceptIndex) -> Tensor:
        """Return gamma of every prompt and eraser, before the erasers' strength: (prompts, erasers)."""
        ...


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """The text encoders of a pipeline under one set of settings.

    encode: gives the states of texts, encoded as one batch, (texts, tokens, d_text).  digest: gives a hash of the
    encoders' weights and the settings, the same in every process.  vocabulary: the tokenizer's tokens and their ids.
    progress: receives the texts encoded and their number, for a gate that encodes many.
    """

    encode: Callable[[Sequence[str]], Tensor]
    digest: Callable[[], str]
    vocabulary: Mapping[str, int]
    progress: ProgressCallback = no_progress


@dataclass(frozen=True, eq=False)
class GatedEraser:
    """An eraser as a gate sees it.

    name: of the eraser.  names: of its concept, the target first.  increments: by module path.
    memo: kept as long as the eraser is attached and the text encoder stays the same.
    """

    name: str
    names: tuple[str, ...]
    increments: Mapping[str, Increment]
    memo: dict[str, Any]


@dataclass(frozen=True)
class Explanation:
    """Why a gamma is as it is.

    term: the part of the gate that gave it, such as "words"; "none" if none did.  shown: what shows it: words of the
    prompt, or a score and where its ramp begins and ends.  position: of the text-encoder state that decided, counted
    from 0; None if it was not a single one.  token: the text of the token at that position; empty where the pipeline's
    states cannot be assigned to tokens.
    """

    gamma: float
    term: str
    shown: str = ""
    position: int | None = None
    token: str = ""


@runtime_checkable
class ExplainingGate(Protocol):
    """Interface of a prepared gate that can say why its gammas are as they are."""

    def explain(self, prompts: Prompts) -> Sequence[Explanation]:
        """Return one explanation for each eraser, for the first prompt."""
        ...


@runtime_checkable
class PreparedGate(Protocol):
    """Interface of a gate that knows the erasers and the text encoder that it is asked about."""

    def gammas(self, prompts: Prompts) -> Tensor:
        """Return gamma of every prompt and eraser, before the erasers' strength: (prompts, erasers)."""
        ...


@runtime_checkable
class PreparingGate(Protocol):
    """Interface of a gate that prepares itself for its erasers; `attach(gate=...)` takes it too."""

    def prepare(self, encoder: TextEncoder, erasers: Sequence[GatedEraser]) -> PreparedGate:
        """Return the gate for these erasers, once for each text encoder and set of erasers.

        The gamma of an eraser must not depend on the other erasers.
        """
        ...


@dataclass(frozen=True)
class ConstantGate:
    """Gives every prompt the same gamma; at 1 an eraser is always fully on."""

    gamma: float

    def gammas(self, prompts: Prompts, concepts: ConceptIndex) -> Tensor:
        return torch.full((len(prompts.states), len(concepts)), self.gamma, dtype=torch.float64)


@dataclass(frozen=True)
class UnknownConceptGate(ConstantGate):
    """Gamma 1 on every prompt, for an eraser whose concept is unknown."""

    gamma: float = 1.0


class TransportGate:
    """Facilitated transport: gamma(p, c) = max(cos(e(p), e(c)), |T(p) & T(c)| / |T(c)|).

    SPM, arXiv 2312.16145. The cosine is between the flattened states (Eq. 10); T are sets of token ids without special
    tokens (Eq. 11). gamma is the maximum over the names of a concept, and the overlap the maximum over the ways in
    which tokenizers cut a text. Where only embeddings of a prompt are known, its overlap is 0.
    """

    def gammas(self, prompts: Prompts, concepts: ConceptIndex) -> Tensor:
        return concepts.greatest(torch.maximum(similarity(prompts.states, concepts), overlap(prompts, concepts)))

    def explain(self, prompts: Prompts, concepts: ConceptIndex) -> list[Explanation]:
        """Return both terms of gamma for each eraser, for the first prompt."""
        cosines, shares = similarity(prompts.states, concepts), overlap(prompts, concepts)
        terms = (torch.maximum(cosines, shares), cosines, shares)
        each = zip(*(concepts.greatest(term)[0].tolist() for term in terms), strict=True)
        return [
            Explanation(gamma, "transport", f"cosine of states {cosine:.2f}, share of tokens {share:.2f}")
            for gamma, cosine, share in each
        ]


def similarity(states: Tensor, concepts: ConceptIndex) -> Tensor:
    """Compute the cosines of flattened states: (prompts, names), float64.

    states: (prompts, tokens, d_text). Embeddings longer than the encoder's window (several windows one after the other)
    are compared window by window; the greatest cosine counts.
    """
    if concepts.varying:
        rows = fixed_point(states)
        shared = ((names, min(names.shape[1], rows.shape[1])) for names in concepts.units)
        return _at_most_1(torch.cat([rows[:, :both] @ names[:, :both].T for names, both in shared], dim=1))
    tokens, width = concepts.each[0].shape
    chunks = [(chunk.shape[1], fixed_point(chunk)) for chunk in torch.split(states, tokens, dim=1)]
    found = []
    for names in concepts.units:
        cosines = []
        for length, chunk in chunks:
            # The last window may be shorter: it is compared with the first states of each name.
            there = names if length == tokens else fixed_point(names.view(-1, tokens, width)[:, :length])
            cosines.append(chunk @ there.T)
        found.append(cosines[0] if len(cosines) == 1 else torch.stack(cosines).amax(dim=0))
    return _at_most_1(torch.cat(found, dim=1))


def _at_most_1(cosines: Tensor) -> Tensor:
    """Clamp cosines, in place."""
    # Rounding to fixed point may lengthen a vector to 1 + 1e-7; no gamma exceeds 1.
    return cosines.clamp_(-1.0, 1.0)


def overlap(prompts: Prompts, concepts: ConceptIndex) -> Tensor:
    """Compute the share of each name's tokens that the prompt contains: (prompts, names), float64.

    The maximum over the ways in which tokenizers cut both texts; 0 for prompts without a known text.
    """
    shares = torch.zeros(len(prompts.states), len(concepts.owners), dtype=torch.float64)
    for row, tokens in enumerate(prompts.tokens or ()):
        hits = Counter((name, token // WAY) for token in tokens for name in concepts.names_by_token.get(token, ()))
        greatest: dict[int, float] = {}
        for (name, way), count in hits.items():
            greatest[name] = max(greatest.get(name, 0.0), count / concepts.sizes[name, way])
        found = torch.tensor(list(greatest.values()), dtype=torch.float64)
        shares[row, torch.tensor(list(greatest), dtype=torch.long)] = found
    return shares
