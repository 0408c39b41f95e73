"""JPEG and WebP at a budget of bytes, through Pillow: the best picture that any setting gives within it.

A codec may also scale the picture down first. `files` counts whole files. `bare` leaves out what a closed
system could agree on beforehand, as a tokenizer's weights are agreed on: of JPEG only the entropy-coded scan
counts (standard Huffman tables), of WebP all but container and frame header, plus two bytes that name quality
and scale.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lexel.data.images import to_image, to_pixels
from lexel.evaluate.metrics import psnr

QUALITIES = (0, 1, 3, 5, 8, 12, 17, 23, 30, 40, 50, 60, 70, 80, 90, 95)
SCALES = (1, 2, 4)
SMALLEST = 8  # pixels of a side after scaling down
NAMED = 2  # bytes for quality and scale
WEBP_HEADERS = 30  # RIFF 12, chunk 8, VP8 frame 10


@dataclass(frozen=True)
class Coded:
    """One way of coding a picture: bytes of the file, bytes without headers, PSNR, what is seen."""

    file: int
    bare: int
    psnr: float
    pixels: Tensor


def codings(picture: Tensor, kind: str) -> list[Coded]:
    """Every quality and scale of ``[3, h, w]``; kind: JPEG or WEBP."""
    original, found = to_image(picture), []
    height, width = picture.shape[1:]
    for scale in SCALES:
        size = (width // scale, height // scale)
        if min(size) < SMALLEST and scale > 1:
            continue
        small = original if scale == 1 else original.resize(size, Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            data = _encode(small, kind, quality)
            decoded = Image.open(io.BytesIO(data)).convert("RGB").resize((width, height), _UP)
            pixels = to_pixels(decoded, (height, width))
            bare = (scan_bytes(data) if kind == "JPEG" else len(data) - WEBP_HEADERS) + NAMED
            quality_db = float(psnr(pixels[None], picture[None])[0])
            found.append(Coded(len(data), bare, quality_db, pixels))
    return found


_UP = Image.Resampling.BICUBIC


def _encode(image: Image.Image, kind: str, quality: int) -> bytes:
    options: dict[str, Any] = {"method": 6} if kind == "WEBP" else {}
    stream = io.BytesIO()
    image.save(stream, kind, quality=max(quality, 1) if kind == "JPEG" else quality, **options)
    return stream.getvalue()


def scan_bytes(data: bytes) -> int:
    """Length of a baseline JPEG's entropy-coded data. ValueError when there is no scan."""
    place = 2
    while place + 4 <= len(data):
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        place += 2 + length
        if marker == 0xDA:
            return len(data) - place - 2
    raise ValueError("this is no baseline JPEG: it has no scan.")


def best(choices: Sequence[Coded], budget: int, bare: bool) -> Coded | None:
    """The highest PSNR within `budget` bytes, None when nothing is that small."""
    fitting = [c for c in choices if (c.bare if bare else c.file) <= budget]
    return max(fitting, key=lambda c: c.psnr, default=None)


def at_budgets(pictures: Tensor, kind: str, budgets: Sequence[int], bare: bool) -> list[dict[str, Any]]:
    """Per budget: `fits`, the share of pictures that some setting brings below it, and, where all fit, the
    mean `psnr` and `pixels` ``[m, 3, h, w]``, else None."""
    chosen: list[list[Coded | None]] = [[] for _ in budgets]
    for picture in pictures.cpu():
        choices = codings(picture, kind)
        for column, budget in zip(chosen, budgets):
            column.append(best(choices, budget, bare))
    rows = []
    for column in chosen:
        fitting = [c for c in column if c is not None]
        whole = len(fitting) == len(column)
        rows.append(
            {
                "fits": len(fitting) / len(column),
                "psnr": float(np.mean([c.psnr for c in fitting])) if whole else None,
                "pixels": torch.stack([c.pixels for c in fitting]) if whole else None,
            }
        )
    return rows
