"""Heads for the tokens after the next one: what they are trained on, and what stays as it is without them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.data.packing import pack
from lexel.document import TokenSequence
from lexel.errors import LexelError
from lexel.hub import load_weights
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.train.lm_module import LMModule
from lexel.train.objectives.lm import NextTokenObjective, predicting, predicting_further
from lexel.train.settings import LMStage
from lexel.train.stages import fresh_network
from lexel.types import LMOutput, TokenBatch

VOCAB = 20


def network(heads: int = 3, **changes: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLMConfig(VOCAB, dim=32, layers=2, heads=2, future_heads=heads, **changes).build()


def shaken(model: CausalLM) -> CausalLM:
    """With heads that do something."""
    for head in model.future.heads if model.future is not None else ():
        torch.nn.init.normal_(head.weight, std=0.3)
        torch.nn.init.normal_(head.bias)
    return model


def sequence(length: int, *, prompt: int = 1, image: int = 0) -> TokenSequence:
    """Random ids; the first `prompt` are no targets, the last `image` are picture codes."""
    modality = (torch.arange(length) >= length - image).long()
    positions = F.pad(torch.arange(length)[:, None], (0, 2))
    return TokenSequence(
        torch.randint(1, VOCAB, (length,)), modality, positions, torch.arange(length) >= prompt
    )


def batch(rows: int = 4, length: int = 12) -> TokenBatch:
    torch.manual_seed(1)
    return pack([sequence(length, prompt=3, image=6) for _ in range(rows)], length, 0)


# The model


def test_a_model_without_heads_is_what_it_was() -> None:
    plain, headed = network(0), network(3)
    assert plain.future is None
    state = headed.state_dict()
    assert {key for key in state if key.startswith("future.")} == state.keys() - plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, state[key])
    one, two = plain(batch()), headed(batch(), future=True)
    assert torch.equal(one.logits, two.logits)
    assert one.future_logits == headed(batch()).future_logits == ()


def test_fresh_heads_repeat_the_next_token_and_trained_ones_are_medusas() -> None:
    model = network(3)
    output = model(batch(), future=True)
    assert len(output.future_logits) == 3
    for logits in output.future_logits:
        assert torch.equal(logits, output.logits)
    shaken(model)
    output = model(batch(), future=True)
    for logits, head in zip(output.future_logits, model.future.heads, strict=True):
        hidden = output.hidden
        expected = hidden + F.silu(hidden @ head.weight.T + head.bias)
        torch.testing.assert_close(logits, expected @ model.model.embed_tokens.weight.T)


def test_only_selected_positions_are_computed() -> None:
    model, documents = shaken(network()), batch()
    select = predicting(documents)
    whole, picked = model(documents, future=True), model(documents, select=select, future=True)
    for full, part in zip(whole.future_logits, picked.future_logits, strict=True):
        assert part.shape == (int(select.sum()), VOCAB)
        torch.testing.assert_close(full[select], part)


@pytest.mark.parametrize("head", ["parallel", "factorized"])
def test_of_several_codes_every_column_is_predicted_and_trained(head: str) -> None:
    """The further columns of a token two places on are those of the next one, of the future head's state."""
    offsets, sizes = (8, 12), (4, 4)
    model = shaken(network(2, head=head, codebook_sizes=sizes, code_offsets=offsets))
    documents = batch()
    images = documents.modality == 1
    first = torch.where(images, documents.ids % 4 + 8, documents.ids % 8)
    second = torch.where(images, documents.ids % 3 + 12, torch.zeros_like(first))
    several = replace(documents, ids=torch.stack([first, second], -1))
    select = predicting(several)
    whole, picked = model(several, future=True), model(several, select=select, future=True)
    for i, (state, columns) in enumerate(
        zip(model.future(whole.hidden), whole.future_code_logits, strict=True)
    ):
        ids = several.ids.roll(-2 - i, 1)
        torch.testing.assert_close(
            columns[0][:, : -2 - i], model.code_logits(state, ids)[0][:, : -2 - i], rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(columns[0][select], picked.future_code_logits[i][0])
    objective = NextTokenObjective(future_weight=1.0, future_decay=1.0)
    loss, metrics = objective(whole, several, code_offsets=offsets)
    alone, _ = objective(
        replace(whole, future_logits=(), future_code_logits=()), several, code_offsets=offsets
    )
    added = torch.zeros(())
    for i in range(2):
        known = predicting_further(several, 2 + i)
        target = several.ids.roll(-2 - i, 1)[known]
        codes = target[:, 1] != 0
        losses = [
            F.cross_entropy(whole.future_logits[i][known], target[:, 0], reduction="none"),
            F.cross_entropy(
                whole.future_code_logits[i][0][known][codes], target[codes, 1] - 12, reduction="none"
            ),
        ]
        added = added + torch.cat(losses).mean()
    torch.testing.assert_close(loss - alone, added)
    assert "future2_accuracy_image" in metrics
    loss.backward()
    assert all(float(head.weight.grad.abs().sum()) > 0 for head in model.future.heads)


def test_a_negative_number_of_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="not be negative"):
        CausalLMConfig(VOCAB, future_heads=-1)


