"""LeCam regularisation of a discriminator (paper 2104.03310): few pictures, or long training, let it grow too
sure; this holds its verdicts near the averages of the other side's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeCam(nn.Module):
    """The averages of the verdicts on real and made pictures, from 0 on, moved before each use, as
    TencentARC/SEED-Voken does. They are buffers, so an interrupted training goes on with them."""

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Logits on real and on made pictures, any shape, to the unweighted term (scalar): how far real ones
        exceed the average made one, and made ones fall below the average real one, squared."""
        with torch.no_grad():
            self.real.lerp_(real.detach().float().mean(), 1 - self.decay)
            self.fake.lerp_(fake.detach().float().mean(), 1 - self.decay)
        # Copies: the averages move on before the gradient is taken when micro-batches accumulate.
        average_real, average_fake = self.real.clone(), self.fake.clone()
        return F.relu(real - average_fake).pow(2).mean() + F.relu(average_real - fake).pow(2).mean()
