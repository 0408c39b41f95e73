"""ELM's autoregressive models (arXiv 2410.16257, github.com/Pepper-lll/LMforImageGeneration): LlamaGen's
decoder over the codes of a binary autoencoder, cut into sub-codes that are predicted side by side.

A code of token_each · code_dim bits is token_each sub-codes of code_dim bits, the first bits first and the
most significant bit first in each (`lexel.tokenizers.factorizer`): the columns of "elm-bae" tokenizers. The
embeddings of a position's sub-codes are merged by a linear layer; with one sub-code there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lexel.catalog import Layout, Published, System
from lexel.models import llamagen_gpt
from lexel.models.raster_lm import BLOCK_RULES, FUSED, RasterLMConfig

ARGUMENTS = {
    **llamagen_gpt.ARGUMENTS,
    "token_each": 4,
    "code_dim": 16,
    "pos_type": "rope2d",
    "attn_type": "sdp",
    "use_adaLN": False,
    "pause": False,
    "cls_row": False,
}
# What the reference can be told to be and no published model is.
FIXED = ("model_type", "pos_type", "attn_type", "use_adaLN", "pause", "cls_row")
_RULES = (
    (r"^model\.condition", "cls_embedding.embedding_table"),
    (r"^model\.embed_tokens", "tok_embedder"),
    (r"^model\.merge", "proj"),
    (r"^model\.(layers|norm)", r"\1"),
    (r"^outputs", "output"),
    *BLOCK_RULES,
)
PARTS_LAYOUT = Layout(rules=_RULES, fused=FUSED, ignored=llamagen_gpt.LAYOUT.ignored)
WHOLE_LAYOUT = replace(PARTS_LAYOUT, rules=(*_RULES, (r"^(tok_embedder|output)\.0", r"\1")))
SIZES: dict[str, dict[str, Any]] = {
    "l": {"n_layer": 24, "dim": 1024, "n_head": 16},
    "xl": {"n_layer": 36, "dim": 1280, "n_head": 20},
    "xxl": {"n_layer": 48, "dim": 1536, "n_head": 24},
    "2b": {"n_layer": 48, "dim": 1792, "n_head": 28},
}


def configure(arguments: Mapping[str, Any]) -> RasterLMConfig:
    """ELM's own arguments → our config."""
    for name in FIXED:
        if arguments[name] != ARGUMENTS[name]:
            raise ValueError(f"{name} is always {ARGUMENTS[name]!r} here, got {arguments[name]!r}")
    parts = arguments["token_each"]
    if parts < 1:
        raise ValueError(f"token_each is the number of sub-codes, at least 1, got {parts}")
    return replace(
        llamagen_gpt.configure(arguments),
        codebook_sizes=(2 ** arguments["code_dim"],) * parts,
        merge="concat",
        head="single" if parts == 1 else "parallel",
    )


def _row(size: str, token_each: int, code_dim: int, parameters: int, fid: str = "") -> Published:
    name = f"{size}-{token_each}-{code_dim}"
    return Published(
        name=f"elm-ar-{name}",
        repository="xuantonglll/ELM",
        file=f"gpt/{name.upper()}.pth",
        arguments={**SIZES[size], "token_each": token_each, "code_dim": code_dim},
        parameters=parameters,
        tokens="16x16",
        codebook=f"{token_each} x 2^{code_dim}",
        code_licence="none stated (no licence file)",
        weight_licence="not stated",
        source="arXiv 2410.16257, github.com/Pepper-lll/LMforImageGeneration",
        fid=fid and f"{fid} (unguided)",
        tokenizer=f"elm-bae-{token_each * code_dim}",
        tokenizer_arguments={"token_each": token_each},
    )


# A file names its tables differently where there is one: the whole code.
PARTS = System(
    name="elm_ar",
    arguments=ARGUMENTS,
    configure=configure,
    layouts=(PARTS_LAYOUT,),
    nestings=("model", "module", "state_dict"),
    container="",
    rows=(
        _row("l", 2, 8, 312_502_272),
        _row("l", 2, 10, 315_648_000, fid="15.95"),
        _row("l", 2, 12, 328_230_912),
        _row("xl", 2, 8, 737_344_000),
        _row("xl", 2, 10, 741_276_160, fid="12.70"),
        _row("xl", 2, 12, 757_004_800),
        _row("xxl", 2, 10, 1_371_651_072),
        _row("xxl", 2, 12, 1_390_525_440, fid="10.11"),
        _row("2b", 2, 12, 1_909_458_432),
    ),
)
WHOLE = System(
    name="elm_ar_whole",
    arguments={**ARGUMENTS, "token_each": 1},
    configure=configure,
    layouts=(WHOLE_LAYOUT,),
    nestings=PARTS.nestings,
    container="",
    rows=(_row("l", 1, 16, 443_574_272), _row("xl", 1, 16, 900_528_640), _row("xxl", 1, 16, 1_561_967_616)),
)
SYSTEMS = (PARTS, WHOLE)
