"""Factorized raster tokenizer: several small codebooks per cell instead of one large one.

FQGAN (arXiv 2411.16681, showlab/FQGAN): LlamaGen's encoder up to `mid` is shared; each branch then has its
own transformer adapter, output convolution and codebook; one decoder reads the concatenated codes. A
disentanglement term keeps the branches' codes orthogonal, and a feature head per semantic branch predicts
what a vision model sees in the picture (its teacher stays in the objective, `RepresentationTerm`). Module
names are the published ones. Codebook order is that of the concatenation and of the published language
models: vis, sem (dual; the publisher's own functions say sem, vis) or vis, sem_mid, sem_high (triple).

b batch · n = h*w positions · k branches · d latent width of one branch · f feature width
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.catalog import Layout, Published, System
from lexel.nn.conv import Decoder, EncoderTrunk, group_norm, swish
from lexel.nn.vit import TokenAdapter, VisionBlock
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import Quantizer
from lexel.tokenizers.vq import (
    LLAMAGEN_ARGUMENTS,
    USAGE_WINDOW,
    RasterConfig,
    RasterTokenizer,
    raster_options,
)
from lexel.types import Codes, QuantizerOutput, TokenizerOutput

# Branch suffix -> name of its adapter in the encoder, in concatenation order.
BRANCHES = {
    2: {"vis": "visual_head", "sem": "semantic_head"},
    3: {"vis": "visual_head", "sem_mid": "semantic_head_mid", "sem_high": "semantic_head_high"},
}
# Semantic branch -> name of its feature head.
FEATURE_HEADS = {
    2: {"sem": "feat_pred_head"},
    3: {"sem_mid": "mid_sem_feat_pred", "sem_high": "high_sem_feat_pred"},
}


@dataclass(frozen=True)
class FactorizedTokenizerConfig(RasterConfig):
    """RasterConfig (its quantizer is built once per branch, `embed_dim` wide each) plus:

    branches: 2 or 3. adapter_layers, adapter_heads: each branch's transformer (0 layers: none).
    disentangle: weight r of the mean squared cosine between branches' codes (published 0.1).
    pattern: how a language model sees the branches' codes (`CodeLayout.pattern`).
    feature_dims: width of the feature head of each semantic branch, that is of its teacher's features (empty:
    no heads); feature_layers, feature_heads: of their transformers.
    Raises ValueError for another number of branches or of feature heads, or a quantizer with several
    codebooks.
    """

    branches: int = 2
    adapter_layers: int = 6
    adapter_heads: int = 8
    disentangle: float = 0.1
    pattern: str = "parallel"
    feature_dims: tuple[int, ...] = ()
    feature_layers: int = 3
    feature_heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "feature_dims", tuple(self.feature_dims))
        if self.branches not in BRANCHES:
            raise ValueError(f"branches must be 2 or 3, got {self.branches}.")
        if self.feature_dims and len(self.feature_dims) != self.branches - 1:
            raise ValueError(
                f"feature_dims needs one width for each of {', '.join(FEATURE_HEADS[self.branches])}, "
                f"got {self.feature_dims}."
            )
        if len(self.quantizer.codebook_sizes) != 1:
            raise ValueError("each branch has one codebook; a residual quantizer belongs to VQTokenizer.")

    def build(self) -> FactorizedTokenizer:
        """The tokenizer with fresh weights."""
        return FactorizedTokenizer(self)


class FactorizedEncoder(EncoderTrunk):
    """The shared trunk and the branches: ``[b, 3, h*f, w*f] -> k x [b, z_channels, h, w]``."""

    def __init__(self, config: FactorizedTokenizerConfig) -> None:
        super().__init__(config.sizes)
        self.branches = BRANCHES[config.branches]
        cells = config.grid[0] * config.grid[1]
        for name, head in self.branches.items():
            adapter: nn.Module = nn.Identity()
            if config.adapter_layers:
                adapter = TokenAdapter(self.width, cells, config.adapter_layers, config.adapter_heads)
            self.add_module(head, nn.Sequential(adapter))
            self.add_module(f"norm_out_{name}", group_norm(self.width, config.norm_groups))
            self.add_module(f"conv_out_{name}", nn.Conv2d(self.width, config.z_channels, 3, padding=1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        shared = self.trunk(pixels)
        return tuple(
            self.get_submodule(f"conv_out_{name}")(
                swish(self.get_submodule(f"norm_out_{name}")(self.get_submodule(head)(shared)))
            )
            for name, head in self.branches.items()
        )


class FeatureHead(nn.Module):
    """A branch's codes to features: widen, prepend a class token, attend. ``[b, n, d] -> [b, 1 + n, f]`` for
    a fixed n; token 0 is the prediction that is compared with the teacher's."""

    def __init__(self, dim: int, width: int, cells: int, layers: int, heads: int) -> None:
        super().__init__()
        self.upscale = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width))
        self.class_embedding = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + cells, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(VisionBlock(width, heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, codes: Tensor) -> Tensor:
        """See the class."""
        start = self.class_embedding.expand(codes.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([start, self.upscale(codes)], dim=1) + self.positional_embedding)
        for block in self.transformer:
            x = block(x)
        return self.ln_post(x)


class FactorizedTokenizer(RasterTokenizer):
    """See the module docstring. ``encode: [b, 3, h*f, w*f] -> Codes [b, h*w, branches]``."""

    model_type: ClassVar[str] = "factorized"
    config_class: ClassVar[type] = FactorizedTokenizerConfig
    config: FactorizedTokenizerConfig

    def __init__(self, config: FactorizedTokenizerConfig) -> None:
        super().__init__(config)
        sizes = config.quantizer.codebook_sizes * config.branches
        self.layout = CodeLayout(sizes, grid=config.grid, pattern=config.pattern)  # type: ignore[arg-type]
        self.encoder = FactorizedEncoder(config)
        self.branch_names = tuple(BRANCHES[config.branches])
        for name in self.branch_names:
            self.add_module(f"quant_conv_{name}", nn.Conv2d(config.z_channels, config.embed_dim, 1))
            self.add_module(f"quantize_{name}", config.quantizer.build(config.embed_dim))
        self.post_quant_conv = nn.Conv2d(config.branches * config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config.decoder_sizes)
        self.features = FEATURE_HEADS[config.branches] if config.feature_dims else {}
        cells = config.grid[0] * config.grid[1]
        for head, width in zip(self.features.values(), config.feature_dims):
            layers, heads = config.feature_layers, config.feature_heads
            self.add_module(head, FeatureHead(config.embed_dim, width, cells, layers, heads))

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """See `Tokenizer.forward`. Losses and metrics are summed and averaged over branches; loss
        `disentangle` comes on top in training. `features` holds what the feature heads predict."""
        latents, grid = self.branch_latents(pixels)
        outputs = {name: self.quantizer(name)(z, quantize) for name, z in latents.items()}
        output = self._merge(list(outputs.values()))
        codes = Codes(output.indices, grid)
        reconstruction = self._decode(output.quantized, codes)
        features = {
            name: self.get_submodule(head)(outputs[name].quantized) for name, head in self.features.items()
        }
        return TokenizerOutput(
            reconstruction, codes, output, torch.cat(list(latents.values()), dim=-1), features
        )

    def branch_latents(self, pixels: Tensor) -> tuple[dict[str, Tensor], tuple[int, int]]:
        """What each branch quantizes, ``[b, n, d]`` by branch name in code order, and the grid."""
        grids = {
            name: self.get_submodule(f"quant_conv_{name}")(z)
            for name, z in zip(self.branch_names, self.encoder(pixels))
        }
        h, w = grids["vis"].shape[2:]
        return {name: rearrange(grid, "b d h w -> b (h w) d") for name, grid in grids.items()}, (h, w)

    def quantizer(self, branch: str) -> Quantizer:
        """The quantizer of a branch (`vis`, `sem`, …)."""
        return self.get_submodule(f"quantize_{branch}")  # type: ignore[return-value]

    def embed(self, codes: Codes) -> Tensor:
        """See `Tokenizer.embed`: the branches' codes, concatenated."""
        columns = codes.indices.split(1, dim=-1)
        parts = [self.quantizer(name).decode(column) for name, column in zip(self.branch_names, columns)]
        return torch.cat(parts, dim=-1)

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        latents, grid = self.branch_latents(pixels)
        parts = [self.quantizer(name).encode(z.float()) for name, z in latents.items()]
        return Codes(torch.cat(parts, dim=-1), grid)

    def _merge(self, outputs: list[QuantizerOutput]) -> QuantizerOutput:
        losses = {name: torch.stack([o.losses[name] for o in outputs]).sum() for name in outputs[0].losses}
        if self.training and self.config.disentangle:
            branches = [o.quantized for o in outputs]
            losses["disentangle"] = self.config.disentangle * disentanglement(branches)
        names = outputs[0].metrics
        metrics = {name: torch.stack([o.metrics[name] for o in outputs]).mean() for name in names}
        return QuantizerOutput(
            torch.cat([o.quantized for o in outputs], dim=-1),
            torch.cat([o.indices for o in outputs], dim=-1),
            losses,
            metrics,
        )


def disentanglement(branches: list[Tensor]) -> Tensor:
    """Mean over positions and over pairs of branches of the squared cosine between their codes
    ``[b, n, d]`` (FQGAN): 0 when orthogonal, 1 when parallel."""
    cosines = [F.cosine_similarity(a, b, dim=-1) for a, b in combinations(branches, 2)]
    return torch.stack([c.pow(2).mean() for c in cosines]).mean()


# Published checkpoints.
ARGUMENTS: dict[str, Any] = {
    **LLAMAGEN_ARGUMENTS,
    "entropy_loss_ratio": 0.03,
    "image_size": 256,
    "adapter_layers": 6,
    "adapter_heads": 8,
    "feat_layers": 3,
    "feat_heads": 8,
    "disentanglement_ratio": 0.1,
    "with_disentanglement": True,
    "with_clip_supervision": True,
}
# ds8: one level fewer.
FINE = {"encoder_ch_mult": (1, 2, 2, 4), "decoder_ch_mult": (1, 2, 2, 4)}


def configure(arguments: Mapping[str, Any], branches: int) -> FactorizedTokenizerConfig:
    """FQGAN's own arguments → our config. `with_clip_supervision` is about the feature heads."""
    return FactorizedTokenizerConfig(
        **raster_options(arguments),
        image_size=arguments["image_size"],
        branches=branches,
        adapter_layers=arguments["adapter_layers"],
        adapter_heads=arguments["adapter_heads"],
        disentangle=arguments["disentanglement_ratio"] if arguments["with_disentanglement"] else 0.0,
        feature_dims=tuple(arguments["feat_dims"]) if arguments["with_clip_supervision"] else (),
        feature_layers=arguments["feat_layers"],
        feature_heads=arguments["feat_heads"],
    )


def as_stored(config: FactorizedTokenizerConfig, names: Container[str]) -> FactorizedTokenizerConfig:
    """The config without feature heads where a file holds none: they only serve training, and the publisher
    reads files without them."""
    heads = FEATURE_HEADS[config.branches].values()
    has_heads = any(f"{head}.class_embedding" in names for head in heads)
    return config if has_heads else replace(config, feature_dims=())


def _system(name: str, branches: int, feat_dims: tuple[int, ...], rows: tuple[Published, ...]) -> System:
    heads = "|".join(FEATURE_HEADS[branches].values())
    return System(
        name=name,
        arguments={**ARGUMENTS, "feat_dims": feat_dims},
        configure=partial(configure, branches=branches),
        as_stored=as_stored,
        layouts=(
            Layout(
                ignored={rf"({heads})\..*": "feature heads, of use in training only"},
                zeros={f"quantize_{branch}.codebook_used": (USAGE_WINDOW,) for branch in BRANCHES[branches]},
            ),
        ),
        rows=rows,
    )


def _row(name: str, parameters: int, tokens: str, rfid: str, **arguments: Any) -> Published:
    kind, ds = name.removeprefix("fqgan-").split("-")
    return Published(
        name=name,
        repository="ZechenBai/FQGAN",
        file=f"fqgan_{kind}_ds{ds}.pt",
        arguments=arguments,
        parameters=parameters,
        tokens=tokens,
        codebook=f"{'2' if kind == 'dual' else '3'} x 16384 x 8",
        code_licence="CC-BY-NC-4.0",
        weight_licence="not stated",
        source="arXiv 2411.16681, github.com/showlab/FQGAN",
        rfid=rfid,
    )


DUAL = _system(
    "fqgan_dual",
    2,
    (1024,),
    (
        _row("fqgan-dual-16", 150_410_131, "16x16", "0.94"),
        _row("fqgan-dual-8", 150_209_427, "32x32", "0.32", **FINE),
    ),
)
TRIPLE = _system(
    "fqgan_triple",
    3,
    (384, 768),
    (
        _row("fqgan-triple-16", 159_295_515, "16x16", "0.76"),
        _row("fqgan-triple-8", 159_586_331, "32x32", "0.24", **FINE),
    ),
)
SYSTEMS = (DUAL, TRIPLE)
