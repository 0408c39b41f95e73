"""Liquid (arXiv 2412.04332, github.com/FoundationVision/Liquid): one language model that draws and reads
pictures, opened from its published folders and written as such.

    pipe = load_liquid("Liquid_V1_7B", "chameleon")        # transformers' folder; vqgan.yaml, vqgan.ckpt
    pipe.draw("a red cat", count=4)                        # the published prompt, guidance and filters
    pipe([Image(pixels=pipe.read_picture("cat.jpg")), Text("What colour is it?"), Text.blank()])

The prompts are `lexel.prompts.FORMATS["liquid"]`. A drawn picture is exactly as many codes as its grid has
places; an answer is text only, where the published script lets the model choose among all ids. Models of
other backbones in this layout (Llama, untied) open as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from lexel.errors import LexelError
from lexel.hub import resolve_folder, write_atomically
from lexel.models.backbones import load_backbone, save_backbone
from lexel.models.extend import Init, extend_vocabulary
from lexel.prompts import FORMATS, PromptCodec, published_codec
from lexel.sample.bundle import load_text_tokenizer
from lexel.sample.logits import SamplingConfig
from lexel.sample.pipeline import Pipeline
from lexel.tokenizers import export_published, load_published
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.chameleon import ChameleonConfig, ChameleonTokenizer
from lexel.types import check_pixels

VQGAN_CONFIG, VQGAN_WEIGHTS = "vqgan.yaml", "vqgan.ckpt"
RENAMED = {"<unused0>": "<boi>", "<unused1>": "<eoi>", "<unused2>": "<unconditional>"}
"""The tokens of Gemma's text tokenizer that Liquid calls otherwise."""


