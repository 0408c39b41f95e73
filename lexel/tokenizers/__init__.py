"""Tokenizers: pixels to discrete codes and back. One file per published system."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lexel.errors import LexelError
from lexel.hub import read_config, resolve_folder

if TYPE_CHECKING:
    from lexel.tokenizers.base import Tokenizer


def _classes() -> dict[str, type[Tokenizer]]:
    # Imported on use: `import lexel` stays fast.
    from lexel.tokenizers.factorized import FactorizedTokenizer
    from lexel.tokenizers.flexible import FlexibleTokenizer
    from lexel.tokenizers.vq import VQTokenizer

    classes: tuple[type[Tokenizer], ...] = (VQTokenizer, FactorizedTokenizer, FlexibleTokenizer)
    return {cls.model_type: cls for cls in classes}


def from_pretrained(name: str | Path) -> Tokenizer:
    """Load any tokenizer from a local folder or hub id; its `config.json` names the family.
    Raises LexelError for a missing folder or a family this version does not have."""
    folder = resolve_folder(name, "tokenizer")
    family = read_config(folder).get("model_type")
    classes = _classes()
    if family not in classes:
        raise LexelError(f"{folder} holds a {family!r} model; tokenizers are {', '.join(sorted(classes))}.")
    return classes[family].from_pretrained(folder)
