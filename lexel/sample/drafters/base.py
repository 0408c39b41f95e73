"""What every drafter is: it proposes, the target verifies, and it learns what became of the proposal."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lexel.sample.session import Outcome, Proposal, Row, Session
from lexel.sample.stream import Prediction, Tree


class Drafter(ABC):
    """Proposes tokens behind each sequence's last known one. `forwards` counts its network calls.

    window: depth of what it proposes; reach: the most tokens of one proposal per row (more than the window
    for trees). A drafter serves one `Generator`; rows come and go in the session's order."""

    layers: tuple[int, ...] = ()
    """Blocks of the target whose inputs it wants to see."""

    def __init__(self, window: int, reach: int | None = None) -> None:
        if window < 1:
            raise ValueError(f"a drafter's window must be at least 1 token, got {window}.")
        self.window, self.reach = window, reach or window
        self.forwards = 0

    def admit(self, session: Session, rows: list[Row], prompts: Prediction | None) -> None:  # noqa: B027
        """New rows were appended to the session; prompts: the target's pass over all but the last token of
        their prompts, lane by lane (None: those are single tokens). When they are all rows of the session,
        this is a new beginning: what was there before is forgotten, for a round that failed drops no row."""

    @abstractmethod
    def propose(self, session: Session) -> Proposal:
        """Draft a continuation of each row; must leave the target's stream as it was."""

    def observe(self, session: Session, outcome: Outcome) -> None:  # noqa: B027
        """Learn what became of the proposal; rows stand where they will go on, finished ones included."""

    def drop(self, row: int) -> None:  # noqa: B027
        """A row leaves; the last one takes its place."""

    def limit(self, row: Row) -> int:
        """Tokens worth drafting: the last remaining one comes with the verifying pass for free."""
        return min(self.window, row.remaining() - 1)


def nothing(session: Session) -> Proposal:
    """No draft at all: the round is a plain step."""
    return Proposal([Tree.line([], [row.state]) for row in session.rows])


def replace_by_last(items: list, index: int) -> None:
    """Remove an item of a list; the last takes its place."""
    items[index] = items[-1]
    items.pop()
