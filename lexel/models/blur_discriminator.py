"""The discriminator of TiTok's second training stage (bytedance/1d-tokenizer): few stages, each halved by a
blur instead of a stride, and verdicts on a fixed grid whatever the picture's size.

b batch · c channels · h w picture
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.1


@dataclass(frozen=True)
class BlurDiscriminatorConfig:
    """channels: width after the first convolution, doubled by each of `stages`; grid: side of the map of
    verdicts. Raises ValueError when one is below 1."""

    channels: int = 128
    stages: int = 3
    grid: int = 16

    def __post_init__(self) -> None:
        if min(self.channels, self.stages, self.grid) < 1:
            raise ValueError(
                f"channels, stages, grid must be positive, got {self.channels}, {self.stages}, {self.grid}."
            )

    def build(self) -> BlurDiscriminator:
        """The discriminator with fresh weights."""
        return BlurDiscriminator(self)


class Blur(nn.Module):
    """Every map smoothed by [1, 3, 3, 1] in both directions and halved: ``[b, c, h, w] -> [b, c, h/2, w/2]``
    (rounded up)."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = taps[:, None] * taps
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        (top, bottom), (left, right) = (_padding(side) for side in x.shape[2:])
        padded = F.pad(x, (left, right, top, bottom))
        weight = self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(padded, weight, stride=2, groups=x.shape[1])


def _padding(side: int) -> tuple[int, int]:
    """What four taps at stride 2 need to give ceil(side / 2) values."""
    total = (math.ceil(side / 2) - 1) * 2 + 4 - side
    return total // 2, total - total // 2


class BlurDiscriminator(nn.Module):
    """Pixels ``[b, 3, h, w]`` in [-1, 1] to logits ``[b, 1, grid, grid]``; large means real."""

    def __init__(self, config: BlurDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * 2**i for i in range(config.stages + 1)]
        self.block_in = nn.Sequential(nn.Conv2d(3, widths[0], 5, padding=2), nn.LeakyReLU(SLOPE))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1), Blur(), nn.GroupNorm(math.gcd(32, b), b), nn.LeakyReLU(SLOPE)
            )
            for a, b in pairwise(widths)
        )
        self.pool = nn.AdaptiveMaxPool2d((config.grid, config.grid))
        self.to_logits = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(widths[-1], 1, 5, padding=2),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        x = self.block_in((pixels + 1) / 2)  # the published one works in [0, 1]
        for block in self.blocks:
            x = block(x)
        return self.to_logits(self.pool(x))
