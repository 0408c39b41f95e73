"""Entropies in bits, and how well a codebook is used.

V vocabulary · n positions
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lexel.evaluate.tokens.stream import Ids, TokenStream, neighbours, ngrams

Floats = npt.NDArray[np.float64]


def entropy(counts: Ids) -> float:
    """-Σ p log2 p of the observed frequencies: too low where there are few observations."""
    seen = counts[counts > 0].astype(np.float64)
    if not len(seen):
        return 0.0
    p = seen / seen.sum()
    return float(-(p * np.log2(p)).sum()) + 0.0


def miller_madow(counts: Ids) -> float:
    """`entropy` with the Miller-Madow correction (K - 1) / (2 N ln 2) for K different tokens among N; it
    mends the first order of the bias only."""
    seen = counts[counts > 0]
    return entropy(counts) + (len(seen) - 1) / (2 * max(1, int(seen.sum())) * math.log(2))


@dataclass(frozen=True)
class Dependence:
    """Of neighbouring tokens, in bits. conditional: H(next | this); corrected: with Miller-Madow in both
    entropies of the difference; information: H(next) - conditional; by_chance: the information that the same
    pairs show after shuffling, all of which is estimation error."""

    conditional: float
    corrected: float
    information: float
    by_chance: float


def dependence(stream: TokenStream, along: str, seed: int = 0) -> Dependence:
    """What a token says about the next one along "rows", "columns" or the "sequence"."""
    first, second = neighbours(stream, along)
    if not len(first):
        return Dependence(math.nan, math.nan, math.nan, math.nan)

    def both(a: Ids, b: Ids) -> Ids:
        return np.unique(a * stream.vocabulary + b, return_counts=True)[1]

    before, after = np.bincount(first), np.bincount(second)
    pairs = both(first, second)
    shuffled = both(first, np.random.default_rng(seed).permutation(second))
    conditional = entropy(pairs) - entropy(before)
    return Dependence(
        conditional,
        miller_madow(pairs) - miller_madow(before),
        entropy(after) - conditional,
        entropy(after) + entropy(before) - entropy(shuffled),
    )


def block_entropies(stream: TokenStream, longest: int = 4) -> list[float]:
    """H_g / g of the n-grams of g = 1.. tokens, bits per token. Bounded by log2(number of n-grams) / g, so
    that long blocks of a short text look more regular than they are."""
    return [entropy(np.bincount(ngrams(stream, g))) / g for g in range(1, longest + 1)]


@dataclass(frozen=True)
class Health:
    """used, dead: different tokens that occur, and that do not; utilization: their share; effective: 2^H;
    top_share: share of all tokens that the most frequent hundredth of the vocabulary makes up."""

    used: int
    dead: int
    utilization: float
    effective: float
    top_share: float


def health(counts: Ids, vocabulary: int) -> Health:
    """How a codebook of `vocabulary` codes is used, from the counts of those that occur (or of all)."""
    used = int((counts > 0).sum())
    top = np.sort(counts)[::-1][: max(1, vocabulary // 100)]
    return Health(
        used,
        vocabulary - used,
        used / max(1, vocabulary),
        2.0 ** entropy(counts),
        float(top.sum() / max(1, counts.sum())),
    )


def by_position(stream: TokenStream) -> tuple[Ids, Floats]:
    """At each position: how many different tokens occur, and their entropy in bits, ``[n]`` each."""
    n = stream.ids.shape[1]
    used, bits = np.zeros(n, np.int64), np.zeros(n)
    for place in range(n):
        counts = np.unique(stream.ids[stream.used[:, place], place], return_counts=True)[1]
        used[place], bits[place] = len(counts), entropy(counts)
    return used, bits
