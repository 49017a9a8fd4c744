"""Draws a labelled grid of pictures, one row per prompt and one column per condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SMALLEST = 192  # pixels; smaller pictures are enlarged by a whole factor, so that their pixels stay sharp
GAP = 8
MARGIN = 16
LABEL_WIDTH = 200
FONT_SIZE = 16
PAPER = (255, 255, 255)
INK = (24, 24, 27)
FAINT = (113, 113, 122)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class GridRow:
    """One row of a grid: a label, a fainter note below it, and for each column a cell of pictures."""

    label: str
    cells: tuple[tuple[Image.Image, ...], ...]
    note: str = ""


def draw_grid(rows: Sequence[GridRow], columns: Sequence[str]) -> Image.Image:
    """Draw `rows` under the headings `columns` as one RGB picture.

    Every row has one cell per column; cells may contain different numbers of pictures of different sizes.
    Labels are wrapped to their column; a single word that is wider is broken.

    Raises ValueError if there is no row or column, or a row has another number of cells than there are columns.
    """
    if not rows or not columns:
        raise ValueError("a grid needs at least one row and one column")
    for row in rows:
        if len(row.cells) != len(columns):
            raise ValueError(
                f"row {row.label!r} has {len(row.cells)} cells for {len(columns)} columns {tuple(columns)}"
            )
    font = _font()
    enlarged = [[[enlarge(picture) for picture in cell] for cell in row.cells] for row in rows]
    widths = [
        max(_text_width(heading, font), *(_cell_width(cells[index]) for cells in enlarged))
        for index, heading in enumerate(columns)
    ]
    line = line_height(font)
    texts = [(wrap(row.label, font, LABEL_WIDTH), wrap(row.note, font, LABEL_WIDTH)) for row in rows]
    heights = [
        max([line * (len(label) + len(note)), *(picture.height for cell in cells for picture in cell)])
        for (label, note), cells in zip(texts, enlarged, strict=True)
    ]
    left = MARGIN + LABEL_WIDTH + GAP
    size = (
        left + sum(widths) + 2 * GAP * (len(columns) - 1) + MARGIN,
        MARGIN + line + GAP + sum(heights) + 2 * GAP * (len(rows) - 1) + MARGIN,
    )
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)

    x = left
    for heading, width in zip(columns, widths, strict=True):
        pen.text((x, MARGIN), heading, fill=INK, font=font)
        x += width + 2 * GAP

    y = MARGIN + line + GAP
    for (label, note), cells, height in zip(texts, enlarged, heights, strict=True):
        for number, text in enumerate([*label, *note]):
            pen.text((MARGIN, y + line * number), text, fill=INK if number < len(label) else FAINT, font=font)
        x = left
        for cell, width in zip(cells, widths, strict=True):
            at = x
            for picture in cell:
                sheet.paste(picture, (at, y))
                at += picture.width + GAP
            x += width + 2 * GAP
        y += height + 2 * GAP
    return sheet


def enlarge(picture: Image.Image) -> Image.Image:
    """Return the picture as RGB, its shorter side enlarged to at least `SMALLEST` pixels.

    The factor is the least whole number that is enough.
    """
    factor = max(1, -(-SMALLEST // min(picture.size)))
    rgb = picture.convert("RGB")
    return rgb if factor == 1 else rgb.resize((rgb.width * factor, rgb.height * factor), Image.Resampling.NEAREST)


def _font() -> Font:
    return ImageFont.load_default(size=FONT_SIZE)


def line_height(font: Font) -> int:
    """Return the pixels from one line of text to the next."""
    top, bottom = font.getbbox("Ág")[1::2]
    return round(bottom - min(top, 0)) + 4


def _text_width(text: str, font: Font) -> int:
    return round(font.getlength(text))


def _cell_width(cell: Sequence[Image.Image]) -> int:
    return sum(picture.width for picture in cell) + GAP * max(0, len(cell) - 1)


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Break `text` into lines no wider than `width` pixels; its own line breaks are kept."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        current = ""
        for word in paragraph.split():
            joined = f"{current} {word}".strip()
            if _text_width(joined, font) <= width:
                current = joined
                continue
            if current:
                lines.append(current)
            *broken, current = _break(word, font, width)
            lines += broken
        lines.append(current)
    return lines


def _break(word: str, font: Font, width: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and _text_width(pieces[-1] + letter, font) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces
