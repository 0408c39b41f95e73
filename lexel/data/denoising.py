"""Documents with holes: UL2's mixture of denoisers (Tay et al., arXiv:2205.05131) for a decoder-only model
over text and pictures.

A document ``<bos> caption <boi> codes <eoi> <eos>`` becomes

    <bos> <mode> document with holes <sep> <span_0> what was in the first hole <span_1> … <eos>

with the loss on what follows ``<sep>``. In the document a hole is its marker ``<span_i>``; the i-th hole
belongs to the i-th group behind ``<sep>`` (markers are numbered modulo `SPANS`, so there may be more holes).
Special tokens are never hidden and every hole lies within one text or one row of codes, so none crosses the
border of a modality. A hidden code keeps its row and column behind ``<sep>``, and a marker has those of the
first code that it stands for: a model with rotary positions for rows and columns is told where each missing
code belongs.

`DENOISERS` are the seven of UL2: span length and rate of its R and X, a tail for S. Numbers of hidden units
and of spans are rounded at random, so that the rate holds on average in short texts, too.

l positions of a sequence · c columns · h w grid of codes
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from lexel.document import DocumentCodec, TokenSequence
from lexel.tokenizers.layout import CodeLayout
from lexel.vocabulary import Vocabulary

SPANS = 32
MODES = ("mode_r", "mode_s", "mode_x")
ROLES = (*MODES, "sep", *(f"span_{i}" for i in range(SPANS)))
"""The special tokens that documents with holes need: ``Vocabulary.build(..., roles=ROLES)``."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Denoiser:
    """mode: the role of the token in front; span: mean length of a hole in tokens, None for one hole at the
    end of the document's last text or picture; rate: share of each text and each picture that is hidden."""

    mode: str
    span: int | None
    rate: float

    def hide(self, codec: DocumentCodec, sequence: TokenSequence, rng: random.Random) -> Tensor:
        """Bool ``[l]``: which tokens of a complete document are hidden. Texts are hidden token by token,
        pictures by whole rows; at least one token or row of the document is."""
        hidden = torch.zeros(len(sequence), dtype=torch.bool)
        runs = runs_of(codec, sequence)
        for number, units in enumerate(runs):
            if self.span is None:
                count = _rounded(self.rate * len(units), rng) if number == len(runs) - 1 else 0
                chosen = [(len(units) - count, len(units))]
            else:
                chosen = spans(len(units), self.span * len(units) / _tokens(units), self.rate, rng)
            for first, last in chosen:
                for start, stop in units[first:last]:
                    hidden[start:stop] = True
        if runs and not hidden.any():
            units = runs[-1] if self.span is None else rng.choice(runs)
            start, stop = units[-1] if self.span is None else rng.choice(units)
            hidden[start:stop] = True
        return hidden


DENOISERS = (
    Denoiser("mode_r", 3, 0.15),
    Denoiser("mode_r", 8, 0.15),
    Denoiser("mode_s", None, 0.25),
    Denoiser("mode_x", 3, 0.5),
    Denoiser("mode_x", 8, 0.5),
    Denoiser("mode_x", 64, 0.15),
    Denoiser("mode_x", 64, 0.5),
)
"""Each is used equally often."""


def denoise(codec: DocumentCodec, sequence: TokenSequence, rng: random.Random) -> TokenSequence:
    """A complete document with holes by one of `DENOISERS`. A document of special tokens only is returned as
    it is. Raises ValueError without the roles (see `with_holes`)."""
    denoiser = rng.choice(DENOISERS)
    hidden = denoiser.hide(codec, sequence, rng)
    return with_holes(codec, sequence, hidden, denoiser.mode) if hidden.any() else sequence


def spans(length: int, mean: float, rate: float, rng: random.Random) -> list[Span]:
    """Holes in a line of `length` units: on average ``rate * length`` of them are hidden, in holes of `mean`
    units on average, but there is at least one hole where anything is hidden, and one unit or more between
    holes. Given both numbers, every arrangement is equally likely."""
    hidden = min(length, _rounded(rate * length, rng))
    if hidden == 0:
        return []
    count = max(1, min(_rounded(hidden / max(1.0, mean), rng), hidden, length - hidden + 1))
    lengths = _parts(hidden, count, rng)
    # One visible unit between holes, the rest anywhere, the two ends included.
    gaps = [extra - 1 for extra in _parts(length - hidden + 2, count + 1, rng)]
    found, at = [], 0
    for number, (gap, size) in enumerate(zip(gaps, lengths)):
        start = at + gap + (1 if number else 0)
        at = start + size
        found.append((start, at))
    return found


