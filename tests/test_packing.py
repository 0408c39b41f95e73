import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from lexel.data.packing import first_fit, pack
from lexel.document import TokenSequence
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLMConfig
from lexel.train.objectives.lm import NextTokenObjective, predicting

PAD = 7


def sequence(length, first_id, columns=1):
    ids = torch.arange(first_id, first_id + length)
    return TokenSequence(
        ids if columns == 1 else torch.stack([ids] * columns, dim=1),
        torch.arange(length) % 2,
        torch.arange(length)[:, None].expand(length, 3).clone(),
        torch.ones(length, dtype=torch.bool),
    )


def documents(lengths, columns=1):
    firsts = [1000 * (i + 1) for i in range(len(lengths))]
    return [sequence(length, first, columns) for length, first in zip(lengths, firsts)]


lengths_lists = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@given(lengths_lists, st.integers(12, 30), st.sampled_from([1, 2]))
def test_every_token_stands_exactly_once_with_its_own_attributes(lengths, capacity, columns):
    sequences = documents(lengths, columns)
    batch = pack(sequences, capacity, PAD)
    ids = batch.ids if columns == 1 else batch.ids[..., 0]
    assert sorted(ids[ids != PAD].tolist()) == sorted(
        torch.cat([s.ids.reshape(len(s), -1)[:, 0] for s in sequences]).tolist()
    )
    for number, s in enumerate(sequences):
        row, start = (ids == 1000 * (number + 1)).nonzero()[0].tolist()
        span = slice(start, start + len(s))
        assert torch.equal(batch.ids[row, span], s.ids)
        assert torch.equal(batch.modality[row, span], s.modality)
        assert torch.equal(batch.positions[row, span], s.positions)
        assert batch.loss_mask[row, span].tolist() == [False] + [True] * (len(s) - 1)
    assert not batch.loss_mask[ids == PAD].any()


@given(lengths_lists, st.integers(12, 30))
def test_attention_is_causal_and_stays_in_the_document(lengths, capacity):
    batch = pack(documents(lengths), capacity, PAD)
    for row in range(len(batch.ids)):
        owner = torch.where(batch.ids[row] == PAD, -1, batch.ids[row] // 1000)
        for query in range(capacity):
            if owner[query] < 0:
                expected = [key == query for key in range(capacity)]
            else:
                expected = [bool(owner[key] == owner[query]) and key <= query for key in range(capacity)]
            assert batch.attention_mask[row, query].tolist() == expected


@given(lengths_lists, st.integers(12, 30))
def test_rows_are_full_enough(lengths, capacity):
    rows = first_fit(lengths, capacity)
    fill = [sum(lengths[i] for i in row) for row in rows]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(fill) <= capacity
    assert all(a + b > capacity for n, a in enumerate(fill) for b in fill[n + 1 :])


def test_packed_attention_equals_each_document_alone():
    lengths, generator = [5, 9, 3, 8], torch.Generator().manual_seed(0)
    batch = pack(documents(lengths), 16, PAD)
    table = torch.randn(5000, 8, generator=generator)
    x = table[batch.ids]
    packed = scaled_dot_product_attention(x, x, x, attn_mask=batch.attention_mask)
    assert packed.isfinite().all()
    for number, length in enumerate(lengths):
        alone = table[1000 * (number + 1) :][:length]
        expected = scaled_dot_product_attention(alone, alone, alone, is_causal=True)
        row, start = (batch.ids == 1000 * (number + 1)).nonzero()[0].tolist()
        torch.testing.assert_close(packed[row, start : start + length], expected)


def test_a_document_that_is_too_long_is_refused_by_its_length():
    with pytest.raises(LexelError, match="17 tokens does not fit into 16"):
        pack(documents([3, 17]), 16, PAD)
    with pytest.raises(ValueError, match="empty"):
        pack([], 16, PAD)


@pytest.mark.parametrize("columns", [1, 2])
def test_the_packed_loss_is_the_loss_of_the_documents(columns):
    """No cross-talk: loss and gradients of packed rows are those of each document alone, weighed by its
    number of targets."""
    torch.manual_seed(0)
    several = {"head": "parallel", "codebook_sizes": (8, 8), "code_offsets": (10, 18)} if columns > 1 else {}
    lm = CausalLMConfig(26, dim=16, layers=2, heads=2, rope_axes=(0.5, 0.25, 0.25), **several).build()
    documents = [document(length, columns) for length in (5, 12, 3, 9)]
    objective = NextTokenObjective(("text", "image"))

    def loss_of(batch):
        output = lm(batch, select=predicting(batch))
        return objective(output, batch, code_offsets=lm.config.code_offsets, pad_id=0)[0]

    packed = pack(documents, length=16, pad=0)
    assert len(packed.ids) == 2
    together = loss_of(packed)
    together.backward()
    found = {name: parameter.grad.clone() for name, parameter in lm.named_parameters()}
    lm.zero_grad()
    alone = [pack([one], length=len(one), pad=0) for one in documents]
    counts = [int(predicting(batch).sum()) * columns for batch in alone]
    separate = sum(loss_of(batch) * count for batch, count in zip(alone, counts)) / sum(counts)
    separate.backward()
    torch.testing.assert_close(together, separate)
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def document(length, columns):
    """Codes of pictures everywhere, so that every column of every position counts."""
    first = torch.randint(10, 18, (length,))
    ids = torch.stack([first, torch.randint(18, 26, (length,))], 1) if columns > 1 else first
    positions = torch.stack([torch.arange(length)] * 3, 1)
    ones = torch.ones(length, dtype=torch.long)
    return TokenSequence(ids, ones, positions, torch.ones(length, dtype=torch.bool))
