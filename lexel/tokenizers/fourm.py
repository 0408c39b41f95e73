"""4M's VQ-VAE tokenizers (arXiv 2312.06647, 2406.09406; apple/ml-4m, Apache-2.0): one small network per
modality that turns it into discrete codes and back.

Pictures and maps of class numbers are cut into patches, feature maps of vision models are read cell by cell,
both by a ViT; global embeddings and human poses are vectors, read by an MLP. Only tokenizers of pictures have
`encode` and `decode`; the others code values: `encode_values`, `decode_values`. Those whose decoder is a
diffusion model (RGB, depth, normals, edges) are in `fourm_divae.py` and share everything up to the codes.
Module names are the published ones.

b batch · c channels · h w grid of the codes · H W of the values (h*p, w*q) · n = h*w positions · k codes each
d latent width · D network width
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
from lexel.errors import LexelError
from lexel.nn.positions import sincos
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers.fourm import CodebookConfig, Memcodes
from lexel.types import Codes, TokenizerOutput

NORM_EPS = 1e-6
LAYER_SCALE = 1e-6
Size = tuple[int, int]


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of an encoder or decoder.

    kind: `vit`, `bottleneck` (residual MLP blocks) or `mlp` (plain linear layers). heads: of a ViT.
    ratio: hidden width of a block over its width. grid: (h, w) of a ViT's position table; other grids read it
    interpolated. Raises ValueError on an unknown kind, and sizes of a ViT that do not divide.
    """

    kind: str = "vit"
    width: int = 768
    depth: int = 12
    heads: int = 12
    ratio: float = 4.0
    grid: Size = (1, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.kind not in ("vit", "bottleneck", "mlp"):
            raise ValueError(f"a network is vit, bottleneck or mlp, got {self.kind!r}.")
        if self.kind == "vit" and (self.width % self.heads or self.width % 4):
            raise ValueError(f"width {self.width} must be a multiple of 4 and of {self.heads} heads.")


@dataclass(frozen=True)
class FourMEncoderConfig:
    """What all tokenizers of 4M share.

    image_size: (h, w) in pixels of the pictures it was trained on, or of those behind its values.
    channels: of the values; of the embedding of a class where there are `labels` (0: none).
    patch: (p, q) values that make one cell, (1, 1) for feature maps and vectors.
    post_mlp: a tanh MLP behind the encoder's ViT (and before the decoder's projection).
    Raises ValueError when the sizes of the picture and its patches do not divide.
    """

    image_size: Size = (224, 224)
    channels: int = 3
    labels: int = 0
    patch: Size = (16, 16)
    post_mlp: bool = False
    encoder: NetworkConfig = field(default_factory=lambda: NetworkConfig(grid=(14, 14)))
    quantizer: CodebookConfig = field(default_factory=CodebookConfig)

    def __post_init__(self) -> None:
        for name in ("image_size", "patch"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def modality(self) -> Literal["pixels", "labels", "map", "vector"]:
        """What the values are: pictures, maps of class numbers ``[b, H, W]``, float maps ``[b, c, H, W]``
        or vectors ``[b, c]``."""
        if self.labels:
            return "labels"
        if self.encoder.kind != "vit":
            return "vector"
        return "pixels" if self.channels == 3 and self.patch != (1, 1) else "map"


@dataclass(frozen=True)
class FourMConfig(FourMEncoderConfig):
    """FourMEncoderConfig plus the decoder; None for a file of the encoder alone. decoder_patch: values that
    it draws per cell. out_conv: two ConvNeXt blocks on what it has drawn, against visible patches."""

    decoder: NetworkConfig | None = field(default_factory=lambda: NetworkConfig(grid=(14, 14)))
    decoder_patch: Size = (16, 16)
    out_conv: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "decoder_patch", tuple(self.decoder_patch))

    @property
    def outputs(self) -> int:
        """Channels that the decoder draws: of the values, or a logit per class."""
        return self.labels or self.channels

    def build(self) -> FourM:
        """The tokenizer with fresh weights."""
        return FourM(self)


# Networks


class Attention(nn.Module):
    """Self-attention ``[b, n, D] -> [b, n, D]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        q, k, v = rearrange(self.qkv(x), "b n (three g e) -> three b g n e", three=3, g=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b g n e -> b n (g e)"))


class MLP(nn.Module):
    """``fc2(act(fc1 x))``, GELU or tanh."""

    def __init__(self, width: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = act
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block ``[b, n, D] -> [b, n, D]``."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = MLP(config.width, int(config.width * config.ratio), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Blocks over a grid with fixed sine-cosine positions, and with `post_mlp` a tanh MLP (ViT-VQGAN's) that
    the encoder runs in float32 whatever autocast says."""

    def __init__(self, config: NetworkConfig, post_mlp: bool) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(sincos(config.width, *config.grid), requires_grad=False)
        self.blocks = nn.Sequential(*[Block(config) for _ in range(config.depth)])
        if post_mlp:
            self.norm_mlp = nn.LayerNorm(config.width, eps=NORM_EPS)
            self.post_mlp = MLP(config.width, int(config.width * config.ratio), nn.Tanh())

    def tokens(self, grid: Tensor) -> Tensor:
        """``[b, D, h, w] -> [b, n, D]`` through positions and blocks."""
        table: Tensor = self.pos_emb
        if table.shape[2:] != grid.shape[2:]:
            table = F.interpolate(table, size=grid.shape[2:], mode="bicubic", align_corners=False)
        return self.blocks(rearrange(grid + table, "b d h w -> b (h w) d"))

    def finish(self, x: Tensor) -> Tensor:
        """The tanh MLP's residual, where there is one."""
        return x + self.post_mlp(self.norm_mlp(x)) if hasattr(self, "post_mlp") else x


class ViTEncoder(ViT):
    """``[b, c, H, W] -> [b, D, h, w]``."""

    def __init__(self, config: FourMEncoderConfig) -> None:
        super().__init__(config.encoder, config.post_mlp)
        self.proj = nn.Conv2d(config.channels, config.encoder.width, config.patch, config.patch)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        grid = self.proj(x)
        tokens = self.tokens(grid)
        if hasattr(self, "post_mlp"):
            with torch.autocast(x.device.type, enabled=False):
                tokens = self.finish(tokens.float())
        return rearrange(tokens, "b (h w) d -> b d h w", h=grid.shape[2])


class ViTDecoder(ViT):
    """``[b, D, h, w] -> [b, c, H, W]``."""

    def __init__(self, config: FourMConfig, network: NetworkConfig) -> None:
        super().__init__(network, config.post_mlp)
        self.patch = config.decoder_patch
        self.out_proj = nn.Linear(network.width, config.outputs * math.prod(self.patch))
        if config.out_conv:
            self.out_conv = nn.Sequential(ConvNeXt(config.outputs), ConvNeXt(config.outputs))

    def forward(self, grid: Tensor) -> Tensor:
        """See the class."""
        p, q = self.patch
        tokens = self.out_proj(self.finish(self.tokens(grid)))
        drawn = rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=grid.shape[2], p=p, q=q)
        return self.out_conv(drawn) if hasattr(self, "out_conv") else drawn

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last linear map."""
        last: Any = self.out_conv[-1].pwconv2 if hasattr(self, "out_conv") else self.out_proj
        return last.weight


class ConvNeXt(nn.Module):
    """ConvNeXt block ``[b, c, H, W] -> [b, c, H, W]`` with layer scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = self.norm(rearrange(self.dwconv(x), "b c h w -> b h w c"))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + rearrange(y, "b h w c -> b c h w")


