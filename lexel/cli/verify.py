"""`lexel verify`: a published system against its own implementation's numbers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lexel.cli.arguments import add_command, add_json, at_least
from lexel.cli.output import show
from lexel.errors import LexelError


def add(commands: Any) -> None:
    """The command's arguments."""
    verify = add_command(
        commands, "verify", _run, "check a published system against its own implementation's numbers",
        "lexel verify llamagen_vq tests/golden/llamagen_vq\n"
        "  lexel verify llamagen_vq --checkpoint vq_ds16_c2i.pt --name llamagen-vq-16",
    )  # fmt: skip
    verify.add_argument("system", metavar="SYSTEM", help="e.g. llamagen_vq, titok, flextok")
    verify.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        nargs="?",
        help="recorded numbers: config.json, io.safetensors and weights",
    )
    verify.add_argument("--checkpoint", type=Path, metavar="FILE", help="try this downloaded file instead")
    verify.add_argument("--name", metavar="ROW", help="which published checkpoint it is (`lexel published`)")
    verify.add_argument(
        "--key", help="the file's copy of the weights to read, e.g. ema (default: as published)"
    )
    verify.add_argument(
        "--config", type=Path, metavar="JSON", help="hyper-parameters that differ from the published ones"
    )
    verify.add_argument(
        "--size", type=at_least(1), help="side of the test pictures (default: the tokenizer's, at most 256)"
    )
    add_json(verify)


def _run(arguments: argparse.Namespace) -> int:
    from lexel.sample.bundle import read_json
    from lexel.verify import verify, verify_checkpoint

    options = (arguments.name, arguments.key, arguments.config, arguments.size)
    if (arguments.folder is None) == (arguments.checkpoint is None):
        raise LexelError("give either a FOLDER of recorded numbers or --checkpoint FILE.")
    if arguments.folder is not None and any(options):
        raise LexelError("--name, --key, --config and --size belong to --checkpoint.")
    report: Any
    if arguments.folder is not None:
        report = verify(arguments.system, arguments.folder)
    else:
        config = read_json(arguments.config) if arguments.config else None
        report = verify_checkpoint(
            arguments.system, arguments.checkpoint, arguments.name, config, arguments.key, arguments.size
        )
    show(arguments, report.as_dict(), report.table())
    return 0 if report.passed else 1
