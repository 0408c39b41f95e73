"""Every exact strategy on a trained model, the shipped one: chi-square of the first two codes of many
pictures against their computed distribution. `test_exactness` has whole sequences of tiny random models."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from test_speculative import chi_square
from torch import Tensor

from lexel.document import Grammar, Image, Text
from lexel.sample.generator import Generator, Request
from lexel.sample.logits import SamplingConfig, target_distribution
from lexel.sample.pipeline import Pipeline
from lexel.sample.policy import Policy
from lexel.types import TokenBatch

COUNT = 800
SAMPLING = SamplingConfig(temperature=1.3, top_p=0.98, guidance=1.5)
STRATEGIES = (
    "plain", "jacobi", "jacobi-repeat", "jacobi-gumbel", "sjd", "pac", "nested", "drafter", "eagle",
    "eagle-tree", "eagle-static", "neighbours", "jacobi-neighbours", "pac-neighbours",
)  # fmt: skip


@cache
def shipped() -> Pipeline:
    return Pipeline.from_pretrained()


@cache
@torch.no_grad()
def expected() -> dict[tuple[int, int], float]:
    """Probability of each pair of first codes, by teacher forcing."""
    codec, (prompt, null) = shipped().codec, pair()
    block = codec.vocabulary.block("image").sort().values

    def following(codes: Tensor) -> Tensor:
        """Float ``[n, v]``: of what follows each of n lines of codes ``[n, l]``."""
        both = [logits(start, codes) for start in (prompt, null)]
        return target_distribution(*both, SAMPLING, block, size=codec.vocabulary.size).dense()

    def logits(start, codes: Tensor) -> Tensor:
        ids = torch.cat([start.ids.expand(len(codes), -1), codes], 1)
        slots = codec.scripts["image"][1][: codes.shape[1]]
        places = torch.tensor([(len(start) + i, s.row, s.column) for i, s in enumerate(slots)]).reshape(-1, 3)
        positions = torch.cat([start.positions, places]).expand(len(codes), -1, -1)
        kinds = torch.cat([start.modality, torch.full((codes.shape[1],), 1)]).expand(len(codes), -1)
        return shipped().lm(TokenBatch(ids, kinds, positions)).logits[:, -1, block]

    first = following(torch.zeros(1, 0, dtype=torch.long))[0]
    starts = first.nonzero()[:, 0]
    second = following(starts[:, None])
    table = first[starts, None].double() * second.double()
    return {
        (a, b): float(table[row, b])
        for row, a in enumerate(starts.tolist())
        for b in second[row].nonzero()[:, 0].tolist()
    }


def pair():
    document = [Text("a red circle left of a blue square"), Image.blank()]
    return shipped().codec.prompt(document), shipped().codec.unconditional(document)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_trained_model_keeps_its_distribution(name: str) -> None:
    """Error rate 1e-3 per strategy, by the Wilson-Hilferty quantile."""
    pipe, (prompt, null) = shipped(), pair()
    assert name in pipe.strategies
    engine = pipe.engine
    policy = Policy(Grammar(pipe.codec, ("image",)), {"image": SAMPLING})
    queue = Generator(engine.lm, drafter=engine.drafter(name), rows=COUNT)
    tickets = [queue.submit(Request(prompt, null, policy, seed)) for seed in range(COUNT)]
    while min(len(ticket.row.ids) for ticket in tickets) < 2:
        queue.step()
    queue.cancel(tickets)
    found = Counter((ticket.row.ids[0][0], ticket.row.ids[1][0]) for ticket in tickets)
    share = torch.tensor(list(expected().values()))
    numbers = torch.tensor([found.pop(key, 0) for key in expected()])
    assert not found
    statistic, freedom = chi_square(numbers, share, COUNT)
    assert freedom >= 10
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 3.0902 * spread**0.5) ** 3
