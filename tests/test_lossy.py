"""Lossy acceptance in the loop: what it may change, by how much, and what it must leave alone."""

import pytest
import torch
from decoding_fakes import RASTER, codec, model, prompts, uncached
from torch import nn

import lexel
from lexel.cli import main
from lexel.document import Grammar, Image, Text
from lexel.errors import LexelError
from lexel.sample.acceptance import Grouped, Lantern, Rule, exact
from lexel.sample.decode import generate
from lexel.sample.drafters import JacobiDrafter, LookupDrafter, NestedDrafter, PacDrafter
from lexel.sample.drafters.base import Drafter
from lexel.sample.logits import SamplingConfig
from lexel.sample.lossy import AcceptanceConfig, code_vectors, greedy_rule, make_acceptance
from lexel.sample.policy import Policy
from lexel.sample.session import Proposal
from lexel.sample.stream import Tree
from lexel.tokenizers.layout import CodeLayout

SAMPLED = {"image": SamplingConfig(temperature=0.8, guidance=2.0), "text": SamplingConfig(guidance=1.5)}
GREEDY = {name: SamplingConfig(temperature=0, guidance=config.guidance) for name, config in SAMPLED.items()}
TEXTS = ["a", "ab ba", "b a b a b"]
INTERLEAVED = CodeLayout((3, 4), grid=(2, 2), pattern="interleaved")
PARALLEL = CodeLayout((3, 4), grid=(2, 2))


