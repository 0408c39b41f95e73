"""Index backpropagation quantization (IBQ): the choice of a row is differentiable, so every row is trained.

Own arithmetic: vector-quantize-pytorch has no such quantizer. Formulas: TencentARC/SEED-Voken,
`IndexPropagationQuantize` (paper 2412.02692).

b batch · n positions · d latent width · K codebook size
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.tokenizers.quantizers.base import Quantizer, nearest_code
from lexel.tokenizers.quantizers.learned import assignment_entropies

if TYPE_CHECKING:
    from lexel.tokenizers.quantizers.config import QuantizerConfig


class IndexBackpropagation(Quantizer):
    """The row with the largest plain dot product (no norms, no distance). Going back, the choice is the
    softmax of those products: unlike in other kinds, the gradient at the latents is not that at the codes."""

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__(dim, config.codebook_sizes)
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, dim)

    def learn(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Quantizer.learn`; losses `quantized` (both sides), `commitment` (latents towards rows),
        `codebook` (rows towards latents) and, where it has a weight, `entropy`."""
        config, rows = self.config, self.embedding.weight.float()
        logits = latents @ rows.T
        indices = logits.argmax(-1)
        chosen = F.embedding(indices, rows)
        # (onehot + soft - sg(soft)) @ rows, without a one-hot: the rows' own share of soft - sg(soft) is
        # zero.
        soft = logits.softmax(-1) @ rows.detach()
        quantized = chosen + (soft - soft.detach())
        losses = {
            "quantized": (quantized - latents).pow(2).mean(),
            "commitment": (chosen.detach() - latents).pow(2).mean(),
            "codebook": config.commitment * (chosen - latents.detach()).pow(2).mean(),
        }
        if config.entropy:
            each, mean = assignment_entropies(rearrange(logits, "b n k -> (b n) k"), config.temperature)
            losses["entropy"] = config.entropy * (
                config.entropy_certainty * each - config.entropy_gamma * mean
            )
        return quantized, indices[..., None], losses

    def encode(self, latents: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        return nearest_code(latents.float(), self.embedding.weight.float(), cosine=True)[..., None]

    @torch.no_grad()
    def logits(self, latents: Tensor) -> Tensor:
        """``[..., d] -> [..., K]``, what the choice is made from."""
        return latents.float() @ self.embedding.weight.float().T

    def decode(self, indices: Tensor) -> Tensor:
        """See `Quantizer.decode`."""
        return F.embedding(indices[..., 0], self.embedding.weight.float())

    def bypass(self, latents: Tensor) -> Tensor:
        """The latents themselves."""
        return latents
