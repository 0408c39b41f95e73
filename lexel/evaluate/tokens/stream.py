"""Token sequences of many items (pictures, captions), the orders to read a picture in, and their n-grams.

N items · n positions · g length of an n-gram · h w grid
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

SCANS = ("row", "column", "snake", "hilbert", "z-order")


@dataclass(frozen=True)
class TokenStream:
    """ids: ``[N, n]``; used: ``[N, n]``, False where an item has no token (padding, dropped positions).
    vocabulary: ids lie in 0..vocabulary - 1. grids: ``(h, w)`` of the raster grids that follow each other in
    the n positions (one for a picture, several for a multi-scale tokenizer, none for 1D codes and text).
    Raises ValueError when these disagree."""

    ids: Ids
    used: Mask
    vocabulary: int
    grids: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.used.shape:
            raise ValueError(
                f"ids and used must be [items, positions], got {self.ids.shape} and {self.used.shape}."
            )
        if self.grids and sum(h * w for h, w in self.grids) != self.ids.shape[1]:
            raise ValueError(f"the grids {self.grids} do not hold {self.ids.shape[1]} positions.")
        seen = self.ids[self.used]
        if len(seen) and (seen.min() < 0 or seen.max() >= self.vocabulary):
            raise ValueError(
                f"token ids must lie in 0..{self.vocabulary - 1}, got {seen.min()}..{seen.max()}."
            )

    @classmethod
    def of(cls, items: Sequence[Sequence[int] | Ids], vocabulary: int) -> TokenStream:
        """Sequences of any lengths."""
        longest = max((len(item) for item in items), default=0)
        ids = np.zeros((len(items), longest), np.int64)
        used = np.zeros((len(items), longest), bool)
        for row, item in enumerate(items):
            ids[row, : len(item)] = item
            used[row, : len(item)] = True
        return cls(ids, used, vocabulary)

    @property
    def tokens(self) -> int:
        """How many there are in all."""
        return int(self.used.sum())

    @property
    def flat(self) -> Ids:
        """All tokens, item after item, ``[tokens]``."""
        return self.ids[self.used]

    @property
    def counts(self) -> Ids:
        """How often each token occurs, ``[vocabulary]``; of a large vocabulary first take the `dense`
        stream."""
        return np.bincount(self.flat, minlength=self.vocabulary)

    def dense(self) -> TokenStream:
        """The same with the tokens that occur renumbered from 0 on, in their order: a vocabulary of them."""
        numbers = _numbered(self.flat)
        ids = np.zeros_like(self.ids)
        ids[self.used] = numbers
        return replace(self, ids=ids, vocabulary=max(1, int(numbers.max(initial=0)) + 1))

    def items(self) -> list[Ids]:
        """The tokens of each item."""
        return [row[used] for row, used in zip(self.ids, self.used)]

    def rows(self, chosen: slice | Ids) -> TokenStream:
        """Some of the items."""
        return replace(self, ids=self.ids[chosen], used=self.used[chosen])

    def first(self, tokens: int) -> TokenStream:
        """The first items, the last one cut, so that at most `tokens` tokens are left."""
        running = np.cumsum(self.used.reshape(-1)).reshape(self.used.shape)
        used = self.used & (running <= tokens)
        kept = int(used.any(1).sum())
        return replace(self, ids=self.ids[:kept], used=used[:kept])

    def read(self, scan: str) -> TokenStream:
        """The same tokens in another reading order (see `scan_order`), each grid by itself. ValueError for
        a stream without grids, where there is one order only."""
        if not self.grids:
            raise ValueError("only tokens on a grid can be read in another order.")
        order, start = [], 0
        for h, w in self.grids:
            order.append(start + scan_order(h, w, scan))
            start += h * w
        positions = np.concatenate(order)
        return TokenStream(self.ids[:, positions], self.used[:, positions], self.vocabulary)

    def packed(self) -> TokenStream:
        """Each item's tokens moved to the front: neighbours in reading order are next to each other."""
        front = np.argsort(~self.used, axis=1, kind="stable")
        moved = np.take_along_axis(self.ids, front, 1), np.take_along_axis(self.used, front, 1)
        return TokenStream(*moved, self.vocabulary)


