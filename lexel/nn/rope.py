"""Rotary position embedding over one or three axes.

b batch · l positions · h heads · e head width
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for sequences longer than a model was first trained on.

    kind: "linear" divides all of them by `factor` (Chen et al., arXiv:2306.15595); "llama3" only those whose
    wavelength exceeds trained_length / low, leaves those below trained_length / high, and interpolates
    between the two (Llama 3.1, as in transformers). trained_length: positions of the first training.
    Raises ValueError for another kind or numbers that make no sense.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    trained_length: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope scaling is linear or llama3, got {self.kind!r}.")
        if self.factor <= 0 or not 0 < self.low < self.high or self.trained_length < 1:
            raise ValueError(f"rope scaling needs factor > 0 and 0 < low < high, got {self}.")

    def stretch(self, frequency: Tensor) -> Tensor:
        """Angles per position, float32 ``[n]``, stretched."""
        if self.kind == "linear":
            return frequency / self.factor
        turns = self.trained_length * frequency / (2 * math.pi)  # within the trained length
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequency * (keep + (1 - keep) / self.factor)


class Rotary(nn.Module):
    """Rotation angles from positions ``[b, l, 3]`` = (index in the document, picture row, picture column).

    axes: share of the ``e / 2`` rotated pairs given to each axis; every axis with m pairs has the spectrum
    ``theta ** (-i / m)``. (1, 0, 0) is the plain rotary embedding of Llama (Su et al., arXiv:2104.09864);
    (0, .5, .5) the two-dimensional one of picture models. Rounding surplus goes to the index.
    scaling: of the index's frequencies.
    Raises ValueError when the head width is odd or the shares are negative or do not add up to 1.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float = 1e4,
        axes: tuple[float, float, float] = (1.0, 0.0, 0.0),
        scaling: RopeScaling | None = None,
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head width, got {head_dim}.")
        if len(axes) != 3 or min(axes) < 0 or abs(sum(axes) - 1) > 1e-6:
            raise ValueError(f"rope_axes are three shares that add up to 1, got {tuple(axes)}.")
        pairs = head_dim // 2
        rows, columns = round(pairs * axes[1]), round(pairs * axes[2])
        self.theta, self.scaling = theta, scaling
        self.pairs = (max(0, pairs - rows - columns), rows, min(columns, pairs - rows))
        # Not a buffer: `model.to(torch.bfloat16)` must not round the frequencies.
        self._spectrum: tuple[Tensor, Tensor] | None = None

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Long ``[b, l, 3]`` → (cos, sin), float32 ``[b, 1, l, e / 2]``."""
        if self._spectrum is None or self._spectrum[0].device != positions.device:
            self._spectrum = self._build_spectrum(positions.device)
        axis, frequency = self._spectrum
        angles = positions.index_select(-1, axis).float() * frequency
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def _build_spectrum(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each rotated pair, its axis (long) and its frequency (float32)."""
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(self.pairs))
        steps = [torch.arange(m).float() / m for m in self.pairs if m]
        frequency = 1.0 / self.theta ** torch.cat(steps)
        if self.scaling is not None:
            frequency = torch.where(axis == 0, self.scaling.stretch(frequency), frequency)
        return axis.to(device), frequency.to(device)


class RasterRotary(nn.Module):
    """LlamaGen's rotary table: position ``start + i`` of the sequence is cell i of a picture of
    ``side * side`` cells in raster order, rotated by row and column. Positions before and after the picture
    have neither cosine nor sine there: their queries and keys become zeros. Of a position only the index
    counts."""

    def __init__(self, head_dim: int, theta: float, side: int, start: int) -> None:
        super().__init__()
        self.rotary = Rotary(head_dim, theta, (0.0, 0.5, 0.5))
        self.side, self.start = side, start

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Long ``[b, l, 3]`` → (cos, sin), float32 ``[b, 1, l, e / 2]``."""
        cell = positions[..., 0] - self.start
        inside = (cell >= 0) & (cell < self.side**2)
        cell = cell.where(inside, 0)
        places = torch.stack([cell, cell.div(self.side, rounding_mode="floor"), cell % self.side], dim=-1)
        cos, sin = self.rotary(places)
        inside = inside[:, None, :, None]
        return cos * inside, sin * inside


class Unrotated(nn.Module):
    """No rotation, for models with learned positions: cosine 1 and sine 0 for every pair."""

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Long ``[b, l, 3]`` → (cos, sin), float32 ``[1, 1, 1, 1]``."""
        one = torch.ones(1, 1, 1, 1, device=positions.device)
        return one, torch.zeros_like(one)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate ``x [b, h, l, e]`` by (cos, sin) ``[b, 1, l, e / 2]``; pair i is (i, i + e/2), the half-split
    convention of transformers' Llama."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_interleaved(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """As `rotate`; pair i is (2i, 2i + 1), the convention of Meta's Llama and LlamaGen."""
    cos, sin = rotation
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
