"""ZipAR: its schedule, plain decoding at full windows, and what tokens see at smaller ones."""

import pytest
import torch
from decoding_fakes import RASTER, codec, model, prompts

from lexel.document import Grammar, TokenSequence
from lexel.errors import LexelError
from lexel.sample.decode import Meter, generate, seeds
from lexel.sample.generator import Request
from lexel.sample.logits import SamplingConfig
from lexel.sample.policy import Policy
from lexel.sample.zipar import ZipAR, schedule
from lexel.tokenizers.layout import CodeLayout
from lexel.types import TokenBatch

GUIDED = {"image": SamplingConfig(temperature=0.8, guidance=2.5)}
PLAIN = {"image": SamplingConfig(temperature=0.8)}
TEXTS = ["a", "ab ba", "", "b a b a b"]
GRID = CodeLayout((6,), grid=(3, 4))
ROWS = CodeLayout((5,), grid=(3, 3), row_end=True)
LAYOUTS = {"raster": (GRID, {}), "rows": (ROWS, {"roles": ("eol", "eof"), "null": "prefix"})}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def zipar(lm, kit, texts, window, sampling=GUIDED, rows=64):
    policy = Policy(Grammar(kit, ("image",)), sampling)
    queue = ZipAR(lm, window, rows=rows)
    meter = Meter(queue)
    pairs = zip(prompts(kit, texts), prompts(kit, texts, unconditional=True), seeds(len(texts), seeded(1)))
    tickets = [queue.submit(Request(prompt, null, policy, seed)) for prompt, null, seed in pairs]
    queue.wait(tickets)
    return meter.results(tickets)


@pytest.mark.parametrize(
    ("height", "width", "window", "passes"),
    [(24, 24, 8, 208), (24, 24, 24, 576), (24, 24, 99, 576), (3, 4, 1, 6), (1, 5, 2, 5), (5, 1, 1, 5)],
)
@pytest.mark.parametrize("row_end", [False, True])
def test_passes(height, width, window, passes, row_end):
    plan = schedule(height, width, window, row_end)
    wide = width + row_end
    if row_end:  # one more pass for the last end, or for all of them when nothing runs side by side
        passes += height if window >= width else 1
    assert len(plan) == passes
    assert sorted(fed.gives for one in plan for fed in one if fed.gives is not None) == list(
        range(height * wide)
    )


def test_no_token_is_read_before_it_is_there_or_twice():
    known, read = {-1}, []
    for fed in schedule(6, 5, 2):
        for one in fed:
            assert one.copied in known if one.auxiliary else one.slot in known
            assert not (one.auxiliary and one.slot in known)
        read += [one.slot for one in fed if not one.auxiliary]
        assert [one.auxiliary for one in fed] == sorted(one.auxiliary for one in fed)
        known |= {one.gives for one in fed if one.gives is not None}
    assert sorted(read) == sorted(set(read))
    assert set(range(24)) <= set(read)  # all that a later row sees; not the end of the last one


@pytest.mark.parametrize("sampling", [GUIDED, PLAIN, {"image": SamplingConfig(temperature=0, guidance=2.0)}])
@pytest.mark.parametrize("window", [4, 9])
def test_a_window_of_the_whole_width_is_plain_decoding(sampling, window):
    kit = codec(GRID)
    lm = model(kit, rope_axes=(0.5, 0.25, 0.25))
    null = prompts(kit, TEXTS, unconditional=True)
    grammar = Grammar(kit, ("image",))
    expected, scores, plain = generate(
        lm, prompts(kit, TEXTS), grammar, unconditional=null, sampling=sampling, generator=seeded(1)
    )
    ids, logprobs, stats = zipar(lm, kit, TEXTS, window, sampling)
    assert all(torch.equal(a, b) for a, b in zip(ids, expected))
    torch.testing.assert_close(torch.stack(logprobs), torch.stack(scores))
    assert stats.target_forwards == plain.target_forwards
    assert stats.mean_accepted == 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_pictures_are_drawn_in_company_as_alone(name):
    layout, options = LAYOUTS[name]
    kit = codec(layout, **options)
    lm = model(kit, seed=2)
    together, scores, stats = zipar(lm, kit, TEXTS, 1)
    batches, _, _ = zipar(lm, kit, TEXTS, 1, rows=3)
    opening = prompts(kit, [""])[0].ids[-len(kit.scripts["image"][0]) :]
    for row, other, one in zip(together, batches, scores):
        assert torch.equal(row, other)
        kit.parse(torch.cat([opening, row]))
        assert len(one) == len(row)
        assert bool(one.isfinite().all())
    assert stats.mean_accepted >= 2


