"""A picture's codes from their neighbours alone: the cheapest guess at a code that is not known yet.

Log-linear in three tables: ``logits = left[code to the left] + above[code above] + slot[position]``, the
maximum-entropy model with these pairs of features. No network is run, so that a window of Jacobi decoding can
begin with codes that fit their surroundings rather than with random ones (a learned form of the spatial
initialisations of speculative Jacobi decoding, Teng et al., arXiv:2410.01699), or a chain be drafted.

n rows · b batch · l positions · k codebooks · K codes of one codebook
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.hub import Pretrained
from lexel.types import Codes

ABSENT = -1
"""In place of a neighbour's code: there is none."""


@dataclass(frozen=True)
class NeighbourTableConfig:
    """Size of a `NeighbourTable`. codebook_sizes: codes of each codebook; grid: (height, width) of raster
    codes, or length: positions of a 1D sequence. Raises ValueError unless exactly one of them is given."""

    codebook_sizes: tuple[int, ...]
    grid: tuple[int, int] | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "codebook_sizes", tuple(self.codebook_sizes))
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(self.grid))
        if (self.grid is None) == (self.length is None):
            raise ValueError(
                f"a neighbour table needs exactly one of grid and length, got {self.grid} and {self.length}."
            )
        if not self.codebook_sizes or min(self.codebook_sizes) < 1 or self.slots < 1:
            raise ValueError(
                f"codebooks and positions must not be empty, got {self.codebook_sizes} and {self.slots}."
            )

    @property
    def slots(self) -> int:
        """Positions of a picture."""
        return self.grid[0] * self.grid[1] if self.grid is not None else self.length or 0

    def build(self) -> NeighbourTable:
        """A table that knows nothing: all codes alike."""
        return NeighbourTable(self)


class NeighbourTable(nn.Module, Pretrained):
    """Logits of a code given the codes to the left and above, and its position; one set of tables per
    codebook, each reading the neighbours in its own codebook."""

    model_type: ClassVar[str] = "lexel_neighbours"
    config_class: ClassVar[type] = NeighbourTableConfig

    def __init__(self, config: NeighbourTableConfig) -> None:
        super().__init__()
        self.config = config
        sizes = config.codebook_sizes
        # The last row is that of an absent neighbour.
        self.left = nn.ModuleList(_zeros(size + 1, size) for size in sizes)
        self.above = nn.ModuleList(_zeros(size + 1, size) for size in sizes if config.grid is not None)
        self.slot = nn.ModuleList(_zeros(config.slots, size) for size in sizes)

    def forward(self, left: Tensor, above: Tensor | None, slot: Tensor, codebook: int = 0) -> Tensor:
        """Logits ``[n, K]``. left, above: codes long ``[n]`` of `codebook`, -1 where there is none; slot:
        long ``[n]``, position in raster order. `above` is not read for 1D codes (None)."""
        last = self.config.codebook_sizes[codebook]
        logits = self.left[codebook](left.where(left != ABSENT, last)) + self.slot[codebook](slot)
        if self.config.grid is None:
            return logits
        if above is None:
            raise ValueError("a table of raster codes needs the codes above.")
        return logits + self.above[codebook](above.where(above != ABSENT, last))

    def neighbours(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes to the left and above of each of ``[b, l, k]``, of the same shape, -1 at the edges. For 1D
        codes (l up to the config's length) the one before, and None."""
        if self.config.grid is None:
            return F.pad(indices[:, :-1], (0, 0, 1, 0), value=ABSENT), None
        rows = indices.unflatten(1, self.config.grid)
        left = F.pad(rows[:, :, :-1], (0, 0, 1, 0), value=ABSENT)
        above = F.pad(rows[:, :-1], (0, 0, 0, 0, 1, 0), value=ABSENT)
        return left.flatten(1, 2), above.flatten(1, 2)

    def loss(self, codes: Codes) -> Tensor:
        """Cross-entropies in nats of the codes in use, float ``[m, k]``."""
        indices = codes.indices
        left, above = self.neighbours(indices)
        slots = torch.arange(indices.shape[1], device=indices.device).expand(indices.shape[:2])
        used = slots >= 0 if codes.lengths is None else slots < codes.lengths[:, None]
        columns = []
        for j in range(len(self.config.codebook_sizes)):
            upper = None if above is None else above[..., j][used]
            logits = self(left[..., j][used], upper, slots[used], j)
            columns.append(F.cross_entropy(logits.float(), indices[..., j][used], reduction="none"))
        return torch.stack(columns, dim=1)


def _zeros(rows: int, columns: int) -> nn.Embedding:
    table = nn.Embedding(rows, columns)
    nn.init.zeros_(table.weight)
    return table
