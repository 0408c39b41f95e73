"""Drafting with an EAGLE head (`lexel.models.eagle`): one layer that reads what the target computed and
guesses what it says next.

* `EagleDrafter`: one drawn token after the other, the cheapest way where a pass costs more with every node.
* `EagleTreeDrafter`: EAGLE-2's tree of the most probable nodes (arXiv 2406.16858), chosen without chance.
* `EagleStaticDrafter`: a tree of fixed shape whose siblings are drawn without replacement (LANTERN++, arXiv
  2502.06352).

The head's guesses go the same way from logits to probabilities as the target's: grammar, guidance,
temperature, filters. Guided sequences may be drafted from their conditional lane alone, which is cheaper, and
better as long as guidance magnifies the head's errors more than it adds.

The head reads pairs: the target's feature of a token and the id of the token after it. A pass of the target
yields the features of the last known token and of every node, so those of the accepted path are the next
pairs. The last pair of a prompt waits for the first proposal, whose root it is.

b sequences · r lanes · n nodes of a level · g nodes of a proposal · f feature width · v vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lexel.document import State, TokenSequence
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.models.eagle import Eagle, EagleState
from lexel.sample.acceptance import without_replacement
from lexel.sample.draft_trees import DraftedTree, TreeShape, dynamic_tree, static_tree, tree_shape
from lexel.sample.drafters.base import Drafter, nothing, replace_by_last
from lexel.sample.logits import Distribution
from lexel.sample.session import Outcome, Proposal, Row, Session
from lexel.sample.stream import Prediction, Tree

UNLIKELY = -1e4
"""Logit of an id that a head cannot draft: finite, for guidance takes differences."""


class Pair(NamedTuple):
    """What the head reads at a position: an id, where it stands, and the number of the feature before it."""

    id: int
    position: tuple[int, int, int]
    feature: int


@dataclass
class Lane:
    """One of the head's cache rows, by number. shift: how much later its tokens stand than the conditional
    twin's. unread: pairs that wait for the next proposal."""

    number: int
    shift: int
    unread: list[Pair] = field(default_factory=list)

    def place(self, position: tuple[int, int, int]) -> tuple[int, int, int]:
        """Where a token of the conditional twin stands here."""
        return position[0] + self.shift, position[1], position[2]


