"""Encode and decode speed and memory against transformers' and diffusers' class of the same network.

python -m benchmarks.throughput

Every pair holds the same weights; before anything is timed both must give the same codes and pictures. Then
both run in turn, first one and then the other first, and the median of the pairs' ratios is reported. On one
CPU thread the clock is the process's own CPU time, which other work on the machine hardly changes; elsewhere
it is the wall clock. Memory is measured in a process of its own per network, task and batch: its peak, and
how far the call raised it.

b batch · n positions · h w picture
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from benchmarks import common
from lexel.catalog import Layout
from lexel.evaluate.metrics import peak_memory_mb
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.vq import JANUS_TRANSFORMERS, VQTokenizer, VQTokenizerConfig
from lexel.types import Codes

MULT = (1, 1, 2, 2, 4)
CODES, WIDTH = 16384, 8
DIFFUSERS = Layout(
    name="diffusers",
    rules=(
        (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
        (r"\.mid\.0\.", ".mid_block.resnets.0."),
        (r"\.mid\.1\.", ".mid_block.attentions.0."),
        (r"\.mid\.2\.", ".mid_block.resnets.1."),
        (r"^encoder\.conv_blocks\.(\d+)\.", r"encoder.down_blocks.\1."),
        (r"^decoder\.conv_blocks\.(\d+)\.", r"decoder.up_blocks.\1."),
        (r"\.res\.", ".resnets."),
        (r"\.attn\.", ".attentions."),
        (r"\.downsample\.conv", ".downsamplers.0.conv"),
        (r"\.upsample\.conv", ".upsamplers.0.conv"),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    ),
)


@dataclass(frozen=True)
class Coder:
    """One implementation: pixels ``[b, 3, h, w]`` to codes ``[b, n]`` and back (None: it has no decoder)."""

    name: str
    network: nn.Module
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Pair:
    """title: of the network. build: (size, channels) → Lexel's coder and the peer's, of equal weights."""

    title: str
    build: Callable[[int, int], tuple[Coder, Coder]]


def own(tokenizer: Tokenizer, drawing: bool = True) -> Coder:
    """Lexel's coder; codes of these pictures fill a square grid."""

    def decode(indices: Tensor) -> Tensor:
        side = round(indices.shape[1] ** 0.5)
        return tokenizer.decode(Codes(indices[..., None], (side, side)))

    return Coder(
        "Lexel",
        tokenizer,
        lambda pixels: tokenizer.encode(pixels).indices[..., 0],
        decode if drawing else None,
    )


def vq16(size: int, channels: int, cosine: bool) -> VQTokenizer:
    """LlamaGen's VQ-16, of any width."""
    torch.manual_seed(0)
    quantizer = QuantizerConfig("learned", codebook_size=CODES, cosine=cosine, entropy=0.0)
    made = VQTokenizerConfig(size, channels, MULT, z_channels=2 * channels, quantizer=quantizer).build()
    spread(made.quantize)
    return made.eval()


@torch.no_grad()
def spread(quantizer: Any) -> None:
    """Rows far enough apart for pictures of random networks to get different codes; of unit length with a
    cosine codebook, where the peer takes that for granted."""
    nn.init.normal_(quantizer.embedding.weight)
    quantizer.embedding.weight.copy_(quantizer.codebook)


def fill(peer: nn.Module, layout: Layout, ours: nn.Module) -> None:
    """Give the peer our weights (1x1 convolutions may be linear maps there)."""
    shapes = {name: value.shape for name, value in peer.state_dict().items()}
    state = replace(layout, prefix="", zeros={}).export(ours)
    peer.load_state_dict({name: value.reshape(shapes[name]) for name, value in state.items()})
    peer.eval()


def with_janus(size: int, channels: int) -> tuple[Coder, Coder]:
    """VQ-16 with its unit-length codebook, and transformers' JanusVQVAE."""
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    ours = vq16(size, channels, cosine=True)
    config = JanusVQVAEConfig(
        base_channels=channels, channel_multiplier=list(MULT), latent_channels=2 * channels,
        num_patches=size // 16, embed_dim=WIDTH, num_embeddings=CODES,
    )  # fmt: skip
    peer: Any = JanusVQVAE(config)
    fill(peer, JANUS_TRANSFORMERS, ours)

    def encode(pixels: Tensor) -> Tensor:
        return rearrange(peer.encode(pixels).image_tokens, "(b n) -> b n", b=len(pixels))

    return own(ours), Coder("transformers JanusVQVAE", peer, encode, peer.decode)


