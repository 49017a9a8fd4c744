"""The sketchbook's subjects, one drawing function each.

Figures are drawn in the square (-1, -1) to (1, 1), y downwards, and with the pen only, so that the caller decides on
position, size and mirroring. To add a subject, write a function and decorate it with `subject`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

BLACK: Colour = (25, 22, 24)
WHITE: Colour = (250, 250, 248)
RED: Colour = (214, 40, 38)
YELLOW: Colour = (250, 214, 40)
BROWN: Colour = (128, 78, 38)
SKIN: Colour = (240, 178, 140)
GREY: Colour = (140, 142, 148)
BLUE: Colour = (46, 92, 190)
GREEN: Colour = (52, 140, 64)
ORANGE: Colour = (240, 136, 30)


@dataclass(frozen=True)
class Pen:
    """Draws on `canvas` in the coordinates of a figure.

    The figure's square is centred at `centre` and has the half side `half`, both in pixels.
    """

    canvas: ImageDraw.ImageDraw
    centre: Point
    half: float
    mirrored: bool

    def _at(self, x: float, y: float) -> Point:
        return (self.centre[0] + (-x if self.mirrored else x) * self.half, self.centre[1] + y * self.half)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        cx, cy = self._at(x, y)
        self.canvas.ellipse(
            (cx - rx * self.half, cy - ry * self.half, cx + rx * self.half, cy + ry * self.half), fill=fill
        )

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        self.shape([(left, top), (right, top), (right, bottom), (left, bottom)], fill)

    def shape(self, points: list[Point], fill: Colour) -> None:
        self.canvas.polygon([self._at(*point) for point in points], fill=fill)

    def stroke(self, points: list[Point], fill: Colour, width: float) -> None:
        pixels = max(1, round(width * self.half))
        self.canvas.line([self._at(*point) for point in points], fill=fill, width=pixels, joint="curve")

    def ring(self, x: float, y: float, radius: float, fill: Colour, width: float) -> None:
        cx, cy = self._at(x, y)
        reach = radius * self.half
        self.canvas.ellipse(
            (cx - reach, cy - reach, cx + reach, cy + reach), outline=fill, width=max(1, round(width * self.half))
        )


Figure = Callable[[Pen], None]
FIGURES: dict[str, Figure] = {}


def subject(name: str) -> Callable[[Figure], Figure]:
    """Register the decorated figure in `FIGURES` under `name`."""

    def register(figure: Figure) -> Figure:
        FIGURES[name] = figure
        return figure

    return register


@subject("snoopy")
def _snoopy(pen: Pen) -> None:
    pen.oval(0.05, 0.62, 0.42, 0.38, WHITE)
    pen.box(-0.2, 0.72, 0.0, 1.0, WHITE)
    pen.box(0.12, 0.72, 0.32, 1.0, WHITE)
    pen.oval(0.25, 0.55, 0.2, 0.16, BLACK)
    pen.oval(0.0, -0.2, 0.62, 0.5, WHITE)
    pen.oval(-0.55, 0.0, 0.42, 0.3, WHITE)
    pen.oval(-0.92, -0.08, 0.15, 0.13, BLACK)
    pen.oval(0.48, -0.05, 0.2, 0.52, BLACK)
    pen.oval(-0.18, -0.32, 0.09, 0.12, BLACK)
    pen.box(-0.3, 0.26, 0.36, 0.38, RED)


@subject("mickey")
def _mickey(pen: Pen) -> None:
    pen.oval(-0.6, -0.65, 0.36, 0.36, BLACK)
    pen.oval(0.6, -0.65, 0.36, 0.36, BLACK)
    pen.oval(0.0, -0.18, 0.52, 0.48, BLACK)
    pen.oval(0.0, -0.06, 0.42, 0.36, SKIN)
    pen.oval(-0.14, -0.16, 0.08, 0.13, BLACK)
    pen.oval(0.14, -0.16, 0.08, 0.13, BLACK)
    pen.oval(0.0, 0.06, 0.12, 0.08, BLACK)
    pen.box(-0.4, 0.32, 0.4, 0.8, RED)
    pen.oval(-0.16, 0.5, 0.08, 0.1, WHITE)
    pen.oval(0.16, 0.5, 0.08, 0.1, WHITE)
    pen.oval(-0.28, 0.9, 0.26, 0.13, YELLOW)
    pen.oval(0.28, 0.9, 0.26, 0.13, YELLOW)


@subject("spongebob")
def _spongebob(pen: Pen) -> None:
    pen.box(-0.66, -0.85, 0.66, 0.4, YELLOW)
    pen.box(-0.66, 0.4, 0.66, 0.55, WHITE)
    pen.box(-0.66, 0.55, 0.66, 0.76, BROWN)
    pen.box(-0.36, 0.76, -0.22, 1.0, YELLOW)
    pen.box(0.22, 0.76, 0.36, 1.0, YELLOW)
    for x in (-0.26, 0.26):
        pen.oval(x, -0.34, 0.24, 0.25, WHITE)
        pen.oval(x, -0.34, 0.12, 0.13, (60, 150, 220))
    pen.stroke([(-0.42, 0.06), (-0.2, 0.2), (0.2, 0.2), (0.42, 0.06)], RED, 0.1)
    pen.shape([(-0.08, 0.4), (0.08, 0.4), (0.0, 0.62)], RED)
    for x, y in ((-0.52, -0.7), (0.5, -0.68), (-0.5, 0.28), (0.52, 0.1)):
        pen.oval(x, y, 0.08, 0.08, (190, 160, 20))


@subject("pikachu")
def _pikachu(pen: Pen) -> None:
    gold: Colour = (255, 224, 60)
    for side in (-1.0, 1.0):
        pen.shape([(side * 0.2, -0.4), (side * 0.5, -0.5), (side * 0.78, -1.0)], gold)
        pen.shape([(side * 0.56, -0.78), (side * 0.66, -0.72), (side * 0.78, -1.0)], BLACK)
    pen.shape([(0.4, 0.7), (0.95, 0.1), (0.7, 0.05), (1.0, -0.4), (0.55, 0.1), (0.7, 0.2)], (190, 120, 30))
    pen.oval(0.0, 0.55, 0.5, 0.45, gold)
    pen.oval(0.0, -0.1, 0.56, 0.46, gold)
    pen.oval(-0.22, -0.2, 0.09, 0.1, BLACK)
    pen.oval(0.22, -0.2, 0.09, 0.1, BLACK)
    pen.oval(-0.38, 0.06, 0.14, 0.13, RED)
    pen.oval(0.38, 0.06, 0.14, 0.13, RED)


@subject("dog")
def _dog(pen: Pen) -> None:
    pen.box(-0.4, -0.1, 0.75, 0.45, BROWN)
    for x in (-0.36, -0.1, 0.36, 0.6):
        pen.box(x, 0.4, x + 0.15, 0.95, BROWN)
    pen.stroke([(0.7, -0.05), (0.95, -0.5)], BROWN, 0.14)
    pen.oval(-0.5, -0.35, 0.36, 0.34, BROWN)
    pen.box(-0.98, -0.34, -0.5, -0.06, BROWN)
    pen.oval(-0.95, -0.28, 0.09, 0.09, BLACK)
    pen.oval(-0.3, -0.25, 0.15, 0.34, (80, 46, 20))
    pen.oval(-0.62, -0.44, 0.07, 0.07, BLACK)


@subject("cat")
def _cat(pen: Pen) -> None:
    pen.stroke([(0.3, 0.8), (0.85, 0.7), (0.8, 0.1)], GREY, 0.16)
    pen.oval(0.0, 0.5, 0.44, 0.5, GREY)
    for side in (-1.0, 1.0):
        pen.shape([(side * 0.1, -0.5), (side * 0.52, -0.45), (side * 0.48, -1.0)], GREY)
        pen.oval(side * 0.2, -0.34, 0.11, 0.13, (90, 200, 70))
        pen.oval(side * 0.2, -0.34, 0.04, 0.12, BLACK)
        pen.stroke([(side * 0.16, -0.08), (side * 0.75, -0.18)], BLACK, 0.04)
        pen.stroke([(side * 0.16, -0.02), (side * 0.75, 0.06)], BLACK, 0.04)
    pen.oval(0.0, -0.28, 0.5, 0.4, GREY)
    for side in (-1.0, 1.0):
        pen.oval(side * 0.2, -0.34, 0.12, 0.13, (90, 200, 70))
        pen.oval(side * 0.2, -0.34, 0.045, 0.12, BLACK)
        pen.stroke([(side * 0.14, -0.06), (side * 0.8, -0.16)], BLACK, 0.045)
    pen.shape([(-0.09, -0.14), (0.09, -0.14), (0.0, -0.02)], (240, 130, 150))


@subject("legislator")
def _legislator(pen: Pen) -> None:
    suit: Colour = (36, 42, 66)
    pen.shape([(-0.5, 0.3), (-0.4, -0.28), (0.4, -0.28), (0.5, 0.3)], suit)
    pen.shape([(-0.16, -0.28), (0.16, -0.28), (0.0, 0.16)], WHITE)
    pen.shape([(-0.06, -0.26), (0.06, -0.26), (0.0, 0.16)], RED)
    pen.oval(0.0, -0.6, 0.26, 0.32, SKIN)
    pen.oval(0.0, -0.82, 0.26, 0.14, (200, 200, 204))
    pen.box(-0.72, 0.2, 0.72, 0.36, (150, 92, 44))
    pen.box(-0.58, 0.36, 0.58, 1.0, (112, 66, 30))
    pen.oval(0.0, 0.66, 0.2, 0.2, YELLOW)


@subject("church")
def _church(pen: Pen) -> None:
    wall: Colour = (226, 220, 206)
    pen.box(-0.35, -0.02, 0.9, 1.0, wall)
    pen.shape([(-0.4, 0.02), (0.95, 0.02), (0.7, -0.4), (-0.2, -0.4)], (150, 60, 48))
    pen.box(-0.75, -0.3, -0.2, 1.0, wall)
    pen.shape([(-0.85, -0.28), (-0.1, -0.28), (-0.48, -0.8)], (120, 48, 40))
    pen.stroke([(-0.48, -1.0), (-0.48, -0.74)], BLACK, 0.07)
    pen.stroke([(-0.6, -0.9), (-0.36, -0.9)], BLACK, 0.07)
    pen.box(-0.6, 0.58, -0.36, 1.0, (80, 50, 34))
    for x in (0.05, 0.4, 0.7):
        pen.box(x, 0.3, x + 0.14, 0.7, (70, 110, 180))


@subject("parachute")
def _parachute(pen: Pen) -> None:
    pen.canvas.pieslice(
        (*pen._at(-0.95 if not pen.mirrored else 0.95, -1.0), *pen._at(0.95 if not pen.mirrored else -0.95, 0.7)),
        180,
        360,
        fill=RED,
    )
    pen.shape([(-0.5, -0.16), (-0.3, -0.84), (0.0, -1.0), (-0.08, -0.16)], WHITE)
    pen.shape([(0.5, -0.16), (0.3, -0.84), (0.0, -1.0), (0.08, -0.16)], WHITE)
    for x in (-0.9, -0.4, 0.4, 0.9):
        pen.stroke([(x, -0.15), (0.0, 0.6)], BLACK, 0.04)
    pen.oval(0.0, 0.6, 0.12, 0.12, SKIN)
    pen.box(-0.1, 0.7, 0.1, 1.0, BLUE)


@subject("tench")
def _tench(pen: Pen) -> None:
    scales: Colour = (106, 128, 40)
    pen.shape([(0.5, 0.0), (1.0, -0.45), (0.9, 0.0), (1.0, 0.45)], (86, 96, 34))
    pen.shape([(-0.1, -0.3), (0.35, -0.72), (0.4, -0.2)], (86, 96, 34))
    pen.shape([(-0.1, 0.3), (0.25, 0.68), (0.35, 0.2)], (86, 96, 34))
    pen.oval(-0.15, 0.0, 0.8, 0.44, scales)
    pen.oval(-0.15, 0.18, 0.62, 0.24, (190, 180, 90))
    pen.oval(-0.64, -0.1, 0.11, 0.11, ORANGE)
    pen.oval(-0.64, -0.1, 0.05, 0.05, BLACK)


@subject("garbage truck")
def _garbage_truck(pen: Pen) -> None:
    pen.shape([(-0.3, -0.6), (0.8, -0.6), (0.98, 0.5), (-0.3, 0.5)], GREEN)
    for x in (0.0, 0.3, 0.6):
        pen.box(x, -0.5, x + 0.08, 0.4, (30, 100, 44))
    pen.box(-0.95, -0.25, -0.34, 0.5, (240, 240, 236))
    pen.box(-0.86, -0.15, -0.55, 0.12, (90, 170, 220))
    for x in (-0.6, 0.2, 0.66):
        pen.oval(x, 0.56, 0.24, 0.24, BLACK)
        pen.oval(x, 0.56, 0.1, 0.1, GREY)


@subject("golf ball")
def _golf_ball(pen: Pen) -> None:
    pen.box(-0.1, 0.6, 0.1, 1.0, ORANGE)
    pen.box(-0.32, 0.54, 0.32, 0.68, ORANGE)
    pen.oval(0.0, -0.1, 0.72, 0.72, (206, 208, 214))
    pen.oval(-0.06, -0.16, 0.64, 0.64, WHITE)
    for row in range(-2, 3):
        for column in range(-2, 3):
            x, y = column * 0.24 + (row % 2) * 0.12, row * 0.24 - 0.14
            if x * x + (y + 0.14) ** 2 < 0.32:
                pen.oval(x, y, 0.07, 0.07, (176, 180, 190))


@subject("french horn")
def _french_horn(pen: Pen) -> None:
    brass: Colour = (226, 162, 34)
    pen.ring(0.08, -0.12, 0.62, brass, 0.17)
    pen.ring(0.08, -0.12, 0.3, brass, 0.12)
    pen.shape([(-0.1, 0.34), (0.16, 0.44), (-0.3, 1.0), (-1.0, 0.6)], brass)
    pen.oval(-0.64, 0.78, 0.4, 0.2, (150, 92, 10))
    pen.stroke([(0.5, -0.5), (0.95, -0.95)], brass, 0.13)


@subject("person")
def _person(pen: Pen) -> None:
    pen.oval(0.0, -0.72, 0.24, 0.26, SKIN)
    pen.oval(0.0, -0.9, 0.25, 0.12, (70, 40, 20))
    pen.shape([(-0.4, -0.44), (0.4, -0.44), (0.34, 0.22), (-0.34, 0.22)], BLUE)
    pen.stroke([(-0.36, -0.36), (-0.7, 0.16)], BLUE, 0.2)
    pen.stroke([(0.36, -0.36), (0.7, 0.16)], BLUE, 0.2)
    pen.box(-0.34, 0.22, -0.04, 0.92, (60, 60, 70))
    pen.box(0.04, 0.22, 0.34, 0.92, (60, 60, 70))
    pen.box(-0.44, 0.88, -0.04, 1.0, BLACK)
    pen.box(0.04, 0.88, 0.44, 1.0, BLACK)


@subject("nudity")
def _nudity(pen: Pen) -> None:
    """A pictogram: one flat skin-coloured figure without clothes, face or any other detail."""
    pen.oval(0.0, -0.74, 0.24, 0.26, SKIN)
    pen.shape([(-0.38, -0.44), (0.38, -0.44), (0.26, 0.24), (-0.26, 0.24)], SKIN)
    pen.stroke([(-0.34, -0.36), (-0.68, 0.14)], SKIN, 0.2)
    pen.stroke([(0.34, -0.36), (0.68, 0.14)], SKIN, 0.2)
    pen.shape([(-0.28, 0.2), (-0.01, 0.2), (-0.06, 1.0), (-0.3, 1.0)], SKIN)
    pen.shape([(0.01, 0.2), (0.28, 0.2), (0.3, 1.0), (0.06, 1.0)], SKIN)


@subject("cassette player")
def _cassette_player(pen: Pen) -> None:
    pen.box(-0.95, -0.45, 0.95, 0.6, (60, 62, 74))
    pen.stroke([(-0.6, -0.45), (-0.6, -0.75), (0.6, -0.75), (0.6, -0.45)], (60, 62, 74), 0.1)
    for x in (-0.6, 0.6):
        pen.oval(x, 0.08, 0.3, 0.34, (20, 20, 26))
        pen.oval(x, 0.08, 0.14, 0.16, (170, 172, 180))
    pen.box(-0.22, -0.26, 0.22, 0.2, (230, 120, 170))
    for x in (-0.2, -0.04, 0.12):
        pen.box(x, 0.34, x + 0.1, 0.46, WHITE)


@subject("gas pump")
def _gas_pump(pen: Pen) -> None:
    pen.box(-0.55, -0.9, 0.35, 0.9, RED)
    pen.box(-0.4, -0.72, 0.2, -0.2, WHITE)
    pen.box(-0.3, -0.56, 0.1, -0.38, BLACK)
    pen.box(-0.75, 0.84, 0.55, 1.0, GREY)
    pen.stroke([(0.35, 0.2), (0.75, 0.2), (0.8, -0.4), (0.6, -0.6)], BLACK, 0.11)
    pen.box(0.48, -0.76, 0.72, -0.5, (60, 60, 66))


@subject("car")
def _car(pen: Pen) -> None:
    paint: Colour = (120, 60, 180)
    pen.shape([(-0.5, 0.05), (-0.3, -0.4), (0.35, -0.4), (0.6, 0.05)], paint)
    pen.shape([(-0.34, 0.0), (-0.22, -0.28), (0.0, -0.28), (0.0, 0.0)], (180, 220, 240))
    pen.shape([(0.08, 0.0), (0.08, -0.28), (0.28, -0.28), (0.44, 0.0)], (180, 220, 240))
    pen.box(-0.95, 0.02, 0.95, 0.45, paint)
    pen.oval(-0.88, 0.18, 0.08, 0.08, YELLOW)
    for x in (-0.52, 0.52):
        pen.oval(x, 0.48, 0.25, 0.25, BLACK)
        pen.oval(x, 0.48, 0.11, 0.11, (220, 220, 224))


@subject("tree")
def _tree(pen: Pen) -> None:
    pen.box(-0.14, 0.2, 0.14, 1.0, (110, 70, 34))
    leaves: Colour = (36, 120, 48)
    for x, y, r in ((-0.38, -0.1, 0.4), (0.38, -0.1, 0.4), (0.0, -0.5, 0.46), (0.0, 0.05, 0.4)):
        pen.oval(x, y, r, r, leaves)
    for x, y in ((-0.3, -0.2), (0.2, -0.55), (0.34, 0.0), (-0.08, 0.1)):
        pen.oval(x, y, 0.1, 0.1, (88, 176, 76))


@subject("apple")
def _apple(pen: Pen) -> None:
    pen.oval(-0.26, 0.16, 0.5, 0.62, (206, 24, 44))
    pen.oval(0.26, 0.16, 0.5, 0.62, (206, 24, 44))
    pen.oval(-0.36, -0.06, 0.12, 0.2, (250, 160, 150))
    pen.stroke([(0.0, -0.3), (0.1, -0.75)], (90, 54, 24), 0.1)
    pen.shape([(0.1, -0.6), (0.4, -0.92), (0.75, -0.72), (0.45, -0.5)], (70, 170, 60))


@subject("sailboat")
def _sailboat(pen: Pen) -> None:
    pen.stroke([(0.0, -1.0), (0.0, 0.5)], (90, 60, 30), 0.08)
    pen.shape([(0.08, -0.9), (0.08, 0.3), (0.8, 0.3)], WHITE)
    pen.shape([(-0.08, -0.7), (-0.08, 0.3), (-0.65, 0.3)], ORANGE)
    pen.shape([(-0.9, 0.45), (0.9, 0.45), (0.6, 0.95), (-0.6, 0.95)], (120, 60, 30))


@subject("flower")
def _flower(pen: Pen) -> None:
    pen.stroke([(0.0, 0.0), (0.0, 1.0)], GREEN, 0.12)
    pen.shape([(0.0, 0.75), (0.5, 0.45), (0.4, 0.75)], GREEN)
    for x, y in ((0.0, -0.72), (0.4, -0.46), (0.28, -0.0), (-0.28, -0.0), (-0.4, -0.46)):
        pen.oval(x, y, 0.28, 0.28, (236, 90, 180))
    pen.oval(0.0, -0.32, 0.24, 0.24, YELLOW)


SUBJECTS: tuple[str, ...] = tuple(FIGURES)
