"""The queue: requests of different kinds side by side give what each gives alone, and after every round the
cache holds what a fresh reading of the same ids would, whatever was accepted."""

import threading

import numpy as np
import pytest
import torch
from decoding_fakes import DRAFTERS, SEVERAL_CODES, codec, little, model, prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from lexel.document import Grammar, Image, Text
from lexel.errors import LexelError
from lexel.sample.acceptance import Rule, Verdict
from lexel.sample.drafters import Drafter, ModelDrafter
from lexel.sample.generator import Generator, Request
from lexel.sample.logits import SamplingConfig
from lexel.sample.policy import Policy, Token
from lexel.sample.session import Proposal
from lexel.sample.stream import Tree
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes, TokenBatch

KITS = {"flexible": CodeLayout((5,), length=6, flexible=True), "columns": CodeLayout((3, 4), grid=(2, 3))}
GUIDED = {
    "image": SamplingConfig(temperature=0.9, guidance=1.7),
    "text": SamplingConfig(guidance=1.3, top_k=3),
}
ALONE = {"image": SamplingConfig(top_p=0.9), "text": SamplingConfig(min_p=0.1)}


def greedy(sampling):
    return {name: SamplingConfig(temperature=0, guidance=x.guidance) for name, x in sampling.items()}


def requests(kit, change=dict):
    """Drawings, descriptions and both, guided and not, after prompts of different lengths."""
    layout = kit.layouts["image"]
    codes = torch.arange(layout.positions * kit.columns).reshape(1, layout.positions, kit.columns) % 3
    picture = Image(Codes(codes, layout.grid))
    drawing, describing = [Text("ab"), Image.blank()], [picture, Text.blank()]
    cases = [
        (drawing, GUIDED, 4),
        (describing, ALONE, 5),
        ([Text("b"), Image.blank(), Text.blank()], GUIDED, 3),
        ([Text("a b ab"), Image.blank()], ALONE, 4),
        (describing, GUIDED, 6),
        ([Image.blank()], ALONE, 4),
        ([Text(""), Image.blank(), Text.blank(), Image.blank()], ALONE, 2),
        ([Text("ab ab ab"), Text.blank()], ALONE, 7),
    ]
    found = []
    for seed, (document, sampling, limit) in enumerate(cases):
        policy = Policy(Grammar(kit, kit.plan(document), text_limit=limit), change(sampling))
        null = kit.unconditional(document) if policy.guided else None
        found.append(Request(kit.prompt(document), null, policy, seed))
    return found


def alone(lm, request, drafter=None):
    queue = Generator(lm, drafter=drafter)
    ticket = queue.submit(request)
    queue.wait([ticket])
    return ticket


def staggered(queue, asked):
    """All tickets, submitted a few at a time while others run."""
    tickets = [queue.submit(request) for request in asked[:2]]
    for request in asked[2:]:
        queue.step()
        tickets.append(queue.submit(request))
    queue.wait(tickets)
    return tickets


USUAL = ["plain", "nested", "model", "jacobi", "gumbel", "pac", "eagle-static"]
CASES = [("flexible", name) for name in DRAFTERS] + [("columns", name) for name in SEVERAL_CODES]
CASES = [
    pytest.param(layout, name, marks=() if name in USUAL else pytest.mark.slow) for layout, name in CASES
]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_company_changes_nothing(layout, name):
    """More requests than rows, of all kinds, some while others run: the ids of each alone, greedily those of
    plain decoding."""
    kit = codec(KITS[layout])
    lm = model(kit, seed=2)
    for change in (greedy, dict):
        asked = requests(kit, change)
        queue = Generator(lm, drafter=DRAFTERS[name](lm, kit, 3), rows=3)
        tickets = staggered(queue, asked)
        assert not queue.busy
        for request, ticket in zip(asked, tickets):
            single = alone(lm, request, DRAFTERS[name](lm, kit, 3))
            assert torch.equal(ticket.ids, single.ids)
            torch.testing.assert_close(ticket.logprobs, single.logprobs)
            assert ticket.row.gained == single.row.gained
            if change is greedy:
                assert torch.equal(ticket.ids, alone(lm, request).ids)


