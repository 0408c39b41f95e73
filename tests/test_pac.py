"""SJD-PAC: exact whatever the tree, in pictures and texts, alone and in company."""

from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from decoding_fakes import RASTER, codec, model, prompts

from lexel.document import Grammar
from lexel.errors import LexelError
from lexel.sample.acceptance import Draft
from lexel.sample.decode import generate
from lexel.sample.drafters.pac import PacDrafter, _continued
from lexel.sample.logits import Distribution, SamplingConfig
from lexel.sample.policy import Token
from lexel.sample.stream import Tree
from lexel.tokenizers.layout import CodeLayout

GUIDED = {"image": SamplingConfig(temperature=0.8, guidance=2.0), "text": SamplingConfig(guidance=1.5)}
GREEDY = {name: SamplingConfig(temperature=0, guidance=config.guidance) for name, config in GUIDED.items()}
TEXTS = ["a", "ab ba", "", "b a b a b"]
SHAPES = [(5, 3, 2), (2, 2, 2), (4, 1, 2), (4, 2, 0), (6, 2, 3)]
LAYOUTS = {
    "raster": (RASTER, {}),
    "rows": (CodeLayout((5,), grid=(2, 2), row_end=True), {"roles": ("eol", "eof"), "null": "prefix"}),
    "flexible": (CodeLayout((5,), length=5, flexible=True), {}),
    "interleaved": (CodeLayout((3, 4), grid=(2, 2), pattern="interleaved"), {}),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(lm, kit, texts, plan, sampling, **options):
    grammar = Grammar(kit, plan, text_limit=4)
    null = prompts(kit, texts, unconditional=True)
    return generate(lm, prompts(kit, texts), grammar, unconditional=null, sampling=sampling, **options)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_is_plain_greedy(name, shape):
    layout, options = LAYOUTS[name]
    kit = codec(layout, **options)
    lm, plan = model(kit, seed=1), ("image", "text", "image")
    plain, _, _ = run(lm, kit, TEXTS, plan, GREEDY)
    found, _, stats = run(lm, kit, TEXTS, plan, GREEDY, drafter=PacDrafter(*shape))
    assert all(torch.equal(a, b) for a, b in zip(plain, found))
    assert stats.target_forwards < max(len(row) for row in plain)


@pytest.mark.parametrize("name", LAYOUTS)
def test_whatever_is_sampled_parses(name):
    layout, options = LAYOUTS[name]
    kit = codec(layout, **options)
    plan = ("image", "text", "image")
    ids, logprobs, _ = run(
        model(kit), kit, TEXTS, plan, GUIDED, drafter=PacDrafter(6, 3, 2), generator=seeded()
    )
    opening = prompts(kit, [""])[0].ids[-len(kit.scripts["image"][0]) :]
    for row, scores in zip(ids, logprobs):
        kit.parse(torch.cat([opening, row]))
        assert bool(scores.isfinite().all())


def exact_probabilities(lm, kit, sampling, length):
    """Of every picture of `length` codes, by an uncached model forced along it: [codes ** length]."""
    from decoding_fakes import uncached

    block = kit.vocabulary.block("image")
    words = torch.cartesian_prod(*[block] * length)
    prompt = prompts(kit, ["ab"])[0]
    null = prompts(kit, ["ab"], unconditional=True)[0]
    grammar = Grammar(kit, ("image",))
    logs = []
    for word in words:
        probs = uncached(lm, kit, grammar, prompt, null, sampling, word)
        logs.append(probs.gather(1, word[:, None]).log().sum())
    return torch.stack(logs).exp()


@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 3, 1)])
def test_samples_have_their_exact_probabilities(shape):
    """Pictures of four codes out of three: chi-square of the draws against the enumerated distribution at
    error rate 1e-3. The rounds go on from kept and redrawn windows, so that a wrong q shows."""
    kit = codec(CodeLayout((3,), length=4))
    lm = model(kit, seed=2)
    expected = exact_probabilities(lm, kit, GUIDED, 4)
    count = 1200
    asked = prompts(kit, ["ab"]) * count
    null = prompts(kit, ["ab"], unconditional=True) * count
    ids, _, stats = generate(
        lm,
        asked,
        Grammar(kit, ("image",)),
        unconditional=null,
        sampling=GUIDED,
        drafter=PacDrafter(*shape),
        generator=seeded(5),
    )
    codes = torch.stack(ids) - kit.vocabulary.block("image")[0]
    words = (codes * torch.tensor([27, 9, 3, 1])).sum(dim=1)
    found = words.bincount(minlength=81).double()
    assert chi_square_passes(found, expected * count)
    assert stats.mean_accepted > 1.2


def chi_square_passes(found, expected, error=1e-3):
    """Rare outcomes (expected below 5) are put together; the quantile is Wilson and Hilferty's."""
    rare = expected < 5
    both = [torch.cat([x[~rare], x[rare].sum()[None]]) if rare.any() else x for x in (found, expected)]
    statistic = ((both[0] - both[1]) ** 2 / both[1]).sum()
    freedom = len(both[0]) - 1
    z = NormalDist().inv_cdf(1 - error)
    return float(statistic) < freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3


