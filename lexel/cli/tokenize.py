"""`lexel tokenize`: write a data set's codes, to train language models on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lexel.cli.arguments import add_command, add_device, add_json, at_least, find_device, parse_part
from lexel.cli.data import SHAPES, data_config
from lexel.cli.output import show
from lexel.errors import LexelError


def add(commands: Any) -> None:
    """The command's arguments."""
    tokenize = add_command(
        commands, "tokenize", _run, "write a data set's codes, to train language models on",
        "lexel tokenize photos --out photo-codes --tokenizer outputs/photos/tokenizer --workers 2 --check",
    )  # fmt: skip
    tokenize.add_argument("data", metavar="DATA", help="folder of pictures or of .tar shards, or 'shapes'")
    tokenize.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="folder for the codes")
    tokenize.add_argument(
        "--tokenizer",
        metavar="NAME_OR_DIR",
        help="published name, tokenizer or bundle folder, or hub id (default: the shipped one)",
    )
    tokenize.add_argument("--split", choices=("all", "train", "validation"), default="all")
    tokenize.add_argument("--batch-size", type=at_least(1), default=64)
    tokenize.add_argument("--workers", type=at_least(0), default=0, help="processes (default: this one)")
    tokenize.add_argument("--check", action="store_true", help="afterwards encode a sample again and compare")
    tokenize.add_argument(
        "--part",
        type=parse_part,
        default=(0, 1),
        metavar="I/N",
        help="write every N-th shard from the I-th on (from 0): N machines fill one folder",
    )
    add_device(tokenize)
    add_json(tokenize)


def _run(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict, replace

    from lexel.data.tokenized import check_codes, write_codes
    from lexel.sample.bundle import load_tokenizer_of

    tokenizer = load_tokenizer_of(arguments.tokenizer)
    config = data_config(arguments.data, tokenizer.image_size)
    if arguments.split == "all" and arguments.data != SHAPES:
        config = replace(config, validation_share=0.0)
    split = "train" if arguments.split == "all" else arguments.split
    dataset = config.build(split)
    missing = write_codes(
        tokenizer,
        dataset,
        arguments.out,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=find_device(arguments.device),
        progress=sys.stderr.isatty(),
        source={"data": arguments.data, "split": split, **asdict(config)},
        part=arguments.part,
    )
    values: dict[str, Any] = {
        "folder": str(arguments.out),
        "pictures": len(dataset),
        "missing_shards": missing,
    }
    text = f"{arguments.out}: codes of {len(dataset)} pictures"
    if missing:
        text = f"{arguments.out}: this part is written; {missing} shards of other parts are still missing"
    elif arguments.check:
        check = check_codes(arguments.out, tokenizer, dataset)
        values["check"] = {**asdict(check), "passed": check.passed}
        text += f"; {check.agreement:.1%} of {check.samples} pictures' codes agree, {check.psnr:.1f} dB"
        if not check.passed:
            raise LexelError(
                f"{arguments.out}: only {check.agreement:.1%} of the stored codes are what the tokenizer "
                "writes now; delete the folder and tokenize again."
            )
    show(arguments, values, text)
