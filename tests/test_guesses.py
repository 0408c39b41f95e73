"""Drafting without a network of its own: from neighbouring codes, and from the model's heads for later
tokens."""

from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
from decoding_fakes import RASTER, codec, model, prompts, uncached

from lexel.document import Grammar
from lexel.errors import LexelError
from lexel.models.neighbour_table import NeighbourTableConfig
from lexel.sample.decode import generate
from lexel.sample.drafters import HeadsDrafter, JacobiDrafter, PacDrafter, TableDrafter, TableGuess
from lexel.sample.drafters.neighbours import Cell
from lexel.sample.generator import Generator, Request
from lexel.sample.logits import SamplingConfig
from lexel.sample.policy import Policy
from lexel.sample.session import Row
from lexel.sample.strategies import strategies
from lexel.tokenizers.layout import CodeLayout

SAMPLED = {"image": SamplingConfig(temperature=0.8, guidance=2.0), "text": SamplingConfig(guidance=1.5)}
GREEDY = {name: SamplingConfig(temperature=0, guidance=config.guidance) for name, config in SAMPLED.items()}
COLUMNS = CodeLayout((3, 4), grid=(2, 3))
TEXTS = ["a", "ab ba", "", "b a b a b"]
LAYOUTS = {
    "raster": (RASTER, {}),
    "rows": (CodeLayout((5,), grid=(2, 2), row_end=True), {"roles": ("eol", "eof"), "null": "prefix"}),
    "flexible": (CodeLayout((5,), length=5, flexible=True), {}),
    "interleaved": (CodeLayout((3, 4), grid=(2, 2), pattern="interleaved"), {}),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def table(layout, seed=1):
    made = NeighbourTableConfig(layout.codebook_sizes, layout.grid, layout.length).build().double()
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def drafters(lm, layout):
    return {
        "table": lambda: TableDrafter(table(layout), 3),
        "jacobi": lambda: JacobiDrafter(4, TableGuess(table(layout))),
        "pac": lambda: PacDrafter(4, 2, 2, TableGuess(table(layout))),
        "heads": lambda: HeadsDrafter(lm),
    }


NAMES = ("table", "jacobi", "pac", "heads")


def run(lm, kit, drafter, sampling, plan=("image", "text", "image"), texts=TEXTS, seed=0):
    null = prompts(kit, texts, unconditional=True)
    grammar = Grammar(kit, plan, text_limit=4)
    return generate(
        lm,
        prompts(kit, texts),
        grammar,
        unconditional=null,
        sampling=sampling,
        drafter=drafter,
        generator=seeded(seed),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_plain_greedy(name, layout):
    layout, options = LAYOUTS[layout]
    kit = codec(layout, **options)
    lm = model(kit, seed=1, future_heads=2)
    plain, _, before = run(lm, kit, None, GREEDY)
    found, _, after = run(lm, kit, drafters(lm, layout)[name](), GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(plain, found))
    # A random table is hardly ever right.
    assert after.target_forwards < before.target_forwards + (name == "table")


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_their_exact_probabilities(name):
    """All pictures of 2 x 2 codes out of three, at error rate 1e-3 (Wilson and Hilferty's quantile)."""
    layout = CodeLayout((3,), grid=(2, 2))
    kit, count = codec(layout), 1000
    lm = model(kit, seed=2, future_heads=2)
    prompt, null = prompts(kit, ["ab"])[0], prompts(kit, ["ab"], unconditional=True)[0]
    words = torch.cartesian_prod(*[kit.vocabulary.block("image")] * 4)
    expected = torch.stack(
        [
            uncached(lm, kit, Grammar(kit, ("image",)), prompt, null, SAMPLED, word)
            .gather(1, word[:, None])
            .prod()
            for word in words
        ]
    )
    ids, _, _ = run(lm, kit, drafters(lm, layout)[name](), SAMPLED, ("image",), ["ab"] * count, seed=4)
    codes = torch.stack(ids) - kit.vocabulary.block("image")[0]
    found = (codes * torch.tensor([27, 9, 3, 1])).sum(dim=1).bincount(minlength=81).double()
    expected = expected * count
    rare = expected < 5
    pairs = [torch.cat([x[~rare], x[rare].sum()[None]]) for x in (found, expected)]
    statistic = float(((pairs[0] - pairs[1]) ** 2 / pairs[1]).sum())
    freedom, z = len(pairs[0]) - 1, NormalDist().inv_cdf(1 - 1e-3)
    assert statistic < freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_guess_reads_the_codes_to_the_left_and_above(layout):
    """At every place of a picture, half of it generated and half drafted, against the table's own
    neighbours."""
    layout, options = LAYOUTS[layout]
    kit, made = codec(layout, **options), table(layout)
    policy = Policy(Grammar(kit, ("image",)), {"image": SamplingConfig(temperature=0.7, guidance=3.0)})
    row = Row.start(prompts(kit, ["ab"])[0], None, policy, 0)
    guess, state, drafted, cells = TableGuess(made), row.state, [], []
    generator = seeded(3)
    while not policy.grammar.done(state):
        place = policy.place(state)
        ids = place.choice.ids[: layout.codebook_sizes[place.books[0]]] if place.books else place.choice.ids
        if guess.knows(place):
            probs = guess(row, place, drafted)
            together = guess.distributions([Cell(row, place, list(drafted)) for _ in range(2)])
            torch.testing.assert_close(together.probs, probs.probs.expand(2, -1))
            cells.append(probs.dense()[0])
        else:
            assert guess(row, place, drafted) is None
        token = policy.token(state, (int(ids[int(torch.randint(len(ids), (), generator=generator))]),))
        drafted.append(token)
        if len(drafted) + len(row.ids) == layout.positions // 2:
            row.ids, drafted = [token.ids for token in drafted], []
        state = policy.grammar.advance(state, token.ids[0])
    written = kit.parse(
        torch.tensor([kit.vocabulary.special["boi"], *(i[0] for i in row.ids), *(t.ids[0] for t in drafted)])
    )
    indices = written[0].codes.indices
    left, above = made.neighbours(indices)
    slots = torch.arange(layout.positions)
    for step, dense in enumerate(cells):
        position, book = divmod(step, layout.k)
        upper = None if above is None else above[0, position, book][None]
        logits = made(left[0, position, book][None], upper, slots[position][None], book)[0]
        block = kit.vocabulary.block("image", book)
        torch.testing.assert_close(dense[block], (logits / 0.7).softmax(-1))


def test_a_row_does_not_depend_on_its_company():
    kit = codec(RASTER)
    lm = model(kit, seed=3)
    policies = [Policy(Grammar(kit, plan, text_limit=3), SAMPLED) for plan in (("image", "text"), ("image",))]
    pairs = zip(prompts(kit, TEXTS), prompts(kit, TEXTS, unconditional=True))
    requests = [Request(a, b, policies[i % 2], i) for i, (a, b) in enumerate(pairs)]

    def sample(requests):
        queue = Generator(lm, drafter=TableDrafter(table(RASTER), 3))
        tickets = [queue.submit(request) for request in requests]
        queue.wait(tickets)
        return [ticket.ids for ticket in tickets]

    together = sample(requests)
    for request, row in zip(requests, together):
        assert torch.equal(sample([request])[0], row)


def test_heads_read_the_state_that_gave_the_last_token():
    """The draft's distributions are the heads' at the true hidden states: of an uncached pass, guided."""
    kit = codec(CodeLayout((6,), grid=(2, 3)))
    lm, seen = model(kit, future_heads=2), []

    class Watched(HeadsDrafter):
        def propose(self, session):
            proposal = super().propose(session)
            if proposal.probs is not None:
                seen.append((len(session.rows[0].history), proposal.probs[0].dense()))
            return proposal

    ids, _, _ = run(lm, kit, Watched(lm), SAMPLED, ("image",), ["ab"])
    whole = []
    for null in (False, True):
        prompt = prompts(kit, ["ab"], null)[0]
        own = prompts(kit, ["ab"])[0]
        grammar = Grammar(kit, ("image",))
        state, positions = grammar.start(own), []
        for token in ids[0].tolist():
            index, line, column = grammar.position(state)
            positions.append((index + len(prompt) - len(own), line, column))
            state = grammar.advance(state, token)
        from lexel.types import TokenBatch

        batch = TokenBatch(
            torch.cat([prompt.ids, ids[0]])[None],
            torch.cat([prompt.modality, torch.ones(len(ids[0]), dtype=torch.long)])[None],
            torch.cat([prompt.positions, torch.tensor(positions)])[None],
        )
        with torch.no_grad():
            output = lm(batch, future=True)
        whole.append((len(prompt), output.future_logits))
    block = kit.vocabulary.block("image")
    (start, cond), (other, uncond) = whole
    assert seen
    for known, dense in seen:
        for head, probs in enumerate(dense):
            at = known - 2  # what gave the last known token
            pair = cond[head][0, at, block], uncond[head][0, at + other - start, block]
            guided = pair[1] + 2.0 * (pair[0] - pair[1])
            torch.testing.assert_close(probs[block], (guided / 0.8).softmax(-1))


def test_what_cannot_draft_is_refused():
    kit = codec(CodeLayout((3, 4), grid=(2, 2), pattern="delayed"))
    lm = model(kit, future_heads=0)
    with pytest.raises(LexelError, match="no heads for later tokens"):
        HeadsDrafter(lm)
    with pytest.raises(LexelError, match="whole positions, this model delays their codes"):
        run(lm, kit, TableDrafter(table(kit.layouts["image"])), GREEDY)
    kit = codec(RASTER)
    with pytest.raises(LexelError, match=r"codebooks of \(5,\) codes, the vocabulary's codebook 0 has 6"):
        run(model(kit), kit, TableDrafter(table(CodeLayout((5,), grid=(2, 3)))), GREEDY)


def test_strategies_by_name():
    kit = codec(RASTER)
    lm = model(kit, future_heads=2)
    found = strategies(lm, {"near": table(RASTER)})
    assert {"pac", "lookup", "heads", "near", "jacobi-near", "pac-near"} <= set(found)
    for name in ("pac", "lookup", "heads", "near", "jacobi-near", "pac-near"):
        plain, _, _ = run(lm, kit, None, GREEDY)
        ids, _, _ = run(lm, kit, found[name].make(lm, found[name].window), GREEDY)
        assert all(torch.equal(a, b) for a, b in zip(plain, ids))
    kit = codec(COLUMNS)
    lm = model(kit)
    found = strategies(lm, {"near": table(COLUMNS)})
    assert {"heads", "near", "jacobi-near"} <= set(found)
    assert not {"pac", "pac-near"} & set(found)
    plain, _, _ = run(lm, kit, None, GREEDY)
    for name, strategy in found.items():  # `auto` races all that are offered
        ids, _, _ = run(lm, kit, strategy.make(lm, strategy.window), GREEDY)
        assert all(torch.equal(a, b) for a, b in zip(plain, ids)), name


def walk(kit, steps):
    """A row that stands where a picture begins, its place `steps` positions later, and those as a draft."""
    policy = Policy(Grammar(kit, ("image",)), {"image": SamplingConfig(temperature=0.7)})
    row, generator = Row.start(prompts(kit, ["ab"])[0], None, policy, 0), seeded(3)
    state, tokens = row.state, []
    for _ in range(steps):
        blocks = [kit.vocabulary.block("image", book) for book in policy.place(state).books]
        ids = tuple(int(b[torch.randint(len(b), (1,), generator=generator)]) for b in blocks)
        tokens.append(policy.token(state, ids))
        state = policy.advance(state, ids[0])
    return row, policy.place(state), tokens


def test_each_of_several_codes_is_guessed_from_its_own_codebook():
    kit, made = codec(COLUMNS), table(COLUMNS)
    row, place, drafted = walk(kit, 4)  # the place is row 1, column 1 of a grid of 2 x 3
    for column in range(2):
        block = kit.vocabulary.block("image", column)
        codes = [block.tolist().index(token.ids[column]) for token in drafted]
        left, above, slot = (torch.tensor([n]) for n in (codes[3], codes[1], 4))
        expected = (made(left, above, slot, column)[0] / 0.7).softmax(-1)
        probs = TableGuess(made)(row, place, drafted, column)
        torch.testing.assert_close(probs.dense()[0][block].double(), expected)


def test_repeating_copies_every_code_of_the_position_before():
    kit = codec(COLUMNS)
    row, place, drafted = walk(kit, 4)
    session = SimpleNamespace(columns=2, vocabulary_size=kit.vocabulary.size, device="cpu")
    for column, token in enumerate(drafted[-1].ids):
        found, probs = JacobiDrafter(4, "repeat")._fresh_column(session, row, place, drafted, column)
        assert found == token
        assert probs.dense()[0, token] == 1
