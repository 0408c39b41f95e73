"""What ``decoding="auto"`` decodes with: measured on this machine, once, and remembered.

Which drafter and window pay depends on the model (how much is accepted) and on the machine (what a pass over
several tokens costs). So the first call races the strategies on its own requests, a few rounds each and in
turns, and writes down the winner: calls after it, in other processes too, repeat that choice, and with it
their random numbers. The winner of so many is often just lucky: it must beat plain decoding again, by a
margin, in a duel that counts alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch

import lexel.machine as machine
from lexel.models.causal_lm import CausalLM
from lexel.sample.drafters import Drafter
from lexel.sample.generator import Generator, Request
from lexel.sample.strategies import PLAIN, Strategy

RECORD = "decoding"
"""Where choices are remembered, see `lexel.machine`."""

ROUNDS = 8
"""Rounds of a heat."""
HEATS = 3
DUEL = 7
"""Heats of the winner against plain decoding, each of twice as many rounds; the median of their ratios
counts."""

MARGIN = 1.05
"""How much faster than plain decoding a strategy must have been to be chosen."""
HOPELESS = 0.8
"""Who is slower than this share of plain decoding in the first heat does not race on."""


@dataclass(frozen=True)
class Chosen:
    """A strategy, its window, and its tokens per second relative to plain decoding when it was measured."""

    strategy: str = PLAIN
    window: int | None = None
    ratio: float = 1.0


class Racer:
    """One strategy at one window, generating `requests` again and again."""

    def __init__(
        self,
        lm: CausalLM,
        requests: Sequence[Request],
        name: str,
        window: int | None,
        drafter: Drafter | None,
    ) -> None:
        self.name, self.window, self.requests = name, window, requests
        self.queue = Generator(lm, drafter=drafter, rows=len(requests))
        self.tokens, self.seconds = 0, 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def heat(self, rounds: int = ROUNDS, *, counted: bool = True) -> float:
        """Some rounds, and the tokens per second in them; those of the first heat warm caches and windows
        up."""
        tokens, seconds, clock = 0, 0.0, _clock()
        for _ in range(rounds):
            if not self.queue.busy:  # prompts are read outside the clock: every strategy reads them alike
                for request in self.requests:
                    self.queue.submit(request)
                self.queue.admit()
            started = clock()
            tokens += self.queue.step()
            seconds += clock() - started
        if counted:
            self.seconds += seconds
            self.tokens += tokens
        return tokens / max(seconds, 1e-9)


def race(
    lm: CausalLM,
    requests: Sequence[Request],
    strategies: Mapping[str, Strategy],
    make: Callable[[str, int | None], Drafter | None],
) -> Chosen:
    """The fastest way to generate `requests` side by side."""
    plain = Racer(lm, requests, PLAIN, None, None)
    racers = [Racer(lm, requests, name, None, make(name, None)) for name in strategies]
    best = _winner(plain, racers)
    if best is not plain:  # the right strategy; now its window
        usual = strategies[best.name].window
        others = [Racer(lm, requests, best.name, w, make(best.name, w)) for w in (usual // 2, usual * 2) if w]
        best = _winner(plain, [best, *others])
    if best is plain:
        return Chosen()
    pairs = [(plain.heat(2 * ROUNDS), best.heat(2 * ROUNDS)) for _ in range(DUEL)]
    ratio = median(mine / base for base, mine in pairs)
    if ratio < MARGIN:
        return Chosen()
    return Chosen(best.name, best.window or strategies[best.name].window, round(ratio, 3))


def _clock() -> Callable[[], float]:
    """On one CPU thread the process's own time, which other work on the machine hardly changes."""
    return (
        time.process_time
        if torch.get_num_threads() == 1 and not torch.cuda.is_available()
        else time.perf_counter
    )


def _winner(plain: Racer, racers: Sequence[Racer]) -> Racer:
    field = [plain, *racers]
    for racer in field:
        racer.heat(counted=False)
        racer.heat()
    field = [plain, *(racer for racer in racers if racer.rate > HOPELESS * plain.rate)]
    for _ in range(HEATS - 1):
        for racer in field:
            racer.heat()
    return max(field, key=lambda racer: racer.rate)


# The record


def circumstances(lm: CausalLM, fingerprint: str, dtype: str, kinds: Sequence[str], rows: int) -> str:
    """What a choice holds for: model, weights' type, machine, threads, what is generated, rows (to a power of
    two)."""
    device = next(lm.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor()
    where = f"{device.type} {name}, {torch.get_num_threads()} threads"
    size = 1 << (rows - 1).bit_length()
    return f"{fingerprint} {dtype}; {where}; {'+'.join(sorted(set(kinds)))} x {size}"


def recall(key: str, known: Sequence[str]) -> Chosen | None:
    """The remembered choice; None without one, or when its strategy is no longer there."""
    values = machine.recall(RECORD).get(key)
    if not isinstance(values, dict) or values.get("strategy") not in known:
        return None
    return Chosen(values["strategy"], values.get("window"), values.get("ratio", 1.0))


def remember(key: str, chosen: Chosen) -> None:
    """Add a choice to the record."""
    machine.remember(RECORD, {key: asdict(chosen)})
