"""How much a nested submodel agrees with the whole model: what decides how many of its drafts are accepted.

b batch · l positions · v vocabulary · m positions
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.models.causal_lm import CausalLM
from lexel.types import TokenBatch


@dataclass(frozen=True)
class Consistency:
    """agreement: share of positions at which both models think the same id most probable (of column 0);
    divergence: mean KL(whole ‖ nested) in nats; positions: how many were compared."""

    agreement: float
    divergence: float
    positions: int


@torch.no_grad()
def consistency(lm: CausalLM, batches: Iterable[tuple[TokenBatch, Tensor]], width: float) -> Consistency:
    """Compare the model at `width` with the whole one on the same prefixes. batches: sequences, each with the
    positions whose next token counts, bool ``[b, l]``. Raises ValueError when none does."""
    device = next(lm.parameters()).device
    equal, divergence, positions = 0, 0.0, 0
    for batch, select in batches:
        batch, select = batch.to(device), select.to(device)
        whole, nested = (
            lm(batch, width=fraction, select=select).logits.float() for fraction in (None, width)
        )
        equal += int((whole.argmax(-1) == nested.argmax(-1)).sum())
        divergence += float(
            F.kl_div(nested.log_softmax(-1), whole.log_softmax(-1), reduction="sum", log_target=True)
        )
        positions += len(whole)
    if not positions:
        raise ValueError("there is no position to compare the two models at.")
    return Consistency(equal / positions, divergence / positions, positions)
