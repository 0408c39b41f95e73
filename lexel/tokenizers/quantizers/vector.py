"""Quantizers with a codebook of vectors: VQ, residual VQ, SimVQ.

State lives in the library's modules (`library._codebook.embed` and so on are buffers).

b batch · n positions · k codebooks per position · d latent width · K codebook size

In every class `library` is the module of vector-quantize-pytorch; the name is part of saved weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ, SimVQ, VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import sample_vectors_distributed

from lexel.tokenizers.quantizers.base import Quantizer, nearest_code

if TYPE_CHECKING:
    from lexel.tokenizers.quantizers.config import QuantizerConfig


class VQ(Quantizer):
    """One EMA codebook (VectorQuantize). With `cosine`, latents and codes have unit length."""

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__(dim, config.codebook_sizes)
        self.cosine = config.cosine
        self.library = VectorQuantize(
            dim=dim,
            codebook_size=config.codebook_size,
            use_cosine_sim=config.cosine,
            rotation_trick=config.rotation,
            **_ema_options(config),
        )

    def learn(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Quantizer.learn`; loss `commitment`."""
        _synchronise(self.library)
        quantized, indices, loss = self.library(latents)
        return quantized, indices[..., None], {"commitment": loss.sum()}

    def encode(self, latents: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        return nearest_code(latents, self.library.codebook, self.cosine)[..., None]

    def decode(self, indices: Tensor) -> Tensor:
        """See `Quantizer.decode`."""
        return self.library.codebook[indices[..., 0]]

    def bypass(self, latents: Tensor) -> Tensor:
        """The latents, of unit length when codes are."""
        return F.normalize(latents, dim=-1) if self.cosine else latents


class Residual(Quantizer):
    """`depth` EMA codebooks, each on what the ones before left over (ResidualVQ, Euclidean)."""

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__(dim, config.codebook_sizes)
        self.library = ResidualVQ(
            dim=dim,
            num_quantizers=config.depth,
            codebook_size=config.codebook_size,
            rotation_trick=False,
            **_ema_options(config),
        )

    def learn(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Quantizer.learn`; loss `commitment` (mean over depth)."""
        for layer in self.library.layers:
            _synchronise(layer)
        quantized, indices, losses = self.library(latents)
        # The library adds one straight-through gradient per layer; the sum should count once.
        quantized = latents + (quantized - latents).detach()
        return quantized, indices, {"commitment": losses.mean()}

    def encode(self, latents: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        indices, residual = [], latents.detach()
        for layer in self.library.layers:
            indices.append(nearest_code(residual, layer.codebook, cosine=False))
            residual = residual - layer.codebook[indices[-1]]
        return torch.stack(indices, dim=-1)

    def decode(self, indices: Tensor) -> Tensor:
        """See `Quantizer.decode`: the sum of the k codes."""
        codes = [layer.codebook[indices[..., j]] for j, layer in enumerate(self.library.layers)]
        return torch.stack(codes).sum(0)

    def bypass(self, latents: Tensor) -> Tensor:
        """The latents."""
        return latents


class Sim(Quantizer):
    """A frozen random codebook seen through one learned linear map, so that every code moves at each step
    and none dies (SimVQ)."""

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__(dim, config.codebook_sizes)
        self.library = SimVQ(
            dim=dim,
            codebook_size=config.codebook_size,
            rotation_trick=config.rotation,
            input_to_quantize_commit_loss_weight=config.commitment,
        )

    def learn(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Quantizer.learn`; loss `codebook` (codes towards latents, plus the weighted commitment)."""
        quantized, indices, loss = self.library(latents)
        return quantized, indices[..., None], {"codebook": loss}

    def encode(self, latents: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        return nearest_code(latents, self.library.codebook, cosine=False)[..., None]

    def decode(self, indices: Tensor) -> Tensor:
        """See `Quantizer.decode`."""
        return self.library.codebook[indices[..., 0]]

    def bypass(self, latents: Tensor) -> Tensor:
        """The latents."""
        return latents


def _ema_options(config: QuantizerConfig) -> dict[str, float | bool]:
    return {
        "decay": config.decay,
        "commitment_weight": config.commitment,
        "threshold_ema_dead_code": config.dead_below,
        "kmeans_init": config.kmeans_init,
        "sync_codebook": False,
    }


def _synchronise(quantizer: VectorQuantize) -> None:
    # The library looks for a process group once, when it is constructed; a trainer opens it later.
    # Without this the codebooks of several processes would drift apart (FSDP2 broadcasts no buffers).
    codebook = quantizer._codebook
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not codebook.use_ddp:
        codebook.use_ddp = True
        codebook.all_reduce_fn = codebook.kmeans_all_reduce_fn = dist.all_reduce
        codebook.sample_fn = codebook.replace_sample_fn = sample_vectors_distributed
