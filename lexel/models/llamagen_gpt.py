"""LlamaGen's published GPTs (arXiv 2406.06525, github.com/FoundationVision/LlamaGen): codes of the LlamaGen
tokenizers behind an ImageNet class (c2i) or a caption (t2i). The network is `raster_lm.RasterLM`; captions
become features in `caption_encoder.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lexel.catalog import Layout, Published, System
from lexel.models.raster_lm import BLOCK_RULES, FFN_MULTIPLE, FUSED, RasterLMConfig

ARGUMENTS: dict[str, Any] = {
    "model_type": "c2i",
    "dim": 4096,
    "n_layer": 32,
    "n_head": 32,
    "n_kv_head": None,
    "multiple_of": FFN_MULTIPLE,
    "ffn_dim_multiplier": None,
    "rope_base": 10000,
    "norm_eps": 1e-5,
    "num_classes": 1000,
    "caption_dim": 2048,
    "cls_token_num": 1,
    "vocab_size": 16384,
    "block_size": 256,
}
"""LlamaGen's `ModelArgs`, without what concerns training."""

RULES = (
    (r"model\.embed_tokens\.0\.", "tok_embeddings."),
    (r"model\.condition\.fc", "cls_embedding.cap_proj.fc"),
    (r"model\.condition\.uncond", "cls_embedding.uncond_embedding"),
    (r"model\.condition\.", "cls_embedding.embedding_table."),
    (r"outputs\.0\.", "output."),
    (r"^model\.", ""),
    *BLOCK_RULES,
)
LAYOUT = Layout(
    rules=RULES,
    fused=FUSED,
    ignored={
        r"freqs_cis": "made from the config",
        r".*kv_cache\.[kv]_cache": "left over from generating",
    },
)


def configure(arguments: Mapping[str, Any]) -> RasterLMConfig:
    """LlamaGen's arguments → our config. Raises ValueError for a grid that is not square or another kind of
    model."""
    kinds = {"c2i": "class", "t2i": "caption"}
    if arguments["model_type"] not in kinds:
        raise ValueError(f"model_type is c2i or t2i, got {arguments['model_type']!r}.")
    return RasterLMConfig(
        codebook_sizes=(arguments["vocab_size"],),
        dim=arguments["dim"],
        layers=arguments["n_layer"],
        heads=arguments["n_head"],
        kv_heads=arguments["n_kv_head"],
        ffn_dim=ffn_dim(arguments),
        side=square_side(arguments["block_size"]),
        condition=kinds[arguments["model_type"]],  # type: ignore[arg-type]
        num_classes=arguments["num_classes"],
        condition_length=arguments["cls_token_num"],
        caption_dim=arguments["caption_dim"],
        rope_theta=arguments["rope_base"],
        norm_eps=arguments["norm_eps"],
    )


def ffn_dim(arguments: Mapping[str, Any]) -> int:
    """Width of the feed-forward: 8/3 of the model's, times a factor if there is one, rounded up."""
    width = int(2 * 4 * arguments["dim"] / 3)
    if arguments["ffn_dim_multiplier"] is not None:
        width = int(arguments["ffn_dim_multiplier"] * width)
    return arguments["multiple_of"] * math.ceil(width / arguments["multiple_of"])


def square_side(positions: int) -> int:
    """Side of the square grid with so many cells. Raises ValueError when there is none."""
    side = math.isqrt(positions)
    if side**2 != positions:
        raise ValueError(f"block_size is a square number, got {positions}.")
    return side


SIZES = {
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1280, 36, 20),
    "xxl": (1536, 48, 24),
    "3b": (3200, 24, 32),
}
"""Width, blocks and heads."""


def _row(
    size: str, pixels: int, parameters: int, *, file: str, fid: str = "", t2i: bool = False
) -> Published:
    dim, layers, heads = SIZES[size]
    side = pixels // 16
    return Published(
        name=f"llamagen-gpt-{'t2i' if t2i else 'c2i'}-{size}-{pixels}",
        repository="peizesun/llamagen_t2i" if t2i else "FoundationVision/LlamaGen",
        file=file,
        arguments={"dim": dim, "n_layer": layers, "n_head": heads, "block_size": side**2},
        parameters=parameters,
        tokens=f"{side}x{side}",
        codebook="16384",
        code_licence="MIT",
        weight_licence="not stated",
        source="arXiv 2406.06525, github.com/FoundationVision/LlamaGen",
        size=pixels,
        fid=fid,
        tokenizer="llamagen-vq-16-t2i" if t2i else "llamagen-vq-16",
    )


SYSTEMS = (
    System(
        name="llamagen_gpt_c2i",
        arguments=ARGUMENTS,
        configure=configure,
        rows=(
            _row("b", 256, 110_888_448, file="c2i_B_256.pt", fid="5.46"),
            _row("b", 384, 110_888_448, file="c2i_B_384.pt", fid="6.09"),
            _row("l", 256, 342_910_976, file="c2i_L_256.pt", fid="3.80"),
            _row("l", 384, 342_910_976, file="c2i_L_384.pt", fid="3.07"),
            _row("xl", 384, 774_699_520, file="c2i_XL_384.pt", fid="2.62"),
            _row("xxl", 384, 1_410_972_672, file="c2i_XXL_384.pt", fid="2.34"),
            _row("3b", 384, 3_096_659_200, file="c2i_3B_384.pt", fid="2.18"),
        ),
        layouts=(LAYOUT,),
        nestings=("model", "module", "state_dict"),
    ),
    System(
        name="llamagen_gpt_t2i",
        arguments={**ARGUMENTS, "model_type": "t2i", "cls_token_num": 120},
        configure=configure,
        rows=(
            _row("xl", 256, 777_678_080, file="t2i_XL_stage1_256.pt", t2i=True),
            _row("xl", 512, 777_678_080, file="t2i_XL_stage2_512.pt", t2i=True),
        ),
        layouts=(LAYOUT,),
        nestings=("model", "module", "state_dict"),
    ),
)
