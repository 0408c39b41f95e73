"""SJD-PAC: Jacobi decoding whose window begins as a tree (Kang et al., arXiv 2603.18599).

* *Adaptive continuation*: after a rejection the later window positions are not redrawn but tested one by one
  against their new distributions and kept where they pass, which is maximal coupling.
* *Proactive drafting*: Jacobi decoding mostly fails at the first positions, whose context has just changed.
  There `width` tokens per position are tried instead of one: the first `depth` levels of the draft are a full
  tree, below whose first leaf the rest of the window follows as a chain, the *main line*.

Why it is exact. What the target draws after the accepted tokens is final and becomes the last known token, so
the tree hangs below it. The round then needs two things of the draft: given all that happened before, the
tokens of a level were drawn without replacement from the distribution q stated for them, and independently of
the levels above, which decide whether they are looked at.

1. A position's q is the target's distribution there in the last pass, given the draft of that pass: out of
   date, but any q is allowed. Its first token is the old one where that passes a test with uniforms of its
   own, else one from the residual, and so distributed as q (see `acceptance.maximal`). This holds given the
   old tokens before it, the new ones, and all earlier rounds, because the old token was drawn from its own q
   independently of them and was not looked at: the acceptance only tests the children of accepted nodes, and
   the last of these lies on the level of the token that the target has drawn instead. Levels up to that one
   are used up; only later ones are continued.
2. The further tokens of a level are drawn from q without the ones before them, by fresh uniforms. (The
   published code draws them from the residual, also where the old token was kept, yet tests them as if drawn
   from q; that is not exact.) The acceptance knows the rule for such siblings.
3. All nodes of a level have the same tokens as children. A round walks down one path and so looks at them
   under one parent only; what it sees on one level says nothing of the next.

After a round the distributions to go on with are those along the accepted path, below it those of first
children as far as the tree goes, and then those of the main line.

b sequences · g nodes · K width · D depth
"""

from __future__ import annotations

import torch
from torch import Tensor

from lexel.errors import LexelError
from lexel.sample.acceptance import maximal, passes, without_replacement
from lexel.sample.drafters.jacobi import Guess, Init, JacobiDrafter
from lexel.sample.logits import Distribution
from lexel.sample.session import Outcome, Proposal, Row, Session
from lexel.sample.stream import Prediction, Tree


