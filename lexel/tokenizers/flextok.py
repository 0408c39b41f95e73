"""FlexTok (arXiv 2502.13967, apple/ml-flextok): pictures as 1 to N ordered codes, drawn by a rectified flow.

A frozen VAE makes latents; an encoder reads them into N registers (register i sees all patches and the
registers before it); FSQ rounds each register to one code. The decoder is a transformer over noisy latent
patches and the codes that predicts a velocity; integrating it from noise draws the latents. Codes that were
cut off stay in the sequence as one learned vector without position, so any prefix draws a picture.
Module names are the published ones. Nothing of this code was taken from the publisher's, whose licence allows
no commercial use; the weights are licensed for research only.

b batch · c latent channels · h w latent grid · p q patch · l patches · n codes of N · k code width · d width
t time in [0, 1], 1 is noise
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.catalog import Published, System
from lexel.checkpoints import read_checkpoint
from lexel.errors import LexelError
from lexel.hub import mismatches, resolve_folder
from lexel.nn.flow import integrate
from lexel.nn.guidance import APG, Guide, Scale, check_guider, make_guide
from lexel.nn.positions import sincos
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.types import Codes, QuantizerOutput, TokenizerOutput, check_pixels

NORM_EPS = 1e-5
TIME_BASE = 256.0  # of the sinusoidal time embedding, where others have 10000
TAIL_DROPS = ("uniform", "pow2", "uniform_pow2")
NOISE_SEED = 0  # of the start of `decode` unless noise or a generator is given


@dataclass(frozen=True)
class VAEConfig:
    """diffusers' AutoencoderKL, f = 2^(levels - 1).

    scaling_factor: latents are the posterior times this; None where a published config does not say, then no
    picture can be coded. sample_posterior: whether training draws from the posterior instead of taking its
    mean (published default; coding takes the mean unless told otherwise).
    """

    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float | None = None
    sample_posterior: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))

    @property
    def downsampling(self) -> int:
        """f: pixels per latent cell side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def build(self) -> nn.Module:
        """The network with fresh weights."""
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        levels = len(self.block_out_channels)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_groups,
        )


@dataclass(frozen=True)
class HalfConfig:
    """Sizes of the encoder or the decoder transformer.

    patch: (p, q) latent cells that make one token. grid: (h, w) of the position table in patches; (): as the
    picture size needs. Raises ValueError when head_dim does not divide dim or dim is no multiple of 4.
    """

    dim: int = 1152
    depth: int = 18
    head_dim: int = 64
    patch: tuple[int, int] = (2, 2)
    grid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.dim % self.head_dim or self.dim % 4:
            raise ValueError(f"dim {self.dim} must be a multiple of 4 and of head_dim {self.head_dim}.")
        if len(self.patch) != 2 or len(self.grid) not in (0, 2):
            raise ValueError(f"patch and grid are pairs (h, w), got {self.patch} and {self.grid}.")


