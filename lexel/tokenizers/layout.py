"""How a grid (or a line, or a pyramid) of codes becomes one sequence, and back.

A layout is the product of an *order* of positions (raster, 1D fixed or flexible, multi-scale) and a
*pattern* of the k codebooks at each position, as in audiocraft's `Pattern`:

* parallel: one step per position, k columns;
* interleaved: k steps per position, one column;
* delayed: k columns, codebook j shifted j steps to the right (MusicGen, arXiv 2306.05284);
* sequential: one column, all codes of the first codebook, then all of the second … (the content and timbre
  streams of MIO's speech, arXiv 2409.17692).

The language model never knows: it sees steps and columns. Laws: ``unflatten(flatten(c)) == c``.

b batch · n positions · k codebooks · t steps · c columns
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from lexel.types import Codes

EMPTY = -1
PATTERNS = ("parallel", "interleaved", "delayed", "sequential")


@dataclass(frozen=True)
class CodeLayout:
    """Order and pattern of a tokenizer's codes.

    codebook_sizes: codes per codebook. Exactly one of `grid` (raster, row-major), `length` (1D) and
    `scales` (multi-scale, coarse first) says how many positions there are. `flexible`: a 1D sequence may
    end after any position. `row_end`: each raster row is followed by an end-of-row token (Emu3); that
    token belongs to the vocabulary, so the grammar writes it, not `flatten`.
    Raises ValueError on contradictions.
    """

    codebook_sizes: tuple[int, ...]
    grid: tuple[int, int] | None = None
    length: int | None = None
    flexible: bool = False
    scales: tuple[tuple[int, int], ...] | None = None
    pattern: Literal["parallel", "interleaved", "delayed", "sequential"] = "parallel"
    row_end: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("grid", "length", "scales") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a CodeLayout needs exactly one of grid, length, scales; got {given or 'none'}."
            )
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes must be positive, got {self.codebook_sizes}.")
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {self.pattern!r}.")
        if self.flexible and (self.length is None or (self.pattern == "delayed" and self.k > 1)):
            raise ValueError("a flexible layout is one-dimensional (length=…) and not delayed.")
        if self.row_end and (self.grid is None or (self.pattern in ("delayed", "sequential") and self.k > 1)):
            raise ValueError("row_end needs a raster grid, and codes in its order: no delay, no streams.")

    @property
    def k(self) -> int:
        """Codebooks per position."""
        return len(self.codebook_sizes)

    @cached_property
    def positions(self) -> int:
        """Code positions n (the maximum for flexible layouts)."""
        if self.grid is not None:
            return self.grid[0] * self.grid[1]
        return self.length if self.length is not None else sum(h * w for h, w in self.scales or ())

    @cached_property
    def lengths(self) -> Sequence[int]:
        """The numbers of positions that one picture may be coded in: any of a flexible layout, those that end
        a scale of a multi-scale one, else all positions."""
        if self.flexible:
            return range(1, self.positions + 1)
        if self.scales is not None:
            return tuple(accumulate(h * w for h, w in self.scales))
        return (self.positions,)

    @property
    def described_lengths(self) -> str:
        """`lengths` in words, to stand before "codes" or "tokens"."""
        if self.flexible:
            return f"1 to {self.positions}"
        *fewer, full = self.lengths
        return f"{', '.join(map(str, fewer))} or {full}" if fewer else f"always {full}"

    @property
    def streams(self) -> bool:
        """Whether several codebooks are written one after the other."""
        return self.pattern == "sequential" and self.k > 1

    @property
    def columns(self) -> int:
        """Codes per step of the flat sequence."""
        return 1 if self.pattern in ("interleaved", "sequential") else self.k

    @property
    def steps(self) -> int:
        """Length of the flat sequence (the maximum for flexible layouts). In a sequential one each stream has
        room for all positions; a shorter sound leaves steps out at the end of every stream."""
        if self.columns < self.k:
            return self.positions * self.k
        return self.positions + (self.k - 1 if self.pattern == "delayed" else 0)

    def steps_for(self, positions: int) -> int:
        """Flat steps taken by the first `positions` positions of a flexible sequence."""
        return positions * self.k if self.columns < self.k else positions

    def allowed(self, step: int) -> tuple[int | None, ...]:
        """The codebook expected in each column at `step`; None is an empty column (delay padding)."""
        self._check(step)
        if self.pattern == "interleaved":
            return (step % self.k,)
        if self.pattern == "sequential":
            return (step // self.positions,)
        if self.pattern == "parallel":
            return tuple(range(self.k))
        return tuple(j if 0 <= step - j < self.positions else None for j in range(self.k))

    def may_end(self, step: int) -> bool:
        """Whether the sequence may stop after `step` steps have been written."""
        if step == self.steps:
            return True
        if self.streams:  # where the first stream ends says how long the others are
            return False
        return self.flexible and step > 0 and (self.pattern != "interleaved" or step % self.k == 0)

    def coordinates(self, step: int) -> tuple[int, int]:
        """(row, column) of `step`, measured on the finest scale's grid; 1D layouts give (0, position).
        A delayed step has the coordinates of its first codebook, clipped to the last position."""
        self._check(step)
        position = step // self.k if self.pattern == "interleaved" else min(step, self.positions - 1)
        if self.pattern == "sequential":
            position = step % self.positions
        if self.grid is not None:
            return divmod(position, self.grid[1])
        if self.scales is None:
            return 0, position
        full_h, full_w = self.scales[-1]
        for h, w in self.scales:
            if position < h * w:
                row, column = divmod(position, w)
                return row * full_h // h, column * full_w // w
            position -= h * w
        raise AssertionError("unreachable: step was checked")

    def flatten(self, codes: Codes) -> Tensor:
        """Codes → long ``[b, t, c]``; EMPTY (-1) marks delay padding and positions beyond `lengths`.
        Raises ValueError when the codes do not belong to this layout."""
        indices = self._checked(codes)
        if codes.lengths is not None:
            beyond = torch.arange(indices.shape[1], device=indices.device) >= codes.lengths[:, None]
            indices = indices.masked_fill(beyond[..., None], EMPTY)
        if self.pattern == "interleaved":
            return rearrange(indices, "b n k -> b (n k) 1")
        if self.pattern == "sequential":
            return rearrange(indices, "b n k -> b (k n) 1")
        if self.pattern == "parallel" or self.k == 1:
            return indices
        flat = indices.new_full((indices.shape[0], self.steps, self.k), EMPTY)
        for j in range(self.k):
            flat[:, j : j + self.positions, j] = indices[:, :, j]
        return flat

    def unflatten(self, flat: Tensor) -> Codes:
        """Long ``[b, t, c]`` → Codes; the inverse of `flatten`. For flexible layouts t may be shorter than
        `steps` (sequential: streams of equal length without room between them) and rows may end early with
        EMPTY. Raises ValueError on any other missing code."""
        if flat.ndim != 3 or flat.shape[2] != self.columns:
            raise ValueError(f"flat codes must be [b, t, {self.columns}], got {tuple(flat.shape)}.")
        if flat.shape[1] != self.steps and not (self.flexible and 0 < flat.shape[1] < self.steps):
            raise ValueError(f"{self.order} holds {self.steps} steps, got {flat.shape[1]}.")
        if self.columns < self.k or self.pattern == "sequential":
            if flat.shape[1] % self.k:
                raise ValueError(
                    f"{flat.shape[1]} {self.pattern} steps do not fill positions of {self.k} codes."
                )
            order = "b (n k) 1 -> b n k" if self.pattern == "interleaved" else "b (k n) 1 -> b n k"
            indices = rearrange(flat, order, k=self.k)
        elif self.pattern == "delayed" and self.k > 1:
            indices = torch.stack([flat[:, j : j + self.positions, j] for j in range(self.k)], dim=2)
        else:
            indices = flat
        lengths = None
        if self.flexible:
            written = (indices != EMPTY).all(dim=2)
            lengths = written.long().cumprod(dim=1).sum(dim=1)
            padding = self.positions - indices.shape[1]
            indices = torch.nn.functional.pad(indices, (0, 0, 0, padding), value=EMPTY)
            inside = torch.arange(self.positions, device=flat.device) < lengths[:, None]
            if bool((indices.ne(EMPTY).any(dim=2) & ~inside).any()):
                raise ValueError("flat codes continue after an empty step; codes must be a prefix.")
            indices = indices.masked_fill(~inside[..., None], 0)
        self._check_range(indices)
        return Codes(indices, self.grid, self.scales, lengths)

    def padded(self, codes: Codes) -> Codes:
        """Codes of fewer positions (a sound's) as codes of this flexible layout: as long, with `lengths`.
        Raises ValueError for more positions than it has, or fewer where it is not flexible."""
        n = codes.indices.shape[1]
        if n > self.positions or (n < self.positions and not self.flexible):
            raise ValueError(f"{n} positions of codes do not fit {self.order}.")
        lengths = codes.lengths
        if lengths is None and self.flexible:
            lengths = torch.full((len(codes),), n, device=codes.indices.device)
        padding = (0, 0, 0, self.positions - n)
        return Codes(torch.nn.functional.pad(codes.indices, padding), self.grid, self.scales, lengths)

    @property
    def order(self) -> str:
        """A short description of the positions for messages."""
        if self.grid is not None:
            return f"a {self.grid[0]}x{self.grid[1]} raster of {self.k} codebook(s)"
        return f"a line of {self.length}" if self.length is not None else f"scales {self.scales}"

    def _checked(self, codes: Codes) -> Tensor:
        if codes.indices.shape[1:] != (self.positions, self.k):
            raise ValueError(
                f"{self.order} needs codes [b, {self.positions}, {self.k}], got {tuple(codes.indices.shape)}."
            )
        if codes.lengths is not None and not self.flexible:
            raise ValueError(f"{self.order} is not flexible, but the codes have lengths.")
        if codes.lengths is None:
            self._check_range(codes.indices)
        return codes.indices

    def _check_range(self, indices: Tensor) -> None:
        sizes = torch.tensor(self.codebook_sizes, device=indices.device)
        if bool(((indices < 0) | (indices >= sizes)).any()):
            raise ValueError(
                f"codes must lie below {self.codebook_sizes}, got {int(indices.min())}..{int(indices.max())}."
            )

    def _check(self, step: int) -> None:
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is outside {self.order} of {self.steps} steps.")
