"""Draws gammas as a labelled heat map, one row for each prompt and one column for each eraser."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from spm_hub.evaluation.grid import FAINT, FONT_SIZE, GAP, INK, MARGIN, PAPER, Font, line_height, wrap

LABEL_WIDTH = 320
LABEL_LINES = 3
HEADING_LENGTH = 200  # pixels; a longer name is cut
CELL_WIDTH, CELL_HEIGHT = 48, 36
LINE = (212, 212, 216)
FULL = (8, 48, 107)
"""The colour of gamma 1: dark in print and in grey."""
STEPS = ((0.0, PAPER), (0.5, (107, 174, 214)), (1.0, FULL))
"""Colours of the scale; between them it is linear, and it gets darker all the way."""
SCALE_WIDTH, SCALE_HEIGHT = 240, 14


def draw_heat_map(gammas: Sequence[Sequence[float]], prompts: Sequence[str], erasers: Sequence[str]) -> Image.Image:
    """Draw the gamma of each prompt (row) and eraser (column) as an RGB picture.

    Gamma 0 is white and gamma 1 dark blue; what is below or beyond gets these colours too. Cells that are not 0 show
    their number. Labels are wrapped, those of erasers upright if they are wider than a cell.
    Raises ValueError if there is no prompt or eraser, or a row has another number of gammas than there are erasers.
    """
    if not prompts or not erasers:
        raise ValueError("a heat map needs at least one prompt and one eraser")
    if [len(row) for row in gammas] != [len(erasers)] * len(prompts):
        raise ValueError(f"gammas of {len(prompts)} prompts and {len(erasers)} erasers have another shape")
    font, small = (ImageFont.load_default(size=size) for size in (FONT_SIZE, FONT_SIZE - 3))
    line = line_height(font)
    labels = [_cut(wrap(prompt, font, LABEL_WIDTH), font) for prompt in prompts]
    heights = [max(CELL_HEIGHT, line * len(label) + GAP) for label in labels]
    headings = [_heading(name, font) for name in erasers]
    head = max(heading.height for heading in headings)
    left, top = MARGIN + LABEL_WIDTH + GAP, MARGIN + head + GAP
    width = max(left + CELL_WIDTH * len(erasers), left + SCALE_WIDTH) + MARGIN
    height = top + sum(heights) + 2 * GAP + SCALE_HEIGHT + line + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        x = left + column * CELL_WIDTH + (CELL_WIDTH - heading.width) // 2
        sheet.paste(heading, (x, MARGIN + head - heading.height))
    y = top
    for label, row, tall in zip(labels, gammas, heights, strict=True):
        for number, text in enumerate(label):
            pen.text((MARGIN, y + (tall - line * len(label)) // 2 + line * number), text, fill=INK, font=font)
        for column, gamma in enumerate(row):
            x = left + column * CELL_WIDTH
            pen.rectangle((x, y, x + CELL_WIDTH, y + tall), fill=colour_of(gamma), outline=LINE)
            if gamma != 0:
                ink = PAPER if colour_of(gamma)[1] < 130 else INK
                middle = x + CELL_WIDTH // 2 + 1, y + tall // 2
                pen.text(middle, f"{gamma:.2f}", fill=ink, font=small, anchor="mm")
        y += tall
    _scale(pen, (left, y + 2 * GAP), small)
    return sheet


def colour_of(gamma: float) -> tuple[int, int, int]:
    """Return the colour of a gamma on the scale from white (0) to dark blue (1)."""
    gamma = min(1.0, max(0.0, gamma))
    (low, one), (high, other) = STEPS[:2] if gamma <= STEPS[1][0] else STEPS[1:]
    share = (gamma - low) / (high - low)
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _scale(pen: ImageDraw.ImageDraw, at: tuple[int, int], font: Font) -> None:
    """Draw the colour scale, with a number at every quarter."""
    x, y = at
    for step in range(SCALE_WIDTH):
        pen.line((x + step, y, x + step, y + SCALE_HEIGHT), fill=colour_of(step / (SCALE_WIDTH - 1)))
    pen.rectangle((x, y, x + SCALE_WIDTH, y + SCALE_HEIGHT), outline=LINE)
    for quarter in range(5):
        # The first and the last number stay within the scale, so that no other label is as far left.
        anchor = "lt" if quarter == 0 else "rt" if quarter == 4 else "mt"
        text = f"{quarter / 4:g}"
        pen.text((x + SCALE_WIDTH * quarter // 4, y + SCALE_HEIGHT + 5), text, fill=FAINT, font=font, anchor=anchor)
    pen.text((x - GAP, y + SCALE_HEIGHT // 2), "gamma", fill=FAINT, font=font, anchor="rm")


def _heading(name: str, font: Font) -> Image.Image:
    """Return an eraser's name as a picture: upright, or level if it is as narrow as a cell."""
    while font.getlength(name) > HEADING_LENGTH:
        name = f"{name.removesuffix('…')[:-1]}…"
    size = round(font.getlength(name)) + 2, line_height(font)
    picture = Image.new("RGB", size, PAPER)
    ImageDraw.Draw(picture).text((1, 0), name, fill=INK, font=font)
    return picture if size[0] <= CELL_WIDTH - 4 else picture.transpose(Image.Transpose.ROTATE_90)


def _cut(lines: list[str], font: Font) -> list[str]:
    """Return the first lines of a label, the last one with an ellipsis where others are left out."""
    if len(lines) <= LABEL_LINES:
        return lines
    last = f"{lines[LABEL_LINES - 1]}…"
    while font.getlength(last) > LABEL_WIDTH:
        last = f"{last[:-2]}…"
    return [*lines[: LABEL_LINES - 1], last]
