"""FQGAN's autoregressive models (FAR; arXiv 2411.16681, github.com/showlab/FQGAN): a decoder over positions,
and behind it a small one over the two or three codes of each position.

Columns: Dual (visual, semantic); Triple (visual, semantic middle, semantic high): the order in which
`lexel.tokenizers.factorized` keeps its codebooks. Embeddings of a position's codes are merged by a linear
layer with a bias. No weights were published: give a local file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lexel.catalog import Layout, Published, System
from lexel.models import llamagen_gpt
from lexel.models.raster_lm import BLOCK_RULES, FUSED, RasterLMConfig

ARGUMENTS = {**llamagen_gpt.ARGUMENTS, "ar_n_layer": 4}
LAYOUT = Layout(
    rules=(
        (r"^model\.condition", "cls_embedding.embedding_table"),
        (r"^model\.merge", "aggregation_layer"),
        *((rf"^model\.embed_tokens\.{j}\.", f"tok_embeddings_{j + 1}.") for j in range(3)),
        *((rf"^outputs\.{j}\.", f"output_{j + 1}.") for j in range(3)),
        (r"^head\.layers", "ar_head"),
        (r"^head\.norm", "norm"),
        (r"^model\.layers", "layers"),
        *BLOCK_RULES,
    ),
    fused=FUSED,
    ignored=llamagen_gpt.LAYOUT.ignored,
)
SIZES: dict[str, dict[str, Any]] = {
    "b": {"dim": 1024, "n_layer": 24, "n_head": 16, "ar_n_layer": 3},
    "l": {"dim": 1280, "n_layer": 36, "n_head": 20, "ar_n_layer": 4},
}


def configure(arguments: Mapping[str, Any], codes: int) -> RasterLMConfig:
    """FAR's own arguments → our config."""
    if arguments["model_type"] != "c2i":
        raise ValueError(f"model_type is always 'c2i', got {arguments['model_type']!r}")
    return replace(
        llamagen_gpt.configure(arguments),
        codebook_sizes=(arguments["vocab_size"],) * codes,
        merge="concat",
        merge_bias=True,
        head="factorized",
        head_layers=arguments["ar_n_layer"],
    )


def _system(kind: str, codes: int, parameters: Mapping[str, int]) -> System:
    return System(
        name=f"fqgan_ar_{kind}",
        arguments=ARGUMENTS,
        configure=partial(configure, codes=codes),
        layouts=(LAYOUT,),
        nestings=("model", "module", "state_dict"),
        rows=tuple(
            Published(
                name=f"fqgan-ar-{kind}-{size}",
                repository="not published",
                file="",
                arguments=arguments,
                parameters=parameters[size],
                tokens="16x16",
                codebook=f"{codes} x 16384",
                code_licence="CC-BY-NC-4.0",
                weight_licence="not published",
                source="arXiv 2411.16681, github.com/showlab/FQGAN",
                tokenizer=f"fqgan-{kind}-16",
            )
            for size, arguments in SIZES.items()
        ),
    )


DUAL = _system("dual", 2, {"b": 417_104_896, "l": 901_195_520})
TRIPLE = _system("triple", 3, {"b": 451_707_904, "l": 944_776_960})
SYSTEMS = (DUAL, TRIPLE)
