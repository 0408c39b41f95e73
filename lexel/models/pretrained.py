"""A language model that starts from a pretrained text model and learns pictures: what ``lm=pretrained``
configures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from lexel.errors import LexelError
from lexel.hub import read_config, resolve_folder
from lexel.models.backbones import load_backbone, native
from lexel.models.causal_lm import CausalLM, code_head
from lexel.models.extend import Init, extend_vocabulary
from lexel.models.heads import FutureHeads
from lexel.models.routed import route

if TYPE_CHECKING:
    from lexel.models.wrapped_lm import WrappedLM


@dataclass(frozen=True)
class PretrainedConfig:
    """Where a language model starts, and what it gets beside the text model's weights.

    source: folder or hub id of a causal language model in transformers' format. native: as a `CausalLM`, for
    the families of `lexel.models.backbones`; other families, and all with False, run as transformers built
    them (`lexel.models.wrapped_lm`). init: how the rows of added ids start (`lexel.models.extend`). dtype: of
    the weights that are trained. max_length: longest sequence; no more than the text model has positions.
    routed: weights of their own for picture tokens (`lexel.models.routed`; with ``stages.lm.trainable`` the
    text's rest). head, head_layers, future_heads, bidirectional: as in `CausalLMConfig`; heads are new.

    The run fills in the rest from its documents: vocab_size, text_size (ids of the text tokenizer, whose rows
    stay), pad_id, codebook_sizes and code_offsets. Raises ValueError for another dtype.
    """

    source: str
    native: bool = True
    init: Init = "mean"
    dtype: str = "float32"
    max_length: int = 1024
    routed: bool = False
    head: Literal["single", "parallel", "factorized"] = "single"
    head_layers: int = 1
    future_heads: int = 0
    bidirectional: tuple[tuple[int, int], ...] = ()
    vocab_size: int = 0
    text_size: int = 0
    pad_id: int = 0
    codebook_sizes: tuple[int, ...] = ()
    code_offsets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"lm.dtype is float32, bfloat16 or float16, got {self.dtype!r}.")

    def build(self) -> CausalLM | WrappedLM:
        """The text model with its extended vocabulary; added rows and heads are drawn from torch's global
        generator. Raises LexelError when source, vocabulary and settings do not fit together."""
        folder = resolve_folder(self.source, "backbone")
        as_ours = self.native and native(read_config(folder)) is not None
        lm = self._native() if as_ours else self._wrapped()
        extend_vocabulary(lm, self.vocab_size, self.text_size, self.init)
        return self._with_heads(lm) if isinstance(lm, CausalLM) else lm

    def _native(self) -> CausalLM:
        lm = load_backbone(self.source, getattr(torch, self.dtype))
        self._check_length(lm.config.max_length)
        return lm

    def _wrapped(self) -> WrappedLM:
        from lexel.models.wrapped_lm import WrappedLM

        if self.routed or self.future_heads or len(self.codebook_sizes) > 1:
            raise LexelError(
                f"{self.source} runs as transformers built it, which leaves no room for routed weights, "
                "heads for later tokens or several codes per position: set lm.routed=false and "
                "lm.future_heads=0, stages.lm.pattern=interleaved, or take a native backbone."
            )
        lm = WrappedLM.from_pretrained(self.source)
        if self.bidirectional:
            lm = WrappedLM(lm.network, self.bidirectional)
        self._check_length(lm.config.max_length)
        lm.set_pad(self.pad_id)
        return lm.to(getattr(torch, self.dtype))

    def _with_heads(self, lm: CausalLM) -> CausalLM:
        changes: dict[str, Any] = {}
        if len(self.codebook_sizes) > 1:
            names = ("head", "head_layers", "codebook_sizes", "code_offsets")
            changes = {name: getattr(self, name) for name in names}
        for name in ("max_length", "pad_id", "future_heads", "bidirectional"):
            changes[name] = getattr(self, name)
        lm.config = replace(lm.config, **changes)
        like = lm.model.embed_tokens.weight
        lm.head = code_head(lm.config)
        lm.future = FutureHeads(lm.config.dim, self.future_heads) if self.future_heads else None
        for part in (lm.head, lm.future):
            if part is not None:
                part.to(like)
        return route(lm) if self.routed else lm

    def _check_length(self, limit: int) -> None:
        if self.max_length > limit:
            raise LexelError(
                f"lm.max_length is {self.max_length}, but {self.source} has {limit} positions; set "
                f"lm.max_length={limit} or less."
            )
