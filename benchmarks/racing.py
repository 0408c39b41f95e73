"""What `benchmarks.sampling` measures and how: strategies, number formats, prompts, interleaved runs.

b batch · s codes of a picture
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer import Peer
from benchmarks.throughput import clock
from lexel.document import Document, Grammar, Image, Text, TokenSequence
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.models.packed import pack
from lexel.sample import strategies as named
from lexel.sample import tuning
from lexel.sample.acceptance import Acceptance, exact
from lexel.sample.decode import run as run_queue
from lexel.sample.decode import seeds
from lexel.sample.drafters import Drafter
from lexel.sample.engine import AUTO
from lexel.sample.generator import Generator, Request
from lexel.sample.logits import SamplingConfig
from lexel.sample.lossy import AcceptanceConfig, make_acceptance
from lexel.sample.pipeline import Pipeline
from lexel.sample.policy import Policy
from lexel.sample.tuning import Chosen
from lexel.sample.zipar import ZIPAR, ZipAR
from lexel.types import Codes, DecodeStats

DTYPES = ("float32", "bfloat16", "int8")
PLAIN, PEER = "plain", "generate"
POOL = 1000
"""Captions of which the batches are made."""


# What is measured


@dataclass(frozen=True)
class Strategy:
    """A way to draw: makes a queue for some requests. exact: whether the pictures have the plain loop's
    distribution."""

    name: str
    exact: bool
    queue: Callable[[Sequence[Request]], Generator]


TRAINED, WINDOW = ("eagle", "drafter"), ("sjd",)
LOSSY = {
    "lantern": (TRAINED, AcceptanceConfig("lantern", bound=0.1, residual="bounded")),
    "lantern-released": (TRAINED, AcceptanceConfig("lantern", bound=0.1, residual="released")),
    "lantern++": (TRAINED, AcceptanceConfig("lantern", bound=2.0, residual="bounded")),
    "grouped": (WINDOW, AcceptanceConfig("grouped")),
}
"""Lossy acceptances with their published numbers, and the drafting strategies that they are measured on: the
first of them that there is."""

Rules = Mapping[str, Acceptance]


def lossy_rules(pipeline: Pipeline) -> Rules:
    """The acceptances of `LOSSY` for a pipeline; also for its widened copies, whose embeddings lie further
    apart."""
    parts = pipeline.tokenizer, pipeline.lm, pipeline.codec.vocabulary
    return {name: make_acceptance(config, *parts) for name, (_, config) in LOSSY.items()}


def strategies(pipeline: Pipeline, rules: Rules) -> dict[str, Strategy]:
    """What `pipeline` can be sampled with: the plain loop, exact speculation, lossy ways."""
    lm, drafting = pipeline.lm, named.strategies(pipeline.lm, pipeline.drafters)

    def speculative(name: str, base: str, rule: Acceptance) -> Strategy:
        def queue(requests: Sequence[Request]) -> Generator:
            drafter = named.make_drafter(drafting, lm, base, None)
            return Generator(lm, drafter=drafter, acceptance=rule, rows=len(requests))

        return Strategy(name, rule is exact, queue)

    found = [plainly(lm), *(speculative(name, name, exact) for name in drafting)]
    found.append(Strategy(AUTO, True, Auto(lm, drafting)))
    for name, rule in rules.items():
        bases = [base for base in LOSSY[name][0] if base in drafting]
        found += [speculative(f"{base}+{name}", base, rule) for base in bases[:1]]
    if pipeline.codec.columns == 1 and pipeline.codec.layouts["image"].grid is not None:
        found.append(Strategy(ZIPAR, False, lambda requests: ZipAR(lm, rows=len(requests))))
    return {strategy.name: strategy for strategy in found}


def plainly(lm: CausalLM) -> Strategy:
    """The plain loop."""
    return Strategy(PLAIN, True, lambda requests: Generator(lm, rows=len(requests)))


class Auto:
    """What ``decoding="auto"`` chooses: raced at the first call for so many pictures, not remembered."""

    def __init__(self, lm: CausalLM, known: Mapping[str, named.Strategy]) -> None:
        self.lm, self.known = lm, known
        self.chosen: dict[tuple[int, bool, int], Chosen] = {}

    def __call__(self, requests: Sequence[Request]) -> Generator:
        """The queue of the choice."""
        key = len(requests), requests[0].policy.guided, torch.get_num_threads()
        if key not in self.chosen:
            self.chosen[key] = tuning.race(self.lm, requests, self.known, self._drafter)
        chosen = self.chosen[key]
        drafter = self._drafter(chosen.strategy, chosen.window)
        return Generator(self.lm, drafter=drafter, rows=len(requests))

    def _drafter(self, name: str, window: int | None) -> Drafter | None:
        return named.make_drafter(self.known, self.lm, name, window)


class _Stopwatch:
    """Seconds spent in an object's methods."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, 0.0

    def watch(self, owner: object, name: str) -> None:
        """Count the time of calls of this method from now on."""
        method = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            start = clock(self.device)
            result = method(*arguments)
            self.seconds += clock(self.device) - start
            return result

        setattr(owner, name, timed)


