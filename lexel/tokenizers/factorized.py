"""Factorized raster tokenizer: several small codebooks per cell instead of one large one.

FQGAN (arXiv 2411.16681, showlab/FQGAN): LlamaGen's encoder up to `mid` is shared; each branch then has its
own transformer adapter, output convolution and codebook; one decoder reads the concatenated codes. A
disentanglement term keeps the branches' codes orthogonal. Module names are the published ones. Codebook
order is that of the concatenation and of the published language models: vis, sem (dual) or vis, sem_mid,
sem_high (triple). Teachers for the published representation loss live in the objective
(`RepresentationTerm`); `FactorizedTokenizer.columns` says which latents belong to a branch.

b batch · n = h*w positions · k branches · d latent width of one branch
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.nn.conv import Decoder, EncoderTrunk, group_norm
from lexel.nn.vit import TokenAdapter
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import Quantizer
from lexel.tokenizers.vq import RasterConfig, RasterTokenizer
from lexel.types import Codes, QuantizerOutput, TokenizerOutput

# Branch suffix -> name of its adapter in the encoder, in concatenation order.
BRANCHES = {
    2: {"vis": "visual_head", "sem": "semantic_head"},
    3: {"vis": "visual_head", "sem_mid": "semantic_head_mid", "sem_high": "semantic_head_high"},
}


@dataclass(frozen=True)
class FactorizedTokenizerConfig(RasterConfig):
    """RasterConfig (its quantizer is built once per branch, `embed_dim` wide each) plus:

    branches: 2 or 3. adapter_layers, adapter_heads: each branch's transformer (0 layers: none).
    disentangle: weight r of the mean squared cosine between branches' codes (published 0.1).
    pattern: how a language model sees the branches' codes (`CodeLayout.pattern`).
    Raises ValueError for another number of branches or a quantizer with several codebooks.
    """

    branches: int = 2
    adapter_layers: int = 6
    adapter_heads: int = 8
    disentangle: float = 0.1
    pattern: str = "parallel"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches not in BRANCHES:
            raise ValueError(f"branches must be 2 or 3, got {self.branches}.")
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
                F.silu(self.get_submodule(f"norm_out_{name}")(self.get_submodule(head)(shared)))
            )
            for name, head in self.branches.items()
        )


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

    def columns(self, branch: str) -> tuple[int, int]:
        """(start, stop) of a branch (`vis`, `sem`, …) in the concatenated latents ``[b, n, k*d]``."""
        start = self.branch_names.index(branch) * self.config.embed_dim
        return start, start + self.config.embed_dim

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """See `Tokenizer.forward`. Losses and metrics are summed and averaged over branches; loss
        `disentangle` comes on top in training."""
        latents, grid = self._latents(pixels)
        outputs = [q(z, quantize) for q, z in zip(self._quantizers(), latents)]
        output = self._merge(outputs)
        codes = Codes(output.indices, grid)
        reconstruction = self._decode(output.quantized, codes)
        return TokenizerOutput(reconstruction, codes, output, torch.cat(latents, dim=-1))

    def embed(self, codes: Codes) -> Tensor:
        """See `Tokenizer.embed`: the branches' codes, concatenated."""
        parts = [q.decode(codes.indices[..., j : j + 1]) for j, q in enumerate(self._quantizers())]
        return torch.cat(parts, dim=-1)

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        latents, grid = self._latents(pixels)
        parts = [q.encode(z.float()) for q, z in zip(self._quantizers(), latents)]
        return Codes(torch.cat(parts, dim=-1), grid)

    def _latents(self, pixels: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        grids = [
            self.get_submodule(f"quant_conv_{name}")(z)
            for name, z in zip(self.branch_names, self.encoder(pixels))
        ]
        size = (grids[0].shape[2], grids[0].shape[3])
        return [rearrange(grid, "b d h w -> b (h w) d") for grid in grids], size

    def _quantizers(self) -> list[Quantizer]:
        return [self.get_submodule(f"quantize_{name}") for name in self.branch_names]  # type: ignore[misc]

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
