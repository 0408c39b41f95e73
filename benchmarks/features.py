"""The network that distances are measured in: a small classifier trained here, or one of transformers.

No Inception network is needed (nor fetched), so Fréchet distances compare the rows of one table, not papers.

b batch · c channels · h w grid · d width of the picture's vector
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from benchmarks.common import Kept, batches, first
from lexel.data.example import stack_pixels
from lexel.train.objectives.perceptual import FeatureDistance
from lexel.train.objectives.teachers import VisionTeacher

MOST_CLASSES, LARGEST_SIDE = 100, 64
TRAINING_PICTURES, BATCH = 20_000, 64


class Features(nn.Module):
    """Pixels ``[b, 3, h, w]`` in [-1, 1] to feature maps ``[b, c, ...]``, shallow first."""

    description: str

    def vector(self, pixels: Tensor) -> Tensor:
        """``[b, 3, h, w] -> [b, d]``: the mean over the last map's places."""
        return self(pixels)[-1].flatten(2).mean(2)


class SmallClassifier(Features):
    """Three levels of two 3x3 convolutions (32, 64, 128 channels) and a linear head on the mean of the last.
    Pictures above 64 pixels are scaled down first."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1),
                nn.GroupNorm(8, b),
                nn.ReLU(),
                nn.Conv2d(b, b, 3, padding=1, stride=2),
                nn.GroupNorm(8, b),
                nn.ReLU(),
            )
            for a, b in ((3, 32), (32, 64), (64, 128))
        )
        self.head = nn.Linear(128, classes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See `Features`."""
        x = pixels if pixels.shape[-1] <= LARGEST_SIDE else F.interpolate(pixels, LARGEST_SIDE, mode="area")
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return tuple(maps)


class TransformersFeatures(Features):
    """A vision model of transformers: its last four hidden states, with the mean, deviation and size that its
    own preprocessor states."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = VisionTeacher(name)
        self.description = f"transformers' {name} at {self.model.size} pixels, mean of its last hidden state"

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See `Features`; a transformer's tokens are a map's places."""
        side = (self.model.size, self.model.size)
        x = F.interpolate((pixels + 1) / 2, side, mode="bicubic", antialias=True)
        x = (x - self.model.mean) / self.model.std
        states = self.model.network(x, output_hidden_states=True).hidden_states[-4:]
        return tuple(s.transpose(1, 2) if s.ndim == 3 else s for s in states)


def build_features(options: argparse.Namespace, data: Any, name: str = "features", seed: int = 0) -> Features:
    """The network --features names, or a small classifier trained on `data` and kept in --out/`name`. Its
    classes are the captions where they repeat (CIFAR), else the four quarter turns of a picture."""
    if options.features:
        return TransformersFeatures(options.features).to(options.device).eval().requires_grad_(False)
    settings = {"data": data, "steps": options.feature_steps, "seed": seed}
    weights = options.out / name / "classifier.safetensors"

    def work() -> dict[str, Any]:
        network, facts = _train_classifier(data, options, seed)
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.cpu() for key, value in network.state_dict().items()}, weights)
        return facts

    facts = Kept(options.out).get(name, settings, work)
    network = SmallClassifier(facts["classes"])
    network.load_state_dict(load_file(weights))
    network.description = facts["description"]
    return network.to(options.device).eval().requires_grad_(False)


def _train_classifier(
    data: Any, options: argparse.Namespace, seed: int
) -> tuple[SmallClassifier, dict[str, Any]]:
    steps, device = options.feature_steps, options.device
    train = first(data.build("train"), min(TRAINING_PICTURES, steps * BATCH))
    captions = sorted({c for example in train for c in example.captions[:1]})
    labelled = 1 < len(captions) <= MOST_CLASSES
    names = captions if labelled else ["0°", "90°", "180°", "270°"]
    torch.manual_seed(seed)
    network = SmallClassifier(len(names)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)

    def draw(examples: Sequence[Any], indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = [examples[i] for i in indices]
        pixels = stack_pixels(chosen)
        if labelled:
            labels = torch.tensor([names.index(example.captions[0]) for example in chosen])
        else:
            labels = torch.randint(4, (len(chosen),), generator=generator)
            pixels = torch.stack([torch.rot90(p, int(k), (1, 2)) for p, k in zip(pixels, labels)])
        return pixels.to(device), labels.to(device)

    for step in range(steps):
        pixels, labels = draw(train, torch.randint(len(train), (BATCH,), generator=generator).tolist())
        if labelled and step % 2:
            pixels = pixels.flip(3)
        loss = F.cross_entropy(network.head(network.vector(pixels)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"feature network {step + 1}/{steps}  loss {float(loss.detach()):.3f}", flush=True)
    validation = first(data.build("validation"), options.count)
    with torch.no_grad():
        pixels, labels = draw(validation, range(len(validation)))
        found = torch.cat([network.head(network.vector(x)).argmax(1) for x in batches(pixels)])
    accuracy = float((found == labels).float().mean())
    what = f"{len(names)} classes" if labelled else "four quarter turns"
    description = (
        f"a 0.3 M convolutional classifier of {what}, trained {steps} steps on the same training pictures "
        f"(seed {seed}, {accuracy:.0%} right on held-out ones), 128 channels of its last level"
    )
    return network, {"classes": len(names), "accuracy": accuracy, "description": description}


class Vectors(nn.Module):
    """What torchmetrics' FID asks for: pixels to one vector per picture."""

    def __init__(self, features: Features, width: int) -> None:
        super().__init__()
        self.features = features
        self.num_features = width

    def forward(self, pixels: Tensor) -> Tensor:
        """``[b, 3, h, w] -> [b, d]``."""
        return self.features.vector(pixels)


class Quality:
    """PSNR's companions for one set of originals ``[m, 3, h, w]``: feature distance and Fréchet distance."""

    def __init__(self, features: Features, originals: Tensor) -> None:
        self.features, self.originals = features, originals
        self.distance = FeatureDistance(features)

    @torch.no_grad()
    def feature_distance(self, rebuilt: Tensor) -> float:
        """Mean over the pictures; 0 for equal ones."""
        pairs = zip(batches(rebuilt), batches(self.originals))
        each = [float(self.distance(a.clamp(-1, 1), b)) * len(a) for a, b in pairs]
        return sum(each) / len(rebuilt)

    @torch.no_grad()
    def frechet(self, rebuilt: Tensor) -> float:
        """Fréchet distance between the vectors of the originals and of `rebuilt` (in double precision)."""
        width = self.features.vector(self.originals[:1]).shape[1]
        metric: Any = FrechetInceptionDistance(feature=Vectors(self.features, width))
        metric.to(self.originals.device)
        for real, pixels in ((True, self.originals), (False, rebuilt.clamp(-1, 1))):
            for piece in batches(pixels):
                metric.update(piece, real=real)
        return float(metric.compute())
