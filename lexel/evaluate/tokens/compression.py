"""How many bits standard codes need for a token: Huffman, Lempel-Ziv 78, LZMA, and the arithmetic bound.

The plain code that gains are measured against spends ceil(log2 V) bits on every token.

V vocabulary
"""

from __future__ import annotations

import heapq
import lzma
import math
from itertools import count

import numpy as np

from lexel.evaluate.tokens.entropy import entropy
from lexel.evaluate.tokens.stream import Ids


def huffman_lengths(counts: Ids) -> Ids:
    """Bits of each token's Huffman code word, ``[V]``; 0 for tokens that never occur. A single token gets one
    bit."""
    lengths = np.zeros(len(counts), np.int64)
    seen = np.flatnonzero(counts)
    if len(seen) == 1:
        lengths[seen] = 1
    if len(seen) < 2:
        return lengths
    order = count()
    heap = [(int(counts[token]), next(order), int(token)) for token in seen]
    heapq.heapify(heap)
    parent: dict[int, int] = {}
    node = len(counts)
    while len(heap) > 1:
        (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        parent[left] = parent[right] = node
        heapq.heappush(heap, (a + b, next(order), node))
        node += 1
    depth = {node - 1: 0}
    for inner in range(node - 2, len(counts) - 1, -1):
        depth[inner] = depth[parent[inner]] + 1
    for token in seen.tolist():
        lengths[token] = depth[parent[token]] + 1
    return lengths


def huffman_bits(counts: Ids) -> float:
    """Mean code word length Σ p l."""
    return float((counts * huffman_lengths(counts)).sum() / max(1, counts.sum()))


def plain_bits(vocabulary: int) -> int:
    """ceil(log2 V), at least 1."""
    return max(1, (vocabulary - 1).bit_length())


def huffman_gain(counts: Ids, vocabulary: int) -> float:
    """1 - Σ p l / ceil(log2 V) for a vocabulary of V tokens, some of which may not occur."""
    return 1 - huffman_bits(counts) / plain_bits(vocabulary)


def arithmetic_bound(counts: Ids, vocabulary: int) -> float:
    """H / log2 V: what an ideal code of single tokens needs of the plain one."""
    return entropy(counts) / math.log2(max(2, vocabulary))


def lz78_phrases(tokens: Ids) -> int:
    """Number of phrases of the Lempel-Ziv 1978 parsing: each is the longest earlier phrase plus one token
    (the last one may be an earlier phrase itself)."""
    children: dict[tuple[int, int], int] = {}
    node = phrases = 0
    for token in tokens.tolist():
        following = children.get((node, token))
        if following is None:
            phrases += 1
            children[node, token] = phrases
            node = 0
        else:
            node = following
    return phrases + (node != 0)


def lz78_bits(tokens: Ids) -> float:
    """Bits per token c log2 c / N for c phrases. It tends to the entropy rate, slowly; while phrases are
    short, as with a large vocabulary, it leaves out most of what their last tokens cost and lies far
    below."""
    c = lz78_phrases(tokens)
    return c * math.log2(max(2, c)) / max(1, len(tokens))


def lzma_bits(tokens: Ids, vocabulary: int) -> float:
    """Bits per token of LZMA (preset 9, without container) on the tokens as 1, 2, 4 or 8 bytes each."""
    kind = next((t for t in (np.uint8, np.uint16, np.uint32) if vocabulary - 1 <= np.iinfo(t).max), np.uint64)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 24}]
    packed = lzma.compress(tokens.astype(kind).tobytes(), lzma.FORMAT_RAW, filters=filters)
    return 8 * len(packed) / max(1, len(tokens))
