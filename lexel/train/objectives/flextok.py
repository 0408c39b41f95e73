"""What FlexTok is trained on: the velocity of a rectified flow, and features like a vision model's.

The publisher released the network but no loss; this follows the description in arXiv 2502.13967 and, for the
distribution of times, the released noise module (after cloneofsimo/minRF and SD3, arXiv 2403.03206).

b batch · l patches · d decoder width · f teacher width · h w grid of patches
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.errors import LexelError
from lexel.tokenizers.flextok import FlexTok, FlexTokFlow
from lexel.train.objectives.base import Metrics, Objective
from lexel.train.objectives.teachers import VisionTeacher

TIMES = ("logit_normal", "stratified", "uniform", "mode")


@dataclass(frozen=True)
class AlignmentConfig:
    """REPA (arXiv 2410.06940): decoder patches, through a projection that is thrown away, should point where
    a frozen vision model's point.

    teacher: hub id or local folder, see `VisionTeacher` (FlexTok: DINOv2-L). size: side of the pictures the
    teacher is shown (518 gives DINOv2 37x37 patches). hidden: of the projection.
    """

    teacher: str
    weight: float = 1.0
    size: int | None = 518
    hidden: int = 2048

    def build(self, width: int) -> Alignment:
        """The term for a decoder of that width, its teacher loaded. Raises LexelError when that cannot be
        had."""
        return Alignment(PatchTeacher(self.teacher, self.size), width, self.hidden)


@dataclass(frozen=True)
class FlowObjectiveConfig:
    """times: distribution of the training times: `logit_normal` (the released default), `stratified` (the
    same, evenly spread over the batch), `uniform` or `mode` (SD3's, with `mode_scale`). alignment: see
    `AlignmentConfig` (None: only the flow). Raises ValueError on an unknown distribution."""

    times: str = "logit_normal"
    mode_scale: float = 0.0
    alignment: AlignmentConfig | None = None
    adversarial: ClassVar[float] = 0.0  # there is no discriminator

    def __post_init__(self) -> None:
        if self.times not in TIMES:
            raise ValueError(f"times must be one of {', '.join(TIMES)}, got {self.times!r}.")

    def build(self) -> FlowObjective:
        """The objective."""
        return FlowObjective(self)


class FlowObjective(Objective):
    """Stands where `TokenizerObjective` stands, without a discriminator. Holds the projection of the
    alignment, which learns with the tokenizer and is part of no exported state."""

    def __init__(self, config: FlowObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.alignment: Alignment | None = None

    def prepare(self, network: Any) -> None:
        """Make what the fresh tokenizer is aligned with. Raises LexelError for one without a flow, or without
        features where they are to be aligned."""
        if not isinstance(network, FlexTok):
            raise LexelError("objective/tokenizer=flow trains tokenizer=flextok only.")
        if self.config.alignment is not None:
            if network.config.feature_layer is None:
                raise LexelError("alignment needs features: set tokenizer.feature_layer.")
            self.alignment = self.config.alignment.build(network.config.decoder.dim)

    def predict(self, network: Any, pixels: Tensor, step: int) -> FlexTokFlow:
        """The tokenizer's training pass at drawn times."""
        return network.flow(pixels, sample_times(self.config.times, pixels, self.config.mode_scale))

    def generator_loss(
        self, output: FlexTokFlow, pixels: Tensor, step: int, last_layer: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Mean squared error of the velocity, plus the weighted alignment; scalar and detached metrics."""
        error = (output.velocity.float() - output.target.float()).square().mean()
        loss, metrics = error, {"flow": error.detach()}
        if self.alignment is not None and self.config.alignment is not None:
            distance = self.alignment(output.features, output.grid, pixels)
            loss = loss + self.config.alignment.weight * distance
            metrics["alignment"] = distance.detach()
        for name, value in output.quantizer.losses.items():
            loss = loss + value
            metrics[name] = value.detach()
        return loss, {**metrics, **output.quantizer.metrics, "loss": loss.detach()}


class Alignment(nn.Module):
    """Decoder patches ``[b, l, d]`` against the teacher's: 1 - cosine, mean over the teacher's grid, onto
    which ours are interpolated. Scalar in 0..2."""

    def __init__(self, teacher: PatchTeacher, width: int, hidden: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, teacher.width),
        )
        # In a tuple it is no submodule: part of no state dict, optimizer or checkpoint.
        self._teacher = (teacher,)

    def forward(self, features: Tensor, grid: tuple[int, int], pixels: Tensor) -> Tensor:
        """See the class; grid: (h, w) of the features, pixels: ``[b, 3, H, W]`` in [-1, 1]."""
        target = self._teacher[0].to(pixels.device)(pixels)
        own = rearrange(features, "b (h w) d -> b d h w", h=grid[0])
        own = F.interpolate(own.float(), target.shape[2:], mode="bilinear", align_corners=False)
        projected = self.head(rearrange(own, "b d h w -> b h w d"))
        return (
            1 - F.cosine_similarity(projected.float(), rearrange(target, "b f h w -> b h w f"), dim=-1).mean()
        )


class PatchTeacher(VisionTeacher):
    """Pixels ``[b, 3, h, w]`` in [-1, 1] to the patches of the last layer, ``[b, f, h, w]``; class and
    register tokens in front of them are left out. Raises LexelError for a model without square patches."""

    def __init__(self, name: str, size: int | None = None) -> None:
        super().__init__(name, size, "patches")
        if self.size % self.network.config.patch_size:
            raise LexelError(f"the teacher {name} has no whole square patches at {self.size} pixels.")

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        return rearrange(super().forward(pixels).float(), "b (h w) f -> b f h w", h=self.grid[0])


def sample_times(kind: str, like: Tensor, mode_scale: float = 0.0) -> Tensor:
    """Float32 ``[b]`` in [0, 1] for a batch like `like`; kinds as in `FlowObjectiveConfig`."""
    count, device = len(like), like.device
    if kind == "logit_normal":
        return torch.randn(count, device=device).sigmoid()
    uniform = torch.rand(count, device=device)
    if kind == "stratified":
        share = (torch.arange(count, device=device) + uniform) / count
        return (torch.erfinv(2 * share - 1) * math.sqrt(2)).sigmoid()
    if kind == "mode":
        # SD3, equation 20.
        bend = torch.cos(math.pi * uniform / 2).square() - 1 + uniform
        return 1 - uniform - mode_scale * bend
    return uniform
