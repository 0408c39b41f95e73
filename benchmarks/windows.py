"""How far to draft: tokens per pass and speed against plain decoding for every strategy and window.

python -m benchmarks.windows --png windows.png

One picture at a time, guided, on one thread, in turns; a ratio is the median over the rounds. The clock is
the process's own CPU time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.common import parser
from benchmarks.plot import plot
from lexel.document import Document, Image, Text
from lexel.models.eagle import Eagle
from lexel.models.grow import widen
from lexel.sample.decode import run
from lexel.sample.generator import Generator
from lexel.sample.pipeline import Pipeline

WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16)
SKIPPED = ("plain", "lookup", "heads", "sjd", "jacobi", "jacobi-gumbel")
TEXTS = ("a red circle left of a blue square", "a large yellow star", "a purple ring above an orange heart")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    made = parser(__doc__.splitlines()[0] if __doc__ else "", "windows")
    made.add_argument("--bundle", help="folder or hub id; without it the shipped one")
    made.add_argument("--factor", type=int, default=1, help="widen the language model so many times")
    made.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "int8"))
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--png", type=Path, metavar="FILE", help="draw the speeds")
    options = made.parse_args(arguments)
    torch.set_num_threads(1)
    rows = race(options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.png:
        names = dict.fromkeys(row["strategy"] for row in rows)
        curves = {
            name: [(row["window"], row["ratio_to_plain"]) for row in rows if row["strategy"] == name]
            for name in names
        }
        plot(options.png, curves, "tokens drafted", "speed against plain decoding")


def race(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per strategy and window."""
    pipe = Pipeline.from_pretrained(options.bundle)
    if options.factor > 1:
        pipe.lm = widen(pipe.lm, options.factor)
        # Heads read features of the width they were trained on.
        pipe.drafters = {k: part for k, part in pipe.drafters.items() if not isinstance(part, Eagle)}
    engine = pipe.pack(options.dtype).engine
    windows = (2, 4) if options.quick else WINDOWS
    names = [n for n in engine.names if n not in SKIPPED and not n.startswith(("pac", "eagle-"))]
    arms: list[tuple[str, int | None]] = [("plain", None), *((n, w) for n in names for w in windows)]
    queues = {arm: Generator(engine.lm, drafter=engine.drafter(*arm), rows=1) for arm in arms}
    seconds: dict[Any, list[float]] = {arm: [] for arm in arms}
    accepted: dict[Any, list[float]] = {arm: [] for arm in arms}
    for number in range(1 + (1 if options.quick else options.rounds)):
        for arm in arms:
            spent, gained = _draw(pipe, queues[arm], options.seed + number)
            if number:  # the first round warms up
                seconds[arm].append(spent)
                accepted[arm].append(gained)
    rows = []
    print(f"{'strategy':20} {'window':>6} {'accepted':>8} {'pictures/s':>10} {'x plain':>7}")
    for arm in arms:
        ratio = median(plain / mine for plain, mine in zip(seconds[arms[0]], seconds[arm]))
        rate = len(TEXTS) / median(seconds[arm])
        row = {"strategy": arm[0], "window": arm[1] or 0, "mean_accepted": fmean(accepted[arm])}
        print(f"{arm[0]:20} {arm[1] or '-':>6} {row['mean_accepted']:8.2f} {rate:10.2f} {ratio:7.2f}")
        if arm[1]:
            rows.append({**row, "pictures_per_second": rate, "ratio_to_plain": ratio})
    return rows


def _draw(pipe: Pipeline, queue: Generator, seed: int) -> tuple[float, float]:
    """CPU seconds for a picture of each text, and tokens per pass."""
    documents: list[Document] = [[Text(text), Image.blank()] for text in TEXTS]
    jobs = pipe._jobs(documents, None, None, None, 256, pipe._random(seed))
    began = time.process_time()
    _, _, stats = run(queue, [queue.submit(job.request) for job in jobs])
    return time.process_time() - began, stats.mean_accepted


if __name__ == "__main__":
    main()
