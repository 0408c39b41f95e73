"""Sequences running through one language model, each at its own pace.

`Stream` owns the cache. A sequence takes one cache row (a *lane*), or two side by side when it is guided: the
conditional and the unconditional one. Sequences come and go while others run. Blocks of different lengths are
padded on the right and the padding is cropped away, so a row's numbers do not depend on its neighbours.
Drafted tokens are fed as a tree: each sees what is known, its ancestors and itself.

r lanes · q new tokens per lane · m drafted positions (with the last known one) · d width
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lexel.document import State, TokenSequence
from lexel.models.causal_lm import CausalLM
from lexel.models.graphs import GraphedStep, capturable
from lexel.nn.spans import see_given
from lexel.sample.policy import Token
from lexel.types import TokenBatch

GRAPHED_WIDTHS = (1, 2, 3, 5, 9, 17, 33, 65)
"""Tokens of a graphed pass: blocks are padded to the next of these, so that few graphs serve all of them."""


@dataclass(frozen=True)
class Tree:
    """What is drafted behind the known tokens of one sequence. parents: per token the number of the one
    before it, -1 for the last known token; parents come before their children. states: the grammar's before
    all of them, then after each."""

    tokens: list[Token]
    parents: list[int]
    states: list[State]

    @property
    def chain(self) -> bool:
        """Whether each token follows the one before it."""
        return self.parents == list(range(-1, len(self.parents) - 1))

    @classmethod
    def line(cls, tokens: list[Token], states: list[State]) -> Tree:
        """A chain: a tree without branches."""
        return cls(tokens, list(range(-1, len(tokens) - 1)), states)


@dataclass(frozen=True)
class Prediction:
    """Hidden states ``[r, q, d]`` of one pass, and for each sequence and drafted position (0: after the last
    known token, j + 1: after token j) which of its rows ``r · q`` to read: long ``[b, m]``; `uncond` holds -1
    for sequences without guidance. lm: the network that was run; inputs: inputs ``[r, q, d]`` of the blocks
    asked for; guided: False where no sequence has an unconditional row, and settings' guidance is ignored."""

    lm: CausalLM
    hidden: Tensor
    cond: Tensor
    uncond: Tensor
    inputs: tuple[Tensor, ...] = ()
    guided: bool = True

    def rows(self, index: Tensor) -> Tensor:
        """Hidden states ``[n, d]`` at an index into all rows."""
        return self.hidden.flatten(0, 1)[index]


@dataclass
class Lane:
    """One cache row. shift: how much later its tokens stand than the conditional twin's, whose prompt has
    another length. Known tokens that the model has not read yet wait in `unread`; `drafted` ones are in the
    cache until `commit` keeps or forgets them, with the numbers of their `parents` (-1: what is known)."""

    shift: int
    unread: list[Token]
    drafted: list[Token] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Mark:
    """A point in a stream to return to."""

    lengths: tuple[int, ...]
    lanes: list[tuple[list[Token], list[Token], list[int]]]


def _tokens(sequence: TokenSequence) -> list[Token]:
    ids = sequence.ids if sequence.ids.ndim == 2 else sequence.ids[:, None]
    rows = zip(ids.tolist(), sequence.modality.tolist(), sequence.positions.tolist())
    tokens = [Token(tuple(i), m, (p[0], p[1], p[2])) for i, m, p in rows]
    if sequence.embeds is not None and sequence.embed_index is not None:
        for place, embed in zip(sequence.embed_index.tolist(), sequence.embeds):
            tokens[place] = tokens[place]._replace(embed=embed)
    return tokens


