"""The decoder block: attention, nested gated feed-forward, norms before the branches or around them.

b batch · l positions · d width · m feed-forward width
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lexel.nn.attention import Extend, SelfAttention
from lexel.nn.norm import RMSNorm

WIDTH_MULTIPLE = 8
INIT_STD = 0.02

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def nested_width(ffn_dim: int, width: float | None) -> int:
    """Hidden units of the nested feed-forward at the fraction `width` of `ffn_dim`: a multiple of 8, at
    least 8; None and 1.0 are all of them. Raises ValueError outside (0, 1]."""
    if width is None or width == 1.0:
        return ffn_dim
    if not 0 < width < 1:
        raise ValueError(f"width is a fraction of the feed-forward in (0, 1], got {width}.")
    units = WIDTH_MULTIPLE * max(1, round(width * ffn_dim / WIDTH_MULTIPLE))
    return min(units, ffn_dim)


class SwiGLU(nn.Module):
    """``down(silu(gate x) * up x)`` (Shazeer, arXiv:2002.05202) whose first hidden units form smaller
    networks: MatFormer (Devvrit et al., arXiv:2310.07707). activation: in the place of silu, one of
    `ACTIVATIONS` (with "gelu_tanh" it is Gemma's GeGLU); bias: of all three layers."""

    def __init__(self, dim: int, hidden: int, activation: Activation = "silu", bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor, width: float | None = None) -> Tensor:
        """``[..., d] -> [..., d]`` with the first hidden units; width as in `nested_width`."""
        activate = ACTIVATIONS[self.activation]
        units = nested_width(self.gate_proj.out_features, width)
        if units == self.gate_proj.out_features:
            return self.down_proj(activate(self.gate_proj(x)) * self.up_proj(x))
        # Slices are views: the first rows of gate and up, the first columns of down.
        gate, up = (
            F.linear(x, part.weight[:units], None if part.bias is None else part.bias[:units])
            for part in (self.gate_proj, self.up_proj)
        )
        return F.linear(activate(gate) * up, self.down_proj.weight[:, :units], self.down_proj.bias)


class DecoderLayer(nn.Module):
    """One pre-norm block; parameters are named as in transformers' `LlamaDecoderLayer`. activation, ffn_bias:
    of `SwiGLU`; norm_offset: of `RMSNorm`."""

    def __init__(
        self,
        attention: SelfAttention,
        ffn_dim: int,
        *,
        norm_eps: float,
        dropout: float,
        activation: Activation = "silu",
        ffn_bias: bool = False,
        norm_offset: float = 0.0,
    ) -> None:
        super().__init__()
        dim = attention.o_proj.out_features
        self.self_attn = attention
        self.mlp = SwiGLU(dim, ffn_dim, activation, ffn_bias)
        self.input_layernorm = RMSNorm(dim, norm_eps, norm_offset)
        self.post_attention_layernorm = RMSNorm(dim, norm_eps, norm_offset)
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        extend: Extend | None = None,
        width: float | None = None,
    ) -> Tensor:
        """``[b, l, d] -> [b, l, d]``; arguments as in `SelfAttention` and `SwiGLU`."""
        y = self.self_attn(self.input_layernorm(x), rotation, mask, causal=causal, extend=extend)
        return self._join(x, y, width)

    def _join(self, x: Tensor, y: Tensor, width: float | None) -> Tensor:
        """The block's output from its input x and what its attention y found, both ``[b, l, d]``."""
        x = x + self._drop(y)
        return x + self._drop(self.mlp(self.post_attention_layernorm(x), width))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class SandwichLayer(DecoderLayer):
    """A block whose branches are normalised before and after, named as in transformers'
    `Gemma2DecoderLayer`: `post_attention_layernorm` stands behind the attention here."""

    def __init__(
        self, attention: SelfAttention, ffn_dim: int, *, norm_eps: float, norm_offset: float, **options: Any
    ) -> None:
        super().__init__(attention, ffn_dim, norm_eps=norm_eps, norm_offset=norm_offset, **options)
        dim = attention.o_proj.out_features
        self.pre_feedforward_layernorm = RMSNorm(dim, norm_eps, norm_offset)
        self.post_feedforward_layernorm = RMSNorm(dim, norm_eps, norm_offset)

    def _join(self, x: Tensor, y: Tensor, width: float | None) -> Tensor:
        x = x + self._drop(self.post_attention_layernorm(y))
        y = self.mlp(self.pre_feedforward_layernorm(x), width)
        return x + self._drop(self.post_feedforward_layernorm(y))


def init_decoder(module: nn.Module, layers: int) -> None:
    """N(0, 0.02) for every linear and embedding, projections back onto the residual stream divided by
    sqrt(2 · layers) so that its variance does not grow with depth (GPT-2); biases of attention and
    feed-forward are zero."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            deep = name.endswith(("o_proj", "down_proj"))
            nn.init.normal_(part.weight, std=INIT_STD / math.sqrt(2 * layers) if deep else INIT_STD)
        if isinstance(part, nn.Linear) and part.bias is not None and name.endswith("_proj"):
            nn.init.zeros_(part.bias)
