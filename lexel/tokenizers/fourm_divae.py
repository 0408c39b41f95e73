"""4M's DiVAE (arXiv 2312.06647; apple/ml-4m, Apache-2.0): a VQ tokenizer whose decoder is a diffusion model.
The published tokenizers of RGB, depth, normals and edges.

Encoder and codes are those of `fourm.py`. The decoder is a guided-diffusion U-Net over 4x4 patches of the
noisy picture, with the quantized latents, enlarged to its grid, as further input channels; it predicts the
clean picture (or the noise, or the velocity) at one of 1000 times. `decode` runs DDIM from a fixed start.
Pictures of one channel (depth, edges) are read as the mean of the three and drawn in grey.

b batch · c channels · h w grid of the codes · H W picture · y x grid of the U-Net · d latent width
e time embedding width · D network width
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.catalog import Published, System
from lexel.tokenizers.fourm import (
    ENCODER_ARGUMENTS,
    FourMEncoderConfig,
    FourMTokenizer,
    Size,
    encoder_options,
    pair,
    published,
    start,
)
from lexel.types import Codes, TokenizerOutput

GROUPS = 32
NOISE_SEED = 0  # of the start of `decode` unless noise or a generator is given
SAMPLERS = ("ddim", "ddpm")
PREDICTIONS = ("sample", "epsilon", "v_prediction")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
SHIFTED = "shifted_cosine:"
MOST_LOG_SNR = 15.0  # of the shifted cosine


@dataclass(frozen=True)
class UNetConfig:
    """patch: pixels (p, q) of a cell. width times mult[i]: channels of level i, finest first. blocks:
    residual ones per level. attention: of levels that are this many times smaller than the first.
    Raises ValueError for a width that the normalisations' groups do not divide."""

    patch: Size = (4, 4)
    width: int = 256
    mult: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 3
    attention: tuple[int, ...] = (4, 8)

    def __post_init__(self) -> None:
        for name in ("patch", "mult", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.width % GROUPS:
            raise ValueError(f"the U-Net's width must be a multiple of {GROUPS}, got {self.width}.")

    @property
    def unit(self) -> Size:
        """(h, w) in pixels that a picture's sides must be multiples of."""
        factor = int(2 ** (len(self.mult) - 1))
        return self.patch[0] * factor, self.patch[1] * factor


@dataclass(frozen=True)
class DiffusionConfig:
    """train_steps: times. schedule: `linear`, `scaled_linear`, `squaredcos_cap_v2`, `sigmoid` or
    ``shifted_cosine:S`` (arXiv 2305.18231). prediction: what the network says: `sample`, `epsilon` or
    `v_prediction`. zero_terminal_snr: the last time is noise alone (arXiv 2305.08891; the shifted cosine
    always is). thresholding, clip: how predicted pictures are kept in [-1, 1] (the first wins).
    sampler: of `decode`, `ddim` or `ddpm`; steps: of `decode`; the publisher's demo takes 25 (10 for edges).
    Raises ValueError on an unknown name."""

    train_steps: int = 1000
    schedule: str = "linear"
    prediction: str = "sample"
    zero_terminal_snr: bool = True
    thresholding: bool = True
    clip: bool = False
    sampler: str = "ddim"
    steps: int = 25

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES and not self.schedule.startswith(SHIFTED):
            known = ", ".join((*SCHEDULES, f"{SHIFTED}S"))
            raise ValueError(f"the noise schedule must be one of {known}, got {self.schedule!r}.")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}.")
        check_sampler(self.sampler)

    def alphas(self) -> Tensor:
        """Float ``[train_steps]``: the share of the picture (its variance) left at each time."""
        if self.schedule.startswith(SHIFTED):
            return shifted_cosine(self.train_steps, float(self.schedule.removeprefix(SHIFTED)))
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        scheduler = DDPMScheduler(
            self.train_steps,
            beta_schedule=self.schedule,
            rescale_betas_zero_snr=self.zero_terminal_snr,
        )
        return cast(Tensor, scheduler.alphas_cumprod)

    def times(self, steps: int, sampler: str) -> list[int]:
        """The times that `steps` steps visit, first to last. DDIM's are "trailing": they start at the last
        time, every train_steps // steps; where that leaves a remainder it takes one step more than asked for.
        DDPM's are "leading": they end at time 0. Raises ValueError on an impossible number of steps."""
        if not 1 <= steps <= self.train_steps:
            raise ValueError(f"steps must lie in 1..{self.train_steps}, got {steps}.")
        stride = self.train_steps // steps
        if sampler == "ddpm":
            return [step * stride for step in reversed(range(steps))]
        return [time - 1 for time in range(self.train_steps, 0, -stride)]

    def scheduler(self, steps: int, sampler: str) -> Any:
        """diffusers' scheduler with our times and noise levels."""
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        kind: Any = DDIMScheduler if sampler == "ddim" else DDPMScheduler
        scheduler = kind(
            self.train_steps,
            prediction_type=self.prediction,
            thresholding=self.thresholding,
            clip_sample=self.clip,
        )
        times = self.times(steps, sampler)
        scheduler.set_timesteps(steps)  # tells DDIM how far a step goes; its own trailing times round
        scheduler.timesteps = torch.tensor(times)
        scheduler.alphas_cumprod = self.alphas()
        return scheduler