def _rounded(value: float, rng: random.Random) -> int:
    """`value` up or down to a whole number, right on average."""
    return int(value + rng.random())


def _parts(total: int, count: int, rng: random.Random) -> list[int]:
    """`total` as the sum of `count` numbers from 1, every way equally likely."""
    cuts = [0, *sorted(rng.sample(range(1, total), count - 1)), total]
    return [after - before for before, after in pairwise(cuts)]


def _tokens(units: Sequence[Span]) -> int:
    return sum(stop - start for start, stop in units)


def runs_of(codec: DocumentCodec, sequence: TokenSequence) -> list[list[Span]]:
    """What may be hidden in a complete document: of each text its tokens, of each picture its rows of codes
    (single codes where they have no rows), as ``(start, stop)``; neither sizes, nor ends of rows, nor any
    other special token."""
    first = _first_column(sequence.ids)
    rows = sequence.positions[:, 1].tolist()
    begins = {codec.vocabulary.begin(modality): modality for modality in codec.layouts}
    runs: list[list[Span]] = []
    index = 0
    while index < len(first):
        if first[index] in begins:
            modality = begins[first[index]]
            places = code_places(codec, first, index, modality)
            runs.append(_rows(places, rows, codec.layouts[modality]))
            index = places[-1] + 1
        elif bool(codec._text_ids[first[index]]):
            start = index
            while index < len(first) and bool(codec._text_ids[first[index]]):
                index += 1
            runs.append([(place, place + 1) for place in range(start, index)])
        else:
            index += 1
    return runs


def code_places(codec: DocumentCodec, first: Sequence[int], begin: int, modality: str) -> list[int]:
    """Where the codes of the picture that opens at `begin` stand, in the order of its layout's steps."""
    opening, slots, closing = codec.scripts[modality]
    places, flexible = [], codec.layouts[modality].flexible
    for number, slot in enumerate(slots, start=begin + len(opening)):
        if flexible and first[number] == closing[0]:
            break
        if slot.step is not None:
            places.append(number)
    return places


def _rows(places: Sequence[int], rows: Sequence[int], layout: CodeLayout) -> list[Span]:
    """Neighbouring places that have the same row."""
    if layout.length is not None:
        return [(place, place + 1) for place in places]
    found: list[Span] = []
    for place in places:
        if found and found[-1][1] == place and rows[found[-1][0]] == rows[place]:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found


def with_holes(
    codec: DocumentCodec, sequence: TokenSequence, hidden: Tensor, mode: str = "mode_x"
) -> TokenSequence:
    """The form above, of a complete document (``codec.build``) and what is hidden of it, bool ``[l]``.
    Raises ValueError when nothing is hidden, or the vocabulary lacks the roles."""
    check_roles(codec.vocabulary)
    holes = holes_of(hidden)
    if not holes:
        raise ValueError("nothing is hidden in the document.")
    special = codec.vocabulary.special
    whole = replace(sequence, loss_mask=torch.zeros_like(sequence.loss_mask))
    given = [_part(whole, 0, 1), _mark(whole, 0, special[mode], like=False)]
    targets = [_mark(whole, 0, special["sep"], like=False)]
    at = 1
    for number, (start, stop) in enumerate(holes):
        marker = _mark(whole, start, special[f"span_{number % SPANS}"])
        given += [_part(whole, at, start), marker]
        targets += [_supervised(marker), _supervised(_part(whole, start, stop))]
        at = stop
    given.append(_part(whole, at, len(whole) - 1))
    return _joined([*given, *targets, _supervised(_part(whole, len(whole) - 1, len(whole)))])


def holes_of(hidden: Tensor) -> list[Span]:
    """The runs of True in bool ``[l]`` as ``(start, stop)``."""
    padded = torch.nn.functional.pad(hidden.long(), (1, 1))
    edges = padded.diff().nonzero()[:, 0].tolist()
    return list(zip(edges[::2], edges[1::2]))


def without_holes(codec: DocumentCodec, ids: Tensor) -> Tensor:
    """Ids ``[l]`` or ``[l, c]`` of a document with holes → those of the whole document, what `with_holes` was
    given. Raises ValueError when the groups behind ``<sep>`` do not fit the holes."""
    special = codec.vocabulary.special
    first = _first_column(ids)
    markers = {special[f"span_{i}"] for i in range(SPANS)}
    if special["sep"] not in first:
        raise ValueError("the ids hold no <sep>; they are no document with holes.")
    sep = first.index(special["sep"])
    end = first.index(special["eos"], sep) if special["eos"] in first[sep:] else len(first)
    holes = [place for place in range(2, sep) if first[place] in markers]
    groups = [place for place in range(sep + 1, end) if first[place] in markers]
    if [first[place] for place in holes] != [first[place] for place in groups] or groups[:1] != [sep + 1]:
        raise ValueError(
            f"the document has {len(holes)} holes, but {len(groups)} groups follow <sep> to fill them."
        )
    parts, at = [ids[:1]], 2
    for hole, start, stop in zip(holes, groups, [*groups[1:], end]):
        parts += [ids[at:hole], ids[start + 1 : stop]]
        at = hole + 1
    return torch.cat([*parts, ids[at:sep], ids[end : end + 1]])


