"""`lexel-train` within this process: what the command does after its arguments are read."""

from __future__ import annotations

from lexel.train.chain import run_chain
from lexel.train.cli import settings_of as resolved
from lexel.train.settings import Run

__all__ = ["resolved", "train"]


def train(*overrides: str) -> Run:
    """``lexel-train OVERRIDES``; the settings as the run left them."""
    run = resolved(*overrides)
    run_chain(run)
    return run
