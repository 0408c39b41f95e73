"""Scenes of coloured shapes and their anti-aliased rendering.

All geometry is in unit coordinates: (0, 0) is the top left corner of the picture, (1, 1) the bottom right,
so a scene is the same picture at every resolution. A shape is a signed distance function of coordinates
divided by the object's radius, negative inside; coverage of a pixel follows from the distance at its centre.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.floating[Any]]
Box = tuple[float, float, float, float]
Rgb = tuple[float, float, float]

PALETTE: dict[str, Rgb] = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.99, 0.87, 0.12),
    "green": (0.13, 0.66, 0.22),
    "cyan": (0.10, 0.80, 0.86),
    "blue": (0.12, 0.30, 0.92),
    "purple": (0.52, 0.18, 0.78),
    "pink": (0.99, 0.48, 0.76),
}
BACKGROUNDS: dict[str, Rgb] = {
    "light": (0.94, 0.93, 0.91),
    "grey": (0.60, 0.61, 0.63),
    "dark": (0.13, 0.14, 0.17),
}
TEXTURES = ("gradient", "stripes", "blotches")
RADIUS = {"small": 0.13, "large": 0.19}
UNKNOWN = "unknown"
COLORS = tuple(PALETTE)
SIZES = tuple(RADIUS)


def _half_planes(x: Array, y: Array, *planes: tuple[float, float, float]) -> Array:
    """Distance to the convex region where ``nx * x + ny * y <= d`` for every (nx, ny, d), corners mitred."""
    distances = [np.float32(nx) * x + np.float32(ny) * y - np.float32(d) for nx, ny, d in planes]
    return np.maximum.reduce(distances)


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 1


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.88)


def _triangle(x: Array, y: Array) -> Array:
    # Apex (0, -1), base corners (±1.1, 0.9): the side's outward normal is (1.9, -1.1), normalised.
    length = math.hypot(1.9, 1.1)
    return _half_planes(np.abs(x), y, (1.9 / length, -1.1 / length, 1.1 / length), (0, 1, 0.9))


def _diamond(x: Array, y: Array) -> Array:
    # Taller than wide, so that it is not the square turned.
    length = math.hypot(1.2, 0.92)
    return _half_planes(np.abs(x), np.abs(y), (1.2 / length, 0.92 / length, 1.2 * 0.92 / length))


def _cross(x: Array, y: Array) -> Array:
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(long - np.float32(1.05), short - np.float32(0.36))


def _star(x: Array, y: Array) -> Array:
    # Fold the plane onto half a sector of the five; there the outline is one line from tip to notch.
    tip, notch, sector = 1.2, 0.5, math.pi / 5
    y = y - np.float32(0.1)
    angle = np.abs(np.mod(np.arctan2(x, -y) + sector, 2 * sector) - sector)
    radius = np.hypot(x, y)
    edge = (notch * math.cos(sector) - tip, notch * math.sin(sector))
    length = math.hypot(*edge)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    return ((along - tip) * edge[1] - across * edge[0]) / np.float32(length)


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - np.float32(0.76)) - np.float32(0.27)


def _heart(x: Array, y: Array) -> Array:
    # Inigo Quilez's exact heart, tip at (0, 0) and lobes up to 1.1, scaled to a half width of 1.1.
    scale = np.float32(0.6036 / 1.1)
    x, y = np.abs(x) * scale, np.float32(0.552) - y * scale
    diagonal = np.maximum(x + y, 0) / 2
    lower = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - diagonal) ** 2 + (y - diagonal) ** 2)) * np.sign(
        x - y
    )
    upper = np.hypot(x - np.float32(0.25), y - np.float32(0.75)) - np.float32(math.sqrt(2) / 4)
    return np.where(x + y > 1, upper, lower) / scale


DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "star": _star,
    "ring": _ring,
    "heart": _heart,
}
SHAPES = tuple(DISTANCES)


@dataclass(frozen=True)
class Moments:
    """Of a shape of radius 1 around its centre: area, centroid (x, y), box (x0, y0, x1, y1) and reach, the
    distance of its farthest point."""

    area: float
    centroid: tuple[float, float]
    box: Box
    reach: float


@lru_cache
def shape_moments(shape: str) -> Moments:
    """Area, centroid, box and reach of a named shape of radius 1, by summing over a fine grid."""
    axis = np.linspace(-1.3, 1.3, 521, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    inside = DISTANCES[shape](x, y) < 0
    xs, ys = x[inside].astype(float), y[inside].astype(float)
    return Moments(
        float(inside.sum()) * float(axis[1] - axis[0]) ** 2,
        (float(xs.mean()), float(ys.mean())),
        (float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max())),
        float(np.hypot(xs, ys).max()),
    )


def place_of(center: tuple[float, float]) -> tuple[str, str]:
    """Column ("left", "center", "right") and row ("top", "center", "bottom") of the loose 3x3 grid."""
    x, y = center
    column = "left" if x < 0.36 else "right" if x > 0.64 else "center"
    row = "top" if y < 0.36 else "bottom" if y > 0.64 else "center"
    return column, row


@dataclass(frozen=True)
class SceneObject:
    """One object: names of shape, colour and size ("unknown" where a reader could not tell), centre (x, y)
    and box (x0, y0, x1, y1) in unit coordinates, radius as a share of the side, rgb in [0, 1]."""

    shape: str
    color: str
    size: str
    center: tuple[float, float]
    radius: float
    rgb: Rgb
    box: Box

    @classmethod
    def of(
        cls, shape: str, color: str, size: str, center: tuple[float, float], radius: float, rgb: Rgb
    ) -> SceneObject:
        """An object whose box follows from its known shape, centre and radius."""
        x0, y0, x1, y1 = (radius * side for side in shape_moments(shape).box)
        (x, y), box = center, (x0, y0, x1, y1)
        box = (x + x0, y + y0, x + x1, y + y1)
        return cls(shape, color, size, center, radius, rgb, box)

    @property
    def reach(self) -> float:
        """Distance from the centre to the object's farthest point, unit coordinates."""
        return self.radius * shape_moments(self.shape).reach