class EagleDrafter(Drafter):
    """Draws a chain of `window` tokens. lm: the target; head: trained for it. A head without an embedding
    table is given the target's.

    Raises LexelError when the head does not fit the target, or the target has several codes per position."""

    def __init__(self, lm: CausalLM, head: Eagle, window: int = 4, *, guided: bool = False) -> None:
        """guided: whether the head reads unconditional lanes too."""
        super().__init__(window)
        _check(lm, head)
        if head.embed_tokens is None:
            head.adopt_embedding(lm.model.embed_tokens.weight)
        self.head, self.layers = head, head.config.layers_of(lm.config.layers)
        self.output: Any = lm if head.config.kind == "eagle" else _OwnOutput(head)
        self.dtype = (lm.model.embed_tokens if head.config.kind == "eagle" else head.fc).weight.dtype
        self.guided = guided
        self.room = window - 1  # nodes that the head reads for one proposal
        self.rows: list[list[Lane]] = []
        self.state = EagleState(head, 0, 1)
        self._features = torch.empty(0)  # [·, f]: what the unread pairs point into
        self._indices: dict[int, tuple[Tensor, Tensor]] = {}

    def propose(self, session: Session) -> Proposal:
        """See `Drafter.propose`."""
        uniforms = session.uniforms(self.window)
        growth = self._root(session)
        if growth is None:
            return nothing(session)
        steps: list[Distribution] = []
        drawn: list[list[int]] = []
        below = [[0]] * len(session.rows)
        for step in range(growth.depth):
            steps.append(growth.probs())
            drawn.append(steps[-1].draw(uniforms[:, step]).tolist())
            growth.descend([[token] for token in drawn[-1]], below)
            if not growth.open:
                break
        size = session.vocabulary_size
        lines = [list(takewhile(lambda token: token < size, line)) for line in zip(*drawn)]
        trees = [_tree(row, line, range(-1, len(line) - 1)) for row, line in zip(session.rows, lines)]
        longest = max(len(line) for line in lines)
        sources = torch.arange(longest, device=session.device).expand(len(trees), -1)
        return Proposal(trees, (_drawn_from(steps, sources),) if longest else None)

    # Coming and going

    def admit(self, session: Session, rows: list[Row], prompts: Prediction | None) -> None:
        """Read the prompts up to their last pair."""
        if len(session.rows) == len(rows):  # a new beginning
            self.rows, self._features = [], torch.empty(0)
        twins = [[row.prompt, row.null] if row.null and self.guided else [row.prompt] for row in rows]
        blocks = [block for both in twins for block in both]
        room = max(max(map(len, both)) + row.remaining() for both, row in zip(twins, rows))
        room += max(self.room, self.window + 1) + 1
        state = EagleState(self.head, len(blocks), room)
        first = 0 if not self.rows else len(self.state.known)
        ends = [int(both[0].positions[-1, 0]) for both in twins for _ in both]
        shifts = [int(block.positions[-1, 0]) - end for block, end in zip(blocks, ends)]
        lanes = [Lane(first + number, shift) for number, shift in enumerate(shifts)]
        if prompts is not None:
            features = self.head.features(self.layers, prompts.hidden, prompts.inputs)
            if len(features) > len(blocks):  # without the unconditional lanes
                before = accumulate((1 + (row.null is not None) for row in rows[:-1]), initial=0)
                features = features[list(before)]
            self._read_prompts(state, blocks, features)
            self._keep_last(lanes, blocks, features)
        if self.rows:
            self.state.cache.reserve(room)
            self.state.join(state)
        else:
            self.state = state
        queue = iter(lanes)
        self.rows += [[next(queue) for _ in both] for both in twins]
        self._indices.clear()

    def _read_prompts(self, state: EagleState, blocks: Sequence[TokenSequence], features: Tensor) -> None:
        """Read all pairs but the last of each prompt. features: ``[r, l, f]`` of its tokens but the last."""
        counts = [max(0, len(block) - 2) for block in blocks]
        if not any(counts):
            return
        ids, positions = (
            pad_sequence([column[1:-1] for column in columns], batch_first=True).to(features.device)
            for columns in ([block.ids for block in blocks], [block.positions for block in blocks])
        )
        state.read(ids, features[:, : max(counts)], positions, counts)
        self.forwards += 1

    def _keep_last(self, lanes: Sequence[Lane], blocks: Sequence[TokenSequence], features: Tensor) -> None:
        """The last pair of each prompt that has one stays unread."""
        ends = torch.tensor([max(0, len(block) - 2) for block in blocks], device=features.device)
        last = features[torch.arange(len(blocks), device=features.device), ends]
        first = len(self._features)
        self._features = torch.cat([self._features, last]) if first else last
        for number, (lane, block) in enumerate(zip(lanes, blocks)):
            if len(block) > 1:
                index, row, column = block.positions[-1].tolist()
                lane.unread = [Pair(int(block.ids[-1]), (index, row, column), first + number)]

    def observe(self, session: Session, outcome: Outcome) -> None:
        """Keep the features of what was accepted, for the next proposal to read."""
        result = outcome.prediction
        self._features = self.head.features(self.layers, result.hidden, result.inputs).flatten(0, 1)
        places = zip(result.cond.tolist(), result.uncond.tolist())
        for lanes, tokens, path, both in zip(self.rows, outcome.committed, outcome.verdict.path, places):
            nodes = [0, *(node + 1 for node in path)]
            for lane, where in zip(lanes, both):
                lane.unread = [
                    Pair(token.ids[0], lane.place(token.position), where[node])
                    for token, node in zip(tokens, nodes)
                ]

    def drop(self, row: int) -> None:
        """See `Drafter.drop`; the cache follows when it is read next."""
        replace_by_last(self.rows, row)

    # Reading

    def _root(self, session: Session) -> Growth | None:
        """Read all unread pairs; None when nothing can be drafted. A row that has not read anything (a prompt
        of one token) is drafted from the next round on."""
        lanes = [lane for both in self.rows for lane in both]
        order = [lane.number for lane in lanes]
        if order != list(range(len(self.state.known))):
            self.state.select(order)
            self._indices.clear()
            for number, lane in enumerate(lanes):
                lane.number = number
        counts = [len(lane.unread) for lane in lanes]
        if not any(counts):
            return None
        filler = [Pair(0, (0, 0, 0), 0)] * max(counts)
        padded = [(lane.unread + filler)[: len(filler)] for lane in lanes]
        ids, positions, numbers = (
            torch.tensor([[pair[item] for pair in line] for line in padded], device=session.device)
            for item in range(3)
        )
        hidden = self.state.read(ids, self._features[numbers], positions, counts)
        self.forwards += 1
        for lane in lanes:
            lane.unread = []
        ready = [all(self.state.known[lane.number] for lane in both) for both in self.rows]
        limits = [self.limit(row) if able else 0 for row, able in zip(session.rows, ready)]
        return Growth(self, session, self._prediction(hidden[:, None]), limits) if max(limits) > 0 else None

    def expand(self, ids: Tensor, parents: Tensor, positions: Tensor) -> Prediction:
        """Read one level of nodes, lane by lane; see `EagleState.expand`."""
        self.forwards += 1
        return self._prediction(self.state.expand(ids, parents, positions))

    def _prediction(self, hidden: Tensor) -> Prediction:
        """Outputs of the head ``[r, n, d]`` as if they were the target's."""
        nodes = hidden.shape[1]
        if nodes not in self._indices:
            steps = torch.arange(nodes)
            cond, uncond = (
                torch.stack([lanes[end].number * nodes + steps for lanes in self.rows]).to(hidden.device)
                for end in (0, -1)
            )
            self._indices[nodes] = cond, uncond
        return Prediction(self.output, hidden.to(self.dtype), *self._indices[nodes])