@dataclass(frozen=True)
class FlexTokConfig:
    """image_size: (h, w) in pixels, or the side of a square: what `decode` draws, and the largest picture.
    vae: None takes the pixels themselves as latents, for small pictures. registers: N, the longest code.
    levels: of FSQ. tail_drop: how training draws the kept length: `uniform` in 1..N, `pow2` (a power of two)
    or `uniform_pow2` (uniform, then rounded up to a power of two). null_dropout: share of training pictures
    whose codes the decoder does not see. frequencies, max_timestep: of the time embedding (the published code
    scales t by 1000 / max_timestep). feature_layer: decoder block whose patches a teacher may align (None:
    none). steps, guidance, guider: defaults of `decode`, the publisher's recommendation.
    Raises ValueError when sizes do not divide.
    """

    image_size: int | tuple[int, int] = 256
    vae: VAEConfig | None = field(default_factory=VAEConfig)
    encoder: HalfConfig = field(default_factory=HalfConfig)
    decoder: HalfConfig = field(default_factory=HalfConfig)
    registers: int = 256
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    tail_drop: str = "uniform"
    null_dropout: float = 0.1
    frequencies: int = 256
    max_timestep: float = 1.0
    feature_layer: int | None = 1
    steps: int = 20
    guidance: float = 7.5
    guider: str = "apg"

    def __post_init__(self) -> None:
        size = self.image_size
        object.__setattr__(self, "image_size", (size, size) if isinstance(size, int) else tuple(size))
        object.__setattr__(self, "levels", tuple(self.levels))
        for name in ("encoder", "decoder"):
            object.__setattr__(self, name, self._with_grid(getattr(self, name), name))
        if self.tail_drop not in TAIL_DROPS:
            raise ValueError(f"tail_drop must be one of {', '.join(TAIL_DROPS)}, got {self.tail_drop!r}.")
        if not 0 <= self.null_dropout < 1:
            raise ValueError(f"null_dropout must lie in [0, 1), got {self.null_dropout}.")
        if self.registers < 1 or self.frequencies % 2:
            raise ValueError(
                f"registers must be positive and frequencies even, got {self.registers}, {self.frequencies}."
            )
        if self.feature_layer is not None and not 0 <= self.feature_layer < self.decoder.depth:
            raise ValueError(
                f"feature_layer {self.feature_layer} is none of the {self.decoder.depth} decoder blocks."
            )
        check_guider(self.guider)

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell side."""
        return self.vae.downsampling if self.vae else 1

    @property
    def channels(self) -> int:
        """c: channels of the latents."""
        return self.vae.latent_channels if self.vae else 3

    @property
    def quantizer(self) -> QuantizerConfig:
        """The FSQ of `levels`."""
        return QuantizerConfig("fsq", levels=self.levels)

    def build(self) -> FlexTok:
        """The tokenizer with fresh weights."""
        return FlexTok(self)

    def _with_grid(self, half: HalfConfig, name: str) -> HalfConfig:
        size = cast("tuple[int, int]", self.image_size)
        units = [self.downsampling * side for side in half.patch]
        cells = [pixels // unit for pixels, unit in zip(size, units)]
        if any(pixels % unit for pixels, unit in zip(size, units)):
            raise ValueError(f"image_size {size} is no multiple of the {name}'s patches of {units} pixels.")
        if half.grid and any(held < needed for held, needed in zip(half.grid, cells)):
            raise ValueError(f"the {name}'s grid {half.grid} is too small for pictures of {size}.")
        return half if half.grid else replace(half, grid=tuple(cells))


# Blocks


def norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without weight or bias, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS).to(x.dtype)


class Attention(nn.Module):
    """Self-attention ``[b, l, d] -> [b, l, d]`` with normalised queries and keys and the scale 8 / head_dim,
    which is the usual 1 / sqrt(head_dim) at 64 only."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)
        self.wv = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """visible: bool ``[l, l]``, True where a row may look (None: everywhere)."""
        q, k, v = (
            rearrange(project(x), "b l (g e) -> b g l e", e=self.head_dim)
            for project in (self.wq, self.wk, self.wv)
        )
        mixed = F.scaled_dot_product_attention(norm(q), norm(k), v, visible, scale=8 / self.head_dim)
        return self.proj(rearrange(mixed, "b g l e -> b l (g e)"))


class GatedMLP(nn.Module):
    """``fc2(silu(fc1 x) * fc3 x)`` with two thirds of 4 d hidden units, not rounded."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(2 * (4 * dim) / 3)
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.fc3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, l, d] -> [b, l, d]``."""
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    """Pre-norm transformer block ``[b, l, d] -> [b, l, d]``."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.attn = Attention(dim, head_dim)
        self.mlp = GatedMLP(dim)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """visible: as in `Attention`."""
        x = x + self.attn(norm(x), visible)
        return x + self.mlp(norm(x))


class ModulatedBlock(Block):
    """`Block` with gates, shifts and scales that follow from the time, one set for patches and one for
    registers. Unlike in DiT the gates come first."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__(dim, head_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * 6 * dim))

    def forward(self, x: Tensor, time: Tensor, patches: int) -> Tensor:  # type: ignore[override]
        """time: ``[b, d]``; the first `patches` tokens are patches, the others registers."""
        both = rearrange(self.adaLN_modulation(time), "b (e d) -> e b 1 d", e=12)
        counts = (patches, x.shape[1] - patches)
        gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = (
            torch.cat(
                [one.expand(-1, count, -1) for one, count in zip((of_patches, of_registers), counts)], 1
            )
            for of_patches, of_registers in zip(both[:6], both[6:])
        )
        x = x + gate_a * self.attn(norm(x) * (1 + scale_a) + shift_a, None)
        return x + gate_m * self.mlp(norm(x) * (1 + scale_m) + shift_m)


class Transformer(nn.Module):
    """A stack of `blocks`; its owner calls them one by one."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class PatchEmbedder(nn.Module):
    """``[b, c, h, w] -> [b, h/p, w/q, d]``; a patch is read (p q c), channel fastest."""

    def __init__(self, channels: int, patch: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.patch_proj = nn.Linear(channels * math.prod(patch), dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        p, q = self.patch
        return self.patch_proj(rearrange(x, "b c (h p) (w q) -> b h w (p q c)", p=p, q=q))


class GridPositions(nn.Module):
    """Fixed sine-cosine positions ``[1, d, h, w]``, kept in the file; smaller grids take its corner.
    ``[b, h, w, d] -> [b, h, w, d]``; raises ValueError for a larger grid."""

    def __init__(self, dim: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.posembs = nn.Parameter(sincos(dim, *grid), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        h, w = x.shape[1:3]
        if h > self.posembs.shape[2] or w > self.posembs.shape[3]:
            raise ValueError(f"positions are for {tuple(self.posembs.shape[2:])} patches, got {(h, w)}.")
        return x + rearrange(self.posembs[:, :, :h, :w], "1 d h w -> 1 h w d")


class LinePositions(nn.Module):
    """Learned positions ``[1, 1, d, N]``, added to ``[b, N, d]``."""

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        self.posembs = nn.Parameter(small(1, 1, dim, length))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x + rearrange(self.posembs, "1 1 d n -> 1 n d")


class Holder(nn.Module):
    """A module that only holds parameters, under the name the file has for them."""

    def __init__(self, **values: nn.Module | Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, value if isinstance(value, nn.Module) else nn.Parameter(value))


class Linear(nn.Module):
    """A linear map named `proj`; with `normed`, of the normalised input."""

    def __init__(self, dim: int, dim_out: int, normed: bool = False) -> None:
        super().__init__()
        self.normed = normed
        self.proj = nn.Linear(dim, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., dim] -> [..., dim_out]``."""
        return self.proj(norm(x) if self.normed else x)