@dataclass(frozen=True)
class Background:
    """shade: name of the tone; rgb in [0, 1]; texture: None for plain, or one of `TEXTURES` with its strength
    (amplitude in [0, 1] units of brightness), direction (radians), frequency (waves per side) and phase."""

    shade: str
    rgb: Rgb
    texture: str | None = None
    strength: float = 0.0
    direction: float = 0.0
    frequency: float = 1.0
    phase: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Objects that do not overlap, in front of a background: everything there is to know of a picture."""

    objects: tuple[SceneObject, ...]
    background: Background

    def render(self, size: int) -> Tensor:
        """The picture, float ``[3, size, size]`` in [-1, 1], anti-aliased."""
        canvas = _paint_background(self.background, size)
        for thing in self.objects:
            rows, columns, distance = object_distance(thing, size)
            coverage = np.clip(np.float32(0.5) - distance, 0, 1)[..., None]
            patch = canvas[rows, columns]
            patch += coverage * (np.asarray(thing.rgb, np.float32) - patch)
        return torch.from_numpy(
            np.ascontiguousarray(canvas.transpose(2, 0, 1) * np.float32(2) - np.float32(1))
        )

    def segmentation(self, size: int) -> Tensor:
        """Which object owns each pixel centre, long ``[size, size]``: 0 background, i + 1 for objects[i]."""
        labels = np.zeros((size, size), np.int64)
        for number, thing in enumerate(self.objects, start=1):
            rows, columns, distance = object_distance(thing, size)
            labels[rows, columns][distance < 0] = number
        return torch.from_numpy(labels)


@lru_cache
def pixel_centers(size: int) -> Array:
    """Unit coordinates of the pixel centres along one side, float32 ``[size]``."""
    return (np.arange(size, dtype=np.float32) + np.float32(0.5)) / size


def object_distance(thing: SceneObject, size: int) -> tuple[slice, slice, Array]:
    """Row slice, column slice and signed distance in pixels on the patch that holds the object's box."""
    x0, y0, x1, y1 = thing.box
    rows = slice(max(0, math.floor(y0 * size) - 1), min(size, math.ceil(y1 * size) + 1))
    columns = slice(max(0, math.floor(x0 * size) - 1), min(size, math.ceil(x1 * size) + 1))
    centers, (cx, cy) = pixel_centers(size), thing.center
    x = (centers[columns][None, :] - np.float32(cx)) / np.float32(thing.radius)
    y = (centers[rows][:, None] - np.float32(cy)) / np.float32(thing.radius)
    distance = DISTANCES[thing.shape](*np.broadcast_arrays(x, y))
    return rows, columns, distance * np.float32(thing.radius * size)


def _paint_background(background: Background, size: int) -> Array:
    """The background alone, float32 ``[size, size, 3]`` in [0, 1]."""
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = background.rgb
    if background.texture is None:
        return canvas
    axis = pixel_centers(size) - np.float32(0.5)
    cos, sin = math.cos(background.direction), math.sin(background.direction)
    along = axis[None, :] * np.float32(cos) + axis[:, None] * np.float32(sin)
    turn = np.float32(2 * math.pi * background.frequency)
    if background.texture == "gradient":
        wave = 2 * along
    elif background.texture == "stripes":
        wave = np.sin(turn * along + np.float32(background.phase))
    else:
        across = axis[:, None] * np.float32(cos) - axis[None, :] * np.float32(sin)
        wave = np.sin(turn * along + np.float32(background.phase)) * np.sin(turn * across)
    canvas += (np.float32(background.strength) * wave)[..., None]
    return np.clip(canvas, 0, 1, out=canvas)
