"""Laws of frequency: Zipf, Zipf-Mandelbrot, Yule-Simon, log-normal, and the first digits of counts.

Two views of the same counts. By rank: the r-th most frequent token has frequency f(r) ~ r^-a. By types: the
share of tokens that occur exactly k times is P(k), which for a Zipf law falls like k^-(1 + 1/a).

c count · r rank from 1 · R ranks · K different counts
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

LEAST_COUNT = 5
"""Least-squares fits leave rarer tokens out: their ranks are plateaus of sampling noise."""
_STEEPEST = 8.0


def ranked(counts: Ids) -> Ids:
    """The counts of what occurs at all, most frequent first, ``[R]``."""
    return np.sort(counts[counts > 0])[::-1]


@dataclass(frozen=True)
class PowerLaw:
    """f(r) ~ (r + shift)^-exponent. r2: of the least-squares line in log-log; ks: largest difference between
    the cumulated frequencies of the data and of the law."""

    exponent: float
    shift: float
    r2: float
    ks: float


def zipf_least_squares(counts: Ids, most_ranks: int | None = None) -> PowerLaw:
    """The line through (log r, log f), every rank weighing the same, over the first `most_ranks` ranks (None:
    those of tokens seen at least `LEAST_COUNT` times). NaN with fewer than two ranks."""
    f = ranked(counts).astype(np.float64)
    if most_ranks is None:
        most_ranks = int((f >= LEAST_COUNT).sum())
    kept = f[:most_ranks]
    if len(kept) < 2:
        return PowerLaw(math.nan, 0.0, math.nan, math.nan)
    x, y = np.log(np.arange(1, len(kept) + 1)), np.log(kept)
    slope, level = np.polyfit(x, y, 1)
    spread = ((y - y.mean()) ** 2).sum()
    left = ((y - slope * x - level) ** 2).sum()
    r2 = 1 - left / spread if spread > 0 else math.nan
    return PowerLaw(float(-slope), 0.0, float(r2), _kolmogorov(f, -slope, 0.0))


def zipf_likelihood(counts: Ids) -> PowerLaw:
    """Maximum likelihood of the truncated zeta law over the ranks that occur: the exponent a that maximises
    -a Σ c_r log r - N log Σ r^-a. `r2` is NaN. NaN with fewer than two ranks."""
    f = ranked(counts).astype(np.float64)
    if len(f) < 2:
        return PowerLaw(math.nan, 0.0, math.nan, math.nan)
    exponent, _ = maximum(lambda a: _rank_likelihood(f, a, 0.0), 0.0, _STEEPEST)
    return PowerLaw(exponent, 0.0, math.nan, _kolmogorov(f, exponent, 0.0))


def zipf_mandelbrot(counts: Ids) -> PowerLaw:
    """The same with f(r) ~ (r + b)^-a: both by maximum likelihood, b between 0 and ten times the ranks."""
    f = ranked(counts).astype(np.float64)
    if len(f) < 3:
        return PowerLaw(math.nan, math.nan, math.nan, math.nan)

    def best(b: float) -> tuple[float, float]:
        return maximum(lambda a: _rank_likelihood(f, a, b), 0.0, 4 * _STEEPEST)

    log_shift, _ = maximum(lambda t: best(math.expm1(t))[1], 0.0, math.log1p(10.0 * len(f)))
    shift = math.expm1(log_shift)
    exponent = best(shift)[0]
    return PowerLaw(exponent, shift, math.nan, _kolmogorov(f, exponent, shift))


def _rank_likelihood(f: Floats, a: float, b: float) -> float:
    logs = np.log(np.arange(1, len(f) + 1) + b)
    return float(-a * (f * logs).sum() - f.sum() * _log_sum(-a * logs))


def _log_sum(x: Floats) -> float:
    top = float(x.max())
    return top + math.log(float(np.exp(x - top).sum()))


def _kolmogorov(f: Floats, a: float, b: float) -> float:
    law = -a * np.log(np.arange(1, len(f) + 1) + b)
    law = np.exp(law - _log_sum(law))
    return float(np.abs(np.cumsum(f) / f.sum() - np.cumsum(law)).max())


def maximum(function: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """Where a function with one peak is highest between low and high (golden section, to 1e-7 of the
    interval), and how high."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = low, high
    left, right = b - ratio * (b - a), a + ratio * (b - a)
    at_left, at_right = function(left), function(right)
    while b - a > 1e-7 * (high - low):
        if at_left >= at_right:
            b, right, at_right = right, left, at_left
            left = b - ratio * (b - a)
            at_left = function(left)
        else:
            a, left, at_left = left, right, at_right
            right = a + ratio * (b - a)
            at_right = function(right)
    return (left, at_left) if at_left >= at_right else (right, at_right)


# How many tokens occur k times


@dataclass(frozen=True)
class TypeLaw:
    """A law of the number of times k that a token occurs, fitted by maximum likelihood: its parameters, its
    log-likelihood, and log P of each different count, ``[K]``."""

    parameters: dict[str, float]
    likelihood: float
    log_p: Floats


