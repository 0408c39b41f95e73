"""The decode loop: one for plain, guided and speculative sampling.

Every round feeds each row its last token and what a drafter proposed behind it, in one pass of the target
(conditional and unconditional rows together), turns the logits into the allowed distributions, and lets the
acceptance decide. Without a drafter a round is one plain step. Rows go at their own pace and leave when the
grammar says that they are done.

b rows · g drafted tokens · k columns (codes per position) · v vocabulary
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lexel.document import Grammar, State, TokenSequence
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.sample.acceptance import Acceptance, Verdict, exact
from lexel.sample.drafters import Drafter, Outcome, Proposal
from lexel.sample.logits import Processor, SamplingConfig, draw, target_distribution, uniform_source
from lexel.sample.stream import Policy, Prediction, Session, Stream, Token
from lexel.types import DecodeStats

# Called with the row and its new ids, long [m] or [m, k], as soon as they are certain.
OnToken = Callable[[int, Tensor], None]


@dataclass
class _Output:
    """What a row has generated so far."""

    row: int
    ids: list[tuple[int, ...]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


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
    """Generate what `grammar` plans after each prompt.

    unconditional: guidance's null prompts, one per prompt (needed when a guidance scale is not 1).
    sampling: settings per modality name; missing ones sample at temperature 1. processors: transformers'
    logits processors, after guidance and grammar. generator: the source of all randomness.
    Returns per prompt the new ids (long ``[l]`` or ``[l, k]``, on the CPU), their log-probabilities under the
    distribution sampled from (float ``[l]``, summed over columns), and statistics.
    Raises LexelError when a prompt and what may follow exceed the context, guidance lacks its prompts, the
    drafter does not fit, or the model's logits are not finite.
    """
    if not prompts:
        raise ValueError("generate needs at least one prompt.")
    with torch.inference_mode():
        policy = Policy(grammar, sampling or {}, processors, next(lm.parameters()).device)
        session = _open(lm, prompts, policy, unconditional, drafter, generator)
        outputs, gained, seconds = _run(session, drafter, acceptance, on_token)
    stats = DecodeStats(
        accept_lengths=tuple(gained),
        target_forwards=session.stream.forwards,
        draft_forwards=drafter.forwards if drafter is not None else 0,
        seconds=seconds,
    )
    ids = [_ids(output.ids) for output in outputs]
    return ids, [torch.tensor(output.logprobs) for output in outputs], stats


def _ids(rows: Sequence[tuple[int, ...]]) -> Tensor:
    ids = torch.tensor(rows, dtype=torch.long)
    return ids[:, 0] if ids.shape[1] == 1 else ids


def _open(
    lm: CausalLM,
    prompts: Sequence[TokenSequence],
    policy: Policy,
    unconditional: Sequence[TokenSequence] | None,
    drafter: Drafter | None,
    generator: torch.Generator | None,
) -> Session:
    if policy.guided and (unconditional is None or len(unconditional) != len(prompts)):
        given = "none" if unconditional is None else str(len(unconditional))
        raise LexelError(f"guidance needs one unconditional prompt for each of {len(prompts)}, got {given}.")
    if drafter is not None and policy.grammar.codec.columns > 1:
        raise LexelError(
            f"drafters propose one code per position, this model has {policy.grammar.codec.columns}; "
            "decode it without a drafter."
        )
    null = unconditional if policy.guided else None
    states = [policy.grammar.start(prompt) for prompt in prompts]
    room = max(policy.grammar.remaining(state) for state in states)
    slack = 2 + (drafter.window if drafter is not None else 0)
    stream = Stream(lm, prompts, null, room, slack)
    history = [(p.ids if p.ids.ndim == 1 else p.ids[:, 0]).tolist() for p in prompts]
    uniform = uniform_source(generator, stream.device)
    session = Session(stream, policy, uniform, states, history, prompts, null, room)
    if drafter is not None:
        drafter.start(session)
    return session


def _run(
    session: Session, drafter: Drafter | None, acceptance: Acceptance, on_token: OnToken | None
) -> tuple[list[_Output], list[int], float]:
    """The loop: (outputs per prompt, tokens gained per round and row, seconds)."""
    started = time.perf_counter()
    outputs = [_Output(row) for row in range(len(session.states))]
    active, gained = list(outputs), []
    columns = _Columns(session)
    while active:
        if drafter is not None:
            proposal = drafter.propose(session)
        else:
            proposal = Proposal([[] for _ in active], [[state] for state in session.states], None)
        prediction = session.stream.forward(proposal.tokens)
        target = session.policy.distribution(prediction, proposal.states, session.contexts(proposal.tokens))
        draft = proposal.draft(session, prediction)
        verdict = acceptance(target, draft, session.uniform)
        further = columns.complete(prediction, session.states, verdict.extra.tolist())
        outcome = Outcome(draft, target, verdict, _accepted(session, proposal, verdict, further))
        committed = outcome.committed
        _record(outcome, active, further)
        session.stream.commit(committed)
        if drafter is not None:
            drafter.observe(session, outcome)
        gained += [len(tokens) for tokens in committed]
        if on_token is not None:
            for output, tokens in zip(active, committed):
                on_token(output.row, _ids([token.ids for token in tokens]))
        active = _drop_finished(session, drafter, active)
    return outputs, gained, time.perf_counter() - started


def _accepted(
    session: Session, proposal: Proposal, verdict: Verdict, further: Sequence[Further]
) -> list[list[Token]]:
    """Move each row's state past its accepted tokens and the target's own next one; those are returned."""
    size = session.grammar.codec.vocabulary.size
    committed: list[list[Token]] = []
    for row, (count, extra) in enumerate(zip(verdict.accepted.tolist(), verdict.extra.tolist())):
        tokens, state = list(proposal.tokens[row][:count]), proposal.states[row][count]
        if extra < size:
            tokens.append(session.token(state, (extra, *further[row].ids)))
            state = session.grammar.advance(state, extra)
        elif not session.grammar.done(state):
            raise LexelError("the model's logits are not finite; its weights are damaged or overflowed.")
        session.history[row] += [token.ids[0] for token in tokens]
        session.states[row] = state
        committed.append(tokens)
    return committed


def _record(outcome: Outcome, active: Sequence[_Output], further: Sequence[Further]) -> None:
    """Append what each row gained, with log-probabilities, to its output."""
    draft, verdict, size = outcome.draft, outcome.verdict, outcome.target.shape[-1]
    ids = torch.cat([draft.ids, verdict.extra[:, None]], dim=1)
    ids.scatter_(1, verdict.accepted[:, None], verdict.extra[:, None])
    probs = outcome.target.gather(-1, ids.clamp(max=size - 1)[..., None])[..., 0]
    for output, tokens, logprobs, rest in zip(active, outcome.committed, probs.log().tolist(), further):
        output.ids += [token.ids for token in tokens]
        output.logprobs += logprobs[: len(tokens)]
        output.logprobs[-1] += rest.logprob


def _drop_finished(session: Session, drafter: Drafter | None, active: list[_Output]) -> list[_Output]:
    rows = [row for row, state in enumerate(session.states) if not session.grammar.done(state)]
    if len(rows) == len(active):
        return active
    if rows:
        session.stream.keep(rows)
        if drafter is not None:
            drafter.keep(rows)
    session.states = [session.states[row] for row in rows]
    session.history = [session.history[row] for row in rows]
    return [active[row] for row in rows]


class Further(NamedTuple):
    """The ids of columns 1..k-1 of a row's new token, and their summed log-probability."""

    ids: tuple[int, ...] = ()
    logprob: float = 0.0


