"""Codes of several pictures as one batch, of one picture as a table, and of one that is not finished.

n code positions · k codebooks · t steps · c columns · h w picture or grid
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes


def concat_codes(parts: Sequence[Codes]) -> Codes:
    """Several batches of one tokenizer's codes as one batch. Raises ValueError when there are none."""
    if not parts:
        raise ValueError("there are no codes to put together.")

    def cat(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    indices = torch.cat([part.indices for part in parts])
    return Codes(indices, parts[0].grid, parts[0].scales, cat("lengths"), cat("keep"))


def code_map(codes: Codes) -> Tensor:
    """The codes of one picture as a table of numbers to look at: long ``[rows, columns]``, grids as they lie,
    lines folded to about a square, further codebooks below each other; -1 where nothing is used."""
    indices = codes.indices[0].clone()
    if codes.lengths is not None:
        indices[int(codes.lengths[0]) :] = -1
    n, _ = indices.shape
    columns = codes.grid[1] if codes.grid is not None else max(1, round(n**0.5))
    padded = F.pad(indices, (0, 0, 0, -n % columns), value=-1)
    return rearrange(padded, "(r c) k -> (k r) c", c=columns)


def known_positions(layout: CodeLayout, steps: int) -> int:
    """How many positions have all their codes after `steps` steps."""
    if layout.pattern == "interleaved":
        return steps // layout.k
    if layout.streams:
        return max(0, steps - (layout.k - 1) * layout.positions)
    return max(0, steps - (layout.k - 1)) if layout.pattern == "delayed" else steps


def codes_so_far(flat: Tensor, layout: CodeLayout) -> Codes | None:
    """The first steps ``[t, c]`` of a picture's flat codes as codes with `lengths`: the positions known. The
    others repeat the nearest known code: the one above in a grid, the last one in a line. None while no
    position is known."""
    known = known_positions(layout, len(flat))
    if known == 0:
        return None
    whole = layout.unflatten(F.pad(flat, (0, 0, 0, layout.steps - len(flat)))[None])
    indices = whole.indices[:, _nearest_known(layout, known)]
    return replace(whole, indices=indices, lengths=torch.tensor([known]))


def _nearest_known(layout: CodeLayout, known: int) -> Tensor:
    """For each position the known one that stands for it, long ``[n]``."""
    at = torch.arange(layout.positions)
    if layout.grid is None or known < layout.grid[1]:
        return at.clamp(max=known - 1)
    width = layout.grid[1]
    last_row = (known - 1 - at % width) // width
    return torch.where(at < known, at, last_row * width + at % width)


def known_pixels(codes: Codes, size: tuple[int, int]) -> Tensor:
    """Bool ``[b, 1, h, w]``: where a picture of `size` is drawn, by the `lengths` of codes on a grid; without
    one everywhere."""
    if codes.grid is None or codes.lengths is None:
        return torch.ones(len(codes), 1, *size, dtype=torch.bool)
    known = torch.arange(codes.indices.shape[1]) < codes.lengths.cpu()[:, None]
    cells = rearrange(known, "b (h w) -> b 1 h w", h=codes.grid[0])
    return F.interpolate(cells.float(), size=size, mode="nearest") > 0
