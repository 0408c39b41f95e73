"""LARP's discriminator of clips (arXiv 2410.21264, github.com/hywang66/LARP): a transformer over patches of a
few frames, and one verdict per clip.

b batch · t frames · h w picture · d width
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from lexel.nn.positions import clip_positions
from lexel.nn.vit import VisionBlock


@dataclass(frozen=True)
class ClipDiscriminatorConfig:
    """image_size, frames: of the clips (squares). patch, frame_patch: pixels and frames of a patch. width,
    layers, heads: of the transformer. Raises ValueError when clips are no multiple of patches."""

    image_size: int = 128
    frames: int = 16
    patch: int = 8
    frame_patch: int = 4
    width: int = 512
    layers: int = 12
    heads: int = 8

    def __post_init__(self) -> None:
        if self.image_size % self.patch or self.frames % self.frame_patch:
            raise ValueError(
                f"clips of {self.frames} frames of {self.image_size} pixels are no multiple of patches of "
                f"{self.frame_patch} frames and {self.patch} pixels."
            )

    def build(self) -> ClipDiscriminator:
        """The discriminator with fresh weights."""
        return ClipDiscriminator(self)


class ClipDiscriminator(nn.Module):
    """Clips ``[b, t, 3, h, w]`` in [-1, 1] to one logit each ``[b, 1]``; large means real."""

    positions: Tensor

    def __init__(self, config: ClipDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        size = (config.frame_patch, config.patch, config.patch)
        self.embed = nn.Conv3d(3, config.width, size, stride=size)
        table = clip_positions(
            config.width, config.frames // config.frame_patch, config.image_size // config.patch
        )
        self.register_buffer("positions", table, persistent=False)
        self.verdict = nn.Parameter(torch.empty(1, 1, config.width))
        self.blocks = nn.ModuleList(
            VisionBlock(config.width, config.heads, in_bias=False) for _ in range(config.layers)
        )
        self.norm_final = nn.LayerNorm(config.width, eps=1e-6)
        self.fc = nn.Linear(config.width, 1)
        self.apply(_initialise)
        nn.init.xavier_uniform_(self.verdict)

    def forward(self, video: Tensor) -> Tensor:
        """See the class. Raises ValueError for clips of another shape."""
        config = self.config
        wanted = (config.frames, 3, config.image_size, config.image_size)
        if tuple(video.shape[1:]) != wanted:
            raise ValueError(
                f"the discriminator judges clips [b, {', '.join(map(str, wanted))}], got "
                f"{list(video.shape)}; set objective.tokenizer.discriminator to the data's sizes."
            )
        patches = self.embed((rearrange(video, "b t c h w -> b c t h w") + 1) / 2)
        x = rearrange(patches, "b d u h w -> b (u h w) d") + self.positions
        x = torch.cat([self.verdict.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.fc(self.norm_final(x[:, 0]))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv3d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
