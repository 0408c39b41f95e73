"""Quantizers without a stored codebook: FSQ (a grid of levels) and LFQ (signs).

b batch · n positions · d latent width · c code width (levels of FSQ, bits of LFQ)

In every class `library` is the module of vector-quantize-pytorch; the name is part of saved weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vector_quantize_pytorch import FSQ, LFQ

from lexel.tokenizers.quantizers.base import Quantizer

if TYPE_CHECKING:
    from lexel.tokenizers.quantizers.config import QuantizerConfig


class FiniteScalar(Quantizer):
    """FSQ: each of the c bounded channels is rounded to one of its levels. Linear maps between d and c
    where they differ. No loss, no dead codes."""

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__(dim, config.codebook_sizes)
        # It reads its tables' values while it is built, which tensors on the meta device do not have.
        with torch.device("cpu"):
            self.library = FSQ(levels=list(config.levels), dim=dim)

    def learn(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Quantizer.learn`; no losses."""
        quantized, indices = self.library(latents)
        return quantized, indices.long()[..., None], {}

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        return self.library(latents.float())[1].long()[..., None]

    def decode(self, indices: Tensor) -> Tensor:
        """See `Quantizer.decode`."""
        return self.library.indices_to_codes(indices[..., 0])

    def bypass(self, latents: Tensor) -> Tensor:
        """FSQ's bounding function without the rounding."""
        levels = self.library._levels
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = 0.5 * (levels % 2 == 0)
        bounded = torch.tanh(self.library.project_in(latents) + torch.atanh(offset / half)) * half - offset
        return self.library.project_out(bounded / (levels // 2))


class LookupFree(Quantizer):
    """LFQ: the signs of c = log2(codebook_size) channels. Linear maps between d and c where they differ.
    The entropy term spans the whole codebook: keep it below about 2^14 codes."""

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__(dim, config.codebook_sizes)
        self.library = LFQ(
            dim=dim,
            codebook_size=config.codebook_size,
            entropy_loss_weight=config.entropy,
            diversity_gamma=config.entropy_gamma,
            commitment_loss_weight=config.commitment,
        )

    def learn(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Quantizer.learn`; loss `entropy` (the weighted entropy term plus commitment)."""
        quantized, indices, loss = self.library(latents)
        return quantized, indices.long()[..., None], {"entropy": loss}

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        signs = self.library.project_in(latents.float()) > 0
        return (signs.long() * self.library.mask).sum(-1, keepdim=True)

    def decode(self, indices: Tensor) -> Tensor:
        """See `Quantizer.decode`."""
        return self.library.indices_to_codes(indices[..., 0])

    def bypass(self, latents: Tensor) -> Tensor:
        """tanh in place of the sign."""
        return self.library.project_out(torch.tanh(self.library.project_in(latents)))
