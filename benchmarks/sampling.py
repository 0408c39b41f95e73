"""Every way to sample against the plain loop, transformers' `generate()` and the memory floor.

python -m benchmarks.sampling --json sampling.json

One language model per run: the shipped bundle's, widened eight times without training (exactly its
distributions at a size that is bound by memory, `lexel.models.grow`); --factor 1 is the bundle as it is,
--bundle another one. Strategies, number formats and `generate()` draw the same prompts in turn, round after
round; a ratio is the median over the rounds. On one CPU thread the clock is the process's own CPU time, which
other work on the machine hardly changes; elsewhere it is the wall clock. The prompts of a batch have one
length: nobody pads.

b batch · s codes of a picture · v vocabulary
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.floor import memory_floor, weight_bytes
from benchmarks.judging import judge
from benchmarks.peer import Peer
from benchmarks.racing import (
    DTYPES,
    PEER,
    PLAIN,
    Batch,
    Entry,
    Prompts,
    Rules,
    Run,
    Sampler,
    Setting,
    Strategy,
    in_dtype,
    lossy_rules,
    plainly,
    race,
    run_peer,
    strategies,
    threads,
)
from lexel.document import TokenSequence
from lexel.errors import LexelError
from lexel.models.eagle import Eagle
from lexel.models.grow import widen
from lexel.sample.engine import AUTO
from lexel.sample.logits import SamplingConfig, target_distribution
from lexel.sample.pipeline import Pipeline
from lexel.types import TokenBatch

QUICK_SECONDS, SECONDS = 95.0, 1800.0
QUICK_LATEST = 100.0  # seconds after which --quick begins nothing but what the rest is compared with


# Results


def rows(
    entries: Sequence[Entry], setting: Setting, floors: dict[str, float | None], steps: int
) -> list[dict[str, Any]]:
    """One row per entry that ran."""
    ran = [entry for entry in entries if entry.measured]
    peers = [entry for entry in ran if entry.name == PEER]
    found = []
    for entry in ran:
        plain = next((e for e in ran if e.name == PLAIN and e.dtype == entry.dtype), None)
        seconds, step = entry.median(_seconds), entry.median(_decoding) / steps
        floor = floors.get(entry.dtype)
        row = {
            "strategy": entry.name,
            "exact": entry.exact,
            "dtype": entry.dtype,
            "threads": setting.threads,
            "batch": setting.batch,
            "guided": setting.guided,
            "pictures_per_second": setting.batch / seconds,
            "mean_accepted": None,
            "verify_cost": None,
            "draft_cost": None,
            "ratio_to_plain": None if plain is None else entry.ratio(plain, _decoding),
            "ratio_to_generate": entry.ratio(peers[0], _seconds) if peers else None,
            "ratio_to_floor": None if floor is None else step / floor,
            "milliseconds_per_token": 1000 * step,
            "runs": len(entry.runs),
        }
        if entry.name != PEER:
            row |= costs(entry, plain)
        found.append(row)
    return found


def costs(entry: Entry, plain: Entry | None) -> dict[str, float | None]:
    """Tokens gained per round, and what a round's two halves cost in plain steps."""
    gained = [n for run in entry.measured if run.stats for n in run.stats.accept_lengths]
    made = {"mean_accepted": sum(gained) / len(gained), "verify_cost": None, "draft_cost": None}
    if plain is not None:
        step = plain.median(lambda run: run.decoding / _rounds(run))
        verifying = entry.median(lambda run: (run.decoding - run.drafting) / _rounds(run))
        made["verify_cost"] = verifying / step
        made["draft_cost"] = entry.median(lambda run: run.drafting / _rounds(run)) / step
    return made


def _seconds(run: Run) -> float:
    return run.seconds


def _decoding(run: Run) -> float:
    return run.decoding


def _rounds(run: Run) -> int:
    return max(1, run.stats.target_forwards if run.stats else 1)


