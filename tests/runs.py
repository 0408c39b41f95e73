"""`lexel-train` within this process: what the command does after its arguments are read."""

from __future__ import annotations

from hydra import compose, initialize_config_module

import lexel.train.cli
from lexel.train.chain import run_chain
from lexel.train.settings import Run


def resolved(*overrides: str) -> Run:
    """The settings of ``lexel-train OVERRIDES``."""
    with initialize_config_module("lexel.conf", version_base="1.3"):
        return lexel.train.cli.resolve(compose("train", overrides=list(overrides)))


def train(*overrides: str) -> Run:
    """``lexel-train OVERRIDES``; the settings as the run left them."""
    run = resolved(*overrides)
    run_chain(run)
    return run
