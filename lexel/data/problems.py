"""What was wrong with a user's data: counted, named, and skipped or refused."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from lexel.errors import LexelError

OnError = Literal["skip", "raise"]
_NAMED = 3  # how many names the summary line shows; all are in `entries`


@dataclass(frozen=True)
class Problem:
    """kind: a short class such as ``"broken picture"``; name: file, line or sample; reason: one clause."""

    kind: str
    name: str
    reason: str


@dataclass
class Problems:
    """A data set's problems. `on_error`: ``"skip"`` collects them, ``"raise"`` makes the first a
    LexelError."""

    source: str
    on_error: OnError = "skip"
    entries: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_error not in ("skip", "raise"):
            raise LexelError(f"on_error must be 'skip' or 'raise', got {self.on_error!r}.")

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, kind: str, name: str, reason: str) -> None:
        """Take note of one problem; LexelError with ``on_error="raise"``."""
        if self.on_error == "raise":
            raise LexelError(
                f"{kind.capitalize()} in {self.source}: {name}: {reason} (on_error=skip leaves it out)."
            )
        self.entries.append(Problem(kind, name, reason))

    def counts(self) -> dict[str, int]:
        """How many of each kind."""
        return dict(Counter(entry.kind for entry in self.entries))

    def summary(self) -> str:
        """One line with counts and the first names, empty when there was nothing."""
        if not self.entries:
            return ""
        counts = ", ".join(f"{number} {kind}" for kind, number in self.counts().items())
        names = ", ".join(entry.name for entry in self.entries[:_NAMED])
        rest = len(self.entries) - _NAMED
        return f"{self.source}: skipped {counts} ({names}{f' and {rest} more' if rest > 0 else ''})"

    def report(self) -> None:
        """Print the summary line, if there is one, to the standard error stream."""
        if self.entries:
            print(self.summary(), file=sys.stderr)
