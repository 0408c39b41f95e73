"""Growing trees of drafted tokens: which nodes a tree has, not what network proposes them.

* `dynamic_tree` (EAGLE-2, arXiv 2406.16858): keeps the most probable nodes; its shape follows the drafter's
  confidence.
* `static_tree` (EAGLE-1, LANTERN++, arXiv 2502.06352): a fixed shape; only the tokens depend on the drafter.

Both work level by level: the root's scores are given, and ``expand(tokens, parents)`` tells the scores behind
each node of a level, `parents` being the numbers of the nodes above among those expanded last (0: the root).
`lexel.models.eagle.EagleState.expand` is made for that.

b rows · n nodes expanded at once · c children · g nodes of a tree · v vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.errors import LexelError

# (tokens long [b, n], parents long [b, n]) -> log-probabilities or logits [b, n, v] of what follows each.
Expand = Callable[[Tensor, Tensor], Tensor]
# (scores [b, n, v], c) -> long [b, n, c]: children of each node in the order they are to be tried; v or more
# where a node has no further child.
Choose = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class DraftedTree:
    """Nodes of each row below its last known token, in the order of creation: parents precede children, and
    siblings lie in the order they are tried.

    tokens, parents: long ``[b, g]``, parents -1 for children of the root. lengths: long ``[b]``, nodes in
    use. sources: long ``[b, g]``, which expansion each token was chosen from: 0 is the root's, 1 + i the i-th
    node given to `expand`, counting on from call to call."""

    tokens: Tensor
    parents: Tensor
    lengths: Tensor
    sources: Tensor

    @cached_property
    def visible(self) -> Tensor:
        """Bool ``[b, g + 1, g + 1]`` over root and nodes: each sees the root, its ancestors and itself."""
        rows, nodes = self.tokens.shape
        seen = torch.eye(nodes + 1, dtype=torch.bool, device=self.tokens.device).repeat(rows, 1, 1)
        row = torch.arange(rows, device=self.tokens.device)
        for node in range(nodes):
            seen[:, node + 1] |= seen[row, self.parents[:, node] + 1]
        return seen

    @property
    def depths(self) -> Tensor:
        """Long ``[b, g + 1]``: 0 for the root."""
        return self.visible.sum(-1) - 1

    def paths(self, row: int) -> list[list[int]]:
        """From the root (0) to each leaf of a row, by number in `visible`, leaves in their order."""
        nodes = int(self.lengths[row])
        parents = (self.parents[row, :nodes] + 1).tolist()
        paths = []
        for leaf in sorted(set(range(nodes + 1)) - set(parents)):
            path = [leaf]
            while path[-1]:
                path.append(parents[path[-1] - 1])
            paths.append(path[::-1])
        return paths


def dynamic_tree(scores: Tensor, expand: Expand, *, width: int, depth: int, nodes: int) -> DraftedTree:
    """EAGLE-2's tree of the most probable nodes.

    scores: log-probabilities ``[b, v]`` behind the root, -inf for what may not be drafted. The `width` best
    children of the root are expanded, then `depth - 1` times the `width` best of all their children; a node's
    score is the sum of log-probabilities on its way. Of all candidates seen the `nodes` best remain (fewer
    where there are fewer). The tree is up to ``depth + 1`` levels deep. Raises ValueError for sizes below 1
    (depth 0 is the root's children alone)."""
    if width < 1 or depth < 0 or nodes < 1:
        raise ValueError(f"a tree needs width and nodes >= 1 and depth >= 0, got {width}, {nodes}, {depth}.")
    width = min(width, scores.shape[-1])
    rows = len(scores)
    best = scores.topk(width)
    tokens, frontier = best.indices, best.values
    # Candidates by creation: their tokens, scores, the candidate above (-1: the root) and their expansion.
    root = torch.full_like(tokens, -1)
    created = [(tokens, frontier, root, torch.zeros_like(tokens))]
    numbers = torch.arange(width, device=scores.device).expand(rows, -1)
    parents, expanded = torch.zeros_like(tokens), 0
    for level in range(depth):
        children = expand(tokens, parents).topk(width)
        totals = (children.values + frontier[..., None]).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        sources = torch.arange(expanded + 1, expanded + 1 + tokens.shape[1], device=scores.device)
        expanded += tokens.shape[1]
        above, sources = (x.expand(rows, -1).repeat_interleave(width, 1) for x in (numbers, sources))
        created.append((children.indices.flatten(1), totals.flatten(1), above, sources))
        best = totals.flatten(1).topk(width)
        first = width + level * width * width
        numbers, frontier = first + best.indices, best.values
        parents, tokens = best.indices // width, children.indices.flatten(1).gather(1, best.indices)
    all_tokens, totals, above, sources = (torch.cat(column, dim=1) for column in zip(*created))
    # A stable sort prefers earlier candidates among equals, so that no child outlives its parent.
    order = totals.sort(dim=1, descending=True, stable=True).indices[:, :nodes]
    keep = torch.zeros_like(all_tokens, dtype=torch.bool).scatter_(1, order, True) & totals.isfinite()
    return _kept(all_tokens, above, sources, keep)


@dataclass(frozen=True)
class TreeShape:
    """A fixed tree: each node by its path of child ranks from the root, shorter and lower ones first.
    Raises LexelError when a node hangs in the air or occurs twice; see `TreeShape.of`."""

    choices: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        known = {(), *self.choices}
        wrong = [path for path in self.choices if not path or min(path) < 0 or path[:-1] not in known]
        if wrong or not self.choices or len(known) != len(self.choices) + 1:
            raise LexelError(
                f"a tree's paths must each occur once, with every beginning of them; wrong: "
                f"{wrong[0] if wrong else 'none, or a repeated one'}."
            )

    @classmethod
    def of(cls, choices: Iterable[Sequence[int]]) -> TreeShape:
        """From paths in any order."""
        return cls(tuple(sorted((tuple(path) for path in choices), key=lambda path: (len(path), path))))

    @property
    def depth(self) -> int:
        """Length of the longest path."""
        return len(self.choices[-1])

    def clipped(self, depth: int) -> TreeShape:
        """Without the paths longer than `depth`."""
        return TreeShape(tuple(path for path in self.choices if len(path) <= depth))

    @cached_property
    def expanded(self) -> list[list[int]]:
        """The nodes that have children, by number, level by level; the root is -1 and alone on its level."""
        number = {path: node for node, path in enumerate(self.choices)} | {(): -1}
        above = {number[path[:-1]] for path in self.choices}
        levels: list[list[int]] = [[-1], *([] for _ in range(self.depth - 1))]
        for node, path in enumerate(self.choices):
            if node in above:
                levels[len(path)].append(node)
        return levels

    @cached_property
    def parents(self) -> list[int]:
        """By node; -1 is the root."""
        number = {path: node for node, path in enumerate(self.choices)} | {(): -1}
        return [number[path[:-1]] for path in self.choices]


def static_tree(scores: Tensor, expand: Expand, shape: TreeShape, choose: Choose) -> DraftedTree:
    """A tree of a fixed shape: node r of a parent is the r-th token that `choose` gives for it. Nodes without
    a token (and what hangs below them) are left out. scores: ``[b, v]`` behind the root, of whatever kind
    `choose` reads; it is asked for as many children as the widest node of a level has."""
    device, rows, size = scores.device, len(scores), scores.shape[-1]
    tokens = torch.zeros(rows, len(shape.choices), dtype=torch.long, device=device)
    sources = torch.zeros_like(tokens)
    valid = torch.zeros_like(tokens, dtype=torch.bool)
    level_scores, counted = scores[:, None], 0
    for level, above in enumerate(shape.expanded):
        children = [node for node, path in enumerate(shape.choices) if len(path) == level + 1]
        ranks = [shape.choices[node][-1] for node in children]
        places = [above.index(shape.parents[node]) for node in children]
        chosen = choose(level_scores, 1 + max(ranks))[:, places, ranks]
        tokens[:, children] = chosen.clamp(max=size - 1)
        sources[:, children] = counted + torch.tensor(places, device=device)
        stands = valid[:, [shape.parents[node] for node in children]] if level else True
        valid[:, children] = (chosen < size) & stands
        counted += len(above)
        if level + 1 < shape.depth:
            following = shape.expanded[level + 1]
            over = torch.tensor([above.index(shape.parents[node]) for node in following], device=device)
            level_scores = expand(tokens[:, following], over.expand(rows, -1))
    return _kept(tokens, torch.tensor(shape.parents, device=device).expand(rows, -1), sources, valid)


def most_probable(scores: Tensor, count: int) -> Tensor:
    """`Choose` without chance: the `count` best, those of -inf left out."""
    size = scores.shape[-1]
    best = scores.topk(min(count, size))
    return F.pad(
        best.indices.masked_fill(~(best.values > -torch.inf), size), (0, max(0, count - size)), value=size
    )


def _kept(tokens: Tensor, parents: Tensor, sources: Tensor, keep: Tensor) -> DraftedTree:
    """The candidates that `keep` (bool ``[b, n]``) marks, moved together in their order and renumbered."""
    lengths = keep.sum(1)
    order = keep.logical_not().sort(dim=1, stable=True).indices[:, : int(lengths.max())]
    place = torch.zeros_like(parents).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    above = parents.gather(1, order)
    renumbered = place.gather(1, above.clamp(min=0)).masked_fill(above < 0, -1)
    used = torch.arange(order.shape[1], device=order.device) < lengths[:, None]
    return DraftedTree(
        tokens.gather(1, order).masked_fill(~used, 0),
        renumbered.masked_fill(~used, -1),
        lengths,
        sources.gather(1, order).masked_fill(~used, 0),
    )


# Published shapes


def chain(length: int) -> TreeShape:
    """One child after the other."""
    return TreeShape(tuple((0,) * depth for depth in range(1, length + 1)))


# A word is a path, a digit a child's rank (github.com/jadohu/LANTERN, models/drafters/choices.py).
_PUBLISHED = {
    "mc_sim_7b_63": (
        "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"
    ),
    "mc_sim_7b_63_balanced": (
        "0 1 2 00 01 02 10 11 12 20 21 000 001 002 010 011 100 101 110 111 0000 0001 0002 00000 00001"
    ),
    "naive_extend_57": (
        "0 1 2 3 4 00 01 02 03 10 11 12 20 21 22 30 31 40 000 001 002 003 010 011 012 020 021 022 030 031 "
        "100 101 110 200 0000 0001 0002 0003 0010 0011 0012 0020 0021 0030 0100 0101 0110 0200 00000 00001 "
        "00002 00010 00011 00100 00101 00110 00200"
    ),
    "medusa_2_7b_63": (
        "0 1 2 3 4 5 6 7 8 9 00 01 02 03 04 05 06 07 08 09 10 11 12 13 14 20 21 30 31 40 50 60 70 000 001 "
        "002 003 004 005 006 007 008 010 011 012 013 020 021 030 040 050 100 101 102 110 200 0000 0001 0002 "
        "0003 0010 0020 0100"
    ),
    "reverse_balanced_25": (
        "0 1 2 00 01 10 20 000 001 002 010 011 100 0000 0001 0002 0010 0011 00000 00001 00002 00003 00010 "
        "00011 00012"
    ),
}


@lru_cache
def tree_shape(name: str) -> TreeShape:
    """A published shape: mc_sim_7b_63 and mc_sim_7b_63_balanced (25 nodes), naive_extend_57 (57, LANTERN's
    default for LlamaGen), medusa_2_7b_63 (63), reverse_balanced_25 (25), chain (5 in a line).
    Raises LexelError for another name."""
    if name == "chain":
        return chain(5)
    if name not in _PUBLISHED:
        raise LexelError(f"there is no tree shape {name!r}; there are: {', '.join((*_PUBLISHED, 'chain'))}.")
    return TreeShape(tuple(tuple(map(int, word)) for word in _PUBLISHED[name].split()))