def shifted_cosine(steps: int, shift: float) -> Tensor:
    """The cosine schedule with its log signal-to-noise ratio moved by ``-2 log(shift)``, cut to
    +-`MOST_LOG_SNR`, and a last time of noise alone. Float ``[steps]``."""
    angle = torch.linspace(0, 1, steps).double() * math.pi / 2
    log_snr = -2 * (angle.tan().log() + math.log(shift))
    alphas = log_snr.clamp(-MOST_LOG_SNR, MOST_LOG_SNR).float().sigmoid()
    alphas[-1] = 0
    return alphas


@dataclass(frozen=True)
class FourMDiVAEConfig(FourMEncoderConfig):
    """FourMEncoderConfig plus the decoder (unet None: a file of the encoder alone) and its diffusion."""

    unet: UNetConfig | None = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels or self.encoder.kind != "vit":
            raise ValueError("a DiVAE codes pictures with a ViT; class maps and vectors belong to a VQVAE.")

    @property
    def modality(self) -> Literal["pixels", "labels", "map", "vector"]:
        """`pixels` for one or three channels, else `map`."""
        return "pixels" if self.channels in (1, 3) and self.patch != (1, 1) else "map"

    def build(self) -> FourMDiVAE:
        """The tokenizer with fresh weights."""
        return FourMDiVAE(self)


# The U-Net: guided-diffusion's, under its names


