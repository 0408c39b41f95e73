"""A batch of sequences running through one language model, each at its own pace.

`Stream` owns the cache: every sequence and, under guidance, its unconditional twin. Prompts of different
lengths are padded on the right and the padding is cropped away, so no mask is needed and a row's numbers do
not depend on its neighbours. `Policy` turns logits into the distribution the grammar and the sampling
settings allow. `Session` is what a `Drafter` gets to see of a generation.

b rows (sequences) · r = b or 2b cache rows (conditional, then unconditional) · m positions · v vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lexel.document import Grammar, State, TokenSequence
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.sample.logits import Processor, SamplingConfig, Uniform, target_distribution
from lexel.types import TokenBatch


class Token(NamedTuple):
    """One position: its id in each column, its modality and its (index, row, column)."""

    ids: tuple[int, ...]
    modality: int
    position: tuple[int, int, int]


@dataclass(frozen=True)
class Prediction:
    """Logits ``[b, m, v]`` of the conditional and (or None) unconditional rows after each row's last known
    token and after each token fed behind it, and the hidden states ``[r, m, d]`` they come from."""

    cond: Tensor
    uncond: Tensor | None
    hidden: Tensor


@dataclass(frozen=True)
class Mark:
    """A point in a stream to return to."""

    lengths: tuple[int, ...]
    unread: list[list[Token]]
    drafted: list[list[Token]]


def _tokens(sequence: TokenSequence) -> list[Token]:
    ids = sequence.ids if sequence.ids.ndim == 2 else sequence.ids[:, None]
    rows = zip(ids.tolist(), sequence.modality.tolist(), sequence.positions.tolist())
    return [Token(tuple(i), m, (p[0], p[1], p[2])) for i, m, p in rows]


class Stream:
    """Sequences in one model's cache. Known tokens that the model has not read yet wait in `unread`; drafted
    ones may be fed behind them and are kept or forgotten by `commit`. `forwards` counts network calls.

    room: tokens that may follow each prompt. Raises LexelError when they do not fit the model's context.
    """

    def __init__(
        self,
        lm: CausalLM,
        prompts: Sequence[TokenSequence],
        unconditional: Sequence[TokenSequence] | None,
        room: int,
        slack: int,
    ) -> None:
        sequences = [_tokens(s) for s in [*prompts, *(unconditional or ())]]
        longest = max(len(s) for s in sequences)
        if longest + room > lm.config.max_length:
            raise LexelError(
                f"a prompt of {longest} tokens and up to {room} more do not fit the model's context of "
                f"{lm.config.max_length}; shorten the prompt or limit what is generated."
            )
        self.lm, self.guided, self.forwards = lm, unconditional is not None, 0
        self.device = next(lm.parameters()).device
        # Slack: rows at different lengths are fed blocks padded to the longest one.
        self.cache = lm.new_cache(len(sequences), longest + room + slack)
        self.columns = len(sequences[0][0].ids)
        # A token has the same place in both twins, but their prompts differ in length.
        ends = [s[-1].position[0] for s in sequences]
        self.shift = [end - ends[i % len(prompts)] for i, end in enumerate(ends)]
        self.unread = [s[-1:] for s in sequences]
        self.drafted: list[list[Token]] = [[] for _ in sequences]
        if longest > 1:
            self._read([s[:-1] for s in sequences], width=None, logits=False)
        self.forwards = 0  # the prompts' own pass gains no token

    @property
    def rows(self) -> int:
        """Sequences in flight (a guided pair counts once)."""
        return len(self.unread) // (2 if self.guided else 1)

    def _read(
        self, blocks: list[list[Token]], width: float | None, logits: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Feed each cache row its block, padded on the right: logits ``[r, q, v]`` (unless not wanted, as for
        a prompt) and hidden states ``[r, q, d]``."""
        longest = max(len(block) for block in blocks)
        lengths = [len(block) for block in blocks]
        filler = Token((0,) * self.columns, 0, (0, 0, 0))
        padded = [block + [filler] * (longest - len(block)) for block in blocks]
        ids = torch.tensor([[token.ids for token in block] for block in padded], device=self.device)
        batch = TokenBatch(
            ids=ids[..., 0] if self.columns == 1 else ids,
            modality=torch.tensor([[t.modality for t in block] for block in padded], device=self.device),
            positions=torch.tensor([[t.position for t in block] for block in padded], device=self.device),
        )
        before = self.cache.host_lengths
        select = None if logits else torch.zeros(ids.shape[:2], dtype=torch.bool, device=self.device)
        output = self.lm(batch, cache=self.cache, width=width, select=select)
        self.forwards += 1
        if min(lengths) < longest:
            self.cache.crop([have + new for have, new in zip(before, lengths)])
        return output.logits, output.hidden

    def _own(self, row: int, tokens: Sequence[Token]) -> list[Token]:
        shift = self.shift[row]
        if not shift:
            return list(tokens)
        return [Token(t.ids, t.modality, (t.position[0] + shift, *t.position[1:])) for t in tokens]

    def forward(self, tokens: Sequence[Sequence[Token]], width: float | None = None) -> Prediction:
        """Read what is unread of each row, then its drafted `tokens` (b lists of any length).

        Position 0 of the prediction follows the last known token (if any was unread), position j the j-th of
        `tokens`; positions past a row's own tokens are meaningless. width: the nested feed-forward width,
        None for the full."""
        drafts = [self._own(row, tokens[row % len(tokens)]) for row in range(len(self.unread))]
        logits, hidden = self._read([known + new for known, new in zip(self.unread, drafts)], width)
        first = torch.tensor([len(known) - 1 for known in self.unread], device=self.device)
        positions = 1 + max(len(draft) for draft in drafts)
        if positions < logits.shape[1] or bool((first != 0).any()):
            take = first[:, None] + torch.arange(positions, device=self.device)
            take = take.clamp(min=0, max=logits.shape[1] - 1)
            every = torch.arange(len(take), device=self.device)[:, None]
            logits, hidden = logits[every, take], hidden[every, take]
        self.unread = [[] for _ in drafts]
        self.drafted = [old + new for old, new in zip(self.drafted, drafts)]
        rows = self.rows
        return Prediction(logits[:rows], logits[rows:] if self.guided else None, hidden)

    def commit(self, tokens: Sequence[Sequence[Token]]) -> None:
        """Append known tokens to each row. Drafted tokens in the cache that agree stay; the cache forgets the
        others, so a row's length is its own number of accepted tokens."""
        dropped, rows = [], len(self.unread)
        for row in range(rows):
            known, drafted = self._own(row, tokens[row % len(tokens)]), self.drafted[row]
            same = next((i for i, (a, b) in enumerate(zip(known, drafted)) if a != b), None)
            keep = min(len(known), len(drafted)) if same is None else same
            dropped.append(len(drafted) - keep)
            self.unread[row] = self.unread[row] + known[keep:]
            self.drafted[row] = []
        if any(dropped):
            self.cache.crop([have - less for have, less in zip(self.cache.host_lengths, dropped)])

    def mark(self) -> Mark:
        """A point to `rewind` to."""
        return Mark(self.cache.host_lengths, list(self.unread), list(self.drafted))

    def rewind(self, mark: Mark) -> None:
        """Forget everything read since `mark`; the next pass overwrites it."""
        self.cache.crop(mark.lengths)
        self.unread, self.drafted = list(mark.unread), list(mark.drafted)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""
        every = [*rows, *(self.rows + row for row in rows)] if self.guided else list(rows)
        self.cache.reorder(torch.tensor(every, device=self.device))
        self.shift = [self.shift[row] for row in every]
        self.unread = [self.unread[row] for row in every]
        self.drafted = [self.drafted[row] for row in every]


