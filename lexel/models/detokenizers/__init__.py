"""Detokenizers: networks that turn codes into pixels better than a tokenizer's own decoder.

`from_pretrained` looks a folder's `model_type` up in an explicit table; the network is imported then.
`load_published` is the door to published weights, as in `lexel.tokenizers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lexel.errors import LexelError
from lexel.hub import read_config, resolve_folder

if TYPE_CHECKING:
    from lexel.catalog import Published, System
    from lexel.models.detokenizers.base import Detokenizer

# model_type → module and class. Imported on use: `import lexel` stays fast.
CLASSES = {
    "diffusion": "diffusion:DiffusionDetokenizer",
    "flow": "diffusion:DiffusionDetokenizer",
    "lavit": "lavit:LaVITDetokenizer",
    "unclip": "unclip:UnClipDetokenizer",
}
# Modules that hold published systems (`SYSTEMS`).
FAMILIES: tuple[str, ...] = ("lavit", "unclip")


def from_pretrained(name: str | Path) -> Detokenizer:
    """Load a saved detokenizer from a local folder or hub id, in eval mode.
    Raises LexelError for an unknown `model_type` or damaged files."""
    folder = resolve_folder(name, "detokenizer")
    found = read_config(folder).get("model_type")
    if found not in CLASSES:
        raise LexelError(f"{folder} holds a {found!r} model; known detokenizers: {', '.join(CLASSES)}.")
    module, cls = CLASSES[found].split(":")
    loaded = cast("type[Detokenizer]", getattr(import_module(f"lexel.models.detokenizers.{module}"), cls))
    return loaded.from_pretrained(folder)


def published_systems() -> dict[str, System]:
    """Every published detokenizer architecture by name."""
    modules = [import_module(f"lexel.models.detokenizers.{name}") for name in FAMILIES]
    return {system.name: system for module in modules for system in module.SYSTEMS}


def list_published() -> list[Published]:
    """Every published checkpoint that `load_published` knows, with its licences and source."""
    return [row for system in published_systems().values() for row in system.rows]


def published_table(rows: Sequence[Published]) -> str:
    """Markdown: one line per checkpoint."""
    head = "| name | tokens | reads | parameters | code / weights | hub | source |"
    lines = [
        f"| {row.name} | {row.tokens} | {row.codebook} | {row.parameters / 1e6:.0f} M "
        f"| {row.code_licence} / {row.weight_licence} | {row.repository} | {row.source} |"
        for row in rows
    ]
    return "\n".join([head, "|---" * 7 + "|", *lines])


def load_published(
    name: str,
    path: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> Detokenizer:
    """A published detokenizer with its published weights, in eval mode; arguments and errors as for
    `lexel.tokenizers.load_published`."""
    from lexel.catalog import load

    return load(*find_published(name), path, config, key)


def export_published(detokenizer: Detokenizer, name: str, path: str | Path) -> None:
    """Write a detokenizer's weights in the published layout of `name` (see `list_published`). Raises
    LexelError when it is of another family."""
    from lexel.catalog import export

    export(detokenizer, *find_published(name), path)


def find_published(name: str) -> tuple[System, Published]:
    """The system and row of a published checkpoint. Raises LexelError when there is none of that name."""
    from lexel.catalog import find

    return find(name, published_systems().values(), "detokenizer")
