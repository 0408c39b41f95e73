"""Perceptual distance: how far two pictures are apart in the features of some network.

The feature network is pluggable: any module that maps ``[b, 3, h, w]`` in [-1, 1] to a sequence of maps.
Shipped are a fixed random pyramid (no download, no dependency) and LPIPS through the optional `lpips`
package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import LexelError


@dataclass(frozen=True)
class PerceptualConfig:
    """features: `random` (seeded random convolutions) or `lpips-vgg` / `lpips-alex` (needs the `eval` extra
    and, once, the network). channels, levels, seed: of the random pyramid.
    Raises ValueError on another name."""

    features: str = "random"
    channels: int = 32
    levels: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.features not in ("random", "lpips-vgg", "lpips-alex"):
            raise ValueError(f"features must be random, lpips-vgg or lpips-alex, got {self.features!r}.")

    def build(self) -> nn.Module:
        """A module mapping (reconstruction, pixels) ``[b, 3, h, w]`` each to a scalar.
        Raises LexelError when `lpips` is not installed or its weights cannot be had."""
        if self.features == "random":
            return FeatureDistance(RandomFeatures(self.channels, self.levels, self.seed))
        return LPIPSDistance(self.features.removeprefix("lpips-"))


class FeatureDistance(nn.Module):
    """LPIPS without its learned weights (arXiv 1801.03924): features of unit length over channels at each
    place, squared difference summed over channels, mean over places, mean over maps. The network is frozen.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FeatureDistance:
        """The feature network stays in eval mode."""
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        """Two ``[b, 3, h, w]`` in [-1, 1] to a scalar, 0 for equal pictures."""
        with torch.no_grad():
            targets: Sequence[Tensor] = self.features(pixels)
        maps: Sequence[Tensor] = self.features(reconstruction)
        terms = [
            (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).pow(2).sum(1).mean()
            for a, b in zip(maps, targets)
        ]
        return torch.stack(terms).mean()


class RandomFeatures(nn.Module):
    """A pyramid of fixed random 3x3 convolutions with ReLU, halved by average pooling between levels.
    Random filters already respond to edges and colour contrasts. The weights follow from `seed` alone and
    are no part of any state dict. ``[b, 3, h, w] -> levels x [b, channels, h/2^i, w/2^i]``."""

    def __init__(self, channels: int = 32, levels: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.levels = levels
        for level, c_in in enumerate([3, *[channels] * (levels - 1)]):
            weight = torch.randn(channels, c_in, 3, 3, generator=generator) * (2 / (9 * c_in)) ** 0.5
            self.register_buffer(f"weight_{level}", weight, persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        maps: list[Tensor] = []
        x = pixels
        for level in range(self.levels):
            x = x if level == 0 else F.avg_pool2d(x, 2)
            x = F.relu(F.conv2d(x, self.get_buffer(f"weight_{level}"), padding=1))
            maps.append(x)
        return tuple(maps)


class LPIPSDistance(nn.Module):
    """Published LPIPS (`lpips` package, net `vgg` or `alex`): two ``[b, 3, h, w]`` in [-1, 1] to a scalar.
    Raises LexelError when the package or its weights are missing."""

    def __init__(self, net: str = "vgg") -> None:
        super().__init__()
        try:
            import lpips
        except ImportError:
            raise LexelError(
                "LPIPS needs the `lpips` package: install lexel[eval], or use features=random."
            ) from None
        try:
            self.network = lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)
        except OSError as error:
            raise LexelError(f"the {net} weights of LPIPS could not be downloaded: {error}.") from error

    def train(self, mode: bool = True) -> LPIPSDistance:
        """The network stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        """Mean over the batch."""
        return self.network(reconstruction, pixels).mean()
