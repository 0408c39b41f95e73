"""Convolutional encoder and decoder of VQGAN-style tokenizers, as LlamaGen publishes them.

Blocks, order and parameter names are those of LlamaGen's VQ-16/VQ-8 (paper 2406.06525): a published
state dict fits without renaming. `decoder.conv_blocks.0` is the deepest level. What is added, off by
default, makes small pictures cheap: a `stem`, and leaving out attention or the middle blocks.

b batch · c channels · h w grid or picture
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class ConvSizes:
    """Sizes of an encoder and its mirrored decoder, by LlamaGen's meaning.

    channels times channel_mult[i] is the width of level i, each level half as fine as the one before;
    res_blocks: residual blocks per level (the decoder has one more); z_channels: width at the codes' side;
    attention: at the deepest level and in the middle; middle: the blocks between levels and codes at all;
    groups: of the normalisations; stem: factor of a pixel-unshuffle before the first convolution and of a
    pixel-shuffle after the last, so that none runs at full resolution.
    """

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    z_channels: int = 256
    attention: bool = True
    middle: bool = True
    groups: int = 32
    dropout: float = 0.0
    stem: int = 1

    @property
    def widths(self) -> list[int]:
        """Width of each level, finest first."""
        return [self.channels * m for m in self.channel_mult]


def group_norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    """GroupNorm with eps 1e-6 and at most `groups` groups, fewer when `channels` is no multiple of it."""
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=1e-6)


def swish(x: Tensor) -> Tensor:
    """x * sigmoid(x). On a CPU as that very product: it then rounds as the published code does, and the
    entropy term of a learned codebook magnifies the last digits of its latents a hundredfold."""
    return x * torch.sigmoid(x) if x.device.type == "cpu" else F.silu(x)


class ResnetBlock(nn.Module):
    """norm, swish, 3x3, norm, swish, dropout, 3x3, plus the input (through a 1x1 where widths differ).
    ``[b, c_in, h, w] -> [b, c_out, h, w]``."""

    def __init__(self, c_in: int, c_out: int, groups: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c_in, h, w] -> [b, c_out, h, w]``."""
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all h*w positions with 1x1 projections, plus the input."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c, h, w] -> [b, c, h, w]``."""
        normed = self.norm(x)
        q, k, v = (rearrange(f(normed), "b c h w -> b c (h w)") for f in (self.q, self.k, self.v))
        # Written out to round as the published code does, see `swish`.
        shares = F.softmax(torch.bmm(q.mT, k) * q.shape[1] ** -0.5, dim=2)
        mixed = torch.bmm(v, shares.mT)
        return x + self.proj_out(rearrange(mixed, "b c (h w) -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halve the grid: zero-pad right and bottom by one, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c, h, w] -> [b, c, h/2, w/2]``."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the grid: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c, h, w] -> [b, c, 2h, 2w]``."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution: `res`, `attn` (empty, or one after each `res`), and `downsample` or
    `upsample` where the resolution changes afterwards. `change` is that last module's class, if any."""

    residual = "res"  # what published files call the residual blocks

    def __init__(
        self,
        c_in: int,
        c_out: int,
        count: int,
        sizes: ConvSizes,
        attention: bool,
        change: type[Downsample] | type[Upsample] | None = None,
    ) -> None:
        super().__init__()
        widths = pairwise([c_in, *[c_out] * count])
        blocks = nn.ModuleList(ResnetBlock(a, b, sizes.groups, sizes.dropout) for a, b in widths)
        self.add_module(self.residual, blocks)
        self.attn = nn.ModuleList(AttnBlock(c_out, sizes.groups) for _ in range(count * attention))
        if change is not None:
            name = "downsample" if change is Downsample else "upsample"
            self.add_module(name, change(c_out if count else c_in))

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c_in, h, w] -> [b, c_out, h', w']``, h' = h/2, h or 2h."""
        for index, block in enumerate(self.get_submodule(self.residual).children()):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if name in self._modules:
                x = self.get_submodule(name)(x)
        return x


def middle(width: int, sizes: ConvSizes) -> nn.ModuleList:
    """`mid`: residual, attention, residual (the attention an identity when switched off), or nothing."""
    if not sizes.middle:
        return nn.ModuleList()
    attention = AttnBlock(width, sizes.groups) if sizes.attention else nn.Identity()
    before, after = (ResnetBlock(width, width, sizes.groups, sizes.dropout) for _ in range(2))
    return nn.ModuleList([before, attention, after])


