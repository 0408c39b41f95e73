"""Open-MAGVIT2: convolutions without attention around look-up free codes, for pictures and for clips.

Paper 2409.04410, TencentARC/SEED-Voken (Apache-2.0); defaults are its 256-pixel configuration and module
names its published ones. A code is the signs of the latent's channels (`QuantizerConfig` kind `sign`). The
clip network is the picture network with every convolution made causal in time; its GroupNorms and the
decoder's adaptive norms do mix all frames, so a clip must be coded as a whole.

b batch · c channels · d latent width (bits of a code) · t frames, time first in codes · h w grid or picture
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.catalog import Layout, Published, System
from lexel.nn.conv import group_norm, swish
from lexel.tokenizers.base import VideoTokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.vq import QuantizedRaster
from lexel.types import Codes, TokenizerOutput

EPSILON = 1e-6


@dataclass(frozen=True)
class OpenMagvit2Config:
    """Sizes of the picture tokenizer.

    image_size: trained picture side. channels times channel_mult[i] is the width of level i, finest first,
    each level half as fine as the one before. res_blocks: residual blocks per level and in the middle.
    embed_dim: channels of the latents; the published quantizer makes each one bit of the code.
    norm_groups: of the GroupNorms.
    Raises ValueError when image_size is no multiple of the downsampling.
    """

    image_size: int = 256
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 4
    embed_dim: int = 18
    norm_groups: int = 32
    quantizer: QuantizerConfig = field(default_factory=lambda: QuantizerConfig("sign", codebook_size=1 << 18))

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

    @property
    def factors(self) -> list[tuple[int, ...]]:
        """Factor of each step from a level to the next coarser one: (rows, columns)."""
        return [(2, 2)] * (len(self.channel_mult) - 1)

    def conv(self, c_in: int, c_out: int, kernel: int = 3, stride: Any = 1, bias: bool = True) -> nn.Module:
        """A convolution that keeps the grid (but for its stride)."""
        return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=bias)

    def build(self) -> OpenMagvit2:
        """The tokenizer with fresh weights."""
        return OpenMagvit2(self)


@dataclass(frozen=True)
class OpenMagvit2VideoConfig(OpenMagvit2Config):
    """The same for clips of 1 + k * `time_downsampling` frames, published for 17. A step after a level of
    multiplier 1 halves rows and columns only, any other step time too."""

    image_size: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 4)

    @property
    def factors(self) -> list[tuple[int, ...]]:
        """Factor of each step from a level to the next coarser one: (time, rows, columns)."""
        return [(1 if mult == 1 else 2, 2, 2) for mult in self.channel_mult[:-1]]

    @property
    def time_downsampling(self) -> int:
        """Frames per latent frame, after the first one, which stands alone."""
        return 2 ** sum(factor[0] == 2 for factor in self.factors)

    def conv(self, c_in: int, c_out: int, kernel: int = 3, stride: Any = 1, bias: bool = True) -> nn.Module:
        """A convolution that keeps the grid (but for its stride) and sees no later frame."""
        return CausalConv(c_in, c_out, kernel, stride, bias)

    def build(self) -> OpenMagvit2Video:  # type: ignore[override]
        """The tokenizer with fresh weights."""
        return OpenMagvit2Video(self)


class CausalConv(nn.Module):
    """A convolution over time and space, padded with zeros: rows and columns on both sides, time before the
    first frame only. ``[b, c_in, t, h, w] -> [b, c_out, t', h', w']``."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: Any, bias: bool) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - 1, 0)
        self.conv_1 = nn.Conv3d(c_in, c_out, kernel, stride, bias=bias)

    @property
    def weight(self) -> Tensor:
        """Of the convolution."""
        return self.conv_1.weight

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c_in, t, h, w] -> [b, c_out, t', h', w']``."""
        return self.conv_1(F.pad(x, self.padding))


class ResBlock(nn.Module):
    """norm, swish, 3x3, norm, swish, 3x3, plus the input (through a 1x1 where widths differ); no biases."""

    def __init__(self, config: OpenMagvit2Config, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in, config.norm_groups)
        self.norm2 = group_norm(c_out, config.norm_groups)
        self.conv1 = config.conv(c_in, c_out, bias=False)
        self.conv2 = config.conv(c_out, c_out, bias=False)
        self.nin_shortcut = config.conv(c_in, c_out, 1, bias=False) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c_in, ...] -> [b, c_out, ...]``."""
        h = self.conv1(swish(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(swish(self.norm2(h)))


class AdaptiveNorm(nn.Module):
    """GroupNorm whose scale and shift are linear in the quantized latent's deviation and mean over all
    cells."""

    def __init__(self, config: OpenMagvit2Config, width: int) -> None:
        super().__init__()
        self.norm = group_norm(width, config.norm_groups)
        self.norm.register_parameter("weight", None)
        self.norm.register_parameter("bias", None)
        self.gamma = nn.Linear(config.embed_dim, width)
        self.beta = nn.Linear(config.embed_dim, width)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x ``[b, width, ...]``, style ``[b, d, ...]`` (any grid) ``-> [b, width, ...]``."""
        cells = style.flatten(2)
        deviation = (cells.var(-1) + EPSILON).sqrt()  # unbiased, as published: needs two cells
        scale, shift = self.gamma(deviation), self.beta(cells.mean(-1))
        ones = (1,) * (x.ndim - 2)
        return scale.unflatten(1, (-1, *ones)) * self.norm(x) + shift.unflatten(1, (-1, *ones))


