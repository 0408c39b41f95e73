"""Structured values as codes: boxes, colour palettes, metadata and layer orders.

The codecs of 4M (arXiv 2312.06647) and 4M-21 (arXiv 2406.09406; apple/ml-4m, Apache-2.0), which write such
values as text (``v0=12 v1=40 v2=300 v3=410 cat``). Here every value of an item has a codebook of its own and
an item is one position of an interleaved, flexible line: a grammar then lets a model write whole items only,
so whatever is sampled decodes. 4M's text is there too, both ways (`to_string`, `from_string`).

There is nothing to learn: a codec is a frozen dataclass with the `layout`, `encode`, `decode` and
`fingerprint` of a tokenizer, over lists of values instead of pixels.

b batch · n items at most · k values per item
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes

Rgb = tuple[int, int, int]
MOST_COLORS = 7


class Box(NamedTuple):
    """A box with corners in unit coordinates, (0, 0) the top left of the picture, and what is in it."""

    x0: float
    y0: float
    x1: float
    y1: float
    name: str


class StructuredCodec(ABC):
    """Lists of values ↔ codes. Law: ``decode(encode(v))`` is v up to the stated rounding, and
    ``encode(decode(c)) == c`` for the codes of `encode`."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each of an item's k values."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Items at most."""

    @abstractmethod
    def item_codes(self, values: Any) -> list[tuple[int, ...]]:
        """The k codes of every item of one list of values, in the order they are written."""

    @abstractmethod
    def value(self, codes: Sequence[int]) -> Any:
        """The item that k codes stand for."""

    @cached_property
    def layout(self) -> CodeLayout:
        """One position per item, its values one after the other; any number of items."""
        return CodeLayout(self.codebook_sizes, length=self.length, flexible=True, pattern="interleaved")

    def encode(self, values: Sequence[Any]) -> Codes:
        """A batch of lists of values → Codes ``[b, n, k]`` with `lengths`. Raises ValueError for an empty
        list, too many items, and values that the codec does not know."""
        rows = [self.item_codes(value) for value in values]
        for row in rows:
            if not 1 <= len(row) <= self.length:
                raise ValueError(f"{self.kind} holds 1 to {self.length} items, got {len(row)}.")
        empty = (0,) * len(self.codebook_sizes)
        padded = [[*row, *[empty] * (self.length - len(row))] for row in rows]
        return Codes(torch.tensor(padded), lengths=torch.tensor([len(row) for row in rows]))

    def decode(self, codes: Codes) -> list[Any]:
        """Codes → a list of values per row."""
        lengths = [self.length] * len(codes) if codes.lengths is None else codes.lengths.tolist()
        rows = codes.indices.tolist()
        return [[self.value(item) for item in row[:length]] for row, length in zip(rows, lengths)]

    def fingerprint(self) -> str:
        """16 hex digits: equal exactly when kind and settings are."""
        text = json.dumps([self.kind, asdict(self)], sort_keys=True)  # type: ignore[call-overload]
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class BoxCodec(StructuredCodec):
    """Boxes: ``x0 y0 x1 y1 class`` each, a coordinate c as ``round(c * (bins - 1))``, so that it comes back
    within ``1 / (2 * (bins - 1))``. Written by the distance of the (rounded) top left corner to the origin,
    4M's default. classes: the names there are; most: boxes at most. Raises ValueError for fewer than 2 bins
    or no class."""

    kind: ClassVar[str] = "boxes"
    classes: tuple[str, ...] = ()
    bins: int = 1000
    most: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.bins < 2 or not self.classes:
            raise ValueError(f"boxes need classes and at least 2 bins, got {self.classes}, {self.bins}.")

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (*(self.bins,) * 4, len(self.classes))

    @property
    def length(self) -> int:
        return self.most

    def item_codes(self, values: Sequence[Box]) -> list[tuple[int, ...]]:
        """See `StructuredCodec.item_codes`; coordinates outside the picture are moved to its edge."""
        items = [(*map(self._bin, box[:4]), _index(self.classes, box[4], "class")) for box in values]
        return sorted(items, key=lambda item: item[0] ** 2 + item[1] ** 2)

    def _bin(self, coordinate: float) -> int:
        return round(min(1.0, max(0.0, coordinate)) * (self.bins - 1))

    def value(self, codes: Sequence[int]) -> Box:
        """See `StructuredCodec.value`."""
        x0, y0, x1, y1 = (code / (self.bins - 1) for code in codes[:4])
        return Box(x0, y0, x1, y1, self.classes[codes[4]])

    def to_string(self, values: Sequence[Box]) -> str:
        """4M's text of boxes."""
        items = self.item_codes(values)
        return " ".join(
            " ".join([*(f"v{j}={code}" for j, code in enumerate(item[:4])), self.classes[item[4]]])
            for item in items
        )

    def from_string(self, text: str) -> list[Box]:
        """Boxes of 4M's text. Raises ValueError where the text is something else."""
        item = r"v0=(\d+) v1=(\d+) v2=(\d+) v3=(\d+) ((?:(?!v0=).)+)"
        found = _whole(item, text)
        return [
            self.value(
                [*(_below(self.bins, x) for x in row[:4]), _index(self.classes, row[4].strip(), "class")]
            )
            for row in found
        ]


