"""Pre-norm transformer blocks with CLIP's parameter names, shared by TiTok-like 1D tokenizers and FQGAN's
adapters: `ln_1`, `attn.{in_proj_weight, in_proj_bias, out_proj}`, `ln_2`, `mlp.{c_fc, c_proj}`.

b batch · l tokens · d width · g heads
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class MultiheadAttention(nn.Module):
    """Self-attention with `nn.MultiheadAttention`'s parameters and values, batch first, through the fused
    kernel. in_bias: whether queries, keys and values have biases. Raises ValueError when heads do not divide
    the width."""

    def __init__(self, width: int, heads: int, in_bias: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}.")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width)) if in_bias else None
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """``[b, l, d] -> [b, l, d]``. visible: bool ``[b, l]``, tokens that may be looked at (None: all)."""
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(packed, "b l (three g e) -> three b g l e", three=3, g=self.heads)
        mask = None if visible is None else visible[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(rearrange(mixed, "b g l e -> b l (g e)"))


class VisionBlock(nn.Module):
    """``x += attn(ln_1 x)``, ``x += c_proj(gelu(c_fc(ln_2 x)))`` on ``[b, l, d]``; exact GELU, eps 1e-5."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, in_bias: bool = True) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = MultiheadAttention(width, heads, in_bias)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, hidden), gelu=nn.GELU(), c_proj=nn.Linear(hidden, width))
        )

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """``[b, l, d] -> [b, l, d]``; `visible` as in `MultiheadAttention`."""
        x = x + self.attn(self.ln_1(x), visible)
        return x + self.mlp(self.ln_2(x))


class TokenAdapter(nn.Module):
    """FQGAN's FactorizedAdapter: learned positions, `ln_pre`, blocks, `ln_post` over the cells of a fixed
    grid. ``[b, d, h, w] -> [b, d, h, w]``; raises ValueError for another number of cells."""

    def __init__(self, width: int, cells: int, layers: int, heads: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(cells, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(VisionBlock(width, heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, grid: Tensor) -> Tensor:
        """See the class."""
        cells = self.positional_embedding.shape[0]
        if grid.shape[2] * grid.shape[3] != cells:
            raise ValueError(f"the adapter is made for {cells} cells, got {grid.shape[2]}x{grid.shape[3]}.")
        x = self.ln_pre(rearrange(grid, "b d h w -> b (h w) d") + self.positional_embedding)
        for block in self.transformer:
            x = block(x)
        return rearrange(self.ln_post(x), "b (h w) d -> b d h w", h=grid.shape[2])
