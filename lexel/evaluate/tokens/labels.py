"""Do tokens stand for things? Co-occurrence of tokens with labels: what is at their place, or in their
picture.

V tokens · L labels
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lexel.evaluate.tokens.entropy import entropy

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """purity: mean over occurrences of max_l P(l | token); nmi: I(w; l) / sqrt(H(w) H(l)); cramers_v:
    sqrt(chi-square / (N (min(V, L) - 1))), 0 (independent) to 1. NaN where one side has a single value."""

    purity: float
    nmi: float
    cramers_v: float


def agreement(tokens: Ids, labels: Ids) -> Agreement:
    """How well the tokens and labels of the same N places, ``[N]`` each, go together. All three figures grow
    with the number of rare tokens: compare with `agreement` of shuffled labels. ValueError when N is 0."""
    if not len(tokens) or len(tokens) != len(labels):
        raise ValueError(f"agreement needs as many labels as tokens, got {len(labels)} and {len(tokens)}.")
    _, rows, in_row = np.unique(tokens, return_inverse=True, return_counts=True)
    _, columns, in_column = np.unique(labels, return_inverse=True, return_counts=True)
    # Only the pairs that occur: the whole table may be too large to hold.
    pairs, count = np.unique(rows.astype(np.int64) * len(in_column) + columns, return_counts=True)
    row, column = np.divmod(pairs, len(in_column))
    starts = np.flatnonzero(np.r_[True, row[1:] != row[:-1]])
    purity = float(np.maximum.reduceat(count, starts).sum() / len(tokens))
    smaller = min(len(in_row), len(in_column))
    if smaller < 2:
        return Agreement(purity, math.nan, math.nan)
    h_token, h_label = entropy(in_row), entropy(in_column)
    information = h_token + h_label - entropy(count)
    phi = max(0.0, float((count**2 / (in_row[row] * in_column[column])).sum() - 1))
    return Agreement(purity, information / math.sqrt(h_token * h_label), math.sqrt(phi / (smaller - 1)))


def presence_v(has_token: npt.NDArray[np.bool_], has_label: npt.NDArray[np.bool_]) -> Floats:
    """Cramer's V between the presence of each token and of each label in N pictures: ``[N, V]`` and ``[N,
    L]`` to ``[V, L]`` (for two by two tables this is |phi|); 0 for what is always or never there."""
    tokens, labels = has_token.astype(np.float64), has_label.astype(np.float64)
    tokens, labels = tokens - tokens.mean(0), labels - labels.mean(0)
    scale = np.sqrt((tokens**2).sum(0))[:, None] * np.sqrt((labels**2).sum(0))[None]
    with np.errstate(invalid="ignore"):
        product = np.abs(tokens.T @ labels)
    return np.where(scale > 1e-12, product / np.maximum(scale, 1e-12), 0.0)
