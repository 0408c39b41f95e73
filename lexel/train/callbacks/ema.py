"""Exponential moving average of the weights, kept as a second network inside the training module.

Because the average is an ordinary submodule, every strategy saves, shards and restores it like the live
network: one device, DDP and FSDP2 (where Lightning's own callback fails on `deepcopy`) alike.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn


class EMA(Callback):
    """After each optimizer step moves `module.average` towards `module.network`: parameters and floating
    buffers by ``1 - decay``, other buffers are copied. The decay starts low, ``(1 + t) / (10 + t)`` after t
    steps (as in TensorFlow's ExponentialMovingAverage), so that the random start is soon forgotten."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.at_step_boundary and isinstance(pl_module.average, nn.Module):
            step = pl_module.step
            update_average(pl_module.average, pl_module.network, min(self.decay, (1 + step) / (10 + step)))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """``average = decay * average + (1 - decay) * network`` over parameters and floating buffers; integer and
    boolean buffers are copied. Both modules have the same structure and the same sharding."""
    ours, theirs = _tensors(average), _tensors(network)
    floating = [key for key, value in ours.items() if value.is_floating_point()]
    torch._foreach_lerp_([ours[key] for key in floating], [theirs[key] for key in floating], 1 - decay)
    for key in ours.keys() - floating:
        ours[key].copy_(theirs[key])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers; of sharded ones this process's share."""
    return {
        key: value.to_local() if hasattr(value, "to_local") else value
        for key, value in module.state_dict(keep_vars=True).items()
    }
