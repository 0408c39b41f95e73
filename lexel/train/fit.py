"""One stage's training: the Lightning trainer with Lexel's callbacks, resumed where a checkpoint lies."""

from __future__ import annotations

import logging
import warnings
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning

from lexel.errors import LexelError
from lexel.sample.bundle import write_json
from lexel.train.batches import Batches
from lexel.train.callbacks import EMA, AtomicCheckpoint, MetricsFile, Progress, SamplePictures, Throughput
from lexel.train.callbacks.checkpoint import last_checkpoint
from lexel.train.module import NotFinite, StageModule
from lexel.train.settings import LoggerSettings, TrainerSettings

NAMED = 8
"""Examples of a bad batch that the message names; all are in `not_finite.json`."""

_NOT_NEWS = (
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*lr_scheduler.step\\(\\)` before `optimizer.step\\(\\).*",
    ".*but CUDA is not available.*",
    ".*GPU available but not used.*",
    ".*weights_only.*",
    ".*in eval mode at the start of training.*",  # feature networks, whose weights are frozen
    ".*FSDP2-wrapped module.*returned a view tensor.*",
)
"""Warnings of the trainer that tell a user nothing to act on."""


def fit(
    title: str,
    module: StageModule,
    batches: Batches,
    folder: Path,
    trainer: TrainerSettings,
    logger: LoggerSettings,
    callbacks: list[lightning.Callback] | None = None,
) -> None:
    """Train `module` to its last step; continue from ``folder/checkpoints/last.ckpt`` if there is one.

    Writes `checkpoints/`, `metrics.csv` and `samples/` under `folder`. LexelError when a checkpoint cannot be
    written or read, and when the loss or the weights become NaN or infinite: the last good checkpoint stays,
    and `not_finite.json` names the examples of the batch.
    """
    stage = module.stage
    checkpoints = folder / "checkpoints"
    built = build_trainer(
        trainer,
        module,
        callbacks=[
            *([EMA(stage.ema)] if stage.ema else []),
            *(callbacks or []),
            Throughput(),
            SamplePictures(folder / "samples", stage.sample_every, stage.sample_count),
            AtomicCheckpoint(checkpoints, stage.checkpoint_every),
            Progress(title),
        ],
        loggers=_loggers(title, folder, logger),
    )
    with warnings.catch_warnings():
        for message in _NOT_NEWS:
            warnings.filterwarnings("ignore", message)
        try:
            built.fit(module, batches, ckpt_path=_checked(last_checkpoint(checkpoints)), weights_only=True)
        except NotFinite as error:
            raise LexelError(_explained(title, error, folder)) from error
        except SystemExit:
            if built.interrupted:  # Lightning turns the interruption into a silent exit
                raise KeyboardInterrupt from None
            raise


def build_trainer(
    settings: TrainerSettings,
    module: StageModule,
    *,
    callbacks: list[lightning.Callback],
    loggers: Any,
) -> lightning.Trainer:
    """The trainer of one stage. It never ends by itself: the module stops it after its last step, because
    Lightning counts a step per optimizer and a discriminator would count double."""
    stage, automatic = module.stage, module.automatic_optimization
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in _NOT_NEWS:
            warnings.filterwarnings("ignore", message)
        return lightning.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=_strategy(settings, module.has_idle_parameters),
            precision=stage.precision,  # type: ignore[arg-type]
            max_epochs=-1,
            accumulate_grad_batches=stage.accumulate if automatic else 1,
            gradient_clip_val=(stage.clip or None) if automatic else None,
            val_check_interval=(stage.validate_every * stage.accumulate) or None,
            check_val_every_n_epoch=None,
            limit_val_batches=stage.validation_batches if stage.validate_every else 0,
            num_sanity_val_steps=0,
            logger=loggers,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            # FSDP2 keeps the buffers that it gathers weights into, and they must stay usable.
            inference_mode=False,
        )


def _explained(title: str, error: NotFinite, folder: Path) -> str:
    """The error in one sentence, with the examples of the batch and what is left of the training."""
    from lightning.pytorch.utilities import rank_zero_only

    checkpoint = last_checkpoint(folder / "checkpoints")
    if error.names and getattr(rank_zero_only, "rank", 0) == 0:
        write_json(folder / "not_finite.json", {"error": str(error), "examples": error.names})
    named = ", ".join(error.names[:NAMED]) + (" …" if len(error.names) > NAMED else "")
    batch = f" (a batch of {len(error.names)} examples: {named})" if error.names else ""
    kept = f"the checkpoint before it is kept in {checkpoint}" if checkpoint else "there is no checkpoint yet"
    return f"{title}: {error}{batch}; {kept}. Look at these examples, or lower the learning rate."


def _strategy(settings: TrainerSettings, idle: bool) -> Any:
    if settings.strategy == "ddp":
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(process_group_backend=settings.backend, find_unused_parameters=idle)
    if settings.strategy == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        return ModelParallelStrategy(
            data_parallel_size=settings.devices * settings.num_nodes,
            tensor_parallel_size=1,
            process_group_backend=settings.backend,
        )
    return "auto"


def _loggers(title: str, folder: Path, settings: LoggerSettings) -> list[Any]:
    loggers: list[Any] = [MetricsFile(folder / "metrics.csv")]
    if settings.wandb:
        from lightning.pytorch.loggers import WandbLogger

        run = settings.name or folder.parent.name
        loggers.append(
            WandbLogger(name=f"{run}-{title}", project=settings.project, save_dir=str(folder), group=run)
        )
    return loggers


def _checked(path: Path | None) -> str | None:
    """The checkpoint's path as Lightning wants it. LexelError when a file is no whole checkpoint (all of them
    are written under another name first, so somebody else has damaged it)."""
    if path is None:
        return None
    if path.is_file() and not zipfile.is_zipfile(path):
        raise LexelError(f"the checkpoint {path} cannot be read; delete it to start the stage over.")
    return str(path)
