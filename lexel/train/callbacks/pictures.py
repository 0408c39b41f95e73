"""A grid of pictures every so often: what the network can do so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import Tensor

from lexel.train.sharding import whole


class SamplePictures(Callback):
    """Saves ``<folder>/step-NNNNNN.png`` every `every` optimizer steps (0: never) from
    `module.pictures(network, count)`, which gives rows of pictures, float ``[rows, columns, 3, h, w]``, or
    None; also sent to loggers that take images."""

    def __init__(self, folder: Path, every: int, count: int) -> None:
        self.folder = folder
        self.every = every
        self.count = count

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = pl_module.step
        if not (self.every and pl_module.at_step_boundary and step % self.every == 0):
            return
        # Drawing loops as long as the pictures need: with sharded weights the first process does it on a
        # copy of its own, because all processes would have to take every turn together.
        network = whole(pl_module.exported).to(pl_module.device)
        if not trainer.is_global_zero:
            return
        training = network.training
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same noise each time: the grids of a run compare
            pictures = pl_module.pictures(network.eval(), self.count)
        network.train(training)
        if pictures is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        picture = grid(pictures)
        picture.save(self.folder / f"step-{step:06d}.png")
        for logger in pl_module.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(key="samples", images=[picture], step=step)


def grid(pictures: Tensor, gap: int = 2) -> Image.Image:
    """Rows of pictures, float ``[rows, columns, 3, h, w]`` in about [-1, 1], as one picture with white
    gaps."""
    padded = torch.nn.functional.pad(pictures.float().cpu().clamp(-1, 1), (0, gap, 0, gap), value=1.0)
    pixels = rearrange(padded, "r c ch h w -> (r h) (c w) ch")[:-gap, :-gap]
    return Image.fromarray(((pixels + 1) * 127.5).round().to(torch.uint8).numpy())
