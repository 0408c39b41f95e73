"""What TokenFlow is trained on (arXiv 2412.03069, ByteFlow-AI/TokenFlow): pixels, as any tokenizer, and the
features that a frozen vision model gives each patch of the same picture.

b batch · n patches · f width of the teacher's features
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.errors import LexelError
from lexel.tokenizers.tokenflow import TokenFlow
from lexel.train.objectives.base import Metrics
from lexel.train.objectives.teachers import VisionTeacher
from lexel.train.objectives.tokenizer import TokenizerObjective, TokenizerObjectiveConfig
from lexel.types import TokenizerOutput


@dataclass(frozen=True)
class SemanticConfig:
    """The teacher of the semantic codes.

    teacher: hub id or local folder, see `VisionTeacher`, which also explains output, layer and size.
    Published: CLIP ViT-B/16's ``projected_patches``, SigLIP's ``patches`` of layer -2. weight: of 1 - cosine.
    """

    teacher: str
    weight: float = 1.0
    output: str = "projected_patches"
    layer: int = -1
    size: int | None = None


@dataclass(frozen=True)
class TokenFlowObjectiveConfig(TokenizerObjectiveConfig):
    """The terms of `TokenizerObjectiveConfig`, and `semantic` (None: no teacher, pixels alone)."""

    semantic: SemanticConfig | None = None

    def build(self) -> TokenFlowObjective:
        """The objective, with its frozen networks loaded. Raises LexelError when a teacher cannot be had."""
        return TokenFlowObjective(self)


class TokenFlowObjective(TokenizerObjective):
    """`TokenizerObjective` and the mean over patches of 1 - cosine to the teacher's features, which reaches
    the semantic encoder through codes of all scales."""

    config: TokenFlowObjectiveConfig

    def __init__(self, config: TokenFlowObjectiveConfig) -> None:
        super().__init__(config, [term.build() for term in config.representation])
        # In a tuple it is no submodule: part of no state dict, optimizer or checkpoint.
        self._teacher: tuple[VisionTeacher, ...] = ()
        if config.semantic is not None and config.semantic.weight:
            term: Any = config.semantic
            self._teacher = (VisionTeacher(term.teacher, term.size, term.output, term.layer),)

    def prepare(self, network: Any) -> None:
        """Without a teacher, let the decoder of its features rest. Raises LexelError for another tokenizer
        and for a teacher of other features than it predicts."""
        if not isinstance(network, TokenFlow):
            raise LexelError("objective/tokenizer=tokenflow trains tokenizer=tokenflow only.")
        if not self._teacher:
            network.decoder_vqkd.requires_grad_(False)
            network.decode_task_layer.requires_grad_(False)
        for teacher in self._teacher:
            side, width = network.config.grid, network.config.feature_dim
            if teacher.grid != (side, side) or teacher.width != width:
                raise LexelError(
                    f"the teacher {teacher.name} gives {teacher.grid[0]}x{teacher.grid[1]} features of width "
                    f"{teacher.width}, the tokenizer predicts {side}x{side} of width {width}; set "
                    "objective.tokenizer.semantic.size and tokenizer.feature_dim."
                )

    def generator_loss(
        self, output: TokenizerOutput, pixels: Tensor, step: int, last_layer: Tensor
    ) -> tuple[Tensor, Metrics]:
        """See `TokenizerObjective.generator_loss`."""
        loss, metrics = super().generator_loss(output, pixels, step, last_layer)
        if self._teacher and self.config.semantic is not None:
            distance = self.distance(output, pixels)
            loss = loss + self.config.semantic.weight * distance
            metrics |= {"semantic": distance.detach(), "loss": loss.detach()}
        return loss, metrics

    def measure(self, output: TokenizerOutput, batch: Tensor) -> Metrics:
        """See `Objective.measure`; with a teacher also how far its features are."""
        metrics = super().measure(output, batch)
        return {**metrics, "semantic": self.distance(output, batch)} if self._teacher else metrics

    def distance(self, output: TokenizerOutput, pixels: Tensor) -> Tensor:
        """1 - cosine of the predicted features ``[b, n, f]`` and the teacher's, mean of all patches; 0..2."""
        with torch.no_grad():
            target = self._teacher[0].to(pixels.device)(pixels)
        return 1 - F.cosine_similarity(output.features["semantic"].float(), target.float(), dim=-1).mean()
