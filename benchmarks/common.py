"""What the benchmark commands share: options, pictures, training, results that are kept, tables.

Networks are trained by `lexel.train` itself, as ``lexel-train task=tokenizer`` does it, so an interrupted
training continues at its last checkpoint and a finished one is reused; `Kept` does the same for results.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lexel.data.example import Example, stack_pixels
from lexel.data.folder import FolderConfig
from lexel.data.shapes import ShapesConfig
from lexel.data.shards import ShardsConfig
from lexel.errors import LexelError
from lexel.tokenizers import from_pretrained
from lexel.tokenizers.base import Tokenizer
from lexel.train.chain import run_chain
from lexel.train.objectives.tokenizer import TokenizerObjectiveConfig
from lexel.train.record import DONE_FILE, StageRecord, plain, read_json
from lexel.train.settings import Run, Stages, Task, TokenizerStage, TrainerSettings

HELD_OUT = 0.1
"""Share of a folder of pictures without splits of its own that is never trained on."""


def parser(description: str, name: str, *, steps: int = 0, size: int = 32) -> argparse.ArgumentParser:
    """The options that every command has; without `steps` those of training are left out."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--size", type=int, default=size, help="side of the pictures in pixels")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    made.add_argument("--quick", action="store_true", help="seconds instead of minutes; figures mean nothing")
    if steps:
        made.add_argument("--data", default="../shared/data/cifar", help="pictures or shards, or: shapes")
        made.add_argument("--steps", type=int, default=steps, help="optimizer steps of each tokenizer")
        made.add_argument("--batch", type=int, default=16, help="pictures per step")
        made.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
        made.add_argument("--count", type=int, default=1000, help="held-out pictures at most")
        made.add_argument("--features", metavar="DIR_OR_ID", help="a vision model of transformers")
        made.add_argument("--feature-steps", type=int, default=600, help="of the network trained without it")
        made.add_argument(
            "--out", type=Path, default=Path("outputs/benchmarks") / name, help="what is finished stays here"
        )
    return made


def shrink(options: argparse.Namespace) -> None:
    """What --quick means for training."""
    if options.quick:
        options.steps, options.feature_steps, options.batch, options.count = 2, 2, 4, 8


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    import os

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        processor = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), processor)
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def source(data: str, size: int) -> ShapesConfig | ShardsConfig | FolderConfig:
    """The pictures that --data names: `shapes` (procedural, no files), a folder of tars, or of pictures."""
    if data == "shapes":
        return ShapesConfig(size=size)
    if any(Path(data).expanduser().rglob("*.tar")):
        return ShardsConfig(data, size=size, validation_share=HELD_OUT, verify=False)
    return FolderConfig(data, size=size, validation_share=HELD_OUT, verify=False)


def held_out(data: Any, count: int) -> Tensor:
    """The first `count` pictures that are never trained on, float ``[m, 3, h, w]``. LexelError when there is
    none."""
    examples = first(data.build("validation"), count)
    if not examples:
        raise LexelError("there are no held-out pictures.")
    return stack_pixels(examples)


def first(dataset: Any, count: int) -> list[Example]:
    """The first `count` examples."""
    return [dataset[index] for index in range(min(count, len(dataset)))]


@dataclass(frozen=True)
class Recipe:
    """How every tokenizer of a run is trained: same pictures, steps, batches and learning rate."""

    data: Any
    steps: int
    batch: int
    seed: int
    device: str
    lr: float

    def train(
        self, folder: Path, config: Any, objective: TokenizerObjectiveConfig | None = None
    ) -> tuple[Tokenizer, float]:
        """The trained tokenizer (in eval mode, on the device) and the seconds its training took; continued
        or reused where `folder` holds it."""
        stage = TokenizerStage(
            steps=self.steps,
            batch_size=self.batch,
            lr=self.lr,
            warmup=min(50, self.steps),
            optimizer=partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.05),
            ema=0.99,
            validate_every=0,
            sample_every=0,
        )
        run = Run(
            task=Task(["tokenizer"]),
            output=str(folder),
            seed=self.seed,
            data=self.data,
            tokenizer=config,
            objective={"tokenizer": objective or self.objective},
            stages=Stages(tokenizer=stage),
            trainer=TrainerSettings("gpu" if self.device.startswith("cuda") else "cpu"),
        )
        run_chain(run)
        trained = folder / "tokenizer"
        done = read_json(trained / DONE_FILE) or {}
        return from_pretrained(trained).to(self.device), float(done.get("seconds", 0))

    @property
    def objective(self) -> TokenizerObjectiveConfig:
        """Squared and absolute error; the first steps do not round."""
        return TokenizerObjectiveConfig(l1=0.5, l2=1.0, unrounded_steps=min(100, self.steps // 4))


@dataclass(frozen=True)
class Kept:
    """Results in ``folder/<name>/result``, measured again only when their settings change."""

    folder: Path

    def get(
        self, name: str, settings: Mapping[str, Any], work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """`work()`, or what it returned when it was called with these settings before."""
        record = StageRecord(name, self.folder / name / "result", plain(settings))
        done = record.finished()
        if done is None:
            record.begin(keep_previous=False)
            record.finish(result=work())
            done = cast("dict[str, Any]", record.finished())
        return cast("dict[str, Any]", done["result"])


def parameters(network: torch.nn.Module) -> int:
    """Numbers that a tokenizer's user needs: trained weights and stored codebooks."""
    codebooks = [
        value
        for name, value in network.named_buffers()
        if name.endswith("_codebook.embed") or name.endswith("codebook.weight")
    ]
    return sum(value.numel() for value in [*network.parameters(), *codebooks])


def batches(pixels: Tensor, size: int = 64) -> tuple[Tensor, ...]:
    """``[m, 3, h, w]`` in pieces."""
    return pixels.split(size)


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column is left-aligned, floats keep their given form."""
    cells = [[str(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        padded = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def report(options: argparse.Namespace, results: Mapping[str, Any], *tables: str) -> None:
    """Print the machine and the tables; write everything to --json."""
    facts = machine(options.device)
    print("\n" + ", ".join(f"{key} {value}" for key, value in facts.items()))
    for text in tables:
        print(f"\n{text}")
    if options.json:
        content = {"machine": facts, "options": plain(vars(options)), **results}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Call a command's `main`; a user's mistake is one sentence, not a traceback."""
    try:
        main(None)
    except (LexelError, ValueError) as error:
        sys.exit(f"error: {error}")
