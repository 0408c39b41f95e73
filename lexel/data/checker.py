"""Reads a picture of `shapes` back into objects: no network, nothing learned.

Background colour by mean shift, foreground by contrast, one connected component per object, then matching of
the component's coverage map with the eight shapes rendered at the centre and about the radius its own moments
give, at several blurs, since a decoder's pictures are softer than the renderer's. Area and centroid survive
blur, so there is no search for the place. Pictures are averaged down to a side of 32..63 pixels first: speed
and thresholds are the same at every resolution.

Legend: s side of the picture, h w patch around one component.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from lexel.data.captions import Claim, satisfies
from lexel.data.scene import (
    COLORS,
    DISTANCES,
    PALETTE,
    RADIUS,
    SHAPES,
    UNKNOWN,
    Array,
    Rgb,
    SceneObject,
    pixel_centers,
    shape_moments,
)

Mask = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int64]

_WORKING_SIDE = 32
# In pixels of a side of 32, besides no blur.
_BLURS = (0.6, 1.1)
# Share of the object's own contrast at which a pixel belongs to it, and the least contrast of an object.
_COVERED, _LEAST_CONTRAST = 0.45, 0.16
# Junk below this many covered pixels (of a side of 32) is ignored; an object covers at least 15.
_LEAST_AREA = 4.0
_SIZE_BORDER = math.sqrt(RADIUS["small"] * RADIUS["large"])
_RADIUS_RANGE = (0.085, 0.25)
# A match is refused above this residual energy, relative to the template's,
_WORST_RESIDUAL = 0.07
# and where another shape explains almost the same share of it.
_LEAST_LEAD = 0.004
_MOST_NOISE = 0.08
_WORST_COLOR = 0.30
# Pixels around a component that still belong to it.
_MARGIN = 2
_RADIUS_STEPS = np.array([0.8, 0.87, 0.93, 1.0, 1.06], np.float32)


@dataclass(frozen=True)
class _Match:
    """A shape fitted to a coverage map: its template ``[h, w]`` and the share of the energy it explains."""

    shape: str
    center: tuple[float, float]
    radius: float
    template: Array
    explained: float


def check(pixels: Tensor) -> list[SceneObject]:
    """The objects in a picture, float ``[3, s, s]`` in about [-1, 1], s >= 32, in no particular order.

    What stands out from the background but is no known shape or colour comes back with `shape` (or `color`)
    "unknown", so that it counts as an object too many. Raises ValueError on another shape of tensor.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.shape[1] != pixels.shape[2]:
        raise ValueError(f"check reads one square picture [3, s, s], got {tuple(pixels.shape)}.")
    if pixels.shape[1] < _WORKING_SIDE:
        raise ValueError(f"check reads pictures of side 32 or more, got {pixels.shape[1]}.")
    # Everything is finite, but matrix products of a few columns also compute on what lies behind them, and
    # numpy reports what that did to the processor's flags.
    with np.errstate(invalid="ignore"):
        return _read(_to_working_array(pixels))


def _read(picture: Array) -> list[SceneObject]:
    background = _background(picture)
    difference = picture - background
    labels = _grow(_components(_foreground(difference, background)), _MARGIN)
    noise = _noise_energy(picture)
    return [
        _read_object(difference, labels == number, background, noise)
        for number in np.unique(labels)
        if number
    ]


def picture_shows(pixels: Tensor, claim: Claim) -> bool:
    """Whether a picture, float ``[3, s, s]`` in about [-1, 1], shows all that the claim names."""
    return satisfies(claim, check(pixels))


