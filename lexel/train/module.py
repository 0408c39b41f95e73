"""What every stage's Lightning module shares: network, average, optimizer, exact resume, reporting.

Exact resume without saved random states: the order of the data is a pure function of (seed, batches consumed)
and the random generator is seeded anew before every batch from (seed, batches consumed, rank). So weights,
buffers, optimizer and the number of batches consumed are the whole state, and they are in the checkpoint.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, nn

from lexel.data.sampler import mix_seed
from lexel.errors import LexelError
from lexel.train.blocks import compile_blocks, recompute
from lexel.train.callbacks.metrics_file import MetricsFile
from lexel.train.processes import anywhere, gathered, several
from lexel.train.settings import StageSettings
from lexel.train.sharding import shard, whole

Metrics = Mapping[str, "Tensor | float"]


class NotFinite(LexelError):
    """A loss or a weight became NaN or infinite. names: the examples of the batch that did it, if known."""

    def __init__(self, sentence: str, names: Sequence[str]) -> None:
        super().__init__(sentence)
        self.names = list(names)


class StageModule(lightning.LightningModule, ABC):
    """A network under training. `network` is what gets exported (its average with ``stage.ema > 0``).

    A subclass gives `compute` (loss and metrics of a batch) and may give `pictures` for the sample grid; with
    manual optimisation it overrides `training_step` too.
    """

    def __init__(self, network: nn.Module, stage: StageSettings, seed: int = 0) -> None:
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False) if stage.ema else None
        self.stage = stage
        self.seed = seed
        self.consumed = 0
        self.seconds = 0.0
        self.latest: dict[str, float] = {}
        self._window: list[Metrics] = []
        self._validation: list[Metrics] = []

    @property
    def exported(self) -> nn.Module:
        """The network with the weights that will be exported: the average, or the live one."""
        return self.network if self.average is None else self.average

    @property
    def has_idle_parameters(self) -> bool:
        """Whether a backward pass may leave parameters without gradient (DDP must then look for them)."""
        return False

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.consumed // self.stage.accumulate

    @property
    def at_step_boundary(self) -> bool:
        """Whether the last batch completed an optimizer step."""
        return self.consumed % self.stage.accumulate == 0

    @abstractmethod
    def compute(self, network: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        """The loss (scalar) and detached metrics of one batch with the given network."""

    def pictures(self, network: nn.Module, count: int) -> Tensor | None:
        """Rows of pictures for the sample grid, float ``[rows, columns, 3, h, w]`` in [-1, 1]; None: no
        grid."""
        return None

    # Training

    def on_train_start(self) -> None:
        """Set modes (Lightning leaves them alone), forget what a killed run reported after its checkpoint,
        and stop at once when the checkpoint was the last one."""
        self.network.train()
        for frozen in self.frozen():
            frozen.eval()
        for logger in self.loggers:
            if isinstance(logger, MetricsFile):
                logger.rewind(self.step)
        self.trainer.should_stop = self.step >= self.stage.steps

    def frozen(self) -> list[nn.Module]:
        """Modules that stay in eval mode: the average, teachers."""
        return [] if self.average is None else [self.average]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make everything random in this batch a function of (seed, batches consumed, rank)."""
        torch.manual_seed(mix_seed(self.seed, self.consumed, self.global_rank))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one batch; Lightning's automatic optimisation does the rest."""
        loss, metrics = self.compute(self.network, batch)
        self.check_loss(loss)
        self.consumed += 1
        self.collect({"loss": loss.detach(), **metrics})
        return loss

    def check_loss(self, loss: Tensor) -> None:
        """Raise NotFinite when the loss is NaN or infinite in any process, before it reaches the weights.
        (Reads the value back from the device, once per batch.)"""
        bad = not bool(torch.isfinite(loss.detach()).all())
        if not anywhere(bad, self.device):
            return
        own = self.trainer.datamodule.names(self.consumed) if bad else []  # type: ignore[attr-defined]
        names = [name for part in gathered(own) for name in part]
        raise NotFinite(f"the loss is not finite at step {self.step + 1}", names)

    def check_weights(self) -> None:
        """Raise NotFinite when a weight is NaN or infinite in any process."""
        values = (getattr(p, "to_local", lambda p=p: p)() for p in self.network.parameters())
        bad = any(not bool(torch.isfinite(value.detach()).all()) for value in values)
        if anywhere(bad, self.device):
            raise NotFinite(f"the weights are not finite after step {self.step}", [])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop after the last step."""
        if self.step >= self.stage.steps:
            self.trainer.should_stop = True

    # Validation, with the weights that will be exported

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same noise in every validation; the next training batch seeds anew."""
        torch.manual_seed(mix_seed(self.seed, -1, batch_idx, self.global_rank))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Metrics of one validation batch; its loss also under its source's name where there are several."""
        loss, metrics = self.compute(self.exported, batch)
        sources = self.trainer.datamodule.sources  # type: ignore[attr-defined]
        own = {f"{sources[dataloader_idx]}/loss": loss} if sources else {}
        self._validation.append({"loss": loss, **own, **metrics})
        return {}

    def on_validation_epoch_end(self) -> None:
        """Report the mean over the validation batches as ``validation/<metric>``."""
        means = self._mean(self._validation)
        self._validation = []
        self.report({f"validation/{key}": value for key, value in means.items()})

    # Reporting

    def collect(self, metrics: Metrics) -> None:
        """Add metrics of a batch to the running window."""
        self._window.append(metrics)

    def report_window(self) -> None:
        """Report the mean of what was collected since the last report, every `log_every` steps."""
        if self.at_step_boundary and (self.step % self.stage.log_every == 0 or self.step == self.stage.steps):
            self.latest = self._mean(self._window)
            self._window = []
            self.report({**self.latest, "lr": self.trainer.optimizers[0].param_groups[0]["lr"]})

    def report(self, metrics: Mapping[str, float]) -> None:
        """Send metrics to the loggers under the current step."""
        for logger in self.loggers:
            logger.log_metrics(dict(metrics), step=self.step)

    def _mean(self, window: list[Metrics]) -> dict[str, float]:
        """Mean of each metric over the entries that have it and over the processes; "nan" entries (a kind of
        token that a batch did not hold) are left out."""
        values: dict[str, list[Tensor]] = {}
        for metrics in window:
            for key, value in metrics.items():
                values.setdefault(key, []).append(
                    torch.as_tensor(value, dtype=torch.float32, device=self.device)
                )
        # A process may have met no token of a kind that another one has.
        keys = sorted({key for part in gathered(list(values)) for key in part})
        if not keys:
            return {}
        nothing = [torch.tensor(float("nan"), device=self.device)]
        means = torch.stack([torch.stack(values.get(key, nothing)).nanmean() for key in keys])
        if several():
            known = ~means.isnan()
            sums = torch.stack([means.nan_to_num(), known.float()])
            total, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
            means = total / count
        return {key: float(mean) for key, mean in zip(keys, means, strict=True) if not torch.isnan(mean)}

    # Optimizers

    def configure_optimizers(self) -> Any:
        """One optimizer over the network (and whatever of the objective learns with it)."""
        return self.optimizer_for(self.network.named_parameters(), self.stage.lr)

    def optimizer_for(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        rate: Callable[[str], float] = lambda name: 1.0,
    ) -> dict[str, Any]:
        """Optimizer and per-step schedule in Lightning's form; vectors (norms, biases) are not decayed, and
        a parameter learns at `rate` of its name times `lr`."""
        from lexel.train.schedule import build_schedule

        parameters: dict[float, list[nn.Parameter]] = {}
        for name, parameter in named:
            if parameter.requires_grad:
                parameters.setdefault(rate(name), []).append(parameter)
        groups: list[dict[str, Any]] = []
        for factor, own in parameters.items():
            groups.append({"params": [p for p in own if p.ndim > 1], "lr": factor * lr})
            groups.append({"params": [p for p in own if p.ndim <= 1], "lr": factor * lr, "weight_decay": 0.0})
        optimizer = self.stage.optimizer([group for group in groups if group["params"]], lr=lr)
        schedule = build_schedule(optimizer, self.stage)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Checkpoints and export

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the two numbers that belong to the state."""
        checkpoint["lexel"] = {"consumed": self.consumed, "seconds": self.seconds}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back, before the data loader is asked for."""
        self.consumed = checkpoint["lexel"]["consumed"]
        self.seconds = checkpoint["lexel"]["seconds"]

    def configure_model(self) -> None:
        """Called by Lightning: blocks that are recomputed or compiled; with FSDP2, shard every block of every
        repeated stack, then the rest."""
        if self.stage.recompute:
            recompute(self.network)
        if self.stage.compile:
            compile_blocks(self.network)
        mesh = self.device_mesh
        if mesh is not None:
            for module in (self.network, *self.frozen()):
                shard(module, mesh["data_parallel"], half=self.stage.precision == "bf16-mixed")

    def export(self, folder: Path) -> None:
        """Save the exported network to `folder` (all processes call this together, the first one writes)."""
        network: Any = self.plain(whole(self.exported))
        if self.trainer.is_global_zero:
            network.save_pretrained(folder)

    def plain(self, network: nn.Module) -> nn.Module:
        """The network as it is saved."""
        return network


def freeze(network: nn.Module, names: Sequence[str]) -> tuple[nn.Module, ...]:
    """No gradient for the named modules and parameters of `network`; returns the modules among them, which
    should stay in eval mode. Raises LexelError for a name that the network does not have."""
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    if unknown := [name for name in names if not name or name not in {**modules, **parameters}]:
        children = ", ".join(name for name, _ in network.named_children())
        raise LexelError(f"frozen names {unknown}, which the network does not have; it has: {children}.")
    for name in names:
        (modules.get(name) or parameters[name]).requires_grad_(False)
    return tuple(modules[name] for name in names if name in modules)
