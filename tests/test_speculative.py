"""Speculation is lossless: greedy drafts change no token, sampled ones no distribution."""

from collections import Counter

import pytest
import torch
from decoding_fakes import (
    DELAYED_CODES,
    DRAFTERS,
    RASTER,
    SEVERAL_CODES,
    codec,
    log_probabilities,
    model,
    prompts,
    whole_sequences,
)

from lexel.document import Grammar
from lexel.errors import LexelError
from lexel.sample.decode import generate
from lexel.sample.drafters import JacobiDrafter, ModelDrafter, NestedDrafter
from lexel.sample.logits import SamplingConfig
from lexel.tokenizers.layout import CodeLayout

FLEXIBLE = CodeLayout((6,), length=7, flexible=True)
COLUMNS = CodeLayout((3, 4), grid=(2, 3))
LAYOUTS = {
    "raster": (RASTER, {}),
    "flexible": (FLEXIBLE, {}),
    "factorized": (COLUMNS, {}),
    "parallel": (COLUMNS, {"head": "parallel"}),
    "delayed": (CodeLayout((3, 4), grid=(2, 2), pattern="delayed"), {}),
}
TEXTS = ["a", "ab ba", "", "b a b a b"]
GUIDED = {"image": SamplingConfig(temperature=0.8, guidance=2.0), "text": SamplingConfig(guidance=1.3)}
GREEDY = {name: SamplingConfig(temperature=0, guidance=config.guidance) for name, config in GUIDED.items()}


def decode(lm, kit, texts, plan, sampling, drafter=None, seed=0, **options):
    guided = any(config.guidance != 1 for config in sampling.values())
    return generate(
        lm,
        prompts(kit, texts),
        Grammar(kit, plan, text_limit=6),
        unconditional=prompts(kit, texts, unconditional=True) if guided else None,
        sampling=sampling,
        drafter=drafter,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def known(shape):
    """Names of the drafters that draft such codes."""
    if shape.columns == 1:
        return list(DRAFTERS)
    return DELAYED_CODES if shape.pattern == "delayed" else SEVERAL_CODES


def cases(usual):
    """Every way to draft in every layout that it knows; the `usual` ones are not slow."""
    return [
        pytest.param(
            *(layout, name),
            id=f"{layout}-{name}",
            marks=() if name in usual and layout != "delayed" else pytest.mark.slow,
        )
        for layout, (shape, _) in LAYOUTS.items()
        for name in known(shape)
        if name != "plain"
    ]


USUAL = ["nested", "model", "jacobi", "jacobi-table", "table", "gumbel", "pac", "eagle-tree"]


@pytest.mark.parametrize(
    ("guided", "dtype"),
    [
        pytest.param(True, torch.float64, id="guided-float64"),
        pytest.param(False, torch.float32, id="alone-float32"),
        pytest.param(True, torch.float32, id="guided-float32", marks=pytest.mark.slow),
        pytest.param(False, torch.float64, id="alone-float64", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("layout", "name"), cases(USUAL))
def test_greedy_speculation_is_greedy_decoding_token_for_token(layout, name, guided, dtype):
    """Text and pictures in one stream, ragged prompts."""
    shape, options = LAYOUTS[layout]
    kit = codec(shape)
    sampling = GREEDY if guided else dict.fromkeys(("image", "text"), SamplingConfig(temperature=0))
    gained = rounds = 0
    for seed in range(2):
        lm, plan = model(kit, seed=seed, **options).to(dtype), ("image", "text", "image", "text")
        plain, _, _ = decode(lm, kit, TEXTS, plan, sampling)
        ids, _, stats = decode(lm, kit, TEXTS, plan, sampling, DRAFTERS[name](lm, kit, 4))
        assert all(torch.equal(a, b) for a, b in zip(plain, ids))
        assert sum(stats.accept_lengths) == sum(len(row) for row in ids)
        gained, rounds = gained + max(len(row) for row in ids), rounds + stats.target_forwards
    # A random table seldom guesses all codes of a position.
    assert rounds < gained or (name == "table" and shape.columns > 1)


@pytest.mark.parametrize(("layout", "name"), cases(["nested", "jacobi", "pac"]))
def test_logprobs_are_those_of_teacher_forcing(layout, name):
    """Of sampled sequences, all columns of a position together."""
    shape, options = LAYOUTS[layout]
    kit = codec(shape)
    lm, plan = model(kit, seed=1, **options), ("image", "text")
    grammar = Grammar(kit, plan, text_limit=6)
    ids, logprobs, _ = decode(lm, kit, TEXTS, plan, GUIDED, DRAFTERS[name](lm, kit, 3))
    asked, null = prompts(kit, TEXTS), prompts(kit, TEXTS, unconditional=True)
    for prompt, free, row, scores in zip(asked, null, ids, logprobs):
        expected = log_probabilities(lm, kit, grammar, prompt, free, GUIDED, row)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def chi_square(found, share, count):
    """Statistic and degrees of freedom, cells expecting fewer than five draws pooled."""
    small = share * count < 5
    found = torch.cat([found[~small], found[small].sum()[None]])
    share = torch.cat([share[~small], share[small].sum()[None]])
    if share[-1] == 0:
        assert found[-1] == 0
        found, share = found[:-1], share[:-1]
    return float(((found - count * share) ** 2 / (count * share)).sum()), len(share) - 1


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "gumbel" else pytest.mark.slow) for n in DRAFTERS if n != "plain"],
)
@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        pytest.param(CodeLayout((2,), length=4), ("image",), id="fixed"),
        pytest.param(
            CodeLayout((2,), length=2, flexible=True), ("image", "text"), id="mixed", marks=pytest.mark.slow
        ),
        pytest.param(CodeLayout((2, 2), length=2), ("image",), id="columns", marks=pytest.mark.slow),
    ],
)
def test_sampled_speculation_has_the_targets_distribution(name, shape, plan):
    """Chi-square of 3000 draws against the enumerated distribution of whole sequences (pictures alone, or
    flexible pictures followed by up to one letter), with filters and guidance. Error rate 1e-3 per case by
    the Wilson-Hilferty quantile. `test_exactness` computes the same without chance, but for Gumbel
    coupling."""
    if name not in known(shape):
        pytest.skip("drafts one code per position")
    kit = codec(shape)
    # A model whose predictions depend much on what came before: errors in the cache would show.
    lm, grammar, count = model(kit, seed=0, scale=0.7), Grammar(kit, plan, text_limit=1), 3000
    sampling = {"image": SamplingConfig(temperature=1.2, min_p=0.02, guidance=1.5), "text": SamplingConfig()}
    prompt, null = prompts(kit, ["ab"])[0], prompts(kit, ["ab"], unconditional=True)[0]
    ids, _, stats = generate(
        lm,
        [prompt] * count,
        grammar,
        unconditional=[null] * count,
        sampling=sampling,
        drafter=DRAFTERS[name](lm, kit, 3),
        generator=torch.Generator().manual_seed(11),
    )
    found = Counter(str(row.tolist()) for row in ids)
    every = list(whole_sequences(kit, grammar, prompt))
    share = torch.stack(
        [log_probabilities(lm, kit, grammar, prompt, null, sampling, row).sum().exp() for row in every]
    )
    numbers = torch.tensor([found.pop(str(row.tolist()), 0) for row in every])
    assert not found
    assert float(share.sum()) == pytest.approx(1)
    statistic, freedom = chi_square(numbers, share, count)
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 3.0902 * spread**0.5) ** 3
    assert stats.mean_accepted > 1 or name == "lookup"