def draw_hole(layout: CodeLayout, rng: random.Random) -> Tensor:
    """Bool ``[n]``: which positions of a picture are missing, as an editor of pictures may want it. On a
    grid a rectangle, every one equally likely, or one time in four all but that rectangle; elsewhere a piece
    of the line. Never nothing; everything is possible, and then it is drawing."""
    h, w = layout.grid or (1, layout.positions)
    top, bottom = sorted(rng.sample(range(h + 1), 2))
    left, right = sorted(rng.sample(range(w + 1), 2))
    missing = torch.zeros(h, w, dtype=torch.bool)
    missing[top:bottom, left:right] = True
    outside = rng.random() < 0.25 and not bool(missing.all())
    return (~missing if outside else missing).flatten()


def hide_codes(codec: DocumentCodec, sequence: TokenSequence, missing: Tensor) -> Tensor:
    """Bool ``[l]``: the tokens of a complete document that hold the codes at the positions `missing`, bool
    ``[n]``, of its last picture. Raises ValueError without a picture, for another number of positions, or
    for a delayed or sequential pattern, where the codes of one position do not stand together."""
    first = _first_column(sequence.ids)
    begins = {codec.vocabulary.begin(modality): modality for modality in codec.layouts}
    opened = [place for place, token in enumerate(first) if token in begins]
    if not opened:
        raise ValueError("the document has no picture whose codes could be missing.")
    layout = codec.layouts[begins[first[opened[-1]]]]
    if missing.shape != (layout.positions,):
        raise ValueError(
            f"missing codes of {layout.order} are a bool [{layout.positions}], got {list(missing.shape)}."
        )
    if layout.pattern in ("delayed", "sequential") and layout.k > 1:
        raise ValueError(f"codes in the {layout.pattern} pattern cannot be hidden by position; use parallel.")
    each = layout.k if layout.pattern == "interleaved" else 1
    places = code_places(codec, first, opened[-1], begins[first[opened[-1]]])
    hidden = torch.zeros(len(sequence), dtype=torch.bool)
    hidden[torch.tensor(places)] = missing.repeat_interleave(each)[: len(places)]
    return hidden


def check_roles(vocabulary: Vocabulary) -> None:
    """Raise ValueError when the vocabulary lacks a token that documents with holes need."""
    if lacking := [role for role in ROLES if role not in vocabulary.special]:
        raise ValueError(
            f"the vocabulary has no <{lacking[0]}> token (documents with holes need {len(ROLES)} of their "
            "own); train with stages.lm.mixture.infill or .denoise above 0."
        )


def _first_column(ids: Tensor) -> list[int]:
    return (ids if ids.ndim == 1 else ids[:, 0]).tolist()


def _part(sequence: TokenSequence, start: int, stop: int) -> TokenSequence:
    return TokenSequence(
        sequence.ids[start:stop],
        sequence.modality[start:stop],
        sequence.positions[start:stop],
        sequence.loss_mask[start:stop],
    )


def _mark(sequence: TokenSequence, place: int, token: int, *, like: bool = True) -> TokenSequence:
    """A special token, with modality, row and column of what stands at `place` unless it is not `like` it."""
    part = _part(sequence, place, place + 1)
    ids = torch.full_like(part.ids, token)
    if ids.ndim == 2:  # further columns of a special token hold the pad id, as those of <bos> do
        ids[:, 1:] = sequence.ids[0, 1:]
    if not like:
        part = replace(part, modality=torch.zeros_like(part.modality), positions=part.positions * 0)
    return replace(part, ids=ids)


def _supervised(part: TokenSequence) -> TokenSequence:
    return replace(part, loss_mask=torch.ones_like(part.loss_mask))


def _joined(parts: Sequence[TokenSequence]) -> TokenSequence:
    """One after the other, the index counted anew."""
    positions = torch.cat([part.positions for part in parts])
    positions[:, 0] = torch.arange(len(positions))
    return TokenSequence(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.modality for part in parts]),
        positions,
        torch.cat([part.loss_mask for part in parts]),
    )