# The objective


def targets_by_hand(documents: list[list[bool]], distance: int) -> list[bool]:
    """Of documents packed one after the other: whether each position has a next target and one at
    `distance`, in its document."""
    found = []
    for wanted in documents:
        for place in range(len(wanted)):
            near = place + 1 < len(wanted) and wanted[place + 1]
            found.append(near and place + distance < len(wanted) and wanted[place + distance])
    return found


@pytest.mark.parametrize("distance", [2, 3, 5, 11, 12, 40])
def test_targets_lie_in_the_same_document_and_under_the_mask(distance: int) -> None:
    torch.manual_seed(0)
    sequences = [sequence(5), sequence(4, prompt=3), sequence(2)]
    packed = pack(sequences, 12, 0)
    assert len(packed.ids) == 1  # all three in one row, longest first, then one padding token
    wanted = [[False, *s.loss_mask[1:].tolist()] for s in sequences] + [[False]]
    assert predicting_further(packed, distance)[0].tolist() == targets_by_hand(wanted, distance)


def test_targets_without_masks_are_all_later_tokens() -> None:
    ids = torch.ones(2, 6, dtype=torch.long)
    plain = TokenBatch(ids, torch.zeros_like(ids), torch.zeros(2, 6, 3, dtype=torch.long))
    assert predicting_further(plain, 2).tolist() == [[True] * 4 + [False] * 2] * 2


def test_the_heads_losses_by_hand() -> None:
    torch.manual_seed(0)
    documents = pack([sequence(7, prompt=2, image=3), sequence(5, image=2), sequence(6)], 12, 0)
    logits = [torch.randn(*documents.ids.shape, VOCAB) for _ in range(3)]
    weights = {"text": 0.5, "image": 2.0}
    objective = NextTokenObjective(weights=weights, future_weight=0.3, future_decay=0.7)
    base, _ = objective(LMOutput(logits[0], logits[0]), documents)
    loss, metrics = objective(LMOutput(logits[0], logits[0], (), tuple(logits[1:])), documents)
    expected = base
    for head in (1, 2):
        total, weight, hits = torch.zeros(()), 0.0, {0: [], 1: []}
        for row, place in predicting_further(documents, 1 + head).nonzero().tolist():
            target = int(documents.ids[row, place + 1 + head])
            kind = int(documents.modality[row, place + 1 + head])
            share = weights[("text", "image")[kind]]
            total = total - share * logits[head][row, place].log_softmax(-1)[target]
            weight += share
            hits[kind].append(float(logits[head][row, place].argmax() == target))
        expected = expected + 0.3 * 0.7**head * total / weight
        for kind, name in enumerate(("text", "image")):
            assert float(metrics[f"future{head}_accuracy_{name}"]) == pytest.approx(
                sum(hits[kind]) / len(hits[kind])
            )
    torch.testing.assert_close(loss, expected)
    select = predicting(documents)
    picked = LMOutput(logits[0][select], logits[0], (), tuple(x[select] for x in logits[1:]))
    assert torch.equal(objective(picked, documents)[0], loss)


def test_no_weight_is_the_loss_without_heads() -> None:
    output = shaken(network())(batch(), future=True)
    without = replace(output, future_logits=())
    plain, _ = NextTokenObjective()(without, batch())
    assert torch.equal(NextTokenObjective(future_weight=0.0)(output, batch())[0], plain)
    assert not torch.equal(NextTokenObjective()(output, batch())[0], plain)
    with pytest.raises(ValueError, match="must not be negative"):
        NextTokenObjective(future_weight=-0.1)


