"""The one path from logits to distributions on their supports, and what is done with those."""

import itertools

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.generation import logits_process as hf

from lexel.sample.logits import Distribution, SamplingConfig, draw, target_distribution


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(rows=5, size=11, seed=0):
    return torch.randn(rows, size, generator=seeded(seed), dtype=torch.float64) * 2


def dense(*arguments, **options):
    found = target_distribution(*arguments, **options)
    assert bool((found.ids.diff(dim=1) > 0).all())
    return found.dense()


def warped(rows, config):
    """By transformers' warpers."""
    top = [hf.TopKLogitsWarper(config.top_k)] if config.top_k else []
    nucleus = [hf.TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []
    warpers = [hf.TemperatureLogitsWarper(config.temperature)] if config.temperature != 1 else []
    warpers += nucleus + top if config.top_p_first else top + nucleus
    warpers += [hf.MinPLogitsWarper(config.min_p)] if config.min_p else []
    for warper in warpers:
        rows = warper(None, rows)
    return rows.softmax(1)


COMBINATIONS = [
    SamplingConfig(temperature, top_k, top_p, min_p, top_p_first=first)
    for temperature, top_k, top_p, min_p, first in itertools.product(
        (1.0, 0.7), (0, 3, 20, 500), (1.0, 0.9, 0.4), (0.0, 0.1, 1.0), (False, True)
    )
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 7), (6, 30), (9, 200)])
def test_filters_equal_transformers_warpers(shape, dtype):
    rows = torch.randn(*shape, generator=seeded(1), dtype=dtype) * 2
    for config in COMBINATIONS:
        expected, found = warped(rows, config), dense(rows, None, config)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(found > 0, expected > 0), config


@pytest.mark.parametrize("coarse", [torch.round, lambda rows: rows.bfloat16().float()])
def test_filters_equal_transformers_warpers_where_scores_tie(coarse):
    rows = coarse(torch.randn(8, 60, generator=seeded(2)) * 2)
    assert any(len(row.unique()) < 60 for row in rows)
    for config in COMBINATIONS:
        expected, found = warped(rows, config), dense(rows, None, config)
        if config.top_p < 1:  # which of equal ids stays is up to transformers' unstable sort
            expected, found = expected.sort(dim=1).values, found.sort(dim=1).values
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_order_of_top_k_and_top_p_matters():
    rows = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    later = SamplingConfig(top_k=2, top_p=0.5)
    assert (dense(rows, None, later) > 0).sum() == 1  # 4/7 of what is left hold 0.5
    first = SamplingConfig(top_k=2, top_p=0.5, top_p_first=True)
    assert (dense(rows, None, first) > 0).sum() == 2


def test_top_p_drops_the_lower_of_equal_ids():
    assert target_distribution(torch.zeros(1, 4), None, SamplingConfig(top_p=0.5)).ids.tolist() == [[2, 3]]


def test_a_support_holds_what_the_filter_keeps():
    found = target_distribution(logits(3, 50), None, SamplingConfig(top_k=4))
    assert found.ids.shape == (3, 4)
    whole = target_distribution(logits(3, 50), None, SamplingConfig())
    assert whole.ids.stride(0) == 0  # one support for all rows


def test_guidance_extrapolates_raw_logits_at_the_allowed_ids():
    cond, uncond = logits(seed=1), logits(seed=2)
    ids = torch.tensor([2, 3, 7])
    expected = torch.zeros_like(cond)
    expected[:, ids] = (uncond + 3 * (cond - uncond))[:, ids].softmax(1)
    found = dense(cond[:, ids], uncond[:, ids], SamplingConfig(guidance=3.0), ids, size=11)
    torch.testing.assert_close(found, expected)


def test_guidance_one_is_the_conditional_row_and_zero_the_unconditional():
    cond, uncond = logits(seed=1), logits(seed=2)
    torch.testing.assert_close(dense(cond, None, SamplingConfig()), cond.softmax(1))
    torch.testing.assert_close(dense(cond, uncond, SamplingConfig(guidance=0.0)), uncond.softmax(1))


def test_the_logits_are_left_as_they_were():
    cond, uncond = logits(seed=1), logits(seed=2)
    dense(cond, uncond, SamplingConfig(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, guidance=3.0))
    assert torch.equal(cond, logits(seed=1))
    assert torch.equal(uncond, logits(seed=2))


def test_greedy_is_one_hot_on_the_lowest_of_equal_ids():
    rows = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [9.0, 0.0, 4.0, 4.0]])
    found = target_distribution(rows, None, SamplingConfig(temperature=0))
    assert (found.ids.tolist(), found.probs.tolist()) == ([[1], [0], [0]], [[1], [1], [1]])
    ids = torch.tensor([2, 3])
    found = target_distribution(rows[:, ids], None, SamplingConfig(temperature=0), ids, size=4)
    assert found.ids.tolist() == [[2], [2], [2]]


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0),
        SamplingConfig(top_k=3),
        SamplingConfig(top_p=0.9),
        SamplingConfig(top_k=3, top_p=0.9, min_p=0.1),
    ],
)
def test_logits_that_are_not_finite_give_no_id(config, damage):
    rows = logits(rows=3)
    rows[1, 4] = damage
    found = target_distribution(rows, None, config).draw(torch.full((3,), 0.5, dtype=torch.float64))
    assert found[1] == 11
    assert bool((found[[0, 2]] < 11).all())


def test_a_row_of_many_is_that_row_alone():
    config = SamplingConfig(temperature=0.8, top_k=5, top_p=0.9, guidance=2.0)
    cond, uncond = logits(seed=1), logits(seed=2)
    together = dense(cond, uncond, config)
    for i in range(len(cond)):
        alone = dense(cond[i : i + 1], uncond[i : i + 1], config)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=0)


