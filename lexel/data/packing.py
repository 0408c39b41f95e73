"""Several documents in one row of fixed length, none seeing another.

r rows · l row length
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lexel.document import TokenSequence
from lexel.errors import LexelError
from lexel.types import TokenBatch


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over rows: longest first, each into the first row with room (first-fit decreasing;
    at most 11/9 of the best possible number of rows, plus one). Returns the item numbers of each row.
    LexelError when an item exceeds the capacity."""
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[item] > capacity:
            raise LexelError(
                f"A document of {lengths[item]} tokens does not fit into {capacity}: raise the context "
                "length, or shorten the text or the picture's codes."
            )
        row = next((r for r, free in enumerate(room) if free >= lengths[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(item)
        room[row] -= lengths[item]
    return rows


def pack(sequences: Sequence[TokenSequence], length: int, pad: int) -> TokenBatch:
    """Pack documents into rows of `length` tokens: ids long ``[r, l]`` (or ``[r, l, k]``) and a
    block-diagonal causal mask bool ``[r, l, l]``, so that each document is computed as if it were alone;
    positions restart with each document. `pad` fills the rest of a row; a padding position sees only itself
    (no empty softmax) and has no loss, nor has the first token of a document, which nothing predicts.

    Raises LexelError naming the length when a document is longer than a row, ValueError on no documents.
    """
    if not sequences:
        raise ValueError("There is nothing to pack: the list of sequences is empty.")
    rows = first_fit([len(sequence) for sequence in sequences], length)
    shape = (len(rows), length)
    first = sequences[0]
    ids = first.ids.new_full((*shape, *first.ids.shape[1:]), pad)
    modality = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros((*shape, 3), dtype=torch.long)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    owner = torch.full(shape, -1, dtype=torch.long)
    for row, items in enumerate(rows):
        start = 0
        for item in items:
            sequence = sequences[item]
            span = slice(start, start + len(sequence))
            ids[row, span] = sequence.ids
            modality[row, span] = sequence.modality
            positions[row, span] = sequence.positions
            loss_mask[row, span] = sequence.loss_mask
            loss_mask[row, start] = False
            owner[row, span] = item
            start += len(sequence)
    return TokenBatch(ids, modality, positions, document_mask(owner), loss_mask, documents=owner)


def document_mask(owner: Tensor) -> Tensor:
    """Causal attention within documents: `owner` long ``[r, l]`` numbers the document of each position, -1 is
    padding. Returns bool ``[r, l, l]``, True where a query (second axis) may look at a key (third axis)."""
    length = owner.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()
    same = (owner[:, :, None] == owner[:, None, :]) & (owner >= 0)[:, :, None]
    return same & causal | torch.eye(length, dtype=torch.bool, device=owner.device)