class EagleTreeDrafter(EagleDrafter):
    """EAGLE-2's tree of the `nodes` most probable continuations, up to `window` deep; `width` nodes of each
    level are read. What is decoded greedily is drafted from the softmax."""

    def __init__(
        self,
        lm: CausalLM,
        head: Eagle,
        window: int = 6,
        width: int = 10,
        nodes: int = 60,
        *,
        guided: bool = False,
    ) -> None:
        super().__init__(lm, head, window, guided=guided)
        if width < 1 or nodes < 1:
            raise ValueError(f"a tree needs a width and nodes of at least 1, got {width} and {nodes}.")
        self.width, self.reach, self.room = width, nodes, (window - 1) * width

    def propose(self, session: Session) -> Proposal:
        """See `Drafter.propose`."""
        growth = self._root(session)
        if growth is None:
            return nothing(session)

        def scores() -> Tensor:
            return growth.probs(soft=True).dense().log().unflatten(0, (len(session.rows), -1))

        def expand(tokens: Tensor, parents: Tensor) -> Tensor:
            growth.descend(tokens.tolist(), parents.tolist())
            return scores()

        depth = growth.depth - 1
        drafted = dynamic_tree(scores()[:, 0], expand, width=self.width, depth=depth, nodes=self.reach)
        return Proposal(_trees(session, drafted))


