"""The race behind decoding="auto", with a clock of its own: costs are set, so that winners are certain."""

import pytest
import torch
from decoding_fakes import RASTER, codec, model, prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from lexel.document import Grammar, Image, Text
from lexel.sample import tuning
from lexel.sample.bundle import DecodingConfig
from lexel.sample.drafters import JacobiDrafter, ModelDrafter
from lexel.sample.generator import Generator, Request
from lexel.sample.logits import SamplingConfig
from lexel.sample.pipeline import Pipeline
from lexel.sample.policy import Policy
from lexel.sample.strategies import Strategy

KIT = codec(RASTER)
LM = model(KIT)


class Clock:
    """Seconds pass only in rounds: so many in each round of a kind of drafter."""

    def __init__(self, costs):
        self.costs, self.now = costs, 0.0

    def perf_counter(self):
        return self.now

    process_time = perf_counter

    def step(self, queue, original=Generator.step):
        self.now += self.costs[type(queue.drafter).__name__]
        return original(queue)


def requests(count=2):
    policy = Policy(Grammar(KIT, ("image",)), {"image": SamplingConfig(temperature=0.5)})
    return [Request(prompt, None, policy, seed) for seed, prompt in enumerate(prompts(KIT, ["a"] * count))]


def race(costs):
    """A drafter that is always right (4 tokens a round), and a Jacobi window."""
    known = {
        "twin": Strategy(lambda lm, window: ModelDrafter(LM, window), 3, ""),
        "jacobi": Strategy(lambda lm, window: JacobiDrafter(window), 4, ""),
    }
    clock = Clock(costs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "time", clock)
        patch.setattr(Generator, "step", lambda queue: clock.step(queue))
        return tuning.race(LM, requests(), known, lambda n, w: known[n].make(LM, w or known[n].window))


def test_the_cheapest_tokens_win():
    chosen = race({"NoneType": 1.0, "ModelDrafter": 2.0, "JacobiDrafter": 9.0})
    assert chosen.strategy == "twin"
    assert chosen.ratio > 1.4  # 3 tokens a round on average (4 and 2), at twice the cost
    assert race({"NoneType": 1.0, "ModelDrafter": 9.0, "JacobiDrafter": 9.0}) == tuning.Chosen()


@settings(deadline=None, max_examples=15)
@given(st.floats(0.3, 6.0), st.floats(0.3, 6.0))
def test_auto_never_loses_to_plain_decoding(model_cost, jacobi_cost):
    chosen = race({"NoneType": 1.0, "ModelDrafter": model_cost, "JacobiDrafter": jacobi_cost})
    assert chosen.strategy == "plain" or chosen.ratio >= tuning.MARGIN
    if model_cost < 2.5:  # 3 tokens for less than 2.5 passes
        assert chosen.strategy != "plain"


def test_the_choice_is_remembered(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path))
    races = []

    def counted(lm, asked, known, make):
        races.append(len(asked))
        return tuning.Chosen("jacobi", 3, 1.5)

    monkeypatch.setattr("lexel.sample.engine.race", counted)
    parts = tiny_pipeline.tokenizer, tiny_pipeline.lm, tiny_pipeline.codec
    draw = [Text("a red circle"), Image.blank()]
    first, again = (Pipeline(*parts, decoding=DecodingConfig()) for _ in range(2))
    chosen = first(draw, seed=0)
    assert chosen.stats.mean_accepted > 1
    assert first(draw, seed=0).ids[0].equal(chosen.ids[0])
    assert again(draw, seed=0).ids[0].equal(chosen.ids[0])  # another process would read the same record
    assert races == [1]
    again(draw, seed=0, count=3)  # three side by side are another race
    assert races == [1, 3]
    (tmp_path / "decoding.json").write_text(
        (tmp_path / "decoding.json").read_text().replace("jacobi", "gone")
    )
    assert Pipeline(*parts, decoding=DecodingConfig())(draw, seed=0).stats.mean_accepted > 1
    assert races == [1, 3, 1]


def test_a_real_race_ends_with_one_of_the_strategies(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path))
    parts = tiny_pipeline.tokenizer, tiny_pipeline.lm, tiny_pipeline.codec
    pipe = Pipeline(*parts, decoding=DecodingConfig())
    with torch.no_grad():
        output = pipe([Text("a red circle"), Image.blank()], seed=0)
    assert output.documents[0][-1].pixels.shape == (3, 32, 32)
    record = (tmp_path / "decoding.json").read_text()
    assert any(f'"strategy": "{name}"' in record for name in pipe.strategies)