class Upsample(nn.Module):
    """A convolution to factor-many times the channels, which then become cells (depth to space). In the
    channel axis the place in the block comes *before* the channel, unlike in `F.pixel_shuffle`."""

    def __init__(self, config: OpenMagvit2Config, width: int, factor: tuple[int, ...]) -> None:
        super().__init__()
        self.factor = factor
        self.conv1 = config.conv(width, width * torch.Size(factor).numel())

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c, (t,) h, w]`` to the finer grid."""
        x = self.conv1(x)
        if len(self.factor) == 2:
            p, q = self.factor
            return rearrange(x, "b (p q c) h w -> b c (h p) (w q)", p=p, q=q)
        s, p, q = self.factor
        x = rearrange(x, "b (s p q c) t h w -> b c (t s) (h p) (w q)", s=s, p=p, q=q)
        # The first latent frame stands for one frame alone: its second half is dropped.
        return x if s == 1 else torch.cat([x[:, :, :1], x[:, :, s:]], dim=2)


def _blocks(config: OpenMagvit2Config, c_in: int, c_out: int) -> nn.Sequential:
    widths = pairwise([c_in, *[c_out] * config.res_blocks])
    return nn.Sequential(*(ResBlock(config, a, b) for a, b in widths))


class Encoder(nn.Module):
    """Pixels ``[b, 3, (t,) h, w]`` to latents ``[b, d, (t',) h', w']``."""

    def __init__(self, config: OpenMagvit2Config) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = config.conv(3, config.channels, bias=False)
        self.down = nn.ModuleList()
        for i, (a, b) in enumerate(pairwise([config.channels, *widths])):
            level = OrderedDict[str, nn.Module](block=_blocks(config, a, b))
            if i < len(config.factors):
                level["downsample"] = config.conv(b, b, stride=config.factors[i])
            self.down.append(nn.Sequential(level))
        self.mid_block = _blocks(config, widths[-1], widths[-1])
        self.norm_out = group_norm(widths[-1], config.norm_groups)
        self.conv_out = config.conv(widths[-1], config.embed_dim, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[b, 3, (t,) h, w] -> [b, d, (t',) h', w']``."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(swish(self.norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Quantized latents ``[b, d, (t',) h', w']`` to pixels ``[b, 3, (t,) h, w]``. `up.0` is the finest
    level."""

    def __init__(self, config: OpenMagvit2Config) -> None:
        super().__init__()
        widths = [*config.widths, config.widths[-1]]  # of level i and of what comes into it
        self.conv_in = config.conv(config.embed_dim, widths[-1])
        self.mid_block = _blocks(config, widths[-1], widths[-1])
        self.adaptive = nn.ModuleList(AdaptiveNorm(config, width) for width in widths[1:])
        self.up = nn.ModuleList()
        for i, (a, b) in enumerate(pairwise(widths)):
            level = OrderedDict[str, nn.Module](block=_blocks(config, b, a))
            if i:
                level["upsample"] = Upsample(config, a, config.factors[i - 1])
            self.up.append(nn.Sequential(level))
        self.norm_out = group_norm(widths[0], config.norm_groups)
        self.conv_out = config.conv(widths[0], 3)

    def forward(self, latents: Tensor) -> Tensor:
        """``[b, d, (t',) h', w'] -> [b, 3, (t,) h, w]``."""
        x = self.mid_block(self.conv_in(latents))
        for norm, level in reversed(list(zip(self.adaptive, self.up, strict=True))):
            x = level(norm(x, latents))
        return self.conv_out(swish(self.norm_out(x)))


class OpenMagvit2(QuantizedRaster):
    """The picture tokenizer. ``encode: [b, 3, h*f, w*f] -> Codes [b, h*w, k]``, row-major; k is 1, or the
    number of the quantizer's `groups`."""

    model_type: ClassVar[str] = "open_magvit2"
    config_class: ClassVar[type] = OpenMagvit2Config
    config: OpenMagvit2Config

    def __init__(self, config: OpenMagvit2Config) -> None:
        super().__init__(config)
        self.layout = CodeLayout(config.quantizer.codebook_sizes, grid=config.grid)
        self.encoder = Encoder(config)
        self.quant_conv = nn.Identity()  # type: ignore[assignment]
        self.quantize = config.quantizer.build(config.embed_dim)
        self.post_quant_conv = nn.Identity()
        self.decoder = Decoder(config)

    def _check_size(self, pixels: Tensor) -> None:
        check_cells(self.config, pixels)


class OpenMagvit2Video(VideoTokenizer):
    """The clip tokenizer. ``encode_video: [b, 1 + k*r, 3, h*f, w*f] -> Codes [b, (1 + k)*h*w, 1]``, time
    first, with time ratio r; a picture is a clip of one frame. `forward` takes pictures ``[b, 3, h, w]``
    and clips ``[b, t, 3, h, w]``, and gives back what it was given."""

    model_type: ClassVar[str] = "open_magvit2_video"
    config_class: ClassVar[type] = OpenMagvit2VideoConfig
    config: OpenMagvit2VideoConfig

    def __init__(self, config: OpenMagvit2VideoConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = (config.image_size, config.image_size)
        self.layout = CodeLayout(config.quantizer.codebook_sizes, grid=config.grid)
        self.encoder = Encoder(config)
        self.quantize = config.quantizer.build(config.embed_dim)
        self.decoder = Decoder(config)

    @property
    def last_layer(self) -> nn.Parameter:
        """See `Tokenizer.last_layer`."""
        return self.decoder.conv_out.weight  # type: ignore[return-value]

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """See `Tokenizer.forward`; nothing is drawn from `generator`."""
        clip = pixels.ndim == 5
        latents, frames, grid = self._latents(pixels if clip else pixels[:, None])
        output = self.quantize(latents, quantize)
        codes = Codes(output.indices, grid, frames=frames)
        video = self._decode_video(output.quantized, codes)
        codes = codes if clip else Codes(output.indices, grid)
        return TokenizerOutput(video if clip else video[:, 0], codes, output, latents)

    def embed(self, codes: Codes) -> Tensor:
        """See `Tokenizer.embed`."""
        return self.quantize.decode(codes.indices)

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        latents, _, grid = self._latents(pixels[:, None])
        return Codes(self.quantize.encode(latents.float()), grid)

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        return self._decode_video(latents, codes)[:, 0]

    def usable_frames(self, frames: int) -> int:
        """See `VideoTokenizer.usable_frames`."""
        return frames - (frames - 1) % self.config.time_downsampling if frames else 0

    def _encode_video(self, video: Tensor) -> Codes:
        self._check_size(video[:, 0])
        latents, frames, grid = self._latents(video)
        return Codes(self.quantize.encode(latents.float()), grid, frames=frames)

    def _decode_video(self, latents: Tensor, codes: Codes) -> Tensor:
        h, w = codes.grid or self.config.grid
        frames = codes.frames or 1
        if frames * h * w != latents.shape[1]:
            raise ValueError(
                f"{latents.shape[1]} codes do not fill {frames} frames of {h}x{w}; set Codes.grid and frames."
            )
        pixels = self.decoder(rearrange(latents, "b (t h w) d -> b d t h w", t=frames, h=h))
        return rearrange(pixels, "b c t h w -> b t c h w")

    def _latents(self, video: Tensor) -> tuple[Tensor, int, tuple[int, int]]:
        """``[b, t, 3, h, w]`` to ``[b, n, d]``, latent frames and their grid."""
        ratio = self.config.time_downsampling
        if video.shape[1] % ratio != 1 % ratio:
            raise ValueError(f"clips must have 1 + a multiple of {ratio} frames, got {video.shape[1]}.")
        latents = self.encoder(rearrange(video, "b t c h w -> b c t h w"))
        frames, h, w = latents.shape[2:]
        return rearrange(latents, "b d t h w -> b (t h w) d"), frames, (h, w)

    def _check_size(self, pixels: Tensor) -> None:
        check_cells(self.config, pixels)


def check_cells(config: OpenMagvit2Config, pixels: Tensor) -> None:
    """Raises ValueError when pictures ``[..., h, w]`` are no grid of cells, or of a single one: the decoder's
    norms need a deviation."""
    f, (h, w) = config.downsampling, pixels.shape[-2:]
    if h % f or w % f or h * w <= f * f:
        raise ValueError(f"picture sides must be multiples of {f}, of two cells or more, got {(h, w)}.")


# Published checkpoints: Lightning files with a raw and an averaged copy. The quantizer keeps nothing in them.
LAYOUT = Layout(ignored={r"loss\..*": "LPIPS, discriminator and LeCam of the training"})
ARGUMENTS: dict[str, Any] = {
    "double_z": False,
    "z_channels": 18,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": (1, 1, 2, 2, 4),
    "num_res_blocks": 4,
    "n_embed": 1 << 18,
    "embed_dim": 18,
    "sample_minimization_weight": 1.0,
    "batch_maximization_weight": 1.0,
    "token_factorization": False,
    "factorized_bits": (6, 12),
    "use_ema": True,
}
ENTROPY, COMMITMENT = 0.1, 0.25  # `codebook_weight` and `commit_weight` of the published loss


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """SEED-Voken's model arguments with those of its group `ddconfig` beside them."""
    return {k: v for k, v in config.items() if k != "ddconfig"} | dict(config.get("ddconfig", {}))


def check_pictures(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments that no published file of SEED-Voken has."""
    if arguments["double_z"] or (arguments["in_channels"], arguments["out_ch"]) != (3, 3):
        raise ValueError("double_z must be False, in_channels and out_ch 3.")


def _options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    check_pictures(arguments)
    if not arguments["n_embed"] == 1 << arguments["embed_dim"] == 1 << arguments["z_channels"]:
        raise ValueError(
            f"n_embed {arguments['n_embed']} must be 2^embed_dim (2^{arguments['embed_dim']}), and "
            f"z_channels ({arguments['z_channels']}) equal embed_dim."
        )
    return {
        "image_size": arguments["resolution"],
        "channels": arguments["ch"],
        "channel_mult": tuple(arguments["ch_mult"]),
        "res_blocks": arguments["num_res_blocks"],
        "embed_dim": arguments["embed_dim"],
        "quantizer": QuantizerConfig(
            "sign",
            codebook_size=arguments["n_embed"],
            groups=tuple(arguments["factorized_bits"]) if arguments["token_factorization"] else (),
            commitment=COMMITMENT,
            entropy=ENTROPY,
            entropy_certainty=arguments["sample_minimization_weight"],
            entropy_gamma=arguments["batch_maximization_weight"],
        ),
    }


def configure(arguments: Mapping[str, Any]) -> OpenMagvit2Config:
    """The reference's arguments → our config. `use_ema` is not looked at: the file shows whether it has an
    averaged copy. With `token_factorization` codes are cut into sub-codes of `factorized_bits`."""
    return OpenMagvit2Config(**_options(arguments))


def configure_video(arguments: Mapping[str, Any]) -> OpenMagvit2VideoConfig:
    """The same for clips."""
    return OpenMagvit2VideoConfig(**_options(arguments))


def _row(name: str, repository: str, file: str, parameters: int, tokens: str, **rest: Any) -> Published:
    arguments = rest.pop("arguments", {})
    return Published(
        name=name,
        repository=f"TencentARC/Open-MAGVIT2-Tokenizer-{repository}",
        file=file,
        arguments=arguments,
        parameters=parameters,
        tokens=tokens,
        codebook=rest.pop("codebook", "262144 signs of 18 channels"),
        code_licence="Apache-2.0",
        weight_licence="not stated",
        source="arXiv 2409.04410, github.com/TencentARC/SEED-Voken",
        **rest,
    )


# The 128-pixel network downsamples by 8 (published configuration `imagenet_lfqgan_128_L`: 16x16 codes at 128
# pixels, 32x32 at 256).
IMAGE_128 = {"resolution": 128, "ch_mult": (1, 2, 2, 4)}
IMAGE = System(
    name="open_magvit2_lfq",
    arguments=ARGUMENTS,
    configure=configure,
    flatten=flatten,
    layouts=(LAYOUT,),
    nestings=("state_dict",),
    container="state_dict",
    dotless_ema=True,
    rows=(
        _row("open-magvit2-256", "256-resolution", "imagenet_256_L.ckpt", 115_127_829, "16x16", rfid="1.17"),
        _row(
            "open-magvit2-128", "128-resolution", "imagenet_128_L.ckpt", 112_021_653, "16x16",
            arguments=IMAGE_128, size=128,
        ),
        _row(
            "open-magvit2-pretrain-16384", "16384-Pretrain", "pretrain256_16384.ckpt", 115_094_033, "16x16",
            rfid="2.55", arguments={"z_channels": 14, "n_embed": 1 << 14, "embed_dim": 14},
            codebook="16384 signs of 14 channels",
        ),
        _row(
            "open-magvit2-pretrain-262144", "262144-Pretrain", "pretrain256_262144.ckpt", 115_127_829,
            "16x16", rfid="1.67",
        ),
    ),
)  # fmt: skip
VIDEO = System(
    name="open_magvit2_video",
    arguments=ARGUMENTS | IMAGE_128,
    configure=configure_video,
    flatten=flatten,
    layouts=(LAYOUT,),
    nestings=("state_dict",),
    container="state_dict",
    dotless_ema=True,
    rows=(
        _row(
            "open-magvit2-video",
            "262144-Video",
            "video_128_262144.ckpt",
            370_547_349,
            "5x16x16 of 17 frames",
            size=128,
        ),
    ),
)
SYSTEMS = (IMAGE, VIDEO)
