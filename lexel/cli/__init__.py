"""The `lexel` command: one file per command here; `add` states its arguments, `_run` carries it out.

Exit codes: 0 done, 1 `verify` found something that does not fit, 2 the user's to mend (one sentence on
stderr, never a traceback), 130 interrupted.
Heavy libraries load inside the commands, so that `lexel --help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lexel import __version__
from lexel.cli import (
    analyze,
    demo,
    describe,
    draw,
    evaluate,
    matrix,
    published,
    reconstruct,
    sample,
    tokenize,
    verify,
)
from lexel.errors import LexelError

COMMANDS = (sample, describe, draw, reconstruct, published, verify, tokenize, analyze, evaluate, matrix, demo)
"""In the order of `lexel --help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` defaults to the process's arguments."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (LexelError, ValueError, OSError) as error:
        print(f"lexel: error: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lexel: interrupted", file=sys.stderr)
        return 130


def _sentence(error: Exception) -> str:
    """The error's message on one line; system errors name the file."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="lexel",
        description="Draw from text, describe and reconstruct pictures with discrete tokens.",
        epilog='example:\n  lexel sample "a red circle left of a blue square" --count 4 --out pictures',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lexel {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
