"""LARP's claim at a small size: codes trained beside an autoregressive prior are easier to predict.

python -m benchmarks.larp_prior --json larp_prior.json

Clips of moving shapes (8 x 32 x 32). A LARP first learns to reconstruct without rounding and without a prior
(`--start-steps`); from there it goes on with rounding, per seed once with the prior's weight at 0.06 and once
at 0, for the same number of steps on the same batches. Then the same small language model learns the frozen
(nearest) codes of the training clips; it is measured on held-out clips, and so is the reconstruction.

Latents are normalised over the batch and the decoder's positions of latents are learned: with the published
choices a network this small shows the mean picture for longer than this benchmark lasts.

m clips · t frames · n codes · K codebook
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from lexel.data.clips import ClipsConfig
from lexel.data.example import stack_pixels
from lexel.evaluate.metrics import psnr
from lexel.models.raster_lm import RasterLM, RasterLMConfig
from lexel.tokenizers.larp import LARP, LARPConfig
from lexel.tokenizers.prior_loss import PriorConfig
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.train.objectives.larp import LarpObjective, LarpObjectiveConfig
from lexel.types import TokenBatch

WEIGHTS = (0.06, 0.0)
SHOWN = ("psnr", "prior", "prior_accuracy", "perplexity")
HELD_OUT = 256
LM_BATCH = 64


@dataclass(frozen=True)
class Clips:
    """Clips ``[m, t, 3, h, w]`` in [-1, 1] to train on and held-out ones."""

    train: Tensor
    validation: Tensor

    @classmethod
    def draw(cls, config: ClipsConfig, held_out: int) -> Clips:
        """All training clips of `config`, and the first `held_out` of the validation split."""
        train, validation = config.build("train"), config.build("validation")
        count = min(held_out, len(validation))
        return cls(
            stack_pixels([train[i] for i in range(len(train))]),
            stack_pixels([validation[i] for i in range(count)]),
        )


def config(options: argparse.Namespace) -> LARPConfig:
    """The tokenizer of every run: patches of 4 x 8 x 8, as published."""
    return LARPConfig(
        image_size=options.size,
        frames=options.frames,
        patch=8,
        frame_patch=4,
        latents=options.codes,
        width=options.width,
        layers=options.layers,
        heads=4,
        latent_width=16,
        norm="bn_b",
        learned=("queries", "latents"),
        quantizer=QuantizerConfig(
            "stochastic", codebook_size=options.codebook, temperature=0.03, entropy=0.0
        ),
        prior=PriorConfig(width=64, layers=2, heads=2, max_length=options.codes),
    )


def objective(options: argparse.Namespace, weight: float) -> LarpObjective:
    """LARP's objective with pixel terms instead of LPIPS and the GAN, which need more than small clips."""
    return LarpObjectiveConfig(
        l2=4.0,
        worst_pixels=0.5,
        quantizer=0.1,
        prior=weight,
        prior_rate=options.prior_rate,
        steps=options.steps,
    ).build()


def learn(
    options: argparse.Namespace, network: LARP, clips: Tensor, weight: float, seed: int, steps: int
) -> None:
    """Some steps on batches that depend on the seed only; `weight` below 0: without rounding and prior."""
    goal = objective(options, max(weight, 0.0))
    goal.prepare(network)
    groups = [{"params": [p], "lr": options.lr * goal.rate(name)} for name, p in network.named_parameters()]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], steps + 1, pct_start=0.05, cycle_momentum=False
    )
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = clips[torch.randint(len(clips), (options.batch,), generator=order)].to(options.device)
        torch.manual_seed(seed * steps + step)  # the same draws, whatever was drawn before
        output = network(batch, quantize=False) if weight < 0 else goal.predict(network, batch, step)
        loss, metrics = goal.generator_loss(output, batch, step, network.last_layer)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            shown = (f"{name} {float(metrics[name]):.3f}" for name in SHOWN if name in metrics)
            print(f"    step {step}: {', '.join(shown)}", flush=True)


@torch.no_grad()
def encode(network: LARP, clips: Tensor, device: str) -> Tensor:
    """The nearest codes, long ``[m, n]``."""
    pieces = [network.encode_video(piece.to(device)).indices[..., 0].cpu() for piece in clips.split(64)]
    return torch.cat(pieces)


@torch.no_grad()
def quality(network: LARP, clips: Tensor, device: str) -> float:
    """Mean PSNR of all frames, dB."""
    found = []
    for piece in clips.split(64):
        rebuilt = network.decode_video(network.encode_video(piece.to(device))).clamp(-1, 1)
        found.append(psnr(rebuilt.flatten(0, 1), piece.to(device).flatten(0, 1)).cpu())
    return float(torch.cat(found).mean())


