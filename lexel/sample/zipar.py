"""ZipAR: the rows of a raster picture are drawn side by side, each some codes behind the one above (He et
al., arXiv 2412.04062). No training and no drafts, but lossy: a code is drawn without having seen the end of
the row above.

Row r + 1 begins as soon as row r has `window` codes; from then on both gain one code per pass, so that a grid
of h rows and w columns takes w + (h - 1) · window passes. Every token has its true place in the raster, for
the positions and for what it sees: of all tokens that are there already, those before it in the raster. A row
that begins before the one above is finished lacks the token it should follow. An auxiliary one is read in
that place, the latest token of the row that is one further up, and forgotten after that pass. (The published
script for LlamaGen draws the first row alone, which takes w - window passes more, and lets tokens attend to
the empty cache of those that are still missing.)

In the cache tokens lie in the order in which they were read. With a window of w or more this is plain
decoding, draw for draw.

r lanes (a guided picture has two) · b pictures · q tokens of a pass · m new tokens of a pass · s cache slots
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lexel.document import Grammar, State
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.sample.generator import Generator, Request, Ticket
from lexel.sample.policy import Token
from lexel.sample.session import Row
from lexel.sample.stream import Lane, Prediction
from lexel.tokenizers.layout import CodeLayout
from lexel.types import TokenBatch

ZIPAR = "zipar"


@dataclass(frozen=True)
class Fed:
    """One token of a pass: the slot of the raster it stands in (-1: the prompt's last token), the slot it
    gives (None: none that is missing), whether it is auxiliary, and then the slot it is copied from (None:
    the end of a row, which is known)."""

    slot: int
    gives: int | None
    auxiliary: bool = False
    copied: int | None = None


def schedule(height: int, width: int, window: int, row_end: bool = False) -> list[list[Fed]]:
    """What every pass reads, in the order of the raster, auxiliary tokens last. row_end: rows end in a token
    of their own. Raises ValueError for a window below 1."""
    if window < 1:
        raise ValueError(f"ZipAR's window must be at least 1 code, got {window}.")
    wide = width + row_end
    ahead = window if window < width else wide
    have = [0] * height
    passes, pending = [], [Fed(-1, 0)]
    while pending:
        passes.append(pending)
        for fed in pending:
            if fed.gives is not None:
                have[fed.gives // wide] += 1
        gained = [fed.gives for fed in pending if fed.gives is not None]
        # What was just drawn is read next and gives what follows it, unless that is there already.
        pending = [
            Fed(slot, slot + 1 if have[(slot + 1) // wide] == (slot + 1) % wide else None)
            for slot in gained
            if slot + 1 < height * wide
        ]
        for row in range(1, height):
            if have[row] == 0 and ahead <= have[row - 1] < wide:
                latest = None if row_end else _latest(row - 1, have, wide)
                pending.append(Fed(row * wide - 1, row * wide, True, latest))
        if all(fed.gives is None for fed in pending):
            break
    return passes


def _latest(row: int, have: Sequence[int], wide: int) -> int:
    """The latest token of the row above `row`, or of `row` itself where it is the first."""
    above = max(row - 1, 0)
    return above * wide + have[above] - 1


@dataclass
class Picture:
    """A picture in the making: its tokens and their log-probabilities by slot."""

    tokens: dict[int, Token] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)


class ZipAR(Generator):
    """A queue that draws pictures this way. Those of one layout are drawn in step, `rows` at a time; others
    wait until they are done. window: codes that a row is ahead of the one below (None: half of the width). A
    row's `gained` counts the codes of each pass."""

    def __init__(self, lm: CausalLM, window: int | None = None, *, rows: int = 64) -> None:
        self.window = window
        super().__init__(lm, rows=rows)

    def _reset(self) -> None:
        super()._reset()
        self.pictures: list[Picture] = []
        self.passes: list[list[Fed]] = []  # those that are still to come
        self.read: list[int] = []  # the slots of the raster in the cache, in its order

    def submit(self, request: Request) -> Ticket:
        """See `Generator.submit`. Raises LexelError for plans other than one picture of raster codes with one
        code per position."""
        _layout(request.policy.grammar)
        return super().submit(request)

    def _admit(self) -> None:
        """Take in pictures of one layout, once those before them are done."""
        if self.tickets or not self._waiting:
            return
        layout = _layout(self._waiting[0].request.policy.grammar)
        alike = [t for t in self._waiting if _layout(t.request.policy.grammar) == layout][: self.most]
        for ticket in alike:
            self._waiting.remove(ticket)
        self.tickets, self.pictures, self.read = alike, [Picture() for _ in alike], []
        assert layout.grid is not None
        height, width = layout.grid
        window = (width + 1) // 2 if self.window is None else self.window
        self.passes = schedule(height, width, window, layout.row_end)
        rows = [ticket.row for ticket in alike]
        slots = max(max(len(r.prompt), len(r.null or ())) + r.remaining() for r in rows) + 2
        self.session.stream.admit([r.prompt for r in rows], [r.null for r in rows], slots)
        self.session.rows = rows

    def _round(self) -> int:
        fed, pictures = self.passes.pop(0), len(self.tickets)
        gives = [one.gives for one in fed]
        self._choose(self._pass(fed), gives)
        for number in reversed(range(len(self.tickets))):
            ticket, row, picture = self.tickets[number], self.tickets[number].row, self.pictures[number]
            before = len(row.ids)
            while len(row.ids) in picture.tokens:  # what the raster holds without a gap
                slot = len(row.ids)
                row.ids.append(picture.tokens[slot].ids)
                row.history.append(picture.tokens[slot].ids[0])
                row.logprobs.append(picture.scores[slot])
            ticket.new.extend(row.ids[before:])
            if not self.passes:
                row.state = row.policy.advance(_state(row, len(row.ids) - 1), row.ids[-1][0])
                self._retire(number)
        return pictures * sum(slot is not None for slot in gives)

    def _retire(self, row: int) -> None:
        self.pictures[row] = self.pictures[-1]
        self.pictures.pop()
        super()._retire(row)

    def _pass(self, fed: list[Fed]) -> Prediction:
        """Read some tokens of every picture; the cache forgets auxiliary ones at once."""
        stream = self.session.stream
        before = stream.cache.host_lengths
        blocks = [
            [self._token(number, row, lane, one) for one in fed]
            for number, row in enumerate(self.session.rows)
            for lane in stream.own(number)
        ]
        batch = TokenBatch(
            ids=torch.tensor([[t.ids[0] for t in block] for block in blocks], device=stream.device),
            modality=torch.tensor([[t.modality for t in block] for block in blocks], device=stream.device),
            positions=torch.tensor([[t.position for t in block] for block in blocks], device=stream.device),
            attention_mask=torch.from_numpy(self._mask([one.slot for one in fed])).to(stream.device),
        )
        hidden, _ = stream.lm.decode(batch, cache=stream.cache)
        self.forwards += 1
        kept = [one.slot for one in fed if not one.auxiliary]
        self.read += kept
        if len(kept) < len(fed):
            stream.cache.crop([length + len(kept) for length in before])
        return self._prediction(hidden)

    def _token(self, number: int, row: Row, lane: Lane, fed: Fed) -> Token:
        if fed.slot < 0:
            return lane.unread[0]
        if fed.auxiliary:
            place = row.policy.place(_state(row, fed.slot))
            known = self.pictures[number].tokens
            ids = (place.choice.start,) if fed.copied is None else known[fed.copied].ids
            token = Token(ids, place.modality, place.position)
        else:
            token = self.pictures[number].tokens[fed.slot]
        index, line, column = token.position
        return Token(token.ids, token.modality, (index + lane.shift, line, column))

    def _mask(self, slots: list[int]) -> np.ndarray:
        """Bool ``[r, q, s]``: prompts, and what is there of the raster up to each token."""
        cache, known = self.session.stream.cache, np.array(self.read + slots)
        mask = np.zeros((cache.batch, len(slots), cache.span(len(slots))), dtype=bool)
        for lane, length in enumerate(cache.host_lengths):
            prompt = length - len(self.read)
            mask[lane, :, :prompt] = True
            mask[lane, :, prompt : prompt + len(known)] = known <= np.array(slots)[:, None]
        return mask

    def _prediction(self, hidden: Tensor) -> Prediction:
        """With every token of the pass as a position."""
        stream, wide = self.session.stream, hidden.shape[1]
        columns, lane = torch.arange(wide, device=hidden.device), 0
        cond, uncond = list[Tensor](), list[Tensor]()
        for guided in stream.guided:
            cond.append(lane * wide + columns)
            uncond.append(cond[-1] + wide if guided else torch.full_like(columns, -1))
            lane += 1 + guided
        return Prediction(stream.lm, hidden, torch.stack(cond), torch.stack(uncond))

    def _choose(self, prediction: Prediction, gives: list[int | None]) -> None:
        """Draw the tokens of the slots that a pass gives, in the order of the raster."""
        session = self.session
        wanted = sorted((slot, place) for place, slot in enumerate(gives) if slot is not None)
        states = [[None if slot is None else _state(row, slot) for slot in gives] for row in session.rows]
        at = [number * len(gives) + place for number in range(len(session.rows)) for _, place in wanted]
        every = session.distributions(prediction, states)
        probs = every[torch.tensor(at, device=every.ids.device)]
        drawn = probs.draw(session.uniforms(len(wanted)).flatten())
        if int(drawn.max()) >= probs.size:
            raise LexelError("the model's logits are not finite; its weights are damaged or overflowed.")
        scores = probs.at(drawn).double().log().reshape(-1, len(wanted)).tolist()
        ids = drawn.reshape(-1, len(wanted)).tolist()
        for number, row in enumerate(session.rows):
            for (slot, _), token, score in zip(wanted, ids[number], scores[number]):
                self.pictures[number].tokens[slot] = row.policy.token(_state(row, slot), (token,))
                self.pictures[number].scores[slot] = score
            row.gained.append(len(wanted))


def _state(row: Row, slot: int) -> State:
    """The grammar's state before a slot of the picture."""
    first = len(row.prompt)
    return State(0, slot, first + slot, row.policy.grammar.plan[0])


def _layout(grammar: Grammar) -> CodeLayout:
    plan = grammar.plan
    layout = grammar.codec.layouts.get(plan[0]) if len(plan) == 1 else None
    if layout is None or layout.grid is None or layout.k != 1:
        written = "" if layout is None else f" as {layout.order}"
        raise LexelError(
            f"decoding={ZIPAR} draws one picture of raster codes, one per position, at the end of a "
            f"document; this one asks for {', '.join(plan)}{written}."
        )
    return layout
