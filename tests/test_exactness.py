"""Every exact way to draft gives the target's own distribution of whole sequences: computed, not estimated,
by running the whole decode loop through every outcome of chance (see `branching`)."""

import pytest
from branching import explore
from decoding_fakes import (
    COUNTABLE,
    DELAYED_CODES,
    DRAFTERS,
    SEVERAL_CODES,
    codec,
    log_probabilities,
    model,
    prompts,
    whole_sequences,
)

from lexel.document import Grammar
from lexel.sample.generator import Generator, Request
from lexel.sample.logits import SamplingConfig
from lexel.sample.policy import Policy
from lexel.tokenizers.layout import CodeLayout

GUIDANCE = {"alone": 1.0, "guided": 1.5}
FILTERS = {"all": {}, "top-k": {"top_k": 2}, "top-p": {"top_p": 0.85}, "min-p": {"min_p": 0.3}}
SINGLE = CodeLayout((2,), length=3)
# Filters need something to drop.
THREE = CodeLayout((3,), length=3)


def distribution(lm, kit, plan, sampling, make, text_limit=2):
    """Of whole sequences generated with a drafter: {ids: probability}, and the target's own."""
    grammar = Grammar(kit, plan, text_limit=text_limit)
    policy = Policy(grammar, sampling)
    prompt, null = prompts(kit, ["ab"])[0], prompts(kit, ["ab"], unconditional=True)[0]
    null = null if policy.guided else None

    def run(paths, acceptance):
        queue = Generator(lm, drafter=make(), acceptance=acceptance, rows=len(paths))
        tickets = [queue.submit(Request(prompt, null, policy, 0)) for _ in paths]
        for ticket, path in zip(tickets, paths):
            ticket.row.random = path
        queue.wait(tickets)
        return [tuple(ticket.row.ids) for ticket in tickets]

    expected = {}
    for ids in whole_sequences(kit, grammar, prompt):
        key = tuple(map(tuple, ids.reshape(len(ids), -1).tolist()))
        logs = log_probabilities(lm, kit, grammar, prompt, null, sampling, ids)
        expected[key] = float(logs.sum().exp())
    return explore(run), expected


def check(found, expected):
    assert sum(expected.values()) == pytest.approx(1, abs=1e-9)
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)
    for line in expected | found:
        assert found.get(line, 0.0) == pytest.approx(expected.get(line, 0.0), abs=1e-6)


def some(cases, fast):
    """Parameters of which only the `fast` ones are not slow."""
    return [pytest.param(case, marks=() if case in fast else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("guidance", some(GUIDANCE, ["guided"]))
@pytest.mark.parametrize("kept", some(FILTERS, ["top-k"]))
@pytest.mark.parametrize("name", COUNTABLE)
def test_pictures(name, kept, guidance):
    kit = codec(SINGLE if kept == "all" else THREE)
    # A model whose predictions depend much on what came before: errors in the cache would show.
    lm = model(kit, scale=0.7)
    sampling = {"image": SamplingConfig(temperature=2.0, guidance=GUIDANCE[guidance], **FILTERS[kept])}
    check(*distribution(lm, kit, ("image",), sampling, lambda: DRAFTERS[name](lm, kit, 2)))


@pytest.mark.parametrize("name", some(COUNTABLE, ["nested", "jacobi-repeat", "lookup"]))
def test_pictures_of_any_length_and_text(name):
    """Generations end at different places, so that rows of a batch differ in everything."""
    kit = codec(CodeLayout((2,), length=2, flexible=True))
    lm = model(kit, scale=0.5)
    sampling = {"image": SamplingConfig(guidance=1.5), "text": SamplingConfig(guidance=0.5, top_k=2)}
    plan = ("image", "text")
    check(*distribution(lm, kit, plan, sampling, lambda: DRAFTERS[name](lm, kit, 2), text_limit=1))


@pytest.mark.parametrize("name", COUNTABLE)
def test_texts_that_repeat(name):
    """What lookup drafts: the ending "ab" of the prompt stands there twice."""
    kit = codec(SINGLE)
    lm = model(kit, scale=0.5)
    check(
        *distribution(
            lm, kit, ("text",), {"text": SamplingConfig(top_k=2)}, lambda: DRAFTERS[name](lm, kit, 2)
        )
    )


@pytest.mark.parametrize("head", ["factorized", "parallel"])
@pytest.mark.parametrize("pattern", some(["parallel", "delayed"], ["parallel"]))
@pytest.mark.parametrize("name", [name for name in SEVERAL_CODES if name in COUNTABLE])
def test_several_codes_per_position(name, pattern, head):
    if pattern == "delayed" and name not in DELAYED_CODES:
        pytest.skip("drafts whole positions")
    kit = codec(CodeLayout((2, 2), length=2, pattern=pattern))
    lm = model(kit, scale=0.7, head=head)
    sampling = {"image": SamplingConfig(temperature=1.3, guidance=1.5)}
    check(*distribution(lm, kit, ("image",), sampling, lambda: DRAFTERS[name](lm, kit, 2)))


@pytest.mark.parametrize("name", ["plain", "jacobi", "sjd", "model-guided"])
def test_settings_of_each_place_and_column(name):
    kit = codec(CodeLayout((2, 2), length=2))
    lm = model(kit, scale=0.7)
    second = SamplingConfig(temperature=0.8, guidance=2.0, guidance_steps=1)
    sampling = {"image": SamplingConfig(1.3, guidance=3.0, schedule="linear", further=(second,))}
    check(*distribution(lm, kit, ("image",), sampling, lambda: DRAFTERS[name](lm, kit, 2)))
