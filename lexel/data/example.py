"""One item of any picture or text source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """key: unique name inside its source; captions: texts that describe it, possibly none; pixels: float
    ``[3, h, w]`` in [-1, 1] (a clip ``[t, 3, h, w]``), None for text-only sources; truth: what a procedural
    source knows of the picture."""

    key: str
    captions: tuple[str, ...]
    pixels: Tensor | None
    truth: object | None = None


def stack_pixels(examples: Sequence[Example]) -> Tensor:
    """The pictures of a list of examples as one batch, float ``[b, 3, h, w]`` (clips ``[b, t, 3, h, w]``) in
    [-1, 1].

    Raises ValueError, naming the example, when one has no picture. Fits as a DataLoader's `collate_fn`.
    """
    pictures = []
    for example in examples:
        if example.pixels is None:
            raise ValueError(f"Example {example.key!r} has no picture; a picture source is needed here.")
        pictures.append(example.pixels)
    return torch.stack(pictures)


def stack_captioned(examples: Sequence[Example]) -> tuple[Tensor, list[str | None]]:
    """As `stack_pixels`, and the first caption of each example, None where it has none."""
    captions = [example.captions[0] if example.captions else None for example in examples]
    return stack_pixels(examples), captions
