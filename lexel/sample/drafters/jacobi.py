"""Jacobi decoding: no draft model at all. The target re-reads its own window until it stops changing.

Each pass redraws every window position from the target's distribution given the current, possibly wrong,
window; the distributions of the previous pass are the draft. Speculative Jacobi decoding (Teng et al., arXiv
2410.01699) redraws independently; coupling successive draws (MC-SJD) makes them agree far more often and is
as exact, because each draw is still distributed as the target says.

b sequences · g window positions (padded) · k columns
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.document import State
from lexel.sample.acceptance import gumbel, maximal
from lexel.sample.drafters.base import Drafter, replace_by_last
from lexel.sample.logits import Distribution
from lexel.sample.policy import Place, Token
from lexel.sample.session import Outcome, Proposal, Row, Session
from lexel.sample.stream import Prediction, Tree

Init = Literal["random", "repeat"]
Coupling = Literal["independent", "maximal", "gumbel"]
# A learned guess of one column at a place, given the tokens drafted before it: one distribution, None for no
# idea.
Guess = Callable[[Row, Place, list[Token], int], Distribution | None]


@dataclass
class Window:
    """What stands in the window of one row: the ids, and where the last pass's distributions of them lie.
    noise: per position of the document and column the uniforms of Gumbel coupling."""

    ids: list[tuple[int, ...]] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    noise: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)


class JacobiDrafter(Drafter):
    """window: positions read at once. init: how a position enters it, column by column: "random" (uniform
    among the allowed ids), "repeat" (the id to its left when allowed, `repeat_horizon` of the released code)
    or a learned `Guess` (uniform where it has no idea). coupling: how a position is redrawn: "independent",
    "maximal" (kept as often as the overlap of old and new distribution allows) or "gumbel" (the same noise in
    every pass)."""

    def __init__(
        self, window: int = 16, init: Init | Guess = "random", coupling: Coupling = "maximal"
    ) -> None:
        super().__init__(window)
        if not callable(init) and init not in ("random", "repeat"):
            raise ValueError(f"init must be random, repeat or a function, got {init!r}.")
        if coupling not in ("independent", "maximal", "gumbel"):
            raise ValueError(f"coupling must be independent, maximal or gumbel, got {coupling!r}.")
        self.init, self.coupling = init, coupling
        self._windows: list[Window] = []
        self._last: tuple[Distribution, ...] = ()
        self._books: dict[tuple[int, int], tuple[Tensor, frozenset[int]]] = {}

    def admit(self, session: Session, rows: list[Row], prompts: Prediction | None) -> None:
        """Begin with empty windows."""
        if len(session.rows) == len(rows):
            self._windows, self._last, self._books = [], (), {}
        self._windows += [Window() for _ in rows]

    def drop(self, row: int) -> None:
        """See `Drafter.drop`."""
        replace_by_last(self._windows, row)

    def propose(self, session: Session) -> Proposal:
        """See `Drafter.propose`."""
        return Proposal(*self._lines(session))

    def _lines(self, session: Session) -> tuple[list[Tree], tuple[Distribution, ...] | None]:
        """Each row's window, filled up with fresh tokens, as a chain, and per column the ``b · g``
        distributions they were drawn from (None when there are none). A window token that no longer fits the
        grammar ends its chain: it is surely rejected, and must be seen to be, for the residual to be
        right."""
        fresh: list[tuple[Distribution, ...]] = []
        old = 0 if not self._last else len(self._last[0])
        trees, sources = [], []
        for row, window in zip(session.rows, self._windows):
            tree, lines = self._line(session, row, window, fresh, old)
            trees.append(tree)
            sources.append(lines)
        longest = max(len(line) for line in sources)
        if not longest:
            return trees, None
        padded = [line + [line[0] if line else 0] * (longest - len(line)) for line in sources]
        index = torch.tensor(padded, device=session.device).flatten()
        columns = range(session.columns)
        every = [[*(self._last[c : c + 1]), *(one[c] for one in fresh)] for c in columns]
        return trees, tuple(Distribution.cat(parts)[index] for parts in every)

    def _line(
        self,
        session: Session,
        row: Row,
        window: Window,
        fresh: list[tuple[Distribution, ...]],
        old: int,
    ) -> tuple[Tree, list[int]]:
        """One row's window as a chain, and the numbers of the distributions it was drawn from; those of
        tokens that enter it are appended to `fresh`."""
        states, tokens, sources = [row.state], list[Token](), list[int]()
        for place in range(self.limit(row)):
            state = states[-1]
            if row.policy.grammar.done(state):
                break
            if place < len(window.ids):
                ids, source = window.ids[place], window.sources[place]
            else:
                ids, probs = self._fresh(session, row, state, tokens)
                source = old + len(fresh)
                fresh.append(probs)
            tokens.append(row.policy.token(state, ids))
            sources.append(source)
            after = row.advance(state, ids[0])
            states.append(after or state)  # no state: never reached, the token before it is rejected
            if after is None:
                break
        return Tree.line(tokens, states), sources

    def _fresh(
        self, session: Session, row: Row, state: State, tokens: list[Token]
    ) -> tuple[tuple[int, ...], tuple[Distribution, ...]]:
        """A token that enters the window: its ids, and per column the distribution it was drawn from."""
        place = row.policy.place(state)
        both = [self._fresh_column(session, row, place, tokens, c) for c in range(session.columns)]
        return tuple(token for token, _ in both), tuple(probs for _, probs in both)

    def _fresh_column(
        self, session: Session, row: Row, place: Place, tokens: list[Token], column: int
    ) -> tuple[int, Distribution]:
        """The id of one column, and the distribution it was drawn from."""
        size = session.vocabulary_size
        probs = self.init(row, place, tokens, column) if callable(self.init) else None
        if probs is not None:
            uniform = torch.tensor([row.random.random()], dtype=torch.float64, device=session.device)
            return int(probs.draw(uniform)), probs
        ids, members = self._allowed(session, row, place, column)
        left = _left(row, tokens, column)
        if self.init == "repeat" and left in members:
            return left, Distribution.certain(torch.tensor([left], device=session.device), size)
        token = int(ids[int(row.random.random() * len(ids))])
        even = torch.full((1, len(ids)), 1 / len(ids), device=ids.device)
        return token, Distribution(ids[None], even, size)

    def _allowed(
        self, session: Session, row: Row, place: Place, column: int
    ) -> tuple[Tensor, frozenset[int]]:
        """The ids that may stand in a column, as a tensor and as a set; padding where there is no code."""
        if column == 0:
            return place.choice.ids, place.choice.members
        vocabulary = row.policy.grammar.codec.vocabulary
        book = place.books[column] if place.books else None
        key = (place.modality, -1 if book is None else book)
        if key not in self._books:
            block = torch.tensor([vocabulary.special["pad"]])
            if book is not None:
                block = vocabulary.block(vocabulary.modalities[place.modality], book)
            self._books[key] = block.to(session.device), frozenset(block.tolist())
        return self._books[key]

    def observe(self, session: Session, outcome: Outcome) -> None:
        """Redraw the window from this pass's distributions and slide it past the committed tokens."""
        target = (outcome.target.first, *outcome.target.further)
        rows = len(session.rows)
        positions = len(target[0]) // rows
        nodes = positions - 1
        drawn = self._redrawn(session, outcome, positions)
        # Of a position after the last node only the first column's distribution is known.
        beyond = 1 if session.columns == 1 else 0
        self._last = (target[0],) if session.columns == 1 else _by_node(target, rows)
        per_row = positions if session.columns == 1 else nodes
        for number, (window, tree) in enumerate(zip(self._windows, outcome.proposal.trees)):
            gained, end = len(outcome.committed[number]), len(tree.tokens) + beyond
            if end == len(tree.tokens) + 1 and session.rows[number].policy.grammar.done(tree.states[-1]):
                end -= 1
            places = range(gained, end)
            window.ids = [tuple(drawn[number][j]) for j in places]
            window.sources = [number * per_row + j for j in places]

    def _redrawn(self, session: Session, outcome: Outcome, positions: int) -> list[list[list[int]]]:
        """New ids ``[b, g + 1, k]`` (k > 1: the last position is meaningless past column 0)."""
        rows, columns = len(session.rows), []
        for column, probs in enumerate((outcome.target.first, *outcome.target.further)):
            fresh = self._coupled(session, outcome, probs, column).reshape(rows, -1)
            columns.append(F.pad(fresh, (0, positions - fresh.shape[1])))
        return torch.stack(columns, dim=-1).tolist()

    def _coupled(self, session: Session, outcome: Outcome, probs: Distribution, column: int) -> Tensor:
        """New ids long ``[b · positions]`` of one column."""
        rows, draft, kept = len(session.rows), outcome.draft, outcome.verdict.kept
        wide = len(probs) // rows
        if self.coupling == "gumbel":
            return gumbel(probs, self._noise(session, outcome, wide, column))
        uniforms = session.uniforms(wide).flatten()
        # A token of several codes is kept or not as a whole, which says nothing of a single code.
        if self.coupling == "independent" or session.columns > 1 or kept is None or draft.probs is None:
            return probs.draw(uniforms)
        # Rows end at different places, and what follows a row's last node was never drafted.
        drafted = torch.arange(wide, device=uniforms.device) < draft.lengths[:, None]
        node, drafted = drafted[:, :-1].flatten(), drafted.flatten()
        old = draft.probs[0][node], draft.ids[..., 0].flatten()[node], kept.flatten()[node]
        fresh = torch.empty(len(probs), dtype=torch.long, device=uniforms.device)
        fresh[drafted] = maximal(probs[drafted], *old, uniforms[drafted])
        fresh[~drafted] = probs[~drafted].draw(uniforms[~drafted])
        return fresh

    def _noise(self, session: Session, outcome: Outcome, wide: int, column: int) -> Tensor:
        """Uniforms ``[b · wide, v]`` that stay with a position of the document (and column)."""
        size = session.vocabulary_size
        noise = np.full((len(session.rows), wide, size), 0.5)
        for number, (row, window) in enumerate(zip(session.rows, self._windows)):
            here = row.state.index  # what lies before is certain, its noise is used up
            window.noise = {key: value for key, value in window.noise.items() if key[0] >= here}
            tree = outcome.proposal.trees[number]
            # What follows the last node has a first column only.
            for j, state in enumerate(tree.states[: len(tree.tokens) + (column == 0)]):
                key = state.index, column
                if state.index >= here:
                    if key not in window.noise:
                        window.noise[key] = 1 - row.random.random(size)  # in (0, 1]
                    noise[number, j] = window.noise[key]
        return torch.from_numpy(noise).to(session.device).flatten(0, 1)


def _left(row: Row, tokens: list[Token], column: int) -> int:
    """The id in a column of the token before; -1 where that is not known (a column of the prompt)."""
    if tokens:
        return tokens[-1].ids[column]
    if row.ids:
        return row.ids[-1][column]
    return row.history[-1] if column == 0 else -1


def _by_node(target: tuple[Distribution, ...], rows: int) -> tuple[Distribution, ...]:
    """Per column the distributions of the drafted positions only, ``b · g`` each."""
    positions = len(target[0]) // rows
    index: Any = torch.arange(rows * positions, device=target[0].ids.device)
    index = index.reshape(rows, positions)[:, : positions - 1].flatten()
    return (target[0][index], *target[1:])
