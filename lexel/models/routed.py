"""LlamaFusion: a trained text model learns pictures without a change to what it does with text.

Every block keeps its weights for text tokens and gets a copy of them (query, key, value and output
projection, norms, feed-forward) for picture tokens; self-attention runs over the mixed sequence (Shi et al.,
arXiv:2412.15188, LMFusion in later versions). With the text weights frozen
(``stages.lm.trainable=[picture,new_rows]``) the model of pure text stays what it was, bit by bit.

Here pictures are discrete tokens of the same vocabulary, so their input and output vectors are rows of the
shared tables, and the loss is next-token for both; the paper trains continuous latents by diffusion, with a
small U-Net around the blocks. Attention is causal unless `bidirectional` says otherwise (the paper: full
inside a picture). Embedding tables and the final norm are shared.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.nn.decoder import DecoderLayer
from lexel.nn.routing import parts, route_blocks


def route(lm: CausalLM) -> CausalLM:
    """A copy of `lm` with weights of its own for picture tokens, equal to the text ones at first, so that its
    logits are `lm`'s. It is a `CausalLM` whose config says `routed`, and is saved, loaded and sampled as one.
    Raises LexelError when `lm` is another kind of model or has routed parts already."""
    if type(lm) is not CausalLM:
        raise LexelError(f"only a CausalLM can be routed, got {type(lm).__name__}.")
    if lm.config.routed:
        raise LexelError("the language model is routed already.")
    made = copy.deepcopy(lm)
    made.config = replace(lm.config, routed=parts(cast(DecoderLayer, lm.model.layers[0])))
    route_blocks(made.model.layers, made.config.routed)
    return made


def is_picture_weight(name: str) -> bool:
    """Whether a parameter's name is that of a weight for picture tokens."""
    return ".picture." in name
