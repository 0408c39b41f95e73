"""Generate once: the queue of `lexel.sample.generator` for a list of prompts under one grammar."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lexel.document import Grammar, TokenSequence
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.sample.acceptance import Acceptance, exact
from lexel.sample.drafters.base import Drafter
from lexel.sample.generator import Generator, Request, Ticket
from lexel.sample.logits import Processor, SamplingConfig
from lexel.sample.policy import Policy
from lexel.types import DecodeStats

# Called with the row and its new ids, long [m] or [m, k], as soon as they are certain.
OnToken = Callable[[int, Tensor], None]


def generate(
    lm: CausalLM,
    prompts: Sequence[TokenSequence],
    grammar: Grammar,
    *,
    unconditional: Sequence[TokenSequence] | None = None,
    sampling: Mapping[str, SamplingConfig] | None = None,
    drafter: Drafter | None = None,
    acceptance: Acceptance = exact,
    processors: Sequence[Processor] = (),
    generator: torch.Generator | None = None,
    on_token: OnToken | None = None,
) -> tuple[list[Tensor], list[Tensor], DecodeStats]:
    """Generate what `grammar` plans after each prompt, all side by side.

    unconditional: guidance's null prompts, one per prompt (needed when a guidance scale is not 1).
    sampling: settings per modality name; missing ones sample at temperature 1. processors: transformers'
    logits processors, after guidance and grammar. generator: where the seed of each row comes from.
    Returns per prompt the new ids (long ``[l]`` or ``[l, k]``, on the CPU), their log-probabilities under the
    distribution sampled from (float ``[l]``, summed over columns), and statistics.
    Raises LexelError when a prompt and what may follow exceed the context, guidance lacks its prompts, the
    drafter does not fit, or the model's logits are not finite.
    """
    if not prompts:
        raise ValueError("generate needs at least one prompt.")
    policy = Policy(grammar, sampling or {}, processors, next(lm.parameters()).device)
    if policy.guided and (unconditional is None or len(unconditional) != len(prompts)):
        given = "none" if unconditional is None else str(len(unconditional))
        raise LexelError(f"guidance needs one unconditional prompt for each of {len(prompts)}, got {given}.")
    queue = Generator(lm, drafter=drafter, acceptance=acceptance, rows=len(prompts))
    nulls = unconditional if policy.guided and unconditional else [None] * len(prompts)
    tickets = [
        queue.submit(Request(prompt, null, policy, seed))
        for prompt, null, seed in zip(prompts, nulls, seeds(len(prompts), generator))
    ]
    return run(queue, tickets, on_token)


def run(
    queue: Generator, tickets: Sequence[Ticket], on_token: OnToken | None = None
) -> tuple[list[Tensor], list[Tensor], DecodeStats]:
    """Work through `tickets`: ids, log-probabilities and statistics as `generate` returns them."""
    meter = Meter(queue)
    for row, ids in queue.stream(tickets):
        if on_token is not None:
            on_token(row, ids)
    return meter.results(tickets)


class Meter:
    """Counts what a queue does from now on, for whomever."""

    def __init__(self, queue: Generator) -> None:
        self.queue = queue
        self.started, self.passes, self.drafted = time.perf_counter(), queue.forwards, _drafts(queue)

    def results(self, tickets: Sequence[Ticket]) -> tuple[list[Tensor], list[Tensor], DecodeStats]:
        """Ids, log-probabilities and statistics of finished tickets."""
        stats = DecodeStats(
            accept_lengths=tuple(count for ticket in tickets for count in ticket.row.gained),
            target_forwards=self.queue.forwards - self.passes,
            draft_forwards=_drafts(self.queue) - self.drafted,
            seconds=time.perf_counter() - self.started,
        )
        return [ticket.ids for ticket in tickets], [ticket.logprobs for ticket in tickets], stats


def _drafts(queue: Generator) -> int:
    return 0 if queue.drafter is None else queue.drafter.forwards


def seeds(count: int, generator: torch.Generator | None) -> list[int]:
    """A seed for each of `count` rows, drawn from `generator` (or the global one)."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()
