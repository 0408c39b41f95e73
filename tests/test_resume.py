"""Killed at any step and started again = never interrupted, bit by bit (CPU)."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from training_fakes import ToyModule, toy_training

from lexel.errors import LexelError
from lexel.train.callbacks.metrics_file import MetricsFile
from lexel.train.fit import fit
from lexel.train.settings import LoggerSettings, TrainerSettings


class _Crash(Callback):
    """Dies after the given batch, before its checkpoint is written."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.consumed == self.batch:
            raise RuntimeError("crash")


def _train(folder: Path, crash: int | None = None, **changes: Any) -> ToyModule:
    module, batches = toy_training(**changes)
    callbacks: list[Callback] = [] if crash is None else [_Crash(crash)]
    fit("toy", module, batches, folder, TrainerSettings(), LoggerSettings(), callbacks)
    return module


def _equal(one: ToyModule, two: ToyModule) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> ToyModule:
    return _train(tmp_path_factory.mktemp("whole"))


# Checkpoints lie after batches 10 and 20 (two batches a step, every five steps); validation after 6, 12, 18.
@pytest.mark.parametrize("crashes", [(5,), (10,), (11,), (12,), (21,), (24,), (11, 13, 23)], ids=str)
def test_a_crash_after_any_batch_changes_nothing(
    tmp_path: Path, uninterrupted: ToyModule, crashes: tuple[int, ...]
) -> None:
    for batch in crashes:
        with pytest.raises(RuntimeError, match="crash"):
            _train(tmp_path, crash=batch)
    resumed = _train(tmp_path)
    assert resumed.consumed == uninterrupted.consumed
    assert _equal(resumed, uninterrupted)
    steps = [int(row["step"]) for row in MetricsFile(tmp_path / "metrics.csv").rows() if row["loss"]]
    assert steps == sorted(set(steps)) == [2, 4, 6, 8, 10, 12]


def test_another_seed_gives_other_weights(tmp_path: Path, uninterrupted: ToyModule) -> None:
    module, batches = toy_training()
    module.seed = batches.seed = 6
    fit("toy", module, batches, tmp_path, TrainerSettings(), LoggerSettings())
    assert not _equal(module, uninterrupted)


def test_a_finished_run_started_again_takes_no_step(tmp_path: Path, uninterrupted: ToyModule) -> None:
    _train(tmp_path)
    again = _train(tmp_path)
    assert again.consumed == uninterrupted.consumed
    assert _equal(again, uninterrupted)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(LexelError, match=r"last\.ckpt cannot be read"):
        _train(tmp_path)


# The command, killed from outside

ARGUMENTS = [
    "task.stages=[tokenizer,lm]",
    "debug=fast",
    "lm=debug",
    "objective.tokenizer.unrounded_steps=7",
    "quantizer.codebook_size=64",
    "threads=1",
    "lm.dropout=0.1",
    "lm.ffn_widths=[0.5,1.0]",
    "stages.lm.narrow=0.5",
]
for _stage in ("tokenizer", "lm"):
    ARGUMENTS += [f"stages.{_stage}.steps=40", f"stages.{_stage}.checkpoint_every=7"]


def _start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lexel.train.cli", *ARGUMENTS, *more, "output=out"]
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background jobs ignore interrupts, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _finish(folder: Path) -> str:
    process = _start(folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def _kill_after_a_checkpoint(folder: Path, stage: str) -> None:
    """Start the run, wait for the first checkpoint of the stage and a moment more, and kill it."""
    process = _start(folder)
    checkpoint = folder / "out" / stage / "checkpoints" / "last.ckpt"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "out" / stage / "done.json").exists()


@pytest.mark.slow
def test_an_interrupted_command_says_how_to_continue(tmp_path: Path) -> None:
    process = _start(tmp_path, "stages.tokenizer.steps=100000")
    while not (tmp_path / "out" / "tokenizer" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "interrupted; the same command continues" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_killed_commands_end_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    _finish(tmp_path / "whole")
    for stage in ("tokenizer", "lm"):
        _kill_after_a_checkpoint(tmp_path / "killed", stage)
    output = _finish(tmp_path / "killed")
    assert "tokenizer: finished before, reused" in output
    assert "lm: continuing" in output
    for stage in ("tokenizer", "lm"):
        whole, killed = (tmp_path / name / "out" / stage for name in ("whole", "killed"))
        assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
        states = [torch.load(p / "checkpoints" / "last.ckpt", weights_only=True) for p in (whole, killed)]
        for key, value in states[0]["state_dict"].items():
            assert torch.equal(value, states[1]["state_dict"][key]), key
