"""Detokenizers: networks that turn codes into pixels better than a tokenizer's own decoder.

`from_pretrained` looks a folder's `model_type` up in an explicit table; the network is imported then.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lexel.errors import LexelError
from lexel.hub import read_config, resolve_folder

if TYPE_CHECKING:
    from lexel.models.detokenizers.flow import FlowDetokenizer


def from_pretrained(name: str | Path) -> FlowDetokenizer:
    """Load a saved detokenizer from a local folder or hub id, in eval mode.
    Raises LexelError for an unknown `model_type` or damaged files."""
    folder = resolve_folder(name, "detokenizer")
    found = read_config(folder).get("model_type")
    if found != "flow":
        raise LexelError(f"{folder} holds a {found!r} model; known detokenizers: flow.")
    from lexel.models.detokenizers.flow import FlowDetokenizer

    return FlowDetokenizer.from_pretrained(folder)
