"""Emu3's vision tokenizer: one code per 8x8 pixels and 4 frames, of pictures and clips (MoVQ with time).

Paper 2409.18869, BAAI/Emu3-VisionTokenizer. The network is transformers' `Emu3VQVAE`, which agrees with
BAAI's own code; the codebook is Lexel's, so that it can be trained (straight-through). Module names are
transformers', without the prefix ``model.vqmodel.``; the published names follow by rules.

A picture is a clip of `frames_per_code` equal frames, of which the first decoded one is returned. The decoder
normalises its features with scale and shift computed from the codes themselves (spatial norm).

Licences: the pages this was written from state none for code or weights; see BAAI's before use.

b batch · t frames · u = t / frames_per_code latent frames · h w grid · n = u*h*w positions · d latent width
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from lexel.catalog import Layout, Published, System
from lexel.tokenizers.base import VideoTokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.types import Codes, TokenizerOutput

GROUPS = 32  # of every GroupNorm in transformers' blocks
SIZE = 720  # Emu3's default area is 720 x 720 pixels


@dataclass(frozen=True)
class Emu3Config:
    """Sizes of the network; the defaults are the published ones.

    image_size: usual picture side in pixels. channels times channel_mult[i] is the width of stage i, each
    half as fine as the one before; res_blocks: residual blocks per stage (the decoder has one more) and in
    each stack over time; latent: width of the quantized latents; attention_stages: *indices* of the stages
    with attention (the middle always has it); frames_per_code: frames that one latent frame covers;
    dropout: in the spatial residual blocks.
    Raises ValueError for sizes that the network cannot have.
    """

    image_size: int = SIZE
    channels: int = 256
    channel_mult: tuple[int, ...] = (1, 2, 2, 4)
    res_blocks: int = 2
    latent: int = 4
    attention_stages: tuple[int, ...] = (3,)
    frames_per_code: int = 4
    dropout: float = 0.0
    quantizer: QuantizerConfig = field(
        default_factory=lambda: QuantizerConfig("learned", codebook_size=32768, cosine=False, entropy=0.0)
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention_stages", tuple(self.attention_stages))
        if self.channels % GROUPS:
            raise ValueError(f"channels must be a multiple of {GROUPS}, got {self.channels}.")
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of the downsampling {self.downsampling}."
            )
        if self.frames_per_code < 1 or self.frames_per_code & (self.frames_per_code - 1):
            raise ValueError(f"frames_per_code must be a power of two, got {self.frames_per_code}.")

    @property
    def downsampling(self) -> int:
        """Pixels per grid cell side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the codes of a picture of the usual size."""
        return (self.image_size // self.downsampling,) * 2

    def build(self) -> Emu3Tokenizer:
        """The tokenizer with fresh weights."""
        return Emu3Tokenizer(self)


def build_network(config: Emu3Config) -> Any:
    """transformers' `Emu3VQVAE` of these sizes, with what BAAI's own class has more: attention as wide as
    its stage (transformers knows one width, that of the middle), and dropout."""
    from transformers import Emu3VQVAE, Emu3VQVAEConfig
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAEAttentionBlock, Emu3VQVAEResnetBlock

    widths = [config.channels * m for m in config.channel_mult]
    options: dict[str, Any] = {
        "codebook_size": config.quantizer.codebook_size,
        "embed_dim": config.latent,
        "latent_channels": config.latent,
        "temporal_downsample_factor": config.frames_per_code,
        "base_channels": config.channels,
        "channel_multiplier": list(config.channel_mult),
        "num_res_blocks": config.res_blocks,
        "attn_resolutions": list(config.attention_stages),
        "num_attention_heads": 1,
    }
    network: Any = Emu3VQVAE(Emu3VQVAEConfig(**options, hidden_size=widths[-1]))
    for width, down, up in zip(widths, network.encoder.down_block.down, network.decoder.up_block.up):
        if width != widths[-1]:
            own = Emu3VQVAEConfig(**options, hidden_size=width)
            own._attn_implementation = network.config._attn_implementation
            for level in (down, up):
                level.attn = nn.ModuleList(Emu3VQVAEAttentionBlock(own) for _ in level.attn)
    for block in network.modules():
        if isinstance(block, Emu3VQVAEResnetBlock) and config.dropout:
            block.conv2.register_forward_pre_hook(partial(_drop, config.dropout))
    return network


def _drop(share: float, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return F.dropout(inputs[0], share, module.training)


class Emu3Tokenizer(VideoTokenizer):
    """See the module docstring. ``encode: [b, 3, h*f, w*f] -> Codes [b, h*w, 1]``; ``encode_video:
    [b, t, 3, h*f, w*f] -> Codes [b, u*h*w, 1]``, t a multiple of `frames_per_code`."""

    model_type: ClassVar[str] = "emu3"
    config_class: ClassVar[type] = Emu3Config
    config: Emu3Config

    def __init__(self, config: Emu3Config) -> None:
        super().__init__()
        self.config = config
        self.image_size = (config.image_size, config.image_size)
        self.layout = CodeLayout(config.quantizer.codebook_sizes, grid=config.grid)
        network = build_network(config)
        self.encoder = network.encoder
        self.quant_conv = network.quant_conv
        self.quantize = config.quantizer.build(config.latent)
        self.post_quant_conv = network.post_quant_conv
        self.decoder = network.decoder
        self.train()  # transformers builds its network in eval mode

    @property
    def last_layer(self) -> nn.Parameter:
        """See `Tokenizer.last_layer`."""
        return self.decoder.conv_out.weight

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """See `Tokenizer.forward`; nothing is drawn from `generator`. Given clips ``[b, t, 3, h, w]`` it
        reconstructs clips."""
        is_clip = pixels.ndim == 5
        maps = self.latents(pixels if is_clip else self._still(pixels))
        latents = _positions(maps)
        output = self.quantize(latents, quantize)
        codes = _codes(output.indices, maps, is_clip)
        draw = self._decode_video if is_clip else self._decode
        return TokenizerOutput(draw(output.quantized, codes), codes, output, latents)

    def latents(self, clip: Tensor) -> Tensor:
        """What is quantized: ``[b, t, 3, h*f, w*f] -> [b, u, d, h, w]``.
        Raises ValueError for sides or a number of frames that the network cannot take."""
        self._check_size(clip)
        if not clip.shape[1] or clip.shape[1] % self.config.frames_per_code:
            raise ValueError(
                f"a clip's frames must be a multiple of {self.config.frames_per_code}, got {clip.shape[1]}."
            )
        return self.quant_conv(self.encoder(clip).transpose(1, 2)).transpose(1, 2)

    def embed(self, codes: Codes) -> Tensor:
        """See `Tokenizer.embed`."""
        return self.quantize.decode(codes.indices)

    def usable_frames(self, frames: int) -> int:
        """See `VideoTokenizer.usable_frames`."""
        return frames - frames % self.config.frames_per_code

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        maps = self.latents(self._still(pixels))
        return _codes(self.quantize.encode(_positions(maps).float()), maps, is_clip=False)

    def _encode_video(self, video: Tensor) -> Codes:
        maps = self.latents(video)
        return _codes(self.quantize.encode(_positions(maps).float()), maps, is_clip=True)

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        if codes.frames is not None:
            raise ValueError(f"these codes are of a clip of {codes.frames} latent frames; use decode_video.")
        return self._decode_video(latents, codes)[:, 0]

    def _decode_video(self, latents: Tensor, codes: Codes) -> Tensor:
        h, w = codes.grid or self.config.grid
        u = codes.frames or 1
        if u * h * w != latents.shape[1]:
            raise ValueError(f"{latents.shape[1]} codes do not fill a {h}x{w} grid; set Codes.grid.")
        vectors = rearrange(latents, "b (u h w) d -> b d u h w", u=u, h=h)
        features = self.post_quant_conv(vectors)
        frames = self.decoder(features.transpose(1, 2), vectors.transpose(1, 2))
        return rearrange(frames, "(b t) c h w -> b t c h w", b=len(latents))

    def _still(self, pixels: Tensor) -> Tensor:
        return repeat(pixels, "b c h w -> b t c h w", t=self.config.frames_per_code)

    def _check_size(self, pixels: Tensor) -> None:
        f = self.config.downsampling
        if pixels.shape[-2] % f or pixels.shape[-1] % f:
            raise ValueError(f"picture sides must be multiples of {f}, got {tuple(pixels.shape[-2:])}.")


def _positions(maps: Tensor) -> Tensor:
    return rearrange(maps, "b u d h w -> b (u h w) d")


def _codes(indices: Tensor, maps: Tensor, is_clip: bool) -> Codes:
    """The codes ``[b, n, 1]`` of latents ``[b, u, d, h, w]``."""
    return Codes(indices, (maps.shape[3], maps.shape[4]), frames=maps.shape[1] if is_clip else None)


# Published checkpoint. Its attention projections are 1x1 convolutions, transformers' are linear.
PUBLISHED = Layout(
    rules=(
        (r"\.(down|up)_block\.", "."),
        (r"\.middle_block\.attn_norm\.", ".mid.attn_1.norm."),
        (r"\.middle_block\.", ".mid."),
        (r"\.attn_norms\.(\d+)\.", r".attn.\1.norm."),
        (r"\.(q|k|v)_proj\.", r".\1."),
        (r"\.out_proj\.", ".proj_out."),
    ),
    pointwise=r"\.(q|k|v|out)_proj\.weight$",
)
TRANSFORMERS = Layout(name="transformers", prefix="model.vqmodel.")
ARGUMENTS: dict[str, Any] = {
    "codebook_size": 32768,
    "embed_dim": 4,
    "z_channels": 4,
    "double_z": False,
    "in_channels": 3,
    "out_channels": 3,
    "temporal_downsample_factor": 4,
    "ch": 256,
    "ch_mult": (1, 2, 2, 4),
    "num_res_blocks": 2,
    "attn_resolutions": (3,),
    "dropout": 0.0,
}


def configure(arguments: Mapping[str, Any]) -> Emu3Config:
    """BAAI's arguments → our config. `attn_resolutions` are stage indices in spite of their name."""
    for name in ("double_z", "in_channels", "out_channels"):
        if arguments[name] != ARGUMENTS[name]:
            raise ValueError(f"{name} can only be {ARGUMENTS[name]}, got {arguments[name]}.")
    if arguments["embed_dim"] != arguments["z_channels"]:
        # The decoder's stack over time runs on latents and codes side by side: they are equally wide.
        raise ValueError(
            f"embed_dim {arguments['embed_dim']} and z_channels {arguments['z_channels']} must be equal."
        )
    f = 2 ** (len(arguments["ch_mult"]) - 1)
    return Emu3Config(
        image_size=SIZE // f * f,
        channels=arguments["ch"],
        channel_mult=arguments["ch_mult"],
        res_blocks=arguments["num_res_blocks"],
        latent=arguments["z_channels"],
        attention_stages=arguments["attn_resolutions"] or (),
        frames_per_code=arguments["temporal_downsample_factor"],
        dropout=arguments["dropout"],
        quantizer=QuantizerConfig(
            "learned", codebook_size=arguments["codebook_size"], cosine=False, entropy=0.0
        ),
    )


EMU3 = System(
    name="emu3_vq",
    arguments=ARGUMENTS,
    configure=configure,
    layouts=(PUBLISHED, TRANSFORMERS),
    container="",
    rows=(
        Published(
            name="emu3-vision-tokenizer",
            repository="BAAI/Emu3-VisionTokenizer",
            file="",
            arguments={},
            parameters=270_740_287,
            tokens="90x90",
            codebook="32768 x 4",
            code_licence="Apache-2.0",
            weight_licence="not stated",
            source="arXiv 2409.18869, github.com/baaivision/Emu3",
            size=SIZE,
        ),
    ),
)
SYSTEMS = (EMU3,)