class ResBlock(nn.Module):
    """``[b, D, y, x] -> [b, D', y, x]``, the time added in the middle."""

    def __init__(self, width: int, width_out: int, time_width: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, width_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, width_out))
        # The file counts a dropout of 0 between them.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width_out),
            nn.SiLU(),
            nn.Identity(),
            zeroed(nn.Conv2d(width_out, width_out, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if width == width_out else nn.Conv2d(width, width_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """time: ``[b, e]``."""
        y = self.in_layers(x) + self.emb_layers(time)[..., None, None]
        return self.skip_connection(x) + self.out_layers(y)


class AttentionBlock(nn.Module):
    """Attention of one head over all cells, ``[b, D, y, x] -> [b, D, y, x]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = zeroed(nn.Conv1d(width, width, 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """See the class; the time is not looked at."""
        flat = rearrange(x, "b d y x -> b d (y x)")
        q, k, v = rearrange(self.qkv(self.norm(flat)), "b (three d) n -> three b n d", three=3)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + rearrange(self.proj_out(mixed.mT), "b d (y x) -> b d y x", y=x.shape[2])


class Downsample(nn.Module):
    """Half the height and width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``[b, D, y, x] -> [b, D, y/2, x/2]``."""
        return self.op(x)


class Upsample(nn.Module):
    """Twice the height and width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``[b, D, y, x] -> [b, D, 2y, 2x]``."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class First(nn.Conv2d):
    """The first convolution, in the line of blocks that are told the time."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        """``[b, c, y, x] -> [b, D, y, x]``."""
        return super().forward(x)


class Stage(nn.ModuleList):
    """Blocks one after the other."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``[b, D, y, x] -> [b, D', y', x']``."""
        for block in self:
            x = block(x, time)
        return x


class UNet(nn.Module):
    """Noisy pictures ``[b, c, H, W]``, times ``[b]`` (or ``[1]`` for all rows) and latents ``[b, d, h, w]`` →
    ``[b, c, H, W]``."""

    def __init__(self, config: UNetConfig, channels: int, condition: int) -> None:
        super().__init__()
        self.patch, self.width = config.patch, config.width
        flat, time_width = channels * math.prod(config.patch), 4 * config.width
        self.time_embed = nn.Sequential(
            nn.Linear(config.width, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        width = first = config.mult[0] * config.width
        self.input_blocks = nn.ModuleList([Stage([First(flat + condition, first, 3, padding=1)])])
        skips = [width]
        for level, mult in enumerate(config.mult):
            if level:
                self.input_blocks.append(Stage([Downsample(width)]))
                skips.append(width)
            for _ in range(config.blocks):
                self.input_blocks.append(self._stage(config, level, width, mult * config.width))
                width = mult * config.width
                skips.append(width)
        self.middle_block = Stage(
            [ResBlock(width, width, time_width), AttentionBlock(width), ResBlock(width, width, time_width)]
        )
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.mult))):
            for block in range(config.blocks + 1):
                stage = self._stage(config, level, width + skips.pop(), mult * config.width)
                width = mult * config.width
                if level and block == config.blocks:
                    stage.append(Upsample(width))
                self.output_blocks.append(stage)
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.SiLU(), zeroed(nn.Conv2d(first, flat, 3, padding=1))
        )

    def _stage(self, config: UNetConfig, level: int, width: int, width_out: int) -> Stage:
        attends = 2**level in config.attention
        block = ResBlock(width, width_out, 4 * config.width)
        return Stage([block, AttentionBlock(width_out)] if attends else [block])

    def forward(self, noisy: Tensor, times: Tensor, latents: Tensor, hidden: Tensor | None = None) -> Tensor:
        """hidden: bool ``[b, h, w]``, cells whose latents are not seen (None: all are)."""
        p, q = self.patch
        x = rearrange(noisy, "b c (y p) (x q) -> b (c p q) y x", p=p, q=q)
        if hidden is not None:
            latents = latents.masked_fill(hidden[:, None], 0)
        x = torch.cat([x, F.interpolate(latents, tuple(x.shape[2:]), mode="nearest").to(x.dtype)], 1)
        time, skips = self.time_embed(time_waves(times, self.width).to(x.dtype)), []
        for stage in self.input_blocks:
            x = stage(x, time)
            skips.append(x)
        x = self.middle_block(x, time)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], 1), time)
        return rearrange(self.out(x), "b (c p q) y x -> b c (y p) (x q)", p=p, q=q)


def time_waves(times: Tensor, width: int) -> Tensor:
    """Times ``[b]`` to cosines, then sines, ``[b, width]``."""
    half = width // 2
    ramp = torch.arange(half, device=times.device).float() / half
    angles = times[:, None].float() * torch.exp(-math.log(10000) * ramp)
    return torch.cat([angles.cos(), angles.sin()], 1)


def zeroed(layer: nn.Module) -> nn.Module:
    """A layer that starts at zero."""
    for value in layer.parameters():
        nn.init.zeros_(value)
    return layer


# The tokenizer


