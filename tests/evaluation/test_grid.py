"""The labelled grid: whole-factor enlargement, every picture in its place, labels that stay inside their column."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from spm_hub.evaluation.grid import FONT_SIZE, LABEL_WIDTH, PAPER, SMALLEST, GridRow, draw_grid, enlarge, wrap

RED, GREEN, BLUE, YELLOW = (200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)


def plain(colour: tuple[int, int, int], side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def area_of(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return {found: count for count, found in sheet.getcolors(maxcolors=1 << 20) or ()}[colour]


def test_small_pictures_are_enlarged_by_a_whole_factor_without_blur() -> None:
    picture = Image.new("RGB", (64, 48))
    picture.putdata([(x, y, 7) for y in range(48) for x in range(64)])
    large = enlarge(picture)
    assert large.size == (256, 192)
    assert all(large.getpixel((4 * x + 3, 4 * y)) == (x, y, 7) for x in range(0, 64, 9) for y in range(0, 48, 7))
    assert enlarge(plain(RED, 512)).size == (512, 512)


def test_every_picture_is_in_its_row_and_column() -> None:
    rows = [GridRow("first", ((plain(RED),), (plain(GREEN),))), GridRow("second", ((plain(BLUE),), (plain(YELLOW),)))]
    sheet = draw_grid(rows, ["without", "with"])
    boxes = {}
    for colour in (RED, GREEN, BLUE, YELLOW):
        assert area_of(sheet, colour) == SMALLEST**2
        mask = Image.new("1", sheet.size)
        mask.putdata([pixel == colour for pixel in sheet.get_flattened_data()])
        boxes[colour] = mask.getbbox()
    assert boxes[RED][0] == boxes[BLUE][0] < boxes[GREEN][0] == boxes[YELLOW][0]
    assert boxes[RED][1] == boxes[GREEN][1] < boxes[BLUE][1] == boxes[YELLOW][1]


def test_a_cell_may_hold_several_pictures_and_a_row_a_note() -> None:
    sheet = draw_grid([GridRow("snoopy", ((plain(RED), plain(GREEN)),), "snoopy 1.00\nmickey 0.31")], ["with"])
    assert area_of(sheet, RED) == area_of(sheet, GREEN) == SMALLEST**2
    label = sheet.crop((0, 0, LABEL_WIDTH, sheet.height))
    assert len(label.getcolors(maxcolors=1 << 20) or ()) > 2, "the label is drawn in ink and in a fainter grey"


@pytest.mark.parametrize(("rows", "columns"), [([], ["with"]), ([GridRow("a", ((plain(RED),),))], ["without", "with"])])
def test_what_cannot_be_drawn_is_said(rows: list[GridRow], columns: list[str]) -> None:
    with pytest.raises(ValueError, match=r"at least one row|1 cells for 2 columns"):
        draw_grid(rows, columns)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab mW[]-'éß\n", max_size=80))
def test_wrapped_labels_fit_their_column_and_lose_no_letter(text: str) -> None:
    font = ImageFont.load_default(size=FONT_SIZE)
    lines = wrap(text, font, LABEL_WIDTH)
    assert all(font.getlength(line) <= LABEL_WIDTH + 0.5 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_the_margin_is_paper() -> None:
    sheet = draw_grid([GridRow("a", ((plain(RED),),))], ["with"])
    assert {sheet.getpixel((x, sheet.height - 1)) for x in range(sheet.width)} == {PAPER}
