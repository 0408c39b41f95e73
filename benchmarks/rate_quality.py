"""Quality at equal bits: six quantizers inside one network, trained alike, 12 bits per position each.

python -m benchmarks.rate_quality --data PICTURES

Every entry has the same decoder but for the 1x1 convolution that reads its codes; the encoder's width is
chosen so that all have the first entry's number of parameters (within 5 %). Codes are measured jointly: with
two codebooks of 64 a position's code is one of 4,096.

b batch · n positions · k codebooks · m pictures
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, log2, prod
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.features import Quality, build_features
from lexel.evaluate.metrics import CodebookUsage, psnr
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.factorized import FactorizedTokenizerConfig
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.vq import RasterConfig, VQTokenizerConfig
from lexel.train.objectives.teachers import VisionTeacher
from lexel.train.objectives.tokenizer import RepresentationConfig, TokenizerObjectiveConfig

BITS = 12
TOLERANCE = 0.05
CELL = 4  # pixels per position at 32 pixels; larger pictures get larger cells, so 64 positions always
UNIT = 4  # encoder widths are multiples of this


@dataclass(frozen=True)
class Entry:
    """embed_dim: width of the quantized latents (of one branch). branches: 1, or those of a factorized
    tokenizer; teacher: what its second branch predicts features of ("": no representation loss)."""

    title: str
    quantizer: QuantizerConfig
    embed_dim: int = 8
    branches: int = 1
    teacher: str = ""


def codebook(kind: str, size: int, positions: int = 1024) -> QuantizerConfig:
    """An EMA codebook whose codes are replaced when used less than a tenth as often as the average (of
    `positions` per step), or one that gradients train (LlamaGen's), without entropy term."""
    rare = 0.1 * positions / size
    return QuantizerConfig(kind, codebook_size=size, decay=0.99, dead_below=rare, entropy=0.0)


def entries(positions: int) -> dict[str, Entry]:
    """Every entry by name; `positions` per training step."""
    codes = 2**BITS
    half, third = (codebook("learned", 2 ** (BITS // k)) for k in (2, 3))
    return {
        "vq": Entry("VQ, EMA codebook", codebook("vq", codes, positions)),
        "vq-learned": Entry("VQ, learned codebook", codebook("learned", codes)),
        "fq-dual": Entry("FQ dual, learned codebooks", half, branches=2),
        "fq-triple": Entry("FQ triple, learned codebooks", third, branches=3),
        "lfq": Entry("LFQ", QuantizerConfig("sign", codebook_size=codes, entropy=0.1), BITS),
        "ibq": Entry("IBQ", QuantizerConfig("ibq", codebook_size=codes, entropy=0.05), 32),
        "bae": Entry("BAE", QuantizerConfig("bernoulli", codebook_size=codes, commitment=0.0), 32),
        "fq-dual-ema": Entry(
            "FQ dual, EMA codebooks", codebook("vq", 2 ** (BITS // 2), positions), branches=2
        ),
        "fq-triple-ema": Entry(
            "FQ triple, EMA codebooks", codebook("vq", 2 ** (BITS // 3), positions), branches=3
        ),
        "fsq": Entry("FSQ 8x8x8x8", QuantizerConfig("fsq", levels=(8, 8, 8, 8))),
    }


TAUGHT = "fq-dual-teacher"
DEFAULT = ("vq", "fq-dual-ema", "fq-triple-ema", "vq-learned", "fq-dual", "fq-triple", "lfq", "ibq", "bae")


def config(entry: Entry, size: int, width: int, encoder: int | None = None) -> RasterConfig:
    """The tokenizer config: `width` channels in the decoder, `encoder` of them (None: as many) before the
    codes."""
    wide = width if encoder is None else encoder
    sizes: dict[str, Any] = {
        "image_size": size,
        "channels": UNIT,
        "channel_mult": (wide // UNIT,),
        "decoder_mult": (width // UNIT,),
        "res_blocks": 1,
        "z_channels": width,
        "embed_dim": entry.embed_dim,
        "attention": False,
        "norm_groups": 8,
        "stem": CELL * size // 32,
        "quantizer": entry.quantizer,
    }
    if entry.branches == 1:
        return VQTokenizerConfig(**sizes)
    return FactorizedTokenizerConfig(**sizes, branches=entry.branches, adapter_layers=1, adapter_heads=2)


def match(entry: Entry, size: int, width: int, target: int, tolerance: float) -> tuple[RasterConfig, int]:
    """The config whose number of parameters is nearest to `target`, and that number. ValueError when it is
    off by more than the share `tolerance`."""
    found: list[tuple[int, int, RasterConfig]] = []
    for encoder in range(UNIT, 2 * width + 1, UNIT):
        made = config(entry, size, width, encoder)
        count = common.parameters(made.build())  # type: ignore[attr-defined]
        found.append((abs(count - target), count, made))
    gap, count, best = min(found, key=lambda row: row[0])
    if gap > tolerance * target:
        raise ValueError(f"{entry.title} cannot have {target} parameters; the nearest number is {count}.")
    return best, count


@torch.no_grad()
def measure(tokenizer: Tokenizer, pictures: Tensor, quality: Quality) -> dict[str, float]:
    """Quality of the reconstructions of ``[m, 3, h, w]`` and statistics of their joint codes."""
    sizes = tokenizer.codebook_sizes
    each, rebuilt, joint = CodebookUsage(sizes), [], []
    for pixels in common.batches(pictures):
        codes = tokenizer.encode(pixels)
        each.update(codes)
        rebuilt.append(tokenizer.decode(codes))
        weights = torch.tensor([prod(sizes[:j]) for j in range(len(sizes))], device=pixels.device)
        joint.append((codes.indices * weights).sum(-1).flatten())
    counts = torch.bincount(torch.cat(joint), minlength=prod(sizes)).double()
    shares = counts / counts.sum()
    images = torch.cat(rebuilt)
    return {
        "psnr": float(psnr(images, pictures).mean()),
        "feature_distance": quality.feature_distance(images),
        "rfid": quality.frechet(images),
        "usage": float((counts > 0).double().mean()),
        "usage_each": each.usage,
        "entropy_bits": float(-(shares[shares > 0] * shares[shares > 0].log2()).sum()),
        "bits_per_picture": log2(prod(sizes)) * codes.indices.shape[1],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.parser(__doc__.splitlines()[0], "rate_quality", steps=1000)
    known = tuple(entries(1))
    help_text = f"which of {', '.join(known)}; the first sets the number of parameters"
    parser.add_argument(
        "--entries", nargs="+", choices=known, default=DEFAULT, metavar="NAME", help=help_text
    )
    parser.add_argument("--teacher", metavar="DIR_OR_ID", help=f"a vision model: adds the entry {TAUGHT}")
    parser.add_argument("--width", type=int, default=64, help="channels of the decoder")
    options = parser.parse_args(arguments)
    common.shrink(options)
    if options.quick:
        options.width = 16
    run(options)


def run(options: argparse.Namespace) -> None:
    """Train and measure every entry, print the table."""
    data = common.source(options.data, options.size)
    pictures = common.held_out(data, options.count).to(options.device)
    features = build_features(options, data)
    quality, kept = Quality(features, pictures), common.Kept(options.out)
    recipe = common.Recipe(data, options.steps, options.batch, options.seed, options.device, options.lr)
    chosen = entries(options.batch * (32 // CELL) ** 2)
    if options.teacher:
        chosen[TAUGHT] = replace(chosen["fq-dual"], title="FQ dual, with teacher", teacher=options.teacher)
        options.entries = [*options.entries, TAUGHT]
    target = common.parameters(config(chosen[options.entries[0]], options.size, options.width).build())  # type: ignore[attr-defined]
    tolerance = inf if options.quick else TOLERANCE
    results: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(options.entries, 1):
        entry = chosen[name]
        made, count = match(entry, options.size, options.width, target, tolerance)
        print(f"[{number}/{len(options.entries)}] {entry.title}: {count:,} parameters", flush=True)
        made, objective = taught(entry, made, recipe.objective)
        tokenizer, seconds = recipe.train(options.out / name, made, objective)
        settings = {"network": tokenizer.fingerprint(), "data": data, "count": len(pictures),
                    "features": features.description}  # fmt: skip
        found = kept.get(name, settings, lambda t=tokenizer: measure(t, pictures, quality))  # type: ignore[misc]
        results[name] = {"title": entry.title, "parameters": count, "train_seconds": seconds, **found}
        print(f"    {found['psnr']:.2f} dB, usage {found['usage']:.1%}", flush=True)
    common.report(options, {"features": features.description, "entries": results}, text(results))
    print(f"\nFeature network: {features.description}.\n{len(pictures)} held-out pictures.")


def taught(
    entry: Entry, made: Any, objective: TokenizerObjectiveConfig
) -> tuple[RasterConfig, TokenizerObjectiveConfig]:
    """Config and objective with FQGAN's representation loss where the entry has a teacher. The head that it
    trains is not counted among the parameters: nobody needs it afterwards."""
    if not entry.teacher:
        return made, objective
    width = VisionTeacher(entry.teacher).network.config.hidden_size
    terms = (RepresentationConfig(entry.teacher, "sem"),)
    return replace(made, feature_dims=(width,), feature_layers=1, feature_heads=1), replace(
        objective, representation=terms
    )


def text(results: dict[str, dict[str, Any]]) -> str:
    """The table."""
    headings = (
        "quantizer", "parameters", "bits", "PSNR dB", "feature distance", "rFID", "codes used",
        "of each codebook", "entropy, bits of 12", "training s",
    )  # fmt: skip
    rows = [
        (
            r["title"], f"{r['parameters'] / 1e3:.0f} k", f"{r['bits_per_picture']:.0f}", f"{r['psnr']:.2f}",
            f"{r['feature_distance']:.4f}", f"{r['rfid']:.3f}", f"{r['usage']:.1%}", f"{r['usage_each']:.1%}",
            f"{r['entropy_bits']:.2f}", f"{r['train_seconds']:.0f}",
        )
        for r in results.values()
    ]  # fmt: skip
    return common.table(headings, rows)


if __name__ == "__main__":
    common.run(main)
