"""One drawn picture: the line of samples.jsonl about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from PIL import Image

Score = bool | float


@dataclass(frozen=True)
class Sample:
    """A picture of a prompt row under one condition, and its scores by metric.

    row: the row's id. batch: the number of the batch in which it was drawn. picture: its file, relative to the folder.
    sha256: of its pixels (`pixel_hash`). gammas: of each attached eraser for the row's prompt, before its strength.
    """

    row: str
    condition: str
    seed: int
    batch: int
    picture: str
    sha256: str
    scores: Mapping[str, Score] = field(default_factory=lambda: MappingProxyType({}))
    gammas: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def scored(self, more: Mapping[str, Score]) -> Sample:
        """Return the sample with more scores; those of the same names are replaced."""
        return replace(self, scores={**self.scores, **more})

    def to_line(self) -> str:
        """Return the line of samples.jsonl, which ends with a newline."""
        return (
            json.dumps({**vars(self), "scores": dict(self.scores), "gammas": dict(self.gammas)}, sort_keys=True) + "\n"
        )

    @classmethod
    def from_dict(cls, value: Any) -> Sample:
        """Build a sample from a parsed line. Raises TypeError or ValueError if it is not one."""
        sample = cls(**value)
        texts = (sample.row, sample.condition, sample.picture, sample.sha256)
        if not all(isinstance(text, str) for text in texts) or not isinstance(sample.batch, int):
            raise TypeError("a key has a value of another type")
        if not all(isinstance(score, bool | int | float) for score in sample.scores.values()):
            raise TypeError("a score is no number")
        if not all(isinstance(gamma, int | float) for gamma in sample.gammas.values()):
            raise TypeError("a gamma is no number")
        return sample


def pixel_hash(picture: Image.Image) -> str:
    """Return the sha256 of a picture's size and RGB pixels; files may be compressed otherwise."""
    rgb = picture.convert("RGB")
    return hashlib.sha256(b"%d %d " % rgb.size + rgb.tobytes()).hexdigest()