def _to_working_array(pixels: Tensor) -> Array:
    """float32 ``[s, s, 3]`` in [0, 1] with s reduced to 32..63 by averaging whole blocks."""
    picture = pixels.detach().float().cpu().clamp(-1, 1)
    picture = picture.nan_to_num(0.0)
    factor = picture.shape[-1] // _WORKING_SIDE
    if picture.shape[-1] % _WORKING_SIDE and factor > 1:
        picture = F.interpolate(picture[None], size=_WORKING_SIDE * 3 // 2, mode="area")[0]
    elif factor > 1:
        picture = F.avg_pool2d(picture[None], factor)[0]
    return np.asarray(picture.permute(1, 2, 0).numpy() / 2 + np.float32(0.5), np.float32)


def _background(picture: Array) -> Array:
    """The most common colour, by mean shift from the median of the border; ``[3]``."""
    border = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3),
                             picture[:, :2].reshape(-1, 3), picture[:, -2:].reshape(-1, 3)])  # fmt: skip
    color, everything = np.median(border, axis=0), picture.reshape(-1, 3)
    for _ in range(3):
        near = ((everything - color) ** 2).sum(-1) < 0.15**2
        if not near.any():
            break
        color = everything[near].mean(0)
    return np.asarray(color, np.float32)


@lru_cache
def _palette() -> Array:
    return np.array([PALETTE[name] for name in COLORS], np.float32)


def _foreground(difference: Array, background: Array) -> Mask:
    """Pixels that stand out by half of the contrast that the palette colour in their direction has."""
    axes = _palette() - background
    contrast = np.linalg.norm(axes, axis=-1)
    direction = (difference @ (axes / contrast[:, None]).T).argmax(-1)
    return np.linalg.norm(difference, axis=-1) > np.maximum(_LEAST_CONTRAST, _COVERED * contrast[direction])


def _spread(labels: Labels) -> Labels:
    """Every pixel's largest label among itself and its four neighbours."""
    wide = np.pad(labels, 1)
    return np.maximum.reduce([labels, wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]])


