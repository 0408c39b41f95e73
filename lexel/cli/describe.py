"""`lexel describe`: write what pictures show."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lexel.cli.arguments import add_bundle, add_command, add_dtype, add_json, add_sampling, load_pipeline
from lexel.cli.output import show


def add(commands: Any) -> None:
    """The command's arguments."""
    describe = add_command(
        commands, "describe", _run, "write what pictures show",
        "lexel describe pictures/0000.png",
    )  # fmt: skip
    describe.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    for add_options in (add_sampling, add_bundle, add_dtype, add_json):
        add_options(describe)


def _run(arguments: argparse.Namespace) -> None:
    from lexel.document import Document, Image, Text

    pipe = load_pipeline(arguments)
    documents: list[Document] = [
        [Image(pixels=pipe.read_picture(path)), Text.blank()] for path in arguments.pictures
    ]
    output = pipe.generate(
        documents,
        seed=arguments.seed,
        temperature=arguments.temperature,
        decoding=arguments.decoding,
        batch_size=arguments.batch_size,
    )
    captions = [pipe.caption(document) for document in output.documents]
    names = [str(path) for path in arguments.pictures]
    values = {"captions": [{"picture": name, "text": text} for name, text in zip(names, captions)]}
    one = len(names) == 1
    show(arguments, values, captions[0] if one else "\n".join(f"{n}: {c}" for n, c in zip(names, captions)))
