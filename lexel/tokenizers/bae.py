"""Binary autoencoder (BAE): a code is n independent bits, its vector the sum of the active bits' rows.

ELM (arXiv 2410.16257, Pepper-lll/LMforImageGeneration; its repository holds no licence file): the tokenizer
of its language models, which read a code of n bits as few sub-codes of n/k bits ("2-10" is two of ten). The
network is unleashing-transformers' VQGAN: flat lists of blocks, `encoder.blocks.K` and `generator.blocks.K`,
with a normalisation but no activation before the last convolution. Its pictures lie in [0, 1]; here, as
everywhere in Lexel, in [-1, 1].

b batch · n = h*w positions · k sub-codes · d latent width · h w grid
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from lexel.catalog import Layout, Published, System
from lexel.nn.conv import AttnBlock, Downsample, ResnetBlock, Upsample, group_norm
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.quantizers.bernoulli import Bernoulli
from lexel.tokenizers.vq import QuantizedRaster
from lexel.types import Codes, TokenizerOutput


@dataclass(frozen=True)
class BAETokenizerConfig:
    """image_size: trained picture side in pixels; a cell covers f = 2^(levels - 1) of them.
    channels times channel_mult[i]: width of level i, finest first. res_blocks, decoder_res_blocks: residual
    blocks per level. attention: levels whose side (of a trained-size picture) is one of these have attention
    after every residual block; the middle always has it. embed_dim: width of the latents that are quantized.
    norm_first: the generator starts with a normalisation. norm_groups: of all normalisations.
    Raises ValueError when image_size is no multiple of f.
    """

    image_size: int = 256
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    decoder_res_blocks: int = 2
    attention: tuple[int, ...] = (16,)
    embed_dim: int = 256
    norm_first: bool = True
    norm_groups: int = 32
    quantizer: QuantizerConfig = field(
        default_factory=lambda: QuantizerConfig("bernoulli", codebook_size=2**16, commitment=0.0)
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention", tuple(self.attention))
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of the downsampling {self.downsampling} "
                f"(2^{len(self.channel_mult) - 1})."
            )

    @property
    def downsampling(self) -> int:
        """Pixels per grid cell side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the codes of a trained-size picture."""
        return (self.image_size // self.downsampling,) * 2

    def attends(self, level: int) -> bool:
        """Whether the residual blocks of a level (0 the finest) are followed by attention."""
        return self.image_size // 2**level in self.attention

    def build(self) -> BAETokenizer:
        """The tokenizer with fresh weights."""
        return BAETokenizer(self)


class ResBlock(ResnetBlock):
    """The usual residual block; where the width does not change, the published files hold the 1x1 of the
    shortcut all the same. It is kept, and nothing uses or trains it."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__(c_in, c_out, groups)
        if c_in == c_out:
            self.conv_out = nn.Conv2d(c_in, c_out, 1).requires_grad_(False)


class Blocks(nn.Module):
    """A flat list of blocks, one after the other."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Encoder ``[b, 3, h*f, w*f] -> [b, d, h, w]``, generator the reverse."""
        for block in self.blocks:
            x = block(x)
        return x


class Generator(Blocks):
    """The decoder, with the head for a variance that published files hold and nothing uses or trains."""

    def __init__(self, blocks: list[nn.Module], width: int) -> None:
        super().__init__(blocks)
        self.logsigma = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 1)
        ).requires_grad_(False)


def build_encoder(config: BAETokenizerConfig) -> Blocks:
    """``[b, 3, h*f, w*f] -> [b, d, h, w]``."""
    width, groups = config.channels, config.norm_groups
    blocks: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    for level, mult in enumerate(config.channel_mult):
        blocks += [Downsample(width)] if level else []
        for _ in range(config.res_blocks):
            blocks += _residual(width, mult * config.channels, groups, config.attends(level))
            width = mult * config.channels
    blocks += _middle(width, groups)
    return Blocks([*blocks, group_norm(width, groups), nn.Conv2d(width, config.embed_dim, 3, padding=1)])


def build_generator(config: BAETokenizerConfig) -> Generator:
    """``[b, d, h, w] -> [b, 3, h*f, w*f]``."""
    width, groups = config.channels * config.channel_mult[-1], config.norm_groups
    blocks: list[nn.Module] = [group_norm(config.embed_dim, groups)] if config.norm_first else []
    blocks += [nn.Conv2d(config.embed_dim, width, 3, padding=1), *_middle(width, groups)]
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        for _ in range(config.decoder_res_blocks):
            blocks += _residual(width, mult * config.channels, groups, config.attends(level))
            width = mult * config.channels
        blocks += [Upsample(width)] if level else []
    return Generator([*blocks, group_norm(width, groups), nn.Conv2d(width, 3, 3, padding=1)], width)


def _residual(c_in: int, c_out: int, groups: int, attention: bool) -> list[nn.Module]:
    return [ResBlock(c_in, c_out, groups), *([AttnBlock(c_out, groups)] if attention else [])]


def _middle(width: int, groups: int) -> list[nn.Module]:
    return [*_residual(width, width, groups, True), *_residual(width, width, groups, False)]


