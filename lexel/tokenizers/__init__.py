"""Tokenizers: pixels to discrete codes and back. One file per published family.

`load_published` is the one door to published weights, `from_pretrained` the one to Lexel's own folders.
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
    from lexel.tokenizers.base import Tokenizer

# model_type → module and class. Imported on use: `import lexel` stays fast.
CLASSES = {
    "vq": "vq:VQTokenizer",
    "factorized": "factorized:FactorizedTokenizer",
    "maskgit_vqgan": "maskgit_vqgan:MaskGITVQGAN",
    "titok": "titok:TiTok",
    "titok_vae": "titok:TiTokVAE",
    "bae": "bae:BAETokenizer",
    "chameleon": "chameleon:ChameleonTokenizer",
    "emu3": "emu3:Emu3Tokenizer",
    "flextok": "flextok:FlexTok",
    "open_magvit2": "open_magvit2:OpenMagvit2",
    "open_magvit2_video": "open_magvit2:OpenMagvit2Video",
    "ibq": "ibq:IBQTokenizer",
    "fourm": "fourm:FourM",
    "fourm_divae": "fourm_divae:FourMDiVAE",
    "seed": "seed:SeedTokenizer",
    "lavit": "lavit:LaVIT",
    "larp": "larp:LARP",
    "tokenflow": "tokenflow:TokenFlow",
    "sound": "sound:SoundTokenizer",
}
_REGISTERED: dict[str, type[Tokenizer]] = {}
# Modules that hold published systems (`SYSTEMS`).
FAMILIES = (
    "vq",
    "factorized",
    "chameleon",
    "emu3",
    "bae",
    "open_magvit2",
    "ibq",
    "maskgit_vqgan",
    "titok",
    "flextok",
    "seed",
    "lavit",
    "larp",
    "fourm",
    "fourm_divae",
    "tokenflow",
    "sound",
)

__all__ = [
    "export_published",
    "find_published",
    "from_pretrained",
    "list_published",
    "load_published",
    "published_systems",
    "published_table",
    "register",
]


def from_pretrained(name: str | Path) -> Tokenizer:
    """Load any tokenizer from a local folder or hub id; its `config.json` names the family.
    Raises LexelError for a missing folder or a family that neither this version nor `register` has."""
    folder = resolve_folder(name, "tokenizer")
    family = read_config(folder).get("model_type")
    if family in _REGISTERED:
        return _REGISTERED[family].from_pretrained(folder)
    if family not in CLASSES:
        known = ", ".join(sorted({*CLASSES, *_REGISTERED}))
        raise LexelError(
            f"{folder} holds a {family!r} model; tokenizers are {known}. For one of your own, import its "
            "module first and let it call lexel.tokenizers.register."
        )
    module, name = CLASSES[family].split(":")
    cls = cast("type[Tokenizer]", getattr(import_module(f"lexel.tokenizers.{module}"), name))
    return cls.from_pretrained(folder)


def register(cls: type[Tokenizer]) -> type[Tokenizer]:
    """Class decorator: let `from_pretrained`, and so bundles, load a tokenizer class of your own by its
    `model_type`. Raises ValueError when another class has that name."""
    name = cls.model_type
    if name in CLASSES or _REGISTERED.get(name, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"model_type {name!r} is taken; give {cls.__name__} another one.")
    _REGISTERED[name] = cls
    return cls


def published_systems() -> dict[str, System]:
    """Every published tokenizer architecture by name."""
    modules = [import_module(f"lexel.tokenizers.{name}") for name in FAMILIES]
    return {system.name: system for module in modules for system in module.SYSTEMS}


def list_published() -> list[Published]:
    """Every published checkpoint that `load_published` knows, with its figures, licences and source."""
    return [row for system in published_systems().values() for row in system.rows]


def published_table(rows: Sequence[Published]) -> str:
    """Markdown: one line per checkpoint."""
    head = "| name | tokens | codebook | parameters | rFID | code / weights | hub | source |"
    lines = [
        f"| {row.name} | {row.tokens} | {row.codebook} | {row.parameters / 1e6:.0f} M | {row.rfid or '–'} "
        f"| {row.code_licence} / {row.weight_licence} | {row.repository} | {row.source} |"
        for row in rows
    ]
    return "\n".join([head, "|---" * 8 + "|", *lines])


def load_published(
    name: str,
    path: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    key: str | None = None,
) -> Tokenizer:
    """A published tokenizer with its published weights, in eval mode and float32.

    name: of `list_published`. path: a local file or folder in the published layout (None: fetched from the
    hub). config: hyper-parameters under the reference's own names that differ from the published ones.
    key: which copy of the weights to read where a file holds several (``"ema"``, ``"model"``, …).
    Raises LexelError for an unknown name or argument, an unreadable or hostile file, and weights that do not
    fit, listing the keys.
    """
    from lexel.catalog import load

    return load(*find_published(name), path, config, key)


def export_published(tokenizer: Tokenizer, name: str, path: str | Path) -> None:
    """Write a tokenizer's weights in the published layout of `name` (see `list_published`), as safetensors or
    as a torch file by the ending of `path`. Raises LexelError when the tokenizer is of another family or
    has no decoder."""
    from lexel.catalog import export

    system, row = find_published(name)
    if not tokenizer.has_decoder and not system.optional:
        raise LexelError(f"this tokenizer has no decoder, which a file of {name} must hold.")
    export(tokenizer, system, row, path)


def find_published(name: str) -> tuple[System, Published]:
    """The system and row of a published checkpoint. Raises LexelError when there is none of that name."""
    from lexel.catalog import find

    return find(name, published_systems().values(), "tokenizer")