def test_a_drafter_equal_to_the_target_is_always_accepted():
    """Every round gains the window and the bonus token until the picture is full: 6 = 4 + 2."""
    kit = codec(RASTER)
    lm = model(kit)
    _, _, stats = decode(lm, kit, TEXTS, ("image",), GUIDED, ModelDrafter(lm, window=3, guided=True))
    assert stats.accept_lengths == (4, 2) * len(TEXTS)
    assert (stats.target_forwards, stats.draft_forwards) == (2, 4)


def test_rows_advance_at_their_own_pace():
    kit = codec(RASTER)
    lm = model(kit)
    rounds = []
    decode(
        *(lm, kit, TEXTS * 3, ("image",), GUIDED, NestedDrafter(lm, window=3)),
        on_token=lambda row, new: rounds.append((row, len(new))),
    )
    first = [count for _, count in rounds[: len(TEXTS) * 3]]
    assert [row for row, _ in rounds[: len(first)]] == list(range(len(first)))
    assert len(set(first)) > 1


def test_streamed_tokens_are_the_result():
    kit = codec(FLEXIBLE)
    lm = model(kit)
    streamed = {row: [] for row in range(len(TEXTS))}
    jacobi = JacobiDrafter(window=4)
    ids, _, _ = decode(
        lm,
        kit,
        TEXTS,
        ("image",),
        GUIDED,
        jacobi,
        on_token=lambda row, new: streamed[row].append(new),
    )
    assert all(torch.equal(torch.cat(streamed[row]), ids[row]) for row in streamed)


def test_a_drafter_serves_one_generation_after_another():
    kit = codec(RASTER)
    lm = model(kit)
    for name in DRAFTERS.keys() - {"plain"}:
        drafter = DRAFTERS[name](lm, kit, 3)
        first = decode(lm, kit, TEXTS, ("image",), GUIDED, drafter)
        second = decode(lm, kit, TEXTS, ("image",), GUIDED, drafter)
        assert all(torch.equal(a, b) for a, b in zip(first[0], second[0]))
        assert first[2].draft_forwards == second[2].draft_forwards


def test_unusable_drafters_are_refused():
    kit = codec(RASTER)
    lm = model(kit)
    with pytest.raises(LexelError, match=r"no nested width 0\.5"):
        NestedDrafter(lm, 0.5)
    other = codec(CodeLayout((9,), grid=(2, 3)))
    with pytest.raises(LexelError, match="must be the same"):
        decode(lm, kit, ["a"], ("image",), GUIDED, ModelDrafter(model(other)))
    with pytest.raises(ValueError, match="window"):
        JacobiDrafter(window=0)
    with pytest.raises(ValueError, match="init"):
        JacobiDrafter(init="left")
