"""Draw the README's picture: what four prompts give without erasers and with two of them, and each prompt's gammas.

    python benchmarks/readme_picture.py            # two minutes on one core

The pictures are the sketchbook's own, three for each prompt from the seeds 1, 2 and 3, none of them chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import spm_hub
from spm_hub.evaluation.pictures import WITH, WITHOUT, DrawingOptions, PromptPictures, show, write_png
from spm_hub.models.loading import load_pipeline

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).parent / "results" / "readme.png"
ERASERS = ("snoopy", "van-gogh")
PROMPTS = (
    ("snoopy in a meadow", "names snoopy"),
    ("a tree by van gogh", "names van gogh"),
    ("mickey", "a neighbour of snoopy"),
    ("a dog at the beach", "names neither"),
)
DRAWING = DrawingOptions(seed=1, number=3, steps=25)

# Everything below is in pixels of a sheet that is shown at half its size.
SIDE, GAP, GUTTER, MARGIN, LABELS, HEAD = 184, 12, 48, 32, 408, 84
BAR_WIDTH, BAR_HEIGHT = 150, 14
PAPER, INK, FAINT, TRACK = (255, 255, 255), (24, 24, 27), (113, 113, 122), (228, 228, 231)
COLOURS = {"snoopy": (190, 49, 68), "van-gogh": (38, 92, 173)}


def sheet(shown: Sequence[PromptPictures]) -> Image.Image:
    """One row for each prompt: its text, a bar for each eraser's gamma, its pictures without erasers and with them."""
    block = DRAWING.number * SIDE + (DRAWING.number - 1) * GAP
    width = MARGIN + LABELS + block + GUTTER + block + MARGIN
    height = HEAD + len(shown) * SIDE + (len(shown) - 1) * 2 * GAP + MARGIN
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    large, small, bold = (ImageFont.load_default(size=size) for size in (30, 24, 34))
    lefts = {WITHOUT: MARGIN + LABELS, WITH: MARGIN + LABELS + block + GUTTER}
    pen.text((MARGIN, 24), "prompt and gamma", fill=FAINT, font=large)
    pen.text((lefts[WITHOUT], 22), "without", fill=INK, font=bold)
    pen.text((lefts[WITH], 22), "with both erasers attached", fill=INK, font=bold)
    for index, (one, (_, note)) in enumerate(zip(shown, PROMPTS, strict=True)):
        top = HEAD + index * (SIDE + 2 * GAP)
        pen.text((MARGIN, top), one.prompt, fill=INK, font=large)
        pen.text((MARGIN, top + 42), note, fill=FAINT, font=small)
        for line, name in enumerate(ERASERS):
            _bar(pen, (MARGIN, top + 96 + 42 * line), name, one.gates[name], small)
        for condition, left in lefts.items():
            for number, picture in enumerate(one.pictures[condition]):
                large_one = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                page.paste(large_one, (left + number * (SIDE + GAP), top))
    return page


def _bar(
    pen: ImageDraw.ImageDraw,
    at: tuple[int, int],
    name: str,
    gamma: float,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x, y = at
    pen.text((x, y - 8), name, fill=INK, font=font)
    left = x + 130
    pen.rounded_rectangle((left, y, left + BAR_WIDTH, y + BAR_HEIGHT), BAR_HEIGHT // 2, fill=TRACK)
    filled = round(BAR_WIDTH * gamma)
    if filled > BAR_HEIGHT:
        pen.rounded_rectangle((left, y, left + filled, y + BAR_HEIGHT), BAR_HEIGHT // 2, fill=COLOURS[name])
    pen.text((left + BAR_WIDTH + 16, y - 8), f"{gamma:.2f}", fill=INK, font=font)


if __name__ == "__main__":
    erasers = [spm_hub.load(name, registry=ROOT) for name in ERASERS]
    drawn = show(load_pipeline("sketchbook", device="cpu"), erasers, [prompt for prompt, _ in PROMPTS], DRAWING)
    gates = {one.prompt: dict(one.gates) for one in drawn}
    write_png(PICTURE, sheet(drawn), {"model": "sketchbook", "adapters": ERASERS, "gates": gates})