def yule_simon(counts: Ids) -> TypeLaw:
    """P(k) = rho B(k, rho + 1), k >= 1, rho by a one-dimensional search."""
    k, weights = _occurrences(counts)
    beta_k = torch.lgamma(torch.from_numpy(k))

    def log_p(rho: float) -> Floats:
        value = torch.tensor(rho, dtype=torch.float64)
        beta = beta_k + torch.lgamma(value + 1) - torch.lgamma(torch.from_numpy(k) + value + 1)
        return (math.log(rho) + beta).numpy()

    log_rho, _ = maximum(lambda t: float((weights * log_p(math.exp(t))).sum()), math.log(1e-3), math.log(1e3))
    rho = math.exp(log_rho)
    return _type_law({"rho": rho}, weights, log_p(rho))


def type_zipf(counts: Ids) -> TypeLaw:
    """P(k) ~ k^-s for k from 1 to the highest count (the truncated zeta law), s by a one-dimensional
    search."""
    k, weights = _occurrences(counts)
    # All k up to the highest one: exactly to 10,000, beyond in steps of growing width.
    highest = int(k.max())
    edges = np.unique(np.concatenate([np.arange(1, min(highest, 10_000) + 2), _steps(10_001, highest + 1)]))
    widths, middles = np.diff(edges), np.log((edges[:-1] + edges[1:] - 1) / 2)

    def log_p(s: float) -> Floats:
        return -s * np.log(k) - _log_sum(-s * middles + np.log(widths))

    s, _ = maximum(lambda value: float((weights * log_p(value)).sum()), 0.0, _STEEPEST)
    return _type_law({"exponent": s}, weights, log_p(s))


def _steps(first: int, end: int) -> Ids:
    if end <= first:
        return np.array([end], np.int64)
    count = int(1000 * math.log(end / first)) + 2
    return np.geomspace(first, end, count).astype(np.int64)


def log_normal(counts: Ids) -> TypeLaw:
    """P(k) of a log-normal variable rounded to the next whole number from 1 on; mu and sigma by coordinate
    search from the moments of log k."""
    k, weights = _occurrences(counts)

    def log_p(mu: float, sigma: float) -> Floats:
        upper, lower, least = ((np.log(x) - mu) / sigma for x in (k + 0.5, k - 0.5, 0.5))
        return np.log(np.maximum(_between(lower, upper), 1e-300)) - math.log(
            max(1e-300, float(_between(np.array(least), np.array(np.inf))))
        )

    def height(mu: float, sigma: float) -> float:
        return float((weights * log_p(mu, sigma)).sum())

    share = weights / weights.sum()
    mu = float((share * np.log(k)).sum())
    sigma = max(0.05, math.sqrt(float((share * (np.log(k) - mu) ** 2).sum())))
    previous = -math.inf
    for _ in range(60):
        mu, _ = maximum(lambda value, s=sigma: height(value, s), mu - 3 * sigma, mu + 3 * sigma)  # type: ignore[misc]
        sigma, best = maximum(lambda value, m=mu: height(m, value), sigma / 3, sigma * 3)  # type: ignore[misc]
        if best - previous < 1e-6 * abs(best):
            break
        previous = best
    return _type_law({"mu": mu, "sigma": sigma}, weights, log_p(mu, sigma))


def _between(lower: Floats, upper: Floats) -> Floats:
    """Probability of a standard normal variable between the two; in the upper half by symmetry, where the
    difference of two values near 1 would be lost."""
    swap = lower > 0
    a, b = np.where(swap, -upper, lower), np.where(swap, -lower, upper)
    cdf = torch.special.ndtr(torch.from_numpy(np.stack([a, b]).astype(np.float64))).numpy()
    return np.asarray(cdf[1] - cdf[0])


def _occurrences(counts: Ids) -> tuple[Floats, Floats]:
    """The different counts k ``[K]``, and how many tokens have each."""
    k, types = np.unique(counts[counts > 0], return_counts=True)
    if not len(k):
        raise ValueError("a law of counts needs at least one token.")
    return k.astype(np.float64), types.astype(np.float64)


def _type_law(parameters: dict[str, float], weights: Floats, log_p: Floats) -> TypeLaw:
    return TypeLaw(parameters, float((weights * log_p).sum()), log_p)


def vuong(counts: Ids, first: TypeLaw, second: TypeLaw) -> tuple[float, float]:
    """Vuong's test between two laws fitted to the same counts: z (positive: the first fits better), and the
    two-sided p-value of no difference. (0, 1) where the laws agree everywhere."""
    _, weights = _occurrences(counts)
    ratio = first.log_p - second.log_p
    types = weights.sum()
    mean = float((weights * ratio).sum() / types)
    spread = math.sqrt(float((weights * (ratio - mean) ** 2).sum() / types))
    if spread < 1e-12:
        return 0.0, 1.0
    z = math.sqrt(types) * mean / spread
    return z, math.erfc(abs(z) / math.sqrt(2))


def benford(counts: Ids) -> tuple[Floats, float, float]:
    """First digits of the counts against log10(1 + 1/d): their shares ``[9]``, chi-square (8 degrees of
    freedom) and its p-value."""
    seen = counts[counts > 0]
    digits = seen // 10 ** np.floor(np.log10(seen) + 1e-12).astype(np.int64)
    observed = np.bincount(digits, minlength=10)[1:10].astype(np.float64)
    expected = observed.sum() * np.log10(1 + 1 / np.arange(1, 10))
    chi = float(((observed - expected) ** 2 / np.maximum(expected, 1e-300)).sum())
    half = chi / 2  # the chi-square tail has a closed form for even degrees of freedom
    tail = math.exp(-half) * sum(half**i / math.factorial(i) for i in range(4))
    return observed / max(1.0, observed.sum()), chi, tail
