"""Prompt lookup: a text is drafted by copying what followed its last tokens before (`lexel.sample.lookup`).

Proposals are chosen without chance, so that a copied token stands with the target's own probability of it.
Pictures are left to plain steps: their codes hardly ever repeat in order.
"""

from __future__ import annotations

from lexel.sample.drafters.base import Drafter
from lexel.sample.lookup import continuation
from lexel.sample.policy import Token
from lexel.sample.session import Proposal, Row, Session
from lexel.sample.stream import Tree

TEXT = 0
"""Number of the modality of text."""


class LookupDrafter(Drafter):
    """window: tokens copied at most; longest: how many of the last tokens are looked up at most."""

    def __init__(self, window: int = 8, longest: int = 4) -> None:
        super().__init__(window)
        if longest < 1:
            raise ValueError(f"an ending to look up has at least 1 token, got longest={longest}.")
        self.longest = longest

    def propose(self, session: Session) -> Proposal:
        """See `Drafter.propose`."""
        return Proposal([self._copied(row, session.columns) for row in session.rows])

    def _copied(self, row: Row, columns: int) -> Tree:
        """What may follow, as far as the grammar stays in a text."""
        tree = Tree.line([], [row.state])
        padding = (row.policy.grammar.codec.vocabulary.special["pad"],) * (columns - 1)
        if row.state.modality != "text":
            return tree
        for token in continuation(row.history, self.limit(row), self.longest):
            state = tree.states[-1]
            if row.policy.grammar.done(state) or row.policy.place(state).modality != TEXT:
                break
            after = row.advance(state, token)
            if after is None:
                break
            tree.tokens.append(Token((token, *padding), TEXT, row.policy.grammar.position(state)))
            tree.states.append(after)
        return Tree.line(tree.tokens, tree.states)
