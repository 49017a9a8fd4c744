"""A judge for --judge MODULE:FUNCTION: a picture shows the concept if it is brighter than most of this pipeline's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL.Image import Image


def bright(pictures: Sequence[Image]) -> list[bool]:
    return [bool(np.asarray(picture).mean() > 120) for picture in pictures]


def odd(pictures: Sequence[Image]) -> list[bool]:
    """Half of all pictures, by a hash of their pixels: the same for the same picture."""
    return [hashlib.sha256(picture.tobytes()).digest()[0] % 2 == 1 for picture in pictures]