@torch.inference_mode()
def entropy(sampler: Sampler, prompts: Prompts, count: int) -> dict[str, float]:
    """Nats per picture code: of the distributions sampled from (guidance, temperature and filters applied),
    and of the model's own at temperature 1 without guidance, over pictures drawn by the plain loop."""
    batch = prompts.batch(0, Setting(1, count, True))
    ids, _ = sampler.draw(plainly(sampler.pipeline.lm), batch, seed=0)
    cond = _picture_logits(sampler, batch.prompts, ids)
    uncond = _picture_logits(sampler, batch.nulls or [], ids)
    guided = uncond + sampler.config.guidance * (cond - uncond)
    return {
        "sampled": _entropy(guided, sampler.config),
        "model": _entropy(cond, SamplingConfig()),
        "mean_highest_probability": float(_probs(guided, sampler.config).amax(-1).mean()),
        "pictures": count,
    }


def _picture_logits(sampler: Sampler, prompts: Sequence[TokenSequence], ids: Sequence[Tensor]) -> Tensor:
    """Float ``[b, s, c]`` over the ids of pictures, each code given the true ones before it."""
    codec, lm = sampler.pipeline.codec, sampler.pipeline.lm
    slots = codec.scripts["image"][1]
    start = len(prompts[0])
    picture = torch.tensor([(start + i, slot.row, slot.column) for i, slot in enumerate(slots)])
    tokens = torch.stack([torch.cat([p.ids, x]) for p, x in zip(prompts, ids)])
    places = torch.stack([torch.cat([p.positions, picture]) for p in prompts])
    modality = torch.zeros_like(tokens)
    modality[:, start:] = codec.vocabulary.modalities.index("image")
    logits = lm(TokenBatch(tokens, modality, places).to(sampler.pipeline.device)).logits
    allowed = codec.vocabulary.mask("image").nonzero()[:, 0].to(logits.device)
    return logits[:, start - 1 : -1].float()[..., allowed]


def _probs(logits: Tensor, config: SamplingConfig) -> Tensor:
    return target_distribution(logits.flatten(0, -2), None, replace(config, guidance=1.0)).dense().double()


def _entropy(logits: Tensor, config: SamplingConfig) -> float:
    probs = _probs(logits, config)
    return float(torch.special.entr(probs).sum(-1).mean())


# The command


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    began = time.perf_counter()
    options = _options(arguments)
    narrow = Pipeline.from_pretrained(options.bundle).to(options.device)
    pipeline = narrow
    if options.factor > 1:
        # Heads read features of the width they were trained on.
        narrow.drafters = {k: part for k, part in narrow.drafters.items() if not isinstance(part, Eagle)}
        pipeline = copy.copy(narrow)
        pipeline.lm = widen(narrow.lm, options.factor)
    prompts, rules = Prompts(narrow, options.seed), lossy_rules(narrow)
    # A widened copy has the narrow model's distributions: what follows from them is measured there.
    drawing = Sampler(narrow, narrow.sampling["image"])
    facts: dict[str, Any] = {"model": describe(pipeline, options), "entropy": entropy(drawing, prompts, 16)}
    print(f"{facts['model']['name']}: {facts['model']['parameters'] / 1e6:.2f} million parameters, "
          f"{facts['entropy']['sampled']:.3f} nats per code", flush=True)  # fmt: skip
    judged = judge(drawing, rules, options)
    bench = Bench(pipeline, prompts, rules, options)
    found: list[dict[str, Any]] = []
    settings = _settings(options)
    # What was needed to come here counts where every second does.
    ends = (began if options.quick else time.perf_counter()) + options.seconds
    for number, setting in enumerate(settings):
        left = ends - time.perf_counter()
        share = left / (len(settings) - number) * (4 / 3 if number == 0 else 1)
        found += bench.compare(setting, share, began + QUICK_LATEST if options.quick else math.inf)
    for row in found:
        row.update({} if row["exact"] else judged.get(row["strategy"], {}))
    facts["sampling"] = common.plain(drawing.config)
    common.report(options, {**facts, "seconds": time.perf_counter() - began, "rows": found}, *texts(found))