class Wild(Drafter):
    """Grammatical trees of random form (chains for several codes per position) and random tokens."""

    def __init__(self, seed, depth=3, width=1, nodes=7):
        super().__init__(depth, nodes)
        self.random, self.width = np.random.default_rng(seed), width

    def propose(self, session):
        return Proposal([self._tree(row) for row in session.rows])

    def _tree(self, row):
        tree, depths, open_ones = Tree([], [], [row.state]), [], [-1]
        grammar, vocabulary = row.policy.grammar, row.policy.grammar.codec.vocabulary
        while open_ones and len(tree.tokens) < self.reach:
            parent = open_ones.pop(0)
            state = tree.states[parent + 1]
            depth = 1 if parent < 0 else depths[parent] + 1
            if depth > self.limit(row) or grammar.done(state):
                continue
            place = row.policy.place(state)
            for _ in range(int(self.random.integers(0, self.width + 1)) if self.width > 1 else 1):
                if len(tree.tokens) == self.reach:
                    break
                first = int(self.random.choice(sorted(place.choice.members)))
                books = grammar.columns(state)
                codes = books and (books[0] is None or first in vocabulary.block("image", books[0]).tolist())
                further = books[1:] if codes else [None] * (grammar.codec.columns - 1)
                pad = vocabulary.special["pad"]
                blocks = [[pad] if book is None else vocabulary.block("image", book) for book in further]
                ids = (first, *(int(self.random.choice(block)) for block in blocks))
                open_ones.append(len(tree.tokens))
                depths.append(depth)
                tree.tokens.append(row.policy.token(state, ids))
                tree.parents.append(parent)
                tree.states.append(grammar.advance(state, first))
        return tree


class Anything(Rule):
    """Accepts a random path of each tree and goes on with what the target says there."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def __call__(self, target, draft, uniforms, relaxed=None):
        rows, length, columns = draft.ids.shape
        verdict = Verdict([], [], [], [], None, target.first, [])
        for row in range(rows):
            path, node, column = [], -1, 0
            used = int(draft.lengths[row])
            while True:
                p = target.first[row * (length + 1) + node + 1 :][:1]
                below = [n for n in range(used) if int(draft.parents[row, n]) == node]
                below = [n for n in below if float(p.at(draft.ids[row, n, :1])) > 0]  # others are forbidden
                if not below or self.random.random() < 0.35:
                    break
                node = int(self.random.choice(below))
                path.append(node)
            rest = target.first[row * (length + 1) + node + 1 :][:1]
            if below and columns > 1 and self.random.random() < 0.5:  # its first code stands
                column, node = 1, below[0]
                rest = target.further[0][row * length + node :][:1]
            verdict.path.append(path)
            verdict.extra.append(int(rest.draw(torch.tensor([self.random.random()]).double())))
            verdict.column.append(column)
            verdict.node.append(node if column else -1)
            verdict.tested.append(used)
        return verdict


def known_tokens(row, start):
    """All tokens of a row after a prompt `start`, and the grammar's state after them."""
    grammar, ids = row.policy.grammar, start.ids.reshape(len(start), -1).tolist()
    tokens = [
        Token(tuple(i), m, tuple(p))
        for i, m, p in zip(ids, start.modality.tolist(), start.positions.tolist())
    ]
    shift = tokens[-1].position[0] - int(row.prompt.positions[-1, 0])
    state = grammar.start(row.prompt)
    for line in row.ids:
        index, line_number, column = grammar.position(state)
        tokens.append(Token(line, grammar.modality(state), (index + shift, line_number, column)))
        state = grammar.advance(state, line[0])
    return tokens, state


