"""How fast the training goes, and the report of it and all else that was measured."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lexel.models.causal_lm import CausalLM
from lexel.train.flops import matrix_rate, tokens, training_flops
from lexel.types import TokenBatch


class Throughput(Callback):
    """Has the module report its metrics (before a checkpoint is written, so that a run killed after it has
    lost no row). Adds ``examples_per_second`` (all processes together, validation and samples not counted)
    to the reported metrics, for language models ``tokens_per_second`` (all processes, without padding) and
    ``mfu`` (model flops utilisation, see `lexel.train.flops`), and counts the seconds of training,
    interruptions included, in `module.seconds`."""

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
        rates = {"examples_per_second": examples / max(seconds, 1e-9)}
        if isinstance(batch, TokenBatch):
            rates |= token_rates(pl_module, batch, max(seconds, 1e-9), trainer.world_size)
        pl_module.collect(rates)
        pl_module.report_window()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._start = 0.0  # the next batch starts the clock again


def token_rates(module: Any, batch: TokenBatch, seconds: float, processes: int) -> dict[str, Tensor]:
    """Tokens per second of all processes (each is taken to do as much as this one), and the share of this
    machine's matrix rate that the network's own arithmetic gets."""
    network, device = module.network, module.device.type
    read = tokens(batch, getattr(network.config, "pad_id", 0))
    rates = {"tokens_per_second": read * processes / seconds}
    if isinstance(network, CausalLM):
        dtype = torch.bfloat16 if module.stage.precision == "bf16-mixed" else torch.float32
        rates["mfu"] = training_flops(network, batch) / seconds / matrix_rate(device, dtype)
    return rates