class Stream:
    """Sequences in one model's cache. `forwards` counts network calls, but not those for prompts. layers:
    blocks whose inputs every pass returns. graphed: passes of a few fixed widths, captured as CUDA graphs
    where there is CUDA (None: exactly there)."""

    def __init__(self, lm: CausalLM, layers: Sequence[int] = (), graphed: bool | None = None) -> None:
        self.lm, self.layers = lm, tuple(layers)
        self.device = next(lm.parameters()).device
        # A graphed pass returns hidden states only.
        wanted = (self.device.type == "cuda" if graphed is None else graphed) and not self.layers
        self.graphed = wanted and capturable(lm)
        self._steps: dict[tuple[int, float | None], GraphedStep[Tensor]] = {}
        self.cache = lm.new_cache(0, 1)
        self.lanes: list[Lane] = []
        self.guided: list[bool] = []
        self._first: list[int] = []
        self._indices: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.forwards = 0

    def __len__(self) -> int:
        """Sequences in flight (a guided pair counts once)."""
        return len(self.guided)

    # Coming and going

    def admit(
        self, prompts: Sequence[TokenSequence], nulls: Sequence[TokenSequence | None], slots: int
    ) -> Prediction | None:
        """Read new prompts, all but their last tokens, which stay unread, and append them to the sequences
        in flight. nulls: the unconditional twin of each, or None. slots: tokens that the cache must hold of
        each. Returns the pass over the prompts (None when there was nothing to read)."""
        lanes, lines = [], []
        for prompt, null in zip(prompts, nulls):
            known = _tokens(prompt)
            for sequence in [known] if null is None else [known, _tokens(null)]:
                shift = sequence[-1].position[0] - known[-1].position[0]
                lanes.append(Lane(shift, sequence[-1:]))
                lines.append(sequence)
        blocks = [line[:-1] for line in lines]
        cache = self.lm.new_cache(len(lanes), slots)
        longest = max(len(block) for block in blocks)
        output = None
        if longest:
            batch = self._batch(blocks, longest, self._prompt_mask(lines))
            hidden, inputs = self.lm.decode(batch, cache=cache, layers=self.layers)
            cache.crop([len(block) for block in blocks])
            empty = torch.empty(0, 0, dtype=torch.long)
            output = Prediction(self.lm, hidden, empty, empty, inputs)
        if self.lanes:
            self.cache.reserve(slots)
            self.cache.join(cache)
        else:
            self.cache = cache
        self.lanes += lanes
        self.guided += [null is not None for null in nulls]
        self._renumber()
        return output

    def drop(self, row: int) -> None:
        """Forget a sequence; the last one takes its place."""
        last = len(self) - 1
        wide, widest = 1 + self.guided[row], 1 + self.guided[last]
        here, there = self._first[row], self._first[last]
        if wide == widest:
            # From the back: dropping a lane moves the cache's last row into its place.
            for lane in reversed(range(here, here + wide)):
                self._drop_lane(lane)
        else:
            kept = [*range(here), *range(there, there + widest), *range(here + wide, there)]
            kept = kept if row != last else list(range(here))
            self.cache.reorder(torch.tensor(kept, dtype=torch.long))
            self.lanes = [self.lanes[lane] for lane in kept]
        self.guided[row] = self.guided[last]
        self.guided.pop()
        self._renumber()

    def _drop_lane(self, lane: int) -> None:
        self.cache.drop(lane)
        self.lanes[lane] = self.lanes[-1]
        self.lanes.pop()

    def _renumber(self) -> None:
        self._first, lane = [], 0
        self._indices.clear()
        for guided in self.guided:
            self._first.append(lane)
            lane += 1 + guided

    def own(self, row: int) -> list[Lane]:
        """The lanes of a sequence."""
        first = self._first[row]
        return self.lanes[first : first + 1 + self.guided[row]]

    # Passes

    def forward(self, trees: Sequence[Tree], width: float | None = None) -> Prediction:
        """Read what is unread of each sequence, then its tree. width: the nested feed-forward width, None for
        the full. A second call before `commit` may only append to chains."""
        blocks: list[list[Token]] = []
        parents: list[list[int]] | None = None if all(tree.chain for tree in trees) else []
        starts: list[int] = []
        for row, tree in enumerate(trees):
            for lane in self.own(row):
                known = len(lane.unread)
                starts.append(known - 1)
                blocks.append(lane.unread + _shifted(tree.tokens, lane.shift))
                if parents is not None:
                    above = [known + parent for parent in tree.parents]
                    parents.append([*range(-1, known - 1), *above])
                drafted = len(lane.drafted)
                lane.drafted = lane.drafted + tree.tokens
                lane.parents = lane.parents + [drafted + parent for parent in tree.parents]
                lane.unread = []
        before, width_of = self.cache.host_lengths, [len(block) for block in blocks]
        hidden, inputs = self._pass(blocks, parents, width)
        self.forwards += 1
        if min(width_of) < hidden.shape[1]:
            self.cache.crop([have + new for have, new in zip(before, width_of)])
        cond, uncond = self._index(starts, 1 + max(len(tree.tokens) for tree in trees), hidden.shape[1])
        return Prediction(self.lm, hidden, cond, uncond, inputs, any(self.guided))

    def _pass(
        self, blocks: list[list[Token]], parents: list[list[int]] | None, width: float | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states ``[r, q, d]`` of the blocks (and the inputs of `layers`); the cache grows by q."""
        longest = max(len(block) for block in blocks)
        wide = next((w for w in GRAPHED_WIDTHS if w >= longest), None) if self.graphed else None
        embedded = any(token.embed is not None for block in blocks for token in block)
        # A graphed pass reads ids alone.
        if wide is None or embedded or max(self.cache.host_lengths) + wide > self.cache.max_length:
            mask = None if parents is None else self._tree_mask(parents, longest)
            batch = self._batch(blocks, longest, mask)
            return self.lm.decode(batch, cache=self.cache, width=width, layers=self.layers)
        step = self._steps.get((wide, width))
        if step is None or step.cache is not self.cache:
            step = self._steps[wide, width] = GraphedStep(self.lm, self.cache, wide, torch.clone, width)
        batch = self._batch(blocks, wide, None)
        try:
            hidden = step(batch.ids, batch.positions, None if parents is None else _trees(parents, wide))
        except RuntimeError as reason:  # a driver or network that cannot be captured
            logging.getLogger(__name__).warning("decoding without CUDA graphs: %s", reason)
            self.graphed = False
            return self._pass(blocks, parents, width)
        self.cache.advance(wide)
        return hidden, ()

    def _index(self, starts: list[int], positions: int, columns: int) -> tuple[Tensor, Tensor]:
        """`Prediction.cond` and `uncond`, positions past a row's own block clamped into it."""
        key = (*starts, positions, columns)
        if key not in self._indices:
            first = np.array(self._first)
            twin = np.where(self.guided, first + 1, first)
            column = np.array(starts)[:, None] + np.arange(positions)
            cond, uncond = (
                lane[:, None] * columns + column[lane].clip(0, columns - 1) for lane in (first, twin)
            )
            uncond[twin == first] = -1
            both = torch.from_numpy(cond).to(self.device), torch.from_numpy(uncond).to(self.device)
            self._indices[key] = both
        return self._indices[key]

    def _batch(self, blocks: list[list[Token]], longest: int, mask: Tensor | None) -> TokenBatch:
        """The blocks, padded on the right to `longest` tokens."""
        columns = self.lm.config.columns
        filler = Token((0,) * columns, 0, (0, 0, 0))
        padded = [block + [filler] * (longest - len(block)) for block in blocks]
        ids = torch.tensor([[token.ids for token in block] for block in padded], device=self.device)
        embedded = [
            (row, place, token.embed)
            for row, block in enumerate(blocks)
            for place, token in enumerate(block)
            if token.embed is not None
        ]
        embeds, embed_index = None, None
        if embedded:
            embeds = torch.stack([embed for _, _, embed in embedded]).to(self.device)
            embed_index = torch.tensor([place[:2] for place in embedded], device=self.device)
        return TokenBatch(
            ids=ids[..., 0] if columns == 1 else ids,
            modality=torch.tensor([[t.modality for t in block] for block in padded], device=self.device),
            positions=torch.tensor([[t.position for t in block] for block in padded], device=self.device),
            attention_mask=mask,
            embeds=embeds,
            embed_index=embed_index,
        )

    def _prompt_mask(self, lines: list[list[Token]]) -> Tensor | None:
        """Bool ``[r, q, q]`` over all but the last token of each prompt where the model sees given pictures
        in both directions, None for plain causal attention."""
        closing = getattr(self.lm.config, "bidirectional", ())
        if not closing:
            return None
        mask = see_given(self._batch(lines, max(map(len, lines)), None), closing).attention_mask
        return None if mask is None else mask[:, :-1, :-1]

    def _tree_mask(self, parents: list[list[int]], longest: int) -> Tensor:
        """Bool ``[r, q, s]``: each token sees what its lane holds, its ancestors and itself."""
        mask = np.zeros((len(parents), longest, self.cache.span(longest)), dtype=bool)
        for lane, (have, line) in enumerate(zip(self.cache.host_lengths, parents)):
            mask[lane, :, :have] = True
            mask[lane, : len(line), have : have + len(line)] = _ancestry(tuple(line))
            mask[lane, len(line) :, have] = True  # padding must see something
        return torch.from_numpy(mask).to(self.device)

    def commit(self, tokens: Sequence[Sequence[Token]]) -> None:
        """Append known tokens to each sequence. Drafted tokens in the cache that agree stay, moved together;
        the cache forgets the others, so a row's length is its own number of known tokens."""
        lengths, moves = list(self.cache.host_lengths), {}
        for row, known in enumerate(tokens):
            for lane_number, lane in enumerate(self.own(row), start=self._first[row]):
                # The last token is read again, even where a rejected node happens to be the same.
                path = _path(lane, known[:-1])
                begin = lengths[lane_number] - len(lane.drafted)
                if path != list(range(len(path))):
                    moves[lane_number] = begin, path
                lengths[lane_number] = begin + len(path)
                lane.unread = lane.unread + _shifted(known[len(path) :], lane.shift)
                lane.drafted, lane.parents = [], []
        for lane_number, (begin, path) in moves.items():
            self.cache.gather(lane_number, begin, path)
        if tuple(lengths) != self.cache.host_lengths:
            self.cache.crop(lengths)

    def mark(self) -> Mark:
        """A point to `rewind` to."""
        return Mark(self.cache.host_lengths, [(x.unread, x.drafted, x.parents) for x in self.lanes])

    def rewind(self, mark: Mark) -> None:
        """Forget everything read since `mark`; the next pass overwrites it."""
        self.cache.crop(mark.lengths)
        for lane, (unread, drafted, parents) in zip(self.lanes, mark.lanes):
            lane.unread, lane.drafted, lane.parents = unread, drafted, parents


def _trees(parents: list[list[int]], wide: int) -> Tensor:
    """Bool ``[r, q, q]``: which of the new tokens each one sees; padding sees itself."""
    seen = np.tile(np.eye(wide, dtype=bool), (len(parents), 1, 1))
    for tree, line in zip(seen, parents):
        tree[: len(line), : len(line)] = _ancestry(tuple(line))
    return torch.from_numpy(seen)


@lru_cache(maxsize=256)
def _ancestry(parents: tuple[int, ...]) -> np.ndarray:
    """Bool ``[n, n]``: row i marks node i and its ancestors."""
    seen = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


def _path(lane: Lane, known: Sequence[Token]) -> list[int]:
    """The drafted nodes that `known` walks through."""
    path: list[int] = []
    at, node = -1, 0
    for token in known:
        while node < len(lane.drafted) and not (lane.parents[node] == at and lane.drafted[node] == token):
            node += 1
        if node == len(lane.drafted):
            break
        path.append(node)
        at, node = node, node + 1
    return path


def _shifted(tokens: Sequence[Token], shift: int) -> list[Token]:
    if not shift:
        return list(tokens)
    return [t._replace(position=(t.position[0] + shift, *t.position[1:])) for t in tokens]
