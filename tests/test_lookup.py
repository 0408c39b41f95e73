"""Prompt lookup against the definition written out."""

from __future__ import annotations

import random

import pytest

from lexel.sample.lookup import continuation


def by_definition(ids: list[int], most: int, longest: int) -> list[int]:
    for size in range(min(longest, len(ids) - 1), 0, -1):
        for end in range(len(ids) - 1, size - 1, -1):
            if ids[end - size : end] == ids[-size:]:
                return ids[end : end + most]
    return []


@pytest.mark.parametrize(
    ("ids", "most", "longest", "expected"),
    [
        ([1, 2, 3, 9, 1, 2], 4, 4, [3, 9, 1, 2]),  # what followed "1 2"
        ([1, 2, 3, 9, 1, 2], 1, 4, [3]),
        ([1, 2, 3, 8, 2, 4, 1, 2], 1, 4, [3]),  # the longer ending wins over the later one
        ([1, 2, 3, 8, 2, 4, 1, 2], 1, 1, [4]),  # ... unless only one token is compared
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, 4, [4, 1]),  # of equally long ones the latest
        ([5, 5, 5, 5], 3, 4, [5]),  # an occurrence may overlap the ending
        ([1, 2, 3], 3, 4, []),  # the last token is new
        ([7], 3, 4, []),
        ([], 3, 4, []),
        ([1, 1], 0, 4, []),
    ],
)
def test_known_cases(ids: list[int], most: int, longest: int, expected: list[int]) -> None:
    assert continuation(ids, most, longest) == expected
    assert continuation(tuple(ids), most, longest) == expected


def test_it_is_the_definition_on_random_texts() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        ids = [rng.randrange(rng.choice((2, 3, 6))) for _ in range(rng.randrange(2, 24))]
        most, longest = rng.randrange(1, 6), rng.randrange(1, 6)
        assert continuation(ids, most, longest) == by_definition(ids, most, longest), (ids, most, longest)


def test_an_ending_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="longest=0"):
        continuation([1, 1], 2, 0)
