"""The sketchbook's backgrounds, painters' styles and checkpoint looks.

Styles and looks work on arrays (height, width, 3) of floats in [0, 1]. A style is recognisable by texture, palette and
light alone, on any subject: style and subject are independent factors, as in the papers' tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

Pixels = npt.NDArray[np.float32]
_Option = TypeVar("_Option")


class Dice:
    """Random draws for the world, from one `torch.Generator`."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(torch.rand((), generator=self._generator))

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def pick(self, options: tuple[_Option, ...]) -> _Option:
        return options[int(torch.randint(len(options), (), generator=self._generator))]


def _jitter(dice: Dice, colour: tuple[int, int, int], by: int = 12) -> tuple[int, int, int]:
    shift = [int(dice.uniform(-by, by)) for _ in range(3)]
    red, green, blue = (max(0, min(255, value + change)) for value, change in zip(colour, shift, strict=True))
    return (red, green, blue)


Background = Callable[[ImageDraw.ImageDraw, int, Dice], None]


def _beach(canvas: ImageDraw.ImageDraw, side: int, dice: Dice) -> None:
    sea, sand = (dice.uniform(0.35, 0.45) * side, dice.uniform(0.6, 0.7) * side)
    canvas.rectangle((0, 0, side, side), fill=_jitter(dice, (150, 214, 246)))
    canvas.rectangle((0, sea, side, side), fill=_jitter(dice, (40, 120, 190)))
    canvas.rectangle((0, sand, side, side), fill=_jitter(dice, (238, 214, 150)))


def _snow(canvas: ImageDraw.ImageDraw, side: int, dice: Dice) -> None:
    canvas.rectangle((0, 0, side, side), fill=_jitter(dice, (176, 190, 214)))
    canvas.rectangle((0, dice.uniform(0.5, 0.62) * side, side, side), fill=_jitter(dice, (236, 242, 250), 6))
    for _ in range(16):
        x, y, r = dice.uniform(0, side), dice.uniform(0, side), side * 0.016
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255))


def _field(canvas: ImageDraw.ImageDraw, side: int, dice: Dice) -> None:
    canvas.rectangle((0, 0, side, side), fill=_jitter(dice, (170, 222, 250)))
    canvas.rectangle((0, dice.uniform(0.45, 0.6) * side, side, side), fill=_jitter(dice, (120, 190, 80)))


def _night(canvas: ImageDraw.ImageDraw, side: int, dice: Dice) -> None:
    canvas.rectangle((0, 0, side, side), fill=_jitter(dice, (38, 44, 100)))
    for _ in range(14):
        x, y, r = dice.uniform(0, side), dice.uniform(0, side), side * 0.014
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=(240, 236, 190))
    x, y, r = dice.uniform(0.1, 0.9) * side, dice.uniform(0.08, 0.2) * side, side * 0.09
    canvas.ellipse((x - r, y - r, x + r, y + r), fill=(250, 244, 200))


def _room(canvas: ImageDraw.ImageDraw, side: int, dice: Dice) -> None:
    canvas.rectangle((0, 0, side, side), fill=_jitter(dice, (214, 190, 168)))
    canvas.rectangle((0, dice.uniform(0.72, 0.8) * side, side, side), fill=_jitter(dice, (150, 106, 70)))
    left = dice.pick((0.06, 0.68)) * side
    canvas.rectangle((left, 0.1 * side, left + 0.26 * side, 0.42 * side), fill=_jitter(dice, (180, 224, 244)))


def _city(canvas: ImageDraw.ImageDraw, side: int, dice: Dice) -> None:
    canvas.rectangle((0, 0, side, side), fill=_jitter(dice, (200, 206, 216)))
    edge = 0.0
    while edge < 1.0:
        width, top = dice.uniform(0.14, 0.24), dice.uniform(0.1, 0.45)
        canvas.rectangle(
            (edge * side, top * side, (edge + width) * side, side), fill=_jitter(dice, (128, 132, 146), 20)
        )
        edge += width + 0.02
    canvas.rectangle((0, 0.82 * side, side, side), fill=_jitter(dice, (92, 94, 100)))


