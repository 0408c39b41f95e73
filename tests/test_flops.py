"""The arithmetic of a training step, counted and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lexel.data.packing import pack
from lexel.document import TokenSequence
from lexel.models.causal_lm import CausalLMConfig
from lexel.train import flops
from lexel.train.flops import attended, matrix_rate, tokens, training_flops
from lexel.train.objectives.lm import NextTokenObjective, predicting


def sequence(length: int, seed: int) -> TokenSequence:
    ids = torch.randint(1, 40, (length,), generator=torch.Generator().manual_seed(seed))
    positions = torch.zeros(length, 3, dtype=torch.long)
    positions[:, 0] = torch.arange(length)
    return TokenSequence(ids, torch.zeros(length, dtype=torch.long), positions, torch.arange(length) > 4)


def test_padding_is_neither_a_token_nor_arithmetic():
    batch = pack([sequence(7, 0), sequence(5, 1)], length=16, pad=0)
    assert int(tokens(batch, 0)) == 12
    assert float(attended(batch, 0)) == 7 * 8 / 2 + 5 * 6 / 2


def test_the_matrices_agree_with_torchs_counter():
    """Of a full causal batch without padding torch counts the same for every matrix; its attention counts
    all pairs, not the causal half, so both sides leave attention out."""
    torch.manual_seed(0)
    lm = CausalLMConfig(40, dim=32, layers=2, heads=2, ffn_dim=64).build()
    batch = pack([sequence(16, 0), sequence(16, 1)], length=16, pad=0)
    objective = NextTokenObjective(("text",))
    with FlopCounterMode(display=False) as counter:
        objective(lm(batch, select=predicting(batch)), batch)[0].backward()
    counted = sum(
        count
        for op, count in counter.get_flop_counts()["Global"].items()
        if "mm" in str(op) and "attention" not in str(op)
    )
    ours = float(training_flops(lm, batch)) - 12 * 2 * 32 * float(attended(batch, 0))
    # The first block's queries, keys and values need no gradient of their input only if the input is a leaf,
    # and the embedding is one: nothing is saved there.
    assert counted == pytest.approx(ours, rel=1e-6)


def test_the_machines_best_rate_is_remembered(monkeypatch: pytest.MonkeyPatch):
    rates = []
    for measured in (2e12, 1e12, 3e12):  # slowed down by other work the second time
        monkeypatch.setattr(flops, "_measure", lambda device, dtype, rate=measured: rate)
        matrix_rate.cache_clear()
        rates.append(matrix_rate("cpu", torch.float32))
    matrix_rate.cache_clear()
    assert rates == [2e12, 2e12, 3e12]


def test_the_rate_is_measured():
    assert flops._measure("cpu", torch.float32) > 1e8
