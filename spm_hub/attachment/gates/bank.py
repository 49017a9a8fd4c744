"""General sentences as a text encoder reads them: what a calibrated gate compares every concept with.

They are encoded once for each text encoder and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import platformdirs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from spm_hub.errors import RegistryError
from spm_hub.io.atomic import write_atomic
from spm_hub.io.progress import ProgressCallback, no_progress

_AT_ONCE = 32
_ELEMENTS = 2**25
"""Numbers of a bank: where states are wide, fewer sentences are encoded."""
_FIRST, _FURTHER = 24, 8
"""Positions of a text that a bank keeps: so many from its beginning, and so many spread over the rest."""
_SHRINKAGE = 0.02
"""Share of the mean variance that is added to the covariance, which is estimated from few sentences."""
_UNIT = 2**14
"""Rows of a bank are of unit length in multiples of 1 / _UNIT."""

Encode = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True, eq=False)
class Bank:
    """The states of general sentences, each state scaled to unit length.

    texts: the sentences. rows: (sentences, positions, d_text), int16, multiples of 2^-14. means: (sentences, d_text),
    float64, of each sentence's own rows. empty: (tokens, d_text), those of the empty prompt. precision: (d_text,
    d_text), the inverse of the rows' covariance.
    """

    texts: tuple[str, ...]
    rows: Tensor
    means: Tensor
    empty: Tensor
    precision: Tensor

    @cached_property
    def mean(self) -> Tensor:
        """(d_text,), float64, of the sentences' means."""
        return self.means.mean(0)

    @cached_property
    def precision_of_means(self) -> Tensor:
        """(d_text, d_text), float64, the inverse of the covariance of `means`."""
        return _inverse_covariance(self.means)

    def greatest(self, directions: Tensor) -> Tensor:
        """Return the greatest product of a row of each sentence with each direction: (sentences, directions).

        directions: (directions, d_text), float64, in fixed point (`unit_rows`), so that the products are exact.
        """
        parts = [chunk.double() @ directions.T for chunk in self.rows.split(64)]
        return torch.cat([part.amax(1) for part in parts]) / _UNIT


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


def open_bank(encode: Encode, key: str, progress: ProgressCallback = no_progress) -> Bank:
    """Return the bank of a text encoder, from the user's cache or encoded now.

    encode: gives the states (texts, tokens, d_text) of some texts. key: names the encoder and its settings. progress:
    called with the sentences done and their number. Raises what `encode` raises.
    """
    empty = encode([""])[0].float().cpu()
    count = max(256, min(len(sentences()), _ELEMENTS // ((_FIRST + _FURTHER) * empty.shape[-1])))
    texts = sentences()[:count]
    named = hashlib.sha256(repr((key, texts, _FIRST, _FURTHER, _SHRINKAGE)).encode()).hexdigest()[:24]
    path = platformdirs.user_cache_path("spm-hub", appauthor=False) / "banks" / f"{named}.safetensors"
    kept = _read(path, count, empty.shape[-1])
    if kept is None:
        rows, means = _encode_all(encode, texts, progress)
        precision = _inverse_covariance(rows.flatten(0, 1).float().div_(_UNIT)).float()
        kept = {"rows": rows, "means": means, "precision": precision}
        _write(path, kept)
    return Bank(texts, kept["rows"], kept["means"], unit_rows(empty), kept["precision"].double())


def _encode_all(encode: Encode, texts: Sequence[str], progress: ProgressCallback) -> tuple[Tensor, Tensor]:
    """Return the rows and the means of a bank."""
    kept: list[Tensor] = []
    with _warnings_off():
        for start in range(0, len(texts), _AT_ONCE):
            units = unit_rows(encode(texts[start : start + _AT_ONCE]))
            kept += [(one * _UNIT).round().to(torch.int16) for one in kept_states(units)]
            progress(min(start + _AT_ONCE, len(texts)), len(texts))
    longest = max(map(len, kept))
    # Where a longer text has more states, a shorter one has its last one again.
    rows = torch.stack([torch.cat([one, one[-1:].expand(longest - len(one), -1)]) for one in kept])
    return rows, torch.stack([one.sum(0, dtype=torch.float64) / (len(one) * _UNIT) for one in kept])


def kept_states(units: Tensor) -> list[Tensor]:
    """Return the states that a bank keeps of each text: (positions, d_text) each.

    units: (texts, tokens, d_text), as `unit_rows` returns them. Zeros at the end, by which a batch fills up shorter
    texts, do not count: what is kept of a text does not depend on the other texts.
    """
    found = []
    for unit in units:
        used = unit.abs().amax(-1).nonzero()
        length = int(used[-1]) + 1 if len(used) else 1
        found.append(unit[positions_of(length)])
    return found


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
    right = kept.keys() == {"rows", "means", "precision"} and kept["rows"].shape[::2] == (count, width)
    return kept if right and kept["precision"].shape == (width, width) else None


def _write(path: Path, kept: dict[str, Tensor]) -> None:
    with suppress(RegistryError):  # without room in the cache, the bank is encoded again next time
        write_atomic(path, save(kept))
