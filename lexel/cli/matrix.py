"""`lexel matrix`: every modality of a bundle against every other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lexel.cli.arguments import add_bundle, add_command, at_least, load_pipeline
from lexel.errors import LexelError


def add(commands: Any) -> None:
    """The command's arguments."""
    matrix = add_command(
        commands, "matrix", _run, "measure every modality of a bundle against every other",
        "lexel matrix --bundle outputs/any_to_any/bundle --count 64 --out outputs/any_to_any",
    )  # fmt: skip
    matrix.add_argument("--count", type=at_least(2), default=64, help="held-out scenes (default: 64)")
    matrix.add_argument("--pairs", nargs="+", metavar="PAIR", help="such as text_to_image (default: all)")
    matrix.add_argument("--seed", type=at_least(0), default=0, help="default: 0")
    matrix.add_argument("--batch-size", type=at_least(1), default=64)
    matrix.add_argument("--out", type=Path, metavar="DIR", help="write matrix.json, .txt and .html there")
    add_bundle(matrix)


def _run(arguments: argparse.Namespace) -> None:
    from lexel.data.any_to_any import parse_pair
    from lexel.evaluate.matrix import matrix_text, measure_matrix, write_matrix

    pipe = load_pipeline(arguments)
    if pipe.scenes is None:
        raise LexelError("the matrix needs a bundle that was trained on procedural scenes (data=shapes).")
    found = measure_matrix(
        pipe,
        pipe.scenes,
        pairs=[parse_pair(pair) for pair in arguments.pairs] if arguments.pairs else None,
        count=arguments.count,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    if arguments.out is not None:
        write_matrix(arguments.out, found, pipe)
    print(matrix_text(found.report))
