"""LeCam's term, the non-saturating game and learning rates that drop: what SEED-Voken's recipes need."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lexel.models.discriminator import PatchDiscriminatorConfig
from lexel.train.objectives.lecam import LeCam
from lexel.train.objectives.tokenizer import TokenizerObjectiveConfig, generator_game
from lexel.train.schedule import drops
from lexel.types import Codes, QuantizerOutput, TokenizerOutput


def test_lecam_by_hand() -> None:
    lecam = LeCam(decay=0.9)
    real, fake = torch.tensor([[2.0], [4.0]]), torch.tensor([[-1.0], [-3.0]])
    first = lecam(real, fake)
    # Averages after the step: 0.1 * 3 and 0.1 * -2.
    assert float(first) == pytest.approx((2.2**2 + 4.2**2) / 2 + (1.3**2 + 3.3**2) / 2)
    lecam(real, fake)
    assert float(lecam.real) == pytest.approx(0.9 * 0.3 + 0.3)
    assert float(lecam.fake) == pytest.approx(-0.9 * 0.2 - 0.2)
    again = LeCam(decay=0.9)
    again.load_state_dict(lecam.state_dict())
    assert float(again(real, fake)) == float(lecam(real, fake))


def test_lecam_leaves_verdicts_within_the_averages_alone() -> None:
    lecam = LeCam(decay=0.0)
    logits = torch.zeros(3, 1, requires_grad=True)
    term = lecam(logits, logits)
    term.backward()
    assert term.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_its_gradient_is_that_of_the_averages_it_saw() -> None:
    # Two micro-batches before one backward pass: the averages must not change under the graph.
    lecam, real = LeCam(), torch.ones(2, requires_grad=True)
    (lecam(real, -torch.ones(2)) + lecam(real, torch.ones(2))).backward()
    assert real.grad is not None


def test_the_objective_adds_it_to_the_discriminator_only() -> None:
    torch.manual_seed(0)
    small = PatchDiscriminatorConfig(channels=4, layers=2)
    fake, pixels = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    codes = torch.zeros(2, 4, 1, dtype=torch.long)
    quantized = QuantizerOutput(torch.zeros(2, 4, 6), codes)
    output = TokenizerOutput(fake, Codes(codes, (2, 2)), quantized, torch.zeros(2, 4, 6))
    built = TokenizerObjectiveConfig(adversarial=0.1, lecam=0.5, discriminator=small).build()
    built.eval()  # batch norm: the same verdicts in every call
    loss, metrics = built.discriminator_loss(output, pixels, 0)
    assert float(loss.detach()) == pytest.approx(float(metrics["discriminator"] + 0.5 * metrics["lecam"]))
    assert metrics["lecam"] > 0
    assert "lecam" not in built.generator_loss(output, pixels, 0, torch.zeros(1))[1]
    assert TokenizerObjectiveConfig(lecam=0.5).build().lecam is None


def test_the_two_games() -> None:
    logits = torch.tensor([[[[1.0, -3.0]]], [[[0.0, 4.0]]]])
    assert float(generator_game(logits, False)) == pytest.approx(-0.5)
    expected = (torch.tensor([1.0, -2.0]).exp() + 1).log().mean()  # of means -1 and 2
    assert float(generator_game(logits, True)) == pytest.approx(float(expected))


def test_learning_rates_drop_at_their_steps() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = drops(optimizer, warmup=3, at=[6, 8], factor=0.1)
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
