"""Training a detokenizer on the codes of a frozen tokenizer, and distilling it for few steps.

b batch · h w picture · c x y channels, height and width of what is denoised
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.models.detokenizers.base import Condition
from lexel.sample.detokenize import condition_of, detokenize
from lexel.tokenizers.base import Tokenizer
from lexel.train.module import Metrics, StageModule
from lexel.train.settings import DetokenizerStage
from lexel.types import Codes

# Pixels [b, 3, h, w] in [-1, 1] and, per picture, a caption or None.
Batch = tuple[Tensor, Sequence[str | None]]


class DetokenizerModule(StageModule):
    """Detokenizer and the frozen tokenizer whose codes it learns to read. Batches are `Batch`; preview: that
    of the sample grid. A super-resolving detokenizer is given larger pictures than the tokenizer, which sees
    them reduced."""

    stage: DetokenizerStage

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Tokenizer,
        stage: DetokenizerStage,
        seed: int = 0,
        preview: Batch | None = None,
    ) -> None:
        super().__init__(network, stage, seed)
        # In a tuple the tokenizer is no submodule: it stays out of checkpoints.
        self._tokenizer = (tokenizer.eval().requires_grad_(False),)
        self.preview = preview

    @property
    def has_idle_parameters(self) -> bool:
        """The null condition learns only if it is sometimes given; nothing reads what the last block of a
        joint transformer would make of the codes."""
        config: Any = self.network.config
        return config.null_dropout == 0 or config.condition == "joint"

    def on_fit_start(self) -> None:
        """Bring the tokenizer to the network's device."""
        self._tokenizer[0].to(self.device)

    def compute(self, network: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        """The detokenizer's own loss."""
        pixels, text = batch
        condition = self._condition(network, pixels)
        return network.loss(pixels, condition, text=text if network.reads_text else None)

    def _codes(self, network: Any, pixels: Tensor) -> Codes:
        # Under autocast near-ties would fall to other codes than those the language model will write.
        with torch.autocast(pixels.device.type, enabled=False):
            seen, size = pixels.float(), network.config.tokenizer_size
            if tuple(seen.shape[-2:]) != tuple(size):
                seen = F.interpolate(seen, size=size, mode="area")
            return self._tokenizer[0].encode(seen)

    def _condition(self, network: Any, pixels: Tensor) -> Condition:
        with torch.autocast(pixels.device.type, enabled=False):
            return condition_of(self._tokenizer[0], network, self._codes(network, pixels))

    def pictures(self, network: Any, count: int) -> Tensor | None:
        """The preview pictures, the tokenizer's reconstructions (if it draws), and what the detokenizer makes
        of the codes."""
        if self.preview is None:
            return None
        tokenizer, (pixels, text) = self._tokenizer[0], self.preview
        pixels = pixels[:count].to(self.device)
        codes, rows = self._codes(network, pixels), [pixels]
        if tokenizer.draws_pixels:
            rows.append(F.interpolate(tokenizer.decode(codes), size=pixels.shape[-2:], mode="nearest"))
        steps = self.stage.steps_to_decode
        return torch.stack([*rows, detokenize(tokenizer, network, codes, text=text[:count], steps=steps)])

    def plain(self, network: Any) -> nn.Module:
        """The network with the text tokenizer, which a gathered copy lacks."""
        if network.reads_text:
            live: Any = self.network
            network.text.tokenizer = live.text.tokenizer
        return network


class DistilledModule(DetokenizerModule):
    """Reflow (arXiv 2209.03003): the student learns to go from noise straight to the picture that a frozen
    teacher draws from that very noise in many steps, so that few steps suffice. The pictures of a batch serve
    only as a source of codes. Guidance of the teacher goes into the student, which then needs none."""

    def __init__(self, network: nn.Module, teacher: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(network, *args, **options)
        self._teacher = (teacher.eval().requires_grad_(False),)

    def on_fit_start(self) -> None:
        """Bring tokenizer and teacher to the network's device."""
        super().on_fit_start()
        self._teacher[0].to(self.device)

    def compute(self, network: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss between the teacher's noise and picture, at several times for each pair."""
        pixels, captions = batch
        text = list(captions) if network.reads_text else None
        condition = network.cut(self._condition(network, pixels))
        teacher: Any = self._teacher[0]
        config, stage = teacher.config, self.stage
        noise = torch.randn(len(pixels), config.space[1], *config.size, device=pixels.device)
        clean = teacher.draw(
            condition, steps=stage.teacher_steps, guidance=stage.teacher_guidance, noise=noise, text=text
        )
        rows = torch.arange(len(pixels), device=pixels.device).repeat(stage.times_per_pair)
        if text is not None:
            text = text * stage.times_per_pair
        return network.loss_of(clean[rows], condition[rows], text=text, noise=noise[rows])


def student_config(teacher: Any, stage: DetokenizerStage) -> Any:
    """The config of a student: the teacher's, drawn in `steps_to_decode` steps without guidance."""
    return replace(teacher.config, steps=stage.steps_to_decode, guidance=1.0)