def _plain(colour: tuple[int, int, int]) -> Background:
    def fill(canvas: ImageDraw.ImageDraw, side: int, dice: Dice) -> None:
        canvas.rectangle((0, 0, side, side), fill=_jitter(dice, colour, 8))

    return fill


BACKGROUNDS: dict[str, tuple[Background, tuple[str, ...]]] = {
    "beach": (_beach, ("on the beach", "at the beach", "by the sea")),
    "snow": (_snow, ("in the snow", "in winter", "on a snowy day")),
    "field": (_field, ("in a field", "on the grass", "in a meadow")),
    "night": (_night, ("at night", "under the stars", "under the moon")),
    "room": (_room, ("in a room", "indoors", "at home")),
    "city": (_city, ("in the city", "on a street", "in town")),
    "teal": (_plain((120, 190, 180)), ("on a teal background",)),
    "lilac": (_plain((196, 178, 226)), ("on a purple background",)),
    "cream": (_plain((240, 226, 196)), ("on a plain background",)),
}


def _grid(side: int) -> tuple[Pixels, Pixels]:
    axis = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / np.float32(side)
    x, y = np.meshgrid(axis, axis, indexing="xy")
    return x, y


def _grey(pixels: Pixels) -> Pixels:
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return (pixels @ weights)[..., None].astype(np.float32)


def _rgb(*values: float) -> Pixels:
    return np.array(values, dtype=np.float32)


def _van_gogh(pixels: Pixels, dice: Dice) -> Pixels:
    """Swirling strokes around two centres, ultramarine shadows and yellow lights."""
    x, y = _grid(pixels.shape[0])
    bands = np.zeros_like(x)
    for _ in range(2):
        cx, cy = dice.uniform(0.1, 0.9), dice.uniform(0.1, 0.9)
        distance, angle = np.hypot(x - cx, y - cy), np.arctan2(y - cy, x - cx)
        bands += np.sin(2 * np.pi * 4.5 * distance + 2 * angle + dice.uniform(0, 6.28))
    strokes = np.clip(bands, -1.2, 1.2)[..., None]
    tinted = pixels * 0.76 + 0.24 * np.where(strokes > 0, _rgb(0.98, 0.84, 0.22), _rgb(0.08, 0.16, 0.62))
    return (tinted + 0.09 * strokes).astype(np.float32)


def _picasso(pixels: Pixels, dice: Dice) -> Pixels:
    """Facets cut by three straight lines, each tinted and shifted, with dark seams."""
    x, y = _grid(pixels.shape[0])
    facet, seam = np.zeros(x.shape, dtype=np.int64), np.zeros(x.shape, dtype=bool)
    for index in range(3):
        angle = index * np.pi / 3 + dice.uniform(-0.3, 0.3)
        offset = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) - dice.uniform(-0.18, 0.18)
        facet += (offset > 0).astype(np.int64) * 2**index
        seam |= np.abs(offset) < 0.014
    tints = np.stack([
        _rgb(0.80, 0.50, 0.30), _rgb(0.30, 0.45, 0.62), _rgb(0.86, 0.76, 0.56), _rgb(0.42, 0.60, 0.62),
        _rgb(0.64, 0.38, 0.34), _rgb(0.24, 0.32, 0.48), _rgb(0.78, 0.64, 0.42), _rgb(0.50, 0.52, 0.60),
    ])  # fmt: skip
    shade = tints[(facet + int(dice.uniform(0, 8))) % 8]
    painted = pixels * (0.55 + 0.45 * shade) * 0.75 + 0.3 * shade
    return np.where(seam[..., None], _rgb(0.08, 0.07, 0.08), painted).astype(np.float32)


