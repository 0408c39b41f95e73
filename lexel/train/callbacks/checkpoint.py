"""Checkpoints that a kill or a full disk cannot spoil."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from lexel.errors import LexelError

LAST = "last.ckpt"


class AtomicCheckpoint(Callback):
    """Keeps ``<folder>/last.ckpt``, written every `every` optimizer steps (0: only at the end) under another
    name, flushed to disk and renamed, so that it is always a whole checkpoint. With a sharded strategy it is
    a folder. Raises LexelError when the system refuses (full disk); the previous checkpoint is kept."""

    def __init__(self, folder: Path, every: int) -> None:
        self.path = folder / LAST
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, at_boundary = pl_module.step, pl_module.at_step_boundary
        if at_boundary and (step >= pl_module.stage.steps or (self.every and step % self.every == 0)):
            pl_module.check_weights()  # a broken network must not replace a good one
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write `last.ckpt` now (all processes of a distributed run call this together)."""
        temporary = self.path.with_name(f".{LAST}.tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                replace(temporary, self.path)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            kept = "the previous one is kept" if self.path.exists() else "there is no earlier one"
            cause = next(
                (e.strerror for e in _causes(error) if isinstance(e, OSError) and e.strerror), str(error)
            )
            raise LexelError(f"could not write the checkpoint {self.path} ({cause}); {kept}.") from error
        finally:
            if trainer.is_global_zero:
                remove(temporary)
        trainer.strategy.barrier()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None. Finishes a replacement that a kill interrupted."""
    path, old = folder / LAST, folder / f".{LAST}.old"
    if not path.exists() and old.exists():
        old.rename(path)
    return path if path.exists() else None


def replace(temporary: Path, path: Path) -> None:
    """Flush `temporary` (a file or a folder) to disk and rename it to `path`. Folders cannot replace one
    another in one step: the old one steps aside first, see `last_checkpoint`."""
    for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    old = path.with_name(f".{path.name}.old")
    if path.is_dir():
        remove(old)
        path.rename(old)
    temporary.rename(path)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
