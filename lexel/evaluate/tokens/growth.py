"""How fast a vocabulary is met: distinct tokens after so many tokens, or after so many pictures (Heaps' law).

N items · V different tokens
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lexel.evaluate.tokens.stream import Ids, TokenStream

Floats = npt.NDArray[np.float64]
_POINTS = 60


def distinct(tokens: Ids) -> Ids:
    """How many different tokens the first m hold, for m = 1.., ``[tokens]``."""
    fresh = np.zeros(len(tokens), np.int64)
    fresh[np.unique(tokens, return_index=True)[1]] = 1
    return np.cumsum(fresh)


@dataclass(frozen=True)
class Heaps:
    """V(m) = factor m^exponent, and the r2 of the line in log-log."""

    factor: float
    exponent: float
    r2: float


def heaps(tokens: Ids) -> Heaps:
    """Least squares of log V(m) against log m at places of equal distance in log m, over the last two decades
    of the text: at its start nearly every token is new. NaN with fewer than three tokens."""
    curve = distinct(tokens)
    if len(curve) < 3:
        return Heaps(math.nan, math.nan, math.nan)
    places = np.unique(np.geomspace(max(1, len(curve) // 100), len(curve), _POINTS).round().astype(np.int64))
    x, y = np.log(places), np.log(curve[places - 1])
    slope, level = np.polyfit(x, y, 1)
    spread, left = ((y - y.mean()) ** 2).sum(), ((y - slope * x - level) ** 2).sum()
    return Heaps(math.exp(level), float(slope), float(1 - left / spread) if spread > 0 else math.nan)


@dataclass(frozen=True)
class Innovation:
    """Growth over items, over random orders of them. curve: mean number of different tokens after 1..N items,
    ``[N]``; low, high: the 2.5 % and 97.5 % quantiles; half, most: items until 50 % and 95 % of the tokens
    that occur at all have been met, (mean, low, high)."""

    curve: Floats
    low: Floats
    high: Floats
    half: tuple[float, float, float]
    most: tuple[float, float, float]


def innovation(stream: TokenStream, orders: int = 20, seed: int = 0) -> Innovation:
    """Growth of the vocabulary item by item in `orders` random orders. ValueError without a token."""
    if not stream.tokens:
        raise ValueError("innovation needs at least one token.")
    # Each item's different tokens: an order then only asks for the first item of each token.
    item, token = np.nonzero(stream.used)[0], stream.flat
    pairs = np.unique(np.stack([token, item], 1), axis=0)
    starts = np.flatnonzero(np.r_[True, pairs[1:, 0] != pairs[:-1, 0]])
    random = np.random.default_rng(seed)
    count = len(stream.ids)
    curves = np.empty((orders, count))
    for row in range(orders):
        place = random.permutation(count)
        first = np.minimum.reduceat(place[pairs[:, 1]], starts)
        curves[row] = np.cumsum(np.bincount(first, minlength=count))
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    total = len(starts)

    def items(share: float) -> tuple[float, float, float]:
        needed = (curves < share * total).sum(1) + 1
        bounds = np.quantile(needed, [0.025, 0.975])
        return float(needed.mean()), float(bounds[0]), float(bounds[1])

    return Innovation(curves.mean(0), low, high, items(0.5), items(0.95))