class Codebooks(nn.Module):
    """A tokenizer as far as lossy rules look at it: random codebooks of vectors, put together."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout
        generator = torch.Generator().manual_seed(7)
        self.books = nn.ParameterList(
            torch.randn(size, 4, generator=generator) for size in layout.codebook_sizes
        )

    def embed(self, codes):
        assert codes.indices.shape[1:] == (self.layout.positions, self.layout.k)
        return torch.cat([book[codes.indices[..., j]] for j, book in enumerate(self.books)], dim=-1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rule(kit, lm, greedy=False, **options):
    tokenizer = Codebooks(kit.layouts["image"])
    return make_acceptance(AcceptanceConfig(**options), tokenizer, lm, kit.vocabulary, greedy=greedy)


def run(lm, kit, drafter, acceptance, sampling=SAMPLED, plan=("image", "text"), seed=3):
    null = prompts(kit, TEXTS, unconditional=True)
    return generate(
        lm,
        prompts(kit, TEXTS),
        Grammar(kit, plan, text_limit=4),
        unconditional=null,
        sampling=sampling,
        drafter=drafter,
        acceptance=acceptance,
        generator=seeded(seed),
    )


DRAFTERS = {
    "jacobi": lambda lm: JacobiDrafter(4),
    "pac": lambda lm: PacDrafter(4, 2, 2),
    "nested": lambda lm: NestedDrafter(lm, window=3),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_lantern_with_nothing_relaxed_is_exact(name):
    kit = codec(RASTER)
    lm = model(kit)
    expected, _, _ = run(lm, kit, DRAFTERS[name](lm), exact)
    found, _, _ = run(lm, kit, DRAFTERS[name](lm), rule(kit, lm, rule="lantern", residual="none", bound=0.5))
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize(
    "options", [{"rule": "lantern", "bound": 0.5}, {"rule": "grouped", "size": 2, "distance": 99}]
)
@pytest.mark.parametrize("layout", [RASTER, INTERLEAVED, PARALLEL])
def test_relaxed_pictures_gain_and_still_parse(options, layout):
    kit = codec(layout)
    lm = model(kit)
    found = [run(lm, kit, JacobiDrafter(4), rule(kit, lm, **options), seed=seed) for seed in range(4)]
    exactly = [run(lm, kit, JacobiDrafter(4), exact, seed=seed)[2] for seed in range(4)]
    ids, logprobs, _ = found[0]
    opening = prompts(kit, [""])[0].ids[-1:]
    for row, scores in zip(ids, logprobs):
        kit.parse(torch.cat([opening, row]))
        assert len(scores) == len(row)
    if options["rule"] == "lantern":
        assert sum(stats.target_forwards for *_, stats in found) < sum(
            stats.target_forwards for stats in exactly
        )


class Constant(Drafter):
    """Always the same code, chosen without chance."""

    def __init__(self, token):
        super().__init__(1)
        self.token = token

    def propose(self, session):
        return Proposal([self._tree(row) for row in session.rows])

    def _tree(self, row):
        if self.limit(row) < 1:
            return Tree.line([], [row.state])
        after = row.advance(row.state, self.token)
        return Tree.line([row.policy.token(row.state, (self.token,))], [row.state, after])


@pytest.mark.parametrize("bound", [0.1, 0.3])
def test_a_decision_stays_within_the_bound(bound):
    """The first code under a constant draft, against the exact distribution: the total variation is at most
    δ, and not just because nothing happens. Sampling adds about 0.04."""
    kit = codec(CodeLayout((20,), length=2))
    lm, grammar, count = model(kit), Grammar(kit, ("image",)), 2000
    block = kit.vocabulary.block("image")
    prompt, sampling = prompts(kit, ["ab"])[0], {"image": SamplingConfig()}
    p = uncached(lm, kit, grammar, prompt, None, sampling, block[:1])[0][block]
    token = int(block[p.argsort()[10]])
    found = {}
    for name, acceptance in (("exact", exact), ("lossy", rule(kit, lm, rule="lantern", bound=bound))):
        ids, _, stats = generate(
            lm,
            [prompt] * count,
            grammar,
            sampling=sampling,
            drafter=Constant(token),
            acceptance=acceptance,
            generator=seeded(1),
        )
        first = torch.stack(ids)[:, 0] - block[0]
        found[name] = 0.5 * (first.bincount(minlength=20) / count - p).abs().sum(), stats.mean_accepted
    assert found["exact"][0] < 0.06
    assert found["lossy"][0] < bound + 0.06
    assert found["lossy"][1] > found["exact"][1] + 0.02


class Recorded(Rule):
    """Exact; remembers which drafted ids might have been relaxed."""

    def __init__(self):
        self.seen = []

    def __call__(self, target, draft, uniforms, relaxed=None):
        inside = torch.arange(draft.ids.shape[1]) < draft.lengths[:, None]
        self.seen.append((draft.ids[..., 0][inside], relaxed[inside]))
        return super().__call__(target, draft, uniforms, relaxed)


def test_only_codes_of_pictures_may_be_relaxed():
    kit = codec(RASTER)
    lm, recorded = model(kit), Recorded()
    run(lm, kit, NestedDrafter(lm, window=8), recorded, plan=("text", "image"))
    ids, relaxed = (torch.cat(parts) for parts in zip(*recorded.seen))
    assert torch.equal(relaxed, torch.isin(ids, kit.vocabulary.block("image")))
    assert {True, False} == set(relaxed.tolist())


def test_texts_are_as_they_are_under_exact_acceptance():
    kit = codec(RASTER)
    lm = model(kit)
    expected, _, _ = run(lm, kit, JacobiDrafter(4), exact, plan=("text",))
    for options in ({"rule": "lantern", "bound": 1.0}, {"rule": "grouped", "gap": 1.0, "distance": 99}):
        found, _, _ = run(lm, kit, JacobiDrafter(4), rule(kit, lm, **options), plan=("text",))
        assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_lantern(name):
    """With δ = 0 it is greedy decoding; with a large one pictures change, and fewer passes do."""
    kit = codec(RASTER)
    lm = model(kit)
    plain, _, _ = run(lm, kit, None, exact, GREEDY)
    strict, _, before = run(lm, kit, DRAFTERS[name](lm), rule(kit, lm, True, rule="lantern", bound=0), GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(plain, strict))
    loose, logprobs, after = run(
        lm, kit, DRAFTERS[name](lm), rule(kit, lm, True, rule="lantern", bound=0.9), GREEDY
    )
    assert any(not torch.equal(a, b) for a, b in zip(plain, loose))
    assert after.target_forwards <= before.target_forwards
    assert all(bool(row.isfinite().all()) for row in logprobs)


def test_which_requests_are_greedy():
    kit = codec(RASTER)
    lantern = AcceptanceConfig("lantern")

    def policy(image, text, plan=("image", "text")):
        settings = {"image": SamplingConfig(temperature=image), "text": SamplingConfig(temperature=text)}
        return Policy(Grammar(kit, plan), settings)

    assert greedy_rule(lantern, [policy(0, 0)])
    assert greedy_rule(lantern, [policy(0, 1, ("image",))])
    assert not greedy_rule(lantern, [policy(1, 0)])
    assert not greedy_rule(lantern, [policy(0, 0, ("text",))])
    assert not greedy_rule(AcceptanceConfig("grouped"), [policy(0, 0)])
    with pytest.raises(ValueError, match="temperature 0 for the texts"):
        greedy_rule(lantern, [policy(0, 1)])


@pytest.mark.parametrize("layout", [RASTER, INTERLEAVED, PARALLEL])
def test_code_vectors_are_the_codebooks(layout):
    tokenizer = Codebooks(layout)
    for number, book in enumerate(tokenizer.books):
        found = code_vectors(tokenizer, number)
        others = torch.cat([book[:1].expand(len(found), -1) for book in tokenizer.books], dim=1)
        torch.testing.assert_close(found[:, 4 * number : 4 * number + 4], book.detach())
        rest = torch.ones(found.shape[1], dtype=torch.bool)
        rest[4 * number : 4 * number + 4] = False
        assert torch.equal(found[:, rest], others[:, rest])


def test_codebooks_of_one_column_keep_their_neighbours_apart():
    kit = codec(INTERLEAVED)
    made = rule(kit, model(kit), rule="lantern", neighbours=2)
    for number in range(2):
        block = kit.vocabulary.block("image", number)
        near, relaxed = made._books[0].near(block)
        assert bool(relaxed.all())
        assert bool(torch.isin(near, block).all())


def test_rules_and_their_values():
    kit = codec(PARALLEL)
    lm = model(kit)
    assert rule(kit, lm) is exact
    assert isinstance(rule(kit, lm, rule="grouped"), Grouped)
    made = rule(kit, lm, rule="lantern", neighbours=2, bound=3.0)
    assert isinstance(made, Lantern)
    assert (made.k, made.bound, made.mode, len(made._books)) == (2, 3.0, "bounded", 2)
    with pytest.raises(LexelError, match="one code per position, this model has 2"):
        rule(kit, lm, True, rule="lantern")
    assert AcceptanceConfig.of("lantern") == AcceptanceConfig("lantern")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "lax"}, "one of exact, lantern, grouped, got 'lax'"),
        ({"neighbours": 0}, "at least 1 neighbour"),
        ({"bound": -0.1}, "bound must be"),
        ({"residual": "none at all"}, "residual must be"),
        ({"size": 0}, "at least 1 id"),
    ],
)
def test_impossible_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AcceptanceConfig(**options)


def test_lookup_copies_texts():
    """A greedy text that repeats itself is copied; pictures are left alone; the result is the same."""
    kit = codec(RASTER)
    lm = model(kit, seed=5)
    asked, plan = prompts(kit, ["ab ab ab"]), ("image", "text")
    grammar = Grammar(kit, plan, text_limit=30)
    null = prompts(kit, ["ab ab ab"], unconditional=True)
    options = {"unconditional": null, "sampling": GREEDY}
    plain, _, before = generate(lm, asked, grammar, **options)
    found, _, after = generate(lm, asked, grammar, drafter=LookupDrafter(6), **options)
    assert torch.equal(plain[0], found[0])
    assert after.accept_lengths[:6] == (1,) * 6
    assert after.target_forwards < before.target_forwards


def test_a_pipeline_keeps_the_rules_apart():
    pipe = lexel.Pipeline.from_pretrained()
    document = [Text("a red circle"), Image.blank()]

    def passes(acceptance, **options):
        output = pipe(document, seed=1, decoding="jacobi-repeat", acceptance=acceptance, **options)
        return output.stats.target_forwards, output.ids[0].tolist()

    before = passes("exact")
    assert passes(AcceptanceConfig("lantern", bound=0.5))[0] < before[0]
    assert passes("exact") == before
    assert passes("lantern", temperature=0.0)[0] > 0


def test_the_command_knows_the_rules(tmp_path, capsys):
    options = ["sample", "a red circle", "--count", "1", "--out", str(tmp_path), "--seed", "1"]
    assert (
        main(
            [*options, "--decoding", "jacobi", "--acceptance", "lantern", "--bound", "2", "--neighbours", "9"]
        )
        == 0
    )
    assert main([*options, "--bound", "0.2"]) == 2
    assert "--bound belongs to --acceptance lantern" in capsys.readouterr().err
