"""The decoder over the codes of one picture behind a condition: LlamaGen (arXiv 2406.06525) and the models
made from it, FQGAN's, ELM's, Open-MAGVIT2's and LARP's.

A sequence is ``[condition][codes in raster order]``; the last position of the condition predicts code 0. The
blocks are those of `CausalLM`, with adjacent pairs of a head rotated by row and column (`RasterRotary`), or
not at all beside learned positions. Everything that decodes a `CausalLM` decodes these models.

Ids: codes of column 0 from 0 on, then those of column 1 and so on; from `class_offset` on the class labels,
the last of them the null class; then the special tokens, which are never fed.

b batch · l positions · k codes per position · K_j codes of column j · d width · f width of caption features
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.models.causal_lm import CausalLM
from lexel.models.heads import CodeHead
from lexel.nn.attention import SelfAttention
from lexel.nn.decoder import INIT_STD, DecoderLayer
from lexel.nn.norm import RMSNorm
from lexel.nn.rope import RasterRotary, Unrotated, rotate, rotate_interleaved
from lexel.types import TokenBatch

FFN_MULTIPLE = 256
BLOCK_RULES = (
    (r"self_attn\.[qkv]_proj", "attention.wqkv"),
    (r"self_attn\.o_proj", "attention.wo"),
    (r"mlp\.gate_proj", "feed_forward.w1"),
    (r"mlp\.up_proj", "feed_forward.w3"),
    (r"mlp\.down_proj", "feed_forward.w2"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
)
"""LlamaGen's names for the parts of a block (`Layout.rules`); its file keeps query, key and value as one
tensor (`FUSED`, for `Layout.fused`)."""

FUSED = r"attention\.wqkv\.weight"
SPECIAL = ("pad", "bos", "eos", "uncond", "boi", "eoi")
"""Roles of the ids behind the class labels: a vocabulary has them, these models never read them."""


@dataclass(frozen=True)
class RasterLMConfig:
    """Size and form of a `RasterLM`.

    codebook_sizes: codes of each column. side: of the square grid of codes; length: code positions where they
    are no such grid (None: side * side).
    condition: "class" (one label of num_classes, or the null class), "caption" (features of width
    caption_dim) or "tokens" (codes of the same codebook and a separator, whose id is class_offset).
    condition_length: positions of the condition; a caption may use fewer, the last of them.
    positions: "raster" (rotary rows and columns) or "learned" (one vector per position, nothing rotated).
    merge: how the embeddings of a position's k codes become one: "sum", or "concat" (side by side through a
    linear layer, with a bias if merge_bias).
    head: "single" (one code per position), "parallel" or "factorized" (k codes); head_layers: blocks of the
    factorized one. kv_heads: None is as many as heads; ffn_dim: None is 8/3 · dim rounded up to 256.
    dropout: on embeddings and both branches of every block. Raises ValueError when fields disagree.
    """

    codebook_sizes: tuple[int, ...]
    dim: int
    layers: int
    heads: int
    kv_heads: int | None = None
    ffn_dim: int | None = None
    side: int = 16
    length: int | None = None
    condition: Literal["class", "caption", "tokens"] = "class"
    num_classes: int = 1000
    condition_length: int = 1
    caption_dim: int = 2048
    positions: Literal["raster", "learned"] = "raster"
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    merge: Literal["sum", "concat"] = "sum"
    merge_bias: bool = False
    head: Literal["single", "parallel", "factorized"] = "single"
    head_layers: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "codebook_sizes", tuple(self.codebook_sizes))
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not divide into {self.heads} heads.")
        for name, known in (
            ("condition", ("class", "caption", "tokens")),
            ("positions", ("raster", "learned")),
            ("merge", ("sum", "concat")),
            ("head", ("single", "parallel", "factorized")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.positions == "raster" and self.length not in (None, self.side**2):
            raise ValueError(f"raster positions need side * side codes, got {self.length}; side {self.side}.")
        if self.positions == "raster" and self.head_width % 4:
            raise ValueError(f"raster positions need a head width divisible by 4, got {self.head_width}.")
        if (self.head == "single") != (len(self.codebook_sizes) == 1):
            raise ValueError(
                f"head single goes with one codebook and the others with more, got {self.head} and "
                f"{self.codebook_sizes}."
            )
        if self.head == "factorized" and self.positions != "raster":
            raise ValueError("a factorized head uses the raster's rotary table; set positions to raster.")
        if self.condition == "class" and self.condition_length != 1:
            raise ValueError(f"a class label is one position, got condition_length {self.condition_length}.")

    @property
    def form(self) -> tuple[str, ...]:
        """What a published file's layout depends on."""
        return self.condition, self.positions, self.merge, self.head

    @property
    def columns(self) -> int:
        """Codes per position."""
        return len(self.codebook_sizes)

    @property
    def code_offsets(self) -> tuple[int, ...]:
        """Id of code 0 of each column."""
        return tuple(sum(self.codebook_sizes[:column]) for column in range(self.columns))

    @property
    def class_offset(self) -> int:
        """Id of class 0, or of the separator of a condition in tokens."""
        return sum(self.codebook_sizes)

    @property
    def labels(self) -> int:
        """Class labels, the null class included."""
        return self.num_classes + 1 if self.condition == "class" else 1

    @property
    def pad_id(self) -> int:
        """Id of the first special token."""
        return self.class_offset + self.labels

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.pad_id + len(SPECIAL)

    @property
    def steps(self) -> int:
        """Code positions of one picture."""
        return self.side**2 if self.length is None else self.length

    @property
    def max_length(self) -> int:
        """Positions of a whole sequence."""
        return self.condition_length + self.steps

    @property
    def key_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    @property
    def hidden_width(self) -> int:
        """Feed-forward width, resolved."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        return FFN_MULTIPLE * math.ceil(8 * self.dim // 3 / FFN_MULTIPLE)

    @property
    def ffn_widths(self) -> tuple[float, ...]:
        """No nested submodels."""
        return (1.0,)

    @property
    def future_heads(self) -> int:
        """No heads for later tokens."""
        return 0

    def build(self) -> RasterLM:
        """A freshly initialised model."""
        return RasterLM(self)


class CaptionProjection(nn.Module):
    """LlamaGen's condition in words: features of a text encoder through two linear layers. `uncond`: features
    that stand in for a caption in guidance's unconditional row, by position; never trained, yet their values
    matter: they come from the file."""

    def __init__(self, width: int, dim: int, length: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        self.uncond: Tensor
        self.register_buffer("uncond", torch.randn(length, width) / width**0.5)

    def forward(self, features: Tensor) -> Tensor:
        """``[..., f] -> [..., d]``"""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class RasterDecoder(nn.Module):
    """Everything below the heads. `positions` ``[1, l, d]`` are there when they are learned."""

    def __init__(self, config: RasterLMConfig) -> None:
        super().__init__()
        extra = 1 if config.condition == "tokens" else 0  # the separator
        self.embed_tokens = nn.ModuleList(
            nn.Embedding(size + extra, config.dim) for size in config.codebook_sizes
        )
        self.condition: nn.Module | None = None
        if config.condition == "class":
            self.condition = nn.Embedding(config.labels, config.dim)
        elif config.condition == "caption":
            self.condition = CaptionProjection(config.caption_dim, config.dim, config.condition_length)
        self.positions = (
            nn.Parameter(torch.randn(1, config.max_length - 1, config.dim) * INIT_STD)
            if config.positions == "learned"
            else None
        )
        self.merge = (
            nn.Linear(config.columns * config.dim, config.dim, bias=config.merge_bias)
            if config.columns > 1 and config.merge == "concat"
            else None
        )
        self.layers = nn.ModuleList(raster_layer(config) for _ in range(config.layers))
        # A factorized head reads what the last block says; its own norm is the last one.
        self.norm = nn.Identity() if config.head == "factorized" else RMSNorm(config.dim, config.norm_eps)


class ColumnHead(CodeHead):
    """All columns of a position by a linear layer each on the same hidden state: ELM's parallel sub-codes.

    The model's `outputs` and its embedding `tables` are used, not owned: a tuple hides them from the list of
    this module's parts."""

    def __init__(self, config: RasterLMConfig, outputs: nn.ModuleList, tables: nn.ModuleList) -> None:
        super().__init__(config.codebook_sizes)
        self._shared = outputs, tables

    def slots(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """hidden ``[m, d]`` and codes ``[m, j]`` of columns 0..j-1 → ``[m, 1 + j, d]``, what the outputs of
        columns 0..j read."""
        return hidden.unsqueeze(1).expand(-1, 1 + codes.shape[1], -1)

    def first(self, hidden: Tensor) -> Tensor:
        """``[..., d] -> [..., d]``: what the output of column 0 reads."""
        nothing = hidden.new_empty(hidden.shape[:-1].numel(), 0, dtype=torch.long)
        return self.slots(hidden.reshape(-1, hidden.shape[-1]), nothing)[:, 0].reshape(hidden.shape)

    def forward(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        slots = self.slots(hidden, codes)
        return tuple(output(slots[:, j]) for j, output in enumerate(self._shared[0]) if j)

    def next_logits(self, hidden: Tensor, chosen: Tensor) -> Tensor:
        column = self._column(chosen)
        return self._shared[0][column](self.slots(hidden, chosen)[:, column])


class IntraHead(ColumnHead):
    """Blocks over the short causal sequence [hidden, emb_0(code_0), .., emb_{k-2}(code_{k-2})] of each
    position, with the model's own embeddings and rotary table: FQGAN's factorized head (arXiv 2411.16681) and
    Open-MAGVIT2's intra transformer (arXiv 2409.04410). Slot j, after the norm, tells column j; slot 0 stands
    where the class label does in the table and is not rotated but zeroed, slot 1 on the first cell."""

    def __init__(self, config: RasterLMConfig, outputs: nn.ModuleList, tables: nn.ModuleList) -> None:
        super().__init__(config, outputs, tables)
        self.layers = nn.ModuleList(raster_layer(config) for _ in range(config.head_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.rotary = RasterRotary(config.head_width, config.rope_theta, config.side, 1)

    def slots(self, hidden: Tensor, codes: Tensor) -> Tensor:
        embedded = [table(codes[:, j]) for j, table in zip(range(codes.shape[1]), self._shared[1])]
        x = torch.stack([hidden, *(e.to(hidden.dtype) for e in embedded)], dim=1)
        index = torch.arange(x.shape[1], device=x.device)[None, :, None]
        cos, sin = self.rotary(F.pad(index, (0, 2)))
        for layer in self.layers:
            x = layer(x, (cos.to(x.dtype), sin.to(x.dtype)), causal=True)
        return self.norm(x)


class RasterLM(CausalLM):
    """Next-code model of one picture. `outputs`: a linear layer per column. Hidden states are those after the
    final norm, with a factorized head those of the last block."""

    model_type: ClassVar[str] = "lexel_raster_lm"
    config_class: ClassVar[type] = RasterLMConfig
    config: RasterLMConfig
    model: RasterDecoder  # type: ignore[assignment]
    rotary: nn.Module  # type: ignore[assignment]
    head: ColumnHead | None

    def __init__(self, config: RasterLMConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.model = RasterDecoder(config)
        self.outputs = nn.ModuleList(
            nn.Linear(config.dim, size, bias=False) for size in config.codebook_sizes
        )
        self.rotary = (
            RasterRotary(config.head_width, config.rope_theta, config.side, config.condition_length)
            if config.positions == "raster"
            else Unrotated()
        )
        self.head = None
        if config.columns > 1:
            head = IntraHead if config.head == "factorized" else ColumnHead
            self.head = head(config, self.outputs, self.model.embed_tokens)
        self.future = None
        self._initialise()

    def _initialise(self) -> None:
        """LlamaGen's: N(0, 0.02), outputs zero."""
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=INIT_STD)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        for output in self.outputs:
            nn.init.zeros_(output.weight)  # type: ignore[arg-type]

    def project(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits ``[..., stop - start]`` of column 0 for the ids start .. stop - 1 (None: to the last one);
        -inf for ids that are not its codes."""
        stop = self.config.vocab_size if stop is None else stop
        codes = self.config.codebook_sizes[0]
        weight = self.outputs[0].weight
        hidden = hidden if self.head is None else self.head.first(hidden)
        logits = F.linear(hidden, weight[min(start, codes) : min(stop, codes)])  # type: ignore[index]
        return F.pad(logits, (0, stop - start - logits.shape[-1]), value=-torch.inf)

    def _embed(self, batch: TokenBatch) -> Tensor:
        """``[b, l, d]``: codes and class labels, then the continuous inputs in their places, then learned
        positions."""
        config = self.config
        ids = batch.ids if batch.ids.ndim == 3 else batch.ids[..., None]
        if ids.shape[2] != config.columns:
            raise ValueError(f"the model reads {config.columns} codes per position, got {ids.shape[2]}.")
        x = self._embed_codes(ids)
        if config.condition == "class":
            label = ids[..., 0] - config.class_offset
            inside = (label >= 0) & (label < config.labels)
            classes = self.model.condition(label.where(inside, 0))  # type: ignore[misc]
            x = torch.where(inside[..., None], classes, x)
        if batch.embeds is not None and batch.embed_index is not None:
            x = x.index_put(tuple(batch.embed_index.unbind(1)), batch.embeds.to(x.dtype))
        if self.model.positions is not None:
            # Padding may stand past the end; nothing reads it.
            index = batch.positions[..., 0].clamp(max=self.model.positions.shape[1] - 1)
            x = x + self.model.positions[0, index]
        return F.dropout(x, config.dropout, self.training) if config.dropout else x

    def _embed_codes(self, ids: Tensor) -> Tensor:
        """Ids long ``[b, l, k]`` → ``[b, l, d]``; meaningless where no codes stand."""
        columns = [
            table((ids[..., j] - offset).clamp(0, table.num_embeddings - 1))  # type: ignore[operator, arg-type]
            for j, (offset, table) in enumerate(zip(self.config.code_offsets, self.model.embed_tokens))
        ]
        if self.model.merge is not None:
            return self.model.merge(torch.cat(columns, dim=-1))
        return sum(columns[1:], columns[0])


def raster_layer(config: RasterLMConfig) -> DecoderLayer:
    """One block."""
    attention = SelfAttention(
        config.dim,
        config.heads,
        config.key_heads,
        config.head_width,
        turn=rotate_interleaved if config.positions == "raster" else rotate,
    )
    return DecoderLayer(attention, config.hidden_width, norm_eps=config.norm_eps, dropout=config.dropout)
