"""Training the table that guesses codes from their neighbours.

b batch · l positions · k codebooks
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lexel.data.tokenized import CodeExample
from lexel.tokenizers.layout import CodeLayout
from lexel.train.module import Metrics, StageModule
from lexel.types import Codes


class NeighbourModule(StageModule):
    """A `NeighbourTable` and the cross-entropy of the codes. Batches are `Codes`; ``bits``: per code."""

    def compute(self, network: Any, batch: Codes) -> tuple[Tensor, Metrics]:
        """The mean over the codes in use."""
        loss = network.loss(batch).mean()
        return loss, {"bits": loss.detach() / math.log(2)}


def stack_codes(examples: Sequence[CodeExample], layout: CodeLayout) -> Codes:
    """Stored codes of `layout` as a batch."""
    lengths = [example.length for example in examples if example.length is not None]
    return Codes(
        torch.stack([example.codes for example in examples]),
        layout.grid,
        layout.scales,
        torch.tensor(lengths) if lengths else None,
    )