@dataclass(frozen=True)
class PaletteCodec(StructuredCodec):
    """A colour palette of 1 to 7 colours ``(r, g, b)`` in 0..255, rounded; whole numbers come back as they
    are. (4M writes the number of colours first; here the end of the line says it.)"""

    kind: ClassVar[str] = "palette"

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (256, 256, 256)

    @property
    def length(self) -> int:
        return MOST_COLORS

    def item_codes(self, values: Sequence[Sequence[float]]) -> list[tuple[int, ...]]:
        """See `StructuredCodec.item_codes`."""
        return [tuple(min(255, max(0, round(channel))) for channel in color) for color in values]

    def value(self, codes: Sequence[int]) -> Rgb:
        """See `StructuredCodec.value`."""
        red, green, blue = codes
        return red, green, blue

    def to_string(self, values: Sequence[Sequence[float]]) -> str:
        """4M's text of a palette: ``v1=<colours>``, then three ``v0=`` per colour."""
        items = self.item_codes(values)
        return " ".join([f"v1={len(items)}", *(f"v0={channel}" for item in items for channel in item)])

    def from_string(self, text: str) -> list[Rgb]:
        """The palette of 4M's text. Raises ValueError where the text is something else."""
        head, _, rest = text.strip().partition(" ")
        found = [
            self.value([_below(256, x) for x in row]) for row in _whole(r"v0=(\d+) v0=(\d+) v0=(\d+)", rest)
        ]
        if head != f"v1={len(found)}":
            raise ValueError(f"the palette begins with {head!r} but holds {len(found)} colours.")
        return found


