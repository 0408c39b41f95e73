"""The one path from logits to probabilities, and drawing from them."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from lexel.sample.logits import SamplingConfig, draw, target_distribution, uniform_source


def logits(rows=5, size=11, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def reference(row, config):
    """Temperature, top-k, top-p, min-p by sorting one row of logits in plain Python."""
    probs = (row / config.temperature).softmax(0)
    order = probs.argsort(descending=True).tolist()
    kept = order[: config.top_k] if config.top_k else order
    total, nucleus = 0.0, []
    mass = sum(float(probs[i]) for i in kept)
    for index in kept:
        if total < config.top_p * mass:
            nucleus.append(index)
        total += float(probs[index])
    mass = sum(float(probs[i]) for i in nucleus)
    top = float(probs[nucleus[0]])
    final = [i for i in nucleus if float(probs[i]) >= config.min_p * top]
    result = torch.zeros_like(row)
    result[final] = probs[final] / probs[final].sum()
    return result


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.5, top_k=4),
        SamplingConfig(temperature=1.7, top_p=0.8),
        SamplingConfig(temperature=0.9, top_k=6, top_p=0.7, min_p=0.2),
    ],
)
def test_filters_equal_sorting_by_hand(config):
    rows = logits()
    expected = torch.stack([reference(row, config) for row in rows])
    torch.testing.assert_close(target_distribution(rows, None, config), expected)


def test_guidance_extrapolates_raw_logits_before_the_mask():
    cond, uncond = logits(seed=1), logits(seed=2)
    allowed = torch.zeros(11, dtype=torch.bool)
    allowed[[2, 3, 7]] = True
    expected = torch.zeros_like(cond)
    expected[:, [2, 3, 7]] = (uncond + 3 * (cond - uncond))[:, [2, 3, 7]].softmax(1)
    found = target_distribution(cond, uncond, SamplingConfig(guidance=3.0), allowed[None])
    torch.testing.assert_close(found, expected)


def test_guidance_one_is_the_conditional_row_and_zero_the_unconditional():
    cond, uncond = logits(seed=1), logits(seed=2)
    torch.testing.assert_close(target_distribution(cond, uncond, SamplingConfig()), cond.softmax(1))
    zero = target_distribution(cond, uncond, SamplingConfig(guidance=0.0))
    torch.testing.assert_close(zero, uncond.softmax(1))


def test_greedy_is_one_hot_on_the_lowest_of_equal_ids():
    rows = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [9.0, 0.0, 4.0, 4.0]])
    allowed = torch.tensor([[True] * 4, [False, False, True, True], [False, True, True, True]])
    found = target_distribution(rows, None, SamplingConfig(temperature=0), allowed)
    assert found.argmax(1).tolist() == [1, 2, 2]
    assert found.sum(1).tolist() == [1, 1, 1]


def test_a_row_of_many_is_that_row_alone():
    config = SamplingConfig(temperature=0.8, top_k=5, top_p=0.9, guidance=2.0)
    cond, uncond = logits(seed=1), logits(seed=2)
    together = target_distribution(cond, uncond, config)
    for i in range(len(cond)):
        torch.testing.assert_close(
            together[i : i + 1],
            target_distribution(cond[i : i + 1], uncond[i : i + 1], config),
            rtol=0,
            atol=0,
        )


def test_half_precision_logits_give_float32_probabilities():
    rows = logits().bfloat16()
    assert target_distribution(rows, rows, SamplingConfig(guidance=2.0)).dtype == torch.float32


def test_transformers_processors_see_each_rows_own_ids():
    rows = logits(rows=2)
    contexts = [torch.tensor([1, 1, 4]), torch.tensor([0])]
    penalty = RepetitionPenaltyLogitsProcessor(2.0)
    found = target_distribution(rows, None, SamplingConfig(), processors=[penalty], contexts=contexts)
    expected = torch.cat([penalty(c[None], row[None]) for c, row in zip(contexts, rows)]).softmax(1)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="processors need the ids"):
        target_distribution(rows, None, SamplingConfig(), processors=[penalty])


def test_guidance_without_the_unconditional_row_is_an_error():
    with pytest.raises(ValueError, match="guidance 2"):
        target_distribution(logits(), None, SamplingConfig(guidance=2.0))


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


def test_uniforms_repeat_with_the_generators_seed():
    first, second = (uniform_source(torch.Generator().manual_seed(3), torch.device("cpu")) for _ in range(2))
    assert torch.equal(first(2, 3), second(2, 3))
