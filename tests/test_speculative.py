"""Speculation is lossless: greedy drafts change no token, sampled ones no distribution."""

import itertools

import pytest
import torch
from decoding_fakes import RASTER, codec, model, prompts, uncached

from lexel.document import Grammar
from lexel.errors import LexelError
from lexel.sample.acceptance import Draft, Verdict, exact, recouple, residual
from lexel.sample.decode import generate
from lexel.sample.drafters import JacobiDrafter, ModelDrafter, NestedDrafter
from lexel.sample.logits import SamplingConfig
from lexel.tokenizers.layout import CodeLayout

FLEXIBLE = CodeLayout((6,), length=7, flexible=True)
TEXTS = ["a", "ab ba", "", "b a b a b"]
GUIDED = {"image": SamplingConfig(temperature=0.8, guidance=2.0), "text": SamplingConfig(guidance=1.3)}
GREEDY = {name: SamplingConfig(temperature=0, guidance=config.guidance) for name, config in GUIDED.items()}
DRAFTERS = {
    "nested": lambda lm, kit: NestedDrafter(lm, 0.25, window=3),
    "model": lambda lm, kit: ModelDrafter(model(kit, seed=9, dim=8, layers=1), window=3),
    "jacobi": lambda lm, kit: JacobiDrafter(window=4),
    "jacobi-repeat": lambda lm, kit: JacobiDrafter(window=5, init="repeat"),
}


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


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("layout", [RASTER, FLEXIBLE], ids=["raster", "flexible"])
def test_greedy_speculation_is_greedy_decoding_token_for_token(name, layout):
    """Text and pictures in one stream, guided, ragged prompts, in float64."""
    kit = codec(layout)
    for seed in range(3):
        lm = model(kit, seed=seed)
        plan = ("image", "text", "image", "text")
        plain, _, _ = decode(lm, kit, TEXTS, plan, GREEDY)
        ids, _, stats = decode(lm, kit, TEXTS, plan, GREEDY, DRAFTERS[name](lm, kit))
        assert all(torch.equal(a, b) for a, b in zip(plain, ids))
        assert sum(stats.accept_lengths) == sum(len(row) for row in ids)
        assert stats.target_forwards < max(len(row) for row in ids)


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_speculation_in_float32_without_guidance(name):
    kit = codec(RASTER)
    lm = model(kit, seed=4).float()
    greedy = {"image": SamplingConfig(temperature=0)}
    drafter = DRAFTERS[name](lm, kit)
    if name == "model":
        drafter.lm.float()
    plain, _, _ = decode(lm, kit, TEXTS, ("image",), greedy)
    ids, _, _ = decode(lm, kit, TEXTS, ("image",), greedy, drafter)
    assert all(torch.equal(a, b) for a, b in zip(plain, ids))


def chi_square(found, share, count):
    """Statistic and degrees of freedom, cells expecting fewer than five draws pooled."""
    small = share * count < 5
    found = torch.cat([found[~small], found[small].sum()[None]])
    share = torch.cat([share[~small], share[small].sum()[None]])
    if share[-1] == 0:
        assert found[-1] == 0
        found, share = found[:-1], share[:-1]
    return float(((found - count * share) ** 2 / (count * share)).sum()), len(share) - 1


