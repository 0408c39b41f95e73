"""Large pictures by overlapping tiles.

b batch · c channels · h w of a picture or latent grid
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Place = tuple[int, int]


def places(size: tuple[int, int], tile: tuple[int, int], overlap: int) -> list[Place]:
    """(top, left) of the tiles that cover a grid of `size`, neighbours sharing at least `overlap` cells, the
    last of a row or column flush with the edge. Raises ValueError when a tile is larger than the grid or does
    not exceed its overlap."""
    return [
        (top, left)
        for top in _starts(size[0], tile[0], overlap)
        for left in _starts(size[1], tile[1], overlap)
    ]


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    if tile > size:
        raise ValueError(f"a tile of {tile} cells does not fit a side of {size}.")
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap must lie in 0..{tile - 1} for tiles of {tile} cells, got {overlap}.")
    last = size - tile
    return [*range(0, last, tile - overlap), last]


def blend(pieces: Sequence[Tensor], found: Sequence[Place], size: tuple[int, int]) -> Tensor:
    """Tiles ``[b, c, h, w]`` at their (top, left) in a whole ``[b, c, *size]``; where they overlap, their
    mean weighted by the distance from the tile's edge, so that no tile ends abruptly. One tile is returned as
    it is."""
    if len(pieces) == 1:
        return pieces[0]
    b, c, h, w = pieces[0].shape
    weight = torch.outer(_hat(h, pieces[0]), _hat(w, pieces[0]))
    total = pieces[0].new_zeros(b, c, *size)
    weights = pieces[0].new_zeros(size)
    for piece, (top, left) in zip(pieces, found, strict=True):
        total[:, :, top : top + h, left : left + w] += weight * piece
        weights[top : top + h, left : left + w] += weight
    return total / weights


def _hat(length: int, like: Tensor) -> Tensor:
    """1, 2, … up to the middle and down again."""
    rising = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(rising, rising.flip(0))