class FourMDiVAE(FourMTokenizer):
    """See the module docstring."""

    model_type: ClassVar[str] = "fourm_divae"
    config_class: ClassVar[type] = FourMDiVAEConfig
    decodes_in_steps: ClassVar[bool] = True
    config: FourMDiVAEConfig
    decoder: UNet | None

    def __init__(self, config: FourMDiVAEConfig) -> None:
        super().__init__(config)
        start(self)
        self.decoder = UNet(config.unet, config.channels, config.quantizer.dim) if config.unet else None

    @property
    def last_layer(self) -> nn.Parameter:
        """See `Tokenizer.last_layer`."""
        return self._unet().out[2].weight  # type: ignore[return-value]

    @torch.no_grad()
    def decode(self, codes: Codes, **options: Any) -> Tensor:
        """Codes to pixels ``[b, 3, H, W]`` in about [-1, 1]. Deterministic: without `noise` or `generator`
        every picture starts from the same noise. Options as in `decode_values`."""
        if not self.reads_pixels:
            raise self.no_pixels()
        return self.decode_values(codes, **options).expand(-1, 3, -1, -1)

    @torch.no_grad()
    def decode_values(
        self,
        codes: Codes,
        *,
        steps: int | None = None,
        guidance: float = 1.0,
        sampler: str | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        size: Size | None = None,
    ) -> Tensor:
        """Codes to pictures of the tokenizer's own channels, ``[b, c, H, W]``.

        steps, sampler: see `DiffusionConfig`; None takes the config's. guidance: w of ``u + w (c - u)``, u
        being the prediction that sees no codes; only for decoders trained with hidden ones, which the
        published were not. noise: the start ``[b, c, H, W]``, else drawn for pictures of `size` (None: of a
        patch per code).
        DDPM draws in every step, from `generator` or a fixed seed, for each row by itself.
        Raises ValueError on an impossible size, sampler or number of steps."""
        unet, config = self._unet(), self.config.diffusion
        kind = check_sampler(sampler or config.sampler)
        size = self._picture_size(codes, size if noise is None else tuple(noise.shape[2:]))
        latents = self.quantized(codes)
        x = self._noise(latents, size, generator) if noise is None else noise.to(latents)
        scheduler = config.scheduler(config.steps if steps is None else steps, kind)
        options: dict[str, Any] = {"generator": _streams(len(x), generator)} if kind == "ddpm" else {}
        for time in scheduler.timesteps:
            shared = time[None].to(x.device)  # one embedding for all rows, as published: near the end of
            predicted = unet(x, shared, latents)  # noise, epsilon magnifies how a product is rounded
            if guidance != 1:
                free = unet(x, shared, torch.zeros_like(latents))
                predicted = free + guidance * (predicted - free)
            x = scheduler.step(predicted.float(), time, x, **options).prev_sample
        return x

    def denoise(
        self, noisy: Tensor, times: Tensor, quantized: Tensor, hidden: Tensor | None = None
    ) -> Tensor:
        """What the U-Net predicts from noisy pictures ``[b, c, H, W]`` at `times` ``[b]``, given quantized
        latents ``[b, d, h, w]``; hidden: bool ``[b, h, w]``, True where they are not seen."""
        return self._unet()(noisy, times, quantized, hidden)

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """See `Tokenizer.forward`. In training the reconstruction is the picture predicted in one step from
        the fixed noise at the noisiest time that tells a picture; in eval mode that of `decode`."""
        values = self._values(pixels)
        grid = self._latents(values)
        (h, w), size = grid.shape[2:], (values.shape[2], values.shape[3])
        latents = rearrange(grid, "b d h w -> b (h w) d")
        output = self.quantize(latents, quantize)
        codes = Codes(output.indices, (h, w))
        if self.training:
            given = rearrange(output.quantized, "b (h w) d -> b d h w", h=h)
            drawn = self._one_step(given, size)
        else:
            drawn = self.decode_values(codes, size=size)
        if self.reads_pixels:
            drawn = drawn.expand(-1, 3, -1, -1)
        return TokenizerOutput(drawn, codes, output, latents)

    # Inside

    def _one_step(self, latents: Tensor, size: Size) -> Tensor:
        config, alphas = self.config.diffusion, self.config.diffusion.alphas()
        time = len(alphas) - 1
        if config.prediction == "epsilon":
            time = int(alphas.nonzero()[-1])
        x = self._noise(latents, size, None)
        told = self._unet()(x, torch.full((len(x),), time, device=x.device), latents)
        alpha = float(alphas[time])
        if config.prediction == "sample":
            return told
        if config.prediction == "epsilon":
            return (x - math.sqrt(1 - alpha) * told) / math.sqrt(alpha)
        return math.sqrt(alpha) * x - math.sqrt(1 - alpha) * told

    def _unet(self) -> UNet:
        if self.decoder is None:
            raise self._needs_decoder()
        return self.decoder

    def _values(self, pixels: Tensor) -> Tensor:
        if self.reads_pixels and self.config.channels == 1 and pixels.shape[1] == 3:
            pixels = pixels.mean(1, keepdim=True)
        return self._checked(pixels)

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        return super()._encode(self._values(pixels), length)

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        return self.decode(codes)

    def _picture_size(self, codes: Codes, size: tuple[int, ...] | None) -> Size:
        h, w = self._grid(codes)
        p, q = self.config.patch
        wanted = (h * p, w * q) if size is None else (size[0], size[1])
        unit = self._unet_unit()
        if wanted[0] % unit[0] or wanted[1] % unit[1]:
            raise ValueError(
                f"this decoder draws pictures whose sides are multiples of {unit}, not {wanted}."
            )
        return wanted

    def _unet_unit(self) -> Size:
        return self.config.unet.unit if self.config.unet else (1, 1)

    def _noise(self, like: Tensor, size: Size, generator: torch.Generator | None) -> Tensor:
        """One draw per picture, so that a row does not depend on the batch; without a generator all alike."""
        source = torch.Generator().manual_seed(NOISE_SEED) if generator is None else generator
        draws = 1 if generator is None else len(like)
        shape = (1, self.config.channels, *size)
        noise = [torch.randn(shape, generator=source, device=source.device) for _ in range(draws)]
        return torch.cat(noise).to(like).expand(len(like), -1, -1, -1)


