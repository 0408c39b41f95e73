"""Which example comes when: a pure function of (seed, batch number), so resuming needs no saved state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler


@dataclass(frozen=True)
class Draw:
    """index: which example; counter: how many draws of the whole run (all ranks) came before this one.

    A dataset takes all its randomness from ``(seed, counter)``, so that the same draw gives the same item in
    every process, worker and resumed run.
    """

    index: int
    counter: int


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several integers; unlike a sum, ``(1, 2)`` and ``(2, 1)`` do not collide."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class ResumableSampler(Sampler[list[Draw]]):
    """Endless shuffled batches for ``DataLoader(batch_sampler=...)``, resumable at any batch by its number.

    All ranks walk one global stream: epoch after epoch, each a fresh permutation of ``range(length)`` given
    by (seed, epoch). Batch number `t` is the next ``batch_size * world_size`` places of the stream and rank
    `r` takes every `world_size`-th of them, beginning with the `r`-th. Nothing is dropped: a batch that
    begins in one epoch ends in the next. So the union over ranks holds each example exactly once per epoch,
    whatever the number of workers, and a run killed after `t` batches continues exactly with
    ``start_batch=t`` (with another number of ranks too, if ``batch_size * world_size`` stays and `t` counts
    the same global batches).

    length: examples in the dataset; batch_size: draws per batch *on this rank*. ValueError on empty or
    inconsistent sizes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
    ) -> None:
        if length < 1 or batch_size < 1 or start_batch < 0:
            raise ValueError(
                f"A sampler needs length >= 1, batch_size >= 1 and start_batch >= 0, "
                f"got {length}, {batch_size} and {start_batch}."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..{world_size - 1} (world_size - 1), got {rank}.")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_batch = start_batch
        self._permutations: dict[int, Tensor] = {}

    def permutation(self, epoch: int) -> Tensor:
        """The order of one epoch, long ``[length]``."""
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            kept = {e: order for e, order in self._permutations.items() if e == epoch - 1}
            self._permutations = {**kept, epoch: torch.randperm(self.length, generator=generator)}
        return self._permutations[epoch]

    def batch(self, number: int) -> list[Draw]:
        """This rank's draws of the global batch `number`."""
        first = number * self.batch_size * self.world_size + self.rank
        draws = []
        for j in range(self.batch_size):
            counter = first + j * self.world_size
            epoch, place = divmod(counter, self.length)
            draws.append(Draw(int(self.permutation(epoch)[place]), counter))
        return draws

    def __iter__(self) -> Iterator[list[Draw]]:
        return (self.batch(number) for number in count(self.start_batch))


def name_of(dataset: Any, draw: Draw) -> str:
    """What a user calls the item of a draw: what the dataset's `name` says, else its number."""
    return dataset.name(draw) if hasattr(dataset, "name") else f"example {draw.index}"


class DrawnDataset(Dataset[Any]):
    """A map-style dataset read by `Draw` instead of by number. With a `seed` each draw is another variation
    of its picture, by the dataset's ``varied(index, seed of the draw)``; without one every draw is alike."""

    def __init__(self, dataset: Dataset[Any], seed: int | None = None) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, draw: Draw) -> Any:
        if self.seed is None:
            return self.dataset[draw.index]
        return self.dataset.varied(draw.index, mix_seed(self.seed, draw.counter))  # type: ignore[attr-defined]

    def name(self, draw: Draw) -> str:
        """The key of the drawn example, for messages."""
        return str(getattr(self.dataset[draw.index], "key", f"example {draw.index}"))
