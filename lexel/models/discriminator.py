"""PatchGAN discriminator (pix2pix, arXiv 1611.07004) as in VQGAN and LlamaGen.

Keys are the published `main.{0,2,3,5,6,8,9,11}.*`. It judges overlapping patches, so a small picture works
as long as its last maps are not empty (32 pixels with three layers: a 2x2 map of verdicts).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn


@dataclass(frozen=True)
class PatchDiscriminatorConfig:
    """channels: width after the first convolution (`ndf`), doubled per layer up to eightfold; layers:
    stride-2 convolutions. Raises ValueError when either is below 1."""

    channels: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        if self.channels < 1 or self.layers < 1:
            raise ValueError(f"channels and layers must be positive, got {self.channels}, {self.layers}.")

    def build(self) -> PatchDiscriminator:
        """The discriminator with fresh weights."""
        return PatchDiscriminator(self)


class PatchDiscriminator(nn.Module):
    """Pixels ``[b, 3, h, w]`` to one logit per patch ``[b, 1, h', w']``; large means real."""

    def __init__(self, config: PatchDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**i, 8) for i in range(config.layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(pairwise(widths)):
            stride = 2 if i < config.layers - 1 else 1
            parts += [nn.Conv2d(a, b, 4, stride, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        parts.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*parts)
        self.main.apply(_initialise)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[b, 3, h, w] -> [b, 1, h', w']``."""
        return self.main(pixels)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
