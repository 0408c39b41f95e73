"""Attention in both directions inside the pictures of a sequence, causal everywhere else.

A picture's codes have no order that matters; NeoBabel (Derakhshani et al., arXiv:2507.06137) and prefix
language models let them see each other. Under next-token training that is possible only for pictures that
are given: a code that sees the next one has nothing to predict. So `given_spans` leaves out every picture in
which a token has a loss, and every one that is not finished.

b batch · l positions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.types import TokenBatch

Closing = Sequence[tuple[int, int]]
"""Pairs of a modality and the id that closes its pictures, as in a model's config (`bidirectional`)."""


def picture_spans(ids: Tensor, modality: Tensor, closing: Closing) -> Tensor:
    """Number the pictures of each row: long ``[b, l]``, from 1 for the tokens of a finished picture of the
    modalities in `closing` (up to its closing token, which sees them all anyhow), 0 for all others.
    ids: long ``[b, l]`` or ``[b, l, k]``; modality: long ``[b, l]``."""
    first = ids if ids.ndim == 2 else ids[..., 0]
    inside, ends = torch.zeros_like(first, dtype=torch.bool), torch.zeros_like(first, dtype=torch.bool)
    for kind, end in closing:
        inside |= (modality == kind) & (first != end)
        ends |= (modality == kind) & (first == end)
    begins = inside & ((modality != F.pad(modality, (1, -1), value=-1)) | ~F.pad(inside, (1, -1)))
    number = begins.cumsum(1) * inside
    return number * _any_in(number, F.pad(ends, (-1, 1)))


def given_spans(batch: TokenBatch, closing: Closing) -> Tensor:
    """`picture_spans` of those pictures in which nothing is a training target."""
    spans = picture_spans(batch.ids, batch.modality, closing)
    return spans if batch.loss_mask is None else spans * ~_any_in(spans, batch.loss_mask)


def _any_in(number: Tensor, marked: Tensor) -> Tensor:
    """Bool ``[b, l]``: whether any token with the same number (0..l) in the row is marked."""
    counts = torch.zeros(len(number), number.shape[1] + 1, dtype=torch.long, device=number.device)
    return counts.scatter_add(1, number, marked.long()).gather(1, number) > 0


def span_mask(spans: Tensor, mask: Tensor | None = None) -> Tensor:
    """Bool ``[b, l, l]``: `mask` (None: plain causal), and every token sees all of its own span."""
    length = spans.shape[1]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=spans.device).tril()
    return mask | ((spans[:, :, None] == spans[:, None]) & (spans > 0)[:, :, None])


def see_given(batch: TokenBatch, closing: Closing) -> TokenBatch:
    """The batch with an attention mask in which the tokens of every given picture see each other; as it is
    where there are none. Rows may hold several documents (`lexel.data.packing`): a picture lies in one."""
    if not closing or not bool((spans := given_spans(batch, closing)).any()):
        return batch
    # The mask alone decides: attention within documents would be causal.
    return replace(batch, attention_mask=span_mask(spans, batch.attention_mask), documents=None)
