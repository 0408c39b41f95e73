"""What lossy decoding costs: how often the checker finds what was asked for, and how far the features of the
pictures are from those of true ones, beside the plain loop.

b batch · h w picture
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from benchmarks.features import Quality, build_features
from benchmarks.racing import Batch, Rules, Sampler, Strategy, plainly, strategies
from lexel.data.captions import Claim
from lexel.data.checker import picture_shows
from lexel.data.example import Example, stack_pixels
from lexel.data.shapes import SEEN_PAIRS, ShapesConfig, draw_scene
from lexel.document import Document, Image, Text

SIDE_BY_SIDE = 32


@dataclass(frozen=True)
class OneObject:
    """Pictures of one object for the feature network, captioned by its colour and shape: classes that it can
    learn, where the captions of `scenes` hardly repeat."""

    scenes: ShapesConfig

    def build(self, split: str) -> Dataset[Example]:
        """The "train" or "validation" split."""
        return _OneObjectPictures(self.scenes, split)


class _OneObjectPictures(Dataset[Example]):
    def __init__(self, scenes: ShapesConfig, split: str) -> None:
        self.scenes, self.split = scenes, split

    def __len__(self) -> int:
        return self.scenes.count

    def __getitem__(self, index: int) -> Example:
        pair = SEEN_PAIRS[index % len(SEEN_PAIRS)]
        random = np.random.default_rng([self.scenes.seed, self.split == "train", index])
        scene = draw_scene(random, [pair], self.scenes)
        return Example(f"{self.split}-{index}", (" ".join(pair),), scene.render(self.scenes.size), scene)


class Judge:
    """Checker accuracy and feature distance of a strategy's pictures, beside the plain loop's."""

    def __init__(self, sampler: Sampler, count: int, options: argparse.Namespace) -> None:
        scenes = sampler.pipeline.scenes
        assert scenes is not None
        self.sampler, self.seed = sampler, options.seed
        self.asked: list[tuple[str, Claim]] = []
        originals = []
        kinds: tuple[Literal["one", "two"], ...] = ("one", "two")
        for kind in kinds:
            self.asked += scenes.prompts(kind, count // 2, options.seed + 1)
            originals += scenes.scenes(kind, count // 2, options.seed + 1)
        self.quality = None
        if options.feature_steps:
            features = build_features(options, OneObject(scenes))
            self.quality = Quality(features, stack_pixels(originals))
        self.plain = self.measure(plainly(sampler.pipeline.lm))

    def measure(self, strategy: Strategy) -> dict[str, float | None]:
        """Accuracy, and distance to pictures of the scenes asked for."""
        codec = self.sampler.pipeline.codec
        documents: list[Document] = [[Text(text), Image.blank()] for text, _ in self.asked]
        pictures = []
        for start in range(0, len(documents), SIDE_BY_SIDE):
            part = documents[start : start + SIDE_BY_SIDE]
            batch = Batch([codec.prompt(d) for d in part], [codec.unconditional(d) for d in part])
            ids, _ = self.sampler.draw(strategy, batch, self.seed + start)
            pictures.append(self.sampler.pixels(torch.stack(ids)))
        pixels = torch.cat(pictures)
        right = sum(picture_shows(p, claim) for p, (_, claim) in zip(pixels, self.asked))
        distance = None if self.quality is None else self.quality.frechet(pixels)
        return {"accuracy": right / len(pixels), "feature_distance": distance}

    def compare(self, strategy: Strategy) -> dict[str, float | None]:
        """Both figures, and how they differ from the plain loop's."""
        found = self.measure(strategy)
        changes = {
            f"{name}_change": None if value is None else value - self.plain[name]  # type: ignore[operator]
            for name, value in found.items()
        }
        return {**found, **changes, "pictures_judged": len(self.asked)}


def judge(sampler: Sampler, rules: Rules, options: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """What each lossy strategy costs in quality."""
    lossy = [strategy for strategy in strategies(sampler.pipeline, rules).values() if not strategy.exact]
    if not lossy or not options.pictures:
        return {}
    bench = Judge(sampler, options.pictures, options)
    return {strategy.name: bench.compare(strategy) for strategy in lossy}
