"""Sentences as a text encoder reads them: what a calibrated gate compares every concept with.

Some are general English sentences, the others are made of the tokenizer's own words, one or several. They are encoded
once for each text encoder and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from spm_hub.attachment.gates.apart import Encode
from spm_hub.attachment.gates.vocabulary import sentences_of, single_words, words_for_sentences
from spm_hub.errors import RegistryError
from spm_hub.io.atomic import write_atomic
from spm_hub.io.environment import user_folder
from spm_hub.io.progress import ProgressCallback, no_progress

_AT_ONCE = 32
_MOST, _LEAST, _ELEMENTS = 2048, 256, 2**25
"""Sentences of a bank, and its numbers: where states are wide, fewer sentences are encoded."""
_FIRST, _FURTHER = 24, 8
"""Positions of a text that a bank keeps: so many from its beginning, and so many spread over the rest."""
_SHRINKAGE = 0.02
"""Share of the mean variance that is added to the covariance, which is estimated from few sentences."""
_UNIT = 2**14
"""Rows of a bank are of unit length in multiples of 1 / _UNIT."""


@dataclass(frozen=True, eq=False)
class Bank:
    """The states of sentences, each state scaled to unit length.

    texts: the sentences: `general` ones, then `single` ones with one word of the tokenizer each, then others of its
    words. rows: (sentences, positions, d_text), int16, multiples of 2^-14; the first `lengths` of each sentence count.
    means: (sentences, d_text), float64, of each sentence's own rows. empty: (tokens, d_text), those of the empty
    prompt. precision: (d_text, d_text), the inverse of the rows' covariance.
    """

    texts: tuple[str, ...]
    general: int
    single: int
    rows: Tensor
    lengths: Tensor
    means: Tensor
    empty: Tensor
    precision: Tensor

    @cached_property
    def mean(self) -> Tensor:
        """(d_text,), float64, of the sentences' means, in fixed point."""
        return self.means.mean(0).mul_(2.0**24).round_().mul_(2.0**-24)

    @cached_property
    def precision_of_means(self) -> Tensor:
        """(d_text, d_text), float64, the inverse of the covariance of `means`."""
        return _inverse_covariance(self.means)

    def products(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the products of the rows of each sentence with directions, summed up in two ways.

        The first is the greatest product of a row, the second is `root_mean_square` of the products that exceed the
        bank's mean, both (sentences, directions). directions: (directions, d_text), float64, in fixed point
        (`unit_rows`): sums are exact.
        """
        greatest, typical = [], []
        centre = directions @ self.mean
        for rows, lengths in zip(self.rows.split(64), self.lengths.split(64), strict=True):
            found = rows.double().div_(_UNIT) @ directions.T
            greatest.append(found.amax(1))
            typical.append(root_mean_square(found.sub_(centre), lengths))
        return torch.cat(greatest), torch.cat(typical)


def root_mean_square(products: Tensor, lengths: Tensor) -> Tensor:
    """Return the root mean square of each text's products, negative ones counted as 0.

    products: (texts, positions, directions), float64, which this changes. lengths: (texts,), how many positions of each
    text count, the first ones. The result: (texts, directions). Squares are rounded to multiples of 2^-44, so that
    their sum is exact.
    """
    squares = products.clamp_min_(0.0).square_().mul_(2.0**44).round_()
    if int(lengths.min()) < products.shape[1]:
        squares.masked_fill_((torch.arange(products.shape[1]) >= lengths[:, None])[..., None], 0.0)
    return squares.sum(1).mul_(2.0**-44).div_(lengths[:, None]).sqrt_()


def unit_rows(states: Tensor) -> Tensor:
    """Scale states (..., d_text) to unit length, in multiples of 2^-24: float64 on the CPU.

    Every sum is exact, whatever its order: a row's result does not depend on the rows next to it, and products with
    other such rows do not depend on how many they are computed with. A row of zeros stays one.
    """
    wide = states.detach().to("cpu", torch.float64)
    greatest = wide.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    whole = (wide / greatest).mul_(2.0**20).round_()
    length = whole.square().sum(-1, keepdim=True).sqrt_().clamp_min_(1.0)
    return whole.div_(length).mul_(2.0**24).round_().mul_(2.0**-24)


def sentences() -> tuple[str, ...]:
    """Return the general sentences that the package carries."""
    text = resources.files(__package__).joinpath("general_sentences.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


@dataclass(frozen=True)
class PlannedBank:
    """The sentences of a text encoder's bank, which is opened only where something has to be calibrated.

    name: differs wherever a bank would. empty: (tokens, d_text), the states of the empty prompt.
    """

    encode: Encode
    name: str
    general: tuple[str, ...]
    single: tuple[str, ...]
    of_words: tuple[str, ...]
    empty: Tensor

    @property
    def texts(self) -> tuple[str, ...]:
        """All sentences."""
        return (*self.general, *self.single, *self.of_words)

    def open(self, progress: ProgressCallback = no_progress) -> Bank:
        """Return the bank, from the user's cache or encoded now.

        progress: called with the sentences done and their number. Raises what `encode` raises.
        """
        path = user_folder("cache") / "banks" / f"{self.name}.safetensors"
        kept = _read(path, len(self.texts), self.empty.shape[-1])
        if kept is None:
            kept = _encode_all(self.encode, self.texts, progress)
            _write(path, kept)
        return Bank(
            self.texts, len(self.general), len(self.single), kept["rows"], kept["lengths"], kept["means"],
            unit_rows(self.empty), kept["precision"].double(),
        )  # fmt: skip


def plan_bank(encode: Encode, key: str, vocabulary: Mapping[str, int]) -> PlannedBank:
    """Choose the sentences of a text encoder's bank.

    encode: gives the states (texts, tokens, d_text) of some texts. key: names the encoder and its settings.
    vocabulary: the tokenizer's tokens and their ids. Raises what `encode` raises.
    """
    empty = encode([""])[0].float().cpu()
    count = max(_LEAST, min(_MOST, _ELEMENTS // ((_FIRST + _FURTHER) * empty.shape[-1])))
    words = words_for_sentences(vocabulary)
    single, of_words = single_words(words, count // 3), sentences_of(words, count // 3)
    general = sentences()[: count - len(single) - len(of_words)]
    texts = (*general, *single, *of_words)
    named = hashlib.sha256(repr((key, texts, _FIRST, _FURTHER, _SHRINKAGE)).encode()).hexdigest()[:24]
    return PlannedBank(encode, named, general, single, of_words, empty)


def _encode_all(encode: Encode, texts: Sequence[str], progress: ProgressCallback) -> dict[str, Tensor]:
    """Return the tensors of a bank by the names of its fields."""
    kept: list[Tensor] = []
    with _warnings_off():
        for start in range(0, len(texts), _AT_ONCE):
            units = unit_rows(encode(texts[start : start + _AT_ONCE]))
            kept += [(one * _UNIT).round().to(torch.int16) for one in kept_states(units)]
            progress(min(start + _AT_ONCE, len(texts)), len(texts))
    longest = max(map(len, kept))
    # Where a longer text has more states, a shorter one has its last one again.
    rows = torch.stack([torch.cat([one, one[-1:].expand(longest - len(one), -1)]) for one in kept])
    return {
        "rows": rows,
        "lengths": torch.tensor([len(one) for one in kept]),
        "means": torch.stack([one.sum(0, dtype=torch.float64) / (len(one) * _UNIT) for one in kept]),
        "precision": _inverse_covariance(rows.flatten(0, 1).float().div_(_UNIT)).float(),
    }


def kept_states(units: Tensor) -> list[Tensor]:
    """Return the states that a bank keeps of each text: (positions, d_text) each.

    units: (texts, tokens, d_text), as `unit_rows` returns them. Zeros at the end, by which a batch fills up shorter
    texts, do not count: what is kept of a text does not depend on the other texts.
    """
    return [unit[positions_of(length)] for unit, length in zip(units, lengths_of(units), strict=True)]


def lengths_of(units: Tensor) -> list[int]:
    """Return the number of states of each text, zeros at the end left out; at least 1."""
    if bool(units[:, -1].any(-1).all()):
        return [units.shape[1]] * len(units)
    used = units.any(-1)
    return [max(1, int(row.nonzero().max()) + 1 if row.any() else 1) for row in used]


@contextmanager
def _warnings_off() -> Iterator[None]:
    """Suppress the warnings of the libraries that a text is cut to the encoder's window."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def positions_of(length: int) -> list[int]:
    """Return the positions of a text's states that a bank keeps.

    They are the first ones, and some spread over the rest.
    """
    first = range(min(length, _FIRST))
    rest = torch.linspace(_FIRST, length - 1, _FURTHER).round().int().tolist() if length > _FIRST else []
    return sorted({*first, *rest})


def _inverse_covariance(rows: Tensor) -> Tensor:
    """(rows, d) to (d, d), float64; the covariance is shrunk, as it is estimated from few sentences."""
    centred = rows - rows.mean(0)
    covariance = (centred.T @ centred).double().div_(len(rows) - 1)
    covariance.diagonal().add_(_SHRINKAGE * covariance.diagonal().mean())
    inverse: Tensor = torch.linalg.inv(covariance)
    return inverse.contiguous()


def _read(path: Path, count: int, width: int) -> dict[str, Tensor] | None:
    """Return a kept bank; None if there is none, or a damaged one."""
    try:
        kept = load_file(path)
    except (OSError, SafetensorError):
        return None
    right = kept.keys() == {"rows", "lengths", "means", "precision"} and kept["rows"].shape[::2] == (count, width)
    return kept if right and kept["precision"].shape == (width, width) else None


def _write(path: Path, kept: dict[str, Tensor]) -> None:
    with suppress(RegistryError):  # without room in the cache, the bank is encoded again next time
        write_atomic(path, save(kept))
