"""Two processes on a CPU (gloo) train the same network as one process with the same global batch.

The language model reads documents of several sources and lengths: the processes hold different numbers of
targets, and each target counts the same. No noise is drawn.

Tolerance: after 8 steps weights agree to 1e-5 (absolute and relative), because the mean over processes of
gradients adds in another order than one mean.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STAGES = ("tokenizer", "lm", "drafter")
COMMON = [
    f"task.stages=[{','.join(STAGES)}]",
    "debug=fast",
    "output=out",
    "quantizer=fsq",
    "threads=1",
    "+data@sources.words=text",
    "sources.words.root=book.txt",
    "+stages.lm.sources.pairs={source:data,weight:2}",
    "+stages.lm.sources.words={weight:1}",
    *(f"stages.{name}.steps=8" for name in STAGES),
]
TWO = ["trainer.accelerator=cpu", "trainer.backend=gloo", *(f"stages.{name}.batch_size=4" for name in STAGES)]
ATOL = 1e-5


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "book.txt").write_text("".join(f"Line {i} of the book.\n" * (1 + i % 3) for i in range(200)))
    command = [sys.executable, "-m", "lexel.train.cli", *COMMON, *arguments]
    # In a session of its own, so that its child processes can be killed with it.
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _run(folder: Path, *arguments: str) -> str:
    process = _start(folder, *arguments)
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def _kill_after_a_checkpoint(folder: Path, stage: str, *arguments: str) -> None:
    process = _start(folder, *arguments)
    checkpoint = folder / "out" / stage / "checkpoints" / "last.ckpt"
    try:
        while not checkpoint.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _losses(folder: Path, stage: str) -> list[float]:
    from lexel.train.callbacks.metrics_file import MetricsFile

    rows = MetricsFile(folder / "out" / stage / "metrics.csv").rows()
    return [float(row["loss"]) for row in rows if row["loss"]]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    _run(folder)
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does_even_when_killed(
    one_process: Path, tmp_path: Path, strategy: str
) -> None:
    arguments = [f"trainer={strategy}", *TWO]
    _kill_after_a_checkpoint(tmp_path, "lm", *arguments)
    output = _run(tmp_path, *arguments)
    assert "tokenizer: finished before" in output
    assert "lm: continuing" in output or "lm: finished before" in output
    for stage in STAGES:
        one, two = (load_file(p / "out" / stage / "model.safetensors") for p in (one_process, tmp_path))
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(
                two[key], value, rtol=ATOL, atol=ATOL, msg=lambda m, k=key: f"{k}: {m}"
            )
        assert len(_losses(tmp_path, stage)) == 8
        assert _losses(tmp_path, stage) == pytest.approx(_losses(one_process, stage), abs=ATOL)
    assert json.loads((tmp_path / "out" / "lm" / "done.json").read_text())["settings"]["processes"] == 2


def test_codebooks_of_two_processes_stay_the_same(one_process: Path, tmp_path: Path) -> None:
    """An EMA codebook is a buffer that every process updates from its own pictures: they must agree."""
    arguments = ["quantizer=vq", "quantizer.dead_below=0", "task.stages=[tokenizer]"]
    _run(tmp_path / "one", *arguments)
    _run(tmp_path / "two", *arguments, "trainer=ddp", *TWO)
    one, two = (load_file(tmp_path / name / "out/tokenizer/model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=ATOL, atol=ATOL, msg=lambda m, k=key: f"{k}: {m}")


def test_a_discriminator_trains_on_two_processes(tmp_path: Path) -> None:
    arguments = [
        "task.stages=[tokenizer]",
        "objective/tokenizer=gan",
        "objective.tokenizer.adversarial_start=2",
    ]
    output = _run(tmp_path, *arguments, "trainer=ddp", *TWO)
    assert "tokenizer 8/8" in output
    refused = _start(tmp_path / "sharded", *arguments, "trainer=fsdp2", *TWO)
    assert "trainer=ddp" in refused.communicate(timeout=120)[0]
    assert refused.returncode == 2


def test_sharded_in_half_precision_with_recomputed_blocks(one_process: Path, tmp_path: Path) -> None:
    """Parameters are gathered in bfloat16 and blocks computed twice: losses stay near float32's (bfloat16 has
    three digits), and the exported weights are float32."""
    parts = ["task.stages=[lm]", f"parts.tokenizer={one_process}/out/tokenizer"]
    half = ["stages.lm.precision=bf16-mixed", "stages.lm.recompute=true"]
    _run(tmp_path, *parts, *half, "trainer=fsdp2", *TWO)
    assert _losses(tmp_path, "lm") == pytest.approx(_losses(one_process, "lm"), rel=0.01)
    weights = load_file(tmp_path / "out/lm/model.safetensors")
    exact = load_file(one_process / "out/lm/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    for key, value in exact.items():
        torch.testing.assert_close(weights[key], value, rtol=0.05, atol=0.01)
