"""`shapes`: the embedded default data, procedural captioned scenes of coloured shapes.

Every example is a pure function of (seed, split, index): no files, random access, any resolution.
Training and validation share no composition that matters:

- each colour and each shape takes part in one held-out (colour, shape) pair that only `prompts("unseen")` and
  `scenes("unseen")` show;
- a share of the unordered combinations of two seen pairs never stands together in a training picture;
  validation pictures of two or more objects always hold such a combination.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lexel.data.captions import (
    PLACES,
    RELATIONS,
    Claim,
    ObjectClaim,
    has_place,
    related,
    render_caption,
    satisfies,
)
from lexel.data.example import Example
from lexel.data.modalities import VIEWS, View, render_view
from lexel.data.scene import (
    BACKGROUNDS,
    COLORS,
    PALETTE,
    RADIUS,
    SHAPES,
    SIZES,
    TEXTURES,
    Background,
    Rgb,
    Scene,
    SceneObject,
    shape_moments,
)

Split = Literal["train", "validation"]
Kind = Literal["one", "two", "three", "unseen"]
Pair = tuple[str, str]

PAIRS: tuple[Pair, ...] = tuple((color, shape) for color in COLORS for shape in SHAPES)
# One pair per colour and per shape: a permutation that keeps the first prompts people type ("a blue square",
# "a red circle", "a yellow star") among the seen pairs.
UNSEEN_PAIRS: tuple[Pair, ...] = tuple((color, SHAPES[(3 * i + 4) % 8]) for i, color in enumerate(COLORS))
SEEN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)

# Quarters: at 32 pixels every cell lies alike on a 4-pixel (or 8-pixel) token grid, so that an object is
# written with the same codes wherever it stands.
_CENTERS = np.array([0.25, 0.5, 0.75])
_CENTER_JITTER = 0.06
_EDGE_MARGIN = 0.015
_GAP = 0.05
_RADIUS_JITTER = 0.06
_COLOR_JITTER = 0.035
_SHADE_JITTER = 0.03
_RELATION_MARGIN = 0.15
_HELDOUT_SHARE = 0.1
STREAMS = {"train": 0, "validation": 1, "one": 2, "two": 3, "three": 4, "unseen": 5}
_OBJECTS = {"one": 1, "two": 2, "three": 3, "unseen": 1}


@lru_cache
def heldout_combinations() -> frozenset[tuple[Pair, Pair]]:
    """Combinations of two seen (colour, shape) pairs kept out of training pictures, each in sorted order."""
    rng = np.random.Generator(np.random.Philox(20))
    everything = [(a, b) for a in SEEN_PAIRS for b in SEEN_PAIRS if a < b]
    chosen = rng.choice(len(everything), round(_HELDOUT_SHARE * len(everything)), replace=False)
    return frozenset(everything[i] for i in chosen)


def _holds_heldout(pairs: Sequence[Pair]) -> bool:
    return any((a, b) in heldout_combinations() for a in pairs for b in pairs if a < b)


@dataclass(frozen=True)
class ShapesConfig:
    """The procedural source.

    size: side of the pictures in pixels, 32..256. count: examples in the training split (the validation split
    has an eighth of it, at least 64). seed: of all randomness. max_objects: 1..3. object_weights: chances of
    1, 2, 3 objects. textured: share of textured backgrounds. backgrounds: shades to choose from.
    variation: how far places, radii, colours and shades wander from their nominal values, 0 (fixed) to 1.
    captions_per_picture: the first always names all objects with colour and shape. partial: share of the
    others that leave something out. view: what the pixels show, see `lexel.data.modalities`: the picture, or
    its segmentation, edges or depth.
    Raises ValueError when a value is out of range.
    """

    size: int = 32
    count: int = 20000
    seed: int = 0
    max_objects: int = 3
    object_weights: tuple[float, ...] = (0.4, 0.4, 0.2)
    textured: float = 0.2
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    variation: float = 1.0
    captions_per_picture: int = 4
    partial: float = 0.25
    view: View = "picture"

    def __post_init__(self) -> None:
        object.__setattr__(self, "object_weights", tuple(self.object_weights))
        object.__setattr__(self, "backgrounds", tuple(self.backgrounds))
        if not self.backgrounds or set(self.backgrounds) - set(BACKGROUNDS):
            raise ValueError(f"backgrounds are some of {', '.join(BACKGROUNDS)}, got {self.backgrounds}.")
        if not 32 <= self.size <= 256:
            raise ValueError(f"shapes are drawn at sizes 32..256, got {self.size}.")
        if self.view not in VIEWS:
            raise ValueError(f"view is one of {', '.join(VIEWS)}, got {self.view!r}.")
        if not 1 <= self.max_objects <= 3:
            raise ValueError(f"max_objects must be 1, 2 or 3, got {self.max_objects}.")
        weights = self.object_weights[: self.max_objects]
        if len(weights) < self.max_objects or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"object_weights needs {self.max_objects} chances >= 0, not all 0, got {weights}."
            )
        if self.count < 1 or self.captions_per_picture < 1:
            raise ValueError(
                "count and captions_per_picture must be at least 1, "
                f"got {self.count} and {self.captions_per_picture}."
            )
        for name in ("textured", "partial", "variation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}.")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        return (self.size, self.size)

    def build(self, split: Split) -> ShapesDataset:
        """The "train" or "validation" split. Raises ValueError for any other name."""
        return ShapesDataset(self, split)

    def scenes(self, kind: Kind, count: int, seed: int = 0) -> list[Example]:
        """Held-out examples to describe: "one" object of a seen pair, "two" or "three" in a held-out
        combination, or one object of an "unseen" pair. A pure function of (config, kind, count, seed)."""
        return [self._example(kind, seed, index) for index in range(count)]

    def prompts(self, kind: Kind, count: int, seed: int = 0) -> list[tuple[str, Claim]]:
        """Held-out captions to draw, with their claims; kinds as in `scenes`. Every object is named with
        colour and shape, and several objects always come with a relation."""
        prompts = []
        for index in range(count):
            rng = generator(self.seed, STREAMS[_known_kind(kind)], seed, index, 1)
            scene = self._scene(kind, seed, index)
            claim = full_claim(scene.objects, rng, relation=1.0)
            prompts.append((render_caption(claim, rng), claim))
        return prompts

    def _scene(self, kind: Kind, seed: int, index: int) -> Scene:
        rng = generator(self.seed, STREAMS[_known_kind(kind)], seed, index)
        pairs = _draw_pairs(rng, _OBJECTS[kind], "unseen" if kind == "unseen" else "validation")
        return draw_scene(rng, pairs, self)

    def _example(self, kind: Kind, seed: int, index: int) -> Example:
        scene = self._scene(kind, seed, index)
        rng = generator(self.seed, STREAMS[kind], seed, index, 1)
        return Example(
            f"shapes-{kind}-{seed}-{index}", self._captions(scene, rng), self._pixels(scene), scene
        )

    def _pixels(self, scene: Scene) -> Tensor:
        return render_view(scene, self.view, self.size)

    def _captions(self, scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
        claims = [full_claim(scene.objects, rng)]
        while len(claims) < self.captions_per_picture:
            partial = rng.random() < self.partial
            claims.append(partial_claim(scene.objects, rng) if partial else full_claim(scene.objects, rng))
        return tuple(render_caption(claim, rng) for claim in claims)


class ShapesDataset(Dataset[Example]):
    """Map-style split of `ShapesConfig`; `scene(i)` and `captions(i)` skip what is not asked for."""

    def __init__(self, config: ShapesConfig, split: Split) -> None:
        if split not in get_args(Split):
            raise ValueError(f'Split must be "train" or "validation", got {split!r}.')
        self.config, self.split = config, split

    def __len__(self) -> int:
        return self.config.count if self.split == "train" else max(64, self.config.count // 8)

    def _index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Index {index} of a split with {len(self)} examples.")
        return index % len(self)

    def scene(self, index: int) -> Scene:
        """Objects and background of an example."""
        rng = generator(self.config.seed, STREAMS[self.split], self._index(index))
        weights = np.array(self.config.object_weights[: self.config.max_objects])
        objects = 1 + int(rng.choice(len(weights), p=weights / weights.sum()))
        return draw_scene(rng, _draw_pairs(rng, objects, self.split), self.config)

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions of an example, without drawing its picture."""
        return self._captions(index, self.scene(index))

    def _captions(self, index: int, scene: Scene) -> tuple[str, ...]:
        rng = generator(self.config.seed, STREAMS[self.split], self._index(index), 1)
        return self.config._captions(scene, rng)

    def __getitem__(self, index: int) -> Example:
        index, scene = self._index(index), self.scene(index)
        key = f"shapes-{self.split}-{self.config.seed}-{index}"
        return Example(key, self._captions(index, scene), self.config._pixels(scene), scene)


