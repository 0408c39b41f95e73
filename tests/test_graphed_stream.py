"""Passes of fixed widths, as CUDA graphs need them, are the same passes; run here without a graph."""

import pytest
import torch
from decoding_fakes import RASTER, codec, model, prompts

from lexel.document import Grammar
from lexel.sample.drafters import JacobiDrafter, NestedDrafter
from lexel.sample.generator import Generator, Request
from lexel.sample.logits import SamplingConfig
from lexel.sample.policy import Policy
from lexel.sample.stream import Stream
from lexel.tokenizers.layout import CodeLayout

TEXTS = ["a", "ab ba", "", "b a b a b"]


def generated(lm, kit, drafter, graphed, monkeypatch):
    monkeypatch.setattr(Stream, "__init__", _with(graphed))
    sampling = {"image": SamplingConfig(temperature=0.7, guidance=1.5)}
    policy = Policy(Grammar(kit, ("image",)), sampling)
    queue = Generator(lm, drafter=drafter, rows=3)
    nulls = prompts(kit, TEXTS, unconditional=True)
    tickets = [
        queue.submit(Request(prompt, null, policy, seed))
        for seed, (prompt, null) in enumerate(zip(prompts(kit, TEXTS), nulls))
    ]
    queue.wait(tickets)
    return [ticket.row.ids for ticket in tickets], queue.session.stream


def _with(graphed, original=Stream.__init__):
    return lambda self, lm, layers=(): original(self, lm, layers, graphed)


@pytest.mark.parametrize("layout", [RASTER, CodeLayout((3, 4), grid=(2, 2))], ids=["single", "columns"])
@pytest.mark.parametrize("name", ["plain", "nested", "jacobi"])
def test_fixed_widths_change_nothing(name, layout, monkeypatch):
    """Rows of different lengths that come and go, guided, in float64."""
    kit = codec(layout)
    lm = model(kit, dtype=torch.float64)
    make = {
        "plain": lambda: None,
        "nested": lambda: NestedDrafter(lm, 0.25, window=3),
        "jacobi": lambda: JacobiDrafter(window=3),
    }[name]
    expected, _ = generated(lm, kit, make(), False, monkeypatch)
    found, stream = generated(lm, kit, make(), True, monkeypatch)
    assert found == expected
    assert stream._steps  # the fixed widths were really used


def test_a_pass_that_cannot_be_captured_is_run_as_it_is(monkeypatch, caplog):
    def refuse(self, *_):
        raise RuntimeError("operation not permitted when stream is capturing")

    kit = codec(RASTER)
    lm = model(kit, dtype=torch.float64)
    expected, _ = generated(lm, kit, None, False, monkeypatch)
    monkeypatch.setattr("lexel.models.graphs.GraphedStep.__call__", refuse)
    found, stream = generated(lm, kit, None, True, monkeypatch)
    assert found == expected
    assert not stream.graphed
    assert "without CUDA graphs: operation not permitted" in caplog.text
