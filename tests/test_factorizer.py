"""Cutting codes of many bits into sub-codes, and back."""

from __future__ import annotations

import pytest
import torch

from lexel.tokenizers.factorizer import MAX_BITS, CodeFactorizer

GROUPINGS = [(1,), (8,), (3, 5), (5, 3), (1, 1, 1), (2, 4), (4, 4, 4), (6, 12), (16, 16, 16, 14)]


@pytest.mark.parametrize("msb_first", [False, True], ids=["lsb", "msb"])
@pytest.mark.parametrize("groups", GROUPINGS, ids=str)
class TestEveryGrouping:
    def test_split_then_merge_changes_nothing(self, groups: tuple[int, ...], msb_first: bool) -> None:
        factorizer = CodeFactorizer(groups, msb_first)
        count = 1 << factorizer.bits
        codes = torch.arange(count) if count <= 1 << 12 else torch.randint(count, (3000,))
        codes = torch.cat([codes, torch.tensor([0, count - 1])])[:, None]
        parts = factorizer.split(codes)
        assert parts.shape == (len(codes), len(groups))
        assert (parts < torch.tensor(factorizer.sizes)).all()
        assert torch.equal(factorizer.merge(parts), codes)

    def test_bits_round_trip_and_keep_their_channel(self, groups: tuple[int, ...], msb_first: bool) -> None:
        factorizer = CodeFactorizer(groups, msb_first)
        bits = torch.randint(2, (2, 5, factorizer.bits))
        parts = factorizer.from_bits(bits)
        assert torch.equal(factorizer.to_bits(parts), bits)
        assert torch.equal(factorizer.from_bits(bits.bool()), parts)
        assert torch.equal(factorizer.split(factorizer.merge(parts)), parts)

    def test_one_group_is_the_code_itself(self, groups: tuple[int, ...], msb_first: bool) -> None:
        whole = CodeFactorizer((sum(groups),), msb_first)
        codes = torch.randint(1 << whole.bits, (7, 1))
        assert torch.equal(whole.split(codes), codes)
        assert torch.equal(
            CodeFactorizer(groups, msb_first).merge(CodeFactorizer(groups, msb_first).split(codes)), codes
        )


def test_least_significant_first_as_open_magvit2() -> None:
    factorizer = CodeFactorizer((2, 4), msb_first=False)
    bits = torch.tensor([1, 0, 0, 1, 1, 0])
    assert factorizer.from_bits(bits).tolist() == [1, 2 + 4]
    assert factorizer.merge(torch.tensor([1, 6])).tolist() == [1 + 4 * 6]
    assert factorizer.sizes == (4, 16)


def test_most_significant_first_as_elm() -> None:
    factorizer = CodeFactorizer((2, 4), msb_first=True)
    bits = torch.tensor([1, 0, 0, 1, 1, 0])
    assert factorizer.from_bits(bits).tolist() == [2, 4 + 2]
    assert factorizer.merge(torch.tensor([2, 6])).tolist() == [2 * 16 + 6]


@pytest.mark.parametrize("groups", [(), (0, 3), (-1,), (40, 40)], ids=str)
def test_groups_that_cannot_be(groups: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="groups"):
        CodeFactorizer(groups, False)
    assert CodeFactorizer((MAX_BITS,), True).bits == MAX_BITS


@pytest.mark.parametrize(
    "codes", [torch.tensor([64]), torch.tensor([-1]), torch.tensor([1, 2]), torch.tensor([0.5])]
)
def test_codes_that_do_not_fit_are_refused(codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="codes must"):
        CodeFactorizer((2, 4), False).split(codes)


def test_sub_codes_and_bits_that_do_not_fit_are_refused() -> None:
    factorizer = CodeFactorizer((2, 4), False)
    with pytest.raises(ValueError, match="below 4, 16"):
        factorizer.merge(torch.tensor([4, 0]))
    with pytest.raises(ValueError, match="6 bits"):
        factorizer.from_bits(torch.zeros(5))
