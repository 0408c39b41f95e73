"""Do two kinds of tokens describe the same items alike? Embeddings of each, and how far their geometries
agree.

Embeddings are positive pointwise mutual information of neighbours, reduced by singular values (Levy and
Goldberg 2014); an item is the mean of its tokens' embeddings.

N paired items · V vocabulary · d width
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lexel.evaluate.tokens.stream import TokenStream

Floats = npt.NDArray[np.float64]


def embed_tokens(stream: TokenStream, width: int = 32, window: int = 4, most: int = 2048) -> Floats:
    """PPMI + SVD embeddings ``[V, width]`` of the `most` commonest tokens, from those at most `window` places
    apart within an item. The other tokens are 0, and so are directions that do not exist."""
    packed = stream.packed()
    counts = packed.counts
    seen = np.sort(np.argsort(-counts, kind="stable")[: min(most, int((counts > 0).sum()))])
    place = np.full(stream.vocabulary, -1, np.int64)
    place[seen] = np.arange(len(seen))
    dense = place[packed.ids]
    there = packed.used & (dense >= 0)
    near = np.zeros((len(seen), len(seen)))
    for distance in range(1, min(window, dense.shape[1] - 1) + 1):
        both = there[:, :-distance] & there[:, distance:]
        pairs = dense[:, :-distance][both] * len(seen) + dense[:, distance:][both]
        near += np.bincount(pairs, minlength=len(seen) ** 2).reshape(near.shape)
    near += near.T
    total, margin = near.sum(), near.sum(0)
    expected = np.outer(margin, margin) / max(1.0, total)
    ratio = np.divide(near, expected, out=np.ones_like(near), where=near > 0)
    ppmi = np.maximum(np.log(ratio), 0.0)
    # A symmetric matrix: its singular vectors are its eigenvectors.
    values, vectors = np.linalg.eigh(ppmi)
    top = np.argsort(-np.abs(values))[:width]
    found = vectors[:, top] * np.sqrt(np.abs(values[top]))
    embedded = np.zeros((stream.vocabulary, width))
    embedded[seen, : found.shape[1]] = found
    return embedded


def item_means(stream: TokenStream, embeddings: Floats) -> Floats:
    """The mean embedding of each item's tokens, ``[N, d]``; 0 for an item without tokens."""
    weights = stream.used[..., None]
    sums = (embeddings[stream.ids] * weights).sum(1)
    return np.asarray(sums / np.maximum(1, weights.sum(1)))


def procrustes(x: Floats, y: Floats) -> tuple[Floats, float]:
    """The orthogonal Q that brings x ``[N, d]`` nearest to y ``[N, d]``, both centred and scaled to norm 1,
    and the residual ||xQ - y|| / ||y||: 0 for the same shape, near sqrt(2) for unrelated ones (x is not
    scaled down to fit)."""
    x, y = _normed(x), _normed(y)
    u, _, v = np.linalg.svd(x.T @ y)
    rotation = u @ v
    return rotation, float(np.linalg.norm(x @ rotation - y))


def _normed(x: Floats) -> Floats:
    x = x - x.mean(0)
    return np.asarray(x / max(1e-12, float(np.linalg.norm(x))))


def distances(x: Floats) -> Floats:
    """Euclidean distances between all rows, ``[N, N]``."""
    squares = (x**2).sum(1)
    return np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * x @ x.T, 0.0))


def mutual_neighbours(x: Floats, y: Floats, k: int = 10) -> float:
    """Mean share of an item's k nearest others that x and y have in common; by chance k / (N - 1)."""
    k = min(k, len(x) - 1)
    shared = []
    for a, b in zip(_nearest(x, k), _nearest(y, k)):
        shared.append(len(np.intersect1d(a, b)) / k)
    return float(np.mean(shared))


def _nearest(x: Floats, k: int) -> npt.NDArray[np.int64]:
    apart = distances(x)
    np.fill_diagonal(apart, np.inf)
    return np.argsort(apart, axis=1, kind="stable")[:, :k]


def distortion(x: Floats, y: Floats) -> float:
    """How differently x and y ``[N, d]`` space the same items: root mean square difference of their distance
    matrices, each divided by its mean. It is `gromov_wasserstein`'s cost of the true pairs."""
    a, b = (d / max(1e-12, float(d.mean())) for d in (distances(x), distances(y)))
    return float(np.sqrt(((a - b) ** 2).mean()))


def gromov_wasserstein(
    x: Floats, y: Floats, regularisation: float = 5e-3, rounds: int = 50
) -> tuple[float, Floats]:
    """Entropic Gromov-Wasserstein distance (Peyré et al. 2016) between the distance matrices of x and y, each
    divided by its mean: the root of Σ (Dx_ij - Dy_kl)² T_ik T_jl, and the plan T ``[N, M]`` with equal
    margins. A local solution from the even start; cubic in the number of items."""
    a, b = (d / max(1e-12, float(d.mean())) for d in (distances(x), distances(y)))
    p, q = np.full(len(a), 1 / len(a)), np.full(len(b), 1 / len(b))
    constant = (a**2 @ p)[:, None] + (b**2 @ q)[None]
    plan = np.outer(p, q)
    for _ in range(rounds):
        previous = plan
        plan = _sinkhorn(constant - 2 * a @ plan @ b.T, p, q, regularisation)
        if np.abs(plan - previous).sum() < 1e-7:
            break
    cost = float(((constant - 2 * a @ plan @ b.T) * plan).sum())
    return math.sqrt(max(0.0, cost)), plan


def _sinkhorn(cost: Floats, p: Floats, q: Floats, regularisation: float, rounds: int = 200) -> Floats:
    """The plan of least cost plus entropy with margins p and q, in logarithms."""
    scaled = -cost / regularisation
    f, g = np.zeros_like(p), np.zeros_like(q)
    for _ in range(rounds):
        f = np.log(p) - _log_sums(scaled + g[None], 1)
        g = np.log(q) - _log_sums(scaled + f[:, None], 0)
    return np.asarray(np.exp(scaled + f[:, None] + g[None]))


def _log_sums(x: Floats, axis: int) -> Floats:
    top = x.max(axis, keepdims=True)
    return np.asarray(np.log(np.exp(x - top).sum(axis)) + top.squeeze(axis))