def scan_order(h: int, w: int, scan: str) -> Ids:
    """Row-major numbers of an h × w grid's cells in reading order, ``[h * w]``: "row", "column", "snake"
    (every other row backwards), "hilbert" (curve of the smallest power-of-two square that covers the grid,
    other cells left out) or "z-order" (bits of row and column interleaved). ValueError for another name."""
    row, column = np.divmod(np.arange(h * w), w)
    if scan == "row":
        return np.arange(h * w)
    if scan == "column":
        return np.lexsort((row, column))
    if scan == "snake":
        return np.lexsort((np.where(row % 2, -column, column), row))
    bits = max(1, (max(h, w) - 1).bit_length())
    if scan == "z-order":
        return np.argsort(_interleave(row, column, bits))
    if scan == "hilbert":
        return np.argsort(_hilbert_distance(row, column, bits))
    raise ValueError(f"a scan is one of {', '.join(SCANS)}, got {scan!r}.")


def _interleave(row: Ids, column: Ids, bits: int) -> Ids:
    place = np.zeros_like(row)
    for bit in range(bits):
        place |= ((column >> bit) & 1) << (2 * bit) | ((row >> bit) & 1) << (2 * bit + 1)
    return place


def _hilbert_distance(row: Ids, column: Ids, bits: int) -> Ids:
    """How far along the curve each cell lies (the usual quadrant-by-quadrant algorithm)."""
    x, y, distance = column.copy(), row.copy(), np.zeros_like(row)
    for level in range(bits - 1, -1, -1):
        side = 1 << level
        right, down = (x & side) > 0, (y & side) > 0
        distance += side * side * ((3 * right) ^ down)
        flip = ~down & right
        x, y = np.where(flip, side - 1 - x, x), np.where(flip, side - 1 - y, y)
        x, y = np.where(down, x, y), np.where(down, y, x)
        x, y = x & (side - 1), y & (side - 1)
    return distance


def ngrams(stream: TokenStream, g: int) -> Ids:
    """The number of each n-gram of g tokens in a row within an item, ``[grams]``: equal n-grams have equal
    numbers, from 0 on without gaps. Nothing reaches over a dropped token's place: items are `packed`."""
    packed = stream.packed()
    ids, inside = packed.ids, packed.used
    grams = ids
    for step in range(1, g):
        grams = _numbered(grams[:, :-1] * stream.vocabulary + ids[:, step:])
        inside = inside[:, :-1] & packed.used[:, step:]
    return _numbered(grams[inside])


def blocks(stream: TokenStream) -> Ids:
    """The number of each 2 × 2 block of neighbouring cells, ``[blocks]``, as in `ngrams`; blocks overlap."""
    found, start = [], 0
    base = stream.vocabulary
    for h, w in stream.grids:
        cells = stream.ids[:, start : start + h * w].reshape(-1, h, w)
        there = stream.used[:, start : start + h * w].reshape(-1, h, w)
        start += h * w
        pairs = cells[:, :, :-1] * base + cells[:, :, 1:]
        both = there[:, :, :-1] & there[:, :, 1:]
        inside = both[:, :-1] & both[:, 1:]
        found.append(np.stack([pairs[:, :-1][inside], pairs[:, 1:][inside]], 1))
    whole = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
    numbers = _numbered(whole)
    return _numbered(numbers[:, 0] * (int(numbers.max(initial=0)) + 1) + numbers[:, 1])


def neighbours(stream: TokenStream, along: str) -> tuple[Ids, Ids]:
    """Pairs of tokens next to each other, ``[pairs]`` each: along "rows" (left, right), "columns" (above,
    below), or "sequence" (before, after)."""
    if along == "sequence":
        packed = stream.packed()
        both = packed.used[:, :-1] & packed.used[:, 1:]
        return packed.ids[:, :-1][both], packed.ids[:, 1:][both]
    firsts, seconds, start = [], [], 0
    for h, w in stream.grids:
        cells = stream.ids[:, start : start + h * w].reshape(-1, h, w)
        there = stream.used[:, start : start + h * w].reshape(-1, h, w)
        start += h * w
        if along == "columns":
            cells, there = cells.swapaxes(1, 2), there.swapaxes(1, 2)
        both = there[:, :, :-1] & there[:, :, 1:]
        firsts.append(cells[:, :, :-1][both])
        seconds.append(cells[:, :, 1:][both])
    return np.concatenate(firsts), np.concatenate(seconds)


def joined(columns: Iterable[Ids]) -> Ids:
    """A number for each combination of several codebooks' codes, from 0 on without gaps; columns of any one
    shape."""
    first, *others = columns
    whole = _numbered(first)
    for column in others:
        column = _numbered(column)
        whole = _numbered(whole * (int(column.max(initial=0)) + 1) + column)
    return whole


def _numbered(values: Ids) -> Ids:
    """Equal values get equal numbers, from 0 on without gaps, in the same shape."""
    return np.unique(values, return_inverse=True)[1].reshape(values.shape).astype(np.int64)