def test_each_code_has_the_distribution_of_what_it_sees():
    """Every log-probability again from an uncached pass over just the tokens that were there, in raster
    order. Of one layer, so that keys and values do not depend on what was there when they were made."""
    kit, window = codec(GRID), 2
    lm = model(kit, rope_axes=(0.5, 0.25, 0.25), layers=1)
    ids, logprobs, _ = zipar(lm, kit, ["ab"], window, PLAIN)
    prompt, block = prompts(kit, ["ab"])[0], kit.vocabulary.block("image")
    grammar = Grammar(kit, ("image",))
    state, places = grammar.start(prompt), []
    for token in ids[0].tolist():
        places.append((token, grammar.modality(state), grammar.position(state)))
        state = grammar.advance(state, token)
    known = []
    for fed in schedule(3, 4, window):
        for one in fed:
            if one.gives is None or one.slot < 0:
                continue
            there = {*known, *(other.slot for other in fed if not other.auxiliary)}
            seen = [places[slot] for slot in sorted(there) if 0 <= slot < one.slot]
            token = places[one.copied if one.auxiliary else one.slot][0]
            seen.append((token, *places[one.slot][1:]))
            whole = TokenSequence(
                torch.cat([prompt.ids, torch.tensor([p[0] for p in seen])]),
                torch.cat([prompt.modality, torch.tensor([p[1] for p in seen])]),
                torch.cat([prompt.positions, torch.tensor([p[2] for p in seen])]),
                torch.zeros(len(prompt) + len(seen), dtype=torch.bool),
            )
            with torch.no_grad():
                logits = lm(TokenBatch(whole.ids[None], whole.modality[None], whole.positions[None])).logits
            scores = (logits[0, -1, block] / 0.8).log_softmax(-1)
            expected = scores[ids[0][one.gives] - block[0]]
            torch.testing.assert_close(logprobs[0][one.gives].double(), expected, rtol=1e-4, atol=1e-5)
        known += [one.slot for one in fed if not one.auxiliary]


def test_codes_come_in_the_order_of_the_raster():
    kit = codec(GRID)
    policy = Policy(Grammar(kit, ("image",)), PLAIN)
    queue = ZipAR(model(kit), 1)
    tickets = [queue.submit(Request(prompt, None, policy, 3)) for prompt in prompts(kit, ["a", "b"])]
    told = {0: [], 1: []}
    for number, new in queue.stream(tickets):
        told[number] += new.tolist()
    assert [told[0], told[1]] == [ticket.ids.tolist() for ticket in tickets]
    assert not queue.tickets


def test_what_it_cannot_draw_is_refused():
    line = codec(CodeLayout((5,), length=5))
    with pytest.raises(LexelError, match=r"draws one picture of raster codes.*as a line of 5"):
        zipar(model(line), line, ["a"], 2)
    kit = codec(RASTER)
    policy = Policy(Grammar(kit, ("image", "text")), PLAIN)
    with pytest.raises(LexelError, match="asks for image, text"):
        ZipAR(model(kit)).submit(Request(prompts(kit, ["a"])[0], None, policy, 0))
    with pytest.raises(ValueError, match="window must be at least 1"):
        schedule(2, 2, 0)
