"""A tokenizer's own decoder against a generative detokenizer of the same codes, one tokenizer per family.

python -m benchmarks.detokenizers --families raster,one-dimensional

Every tokenizer and detokenizer is trained by `lexel-train` on the same plain scenes of shapes, for the same
number of steps; each detokenizer is then distilled to few steps. Figures are of held-out scenes: PSNR,
Fréchet distance in the features of a small classifier (`benchmarks.features`; no Inception network), how
often the checker finds in the picture what is true of the scene, and pictures per second (median of three).

b batch · m pictures · h w picture
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.features import Quality, build_features
from benchmarks.judging import OneObject
from lexel.data.captions import Claim
from lexel.data.checker import picture_shows
from lexel.data.example import stack_pixels
from lexel.evaluate.metrics import psnr
from lexel.models.detokenizers import from_pretrained as load_detokenizer
from lexel.sample.codes import concat_codes
from lexel.sample.detokenize import detokenize
from lexel.tokenizers import from_pretrained as load_tokenizer
from lexel.tokenizers.base import Tokenizer
from lexel.train.chain import run_chain
from lexel.train.cli import settings_of
from lexel.types import Codes

SCENES = (
    "data=shapes",
    "data.textured=0.0",
    "data.backgrounds=[light]",
    "data.variation=0.25",
    "data.object_weights=[0.5,0.4,0.1]",
)
STEPS = (1, 2, 4, 8, 25)
BATCH, TIMED = 16, 3


@dataclass(frozen=True)
class Family:
    """tokenizer, detokenizer: options of `lexel-train`; what: of the tokenizer, for the table."""

    what: str
    tokenizer: tuple[str, ...]
    detokenizer: tuple[str, ...]


PLAIN = ("objective.tokenizer.l1=0.5", "objective.tokenizer.l2=1.0")
WARM = (*PLAIN, "objective.tokenizer.unrounded_steps=100", "quantizer.cosine=true")
FAMILIES: Mapping[str, Family] = {
    "raster": Family(
        "64 codes of 256, a grid (VQ)",
        ("tokenizer=vq", "quantizer.codebook_size=256", *WARM),
        ("detokenizer=flow",),
    ),
    "factorized": Family(
        "64 positions with two codes of 64 each (FQGAN)",
        ("tokenizer=factorized", "quantizer.codebook_size=64", *WARM),
        ("detokenizer=flow",),
    ),
    "one-dimensional": Family(
        "up to 32 codes of 512 (TiTok with tail drop, FSQ)",
        (
            "tokenizer=flexible",
            "tokenizer.latents=32",
            "tokenizer.patch=8",
            "tokenizer.layers=2",
            "stages.tokenizer.lr=4e-4",
            "quantizer=fsq",
            *PLAIN,
        ),
        ("detokenizer=flow",),
    ),
    "multi-scale": Family(
        "85 codes in 4 scales (TokenFlow, no teacher)",
        ("experiment=tokenflow_debug",),
        ("detokenizer=flow",),
    ),
    "semantic": Family(
        "16 causal codes of 256 (SEED) of the teacher's features",
        (
            "experiment=seed_debug",
            "objective.tokenizer.teacher={teacher}",
            "objective.tokenizer.encoder={teacher}",
        ),
        ("detokenizer=flow",),
    ),
}


def train(stage: str, folder: Path, steps: int, options: argparse.Namespace, *more: str) -> Path:
    """Train one network in `folder`, or take the one that lies there; its own folder."""
    settings = {
        "threads": torch.get_num_threads(),
        "seed": options.seed,
        f"stages.{stage}.steps": steps,
        f"stages.{stage}.batch_size": options.batch,
        f"stages.{stage}.validate_every": 0,
        f"stages.{stage}.sample_every": 0,
        "output": folder,
        "trainer": "gpu" if options.device.startswith("cuda") else "cpu",
    }
    run_chain(settings_of(*more, *SCENES, *(f"{key}={value}" for key, value in settings.items())))
    return folder / stage


class Bench:
    """Held-out scenes and what is asked of pictures of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        scenes: Any = settings_of("task=tokenizer", *SCENES).data
        self.options = options
        halves = [scenes.scenes(kind, options.count // 2, options.seed) for kind in ("one", "two")]
        self.pixels = stack_pixels([example for half in halves for example in half]).to(options.device)
        prompts = [scenes.prompts(kind, options.count // 2, options.seed) for kind in ("one", "two")]
        self.claims: list[Claim] = [claim for half in prompts for _, claim in half]
        features = build_features(options, OneObject(scenes))
        self.description = features.description
        self.quality = Quality(features, self.pixels)

    def encode(self, tokenizer: Tokenizer) -> Codes:
        """Codes of the held-out pictures."""
        return concat_codes([tokenizer.encode(piece) for piece in common.batches(self.pixels)])

    def measure(self, draw: Callable[[Codes], Tensor], codes: Codes) -> dict[str, float]:
        """Figures of one way to draw `codes`."""
        pieces = torch.arange(len(codes)).split(BATCH)
        drawn = torch.cat([draw(codes[rows]) for rows in pieces]).clamp(-1, 1)
        few, seconds = codes[:BATCH], []
        for _ in range(TIMED):
            start = time.perf_counter()
            draw(few)
            seconds.append(time.perf_counter() - start)
        right = [picture_shows(picture, claim) for picture, claim in zip(drawn.cpu(), self.claims)]
        return {
            "psnr": float(psnr(drawn, self.pixels).mean()),
            "frechet": self.quality.frechet(drawn),
            "accuracy": sum(right) / len(right),
            "pictures_per_second": len(few) / statistics.median(seconds),
        }


def measure_family(name: str, bench: Bench, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Rows of one family: its own decoder where it has one, the detokenizer and the distilled one at every
    number of steps."""
    family, folder = FAMILIES[name], options.out / name
    own = [option.format(teacher=options.teacher) for option in family.tokenizer]
    first = train("tokenizer", folder, options.steps, options, "task=tokenizer", *own)
    reads = (f"parts.tokenizer={first}", *family.detokenizer, "task=detokenizer")
    second = train("detokenizer", folder / "flow", options.detokenizer_steps, options, *reads)
    distil = (*reads, f"stages.detokenizer.distil={second}")
    third = train("detokenizer", folder / "distilled", options.distil_steps, options, *distil)
    tokenizer = load_tokenizer(first).to(options.device)
    codes = bench.encode(tokenizer)
    rows = {"own decoder": bench.measure(tokenizer.decode, codes)} if tokenizer.draws_pixels else {}
    for title, place in (("detokenizer", second), ("distilled", third)):
        network: Any = load_detokenizer(place).to(options.device)
        for steps in STEPS[:2] if options.quick else STEPS:

            def draw(part: Codes, network: Any = network, steps: int = steps) -> Tensor:
                generator = torch.Generator(options.device).manual_seed(options.seed)
                return detokenize(tokenizer, network, part, steps=steps, generator=generator)

            rows[f"{title}, {steps} steps"] = bench.measure(draw, codes)
            print(f"    {title}, {steps} steps: {rows[f'{title}, {steps} steps']}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, print one table per family."""
    parser = common.parser(__doc__.splitlines()[0], "detokenizers", steps=1500)
    parser.add_argument("--families", default=",".join(FAMILIES), help="separated by commas (default: all)")
    parser.add_argument("--detokenizer-steps", type=int, default=1000)
    parser.add_argument("--distil-steps", type=int, default=60)
    parser.add_argument(
        "--teacher", default="outputs/teacher", help="of the semantic family: benchmarks.teacher"
    )
    parser.set_defaults(batch=32, count=256)
    options = parser.parse_args(argv)
    common.shrink(options)
    if options.quick:
        options.detokenizer_steps = options.distil_steps = 2
    names = options.families.split(",")
    if unknown := [name for name in names if name not in FAMILIES]:
        raise ValueError(f"there is no family {unknown[0]!r}; there are {', '.join(FAMILIES)}.")
    bench = Bench(options)
    results: dict[str, Any] = {}
    tables = []
    for name in names:
        print(f"[{len(results) + 1}/{len(names)}] {name}: {FAMILIES[name].what}", flush=True)
        results[name] = measure_family(name, bench, options)
        heads = ("", "PSNR, dB", "Fréchet", "checker", "pictures/s")
        rows = [
            (
                title,
                f"{r['psnr']:.2f}",
                f"{r['frechet']:.2f}",
                f"{r['accuracy']:.1%}",
                f"{r['pictures_per_second']:.1f}",
            )
            for title, r in results[name].items()
        ]
        tables.append(f"{name}: {FAMILIES[name].what}\n\n{common.table(heads, rows)}")
    common.report(options, {"features": bench.description, "families": results}, *tables)
    print(f"\nFeature network: {bench.description}.\n{len(bench.pixels)} held-out scenes.")


if __name__ == "__main__":
    common.run(main)
