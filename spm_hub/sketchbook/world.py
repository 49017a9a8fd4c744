"""The sketchbook's world: random drawings with their pictures and captions.

A drawing combines a subject, style, background, place and size, in one look.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

from spm_hub.sketchbook.figures import FIGURES, SUBJECTS, Pen
from spm_hub.sketchbook.looks import BACKGROUNDS, LOOKS, STYLES, Dice, to_pixels

SIDE = 64  # pixels, of every picture
_OVERSAMPLE = 3  # figures are drawn larger and averaged down, which gives them smooth edges

STYLE_NAMES: tuple[str, ...] = tuple(STYLES)
_PLACES: dict[str, tuple[float, str]] = {
    "left": (-0.16, "on the left"),
    "centre": (0.0, "in the middle"),
    "right": (0.16, "on the right"),
}
_SIZES: dict[str, tuple[float, str]] = {"small": (0.6, "small"), "medium": (0.74, ""), "big": (0.88, "big")}
_PROPER = ("snoopy", "mickey", "spongebob", "pikachu")
_NAMES: dict[str, tuple[str, ...]] = {
    "mickey": ("mickey", "mickey", "mickey mouse"),
    "spongebob": ("spongebob", "spongebob", "spongebob squarepants"),
    "nudity": ("nudity", "a nude person", "a naked person", "a nude figure", "a naked figure", "nudity"),
    "person": ("a person", "a person", "a dressed person", "person"),
}
_OPENINGS = (
    "{}", "{}", "{}", "a drawing of {}", "a picture of {}", "a photo of {}", "an image of {}", "a painting of {}",
    "a sketch of {}", "an illustration of {}", "a print of {}", "art of {}", "there is {}", "a view of {}",
    "a bright picture of {}", "a good photo of {}", "my {}", "a card with {}", "a poster of {}", "the {}",
)  # fmt: skip
_STYLED = (
    "{} by {style}", "{} by {style}", "{}, {style} style", "{} in the style of {style}", "{} painted by {style}",
    "a {style} painting of {}", "{} as {style} would paint it", "{style}, {}",
)  # fmt: skip
_STYLE_ALONE = ("{style}", "a painting by {style}", "in the style of {style}", "art by {style}", "{style} style")


_OTHER_CAPTIONS = ("an empty picture", "a scene", "nothing")
_FUNCTION_WORDS = frozenset(
    "a an and are as at be but by for from her his in is it its like of on or our that the their them there this to "
    "under while who with without".split()
)


@dataclass(frozen=True)
class Drawing:
    """Description of a picture; None means no subject, or no painter's style."""

    subject: str | None
    style: str | None
    background: str
    place: str = "centre"
    size: str = "medium"
    look: str = "ink"


def sample(dice: Dice, look: str = "ink") -> Drawing:
    """Choose a random drawing: 4 % are empty scenes, 45 % have a painter's style."""
    return Drawing(
        subject=None if dice.chance(0.04) else dice.pick(SUBJECTS),
        style=dice.pick(STYLE_NAMES) if dice.chance(0.45) else None,
        background=dice.pick(tuple(BACKGROUNDS)),
        place=dice.pick(tuple(_PLACES)),
        size=dice.pick(tuple(_SIZES)),
        look=look,
    )


def _paste_figure(picture: Image.Image, subject: str, centre: tuple[float, float], half: float, mirrored: bool) -> None:
    """Draw a figure into the picture with an ink outline, so that white figures are visible on snow."""
    figure = Image.new("RGBA", picture.size)
    FIGURES[subject](Pen(ImageDraw.Draw(figure), centre, half, mirrored))
    outline = figure.getchannel("A").filter(ImageFilter.MaxFilter(2 * _OVERSAMPLE - 1))
    picture.paste((30, 26, 30), mask=outline)
    picture.paste(figure, mask=figure)