def in_dtype(pipeline: Pipeline, dtype: str, compiled: bool) -> Pipeline:
    """The pipeline with its language models packed in another number format. compiled: with compiled kernels,
    where the machine has a compiler."""
    made = copy.copy(pipeline)
    made.lm = pack(pipeline.lm, dtype, compiled)  # type: ignore[arg-type]
    made.drafters = {
        name: pack(model, dtype, compiled)  # type: ignore[arg-type]
        for name, model in pipeline.drafters.items()
    }
    return made


@dataclass(frozen=True)
class Setting:
    """The conditions of a comparison: rows of one table."""

    threads: int
    batch: int
    guided: bool


# Prompts


@dataclass(frozen=True)
class Batch:
    """Prompts of one length, and the unconditional ones where they are guided."""

    prompts: list[TokenSequence]
    nulls: list[TokenSequence] | None


class Prompts:
    """Batches of captions that have as many tokens as most of their kind have."""

    def __init__(self, pipeline: Pipeline, seed: int) -> None:
        if pipeline.scenes is None:
            raise LexelError("this bundle does not say which scenes it was trained on: there are no prompts.")
        codec = pipeline.codec
        texts = [text for text, _ in pipeline.scenes.prompts("two", POOL, seed)]
        documents: list[Document] = [[Text(text), Image.blank()] for text in texts]
        pairs = [(codec.prompt(document), codec.unconditional(document)) for document in documents]
        usual = statistics.mode(len(prompt) for prompt, _ in pairs)
        self.pairs = [pair for pair in pairs if len(pair[0]) == usual]

    def batch(self, number: int, setting: Setting) -> Batch:
        """The `number`-th batch; the same for everybody who asks."""
        start = number * setting.batch
        chosen = [self.pairs[(start + i) % len(self.pairs)] for i in range(setting.batch)]
        return Batch([p for p, _ in chosen], [n for _, n in chosen] if setting.guided else None)


# Runs


@dataclass(frozen=True)
class Run:
    """One batch drawn. seconds: prompts in, pixels out; decoding: without the pixels; drafting: of those, in
    the drafter."""

    seconds: float
    decoding: float
    drafting: float = 0.0
    stats: DecodeStats | None = None


@dataclass(eq=False)
class Entry:
    """A strategy in a number format; None is transformers. needed: measured whatever the time."""

    name: str
    dtype: str
    needed: bool
    run: Callable[[Batch, int], Run]
    exact: bool = True
    runs: dict[int, Run] = field(default_factory=dict)
    warm: Run | None = None

    def median(self, value: Callable[[Run], float]) -> float:
        """Over the runs; the first, unmeasured one stands in where time allowed no other."""
        return statistics.median(value(run) for run in self.measured)

    @property
    def measured(self) -> list[Run]:
        """The runs that count."""
        return list(self.runs.values()) or ([self.warm] if self.warm else [])

    def ratio(self, other: Entry, value: Callable[[Run], float]) -> float:
        """Median over the rounds of the other's seconds for one of ours."""
        shared = [(self.runs[r], other.runs[r]) for r in self.runs if r in other.runs]
        if not shared:
            return other.median(value) / self.median(value)
        return statistics.median(value(theirs) / value(ours) for ours, theirs in shared)