def _known_kind(kind: str) -> str:
    if kind not in get_args(Kind):
        raise ValueError(f"Kind must be one of {', '.join(get_args(Kind))}, got {kind!r}.")
    return kind


def generator(*entropy: int) -> np.random.Generator:
    """The generator of these numbers: (seed, stream, index, what is drawn)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def _draw_pairs(rng: np.random.Generator, count: int, pool: str) -> list[Pair]:
    """`count` different (colour, shape) pairs: no held-out combination in "train", at least one in
    "validation"; "unseen" and "any" draw from the held-out pairs and from all of them."""
    source = {"unseen": UNSEEN_PAIRS, "any": PAIRS}.get(pool, SEEN_PAIRS)
    while True:
        pairs = [source[i] for i in rng.integers(len(source), size=count)]
        if len(set(pairs)) < count:
            continue
        if pool in ("unseen", "any") or count == 1 or _holds_heldout(pairs) == (pool == "validation"):
            return pairs


def draw_scene(rng: np.random.Generator, pairs: Sequence[Pair], config: ShapesConfig) -> Scene:
    """A scene of the given (colour, shape) pairs with random sizes, places and background.

    Objects keep a gap to each other and to the picture's edge, and lie well inside a cell of the 3x3 grid.
    """
    sizes, radii, centers = _arrange(rng, pairs, config)
    objects = []
    for (color, shape), size, radius, (x, y) in zip(pairs, sizes, radii, centers):
        rgb = _jitter(rng, PALETTE[color], config.variation * _COLOR_JITTER)
        objects.append(SceneObject.of(shape, color, size, (float(x), float(y)), float(radius), rgb))
    # Reading order by cell, so that a list of objects has one canonical order.
    objects.sort(key=lambda thing: (round(thing.center[1] / 0.25), thing.center[0]))
    return Scene(tuple(objects), _draw_background(rng, config))


def _arrange(
    rng: np.random.Generator, pairs: Sequence[Pair], config: ShapesConfig
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Size names, radii ``[n]`` and centres ``[n, 2]`` such that boxes or surrounding circles keep the gap.
    Objects too large to stand apart get other sizes."""
    moments = [shape_moments(shape) for _, shape in pairs]
    jitter = config.variation * _CENTER_JITTER
    first, second = np.triu_indices(len(pairs), 1)
    while True:
        sizes = [SIZES[i] for i in rng.integers(len(SIZES), size=len(pairs))]
        radii = np.array([RADIUS[size] for size in sizes])
        radii *= 1 + config.variation * rng.uniform(-_RADIUS_JITTER, _RADIUS_JITTER, len(pairs))
        reach = radii * np.array([moment.reach for moment in moments])
        boxes = radii[:, None] * np.array([moment.box for moment in moments])
        cells = _CENTERS[rng.integers(3, size=(16, len(pairs), 2))]
        centers = np.clip(
            cells + rng.uniform(-jitter, jitter, cells.shape),
            _EDGE_MARGIN - boxes[:, :2],
            1 - _EDGE_MARGIN - boxes[:, 2:],
        )
        between = centers[:, second] - centers[:, first]
        rounds_apart = np.linalg.norm(between, axis=-1) - reach[first] - reach[second]
        ahead = between + boxes[second, :2] - boxes[first, 2:]
        behind = boxes[first, :2] - boxes[second, 2:] - between
        boxes_apart = np.maximum(ahead, behind).max(-1)
        free = (np.maximum(rounds_apart, boxes_apart) > _GAP).all(1)
        if free.any():
            return sizes, radii, centers[free.argmax()]


