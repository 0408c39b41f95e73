"""EVA-CLIP's ViT-g (arXiv 2211.07636), the frozen picture encoder of BLIP-2, SEED and LaVIT, and its
pre-norm blocks. Parameters are named as in the published files (`eva_vit_g.pth`, `eva_vitg_psz14.bin`), so no
key map is needed: `patch_embed.proj`, `cls_token`, `pos_embed`, `blocks.N.{norm1,attn,norm2,mlp.{fc1,fc2}}`.

b batch · l tokens · n patches · d width · g heads · h w picture
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Of the pixels in [0, 1] that CLIP's vision models are shown, by red, green and blue.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class EvaConfig:
    """Defaults are ViT-g with its 40 blocks (BLIP-2 and SEED drop the last one).

    image_size: side of the square picture; patch: of a patch. mlp_ratio: the hidden width is
    int(width * mlp_ratio). projection: width of the final norm and head that the published file of all 40
    blocks ends with; nothing here reads them, they are kept so that such a file is written back whole
    (0: without both). Raises ValueError for sizes that do not divide.
    """

    image_size: int = 224
    patch: int = 14
    width: int = 1408
    layers: int = 40
    heads: int = 16
    mlp_ratio: float = 4.3637
    projection: int = 0

    def __post_init__(self) -> None:
        if self.image_size % self.patch or self.width % self.heads:
            raise ValueError(
                f"patch {self.patch} must divide image_size {self.image_size}, and {self.heads} heads the "
                f"width {self.width}."
            )

    @property
    def patches(self) -> int:
        """n: patches of a picture."""
        return (self.image_size // self.patch) ** 2


class Mlp(nn.Module):
    """``fc2(gelu(fc1 x))`` with the exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, l, d] -> [b, l, d]``."""
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Self-attention with one `qkv` projection. key_bias: its bias is one vector; without, queries and values
    have a bias each (`q_bias`, `v_bias`) and keys none (EVA)."""

    def __init__(self, width: int, heads: int, key_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
        self.q_bias = None if key_bias else nn.Parameter(torch.zeros(width))
        self.v_bias = None if key_bias else nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[b, g, l, d / g]`` of ``[b, l, d]``."""
        bias: Tensor | None = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        packed = F.linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(packed, "b l (three g e) -> three b g l e", three=3, g=self.heads)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """``[b, l, d] -> [b, l, d]``."""
        mixed = F.scaled_dot_product_attention(*self.project(x))
        return self.proj(rearrange(mixed, "b g l e -> b l (g e)"))


class Block(nn.Module):
    """``x += attn(norm1 x)``, ``x += mlp(norm2 x)`` on ``[b, l, d]``. hidden: of the MLP; key_bias: see
    `Attention`; eps: of the norms."""

    def __init__(self, width: int, heads: int, hidden: int, key_bias: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, key_bias)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, l, d] -> [b, l, d]``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Pixels ``[b, 3, h, w]`` to tokens ``[b, n, d]`` of square patches, row-major."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class EvaViT(nn.Module):
    """Pixels (normalised with CLIP's mean and deviation) to the residual stream after the last block: no
    final norm, the class token first."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        hidden = int(width * config.mlp_ratio)
        self.patch_embed = PatchEmbed(config.patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches + 1, width))
        self.blocks = nn.ModuleList(
            Block(width, config.heads, hidden, key_bias=False) for _ in range(config.layers)
        )
        if config.projection:
            self.norm = nn.LayerNorm(width, 1e-6)
            self.head = nn.Linear(width, config.projection)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, 3, h, w] -> [b, 1 + n, d]``. Raises ValueError for another picture size."""
        side = self.config.image_size
        if tuple(x.shape[2:]) != (side, side):
            raise ValueError(f"this ViT reads {side}x{side} pictures, got {x.shape[2]}x{x.shape[3]}.")
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x
