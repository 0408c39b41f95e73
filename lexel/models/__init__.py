"""Language models, draft heads, detokenizers. `load_published` is the door to published draft heads,
`load_drafter` opens any drafter in Lexel's own format."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lexel.errors import LexelError
from lexel.hub import read_config, resolve_folder

if TYPE_CHECKING:
    from lexel.catalog import Published, System
    from lexel.models.causal_lm import CausalLM
    from lexel.models.eagle import Eagle
    from lexel.models.neighbour_table import NeighbourTable

# model_type → module and class of what can draft. Imported on use: `import lexel` stays fast.
DRAFTERS = {
    "lexel_lm": "causal_lm:CausalLM",
    "eagle": "eagle:Eagle",
    "lexel_neighbours": "neighbour_table:NeighbourTable",
}
# Modules that hold published systems (`SYSTEMS`).
FAMILIES = ("eagle",)

__all__ = ["export_published", "find_published", "list_published", "load_drafter", "load_published"]


def load_drafter(name: str | Path) -> CausalLM | Eagle | NeighbourTable:
    """A drafter, a small language model, a draft head or a table of neighbours, from a local folder or hub
    id; its `config.json` says which. Raises LexelError for a missing folder or another kind of model."""
    folder = resolve_folder(name, "drafter")
    kind = read_config(folder).get("model_type")
    if kind not in DRAFTERS:
        raise LexelError(f"{folder} holds a {kind!r} model; drafters are {', '.join(DRAFTERS)}.")
    module, cls = DRAFTERS[kind].split(":")
    return cast(
        "CausalLM | Eagle | NeighbourTable",
        getattr(import_module(f"lexel.models.{module}"), cls).from_pretrained(folder),
    )


def published_systems() -> dict[str, System]:
    """Every published draft head's architecture by name."""
    modules = [import_module(f"lexel.models.{name}") for name in FAMILIES]
    return {system.name: system for module in modules for system in module.SYSTEMS}


def list_published() -> list[Published]:
    """Every published checkpoint that `load_published` knows, with its licences and source."""
    return [row for system in published_systems().values() for row in system.rows]


def find_published(name: str) -> tuple[System, Published]:
    """The system and row of a published checkpoint. Raises LexelError when there is none of that name."""
    from lexel.catalog import find

    return find(name, published_systems().values(), "draft head")


def load_published(
    name: str,
    path: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> Eagle:
    """A published draft head with its published weights; arguments and errors as for
    `lexel.tokenizers.load_published`. A head whose file leaves the target's embedding out needs
    `Eagle.adopt_embedding` before use."""
    from lexel.catalog import load

    return cast("Eagle", load(*find_published(name), path, config, key))


def export_published(model: Eagle, name: str, path: str | Path) -> None:
    """Write a draft head's weights in the published layout of `name` (see `list_published`), as safetensors
    or as a torch file by the ending of `path`. Raises LexelError for another kind of network."""
    from lexel.catalog import export

    system, row = find_published(name)
    wanted: Any = system.config(row.arguments)
    if (model.config.kind, model.config.raster > 0) != (wanted.kind, wanted.raster > 0):
        raise LexelError(f"{name} is written from another kind of draft head than this {model.config.kind}.")
    export(model, system, row, path)
