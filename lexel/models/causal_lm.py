"""The decoder-only language model over mixed text and picture tokens.

Llama's architecture with Llama's parameter names (so weights of the Llama family fit unchanged), plus:
rotary positions shared out between document index, picture row and picture column; nested feed-forward
widths (MatFormer, arXiv:2310.07707); several codes per position (`heads.py`).

b batch · l positions (q: new ones) · s keys · k codes per position · v vocabulary · d width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.hub import Pretrained
from lexel.models.heads import CodeHead, FactorizedHead, FutureHeads, ParallelHead
from lexel.models.kv_cache import KVCache
from lexel.nn.attention import SelfAttention, additive_mask
from lexel.nn.decoder import DecoderLayer, init_decoder, nested_width
from lexel.nn.norm import RMSNorm
from lexel.nn.rope import Rotary
from lexel.types import LMOutput, TokenBatch

FFN_MULTIPLE = 64


@dataclass(frozen=True)
class CausalLMConfig:
    """Size and form of a `CausalLM`.

    kv_heads: key/value heads (None: as many as heads); head_dim: None is dim / heads; ffn_dim: None is
    8/3 · dim rounded up to 64.
    rope_axes: share of rotary pairs for (index, row, column); (1, 0, 0) is plain 1D, (.5, .25, .25) mixed.
    ffn_widths: fractions of the feed-forward trained as nested submodels, ascending, the last 1.0.
    head: "single" (one code per position), "parallel" or "factorized" (k codes per position), which need
    codebook_sizes (k of them) and code_offsets (id of code 0 of each codebook in the joint vocabulary).
    head_layers: blocks of the factorized head. pad_id: contributes nothing to the sum over columns.
    future_heads: how many tokens after the next one have a head of their own (`FutureHeads`), to draft with;
    only with one code per position.
    max_length: longest sequence the model is meant for, a new cache's default size.
    dropout: on embeddings and both branches of every block. Raises ValueError when fields disagree.
    """

    vocab_size: int
    dim: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    rope_theta: float = 1e4
    rope_axes: tuple[float, float, float] = (1.0, 0.0, 0.0)
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tie_embeddings: bool = True
    ffn_widths: tuple[float, ...] = (1.0,)
    head: Literal["single", "parallel", "factorized"] = "single"
    codebook_sizes: tuple[int, ...] = ()
    code_offsets: tuple[int, ...] = ()
    head_layers: int = 1
    pad_id: int = 0
    max_length: int = 1024
    dropout: float = 0.0
    future_heads: int = 0

    def __post_init__(self) -> None:
        for name in ("rope_axes", "ffn_widths", "codebook_sizes", "code_offsets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not divide into {self.heads} heads; set head_dim.")
        widths = self.ffn_widths
        if not widths or list(widths) != sorted(set(widths)) or widths[0] <= 0 or widths[-1] != 1.0:
            raise ValueError(f"ffn_widths ascend within (0, 1] and end in 1.0, got {widths}.")
        if self.head not in ("single", "parallel", "factorized"):
            raise ValueError(f"head is single, parallel or factorized, got {self.head!r}.")
        if self.head == "single" and len(self.codebook_sizes) > 1:
            raise ValueError("several codebooks per position need head=parallel or head=factorized.")
        if self.head != "single" and not len(self.codebook_sizes) == len(self.code_offsets) > 1:
            raise ValueError(
                f"head={self.head} needs codebook_sizes and code_offsets of two or more codebooks, "
                f"got {self.codebook_sizes} and {self.code_offsets}."
            )
        if self.future_heads < 0:
            raise ValueError(f"future_heads must not be negative, got {self.future_heads}.")
        if self.future_heads and self.head != "single":
            raise ValueError(
                f"future heads draft one code per position; with head={self.head} set future_heads=0, "
                f"got {self.future_heads}."
            )

    @property
    def columns(self) -> int:
        """Codes per position."""
        return 1 if self.head == "single" else len(self.codebook_sizes)

    @property
    def key_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head, resolved."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def hidden_width(self) -> int:
        """Feed-forward width, resolved."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        return FFN_MULTIPLE * -(-8 * self.dim // (3 * FFN_MULTIPLE))

    def build(self) -> CausalLM:
        """A freshly initialised model."""
        return CausalLM(self)


