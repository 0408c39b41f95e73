"""Several codes per position: step by step = teacher-forced, and nobody sees a later column."""

import pytest
import torch

from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.types import TokenBatch

TEXT, SIZES, PAD = 10, (5, 6, 7), 3
OFFSETS = (10, 15, 21)
VOCAB = 28


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(head: str) -> CausalLM:
    model = CausalLMConfig(
        VOCAB,
        dim=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head=head,  # type: ignore[arg-type]
        codebook_sizes=SIZES,
        code_offsets=OFFSETS,
        head_layers=2,
        pad_id=PAD,
    ).build()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    return model.eval().requires_grad_(False)


def mixed_batch(rows: int = 2, text: int = 3, picture: int = 5) -> TokenBatch:
    """Text in column 0 (padding in the others), then a picture of three codes per position."""
    ids = torch.full((rows, text + picture, 3), PAD)
    ids[:, :text, 0] = torch.randint(4, TEXT, (rows, text))
    for j, (offset, size) in enumerate(zip(OFFSETS, SIZES)):
        ids[:, text:, j] = offset + torch.randint(size, (rows, picture))
    modality = (torch.arange(text + picture) >= text).long().expand(rows, -1)
    positions = torch.arange(text + picture)[None, :, None].expand(rows, -1, 3)
    return TokenBatch(ids, modality, positions)


def with_ids(batch: TokenBatch, ids: torch.Tensor) -> TokenBatch:
    return TokenBatch(ids, batch.modality, batch.positions)


@pytest.mark.parametrize("head", ["parallel", "factorized"])
def test_step_by_step_is_teacher_forced(head: str):
    model, batch = build(head), mixed_batch()
    output = model(batch)
    assert model.head is not None
    assert [x.shape[-1] for x in output.code_logits] == list(SIZES[1:])
    for position in range(2, 7):
        chosen = batch.ids[:, position + 1] - torch.tensor(OFFSETS)
        for column in (1, 2):
            logits = model.head.next_logits(output.hidden[:, position], chosen[:, :column])
            expected = output.code_logits[column - 1][:, position]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
            assert expected.std() > 0.1


@pytest.mark.parametrize("head", ["parallel", "factorized"])
def test_a_column_depends_on_the_columns_before_it_only(head: str):
    model, batch = build(head), mixed_batch()
    before = model(batch)
    for changed in range(3):
        ids = batch.ids.clone()
        ids[:, 6, changed] = OFFSETS[changed] + (ids[:, 6, changed] - OFFSETS[changed] + 1) % SIZES[changed]
        after = model(with_ids(batch, ids))
        assert torch.equal(after.logits[:, :6], before.logits[:, :6])
        for column in (1, 2):
            old, new = before.code_logits[column - 1], after.code_logits[column - 1]
            same = torch.allclose(old[:, 5], new[:, 5], atol=1e-6)
            assert same == (head == "parallel" or column <= changed)
            torch.testing.assert_close(old[:, :5], new[:, :5])
            assert not torch.allclose(old[:, 6], new[:, 6], atol=1e-4)


def test_padding_adds_nothing_to_the_sum_over_columns():
    model, batch = build("factorized"), mixed_batch()
    before = model(batch)
    model.model.embed_tokens.weight.data[PAD] = 100.0
    changed = model(batch)
    kept = [i for i in range(VOCAB) if i != PAD]
    assert torch.equal(changed.hidden, before.hidden)
    assert torch.equal(changed.logits[..., kept], before.logits[..., kept])


def test_with_a_cache_the_caller_asks_for_the_columns():
    model, batch = build("factorized"), mixed_batch()
    full = model(batch)
    cache = model.new_cache(2)
    for start, stop in ((0, 4), (4, 5), (5, 8)):
        part = TokenBatch(
            batch.ids[:, start:stop], batch.modality[:, start:stop], batch.positions[:, start:stop]
        )
        output = model(part, cache)
        assert output.code_logits == ()
        torch.testing.assert_close(output.logits, full.logits[:, start:stop], atol=1e-5, rtol=1e-4)
        known = min(stop, 7)
        verified = model.code_logits(output.hidden[:, : known - start], batch.ids[:, start + 1 : known + 1])
        for ours, expected in zip(verified, full.code_logits):
            torch.testing.assert_close(ours, expected[:, start:known], atol=1e-5, rtol=1e-4)


def test_select_picks_the_same_code_logits():
    model, batch = build("factorized"), mixed_batch()
    select = torch.rand(2, 8) < 0.5
    full, picked = model(batch), model(batch, select=select)
    for ours, expected in zip((picked.logits, *picked.code_logits), (full.logits, *full.code_logits)):
        torch.testing.assert_close(ours, expected[select], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", ["parallel", "factorized"])
def test_save_and_load_are_bit_exact(tmp_path, head: str):
    model, batch = build(head), mixed_batch()
    model.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    for ours, expected in zip(again(batch).code_logits, model(batch).code_logits):
        assert torch.equal(ours, expected)


def test_columns_without_logits_here_are_refused():
    head = build("factorized").head
    assert head is not None
    for column in (0, 3):
        with pytest.raises(ValueError, match=r"serves columns 1\.\.2"):
            head.next_logits(torch.zeros(1, 32), torch.zeros(1, column, dtype=torch.long))
