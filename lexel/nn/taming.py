"""Convolutional encoder and decoder of VQGAN-style tokenizers, as taming-transformers publishes them.

The blocks are LlamaGen's (`lexel.nn.conv`); what differs is the names, the order and where attention stands
(taming-transformers, paper 2012.09841; Chameleon, IBQ). Module names are the published ones:
`encoder.down.{i}.block.{j}`, `.attn.{j}`, `.downsample`, `mid.block_1`, `mid.attn_1`, `mid.block_2`,
`decoder.up.{i}` with `up.0` the *finest* level: a published state dict fits without renaming.

b batch · c channels · h w grid or picture
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from lexel.nn.conv import ConvSizes, Downsample, Level, Upsample, group_norm, middle, swish


@dataclass(frozen=True)
class TamingSizes:
    """Sizes of an encoder and its mirrored decoder, by taming's meaning.

    channels times channel_mult[i] is the width of level i (taming: `ch`, `ch_mult`), each level half as fine
    as the one before; res_blocks: residual blocks per level (`num_res_blocks`; the decoder has one more);
    z_channels: width at the codes' side; resolution: the picture side for which attn_resolutions is meant;
    attn_resolutions: the levels whose side is one of these have attention after every residual block (the
    middle always has it), whatever size a picture then is; groups: of the normalisations; dropout: in the
    residual blocks.
    """

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    z_channels: int = 256
    resolution: int = 256
    attn_resolutions: tuple[int, ...] = ()
    groups: int = 32
    dropout: float = 0.0

    @property
    def downsampling(self) -> int:
        """Pixels per grid cell side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Width of each level, finest first."""
        return [self.channels * m for m in self.channel_mult]

    @property
    def attends(self) -> list[bool]:
        """Whether each level has attention, finest first."""
        return [self.resolution // 2**i in self.attn_resolutions for i in range(len(self.channel_mult))]

    @property
    def blocks(self) -> ConvSizes:
        """What the shared blocks read."""
        return ConvSizes(groups=self.groups, dropout=self.dropout)


class TamingLevel(Level):
    """A `Level` whose residual blocks are called `block`."""

    residual = "block"


def _middle(width: int, sizes: TamingSizes) -> nn.Sequential:
    names = ("block_1", "attn_1", "block_2")
    return nn.Sequential(OrderedDict(zip(names, middle(width, sizes.blocks), strict=True)))


class Encoder(nn.Module):
    """``[b, 3, h, w] -> [b, z_channels, h/f, w/f]``, f = 2^(levels - 1)."""

    def __init__(self, sizes: TamingSizes) -> None:
        super().__init__()
        widths, last = [sizes.channels, *sizes.widths], len(sizes.widths) - 1
        self.conv_in = nn.Conv2d(3, sizes.channels, 3, padding=1)
        self.down = nn.ModuleList(
            TamingLevel(
                a, b, sizes.res_blocks, sizes.blocks, sizes.attends[i], Downsample if i < last else None
            )
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.mid = _middle(widths[-1], sizes)
        self.norm_out = group_norm(widths[-1], sizes.groups)
        self.conv_out = nn.Conv2d(widths[-1], sizes.z_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[b, 3, h, w] -> [b, z_channels, h/f, w/f]``."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(swish(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """``[b, z_channels, h, w] -> [b, 3, h*f, w*f]``, f = 2^(levels - 1)."""

    def __init__(self, sizes: TamingSizes) -> None:
        super().__init__()
        widths = [*sizes.widths, sizes.widths[-1]]  # of level i and of what comes into it
        self.conv_in = nn.Conv2d(sizes.z_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], sizes)
        self.up = nn.ModuleList(
            TamingLevel(b, a, sizes.res_blocks + 1, sizes.blocks, sizes.attends[i], Upsample if i else None)
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.norm_out = group_norm(widths[0], sizes.groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """``[b, z_channels, h, w] -> [b, 3, h*f, w*f]``."""
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(swish(self.norm_out(x)))
