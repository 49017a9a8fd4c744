"""The heat map of gammas: white at 0, darkest at 1, and labels that stay inside the picture."""

from __future__ import annotations

from itertools import pairwise

import pytest
from PIL import Image, ImageChops

from spm_hub.evaluation.grid import MARGIN
from spm_hub.evaluation.heat_map import CELL_HEIGHT, CELL_WIDTH, LABEL_WIDTH, colour_of, draw_heat_map

WHITE, DARKEST = (255, 255, 255), (8, 48, 107)
LONG = "a very long prompt about an old house by the river with many swirls and stars, " * 5


def luminance(colour: tuple[int, int, int]) -> float:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue


def box_of(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    difference = ImageChops.difference(sheet, Image.new("RGB", sheet.size, colour)).convert("L")
    return difference.point(lambda value: 255 * (value == 0)).getbbox()


def test_the_scale_begins_white_and_gets_darker_all_the_way() -> None:
    assert colour_of(0) == colour_of(-0.3) == WHITE
    assert colour_of(1) == colour_of(2.5) == DARKEST
    shades = [luminance(colour_of(step / 50)) for step in range(51)]
    assert all(lighter - darker > 1 for lighter, darker in pairwise(shades))


@pytest.mark.parametrize("erasers", [2, 20, 60])
def test_cells_have_the_colours_of_their_gammas(erasers: int) -> None:
    gammas = [[(row + column) % 2 * 1.0 for column in range(erasers)] for row in range(3)]
    sheet = draw_heat_map(gammas, ["a dog"] * 3, [f"eraser-{column}" for column in range(erasers)])
    pixels = sheet.load()
    assert pixels is not None
    found = box_of(sheet, DARKEST)
    assert found is not None
    left, top = found[:2]  # the second row begins with a gamma of 1
    for row, each in enumerate(gammas):
        for column, gamma in enumerate(each):
            x, y = left + column * CELL_WIDTH + 4, top + row * CELL_HEIGHT + 4
            assert pixels[x, y] == (DARKEST if gamma else WHITE), (row, column)


def test_a_cell_of_zero_is_blank_and_every_other_one_has_its_number() -> None:
    def inside(gamma: float) -> set[tuple[int, int, int]]:
        sheet = draw_heat_map([[gamma]], ["a dog"], ["snoopy"])
        other = draw_heat_map([[1.0]], ["a dog"], ["snoopy"])
        box = box_of(other, DARKEST)
        assert box is not None
        cell = sheet.crop((box[0] + 2, box[1] + 2, box[0] + CELL_WIDTH - 2, box[1] + CELL_HEIGHT - 2))
        return {colour for _, colour in cell.getcolors(1 << 16) or ()}

    assert inside(0.0) == {WHITE}
    for gamma in (1.0, 0.6, 0.2, 0.001, -0.1):
        shades = inside(gamma)
        assert colour_of(gamma) in shades
        # The number is legible on its cell.
        assert max(abs(luminance(shade) - luminance(colour_of(gamma))) for shade in shades) > 100


def test_labels_stay_in_the_picture_and_beside_the_cells() -> None:
    names = ["x", "a-name-that-is-much-too-long-for-a-heading-of-a-column-in-any-picture"]
    prompts = [LONG, "Donaudampfschifffahrtsgesellschaftskapitaensmuetzenverordnungsblatt", "a dog"]
    sheet = draw_heat_map([[0.0, 0.0]] * 3, prompts, names)
    border = ImageChops.difference(sheet, Image.new("RGB", sheet.size, WHITE)).convert("L").getbbox()
    assert border is not None
    assert border[0] >= MARGIN - 1
    assert border[1] >= MARGIN - 1
    assert border[2] <= sheet.width
    assert border[3] <= sheet.height - MARGIN // 2
    gap = sheet.crop((MARGIN + LABEL_WIDTH + 2, 0, MARGIN + LABEL_WIDTH + 7, sheet.height - 60))
    assert gap.getcolors(1 << 16) == [(gap.width * gap.height, WHITE)]
    assert sheet.height < 700, "a prompt that is too long is cut"


@pytest.mark.parametrize(("gammas", "prompts"), [([], []), ([[0.1]], ["a", "b"]), ([[0.1, 0.2]], ["a"])])
def test_what_cannot_be_drawn_is_refused(gammas: list[list[float]], prompts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"at least one prompt|another shape"):
        draw_heat_map(gammas, prompts, ["snoopy"])