def _components(mask: Mask) -> Labels:
    """A positive number per connected component (four neighbours), 0 elsewhere and where it is a speck."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = np.where(mask, _spread(labels), 0)
        if (spread == labels).all():
            break
        labels = spread
    numbers, areas = np.unique(labels, return_counts=True)
    specks = numbers[areas < _LEAST_AREA * (len(mask) / _WORKING_SIDE) ** 2]
    return np.where(np.isin(labels, specks), 0, labels)


def _grow(labels: Labels, steps: int) -> Labels:
    """The components, each with the free pixels up to `steps` around it."""
    for _ in range(steps):
        labels = np.where(labels > 0, labels, _spread(labels))
    return labels


def _noise_energy(picture: Array) -> float:
    """Expected squared distance between a pixel and itself without noise, from second differences along rows,
    whose median is blind to outlines; limited, so that pure noise is not excused."""
    second = picture[:, :-2] - 2 * picture[:, 1:-1] + picture[:, 2:]
    deviation = float(np.median(np.abs(second))) / (0.6745 * np.sqrt(6))
    return 3 * min(deviation, _MOST_NOISE) ** 2


def _read_object(difference: Array, mask: Mask, background: Array, noise: float) -> SceneObject:
    """The object that owns the pixels of `mask`: best match, then colour by least squares under the match."""
    side = len(mask)
    rows, columns = _bounds(mask, 0), _bounds(mask, 1)
    patch = difference[rows, columns] * mask[rows, columns, None]
    found = _coverage(patch, rows, columns, side)
    matches = sorted((_match(shape, found) for shape in SHAPES), key=lambda match: -match.explained)
    match, lead = matches[0], matches[0].explained - matches[1].explained
    energy = float((match.template**2).sum()) + 1e-6
    contrast = einsum(match.template, patch, "h w, h w c -> c") / energy
    unexplained = ((patch - match.template[..., None] * contrast) ** 2).sum() - noise * mask.sum()
    residual = float(unexplained / (energy * (contrast**2).sum() + 1e-6))
    red, green, blue = np.clip(background + contrast, 0, 1).tolist()
    rgb = (red, green, blue)
    size = "small" if match.radius < _SIZE_BORDER else "large"
    thing = SceneObject.of(match.shape, _name_color(rgb), size, match.center, match.radius, rgb)
    in_range = _RADIUS_RANGE[0] < match.radius < _RADIUS_RANGE[1]
    known = residual < _WORST_RESIDUAL and lead > _LEAST_LEAD and in_range
    return thing if known else replace(thing, shape=UNKNOWN)


def _bounds(mask: Mask, axis: int) -> slice:
    places = np.nonzero(mask)[axis]
    return slice(int(places.min()), int(places.max()) + 1)


def _name_color(rgb: Rgb) -> str:
    """Nearest palette colour, brightness counting half since blur moves it most; "unknown" when far."""
    apart = _palette() - np.asarray(rgb, np.float32)
    gray = apart.mean(-1, keepdims=True)
    distance = np.linalg.norm(apart - gray / 2, axis=-1)
    nearest = int(distance.argmin())
    return COLORS[nearest] if distance[nearest] < _WORST_COLOR else UNKNOWN


@lru_cache
def _blurs(length: int, unit: float) -> Array:
    """Gaussian blurs along one side as matrices ``[blur, length, length]``; unit: their scale in pixels."""
    apart = np.subtract.outer(np.arange(length), np.arange(length)) ** 2
    sigmas = np.array(_BLURS)[:, None, None] * unit
    weights = np.exp(-apart / (2 * sigmas**2)) / (sigmas * math.sqrt(2 * math.pi))
    return np.concatenate([np.eye(length)[None], weights]).astype(np.float32)


@dataclass(frozen=True)
class _Coverage:
    """How much of each pixel an object covers, ``[h, w]``, at unit coordinates x ``[w]`` and y ``[h]``."""

    amount: Array
    x: Array
    y: Array
    side: int

    @property
    def area(self) -> float:
        """In pixels, at least 1."""
        return max(1.0, float(self.amount.sum()))

    @property
    def centroid(self) -> tuple[float, float]:
        return float((self.amount @ self.x).sum()) / self.area, float(
            (self.y @ self.amount).sum()
        ) / self.area


def _coverage(patch: Array, rows: slice, columns: slice, side: int) -> _Coverage:
    """Coverage of the patch ``[h, w, 3]`` along the mean direction of its strongest pixels."""
    strength = np.linalg.norm(patch, axis=-1)
    core = patch[strength >= 0.7 * np.quantile(strength, 0.95)].mean(0)
    # Not cut at 0 and 1, or noise would no longer average out.
    amount = np.clip(patch @ core / ((core**2).sum() + 1e-6), -0.3, 1.3)
    return _Coverage(amount, pixel_centers(side)[columns], pixel_centers(side)[rows], side)


def _match(shape: str, found: _Coverage) -> _Match:
    """The radius and blur at which a shape, its centroid on the coverage's, explains most of the coverage."""
    moments, (x, y) = shape_moments(shape), found.centroid
    radii = (math.sqrt(found.area / moments.area) / found.side * _RADIUS_STEPS)[:, None, None]
    distance = DISTANCES[shape](
        *np.broadcast_arrays(
            (found.x - np.float32(x)) / radii + np.float32(moments.centroid[0]),
            (found.y[:, None] - np.float32(y)) / radii + np.float32(moments.centroid[1]),
        )
    )
    sharp = np.clip(np.float32(0.5) - distance * radii * found.side, 0, 1)
    unit = found.side / _WORKING_SIDE
    down, across = _blurs(len(found.y), unit), _blurs(len(found.x), unit)
    soft = down[:, None] @ sharp[None] @ across[:, None]
    energy = (soft**2).sum((-2, -1)) * (found.amount**2).sum() + np.float32(1e-6)
    explained = (soft * found.amount).sum((-2, -1)) ** 2 / energy
    blur, step = np.unravel_index(int(explained.argmax()), explained.shape)
    radius = float(radii[step, 0, 0])
    center = (x - radius * moments.centroid[0], y - radius * moments.centroid[1])
    return _Match(shape, center, radius, soft[blur, step], float(explained[blur, step]))
