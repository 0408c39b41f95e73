"""Who proposes tokens for the target to verify.

* `NestedDrafter`: the target itself with a narrow feed-forward slice (MatFormer, arXiv 2310.07707). It shares
  the target's attention cache: its provisional keys and values are overwritten by the verifying pass.
* `ModelDrafter`: a separate small model of the same vocabulary, with its own cache.
* `JacobiDrafter`: no model at all; the previous iteration's distributions are the draft (speculative Jacobi
  decoding, arXiv 2410.01699, with the maximal coupling of MC-SJD).

All of them propose text and codes alike, under the grammar and with guidance, and clip their drafts to what
the grammar still allows. Whatever they propose, the output's distribution is the target's.

b rows · g drafted tokens (padded) · v vocabulary
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lexel.document import State
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.sample.acceptance import Draft, Verdict, recouple
from lexel.sample.logits import draw
from lexel.sample.stream import Prediction, Session, Stream, Token


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens per row, the grammar's states before each of them and after the last (so one more), and
    the distributions float ``[b, g, v]`` that they were drawn from."""

    tokens: list[list[Token]]
    states: list[list[State]]
    probs: Tensor | None

    def draft(self, session: Session, prediction: Prediction) -> Draft:
        """The same as tensors, on the prediction's device."""
        device, size = prediction.cond.device, prediction.cond.shape[-1]
        longest = max(len(line) for line in self.tokens)
        ids = [[token.ids[0] for token in line] + [0] * (longest - len(line)) for line in self.tokens]
        probs = prediction.cond.new_zeros(len(ids), 0, size) if self.probs is None else self.probs
        done = [session.grammar.done(line[-1]) for line in self.states]
        return Draft(
            ids=torch.tensor(ids, dtype=torch.long, device=device).reshape(len(ids), longest),
            lengths=torch.tensor([len(line) for line in self.tokens], device=device),
            probs=probs[:, :longest],
            bonus=~torch.tensor(done, device=device),
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a draft: its tensors, the target's distributions there (``[b, g + 1, v]``), the verdict,
    and the tokens each row gained."""

    draft: Draft
    target: Tensor
    verdict: Verdict
    committed: list[list[Token]]


class Drafter(ABC):
    """Proposes up to `window` tokens per row and round. `forwards` counts its network calls.

    A drafter serves one generation at a time: `start` resets it."""

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"a drafter's window must be at least 1 token, got {window}.")
        self.window = window
        self.forwards = 0

    def start(self, session: Session) -> None:
        """Begin a generation; the target's stream has read the prompts."""
        self.forwards = 0

    @abstractmethod
    def propose(self, session: Session) -> Proposal:
        """Draft a continuation of each row; must leave the target's stream as it was."""

    @abstractmethod
    def observe(self, session: Session, outcome: Outcome) -> None:
        """Learn what became of the proposal."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""

    def limit(self, session: Session, state: State) -> int:
        """Tokens worth drafting: the last remaining one comes with the verifying pass for free."""
        return min(self.window, session.grammar.remaining(state) - 1)


class _ChainDrafter(Drafter):
    """Draws one token after the other from a network read through a stream: an `own` one, or the target's."""

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.own: Stream | None = None

    def observe(self, session: Session, outcome: Outcome) -> None:
        """Keep in an own cache what was accepted."""
        if self.own is not None:
            self.own.commit(outcome.committed)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        if self.own is not None:
            self.own.keep(rows)

    def _chain(self, session: Session, stream: Stream, width: float | None) -> Proposal:
        states = [[state] for state in session.states]
        tokens: list[list[Token]] = [[] for _ in states]
        limits = [self.limit(session, state) for state in session.states]
        fed: list[list[Token]] = [[] for _ in states]
        steps: list[Tensor] = []
        for step in range(max(limits)):
            active = [
                row
                for row, limit in enumerate(limits)
                if step < limit and not session.grammar.done(states[row][-1])
            ]
            if not active:
                break
            last = self._last(stream.forward(fed, width=width))
            self.forwards += 1
            now: list[list[State]] = [[] for _ in states]
            for row in active:
                now[row] = states[row][-1:]
            contexts = session.contexts(tokens)
            ends = None if contexts is None else [line[-1:] for line in contexts]
            probs = session.policy.distribution(last, now, ends)[:, 0]
            ids = draw(probs, session.uniform(len(states))).tolist()
            fed = [[] for _ in states]
            for row in active:
                token = session.token(states[row][-1], (ids[row],))
                states[row].append(session.grammar.advance(states[row][-1], ids[row]))
                tokens[row].append(token)
                fed[row] = [token]
            steps.append(probs)
        return Proposal(tokens, states, torch.stack(steps, dim=1) if steps else None)

    @staticmethod
    def _last(prediction: Prediction) -> Prediction:
        uncond = prediction.uncond
        return Prediction(
            prediction.cond[:, -1:], None if uncond is None else uncond[:, -1:], prediction.hidden[:, -1:]
        )


class NestedDrafter(_ChainDrafter):
    """Drafts with the target's own narrow feed-forward slice.

    width: one of the model's `ffn_widths` below 1; window: tokens per round. Raises LexelError when the model
    was not built with that width."""

    def __init__(self, lm: CausalLM, width: float | None = None, window: int = 4) -> None:
        super().__init__(window)
        widths = lm.config.ffn_widths
        if width is None:
            width = widths[0]
        if width not in widths or width >= 1:
            raise LexelError(
                f"the model has no nested width {width} to draft with; it has {', '.join(map(str, widths))}."
            )
        self.width = width

    def propose(self, session: Session) -> Proposal:
        """See `Drafter.propose`."""
        mark = session.stream.mark()
        counted = session.stream.forwards
        proposal = self._chain(session, session.stream, self.width)
        session.stream.rewind(mark)
        session.stream.forwards = counted  # they are counted as drafts
        return proposal


class ModelDrafter(_ChainDrafter):
    """Drafts with a separate small model. Raises LexelError when its vocabulary has another size."""

    def __init__(self, lm: CausalLM, window: int = 4) -> None:
        super().__init__(window)
        self.lm = lm

    def start(self, session: Session) -> None:
        """Read the prompts with the small model."""
        super().start(session)
        theirs, own = session.stream.lm.config.vocab_size, self.lm.config.vocab_size
        if theirs != own:
            raise LexelError(f"the drafting model has {own} ids, the target {theirs}; they must be the same.")
        self.own = Stream(
            self.lm, session.prompts, session.unconditional, session.room, slack=self.window + 2
        )

    def propose(self, session: Session) -> Proposal:
        """See `Drafter.propose`."""
        assert self.own is not None, "call start first"
        return self._chain(session, self.own, None)


class JacobiDrafter(Drafter):
    """Re-reads its own window until it stops changing: each pass redraws every position from the target's
    distribution given the current window, with maximal coupling to the previous draw.

    init: how a position enters the window: "random" (uniform among the allowed ids) or "repeat" (the id to
    its left when allowed, `repeat_horizon` of the released code). Speculative Jacobi decoding is exact only
    because the distributions of the previous pass are kept as q."""

    def __init__(self, window: int = 16, init: Literal["random", "repeat"] = "random") -> None:
        super().__init__(window)
        if init not in ("random", "repeat"):
            raise ValueError(f"init must be random or repeat, got {init!r}.")
        self.init = init
        self._ids: list[list[int]] = []
        self._probs: list[list[Tensor]] = []
        # Per grammar mask (and id to repeat): the ids that may enter the window, and their distribution.
        self._entries: dict[tuple[int, int | None], tuple[list[int], Tensor]] = {}

    def start(self, session: Session) -> None:
        """Begin with an empty window."""
        super().start(session)
        self._ids = [[] for _ in session.states]
        self._probs = [[] for _ in session.states]
        self._entries = {}

    def propose(self, session: Session) -> Proposal:
        """See `Drafter.propose`. A window token that no longer fits the grammar ends the draft: it is surely
        rejected, and must be seen to be, for the residual to be right."""
        lines = [self._line(session, row, state) for row, state in enumerate(session.states)]
        tokens = [line[0] for line in lines]
        states = [line[1] for line in lines]
        weights = [probs for line in lines for probs in line[2]]
        if not weights:
            return Proposal(tokens, states, None)
        stacked = weights[0].new_zeros(len(lines), max(len(line) for line in tokens), len(weights[0]))
        for row, (_, _, probs) in enumerate(lines):
            if probs:
                stacked[row, : len(probs)] = torch.stack(probs)
        return Proposal(tokens, states, stacked)

    def _line(
        self, session: Session, row: int, state: State
    ) -> tuple[list[Token], list[State], list[Tensor]]:
        """One row's window: tokens, states around them, and the distributions they were drawn from."""
        states, tokens, probs = [state], list[Token](), list[Tensor]()
        for place in range(self.limit(session, state)):
            state = states[-1]
            if session.grammar.done(state):
                break
            if place < len(self._ids[row]):
                token, weights = self._ids[row][place], self._probs[row][place]
            else:
                left = tokens[-1].ids[0] if tokens else session.history[row][-1]
                token, weights = self._fresh(session, state, left)
            tokens.append(session.token(state, (token,)))
            probs.append(weights)
            if not bool(session.policy.place(state).mask[token]):
                states.append(state)  # never reached: the token before it is rejected
                break
            states.append(session.grammar.advance(state, token))
        return tokens, states, probs

    def _fresh(self, session: Session, state: State, left: int) -> tuple[int, Tensor]:
        """A token that enters the window, and the distribution it was drawn from."""
        place = session.policy.place(state)
        repeat = self.init == "repeat" and bool(place.mask[left])
        key = (place.number, left if repeat else None)
        if key not in self._entries:
            weights = torch.zeros_like(place.mask, dtype=torch.float32) if repeat else place.mask.float()
            if repeat:
                weights[left] = 1
            self._entries[key] = (weights.nonzero()[:, 0].tolist(), weights / weights.sum())
        choices, weights = self._entries[key]
        return choices[int(float(session.uniform(1)) * len(choices))], weights

    def observe(self, session: Session, outcome: Outcome) -> None:
        """Redraw the window from this pass's distributions and slide it past the committed tokens."""
        draft, target = outcome.draft, outcome.target
        redrawn = recouple(target, draft, outcome.verdict, session.uniform).tolist()
        ends = (draft.lengths + draft.bonus).tolist()
        for row, (gained, end) in enumerate(zip(outcome.committed, ends)):
            places = range(len(gained), end)
            self._ids[row] = [redrawn[row][j] for j in places]
            self._probs[row] = [target[row, j] for j in places]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._ids = [self._ids[row] for row in rows]
        self._probs = [self._probs[row] for row in rows]
