"""A small line chart drawn with Pillow (no plotting library is among the dependencies)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE, LEFT, RIGHT, TOP, BOTTOM = (1000, 620), 80, 30, 30, 70
COLOURS = ("#0a58ca", "#d9480f", "#2b8a3e", "#862e9c", "#e8a100", "#868e96", "#343a40")
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axes:
    """Data to pixels; x is logarithmic."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is drawn."""
        across = math.log(x / self.x[0]) / math.log(self.x[1] / self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (SIZE[0] - LEFT - RIGHT), SIZE[1] - BOTTOM - up * (SIZE[1] - TOP - BOTTOM)


def plot(path: Path, curves: Mapping[str, Points], across: str, up: str) -> None:
    """Save a PNG of curves by title, each a list of (x, y) with x > 0; `across` and `up` name the axes."""
    points = [point for curve in curves.values() for point in curve]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = math.floor(min(ys) / 2) * 2, math.ceil(max(ys) / 2) * 2
    axes = Axes((min(xs) / 1.15, max(xs) * 1.15 + 1e-9), (low, max(high, low + 2)))
    image = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    _grid(draw, axes, font)
    draw.text((SIZE[0] / 2, SIZE[1] - 20), across, "black", font, anchor="mm")
    draw.text((LEFT, TOP - 14), up, "black", font, anchor="lm")
    for number, (title, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [axes.place(x, y) for x, y in sorted(curve)]
        if len(places) > 1:
            draw.line(places, colour, 3, joint="curve")
        for x, y in places:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        line = TOP + 18 + 26 * number
        draw.line((LEFT + 16, line, LEFT + 46, line), colour, 4)
        draw.text((LEFT + 56, line), title, "black", font, anchor="lm")
    image.quantize(32).save(path, optimize=True)


def _grid(draw: ImageDraw.ImageDraw, axes: Axes, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> None:
    start, end = math.ceil(math.log2(axes.x[0])), math.floor(math.log2(axes.x[1]))
    for exponent in range(start, end + 1):
        x, bottom = axes.place(2.0**exponent, axes.y[0])
        draw.line((x, bottom, x, TOP), "#e9ecef")
        draw.text((x, bottom + 16), f"{2.0**exponent:g}", "black", font, anchor="mm")
    steps = 2 if axes.y[1] - axes.y[0] <= 24 else 5
    for value in range(round(axes.y[0]), round(axes.y[1]) + 1, steps):
        left, y = axes.place(axes.x[0], value)
        draw.line((left, y, SIZE[0] - RIGHT, y), "#e9ecef")
        draw.text((left - 10, y), f"{value}", "black", font, anchor="rm")
    draw.rectangle((LEFT, TOP, SIZE[0] - RIGHT, SIZE[1] - BOTTOM), outline="#adb5bd")
