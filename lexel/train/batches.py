"""Batches for training and validation, with the place in the training stream taken from the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as lightning
from torch.utils.data import DataLoader, Dataset

from lexel.data.sampler import Draw, ResumableSampler, name_of
from lexel.train.settings import StageSettings


class Batches(lightning.LightningDataModule):
    """Endless training batches that begin after the `consumed` ones of the module, and a fixed set of
    validation batches (the same in every run, validation and number of processes alike).

    train, validation: datasets read by `Draw`; collate: list of items -> batch. `validation` may be None, or
    several datasets by name, each of which is then validated by itself.
    """

    def __init__(
        self,
        train: Dataset[Any],
        validation: Dataset[Any] | Mapping[str, Dataset[Any]] | None,
        collate: Callable[[list[Any]], Any],
        stage: StageSettings,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train = train
        self.validation = validation
        self.collate = collate
        self.stage = stage
        self.seed = seed

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the validation sets, where there are several."""
        return tuple(self.validation) if isinstance(self.validation, Mapping) else ()

    def train_dataloader(self) -> DataLoader[Any]:
        """Called by Lightning after the checkpoint is restored."""
        assert self.trainer is not None
        return self._loader(self.train, self._sampler(self.trainer.lightning_module.consumed))  # type: ignore[arg-type]

    def names(self, batch: int) -> list[str]:
        """What a user calls the examples of this process's training batch number `batch`."""
        return [name_of(self.train, draw) for draw in self._sampler(batch).batch(batch)]

    def _sampler(self, start: int) -> ResumableSampler:
        assert self.trainer is not None
        return ResumableSampler(
            len(self.train),  # type: ignore[arg-type]
            self.stage.batch_size,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            start_batch=start,
        )

    def val_dataloader(self) -> Any:
        """`validation_batches` batches of each validation set for this process, or none at all."""
        if self.validation is None:
            return []
        if isinstance(self.validation, Mapping):
            return [self._fixed(dataset) for dataset in self.validation.values()]
        return self._fixed(self.validation)

    def _fixed(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        assert self.trainer is not None
        batches = FixedBatches(
            len(dataset),  # type: ignore[arg-type]
            self.stage.batch_size,
            self.stage.validation_batches,
            self.trainer.global_rank,
            self.trainer.world_size,
        )
        return self._loader(dataset, batches)

    def _loader(self, dataset: Dataset[Any], sampler: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.stage.workers,
            persistent_workers=self.stage.workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )


class FixedBatches(Sequence[list[Draw]]):
    """The first ``count * world_size`` batches of a dataset in order, dealt out to the processes; a small
    dataset is gone through repeatedly, so that all processes have equally many."""

    def __init__(self, length: int, batch_size: int, count: int, rank: int = 0, world_size: int = 1) -> None:
        size = min(batch_size, length)
        starts = [(number * world_size + rank) * size for number in range(count)]
        self._batches = [[Draw((start + i) % length, start + i) for i in range(size)] for start in starts]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]

    def __iter__(self) -> Iterator[list[Draw]]:
        return iter(self._batches)