def with_diffusers(size: int, channels: int) -> tuple[Coder, Coder]:
    """VQ-16 with a Euclidean codebook, and diffusers' VQModel."""
    from diffusers import VQModel

    ours = vq16(size, channels, cosine=False)
    last = len(MULT) - 1
    kinds = ["AttnDownEncoderBlock2D" if i == last else "DownEncoderBlock2D" for i in range(len(MULT))]
    ups = ["AttnUpDecoderBlock2D" if i == 0 else "UpDecoderBlock2D" for i in range(len(MULT))]
    peer: Any = VQModel(
        down_block_types=tuple(kinds), up_block_types=tuple(ups), layers_per_block=2,
        block_out_channels=tuple(channels * m for m in MULT), latent_channels=2 * channels, sample_size=size,
        num_vq_embeddings=CODES, vq_embed_dim=WIDTH, lookup_from_codebook=True,
    )  # fmt: skip
    fill(peer, DIFFUSERS, ours)

    def encode(pixels: Tensor) -> Tensor:
        indices = peer.quantize(peer.encode(pixels).latents)[2][2]
        return rearrange(indices, "(b n) -> b n", b=len(pixels))

    def decode(indices: Tensor) -> Tensor:
        side = size // 16
        shape = (len(indices), side, side, WIDTH)
        return peer.decode(indices.flatten(), force_not_quantize=True, shape=shape).sample

    return own(ours), Coder("diffusers VQModel", peer, encode, decode)


def with_chameleon(size: int, channels: int) -> tuple[Coder, Coder]:
    """Chameleon's VQGAN, and transformers' ChameleonVQVAE, which has no decoder."""
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    from lexel.tokenizers.chameleon import TRANSFORMERS, ChameleonConfig

    torch.manual_seed(0)
    config = ChameleonConfig(size, channels, z_channels=2 * channels, embed_dim=2 * channels)
    ours = config.build().eval()
    spread(ours.quantize)
    peer = ChameleonVQVAE(
        ChameleonVQVAEConfig(
            base_channels=channels, latent_channels=2 * channels, embed_dim=2 * channels, resolution=size
        )
    )
    fill(peer, TRANSFORMERS, ours)

    def encode(pixels: Tensor) -> Tensor:
        return rearrange(peer.encode(pixels).image_tokens, "(b n) -> b n", b=len(pixels))

    return own(ours, drawing=False), Coder("transformers ChameleonVQVAE", peer, encode, None)