def load_liquid(
    llm: str | Path,
    vqgan: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Pipeline:
    """Liquid from its published files, in eval mode.

    llm: transformers' folder or hub id (config, weights, tokenizer); vqgan: the folder of Chameleon's
    ``vqgan.yaml`` and ``vqgan.ckpt``; image_size: side of the pictures in pixels, or (h, w) where they are no
    squares (None: as the yaml says); dtype: of the language model's weights (None: float32). Raises
    LexelError for files that are missing or do not belong together.
    """
    folder = resolve_folder(llm, "Liquid model")
    text_tokenizer: Any = load_text_tokenizer(folder)
    tokenizer = load_vqgan(vqgan, image_size)
    codec = _codec(folder, text_tokenizer, tokenizer)
    return Pipeline(tokenizer, load_backbone(folder, dtype), codec, sampling=published_sampling("liquid"))


def _codec(folder: Path, text_tokenizer: Any, tokenizer: Tokenizer) -> PromptCodec:
    try:
        return published_codec("liquid", text_tokenizer, {"image": tokenizer.layout})
    except ValueError as error:
        raise LexelError(f"{folder} is no Liquid model: {error}") from error


def published_sampling(name: str) -> dict[str, SamplingConfig]:
    """The published sampling settings of a model of `lexel.prompts.FORMATS`, by modality."""
    return {kind: SamplingConfig(**values) for kind, values in FORMATS[name].sampling.items()}  # type: ignore[arg-type]


def load_vqgan(folder: str | Path, image_size: int | tuple[int, int] | None = None) -> Tokenizer:
    """Chameleon's picture tokenizer from ``vqgan.yaml`` and ``vqgan.ckpt``; image_size as in `load_liquid`.
    Raises LexelError for missing or damaged files."""
    folder = Path(folder)
    try:
        # Not resolved: a config file may not ask for variables of the environment.
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / VQGAN_CONFIG), resolve=False)
        values = dict(config["model"]["params"])
    except Exception as error:  # the yaml parser and omegaconf raise wide families
        raise LexelError(f"{folder / VQGAN_CONFIG} is not a readable VQGAN config ({error}).") from error
    arguments: dict[str, Any] = {name: values[name] for name in ("embed_dim", "n_embed") if name in values}
    arguments["ddconfig"] = dict(values.get("ddconfig", {}))
    if isinstance(image_size, int):
        arguments["ddconfig"] |= _resized(arguments["ddconfig"], image_size)
    tokenizer: Any = load_published("chameleon-vq", folder / VQGAN_WEIGHTS, arguments)
    if isinstance(image_size, tuple):  # the network takes any size; its config knows squares only
        height, width = (side // tokenizer.config.downsampling for side in image_size)
        tokenizer.layout = replace(tokenizer.layout, grid=(height, width))
        tokenizer.image_size = image_size
    return tokenizer


def _resized(sizes: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """The same network for pictures of another size: attention, which is placed by resolution, stays."""
    trained = sizes.get("resolution", 512)
    attention = [side * image_size // trained for side in sizes.get("attn_resolutions") or ()]
    return {"resolution": image_size, "attn_resolutions": attention}


def save_liquid(pipe: Pipeline, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `pipe` in the published layout: ``llm/`` (transformers' format, with the text tokenizer) and
    ``vqgan/``, so that the published scripts, transformers and `load_liquid` open them. dtype: of the
    language model's weights written. Raises LexelError for a model of other documents or another tokenizer.
    """
    folder, tokenizer = Path(folder), pipe.tokenizer
    if pipe.codec.vocabulary.forms != "liquid" or not isinstance(tokenizer, ChameleonTokenizer):
        raise LexelError(
            "only a model of Liquid's documents over Chameleon's picture tokenizer can be written in "
            "Liquid's layout; save others with save_pretrained."
        )
    # The published code counts the text tokenizer's entries to find the first code: none may be added.
    save_backbone(pipe.lm, folder / "llm", text_tokenizer=pipe.codec.text_tokenizer, dtype=dtype)
    (folder / "vqgan").mkdir(parents=True, exist_ok=True)
    export_published(tokenizer, "chameleon-vq", folder / "vqgan" / VQGAN_WEIGHTS)
    text = OmegaConf.to_yaml(OmegaConf.create({"model": {"params": _vqgan_arguments(tokenizer.config)}}))
    write_atomically(folder / "vqgan" / VQGAN_CONFIG, lambda path: _write_text(path, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _vqgan_arguments(config: ChameleonConfig) -> dict[str, Any]:
    """The reference's names for the config, as `vqgan.yaml` has them."""
    return {
        "embed_dim": config.embed_dim,
        "n_embed": config.quantizer.codebook_sizes[0],
        "ddconfig": {
            "double_z": False,
            "z_channels": config.z_channels,
            "resolution": config.image_size,
            "in_channels": 3,
            "out_ch": 3,
            "ch": config.channels,
            "ch_mult": list(config.channel_mult),
            "num_res_blocks": config.res_blocks,
            "attn_resolutions": list(config.attn_resolutions),
            "dropout": config.dropout,
        },
        "lossconfig": {"target": "chameleon.inference.vqgan.DummyLoss"},
    }


def begin_liquid(
    backbone: str | Path,
    vqgan: str | Path,
    *,
    image_size: int | None = None,
    init: Init = "mean_covariance",
    seed: int = 0,
) -> Pipeline:
    """A text model of transformers (Gemma, or another whose tokenizer has spare tokens) extended as Liquid
    was: three spare tokens renamed, one row for each code behind the text. It has learnt nothing of pictures
    yet. init: of the new rows, see `lexel.models.extend.extend_vocabulary`.
    Raises LexelError as `load_liquid` does, and for a tokenizer without the spare tokens."""
    folder = resolve_folder(backbone, "backbone")
    text_tokenizer = renamed_tokens(load_text_tokenizer(folder), RENAMED)
    tokenizer = load_vqgan(vqgan, image_size)
    codec, lm = _codec(folder, text_tokenizer, tokenizer), load_backbone(folder)
    generator = torch.Generator().manual_seed(seed)
    text = len(text_tokenizer)
    extend_vocabulary(lm, codec.vocabulary.size, text, init, generator)
    return Pipeline(tokenizer, lm, codec, sampling=published_sampling("liquid"))


def renamed_tokens(text_tokenizer: Any, names: Mapping[str, str]) -> Any:
    """A copy of a fast tokenizer of transformers in which some tokens have other texts (and are special) and
    the same ids. Tokens that already have them stay. Raises LexelError for absent ones."""
    made = deepcopy(text_tokenizer)
    entries, content = made.get_vocab(), json.loads(made.backend_tokenizer.to_str())
    names = {old: new for old, new in names.items() if new not in entries}
    if absent := [old for old in names if old not in entries]:
        raise LexelError(f"the text tokenizer has no token {absent[0]} to be renamed to {names[absent[0]]}.")
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        content["model"]["vocab"] = {names.get(text, text): token for text, token in vocabulary.items()}
    else:  # Unigram: pairs of text and score
        content["model"]["vocab"] = [[names.get(text, text), *rest] for text, *rest in vocabulary]
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    made._tokenizer = Backend.from_str(json.dumps(content))
    special = [AddedToken(text, normalized=False, special=True) for text in names.values()]
    made.add_tokens(special, special_tokens=True)
    return made


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] → bytes as the published code makes them: cut off, not rounded."""
    return ((check_pixels(pixels).clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
