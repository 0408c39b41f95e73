"""One code of many bits as several small sub-codes, and back, without loss.

A vocabulary of 2^18 entries is too large to predict at once; two sub-codes of 6 and 12 bits are not. The
bits of a code are its channels, in order; a group is a run of neighbouring channels, the first group the
first run.

What differs between publications is how channels make a number:

- Open-MAGVIT2 (`msb_first=False`): channel i has weight 2^i, so channel 0 is the least significant, and the
  same inside every group. Published grouping: (6, 12), called pre and post.
- ELM (`msb_first=True`): the first channel is the most significant one, and the same inside every group.
  Published groupings: (16,), (8, 8), (10, 10), (12, 12).

n bits (channels) of a code · k groups
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_BITS = 62  # of a whole code, so that it fits a long


@dataclass(frozen=True)
class CodeFactorizer:
    """How the n bits of a code are cut into groups.

    groups: bits per sub-code, first channels first. msb_first: whether the first channel of a code, and of
    every group, is its most significant bit.
    Raises ValueError for an empty group or more bits than a long holds.
    """

    groups: tuple[int, ...]
    msb_first: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not self.groups or min(self.groups) < 1:
            raise ValueError(f"groups must each have at least one bit, got {self.groups}.")
        if self.bits > MAX_BITS:
            raise ValueError(f"groups {self.groups} hold {self.bits} bits, the most is {MAX_BITS}.")

    @property
    def bits(self) -> int:
        """Bits of a whole code, n."""
        return sum(self.groups)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Vocabulary of each group."""
        return tuple(1 << width for width in self.groups)

    def split(self, indices: Tensor) -> Tensor:
        """Codes, long ``[..., 1]``, to sub-codes, long ``[..., k]``. Raises ValueError for a code of more
        than n bits."""
        _check_range(indices, (1 << self.bits,))
        return self.from_bits(self._unpack(indices[..., 0], self.bits))

    def merge(self, codes: Tensor) -> Tensor:
        """Sub-codes, long ``[..., k]``, to codes, long ``[..., 1]``. Raises ValueError for a sub-code outside
        its group."""
        return self._pack(self.to_bits(codes))[..., None]

    def from_bits(self, bits: Tensor) -> Tensor:
        """Bits, bool or integer 0 and 1 ``[..., n]``, in channel order, to sub-codes, long ``[..., k]``."""
        if bits.shape[-1] != self.bits:
            raise ValueError(f"codes of {self.groups} have {self.bits} bits, got {list(bits.shape)}.")
        return torch.stack([self._pack(group) for group in bits.split(self.groups, dim=-1)], dim=-1)

    def to_bits(self, codes: Tensor) -> Tensor:
        """Sub-codes, long ``[..., k]``, to bits, long 0 and 1 ``[..., n]``, in channel order. Raises
        ValueError for a sub-code outside its group."""
        _check_range(codes, self.sizes)
        return torch.cat([self._unpack(codes[..., j], width) for j, width in enumerate(self.groups)], dim=-1)

    def _pack(self, bits: Tensor) -> Tensor:
        """``[..., w] -> [...]``."""
        return (bits.long() << self._places(bits.shape[-1], bits.device)).sum(-1)

    def _unpack(self, values: Tensor, width: int) -> Tensor:
        """``[...] -> [..., w]``."""
        return (values[..., None] >> self._places(width, values.device)) & 1

    def _places(self, width: int, device: torch.device) -> Tensor:
        """The power of two of each of `width` channels."""
        places = torch.arange(width, device=device)
        return places.flip(0) if self.msb_first else places


def _check_range(codes: Tensor, sizes: tuple[int, ...]) -> None:
    if codes.dtype != torch.long or codes.ndim == 0 or codes.shape[-1] != len(sizes):
        raise ValueError(f"codes must be long [..., {len(sizes)}], got {codes.dtype} {list(codes.shape)}.")
    limits = torch.tensor(sizes, device=codes.device)
    if bool(((codes < 0) | (codes >= limits)).any()):
        raise ValueError(f"codes must lie below {', '.join(map(str, sizes))}, got up to {int(codes.max())}.")