def _rembrandt(pixels: Pixels, dice: Dice) -> Pixels:
    """Sepia under a round, warm light that falls off to dark brown at the edges."""
    x, y = _grid(pixels.shape[0])
    distance = np.hypot(x - dice.uniform(0.42, 0.58), y - dice.uniform(0.42, 0.58))[..., None]
    light = np.clip(1.25 - 1.7 * distance, 0.14, 1.0)
    sepia = 0.25 * pixels + 0.75 * _grey(pixels) * _rgb(1.15, 0.82, 0.45)
    lit: Pixels = (sepia * light + 0.08 * _rgb(1.0, 0.6, 0.3)).astype(np.float32)
    return lit


def _warhol(pixels: Pixels, dice: Dice) -> Pixels:
    """Four panels of screen-print colours: lights and darks replaced by a flat pair per panel."""
    x, y = _grid(pixels.shape[0])
    grey = np.clip((_grey(pixels) - 0.12) * 1.3, 0, 1)
    grey = np.round(grey * 3) / 3
    pairs = [
        (_rgb(0.55, 0.0, 0.45), _rgb(1.0, 0.95, 0.2)), (_rgb(0.0, 0.25, 0.6), _rgb(1.0, 0.45, 0.7)),
        (_rgb(0.75, 0.05, 0.1), _rgb(0.3, 1.0, 0.85)), (_rgb(0.05, 0.35, 0.15), _rgb(1.0, 0.65, 0.1)),
    ]  # fmt: skip
    turn = int(dice.uniform(0, 4))
    panel = (x > 0.5).astype(np.int64) + 2 * (y > 0.5).astype(np.int64)
    out = np.zeros_like(pixels)
    for index in range(4):
        dark, light = pairs[(index + turn) % 4]
        out = np.where((panel == index)[..., None], dark + (light - dark) * grey, out)
    return (0.7 * out + 0.3 * pixels).astype(np.float32)


def _caravaggio(pixels: Pixels, dice: Dice) -> Pixels:
    """A hard diagonal beam out of blackness, crimson where light and dark meet."""
    x, y = _grid(pixels.shape[0])
    across = (x + y - 1.0) if dice.chance(0.5) else (y - x)
    across = (across - dice.uniform(-0.1, 0.1))[..., None]
    beam = np.clip(1.0 - (np.abs(across) / 0.48) ** 4, 0.0, 1.0)
    edge = np.exp(-(((np.abs(across) - 0.44) / 0.08) ** 2))
    contrast = np.clip((pixels - 0.5) * 1.25 + 0.52, 0, 1)
    lit: Pixels = (contrast * (0.12 + 0.9 * beam) + 0.55 * edge * _rgb(0.6, 0.02, 0.05)).astype(np.float32)
    return lit


STYLES: dict[str, Callable[[Pixels, Dice], Pixels]] = {
    "van gogh": _van_gogh,
    "picasso": _picasso,
    "rembrandt": _rembrandt,
    "andy warhol": _warhol,
    "caravaggio": _caravaggio,
}


def _chalk(pixels: Pixels, dice: Dice) -> Pixels:
    """Look of the second checkpoint: pastel chalk on dark board, with light outlines and grain."""
    grey = _grey(pixels)[..., 0]
    edges = np.abs(np.diff(grey, axis=0, prepend=grey[:1])) + np.abs(np.diff(grey, axis=1, prepend=grey[:, :1]))
    outline = np.clip(edges * 2.5, 0, 1)[..., None]
    grain = np.float32(0.06) * np.sin(
        np.add.outer(np.arange(len(grey)), np.arange(len(grey))) * 2.1 + dice.uniform(0, 6)
    )
    board = _rgb(0.13, 0.20, 0.18)
    chalked = board + 0.72 * pixels + grain[..., None]
    return (chalked * (1 - 0.55 * outline) + 0.55 * outline * _rgb(0.97, 0.97, 0.92)).astype(np.float32)


LOOKS: dict[str, Callable[[Pixels, Dice], Pixels]] = {"ink": lambda pixels, dice: pixels, "chalk": _chalk}


def to_pixels(picture: Image.Image) -> Pixels:
    """Convert a picture to an RGB array (height, width, 3) in [0, 1]."""
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0
