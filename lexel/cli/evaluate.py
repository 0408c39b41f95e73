"""`lexel evaluate`: measure a bundle on held-out data."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lexel.cli.arguments import add_bundle, add_command, at_least, load_pipeline
from lexel.cli.data import SHAPES, data_config


def add(commands: Any) -> None:
    """The command's arguments."""
    evaluate = add_command(
        commands, "evaluate", _run, "measure a bundle on held-out data",
        "lexel evaluate --bundle outputs/quickstart/bundle --count 500 --json report.json",
    )  # fmt: skip
    evaluate.add_argument(
        "--data",
        default=SHAPES,
        help="'shapes' (default: the scenes the bundle was trained on), or a folder of pictures or shards",
    )
    evaluate.add_argument(
        "--count", type=at_least(1), default=500, help="prompts of each kind (default: 500)"
    )
    evaluate.add_argument("--seed", type=at_least(0), default=0, help="default: 0")
    evaluate.add_argument("--batch-size", type=at_least(1), default=64)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the report there ('-': print it)")
    evaluate.add_argument(
        "--card", type=Path, metavar="FILE", help="write a model card with the figures there"
    )
    add_bundle(evaluate)


def _run(arguments: argparse.Namespace) -> None:
    from lexel.evaluate.card import figures_table, model_card
    from lexel.evaluate.evaluate import evaluate_bundle
    from lexel.sample.bundle import write_json, write_text

    pipe = load_pipeline(arguments)
    report = evaluate_bundle(
        pipe,
        pipe.scenes
        if arguments.data == SHAPES and pipe.scenes is not None
        else data_config(arguments.data, pipe.tokenizer.image_size),
        count=arguments.count,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        progress=sys.stderr.isatty(),
    )
    if arguments.card is not None:
        write_text(arguments.card, model_card(pipe, report))
    if str(arguments.json) == "-":
        print(json.dumps(report, indent=2))
        return
    if arguments.json is not None:
        write_json(arguments.json, report)
    print(figures_table(report))
