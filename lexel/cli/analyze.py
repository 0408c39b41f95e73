"""`lexel analyze`: the statistics of a tokenizer's codes as of a language, beside those of text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexel.cli.arguments import add_command, add_device, at_least, find_device
from lexel.cli.data import SHAPES, data_config
from lexel.errors import LexelError

if TYPE_CHECKING:
    from lexel.evaluate.analysis import Corpus


SHIPPED = "shipped"


def add(commands: Any) -> None:
    """The command's arguments."""
    analyze = add_command(
        commands, "analyze", _run, "measure a tokenizer's codes as a language, beside text",
        "lexel analyze outputs/photos/tokenizer photos --out analysis.html\n"
        "  lexel analyze shipped shapes --json analysis.json\n"
        "  lexel analyze llamagen-vq-ds16 photo-codes --text book.txt",
    )  # fmt: skip
    analyze.add_argument(
        "tokenizer",
        metavar="TOKENIZER",
        help="published name, tokenizer or bundle folder, hub id, or 'shipped' (the shipped one)",
    )
    analyze.add_argument(
        "data", metavar="DATA", help="folder of pictures, of .tar shards or of written codes, or 'shapes'"
    )
    analyze.add_argument("--count", type=at_least(8), default=1000, help="pictures (default: 1000)")
    analyze.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="text (file or folder) to compare with (default: the captions)",
    )
    analyze.add_argument(
        "--out", type=Path, default=Path("analysis.html"), metavar="FILE", help="default: analysis.html"
    )
    analyze.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures there ('-': print them)"
    )
    analyze.add_argument("--checkpoint", type=Path, metavar="FILE", help="local file of a published name")
    analyze.add_argument("--seed", type=at_least(0), default=0, help="of random orders (default: 0)")
    analyze.add_argument("--batch-size", type=at_least(1), default=64)
    add_device(analyze)


def _run(arguments: argparse.Namespace) -> None:
    from lexel.evaluate.analysis import analyze, without_nan
    from lexel.evaluate.analysis_page import render_analysis, summary
    from lexel.sample.bundle import write_json, write_text

    text = None if arguments.text is None else _text(arguments.text)
    report = {
        "tokenizer": arguments.tokenizer,
        "data": arguments.data,
        **analyze(_corpus(arguments), text, arguments.seed),
    }
    title = f"{arguments.tokenizer} on {arguments.data}"
    write_text(arguments.out, render_analysis(report, title))
    if str(arguments.json) == "-":
        print(json.dumps(without_nan(report), indent=2))
        return
    if arguments.json is not None:
        write_json(arguments.json, without_nan(report))
    print(f"{summary(report)}\n{arguments.out}")


def _corpus(arguments: argparse.Namespace) -> Corpus:
    """The codes that the arguments name: written ones, or those of pictures."""
    from dataclasses import replace

    from lexel.data.tokenized import MANIFEST_FILE, TokenizedDataset
    from lexel.evaluate.analysis import collect, stored
    from lexel.sample.bundle import load_tokenizer_of
    from lexel.tokenizers.sound import SoundTokenizer

    name = None if arguments.tokenizer == SHIPPED else arguments.tokenizer
    tokenizer = load_tokenizer_of(name, checkpoint=arguments.checkpoint)
    if isinstance(tokenizer, SoundTokenizer):
        raise LexelError("an analysis reads pictures; this tokenizer reads sounds.")
    if (Path(arguments.data) / MANIFEST_FILE).is_file():
        return stored(TokenizedDataset(arguments.data, tokenizer.fingerprint()), arguments.count)
    config = data_config(arguments.data, tokenizer.image_size)
    if arguments.data != SHAPES:
        config = replace(config, validation_share=0.0)
    pictures = config.build("train")
    examples = [pictures[i] for i in range(min(arguments.count, len(pictures)))]
    return collect(tokenizer, examples, arguments.batch_size, find_device(arguments.device))


def _text(path: Path) -> str:
    """A text file, or all those of a folder."""
    from lexel.data.text import TextConfig

    documents = TextConfig(str(path), validation_share=0.0, on_error="raise").build("train")
    return "".join(text for _, text in documents.items)