class Bench:
    """A model in every number format and in transformers, ready to race.

    quick: every exact strategy in one format (bfloat16 if it is among --dtypes), the others only plainly."""

    def __init__(
        self, pipeline: Pipeline, prompts: Prompts, rules: Rules, options: argparse.Namespace
    ) -> None:
        self.pipeline, self.prompts, self.quick = pipeline, prompts, options.quick
        config, compiled = pipeline.sampling["image"], not options.no_compile
        packed = {dtype: in_dtype(pipeline, dtype, compiled) for dtype in options.dtypes}
        self.samplers = {dtype: Sampler(made, config) for dtype, made in packed.items()}
        self.known = {dtype: strategies(made, rules) for dtype, made in packed.items()}
        self.usual = "bfloat16" if "bfloat16" in packed else options.dtypes[0]
        self.peer = _peer(pipeline, prompts)

    def compare(self, setting: Setting, seconds: float, latest: float) -> list[dict[str, Any]]:
        """The rows of one setting; latest: see `race`."""
        steps = self.pipeline.codec.layouts["image"].steps
        with threads(setting.threads), torch.inference_mode():
            entries = self._entries(setting)
            race(entries, self.prompts, setting, seconds, latest)
            floors = {dtype: self._floor(dtype, setting.threads) for dtype in self.samplers}
            few = sorted({entry.name for entry in entries if entry.measured and not entry.runs})
            print(f"{setting}: {sum(len(entry.runs) for entry in entries)} runs", flush=True)
            if few:
                print(f"  too little time: first runs, which also pack weights, stand for {', '.join(few)}")
            return rows(entries, setting, floors, steps)

    def _floor(self, dtype: str, count: int) -> float | None:
        """Seconds of a pass that does nothing but read the weights; only CPUs are asked."""
        return memory_floor(self.pipeline.lm, dtype, count) if self.pipeline.device.type == "cpu" else None

    def _entries(self, setting: Setting) -> list[Entry]:
        """What takes part, the most important first: transformers, the plain loops, exact strategies, lossy
        ones; the usual number format before the others."""
        made = []
        if self.peer is not None:
            peer, drawing = self.peer, self.samplers[self.usual]
            made.append(
                Entry(PEER, "float32", True, lambda batch, seed: run_peer(peer, drawing, batch, seed))
            )
        made += [self._entry(self.known[dtype][PLAIN], dtype, True) for dtype in self.samplers]
        for dtype in sorted(self.samplers, key=lambda dtype: dtype != self.usual):
            if dtype != self.usual and self.quick:
                continue
            first = dtype == self.usual and setting.batch == 1
            drafting = [strategy for strategy in self.known[dtype].values() if strategy.name != PLAIN]
            made += [self._entry(s, dtype, first and s.exact and s.name != AUTO) for s in drafting]
        return made

    def _entry(self, strategy: Strategy, dtype: str, needed: bool) -> Entry:
        sampler = self.samplers[dtype]

        def run(batch: Batch, seed: int) -> Run:
            return sampler.run(strategy, batch, seed)

        return Entry(strategy.name, dtype, needed, run, strategy.exact)


def _peer(pipeline: Pipeline, prompts: Prompts) -> Peer | None:
    """transformers with the same weights, whose logits must be the same; None where it cannot express the
    model."""
    try:
        peer = Peer(pipeline)
    except LexelError as error:
        print(f"without transformers' generate(): {error}", flush=True)
        return None
    prompt, null = prompts.pairs[0]
    apart = max(peer.check(prompt), peer.check(null))
    if apart > 1e-2:
        raise ValueError(f"Lexel's logits and those of {peer.name} differ by {apart:.2g}.")
    print(f"transformers' {peer.name} gives the same logits up to {apart:.0e}", flush=True)
    return peer


def describe(pipeline: Pipeline, options: argparse.Namespace) -> dict[str, Any]:
    """The language model: name, parameters, bytes of its float32 weights, tokens per picture."""
    config, count = pipeline.lm.config, common.parameters(pipeline.lm)
    name = "shapes" if options.bundle is None else str(options.bundle)
    return {
        "name": name + (f", widened {options.factor} times" if options.factor > 1 else ""),
        "parameters": count,
        "bytes": 4 * count,
        "bytes_per_pass": {dtype: weight_bytes(pipeline.lm, dtype) for dtype in options.dtypes},
        "tokens_per_picture": pipeline.codec.layouts["image"].steps,
        "dim": config.dim,
        "layers": config.layers,
        "vocabulary": config.vocab_size,
    }


