"""Generations in flight: what drafters get to see, and how their proposals become tensors.

b sequences · g drafted tokens (padded) · k columns (codes per position) · s support · v vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lexel.document import State, TokenSequence
from lexel.sample.acceptance import Draft, Target, Verdict
from lexel.sample.logits import Distribution, SamplingConfig, target_distribution
from lexel.sample.policy import Choice, Policy, Token
from lexel.sample.stream import Prediction, Stream, Tree


@dataclass(eq=False)
class Row:
    """One generation in flight. random: the source of all its randomness; history: ids (column 0) of the
    prompt and of what came after; ids, logprobs: what was generated; gained: tokens per round."""

    prompt: TokenSequence
    null: TokenSequence | None
    policy: Policy
    random: np.random.Generator
    state: State
    history: list[int]
    ids: list[tuple[int, ...]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    gained: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, prompt: TokenSequence, null: TokenSequence | None, policy: Policy, seed: int) -> Row:
        """A generation that stands right after its prompt."""
        first = prompt.first
        state = policy.grammar.start(prompt)
        return cls(prompt, null, policy, np.random.default_rng(seed), state, first.tolist())

    @property
    def done(self) -> bool:
        """Whether its plan is fulfilled."""
        return self.policy.grammar.done(self.state)

    def remaining(self) -> int:
        """How many more tokens may come at most."""
        return self.policy.grammar.remaining(self.state)

    def advance(self, state: State, token: int) -> State | None:
        """The grammar's state after `token`; None when the token is not allowed there."""
        if token not in self.policy.place(state).choice.members:
            return None
        return self.policy.advance(state, token)


