"""A codebook that gradients train: the quantizer of LlamaGen, FQGAN, TiTok, Chameleon and Janus.

Own arithmetic, because published files keep their rows under `embedding.weight` and vector-quantize-pytorch
has no such layout. Formulas: FoundationVision/LlamaGen, `VectorQuantizer`.

b batch · n positions · d latent width · K codebook size
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.tokenizers.quantizers.base import Quantizer, nearest_code

if TYPE_CHECKING:
    from lexel.tokenizers.quantizers.config import QuantizerConfig

TEMPERATURE = 0.01  # of the soft assignment inside the entropy term


class Learned(Quantizer):
    """Nearest row of a plain embedding table. With `cosine`, latents and rows are normalised at every use:
    stored rows are not of unit length."""

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__(dim, config.codebook_sizes)
        self.cosine = config.cosine
        self.commitment = config.commitment
        self.pull = config.pull
        self.entropy = config.entropy
        self.make_rows(config.codebook_size, dim)

    def make_rows(self, size: int, dim: int) -> None:
        """Set the parameters of `size` rows of width `dim`."""
        self.embedding = self.table(size, dim)

    def table(self, size: int, dim: int) -> nn.Embedding:
        """Rows drawn evenly around 0, at unit length with `cosine`."""
        table = nn.Embedding(size, dim)
        nn.init.uniform_(table.weight, -1 / size, 1 / size)
        if self.cosine:
            with torch.no_grad():
                table.weight.copy_(F.normalize(table.weight, dim=-1))
        return table

    @property
    def codebook(self) -> Tensor:
        """The rows as they are compared and returned, ``[K, d]``."""
        return self.bypass(self.embedding.weight.float())

    def learn(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Quantizer.learn`; losses `codebook` (rows towards latents), `commitment` and, where it has a
        weight, `entropy`."""
        latents, codebook = self.bypass(latents), self.codebook
        indices = self.choose(latents, codebook)
        codes = F.embedding(indices, codebook)
        losses = {
            "codebook": self.pull * (codes - latents.detach()).pow(2).mean(),
            "commitment": self.commitment * (codes.detach() - latents).pow(2).mean(),
        }
        if self.entropy:
            losses["entropy"] = self.entropy * entropy_gap(-squared_distances(latents, codebook))
        return latents + (codes - latents).detach(), indices[..., None], losses

    def choose(self, latents: Tensor, codebook: Tensor) -> Tensor:
        """Which row each of the latents ``[b, n, d]`` takes in training, long ``[b, n]``."""
        return nearest_code(latents, codebook, self.cosine)

    def encode(self, latents: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        return nearest_code(self.bypass(latents.float()), self.codebook, self.cosine)[..., None]

    def decode(self, indices: Tensor) -> Tensor:
        """See `Quantizer.decode`."""
        return F.embedding(indices[..., 0], self.codebook)

    def bypass(self, latents: Tensor) -> Tensor:
        """The latents, of unit length when codes are."""
        return F.normalize(latents, dim=-1) if self.cosine else latents


def squared_distances(latents: Tensor, codebook: Tensor) -> Tensor:
    """``[b, n, d], [K, d] -> [b * n, K]``."""
    rows = rearrange(latents, "b n d -> (b n) d")
    return rows.pow(2).sum(1, keepdim=True) + codebook.pow(2).sum(1) - 2 * rows @ codebook.T


def entropy_gap(affinity: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Mean entropy of each position's soft assignment minus the entropy of their mean: low when every
    position is sure and all codes are used. affinity: ``[positions, K]``, larger is closer; scalar (nats)."""
    each, mean = assignment_entropies(affinity, temperature)
    return each - mean


def assignment_entropies(affinity: Tensor, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor]:
    """The two halves of `entropy_gap`: the mean entropy of the positions and that of their mean."""
    shares = F.softmax(affinity / temperature, dim=-1)
    each = -(shares * F.log_softmax(affinity / temperature, dim=-1)).sum(1).mean()
    mean = shares.mean(0)
    return each, -(mean * (mean + 1e-5).log()).sum()
