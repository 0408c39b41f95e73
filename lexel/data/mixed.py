"""Several sources in one stream with weights, a pure function of (seed, number of the draw).

The stream is cut into blocks of `BLOCK` draws. Every block holds each source as often as its weight says, in
an order that (seed, block) decides. So how often a source was drawn before any place is known without
counting: every source is gone through epoch after epoch without repetition, and a resumed run continues
anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lexel.data.sampler import Draw, ResumableSampler, mix_seed, name_of

BLOCK = 4096
"""Draws of one block: shares are exact to one in so many, and no source with a weight has fewer than one."""


class MixedDataset(Dataset[Any]):
    """Sources by name, mixed by their relative `weights`. Read by `Draw`, of which only `counter` counts: it
    decides the source and, within it, the example; the source receives the same counter for its own
    randomness.

    Raises ValueError for no sources, an empty one, a negative weight, and when all weights are zero.
    """

    def __init__(
        self, sources: Mapping[str, Dataset[Any]], weights: Mapping[str, float], seed: int = 0
    ) -> None:
        check_weights(weights)
        self.sources = {name: dataset for name, dataset in sources.items() if weights[name] > 0}
        lengths = {name: len(dataset) for name, dataset in self.sources.items()}  # type: ignore[arg-type]
        if empty := [name for name, length in lengths.items() if not length]:
            raise ValueError(f"the source {empty[0]!r} is empty; give it data or the weight 0.")
        self.names = tuple(self.sources)
        self.seed = seed
        self.counts = block_counts([weights[name] for name in self.names])
        self._length = sum(lengths.values())
        self._within = [
            ResumableSampler(lengths[name], 1, mix_seed(seed, number))
            for number, name in enumerate(self.names)
        ]
        self._block = (-1, torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, draw: Draw) -> Any:
        name, inner = self.place(draw.counter)
        return self.sources[name][inner]

    def place(self, counter: int) -> tuple[str, Draw]:
        """The source of a draw, and what is drawn from it."""
        block, place = divmod(counter, BLOCK)
        if self._block[0] != block:
            self._block = (block, *self._order(block))
        number = int(self._block[1][place])
        earlier = block * self.counts[number] + int(self._block[2][place])
        index = self._within[number].batch(earlier)[0].index
        return self.names[number], Draw(index, counter)

    def name(self, draw: Draw) -> str:
        """``source: key`` of a draw, for messages."""
        name, inner = self.place(draw.counter)
        return f"{name}: {name_of(self.sources[name], inner)}"

    def _order(self, block: int) -> tuple[Tensor, Tensor]:
        """For each place of a block the number of its source, and how often that one came before it within
        the block; long ``[BLOCK]`` each."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, -1, block))
        order = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        order = order[torch.randperm(BLOCK, generator=generator)]
        earlier = torch.empty(BLOCK, dtype=torch.long)
        for number, count in enumerate(self.counts):
            earlier[order == number] = torch.arange(count)
        return order, earlier


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ValueError unless there is a source, no weight is negative and one is positive."""
    if not weights:
        raise ValueError("a mixture needs at least one source.")
    if negative := [name for name, weight in weights.items() if not 0 <= weight < float("inf")]:
        raise ValueError(f"the weight of source {negative[0]!r} must be >= 0, got {weights[negative[0]]}.")
    if not any(weights.values()):
        raise ValueError(f"the weights of the sources {', '.join(weights)} are all zero; raise one.")
    if len(weights) > BLOCK:
        raise ValueError(f"a mixture holds at most {BLOCK} sources, got {len(weights)}.")


def block_counts(weights: list[float]) -> list[int]:
    """How often each source stands in a block: its share rounded by largest remainder, at least once."""
    total = sum(weights)
    exact = [BLOCK * weight / total for weight in weights]
    counts = [max(1, int(value)) for value in exact]
    by_need = sorted(range(len(weights)), key=lambda i: exact[i] - counts[i])
    while (missing := BLOCK - sum(counts)) != 0:
        number = by_need.pop() if missing > 0 else counts.index(max(counts))
        counts[number] += 1 if missing > 0 else -1
    return counts
