"""LARP's published generators (arXiv 2410.21264, github.com/hywang66/LARP): codes of the LARP video tokenizer
behind an action class (UCF101), or behind the codes of a clip's first frames (frame prediction, K600). The
network is `raster_lm.RasterLM` with learned positions.

For frame prediction the condition is all codes of a clip whose first frames are given and whose last given
frame is repeated to the end, and a separator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lexel.catalog import Layout, Published, System
from lexel.models.llamagen_gpt import LAYOUT, RULES, ffn_dim
from lexel.models.raster_lm import FFN_MULTIPLE, FUSED, RasterLMConfig

ARGUMENTS: dict[str, Any] = {
    "dim": 1280,
    "n_layer": 30,
    "n_head": 20,
    "n_kv_head": None,
    "multiple_of": FFN_MULTIPLE,
    "ffn_dim_multiplier": None,
    "norm_eps": 1e-5,
    "num_classes": 101,
    "vocab_size": 8192,
    "cls_token_num": 1,
    "max_seq_len": 1024,
    "frame_prediction": False,
}
"""LARP's `ModelArgs`, without what concerns training; sizes are those of its published models."""


def configure(arguments: Mapping[str, Any]) -> RasterLMConfig:
    """LARP's arguments → our config."""
    return RasterLMConfig(
        codebook_sizes=(arguments["vocab_size"],),
        dim=arguments["dim"],
        layers=arguments["n_layer"],
        heads=arguments["n_head"],
        kv_heads=arguments["n_kv_head"],
        ffn_dim=ffn_dim(arguments),
        side=0,
        length=arguments["max_seq_len"],
        condition="tokens" if arguments["frame_prediction"] else "class",
        num_classes=arguments["num_classes"],
        condition_length=arguments["cls_token_num"],
        positions="learned",
        norm_eps=arguments["norm_eps"],
    )


def flatten(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The hub's `config.json` keeps the arguments under "config"."""
    return config.get("config", config)


def _row(name: str, repository: str, parameters: int, **arguments: Any) -> Published:
    return Published(
        name=name,
        repository=repository,
        file="",
        arguments=arguments,
        parameters=parameters,
        tokens="1024",
        codebook="8192",
        code_licence="MIT",
        weight_licence="not stated",
        source="arXiv 2410.21264, github.com/hywang66/LARP",
        size=128,
        tokenizer="larp-l-long",
    )


SYSTEMS = (
    System(
        name="larp_ar",
        arguments=ARGUMENTS,
        configure=configure,
        rows=(
            _row("larp-l-long-ar", "hywang66/LARP-L-long-AR", 631_975_680),
            _row(
                "larp-l-long-ar-fp",
                "hywang66/LARP-L-long-AR-FP",
                633_157_120,
                cls_token_num=1025,
                frame_prediction=True,
            ),
        ),
        layouts=(
            Layout(rules=((r"model\.positions", "abs_pe"), *RULES), fused=FUSED, ignored=LAYOUT.ignored),
        ),
        container="",
        flatten=flatten,
        reads_config=True,
    ),
)
