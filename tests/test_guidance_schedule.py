"""Settings that change over a picture or from column to column."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from decoding_fakes import DRAFTERS, RASTER, codec, log_probabilities, model, prompts

from lexel.document import Grammar
from lexel.errors import LexelError
from lexel.hub import decode_config
from lexel.sample.bundle import BundleInfo
from lexel.sample.decode import generate
from lexel.sample.logits import SamplingConfig, guidance_share
from lexel.sample.policy import Policy
from lexel.tokenizers.layout import CodeLayout

# The published formulas at four codes, worked out by hand.
SHARES = {
    "constant": [1, 1, 1, 1],
    "linear": [0.25, 0.5, 0.75, 1],
    "cosine": [0.3826834, 0.7071068, 0.9238795, 1],
    "log": [0.3573740, 0.6201145, 0.8279889, 1],
    "square": [0.0625, 0.25, 0.5625, 1],
    "square_root": [0, 0.5, 0.7071068, 0.8660254],
}
TWO = CodeLayout((3, 4), grid=(2, 2))
VARIED = SamplingConfig(
    temperature=0.8,
    guidance=4.0,
    schedule="linear",
    further=(SamplingConfig(temperature=1.3, top_k=3, guidance=2.5, guidance_steps=2),),
)


def run(lm, kit, sampling, drafter=None, seed=0):
    grammar, texts = Grammar(kit, ("image",)), ["ab", ""]
    ids, logprobs, _ = generate(
        lm,
        prompts(kit, texts),
        grammar,
        unconditional=prompts(kit, texts, unconditional=True),
        sampling={"image": sampling},
        drafter=drafter,
        generator=torch.Generator().manual_seed(seed),
    )
    return ids, logprobs


@pytest.mark.parametrize("schedule", SHARES)
def test_schedules_are_the_published_ones(schedule):
    found = [guidance_share(schedule, step, 4) for step in range(4)]
    assert found == pytest.approx(SHARES[schedule], abs=1e-7)
    config = SamplingConfig(guidance=5.0, schedule=schedule)
    assert [config.at(step, 4).guidance for step in range(4)] == pytest.approx(
        [1 + 4 * share for share in found]
    )


def test_guidance_ends_after_its_steps():
    """LlamaGen's cfg_interval 0: the prefill's code and that of decode step 0."""
    config = SamplingConfig(guidance=3.0, guidance_steps=2)
    assert [config.at(step, 5).guidance for step in range(5)] == [3, 3, 1, 1, 1]


def test_what_does_not_vary_stays_the_same_object():
    config = SamplingConfig(guidance=3.0, further=(SamplingConfig(top_k=2),))
    assert config.at(1, 4) is config
    assert VARIED.at(0, 4) == replace(
        VARIED, guidance=1.75, schedule="constant", further=(replace(VARIED.further[0], guidance_steps=None),)
    )


@pytest.mark.parametrize("head", ["factorized", "parallel"])
@pytest.mark.parametrize("name", ["plain", "jacobi", "model-guided"])
def test_every_code_is_drawn_with_the_settings_of_its_place_and_column(name, head):
    kit = codec(TWO)
    lm, grammar = model(kit, head=head), Grammar(codec(TWO), ("image",))
    ids, logprobs = run(lm, kit, VARIED, DRAFTERS[name](lm, kit, 2))
    nulls = prompts(kit, ["ab", ""], unconditional=True)
    for prompt, null, row, scores in zip(prompts(kit, ["ab", ""]), nulls, ids, logprobs):
        expected = log_probabilities(lm, kit, grammar, prompt, null, {"image": VARIED}, row)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
        constant = {"image": replace(VARIED, schedule="constant", further=())}
        other = log_probabilities(lm, kit, grammar, prompt, null, constant, row)
        assert not torch.allclose(scores.double(), other, atol=1e-2)


@pytest.mark.parametrize("name", ["jacobi", "model", "sjd-repeat"])
def test_drafters_keep_greedy_sequences(name):
    kit = codec(TWO)
    lm = model(kit, seed=4)
    greedy = VARIED.with_every(temperature=0.0)
    plain, _ = run(lm, kit, greedy)
    drafted, _ = run(lm, kit, greedy, DRAFTERS[name](lm, kit, 3))
    assert all(torch.equal(a, b) for a, b in zip(plain, drafted))


def test_a_policy_needs_unconditional_rows_where_any_column_is_guided():
    grammar = Grammar(codec(TWO), ("image",))

    def guided(config):
        return Policy(grammar, {"image": config}).guided

    assert not guided(SamplingConfig(schedule="linear", further=(SamplingConfig(),)))
    assert guided(SamplingConfig(further=(SamplingConfig(guidance=2.0),)))
    assert guided(SamplingConfig(guidance=2.0, guidance_steps=1))


def test_texts_and_special_tokens_are_guided_evenly():
    kit = codec(RASTER)
    config = SamplingConfig(guidance=3.0, schedule="linear")
    policy = Policy(Grammar(kit, ("text", "image"), text_limit=2), {"text": config, "image": config})
    state, found = policy.grammar.start(prompts(kit, ["a"])[0]), []
    for token in [0, 0, kit.vocabulary.special["boi"], *kit.vocabulary.block("image")[:6].tolist()]:
        found.append(policy.place(state).config.guidance)
        state = policy.advance(state, token)
    assert found[:3] == [3, 3, 3]
    assert found[3:] == pytest.approx([1 + 2 * (i + 1) / 6 for i in range(6)])


@pytest.mark.parametrize("sizes", [(3,), (3, 4, 5)])
def test_settings_of_other_columns_than_the_models_are_refused(sizes):
    kit = codec(CodeLayout(sizes, grid=(1, 2)))
    with pytest.raises(LexelError, match=rf"{len(sizes)} code\(s\) per position, .* given for 2"):
        run(model(kit), kit, VARIED)


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "cubic"},
        {"guidance_steps": 0},
        {"further": (SamplingConfig(further=(SamplingConfig(),)),)},
        {"further": (2.0,)},
        {"temperature": "hot"},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingConfig(**wrong)


def test_an_override_reaches_every_column():
    changed = VARIED.with_every(temperature=0.0)
    assert (changed.temperature, changed.further[0].temperature) == (0, 0)
    assert (changed.schedule, changed.further[0].top_k) == ("linear", 3)


def test_settings_travel_as_json(tmp_path):
    info = BundleInfo("0" * 16, (3, 4), ("lm",), {"image": TWO}, {"image": VARIED})
    info.write(tmp_path)
    assert BundleInfo.read(tmp_path) == info
    path = tmp_path / "bundle.json"
    values = json.loads(path.read_text())
    values["sampling"]["image"] = {"temperature": 0.5, "guidance": 2.0}  # as older versions wrote it
    path.write_text(json.dumps(values))
    assert BundleInfo.read(tmp_path).sampling["image"] == SamplingConfig(temperature=0.5, guidance=2.0)


def test_settings_are_read_from_plain_values():
    given = {"guidance": 4.0, "schedule": "linear", "further": [{"top_k": 3}]}
    found = decode_config(SamplingConfig, given)
    assert found == SamplingConfig(guidance=4.0, schedule="linear", further=(SamplingConfig(top_k=3),))
    assert decode_config(SamplingConfig, asdict(VARIED)) == VARIED
    given["further"] = [{"topk": 3}]
    with pytest.raises(LexelError, match="topk"):
        decode_config(SamplingConfig, given)