def spread(seed, count):
    """One random distribution over the six ids 3..8 of ten, `count` times."""
    probs = torch.rand(1, 6, generator=seeded(seed), dtype=torch.float64)
    return Distribution(torch.arange(3, 9).expand(count, -1), (probs / probs.sum()).expand(count, -1), 10)


def test_a_continued_token_has_its_new_distribution():
    """And is the old one as often as that allows; 20000 tokens at once, some of them without an old one."""
    count = 20000
    p, q = spread(1, count), spread(2, count)
    old = q.draw(torch.rand(count, generator=seeded(3), dtype=torch.float64))
    nothing = torch.zeros(1, count, dtype=torch.long)
    draft = Draft(old[None, :, None], nothing, torch.tensor([count]), (q,))
    nodes = [node if node % 4 else -1 for node in range(count)]
    uniforms = torch.rand(count, 2, generator=seeded(4), dtype=torch.float64)
    new = _continued(SimpleNamespace(draft=draft), p, nodes, uniforms)
    for some in (torch.tensor(nodes) >= 0, torch.tensor(nodes) < 0):
        found = new[some].bincount(minlength=9)[3:].double()
        assert chi_square_passes(found, p.probs[0] * some.sum())
    overlap = float(torch.minimum(p.probs[0], q.probs[0]).sum())
    kept = (new == old)[torch.tensor(nodes) >= 0].double().mean()
    assert abs(float(kept) - overlap) < 0.02


def test_the_tokens_of_a_level_are_drawn_without_replacement():
    """Pairs of a main token drawn from q and its sibling, against q(x) q(y) / (1 - q(x))."""
    count, q = 4000, spread(5, 1)
    first = q[torch.zeros(count, dtype=torch.long)].draw(
        torch.rand(count, generator=seeded(6), dtype=torch.float64)
    )
    row = SimpleNamespace(random=np.random.default_rng(7))
    drafter, pairs = PacDrafter(2, 2, 1), torch.zeros(6, 6)
    for token in first.tolist():
        line = Tree.line([Token((token,), 1, (0, 0, 0))], [])
        ((main, sibling),) = drafter._levels(row, line, q)
        assert main == token
        pairs[main - 3, sibling - 3] += 1
    probs = q.probs[0]
    expected = probs[:, None] * probs / (1 - probs[:, None])
    off = ~torch.eye(6, dtype=torch.bool)
    assert int(pairs.diagonal().sum()) == 0
    assert chi_square_passes(pairs[off].double(), expected[off] * count)


def test_a_row_does_not_depend_on_its_company():
    kit = codec(RASTER)
    lm = model(kit, seed=3)
    from lexel.sample.generator import Generator, Request
    from lexel.sample.policy import Policy

    def sample(requests):
        queue = Generator(lm, drafter=PacDrafter(4, 2, 2))
        tickets = [queue.submit(request) for request in requests]
        queue.wait(tickets)
        return [ticket.ids for ticket in tickets]

    policies = [Policy(Grammar(kit, plan, text_limit=3), GUIDED) for plan in (("image", "text"), ("image",))]
    pairs = zip(prompts(kit, TEXTS), prompts(kit, TEXTS, unconditional=True))
    requests = [Request(a, b, policies[i % 2], i) for i, (a, b) in enumerate(pairs)]
    together = sample(requests)
    for request, row in zip(requests, together):
        assert torch.equal(sample([request])[0], row)


def test_it_draws_more_tokens_per_pass_than_a_chain_of_the_same_length():
    kit = codec(CodeLayout((4,), grid=(4, 4)))
    lm = model(kit, seed=4, max_length=32)
    sampling = {"image": SamplingConfig(guidance=1.0)}
    gains = []
    for shape in ((4, 1, 0), (4, 3, 2)):
        _, _, stats = generate(
            lm,
            prompts(kit, ["ab"]) * 40,
            Grammar(kit, ("image",)),
            sampling=sampling,
            drafter=PacDrafter(*shape),
            generator=seeded(1),
        )
        gains.append(stats.mean_accepted)
    assert gains[1] > gains[0] + 0.2


def test_several_codes_per_position_are_refused():
    kit = codec(CodeLayout((3, 4), grid=(2, 2)))
    with pytest.raises(LexelError, match="one code per position, this model has 2"):
        run(model(kit), kit, ["a"], ("image",), GREEDY, drafter=PacDrafter(4))


@pytest.mark.parametrize("options", [{"window": 2, "depth": 3}, {"width": 0}, {"depth": -1}])
def test_impossible_trees_are_refused(options):
    with pytest.raises(ValueError, match="width of at least 1 and depth from 0"):
        PacDrafter(**options)
