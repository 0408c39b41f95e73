"""Plain decoding: against an uncached model, row by row, for every layout."""

import itertools

import pytest
import torch
from decoding_fakes import RASTER, codec, model, prompts, uncached

from lexel.document import Grammar, Image, Text
from lexel.errors import LexelError
from lexel.sample.decode import generate
from lexel.sample.drafters import JacobiDrafter
from lexel.sample.logits import SamplingConfig
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes

GUIDED = {"image": SamplingConfig(temperature=0.8, guidance=2.5), "text": SamplingConfig(guidance=1.5)}
GREEDY = {name: SamplingConfig(temperature=0, guidance=config.guidance) for name, config in GUIDED.items()}
TEXTS = ["a", "ab ba", "", "b a b a b"]
LAYOUTS = {
    "raster": (RASTER, {}),
    "rows": (CodeLayout((5,), grid=(2, 2), row_end=True), {"roles": ("eol", "eof"), "null": "prefix"}),
    "flexible": (CodeLayout((5,), length=5, flexible=True), {}),
    "interleaved": (CodeLayout((3, 4), grid=(2, 2), pattern="interleaved"), {}),
    "scales": (CodeLayout((4,), scales=((1, 1), (2, 2))), {"null": "padding"}),
    "parallel": (CodeLayout((3, 4, 5), grid=(2, 2)), {}),
    "delayed": (CodeLayout((3, 4), grid=(2, 2), pattern="delayed"), {}),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(lm, kit, texts, plan=("image",), sampling=GUIDED, **options):
    grammar = Grammar(kit, plan, text_limit=4)
    asked = prompts(kit, texts)
    null = prompts(kit, texts, unconditional=True)
    return generate(lm, asked, grammar, unconditional=null, sampling=sampling, **options)


@pytest.mark.parametrize("name", LAYOUTS)
def test_whatever_is_sampled_parses_and_decodes(name):
    layout, options = LAYOUTS[name]
    kit = codec(layout, **options)
    ids, logprobs, stats = run(model(kit), kit, TEXTS, ("image", "text", "image"), generator=seeded())
    opening = prompts(kit, [""])[0].ids[-len(kit.scripts["image"][0]) :]
    for row, scores in zip(ids, logprobs):
        first, *_, last = kit.parse(torch.cat([opening, row]))
        assert isinstance(first, Image)
        assert isinstance(last, Image)
        assert len(scores) == len(row)
        assert bool(scores.isfinite().all() and (scores <= 1e-9).all())
    assert stats.mean_accepted == 1
    assert stats.target_forwards == max(len(row) for row in ids)
    assert len(stats.accept_lengths) == sum(len(row) for row in ids)


@pytest.mark.parametrize("name", ["raster", "flexible", "rows"])
def test_logprobs_are_those_of_an_uncached_model(name):
    layout, options = LAYOUTS[name]
    kit, plan = codec(layout, **options), ("image", "text")
    lm, grammar = (
        model(kit, rope_axes=(0.5, 0.25, 0.25)),
        Grammar(codec(layout, **options), plan, text_limit=4),
    )
    ids, logprobs, _ = run(lm, kit, TEXTS, plan, generator=seeded(1))
    pairs = zip(prompts(kit, TEXTS), prompts(kit, TEXTS, unconditional=True), ids, logprobs)
    for prompt, null, row, scores in pairs:
        probs = uncached(lm, kit, grammar, prompt, null, GUIDED, row)
        expected = probs.gather(1, row[:, None])[:, 0].log()
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["raster", "flexible", "parallel", "delayed"])
def test_a_row_of_a_batch_is_that_row_alone(name):
    kit = codec(LAYOUTS[name][0])
    lm = model(kit, seed=3)
    together, _, _ = run(lm, kit, TEXTS, ("image", "text"), GREEDY)
    for text, row in zip(TEXTS, together):
        alone, _, _ = run(lm, kit, [text], ("image", "text"), GREEDY)
        assert torch.equal(alone[0], row)


@pytest.mark.parametrize("pattern", ["parallel", "delayed"])
def test_further_columns_have_the_heads_own_distribution(pattern):
    """Teacher forcing the finished sequence gives each further column's log-probability again."""
    kit = codec(CodeLayout((3, 4), grid=(2, 2), pattern=pattern))
    lm, sampling = model(kit), {"image": SamplingConfig()}
    ids, logprobs, _ = run(lm, kit, ["ab"], sampling=sampling, generator=seeded(2))
    prompt, grammar = prompts(kit, ["ab"])[0], Grammar(kit, ("image",))
    expected = uncached(lm, kit, grammar, prompt, None, sampling, ids[0]).gather(1, ids[0][:, :1])[:, 0].log()
    whole = kit.build([Text("ab"), Image(layout_codes(kit, ids[0]))])
    batch = kit.collate([whole])
    output = lm(batch)
    start, block = len(prompt), kit.vocabulary.block("image", 1)
    for step, row in enumerate(ids[0].tolist()):
        if row[1] != kit.vocabulary.special["pad"]:
            column = output.code_logits[0][0, start + step - 1].log_softmax(0)
            expected[step] += column[block.tolist().index(row[1])]
    torch.testing.assert_close(logprobs[0].double(), expected, rtol=1e-5, atol=1e-5)