def assert_as_fresh(lm, stream, rows):
    """Each lane holds its known tokens but the unread ones, with the keys and values of a single pass."""
    number = 0
    assert len(stream) == len(rows)
    for row_number, row in enumerate(rows):
        # An unguided row has one lane: no second one for its null.
        for lane, start in zip(stream.own(row_number), [row.prompt, row.null]):
            tokens, state = known_tokens(row, start)
            assert row.state == state
            read = stream.cache.host_lengths[number]
            assert lane.unread == tokens[read:] != []
            assert not lane.drafted
            fresh = lm.new_cache(1, len(tokens))
            if read:
                ids = torch.tensor([[t.ids for t in tokens[:read]]])
                batch = TokenBatch(
                    ids[..., 0] if ids.shape[2] == 1 else ids,
                    torch.tensor([[t.modality for t in tokens[:read]]]),
                    torch.tensor([[t.position for t in tokens[:read]]]),
                )
                with torch.no_grad():
                    lm.decode(batch, cache=fresh)
            for mine, theirs in ((stream.cache.keys, fresh.keys), (stream.cache.values, fresh.values)):
                torch.testing.assert_close(mine[:, number, :, :read], theirs[:, 0, :, :read])
            number += 1
    assert number == stream.cache.batch == len(stream.lanes)


@given(seed=st.integers(0, 2**32), width=st.integers(1, 3), case=st.sampled_from(["flexible", "columns"]))
@settings(max_examples=25, deadline=None)
def test_after_every_round_all_is_as_if_read_afresh(seed, width, case):
    """Random trees of which random paths are accepted: after each round cache contents, lengths, unread
    tokens, positions and grammar states are those of a fresh run over the same ids; rows come and go."""
    kit = codec(KITS[case])
    lm, random = model(kit, rope_axes=(0.5, 0.25, 0.25)), np.random.default_rng(seed)
    queue = Generator(
        lm,
        drafter=Wild(seed, width=1 if case == "columns" else width),
        acceptance=Anything(seed),
        rows=int(random.integers(1, 4)),
    )
    asked = requests(kit)
    waiting = [asked[i] for i in random.permutation(len(asked))[:5]]
    tickets = [queue.submit(waiting.pop())]
    while queue.busy or waiting:
        if waiting and random.random() < 0.6:
            tickets.append(queue.submit(waiting.pop()))
        if random.random() < 0.1:
            queue.cancel([tickets[int(random.integers(len(tickets)))]])
        queue.step()
        assert_as_fresh(lm, queue.session.stream, queue.session.rows)
    for ticket in tickets:
        assert sum(ticket.row.gained) == len(ticket.row.ids) == len(ticket.row.logprobs)


@pytest.mark.parametrize(("case", "name"), CASES)
def test_drafters_bear_any_acceptance(case, name):
    """The same with their own drafts; what is accepted, or drawn afterwards, need not be likely."""
    kit = codec(KITS[case])
    lm = model(kit)
    for seed in range(3):
        queue = Generator(lm, drafter=DRAFTERS[name](lm, kit, 3), acceptance=Anything(seed), rows=3)
        tickets = [queue.submit(request) for request in requests(kit)]
        while queue.busy:
            queue.step()
            assert_as_fresh(lm, queue.session.stream, queue.session.rows)
        assert all(ticket.row.done for ticket in tickets)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_a_drafting_models_own_cache_follows(seed):
    """The same for the cache of the small model that drafts."""
    kit = codec(KITS["flexible"])
    lm = model(kit)
    drafter = ModelDrafter(little(kit, lm), 3)
    queue = Generator(lm, drafter=drafter, acceptance=Anything(seed), rows=3)
    tickets = [queue.submit(request) for request in requests(kit)]
    while queue.busy:
        queue.step()
        assert_as_fresh(drafter.lm, drafter.own, queue.session.rows)
    assert all(ticket.row.done for ticket in tickets)


@pytest.mark.parametrize("name", DRAFTERS)
def test_whoever_stops_listening_is_forgotten(name):
    kit = codec(CodeLayout((5,), length=9))
    lm, asked = model(kit), requests(kit)
    queue = Generator(lm, drafter=DRAFTERS[name](lm, kit, 3), rows=2)
    kept, left, waiting = (queue.submit(request) for request in asked[2:5])
    for _ in queue.stream([left]):
        break
    assert left.done
    assert not left.row.done
    queue.cancel([waiting])
    queue.wait([kept])
    assert torch.equal(kept.ids, alone(lm, asked[2], DRAFTERS[name](lm, kit, 3)).ids)
    assert len(waiting.ids) == 0
    assert not queue.busy
    assert len(queue.session.stream) == queue.session.stream.cache.batch == 0


