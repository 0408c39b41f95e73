"""`lexel draw`: pictures (LARP: clips) of classes or captions from a published model."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from lexel.cli.arguments import add_command, add_device, add_json, at_least, find_device, parse_labels
from lexel.cli.output import save_picture, show
from lexel.errors import LexelError


def add(commands: Any) -> None:
    """The command's arguments."""
    draw = add_command(
        commands, "draw", _run, "draw classes or captions with a published model",
        "lexel draw llamagen-gpt-c2i-b-256 --classes 207,360 --guidance 4 --top-k 2000 --out pictures",
    )  # fmt: skip
    draw.add_argument(
        "model", metavar="NAME_OR_DIR", help="published name (`lexel published`) or model folder"
    )
    what = draw.add_mutually_exclusive_group(required=True)
    what.add_argument("--classes", type=parse_labels, metavar="N,N,…", help="class labels from 0")
    what.add_argument("--captions", nargs="+", metavar="TEXT", help="what to draw, in words")
    draw.add_argument("--count", type=at_least(1), default=1, help="how many pictures of each (default: 1)")
    draw.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR", help="default: samples")
    files = {
        "--checkpoint": ("FILE", "local file of the published name (default: the hub's)"),
        "--config": ("JSON", "hyper-parameters that differ from the published ones"),
        "--tokenizer-checkpoint": ("FILE", "local file of the published tokenizer (default: the hub's)"),
        "--tokenizer-config": ("JSON", "its hyper-parameters that differ from the published ones"),
        "--sampling": ("JSON", "fields of SamplingConfig, such as schedule and further; they come first"),
    }
    for option, (kind, help) in files.items():
        draw.add_argument(option, type=Path, metavar=kind, help=help)
    draw.add_argument(
        "--tokenizer", metavar="NAME_OR_DIR", help="what draws the codes (default: the one they belong to)"
    )
    draw.add_argument(
        "--caption-encoder", metavar="DIR", help="T5 folder or hub id (default: google/flan-t5-xl)"
    )
    draw.add_argument("--guidance", type=at_least(0.0, float), default=1.0, help="1 is none (default: 1)")
    draw.add_argument("--top-k", type=at_least(0), default=0, help="most probable codes kept (default: all)")
    draw.add_argument("--top-p", type=at_least(0.0, float, 1.0), default=1.0, help="of them, by probability")
    draw.add_argument(
        "--temperature", type=at_least(0.0, float), default=1.0, help="0 is greedy (default: 1)"
    )
    draw.add_argument("--seed", type=at_least(0), default=0, help="repeats exactly (default: 0)")
    draw.add_argument(
        "--decoding", default="plain", metavar="NAME", help="plain, jacobi, pac, … (default: plain)"
    )
    draw.add_argument("--batch-size", type=at_least(1), default=64, help="drawn side by side (default: 64)")
    draw.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    add_device(draw)
    add_json(draw)


def _run(arguments: argparse.Namespace) -> None:
    from lexel.data.media import write_clip
    from lexel.hub import decode_config
    from lexel.sample.bundle import read_json
    from lexel.sample.conditional import draw
    from lexel.sample.logits import SamplingConfig
    from lexel.sample.strategies import make_drafter, strategies
    from lexel.tokenizers.larp import LARP

    settings = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "guidance")}
    if arguments.sampling:
        settings |= read_json(arguments.sampling)
    device = find_device(arguments.device)
    lm, tokenizer = (network.to(device) for network in _conditional_model(arguments))
    what = list(arguments.captions or arguments.classes)
    conditions: list[Any] = what
    if arguments.captions:
        from lexel.models.caption_encoder import FLAN_T5_XL, CaptionEncoder

        encoder = CaptionEncoder.from_pretrained(arguments.caption_encoder or FLAN_T5_XL)
        conditions = encoder.to(device).encode(what)
    codes = draw(
        lm,
        [condition for condition in conditions for _ in range(arguments.count)],
        sampling=decode_config(SamplingConfig, settings),
        seed=arguments.seed,
        drafter=make_drafter(strategies(lm, {}), lm, arguments.decoding, None),
        rows=arguments.batch_size,
    )
    kind = "gif" if isinstance(tokenizer, LARP) else "png"
    paths = [arguments.out / f"{number:04d}.{kind}" for number in range(len(codes))]
    for number, path in enumerate(paths):
        one = codes[number : number + 1].to(device)
        if isinstance(tokenizer, LARP):
            whole = replace(one, frames=tokenizer.config.groups)
            write_clip(tokenizer.decode_video(whole)[0].clamp(-1, 1).cpu(), path)
        else:
            save_picture(tokenizer.decode(one)[0].clamp(-1, 1).cpu(), path)
    shown = [what[number // arguments.count] for number in range(len(paths))]
    values = [{"picture": str(path), "of": one} for path, one in zip(paths, shown)]
    show(arguments, {"seed": arguments.seed, "pictures": values}, "\n".join(map(str, paths)))


def _conditional_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model to draw with and the tokenizer of its codes. Raises LexelError when they do not fit."""
    import torch

    from lexel.models import find_published, load_published
    from lexel.models.raster_lm import RasterLM
    from lexel.sample.bundle import load_tokenizer_of, read_json

    config = read_json(arguments.config) if arguments.config else None
    tokenizer_config = read_json(arguments.tokenizer_config) if arguments.tokenizer_config else {}
    name = arguments.tokenizer
    if Path(arguments.model).is_dir():
        lm: Any = RasterLM.from_pretrained(arguments.model)
    else:
        lm = load_published(arguments.model, arguments.checkpoint, config)
        row = find_published(arguments.model)[1]
        if name is None:
            name, tokenizer_config = row.tokenizer, {**row.tokenizer_arguments, **tokenizer_config}
    if not isinstance(lm, RasterLM):
        raise LexelError(f"{arguments.model} is no class- or caption-conditional model.")
    given = "caption" if arguments.captions else "class"
    if lm.config.condition != given:
        raise LexelError(f"{arguments.model} draws from a {lm.config.condition} condition, not a {given}.")
    if not name:
        raise LexelError(f"--tokenizer: name the tokenizer whose codes {arguments.model} was trained on.")
    tokenizer = load_tokenizer_of(
        name,
        checkpoint=arguments.tokenizer_checkpoint,
        config=tokenizer_config or None,
    )
    if tuple(tokenizer.layout.codebook_sizes) != lm.config.codebook_sizes:
        raise LexelError(
            f"{arguments.model} draws codes of {lm.config.codebook_sizes}, {name} has "
            f"{tuple(tokenizer.layout.codebook_sizes)}; use the tokenizer that it was trained with."
        )
    return lm.to(getattr(torch, arguments.dtype)), tokenizer