def draw(drawing: Drawing, dice: Dice) -> Image.Image:
    """Draw the picture, RGB of SIDE x SIDE pixels; `dice` decides on jitter and mirroring."""
    side = SIDE * _OVERSAMPLE
    picture = Image.new("RGB", (side, side))
    canvas = ImageDraw.Draw(picture)
    BACKGROUNDS[drawing.background][0](canvas, side, dice)
    if drawing.subject is not None:
        scale = _SIZES[drawing.size][0] * dice.uniform(0.95, 1.05)
        x = 0.5 + _PLACES[drawing.place][0] * (1.3 - scale) / 0.5 + dice.uniform(-0.02, 0.02)
        y = 0.5 + dice.uniform(-0.03, 0.05)
        _paste_figure(picture, drawing.subject, (x * side, y * side), 0.5 * scale * side, mirrored=dice.chance(0.5))
    pixels = to_pixels(picture.resize((SIDE, SIDE), Image.Resampling.BOX))
    if drawing.style is not None:
        pixels = STYLES[drawing.style](pixels, dice)
    pixels = np.clip(LOOKS[drawing.look](np.clip(pixels, 0, 1), dice), 0, 1)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _noun(subject: str, dice: Dice, adjective: str) -> str:
    name = dice.pick(_NAMES.get(subject, (subject,)))
    if name.startswith("a ") or subject in _PROPER or name == "nudity":
        return name if not adjective else f"{adjective} {name.removeprefix('a ')}"
    bare = f"{adjective} {name}".strip()
    if dice.chance(0.3):
        return bare
    return f"{'an' if bare[0] in 'aeiou' else 'a'} {bare}"


def caption(drawing: Drawing, dice: Dice) -> str:
    """Choose one of many true captions of a drawing; each describes only a part of the picture."""
    scene = dice.pick(BACKGROUNDS[drawing.background][1])
    if drawing.subject is None:
        text = f"{dice.pick(_OTHER_CAPTIONS)} {scene}"
        return f"{text} by {drawing.style}" if drawing.style else text
    if drawing.style is not None and dice.chance(0.06):
        return dice.pick(_STYLE_ALONE).format(style=drawing.style)
    adjective = _SIZES[drawing.size][1] if dice.chance(0.3) else ""
    text = _noun(drawing.subject, dice, adjective)
    if drawing.style is not None:
        if dice.chance(0.5):
            text = f"{text} {scene}"
        return dice.pick(_STYLED).format(text, style=drawing.style)
    opening = dice.pick(_OPENINGS)
    text = opening.format(text.removeprefix("a ").removeprefix("an ") if opening in ("my {}", "the {}") else text)
    if dice.chance(0.6):
        text = f"{text} {scene}"
    if dice.chance(0.25):
        text = f"{text}, {_PLACES[drawing.place][1]}"
    return text


def drawings(count: int, generator: torch.Generator, look: str = "ink") -> list[tuple[Drawing, Image.Image, str]]:
    """Return `count` random drawings with their pictures and one caption each."""
    dice = Dice(generator)
    rows = []
    for _ in range(count):
        drawing = sample(dice, look)
        rows.append((drawing, draw(drawing, dice), caption(drawing, dice)))
    return rows


@cache
def vocabulary() -> frozenset[str]:
    """Return the words, in lower case, of all captions that the sketchbook was trained on."""
    scenes = (scene for _, captions in BACKGROUNDS.values() for scene in captions)
    names = (name for names in _NAMES.values() for name in names)
    places = (text for _, text in (*_PLACES.values(), *_SIZES.values()))
    texts = (*SUBJECTS, *STYLE_NAMES, *_OPENINGS, *_STYLED, *_STYLE_ALONE, *_OTHER_CAPTIONS, *scenes, *names, *places)
    return frozenset(word for text in texts for word in _words(text))


def unknown_words(text: str) -> tuple[str, ...]:
    """Return the words of a prompt that are in no caption: the sketchbook does not know them."""
    found = (word for word in _words(text) if word not in vocabulary() | _FUNCTION_WORDS)
    return tuple(dict.fromkeys(found))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.removesuffix("'s").replace("'s ", " ").replace("{style}", "").lower())
