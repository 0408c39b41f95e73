"""Drafting one token after the other with a cheaper network.

* `NestedDrafter`: the target itself with a narrow feed-forward slice (MatFormer, arXiv 2310.07707). It shares
  the target's attention cache: its provisional keys and values are overwritten by the verifying pass.
* `ModelDrafter`: a separate small model of the same vocabulary, with its own cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.sample.columns import Cell, Columns
from lexel.sample.drafters.base import Drafter
from lexel.sample.logits import Distribution
from lexel.sample.session import Outcome, Proposal, Row, Session
from lexel.sample.stream import Prediction, Stream, Tree

# The tokens drafted since the last call, per row → the pass that says what follows them.
Reader = Callable[[list[Tree]], Prediction]


class ChainDrafter(Drafter):
    """Draws from a network read through a stream: an `own` one, or the target's."""

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.own: Stream | None = None

    def observe(self, session: Session, outcome: Outcome) -> None:
        """Keep in an own cache what was accepted."""
        if self.own is not None:
            self.own.commit(outcome.committed)

    def drop(self, row: int) -> None:
        """See `Drafter.drop`."""
        if self.own is not None:
            self.own.drop(row)

    def _reader(self, stream: Stream, width: float | None) -> Reader:
        """Passes of a network through its stream."""

        def read(fed: list[Tree]) -> Prediction:
            self.forwards += 1
            return _last(stream.forward(fed, width=width))

        return read

    def _chain(self, session: Session, read: Reader, able: Sequence[bool] | None = None) -> Proposal:
        """One token after the other, each drawn from what `read` says given those before it. able: which rows
        can be drafted for (None: all)."""
        trees = [Tree.line([], [row.state]) for row in session.rows]
        limits = [self.limit(row) for row in session.rows]
        if able is not None:
            limits = [limit if can else 0 for limit, can in zip(limits, able)]
        fed = [Tree.line([], [row.state]) for row in session.rows]
        steps: list[tuple[Distribution, ...]] = []
        columns = Columns(session) if session.columns > 1 else None
        for step in range(max(limits)):
            states = [tree.states[-1] for tree in trees]
            active = [
                step < limit and len(tree.tokens) == step and not row.policy.grammar.done(tree.states[-1])
                for row, limit, tree in zip(session.rows, limits, trees)
            ]
            if not any(active):
                break
            prediction = read(fed)
            now = [[state if use else None] for state, use in zip(states, active)]
            contexts = session.contexts(trees)
            ends = None if contexts is None else [line[-1:] for line in contexts]
            probs = session.distributions(prediction, now, ends)
            drafting = [row for row, use in enumerate(active) if use]
            first = probs.draw(session.uniforms(1, drafting)[:, 0]).tolist()
            ids: list[tuple[int, ...]] = [(token,) for token in first]
            steps.append((probs,))
            if columns is not None:
                steps[-1] = (probs, *self._further(session, columns, prediction, states, active, ids))
            fed = [Tree.line([], [state]) for state in states]
            for number, row in enumerate(session.rows):
                if active[number]:
                    token = row.policy.token(states[number], ids[number])
                    trees[number].tokens.append(token)
                    trees[number].states.append(row.policy.advance(states[number], token.ids[0]))
                    fed[number] = Tree.line([token], trees[number].states[-2:])
        chains = [Tree.line(tree.tokens, tree.states) for tree in trees]
        return Proposal(chains, _by_row(steps, len(trees)) if steps else None)

    @staticmethod
    def _further(
        session: Session,
        columns: Columns,
        prediction: Prediction,
        states: list,
        active: list[bool],
        ids: list[tuple[int, ...]],
    ) -> list[Distribution]:
        """Complete `ids` in place; the distributions of columns 1..k-1, one row per sequence."""
        cells, rows = [], [row for row, use in enumerate(active) if use]
        for row in rows:
            place = session.rows[row].policy.place(states[row])
            cells.append(Cell(row, 0, place, ids[row]))
        done, drawn = columns.complete(prediction, cells)
        for row, whole in zip(rows, done):
            ids[row] = whole
        return [
            session.arranged([line[column] for line in drawn], rows, len(active))
            for column in range(session.columns - 1)
        ]


def _last(prediction: Prediction) -> Prediction:
    return replace(prediction, cond=prediction.cond[:, -1:], uncond=prediction.uncond[:, -1:])


def _by_row(steps: list[tuple[Distribution, ...]], rows: int) -> tuple[Distribution, ...]:
    """Distributions by step and row → ``b · g`` by row and step, for each column."""
    joined = (Distribution.cat([step[column] for step in steps]) for column in range(len(steps[0])))
    order = torch.arange(len(steps) * rows).reshape(len(steps), rows).t().flatten()
    return tuple(probs[order.to(probs.ids.device)] for probs in joined)


class NestedDrafter(ChainDrafter):
    """Drafts with the target's own narrow feed-forward slice.

    width: one of the model's `ffn_widths` below 1; window: tokens per round. Raises LexelError when the model
    was not built with that width."""

    def __init__(self, lm: CausalLM, width: float | None = None, window: int = 4) -> None:
        super().__init__(window)
        widths = lm.config.ffn_widths
        if width is None:
            width = widths[0]
        if width not in widths or width >= 1:
            raise LexelError(
                f"the model has no nested width {width} to draft with; it has {', '.join(map(str, widths))}."
            )
        self.width = width

    def propose(self, session: Session) -> Proposal:
        """See `Drafter.propose`."""
        stream = session.stream
        mark, counted = stream.mark(), stream.forwards
        proposal = self._chain(session, self._reader(stream, self.width))
        stream.rewind(mark)
        stream.forwards = counted  # they are counted as drafts
        return proposal


class ModelDrafter(ChainDrafter):
    """Drafts with a separate small model. guided: whether it reads the unconditional rows too; without them
    a draft is cheaper (0.67 for 0.80 plain steps where it was measured) and as good. Raises LexelError when
    its vocabulary has another size."""

    def __init__(self, lm: CausalLM, window: int = 4, *, guided: bool = False) -> None:
        super().__init__(window)
        self.lm, self.guided = lm, guided
        self.own = Stream(lm)

    def admit(self, session: Session, rows: list[Row], prompts: Prediction | None) -> None:
        """Read the prompts with the small model."""
        theirs, own = session.stream.lm.config.vocab_size, self.lm.config.vocab_size
        if theirs != own:
            raise LexelError(f"the drafting model has {own} ids, the target {theirs}; they must be the same.")
        if self.own is None or len(session.rows) == len(rows):
            self.own = Stream(self.lm)
        nulls = [row.null if self.guided else None for row in rows]
        longest = max(max(len(row.prompt), len(n or ())) + row.remaining() for row, n in zip(rows, nulls))
        self.own.admit([row.prompt for row in rows], nulls, longest + self.window + 2)

    def propose(self, session: Session) -> Proposal:
        """See `Drafter.propose`."""
        assert self.own is not None
        return self._chain(session, self._reader(self.own, None))
