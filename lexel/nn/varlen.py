"""Attention within the documents of packed rows, without the pairs that a mask would only throw away.

r rows · l row length · m documents · n longest document · h heads · g key/value heads · e head width
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class Documents:
    """Where the documents of packed rows lie: causal attention inside each.

    owner: long ``[r, l]``, a number per document, -1 for padding; a document's positions are contiguous. Of a
    row of 1,024 tokens with ten documents a dense mask computes 1,024² scores of which a tenth count.
    Padding gives zeros.
    """

    def __init__(self, owner: Tensor) -> None:
        row, column = (owner >= 0).nonzero(as_tuple=True)
        number = owner[row, column]
        starts = torch.ones_like(number, dtype=torch.bool)
        starts[1:] = (number[1:] != number[:-1]) | (row[1:] != row[:-1])
        self.shape = owner.shape
        self.flat = row * owner.shape[1] + column
        """Long [t]: places of the tokens among all positions."""
        first = starts.nonzero()[:, 0]
        self.bounds = F.pad(first, (0, 1), value=len(number)).int()
        """Int [m + 1]: where each document begins in `flat`, and where the last one ends."""

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.bounds.diff().max()) if len(self.bounds) > 1 else 0

    @cached_property
    def _grid(self) -> tuple[Tensor, Tensor]:
        """Long ``[m, n]``: of each document's tokens, padded with its last one, the places in `flat`; and of
        each token in `flat` its place in that grid."""
        lengths = self.bounds.diff().long()
        steps = torch.arange(self.longest, device=lengths.device)
        inside = self.bounds[:-1, None] + steps.minimum(lengths[:, None] - 1)
        return self.flat[inside], (steps < lengths[:, None]).flatten().nonzero()[:, 0]

    @torch.compiler.disable  # how many documents there are differs from batch to batch
    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """``q [r, h, l, e]`` and ``k, v [r, g, l, e]`` → ``[r, h, l, e]``."""
        if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
            return self._varlen(q, k, v, scale)
        return self._regrouped(q, k, v, scale)

    def _regrouped(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Every document as a row of its own, padded to the longest: causal attention never looks ahead to
        the padding."""
        grid, back = self._grid

        def apart(x: Tensor) -> Tensor:
            return rearrange(rearrange(x, "r h l e -> (r l) h e")[grid], "m n h e -> m h n e")

        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            apart(q), apart(k), apart(v), is_causal=True, scale=scale, enable_gqa=grouped
        )
        return self._together(rearrange(out, "m h n e -> (m n) h e")[back], q)

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """torch's kernel for sequences of different lengths."""
        from torch.nn.attention.varlen import varlen_attn

        def tokens(x: Tensor) -> Tensor:
            return rearrange(x, "r h l e -> (r l) h e")[self.flat]

        grouped = q.shape[1] != k.shape[1]
        out = varlen_attn(
            tokens(q),
            tokens(k),
            tokens(v),
            self.bounds,
            self.bounds,
            self.longest,
            self.longest,
            scale=scale,
            window_size=(-1, 0),  # causal
            enable_gqa=grouped,
        )
        assert isinstance(out, Tensor)  # what else it can return was not asked for
        return self._together(out, q)

    def _together(self, out: Tensor, q: Tensor) -> Tensor:
        """Tokens ``[t, h, e]`` at their places among ``[r, h, l, e]``, zeros elsewhere."""
        everywhere = out.new_zeros(q.shape[0] * q.shape[2], *out.shape[1:]).index_copy(0, self.flat, out)
        return rearrange(everywhere, "(r l) h e -> r h l e", r=q.shape[0])