def sequences(kit, grammar, prompt):
    """Every sequence the grammar allows after a prompt."""
    partial = [((), grammar.start(prompt))]
    while partial:
        ids, state = partial.pop()
        if grammar.done(state):
            yield ids
            continue
        for token in grammar.allowed(state).nonzero()[:, 0].tolist():
            partial.append(((*ids, token), grammar.advance(state, token)))


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize(
    ("layout", "plan"),
    [
        pytest.param(CodeLayout((2,), length=4), ("image",), id="fixed"),
        pytest.param(
            CodeLayout((2,), length=2, flexible=True), ("image", "text"), id="mixed", marks=pytest.mark.slow
        ),
    ],
)
def test_sampled_speculation_has_the_targets_distribution(name, layout, plan):
    """Chi-square of 4000 draws against the enumerated distribution of whole sequences (pictures alone, or
    flexible pictures followed by up to one letter), with filters and guidance. Error rate 1e-3 per case by
    the Wilson-Hilferty quantile."""
    kit = codec(layout)
    # A model whose predictions depend much on what came before: errors in the cache would show.
    lm, grammar, count = model(kit, seed=0, scale=0.7), Grammar(kit, plan, text_limit=1), 4000
    sampling = {"image": SamplingConfig(temperature=1.2, min_p=0.02, guidance=1.5), "text": SamplingConfig()}
    prompt, null = prompts(kit, ["ab"])[0], prompts(kit, ["ab"], unconditional=True)[0]
    ids, _, stats = generate(
        lm,
        [prompt] * count,
        grammar,
        unconditional=[null] * count,
        sampling=sampling,
        drafter=DRAFTERS[name](lm, kit),
        generator=torch.Generator().manual_seed(11),
    )
    every = {line: number for number, line in enumerate(sequences(kit, grammar, prompt))}
    found = torch.zeros(len(every))
    for row in ids:
        found[every[tuple(row.tolist())]] += 1
    share = []
    for line in every:
        row = torch.tensor(line)
        probs = uncached(lm, kit, grammar, prompt, null, sampling, row)
        share.append(float(probs.gather(1, row[:, None]).prod()))
    statistic, freedom = chi_square(found, torch.tensor(share), count)
    assert sum(share) == pytest.approx(1)
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 3.0902 * spread**0.5) ** 3
    assert stats.mean_accepted > 1


def test_logprobs_are_the_targets_own():
    kit = codec(FLEXIBLE)
    lm, grammar = model(kit, seed=1), Grammar(kit, ("image", "text"), text_limit=6)
    nested = NestedDrafter(lm, 0.25, window=3)
    ids, logprobs, _ = decode(lm, kit, TEXTS, ("image", "text"), GUIDED, nested)
    asked, null = prompts(kit, TEXTS), prompts(kit, TEXTS, unconditional=True)
    for prompt, free, row, scores in zip(asked, null, ids, logprobs):
        probs = uncached(lm, kit, grammar, prompt, free, GUIDED, row)
        torch.testing.assert_close(
            scores.double(), probs.gather(1, row[:, None])[:, 0].log(), rtol=1e-5, atol=1e-5
        )


def test_a_drafter_equal_to_the_target_is_always_accepted():
    """Every round gains the window and the bonus token until the picture is full: 6 = 4 + 2."""
    kit = codec(RASTER)
    lm = model(kit)
    _, _, stats = decode(lm, kit, TEXTS, ("image",), GUIDED, ModelDrafter(lm, window=3))
    assert stats.accept_lengths == (4,) * len(TEXTS) + (2,) * len(TEXTS)
    assert (stats.target_forwards, stats.draft_forwards) == (2, 4)


def test_rows_advance_at_their_own_pace():
    kit = codec(RASTER)
    lm = model(kit)
    _, _, stats = decode(lm, kit, TEXTS * 3, ("image",), GUIDED, NestedDrafter(lm, window=3))
    first_round = stats.accept_lengths[: len(TEXTS) * 3]
    assert len(set(first_round)) > 1


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
    for make in DRAFTERS.values():
        drafter = make(lm, kit)
        first = decode(lm, kit, TEXTS, ("image",), GUIDED, drafter)
        second = decode(lm, kit, TEXTS, ("image",), GUIDED, drafter)
        assert all(torch.equal(a, b) for a, b in zip(first[0], second[0]))
        assert first[2].draft_forwards == second[2].draft_forwards


# p and q in sixteenths, chosen so that p/q and the residual have denominators dividing the grids below.
P = torch.tensor([[4, 2, 4, 4, 2], [8, 2, 2, 4, 0], [2, 2, 4, 4, 4]], dtype=torch.float64) / 16
Q = torch.tensor([[8, 4, 4, 0, 0], [4, 4, 4, 4, 0]], dtype=torch.float64) / 16
GRID = 12


