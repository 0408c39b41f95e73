"""Perplexity of held-out tokens under a smoothed n-gram model.

The model is interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999) with one discount per order,
D = n1 / (n1 + 2 n2) from the numbers of n-grams that occur once and twice; below the unigrams lies the
uniform distribution over the vocabulary, so that no token is impossible. Items start with order - 1 start
tokens.

T test tokens
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lexel.evaluate.tokens.stream import Ids, TokenStream

Floats = npt.NDArray[np.float64]


def kneser_ney(train: TokenStream, test: TokenStream, order: int) -> Floats:
    """log2 probability of every token of `test`, item after item, ``[T]``, given the `order` - 1 tokens
    before it. ValueError when the vocabularies differ, the order is below 1 or there is nothing to train
    on."""
    if train.vocabulary != test.vocabulary or order < 1 or not train.tokens:
        raise ValueError("n-grams need training tokens of the same vocabulary and an order of at least 1.")
    start = train.vocabulary
    text, real, is_train = _with_starts(train, test, order - 1, start)
    numbers = _gram_numbers(text, order, start + 1)
    learned, asked = real & is_train, real & ~is_train
    probability = np.full(int(asked.sum()), 1 / train.vocabulary)
    # From the uniform distribution up: each order mixes what it has counted with the order below.
    for g in range(1, order + 1):
        gram = numbers[g]
        context = np.r_[0, numbers[g - 1][:-1]] if g > 1 else np.zeros_like(gram)
        kinds = int(gram.max()) + 1
        weight = _weights(numbers, learned, g, order, kinds)
        contexts = int(context.max()) + 1
        # Each kind of n-gram has one context: that of any of its places.
        context_of = np.zeros(kinds, np.int64)
        context_of[gram[real]] = context[real]
        once, twice = int((weight == 1).sum()), int((weight == 2).sum())
        discount = once / (once + 2 * twice) if once and twice else 0.5
        total = np.bincount(context_of, weight, contexts)
        followers = np.bincount(context_of, weight > 0, contexts)
        own, at = weight[gram[asked]], context[asked]
        known = total[at] > 0
        below = np.maximum(1.0, total[at])
        mixed = (np.maximum(own - discount, 0) + discount * followers[at] * probability) / below
        probability = np.where(known, mixed, probability)
    return np.asarray(np.log2(probability))


def _with_starts(
    train: TokenStream, test: TokenStream, starts: int, start: int
) -> tuple[Ids, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Both streams as one text with start tokens before each item; where the real tokens are, and which of
    the text is for training."""
    pieces, real = [], []
    for item in (*train.items(), *test.items()):
        pieces += [np.full(starts, start, np.int64), item]
        real += [np.zeros(starts, bool), np.ones(len(item), bool)]
    text, inside = np.concatenate(pieces), np.concatenate(real)
    border = train.tokens + starts * len(train.ids)
    return text, inside, np.arange(len(text)) < border


def _gram_numbers(text: Ids, order: int, base: int) -> dict[int, Ids]:
    """For g = 1..order the number of the n-gram of g tokens that ends at each place (meaningless at the first
    g - 1 places, which are start tokens)."""
    numbers = {1: np.unique(text, return_inverse=True)[1].astype(np.int64)}
    for g in range(2, order + 1):
        joint = np.r_[0, numbers[g - 1][:-1]] * base + text
        numbers[g] = np.unique(joint, return_inverse=True)[1].astype(np.int64)
    return numbers


def _weights(
    numbers: dict[int, Ids], learned: npt.NDArray[np.bool_], g: int, order: int, kinds: int
) -> Floats:
    """How often each n-gram of g tokens was seen in training or, below the highest order, after how many
    different tokens, ``[kinds]``."""
    gram = numbers[g]
    if g == order:
        return np.bincount(gram[learned], minlength=kinds).astype(np.float64)
    longer = np.unique(np.stack([numbers[g + 1][learned], gram[learned]], 1), axis=0)
    return np.bincount(longer[:, 1], minlength=kinds).astype(np.float64)


def held_out_perplexity(stream: TokenStream, order: int, every: int = 5) -> float:
    """Perplexity per token of every `every`-th item under a model of the others; NaN with fewer items."""
    number = np.arange(len(stream.ids))
    test, train = (
        stream.rows(number[number % every == every - 1]),
        stream.rows(number[number % every != every - 1]),
    )
    if not test.tokens or not train.tokens:
        return float("nan")
    return float(2 ** -kneser_ney(train, test, order).mean())
