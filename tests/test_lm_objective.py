"""The next-token objective against its formula written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from lexel.models.causal_lm import CausalLMConfig
from lexel.train.objectives.lm import NextTokenObjective, predicting
from lexel.types import LMOutput, TokenBatch

VOCAB = 12


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_batch(rows: int = 3, length: int = 9) -> TokenBatch:
    return TokenBatch(
        torch.randint(VOCAB, (rows, length)),
        torch.randint(2, (rows, length)),
        torch.zeros(rows, length, 3, dtype=torch.long),
        loss_mask=torch.rand(rows, length) < 0.6,
    )


def as_output(logits: torch.Tensor, *columns: torch.Tensor) -> LMOutput:
    return LMOutput(logits, logits, columns)


def by_hand(logits: torch.Tensor, batch: TokenBatch) -> dict[int, list[torch.Tensor]]:
    """Cross-entropies of the targets of each modality."""
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    assert batch.loss_mask is not None
    for row in range(batch.ids.shape[0]):
        for place in range(1, batch.ids.shape[1]):
            if batch.loss_mask[row, place]:
                loss = -logits[row, place - 1].log_softmax(-1)[batch.ids[row, place]]
                found[int(batch.modality[row, place])].append(loss)
    return found


def test_weighted_mean_and_metrics_per_modality():
    batch, logits = random_batch(), 2 * torch.randn(3, 9, VOCAB)
    text, image = (torch.stack(x) for x in by_hand(logits, batch).values())
    objective = NextTokenObjective(weights={"text": 0.3, "image": 2.0})
    loss, metrics = objective(as_output(logits), batch)
    expected = (0.3 * text.sum() + 2 * image.sum()) / (0.3 * len(text) + 2 * len(image))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["loss_text"], text.mean())
    torch.testing.assert_close(metrics["loss_image"], image.mean())
    assert (int(metrics["tokens_text"]), int(metrics["tokens_image"])) == (len(text), len(image))
    plain, _ = NextTokenObjective()(as_output(logits), batch)
    torch.testing.assert_close(plain, torch.cat((text, image)).mean())


def test_no_mask_means_every_following_token():
    batch = random_batch()
    batch = TokenBatch(batch.ids, batch.modality, batch.positions)
    logits = torch.randn(3, 9, VOCAB)
    loss, _ = NextTokenObjective()(as_output(logits), batch)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten())
    )


def test_selected_logits_give_the_same_and_others_no_gradient():
    batch, objective = random_batch(), NextTokenObjective(z_loss=0.1)
    logits = torch.randn(3, 9, VOCAB, requires_grad=True)
    select = predicting(batch)
    loss, metrics = objective(as_output(logits), batch)
    picked, picked_metrics = objective(as_output(logits[select]), batch)
    assert torch.equal(loss, picked)
    assert all(torch.equal(metrics[name], picked_metrics[name]) for name in metrics)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(-1) > 0).equal(select)


def test_z_loss_is_the_squared_log_partition():
    batch = random_batch()
    logits = torch.randn(3, 9, VOCAB, requires_grad=True)
    expected = 0.01 * logits[predicting(batch)].logsumexp(-1).square().mean()
    (wanted,) = torch.autograd.grad(expected, logits)
    plain, _ = NextTokenObjective()(as_output(logits), batch)
    loss, metrics = NextTokenObjective(z_loss=0.01)(as_output(logits), batch)
    torch.testing.assert_close(metrics["z_loss"], expected.detach())
    (gradient,) = torch.autograd.grad(loss - plain, logits)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)


def test_known_logits_give_known_figures():
    batch = random_batch()
    certain = 50.0 * F.one_hot(batch.ids.roll(-1, 1), VOCAB).float()
    _, metrics = NextTokenObjective()(as_output(certain), batch)
    assert metrics["accuracy_text"] == metrics["accuracy_image"] == 1
    assert metrics["loss_text"] < 1e-6
    loss, _ = NextTokenObjective()(as_output(torch.zeros(3, 9, VOCAB)), batch)
    assert loss.item() == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_an_absent_modality_has_no_metric():
    batch = random_batch()
    only_text = TokenBatch(batch.ids, torch.zeros_like(batch.modality), batch.positions)
    _, metrics = NextTokenObjective()(as_output(torch.randn(3, 9, VOCAB)), only_text)
    assert set(metrics) == {"loss_text", "accuracy_text", "tokens_text"}


def test_columns_count_as_targets_in_their_codebook_and_padding_does_not():
    pad, offsets, sizes = 0, (4, 7), (3, 5)
    ids = torch.tensor([[[1, pad], [2, pad], [5, 9], [pad, 11], [6, pad]]])
    modality = torch.tensor([[0, 0, 1, 1, 1]])
    batch = TokenBatch(ids, modality, torch.zeros(1, 5, 3, dtype=torch.long))
    first, second = torch.randn(1, 5, VOCAB), torch.randn(1, 5, sizes[1])
    loss, metrics = NextTokenObjective(weights={"image": 3.0})(
        as_output(first, second), batch, code_offsets=offsets, pad_id=pad
    )
    one, two = -first[0].log_softmax(-1), -second[0].log_softmax(-1)
    text = [one[0, 2]]
    image = [one[1, 5], one[3, 6], two[1, 9 - 7], two[2, 11 - 7]]
    torch.testing.assert_close(loss, (sum(text) + 3 * sum(image)) / (1 + 3 * 4))
    assert int(metrics["tokens_image"]) == 4


def test_bad_weights_and_empty_targets_are_refused():
    with pytest.raises(ValueError, match="unknown modalities"):
        NextTokenObjective(weights={"sound": 1.0})
    with pytest.raises(ValueError, match="must not be negative"):
        NextTokenObjective(weights={"text": -1.0})
    batch = random_batch()
    empty = TokenBatch(batch.ids, batch.modality, batch.positions, loss_mask=torch.zeros(3, 9).bool())
    with pytest.raises(ValueError, match="no training target"):
        NextTokenObjective()(as_output(torch.randn(3, 9, VOCAB)), empty)


@pytest.mark.parametrize("head", ["single", "parallel", "factorized"])
def test_a_model_overfits_one_batch(head: str):
    columns = 1 if head == "single" else 2
    codes = {} if columns == 1 else {"codebook_sizes": (6, 6), "code_offsets": (8, 14)}
    model = CausalLMConfig(20, dim=48, layers=2, heads=4, head=head, **codes).build()  # type: ignore[arg-type]
    ids = torch.randint(8, 14, (4, 12, columns)) + 6 * torch.arange(columns)
    index = torch.arange(12)[None, :, None].expand(4, -1, 3)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[:, :3] = False  # nothing tells the rows apart before that
    batch = TokenBatch(ids[..., 0] if columns == 1 else ids, torch.ones(4, 12).long(), index, loss_mask=mask)
    objective = NextTokenObjective(z_loss=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(80):
        output = model(batch, select=predicting(batch))
        loss, metrics = objective(output, batch, code_offsets=model.config.code_offsets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["accuracy_image"] == 1
    assert metrics["loss_image"] < 0.2