@pytest.mark.parametrize("name", DRAFTERS)
def test_after_an_error_the_generator_goes_on(name):
    """What is in flight fails; what waits and what comes later is as ever."""
    kit = codec(CodeLayout((5,), length=9))
    lm = model(kit)
    asked = [request for request in requests(kit) if request.policy.grammar.plan[0] == "image"]
    queue = Generator(lm, drafter=DRAFTERS[name](lm, kit, 3), rows=2)
    tickets = [queue.submit(request) for request in asked[:3]]
    queue.step()
    queue.acceptance, right = Broken(), queue.acceptance
    plain, queue._plain = queue._plain, Broken()
    with pytest.raises(ZeroDivisionError, match="broken"):
        queue.wait(tickets[:1])
    queue.acceptance, queue._plain = right, plain
    with pytest.raises(ZeroDivisionError, match="broken"):
        queue.wait(tickets[1:2])
    queue.wait(tickets[2:])
    later = queue.submit(asked[3])
    queue.wait([later])
    for ticket in (tickets[2], later):
        expected = alone(lm, ticket.request, DRAFTERS[name](lm, kit, 3))
        assert torch.equal(ticket.ids, expected.ids)


class Broken(Rule):
    def __call__(self, *args, **options):
        raise ZeroDivisionError("broken")


def test_threads_share_rounds():
    """Two callers wait for their own requests: the rounds are shared and nobody gets the other's tokens."""
    kit = codec(KITS["flexible"])
    lm, asked = model(kit), requests(kit)
    drafter = DRAFTERS["jacobi"]
    queue = Generator(lm, drafter=drafter(lm, kit, 3))
    tickets, streamed = [queue.submit(request) for request in asked], {}

    def listen(numbers):
        mine = [tickets[number] for number in numbers]
        for number, ids in queue.stream(mine):
            streamed.setdefault(numbers[number], []).append(ids)

    threads = [threading.Thread(target=listen, args=(list(range(start, 8, 2)),)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, request in enumerate(asked):
        expected = alone(lm, request, drafter(lm, kit, 3)).ids
        assert torch.equal(torch.cat(streamed[number]), expected)
    assert queue.forwards == max(len(ticket.row.gained) for ticket in tickets)


def test_who_waits_gets_a_turn():
    """A request that comes while another thread works is begun at once, not after the other's last token."""
    kit = codec(CodeLayout((5,), length=200))
    lm = model(kit, max_length=256)
    policy = Policy(Grammar(kit, ("image",)), {"image": SamplingConfig()})
    long, short = (Request(prompts(kit, ["a"])[0], None, policy, seed) for seed in (0, 1))
    queue = Generator(lm)
    started, order = threading.Event(), []

    def work():
        for _ in queue.stream([queue.submit(long)]):
            started.set()
            order.append("first")

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(60)
    ticket = queue.submit(short)
    order.append("submitted")
    stream = queue.stream([ticket])
    next(stream)
    order.append("second")
    stream.close()
    thread.join(60)
    assert order.index("submitted") < 150
    assert order.index("second") < 180


@pytest.mark.parametrize("name", DRAFTERS)
def test_an_unconditional_prompt_may_be_the_longer_one(name):
    kit = codec(CodeLayout((5,), length=9), null="negative")
    lm, document = model(kit), [Text("a"), Image.blank()]
    policy = Policy(Grammar(kit, ("image",)), greedy(GUIDED))
    null = kit.unconditional(document, negative="ab " * 9)
    request = Request(kit.prompt(document), null, policy, 0)
    assert torch.equal(alone(lm, request, DRAFTERS[name](lm, kit, 4)).ids, alone(lm, request).ids)


def test_requests_that_cannot_be_served_are_refused():
    kit = codec(KITS["flexible"])
    lm = model(kit, max_length=10)
    guided, free = requests(kit)[0], requests(kit)[3]
    with pytest.raises(LexelError, match="context of 10"):
        Generator(lm).submit(free)
    with pytest.raises(LexelError, match="needs an unconditional prompt"):
        Generator(lm).submit(Request(guided.prompt, None, guided.policy, 0))
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        Generator(lm, rows=0)
