"""Raster VQ tokenizer: convolutional encoder, one code (or `depth` residual codes) per grid cell.

LlamaGen's VQ-16 / VQ-8 (paper 2406.06525, FoundationVision/LlamaGen, MIT): defaults are its configuration
and module names its published ones. Small pictures get by with far less: see `encoder`, `stem`.

b batch · n = h*w positions · k codebooks per position · d latent width · h w grid
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from lexel.nn.conv import ConvSizes, Decoder, Encoder, PatchEncoder
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.types import Codes, TokenizerOutput


@dataclass(frozen=True)
class RasterConfig:
    """Sizes shared by the convolutional tokenizers.

    image_size: trained picture side in pixels. A cell covers f = stem * 2^(levels - 1) pixels.
    channels, channel_mult, res_blocks, z_channels, attention, middle, norm_groups, dropout, stem: see
    `ConvSizes`. embed_dim: width of the latents that are quantized.
    Raises ValueError when image_size is no multiple of f.
    """

    image_size: int = 256
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    z_channels: int = 256
    embed_dim: int = 8
    attention: bool = True
    middle: bool = True
    norm_groups: int = 32
    dropout: float = 0.0
    stem: int = 1
    quantizer: QuantizerConfig = field(default_factory=lambda: QuantizerConfig(codebook_size=16384))

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of the downsampling {self.downsampling} "
                f"(stem {self.stem} times 2^{len(self.channel_mult) - 1})."
            )

    @property
    def downsampling(self) -> int:
        """Pixels per grid cell side."""
        return self.stem * 2 ** (len(self.channel_mult) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the codes of a trained-size picture."""
        return (self.image_size // self.downsampling,) * 2

    @property
    def sizes(self) -> ConvSizes:
        """Sizes of the convolutional encoder and decoder."""
        return ConvSizes(
            self.channels,
            self.channel_mult,
            self.res_blocks,
            self.z_channels,
            self.attention,
            self.middle,
            self.norm_groups,
            self.dropout,
            self.stem,
        )


@dataclass(frozen=True)
class VQTokenizerConfig(RasterConfig):
    """RasterConfig plus the encoder's kind.

    encoder: `conv` (LlamaGen's) or `patch`: a small receptive field of one cell and `overlap` pixels around
    it, made of `encoder_blocks` 1x1 blocks of width `encoder_channels`; cheap, and a language model learns
    its codes about twice as fast.
    """

    encoder: str = "conv"
    encoder_channels: int = 128
    encoder_blocks: int = 2
    overlap: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ("conv", "patch"):
            raise ValueError(f"encoder must be conv or patch, got {self.encoder!r}.")

    def build(self) -> VQTokenizer:
        """The tokenizer with fresh weights."""
        return VQTokenizer(self)


class RasterTokenizer(Tokenizer):
    """Codes on a grid. Any picture whose sides are multiples of the downsampling can be coded."""

    config: RasterConfig

    def __init__(self, config: RasterConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = (config.image_size, config.image_size)

    @property
    def last_layer(self) -> nn.Parameter:
        """See `Tokenizer.last_layer`."""
        return self.decoder.conv_out.weight  # type: ignore[union-attr,return-value]

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        h, w = self._grid(codes)
        return self.decoder(self.post_quant_conv(rearrange(latents, "b (h w) d -> b d h w", h=h, w=w)))  # type: ignore[operator]

    def _grid(self, codes: Codes) -> tuple[int, int]:
        grid = codes.grid or self.config.grid
        if grid[0] * grid[1] != codes.indices.shape[1]:
            raise ValueError(
                f"{codes.indices.shape[1]} codes do not fill a {grid[0]}x{grid[1]} grid; set Codes.grid."
            )
        return grid

    def _check_size(self, pixels: Tensor) -> None:
        f = self.config.downsampling
        if pixels.shape[2] % f or pixels.shape[3] % f:
            raise ValueError(f"picture sides must be multiples of {f}, got {tuple(pixels.shape[2:])}.")


class VQTokenizer(RasterTokenizer):
    """See the module docstring. ``encode: [b, 3, h*f, w*f] -> Codes [b, h*w, k]``, row-major."""

    model_type: ClassVar[str] = "vq"
    config_class: ClassVar[type] = VQTokenizerConfig
    config: VQTokenizerConfig

    def __init__(self, config: VQTokenizerConfig) -> None:
        super().__init__(config)
        self.layout = CodeLayout(config.quantizer.codebook_sizes, grid=config.grid)
        self.encoder: Encoder | PatchEncoder
        if config.encoder == "patch":
            self.encoder = PatchEncoder(
                config.downsampling,
                config.encoder_channels,
                config.encoder_blocks,
                config.z_channels,
                overlap=config.overlap,
            )
        else:
            self.encoder = Encoder(config.sizes)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.quantize = config.quantizer.build(config.embed_dim)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config.sizes)

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """See `Tokenizer.forward`; nothing is drawn from `generator`."""
        latents, grid = self._latents(pixels)
        output = self.quantize(latents, quantize)
        codes = Codes(output.indices, grid)
        return TokenizerOutput(self._decode(output.quantized, codes), codes, output, latents)

    def embed(self, codes: Codes) -> Tensor:
        """See `Tokenizer.embed`."""
        return self.quantize.decode(codes.indices)

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        latents, grid = self._latents(pixels)
        return Codes(self.quantize.encode(latents.float()), grid)

    def _latents(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        grid = self.quant_conv(self.encoder(pixels))
        return rearrange(grid, "b d h w -> b (h w) d"), (grid.shape[2], grid.shape[3])
