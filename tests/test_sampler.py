from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from lexel.data.sampler import Draw, DrawnDataset, ResumableSampler, mix_seed


class Numbers(Dataset):
    def __len__(self):
        return 13

    def __getitem__(self, index):
        return index * 10


def identity(items):
    return items


@given(
    length=st.integers(1, 30),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
    runs=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    seed=st.integers(0, 2**70),
)
def test_every_example_once_per_epoch_whatever_the_ranks_and_kills(
    length, batch_size, world_size, runs, seed
):
    """Each entry of `runs` is a process group killed after so many batches; the next one resumes there."""
    draws, done = [], 0
    for batches in runs:
        for rank in range(world_size):
            sampler = ResumableSampler(length, batch_size, seed, rank, world_size, start_batch=done)
            draws += [draw for batch in islice(sampler, batches) for draw in batch]
        done += batches
    draws.sort(key=lambda draw: draw.counter)
    assert [draw.counter for draw in draws] == list(range(done * batch_size * world_size))
    for epoch in range(len(draws) // length):
        indices = [draw.index for draw in draws[epoch * length : (epoch + 1) * length]]
        assert sorted(indices) == list(range(length))


@given(world_size=st.sampled_from([1, 2, 3, 4, 6]), start=st.integers(0, 20))
def test_the_stream_does_not_depend_on_the_number_of_ranks(world_size, start):
    alone = ResumableSampler(17, 12, seed=5, start_batch=start)
    ranks = [ResumableSampler(17, 12 // world_size, 5, r, world_size, start) for r in range(world_size)]
    together = {draw for sampler in ranks for draw in next(iter(sampler))}
    assert together == set(next(iter(alone)))


def test_epochs_and_seeds_are_shuffled_differently():
    sampler = ResumableSampler(50, 50, seed=1)
    orders = [sampler.permutation(0), sampler.permutation(1), ResumableSampler(50, 50, seed=2).permutation(0)]
    assert not any(torch.equal(a, b) for a, b in [(orders[0], orders[1]), (orders[0], orders[2])])
    assert torch.equal(sampler.permutation(0), orders[0])  # after it left the cache, too


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_deliver_the_same_batches_in_the_same_order():
    def read(workers):
        sampler = ResumableSampler(13, 4, seed=3, start_batch=2)
        loader = DataLoader(
            DrawnDataset(Numbers()), batch_sampler=sampler, num_workers=workers, collate_fn=identity
        )
        return list(islice(loader, 6))

    sampler = ResumableSampler(13, 4, seed=3)
    expected = [[draw.index * 10 for draw in sampler.batch(number)] for number in range(2, 8)]
    assert read(0) == read(2) == expected


def test_mixed_seeds_differ_and_fit_a_generator():
    seeds = {mix_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert 0 <= min(seeds) <= max(seeds) < 2**63


@pytest.mark.parametrize(
    "arguments", [(0, 1), (5, 0), (5, 1, 0, 2, 2), (5, 1, 0, -1, 2), (5, 1, 0, 0, 1, -1)]
)
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match=r"must lie|needs"):
        ResumableSampler(*arguments)


def test_draws_are_values():
    assert Draw(1, 2) == Draw(1, 2)
    assert len({Draw(1, 2), Draw(1, 2), Draw(2, 1)}) == 2