class Decoder(nn.Module):
    """Embedding table, blocks and final norm: what transformers calls `LlamaModel`."""

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(_layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class CausalLM(nn.Module, Pretrained):
    """Next-token model over one mixed vocabulary; parameter names equal transformers' `LlamaForCausalLM`
    (`Qwen3ForCausalLM` with qk_norm). `head` is None with one code per position."""

    model_type: ClassVar[str] = "lexel_lm"
    config_class: ClassVar[type] = CausalLMConfig
    head: CodeHead | None

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rotary = Rotary(config.head_width, config.rope_theta, config.rope_axes)
        init_decoder(self, config.layers)
        self.head = _code_head(config)
        self.future = FutureHeads(config.dim, config.future_heads) if config.future_heads else None

    def new_cache(
        self, batch: int, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache of `batch` rows on the model's device; `max_length` slots (default: the config's),
        in the weights' dtype unless another is given (bfloat16 under autocast)."""
        weight = self.model.embed_tokens.weight
        return KVCache(
            self.config.layers,
            batch,
            self.config.key_heads,
            max_length or self.config.max_length,
            self.config.head_width,
            device=weight.device,
            dtype=dtype or weight.dtype,
        )

    def forward(
        self,
        batch: TokenBatch,
        cache: KVCache | None = None,
        width: float | None = None,
        select: Tensor | None = None,
        future: bool = False,
    ) -> LMOutput:
        """Logits of the position after each of the batch's.

        cache: the batch then holds the q new tokens of each row; row r continues at ``cache.lengths[r]``, and
        the cache grows by q. Without `attention_mask`, attention is causal (over the row's cached tokens and
        the new ones); with it, bool (or additive float) ``[b, q, s]`` decides, s at least the slots in use.
        width: fraction of the feed-forward to use (nested submodel); None is all of it.
        select: bool ``[b, l]``, positions whose logits are wanted; `logits` and `code_logits` are then
        ``[m, ·]`` over them in row-major order, and the others are never computed.
        future: fill `future_logits` where the model has heads for them (for training; a decoder calls
        ``project`` on what ``future`` makes of the hidden states it needs).

        With k codes per position, `code_logits` are teacher-forced with the following position's ids; the
        last position has none and its entry is to be ignored. With a cache they are left out: see
        `code_logits` and `head.next_logits`. Raises LexelError when the cache is full.
        """
        hidden, _ = self.decode(batch, cache, width)
        picked = hidden if select is None else hidden[select]
        code_logits: tuple[Tensor, ...] = ()
        if self.head is not None and cache is None:
            following = F.pad(batch.ids[:, 1:], (0, 0, 0, 1), value=self.config.pad_id)
            code_logits = self.code_logits(picked, following if select is None else following[select])
        further = self.future(picked) if future and self.future is not None else ()
        return LMOutput(self.project(picked), hidden, code_logits, tuple(map(self.project, further)))

    def decode(
        self,
        batch: TokenBatch,
        cache: KVCache | None = None,
        width: float | None = None,
        layers: Sequence[int] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states ``[b, l, d]`` after the final norm, and the inputs ``[b, l, d]`` of the blocks
        numbered `layers` (what EAGLE-3 heads read). Arguments as for `forward`; `project` makes logits."""
        x = self._embed(batch)
        mask, causal = self._mask(batch, cache, x)
        cos, sin = self.rotary(batch.positions)
        rotation = cos.to(x.dtype), sin.to(x.dtype)
        x, inputs = self._blocks(x, rotation, mask, causal, cache, width, layers)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.model.norm(x), inputs

    def _blocks(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        cache: KVCache | None,
        width: float | None,
        layers: Sequence[int],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All blocks: ``[b, l, d]`` before the final norm, and the inputs of those numbered `layers`."""
        inputs = []
        for index, layer in enumerate(self.model.layers):
            if index in layers:
                inputs.append(x)
            extend = None if cache is None else partial(cache.append, index)
            x = layer(x, rotation, mask, causal=causal, extend=extend, width=width)
        return x, tuple(inputs)

    def project(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits ``[..., v]`` of hidden states ``[..., d]``, or only those of the ids start .. stop - 1."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        if start == 0 and stop in (None, len(weight)):
            return F.linear(hidden, weight) if self.lm_head is None else self.lm_head(hidden)
        return F.linear(hidden, weight[start:stop])

    def code_logits(self, hidden: Tensor, following: Tensor) -> tuple[Tensor, ...]:
        """Logits ``[..., K_j]`` of columns 1..k-1 of the position after each of hidden ``[..., d]``, given
        that position's true ids ``[..., k]``; meaningless where it holds text."""
        assert self.head is not None
        flat = self.head(hidden.reshape(-1, hidden.shape[-1]), self.local_codes(following).flatten(0, -2))
        return tuple(logits.unflatten(0, hidden.shape[:-1]) for logits in flat)

    def local_codes(self, ids: Tensor) -> Tensor:
        """Ids ``[..., k]`` → codebook-local codes ``[..., k - 1]`` of columns 0..k-2, what the head is given.
        Ids of text, special tokens or padding become a code at the edge; no loss falls there."""
        local = [
            (ids[..., j] - offset).clamp(0, size - 1)
            for j, (offset, size) in enumerate(zip(self.config.code_offsets, self.config.codebook_sizes))
        ]
        return torch.stack(local[:-1], dim=-1)

    def submodel_units(self, width: float | None) -> int:
        """Feed-forward units in use at `width`."""
        return nested_width(self.config.hidden_width, width)

    def _embed(self, batch: TokenBatch) -> Tensor:
        """``[b, l, d]``: one row of the table per id, summed over columns (padding adds nothing), then the
        continuous inputs put in their places."""
        ids = batch.ids
        columns = ids.shape[2] if ids.ndim == 3 else 1
        if columns != self.config.columns:
            raise ValueError(f"the model reads {self.config.columns} codes per position, got {columns}.")
        if columns == 1:
            x = self.model.embed_tokens(ids.reshape(ids.shape[:2]))
        else:
            x = (self.model.embed_tokens(ids) * (ids != self.config.pad_id).unsqueeze(-1)).sum(2)
        if batch.embeds is not None and batch.embed_index is not None:
            x = x.index_put(tuple(batch.embed_index.unbind(1)), batch.embeds.to(x.dtype))
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def _mask(self, batch: TokenBatch, cache: KVCache | None, x: Tensor) -> tuple[Tensor | None, bool]:
        """(additive mask or None, whether plain causal attention does)."""
        new = x.shape[1]
        visible = batch.attention_mask
        if cache is not None and visible is not None:
            span = cache.span(new)
            if visible.shape[2] < span:
                raise ValueError(f"attention_mask covers {visible.shape[2]} slots, {span} are in use.")
            visible = visible[:, :, :span]
        if cache is not None and visible is None and any(cache.host_lengths):
            visible = cache.visible(new)
            if visible is None:
                return None, False
        if visible is None:
            return None, True
        return additive_mask(visible, x.dtype), False


def _attention_sizes(config: CausalLMConfig) -> dict[str, Any]:
    return {"heads": config.heads, "kv_heads": config.key_heads, "head_dim": config.head_width}


def _layer(config: CausalLMConfig) -> DecoderLayer:
    attention = SelfAttention(
        config.dim, **_attention_sizes(config), qk_norm=config.qk_norm, norm_eps=config.norm_eps
    )
    return DecoderLayer(attention, config.hidden_width, norm_eps=config.norm_eps, dropout=config.dropout)


def _code_head(config: CausalLMConfig) -> CodeHead | None:
    if config.head == "single":
        return None
    if config.head == "parallel":
        return ParallelHead(config.dim, config.codebook_sizes)
    return FactorizedHead(
        config.dim,
        config.codebook_sizes,
        layers=config.head_layers,
        **_attention_sizes(config),
        ffn_dim=config.hidden_width,
        norm_eps=config.norm_eps,
    )
