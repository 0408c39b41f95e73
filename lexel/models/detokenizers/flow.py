"""A rectified-flow detokenizer: from discrete codes and noise to pixels.

Rectified flow (Liu et al., arXiv 2209.03003; Lipman et al., arXiv 2210.02747) on patches of pixels:
``x_t = (1 − t)·x_0 + t·noise`` with velocity ``noise − x_0``, integrated from t = 1 to 0 with diffusers'
`FlowMatchEulerDiscreteScheduler`. The network predicts the clean picture and the loss is taken on the
velocity ``(x_t − x̂_0) / t`` that follows (JiT, arXiv 2511.13720, whose distribution of times and limit on 1/t
are used too): a narrow network need not carry the noise of large patches. The condition is one map: the
codes' own embeddings, laid out on the grid (raster codes) or gathered onto it by cross-attention (1D codes),
then enlarged and concatenated to the noisy picture. Classifier-free guidance uses a learned null map. The
network is diffusers' `UNet2DModel`. The embedding tables are its own, so a detokenizer loads alone.

b batch · n code positions · k codebooks · d condition channels · h w grid · H W picture
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from lexel.hub import Pretrained
from lexel.nn.flow import integrate
from lexel.types import Codes, check_pixels

# JiT's training times, sigmoid of a normal, and the bound on the weight 1 / t² of their loss.
TIME_MEAN, TIME_SPREAD = 0.8, 0.8
SMALLEST_TIME = 0.05


@dataclass(frozen=True)
class FlowDetokenizerConfig:
    """Shape of a `FlowDetokenizer`.

    codebook_sizes: codes per codebook of the tokenizer. grid: (h, w) of the condition map; for raster codes
    their grid. length: positions of 1D codes, None for raster. image_size: (H, W) of the pictures. patch:
    side of the square of pixels the network sees as one place. channels: network width per resolution.
    layers: residual blocks per resolution. condition_dim: d. null_dropout: share of training samples whose
    condition is replaced by the null map. steps: Euler steps of `decode` unless told otherwise.
    Raises ValueError when sizes do not divide.
    """

    codebook_sizes: tuple[int, ...]
    grid: tuple[int, int]
    image_size: tuple[int, int] = (32, 32)
    length: int | None = None
    patch: int = 2
    channels: tuple[int, ...] = (32, 56)
    layers: int = 1
    condition_dim: int = 32
    null_dropout: float = 0.1
    steps: int = 8

    def __post_init__(self) -> None:
        for name in ("codebook_sizes", "grid", "image_size", "channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise ValueError(f"codebook_sizes must be positive, got {self.codebook_sizes}.")
        if not 0 <= self.null_dropout < 1:
            raise ValueError(f"null_dropout must lie in [0, 1), got {self.null_dropout}.")
        if self.length is not None and self.length < 1:
            raise ValueError(f"length must be positive or None for raster codes, got {self.length}.")
        if any(c % 8 for c in self.channels):
            raise ValueError(f"channels must be multiples of 8, got {self.channels}.")
        if self.length is not None and self.condition_dim % 16:
            raise ValueError(f"1D codes need a condition_dim divisible by 16, got {self.condition_dim}.")
        unit = self.patch * 2 ** (len(self.channels) - 1)
        for size, cells in zip(self.image_size, self.grid):
            if size % unit or size % (self.patch * cells):
                raise ValueError(
                    f"image_size {self.image_size} must be divisible by {unit} (patch, resolutions) and by "
                    f"patch {self.patch} times the grid {self.grid}."
                )

    @property
    def positions(self) -> int:
        """Code positions n."""
        return self.length if self.length is not None else self.grid[0] * self.grid[1]

    def build(self) -> FlowDetokenizer:
        """A detokenizer with random weights."""
        return FlowDetokenizer(self)


class CodeMap(nn.Module):
    """Codes → condition map ``[b, d, h, w]``: summed embeddings of a position's codebooks, put on the grid
    directly or, for 1D codes, by one cross-attention from a learned query per cell; then two convolutions
    let neighbours speak."""

    def __init__(self, config: FlowDetokenizerConfig) -> None:
        super().__init__()
        d = config.condition_dim
        self.config = config
        self.tables = nn.ModuleList(nn.Embedding(size, d) for size in config.codebook_sizes)
        cells = config.grid[0] * config.grid[1]
        self.places = nn.Parameter(torch.randn(cells, d) * 0.02)
        if config.length is not None:
            self.code_places = nn.Parameter(torch.randn(config.length, d) * 0.02)
            self.norm = nn.LayerNorm(d)
            self.attention = nn.MultiheadAttention(d, max(1, d // 16), batch_first=True)
        self.mix = nn.Sequential(nn.Conv2d(d, d, 3, padding=1), nn.SiLU(), nn.Conv2d(d, d, 3, padding=1))

    def forward(self, codes: Codes) -> Tensor:
        """Raises ValueError when the codes are not of the configured shape."""
        expected = (self.config.positions, len(self.tables))
        if tuple(codes.indices.shape[1:]) != expected:
            raise ValueError(
                f"this detokenizer reads codes [b, {expected[0]}, {expected[1]}], "
                f"got {tuple(codes.indices.shape)}."
            )
        x = torch.stack([table(codes.indices[..., j]) for j, table in enumerate(self.tables)]).sum(dim=0)
        if self.config.length is None:
            x = x + self.places
        else:
            x = self._gather(x, codes.lengths)
        x = rearrange(x, "b (h w) d -> b d h w", h=self.config.grid[0])
        return x + self.mix(x)

    def _gather(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        keys = self.norm(x + self.code_places)
        queries = repeat(self.places, "c d -> b c d", b=len(x))
        unused = None
        if lengths is not None:
            unused = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        attended, _ = self.attention(queries, keys, keys, key_padding_mask=unused, need_weights=False)
        return queries + attended


class FlowDetokenizer(nn.Module, Pretrained):
    """Draws pictures from codes by integrating a learned flow."""

    model_type: ClassVar[str] = "flow"
    config_class: ClassVar[type] = FlowDetokenizerConfig

    def __init__(self, config: FlowDetokenizerConfig) -> None:
        super().__init__()
        from diffusers.models.unets.unet_2d import UNet2DModel

        self.config = config
        self.codes = CodeMap(config)
        self.null = nn.Parameter(torch.zeros(config.condition_dim, 1, 1))
        pixels = 3 * config.patch**2
        height, width = (size // config.patch for size in config.image_size)
        self.network = UNet2DModel(
            sample_size=(height, width),
            in_channels=pixels + config.condition_dim,
            out_channels=pixels,
            block_out_channels=config.channels,
            down_block_types=("DownBlock2D",) * len(config.channels),
            up_block_types=("UpBlock2D",) * len(config.channels),
            layers_per_block=config.layers,
            attention_head_dim=16,
            norm_num_groups=8,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the pictures it draws."""
        return self.config.image_size

    def denoise(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """The predicted clean pictures ``[b, 3, H, W]``.

        x: noisy pictures ``[b, 3, H, W]``; times: ``[b]`` in (0, 1], 1 is pure noise; condition: maps
        ``[b, d, h, w]`` from `codes`, or the null map."""
        size = self.config.patch
        patches = F.pixel_unshuffle(x, size)
        enlarged = F.interpolate(condition, size=patches.shape[-2:], mode="nearest")
        # diffusers' sinusoidal time embedding is made for steps 0..1000.
        out = self.network(torch.cat([patches, enlarged], dim=1), times * 1000).sample
        return F.pixel_shuffle(out, size)

    def loss(
        self,
        pixels: Tensor,
        codes: Codes,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        times: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity at random times (weight bounded near 0), and detached metrics.

        pixels: ``[b, 3, H, W]`` in [-1, 1]; codes: theirs, from a frozen tokenizer. noise ``[b, 3, H, W]``
        and times ``[b]`` in (0, 1] replace the random draws. In training mode conditions drop out.
        Metrics: ``loss`` and ``x0_mse``, the error of the clean picture estimated in one step."""
        pixels = self._checked(pixels)
        noise = self._noise(len(pixels), pixels, generator) if noise is None else noise
        times = self._times(pixels, generator) if times is None else times
        condition = self.codes(codes)
        if self.training and self.config.null_dropout:
            dropped = self._uniform(pixels, generator) < self.config.null_dropout
            condition = torch.where(dropped[:, None, None, None], self.null, condition)
        t = times[:, None, None, None]
        noisy = (1 - t) * pixels + t * noise
        error = self.denoise(noisy, times, condition) - pixels
        # (x_t − x̂_0) / t differs from noise − x_0 by this error over t.
        loss = (error / t.clamp(min=SMALLEST_TIME)).square().mean()
        return loss, {"loss": loss.detach(), "x0_mse": error.detach().square().mean()}

    @torch.no_grad()
    def decode(
        self,
        codes: Codes,
        *,
        steps: int | None = None,
        guidance: float = 1.0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Pictures ``[b, 3, H, W]`` in [-1, 1] from codes.

        steps: Euler steps (None: the config's); guidance: scale of the conditional over the null velocity
        (1: conditional only, one network pass per step); noise ``[b, 3, H, W]``: the start, else drawn from
        `generator`."""
        condition = self.codes(codes)
        noise = self._noise(len(codes), condition, generator) if noise is None else noise
        null = self.null.expand_as(condition)

        def field(x: Tensor, time: float) -> Tensor:
            times = x.new_full((len(x),), time)
            if guidance == 1.0:
                return (x - self.denoise(x, times, condition)) / time
            both = self.denoise(x.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([condition, null]))
            given, free = both.chunk(2)
            return (x - (free + guidance * (given - free))) / time

        return integrate(field, noise.to(condition), self.config.steps if steps is None else steps).clamp(
            -1, 1
        )

    def _checked(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels)
        if tuple(pixels.shape[-2:]) != tuple(self.config.image_size):
            raise ValueError(
                f"this detokenizer draws {self.config.image_size}, got {tuple(pixels.shape[-2:])}."
            )
        return pixels

    def _noise(self, count: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
        device = generator.device if generator is not None else like.device
        shape = (count, 3, *self.config.image_size)
        return torch.randn(shape, generator=generator, device=device).to(like)

    def _times(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Logit-normal times, mostly on the noisy side, where the picture is decided."""
        device = generator.device if generator is not None else like.device
        normal = torch.randn(len(like), generator=generator, device=device).to(like)
        return (TIME_MEAN + TIME_SPREAD * normal).sigmoid()

    @staticmethod
    def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
        device = generator.device if generator is not None else like.device
        return torch.rand(len(like), generator=generator, device=device).to(like)