def enumerated():
    """Every drafted pair with its probability, against every acceptance uniform on a grid of cell centres:
    (drafted ids [m, 2], acceptance uniforms [m, 2], weight [m])."""
    centres = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    cases = list(itertools.product(range(5), range(5), range(GRID), range(GRID)))
    x = torch.tensor([case[:2] for case in cases])
    u = torch.stack([centres[[case[2] for case in cases]], centres[[case[3] for case in cases]]], dim=1)
    weight = Q[0][x[:, 0]] * Q[1][x[:, 1]] / GRID**2
    return x[weight > 0], u[weight > 0], weight[weight > 0]


def drafted(ids):
    rows = len(ids)
    return Draft(ids, torch.full((rows,), 2), Q.expand(rows, -1, -1), torch.ones(rows, dtype=torch.bool))


def test_exact_acceptance_by_exact_enumeration():
    """Over all drafts and injected uniforms the first token is distributed as p_1, the second, where there is
    one, as p_2, the third as p_3: exactly, without statistics."""
    ids, uniforms, weight = enumerated()
    totals = [torch.zeros(5, dtype=torch.float64) for _ in range(3)]
    for last in (torch.arange(2 * GRID, dtype=torch.float64) + 0.5) / (2 * GRID):
        queue = [uniforms, last.expand(len(ids))]
        verdict = exact(P.expand(len(ids), -1, -1), drafted(ids), lambda *shape, q=queue: q.pop(0))
        emitted = torch.cat([ids, verdict.extra[:, None]], dim=1)
        emitted.scatter_(1, verdict.accepted[:, None], verdict.extra[:, None])
        for place in range(3):
            reached = verdict.accepted >= place
            totals[place].index_add_(0, emitted[reached, place], weight[reached])
    for place, total in enumerate(totals):
        torch.testing.assert_close(total / total.sum(), P[place], rtol=0, atol=1e-9)
    reached = 2 * GRID * torch.minimum(P[0], Q[0]).sum()
    torch.testing.assert_close(totals[1].sum(), reached)


def test_recoupled_windows_by_exact_enumeration():
    """After maximal coupling every window position is distributed as its target, and kept as often as the
    overlap of p and q allows."""
    ids, uniforms, weight = enumerated()
    target, draft = P.expand(len(ids), -1, -1), drafted(ids)
    totals, kept = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for last in (torch.arange(2 * GRID, dtype=torch.float64) + 0.5) / (2 * GRID):
        queue = [uniforms, last.expand(len(ids))]
        verdict = exact(target, draft, lambda *shape, q=queue: q.pop(0))
        redrawn = recouple(target, draft, verdict, lambda count, u=last: u.expand(count))
        for place in range(3):
            totals[place].index_add_(0, redrawn[:, place], weight)
        kept += ((redrawn[:, :2] == ids) * weight[:, None]).sum(0)
    torch.testing.assert_close(totals / (2 * GRID), P, rtol=0, atol=1e-9)
    torch.testing.assert_close(kept / (2 * GRID), torch.minimum(P[:2], Q).sum(1), rtol=0, atol=1e-9)


def test_an_empty_residual_falls_back_to_the_target():
    p = torch.tensor([[0.5, 0.5, 0.0]])
    assert torch.equal(residual(p, p), p)


def test_a_draft_that_ends_the_generation_has_no_bonus_token():
    probs = torch.tensor([[[0.0, 1.0]]])
    draft = Draft(torch.tensor([[1]]), torch.tensor([1]), probs, torch.tensor([False]))
    target = torch.cat([probs, torch.zeros(1, 1, 2)], dim=1)
    verdict = exact(target, draft, lambda *shape: torch.zeros(*shape))
    assert isinstance(verdict, Verdict)
    assert (int(verdict.accepted), int(verdict.extra)) == (1, 2)


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
    columns = codec(CodeLayout((3, 4), grid=(2, 2)))
    with pytest.raises(LexelError, match="decode it without a drafter"):
        decode(model(columns), columns, ["a"], ("image",), GUIDED, JacobiDrafter())
