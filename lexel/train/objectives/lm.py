"""The language model's objective: next-token cross-entropy, weighted and reported per modality, and the same
for the heads of further tokens.

b batch · l positions · k codes per position · v vocabulary · m positions that have a target
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.train.processes import mean_over_processes
from lexel.types import LMOutput, TokenBatch


def predicting(batch: TokenBatch) -> Tensor:
    """Bool ``[b, l]``: positions whose following position is a training target. Give it to
    `CausalLM.forward(select=...)` so that no other logits are computed."""
    wanted = torch.ones_like(batch.modality, dtype=torch.bool) if batch.loss_mask is None else batch.loss_mask
    return F.pad(wanted[:, 1:], (0, 1))


def predicting_further(batch: TokenBatch, distance: int) -> Tensor:
    """Bool ``[b, l]``: positions of `predicting` whose token `distance` places on is a training target of the
    same document, that is one which may look back at the position (plain causal attention: any)."""
    length = batch.modality.shape[1]
    if distance >= length:
        return torch.zeros_like(batch.modality, dtype=torch.bool)
    known = predicting(batch)[:, : length - distance]
    if batch.loss_mask is not None:
        known = known & batch.loss_mask[:, distance:]
    if batch.attention_mask is not None:
        known = known & batch.attention_mask.diagonal(-distance, 1, 2)
    return F.pad(known, (0, distance))


class NextTokenObjective(nn.Module):
    """``sum_m w_m · CE_m / sum_m w_m · count_m`` over modalities m, plus ``z_loss · mean(log Z ** 2)``.

    CE_m sums the cross-entropies of the targets of modality m and count_m counts them, so that weight 1
    everywhere is the plain mean per token. Every column of a position counts as one target. With several
    processes the counts are their means over the processes: the mean of all losses is then that of one
    process with all the targets.
    modalities: names in the order of `TokenBatch.modality`; weights: per name, 1.0 where absent.
    z_loss: weight of the squared log-partition (PaLM, arXiv:2204.02311), over column 0.
    future_weight, future_decay: where the output has logits of further tokens, the i-th head (from 1, token
    t + 1 + i) adds ``future_weight · future_decay ** i`` times its own such weighted mean. The defaults are
    Medusa-2's (arXiv:2401.10774 and its released recipe), for training a model together with its heads; in a
    frozen model only the decay matters.
    Raises ValueError when weights name an unknown modality or are negative.
    """

    def __init__(
        self,
        modalities: Sequence[str] = ("text", "image"),
        weights: Mapping[str, float] | None = None,
        z_loss: float = 0.0,
        future_weight: float = 0.2,
        future_decay: float = 0.8,
    ) -> None:
        super().__init__()
        weights = dict(weights or {})
        if unknown := sorted(set(weights) - set(modalities)):
            raise ValueError(f"loss weights for unknown modalities {unknown}; known: {list(modalities)}.")
        if min(weights.values(), default=0.0) < 0:
            raise ValueError(f"loss weights must not be negative, got {weights}.")
        if future_weight < 0 or future_decay < 0:
            raise ValueError(
                f"future_weight and future_decay must not be negative, got {future_weight}, {future_decay}."
            )
        self.modalities = tuple(modalities)
        self.z_loss = z_loss
        self.future_weight = future_weight
        self.future_decay = future_decay
        self.weights: Tensor
        table = torch.tensor([float(weights.get(name, 1.0)) for name in modalities])
        self.register_buffer("weights", table, persistent=False)

    def forward(
        self, output: LMOutput, batch: TokenBatch, *, code_offsets: Sequence[int] = (), pad_id: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar, float32) and detached metrics ``loss_<modality>``, ``accuracy_<modality>``,
        ``tokens_<modality>`` (absent modalities are left out), ``z_loss`` when it is used, and
        ``future<i>_loss_<modality>`` and ``future<i>_accuracy_<modality>`` of each head.

        output: logits of every position (``[b, l, v]``) or of `predicting(batch)` only (``[m, v]``).
        code_offsets, pad_id: as in the model's config, needed with several codes per position, where padding
        is no target. Raises ValueError when nothing in the batch is a target's predecessor.
        """
        select = predicting(batch)
        ids = batch.ids[:, 1:][select[:, :-1]]
        modality = batch.modality[:, 1:][select[:, :-1]]
        if not len(ids):
            raise ValueError("the batch has no training target; its loss_mask is empty.")
        losses, hits, kinds = [], [], []
        for column, logits in enumerate((output.logits, *output.code_logits)):
            picked = logits if logits.ndim == 2 else logits[select]
            target, kind, values = _column(ids, modality, picked, column, code_offsets, pad_id)
            values = values.float()
            losses.append(F.cross_entropy(values, target, reduction="none"))
            hits.append(values.detach().max(-1).indices == target)
            kinds.append(kind)
            if self.z_loss and column == 0:
                # log Z = cross-entropy + the target's logit: no second pass over the vocabulary.
                log_z = losses[0] + values.gather(-1, target[:, None])[:, 0]
        loss, metrics = self._combine(torch.cat(losses), torch.cat(hits), torch.cat(kinds))
        if self.z_loss:
            count = mean_over_processes(log_z.new_tensor(float(len(log_z))))
            penalty = self.z_loss * log_z.square().sum() / count
            loss, metrics["z_loss"] = loss + penalty, penalty.detach()
        codes = output.future_code_logits or ((),) * len(output.future_logits)
        for head, columns in enumerate(zip(output.future_logits, codes), start=1):
            each = [logits if logits.ndim == 2 else logits[select] for logits in (columns[0], *columns[1])]
            further, figures = self._further(each, batch, select, 1 + head, code_offsets, pad_id)
            loss = loss + self.future_weight * self.future_decay**head * further
            metrics |= {f"future{head}_{name}": value for name, value in figures.items()}
        return loss, metrics

    def _further(
        self,
        columns: Sequence[Tensor],
        batch: TokenBatch,
        select: Tensor,
        distance: int,
        code_offsets: Sequence[int],
        pad_id: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted mean cross-entropy, and figures, of one head's logits ``[m, v]`` (of every column) at the
        positions of `select` for the tokens `distance` places on; 0 where there are none."""
        known = predicting_further(batch, distance)
        ids, modality = (whole.roll(-distance, 1)[known] for whole in (batch.ids, batch.modality))
        losses, hits, kinds = [], [], []
        for column, logits in enumerate(columns):
            target, kind, values = _column(ids, modality, logits[known[select]], column, code_offsets, pad_id)
            losses.append(F.cross_entropy(values.float(), target, reduction="none"))
            hits.append(values.detach().max(-1).indices == target)
            kinds.append(kind)
        loss, figures = self._combine(torch.cat(losses), torch.cat(hits), torch.cat(kinds))
        return loss, {name: value for name, value in figures.items() if not name.startswith("tokens")}

    def _combine(self, losses: Tensor, hits: Tensor, kinds: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted mean of the targets' losses ``[t]`` and the figures of each modality."""
        weight = self.weights[kinds]
        loss = (weight * losses).sum() / mean_over_processes(weight.sum()).clamp(min=1e-12)
        metrics = {}
        for index, name in enumerate(self.modalities):
            own = kinds == index
            count = own.sum()
            if count:
                metrics[f"loss_{name}"] = losses.detach()[own].mean()
                metrics[f"accuracy_{name}"] = hits[own].float().mean()
                metrics[f"tokens_{name}"] = count
        return loss, metrics


def _column(
    ids: Tensor, modality: Tensor, logits: Tensor, column: int, offsets: Sequence[int], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, modalities and logits of one column, padding left out; further columns are local codes."""
    if ids.ndim == 1:
        return ids, modality, logits
    present = ids[:, column] != pad_id
    target = ids[:, column][present] - (offsets[column] if column else 0)
    return target, modality[present], logits[present]
