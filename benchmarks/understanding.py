"""Semantic against pixel tokens for understanding, at equal tokens: what a linear probe and a small language
model can tell of a picture from its codes alone.

python -m benchmarks.understanding [--teacher DIR] [--add NAME=DIR ...]

The candidates are one network (16 codes of 256 for a picture of 32 pixels) trained alike but for the target:
pixels (a VQ tokenizer), a frozen teacher's patch features (VQ-KD, BEiT v2, arXiv 2208.06366), or both. --add
measures tokenizers trained elsewhere beside them. The teacher is `benchmarks.teacher`'s, trained first unless
given; its own features are the probe's ceiling.

b batch · n positions · d width of a code's embedding · f teacher's width · m pictures
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import common, teacher
from benchmarks.liquid_claims import measure, train, write_codes
from lexel.data.example import Example, stack_pixels
from lexel.data.scene import COLORS, SHAPES, place_of
from lexel.data.shapes import ShapesConfig
from lexel.tokenizers import from_pretrained
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.vq import VQTokenizerConfig
from lexel.train.objectives.base import Metrics
from lexel.train.objectives.teachers import VisionTeacher
from lexel.train.objectives.tokenizer import TokenizerObjective, TokenizerObjectiveConfig
from lexel.types import TokenizerOutput

CODES, WIDTH = 256, 16
PLACES = ("left", "center", "right")
PROBED = ("color", "shape", "place")


@dataclass(frozen=True)
class DistilledConfig(TokenizerObjectiveConfig):
    """TokenizerObjectiveConfig plus: teacher: folder of a vision model; distil: weight of its features."""

    teacher: str = ""
    distil: float = 1.0

    def build(self) -> TokenizerObjective:
        """The objective with its teacher loaded."""
        return DistilledObjective(self)


class DistilledObjective(TokenizerObjective):
    """VQ-KD: each code predicts the teacher's feature of its cell by a small network; cosine loss. The
    feature is the hidden state before the last layer, from which the class token gathers what it knows (the
    last layer's own patch tokens are never trained in CLIP), standardised over the batch: a good part of it
    is the same in every cell of every picture.
    """

    def __init__(self, config: DistilledConfig) -> None:
        super().__init__(config)
        seen = VisionTeacher(config.teacher, output="patches", layer=-2)
        self.teacher = (seen,)  # a tuple: no part of what is trained
        self.weight = config.distil
        self.standardise = nn.BatchNorm1d(seen.width, affine=False)
        self.head = nn.Sequential(nn.Linear(WIDTH, seen.width), nn.GELU(), nn.Linear(seen.width, seen.width))

    def generator_loss(
        self, output: TokenizerOutput, pixels: Tensor, step: int, last_layer: Tensor
    ) -> tuple[Tensor, Metrics]:
        """See `Objective.generator_loss`."""
        loss, metrics = super().generator_loss(output, pixels, step, last_layer)
        target = self.teacher[0].to(pixels.device)(pixels)
        target = self.standardise(target.flatten(0, 1)).unflatten(0, target.shape[:2])
        distance = 1 - F.cosine_similarity(self.head(output.quantizer.quantized), target, dim=-1).mean()
        loss = loss + self.weight * distance
        return loss, {**metrics, "distance": distance.detach(), "loss": loss.detach()}


def tokenizer_config(size: int) -> VQTokenizerConfig:
    """4 × 4 codes; the encoder's attention lets each of them see the whole picture."""
    return VQTokenizerConfig(
        image_size=size, stem=size // 8, channels=32, channel_mult=(1, 2), res_blocks=1, z_channels=64,
        embed_dim=WIDTH, attention=True, norm_groups=16,
        quantizer=QuantizerConfig("vq", codebook_size=CODES, cosine=True, decay=0.99, dead_below=0.1),
    )  # fmt: skip


def objectives(teacher: str, unrounded: int) -> dict[str, TokenizerObjectiveConfig]:
    """The candidates' targets."""
    pixels: dict[str, Any] = {"l1": 0.5, "l2": 1.0}
    none: dict[str, Any] = {"l1": 0.0, "l2": 0.0}
    return {
        "pixels": TokenizerObjectiveConfig(**pixels, unrounded_steps=unrounded),
        "semantic": DistilledConfig(**none, unrounded_steps=unrounded, teacher=teacher),
        "both": DistilledConfig(**pixels, unrounded_steps=unrounded, teacher=teacher),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = _options(arguments)
    options.scenes = teacher.easy_scenes(options.size, options.pictures)
    taught = options.teacher or _train_teacher(options)
    rows: dict[str, Any] = {}
    examples = probe_examples(options.scenes, options.probe, options.count)
    seen = VisionTeacher(str(taught), output="patches", layer=-2).to(options.device)
    rows["teacher, not rounded"] = {"positions": seen.grid[0] * seen.grid[1], "probe": probe(seen, examples)}
    recipe = common.Recipe(
        options.scenes, options.steps, options.batch, options.seed, options.device, options.lr
    )
    candidates: dict[str, Tokenizer] = {}
    for name, objective in objectives(str(taught), min(100, options.steps // 4)).items():
        folder = options.out / name
        candidates[name], _ = recipe.train(folder, tokenizer_config(options.size), objective)
        rows[name] = judge(options, name, folder / "tokenizer", candidates[name], examples)
    for name, folder in options.add:
        tokenizer = from_pretrained(folder).to(options.device)
        rows[name] = judge(options, name, folder, tokenizer, examples)
    common.report(options, {"candidates": rows}, text(rows))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = common.parser(" ".join(str(__doc__).splitlines()[:2]), "understanding")
    made.add_argument(
        "--teacher", type=Path, metavar="DIR", help="folder of a vision model (default: train one)"
    )
    made.add_argument("--teacher-steps", type=int, default=1200, help="of the one trained without it")
    made.add_argument(
        "--add", type=_named, action="append", default=[], metavar="NAME=DIR", help="a tokenizer"
    )
    made.add_argument("--steps", type=int, default=500, help="optimizer steps of each tokenizer")
    made.add_argument("--lm-steps", type=int, default=500, help="optimizer steps of each language model")
    made.add_argument("--batch", type=int, default=32, help="pictures or documents per step")
    made.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of the tokenizers")
    made.add_argument("--lm-lr", type=float, default=3e-3, help="and of the language models")
    made.add_argument("--dim", type=int, default=96, help="width of the language models")
    made.add_argument("--layers", type=int, default=3)
    made.add_argument("--pictures", type=int, default=6000, help="different training scenes")
    made.add_argument("--probe", type=int, default=2000, help="pictures that the probe learns from")
    made.add_argument("--count", type=int, default=300, help="held-out pictures")
    made.add_argument("--out", type=Path, default=Path("outputs/benchmarks/understanding"))
    options = made.parse_args(arguments)
    options.precision = "32-true"
    if options.quick:
        options.steps = options.lm_steps = options.teacher_steps = 2
        options.batch, options.pictures, options.probe, options.count = 4, 16, 40, 8
        options.dim, options.layers = 16, 1
    return options


def _named(argument: str) -> tuple[str, Path]:
    name, equals, folder = argument.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"must be NAME=DIR, got {argument!r}")
    return name, Path(folder)


def _train_teacher(options: argparse.Namespace) -> Path:
    folder: Path = options.out / "teacher"
    if not (folder / "config.json").is_file():
        scenes = teacher.easy_scenes(options.size, 50000)
        teacher.save(*teacher.train(scenes, options.teacher_steps, 64, 1.5e-3, options.seed), folder)
    return folder


def judge(
    options: argparse.Namespace,
    name: str,
    folder: Path,
    tokenizer: Tokenizer,
    examples: Mapping[str, Sequence[Example]],
) -> dict[str, Any]:
    """A candidate's figures: positions, codes, probes, and the captions of a language model trained on it."""
    print(f"{name}: probe and language model", flush=True)
    own = copy(options)
    own.tokenizer, own.out, own.lr = folder, options.out / name, options.lm_lr
    write_codes(own)
    trained = train(own, own.out / "describing", own.dim, ["image_to_text"], own.lm_steps)
    described = measure(own, trained["folder"], ["image_to_text"])["image_to_text"]
    return {
        "positions": tokenizer.layout.positions,
        "codes": list(tokenizer.codebook_sizes),
        "probe": probe(lambda pixels: tokenizer.embed(tokenizer.encode(pixels)), examples),
        "captions": described["accuracy"],
        "nats": described["nll"],
        "seconds": trained["seconds"],
    }


# The probe


def probe_examples(scenes: ShapesConfig, train: int, count: int) -> dict[str, list[Example]]:
    """Pictures of one object: to learn from, held out, and held out with a pair that was never seen."""
    alone = replace(scenes, max_objects=1, object_weights=(1.0,), count=train).build("train")
    return {
        "train": [alone[i] for i in range(train)],
        "one": scenes.scenes("one", count, seed=11),
        "unseen": scenes.scenes("unseen", count, seed=11),
    }


def answers(examples: Sequence[Example]) -> Tensor:
    """Number of the colour, the shape and the place (of nine), long ``[m, 3]``."""
    rows = []
    for example in examples:
        thing = example.truth.objects[0]  # type: ignore[attr-defined]
        column, row = place_of(thing.center)
        vertical = ("top", "center", "bottom").index(row)
        rows.append(
            [COLORS.index(thing.color), SHAPES.index(thing.shape), 3 * vertical + PLACES.index(column)]
        )
    return torch.tensor(rows)


@torch.no_grad()
def features(embed: Callable[[Tensor], Tensor], examples: Sequence[Example], device: Any = None) -> Tensor:
    """The embeddings of all positions, one after the other, ``[m, n * d]``."""
    return torch.cat(
        [embed(part).float().flatten(1).cpu() for part in common.batches(stack_pixels(examples))]
    )


def probe(
    embed: Callable[[Tensor], Tensor], examples: Mapping[str, Sequence[Example]], steps: int = 300
) -> dict[str, float]:
    """Accuracy of linear classifiers of colour, shape and place on frozen features, pixels ``[b, 3, h, w]``
    to ``[b, n, d]``, on held-out pictures, and of colour and shape together there and on unseen pairs. Each
    is a softmax regression on standardised features, with weight decay, trained by full batches of AdamW."""
    x = features(embed, examples["train"])
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-4)
    x, y = (x - mean) / deviation, answers(examples["train"])
    sizes = (len(COLORS), len(SHAPES), 9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Linear(x.shape[1], sum(sizes))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        parts = network(x).split(sizes, 1)
        loss = torch.stack([F.cross_entropy(part, y[:, i]) for i, part in enumerate(parts)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    right = {}
    for kind in ("one", "unseen"):
        held = (features(embed, examples[kind]) - mean) / deviation
        with torch.no_grad():
            found = torch.stack([part.argmax(1) for part in network(held).split(sizes, 1)], 1)
        right[kind] = found == answers(examples[kind])
    shares = {name: float(right["one"][:, i].float().mean()) for i, name in enumerate(PROBED)}
    both = {kind: float(hits[:, :2].all(1).float().mean()) for kind, hits in right.items()}
    return {**shares, "both": both["one"], "both_unseen": both["unseen"]}


def text(rows: Mapping[str, Any]) -> str:
    """The table."""
    headings = (
        "tokens trained on", "codes", "colour", "shape", "place", "colour and shape", "unseen pairs",
        "captions right", "nats per caption token",
    )  # fmt: skip
    lines = []
    for name, row in rows.items():
        shares = [f"{row['probe'][key]:.1%}" for key in (*PROBED, "both", "both_unseen")]
        codes = "-" if "codes" not in row else f"{row['positions']} of {'+'.join(map(str, row['codes']))}"
        told = ["-", "-"] if "nats" not in row else [f"{row['captions']:.1%}", f"{row['nats']:.3f}"]
        lines.append((name, codes, *shares, *told))
    return common.table(headings, lines)


if __name__ == "__main__":
    common.run(main)
