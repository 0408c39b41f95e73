"""Chameleon's VQGAN: the picture tokenizer of Chameleon, Liquid, Lumina-mGPT and Anole.

taming-transformers' network (paper 2012.09841; Chameleon: 2405.09818) with a plain Euclidean codebook that
gradients train. At the published sizes attention stands in the middle only. Two kinds of file: the published
``vqgan.ckpt``, and transformers' `ChameleonVQVAE` (inside facebook/chameleon-7b as ``model.vqmodel.``),
which has no decoder: such a tokenizer encodes, and `decode` raises one sentence.

Licences: the pages this was written from state none for code or weights; see Meta's before use.

b batch · n = h*w positions · d latent width
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from lexel.catalog import Layout, Published, System
from lexel.errors import LexelError
from lexel.nn.taming import Decoder, Encoder, TamingSizes
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.vq import QuantizedRaster
from lexel.types import Codes


@dataclass(frozen=True)
class ChameleonConfig:
    """Sizes of the network; the defaults are the published ones.

    image_size: trained picture side in pixels. channels, channel_mult, res_blocks, z_channels,
    attn_resolutions, dropout: see `TamingSizes` (image_size is its `resolution`). embed_dim: width of the
    latents that are quantized. decoder: False for the encoder alone, which is all that transformers' files
    hold.
    Raises ValueError when image_size is no multiple of the downsampling 2^(levels - 1).
    """

    image_size: int = 512
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    z_channels: int = 256
    embed_dim: int = 256
    attn_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    quantizer: QuantizerConfig = field(
        default_factory=lambda: QuantizerConfig("learned", codebook_size=8192, cosine=False, entropy=0.0)
    )
    decoder: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attn_resolutions", tuple(self.attn_resolutions))
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of the downsampling {self.downsampling}."
            )

    @property
    def sizes(self) -> TamingSizes:
        """Sizes of encoder and decoder."""
        return TamingSizes(
            self.channels,
            self.channel_mult,
            self.res_blocks,
            self.z_channels,
            self.image_size,
            self.attn_resolutions,
            dropout=self.dropout,
        )

    @property
    def downsampling(self) -> int:
        """Pixels per grid cell side."""
        return self.sizes.downsampling

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the codes of a trained-size picture."""
        return (self.image_size // self.downsampling,) * 2

    def build(self) -> ChameleonTokenizer:
        """The tokenizer with fresh weights."""
        return ChameleonTokenizer(self)


class ChameleonTokenizer(QuantizedRaster):
    """See the module docstring. ``encode: [b, 3, h*f, w*f] -> Codes [b, h*w, 1]``, row-major."""

    model_type: ClassVar[str] = "chameleon"
    config_class: ClassVar[type] = ChameleonConfig
    config: ChameleonConfig

    def __init__(self, config: ChameleonConfig) -> None:
        super().__init__(config)
        self.layout = CodeLayout(config.quantizer.codebook_sizes, grid=config.grid)
        self.encoder = Encoder(config.sizes)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.quantize = config.quantizer.build(config.embed_dim)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config.sizes) if config.decoder else None

    @property
    def has_decoder(self) -> bool:
        """See `Tokenizer.has_decoder`."""
        return self.decoder is not None

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        if self.decoder is None:
            raise LexelError(
                "this tokenizer has no decoder: its file, in transformers' layout, holds the encoder alone. "
                "To draw pictures load the published vqgan.ckpt."
            )
        return super()._decode(latents, codes)


# Published checkpoint
PUBLISHED = Layout(
    ignored={
        r"(loss|discriminator|perceptual_loss|lpips)\..*": "networks that only its training used",
        r"model_ema\..*": "an average of the weights that the reference does not read",
        r"colorize": "a table for drawing label maps",
    }
)
# transformers' ChameleonVQVAE: the same names, but every key with "decoder" in it was dropped.
TRANSFORMERS = Layout(name="transformers", prefix="model.vqmodel.", lacks=r"^decoder\.")
DDCONFIG: dict[str, Any] = {
    "double_z": False,
    "z_channels": 256,
    "resolution": 512,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": (1, 1, 2, 2, 4),
    "num_res_blocks": 2,
    "attn_resolutions": (),
    "attn_type": "vanilla",
    "dropout": 0.0,
}


def configure(arguments: Mapping[str, Any]) -> ChameleonConfig:
    """The reference's VQModel arguments → our config; `ddconfig` may name some of its entries only."""
    if unknown := sorted(set(arguments["ddconfig"]) - set(DDCONFIG)):
        raise ValueError(f"ddconfig has no {', '.join(unknown)}; it has: {', '.join(sorted(DDCONFIG))}.")
    sizes = DDCONFIG | dict(arguments["ddconfig"])
    for name in ("double_z", "in_channels", "out_ch", "attn_type"):
        if sizes[name] != DDCONFIG[name]:
            raise ValueError(f"{name} can only be {DDCONFIG[name]}, got {sizes[name]}.")
    return ChameleonConfig(
        image_size=sizes["resolution"],
        channels=sizes["ch"],
        channel_mult=sizes["ch_mult"],
        res_blocks=sizes["num_res_blocks"],
        z_channels=sizes["z_channels"],
        embed_dim=arguments["embed_dim"],
        attn_resolutions=sizes["attn_resolutions"] or (),
        dropout=sizes["dropout"],
        quantizer=QuantizerConfig("learned", codebook_size=arguments["n_embed"], cosine=False, entropy=0.0),
    )


def as_stored(config: ChameleonConfig, names: Container[str]) -> ChameleonConfig:
    """The config of what a file holds: without decoder where it has none."""
    return replace(config, decoder="decoder.conv_in.weight" in names)


CHAMELEON = System(
    name="chameleon_vq",
    arguments={"embed_dim": 256, "n_embed": 8192, "ddconfig": DDCONFIG},
    configure=configure,
    layouts=(PUBLISHED, TRANSFORMERS),
    container="state_dict",
    as_stored=as_stored,
    rows=(
        Published(
            name="chameleon-vq",
            repository="facebook/chameleon-7b",  # transformers' layout; vqgan.ckpt is given as a path
            file="",
            arguments={},
            parameters=68_718_467,
            tokens="32x32",
            codebook="8192 x 256",
            code_licence="Chameleon Research License",
            weight_licence="Chameleon Research License",
            source="arXiv 2405.09818, github.com/facebookresearch/chameleon",
            size=512,
        ),
    ),
)
SYSTEMS = (CHAMELEON,)
