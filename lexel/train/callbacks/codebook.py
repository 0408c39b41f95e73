"""How much of each codebook the validation pictures use."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor


class CodebookUsage(Callback):
    """Over each validation run, reports ``validation/codebook_usage`` (share of codes used at least once) and
    ``validation/codebook_perplexity`` (exp of the entropy of the code frequencies), averaged over codebooks.
    Expects `validation_step` to return ``{"codes": long [b, n, k]}``."""

    def __init__(self, codebook_sizes: tuple[int, ...]) -> None:
        self.codebook_sizes = codebook_sizes
        self._counts: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._counts = [torch.zeros(size, device=pl_module.device) for size in self.codebook_sizes]

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for counts, codes in zip(self._counts, outputs["codes"].unbind(-1), strict=True):
            used = codes[codes >= 0]
            counts += torch.bincount(used.flatten(), minlength=len(counts))[: len(counts)]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        usage, perplexity = zip(
            *(
                codebook_statistics(trainer.strategy.reduce(counts, reduce_op="sum"))
                for counts in self._counts
            ),
            strict=True,
        )
        pl_module.report(
            {
                "validation/codebook_usage": sum(usage) / len(usage),
                "validation/codebook_perplexity": sum(perplexity) / len(perplexity),
            }
        )


def codebook_statistics(counts: Tensor) -> tuple[float, float]:
    """(share of codes with a count, exp of the entropy) of occurrence counts ``[K]``."""
    frequency = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(frequency, frequency).sum()
    return float((counts > 0).double().mean()), float(entropy.exp())
