"""Raster VQ tokenizer: convolutional encoder, one code (or `depth` residual codes) per grid cell.

LlamaGen's VQ-16 / VQ-8 (paper 2406.06525, FoundationVision/LlamaGen, MIT): defaults are its configuration
and module names its published ones. Small pictures get by with far less: see `encoder`, `stem`.

b batch · n = h*w positions · k codebooks per position · d latent width · h w grid
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from lexel.catalog import Layout, Published, System
from lexel.nn.conv import ConvSizes, Decoder, Encoder, PatchEncoder
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import Quantizer, QuantizerConfig
from lexel.types import Codes, TokenizerOutput


@dataclass(frozen=True)
class RasterConfig:
    """Sizes shared by the convolutional tokenizers.

    image_size: trained picture side in pixels. A cell covers f = stem * 2^(levels - 1) pixels.
    channels, channel_mult, res_blocks, z_channels, attention, middle, norm_groups, dropout, stem: see
    `ConvSizes`. embed_dim: width of the latents that are quantized. decoder_mult: the decoder's channel_mult
    where it is another one.
    Raises ValueError when image_size is no multiple of f, or encoder and decoder differ in levels.
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
    decoder_mult: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "decoder_mult", tuple(self.decoder_mult))
        if self.decoder_mult and len(self.decoder_mult) != len(self.channel_mult):
            raise ValueError(
                f"channel_mult {self.channel_mult} and decoder_mult {self.decoder_mult} differ in length."
            )
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
    def decoder_sizes(self) -> ConvSizes:
        """Sizes of the convolutional decoder."""
        return replace(self.sizes, channel_mult=self.decoder_mult or self.channel_mult)

    @property
    def sizes(self) -> ConvSizes:
        """Sizes of the convolutional encoder."""
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


class GridConfig(Protocol):
    """What `RasterTokenizer` reads of a config, see `RasterConfig`."""

    @property
    def image_size(self) -> int: ...
    @property
    def downsampling(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int]: ...


class RasterTokenizer(Tokenizer):
    """Codes on a grid. Any picture whose sides are multiples of the downsampling can be coded."""

    config: GridConfig

    def __init__(self, config: GridConfig) -> None:
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


class QuantizedRaster(RasterTokenizer):
    """A raster tokenizer of five parts: `encoder`, `quant_conv`, `quantize`, `post_quant_conv`, `decoder`
    (VQGAN's). ``encode: [b, 3, h*f, w*f] -> Codes [b, h*w, k]``, row-major."""

    encoder: nn.Module
    quant_conv: nn.Conv2d
    quantize: Quantizer

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


class VQTokenizer(QuantizedRaster):
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
        self.decoder = Decoder(config.decoder_sizes)


# Published checkpoints. Their quantizer keeps a usage window of 65,536 codes that inference never reads.
USAGE_WINDOW = 65536
LLAMAGEN_LAYOUT = Layout(
    ignored={r"(.*\.)?freqs_cis": "a table the reference recomputes"},
    zeros={"quantize.codebook_used": (USAGE_WINDOW,)},
)
# transformers' JanusVQVAE: the same tensors under other names (its encoder omits the normalisation).
JANUS_TRANSFORMERS = Layout(
    name="transformers",
    prefix="model.vqmodel.",
    rules=(
        (r"^encoder\.conv_blocks\.(\d+)\.res\.", r"encoder.down.\1.block."),
        (r"^encoder\.conv_blocks\.", "encoder.down."),
        (r"^decoder\.conv_blocks\.(\d+)\.res\.", r"decoder.up.\1.block."),
        (r"^decoder\.conv_blocks\.", "decoder.up."),
        (r"\.mid\.0\.", ".mid.block_1."),
        (r"\.mid\.1\.", ".mid.attn_1."),
        (r"\.mid\.2\.", ".mid.block_2."),
    ),
)
LLAMAGEN_ARGUMENTS: dict[str, Any] = {
    "ch": 128,
    "num_res_blocks": 2,
    "encoder_ch_mult": (1, 1, 2, 2, 4),
    "decoder_ch_mult": (1, 1, 2, 2, 4),
    "z_channels": 256,
    "codebook_size": 16384,
    "codebook_embed_dim": 8,
    "codebook_l2_norm": True,
    "commit_loss_beta": 0.25,
    "entropy_loss_ratio": 0.0,
    "dropout_p": 0.0,
    "norm_groups": 32,
}


def raster_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """LlamaGen's arguments as `RasterConfig` options (FQGAN's are the same)."""
    return {
        "channels": arguments["ch"],
        "channel_mult": tuple(arguments["encoder_ch_mult"]),
        "decoder_mult": tuple(arguments["decoder_ch_mult"]),
        "res_blocks": arguments["num_res_blocks"],
        "z_channels": arguments["z_channels"],
        "embed_dim": arguments["codebook_embed_dim"],
        "norm_groups": arguments["norm_groups"],
        "dropout": arguments["dropout_p"],
        "quantizer": QuantizerConfig(
            "learned",
            codebook_size=arguments["codebook_size"],
            cosine=arguments["codebook_l2_norm"],
            commitment=arguments["commit_loss_beta"],
            entropy=arguments["entropy_loss_ratio"],
        ),
    }


def configure(arguments: Mapping[str, Any]) -> VQTokenizerConfig:
    """LlamaGen's own arguments → our config. Its network takes pictures of any size; ours is told 256."""
    return VQTokenizerConfig(**raster_options(arguments))


def _row(
    name: str, file: str, parameters: int, tokens: str, rfid: str, psnr: str = "", **arguments: Any
) -> Published:
    return Published(
        name=name,
        repository="peizesun/llamagen_t2i" if "t2i" in name else "FoundationVision/LlamaGen",
        file=file,
        arguments=arguments,
        parameters=parameters,
        tokens=tokens,
        codebook="16384 x 8",
        code_licence="MIT",
        weight_licence="not stated",
        source="arXiv 2406.06525, github.com/FoundationVision/LlamaGen",
        rfid=rfid,
        psnr=psnr,
    )


LLAMAGEN = System(
    name="llamagen_vq",
    arguments=LLAMAGEN_ARGUMENTS,
    configure=configure,
    layouts=(LLAMAGEN_LAYOUT,),
    rows=(
        _row("llamagen-vq-16", "vq_ds16_c2i.pt", 71_883_403, "16x16", "2.19"),
        _row(
            "llamagen-vq-16-t2i", "vq_ds16_t2i.pt", 71_883_403, "16x16", "",
            psnr="20.65 on ImageNet (measured by SEED-Voken)",
        ),
        _row(
            "llamagen-vq-8", "vq_ds8_c2i.pt", 70_109_835, "32x32", "0.59",
            encoder_ch_mult=(1, 2, 2, 4), decoder_ch_mult=(1, 2, 2, 4),
        ),
    ),
)  # fmt: skip
JANUS = System(
    name="janus_vq",
    arguments=LLAMAGEN_ARGUMENTS,
    configure=configure,
    layouts=(replace(LLAMAGEN_LAYOUT, prefix="gen_vision_model."), JANUS_TRANSFORMERS),
    container="",
    rows=(
        Published(
            name="janus-vq-16",
            repository="deepseek-ai/Janus-Pro-7B",
            file="",
            arguments={},
            parameters=71_883_403,
            tokens="24x24",
            codebook="16384 x 8",
            code_licence="MIT",
            weight_licence="DeepSeek Model License",
            source="arXiv 2501.17811, github.com/deepseek-ai/Janus",
            size=384,
        ),
    ),
)
SYSTEMS = (LLAMAGEN, JANUS)