class EagleStaticDrafter(EagleDrafter):
    """A tree of a fixed shape, by default 25 nodes (see `draft_trees.tree_shape`), whose siblings are drawn
    without replacement. What is decoded greedily is drafted from the softmax."""

    def __init__(
        self, lm: CausalLM, head: Eagle, shape: TreeShape | str = "mc_sim_7b_63", *, guided: bool = False
    ) -> None:
        self.shape = tree_shape(shape) if isinstance(shape, str) else shape
        super().__init__(lm, head, self.shape.depth, guided=guided)
        self.reach = len(self.shape.choices)
        self.room = sum(map(len, self.shape.expanded[1:]))
        ranks = [1 + max(p[-1] for p in self.shape.choices if len(p) == d + 1) for d in range(self.window)]
        self.draws = sum(len(level) * most for level, most in zip(self.shape.expanded, ranks))

    def propose(self, session: Session) -> Proposal:
        """See `Drafter.propose`."""
        uniforms, rows = session.uniforms(self.draws), len(session.rows)
        growth = self._root(session)
        if growth is None:
            return nothing(session)
        seen = [growth.probs(soft=True)]
        left = iter(uniforms.unbind(1))

        def choose(level: Tensor, count: int) -> Tensor:
            nodes = level.shape[1]
            own = torch.stack([next(left) for _ in range(nodes * count)], dim=1)
            return without_replacement(seen[-1], count, own.view(rows * nodes, count)).view(
                rows, nodes, count
            )

        def level() -> Tensor:
            """Of its shape alone: `choose` reads `seen`."""
            return uniforms.new_empty(()).expand(rows, len(seen[-1]) // rows, session.vocabulary_size)

        def expand(tokens: Tensor, parents: Tensor) -> Tensor:
            growth.descend(tokens.tolist(), parents.tolist())
            seen.append(growth.probs(soft=True))
            return level()

        drafted = static_tree(level()[:, 0], expand, self.shape, choose)
        return Proposal(_trees(session, drafted), (_drawn_from(seen, drafted.sources),))


class Growth:
    """A proposal in the making: the level of nodes that was read last (at first the last known tokens).

    limits: how deep each row may be drafted. states: of each row the grammar's at the level's nodes, None
    where nothing is to be drafted below."""

    def __init__(
        self, drafter: EagleDrafter, session: Session, prediction: Prediction, limits: Sequence[int]
    ) -> None:
        self.drafter, self.session, self.prediction, self.limits = drafter, session, prediction, limits
        self.depth, self.level = max(limits), 0
        self.states: list[list[State | None]] = [
            [row.state if limit > 0 else None] for row, limit in zip(session.rows, limits)
        ]
        asked = any(row.policy.processors for row in session.rows)
        self.contexts = [[row.history] for row in session.rows] if asked else None

    @property
    def open(self) -> bool:
        """Whether anything is to be drafted below."""
        return any(state is not None for line in self.states for state in line)

    def descend(self, tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> None:
        """Go on to the nodes `tokens`, each below number ``parents[row][i]`` of the level, and read them
        unless nothing is to be drafted below. A node that may not stand there is read as padding."""
        self.level += 1
        before, contexts = self.states, self.contexts
        self.states = [
            [self._after(number, before[number][parent], token) for token, parent in zip(*line)]
            for number, line in enumerate(zip(tokens, parents))
        ]
        if contexts is not None:
            self.contexts = [
                [[*contexts[number][parent], token] for token, parent in zip(*line)]
                for number, line in enumerate(zip(tokens, parents))
            ]
        if self.open:
            self._read(before, tokens, parents)

    def _after(self, number: int, state: State | None, token: int) -> State | None:
        row = self.session.rows[number]
        if state is None or self.level >= self.limits[number]:
            return None
        after = row.advance(state, token)
        return None if after is None or row.policy.grammar.done(after) else after

    def _read(
        self,
        before: list[list[State | None]],
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
    ) -> None:
        ids, above, positions = [], [], []
        for number, (row, lanes) in enumerate(zip(self.session.rows, self.drafter.rows)):
            usable = [state is not None for state in self.states[number]]
            states = [before[number][parent] for parent in parents[number]]
            places = [
                row.policy.place(state).position if use and state is not None else (0, 0, 0)
                for state, use in zip(states, usable)
            ]
            for lane in lanes:
                ids.append([token if use else 0 for token, use in zip(tokens[number], usable)])
                above.append(parents[number])
                positions.append([lane.place(place) for place in places])
        device = self.session.device
        self.prediction = self.drafter.expand(
            torch.tensor(ids, device=device),
            torch.tensor(above, device=device),
            torch.tensor(positions, device=device),
        )

    def probs(self, soft: bool = False) -> Distribution:
        """What the head says below each node: ``b · n`` distributions, empty where nothing is to be drafted.
        soft: of what is decoded greedily the softmax."""
        session, states = self.session, self.states
        count = sum(map(len, states))
        if not self.open:
            return session.arranged([], [], count)
        if not soft:
            return session.distributions(self.prediction, states, self.contexts)
        greedy = [
            [state is not None and row.policy.place(state).config.temperature == 0 for state in line]
            for row, line in zip(session.rows, states)
        ]
        parts = []
        for wanted in (False, True):
            some = [[s if g is wanted else None for s, g in zip(*line)] for line in zip(states, greedy)]
            if any(state is not None for line in some for state in line):
                parts.append(session.distributions(self.prediction, some, self.contexts, soft=wanted))
        if len(parts) == 1:
            return parts[0]
        which = torch.tensor([g for line in greedy for g in line], device=session.device)
        numbers = torch.arange(count, device=session.device)
        return Distribution.cat(parts)[torch.where(which, count + numbers, numbers)]


class _OwnOutput:
    """EAGLE-3's output layer in the place of the target's; ids that it does not draft are `UNLIKELY`."""

    def __init__(self, head: Eagle) -> None:
        self.head = head

    def project(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """As `CausalLM.project`."""
        return self.head.project(hidden, None, start, stop).clamp(min=UNLIKELY)


def _check(lm: CausalLM, head: Eagle) -> None:
    """Raises LexelError when `head` cannot draft for `lm`."""
    target, config = lm.config, head.config
    if target.columns > 1:
        raise LexelError(
            f"an EAGLE head drafts one code per position, this model has {target.columns}; decode it with "
            "jacobi or another drafter."
        )
    if config.vocab_size != target.vocab_size:
        raise LexelError(
            f"the draft head has {config.vocab_size} ids, the target {target.vocab_size}; they must be the "
            "same."
        )
    width = config.target_dim or config.dim
    if width != target.dim:
        raise LexelError(
            f"the draft head reads features of width {width}, the target's are {target.dim} wide; use the "
            "head that was trained for it."
        )


def _tree(row: Row, ids: Sequence[int], parents: Sequence[int]) -> Tree:
    """Drafted ids as tokens with their places."""
    tree = Tree([], list(parents), [row.state])
    for token, parent in zip(ids, parents):
        state = tree.states[parent + 1]
        tree.tokens.append(row.policy.token(state, (token,)))
        tree.states.append(row.policy.advance(state, token))
    return tree


def _trees(session: Session, drafted: DraftedTree) -> list[Tree]:
    lines = zip(drafted.tokens.tolist(), drafted.parents.tolist(), drafted.lengths.tolist())
    return [_tree(row, ids[:n], above[:n]) for row, (ids, above, n) in zip(session.rows, lines)]


def _drawn_from(levels: Sequence[Distribution], sources: Tensor) -> Distribution:
    """``b · g`` distributions: of each node the one that it was drawn from. levels: ``b · n`` of each level;
    sources ``[b, g]``: the number of the node above, counted over levels (`DraftedTree.sources`)."""
    rows, device = len(sources), sources.device
    counts = [len(level) // rows for level in levels]
    starts = [sum(map(len, levels[:number])) for number in range(len(levels))]
    first = [start + node for start, count in zip(starts, counts) for node in range(count)]
    stride = [count for count in counts for _ in range(count)]
    row = torch.arange(rows, device=device)[:, None]
    index = torch.tensor(first, device=device)[sources] + row * torch.tensor(stride, device=device)[sources]
    return Distribution.cat(levels)[index.flatten()]
