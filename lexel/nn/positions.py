"""Fixed position tables.

t frames · h w grid · d width
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def sincos(dim: int, h: int, w: int) -> Tensor:
    """``[1, dim, h, w]``: sine and cosine of one coordinate, then of the other. The published table (MoCo v3
    as 4M and FlexTok write it) numbers its cells column by column and is then read row by row: on a square
    grid the first is the row, on any other neither coordinate is a row or column."""
    first, second = torch.meshgrid(torch.arange(w).float(), torch.arange(h).float(), indexing="ij")
    omega = 1 / 10000 ** (torch.arange(dim // 4).float() / (dim // 4))
    angles = [torch.outer(axis.reshape(-1), omega) for axis in (first, second)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
    return rearrange(table, "(h w) d -> 1 d h w", h=h, w=w)


BASE = 10000.0


def line_positions(width: int, count: int, base: float = BASE) -> Tensor:
    """LARP's positions of a line, float ``[count, width]``: sines, then cosines (computed in float64).
    Raises ValueError for an odd width."""
    if width % 2:
        raise ValueError(f"sine and cosine positions need an even width, got {width}.")
    rates = base ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.outer(torch.arange(count, dtype=torch.float64), rates)
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def clip_positions(width: int, frames: int, side: int) -> Tensor:
    """LARP's positions of a clip, float ``[t*h*w, d]`` of a square grid, time first: half of the width for
    the column, half for the row (in this order), plus all of it for the frame."""
    half = line_positions(width // 2, side)
    columns, rows = half.expand(side, side, -1), half[:, None].expand(side, side, -1)
    cells = torch.cat([columns, rows], 2)
    times = line_positions(width, frames)[:, None, None]
    return rearrange(times + cells, "t h w d -> (t h w) d")