def _jitter(rng: np.random.Generator, rgb: Rgb, amount: float) -> Rgb:
    red, green, blue = np.clip(np.array(rgb) + rng.uniform(-amount, amount, 3), 0, 1).tolist()
    return (red, green, blue)


def _draw_background(rng: np.random.Generator, config: ShapesConfig) -> Background:
    shade = config.backgrounds[int(rng.integers(len(config.backgrounds)))]
    lift = config.variation * rng.uniform(-_SHADE_JITTER, _SHADE_JITTER)
    red, green, blue = (min(1.0, channel + lift) for channel in BACKGROUNDS[shade])
    rgb = _jitter(rng, (red, green, blue), config.variation * 0.01)
    if rng.random() >= config.textured:
        return Background(shade, rgb)
    return Background(
        shade,
        rgb,
        TEXTURES[int(rng.integers(len(TEXTURES)))],
        strength=float(rng.uniform(0.02, 0.05)),
        direction=float(rng.uniform(0, math.pi)),
        frequency=float(rng.uniform(2, 4)),
        phase=float(rng.uniform(0, 2 * math.pi)),
    )


def _claim_object(
    thing: SceneObject, rng: np.random.Generator, place: float, size: float = 0.3
) -> ObjectClaim:
    """An object with colour and shape, with chance `size` its size, with chance `place` one of its places."""
    where = None
    if rng.random() < place:
        true = [name for name in PLACES if has_place(thing, name)]
        where = true[int(rng.integers(len(true)))]
    return ObjectClaim(thing.shape, thing.color, thing.size if rng.random() < size else None, where)


