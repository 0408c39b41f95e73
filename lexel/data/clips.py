"""`clips`: short clips of moving shapes, drawn like the scenes of `shapes`.

Every example is a pure function of (seed, split, index). A clip is a scene of `shapes` (with the same split
of combinations) whose objects move at a constant speed, each in one of eight directions, and bounce off the
picture's edge. Objects pass in front of each other.

t frames · h w picture
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lexel.data.example import Example
from lexel.data.scene import Scene, SceneObject
from lexel.data.shapes import STREAMS, ShapesConfig, ShapesDataset, Split, generator

DIRECTIONS = (
    "right", "down and right", "down", "down and left", "left", "up and left", "up", "up and right",
)  # fmt: skip
"""In the order of their angles, every 45 degrees, clockwise."""


@dataclass(frozen=True)
class ClipsConfig:
    """The procedural source of clips.

    size, count, seed, max_objects, textured, backgrounds, variation: as in `ShapesConfig`. frames: t. speed:
    the slowest and the fastest, as a share of the picture's side per frame.
    Raises ValueError when a value is out of range.
    """

    size: int = 32
    frames: int = 8
    count: int = 20000
    seed: int = 0
    max_objects: int = 2
    speed: tuple[float, float] = (0.02, 0.06)
    textured: float = 0.0
    backgrounds: tuple[str, ...] = ("light", "dark")
    variation: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "speed", tuple(self.speed))
        object.__setattr__(self, "backgrounds", tuple(self.backgrounds))
        if self.frames < 1:
            raise ValueError(f"a clip has at least one frame, got frames={self.frames}.")
        if len(self.speed) != 2 or not 0 <= self.speed[0] <= self.speed[1] <= 0.5:
            raise ValueError(f"speed is the slowest and the fastest, within 0..0.5, got {self.speed}.")
        _ = self.scenes_of  # the other options are checked there

    @property
    def scenes_of(self) -> ShapesConfig:
        """The source of the first frames."""
        return ShapesConfig(
            size=self.size,
            count=self.count,
            seed=self.seed,
            max_objects=self.max_objects,
            textured=self.textured,
            backgrounds=self.backgrounds,
            variation=self.variation,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the frames."""
        return (self.size, self.size)

    def build(self, split: Split) -> ClipsDataset:
        """The "train" or "validation" split. Raises ValueError for any other name."""
        return ClipsDataset(self, split)


@dataclass(frozen=True)
class Motion:
    """One object's: a name of `DIRECTIONS` (at first; it bounces), and the way per frame (x, y)."""

    direction: str
    velocity: tuple[float, float]


@dataclass(frozen=True)
class MovingScene:
    """A scene at the first frame, and how each of its objects moves."""

    scene: Scene
    motions: tuple[Motion, ...]

    def at(self, frame: int) -> Scene:
        """The scene at a frame, from 0 on."""
        pairs = zip(self.scene.objects, self.motions, strict=True)
        return Scene(tuple(_moved(thing, motion, frame) for thing, motion in pairs), self.scene.background)

    def render(self, frames: int, size: int) -> Tensor:
        """Float ``[t, 3, size, size]`` in [-1, 1]."""
        return torch.stack([self.at(frame).render(size) for frame in range(frames)])

    def caption(self) -> str:
        """Such as "a red circle moving right and a blue star moving up"."""
        parts = []
        for thing, motion in zip(self.scene.objects, self.motions, strict=True):
            article = "an" if thing.color[0] in "aeiou" else "a"
            parts.append(f"{article} {thing.color} {thing.shape} moving {motion.direction}")
        return " and ".join(parts)


class ClipsDataset(Dataset[Example]):
    """Map-style split of `ClipsConfig`; `truth` of an example is its `MovingScene`."""

    def __init__(self, config: ClipsConfig, split: Split) -> None:
        self.config, self.split = config, split
        self._scenes = ShapesDataset(config.scenes_of, split)

    def __len__(self) -> int:
        return len(self._scenes)

    def moving(self, index: int) -> MovingScene:
        """What happens in an example."""
        scene = self._scenes.scene(index)
        rng = generator(self.config.seed, STREAMS[self.split], index % len(self), 2)
        return MovingScene(scene, tuple(_draw_motion(rng, self.config.speed) for _ in scene.objects))

    def __getitem__(self, index: int) -> Example:
        moving = self.moving(index)
        key = f"clips-{self.split}-{self.config.seed}-{index % len(self)}"
        pixels = moving.render(self.config.frames, self.config.size)
        return Example(key, (moving.caption(),), pixels, moving)


def _draw_motion(rng: np.random.Generator, speed: tuple[float, float]) -> Motion:
    number = int(rng.integers(len(DIRECTIONS)))
    fast, angle = float(rng.uniform(*speed)), math.tau * number / len(DIRECTIONS)
    return Motion(DIRECTIONS[number], (fast * math.cos(angle), fast * math.sin(angle)))


def _moved(thing: SceneObject, motion: Motion, frame: int) -> SceneObject:
    """The object after `frame` frames; its box stays inside the picture."""
    (x, y), (x0, y0, x1, y1) = thing.center, thing.box
    # The centre runs between these bounds, so that the box touches the edge at either end.
    left, top, right, bottom = x - x0, y - y0, 1 - (x1 - x), 1 - (y1 - y)
    center = (
        _bounced(x + frame * motion.velocity[0], left, right),
        _bounced(y + frame * motion.velocity[1], top, bottom),
    )
    return SceneObject.of(thing.shape, thing.color, thing.size, center, thing.radius, thing.rgb)


def _bounced(value: float, low: float, high: float) -> float:
    """A straight way folded back into [low, high] at both ends."""
    span = high - low
    place = (value - low) % (2 * span)
    return low + (place if place <= span else 2 * span - place)
