"""Learning rates over the steps of a run: those of transformers, and drops at given steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

if TYPE_CHECKING:
    from lexel.train.settings import StageSettings


def build_schedule(optimizer: Optimizer, stage: StageSettings) -> LRScheduler:
    """The schedule that `stage.schedule` names: ``drops`` (`schedule_args`: those of `drops`) or one of
    `transformers.get_scheduler`. Raises TypeError for arguments that it does not take, ValueError for an
    unknown name."""
    if stage.schedule == "drops":
        return drops(optimizer, stage.warmup, **stage.schedule_args)
    from transformers import get_scheduler

    return get_scheduler(
        stage.schedule,
        optimizer,
        num_warmup_steps=stage.warmup,
        num_training_steps=stage.steps,
        scheduler_specific_kwargs=stage.schedule_args or None,
    )


def drops(optimizer: Optimizer, warmup: int, at: Sequence[int], factor: float = 0.1) -> LambdaLR:
    """Constant after `warmup` linear steps, multiplied by `factor` at each of the steps `at`."""

    def scale(step: int) -> float:
        return min(1.0, (step + 1) / (warmup + 1)) * factor ** sum(step >= drop for drop in at)

    return LambdaLR(optimizer, scale)