def full_claim(objects: Sequence[SceneObject], rng: np.random.Generator, relation: float = 0.6) -> Claim:
    """A claim that names every object with colour and shape, some sizes, and either places or, with chance
    `relation` where there are two objects or more, a relation of two that holds with a margin."""
    things = list(objects)
    if len(things) == 1:
        return Claim((_claim_object(things[0], rng, place=0.4),))
    if rng.random() >= relation:
        place = 1.0 if rng.random() < 0.3 else 0.0
        return Claim(tuple(_claim_object(thing, rng, place) for thing in things))
    options = [
        (first, second, name)
        for first in things
        for second in things
        for name in RELATIONS
        if first is not second and related(first, second, name, _RELATION_MARGIN)
    ]
    first, second, name = options[int(rng.integers(len(options)))]
    others = [thing for thing in things if thing is not first and thing is not second]
    # Mentioned first or last: "X left of Y", or "Y with X to its left".
    forward = rng.random() < 0.6
    mentioned = [first, second, *others] if forward else [second, first, *others]
    named = tuple(_claim_object(thing, rng, place=0.0) for thing in mentioned)
    return Claim(named, (0, 1, name) if forward else (1, 0, name))


def partial_claim(objects: Sequence[SceneObject], rng: np.random.Generator) -> Claim:
    """A true claim that is silent about something: the colour or the shape of one object, or, where there are
    several objects, all but one of them."""
    if len(objects) > 1 and rng.random() < 0.3:
        thing = objects[int(rng.integers(len(objects)))]
        return Claim((_claim_object(thing, rng, place=0.3),), None, exact_count=False)
    claim = full_claim(objects, rng)
    named = list(claim.objects)
    silent = int(rng.integers(len(named)))
    named[silent] = named[silent]._replace(**{"shape" if rng.random() < 0.5 else "color": None})
    return Claim(tuple(named), claim.relation, claim.exact_count)


@lru_cache
def chance_accuracy(kind: Kind) -> float:
    """Chance that a random scene with the right number of objects shows a random prompt of this kind, and so
    that a random caption fits a random scene. Every (colour, shape) pair is equally likely in the scenes,
    the unseen ones too. Monte Carlo over 400 prompts x 400 scenes with a fixed seed."""
    config = ShapesConfig()
    claims = [claim for _, claim in config.prompts(kind, 400, seed=1)]
    rng = generator(STREAMS[kind], 2)
    scenes = [draw_scene(rng, _draw_pairs(rng, _OBJECTS[kind], "any"), config).objects for _ in range(400)]
    shown = sum(satisfies(claim, objects) for claim in claims for objects in scenes)
    return shown / (len(claims) * len(scenes))
