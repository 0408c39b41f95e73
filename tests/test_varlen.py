"""Attention document by document against a dense mask."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lexel.data.packing import document_mask
from lexel.nn.attention import additive_mask, attend
from lexel.nn.varlen import Documents


def rows(lengths: list[list[int]], length: int) -> torch.Tensor:
    """Owners of rows that hold documents of these lengths one after the other, then padding."""
    owner = torch.full((len(lengths), length), -1)
    number = 0
    for row, line in zip(owner, lengths):
        at = 0
        for size in line:
            row[at : at + size] = number
            at, number = at + size, number + 1
    return owner


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=3), st.booleans())
def test_documents_attend_as_a_dense_mask_says(lengths: list[list[int]], grouped: bool):
    owner = rows(lengths, 20)
    torch.manual_seed(len(lengths))
    q = torch.randn(len(owner), 4, 20, 8, dtype=torch.float64)
    k, v = torch.randn(2, len(owner), 2 if grouped else 4, 20, 8, dtype=torch.float64)
    mask = additive_mask(document_mask(owner), torch.float64)
    found = attend(q, k, v, Documents(owner), scale=0.3)
    expected = attend(q, k, v, mask, scale=0.3)
    real = (owner >= 0)[:, None, :, None]
    torch.testing.assert_close(found, expected * real)


def test_gradients_are_those_of_a_dense_mask():
    owner = rows([[3, 4], [5]], 8)
    torch.manual_seed(0)
    tensors = torch.randn(3, 2, 2, 8, 4, dtype=torch.float64)
    weight = torch.randn(2, 2, 8, 4, dtype=torch.float64) * (owner >= 0)[:, None, :, None]
    found = []
    for mask in (Documents(owner), additive_mask(document_mask(owner), torch.float64)):
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        (attend(q, k, v, mask) * weight).sum().backward()
        found.append((q.grad, k.grad, v.grad))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


def test_what_the_kernel_for_many_lengths_is_given(monkeypatch: pytest.MonkeyPatch):
    """The kernel needs a GPU: in its place stands a loop over the documents, with the same arguments."""
    import torch.nn.attention.varlen as varlen

    def loop(q, k, v, bounds, keys, longest, _, *, scale, window_size, enable_gqa):
        assert window_size == (-1, 0)
        assert torch.equal(bounds, keys)
        assert bounds.dtype == torch.int32
        assert longest == int(bounds.diff().max())
        parts = []
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
            one = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
            out = F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=enable_gqa)
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(varlen, "varlen_attn", loop)
    owner = rows([[3, 4], [5, 1]], 8)
    q, k, v = torch.randn(3, 2, 2, 8, 4)
    documents = Documents(owner)
    torch.testing.assert_close(documents._varlen(q, k, v, None), documents.attend(q, k, v))
