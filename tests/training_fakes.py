"""A tiny stage for tests of the training machinery: a network the hub mixin can save, and random data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lexel.data.sampler import Draw
from lexel.hub import Pretrained
from lexel.train.batches import Batches
from lexel.train.module import StageModule
from lexel.train.settings import StageSettings


@dataclass(frozen=True)
class ToyConfig:
    """dim: width."""

    dim: int = 8


class Toy(nn.Module, Pretrained):
    """Two residual blocks with dropout and a running mean, so that order, noise and buffers all matter."""

    config_class: ClassVar[type] = ToyConfig
    model_type: ClassVar[str] = "toy"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(2))
        self.drop = nn.Dropout(0.2)
        self.momentum = 0.1
        self.seen: Tensor
        self.mean: Tensor
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.mean.lerp_(x.detach().mean(0), self.momentum)
        for block in self.blocks:
            x = x + self.drop(torch.tanh(block(x)))
        return x - self.mean


class ToyData(Dataset[Tensor]):
    """`count` fixed random vectors."""

    def __init__(self, count: int = 37, dim: int = 8) -> None:
        self.rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> Tensor:
        return self.rows[draw.index]


class ToyModule(StageModule):
    """Learns to reverse its input."""

    def compute(self, network: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (network(batch) - batch.flip(-1)).square().mean()
        return loss, {"half": loss.detach() / 2}

    def pictures(self, network: nn.Module, count: int) -> Tensor:
        return torch.rand(1, count, 3, 4, 4)


def toy_stage(**changes: Any) -> StageSettings:
    """A short stage with every interval coprime to the others."""
    settings: dict[str, Any] = {
        "steps": 12, "batch_size": 4, "accumulate": 2, "warmup": 2, "ema": 0.9, "validate_every": 3,
        "validation_batches": 2, "sample_every": 7, "sample_count": 3, "checkpoint_every": 5, "log_every": 2,
        "optimizer": partial(torch.optim.AdamW, weight_decay=0.1),
    }  # fmt: skip
    return StageSettings(**{**settings, **changes})


def toy_training(**changes: Any) -> tuple[ToyModule, Batches]:
    """A fresh module (same initial weights each time) and its batches."""
    stage = toy_stage(**changes)
    torch.manual_seed(0)
    module = ToyModule(Toy(ToyConfig()), stage, seed=5)
    return module, Batches(ToyData(), ToyData(9), torch.stack, stage, seed=5)