def _streams(count: int, generator: torch.Generator | None) -> list[torch.Generator]:
    """A random stream per row: of seeds that `generator` draws, or of one fixed seed."""
    seeds = [NOISE_SEED + 1] * count
    if generator is not None:
        drawn = torch.randint(2**62, (count,), generator=generator, device=generator.device)
        seeds = drawn.tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def check_sampler(name: str) -> str:
    """Raises ValueError for a sampler that there is not."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}.")
    return name


# Published checkpoints

DIVAE_ARGUMENTS = {
    **ENCODER_ARGUMENTS,
    "dec_type": "unet_patched",
    "num_train_timesteps": 1000,
    "cls_free_guidance_dropout": 0.0,  # of training, like masked_cfg
    "masked_cfg": False,
    "masked_cfg_low": 0,
    "masked_cfg_high": None,
    "scheduler": "ddpm",  # its noise levels are DDIM's
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "thresholding": True,
    "conditioning": "concat",
    "dec_transformer_dropout": 0.2,  # of another decoder
    "zero_terminal_snr": True,
    "unet": None,  # sizes that are not unet_patched's
}


def configure(arguments: Mapping[str, Any]) -> FourMDiVAEConfig:
    """The arguments of 4M's DiVAE → our config. `decode` takes DDIM whatever scheduler trained it."""
    return FourMDiVAEConfig(
        **encoder_options(arguments),
        unet=_unet_config(arguments["dec_type"], arguments["unet"] or {}),
        diffusion=DiffusionConfig(
            train_steps=arguments["num_train_timesteps"],
            schedule=arguments["beta_schedule"],
            prediction=arguments["prediction_type"],
            zero_terminal_snr=arguments["zero_terminal_snr"],
            thresholding=arguments["thresholding"],
            clip=arguments["clip_sample"],
        ),
    )


def _unet_config(kind: str | None, sizes: Mapping[str, Any]) -> UNetConfig | None:
    if kind is None:
        return None
    if "unet_" not in kind:
        raise ValueError(
            f"dec_type {kind} is not known here: a DiVAE has unet_patched (its U-ViT and ControlNet decoders "
            "have no published weights), and a VQVAE is loaded by the name of one"
        )
    default = UNetConfig()
    return UNetConfig(
        patch=pair(sizes.get("patch_size", default.patch)),
        width=sizes.get("model_channels", default.width),
        mult=tuple(sizes.get("channel_mult", default.mult)),
        blocks=sizes.get("num_res_blocks", default.blocks),
        attention=tuple(sizes.get("attention_resolutions", default.attention)),
    )


def as_stored(config: FourMDiVAEConfig, names: Container[str]) -> FourMDiVAEConfig:
    """4M publishes encoders alone too (its class VQ)."""
    return config if "decoder.out.2.weight" in names else replace(config, unet=None)


def _row(name: str, parameters: int, codes: int, size: int = 448, channels: int = 3) -> Published:
    return published(
        name, parameters, f"14x14 to {size // 16}x{size // 16}", f"{codes} x 32", size,
        n_channels=channels, post_mlp=True, codebook_size=codes, beta_schedule="linear",
        prediction_type="sample", scheduler="ddim",
    )  # fmt: skip


FOURM_DIVAE = System(
    name="fourm_divae",
    arguments=DIVAE_ARGUMENTS,
    configure=configure,
    nestings=("model", "state_dict"),
    reads_config=True,
    as_stored=as_stored,
    rows=(
        _row("rgb_16k_224-448", 287_346_000, 16384),
        _row("depth_8k_224-448", 286_805_296, 8192, channels=1),
        _row("normal_8k_224-448", 287_346_000, 8192),
        _row("edge_8k_224-512", 286_989_616, 8192, 512, channels=1),
    ),
)
SYSTEMS = (FOURM_DIVAE,)