class TimeEmbedder(nn.Module):
    """Times ``[b]`` in [0, 1] to ``[b, d]``: cosines, then sines, then two linear maps."""

    def __init__(self, dim: int, frequencies: int, max_timestep: float) -> None:
        super().__init__()
        self.pairs = frequencies // 2
        self.factor = 1000 / max_timestep
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, times: Tensor) -> Tensor:
        """See the class."""
        ramp = torch.arange(self.pairs, device=times.device).float() / self.pairs
        # The frequencies first, as published: angles reach 1000, where a float's last digit shows.
        frequencies = self.factor * torch.exp(-math.log(TIME_BASE) * ramp)
        angles = times.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


class PatchHead(nn.Module):
    """Modulated ``[b, h, w, d]`` to ``[b, c, h*p, w*q]``; here the shift comes first."""

    def __init__(self, dim: int, channels: int, patch: tuple[int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.proj = nn.Linear(dim, channels * math.prod(patch))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """See the class; time: ``[b, d]``."""
        shift, scale = rearrange(self.adaLN_modulation(time), "b (two d) -> two b 1 1 d", two=2)
        p, q = self.patch
        return rearrange(
            self.proj(norm(x) * (1 + scale) + shift), "b h w (p q c) -> b c (h p) (w q)", p=p, q=q
        )


class FlexTokEncoder(nn.Module):
    """Latents ``[b, c, h, w]`` to registers ``[b, N, k]``, not yet rounded."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        half = config.encoder
        self.module_dict = nn.ModuleDict(
            {
                "enc_patch_emb": PatchEmbedder(config.channels, half.patch, half.dim),
                "enc_posemb_module": GridPositions(half.dim, half.grid),
                "enc_register_module": Holder(registers=small(config.registers, half.dim)),
                "enc_transformer": Transformer(Block(half.dim, half.head_dim) for _ in range(half.depth)),
                "enc_to_latents": Linear(half.dim, len(config.levels), normed=True),
            }
        )

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        parts: Any = self.module_dict
        patches = parts["enc_posemb_module"](parts["enc_patch_emb"](latents))
        patches = rearrange(patches, "b h w d -> b (h w) d")
        registers = parts["enc_register_module"].registers
        x = torch.cat([patches, registers.to(patches.dtype).expand(len(patches), -1, -1)], 1)
        visible = causal_last(patches.shape[1], len(registers), x.device)
        for block in parts["enc_transformer"].blocks:
            x = block(x, visible)
        return parts["enc_to_latents"](x[:, patches.shape[1] :])


def causal_last(patches: int, registers: int, device: torch.device) -> Tensor:
    """Bool ``[l, l]``: patches see patches; a register sees patches, itself and the registers before it."""
    visible = torch.ones(patches + registers, patches + registers, dtype=torch.bool, device=device).tril()
    visible[:patches, :patches] = True
    return visible


class FlexTokDecoder(nn.Module):
    """Noisy latents ``[b, c, h, w]``, times ``[b]`` and codes ``[b, N, k]`` to a velocity ``[b, c, h, w]``
    and the patches after the feature layer ``[b, l, d]`` (None without one)."""

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        half, dim = config.decoder, config.decoder.dim
        self.feature_layer = config.feature_layer
        self.module_dict = nn.ModuleDict(
            {
                "dec_from_latents": Linear(len(config.levels), dim),
                "dec_registers_posemb_module": LinePositions(dim, config.registers),
                "dec_nested_dropout": Holder(dropout_mask_token=small(dim)),
                "dec_latent_dropout": Holder(nullcond=small(dim)),
                "dec_noise_patch_emb": PatchEmbedder(config.channels, half.patch, dim),
                "dec_patches_posemb_module": GridPositions(dim, half.grid),
                "dec_time_embedder": TimeEmbedder(dim, config.frequencies, config.max_timestep),
                "dec_transformer": Transformer(ModulatedBlock(dim, half.head_dim) for _ in range(half.depth)),
                "dec_to_patches": PatchHead(dim, config.channels, half.patch),
            }
        )

    def forward(
        self, x: Tensor, times: Tensor, tokens: Tensor, lengths: Tensor, null: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """lengths: long ``[b]``, codes to look at; null: bool ``[b]``, rows that see none at all."""
        parts: Any = self.module_dict
        grid = parts["dec_patches_posemb_module"](parts["dec_noise_patch_emb"](x))
        patches = rearrange(grid, "b h w d -> b (h w) d")
        z = torch.cat([patches, self.registers(tokens, lengths, null).to(patches.dtype)], 1)
        time = parts["dec_time_embedder"](times)
        features = None
        for index, block in enumerate(parts["dec_transformer"].blocks):
            z = block(z, time, patches.shape[1])
            if index == self.feature_layer:
                features = z[:, : patches.shape[1]]
        z = rearrange(z[:, : patches.shape[1]], "b (h w) d -> b h w d", h=grid.shape[1])
        return parts["dec_to_patches"](z, time), features

    def registers(self, tokens: Tensor, lengths: Tensor, null: Tensor) -> Tensor:
        """``[b, N, d]``. What is cut off, and all of a null row, is overwritten *after* positions were added:
        such registers are all alike, and none is taken out of the sequence."""
        parts: Any = self.module_dict
        x = parts["dec_registers_posemb_module"](parts["dec_from_latents"](tokens))
        kept = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        x = torch.where(kept[..., None], x, parts["dec_nested_dropout"].dropout_mask_token.to(x.dtype))
        return torch.where(null[:, None, None], parts["dec_latent_dropout"].nullcond.to(x.dtype), x)


@dataclass(frozen=True)
class FlexTokFlow:
    """One training pass: the predicted velocity and its `target` ``[b, c, h, w]``; patches ``[b, l, d]``
    after the feature layer (None without one) and their `grid`; codes with the lengths drawn; the quantizer's
    output."""

    velocity: Tensor
    target: Tensor
    features: Tensor | None
    grid: tuple[int, int]
    codes: Codes
    quantizer: QuantizerOutput


class FlexTok(Tokenizer):
    """See the module docstring. ``encode: [b, 3, h, w] -> Codes [b, N, 1]`` with `lengths`."""

    model_type: ClassVar[str] = "flextok"
    config_class: ClassVar[type] = FlexTokConfig
    decodes_in_steps: ClassVar[bool] = True
    config: FlexTokConfig

    def __init__(self, config: FlexTokConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = cast("tuple[int, int]", config.image_size)
        self.layout = CodeLayout(config.quantizer.codebook_sizes, length=config.registers, flexible=True)
        # The file calls it vae.vae.
        self.vae = Holder(vae=config.vae.build()).requires_grad_(False) if config.vae else None
        self.encoder = FlexTokEncoder(config)
        self.quantize = config.quantizer.build(len(config.levels))
        self.decoder = FlexTokDecoder(config)
        start(self.encoder)
        start(self.decoder)

    @property
    def last_layer(self) -> nn.Parameter:
        """See `Tokenizer.last_layer`."""
        head: Any = self.decoder.module_dict["dec_to_patches"]
        return head.proj.weight

    def load_vae(self, name: str | Path) -> None:
        """Take the VAE's weights from a file or folder of diffusers' AutoencoderKL (``flextok_vae_c16``), or
        from the hub. Raises LexelError when there is no VAE here or the weights do not fit, listing them."""
        if self.vae is None:
            raise LexelError("this FlexTok has no VAE (vae is null); pixels are its latents.")
        path = Path(name) if Path(name).is_file() else resolve_folder(name, "VAE")
        network: Any = self.vae.vae
        state, own = read_checkpoint(path), network.state_dict()
        shapes = [{key: tuple(value.shape) for key, value in one.items()} for one in (own, state)]
        if problems := mismatches(*shapes):
            raise LexelError(f"{path} is not this VAE: {problems}.")
        network.load_state_dict(state)

    # Pictures and latents

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The VAE's mean and log-variance ``[b, c, h, w]`` of pixels in [-1, 1], not yet scaled.
        Without a VAE the pixels, and a variance of zero."""
        if self.vae is None:
            return pixels, torch.full_like(pixels, -math.inf)
        with _float32(pixels):
            found = self.vae.vae.encode(pixels.float()).latent_dist  # type: ignore[operator,union-attr]
        return found.mean, found.logvar

    @torch.no_grad()
    def latents(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents ``[b, c, h, w]``: the posterior's mean, plus `noise` times its deviation."""
        mean, logvar = self.posterior(pixels)
        if noise is not None:
            mean = mean + torch.exp(0.5 * logvar) * noise
        return mean * self._scale()

    def pictures(self, latents: Tensor) -> Tensor:
        """Pixels ``[b, 3, h, w]`` of scaled latents, not clamped; the way back from `latents`."""
        if self.vae is None:
            return latents
        with _float32(latents):
            return self.vae.vae.decode(latents.float() / self._scale()).sample  # type: ignore[operator,union-attr]

    def registers(self, latents: Tensor) -> Tensor:
        """Scaled latents to what FSQ rounds, ``[b, N, k]``."""
        return self.encoder(latents)

    @torch.no_grad()
    def encode(
        self,
        pixels: Tensor,
        length: int | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Codes:
        """As `Tokenizer.encode`. Codes are of the posterior's mean; with `noise` ``[b, c, h, w]`` or a
        `generator` to draw it, of a sample, as the publisher's code has it by default."""
        self._check_size(check_pixels(pixels))
        if noise is None and generator is not None:
            f = self.config.downsampling
            noise = self._noise(pixels, pixels.shape[2] // f, pixels.shape[3] // f, generator)
        indices = self.quantize.encode(self.registers(self.latents(pixels, noise)).float())
        return Codes(indices, lengths=indices.new_full((len(pixels),), self.layout_length(length)))

    def embed(self, codes: Codes) -> Tensor:
        """FSQ's codes in [-1, 1], ``[b, n, k]``; what lies beyond a row's length is code 0."""
        indices = codes.indices
        if codes.lengths is not None:
            beyond = torch.arange(indices.shape[1], device=indices.device) >= codes.lengths[:, None]
            indices = indices.masked_fill(beyond[..., None], 0)
        return self.quantize.decode(indices)

    # Flow

    def velocity(self, x: Tensor, times: Tensor, codes: Codes | None) -> Tensor:
        """Velocity ``[b, c, h, w]`` at the state `x` and `times` ``[b]``, given codes (None: the learned null
        condition, which ignores any length)."""
        return self._evaluate(x, times, codes)[0]

    def features(self, x: Tensor, times: Tensor, codes: Codes | None) -> Tensor:
        """Patches after the feature layer ``[b, l, d]``, row-major. Raises ValueError without one."""
        found = self._evaluate(x, times, codes)[1]
        if found is None:
            raise ValueError("this FlexTok keeps no features; set feature_layer.")
        return found

    @torch.no_grad()
    def decode(self, codes: Codes, **options: Any) -> Tensor:
        """Codes to pixels ``[b, 3, h, w]`` in about [-1, 1] (not clamped). Deterministic: without `noise` or
        `generator` every picture starts from the same noise. Options as in `draw`."""
        return self.pictures(self.draw(codes, **options))

    @torch.no_grad()
    def draw(
        self,
        codes: Codes,
        *,
        steps: int | None = None,
        guidance: Scale | None = None,
        guider: str | None = None,
        apg: APG | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Codes to scaled latents ``[b, c, h, w]``, each row by its own length.

        steps: equal Euler steps. guidance: scale, or a function of t; 1 switches guidance off. guider:
        `none`, `cfg` (``u + w (c - u)`` of the velocities) or `apg`, with the values `apg`. noise:
        ``[b, c, h, w]`` at t = 1, else drawn for pictures of `size` (h, w). None takes the config's.
        Raises ValueError on an unknown guider, an impossible size or no steps."""
        config = self.config
        if noise is None:
            noise = self._noise(codes.indices, *self._latent_size(size or self.image_size), generator)
        scale = config.guidance if guidance is None else guidance
        guide = make_guide(check_guider(config.guider if guider is None else guider), scale, apg or APG())
        steps = config.steps if steps is None else steps
        return self._integrate(*self._condition(codes), noise, guide, steps)

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """See `Tokenizer.forward`; `flow` is the training pass FlexTok is meant for. Here the training
        reconstruction is one step from noise, ``noise - velocity`` at t = 1, with drawn lengths."""
        registers = self.registers(self._training_latents(pixels, generator))
        output = self.quantize(registers, quantize)
        lengths = self._draw_lengths(len(pixels), generator).to(pixels.device)
        noise = self._noise(pixels, *self._latent_size(tuple(pixels.shape[2:])), None)
        if self.training:
            one = torch.ones(len(pixels), device=pixels.device)
            drawn = noise - self.decoder(noise, one, output.quantized, lengths, lengths < 0)[0]
        else:
            config = self.config
            guide = make_guide(config.guider, config.guidance, APG())
            drawn = self._integrate(output.quantized, lengths, noise, guide, config.steps)
        codes = Codes(output.indices, lengths=lengths)
        return TokenizerOutput(self.pictures(drawn), codes, output, registers)

    def flow(
        self,
        pixels: Tensor,
        times: Tensor,
        *,
        noise: Tensor | None = None,
        quantize: bool = True,
        generator: torch.Generator | None = None,
    ) -> FlexTokFlow:
        """The training pass at ``x_t = t noise + (1 - t) latents``; the target is ``noise - latents``.

        pixels: ``[b, 3, h, w]`` in [-1, 1]; times: ``[b]``; noise: ``[b, c, h, w]``, else drawn. In training
        mode lengths and null rows are drawn too (see the config), and posterior samples if the VAE's config
        says so."""
        latents = self._training_latents(pixels, generator)
        output = self.quantize(self.registers(latents), quantize)
        lengths = self._draw_lengths(len(pixels), generator).to(pixels.device)
        noise = self._normal(latents, generator) if noise is None else noise
        t = times[:, None, None, None]
        velocity, features = self.decoder(
            t * noise + (1 - t) * latents,
            times,
            output.quantized,
            lengths,
            self._draw_null(len(pixels), generator).to(pixels.device),
        )
        p, q = self.config.decoder.patch
        grid = (latents.shape[2] // p, latents.shape[3] // q)
        codes = Codes(output.indices, lengths=lengths)
        return FlexTokFlow(velocity, noise - latents, features, grid, codes, output)

    # Inside

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        return self.encode(pixels, length)

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        return self.decode(codes)

    def _integrate(
        self, tokens: Tensor, lengths: Tensor, noise: Tensor, guide: Guide | None, steps: int
    ) -> Tensor:
        null = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

        def field(x: Tensor, time: float) -> Tensor:
            times = x.new_full((len(x),), time)
            if guide is None:
                return self.decoder(x, times, tokens, lengths, null)[0].to(x.dtype)
            twice = [torch.cat([value, value]) for value in (x, times, tokens, lengths)]
            both = self.decoder(*twice, torch.cat([null, ~null]))[0].to(x.dtype)
            given, free = both.chunk(2)
            return guide(given, free, time)

        return integrate(field, noise.to(tokens), steps)

    def _training_latents(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        drawn = self.training and self.config.vae is not None and self.config.vae.sample_posterior
        if not drawn:
            return self.latents(pixels)
        mean, logvar = self.posterior(pixels)
        return (mean + torch.exp(0.5 * logvar) * self._normal(mean, generator)) * self._scale()

    def _evaluate(self, x: Tensor, times: Tensor, codes: Codes | None) -> tuple[Tensor, Tensor | None]:
        null = torch.full((len(x),), codes is None, device=x.device)
        if codes is None:
            codes = Codes(torch.zeros(len(x), 1, 1, dtype=torch.long, device=x.device))
        tokens, lengths = self._condition(codes)
        return self.decoder(x, times, tokens, lengths, null)

    def _condition(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """Embedded codes, filled up to N, and every row's length."""
        count, n, k = codes.indices.shape
        if n > self.config.registers or k != 1:
            raise ValueError(
                f"this FlexTok reads codes [b, up to {self.config.registers}, 1], "
                f"got {tuple(codes.indices.shape)}."
            )
        lengths = codes.indices.new_full((count,), n) if codes.lengths is None else codes.lengths
        return F.pad(self.embed(codes), (0, 0, 0, self.config.registers - n)), lengths

    def _scale(self) -> float:
        if self.config.vae is None:
            return 1.0
        if self.config.vae.scaling_factor is None:
            raise LexelError(
                "the scaling factor of this FlexTok's latents is not known: load it from a folder that holds "
                "the publisher's config.json, or give config={'vae': {..., 'scaling_factor': …}}."
            )
        return self.config.vae.scaling_factor

    def _noise(self, like: Tensor, h: int, w: int, generator: torch.Generator | None) -> Tensor:
        """One draw per picture, so that a row does not depend on the batch; without a generator all alike."""
        source = torch.Generator().manual_seed(NOISE_SEED) if generator is None else generator
        shape = (1, self.config.channels, h, w)
        draws = 1 if generator is None else len(like)
        noise = [torch.randn(shape, generator=source, device=source.device) for _ in range(draws)]
        return torch.cat(noise).to(like.device).expand(len(like), -1, -1, -1)

    @staticmethod
    def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
        device = like.device if generator is None else generator.device
        return torch.randn(like.shape, generator=generator, device=device).to(like)

    def _draw_lengths(self, count: int, generator: torch.Generator | None) -> Tensor:
        full, kind = self.config.registers, self.config.tail_drop
        if not self.training:
            return torch.full((count,), full)
        # On the generator's own device, CPU by default: the same draw whatever the pixels' device.
        device = "cpu" if generator is None else generator.device
        powers = torch.tensor([2**i for i in range(full.bit_length())], device=device)
        high = len(powers) if kind == "pow2" else full
        drawn = torch.randint(0, high, (count,), generator=generator, device=device)
        if kind == "pow2":
            return powers[drawn]
        if kind == "uniform_pow2":
            up = torch.cat([powers, 2 * powers[-1:]])
            return up[torch.searchsorted(up, drawn + 1)].clamp(max=full)
        return drawn + 1

    def _draw_null(self, count: int, generator: torch.Generator | None) -> Tensor:
        device = "cpu" if generator is None else generator.device
        drawn = torch.rand(count, generator=generator, device=device)
        return drawn < (self.config.null_dropout if self.training else 0.0)

    def _check_size(self, pixels: Tensor) -> None:
        self._latent_size(tuple(pixels.shape[2:]))

    def _latent_size(self, size: tuple[int, ...]) -> tuple[int, int]:
        """(h, w) of the latents of a picture. Raises ValueError when it is too large or does not divide."""
        f, halves = self.config.downsampling, (self.config.encoder, self.config.decoder)
        for axis, pixels in enumerate(size):
            for half in halves:
                unit = f * half.patch[axis]
                if pixels % unit or not 0 < pixels <= unit * half.grid[axis]:
                    raise ValueError(
                        f"picture sides must be multiples of {[f * side for side in half.patch]}, at most "
                        f"{self.image_size}, got {tuple(size)}."
                    )
        return size[0] // f, size[1] // f


def start(half: nn.Module) -> None:
    """Fresh linear maps as the publisher starts them: Xavier, zero biases, zero modulation and heads."""
    for name, part in half.named_modules():
        if isinstance(part, nn.Linear):
            if name.endswith(("enc_to_latents.proj", "dec_to_patches.proj")) or "adaLN" in name:
                nn.init.zeros_(part.weight)
            else:
                nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def small(*shape: int) -> Tensor:
    """A fresh learned vector or table."""
    return nn.init.trunc_normal_(torch.empty(shape), std=0.02)


def _float32(like: Tensor) -> Any:
    """The VAE runs in float32 whatever autocast says, as published."""
    return torch.autocast(like.device.type, enabled=False)


# Published checkpoints

REQUIRED: dict[str, dict[str, Any]] = {
    "enc_patch_emb": {"_target_": "PatchEmbedder"},
    "enc_posemb_module": {
        "_target_": "PositionalEmbeddingAdder", "posemb_type": "sincos", "posemb_scaling": "absolute",
    },
    "enc_register_module": {"_target_": "Registers1D", "ordering_mode": "nested"},
    "enc_seq_packer": {"_target_": "BlockWiseSequencePacker", "mask_mode": "causal_last"},
    "enc_transformer": {"_target_": "FlexTransformer", "mlp_ratio": 4.0, "gated_mlp": True, "qk_norm": True},
    "enc_to_latents": {"_target_": "LinearHead", "use_mup_readout": False},
    "dec_from_latents": {"_target_": "LinearLayer"},
    "dec_registers_posemb_module": {
        "_target_": "PositionalEmbeddingAdder", "posemb_type": "learnable_sum", "posemb_scaling": "absolute",
    },
    "dec_nested_dropout": {"_target_": "MaskedNestedDropout"},
    "dec_latent_dropout": {"_target_": "LearnedNullCond", "replace_with_single_token": False},
    "dec_noise_patch_emb": {"_target_": "PatchEmbedder"},
    "dec_patches_posemb_module": {
        "_target_": "PositionalEmbeddingAdder", "posemb_type": "sincos", "posemb_scaling": "absolute",
    },
    "dec_seq_packer": {"_target_": "BlockWiseSequencePacker", "mask_mode": "full", "per_subseq_embs": True},
    "dec_time_embedder": {"_target_": "TimestepEmbedder", "temb_as_tokens": False},
    "dec_transformer": {
        "_target_": "FlexTransformer", "mlp_ratio": 4.0, "gated_mlp": True, "qk_norm": True,
        "adaLN_expansion": 2,
    },
    "dec_to_patches": {"_target_": "ToPatchesLinearHead", "use_mup_readout": False},
}  # fmt: skip
"""What a published config must say of its modules where it says anything: the parts this file has."""


def sections(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The publisher's nested config as it is. Raises ValueError where a part of it is no dictionary."""
    for name in set(config) & set(published_arguments()):
        if not isinstance(config[name], Mapping):
            raise ValueError(f"{name} is a {type(config[name]).__name__}, expected a dictionary")
    return config


def configure(arguments: Mapping[str, Any]) -> FlexTokConfig:
    """The publisher's nested config → ours. It is read as data: a `_target_` is compared, never imported.
    Missing values take the defaults of the published code. Raises ValueError for a module of another kind."""
    enc, dec = (arguments[half]["module_dict"] for half in ("encoder", "decoder"))
    for name, section in {**enc, **dec}.items():
        _check_section(name, section)
    vae = _vae(arguments["vae"], (arguments.get("_reduced") or {}).get("autoencoder_kl") or {})
    encoder = _half(enc["enc_transformer"], enc["enc_patch_emb"], enc["enc_posemb_module"])
    decoder = _half(dec["dec_transformer"], dec["dec_noise_patch_emb"], dec["dec_patches_posemb_module"])
    sides = [
        min(vae.downsampling * half.patch[axis] * half.grid[axis] for half in (encoder, decoder))
        for axis in (0, 1)
    ]
    layers = [
        layer for layer in dec["dec_transformer"].get("intermediate_layers") or () if layer < decoder.depth
    ]
    return FlexTokConfig(
        image_size=(sides[0], sides[1]),
        vae=vae,
        encoder=encoder,
        decoder=decoder,
        registers=enc["enc_register_module"]["n_max"],
        levels=tuple(arguments["regularizer"]["levels"]),
        tail_drop=dec["dec_nested_dropout"].get("size_sampling_mode", "uniform"),
        null_dropout=dec["dec_latent_dropout"].get("dropout_prob", 0.0),
        frequencies=dec["dec_time_embedder"].get("frequency_embedding_size", 256),
        max_timestep=dec["dec_time_embedder"].get("max_timestep", 1000.0),
        feature_layer=layers[0] if layers else None,
    )


def _vae(section: Mapping[str, Any], sizes: Mapping[str, Any]) -> VAEConfig:
    """sizes: diffusers' own options of a VAE that is not the published one."""
    return VAEConfig(
        latent_channels=section.get("latent_channels", 16),
        block_out_channels=tuple(sizes.get("block_out_channels", VAEConfig.block_out_channels)),
        layers_per_block=sizes.get("layers_per_block", VAEConfig.layers_per_block),
        norm_groups=sizes.get("norm_num_groups", VAEConfig.norm_groups),
        scaling_factor=section.get("scaling_factor") or sizes.get("scaling_factor"),
        sample_posterior=section.get("sample_posterior", True),
    )


def _half(
    transformer: Mapping[str, Any], patches: Mapping[str, Any], positions: Mapping[str, Any]
) -> HalfConfig:
    return HalfConfig(
        dim=transformer["dim"],
        depth=transformer["depth"],
        head_dim=transformer.get("head_dim", 64),
        patch=tuple(patches["patch_sizes"]),
        grid=tuple(positions["max_sizes"]),
    )


def _check_section(name: str, section: Mapping[str, Any]) -> None:
    for option, value in REQUIRED.get(name, {}).items():
        found = section.get(option, value)
        if (str(found).rpartition(".")[2] if option == "_target_" else found) != value:
            raise ValueError(f"{name}.{option} is {found!r}; this FlexTok knows {value!r} only")


def published_arguments(encoder_depth: int = 18, decoder_depth: int = 28) -> dict[str, Any]:
    """The published config as far as it is known, under its own names: width 64 per layer, 16-channel VAE,
    256 registers. `scaling_factor` and `max_timestep` were not stated: the repository's config.json is."""
    sizes: dict[str, Any] = {}
    for side, depth in (("enc", encoder_depth), ("dec", decoder_depth)):
        patches = "enc_patch_emb" if side == "enc" else "dec_noise_patch_emb"
        positions = "enc_posemb_module" if side == "enc" else "dec_patches_posemb_module"
        sizes[side] = {
            f"{side}_transformer": {"dim": 64 * depth, "depth": depth, "head_dim": 64},
            patches: {"patch_sizes": [2, 2]},
            positions: {"max_sizes": [16, 16]},
        }
    sizes["dec"]["dec_transformer"] |= {"adaLN_expansion": 2, "intermediate_layers": [1]}
    return {
        "vae": {"latent_channels": 16, "scaling_factor": None, "sample_posterior": True},
        "encoder": {"module_dict": {**sizes["enc"], "enc_register_module": {"n_max": 256}}},
        "decoder": {
            "module_dict": {
                **sizes["dec"],
                "dec_nested_dropout": {},
                "dec_latent_dropout": {},
                "dec_time_embedder": {},
            }
        },
        "regularizer": {"levels": [8, 8, 8, 5, 5, 5]},
        "flow_matching_noise_module": {},
        "pipeline": {},
        "_reduced": {},
    }


def _row(data: str, depths: tuple[int, int], parameters: int) -> Published:
    name = f"flextok_d{depths[0]}_d{depths[1]}_{data}"
    sections = published_arguments(*depths)
    return Published(
        name=name.replace("_", "-"),
        repository=f"EPFL-VILAB/{name}",
        file="",
        arguments={half: sections[half] for half in ("encoder", "decoder")},
        parameters=parameters,
        tokens="1-256",
        codebook="64000 x 6 (FSQ)",
        code_licence="Apple Sample Code License",
        weight_licence="Apple Machine Learning Research Model licence (research only)",
        source="arXiv 2502.13967, github.com/apple/ml-flextok",
    )


FLEXTOK = System(
    name="flextok",
    arguments=published_arguments(),
    configure=configure,
    flatten=sections,
    reads_config=True,
    container="",
    rows=(
        _row("in1k", (12, 12), 341_651_737),
        _row("in1k", (18, 18), 949_734_553),
        _row("in1k", (18, 28), 2_540_882_841),
        _row("dfn", (18, 28), 2_540_882_841),
    ),
)
SYSTEMS = (FLEXTOK,)
