"""Language models, draft heads, detokenizers. `load_published` is the door to published language models and
draft heads, `load_drafter` opens any drafter in Lexel's own format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    from lexel.models.raster_lm import RasterLM

# model_type → module and class of what can draft. Imported on use: `import lexel` stays fast.
DRAFTERS = {
    "lexel_lm": "causal_lm:CausalLM",
    "eagle": "eagle:Eagle",
    "lexel_neighbours": "neighbour_table:NeighbourTable",
}
# Modules that hold published systems (`SYSTEMS`).
FAMILIES = (
    "llamagen_gpt",
    "fqgan_ar",
    "elm_ar",
    "open_magvit2_ar",
    "larp_ar",
    "liquid",
    "eagle",
)

# model_type → module and class of Lexel's own language models.
LANGUAGE_MODELS = {"lexel_lm": "causal_lm:CausalLM", "lexel_raster_lm": "raster_lm:RasterLM"}

__all__ = [
    "export_published",
    "find_published",
    "list_published",
    "load_drafter",
    "load_lm",
    "load_published",
    "published_table",
]


def load_lm(name: str | Path) -> Any:
    """Any language model, from a local folder or hub id, in eval mode and float32; its `config.json` says
    which: Lexel's own, or transformers', as a `CausalLM` where it can be one (`lexel.models.backbones`) and
    else as a `WrappedLM`. Raises LexelError for a missing folder or another kind of model."""
    folder = resolve_folder(name, "language model")
    config = read_config(folder)
    kind = config.get("model_type")
    if kind in LANGUAGE_MODELS:
        module, cls = LANGUAGE_MODELS[kind].split(":")
        return getattr(import_module(f"lexel.models.{module}"), cls).from_pretrained(folder)
    from lexel.models.backbones import FAMILIES as BACKBONES
    from lexel.models.backbones import UnsupportedBackbone, load_backbone

    if kind in BACKBONES and "lexel_bidirectional" not in config:  # what a WrappedLM wrote stays one
        try:
            return load_backbone(folder)
        except UnsupportedBackbone:
            pass
    from lexel.models.wrapped_lm import WrappedLM

    return WrappedLM.from_pretrained(folder)


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
    """Every published model's architecture by name."""
    modules = [import_module(f"lexel.models.{name}") for name in FAMILIES]
    return {system.name: system for module in modules for system in module.SYSTEMS}


def list_published() -> list[Published]:
    """Every published checkpoint that `load_published` knows, with its licences and source."""
    return [row for system in published_systems().values() for row in system.rows]


def find_published(name: str) -> tuple[System, Published]:
    """The system and row of a published checkpoint. Raises LexelError when there is none of that name."""
    from lexel.catalog import find

    return find(name, published_systems().values(), "model")


def published_table(rows: Sequence[Published]) -> str:
    """Markdown: one line per checkpoint."""
    head = "| name | tokens | vocabulary | parameters | FID | code / weights | hub | source |"
    lines = [
        f"| {row.name} | {row.tokens} | {row.codebook} | {row.parameters / 1e6:.0f} M | {row.fid or '–'} "
        f"| {row.code_licence} / {row.weight_licence} | {row.repository} | {row.source} |"
        for row in rows
    ]
    return "\n".join([head, "|---" * 8 + "|", *lines])


def load_published(
    name: str,
    path: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> Any:
    """A published model with its published weights: a `RasterLM`, an `Eagle` or (Liquid) a `CausalLM`;
    arguments and errors as for `lexel.tokenizers.load_published`. A draft head whose file leaves the target's
    embedding out needs `Eagle.adopt_embedding` before use."""
    from lexel.catalog import load

    return load(*find_published(name), path, config, key)


def export_published(model: RasterLM | Eagle, name: str, path: str | Path) -> None:
    """Write a model's weights in the published layout of `name` (see `list_published`), as safetensors or as
    a torch file by the ending of `path`. Raises LexelError for another kind of network."""
    from lexel.catalog import export

    system, row = find_published(name)
    wanted: Any = system.config(row.arguments)
    own, theirs = (getattr(x, "form", None) for x in (model.config, wanted))
    if type(model.config) is type(wanted) and own != theirs:
        raise LexelError(f"{name} is written from another kind of model: {theirs}, not {own}.")
    export(model, system, row, path)
