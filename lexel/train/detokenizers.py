"""The detokenizer's stage: training one on a frozen tokenizer's codes, or distilling a trained one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from lexel.data.example import stack_captioned
from lexel.errors import LexelError
from lexel.hub import resolve_folder
from lexel.models.detokenizers.frozen import TEXT_FOLDER, text_settings, vae_geometry, vae_settings
from lexel.sample.bundle import TRAINED_ON_FILE, check_trained_on, write_json
from lexel.train.chain import Chain
from lexel.train.stages import fresh_network, pictures_of, train_network, training_stage

if TYPE_CHECKING:
    from lexel.tokenizers.base import Tokenizer
    from lexel.train.detokenizer_module import Batch, DetokenizerModule


def train_detokenizer(chain: Chain) -> None:
    """Train the detokenizer that ``run.detokenizer`` describes."""
    run, stage, tokenizer = chain.run, chain.run.stages.detokenizer, chain.tokenizer_of_any_size
    named = {name: _named(run.detokenizer, name) for name in ("vae", "text")}
    config = complete_detokenizer(run.detokenizer, tokenizer)
    _check_size(chain, config)

    def work(folder: Path) -> dict[str, Any]:
        from lexel.train.detokenizer_module import DetokenizerModule

        network = fresh_network(config, run.seed, stage.init)
        _fill(network, named, stage.init)
        module = DetokenizerModule(network, tokenizer, stage, run.seed, _preview(chain))
        return _trained(chain, module, folder)

    inputs = {"network": config, "tokenizer": chain.fingerprint}
    inputs |= {name: place for name, place in named.items() if place is not None}
    training_stage(chain, "detokenizer", work, **inputs)


def distil_detokenizer(chain: Chain) -> None:
    """Distil the detokenizer in ``stages.detokenizer.distil`` for few steps. LexelError when it is none that
    was trained here on the codes of this tokenizer."""
    from lexel.models.detokenizers import from_pretrained
    from lexel.models.detokenizers.diffusion import DiffusionDetokenizer
    from lexel.train.detokenizer_module import DistilledModule, student_config

    run, stage, tokenizer = chain.run, chain.run.stages.detokenizer, chain.tokenizer_of_any_size
    source = resolve_folder(stage.distil or "", "detokenizer")
    if source.resolve() == (run.folder / "detokenizer").resolve():
        raise LexelError(
            f"the student is written to {source}, where its teacher lies; choose another output."
        )
    check_trained_on(source.parent, source.name, chain.fingerprint)
    teacher = from_pretrained(source)
    if not isinstance(teacher, DiffusionDetokenizer):
        raise LexelError(f"{source} holds a {type(teacher).__name__}, which is not distilled here.")
    config = student_config(teacher, stage)
    _check_size(chain, config)

    def work(folder: Path) -> dict[str, Any]:
        network = fresh_network(config, run.seed, str(source))
        if network.reads_text:
            network.text.tokenizer = teacher.text.tokenizer
        module = DistilledModule(network, teacher, tokenizer, stage, run.seed, _preview(chain))
        return _trained(chain, module, folder)

    inputs = {"network": config, "teacher": teacher.fingerprint(), "tokenizer": chain.fingerprint}
    training_stage(chain, "detokenizer", work, **inputs)


def complete_detokenizer(config: partial[Any], tokenizer: Tokenizer) -> Any:
    """The detokenizer config with the tokenizer's geometry filled in, and the settings of the VAE and the
    text encoder that it names by folder or hub id. 1D codes on a map are gathered onto a grid as coarse as
    the network's lowest resolution."""
    layout, given = tokenizer.layout, config.keywords
    scale = given.get("scale", 1)
    size = tuple(side * scale for side in tokenizer.image_size)
    values: dict[str, Any] = {"image_size": size}
    if _named(config, "vae"):
        values["vae"] = vae_settings(given["vae"])
    if _named(config, "text"):
        values["text"] = text_settings(given["text"])
    if given.get("reads") == "features":
        pixels = torch.zeros(1, 3, *tokenizer.image_size)
        _, count, width = tokenizer.decode_features(tokenizer.encode(pixels)).shape
        grid = layout.grid or (layout.scales[-1] if layout.scales else (0, 0))
        values |= {"feature_dim": width}
        values |= {"grid": grid} if grid[0] * grid[1] == count else {"length": count}
    else:
        values |= {"codebook_sizes": layout.codebook_sizes, "grid": layout.grid, "scales": layout.scales}
        values |= {"length": layout.length, "flexible": layout.flexible}
    if values.get("length") and given.get("condition", "concat") == "concat":
        vae = values.get("vae", given.get("vae"))
        factor = vae_geometry(vae)[0] if vae else 1
        unit = factor * given["patch"] * 2 ** (len(given["channels"]) - 1)
        values["grid"] = tuple(side // unit for side in size)
    return config(**values)


def _named(config: partial[Any], part: str) -> str | None:
    """The folder or hub id that a config names for its VAE or text encoder, if it is not their settings."""
    value = config.keywords.get(part)
    return value if isinstance(value, str) else None


def _fill(network: Any, named: dict[str, str | None], init: str | None) -> None:
    """Weights of the frozen parts, from where the config names them or with the rest from `init`."""
    if network.vae is not None and not (named["vae"] or init):
        raise LexelError(
            "the VAE is frozen and must come trained: set detokenizer.vae to a folder or hub id."
        )
    if network.reads_text and not (named["text"] or init):
        raise LexelError("the text encoder is frozen and must come trained: set detokenizer.text.")
    network.load_frozen(**named)
    if network.reads_text and not named["text"] and init:
        network.text.load_tokenizer(resolve_folder(init) / TEXT_FOLDER)


def _check_size(chain: Chain, config: Any) -> None:
    size = tuple(chain.data_of().image_size)
    if size != tuple(config.image_size):
        raise LexelError(
            f"the pictures are {size}, the detokenizer draws {tuple(config.image_size)} (height, width), the "
            f"tokenizer's size times detokenizer.scale={config.scale}; set data.size to that."
        )


def _preview(chain: Chain) -> Batch:
    """The first validation pictures and their captions, for the sample grids."""
    source: Dataset[Any] = chain.source("validation")
    return stack_captioned([source[index] for index in range(min(16, len(source)))])  # type: ignore[arg-type]


def _trained(chain: Chain, module: DetokenizerModule, folder: Path) -> dict[str, Any]:
    write_json(folder / TRAINED_ON_FILE, {"tokenizer": chain.fingerprint})
    return train_network(chain, "detokenizer", module, folder, *pictures_of(chain), stack_captioned)