@dataclass(frozen=True)
class Field:
    """How one metadatum becomes a bin: whole numbers divided by `unit` and kept within 0..999; with `range`
    50 bins, ``int((x - low) / (high - low) * 49)``; with `bounds` the number of bounds not above it."""

    unit: int = 1
    range: tuple[float, float] | None = None
    bounds: tuple[float, ...] = ()

    def bin(self, value: float) -> int:
        """The bin of a value; values out of range count as the nearest end."""
        if self.bounds:
            return bisect.bisect_right(self.bounds, value)
        if self.range is None:
            return max(0, min(int(value) // self.unit, _BINS - 1))
        low, high = self.range
        return int((max(low, min(value, high)) - low) / (high - low) * (_FLOAT_BINS - 1))

    def value(self, bin: int) -> float:
        """A value of a bin: the lowest of whole numbers, else one from its middle."""
        if self.bounds:
            edges = (2 * self.bounds[0] - self.bounds[-1] - 0.5, *self.bounds)
            edges += (2 * self.bounds[-1] - self.bounds[0] + 0.5,)
            bin = min(bin, len(self.bounds))
            return (edges[bin] + edges[bin + 1]) / 2
        if self.range is None:
            return bin * self.unit
        low, high = self.range
        return min(high, low + (bin + 0.5) / (_FLOAT_BINS - 1) * (high - low))


_BINS, _FLOAT_BINS = 1000, 50
FIELDS: Mapping[str, Field] = {
    "original_width": Field(unit=32),
    "original_height": Field(unit=32),
    "caption_n_chars": Field(),
    "caption_n_words": Field(),
    "caption_n_sentences": Field(),
    "n_humans": Field(),
    "n_sam_instances": Field(),
    "n_coco_instances": Field(),
    "coco_instance_diversity": Field(),
    "colorfulness": Field(range=(0, 150)),
    "brightness": Field(range=(0, 255)),
    "contrast": Field(range=(0, 127)),
    "saturation": Field(range=(0, 255)),
    "entropy": Field(range=(0, 10)),
    "walkability": Field(range=(0, 1)),
    "objectness": Field(range=(0, 1)),
    "semantic_diversity": Field(),
    "geometric_complexity": Field(range=(0, 0.75)),
    "occlusion_score": Field(range=(0, 0.25)),
    "watermark_score": Field(bounds=(0.5,)),
    "aesthetic_score": Field(bounds=(4.5, 5.5)),
}
"""4M-21's metadata, in the order of their ids."""
_NAMES = tuple(FIELDS)


@dataclass(frozen=True)
class MetadataCodec(StructuredCodec):
    """Metadata: pairs (name of one of `FIELDS`, value), in the order given (4M shuffles them). What comes
    back is a value of the same bin."""

    kind: ClassVar[str] = "metadata"

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (len(FIELDS), _BINS)

    @property
    def length(self) -> int:
        return len(FIELDS)

    def item_codes(self, values: Sequence[tuple[str, float]]) -> list[tuple[int, ...]]:
        """See `StructuredCodec.item_codes`."""
        return [(_index(_NAMES, name, "metadata field"), FIELDS[name].bin(value)) for name, value in values]

    def value(self, codes: Sequence[int]) -> tuple[str, float]:
        """See `StructuredCodec.value`."""
        name = _NAMES[codes[0]]
        return name, FIELDS[name].value(codes[1])

    def to_string(self, values: Sequence[tuple[str, float]]) -> str:
        """4M's text of metadata: ``v1=<field id> v0=<bin>`` pairs."""
        return " ".join(f"v1={field} v0={bin}" for field, bin in self.item_codes(values))

    def from_string(self, text: str) -> list[tuple[str, float]]:
        """The metadata of 4M's text. Raises ValueError where the text is something else."""
        found = _whole(r"v1=(\d+) v0=(\d+)", text)
        return [self.value([_below(len(FIELDS), field), _below(_BINS, bin)]) for field, bin in found]


@dataclass(frozen=True)
class LayersCodec(StructuredCodec):
    """What lies in front of what: class names from the nearest to the farthest. classes: the names there
    are; most: layers at most. (Not one of 4M's.)"""

    kind: ClassVar[str] = "layers"
    classes: tuple[str, ...] = ()
    most: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if not self.classes:
            raise ValueError("layers need classes, got none.")

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return (len(self.classes),)

    @property
    def length(self) -> int:
        return self.most

    def item_codes(self, values: Sequence[str]) -> list[tuple[int, ...]]:
        """See `StructuredCodec.item_codes`."""
        return [(_index(self.classes, name, "class"),) for name in values]

    def value(self, codes: Sequence[int]) -> str:
        """See `StructuredCodec.value`."""
        return self.classes[codes[0]]


STRUCTURED: dict[str, type[StructuredCodec]] = {
    codec.kind: codec for codec in (BoxCodec, PaletteCodec, MetadataCodec, LayersCodec)
}
"""Codecs by kind; a model's modality is called like the kind of its codec."""


# What can be computed from a picture or a caption


def palette_of(pixels: Tensor, colors: int) -> list[Rgb]:
    """The `colors` most telling colours of a picture ``[3, h, w]`` in [-1, 1], most pixels first: k-means,
    begun at the median colour and then each time at the pixel farthest from those chosen, so nothing is
    random. A picture with fewer different colours gives fewer. Raises ValueError outside 1..7."""
    if not 1 <= colors <= MOST_COLORS:
        raise ValueError(f"a palette has 1 to {MOST_COLORS} colours, got {colors}.")
    points = (_rgb(pixels) * 255).reshape(-1, 3)
    centers = [points[((points - np.median(points, 0)) ** 2).sum(1).argmin()]]
    while len(centers) < colors:
        distance = ((points[:, None] - np.array(centers)) ** 2).sum(2).min(1)
        if distance.max() < 1:
            break
        centers.append(points[distance.argmax()])
    chosen = np.array(centers)
    for _ in range(20):
        owner = ((points[:, None] - chosen) ** 2).sum(2).argmin(1)
        moved = np.array(
            [points[owner == j].mean(0) if (owner == j).any() else chosen[j] for j in range(len(chosen))]
        )
        if np.abs(moved - chosen).max() < 1e-3:
            break
        chosen = moved
    order = np.argsort(-np.bincount(owner, minlength=len(chosen)), kind="stable")
    return [(int(r), int(g), int(b)) for r, g, b in chosen[order].round()]


def picture_metadata(pixels: Tensor) -> dict[str, float]:
    """The metadata of a picture ``[3, h, w]`` in [-1, 1] that its pixels tell: sizes; colourfulness (Hasler
    and Süsstrunk 2003); brightness and contrast, mean and deviation of grey (Rec. 601); mean HSV saturation;
    entropy of the 256-step grey histogram in bits. All on the 0..255 scale but sizes and entropy."""
    rgb = _rgb(pixels) * 255
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    rg, yb = red - green, (red + green) / 2 - blue
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    high, low = rgb.max(-1), rgb.min(-1)
    saturation = np.where(high > 0, (high - low) / np.maximum(high, 1e-9), 0) * 255
    share = np.bincount(gray.round().astype(int).ravel(), minlength=256) / gray.size
    used = share[share > 0]
    return {
        "original_width": pixels.shape[2],
        "original_height": pixels.shape[1],
        "colorfulness": float(math.hypot(rg.std(), yb.std()) + 0.3 * math.hypot(rg.mean(), yb.mean())),
        "brightness": float(gray.mean()),
        "contrast": float(gray.std()),
        "saturation": float(saturation.mean()),
        "entropy": float(-(used * np.log2(used)).sum()) + 0.0,
    }


def caption_metadata(text: str) -> dict[str, float]:
    """Characters, words and sentences of a caption (a text without a full stop is one sentence)."""
    sentences = [part for part in re.split(r"[.!?]+", text) if part.strip()]
    return {
        "caption_n_chars": len(text),
        "caption_n_words": len(text.split()),
        "caption_n_sentences": len(sentences),
    }


def _rgb(pixels: Tensor) -> np.ndarray:
    """float64 ``[h, w, 3]`` in [0, 1]."""
    return (pixels.detach().cpu().double().clamp(-1, 1).permute(1, 2, 0).numpy() + 1) / 2


def _index(names: Sequence[str], name: str, what: str) -> int:
    if name not in names:
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise ValueError(f"there is no {what} {name!r}; there are {len(names)}: {shown}.")
    return names.index(name)


def _below(limit: int, text: str) -> int:
    value = int(text)
    if value >= limit:
        raise ValueError(f"the codes of this value are 0 to {limit - 1}, got {value}.")
    return value


def _whole(item: str, text: str) -> list[tuple[str, ...]]:
    """The groups of every `item` of a text that is nothing but items, blanks between them."""
    text = " ".join(text.split())
    if re.fullmatch(rf"(?:{item} ?)+", text) is None:
        raise ValueError(f"{text[:60]!r} is not text of this kind.")
    return re.findall(item, text)
