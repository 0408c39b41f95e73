"""A code as many independent bits: the quantizer of ELM's binary autoencoder (arXiv 2410.16257).

A linear map and a sigmoid make one probability per bit. Bits are drawn in training (or thresholded at 1/2,
the "deterministic" models) and thresholded by `encode`. A code's vector is the sum of the rows of its active
bits, so a table of n rows serves 2^n codes. The gradient passes straight through to the probabilities.

b batch · n positions · d latent width · c bits of a code · k sub-codes
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lexel.tokenizers.factorizer import CodeFactorizer
from lexel.tokenizers.quantizers.base import Quantizer

if TYPE_CHECKING:
    from lexel.tokenizers.quantizers.config import QuantizerConfig


class Bernoulli(Quantizer):
    """See the module docstring. With `tanh` an active bit counts +1 and an inactive one -1 instead of 0.
    generator: of the bits drawn in training; None is torch's own."""

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__(dim, config.codebook_sizes)
        bits = config.codebook_size.bit_length() - 1
        self.factorizer = CodeFactorizer(config.groups or (bits,), msb_first=True)
        self.deterministic = config.deterministic
        self.tanh = config.tanh
        self.commitment = config.commitment
        self.proj = nn.Linear(dim, bits)
        self.embed = nn.Embedding(bits, dim)
        self.generator: torch.Generator | None = None

    def learn(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Quantizer.learn`; loss `code` where `commitment` gives it a weight."""
        values = self.values(latents)
        bits = self.bits(latents) if self.deterministic else self.draw(latents, self.generator)
        straight = values + (self._signed(bits) - values).detach()
        losses = {"code": self.commitment * code_loss(values)} if self.commitment else {}
        return straight @ self.embed.weight.float(), self.factorizer.from_bits(bits), losses

    def encode(self, latents: Tensor) -> Tensor:
        """See `Quantizer.encode`: the likelier value of every bit."""
        return self.factorizer.from_bits(self.bits(latents.float()))

    def decode(self, indices: Tensor) -> Tensor:
        """See `Quantizer.decode`."""
        return self._signed(self.factorizer.to_bits(indices)) @ self.embed.weight.float()

    def bypass(self, latents: Tensor) -> Tensor:
        """The sum of all rows, each weighted by its bit's expected value."""
        return self.values(latents) @ self.embed.weight.float()

    def values(self, latents: Tensor) -> Tensor:
        """``[b, n, d] -> [b, n, c]``, the expected value of every bit: its probability, or within (-1, 1)
        with `tanh`."""
        logits = self.proj(latents)
        return logits.tanh() if self.tanh else logits.sigmoid()

    def probabilities(self, latents: Tensor) -> Tensor:
        """``[b, n, d] -> [b, n, c]``, how likely every bit is active."""
        values = self.values(latents)
        return (values + 1) / 2 if self.tanh else values

    def bits(self, latents: Tensor) -> Tensor:
        """``[b, n, d]`` to bool ``[b, n, c]``: active where the probability is above 1/2."""
        return self.probabilities(latents) > 0.5

    @torch.no_grad()
    def draw(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``[b, n, d]`` to bool ``[b, n, c]``: one draw of every bit. A generator on another device than the
        latents (a CPU one repeats everywhere) is welcome."""
        chances = self.probabilities(latents)
        device = latents.device if generator is None else generator.device
        return torch.rand(chances.shape, generator=generator, device=device).to(latents.device) < chances

    def _signed(self, bits: Tensor) -> Tensor:
        return bits.float() * 2 - 1 if self.tanh else bits.float()


def code_loss(values: Tensor) -> Tensor:
    """Mean of s (1 - s) over all bits, s the sigmoid of what already went through a sigmoid: as published,
    where its weight is 0."""
    twice = values.sigmoid()
    return (twice * (1 - twice)).mean()