def test_a_head_beyond_every_document_adds_nothing() -> None:
    documents = pack([sequence(3), sequence(3)], 8, 0)
    output = shaken(network(4))(documents, future=True)
    loss, metrics = NextTokenObjective()(output, documents)
    assert math.isfinite(float(loss.detach()))
    assert "future1_accuracy_text" in metrics
    assert not any(name.startswith("future4") for name in metrics)


# Training


def module(model: CausalLM, **stage: Any) -> LMModule:
    return LMModule(model, NextTokenObjective(future_weight=1.0), LMStage(ema=0.0, **stage))


def learn(trained: LMModule, documents: TokenBatch, steps: int, lr: float) -> dict[str, Tensor]:
    parameters = [p for p in trained.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for _ in range(steps):
        loss, metrics = trained.compute(trained.network, documents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return dict(metrics)


def test_model_and_heads_overfit_a_batch() -> None:
    metrics = learn(module(network()), batch(), steps=120, lr=5e-3)
    assert metrics["accuracy_text"] == metrics["accuracy_image"] == 1
    for head in (1, 2, 3):
        assert metrics[f"future{head}_accuracy_image"] == 1
        assert metrics[f"future{head}_loss_image"] < 0.3


def test_heads_alone_learn_on_a_frozen_model() -> None:
    model = network()
    learn(module(model), batch(), steps=60, lr=5e-3)  # something worth predicting from
    for parameter in model.future.parameters():
        torch.nn.init.zeros_(parameter)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    resting = module(model, frozen=["model"])
    assert resting.frozen() == [model.model]
    loss, start = resting.compute(model, batch())
    loss.backward()
    assert all(bool(p.grad.any()) for p in model.future.parameters())  # type: ignore[union-attr]
    assert all(p.grad is None or not p.requires_grad for p in model.model.parameters())
    end = learn(resting, batch(), steps=60, lr=2e-2)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith("future.")
    for head in (1, 2, 3):
        assert end[f"future{head}_loss_image"] < start[f"future{head}_loss_image"] - 0.5
    with pytest.raises(LexelError, match=r"\['modle'\].*it has: model"):
        module(model, frozen=["modle"])


def test_heads_are_idle_only_without_a_weight() -> None:
    assert not module(network()).has_idle_parameters
    idle = LMModule(network(), NextTokenObjective(future_weight=0.0), LMStage(ema=0.0))
    assert idle.has_idle_parameters
    _, metrics = idle.compute(idle.network, batch())
    assert not any(name.startswith("future") for name in metrics)


def test_heads_join_the_weights_of_a_model_without(tmp_path: Path) -> None:
    network(0).save_pretrained(tmp_path)
    grown = fresh_network(replace(network(2).config), seed=5, init=str(tmp_path))
    for key, value in network(0).state_dict().items():
        assert torch.equal(grown.state_dict()[key], value)
    assert not any(bool(p.any()) for p in grown.future.parameters())
    with pytest.raises(LexelError, match="missing future"):
        load_weights(network(2), tmp_path / "model.safetensors")
    shaken(grown).save_pretrained(tmp_path / "headed")
    loaded = CausalLM.from_pretrained(tmp_path / "headed")
    assert loaded.fingerprint() == grown.fingerprint()
    with pytest.raises(LexelError, match="unknown future"):
        fresh_network(network(0).config, seed=5, init=str(tmp_path / "headed"))


def test_the_experiment_trains_the_heads_of_the_shipped_model() -> None:
    from hydra import compose, initialize_config_module

    from lexel.train.cli import resolve

    with initialize_config_module("lexel.conf", version_base="1.3"):
        run = resolve(compose("train", overrides=["experiment=shapes_heads"]))
    shipped = CausalLM.from_pretrained(Path(__file__).parents[1] / "lexel/bundles/shapes/lm")
    config = run.lm(vocab_size=shipped.config.vocab_size, pad_id=shipped.config.pad_id)
    assert replace(config, future_heads=0) == replace(shipped.config, max_length=config.max_length)
    assert isinstance(run.lm, partial)
    assert run.stages.lm.frozen == ["model"]
    assert shipped.config.future_heads == 0
