"""`lexel sample`: draw pictures of a text, also while they are drawn (--stream) and in part (--inpaint)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexel.cli.arguments import (
    acceptance_config,
    add_acceptance,
    add_bundle,
    add_command,
    add_detokenizer,
    add_dtype,
    add_json,
    add_sampling,
    at_least,
    load_pipeline,
    parse_box,
)
from lexel.cli.output import save_picture, show
from lexel.errors import LexelError

if TYPE_CHECKING:
    from lexel.sample.partial import Partial, Partials
    from lexel.sample.pipeline import Pipeline
    from lexel.types import GenerationOutput


def add(commands: Any) -> None:
    """The command's arguments."""
    sample = add_command(
        commands, "sample", _run, "draw pictures of a text",
        'lexel sample "a red circle left of a blue square" --count 4 --out pictures --seed 1',
    )  # fmt: skip
    sample.add_argument("text", help="what to draw")
    sample.add_argument("--count", type=at_least(1), default=4, help="how many pictures (default: 4)")
    sample.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR", help="default: samples")
    sample.add_argument("--guidance", type=at_least(0.0, float), help="1 is none (default: the bundle's)")
    sample.add_argument(
        "--stream", action="store_true", help="write the pictures while they are drawn, too, row by row"
    )
    sample.add_argument(
        "--inpaint", type=Path, metavar="PICTURE",
        help="draw a part of this picture anew; the text says what the whole shall show ('': anything)",
    )  # fmt: skip
    part = sample.add_mutually_exclusive_group()
    part.add_argument(
        "--mask", type=parse_box, metavar="X0,Y0,X1,Y1",
        help="of --inpaint: the part to draw, in pixels of the bundle's picture size",
    )  # fmt: skip
    part.add_argument(
        "--keep",
        type=parse_box,
        metavar="X0,Y0,X1,Y1",
        help="of --inpaint: the part to keep, around which to draw",
    )
    for add_options in (add_sampling, add_acceptance, add_detokenizer, add_bundle, add_dtype, add_json):
        add_options(sample)


def _run(arguments: argparse.Namespace) -> None:
    from lexel.document import Document, Image, Text

    pipe = load_pipeline(arguments)
    paths = [arguments.out / f"{number:04d}.png" for number in range(arguments.count)]
    if arguments.inpaint is not None or arguments.mask or arguments.keep:
        output = _completed(pipe, arguments)
    else:
        document: Document = [Text(arguments.text), Image.blank()]
        partials = pipe.stream(
            document,
            decoding=arguments.decoding,
            acceptance=acceptance_config(arguments),
            **_drawing_options(arguments),
        )
        output = _watched(partials, paths) if arguments.stream else partials.wait()
    for path, document in zip(paths, output.documents):
        save_picture(document[-1].pixels, path)  # type: ignore[union-attr]
    stats = {
        "mean_accepted": output.stats.mean_accepted,
        "target_forwards": output.stats.target_forwards,
        "seconds": output.stats.seconds,
    }
    values = {"text": arguments.text, "seed": arguments.seed, "pictures": [str(p) for p in paths], **stats}
    show(arguments, values, "\n".join(str(path) for path in paths))


def _completed(pipe: Pipeline, arguments: argparse.Namespace) -> GenerationOutput:
    """The pictures of --inpaint. Raises LexelError for options that make no sense together."""
    from lexel.sample.completion import cells_outside

    box = arguments.mask or arguments.keep
    if arguments.inpaint is None or box is None:
        raise LexelError("--inpaint PICTURE and one of --mask and --keep belong together.")
    if arguments.stream or arguments.acceptance != "exact":
        raise LexelError("--inpaint draws without --stream and with --acceptance exact.")
    keep = cells_outside(box, pipe.codec.layouts["image"], pipe.tokenizer.image_size)
    return pipe.complete(
        pipe.read_picture(arguments.inpaint),
        ~keep if arguments.keep else keep,
        caption=arguments.text or None,
        decoding="plain" if arguments.decoding == "auto" else arguments.decoding,
        **_drawing_options(arguments),
    )


def _drawing_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("count", "seed", "temperature", "guidance", "detokenizer", "steps", "batch_size")
    return {name: getattr(arguments, name) for name in names}


def _watched(partials: Partials, paths: Sequence[Path]) -> GenerationOutput:
    """The result; on the way the pictures are written as far as they are drawn, and counted on stderr."""
    drawn: dict[int, Partial] = {}
    try:
        for partial in partials:
            drawn[partial.row] = partial
            save_picture(partial.segment.pixels, paths[partial.row])  # type: ignore[union-attr]
            tokens, done = sum(p.tokens for p in drawn.values()), sum(p.done for p in drawn.values())
            print(f"\r{done} of {len(paths)} pictures, {tokens} tokens", end="", file=sys.stderr, flush=True)
    finally:
        print(file=sys.stderr)
    assert partials.output is not None
    return partials.output
