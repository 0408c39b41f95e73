"""MaskGIT-VQGAN: the raster tokenizer whose codes TiTok's first stage learns to predict and whose decoder
paints TiTok's and One-D-Piece's pictures (MaskGIT, arXiv 2202.04200; weights of bytedance/1d-tokenizer,
Apache-2.0).

A convolutional VQGAN without attention. Two things differ from taming's: several convolutions have no bias,
and where a residual block changes the width there is no skip from its input (see `ResidualBlock`). Module
names are the published ones; `decoder.up.0` is the finest level.

b batch · d latent width · h w grid or picture
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.catalog import Published, System
from lexel.nn.conv import group_norm
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.vq import QuantizedRaster
from lexel.types import Codes


@dataclass(frozen=True)
class MaskGITConfig:
    """Sizes of the network; the defaults are the published ones.

    image_size: trained picture side in pixels. channels times channel_mult[i] is the width of level i, each
    level half as fine as the one before; res_blocks: residual blocks per level and in the middle; z_channels:
    width of latents and codes; dropout: in the residual blocks.
    Raises ValueError when image_size is no multiple of the downsampling 2^(levels - 1).
    """

    image_size: int = 256
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    z_channels: int = 256
    dropout: float = 0.0
    quantizer: QuantizerConfig = field(
        default_factory=lambda: QuantizerConfig("learned", codebook_size=1024, cosine=False, entropy=0.0)
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of the downsampling {self.downsampling}."
            )

    @property
    def downsampling(self) -> int:
        """Pixels per grid cell side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the codes of a trained-size picture."""
        return (self.image_size // self.downsampling,) * 2

    @property
    def widths(self) -> list[int]:
        """Width of each level, finest first."""
        return [self.channels * m for m in self.channel_mult]

    def build(self) -> MaskGITVQGAN:
        """The tokenizer with fresh weights."""
        return MaskGITVQGAN(self)


class ResidualBlock(nn.Module):
    """norm, swish, 3x3, norm, swish, dropout, 3x3, plus the input. ``[b, c_in, h, w] -> [b, c_out, h, w]``.

    Where the widths differ, the published `nin_shortcut` is a 1x1 convolution of the block's *own output*:
    the input is not added at all. The weights were trained like that, so it stays.
    """

    def __init__(self, c_in: int, c_out: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(c_out, c_out, 1, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c_in, h, w] -> [b, c_out, h, w]``."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class Level(nn.Module):
    """The residual blocks of one resolution, then, with `upsample`, nearest doubling and a convolution."""

    def __init__(self, c_in: int, c_out: int, config: MaskGITConfig, upsample: bool = False) -> None:
        super().__init__()
        widths = [c_in] + [c_out] * config.res_blocks
        self.block = nn.Sequential(*(ResidualBlock(a, b, config.dropout) for a, b in pairwise(widths)))
        self.upsample_conv = nn.Conv2d(c_out, c_out, 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c_in, h, w] -> [b, c_out, h, w]``, or twice the sides."""
        x = self.block(x)
        if self.upsample_conv is None:
            return x
        return self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PixelEncoder(nn.Module):
    """``[b, 3, h*f, w*f]`` in [0, 1] to latents ``[b, d, h, w]``."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            Level(a, b, config) for a, b in zip([config.channels, *widths[:-1]], widths, strict=True)
        )
        self.mid = nn.Sequential(
            *(ResidualBlock(widths[-1], widths[-1], config.dropout) for _ in range(config.res_blocks))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        x = self.conv_in(pixels)
        for index, level in enumerate(self.down):
            x = level(x if index == 0 else F.avg_pool2d(x, 2))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class PixelDecoder(nn.Module):
    """Code vectors ``[b, d, h, w]`` to ``[b, 3, h*f, w*f]`` in about [0, 1]."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = nn.Sequential(
            *(ResidualBlock(widths[-1], widths[-1], config.dropout) for _ in range(config.res_blocks))
        )
        self.up = nn.ModuleList(
            Level(a, b, config, upsample=index > 0)
            for index, (a, b) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, states: Tensor) -> Tensor:
        """See the class."""
        x = self.mid(self.conv_in(states))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class MaskGITVQGAN(QuantizedRaster):
    """See the module docstring. ``encode: [b, 3, h*f, w*f] -> Codes [b, h*w, 1]``, row-major."""

    model_type: ClassVar[str] = "maskgit_vqgan"
    config_class: ClassVar[type] = MaskGITConfig
    config: MaskGITConfig

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__(config)
        self.layout = CodeLayout(config.quantizer.codebook_sizes, grid=config.grid)
        self.encoder = PixelEncoder(config)
        self.quantize = config.quantizer.build(config.z_channels)
        self.decoder = PixelDecoder(config)

    # The published network works in [0, 1], and has no convolutions around the quantizer.

    def _latents(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        grid = self.encoder((pixels + 1) / 2)
        return rearrange(grid, "b d h w -> b (h w) d"), (grid.shape[2], grid.shape[3])

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        h, w = self._grid(codes)
        return self.decoder(rearrange(latents, "b (h w) d -> b d h w", h=h, w=w)) * 2 - 1


# Published checkpoints.
ARGUMENTS: dict[str, Any] = {
    "channel_mult": (1, 1, 2, 2, 4),
    "num_resolutions": 5,
    "dropout": 0.0,
    "hidden_channels": 128,
    "num_channels": 3,
    "num_res_blocks": 2,
    "resolution": 256,
    "z_channels": 256,
    "num_embeddings": 1024,
    "embedding_dim": 256,
    "commitment_cost": 0.25,
}


def configure(arguments: Mapping[str, Any]) -> MaskGITConfig:
    """1d-tokenizer's own arguments → our config. Raises ValueError where they contradict each other."""
    levels, width = len(arguments["channel_mult"]), arguments["z_channels"]
    if arguments["num_resolutions"] != levels:
        raise ValueError(f"num_resolutions {arguments['num_resolutions']} with {levels} of channel_mult.")
    if arguments["embedding_dim"] != width:
        raise ValueError(f"embedding_dim {arguments['embedding_dim']} is not z_channels {width}.")
    if arguments["num_channels"] != 3:
        raise ValueError(f"num_channels must be 3, got {arguments['num_channels']}.")
    return MaskGITConfig(
        image_size=arguments["resolution"],
        channels=arguments["hidden_channels"],
        channel_mult=tuple(arguments["channel_mult"]),
        res_blocks=arguments["num_res_blocks"],
        z_channels=width,
        dropout=arguments["dropout"],
        quantizer=QuantizerConfig(
            "learned",
            codebook_size=arguments["num_embeddings"],
            cosine=False,
            commitment=arguments["commitment_cost"],
            entropy=0.0,
        ),
    )


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that may stand in groups (`pixel_vqgan`, `proxy_codebook`) as one flat mapping."""
    groups = ("pixel_vqgan", "proxy_codebook")
    return {k: v for k, v in config.items() if k not in groups} | {
        k: v for group in groups for k, v in config.get(group, {}).items()
    }


MASKGIT = System(
    name="maskgit_vqgan",
    arguments=ARGUMENTS,
    configure=configure,
    flatten=flatten,
    container="",
    rows=(
        Published(
            name="maskgit-vqgan-f16",
            repository="fun-research/TiTok",
            file="maskgit-vqgan-imagenet-f16-256.bin",
            arguments={},
            parameters=54_515_587,
            tokens="16x16",
            codebook="1024 x 256",
            code_licence="Apache-2.0",
            weight_licence="not stated",
            source="arXiv 2202.04200, github.com/bytedance/1d-tokenizer",
        ),
    ),
)
SYSTEMS = (MASKGIT,)