def train_lm(options: argparse.Namespace, codes: Tensor, seed: int) -> RasterLM:
    """The same small language model over the codes long ``[m, n]`` of every tokenizer."""
    torch.manual_seed(seed)
    lm = RasterLMConfig(
        (options.codebook,), dim=128, layers=3, heads=4, ffn_dim=256, side=0, length=codes.shape[1],
        num_classes=1, positions="learned", dropout=0.1,
    ).build().to(options.device)  # fmt: skip
    optimizer = torch.optim.AdamW(lm.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, options.lm_steps + 1, pct_start=0.1, anneal_strategy="cos", cycle_momentum=False
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(options.lm_steps):
        batch = codes[torch.randint(len(codes), (LM_BATCH,), generator=order)].to(options.device)
        loss = nll(lm, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return lm.eval()


def nll(lm: RasterLM, codes: Tensor) -> Tensor:
    """Nats per code of long ``[b, n]``; scalar."""
    start = torch.full_like(codes[:, :1], lm.config.class_offset)
    ids = torch.cat([start, codes[:, :-1]], 1)
    positions = F.pad(torch.arange(ids.shape[1], device=ids.device)[:, None], (0, 2)).expand(len(ids), -1, -1)
    logits = lm(TokenBatch(ids, torch.ones_like(ids), positions)).logits[..., : lm.config.codebook_sizes[0]]
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def entropy(codes: Tensor, size: int) -> float:
    """Nats per code of long ``[m, n]`` when only how often each code occurs is known."""
    share = torch.bincount(codes.flatten(), minlength=size).double() / codes.numel()
    return float(torch.special.entr(share).sum())


def measure(
    options: argparse.Namespace, begun: LARP, clips: Clips, weight: float, seed: int
) -> dict[str, Any]:
    """One tokenizer, which goes on from where `begun` is, and its language model."""
    start, network = time.perf_counter(), copy.deepcopy(begun)
    learn(options, network, clips.train, weight, seed, options.steps)
    network.eval()
    seconds = time.perf_counter() - start
    train, held_out = (encode(network, part, options.device) for part in (clips.train, clips.validation))
    lm = train_lm(options, train, seed)
    with torch.no_grad():
        losses = {
            name: mean(float(nll(lm, piece.to(options.device))) for piece in part.split(128))
            for name, part in (("nll", held_out), ("nll_train", train[: len(held_out)]))
        }
    return {
        "weight": weight,
        "seed": seed,
        "psnr": quality(network, clips.validation, options.device),
        **losses,
        "unigram": entropy(held_out, options.codebook),
        "used": len(held_out.unique()),
        "seconds": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.parser(__doc__.splitlines()[0], "larp_prior", steps=0, size=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--weights", type=float, nargs="+", default=list(WEIGHTS), help="of the prior")
    parser.add_argument("--start-steps", type=int, default=5000, help="without rounding, shared by all")
    parser.add_argument(
        "--steps", type=int, default=1500, help="optimizer steps of each tokenizer after them"
    )
    parser.add_argument("--lm-steps", type=int, default=300, help="of each language model")
    parser.add_argument("--batch", type=int, default=8, help="clips per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--prior-rate", type=float, default=1.0, help="factor of it for the prior")
    parser.add_argument("--count", type=int, default=2048, help="training clips")
    parser.add_argument("--objects", type=int, default=1, help="most objects in a clip")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--codes", type=int, default=32, help="codes of a clip")
    parser.add_argument("--codebook", type=int, default=256)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.lm_steps, options.batch, options.count = 2, 2, 4, 8
        options.width, options.layers, options.seeds, options.codes = 16, 1, 1, 8
        options.start_steps = 2
    data = ClipsConfig(
        size=options.size, frames=options.frames, count=options.count, seed=options.seed,
        max_objects=options.objects, backgrounds=("light",),
    )  # fmt: skip
    clips = Clips.draw(data, 8 if options.quick else HELD_OUT)
    torch.manual_seed(options.seed)
    begun, rows = config(options).build().to(options.device), []
    print("start, without rounding", flush=True)
    learn(options, begun, clips.train, -1.0, options.seed, options.start_steps)
    for seed in range(options.seed, options.seed + options.seeds):
        for weight in options.weights:
            print(f"prior weight {weight}, seed {seed}", flush=True)
            rows.append(measure(options, begun, clips, weight, seed))
            print(f"    {rows[-1]}", flush=True)
    common.report(options, {"runs": rows}, text(rows))


def text(rows: Sequence[dict[str, Any]]) -> str:
    """One line per run."""
    headings = ("prior", "seed", "PSNR, dB", "NLL per code, nats", "training NLL", "unigram entropy", "used")
    lines = [
        (row["weight"], row["seed"], f"{row['psnr']:.2f}", f"{row['nll']:.3f}", f"{row['nll_train']:.3f}",
         f"{row['unigram']:.3f}", row["used"])
        for row in rows
    ]  # fmt: skip
    return common.table(headings, lines)


if __name__ == "__main__":
    common.run(main)