def _settings(options: argparse.Namespace) -> list[Setting]:
    """Guided pairs at every batch and number of threads; without guidance one picture at a time."""
    made = [Setting(n, batch, True) for n in options.threads for batch in options.batches]
    return made + ([] if options.quick else [Setting(options.threads[0], 1, False)])


def texts(found: Sequence[dict[str, Any]]) -> list[str]:
    """A table per setting."""
    shown = {
        "× plain": "ratio_to_plain",
        "× generate()": "ratio_to_generate",
        "floors": "ratio_to_floor",
        "accepted": "mean_accepted",
        "verify": "verify_cost",
        "draft": "draft_cost",
    }
    headings = ("strategy", "dtype", "pictures/s", "ms/token", *shown, "runs")
    settings = sorted({(row["threads"], row["batch"], row["guided"]) for row in found})
    made = []
    for threads_, batch, guided in settings:
        chosen = [r for r in found if (r["threads"], r["batch"], r["guided"]) == (threads_, batch, guided)]
        title = f"{threads_} thread{'s' if threads_ > 1 else ''}, batch {batch}{', guided' if guided else ''}"
        lines = [
            (
                row["strategy"] + ("" if row["exact"] else " (lossy)"),
                row["dtype"],
                f"{row['pictures_per_second']:.2f}",
                f"{row['milliseconds_per_token']:.2f}",
                *("–" if row[key] is None else f"{row[key]:.2f}" for key in shown.values()),
                row["runs"],
            )
            for row in chosen
        ]
        made.append(f"{title}\n\n{common.table(headings, lines)}")
    if judged := {row["strategy"]: row for row in found if row.get("pictures_judged")}:
        made.append(_judged(list(judged.values())))
    return made


def _judged(found: Sequence[dict[str, Any]]) -> str:
    """The table of lossy strategies."""
    lines = []
    for row in found:
        distances = (row["feature_distance"], row["feature_distance_change"])
        lines.append(
            (
                row["strategy"],
                f"{row['accuracy']:.1%}",
                f"{100 * row['accuracy_change']:+.1f} points",
                *("–" if value is None else f"{value:.3f}" for value in distances),
            )
        )
    return common.table(("lossy strategy", "shown right", "change", "feature distance", "change"), lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--bundle", help="folder or hub id; without it the shipped one")
    parser.add_argument("--factor", type=int, help="widen the language model (8; with --bundle 1)")
    parser.add_argument("--threads", type=int, nargs="+", help="1 and all; with --quick 1")
    parser.add_argument(
        "--batches", type=int, nargs="+", help="pictures side by side: 1 4 16; with --quick 1 4"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--no-compile", action="store_true", help="without compiled kernels")
    parser.add_argument(
        "--seconds", type=float, help=f"for everything ({SECONDS:.0f}; with --quick {QUICK_SECONDS:.0f})"
    )
    parser.add_argument("--pictures", type=int, help="to judge lossy strategies by (400; with --quick 32)")
    parser.add_argument("--features", metavar="DIR_OR_ID", help="a vision model of transformers")
    parser.add_argument(
        "--feature-steps", type=int, help="of the network trained without it (600; with --quick 0)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/sampling"), help="what is kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--quick", action="store_true", help="within two minutes on one thread")
    options = parser.parse_args(arguments)
    cores = torch.get_num_threads()
    usual = {
        "factor": 1 if options.bundle else 8,
        "threads": [1] if options.quick else sorted({1, cores}),
        "batches": [1, 4] if options.quick else [1, 4, 16],
        "seconds": QUICK_SECONDS if options.quick else SECONDS,
        "pictures": 32 if options.quick else 400,
        "feature_steps": 0 if options.quick else 600,
    }
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.count = options.pictures
    return options


if __name__ == "__main__":
    common.run(main)
