"""`lexel published`: the published tokenizers, models and detokenizers that load by name."""

from __future__ import annotations

import argparse
from typing import Any

from lexel.cli.arguments import add_command, add_json
from lexel.cli.output import show


def add(commands: Any) -> None:
    """The command's arguments."""
    published = add_command(
        commands, "published", _run, "list the tokenizers, models and detokenizers that load by name",
        "lexel published --json",
    )  # fmt: skip
    add_json(published)


def _run(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from lexel import models, tokenizers
    from lexel.models import detokenizers

    parts = {"tokenizers": tokenizers, "models": models, "detokenizers": detokenizers}
    found = {kind: part.list_published() for kind, part in parts.items()}
    tables = [part.published_table(found[kind]) for kind, part in parts.items()]
    values = {kind: [asdict(row) for row in rows] for kind, rows in found.items()}
    show(arguments, values, "\n\n".join(tables))
