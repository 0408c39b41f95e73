"""What every detokenizer satisfies: codes (or features) and noise to pictures.

b batch · n code positions · m feature positions · f feature width · H W picture
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from lexel.hub import Pretrained
from lexel.types import Codes

# What a detokenizer is given: discrete codes, or float features [b, m, f] that a tokenizer computes of them.
Condition = Codes | Tensor


class Detokenizer(nn.Module, Pretrained, ABC):
    """Base of all detokenizers: networks that draw pictures where a tokenizer has no decoder, or a worse one.

    reads: "codes" (`Codes` as the tokenizer made them) or "features" (float ``[b, m, f]`` of the tokenizer's
    `decode_features`; whoever pairs the two computes them). A class says it once, or an instance by its
    config. reads_text: whether `decode` takes ``text``, one caption or None per picture. Laws: the same noise
    gives the same picture, and a row of a batch equals that row alone.
    """

    reads: Literal["codes", "features"] = "codes"
    reads_text: bool = False

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the pictures it draws."""

    @abstractmethod
    def decode(
        self,
        condition: Condition,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Pictures float ``[b, 3, H, W]`` in [-1, 1].

        condition: what it `reads`. steps: of the sampler (None: the config's). guidance: scale of the
        conditional over the null prediction (None: the config's; 1: conditional only). noise: the start of
        the sampler, in the shape the class states; None: drawn from `generator`.
        Raises ValueError for a condition of another shape."""