class PacDrafter(JacobiDrafter):
    """window: length of the main line; width: tokens tried per position on the first `depth` levels; init:
    see `JacobiDrafter`. One code per position. Raises ValueError for a tree that does not fit the window."""

    def __init__(
        self, window: int = 16, width: int = 3, depth: int = 2, init: Init | Guess = "random"
    ) -> None:
        super().__init__(window, init)
        if width < 1 or not 0 <= depth <= window:
            raise ValueError(
                f"a tree needs width of at least 1 and depth from 0 to the window's {window}, got "
                f"width={width}, depth={depth}."
            )
        self.width, self.depth = width, depth
        self.reach = sum(width**level for level in range(1, depth + 1)) + window - depth

    def admit(self, session: Session, rows: list[Row], prompts: Prediction | None) -> None:
        """See `Drafter.admit`. Raises LexelError for a model with several codes per position."""
        if session.columns > 1:
            raise LexelError(
                f"trees are for one code per position, this model has {session.columns}; use decoding=jacobi."
            )
        super().admit(session, rows, prompts)

    def propose(self, session: Session) -> Proposal:
        """See `Drafter.propose`."""
        lines, probs = self._lines(session)
        if probs is None:
            return Proposal(lines)
        longest = max(len(line.tokens) for line in lines)
        trees = [
            self._branched(row, line, self._levels(row, line, probs[0][number * longest :][: self.depth]))
            for number, (row, line) in enumerate(zip(session.rows, lines))
        ]
        nodes = max(len(tree.tokens) for tree in trees)
        sources = [
            number * longest + level for number, tree in enumerate(trees) for level in _levels_of(tree, nodes)
        ]
        return Proposal(trees, (probs[0][torch.tensor(sources, device=session.device)],))

    def _levels(self, row: Row, line: Tree, probs: Distribution) -> list[list[int]]:
        """The tokens of each branching level, that of the main line first."""
        levels = [[token.ids[0]] for token in line.tokens[: self.depth]]
        if self.width == 1 or not levels:
            return levels
        device = probs.ids.device
        first = torch.tensor(levels, device=device)
        uniforms = torch.from_numpy(row.random.random((len(levels), self.width - 1))).to(device)
        others = without_replacement(probs[: len(levels)].without(first), self.width - 1, uniforms)
        return [
            level + [token for token in more if token < probs.size]
            for level, more in zip(levels, others.tolist())
        ]

    @staticmethod
    def _branched(row: Row, line: Tree, levels: list[list[int]]) -> Tree:
        """The main line, nodes 0, 1, …, with all branches of the first levels."""
        tree = Tree(list(line.tokens), list(line.parents), list(line.states))
        above = [-1]  # the nodes of the level above
        for level, ids in enumerate(levels):
            here = []
            for parent in above:
                main = parent == level - 1
                if main:
                    here.append(level)
                state = tree.states[parent + 1]
                if row.policy.grammar.done(state):
                    continue
                for token in ids[1:] if main else ids:
                    after = row.advance(state, token)
                    if after is not None:  # forbidden ones are surely rejected, nothing follows
                        here.append(len(tree.tokens))
                    tree.tokens.append(row.policy.token(state, (token,)))
                    tree.parents.append(parent)
                    tree.states.append(after or state)
            above = here
        return tree

    def observe(self, session: Session, outcome: Outcome) -> None:
        """Continue the levels that were not used up from this pass's distributions."""
        nodes = outcome.draft.ids.shape[1]
        before, old, uniforms = list[int](), list[int](), list[Tensor]()
        ends = []
        for number, (row, tree) in enumerate(zip(session.rows, outcome.proposal.trees)):
            spine = _spine(tree, outcome.verdict.path[number], self._line_length(tree))
            gained = len(outcome.committed[number])
            # Position j of the window stands after node spine[j - 1]; its old token is node spine[j].
            for place in range(gained, len(spine) + 1):
                if row.policy.grammar.done(tree.states[spine[place - 1] + 1]):
                    break
                before.append(number * (nodes + 1) + spine[place - 1] + 1)
                old.append(number * nodes + spine[place] if place < len(spine) else -1)
                uniforms.append(torch.from_numpy(row.random.random(2)))
            ends.append(len(before))
        ids = list[int]()
        if before:
            index = torch.tensor(before, device=session.device)
            last = outcome.target.first[index]
            self._last = (last,)
            ids = _continued(outcome, last, old, torch.stack(uniforms).to(session.device)).tolist()
        start = 0
        for window, end in zip(self._windows, ends):
            window.ids = [(token,) for token in ids[start:end]]
            window.sources = list(range(start, end))
            start = end

    @staticmethod
    def _line_length(tree: Tree) -> int:
        """How many of the first nodes are the main line."""
        length = 0
        while length < len(tree.parents) and tree.parents[length] == length - 1:
            length += 1
        return length


def _levels_of(tree: Tree, count: int) -> list[int]:
    """The level of each node, 0 for padding up to `count`."""
    levels: list[int] = []
    for parent in tree.parents:
        levels.append(0 if parent < 0 else levels[parent] + 1)
    return levels + [0] * (count - len(levels))


def _spine(tree: Tree, path: list[int], line: int) -> list[int]:
    """A node of each level: the accepted path, first children below it, then the main line."""
    first: dict[int, int] = {}
    for node, parent in enumerate(tree.parents):
        first.setdefault(parent, node)
    spine = list(path)
    while True:
        child = first.get(spine[-1] if spine else -1)
        if child is None and len(spine) < line:
            child = len(spine)
        if child is None:
            return spine
        spine.append(child)


def _continued(outcome: Outcome, last: Distribution, old: list[int], uniforms: Tensor) -> Tensor:
    """Ids long ``[n]`` distributed as `last`: the tokens of the nodes `old` where they pass their test,
    redrawn where they do not, and drawn anew where there is none (-1). uniforms: ``[n, 2]``."""
    ids = last.draw(uniforms[:, 1])
    places = [place for place, node in enumerate(old) if node >= 0]
    draft = outcome.draft
    if places and draft.probs is not None:
        at = torch.tensor(places, device=ids.device)
        nodes = torch.tensor([old[place] for place in places], device=ids.device)
        p, q = last[at], draft.probs[0][nodes]
        tokens = draft.ids[..., 0].flatten()[nodes]
        kept = passes(uniforms[at, 0], p.at(tokens), q.at(tokens))
        ids[at] = maximal(p, q, tokens, kept, uniforms[at, 1])
    return ids