class Place(NamedTuple):
    """What the grammar and the settings say about the next token at one state: all that is asked at every
    step, looked up once. mask: bool ``[v]`` on the model's device; number: which of the masks it is."""

    modality: int
    position: tuple[int, int, int]
    config: SamplingConfig
    mask: Tensor
    number: int


class Policy:
    """From logits to the distributions that the grammar and each modality's settings allow."""

    def __init__(
        self,
        grammar: Grammar,
        sampling: Mapping[str, SamplingConfig],
        processors: Sequence[Processor],
        device: torch.device,
    ) -> None:
        known = grammar.codec.vocabulary.modalities
        if unknown := sorted(set(sampling) - set(known)):
            raise LexelError(f"no modality {', '.join(unknown)} to sample; the model has {', '.join(known)}.")
        self.grammar, self.processors, self.device = grammar, processors, device
        self.configs = tuple(sampling.get(name, SamplingConfig()) for name in known)
        self._places: dict[State, Place] = {}
        self._masks: dict[int, tuple[int, Tensor, Tensor]] = {}

    @property
    def guided(self) -> bool:
        """Whether any modality of the plan needs the unconditional rows."""
        names = self.grammar.codec.vocabulary.modalities
        return any(c.guidance != 1.0 for name, c in zip(names, self.configs) if name in self.grammar.plan)

    def place(self, state: State) -> Place:
        """What is known about the next token at `state`, which must not be done."""
        if state not in self._places:
            mask, modality = self.grammar.allowed(state), self.grammar.modality(state)
            # The grammar's own mask is kept beside its copy: its id() must not be reused meanwhile.
            number, _, here = self._masks.setdefault(id(mask), (len(self._masks), mask, mask.to(self.device)))
            position = self.grammar.position(state)
            self._places[state] = Place(modality, position, self.configs[modality], here, number)
        return self._places[state]

    def _allowed(self, places: Sequence[Place]) -> Tensor:
        """Bool ``[1 or n, v]``: one row when all places share their mask."""
        masks = {place.number: place.mask for place in places}
        if len(masks) == 1:
            return places[0].mask[None]
        order = {number: index for index, number in enumerate(masks)}
        index = torch.tensor([order[place.number] for place in places], device=self.device)
        return torch.stack(list(masks.values()))[index]

    def distribution(
        self,
        prediction: Prediction,
        states: Sequence[Sequence[State]],
        contexts: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> Tensor:
        """Float ``[b, m, v]``: the distribution of the next token at ``states[row][j]``; zeros where a row
        has no state (or one that is done). contexts: for processors, the ids before each of those."""
        rows, positions, size = prediction.cond.shape
        cells: dict[SamplingConfig, list[tuple[int, int, Place]]] = {}
        for row, line in enumerate(states):
            for j, state in enumerate(line):
                if not self.grammar.done(state):
                    place = self.place(state)
                    cells.setdefault(place.config, []).append((row, j, place))
        cond, uncond = (
            None if x is None else x.reshape(-1, size) for x in (prediction.cond, prediction.uncond)
        )
        assert cond is not None
        result = cond.new_zeros(cond.shape, dtype=torch.promote_types(cond.dtype, torch.float32))
        for config, group in cells.items():
            index = torch.tensor([row * positions + j for row, j, _ in group], device=self.device)
            every = len(group) == len(result)
            before = None
            if contexts is not None:
                before = [torch.tensor(contexts[row][j], device=self.device) for row, j, _ in group]
            probs = target_distribution(
                cond if every else cond[index],
                uncond if every or uncond is None else uncond[index],
                config,
                self._allowed([place for _, _, place in group]),
                processors=self.processors,
                contexts=before,
            )
            if every:  # the usual case, without a copy
                return probs.reshape(rows, positions, size)
            result[index] = probs
        return result.reshape(rows, positions, size)


@dataclass
class Session:
    """A generation in flight, as drafters see it: the target's stream, the policy, a source of uniforms, and
    for each row its grammar state, the ids so far (prompt and generated) and its prompts."""

    stream: Stream
    policy: Policy
    uniform: Uniform
    states: list[State]
    history: list[list[int]]
    prompts: Sequence[TokenSequence]
    unconditional: Sequence[TokenSequence] | None
    room: int

    @property
    def grammar(self) -> Grammar:
        """The grammar of what is generated."""
        return self.policy.grammar

    def token(self, state: State, ids: tuple[int, ...]) -> Token:
        """The token `ids` at the place that `state` says comes next."""
        place = self.policy.place(state)
        return Token(ids, place.modality, place.position)

    def contexts(self, tokens: Sequence[Sequence[Token]]) -> list[list[list[int]]] | None:
        """Ids (column 0) before each drafted position and after the last; None when no processor asks."""
        if not self.policy.processors:
            return None
        lines = []
        for history, drafted in zip(self.history, tokens):
            ids = [token.ids[0] for token in drafted]
            lines.append([history + ids[:j] for j in range(len(ids) + 1)])
        return lines