class Sampler:
    """Draws with one pipeline (so one number format) under its own settings for pictures."""

    def __init__(self, pipeline: Pipeline, config: SamplingConfig) -> None:
        self.pipeline, self.config = pipeline, config
        self.grammar = Grammar(pipeline.codec, ("image",))

    def run(self, strategy: Strategy, batch: Batch, seed: int) -> Run:
        """Draw one batch."""
        device = self.pipeline.device.type
        spent = _Stopwatch(device)
        start = clock(device)
        ids, stats = self.draw(strategy, batch, seed, spent)
        decoded = clock(device)
        self.pixels(torch.stack(ids))
        return Run(clock(device) - start, decoded - start, spent.seconds, stats)

    def draw(
        self, strategy: Strategy, batch: Batch, seed: int, spent: _Stopwatch | None = None
    ) -> tuple[list[Tensor], DecodeStats]:
        """The ids long ``[s]`` of each picture. spent: runs while a drafter works."""
        config = self.config if batch.nulls else replace(self.config, guidance=1.0)
        policy = Policy(self.grammar, {"image": config}, device=self.pipeline.device)
        nulls: list[Any] = batch.nulls or [None] * len(batch.prompts)
        numbers = seeds(len(nulls), torch.Generator().manual_seed(seed))
        requests = [Request(*each) for each in zip(batch.prompts, nulls, [policy] * len(nulls), numbers)]
        queue = strategy.queue(requests)
        if spent is not None and queue.drafter is not None:
            for name in ("admit", "propose", "observe"):
                spent.watch(queue.drafter, name)
        ids, _, stats = run_queue(queue, [queue.submit(request) for request in requests])
        return ids, stats

    def pixels(self, ids: Tensor) -> Tensor:
        """Ids ``[b, s]`` to pixels ``[b, 3, h, w]``."""
        return self.pipeline.decode(self.codes(ids)).cpu()

    def codes(self, ids: Tensor) -> Codes:
        """Ids ``[b, s]`` as a tokenizer's codes."""
        codec = self.pipeline.codec
        layout = codec.layouts["image"]
        return layout.unflatten(codec.vocabulary.to_codes(ids[..., None].cpu(), layout, "image"))


def run_peer(peer: Peer, sampler: Sampler, batch: Batch, seed: int) -> Run:
    """Draw one batch with transformers."""
    config = sampler.config if batch.nulls else replace(sampler.config, guidance=1.0)
    draw = peer.prepare(batch.prompts, batch.nulls, config)
    torch.manual_seed(seed)
    device = sampler.pipeline.device.type
    start = clock(device)
    ids = draw()
    decoded = clock(device)
    sampler.pixels(ids)
    return Run(clock(device) - start, decoded - start)


def race(
    entries: Sequence[Entry], prompts: Prompts, setting: Setting, seconds: float, latest: float = math.inf
) -> None:
    """Run all entries in turn, round after round, forwards and backwards, until the wall clock says that the
    next run would end too late. The first run of an entry does not count. Of entries that are not needed, as
    many take part as half of the time is enough to begin with. latest: when no more begins on
    `time.perf_counter`, needed or not, but for what the others are compared with."""
    deadline = time.perf_counter() + seconds
    lasted: dict[Entry, float] = {}

    def run(entry: Entry, number: int) -> Run:
        start = time.perf_counter()
        found = entry.run(prompts.batch(number, setting), number)
        lasted[entry] = time.perf_counter() - start
        return found

    for entry in entries:
        now = time.perf_counter()
        peer = entry.name in (PEER, PLAIN)
        if peer or (entry.needed and now < latest) or now < deadline - seconds * 2 / 3:
            entry.warm = run(entry, 0)
    racing = [entry for entry in entries if entry.warm is not None]
    number = 0
    while any(time.perf_counter() + lasted[entry] < deadline for entry in racing):
        number += 1
        for entry in racing if number % 2 else racing[::-1]:
            if time.perf_counter() + lasted[entry] < deadline:
                entry.runs[number] = run(entry, number)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