class BAETokenizer(QuantizedRaster):
    """See the module docstring. ``encode: [b, 3, h*f, w*f] -> Codes [b, h*w, k]``, row-major.

    `encode` takes the likelier value of every bit; the published models but the "deter" one were trained, and
    their language models fed, with bits drawn at random: `draw`, and `forward` in training mode."""

    model_type: ClassVar[str] = "bae"
    config_class: ClassVar[type] = BAETokenizerConfig
    config: BAETokenizerConfig

    def __init__(self, config: BAETokenizerConfig) -> None:
        super().__init__(config)
        self.layout = CodeLayout(config.quantizer.codebook_sizes, grid=config.grid)
        self.encoder = build_encoder(config)
        self.quantize = config.quantizer.build(config.embed_dim)
        self.generator = build_generator(config)

    @property
    def last_layer(self) -> nn.Parameter:
        """See `Tokenizer.last_layer`."""
        return cast(nn.Parameter, self.generator.blocks[-1].weight)

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """See `Tokenizer.forward`; in training the bits are drawn from `generator`."""
        if isinstance(self.quantize, Bernoulli):
            self.quantize.generator = generator
        return super().forward(pixels, quantize=quantize)

    @torch.no_grad()
    def draw(self, pixels: Tensor, generator: torch.Generator | None = None) -> Codes:
        """As `encode`, with every bit drawn from its probability. Raises ValueError for a quantizer whose
        codes are not drawn."""
        if not isinstance(self.quantize, Bernoulli):
            raise ValueError(f"codes of a {self.config.quantizer.kind} quantizer are not drawn; use encode.")
        latents, grid = self._latents(pixels)
        bits = self.quantize.draw(latents.float(), generator)
        return Codes(self.quantize.factorizer.from_bits(bits), grid)

    def _latents(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        grid = self.encoder((pixels + 1) / 2)
        return rearrange(grid, "b d h w -> b (h w) d"), (grid.shape[2], grid.shape[3])

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        h, w = self._grid(codes)
        return self.generator(rearrange(latents, "b (h w) d -> b d h w", h=h, w=w)) * 2 - 1


# Published checkpoints: `ae.` beside a discriminator (`disc.`) and LPIPS (`perceptual.`).
LAYOUT = Layout(
    prefix="ae.",
    rules=((r"\.nin_shortcut\.", ".conv_out."), (r"^quantize\.proj\.", "quantize.proj.0.")),
    pointwise=r"^quantize\.proj\.weight$",
)
ARGUMENTS: dict[str, Any] = {
    "n_channels": 3,
    "nf": 128,
    "res_blocks": 2,
    "codebook_size": 16,  # the number of bits
    "emb_dim": 256,
    "ch_mult": (1, 1, 2, 2, 4),
    "img_size": 256,
    "attn_resolutions": (16,),
    "quantizer": "binary",
    "beta": 0.25,  # nothing of the binary quantizer reads it
    "deterministic": False,
    "use_tanh": False,
    "gen_mul": 1.0,
    "norm_first": True,  # the code's default is False; the published models have it
    "code_weight": 0.0,
    "token_each": 1,  # of the language model: sub-codes per position
}


def configure(arguments: Mapping[str, Any]) -> BAETokenizerConfig:
    """ELM's own arguments → our config."""
    bits, parts = arguments["codebook_size"], arguments["token_each"]
    if arguments["quantizer"] != "binary":
        raise ValueError(f"quantizer is always 'binary', got {arguments['quantizer']!r}")
    if arguments["n_channels"] != 3:
        raise ValueError(f"pictures have 3 channels, got n_channels={arguments['n_channels']}")
    if parts < 1 or bits % parts:
        raise ValueError(f"codes of {bits} bits do not split into token_each={parts} equal sub-codes")
    return BAETokenizerConfig(
        image_size=arguments["img_size"],
        channels=arguments["nf"],
        channel_mult=tuple(arguments["ch_mult"]),
        res_blocks=arguments["res_blocks"],
        decoder_res_blocks=int(arguments["res_blocks"] * arguments["gen_mul"]),
        attention=tuple(arguments["attn_resolutions"]),
        embed_dim=arguments["emb_dim"],
        norm_first=arguments["norm_first"],
        quantizer=QuantizerConfig(
            "bernoulli",
            codebook_size=2**bits,
            groups=(bits // parts,) * parts if parts > 1 else (),
            deterministic=arguments["deterministic"],
            tanh=arguments["use_tanh"],
            commitment=arguments["code_weight"],
        ),
    )


def _row(name: str, folder: str, parameters: int, codebook: str, **arguments: Any) -> Published:
    return Published(
        name=name,
        repository="xuantonglll/ELM",
        file=f"bae/{folder}/binaryae_ema.th",
        arguments=arguments,
        parameters=parameters,
        tokens="16x16",
        codebook=codebook,
        code_licence="none stated (no licence file)",
        weight_licence="not stated",
        source="arXiv 2410.16257, github.com/Pepper-lll/LMforImageGeneration",
    )


BAE = System(
    name="elm_bae",
    arguments=ARGUMENTS,
    configure=configure,
    layouts=(LAYOUT,),
    container="",
    rows=(
        _row("elm-bae-16", "bae_16", 65_526_550, "2^16 (16 bits) x 256"),
        _row("elm-bae-16-deter", "bae_16_deter", 65_526_550, "2^16 (16 bits) x 256", deterministic=True),
        _row("elm-bae-20", "bae_20", 65_528_602, "2^20 (2 x 10 bits) x 256", codebook_size=20, token_each=2),
        _row("elm-bae-24", "bae_24", 65_530_654, "2^24 (2 x 12 bits) x 256", codebook_size=24, token_each=2),
    ),
)
SYSTEMS = (BAE,)
