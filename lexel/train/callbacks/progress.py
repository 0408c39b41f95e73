"""One progress bar per stage in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SHOWN = ("loss", "psnr", "accuracy_image", "accuracy_text")
"""Metrics beside the bar, where a stage has them."""


class Progress(Callback):
    """Shows step, speed, time left and the newest `SHOWN` metrics of the stage called `title`. Without a
    terminal it prints a line at most every `seconds_per_line`."""

    def __init__(self, title: str, seconds_per_line: float = 10.0) -> None:
        self.title = title
        self.seconds_per_line = seconds_per_line
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._printed = self._started = 0.0
        self._first = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._started, self._first = time.perf_counter(), pl_module.step
        if not trainer.is_global_zero:
            return
        if sys.stdout.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[metrics]}"),
                console=Console(file=sys.stdout),
            )  # fmt: skip
            self._task = self._bar.add_task(
                self.title, total=pl_module.stage.steps, completed=self._first, metrics=""
            )
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or not pl_module.at_step_boundary:
            return
        step, now = pl_module.step, time.perf_counter()
        metrics = "  ".join(f"{k} {pl_module.latest[k]:.4g}" for k in SHOWN if k in pl_module.latest)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=metrics)
        elif now - self._printed >= self.seconds_per_line or step == pl_module.stage.steps:
            self._printed = now
            speed = (step - self._first) / max(now - self._started, 1e-9)
            left = (pl_module.stage.steps - step) / max(speed, 1e-9)
            place = f"{self.title} {step}/{pl_module.stage.steps}"
            print(f"{place}  {metrics}  {speed:.3g} steps/s, {left:.0f} s left", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
