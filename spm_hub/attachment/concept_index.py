"""What erasers listen to: the names of their concepts, and what the text encoder makes of them."""

import os
import tempfile
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

WAY = 2**32
"""Beyond every token's id: a text that is cut in several ways has the ids of the n-th way in its T(.) plus n * WAY."""


class Concept:
    """What one eraser listens to: all names of its concept.

    names: the target, then its aliases.  tokens: T(c) of each, as `gate.token_sets` has it.  shape: of the states of a
    name, (tokens, d_text).
    states: (names, tokens, d_text), e(c) of each; on a `shelf` they are given back to 2^-24 of their length.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        tokens: tuple[frozenset[int], ...],
        states: Tensor,
        shelf: "Shelf | None" = None,
    ) -> None:
        self.names, self.tokens = names, tokens
        self.shape = states.shape[1:]
        self._kept = states if shelf is None else shelf.put(states)

    @property
    def states(self) -> Tensor:
        if isinstance(self._kept, Tensor):
            return self._kept
        return (self._kept.read() * self._kept.lengths[:, None]).view(-1, *self.shape)

    @property
    def units(self) -> Tensor:
        """(names, tokens * d_text), float64: `fixed_point` of the states."""
        return fixed_point(self._kept) if isinstance(self._kept, Tensor) else self._kept.read().double()

    @property
    def shelved(self) -> bool:
        """Whether the states lie on a shelf."""
        return isinstance(self._kept, Places)


@dataclass(frozen=True, eq=False)
class Concepts:
    """The concepts of several erasers, as one matrix of states and one inverted index of tokens.

    varying: whether a longer text has more states (Qwen-Image); the states of a shorter one then count as followed by
    zeros, as they are in a batch.
    """

    each: tuple[Concept, ...]
    varying: bool = False

    def __len__(self) -> int:
        return len(self.each)

    @cached_property
    def owners(self) -> Tensor:
        """(names,): the index of the concept that each name is of."""
        return torch.tensor([index for index, concept in enumerate(self.each) for _ in concept.names], dtype=torch.long)

    @property
    def states(self) -> Tensor:
        """(names, tokens, d_text), the names of all concepts one after the other."""
        return pad_sequence([states for concept in self.each for states in concept.states], batch_first=True)

    @cached_property
    def sizes(self) -> Counter[tuple[int, int]]:
        """|T(c)| by name and by the way it is cut in."""
        every = enumerate(tokens for concept in self.each for tokens in concept.tokens)
        return Counter((name, token // WAY) for name, tokens in every for token in tokens)

    def greatest(self, per_name: Tensor) -> Tensor:
        """The greatest over the names of each concept: (prompts, names) to (prompts, concepts)."""
        if per_name.shape[1] == len(self.each):
            return per_name
        owners = self.owners.expand_as(per_name)
        lowest = per_name.new_full((len(per_name), len(self.each)), -torch.inf)
        return lowest.scatter_reduce_(1, owners, per_name, "amax")

    @cached_property
    def holders(self) -> dict[int, list[int]]:
        """For every token the names that contain it."""
        index: dict[int, list[int]] = defaultdict(list)
        for name, tokens in enumerate(tokens for concept in self.each for tokens in concept.tokens):
            for token in tokens:
                index[token].append(name)
        return dict(index)

    @property
    def units(self) -> Iterator[Tensor]:
        """The rows of all names, (some names, tokens * d_text) at a time: all at once unless they lie on a shelf.

        Rows of names that have more states are longer.
        """
        if self._matrix is None:
            yield from (concept.units for concept in self.each)
        else:
            yield self._matrix

    @cached_property
    def _matrix(self) -> Tensor | None:
        if any(concept.shelved or concept.shape != self.each[0].shape for concept in self.each):
            return None
        return fixed_point(self.states)


class Shelf:
    """A nameless file in the temporary folder, where states lie that would take too much memory.

    77 x 768 numbers of SD1.5's encoder are 236 kB for each name, beside the 1.7 MB of a rank-1 eraser. The system keeps
    in memory what it has room for; the file is gone with the process, whatever ends it. A process that was forked from
    another reads what lay there before, and writes into a file of its own. Not thread-safe by itself.
    """

    def __init__(self) -> None:
        self._row = 0
        self._begin()

    def _begin(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - as long as the shelf is there
        self._free: list[int] = []
        self._end = 0
        self._process = os.getpid()
        weakref.finalize(self, self._file.close)

    def put(self, states: Tensor) -> "Places":
        """Keep (names, tokens, d_text), as long as what this gives is there. Raises OSError where there is no room."""
        units, lengths = fixed_point(states), states.detach().to("cpu", torch.float64).flatten(1).norm(dim=1)
        self._row = self._row or units.shape[1]
        assert units.shape[1] == self._row, "one shelf is for states of one size"
        if self._process != os.getpid():
            self._begin()
        places = Places(self, self._file, [self._place() for _ in units], lengths.float())
        for place, row in zip(places.at, units.float(), strict=True):
            self._file.seek(place)
            written = self._file.write(row.numpy().data)
            if written != row.nbytes:
                raise OSError(f"{written} of {row.nbytes} bytes were written to the temporary folder")
        return places

    def get(self, file: Any, at: list[int]) -> Tensor:
        """(places, tokens * d_text), float32, which holds fixed point exactly."""
        rows = torch.empty(len(at), self._row)
        for place, row in zip(at, rows, strict=True):
            if hasattr(os, "preadv"):
                # Forked processes share a file's position, and would read at each other's.
                os.preadv(file.fileno(), [row.numpy().data], place)
            else:
                file.seek(place)
                file.readinto(row.numpy().data)
        return rows

    def give_back(self, file: Any, at: list[int]) -> None:
        """Others may lie there from now on."""
        if file is self._file and self._process == os.getpid():
            self._free += at

    def _place(self) -> int:
        if self._free:
            return self._free.pop()
        self._end += 4 * self._row
        return self._end - 4 * self._row


class Places:
    """Where on a shelf the names of one concept lie; given back to it when nobody needs them any more."""

    def __init__(self, shelf: Shelf, file: Any, at: list[int], lengths: Tensor) -> None:
        self._shelf, self._file, self.at, self.lengths = shelf, file, at, lengths
        weakref.finalize(self, shelf.give_back, file, at)

    def read(self) -> Tensor:
        """(names, tokens * d_text), float32, of unit length in fixed point."""
        return self._shelf.get(self._file, self.at)


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
