"""Open-MAGVIT2's autoregressive models (arXiv 2409.04410, github.com/TencentARC/SEED-Voken): LlamaGen's
decoder over 18-bit codes cut into 6 and 12 bits, and behind it an intra transformer over the two parts of a
position.

The first factorized_bits[0] channels of a code are its first part, least significant bit first in each part
(`lexel.tokenizers.factorizer`, msb_first=False). The embeddings of a position's two parts are added up.
Published guidance of the two parts (`SamplingConfig.further`): B 1.9 and 2.0, L 1.9 and 1.9, XL 1.75 and
1.85.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lexel.catalog import Layout, Published, System
from lexel.models import llamagen_gpt
from lexel.models.raster_lm import BLOCK_RULES, FUSED, RasterLMConfig

ARGUMENTS: dict[str, Any] = {
    "spatial_n_layer": 12,
    "factorized_n_layer": 2,
    "factorized_bits": (9, 9),
    "token_factorization": True,
    "dim": 256,
    "n_head": 8,
    "n_kv_head": None,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "rope_base": 10000,
    "norm_eps": 1e-5,
    "class_num": 1000,
    "cls_token_num": 1,
    "block_size": 256,
}
LAYOUT = Layout(
    prefix="transformer.",
    rules=(
        (r"^model\.condition", "class_emb.embedding_table"),
        (r"^model\.embed_tokens\.0", "pre_emb"),
        (r"^model\.embed_tokens\.1", "post_emb"),
        (r"^model\.layers", "spatial_blocks"),
        (r"^head\.layers", "factorized_blocks"),
        (r"^head\.norm", "norm"),
        (r"^outputs", "head"),
        *BLOCK_RULES,
    ),
    fused=FUSED,
    ignored=llamagen_gpt.LAYOUT.ignored,
)


def configure(arguments: Mapping[str, Any]) -> RasterLMConfig:
    """Open-MAGVIT2's own arguments → our config."""
    if not arguments["token_factorization"]:
        raise ValueError("token_factorization is always true, got false")
    bits = tuple(arguments["factorized_bits"])
    if len(bits) != 2:
        raise ValueError(f"factorized_bits names two parts, got {list(bits)}")
    renamed = {"n_layer": arguments["spatial_n_layer"], "num_classes": arguments["class_num"]}
    return replace(
        llamagen_gpt.configure({**llamagen_gpt.ARGUMENTS, **arguments, **renamed}),
        codebook_sizes=tuple(2**width for width in bits),
        merge="sum",
        head="factorized",
        head_layers=arguments["factorized_n_layer"],
    )


def _row(size: str, layers: tuple[int, int], dim: int, heads: int, parameters: int, fid: str) -> Published:
    return Published(
        name=f"open-magvit2-ar-{size.lower()}",
        repository=f"TencentARC/Open-MAGVIT2-AR-{size}-256-resolution",
        file=f"AR_256_{size}.ckpt",
        arguments={
            "spatial_n_layer": layers[0],
            "factorized_n_layer": layers[1],
            "factorized_bits": (6, 12),
            "dim": dim,
            "n_head": heads,
        },
        parameters=parameters,
        tokens="16x16",
        codebook="2^6 and 2^12",
        code_licence="Apache-2.0",
        weight_licence="not stated",
        source="arXiv 2409.04410, github.com/TencentARC/SEED-Voken",
        fid=fid,
        tokenizer="open-magvit2-256",
        tokenizer_arguments={"token_factorization": True, "factorized_bits": (6, 12)},
    )


SYSTEMS = (
    System(
        name="open_magvit2_ar",
        arguments=ARGUMENTS,
        configure=configure,
        layouts=(LAYOUT,),
        nestings=("state_dict",),
        container="state_dict",
        rows=(
            _row("B", (24, 2), 1024, 16, 343_570_432, "3.08"),
            _row("L", (36, 3), 1280, 20, 804_362_240, "2.51"),
            _row("XL", (48, 4), 1536, 24, 1_486_679_040, "2.33"),
        ),
    ),
)
