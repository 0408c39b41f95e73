"""The cache stores what was appended, row by row, and forgets exactly what it is told to forget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lexel.errors import LexelError
from lexel.models.kv_cache import KVCache

LAYERS, HEADS, WIDTH = 2, 3, 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(batch: int, max_length: int) -> KVCache:
    return KVCache(LAYERS, batch, HEADS, max_length, WIDTH)


def push(cache: KVCache, keys: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Append ``[layers, b, g, q, e]`` to every layer (values are the keys negated)."""
    seen = [cache.append(layer, keys[layer], -keys[layer]) for layer in range(LAYERS)]
    cache.advance(keys.shape[3])
    return seen


def held(cache: KVCache, row: int) -> torch.Tensor:
    """``[layers, g, length, e]`` of one row."""
    return cache.keys[:, row, :, : cache.host_lengths[row]]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_rows_are_lists_that_grow_and_shrink_on_their_own(data: st.DataObject):
    batch = data.draw(st.integers(1, 3))
    cache = make(batch, 40)
    truth = [torch.zeros(LAYERS, HEADS, 0, WIDTH) for _ in range(batch)]
    for _ in range(data.draw(st.integers(1, 6))):
        new = data.draw(st.integers(1, 5))
        keys = torch.randn(LAYERS, batch, HEADS, new, WIDTH)
        seen = push(cache, keys)
        truth = [torch.cat((old, keys[:, row]), 2) for row, old in enumerate(truth)]
        assert seen[0][0].shape[2] == max(t.shape[2] for t in truth)
        lengths = [data.draw(st.integers(0, t.shape[2])) for t in truth]
        cache.crop(torch.tensor(lengths))
        truth = [t[:, :, :length] for t, length in zip(truth, lengths)]
        for row in range(batch):
            assert torch.equal(held(cache, row), truth[row])
            assert torch.equal(cache.values[:, row, :, : lengths[row]], -truth[row])
        assert cache.lengths.tolist() == lengths


def test_visible_is_the_lower_triangle_after_each_rows_own_tokens():
    cache = make(2, 8)
    push(cache, torch.randn(LAYERS, 2, HEADS, 3, WIDTH))
    assert cache.visible(1) is None
    assert cache.visible(2).tolist() == [[[True] * 4 + [False], [True] * 5]]
    cache.crop([1, 3])
    assert cache.visible(2).int().tolist() == [
        [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
        [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
    ]


@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 2, 0], [1], [0, 1, 2, 2]])
def test_reorder_copies_whole_rows(rows: list[int]):
    cache = make(3, 8)
    push(cache, torch.randn(LAYERS, 3, HEADS, 4, WIDTH))
    cache.crop([2, 3, 4])
    before = [held(cache, row).clone() for row in range(3)]
    cache.reorder(torch.tensor(rows))
    assert cache.host_lengths == tuple([2, 3, 4][row] for row in rows)
    for new, old in enumerate(rows):
        assert torch.equal(held(cache, new), before[old])
    push(cache, torch.randn(LAYERS, len(rows), HEADS, 1, WIDTH))
    for new, old in enumerate(rows):
        assert torch.equal(held(cache, new)[:, :, :-1], before[old])


def test_gather_closes_the_gaps_between_accepted_tree_nodes():
    cache = make(3, 12)
    push(cache, torch.randn(LAYERS, 3, HEADS, 3, WIDTH))
    cache.crop([3, 1, 2])
    tree = torch.randn(LAYERS, 3, HEADS, 5, WIDTH)
    prefix = [held(cache, row).clone() for row in range(3)]
    push(cache, tree)
    paths = [[0, 2, 4], [], [0, 1]]
    for row, (start, path) in enumerate(zip((3, 1, 2), paths)):
        cache.gather(row, start, path)
    assert cache.host_lengths == (8, 6, 7)
    cache.crop([6, 1, 4])
    assert cache.host_lengths == (6, 1, 4)
    for row, path in enumerate(paths):
        assert torch.equal(held(cache, row), torch.cat((prefix[row], tree[:, row][:, :, path]), 2))


def test_int_crop_caps_and_impossible_requests_say_so():
    cache = make(2, 4)
    push(cache, torch.randn(LAYERS, 2, HEADS, 3, WIDTH))
    with pytest.raises(LexelError, match=r"holds 4 positions, asked for 5; build it with max_length=5"):
        cache.append(0, torch.zeros(2, HEADS, 2, WIDTH), torch.zeros(2, HEADS, 2, WIDTH))
    cache.crop([1, 3])
    cache.crop(2)
    assert cache.host_lengths == (1, 2)
    with pytest.raises(ValueError, match="none longer than now"):
        cache.crop([2, 2])
    for start, path in ((0, [0, 2]), (1, [1]), (0, [1, 0]), (0, [-1])):
        with pytest.raises(ValueError, match="leaves a row of 2 tokens"):
            cache.gather(1, start, path)
