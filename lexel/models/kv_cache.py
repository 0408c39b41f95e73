"""Preallocated keys and values, every row with its own length; rows come and go.

n layers · b rows · g key/value heads · t slots · e head width · q new tokens per row
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lexel.errors import LexelError


class KVCache:
    """Keys and values of what each row has read so far, for inference (no gradients flow through it).

    Row r's tokens fill slots ``0 .. lengths[r] - 1``; what lies beyond is left over or zero and must be
    masked. A forward writes q new tokens of every row at its own end (`append`, once per layer) and then
    lengthens every row by q (`advance`). Undoing is `crop`; after verifying a tree, `gather`
    closes the gaps between the accepted tokens.

    Lengths live on the host: no step of decoding waits for the device to read them.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (layers, batch, kv_heads, max_length, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self._lengths = [0] * batch
        self._slots: Tensor | None = None
        self._places: Tensor | None = None

    @property
    def batch(self) -> int:
        """Number of rows in use; there may be room for more."""
        return len(self._lengths)

    @property
    def max_length(self) -> int:
        """Slots of each row."""
        return self.keys.shape[3]

    @property
    def lengths(self) -> Tensor:
        """Long ``[b]`` on the cache's device: tokens held by each row."""
        return torch.tensor(self._lengths, device=self.keys.device)

    @property
    def host_lengths(self) -> tuple[int, ...]:
        """The same lengths as Python numbers."""
        return tuple(self._lengths)

    @property
    def uniform(self) -> bool:
        """True when all rows have the same length."""
        return len(set(self._lengths)) <= 1

    def span(self, new: int) -> int:
        """Slots that a forward of `new` tokens per row looks at: the longest row's length after it.
        Raises LexelError when the cache does not hold that many."""
        needed = max(self._lengths, default=0) + new
        if needed > self.max_length:
            raise LexelError(
                f"the cache holds {self.max_length} positions, asked for {needed}; "
                f"build it with max_length={needed}."
            )
        return needed

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[b, g, q, e]`` at the end of each row and return views ``[b, g, span(q), e]``.
        Lengths change only in `advance`, after the last layer. Raises LexelError when full."""
        new, batch = keys.shape[2], self.batch
        span = self.span(new)
        here = self.keys[layer], self.values[layer]
        for store, value in zip(here, (keys, values)):
            if self.uniform:
                store[:batch, :, span - new : span] = value
            else:
                # Of all ways to scatter a few short rows, this is the quickest.
                flat = value.to(store.dtype).reshape(-1, value.shape[3])
                store.view(-1, store.shape[3]).index_copy_(0, self._new_places(new), flat)
        return here[0][:batch, :, :span], here[1][:batch, :, :span]

    def _new_slots(self, new: int) -> Tensor:
        """Long ``[b, new]``: where the next tokens of each row go; kept until lengths change."""
        if self._slots is None or self._slots.shape[1] != new:
            self._slots = self.lengths[:, None] + torch.arange(new, device=self.keys.device)
        return self._slots

    def _new_places(self, new: int) -> Tensor:
        """Long ``[b · g · new]``: the same as places in a layer's store seen as ``[rows · g · t, e]``."""
        slots = self._new_slots(new)
        if self._places is None or len(self._places) != self.batch * self.keys.shape[2] * new:
            heads, slots_each = self.keys.shape[2:4]
            head = torch.arange(self.batch * heads, device=slots.device).reshape(self.batch, heads, 1)
            self._places = (head * slots_each + slots[:, None]).flatten()
        return self._places

    def visible(self, new: int) -> Tensor | None:
        """Bool ``[b or 1, new, span(new)]``: each new token sees its row's tokens, itself and the new ones
        before it. None when it sees every slot (one new token, rows of equal length)."""
        span = self.span(new)
        if self.uniform and new == 1:
            return None
        slots = torch.arange(span, device=self.keys.device)
        if self.uniform:
            return (slots <= slots[span - new :, None])[None]
        return slots <= self._new_slots(new)[:, :, None]

    def advance(self, new: int) -> None:
        """Count `new` appended tokens into every row."""
        self._set([length + new for length in self._lengths])

    def crop(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Forget the end of rows: an int caps every row; one length per row (list or ``[b]``) sets each.
        Raises ValueError when a row would grow or a length is negative."""
        if isinstance(lengths, int):
            target = [min(lengths, have) for have in self._lengths]
        else:
            target = [int(x) for x in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        if len(target) != self.batch or any(not 0 <= t <= h for t, h in zip(target, self._lengths)):
            raise ValueError(
                f"cannot crop rows of {self._lengths} to {target}: one length per row, none longer than now."
            )
        self._set(target)

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes the old row ``rows[i]`` (long ``[b']``): repeats copy, absent rows are dropped."""
        rows = rows.to(self.keys.device)
        self.keys, self.values = (store.index_select(1, rows) for store in (self.keys, self.values))
        self._set([self._lengths[row] for row in rows.tolist()])

    def join(self, other: KVCache) -> None:
        """Append the rows of another cache of the same model, making room (twice as much) where needed."""
        first, used = self.batch, max(other._lengths, default=0)
        self._reserve(first + other.batch, used)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, first : first + other.batch, :, :used] = theirs[:, : other.batch, :, :used]
        self._set(self._lengths + other._lengths)

    def drop(self, row: int) -> None:
        """Forget a row; the last one takes its place, so the cost is that of copying one row."""
        last, used = self.batch - 1, self._lengths[-1]
        if row != last:
            for store in (self.keys, self.values):
                store[:, row, :, :used] = store[:, last, :, :used]
            self._lengths[row] = used
        self._set(self._lengths[:-1])

    def _reserve(self, rows: int, slots: int) -> None:
        have = self.keys.shape
        if rows <= have[1] and slots <= have[3]:
            return
        shape = list(have)
        shape[1] = have[1] if rows <= have[1] else max(rows, 2 * have[1])
        shape[3] = max(slots, have[3])
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(shape)
            new[:, : have[1], :, : have[3]] = old
            setattr(self, name, new)

    def reserve(self, slots: int) -> None:
        """Make every row hold at least so many tokens."""
        self._reserve(self.batch, slots)

    def gather(self, row: int, start: int, path: Sequence[int]) -> None:
        """Move the tokens in slots ``start + path[i]`` of a row together, to ``start + i``: the accepted
        branch of a verified tree. Lengths stay; `crop` follows. Raises ValueError when the path does not
        ascend, or leaves the row."""
        have = self._lengths[row]
        if any(a >= b for a, b in pairwise([-1, *path, have - start])):
            raise ValueError(f"path {list(path)} from slot {start} leaves a row of {have} tokens.")
        slots = start + torch.tensor(path, dtype=torch.long, device=self.keys.device)
        for store in (self.keys, self.values):
            store[:, row, :, start : start + len(path)] = store[:, row].index_select(2, slots)

    def _set(self, lengths: list[int]) -> None:
        self._lengths = lengths
        self._slots = self._places = None
