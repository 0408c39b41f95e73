"""Drafting with the model's own heads for later tokens (`CausalLMConfig.future_heads`).

The hidden state from which the target drew the last known token also says something of the tokens after it:
head i of the token i places further on. So a chain as long as there are heads costs no pass at all. A head
does not know the tokens between; its draws are independent given the hidden state, which is what q states.

b sequences · d width
"""

from __future__ import annotations

import torch
from torch import Tensor

from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.sample.drafters.base import nothing, replace_by_last
from lexel.sample.drafters.chain import ChainDrafter
from lexel.sample.session import Outcome, Proposal, Row, Session
from lexel.sample.stream import Prediction, Tree


class HeadsDrafter(ChainDrafter):
    """window: heads used at most (None: all). Raises LexelError when the model has none."""

    def __init__(self, lm: CausalLM, window: int | None = None) -> None:
        if lm.future is None:
            raise LexelError("the model has no heads for later tokens; train it with future_heads above 0.")
        super().__init__(min(window or len(lm.future), len(lm.future)))
        self._known: list[Tensor | None] = []

    def admit(self, session: Session, rows: list[Row], prompts: Prediction | None) -> None:
        """The pass over the prompts ends before their last tokens: its last hidden states are the ones."""
        if len(session.rows) == len(rows):
            self._known = []
        lane = 0
        for row in rows:
            states = []
            for prompt in [row.prompt] if row.null is None else [row.prompt, row.null]:
                if prompts is not None and len(prompt) > 1:
                    states.append(prompts.hidden[lane, len(prompt) - 2])
                lane += 1
            whole = len(states) == 1 + (row.null is not None)
            self._known.append(torch.stack(states) if whole else None)

    def drop(self, row: int) -> None:
        """See `Drafter.drop`."""
        replace_by_last(self._known, row)

    def observe(self, session: Session, outcome: Outcome) -> None:
        """Keep the hidden states of the last accepted token, of both rows of guidance."""
        prediction = outcome.prediction
        for number, path in enumerate(outcome.verdict.path):
            position = path[-1] + 1 if path else 0
            at = [prediction.cond[number, position]]
            if session.rows[number].null is not None:
                at.append(prediction.uncond[number, position])
            self._known[number] = prediction.rows(torch.stack(at))

    def propose(self, session: Session) -> Proposal:
        """See `Drafter.propose`."""
        lm = session.stream.lm
        assert lm.future is not None
        known = [state for state in self._known if state is not None]
        if not known:
            return nothing(session)
        cond, uncond, lanes = list[list[int]](), list[list[int]](), 0
        for state in self._known:
            wide = 0 if state is None else len(state)
            cond.append([lanes if wide else 0])
            uncond.append([lanes + 1 if wide > 1 else -1])
            lanes += wide
        where = torch.tensor(cond, device=session.device), torch.tensor(uncond, device=session.device)
        hidden = iter(lm.future(torch.cat(known)))

        def read(fed: list[Tree]) -> Prediction:
            return Prediction(lm, next(hidden)[:, None], *where)

        return self._chain(session, read, [state is not None for state in self._known])
