"""Next-token prediction with a second task beside it: say which tokens are still to come, in any order.

TokenUnify (arXiv:2405.16847) names three tasks, of which "next-all" is
``-sum_i sum_{j >= i} log p(x_j | x_<i)`` over the voxels of a volume; its released code holds the other two
only. What follows is derived anew, for discrete tokens: a set-prediction head q gives at each position one
distribution, meant to be that of a token drawn at random from those that remain of the span (a text, a
picture),

    L = L_next + next_all · mean_i ( -1/(n - i + 1) · sum_{j = i..n} log q(x_j | x_<i) ),

normalised per position, so that the first ones do not outweigh the last. q is
``softmax(E (h + silu(W h + b)))`` with h the model's last hidden state and E its own output table, as in
`FutureHeads`. W and b belong to the objective and are thrown away after training: the model is the same with
and without.

b batch · l positions · m positions that have a target · v vocabulary · d width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.train.objectives.lm import NextTokenObjective, predicting
from lexel.train.processes import mean_over_processes
from lexel.types import LMOutput, TokenBatch


class NextAllObjective(NextTokenObjective):
    """`NextTokenObjective` plus the term above with the weight `next_all`, over column 0 of targets; the
    weights of modalities hold for it, too. Call `prepare` before the first forward pass. Raises ValueError
    for a negative weight."""

    def __init__(
        self,
        modalities: Sequence[str] = ("text", "image"),
        weights: Mapping[str, float] | None = None,
        z_loss: float = 0.0,
        future_weight: float = 0.2,
        future_decay: float = 0.8,
        next_all: float = 0.1,
    ) -> None:
        super().__init__(modalities, weights, z_loss, future_weight, future_decay)
        if next_all < 0:
            raise ValueError(f"next_all must not be negative, got {next_all}.")
        self.next_all = next_all
        self.head: nn.Linear | None = None

    def prepare(self, dim: int) -> None:
        """Make the head for a model of width `dim`. It starts at zero: as the model's own next-token
        distribution."""
        self.head = nn.Linear(dim, dim)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        output: LMOutput,
        batch: TokenBatch,
        *,
        code_offsets: Sequence[int] = (),
        pad_id: int = 0,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `NextTokenObjective.forward`, and the metric ``next_all``. project: hidden states ``[m, d]`` →
        logits ``[m, v]`` by the model's output table."""
        loss, metrics = super().forward(output, batch, code_offsets=code_offsets, pad_id=pad_id)
        if self.head is None or project is None:
            raise ValueError("next-all needs its head (prepare) and the model's output table (project).")
        select = predicting(batch)
        hidden = output.hidden[select]
        logits = project(hidden + F.silu(self.head(hidden))).float()
        own = bag_loss(logits, batch, select)
        weight = self.weights[batch.modality.roll(-1, 1)[select]]
        term = (weight * own).sum() / mean_over_processes(weight.sum()).clamp(min=1e-12)
        return loss + self.next_all * term, {**metrics, "next_all": term.detach()}


def bag_loss(logits: Tensor, batch: TokenBatch, select: Tensor) -> Tensor:
    """Mean of ``-log q(x_j)`` over the tokens that remain of the span, float ``[m]``, for logits ``[m, v]``
    at the positions of `select` bool ``[b, l]``, each of which is followed by a target."""
    ids = batch.first
    row, place = select.nonzero(as_tuple=True)
    targets = spans(batch)
    later = torch.arange(ids.shape[1], device=ids.device) > place[:, None]
    remaining = later & (targets[row] == targets[row, place + 1][:, None])
    scores = logits.gather(1, ids[row])
    return logits.logsumexp(1) - (scores * remaining).sum(1) / remaining.sum(1)


def spans(batch: TokenBatch) -> Tensor:
    """Long ``[b, l]``: the number of the span of targets that each position belongs to, -1 for what is no
    target. A span ends with its text or picture, with its document, and where targets end."""
    targets = (
        torch.ones_like(batch.modality, dtype=torch.bool) if batch.loss_mask is None else batch.loss_mask
    )
    starts = torch.ones_like(targets)
    same = (batch.modality[:, 1:] == batch.modality[:, :-1]) & (targets[:, 1:] == targets[:, :-1])
    starts[:, 1:] = ~same | (batch.positions[:, 1:, 0] <= batch.positions[:, :-1, 0])
    return starts.cumsum(1).masked_fill(~targets, -1)
