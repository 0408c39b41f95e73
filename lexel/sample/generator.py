"""The decode loop as a queue: requests of different kinds are generated side by side.

Every round feeds each sequence its last token and what a drafter proposed behind it, in one pass of the
target (conditional and unconditional lanes together), turns the hidden states into the allowed distributions,
and lets the acceptance decide. Without a drafter a round is one plain step. Sequences go at their own pace,
leave when their grammar says that they are done, and make room for those that wait.

b sequences · g drafted tokens · k columns (codes per position) · v vocabulary
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lexel.document import TokenSequence
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.sample.acceptance import Acceptance, Target, Verdict, exact
from lexel.sample.columns import Cell, Columns
from lexel.sample.drafters.base import Drafter, nothing, replace_by_last
from lexel.sample.logits import Distribution
from lexel.sample.policy import Policy, Token
from lexel.sample.session import Outcome, Proposal, Row, Session
from lexel.sample.stream import Prediction, Stream, Tree

Drawn = tuple[Distribution, ...]


@dataclass(frozen=True)
class Request:
    """What to generate: a prompt, its unconditional twin where the policy is guided, the policy, and the seed
    of its randomness. Equal requests give equal results, whatever else is generated at the same time (up to
    rounding, which depends on the size of the batch)."""

    prompt: TokenSequence
    null: TokenSequence | None
    policy: Policy
    seed: int


@dataclass(eq=False)
class Ticket:
    """A request in the queue. After `done`, `row` holds the result; until then what there is so far."""

    request: Request
    row: Row
    done: bool = False
    error: BaseException | None = None
    new: deque[tuple[int, ...]] = field(default_factory=deque)

    @property
    def ids(self) -> Tensor:
        """The new ids on the CPU: long ``[l]`` or ``[l, k]``."""
        ids = torch.tensor(self.row.ids, dtype=torch.long)
        return ids[:, 0] if ids.ndim == 2 and ids.shape[1] == 1 else ids

    @property
    def logprobs(self) -> Tensor:
        """Log-probabilities float ``[l]`` under the distribution sampled from, summed over columns."""
        return torch.tensor(self.row.logprobs)


class Generator:
    """Serves requests with one language model and one decoding strategy.

    rows: sequences generated side by side at most. Whoever waits (`wait`, `stream`) does the work, round by
    round, for everybody: threads may share a generator, and their requests are batched together.
    """

    def __init__(
        self,
        lm: CausalLM,
        *,
        drafter: Drafter | None = None,
        acceptance: Acceptance = exact,
        rows: int = 64,
    ) -> None:
        if rows < 1:
            raise ValueError(f"a generator needs room for at least 1 row, got {rows}.")
        self.lm, self.drafter, self.acceptance, self.most = lm, drafter, acceptance, rows
        self.forwards = 0
        self._waiting: deque[Ticket] = deque()
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        stream = Stream(self.lm, self.drafter.layers if self.drafter else ())
        self.session = Session(stream, self.drafter.reach if self.drafter else 0)
        self.tickets: list[Ticket] = []

    # Asking

    def submit(self, request: Request) -> Ticket:
        """Put a request into the queue. Raises LexelError when it lacks its unconditional prompt, or it and
        what may follow exceed the model's context."""
        if request.policy.guided and request.null is None:
            raise LexelError("guidance needs an unconditional prompt for each prompt, got none.")
        null = request.null if request.policy.guided else None
        row = Row.start(request.prompt, null, request.policy, request.seed)
        longest = max(len(request.prompt), 0 if null is None else len(null))
        room, context = row.remaining(), self.lm.config.max_length
        if longest + room > context:
            raise LexelError(
                f"a prompt of {longest} tokens and up to {room} more do not fit the model's context of "
                f"{context}; shorten the prompt or limit what is generated."
            )
        ticket = Ticket(request, row)
        with self._lock:
            self._waiting.append(ticket)
        return ticket

    def wait(self, tickets: Sequence[Ticket]) -> None:
        """Work until all of `tickets` are done. Raises what went wrong with the first that failed."""
        for _ in self.stream(tickets):
            pass

    def stream(self, tickets: Sequence[Ticket]) -> Iterator[tuple[int, Tensor]]:
        """Work, and yield ``(number of the ticket, its new ids)`` as soon as they are certain. Whoever stops
        listening cancels what is not done."""
        try:
            while True:
                for number, ticket in enumerate(tickets):
                    if ticket.error is not None:
                        raise ticket.error
                    if ticket.new:
                        new = [ticket.new.popleft() for _ in range(len(ticket.new))]
                        ids = torch.tensor(new, dtype=torch.long)
                        yield number, ids[:, 0] if ids.shape[1] == 1 else ids
                if all(ticket.done and not ticket.new for ticket in tickets):
                    return
                with self._lock:
                    if not all(ticket.done for ticket in tickets):
                        self._work()
        finally:
            self.cancel(tickets)

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Forget those of `tickets` that are not done."""
        open_ones = [ticket for ticket in tickets if not ticket.done]
        if not open_ones:
            return
        with self._lock, torch.inference_mode():
            for ticket in open_ones:
                ticket.done = True
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                elif ticket in self.tickets:
                    self._retire(self.tickets.index(ticket))

    # Working

    @property
    def busy(self) -> bool:
        """Whether anything is in flight or waiting."""
        return bool(self.tickets or self._waiting)

    def step(self) -> int:
        """One round for everything in flight; the number of tokens gained. Whoever steps by hand listens to
        nobody else: `wait` and `stream` do it for their tickets."""
        with self._lock:
            return self._work()

    def admit(self) -> None:
        """Read the prompts of those that wait, as far as there is room."""
        with self._lock, torch.inference_mode():
            self._admit()

    def _work(self) -> int:
        """One round; what goes wrong fails everything in flight and leaves the generator fresh."""
        try:
            with torch.inference_mode():
                self._admit()
                return self._round() if self.tickets else 0
        except BaseException as error:
            for ticket in self.tickets:
                ticket.error, ticket.done = error, True
            self._reset()
            raise

    def _admit(self) -> None:
        """Let those that wait in, as far as there is room, and read their prompts."""
        room = self.most - len(self.tickets)
        tickets = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if not tickets:
            return
        self.tickets += tickets
        rows = [ticket.row for ticket in tickets]
        # Rows at different lengths are fed blocks padded to the longest one: room for that past the end.
        longest = max(max(len(r.prompt), len(r.null or ())) + r.remaining() for r in rows)
        slots = longest + 2 + self.session.reach * (2 if self.session.stream.graphed else 1)
        prompts = self.session.stream.admit([r.prompt for r in rows], [r.null for r in rows], slots)
        self.session.rows += rows
        if self.drafter is not None:
            self.drafter.admit(self.session, rows, prompts)

    def _round(self) -> int:
        session, drafter = self.session, self.drafter
        proposal = nothing(session) if drafter is None else drafter.propose(session)
        prediction = session.stream.forward(proposal.trees)
        self.forwards += 1
        if drafter is None and session.columns == 1:
            committed = self._plain(prediction)
            session.stream.commit(committed)
        else:
            outcome = self._judge(proposal, prediction)
            committed = outcome.committed
            session.stream.commit(committed)
            if drafter is not None:
                drafter.observe(session, outcome)
        for row in reversed(range(len(self.tickets))):
            ticket = self.tickets[row]
            ticket.new.extend(token.ids for token in committed[row])
            if ticket.row.done:
                self._retire(row)
        return sum(len(tokens) for tokens in committed)

    def _plain(self, prediction: Prediction) -> list[list[Token]]:
        """A step in which nothing was drafted: the same as `_judge`, without what verifying takes."""
        session, contexts = self.session, None
        if any(row.policy.processors for row in session.rows):
            contexts = [[row.history] for row in session.rows]
        probs = session.distributions(prediction, [[row.state] for row in session.rows], contexts)
        drawn = probs.draw(session.uniforms(1)[:, 0])
        logprobs = probs.at(drawn).double().log().tolist()
        committed = []
        for row, token, logprob in zip(session.rows, drawn.tolist(), logprobs):
            if token >= probs.size:
                raise LexelError("the model's logits are not finite; its weights are damaged or overflowed.")
            committed.append([row.policy.token(row.state, (token,))])
            row.state = row.policy.advance(row.state, token)
            row.ids.append((token,))
            row.history.append(token)
            row.logprobs.append(logprob)
            row.gained.append(1)
        return committed

    def _retire(self, row: int) -> None:
        self.tickets[row].done = True
        replace_by_last(self.tickets, row)
        replace_by_last(self.session.rows, row)
        self.session.stream.drop(row)
        if self.drafter is not None:
            self.drafter.drop(row)

    def _judge(self, proposal: Proposal, prediction: Prediction) -> Outcome:
        """What the target says of a proposal; moves every row past what it gained."""
        session = self.session
        columns = Columns(session) if session.columns > 1 else None
        draft = proposal.draft(session.columns, session.device)
        states = [tree.states for tree in proposal.trees]
        soft = self.acceptance.greedy
        first = session.distributions(prediction, states, session.contexts(proposal.trees), soft)
        further = () if columns is None else columns.targets(prediction, proposal.trees, draft.ids.shape[1])
        target = Target(first, further)
        verdict = self.acceptance(target, draft, session.uniforms, self._relaxed(proposal.trees))
        committed, drawn = self._accepted(proposal, prediction, verdict, columns)
        self._record(target, verdict, committed, drawn)
        if soft:  # drafters go on from what is drawn
            target = Target(first.peaks())
        return Outcome(proposal, draft, prediction, target, verdict, committed)

    def _relaxed(self, trees: Sequence[Tree]) -> Tensor | None:
        """Which drafted tokens a lossy acceptance may relax: those of pictures, never text."""
        if self.acceptance is exact:
            return None
        longest = max(len(tree.tokens) for tree in trees)
        lines = [[token.modality > 0 for token in tree.tokens] for tree in trees]
        padded = [line + [False] * (longest - len(line)) for line in lines]
        return torch.tensor(padded, dtype=torch.bool, device=self.session.device).reshape(len(trees), longest)

    def _accepted(
        self, proposal: Proposal, prediction: Prediction, verdict: Verdict, columns: Columns | None
    ) -> tuple[list[list[Token]], dict[int, Drawn]]:
        """Move each row past its accepted tokens and the target's own next one; those are returned, and by
        row what the further columns of the target's own were drawn from."""
        size, committed = self.session.vocabulary_size, []
        cells, waiting = [], []
        for number, (row, tree) in enumerate(zip(self.session.rows, proposal.trees)):
            path, extra = verdict.path[number], verdict.extra[number]
            tokens = [tree.tokens[node] for node in path]
            last = path[-1] if path else -1
            state = tree.states[last + 1]
            committed.append(tokens)
            row.state = state
            if extra < size:
                ids: tuple[int, ...] = (extra,)
                if verdict.column[number]:
                    ids = (*tree.tokens[verdict.node[number]].ids[: verdict.column[number]], extra)
                cells.append(Cell(number, last + 1, row.policy.place(state), ids))
                waiting.append(number)
            elif not row.policy.grammar.done(state):
                raise LexelError("the model's logits are not finite; its weights are damaged or overflowed.")
        whole, drawn = [cell.ids for cell in cells], list[Drawn]()
        if columns is not None:
            whole, drawn = columns.complete(prediction, cells)
        for number, chosen in zip(waiting, whole):
            row = self.session.rows[number]
            committed[number].append(row.policy.token(row.state, chosen))
            row.state = row.policy.advance(row.state, chosen[0])
        return committed, dict(zip(waiting, drawn))

    def _record(
        self, target: Target, verdict: Verdict, committed: list[list[Token]], drawn: dict[int, Drawn]
    ) -> None:
        """Append what each row gained, with log-probabilities, to its output."""
        rows, gains = self.session.rows, [len(tokens) for tokens in committed]
        positions = len(target.first) // len(rows)
        at, ids = [], []
        for number, tokens in enumerate(committed):
            before = [-1, *verdict.path[number]]
            at += [number * positions + before[i] + 1 for i in range(len(tokens))]
            ids += [token.ids[0] for token in tokens]
        device = target.first.ids.device
        where = torch.tensor(at, dtype=torch.long, device=device)
        chosen = torch.tensor(ids, dtype=torch.long, device=device)
        logprobs = target.first[where].at(chosen).double().log().tolist()
        if target.further:
            _add_columns(target, verdict, committed, drawn, logprobs)
        for row, tokens, gain in zip(rows, committed, gains):
            row.ids += [token.ids for token in tokens]
            row.history += [token.ids[0] for token in tokens]
            row.logprobs += logprobs[:gain]
            row.gained.append(gain)
            del logprobs[:gain]


def _add_columns(
    target: Target,
    verdict: Verdict,
    committed: list[list[Token]],
    drawn: dict[int, Drawn],
    logprobs: list[float],
) -> None:
    """Add the log-probabilities of the columns after the first."""
    place, rows = 0, len(committed)
    for number, tokens in enumerate(committed):
        for i, token in enumerate(tokens):
            path = verdict.path[number]
            node = path[i] if i < len(path) else verdict.node[number]
            for column, probs in enumerate(target.further, start=1):
                if i < len(path) or column <= verdict.column[number]:
                    nodes = len(probs) // rows
                    chosen = torch.tensor([token.ids[column]], device=probs.ids.device)
                    one = probs[number * nodes + node : number * nodes + node + 1]
                    logprobs[place] += float(one.at(chosen).double().log())
            if i == len(path):
                own = drawn[number]
                for column, probs in enumerate(own, start=len(token.ids) - len(own)):
                    chosen = torch.tensor([token.ids[column]], device=probs.ids.device)
                    logprobs[place] += float(probs.at(chosen).double().log())
            place += 1