class EncoderTrunk(nn.Module):
    """Everything of the encoder up to and including `mid`: ``[b, 3, h, w] -> [b, width, h/f, w/f]`` with
    f = stem * 2^(levels-1). Factorized tokenizers (FQGAN) branch here."""

    def __init__(self, sizes: ConvSizes) -> None:
        super().__init__()
        widths, last = [sizes.channels, *sizes.widths], len(sizes.widths) - 1
        self.stem = sizes.stem
        self.width = widths[-1]
        self.conv_in = nn.Conv2d(3 * sizes.stem**2, sizes.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                a, b, sizes.res_blocks, sizes, sizes.attention and i == last, Downsample if i < last else None
            )
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.mid = middle(self.width, sizes)

    def trunk(self, pixels: Tensor) -> Tensor:
        """``[b, 3, h, w] -> [b, width, h/f, w/f]``."""
        x = self.conv_in(F.pixel_unshuffle(pixels, self.stem))
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return x


class Encoder(EncoderTrunk):
    """LlamaGen's encoder: ``[b, 3, h, w] -> [b, z_channels, h/f, w/f]``."""

    def __init__(self, sizes: ConvSizes) -> None:
        super().__init__(sizes)
        self.norm_out = group_norm(self.width, sizes.groups)
        self.conv_out = nn.Conv2d(self.width, sizes.z_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[b, 3, h, w] -> [b, z_channels, h/f, w/f]``."""
        return self.conv_out(swish(self.norm_out(self.trunk(pixels))))


class PatchEncoder(nn.Module):
    """A cheap encoder that sees little: one strided convolution over `patch` + 2 * `overlap` pixels, then
    `blocks` residual blocks of 1x1 convolutions. ``[b, 3, h, w] -> [b, z_channels, h/patch, w/patch]``.

    A code then depends on its own patch and `overlap` pixels around it only (GroupNorm's picture-wide
    statistics are replaced by a per-position LayerNorm). Such codes repeat more, so a language model on
    them learns faster."""

    def __init__(self, patch: int, channels: int, blocks: int, z_channels: int, *, overlap: int = 0) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, patch + 2 * overlap, stride=patch, padding=overlap)
        self.blocks = nn.ModuleList(PointwiseBlock(channels) for _ in range(blocks))
        self.norm_out = nn.LayerNorm(channels)
        self.conv_out = nn.Linear(channels, z_channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[b, 3, h, w] -> [b, z_channels, h/patch, w/patch]``."""
        x = rearrange(self.conv_in(pixels), "b c h w -> b h w c")
        for block in self.blocks:
            x = block(x)
        return rearrange(self.conv_out(F.silu(self.norm_out(x))), "b h w c -> b c h w")


class PointwiseBlock(nn.Module):
    """LayerNorm, widen by two, swish, narrow, plus the input; on ``[..., channels]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 2 * channels)
        self.fc2 = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., c] -> [..., c]``."""
        return x + self.fc2(F.silu(self.fc1(self.norm(x))))


class Decoder(nn.Module):
    """LlamaGen's decoder: ``[b, z_channels, h, w] -> [b, 3, h*f, w*f]`` with f = stem * 2^(levels-1)."""

    def __init__(self, sizes: ConvSizes) -> None:
        super().__init__()
        deep_first = sizes.widths[::-1]
        last = len(deep_first) - 1
        self.stem = sizes.stem
        self.conv_in = nn.Conv2d(sizes.z_channels, deep_first[0], 3, padding=1)
        self.mid = middle(deep_first[0], sizes)
        self.conv_blocks = nn.ModuleList(
            Level(
                a, b, sizes.res_blocks + 1, sizes, sizes.attention and i == 0, Upsample if i < last else None
            )
            for i, (a, b) in enumerate(pairwise([deep_first[0], *deep_first]))
        )
        self.norm_out = group_norm(deep_first[-1], sizes.groups)
        self.conv_out = nn.Conv2d(deep_first[-1], 3 * sizes.stem**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """``[b, z_channels, h, w] -> [b, 3, h*f, w*f]``."""
        x = self.conv_in(latents)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return F.pixel_shuffle(self.conv_out(swish(self.norm_out(x))), self.stem)
