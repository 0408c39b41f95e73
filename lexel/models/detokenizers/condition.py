"""What a trained detokenizer's network is given: codes or features as a map beside the picture, or as tokens.

b batch · n code positions · m tokens · k codebooks · f feature width · d condition channels · h w code grid
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from lexel.models.detokenizers.base import Condition
from lexel.types import Codes

if TYPE_CHECKING:
    from lexel.models.detokenizers.diffusion import DiffusionDetokenizerConfig


class Given(NamedTuple):
    """A condition as the network takes it: plane ``[b, d, h, w]`` beside the noisy picture; tokens
    ``[b, m, d]``, of which `present` ``[b, m]`` are not the null vector."""

    plane: Tensor | None
    tokens: Tensor | None
    present: Tensor | None

    def pick(self, keep: Tensor, other: Given) -> Given:
        """This condition in the rows where bool `keep` ``[b]`` is true, else the `other`."""
        return Given(
            *(
                a
                if a is None or b is None
                else torch.where(rearrange(keep, f"b -> b{' 1' * (a.ndim - 1)}"), a, b)
                for a, b in zip(self, other)
            )
        )

    def and_then(self, other: Given) -> Given:
        """The rows of both."""
        return Given(*(a if a is None or b is None else torch.cat([a, b]) for a, b in zip(self, other)))


class Reader(nn.Module):
    """Codes or features → vectors ``[b, n, d]``: a position's codebooks summed, features projected."""

    def __init__(self, config: DiffusionDetokenizerConfig) -> None:
        super().__init__()
        self.config, d = config, config.condition_dim
        if config.reads == "codes":
            self.tables = nn.ModuleList(nn.Embedding(size, d) for size in config.codebook_sizes)
        else:
            assert config.feature_dim is not None
            self.project = nn.Sequential(nn.LayerNorm(config.feature_dim), nn.Linear(config.feature_dim, d))

    def whole(self, condition: Condition) -> Condition:
        """1D codes, or scales, of which only the first are given, filled up to all positions."""
        if isinstance(condition, Tensor) or self.config.raster:
            return condition
        b, n, _ = condition.indices.shape
        if n >= self.config.positions:
            return condition
        lengths = condition.indices.new_full((b,), n) if condition.lengths is None else condition.lengths
        missing = self.config.positions - n
        keep = None if condition.keep is None else F.pad(condition.keep, (0, missing))
        return Codes(F.pad(condition.indices, (0, 0, 0, missing)), lengths=lengths, keep=keep)

    def embed(self, condition: Condition) -> Tensor:
        """Raises ValueError when the condition is not of the configured shape."""
        reads, sizes = self.config.reads, self.config.codebook_sizes
        if isinstance(condition, Tensor) != (reads == "features"):
            raise ValueError(f"this detokenizer reads {reads}, got {type(condition).__name__}.")
        values = condition if isinstance(condition, Tensor) else condition.indices
        n, last = self.config.positions, self.config.feature_dim if reads == "features" else len(sizes)
        if tuple(values.shape[1:]) != (n, last):
            raise ValueError(f"this detokenizer reads {reads} [b, {n}, {last}], got {tuple(values.shape)}.")
        if isinstance(condition, Tensor):
            return self.project(condition)
        return torch.stack([table(values[..., j]) for j, table in enumerate(self.tables)]).sum(dim=0)

    def present(self, condition: Condition) -> Tensor:
        """Bool ``[b, n]``: positions that hold something."""
        if isinstance(condition, Tensor):
            return torch.ones(condition.shape[:2], dtype=torch.bool, device=condition.device)
        indices = condition.indices
        there = torch.ones(indices.shape[:2], dtype=torch.bool, device=indices.device)
        if condition.lengths is not None:
            there &= torch.arange(there.shape[1], device=there.device) < condition.lengths[:, None]
        return there if condition.keep is None else there & condition.keep.bool()


class CodeMap(Reader):
    """Codes → condition map ``[b, d, h, w]``: raster codes lie on the grid, the scales of multi-scale codes
    are enlarged to it and summed, 1D codes are gathered by one cross-attention from a learned query per cell;
    then two convolutions let neighbours speak."""

    def __init__(self, config: DiffusionDetokenizerConfig) -> None:
        super().__init__(config)
        d, (h, w) = config.condition_dim, cast("tuple[int, int]", config.grid)
        self.places = nn.Parameter(torch.randn(h * w, d) * 0.02)
        if config.length is not None:
            self.code_places = nn.Parameter(torch.randn(config.length, d) * 0.02)
            self.norm = nn.LayerNorm(d)
            self.attention = nn.MultiheadAttention(d, max(1, d // 16), batch_first=True)
        self.mix = nn.Sequential(nn.Conv2d(d, d, 3, padding=1), nn.SiLU(), nn.Conv2d(d, d, 3, padding=1))

    def forward(self, condition: Condition) -> Tensor:
        """Raises ValueError when the condition is not of the configured shape."""
        x = self.embed(condition)
        there = self.present(condition)
        if self.config.length is not None:
            x = self._gather(x, None if bool(there.all()) else ~there)
        else:
            x = x.masked_fill(~there[..., None], 0)
            x = (self._stack(x) if self.config.scales else x) + self.places
        x = rearrange(x, "b (h w) d -> b d h w", h=cast("tuple[int, int]", self.config.grid)[0])
        return x + self.mix(x)

    def _gather(self, x: Tensor, unused: Tensor | None) -> Tensor:
        keys = self.norm(x + self.code_places)
        queries = repeat(self.places, "c d -> b c d", b=len(x))
        attended, _ = self.attention(queries, keys, keys, key_padding_mask=unused, need_weights=False)
        return queries + attended

    def _stack(self, x: Tensor) -> Tensor:
        scales = cast("tuple[tuple[int, int], ...]", self.config.scales)
        maps = [
            F.interpolate(rearrange(part, "b (h w) d -> b d h w", h=h), size=self.config.grid, mode="nearest")
            for part, (h, w) in zip(x.split([h * w for h, w in scales], dim=1), scales)
        ]
        return rearrange(torch.stack(maps).sum(dim=0), "b d h w -> b (h w) d")


class CodeTokens(Reader):
    """Codes → one token each, ``[b, n, d]``, with learned positions that start as the network's own fixed
    ones where codes lie on a grid."""

    def __init__(self, config: DiffusionDetokenizerConfig) -> None:
        super().__init__(config)
        shape = (config.positions, config.condition_dim)
        start = torch.randn(shape)
        if config.raster:
            start = waves(config.condition_dim, cast("tuple[int, int]", config.grid))
        self.places = nn.Parameter(start)
        self.norm = nn.LayerNorm(config.condition_dim)

    def forward(self, condition: Condition) -> Tensor:
        """Raises ValueError when the condition is not of the configured shape."""
        return self.norm(self.embed(condition) + self.places)


def waves(dim: int, size: tuple[int, int]) -> Tensor:
    """Sine and cosine of the two coordinates in a grid of `size`, scaled alike for all grids,
    ``[h*w, dim]``."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    return get_2d_sincos_pos_embed(dim, size, output_type="pt", base_size=8).float()
