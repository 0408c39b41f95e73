"""Look-up free quantization as Open-MAGVIT2 publishes it: the signs of the channels are the code.

Own arithmetic, because vector-quantize-pytorch's LFQ (kind `lfq`) differs in what published codes and losses
depend on: its first channel is the *most* significant bit, its entropies clamp the logarithm where the
published ones add to it, and it builds all ``positions * K`` assignments: for 2^18 codes 2 GB per 8 pictures
of 256 positions, several times over with gradients. Formulas: TencentARC/SEED-Voken, `LFQ` (papers
2310.05737, 2409.04410).

b batch · n positions · d latent width · K codes
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.tokenizers.factorizer import CodeFactorizer
from lexel.tokenizers.quantizers.base import Quantizer

if TYPE_CHECKING:
    from lexel.tokenizers.quantizers.config import QuantizerConfig

EPSILON = 1e-5  # inside the logarithm of the mean assignment, as published
MAX_ENTROPY_BITS = 24  # the mean assignment has 2^bits entries


class Sign(Quantizer):
    """A channel above 0 is the bit 1 and the value +1, any other the bit 0 and -1; channel i has weight
    2^i (in its group, where there are `groups`). Linear maps between d channels and log2(codebook_size) bits
    where they differ; published latents have one channel per bit, and then there are no weights here."""

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__(dim, config.codebook_sizes)
        bits = config.codebook_size.bit_length() - 1
        if config.entropy and bits > MAX_ENTROPY_BITS:
            raise ValueError(f"the entropy term allows up to {MAX_ENTROPY_BITS} bits, got {bits}.")
        self.project_in = nn.Linear(dim, bits) if dim != bits else nn.Identity()
        self.project_out = nn.Linear(bits, dim) if dim != bits else nn.Identity()
        self.factorizer = CodeFactorizer(config.groups or (bits,), msb_first=False)
        self.config = config

    def learn(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Quantizer.learn`; losses `commitment` and, where it has a weight, `entropy`."""
        config = self.config
        latents = self.project_in(latents)
        signs = torch.where(latents > 0, 1.0, -1.0)
        losses = {"commitment": config.commitment * (latents - signs).pow(2).mean()}
        if config.entropy:
            each, mean = sign_entropies(latents, config.temperature)
            losses["entropy"] = config.entropy * (
                config.entropy_certainty * each - config.entropy_gamma * mean
            )
        quantized = self.project_out(latents + (signs - latents).detach())
        return quantized, self.factorizer.from_bits(latents > 0), losses

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        return self.factorizer.from_bits(self.project_in(latents.float()) > 0)

    def decode(self, indices: Tensor) -> Tensor:
        """See `Quantizer.decode`."""
        return self.project_out(self.factorizer.to_bits(indices) * 2.0 - 1)

    def bypass(self, latents: Tensor) -> Tensor:
        """tanh in place of the sign."""
        return self.project_out(torch.tanh(self.project_in(latents)))


def sign_entropies(latents: Tensor, temperature: float = 0.01) -> tuple[Tensor, Tensor]:
    """Two entropies (scalars, nats) of the soft assignment ``softmax_c(2 x.c / temperature)`` of latents x
    ``[b, n, d]`` to all 2^d sign vectors c: the mean over positions, and that of the mean assignment.

    The 2^d probabilities of a position are products of d independent ones, sigmoid(4 x_i / temperature). So
    the first entropy is a sum over bits, and the mean assignment one matrix product of two halves of the
    bits: exact, with ``positions * 2^(d/2)`` numbers in memory in place of ``positions * 2^d``.
    """
    logits = rearrange(latents, "b n d -> (b n) d") * (4 / temperature)
    sure = logits.abs()  # the entropy of a bit is even in its logit, and exact to compute for positive ones
    each = (F.softplus(-sure) + sure * torch.sigmoid(-sure)).sum(1).mean()
    low, high = (_joint(half) for half in logits.tensor_split(2, dim=1))
    mean = low.T @ high / len(logits)
    return each, -(mean * (mean + EPSILON).log()).sum()


def _joint(logits: Tensor) -> Tensor:
    """Bits' logits ``[positions, m]`` to the probabilities of their combinations ``[positions, 2^m]``."""
    joint = logits.new_ones(len(logits), 1)
    for zero, one in zip(torch.sigmoid(-logits).unbind(1), torch.sigmoid(logits).unbind(1), strict=True):
        joint = torch.cat([joint * zero[:, None], joint * one[:, None]], dim=1)
    return joint