@dataclass(frozen=True)
class Proposal:
    """A tree per sequence, and per column the distributions of ``b · g`` rows (row-major, padded to the
    largest tree) that its tokens were drawn from; None when they were chosen without chance."""

    trees: list[Tree]
    probs: tuple[Distribution, ...] | None = None

    def draft(self, columns: int, device: torch.device) -> Draft:
        """The same as tensors."""
        longest = max(len(tree.tokens) for tree in self.trees)
        ids = np.zeros((len(self.trees), longest, columns), dtype=np.int64)
        parents = np.tile(np.arange(-1, longest - 1), (len(self.trees), 1))
        for row, tree in enumerate(self.trees):
            if tree.tokens:
                ids[row, : len(tree.tokens)] = [token.ids for token in tree.tokens]
                parents[row, : len(tree.tokens)] = tree.parents
        lengths = torch.tensor([len(tree.tokens) for tree in self.trees], device=device)
        return Draft(
            torch.from_numpy(ids).to(device), torch.from_numpy(parents).to(device), lengths, self.probs
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a proposal: the target's pass and distributions, the verdict, the tokens each sequence
    gained."""

    proposal: Proposal
    draft: Draft
    prediction: Prediction
    target: Target
    verdict: Verdict
    committed: list[list[Token]]


class Session:
    """The generations in flight over one model: their stream through it and their rows, in the same order.

    reach: the most nodes of a tree; every call of `uniforms` draws at least so many numbers of each row, so
    that a row's randomness does not depend on the company it keeps."""

    def __init__(self, stream: Stream, reach: int = 0) -> None:
        self.stream, self.reach = stream, reach
        self.rows: list[Row] = []

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.stream.device

    def uniforms(self, count: int, rows: Iterable[int] | None = None) -> Tensor:
        """Float64 ``[b, count]`` in [0, 1), each row from its own source. rows: those that need them (None:
        all); the others' are 0, and their sources stay where they are."""
        many = max(count, 1 + self.reach * self.columns)
        drawn = np.zeros((len(self.rows), count))
        for row in range(len(self.rows)) if rows is None else rows:
            drawn[row] = self.rows[row].random.random(many)[:count]
        return torch.from_numpy(drawn).to(self.device)

    def distributions(
        self,
        prediction: Prediction,
        states: Sequence[Sequence[State | None]],
        contexts: Sequence[Sequence[Sequence[int]]] | None = None,
        soft: bool = False,
    ) -> Distribution:
        """The distribution of the next token at ``states[row][j]``, position j of the prediction: ``b · m``
        rows, empty where there is no state or it is done. contexts: the ids before each of those, for logits
        processors (`contexts`). soft: the plain softmax of the guided logits, whatever the settings."""
        rows, positions = prediction.cond.shape
        cells: dict[tuple[SamplingConfig, int, int], list[int]] = {}
        places: dict[tuple[SamplingConfig, int, int], tuple[Choice, int]] = {}
        for row, line in enumerate(states):
            policy = self.rows[row].policy
            grammar = policy.grammar
            for j, state in enumerate(line[:positions]):
                if state is None or grammar.done(state):
                    continue
                place = policy.place(state)
                # Rows with processors of their own are done apart.
                config = SamplingConfig(guidance=place.config.guidance) if soft else place.config
                key = config, id(place.choice), row if policy.processors else -1
                cells.setdefault(key, []).append(row * positions + j)
                places[key] = place.choice, row
        parts, order = [], []
        for key, cell in cells.items():
            choice, row = places[key]
            before = None
            if contexts is not None and key[2] >= 0:
                before = [torch.tensor(contexts[row][n % positions], device=self.device) for n in cell]
            every = len(cell) == rows * positions
            parts.append(self._part(prediction, None if every else cell, key[0], choice, row, before))
            order += cell
        return self.arranged(parts, order, rows * positions)

    def _part(
        self,
        prediction: Prediction,
        cells: list[int] | None,
        config: SamplingConfig,
        choice: Choice,
        row: int,
        contexts: list[Tensor] | None,
    ) -> Distribution:
        """The distributions at some cells that share settings and allowed ids."""
        index = None if cells is None else torch.tensor(cells, device=self.device)
        cond, uncond = (x.flatten() for x in (prediction.cond, prediction.uncond))
        if index is not None:
            cond, uncond = cond[index], uncond[index]
        guided = config.guidance != 1.0 and prediction.guided
        hidden = prediction.rows(torch.cat([cond, uncond]) if guided else cond)
        logits = prediction.lm.project(hidden, choice.start, choice.stop)
        if not choice.whole:
            logits = logits[:, choice.ids - choice.start]
        return target_distribution(
            logits[: len(cond)],
            logits[len(cond) :] if guided else None,
            config if guided else unguided(config),
            choice.ids,
            processors=self.rows[row].policy.processors,
            contexts=contexts,
            size=self.vocabulary_size,
        )

    def arranged(self, parts: list[Distribution], order: list[int], count: int) -> Distribution:
        """`count` distributions: number ``order[i]`` is the i-th of `parts` put together, others are
        empty."""
        if len(parts) == 1 and len(order) == count:
            return parts[0]
        size = self.vocabulary_size
        if parts:  # with the support of the first, so that equal supports stay equal
            empty = Distribution(parts[0].ids[:1], torch.zeros_like(parts[0].probs[:1]), size)
        else:
            nowhere = torch.full((1, 1), size, device=self.device)
            empty = Distribution(nowhere, torch.zeros(1, 1, device=self.device), size)
        together = Distribution.cat([*parts, empty])
        at = torch.full((count,), len(together) - 1)
        at[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
        return together[at.to(self.device)]

    @property
    def vocabulary_size(self) -> int:
        """v"""
        return self.rows[0].policy.grammar.codec.vocabulary.size

    @property
    def columns(self) -> int:
        """k"""
        return self.rows[0].policy.grammar.codec.columns

    def contexts(self, trees: Sequence[Tree]) -> list[list[list[int]]] | None:
        """Ids (column 0) before each drafted token and after it; None when no processor asks."""
        if not any(row.policy.processors for row in self.rows):
            return None
        lines = []
        for row, tree in zip(self.rows, trees):
            line = [row.history]
            for token, parent in zip(tree.tokens, tree.parents):
                line.append([*line[parent + 1], token.ids[0]])
            lines.append(line)
        return lines


@lru_cache(maxsize=64)
def unguided(config: SamplingConfig) -> SamplingConfig:
    """The settings without guidance."""
    return replace(config, guidance=1.0)