class BottleneckBlock(nn.Module):
    """``block.2(gelu(block.0 x))``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        return self.block(x)


class PointMLP(nn.Module):
    """An MLP (arXiv 2306.13575) for every cell of a map, ``[b, c, h, w] -> [b, c', h, w]``: residual
    bottleneck blocks, or plain layers without any activation, as published."""

    def __init__(self, config: NetworkConfig, channels: int, channels_out: int) -> None:
        super().__init__()
        width, self.residual = config.width, config.kind == "bottleneck"
        self.linear_in = nn.Linear(channels, width)
        self.linear_out = nn.Linear(width, channels_out)
        if self.residual:
            hidden, self.blocks = int(config.ratio * width), nn.ModuleList()
            self.blocks.extend(BottleneckBlock(width, hidden) for _ in range(config.depth))
        else:
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth - 1))
        count = config.depth if self.residual else config.depth - 1
        self.layernorms = nn.ModuleList(nn.LayerNorm(width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = self.linear_in(rearrange(x, "b c h w -> b h w c"))
        for layer, norm in zip(self.blocks if self.residual else self.layers, self.layernorms):
            y = y + layer(norm(y)) if self.residual else layer(norm(y))
        return rearrange(self.linear_out(y), "b h w c -> b c h w")

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last linear map."""
        return cast(nn.Parameter, self.linear_out.weight)


# Tokenizers


class FourMTokenizer(Tokenizer):
    """The half that all of 4M's tokenizers share: values to codes, and codes to latents."""

    config: FourMEncoderConfig
    decoder: nn.Module | None

    def __init__(self, config: FourMEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        sizes = config.quantizer.codebook_sizes
        # 4M writes the codes of several heads one after the other.
        pattern: Literal["parallel", "interleaved"] = "interleaved" if len(sizes) > 1 else "parallel"
        self.layout = CodeLayout(sizes, grid=config.encoder.grid, pattern=pattern)
        self.cls_emb = nn.Embedding(config.labels, config.channels) if config.labels else None
        width = config.encoder.width
        self.encoder = (
            ViTEncoder(config)
            if config.encoder.kind == "vit"
            else PointMLP(config.encoder, config.channels, width)
        )
        self.quant_proj = nn.Conv2d(width, config.quantizer.dim, 1)
        self.quantize = config.quantizer.build()

    @property
    def has_decoder(self) -> bool:
        """Whether the weights hold a decoder."""
        return self.decoder is not None

    @property
    def reads_pixels(self) -> bool:
        """Whether it codes pictures; the others code values (`encode_values`)."""
        return self.config.modality == "pixels"

    @property
    def draws_pixels(self) -> bool:
        """See `Tokenizer.draws_pixels`."""
        return self.has_decoder and self.reads_pixels

    @torch.no_grad()
    def encode_values(self, values: Tensor) -> Codes:
        """Values to codes ``[b, h*w, k]`` with their `grid`, row-major.

        values, by `config.modality`: long ``[b, H, W]`` class numbers; float ``[b, c, H, W]`` maps (pictures
        in [-1, 1] too); float ``[b, c]`` vectors. Raises ValueError on another shape, dtype or range."""
        return self._encode_map(self._checked(values))

    def latents(self, values: Tensor) -> Tensor:
        """Values as in `encode_values`, to what is rounded, ``[b, d, h, w]``."""
        return self._latents(self._checked(values))

    def embed(self, codes: Codes) -> Tensor:
        """See `Tokenizer.embed`."""
        return self.quantize.decode(codes.indices)

    def quantized(self, codes: Codes) -> Tensor:
        """`embed` on the grid of the codes, ``[b, d, h, w]``."""
        h, w = self._grid(codes)
        return rearrange(self.embed(codes), "b (h w) d -> b d h w", h=h, w=w)

    def _encode_map(self, values: Tensor) -> Codes:
        grid = self._latents(values)
        indices = self.quantize.encode(rearrange(grid, "b d h w -> b (h w) d").float())
        return Codes(indices, (grid.shape[2], grid.shape[3]))

    def _latents(self, values: Tensor) -> Tensor:
        if self.cls_emb is not None:
            values = rearrange(self.cls_emb(values), "b h w c -> b c h w")
        return self.quant_proj(self.encoder(values))

    def _checked(self, values: Tensor) -> Tensor:
        """The values as the network takes them: labels ``[b, H, W]``, everything else ``[b, c, H, W]``."""
        config, shape = self.config, tuple(values.shape)
        if config.labels:
            if values.ndim != 3 or values.dtype != torch.long:
                raise ValueError(f"class maps are long [b, h, w], got {values.dtype} {shape}.")
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < config.labels:
                span = f"{int(values.min())}..{int(values.max())}"
                raise ValueError(f"classes must lie in 0..{config.labels - 1}, got {span}.")
        else:
            if config.modality == "vector" and values.ndim == 2:
                values = values[:, :, None, None]
            if values.ndim != 4 or values.shape[1] != config.channels or not values.is_floating_point():
                expected = f"[b, {config.channels}" + ("]" if config.modality == "vector" else ", h, w]")
                raise ValueError(f"values must be float {expected}, got {values.dtype} {shape}.")
        self._check_size(values)
        return values

    def _check_size(self, pixels: Tensor) -> None:
        p, q = self.config.patch
        if pixels.shape[-2] % p or pixels.shape[-1] % q:
            raise ValueError(f"sides must be multiples of {(p, q)}, got {tuple(pixels.shape[-2:])}.")

    def _grid(self, codes: Codes) -> Size:
        grid = codes.grid or self.config.encoder.grid
        if grid[0] * grid[1] != codes.indices.shape[1]:
            raise ValueError(
                f"{codes.indices.shape[1]} codes do not fill a {grid[0]}x{grid[1]} grid; set Codes.grid."
            )
        return grid

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        if not self.reads_pixels:
            raise self.no_pixels()
        return self._encode_map(pixels)

    def no_pixels(self) -> LexelError:
        """See `Tokenizer.no_pixels`."""
        what = {"labels": "class maps", "map": "maps", "vector": "vectors"}.get(self.config.modality, "")
        return LexelError(
            f"this tokenizer codes {what} of {self.config.labels or self.config.channels} "
            f"{'classes' if self.config.labels else 'channels'}, not pictures; use encode_values and "
            "decode_values."
        )

    def _needs_decoder(self) -> LexelError:
        return LexelError("this file holds 4M's encoder alone; load one with a decoder to draw.")


class FourM(FourMTokenizer):
    """See the module docstring."""

    model_type: ClassVar[str] = "fourm"
    config_class: ClassVar[type] = FourMConfig
    config: FourMConfig
    decoder: ViTDecoder | PointMLP | None

    def __init__(self, config: FourMConfig) -> None:
        super().__init__(config)
        network = config.decoder
        self.decoder = None
        if network is not None:
            self.post_quant_proj = nn.Conv2d(config.quantizer.dim, network.width, 1)
            self.decoder = (
                ViTDecoder(config, network)
                if network.kind == "vit"
                else PointMLP(network, network.width, config.outputs)
            )
        start(self)

    @property
    def last_layer(self) -> nn.Parameter:
        """See `Tokenizer.last_layer`."""
        if self.decoder is None:
            raise self._needs_decoder()
        return self.decoder.last_layer

    @torch.no_grad()
    def decode_values(self, codes: Codes) -> Tensor:
        """Codes to values of the kind that `encode_values` takes: the likeliest class of each place, maps, or
        vectors. (Masks of SAM instances come back as logits, positive inside.)"""
        drawn = self.draw(self.quantized(codes))
        if self.config.labels:
            return drawn.argmax(1)
        return (
            drawn[:, :, 0, 0] if self.config.modality == "vector" and self._grid(codes) == (1, 1) else drawn
        )

    def draw(self, quantized: Tensor) -> Tensor:
        """What the decoder makes of latents ``[b, d, h, w]``: ``[b, c, H, W]``, a logit per class for class
        maps. Raises LexelError when the weights hold no decoder."""
        if self.decoder is None:
            raise self._needs_decoder()
        return self.decoder(self.post_quant_proj(quantized))

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """See `Tokenizer.forward`; takes values as `encode_values` does, and reconstructs what `draw` draws.
        Memcodes draws its codes from `generator`."""
        if isinstance(self.quantize, Memcodes):
            self.quantize.generator = generator
        grid = self.latents(pixels)
        h, w = grid.shape[2:]
        latents = rearrange(grid, "b d h w -> b (h w) d")
        output = self.quantize(latents, quantize)
        drawn = self.draw(rearrange(output.quantized, "b (h w) d -> b d h w", h=h))
        return TokenizerOutput(drawn, Codes(output.indices, (h, w)), output, latents)

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        if not self.reads_pixels:
            raise self.no_pixels()
        return self.draw(self.quantized(codes))


def start(network: nn.Module) -> None:
    """Fresh weights as the publisher starts them: Xavier, zero biases; queries, keys and values each as a
    map of their own."""
    for name, part in network.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
            if name.endswith("qkv"):
                bound = math.sqrt(6 / (part.weight.shape[0] // 3 + part.weight.shape[1]))
                nn.init.uniform_(part.weight, -bound, bound)


# Published checkpoints

VIT_PRESETS = {"s": (512, 8, 8), "b": (768, 12, 12), "l": (1024, 24, 16)}
QUANTIZERS = {"lucid": "ema", "memcodes": "memcodes"}
REPLACEMENTS = {"batch_random": "latents", "linde_buzo_gray": "split"}
ENCODER_ARGUMENTS: dict[str, Any] = {
    "image_size": 224,
    "image_size_enc": None,
    "image_size_dec": None,
    "n_channels": 3,
    "n_labels": None,
    "enc_type": "vit_b_enc",
    "patch_proj": True,
    "post_mlp": False,
    "patch_size": 16,
    "quant_type": "lucid",
    "codebook_size": 16384,
    "num_codebooks": 1,
    "latent_dim": 32,
    "norm_codes": True,
    "norm_latents": False,
    "sync_codebook": True,  # ours always is
    "ema_decay": 0.99,
    "threshold_ema_dead_code": 0.25,
    "code_replacement_policy": "batch_random",
    "commitment_weight": 1.0,
    "kmeans_init": False,  # how training started
    "undo_std": False,  # pixels always lie in [-1, 1] here
    "freeze_enc": False,
    "vit_sizes": None,  # dim_tokens, depth, num_heads (of the halves, or of both) that are no preset's
}


def pair(value: Any) -> Size:
    """An integer for both sides, or (h, w)."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def network(kind: str, half: str, sizes: Mapping[str, Any] | None, grid: Size) -> NetworkConfig:
    """``vit_b_enc`` or ``BottleneckMLP/B_6-Wi_1024`` → our config; half: `encoder` or `decoder`. Raises
    ValueError for a name that is neither."""
    if "MLP" in kind:
        model, _, numbers = kind.partition("/")
        if model not in ("BottleneckMLP", "MLP"):
            raise ValueError(f"{model!r} is no MLP of 4M's; there are BottleneckMLP and MLP")
        values = [int(part.split("_")[1]) for part in numbers.split("-")]
        ratio = float(values[2]) if len(values) == 3 else 4.0
        kind = "bottleneck" if model == "BottleneckMLP" else "mlp"
        return NetworkConfig(kind, width=values[1], depth=values[0], ratio=ratio)
    own = (sizes or {}).get(half) or ({} if half in (sizes or {}) else sizes) or {}
    preset = VIT_PRESETS.get(kind.removeprefix("vit_").rsplit("_", 1)[0], ())
    if "vit" not in kind or not (own or preset):
        raise ValueError(f"{kind!r} is no network of 4M's that is known here")
    width, depth, heads = preset or (0, 0, 0)
    return NetworkConfig(
        "vit",
        own.get("dim_tokens", width),
        own.get("depth", depth),
        own.get("num_heads", heads),
        own.get("mlp_ratio", 4.0),
        grid,
    )


def encoder_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The reference's arguments as `FourMEncoderConfig` options."""
    patch, size = pair(arguments["patch_size"]), pair(arguments["image_size"])
    sizes = arguments["vit_sizes"]
    if arguments["quant_type"] not in QUANTIZERS:
        raise ValueError(f"quant_type is lucid or memcodes, got {arguments['quant_type']!r}")
    if arguments["code_replacement_policy"] not in REPLACEMENTS:
        raise ValueError(f"code_replacement_policy {arguments['code_replacement_policy']!r} is unknown")
    grid = cells(pair(arguments["image_size_enc"] or size), patch)
    encoder = network(arguments["enc_type"], "encoder", sizes, grid)
    whole = encoder.kind == "vit" and arguments["patch_proj"]
    return {
        "image_size": size,
        "channels": arguments["n_channels"],
        "labels": arguments["n_labels"] or 0,
        "patch": patch if whole else (1, 1),
        "post_mlp": arguments["post_mlp"] and encoder.kind == "vit",
        "encoder": encoder,
        "quantizer": CodebookConfig(
            kind=QUANTIZERS[arguments["quant_type"]],
            codebook_size=arguments["codebook_size"],
            dim=arguments["latent_dim"],
            heads=arguments["num_codebooks"],
            cosine=arguments["norm_codes"],
            unit_latents=arguments["norm_latents"],
            decay=arguments["ema_decay"],
            dead_below=arguments["threshold_ema_dead_code"],
            replacement=REPLACEMENTS[arguments["code_replacement_policy"]],
            commitment=arguments["commitment_weight"],
        ),
    }


def cells(size: Size, patch: Size) -> Size:
    """(h, w) of the grid. Raises ValueError when the patches do not fill the picture."""
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(f"pictures of {size} do not divide into patches of {patch}")
    return size[0] // patch[0], size[1] // patch[1]


VQ_ARGUMENTS = {**ENCODER_ARGUMENTS, "dec_type": "vit_b_dec", "out_conv": False, "patch_size_dec": None}


def configure(arguments: Mapping[str, Any]) -> FourMConfig:
    """The arguments of 4M's VQVAE → our config."""
    options = encoder_options(arguments)
    kind = arguments["dec_type"]
    if kind is None:
        return FourMConfig(**options, decoder=None)
    if "unet" in kind or "uvit" in kind:
        raise ValueError(f"dec_type {kind} is a diffusion decoder: load this file by the name of a DiVAE")
    patch = pair(arguments["patch_size_dec"] or arguments["patch_size"])
    size = pair(arguments["image_size_dec"] or arguments["image_size"])
    decoder = network(kind, "decoder", arguments["vit_sizes"], cells(size, patch))
    # The reference's ViT decoder follows patch_proj whatever its encoder is.
    whole = decoder.kind == "vit" and arguments["patch_proj"]
    return FourMConfig(
        **options,
        decoder=decoder,
        decoder_patch=patch if whole else (1, 1),
        out_conv=arguments["out_conv"] and decoder.kind == "vit",
    )


def as_stored(config: FourMConfig, names: Container[str]) -> FourMConfig:
    """4M publishes encoders alone too (its class VQ)."""
    return config if "post_quant_proj.weight" in names else replace(config, decoder=None)


def published(
    name: str, parameters: int, tokens: str, codebook: str, size: int, **arguments: Any
) -> Published:
    """A row; `name` is the hub's without ``4M_tokenizers_``."""
    return Published(
        name="4m-" + name.replace("_", "-").lower(),
        repository=f"EPFL-VILAB/4M_tokenizers_{name}",
        file="",
        arguments={"image_size": size, **arguments},
        parameters=parameters,
        tokens=tokens,
        codebook=codebook,
        code_licence="Apache-2.0",
        weight_licence="Sample Code License (non-commercial)",
        source="arXiv 2406.09406, github.com/apple/ml-4m",
        size=size,
    )


def _features(name: str, parameters: int, tokens: str, channels: int, patch: int) -> Published:
    arguments = {"n_channels": channels, "patch_size": patch, "patch_proj": False, "post_mlp": True}
    return published(name, parameters, tokens, "8192 x 32", 448, codebook_size=8192, **arguments)


def _vector(name: str, parameters: int, channels: int, codes: int) -> Published:
    mlp = "BottleneckMLP/B_6-Wi_1024"
    return published(
        name, parameters, "8", f"8 x {codes} x 128 (Memcodes)", 224, n_channels=channels, enc_type=mlp,
        dec_type=mlp, quant_type="memcodes", codebook_size=codes, num_codebooks=8, latent_dim=1024,
    )  # fmt: skip


FOURM_VQ = System(
    name="fourm_vq",
    arguments=VQ_ARGUMENTS,
    configure=configure,
    nestings=("model", "state_dict"),
    reads_config=True,
    as_stored=as_stored,
    rows=(
        published(
            "semseg_4k_224-448", 219_783_072, "14x14 to 28x28", "4096 x 32", 448,
            n_channels=64, n_labels=134, post_mlp=True, codebook_size=4096,
        ),
        _features("CLIP-B16_8k_224-448", 181_598_752, "14x14 to 28x28", 512, 16),
        _features("DINOv2-B14_8k_224-448", 182_360_864, "16x16 to 32x32", 768, 14),
        _features("ImageBind-H14_8k_224-448", 183_147_808, "16x16 to 32x32", 1280, 14),
        _vector("DINOv2-B14-global_8k_16_224", 115_173_120, 768, 8192),
        _vector("ImageBind-H14-global_8k_16_224", 116_222_208, 1280, 8192),
        _vector("human-poses_1k_8", 106_683_599, 207, 1024),
        published(
            "sam-instance_1k_64", 172_102_532, "4x4", "1024 x 1024", 64,
            n_channels=1, out_conv=True, codebook_size=1024, latent_dim=1024,
        ),
    ),
)  # fmt: skip
SYSTEMS = (FOURM_VQ,)
