"""The judge of the base in benchmarks/bases/fluent: does its classifier name the subject of each picture first?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL.Image import Image
from second_base import Classifier

FOLDER = Path(__file__).parent / "bases" / "fluent" / "judge"


@cache
def _classifier() -> Classifier:
    return Classifier.load(FOLDER)


def shown(pictures: Sequence[Image], subjects: Sequence[str]) -> list[bool]:
    """Return for each picture whether it shows its subject. Raises KeyError for a name that no drawing has."""
    judge = _classifier()
    for subject in subjects:
        judge.model.config.label2id[subject]
    named = judge.names(np.stack([np.asarray(one.convert("RGB")) for one in pictures]))
    return [name == subject for name, subject in zip(named, subjects, strict=True)]
