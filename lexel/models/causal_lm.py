"""The decoder-only language model over mixed text and picture tokens.

Llama's architecture with Llama's parameter names, the variations that Mistral, Qwen and Gemma made of it (so
that their weights fit unchanged, see `backbones.py`), plus: rotary positions shared out between document
index, picture row and picture column; nested feed-forward widths (MatFormer, arXiv:2310.07707); several codes
per position (`heads.py`).

b batch · l positions (q: new ones) · s keys · k codes per position · v vocabulary · d width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.hub import Pretrained
from lexel.models.heads import CodeHead, FactorizedHead, FutureHeads, ParallelHead
from lexel.models.kv_cache import KVCache
from lexel.nn.attention import SelfAttention, additive_mask, within_window
from lexel.nn.decoder import (
    ACTIVATIONS,
    Activation,
    DecoderLayer,
    SandwichLayer,
    init_decoder,
    nested_width,
)
from lexel.nn.norm import RMSNorm
from lexel.nn.rope import RopeScaling, Rotary
from lexel.nn.routing import Tokens, route_blocks
from lexel.nn.spans import see_given
from lexel.nn.varlen import Documents
from lexel.types import LMOutput, TokenBatch

FFN_MULTIPLE = 64
LayerMask = tuple[Tensor | Documents | None, bool]
"""What a block attends by: an additive mask or None, and whether plain causal attention does."""


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
    dropout: on embeddings and both branches of every block.

    The other fields tell the families of `lexel.models.backbones` apart; their defaults are Llama's.
    activation: of the feed-forward's gate ("gelu_tanh": Gemma). qkv_bias, out_bias: of the attention's
    projections (Qwen2: the first). ffn_bias: of the feed-forward. norm_offset: added to the weights of all
    norms (Gemma: 1). sandwich_norm: norms behind both branches of a block too (Gemma-2). embed_scale: factor
    of the embeddings, rounded to their dtype as in transformers (Gemma: sqrt(dim)); continuous inputs stay as
    they are. attention_scale: factor of the attention's scores (None: 1 / sqrt(head_dim)). attention_softcap,
    logit_softcap: bound c of scores and of logits, c·tanh(x / c) (Gemma-2; None: no bound).
    windows: for each block, how many tokens back it sees, the token itself counted (None: all); empty: every
    block sees all. rope_scaling: stretched rotary frequencies (Llama 3.1).

    routed: parts of every block that have weights of their own for picture tokens (`lexel.models.routed`).
    bidirectional: pairs (modality, id that closes it): the tokens of a picture of such a modality that is
    given, not generated, see each other (`lexel.nn.spans`): in prompts, and in documents whose loss mask
    says which pictures are given.
    Raises ValueError when fields disagree.
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
    activation: Activation = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    norm_offset: float = 0.0
    sandwich_norm: bool = False
    embed_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int | None, ...] = ()
    rope_scaling: RopeScaling | None = None
    routed: tuple[str, ...] = ()
    bidirectional: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("rope_axes", "ffn_widths", "codebook_sizes", "code_offsets", "windows", "routed"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "bidirectional", tuple((int(m), int(end)) for m, end in self.bidirectional))
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
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {' or '.join(ACTIVATIONS)}, got {self.activation!r}.")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows name one length per block, {self.layers} in all, got {self.windows}.")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows are at least 1 (or null for no limit), got {self.windows}.")

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
        self.norm = RMSNorm(config.dim, config.norm_eps, config.norm_offset)


class CausalLM(nn.Module, Pretrained):
    """Next-token model over one mixed vocabulary; parameter names equal those of transformers'
    `LlamaForCausalLM` and its relatives. `head` is None with one code per position."""

    model_type: ClassVar[str] = "lexel_lm"
    config_class: ClassVar[type] = CausalLMConfig
    head: CodeHead | None
    windows: tuple[int | None, ...] = ()
    source: dict[str, Any] | None = None  # config.json of the backbone it was read from

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.config = config
        self.windows = config.windows
        self.model = Decoder(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rotary = Rotary(config.head_width, config.rope_theta, config.rope_axes, config.rope_scaling)
        init_decoder(self, config.layers)
        self.head = code_head(config)
        self.future = FutureHeads(config.dim, config.future_heads) if config.future_heads else None
        route_blocks(self.model.layers, config.routed)

    def new_cache(
        self, batch: int, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache of `batch` rows on the model's device; `max_length` slots (default: the config's),
        in the weights' dtype unless another is given (bfloat16 under autocast)."""
        weight = next(self.parameters())
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
        ``project`` on what ``future`` makes of the hidden states it needs), and `future_code_logits`.

        With k codes per position, `code_logits` are teacher-forced with the following position's ids; the
        last position has none and its entry is to be ignored. With a cache they are left out: see
        `code_logits` and `head.next_logits`. Raises LexelError when the cache is full.
        """
        hidden, _ = self.decode(batch, cache, width)
        picked = hidden if select is None else hidden[select]
        further = self.future(picked) if future and self.future is not None else ()
        codes: list[tuple[Tensor, ...]] = []
        if self.head is not None and cache is None:
            for distance, state in enumerate((picked, *further), start=1):
                ids = F.pad(batch.ids, (0, 0, 0, distance), value=self.config.pad_id)[:, distance:]
                codes.append(self.code_logits(state, ids if select is None else ids[select]))
        logits = tuple(map(self.project, (picked, *further)))
        return LMOutput(logits[0], hidden, codes[0] if codes else (), logits[1:], tuple(codes[1:]))

    def decode(
        self,
        batch: TokenBatch,
        cache: KVCache | None = None,
        width: float | None = None,
        layers: Sequence[int] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states ``[b, l, d]`` after the final norm, and the inputs ``[b, l, d]`` of the blocks
        numbered `layers` (what EAGLE-3 heads read). Arguments as for `forward`; `project` makes logits."""
        if cache is None and batch.loss_mask is not None:
            batch = see_given(batch, getattr(self.config, "bidirectional", ()))
        x = self._embed(batch)
        masks = self._masks(batch, cache, x)
        cos, sin = self.rotary(batch.positions)
        rotation = cos.to(x.dtype), sin.to(x.dtype)
        tokens = Tokens.of(batch.modality) if getattr(self.config, "routed", ()) else None
        x, inputs = self._blocks(x, rotation, masks, cache, width, layers, tokens)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.model.norm(x), inputs

    def _blocks(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        masks: Sequence[LayerMask],
        cache: KVCache | None,
        width: float | None,
        layers: Sequence[int],
        tokens: Tokens | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All blocks: ``[b, l, d]`` before the final norm, and the inputs of those numbered `layers`."""
        inputs = []
        told = {} if tokens is None else {"tokens": tokens}
        for index, (layer, (mask, causal)) in enumerate(zip(self.model.layers, masks)):
            if index in layers:
                inputs.append(x)
            extend = None if cache is None else partial(cache.append, index)
            x = layer(x, rotation, mask, causal=causal, extend=extend, width=width, **told)
        return x, tuple(inputs)

    def project(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits ``[..., v]`` of hidden states ``[..., d]``, or only those of the ids start .. stop - 1."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        if start == 0 and stop in (None, len(weight)):
            logits = F.linear(hidden, weight) if self.lm_head is None else self.lm_head(hidden)
        else:
            logits = F.linear(hidden, weight[start:stop])
        return self._cap(logits)

    def _cap(self, logits: Tensor) -> Tensor:
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

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

    def resize_token_embeddings(self, size: int) -> None:
        """Give the embedding and an untied output table `size` rows: the first ones stay, added ones are zero
        (`lexel.models.extend` fills them)."""
        tables: list[Any] = [self.model.embed_tokens, *([] if self.lm_head is None else [self.lm_head])]
        for table in tables:
            old = table.weight
            rows = old.new_zeros(size, old.shape[1])
            rows[: len(old)] = old.detach()[:size]
            table.weight = nn.Parameter(rows, requires_grad=old.requires_grad)
        self.model.embed_tokens.num_embeddings = size
        if self.lm_head is not None:
            self.lm_head.out_features = size
        self.config = replace(self.config, vocab_size=size)

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
        if self.config.embed_scale != 1.0:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype)
        if batch.embeds is not None and batch.embed_index is not None:
            x = x.index_put(tuple(batch.embed_index.unbind(1)), batch.embeds.to(x.dtype))
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def _masks(self, batch: TokenBatch, cache: KVCache | None, x: Tensor) -> list[LayerMask]:
        """For every block, how it attends."""
        if self._within_documents(batch, cache):
            assert batch.documents is not None
            return [(Documents(batch.documents), False)] * len(self.model.layers)
        visible, causal = self._visible(batch, cache)
        plain = None if visible is None else additive_mask(visible, x.dtype), causal
        new = x.shape[1]
        span = new if cache is None else cache.span(new)
        if not any(window is not None and window < span for window in self.windows):
            return [plain] * len(self.model.layers)
        start = torch.zeros(1, dtype=torch.long, device=x.device) if cache is None else cache.lengths
        own = start[:, None] + torch.arange(new, device=x.device)
        if visible is None:
            visible = torch.arange(span, device=x.device) <= own[..., None]
        return self.window_masks(visible, own, x.dtype)

    def _within_documents(self, batch: TokenBatch, cache: KVCache | None) -> bool:
        """Whether attention is computed document by document."""
        plain = not self.windows and getattr(self.config, "attention_softcap", None) is None
        return batch.documents is not None and cache is None and plain

    def window_masks(self, visible: Tensor, own: Tensor, dtype: torch.dtype) -> list[LayerMask]:
        """For every block, what is left of ``visible [b, l, s]`` in its window; own: see `within_window`."""
        slots = visible.shape[2]
        windows = [min(window or slots, slots) for window in self.windows or [None] * len(self.model.layers)]
        seen = {w: visible if w == slots else within_window(visible, own, w) for w in set(windows)}
        made = {window: additive_mask(mask, dtype) for window, mask in seen.items()}
        return [(made[window], False) for window in windows]

    def _visible(self, batch: TokenBatch, cache: KVCache | None) -> tuple[Tensor | None, bool]:
        """(what each new token may see ``[b, l, s]`` or None for everything, whether plain causal attention
        does), windows left aside."""
        new = batch.ids.shape[1]
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
        return visible, visible is None


def _attention_sizes(config: CausalLMConfig) -> dict[str, Any]:
    return {"heads": config.heads, "kv_heads": config.key_heads, "head_dim": config.head_width}


def _layer(config: CausalLMConfig) -> DecoderLayer:
    norms: dict[str, Any] = {"norm_eps": config.norm_eps, "norm_offset": config.norm_offset}
    attention = SelfAttention(
        config.dim,
        **_attention_sizes(config),
        qk_norm=config.qk_norm,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        **norms,
    )
    form = SandwichLayer if config.sandwich_norm else DecoderLayer
    return form(
        attention,
        config.hidden_width,
        dropout=config.dropout,
        activation=config.activation,
        ffn_bias=config.ffn_bias,
        **norms,
    )


def code_head(config: CausalLMConfig) -> CodeHead | None:
    """A new head for columns 1..k-1 of a position; None with one code per position."""
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