PAIRS = {
    "janus": Pair("VQ-16", with_janus),
    "diffusers": Pair("VQ-16, Euclidean codebook", with_diffusers),
    "chameleon": Pair("Chameleon VQGAN", with_chameleon),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.parser(__doc__.splitlines()[0], "throughput", size=128)
    parser.add_argument("--pairs", nargs="+", choices=tuple(PAIRS), default=list(PAIRS), metavar="NAME",
                        help=f"which of {', '.join(PAIRS)}")  # fmt: skip
    parser.add_argument("--channels", type=int, default=32, help="width of the networks (published: 128)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", nargs=3, metavar=("PAIR", "WHO", "TASK"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.batches, options.repeats = 32, [1, 2], 1
    with torch.no_grad():
        if options.memory_of:
            print(json.dumps(memory_here(options)))
        else:
            run(options)


def run(options: argparse.Namespace) -> None:
    """Check, time and weigh every pair; print the table."""
    rows = []
    for name in options.pairs:
        ours, theirs = (_placed(c, options.device) for c in PAIRS[name].build(options.size, options.channels))
        equal = agree(ours, theirs, options)
        count = common.parameters(ours.network)
        print(f"{PAIRS[name].title}: {count / 1e6:.2f} M parameters, {equal}", flush=True)
        for task in ("encode", "decode"):
            if getattr(theirs, task) is None:
                continue
            for batch in options.batches:
                row = {"pair": name, "title": PAIRS[name].title, "peer": theirs.name, "task": task}
                row |= {"batch": batch, "equal": equal, **race(ours, theirs, task, batch, options)}
                row["memory_mb"] = [memory_of(options, name, who, task, batch) for who in ("ours", "theirs")]
                rows.append(row)
                print(f"    {task} {batch}: {row['ratio']:.2f} times {theirs.name}", flush=True)
    common.report(options, {"rows": rows}, text(rows))


def agree(ours: Coder, theirs: Coder, options: argparse.Namespace) -> str:
    """One sentence on how equal codes and pictures are. ValueError when they are not."""
    pixels = _pixels(2, options)
    mine, other = ours.encode(pixels), theirs.encode(pixels)
    same = float((mine == other).float().mean())
    found = f"{same:.1%} of codes equal ({len(mine.unique())} different ones)"
    if same < 0.99:
        raise ValueError(f"Lexel and {theirs.name} disagree: {found}.")
    if ours.decode is None or theirs.decode is None:
        return found
    difference = float((ours.decode(mine) - theirs.decode(mine)).abs().max())
    if difference > 1e-2:
        raise ValueError(f"Lexel and {theirs.name} draw pictures {difference:.2g} apart.")
    return f"{found}, pictures {difference:.0e} apart at most"


def race(ours: Coder, theirs: Coder, task: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Pictures per second of both and the median ratio of paired runs, with its extremes."""
    value = _input(ours, task, batch, options)
    calls = [getattr(coder, task) for coder in (ours, theirs)]
    for call in calls:
        call(value)
    seconds: list[tuple[float, float]] = []
    for repeat in range(options.repeats):
        pair = [0.0, 0.0]
        for who in (0, 1) if repeat % 2 == 0 else (1, 0):
            pair[who] = timed(calls[who], value, options.device)
        seconds.append((pair[0], pair[1]))
    ratios = sorted(theirs_s / ours_s for ours_s, theirs_s in seconds)
    return {
        "ours_per_second": batch / statistics.median(s for s, _ in seconds),
        "theirs_per_second": batch / statistics.median(s for _, s in seconds),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
    }


def clock(device: str) -> float:
    """Seconds, see the module docstring; the device's work is finished first."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def timed(call: Callable[[Tensor], Any], value: Tensor, device: str) -> float:
    """Seconds of one call."""
    start = clock(device)
    call(value)
    return clock(device) - start


def memory_of(options: argparse.Namespace, pair: str, who: str, task: str, batch: int) -> list[float]:
    """Peak of a fresh process (with --quick: of this one) in MB, and by how much one call raised it."""
    if options.quick:
        here = argparse.Namespace(**{**vars(options), "memory_of": (pair, who, task), "batches": [batch]})
        return memory_here(here)
    command = [
        sys.executable, "-m", "benchmarks.throughput", "--memory-of", pair, who, task,
        "--size", str(options.size), "--channels", str(options.channels), "--batches", str(batch),
        "--device", options.device,
    ]  # fmt: skip
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [float(number) for number in json.loads(done.stdout.splitlines()[-1])]


def memory_here(options: argparse.Namespace) -> list[float]:
    """See `memory_of`: the work of that process."""
    pair, who, task = options.memory_of
    ours, theirs = PAIRS[pair].build(options.size, options.channels)
    coder = _placed(ours if who == "ours" else theirs, options.device)
    value = _input(coder, task, options.batches[0], options)
    before = _peak(options.device)
    getattr(coder, task)(value)
    after = _peak(options.device)
    return [after, after - before]


def _peak(device: str) -> float:
    """The most memory held so far in MB: of the device, else of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent held when it started this process
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024 / 1e6
    return peak_memory_mb()


def _placed(coder: Coder, device: str) -> Coder:
    coder.network.to(device)
    return coder


def _pixels(batch: int, options: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(options.seed)
    shape = (batch, 3, options.size, options.size)
    return (torch.rand(shape, generator=generator) * 2 - 1).to(options.device)


def _input(coder: Coder, task: str, batch: int, options: argparse.Namespace) -> Tensor:
    if task == "encode":
        return _pixels(batch, options)
    generator = torch.Generator().manual_seed(options.seed)
    shape = (batch, (options.size // 16) ** 2)
    return torch.randint(0, CODES, shape, generator=generator).to(options.device)


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    headings = ("network", "peer", "task", "batch", "Lexel, pictures/s", "peer, pictures/s", "Lexel / peer",
                "range", "Lexel peak MB", "peer peak MB")  # fmt: skip
    return common.table(
        headings,
        [
            (
                r["title"], r["peer"], r["task"], r["batch"], f"{r['ours_per_second']:.2f}",
                f"{r['theirs_per_second']:.2f}", f"{r['ratio']:.2f}",
                "–".join(f"{x:.2f}" for x in r["ratio_range"]),
                *(f"{peak:.0f} (+{rise:.0f})" for peak, rise in r["memory_mb"]),
            )
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    common.run(main)
