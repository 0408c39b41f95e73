"""Stochastic vector quantization: training draws a row by its likeness to the latent (LARP, arXiv 2410.21264,
github.com/hywang66/LARP), so that rows near the nearest one learn too and the decoder learns to bear them.

b batch · n positions · d latent width · K codebook size
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.tokenizers.quantizers.learned import Learned

if TYPE_CHECKING:
    from lexel.tokenizers.quantizers.config import QuantizerConfig

START = 10.0  # of an inverse temperature that is a parameter


class Stochastic(Learned):
    """`Learned` by direction; in training the row is a draw from ``softmax(cosines / temperature)``. In eval
    mode and in `encode` it is the nearest row, as everywhere.

    temperature may be set from outside between steps (annealing), unless it is a parameter, which published
    files may hold (a draw passes no gradient on to it). generator: of the draws in training; None is torch's
    own."""

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__(dim, config)
        self.temperature = config.temperature
        self.inverse_temperature = nn.Parameter(torch.tensor(START)) if config.temperature < 0 else None
        self.generator: torch.Generator | None = None

    def chances(self, latents: Tensor) -> Tensor:
        """Latents ``[b, n, d]`` to the chance of each row ``[b, n, K]``."""
        cosines = self.bypass(latents.float()) @ self.codebook.T
        scale = 1 / self.temperature if self.inverse_temperature is None else self.inverse_temperature
        return F.softmax(cosines * scale, dim=-1)

    @torch.no_grad()
    def draw(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``[b, n, d]`` to long ``[b, n]``: one draw per position. A generator on another device than the
        latents' is drawn from there."""
        chances = rearrange(self.chances(latents), "b n k -> (b n) k")
        device = chances.device if generator is None else generator.device
        drawn = torch.multinomial(chances.to(device), 1, generator=generator).to(latents.device)
        return rearrange(drawn, "(b n) 1 -> b n", b=len(latents))

    def choose(self, latents: Tensor, codebook: Tensor) -> Tensor:
        """See `Learned.choose`; a draw."""
        return self.draw(latents, self.generator)
