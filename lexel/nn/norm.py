"""Normalisation layers.

d width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, ``[..., d] -> [..., d]`` in the input's dtype.

    Zhang & Sennrich, arXiv:1910.07467. Statistics are float32 whatever the input. offset: what is added to
    the weight (Gemma keeps its norms' weights minus one); the sum, one at first, is float32 too.
    """

    def __init__(self, dim: int, eps: float = 1e-5, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 1 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        if self.offset:
            exact = torch.promote_types(self.weight.dtype, torch.float32)
            weight = self.weight.to(exact) + self.offset
            return F.rms_norm(x.to(exact), weight.shape, weight, self.eps).to(x.dtype)
        # Under autocast a bfloat16 input meets a float32 weight; torch fuses only equal dtypes, and takes
        # the statistics of half precision inputs in float32 itself.
        y = F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        return y.to(x.dtype)
