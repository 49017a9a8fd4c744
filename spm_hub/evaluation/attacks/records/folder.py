"""The folder of an attack: its cases, its pictures, and a line of samples.jsonl for each picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from PIL import Image

from spm_hub.errors import UsageError
from spm_hub.evaluation.pictures import WITH, WITHOUT, write_png
from spm_hub.evaluation.records.folder import SAMPLES, RunFolder, whole_lines
from spm_hub.evaluation.records.rows import Batch
from spm_hub.evaluation.records.sample import Sample, pixel_hash
from spm_hub.io.atomic import write_atomic

UNITS = "units"
BASE, BEFORE, TRIED, FRESH = "base", "before", "try", "fresh"
"""Why a picture was drawn: without erasers, with them and no attack, by an attack, by its successful try once more."""


@dataclass(frozen=True)
class TrySample:
    """A judged picture of an attack.

    row: the case's id. attack: None for pictures that no attack made. place: of the try or fresh seed, from 0.
    text: what was tried. picture: its file, relative to the folder. sha256: of its pixels (`pixel_hash`). scores: by
    judge, True where it sees the concept. gammas: of each eraser, for the try that succeeded.
    """

    row: str
    attack: str | None
    why: str
    place: int
    text: str
    seed: int
    picture: str
    sha256: str
    scores: Mapping[str, bool] = field(default_factory=lambda: MappingProxyType({}))
    gammas: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def to_line(self) -> str:
        """Return the line of samples.jsonl, which ends with a newline."""
        value = {**vars(self), "scores": dict(self.scores), "gammas": dict(self.gammas)}
        return json.dumps(value, sort_keys=True) + "\n"

    def judged(self, key: str, shown: bool) -> TrySample:
        """Return the sample with one more judge's answer."""
        return replace(self, scores={**self.scores, key: shown})


class AttackFolder(RunFolder):
    """The records of attacks on one eraser: a unit of work is one attack on one batch of cases."""

    @property
    def attacks(self) -> tuple[str, ...]:
        """The names of the attacks and controls, in order."""
        return tuple(one["name"] for one in self.run["attacks"])

    @property
    def units(self) -> tuple[tuple[int, int], ...]:
        """All units: the number of an attack, and of a batch of cases."""
        return tuple((place, batch.number) for place in range(len(self.attacks)) for batch in self.batches)

    def unit_file(self, unit: tuple[int, int]) -> Path:
        return self.path / UNITS / f"{unit[0]:02d}-{unit[1]:06d}.jsonl"

    def missing(self) -> tuple[tuple[int, int], ...]:
        """Return the units that are not done. A unit's file is written whole, at its end."""
        return tuple(unit for unit in self.units if not self.unit_file(unit).is_file())

    def gather(self) -> None:
        """Write samples.jsonl from the units that are done, in order. Raises RegistryError."""
        done = [self.unit_file(unit).read_bytes() for unit in self.units if self.unit_file(unit).is_file()]
        write_atomic(self.path / SAMPLES, b"".join(done))

    def tries(self) -> tuple[TrySample, ...]:
        """Return all samples in order. Raises UsageError for a line that is none."""
        try:
            return tuple(TrySample(**value) for value in whole_lines(self.path / SAMPLES))
        except TypeError as error:
            raise UsageError(f"{self.path / SAMPLES} has a line that is no sample: {error}") from error

    def write(self, samples: Sequence[TrySample]) -> None:
        """Replace samples.jsonl, atomically. Raises RegistryError."""
        write_atomic(self.path / SAMPLES, "".join(sample.to_line() for sample in samples).encode())

    def keep_try(
        self, batch: Batch, case: int, attack: str | None, why: str, place: int, text: str, seed: int,
        picture: Image.Image,
    ) -> TrySample:  # fmt: skip
        """Write one picture of a batch's case, and return its sample. Raises RegistryError."""
        row = batch.rows[case]
        folder = {BASE: WITHOUT, BEFORE: WITH}.get(why, f"{attack}")
        number = f"{'-fresh' if why == FRESH else ''}-{place:03d}" if why in (TRIED, FRESH) else ""
        name = f"pictures/{folder}/{row.id}{number}.png"
        write_png(
            self.path / name, picture, {**row.as_dict(), "attack": attack, "why": why, "text": text, "seed": seed}
        )
        return TrySample(row.id, attack, why, place, text, seed, name, pixel_hash(picture))

    def picture_of(self, sample: TrySample) -> Image.Image:
        """Read a kept picture. Raises UsageError as `picture` does."""
        return self.picture(cast(Sample, sample))


def is_attack(run: Mapping[str, Any]) -> bool:
    """Return whether a run's record, run.json, is of an attack."""
    return "attacks" in run
