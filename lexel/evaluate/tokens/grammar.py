"""A grammar without parameters: Re-Pair (Larsson and Moffat 1999), and what it says about structure.

The most frequent pair of neighbouring symbols becomes a rule, again and again, until no pair occurs twice.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lexel.evaluate.tokens.entropy import entropy
from lexel.evaluate.tokens.stream import Ids

_NONE = -1


@dataclass(frozen=True)
class Grammar:
    """rules: rule i writes symbol vocabulary + i as two symbols; items: what is left of each item."""

    vocabulary: int
    rules: tuple[tuple[int, int], ...]
    items: tuple[Ids, ...]

    def expand(self) -> list[Ids]:
        """The items that the grammar was made from."""
        return [np.array(self._expanded(item.tolist()), np.int64) for item in self.items]

    def _expanded(self, symbols: list[int]) -> list[int]:
        stack, text = symbols[::-1], []
        while stack:
            symbol = stack.pop()
            if symbol < self.vocabulary:
                text.append(symbol)
            else:
                left, right = self.rules[symbol - self.vocabulary]
                stack += [right, left]
        return text

    def depths(self) -> Ids:
        """Height of each rule's tree (1: two tokens), ``[rules]``."""
        depths = np.zeros(len(self.rules), np.int64)
        for number, pair in enumerate(self.rules):
            depths[number] = 1 + max(
                0 if part < self.vocabulary else int(depths[part - self.vocabulary]) for part in pair
            )
        return depths


def re_pair(items: Sequence[Ids], vocabulary: int) -> Grammar:
    """The Re-Pair grammar of sequences of ids below `vocabulary`; no rule reaches over the end of an item.
    Of equally frequent pairs the one with the smaller symbols is taken."""
    symbols = [symbol for item in items for symbol in (*item.tolist(), _NONE)]
    after = list(range(1, len(symbols) + 1))
    before = list(range(-1, len(symbols) - 1))
    places: dict[tuple[int, int], set[int]] = defaultdict(set)

    def pair_at(place: int) -> tuple[int, int] | None:
        if not 0 <= place < len(symbols) or symbols[place] == _NONE:
            return None
        following = after[place]
        if following >= len(symbols) or symbols[following] == _NONE:
            return None
        return symbols[place], symbols[following]

    # Of a run like "aaa" only every other pair can be replaced; the last check is made when it is.
    for place in range(len(symbols)):
        pair = pair_at(place)
        if pair is not None:
            places[pair].add(place)
    heap = [(-len(found), pair) for pair, found in places.items() if len(found) > 1]
    heapq.heapify(heap)
    rules: list[tuple[int, int]] = []
    while heap:
        times, pair = heapq.heappop(heap)
        found = _apart(sorted(places[pair]), after, pair)
        if len(found) < 2:
            continue
        if len(found) < -times:
            heapq.heappush(heap, (-len(found), pair))
            continue
        symbol = vocabulary + len(rules)
        rules.append(pair)
        changed: set[tuple[int, int]] = set()
        for place in found:
            second = after[place]
            for border in (before[place], place, second):
                old = pair_at(border)
                if old is not None:
                    places[old].discard(border)
            symbols[place] = symbol
            after[place] = after[second]
            if after[second] < len(symbols):
                before[after[second]] = place
            for border in (before[place], place):
                fresh = pair_at(border)
                if fresh is not None:
                    places[fresh].add(border)
                    changed.add(fresh)
        for fresh in changed:
            if len(places[fresh]) > 1:
                heapq.heappush(heap, (-len(places[fresh]), fresh))
    return Grammar(vocabulary, tuple(rules), tuple(_left(symbols, after, len(items))))


def _apart(found: list[int], after: list[int], pair: tuple[int, int]) -> list[int]:
    """Places of a pair that do not overlap: only pairs of one symbol twice ever do."""
    if pair[0] != pair[1]:
        return found
    kept: list[int] = []
    for place in found:
        if not kept or after[kept[-1]] != place:
            kept.append(place)
    return kept


def _left(symbols: list[int], after: list[int], count: int) -> list[Ids]:
    items: list[list[int]] = [[]]
    place = 0
    while place < len(symbols):
        if symbols[place] == _NONE:
            items.append([])
        else:
            items[-1].append(symbols[place])
        place = after[place]
    return [np.array(item, np.int64) for item in items[:count]]


@dataclass(frozen=True)
class GrammarSize:
    """rules: how many; symbols: of the items that are left plus two per rule; ratio: symbols per token; bits:
    per token, the left symbols coded by their entropy and the rules plainly; depth: mean height of the trees
    that are left (0 for a single token); left, right: share of rules whose left, right part is a rule."""

    rules: int
    symbols: int
    ratio: float
    bits: float
    depth: float
    left: float
    right: float


def grammar_size(grammar: Grammar) -> GrammarSize:
    """What a grammar weighs and how its trees branch."""
    rest = np.concatenate([*grammar.items, np.zeros(0, np.int64)])
    tokens = sum(len(item) for item in grammar.expand())
    rules = np.array(grammar.rules, np.int64).reshape(-1, 2)
    symbols = len(rest) + 2 * len(rules)
    kinds = max(2, grammar.vocabulary + len(rules))
    counts = np.unique(rest, return_counts=True)[1]
    bits = entropy(counts) * len(rest) + 2 * len(rules) * math.log2(kinds)
    depths = np.r_[np.zeros(grammar.vocabulary, np.int64), grammar.depths()]
    nested = rules >= grammar.vocabulary
    return GrammarSize(
        len(rules),
        symbols,
        symbols / max(1, tokens),
        bits / max(1, tokens),
        float(depths[rest].mean()) if len(rest) else 0.0,
        float(nested[:, 0].mean()) if len(rules) else 0.0,
        float(nested[:, 1].mean()) if len(rules) else 0.0,
    )