def layout_codes(kit, ids):
    layout = kit.layouts["image"]
    return layout.unflatten(kit.vocabulary.to_codes(ids[None], layout))


def test_sampled_sequences_have_their_exact_probabilities():
    """All 27 pictures of three codes: chi-square of 4000 guided draws against the enumerated distribution.
    26 degrees of freedom, threshold at error rate 1e-3."""
    kit = codec(CodeLayout((3,), length=3))
    lm, grammar = model(kit), Grammar(kit, ("image",))
    asked, null = prompts(kit, ["ab"])[0], prompts(kit, ["ab"], unconditional=True)[0]
    count = 4000
    ids, _, _ = generate(
        lm, [asked] * count, grammar, unconditional=[null] * count, sampling=GUIDED, generator=seeded(5)
    )
    block = kit.vocabulary.block("image")
    found = torch.zeros(27)
    for row in torch.stack(ids) - block[0]:
        found[int(row @ torch.tensor([9, 3, 1]))] += 1
    expected = []
    for codes in itertools.product(range(3), repeat=3):
        row = block[list(codes)]
        probs = uncached(lm, kit, grammar, asked, null, GUIDED, row)
        expected.append(float(probs.gather(1, row[:, None]).prod()))
    share = torch.tensor(expected)
    assert float(share.sum()) == pytest.approx(1)
    assert float(((found - count * share) ** 2 / (count * share)).sum()) < 54.05


def test_the_seed_decides_everything():
    kit = codec(RASTER)
    lm = model(kit)
    one, two, other = (run(lm, kit, TEXTS, generator=seeded(s))[0] for s in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert any(not torch.equal(a, b) for a, b in zip(one, other))


def test_tokens_are_streamed_in_order():
    kit = codec(LAYOUTS["flexible"][0])
    streamed = {row: [] for row in range(len(TEXTS))}
    ids, _, _ = run(
        model(kit), kit, TEXTS, ("image", "text"), on_token=lambda row, new: streamed[row].append(new)
    )
    assert all(torch.equal(torch.cat(streamed[row]), ids[row]) for row in streamed)


def never_again(ids, scores):
    """A logits processor in transformers' signature that forbids every id already there."""
    return scores.scatter(1, ids, -torch.inf)


@pytest.mark.parametrize("drafter", [None, JacobiDrafter(window=4)], ids=["plain", "jacobi"])
def test_processors_see_what_came_before(drafter):
    kit = codec(RASTER)
    ids, _, _ = run(model(kit), kit, TEXTS, processors=[never_again], drafter=drafter, generator=seeded())
    assert all(sorted(row.tolist()) == kit.vocabulary.block("image").tolist() for row in ids)


def test_pictures_condition_texts():
    kit = codec(RASTER)
    picture = Image(Codes(torch.arange(6)[None, :, None], (2, 3)))
    asked = [kit.prompt([picture, Text.blank()])]
    ids, _, _ = generate(model(kit), asked, Grammar(kit, ("text",), text_limit=5), generator=seeded(1))
    assert len(ids[0]) <= 6
    assert int(ids[0][-1]) == kit.vocabulary.special["eos"]


def test_a_prompt_beyond_the_context_is_refused():
    kit = codec(RASTER)
    with pytest.raises(LexelError, match="context of 12"):
        run(model(kit, max_length=12), kit, ["ab ab"])


def test_guidance_without_prompts_is_refused():
    kit = codec(RASTER)
    with pytest.raises(LexelError, match="one unconditional prompt for each of 1"):
        generate(model(kit), prompts(kit, ["a"]), Grammar(kit, ("image",)), sampling=GUIDED)


def test_guidance_of_a_modality_outside_the_plan_needs_no_prompts():
    kit = codec(RASTER)
    asked = [kit.prompt([Text.blank()])]
    only_image = {"image": SamplingConfig(guidance=3.0)}
    ids, _, _ = generate(model(kit), asked, Grammar(kit, ("text",), text_limit=3), sampling=only_image)
    assert len(ids) == 1


def test_damaged_weights_are_named():
    kit = codec(RASTER)
    lm = model(kit)
    with torch.no_grad():
        lm.model.norm.weight.fill_(torch.nan)
    for sampling in (GUIDED, GREEDY):
        with pytest.raises(LexelError, match="not finite"):
            run(lm, kit, ["a"], sampling=sampling)


def test_an_unknown_modality_is_refused():
    kit = codec(RASTER)
    with pytest.raises(LexelError, match="no modality sound"):
        run(model(kit), kit, ["a"], sampling={"sound": SamplingConfig()})