def test_half_precision_logits_give_float32_probabilities():
    rows = logits().bfloat16()
    assert target_distribution(rows, rows, SamplingConfig(guidance=2.0)).probs.dtype == torch.float32


def test_transformers_processors_see_each_rows_own_ids_and_the_whole_vocabulary():
    rows, ids = logits(rows=2), torch.tensor([0, 1, 4, 8])
    contexts = [torch.tensor([1, 1, 4]), torch.tensor([0])]
    penalty = RepetitionPenaltyLogitsProcessor(2.0)
    options = {"processors": [penalty], "contexts": contexts}
    expected = torch.cat([penalty(c[None], row[None]) for c, row in zip(contexts, rows)])
    torch.testing.assert_close(dense(rows, None, SamplingConfig(), **options), expected.softmax(1))
    found = dense(rows[:, ids], None, SamplingConfig(), ids, size=11, **options)
    torch.testing.assert_close(found[:, ids], expected[:, ids].softmax(1))
    with pytest.raises(ValueError, match="processors need the ids"):
        target_distribution(rows, None, SamplingConfig(), processors=[penalty])


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="guidance 2"):
        target_distribution(logits(), None, SamplingConfig(guidance=2.0))
    with pytest.raises(ValueError, match="vocabulary's size"):
        target_distribution(logits(), None, SamplingConfig(), torch.arange(11))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"guidance": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingConfig(**wrong)


def distributions(form, rows=6, size=20):
    """Two sets of rows over supports of one form."""
    config = {"all": SamplingConfig(), "equal": SamplingConfig(top_k=7), "ragged": SamplingConfig(top_p=0.8)}
    return [target_distribution(logits(rows, size, seed), None, config[form]) for seed in (1, 2)]


@pytest.mark.parametrize("form", ["all", "equal", "ragged"])
class TestOnSupports:
    """Every operation is that of the dense rows."""

    def test_lookup(self, form):
        one, _ = distributions(form)
        tokens = torch.arange(20).expand(6, -1)
        torch.testing.assert_close(one.at(tokens), one.dense())
        few = torch.randint(21, (6,), generator=seeded())
        expected = torch.nn.functional.pad(one.dense(), (0, 1)).gather(1, few[:, None])[:, 0]
        torch.testing.assert_close(one.at(few), expected)
        torch.testing.assert_close(one.at(few[:, None])[:, 0], expected)

    @pytest.mark.parametrize("other", ["all", "equal", "ragged"])
    def test_residual(self, form, other):
        one, two = distributions(form)[0], distributions(other)[1]
        expected = (one.dense() - two.dense()).clamp(min=0)
        expected = expected / expected.sum(1, keepdim=True)
        torch.testing.assert_close(one.minus(two).dense(), expected)
        torch.testing.assert_close(one.minus(one).dense(), one.dense())  # nothing left: p

    def test_exclusion(self, form):
        one, _ = distributions(form)
        tokens = torch.randint(21, (6, 3), generator=seeded())
        expected = torch.nn.functional.pad(one.dense(), (0, 1)).scatter(1, tokens, 0)[:, :20]
        torch.testing.assert_close(one.without(tokens).dense(), expected / expected.sum(1, keepdim=True))
        torch.testing.assert_close(one.without(tokens[:, 0]).dense(), one.without(tokens[:, :1]).dense())
        assert not bool(one.without(torch.arange(20).expand(6, -1)).probs.any())

    def test_rows(self, form):
        one, _ = distributions(form)
        picked = torch.tensor([4, 0, 4])
        mask = torch.tensor([True, False] * 3)
        for rows in (picked, mask, slice(1, 3), slice(0, 0)):
            assert torch.equal(one[rows].dense(), one.dense()[rows])
            assert len(one[rows]) == len(one.dense()[rows])

    @pytest.mark.parametrize("other", ["all", "equal", "ragged"])
    def test_joining(self, form, other):
        one, two = distributions(form)[0], distributions(other)[1][:2]
        joined = Distribution.cat([one, two, one[1:2]])
        assert torch.equal(joined.dense(), torch.cat([one.dense(), two.dense(), one.dense()[1:2]]))
        assert bool((joined.ids.diff(dim=1) > 0).all())

    def test_draws(self, form):
        one, _ = distributions(form)
        uniforms = torch.rand(6, dtype=torch.float64, generator=seeded())
        assert torch.equal(one.draw(uniforms), draw(one.dense(), uniforms))


def test_rows_over_all_ids_keep_their_support():
    one, two = distributions("all")
    joined = Distribution.cat([one, two])[torch.tensor([3, 1])]
    assert joined.ids.stride(0) == 0
    assert joined.minus(one[2:4]).ids.data_ptr() == one.ids.data_ptr()


def test_certain_rows():
    found = Distribution.certain(torch.tensor([3, 5]), 5)
    assert found.dense().tolist() == [[0, 0, 0, 1, 0], [0] * 5]
    assert found.draw(torch.tensor([0.9, 0.9]).double()).tolist() == [3, 5]


def test_draw_inverts_the_cumulative_sum_and_never_takes_a_zero():
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]).repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.5, 0.999999, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(weights, uniforms).tolist() == [1, 1, 3, 3, 3, 3]
    assert draw(torch.zeros(1, 5), uniforms[:1]).tolist() == [5]
    assert draw(torch.full((1, 5), torch.nan), uniforms[:1]).tolist() == [5]


def test_draw_is_unbiased_over_a_grid_of_uniforms():
    weights = logits(rows=1).softmax(1)
    count = 100_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = draw(weights.expand(count, -1), uniforms).bincount(minlength=11) / count
    torch.testing.assert_close(found.double(), weights[0], rtol=0, atol=1.01 / count)