class _Columns:
    """Samples the further columns of models with several codes per position, by the model's own head, with
    the same settings and guidance as the first."""

    def __init__(self, session: Session) -> None:
        self.session, self.count = session, session.stream.columns
        self._codes: dict[tuple[int, int], Tensor] = {}

    def complete(
        self, prediction: Prediction, states: Sequence[State], first: Sequence[int]
    ) -> list[Further]:
        """The further columns of each row, given the ids in column 0."""
        further = [Further()] * len(first)
        if self.count == 1:
            return further
        groups: dict[tuple[int, tuple[int | None, ...]], list[int]] = {}
        for row, state in enumerate(states):
            modality = self.session.policy.place(state).modality
            groups.setdefault((modality, self._books(state, modality, first[row])), []).append(row)
        for (modality, books), rows in groups.items():
            start = [first[row] for row in rows]
            ids, logprobs = self._sample(prediction.hidden, modality, books, rows, start)
            for row, row_ids, logprob in zip(rows, ids, logprobs):
                further[row] = Further(tuple(row_ids[1:]), logprob)
        return further

    def _books(self, state: State, modality: int, token: int) -> tuple[int | None, ...]:
        """The codebook of each column beside `token`. A flexible picture's end may stand where a code might;
        it has no further columns, like text."""
        books = self.session.grammar.columns(state) or (None,) * self.count
        if books[0] is not None:
            key = modality, books[0]
            if key not in self._codes:
                vocabulary = self.session.grammar.codec.vocabulary
                self._codes[key] = vocabulary.mask(vocabulary.modalities[modality], books[0])
            if token >= len(self._codes[key]) or not bool(self._codes[key][token]):
                return (None,) * self.count
        return books

    def _sample(
        self,
        hidden: Tensor,
        modality: int,
        books: tuple[int | None, ...],
        rows: list[int],
        first: list[int],
    ) -> tuple[list[list[int]], list[float]]:
        """All k ids of `rows` and the log-probability of those after the first."""
        session, device = self.session, hidden.device
        lm, vocabulary = session.stream.lm, session.grammar.codec.vocabulary
        config, name = session.policy.configs[modality], vocabulary.modalities[modality]
        twins = [*rows, *(session.stream.rows + row for row in rows)] if session.stream.guided else rows
        features = hidden[torch.tensor(twins, device=device), 0]
        ids = torch.full((len(rows), self.count), vocabulary.special["pad"], device=device)
        ids[:, 0] = torch.tensor(first, device=device)
        logprobs = torch.zeros(len(rows), dtype=torch.float64, device=device)
        for column, book in enumerate(books):
            if column == 0 or book is None:  # chosen already, or delay padding
                continue
            assert lm.head is not None
            chosen = lm.local_codes(ids)[:, :column]
            logits = lm.head.next_logits(features, chosen.repeat(len(features) // len(rows), 1))
            uncond = logits[len(rows) :] if session.stream.guided else None
            probs = target_distribution(logits[: len(rows)], uncond, config)
            code = draw(probs, session.uniform(len(rows)))
            logprobs += probs.gather(1, code[:, None])[:, 0].double().log()
            ids[:, column] = vocabulary.block(name, book).to(device)[code]
        return ids.tolist(), logprobs.tolist()
