"""How fast the training goes, and the report of it and all else that was measured."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, Trainer


class Throughput(Callback):
    """Has the module report its metrics (before a checkpoint is written, so that a run killed after it has
    lost no row). Adds ``examples_per_second`` (all processes together, validation and samples not counted)
    to the reported metrics, and counts the seconds of training, interruptions included, in
    `module.seconds`."""

    def __init__(self) -> None:
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._start = self._start or time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        pl_module.seconds += seconds
        examples = pl_module.stage.batch_size * trainer.world_size
        pl_module.collect({"examples_per_second": examples / max(seconds, 1e-9)})
        pl_module.report_window()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._start = 0.0  # the next batch starts the clock again
