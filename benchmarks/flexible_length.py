"""Flexible length: quality against codes kept, against one tokenizer per length and against JPEG and WebP.

python -m benchmarks.flexible_length --data PICTURES

All tokenizers are TiTok-like (`TiTok`) with finite scalar quantization, 12 bits per code, and are
trained for the same number of steps: `tail-drop` on lengths uniform in 1..N, one per batch (One-D-Piece),
`nested` on powers of two, one per picture (FlexTok's nested dropout), and one of fixed length for every power
of two up to N.

b batch · N longest code · m pictures
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, log2, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.codecs import at_budgets
from benchmarks.features import Quality, build_features
from benchmarks.plot import plot
from lexel.evaluate.metrics import psnr
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.titok import TiTok, TiTokConfig

LEVELS = (8, 8, 8, 8)
CODECS = {
    "JPEG bare": ("JPEG", True),
    "WebP bare": ("WEBP", True),
    "JPEG file": ("JPEG", False),
    "WebP file": ("WEBP", False),
}
BEYOND = (2, 4, 8, 16)
"""Budgets beyond the longest code, as multiples of it: where codecs come into their own."""


class NestedDropout(TiTok):
    """Trained on lengths that are powers of two, drawn for every picture alone. Saved and loaded it is a
    `TiTok`: the draw matters in training only."""

    def _draw_lengths(self, count: int, generator: torch.Generator | None) -> Tensor:
        if not self.training:
            return super()._draw_lengths(count, generator)
        device = "cpu" if generator is None else generator.device
        highest = int(log2(self.config.latents))
        return 2 ** torch.randint(0, highest + 1, (count,), generator=generator, device=device)


@dataclass(frozen=True)
class NestedDropoutConfig(TiTokConfig):
    """TiTokConfig whose training draws powers of two."""

    def build(self) -> TiTok:
        """The tokenizer with fresh weights."""
        return NestedDropout(self)


def lengths(longest: int) -> list[int]:
    """1, 2, 4, … up to `longest`."""
    return [2**i for i in range(int(log2(longest)) + 1)]


def budget(length: int) -> int:
    """Bytes of `length` codes."""
    return ceil(length * log2(prod(LEVELS)) / 8)


def configs(options: argparse.Namespace) -> Iterator[tuple[str, TiTokConfig]]:
    """Every tokenizer by name."""
    sizes: dict[str, Any] = {
        "image_size": options.size, "patch": options.patch or options.size // 4, "width": options.width,
        "layers": options.layers, "heads": 4, "quantizer": QuantizerConfig("fsq", levels=LEVELS),
    }  # fmt: skip
    longest = options.latents
    yield "tail-drop", TiTokConfig(**sizes, latents=longest, tail_drop="batch")
    yield "nested", NestedDropoutConfig(**sizes, latents=longest, tail_drop="sample")
    for length in reversed(lengths(longest)):
        yield f"fixed-{length}", TiTokConfig(**sizes, latents=length, tail_drop="none")


@torch.no_grad()
def measure(tokenizer: Tokenizer, pictures: Tensor, kept: list[int], quality: Quality) -> dict[str, Any]:
    """PSNR and feature distance of ``[m, 3, h, w]`` for every number of codes kept."""
    found = {}
    for length in kept:
        wanted = length if tokenizer.layout.flexible else None
        pieces = common.batches(pictures)
        rebuilt = torch.cat([tokenizer.decode(tokenizer.encode(piece, wanted)) for piece in pieces])
        found[str(length)] = _figures(rebuilt, pictures, quality)
    return found


def _figures(rebuilt: Tensor, pictures: Tensor, quality: Quality) -> dict[str, Any]:
    return {
        "psnr": float(psnr(rebuilt, pictures).mean()),
        "feature_distance": quality.feature_distance(rebuilt),
        "fits": 1.0,
    }


def measure_codec(kind: str, bare: bool, pictures: Tensor, budgets: list[int], quality: Quality) -> Any:
    """The same for a codec by bytes; where not every picture fits only `fits` is a number."""
    found = {}
    for bytes_, row in zip(budgets, at_budgets(pictures, kind, budgets, bare)):
        pixels = row["pixels"]
        nothing = {"psnr": None, "feature_distance": None, "fits": row["fits"]}
        found[str(bytes_)] = (
            nothing if pixels is None else _figures(pixels.to(pictures.device), pictures, quality)
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.parser(__doc__.splitlines()[0], "flexible_length", steps=3500)
    parser.set_defaults(count=256, batch=8, lr=4e-4)  # transformers stall at higher rates
    parser.add_argument("--latents", type=int, default=32, help="codes of a whole picture, a power of two")
    parser.add_argument("--patch", type=int, default=0, help="pixels (default: a quarter of the side)")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of PSNR against bytes")
    options = parser.parse_args(arguments)
    if options.latents & (options.latents - 1) or options.latents < 1:
        raise ValueError(f"--latents must be a power of two, got {options.latents}.")
    common.shrink(options)
    if options.quick:
        options.latents, options.width, options.layers = 4, 16, 1
    run(options)


def run(options: argparse.Namespace) -> None:
    """Train and measure every tokenizer, then the codecs; print the tables."""
    data = common.source(options.data, options.size)
    pictures = common.held_out(data, options.count).to(options.device)
    features = build_features(options, data)
    quality, kept = Quality(features, pictures), common.Kept(options.out)
    recipe = common.Recipe(data, options.steps, options.batch, options.seed, options.device, options.lr)
    judged = {"data": data, "count": len(pictures), "features": features.description}
    every, results = lengths(options.latents), {}
    jobs = list(configs(options))
    for number, (name, config) in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {name}", flush=True)
        tokenizer, seconds = recipe.train(options.out / name, config)
        wanted = every if tokenizer.layout.flexible else [config.latents]
        settings = {**judged, "network": tokenizer.fingerprint(), "lengths": wanted}
        found = kept.get(name, settings, lambda t=tokenizer, w=wanted: measure(t, pictures, w, quality))  # type: ignore[misc]
        count = common.parameters(tokenizer)
        results[name] = {"parameters": count, "train_seconds": seconds, "lengths": found}
        print("    " + ", ".join(f"{n}: {found[str(n)]['psnr']:.2f} dB" for n in wanted), flush=True)
    budgets = [budget(n) for n in every] + [budget(options.latents) * m for m in BEYOND]
    codecs = {
        name: kept.get(
            name.replace(" ", "-"), {**judged, "budgets": budgets},
            lambda k=kind, b=bare: measure_codec(k, b, pictures, budgets, quality),  # type: ignore[misc]
        )
        for name, (kind, bare) in CODECS.items()
    }  # fmt: skip
    curves = gather(results, codecs, every)
    if options.plot:
        plot(options.plot, drawn(curves), "bytes per picture", "PSNR, dB")
    content = {"features": features.description, "entries": results, "codecs": codecs}
    tables = [
        f"{title}\n\n{text(curves, key, digits, [*every, *(f'{m} x' for m in BEYOND)])}"
        for title, key, digits in (("PSNR, dB", "psnr", 2), ("Feature distance", "feature_distance", 4))
    ]
    common.report(options, content, *tables)
    print(f"\nFeature network: {features.description}.\n{len(pictures)} held-out pictures.")


def gather(results: Any, codecs: Any, every: list[int]) -> dict[str, dict[int, dict[str, Any]]]:
    """Figures by column and bytes."""
    fixed = {budget(n): results[f"fixed-{n}"]["lengths"][str(n)] for n in every}
    flexible = {
        name: {budget(int(n)): row for n, row in results[name]["lengths"].items()}
        for name in ("tail-drop", "nested")
    }
    by_bytes = {name: {int(b): row for b, row in rows.items()} for name, rows in codecs.items()}
    return {**flexible, "one per length": fixed, **by_bytes}


def drawn(curves: dict[str, dict[int, dict[str, Any]]]) -> dict[str, list[tuple[float, float]]]:
    """What the plot shows: every budget that all pictures keep."""
    points = {
        name: [(float(b), row["psnr"]) for b, row in rows.items() if row["psnr"] is not None]
        for name, rows in curves.items()
    }
    return {name: rows for name, rows in points.items() if rows}


def text(curves: dict[str, dict[int, dict[str, Any]]], key: str, digits: int, names: Sequence[Any]) -> str:
    """One table: a row per budget, a column per tokenizer or codec; in brackets the share of pictures that
    fit where not all do."""

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        return f"({row['fits']:.0%} fit)" if row[key] is None else f"{row[key]:.{digits}f}"

    budgets = sorted({b for rows in curves.values() for b in rows})
    rows = [(name, b, *(cell(rows.get(b)) for rows in curves.values())) for name, b in zip(names, budgets)]
    return common.table(("codes", "bytes", *curves), rows)


if __name__ == "__main__":
    common.run(main)
