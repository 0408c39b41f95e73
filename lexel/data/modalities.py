"""One scene in many modalities: views drawn as pictures, and structured values (boxes, palette, …).

A view is a picture ``[3, h, w]`` in [-1, 1] like any other, so every picture tokenizer trains on it:

    segmentation   the colour of each pixel says which shape it belongs to (`SEGMENT_COLORS`, black: none)
    edges          white outlines on black: Sobel gradients, thinned and cut at a threshold
    depth          grey: the lower an object stands in the picture, the nearer and brighter it is

The scenes are flat and their objects never overlap, so depth is a stated rule and not something seen: an
object's nearness is the bottom edge of its box, 0 (the top of the picture) to 1 (its bottom), and the
background lies at 0. That is how a floor looks from a standing height. `layers` tells the same as a list.

h w picture
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.data.example import Example
from lexel.data.scene import COLORS, PALETTE, SHAPES, Scene, SceneObject
from lexel.tokenizers.structured import (
    STRUCTURED,
    Box,
    BoxCodec,
    LayersCodec,
    MetadataCodec,
    PaletteCodec,
    StructuredCodec,
    palette_of,
    picture_metadata,
)

View = Literal["picture", "segmentation", "edges", "depth"]
VIEWS: tuple[str, ...] = get_args(View)

CLASSES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
"""What boxes and layers call objects."""

SEGMENT_COLORS = torch.tensor([(0.0, 0.0, 0.0), *PALETTE.values()])
"""Colour of class c of a segmentation, in [0, 1]: the background is class 0, shape i is class i + 1."""

EDGE_THRESHOLD = 0.2
"""Least gradient of an edge, where a step from 0 to 1 in one channel is 1."""

FIELDS = (
    "n_coco_instances",
    "coco_instance_diversity",
    "colorfulness",
    "brightness",
    "contrast",
    "saturation",
    "entropy",
)
"""Metadata of a scene that vary from one to the next."""


def render_view(scene: Scene, view: str, size: int) -> Tensor:
    """A view of a scene, float ``[3, size, size]`` in [-1, 1]. Raises ValueError for an unknown one."""
    if view == "picture":
        return scene.render(size)
    if view == "edges":
        return edges(scene.render(size))
    labels = scene.segmentation(size)
    if view == "segmentation":
        classes = torch.tensor([0, *(SHAPES.index(thing.shape) + 1 for thing in scene.objects)])
        return SEGMENT_COLORS[classes[labels]].permute(2, 0, 1) * 2 - 1
    if view == "depth":
        near = torch.tensor([0.0, *(nearness(thing) for thing in scene.objects)])
        return (near[labels] * 2 - 1).expand(3, -1, -1).contiguous()
    raise ValueError(f"a view is one of {', '.join(VIEWS)}, got {view!r}.")


def nearness(thing: SceneObject) -> float:
    """How near an object is, 0..1: the bottom edge of its box."""
    return min(1.0, max(0.0, thing.box[3]))


def edges(pixels: Tensor) -> Tensor:
    """The outlines of a picture ``[3, h, w]`` in [-1, 1], white (1) on black (-1), one pixel wide.

    Sobel gradients of each channel (border pixels repeated), of which the channel with the longest counts.
    A pixel is an edge where that is at least `EDGE_THRESHOLD` and not less than at its two neighbours along
    the axis nearer to the gradient's direction (of two equal neighbours the left or upper one)."""
    channels = F.pad((pixels[:, None] + 1) / 2, (1, 1, 1, 1), mode="replicate")
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    dx, dy = (F.conv2d(channels, kernel[None, None])[:, 0] for kernel in (across, across.T))
    length, channel = (dx.square() + dy.square()).sqrt().max(0)
    dx, dy = (d.gather(0, channel[None])[0].abs() for d in (dx, dy))
    wide = F.pad(length, (1, 1, 1, 1))
    left, right, above, below = wide[1:-1, :-2], wide[1:-1, 2:], wide[:-2, 1:-1], wide[2:, 1:-1]
    before, after = torch.where(dx >= dy, left, above), torch.where(dx >= dy, right, below)
    # Rounding may not decide between two equal neighbours.
    peak = (length > before + 1e-4) & (length >= after - 1e-4)
    found = peak & (length >= EDGE_THRESHOLD)
    return (found.float() * 2 - 1).expand(3, -1, -1).contiguous()


def read_segmentation(pixels: Tensor) -> Tensor:
    """The class of each pixel by the nearest colour, long ``[h, w]``; the inverse of the view."""
    colors = SEGMENT_COLORS * 2 - 1
    return (pixels[None] - colors[:, :, None, None]).square().sum(1).argmin(0)


def read_edges(pixels: Tensor) -> Tensor:
    """Where a picture of edges is white, bool ``[h, w]``."""
    return pixels.mean(0) > 0


def read_depth(pixels: Tensor) -> Tensor:
    """Nearness of each pixel, float ``[h, w]`` in [0, 1]."""
    return ((pixels.mean(0) + 1) / 2).clamp(0, 1)


def structured_codecs(bins: int = 1000, most: int = 3) -> dict[str, StructuredCodec]:
    """The structured modalities of the scenes, by name: boxes with coordinates in `bins` steps, palette,
    metadata and layers, for at most `most` objects."""
    return {
        "boxes": BoxCodec(CLASSES, bins, most),
        "palette": PaletteCodec(),
        "metadata": MetadataCodec(),
        "layers": LayersCodec(CLASSES, most),
    }


def structured_values(name: str, example: Example) -> Any:
    """What a structured modality says of a scene's example: a list of `Box`, of colours ``(r, g, b)`` in
    0..255 (the background and each colour name among the objects, most pixels first), of (field, value)
    pairs, or of class names from the nearest to the farthest.
    Raises ValueError for an example without a scene or pixels, and for an unknown name."""
    scene, pixels = example.truth, example.pixels
    if not isinstance(scene, Scene) or pixels is None:
        raise ValueError(f"example {example.key!r} has no scene to read {name} from.")
    if name == "boxes":
        return [Box(*thing.box, _class(thing)) for thing in scene.objects]
    if name == "palette":
        return palette_of(pixels, 1 + len({thing.color for thing in scene.objects}))
    if name == "metadata":
        return list(scene_metadata(scene, pixels).items())
    if name == "layers":
        return [_class(thing) for thing in sorted(scene.objects, key=nearness, reverse=True)]
    raise ValueError(f"a structured modality is one of {', '.join(STRUCTURED)}, got {name!r}.")


def scene_metadata(scene: Scene, pixels: Tensor) -> Mapping[str, float]:
    """The `FIELDS` of a scene: objects stand for COCO's instances, different shapes for its classes."""
    found = {
        "n_coco_instances": len(scene.objects),
        "coco_instance_diversity": len({thing.shape for thing in scene.objects}),
        **picture_metadata(pixels),
    }
    return {name: found[name] for name in FIELDS}


def _class(thing: SceneObject) -> str:
    return f"{thing.color} {thing.shape}"
