"""Perceptual distance: how far two pictures are apart in the features of some network.

The feature network is pluggable: any module that maps ``[b, 3, h, w]`` in [-1, 1] to a sequence of maps.
Shipped are a fixed random pyramid (no download, no dependency) and LPIPS through the optional `lpips`
package; the verdicts of an image classifier (TiTok) may be compared too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import LexelError
from lexel.train.objectives.teachers import IMAGENET_STATISTICS


@dataclass(frozen=True)
class PerceptualConfig:
    """features: `random` (seeded random convolutions), `lpips-vgg` / `lpips-alex` (needs the `eval` extra
    and, once, the network) or `none`. channels, levels, seed: of the random pyramid.
    classifier: hub id or local folder of an image classifier whose `LogitDistance` is added, weighted by
    classifier_weight ("": none).
    Raises ValueError on another name, or when there is nothing to compare."""

    features: str = "random"
    channels: int = 32
    levels: int = 3
    seed: int = 0
    classifier: str = ""
    classifier_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.features not in ("random", "lpips-vgg", "lpips-alex", "none"):
            raise ValueError(
                f"features must be random, lpips-vgg, lpips-alex or none, got {self.features!r}."
            )
        if self.features == "none" and not self.classifier:
            raise ValueError("features none leaves nothing to compare; name a classifier.")

    def build(self) -> nn.Module:
        """A module mapping (reconstruction, pixels) ``[b, 3, h, w]`` each to a scalar.
        Raises LexelError when `lpips` is not installed or weights cannot be had."""
        terms: list[tuple[float, nn.Module]] = []
        if self.features == "random":
            terms.append((1.0, FeatureDistance(RandomFeatures(self.channels, self.levels, self.seed))))
        elif self.features != "none":
            terms.append((1.0, LPIPSDistance(self.features.removeprefix("lpips-"))))
        if self.classifier:
            terms.append((self.classifier_weight, LogitDistance(self.classifier)))
        return terms[0][1] if [weight for weight, _ in terms] == [1.0] else WeightedDistance(terms)


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


class LogitDistance(nn.Module):
    """How differently a classifier judges two pictures: the mean squared difference of its logits (TiTok,
    with ConvNeXt-S). Any image classifier of transformers; shown at `size` pixels, normalised by ImageNet's
    statistics. Two ``[b, 3, h, w]`` in [-1, 1] to a scalar. Raises LexelError when the classifier cannot be
    had."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, size: int = 224) -> None:
        super().__init__()
        try:
            from transformers import AutoModelForImageClassification

            network = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=False)
        except (ImportError, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise LexelError(f"the classifier {name} cannot be loaded: {reason}") from error
        self.network = network.eval().requires_grad_(False)
        self.size = size
        self.register_buffer("mean", torch.tensor(IMAGENET_STATISTICS[0]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STATISTICS[1]).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> LogitDistance:
        """The classifier stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        """See the class."""
        with torch.no_grad():
            target = self._logits(pixels)
        return F.mse_loss(self._logits(reconstruction), target)

    def _logits(self, pixels: Tensor) -> Tensor:
        size = (self.size, self.size)
        shown = F.interpolate((pixels + 1) / 2, size, mode="bilinear", antialias=True)
        return self.network((shown - self.mean) / self.std).logits.float()


class WeightedDistance(nn.Module):
    """A weighted sum of distances of (reconstruction, pixels)."""

    def __init__(self, terms: Sequence[tuple[float, nn.Module]]) -> None:
        super().__init__()
        self.weights = [weight for weight, _ in terms]
        self.distances = nn.ModuleList(distance for _, distance in terms)

    def forward(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        """Scalar."""
        values = [distance(reconstruction, pixels) for distance in self.distances]
        return torch.stack([w * v for w, v in zip(self.weights, values, strict=True)]).sum()
