"""What language a tokenizer writes: the statistics of its codes on some pictures, beside those of text.

`collect` (or `stored`) gathers codes, captions and, for procedural scenes, what stands at every cell;
`analyze` measures them with `lexel.evaluate.tokens` and returns plain numbers.

Text is compared at equal length: whichever of the two is longer is cut. It is split into words (and signs),
and into a byte-level BPE with as many ids as the codebook has codes, learned from the same text.

N pictures · n positions · k codebooks
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lexel.data.example import Example, stack_pixels
from lexel.errors import LexelError
from lexel.evaluate.tokens import (
    alignment,
    compression,
    entropy,
    grammar,
    growth,
    labels,
    ngrams,
    stream,
    zipf,
)
from lexel.evaluate.tokens.stream import SCANS, Ids, Mask, TokenStream

if TYPE_CHECKING:
    from lexel.data.tokenized import TokenizedDataset
    from lexel.tokenizers.base import Tokenizer
    from lexel.tokenizers.layout import CodeLayout

LONGEST = 4
"""n-grams of 1 to this many tokens."""

SMALLEST_BPE = 512
LEAST_PICTURES = 8
_SIDE_BY_SIDE = 4096  # tokens whose presence is compared at once
MOST_GRAMMAR, MOST_TRANSPORTED, MOST_WORDS = 50_000, 100, 200
"""Limits of what grows faster than the number of tokens: tokens read into a grammar, items of the
Gromov-Wasserstein distance, words whose presence is compared."""


@dataclass(frozen=True)
class Corpus:
    """Codes of N pictures. indices: ``[N, n, k]``; used: ``[N, n]``, False beyond a flexible length and where
    a selector dropped the position; captions: one text per picture, "" where it has none; cells: by level
    ("object", "part", …) what stands at each position, ``[N, n]`` of numbers from 0, where that is known."""

    indices: Ids
    used: Mask
    layout: CodeLayout
    captions: tuple[str, ...]
    cells: Mapping[str, Ids] = field(default_factory=dict)


@torch.no_grad()
def collect(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Corpus:
    """The codes of examples with pictures at the tokenizer's size. Raises LexelError when there are too
    few."""
    _enough(len(examples))
    tokenizer = tokenizer.to(device).eval()
    indices, used = [], []
    for start in range(0, len(examples), batch_size):
        codes = tokenizer.encode(stack_pixels(examples[start : start + batch_size]).to(device)).to("cpu")
        there = torch.ones(codes.indices.shape[:2], dtype=torch.bool)
        if codes.lengths is not None:
            there &= torch.arange(there.shape[1]) < codes.lengths[:, None]
        if codes.keep is not None:
            there &= codes.keep
        indices.append(codes.indices.numpy())
        used.append(there.numpy())
    captions = tuple(example.captions[0] if example.captions else "" for example in examples)
    layout = tokenizer.layout
    return Corpus(
        np.concatenate(indices), np.concatenate(used), layout, captions, scene_cells(examples, layout)
    )


def stored(dataset: TokenizedDataset, count: int) -> Corpus:
    """The first `count` pictures of a folder that `lexel tokenize` wrote. LexelError when there are too
    few."""
    from lexel.tokenizers.layout import CodeLayout

    count = min(count, len(dataset))
    _enough(count)
    rows = [dataset[i] for i in range(count)]
    manifest = dataset.manifest
    layout = CodeLayout(
        manifest.codebook_sizes,
        grid=manifest.grid,
        length=manifest.length,
        scales=manifest.scales,
        flexible=manifest.flexible,
    )
    indices = np.stack([row.codes.numpy() for row in rows])
    lengths = np.array([indices.shape[1] if row.length is None else row.length for row in rows])
    used = np.arange(indices.shape[1]) < lengths[:, None]
    return Corpus(indices, used, layout, tuple(row.captions[0] if row.captions else "" for row in rows))


def _enough(count: int) -> None:
    if count < LEAST_PICTURES:
        raise LexelError(f"an analysis needs at least {LEAST_PICTURES} pictures, got {count}.")


def scene_cells(examples: Sequence[Example], layout: CodeLayout) -> dict[str, Ids]:
    """For procedural scenes, at each cell of each grid: "object", colour and shape together, "color",
    "shape", and "part", the object and in which ninth of its box the cell lies; 0 is background (no object
    covers a quarter of the cell). Empty for other pictures and for codes that lie on no grid."""
    grids = grids_of(layout)
    if not grids or any(getattr(example.truth, "segmentation", None) is None for example in examples):
        return {}
    found = {
        name: np.zeros((len(examples), layout.positions), np.int64) for name in ("object", "color", "shape")
    }
    found["part"] = np.zeros((len(examples), layout.positions), np.int64)
    names: dict[str, dict[Any, int]] = {level: {} for level in found}
    for row, example in enumerate(examples):
        start = 0
        for h, w in grids:
            for cell, thing, part in _covered(example.truth, h, w):
                told = {"object": (thing.color, thing.shape), "color": thing.color, "shape": thing.shape}
                told["part"] = (thing.color, thing.shape, part)
                for level, name in told.items():
                    known = names[level]
                    found[level][row, start + cell] = known.setdefault(name, len(known) + 1)
            start += h * w
    return found


def _covered(scene: Any, h: int, w: int) -> list[tuple[int, Any, int]]:
    """The cells of an h × w grid of which an object covers a quarter or more: cell, object, ninth of its
    box."""
    side = 8 * max(h, w)
    owner = scene.segmentation(side).numpy()
    rows, columns = np.arange(side) * h // side, np.arange(side) * w // side
    cell = rows[:, None] * w + columns[None]
    size = np.bincount(cell.reshape(-1), minlength=h * w)
    found = []
    for number, thing in enumerate(scene.objects, 1):
        share = np.bincount(cell[owner == number], minlength=h * w) / size
        x0, y0, x1, y1 = thing.box
        for place in np.flatnonzero(share >= 0.25):
            y, x = (place // w + 0.5) / h, (place % w + 0.5) / w
            across, down = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
            ninth = 3 * min(2, max(0, int(3 * down))) + min(2, max(0, int(3 * across)))
            found.append((int(place), thing, ninth))
    return found


def grids_of(layout: CodeLayout) -> tuple[tuple[int, int], ...]:
    """The raster grids that a layout's positions are made of; none for 1D codes."""
    if layout.grid is not None:
        return (layout.grid,)
    return layout.scales or ()


# Streams


def code_streams(corpus: Corpus) -> dict[str, tuple[TokenStream, int]]:
    """The codes as token streams (dense) and their nominal vocabularies: "codes", or with several codebooks
    each of them and "all codebooks", where a position's codes are one token together."""
    grids, sizes = grids_of(corpus.layout), corpus.layout.codebook_sizes
    columns = [corpus.indices[..., j] for j in range(len(sizes))]

    def dense(ids: Ids) -> TokenStream:
        return TokenStream(ids, corpus.used, int(ids.max()) + 1, grids).dense()

    if len(sizes) == 1:
        return {"codes": (dense(columns[0]), sizes[0])}
    found = {
        f"codebook {j + 1}": (dense(column), size) for j, (column, size) in enumerate(zip(columns, sizes))
    }
    product = 1
    for size in sizes:
        product *= size
    return {"all codebooks": (dense(stream.joined(columns)), product), **found}


def words_of(text: str) -> list[str]:
    """Lower-case words, numbers and signs."""
    return re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text.lower())


def text_streams(texts: Sequence[str], vocabulary: int) -> dict[str, tuple[TokenStream, int]]:
    """Texts as streams of words, and of BPE ids with at most `vocabulary` of them (left out where the
    codebook is too small for its 256 bytes), each with its vocabulary: the words that occur, the ids there
    are."""
    split = [words_of(text) for text in texts]
    numbers = {
        word: number for number, word in enumerate(sorted({word for words in split for word in words}))
    }
    if not numbers:
        return {}
    items = [np.array([numbers[word] for word in words], np.int64) for words in split]
    found = {"words": (TokenStream.of(items, len(numbers)).dense(), len(numbers))}
    if vocabulary >= SMALLEST_BPE:
        from lexel.data.text_tokenizer import train_text_tokenizer

        tokenizer = train_text_tokenizer(texts, min(vocabulary, 65_536))
        ids = [np.array(tokenizer.encode(text, add_special_tokens=False), np.int64) for text in texts]
        found["BPE"] = (TokenStream.of(ids, len(tokenizer)).dense(), len(tokenizer))
    return found


def pieces(text: str, count: int) -> list[str]:
    """A long text in `count` pieces of about equal length, cut between words."""
    words = text.split()
    edges = np.linspace(0, len(words), count + 1).astype(int)
    return [" ".join(words[a:b]) for a, b in pairwise(edges)]


# Statistics


def describe(tokens: TokenStream, vocabulary: int, seed: int = 0) -> dict[str, Any]:
    """All statistics of one stream that need nothing else, as plain numbers and lists."""
    counts, flat = tokens.counts, tokens.flat
    return {
        "tokens": tokens.tokens,
        "items": len(tokens.ids),
        "vocabulary": vocabulary,
        "health": asdict(entropy.health(counts, vocabulary)),
        "zipf": _frequency(counts),
        "yule_simon": _types(counts),
        "benford": dict(zip(("shares", "chi_square", "p"), _listed(zipf.benford(counts)))),
        "growth": _growth(tokens, seed),
        "entropy": _entropies(tokens, vocabulary, seed),
        "compression": _compressed(counts, flat, vocabulary),
        "grammar": asdict(
            grammar.grammar_size(grammar.re_pair(tokens.first(MOST_GRAMMAR).items(), tokens.vocabulary))
        ),
        "ngrams": _orders(tokens),
        "ranks": _curve(zipf.ranked(counts)),
    }


def _frequency(counts: Ids) -> dict[str, Any]:
    line, likely = zipf.zipf_least_squares(counts), zipf.zipf_likelihood(counts)
    bent = zipf.zipf_mandelbrot(counts)
    return {
        "exponent_least_squares": line.exponent,
        "r2": line.r2,
        "exponent": likely.exponent,
        "ks": likely.ks,
        "mandelbrot_exponent": bent.exponent,
        "mandelbrot_shift": bent.shift,
        "mandelbrot_ks": bent.ks,
    }


def _types(counts: Ids) -> dict[str, Any]:
    law = zipf.yule_simon(counts)
    found: dict[str, Any] = {"rho": law.parameters["rho"], "log_likelihood": law.likelihood}
    for name, other in (("zipf", zipf.type_zipf(counts)), ("log_normal", zipf.log_normal(counts))):
        z, p = zipf.vuong(counts, law, other)
        found[name] = {**other.parameters, "log_likelihood": other.likelihood, "vuong_z": z, "vuong_p": p}
    return found


def _growth(tokens: TokenStream, seed: int) -> dict[str, Any]:
    law, found = growth.heaps(tokens.flat), growth.innovation(tokens, seed=seed)
    return {
        "heaps_factor": law.factor,
        "heaps_exponent": law.exponent,
        "heaps_r2": law.r2,
        "n50": list(found.half),
        "n95": list(found.most),
        "curve": _curve(found.curve),
        "low": _curve(found.low),
        "high": _curve(found.high),
    }


def _entropies(tokens: TokenStream, vocabulary: int, seed: int) -> dict[str, Any]:
    bits = entropy.miller_madow(tokens.counts)
    along = ("rows", "columns") if tokens.grids else ()
    used, each = entropy.by_position(tokens)
    return {
        "bits": entropy.entropy(tokens.counts),
        "corrected": bits,
        "normalized": bits / max(1.0, math.log2(vocabulary)),
        "blocks": entropy.block_entropies(tokens, LONGEST),
        "along": {name: asdict(entropy.dependence(tokens, name, seed)) for name in ("sequence", *along)},
        "used_by_position": used.tolist(),
        "bits_by_position": each.tolist(),
    }


def _compressed(counts: Ids, flat: Ids, vocabulary: int) -> dict[str, Any]:
    return {
        "plain_bits": compression.plain_bits(vocabulary),
        "huffman_bits": compression.huffman_bits(counts),
        "huffman_gain": compression.huffman_gain(counts, vocabulary),
        "huffman_gain_used": compression.huffman_gain(counts, len(counts)),
        "arithmetic_bound": compression.arithmetic_bound(counts, vocabulary),
        "lz78_bits": compression.lz78_bits(flat),
        "lzma_bits": compression.lzma_bits(flat, len(counts)),
    }


def _orders(tokens: TokenStream) -> dict[str, Any]:
    """The n-grams of every scan, and 2 × 2 blocks. Single tokens are the same in each scan."""
    scans = {scan: tokens.read(scan) for scan in SCANS} if tokens.grids else {"sequence": tokens}
    found: dict[str, Any] = {
        scan: {str(g): _grams(stream.ngrams(read, g), read, g) for g in range(1, LONGEST + 1)}
        for scan, read in scans.items()
    }
    if tokens.grids and (numbers := stream.blocks(tokens)).size:
        found["2x2 blocks"] = {"4": _grams(numbers, None, 4)}
    return found


def _grams(numbers: Ids, tokens: TokenStream | None, g: int) -> dict[str, Any]:
    counts = np.bincount(numbers)
    law = zipf.zipf_likelihood(counts)
    _, chi, p = zipf.benford(counts) if len(counts) else (None, float("nan"), float("nan"))
    return {
        "types": len(counts),
        "once": float((counts == 1).mean()) if len(counts) else 0.0,
        "bits_per_token": entropy.entropy(counts) / g,
        "zipf_exponent": law.exponent,
        "zipf_ks": law.ks,
        "zipf_r2": zipf.zipf_least_squares(counts).r2,
        "huffman_gain": compression.huffman_gain(counts, len(counts)),
        "benford_chi_square": chi,
        "benford_p": p,
        "perplexity": None if tokens is None else ngrams.held_out_perplexity(tokens, g),
        "ranks": _curve(zipf.ranked(counts)),
    }


def _listed(values: Sequence[Any]) -> list[Any]:
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in values]


def _curve(values: Any, points: int = 120) -> list[list[float]]:
    """(place from 1, value) at places of about equal distance in log, for a plot."""
    values = np.asarray(values)
    if not len(values):
        return []
    places = np.unique(np.geomspace(1, len(values), points).round().astype(int))
    return [[int(place), float(values[place - 1])] for place in places]


# Tokens and what they stand for


def granularity(corpus: Corpus, tokens: TokenStream, seed: int = 0) -> dict[str, Any]:
    """Of each level of `Corpus.cells`, how tokens and labels agree at the cells that show an object
    (background is most of a picture, and easy), and how much of that remains after shuffling the labels over
    those cells."""
    random, found = np.random.default_rng(seed), {}
    for level, numbers in corpus.cells.items():
        there = numbers[corpus.used]
        some, labelled = tokens.flat[there > 0], there[there > 0]
        if len(some):
            found[level] = {
                "labels": len(np.unique(labelled)),
                **asdict(labels.agreement(some, labelled)),
                "by_chance": asdict(labels.agreement(some, random.permutation(labelled))),
            }
    return found


def word_presence(tokens: TokenStream, words: TokenStream, seed: int = 0) -> dict[str, Any] | None:
    """For each word (of the `MOST_WORDS` commonest) the token whose presence in the picture goes best with
    the word's in the caption: mean and highest Cramer's V, and the mean after shuffling the captions. None
    where captions say the same of every picture."""
    has_word = _presence(words, slice(0, words.vocabulary))
    share = has_word.mean(0)
    useful = np.flatnonzero((share > 0.01) & (share < 0.99))
    useful = useful[np.argsort(-share[useful], kind="stable")][:MOST_WORDS]
    if not len(useful):
        return None
    has_word = has_word[:, useful]
    shuffled = has_word[np.random.default_rng(seed).permutation(len(has_word))]
    best = chance = np.zeros(len(useful))
    for start in range(0, tokens.vocabulary, _SIDE_BY_SIDE):
        has_token = _presence(tokens, slice(start, min(start + _SIDE_BY_SIDE, tokens.vocabulary)))
        best = np.maximum(best, labels.presence_v(has_token, has_word).max(0))
        chance = np.maximum(chance, labels.presence_v(has_token, shuffled).max(0))
    return {
        "words": len(useful),
        "cramers_v": float(best.mean()),
        "highest": float(best.max()),
        "by_chance": float(chance.mean()),
    }


def _presence(tokens: TokenStream, some: slice) -> Mask:
    """Which items hold which of some tokens, ``[N, tokens]``."""
    item, token = np.nonzero(tokens.used)[0], tokens.flat
    wanted = (token >= some.start) & (token < some.stop)
    present = np.zeros((len(tokens.ids), some.stop - some.start), bool)
    present[item[wanted], token[wanted] - some.start] = True
    return present


def text_alignment(tokens: TokenStream, words: TokenStream, seed: int = 0) -> dict[str, Any]:
    """How far the pictures' geometry by codes agrees with that by captions (see `tokens.alignment`), beside
    the same after shuffling the captions."""
    codes = alignment.item_means(tokens, alignment.embed_tokens(tokens))
    texts = alignment.item_means(words, alignment.embed_tokens(words))
    order = np.random.default_rng(seed).permutation(len(texts))
    found: dict[str, Any] = {"pairs": len(codes)}
    for name, other in (("matched", texts), ("by_chance", texts[order])):
        found[name] = {
            "procrustes": alignment.procrustes(codes, other)[1],
            "mutual_neighbours": alignment.mutual_neighbours(codes, other),
            "distortion": alignment.distortion(codes, other),
        }
    # The best plan is not told the pairs: what it puts on them is what the geometry alone gives away.
    few = slice(0, MOST_TRANSPORTED)
    distance, plan = alignment.gromov_wasserstein(codes[few], texts[few])
    found["gromov_wasserstein"] = {
        "distance": distance,
        "true_pairs": alignment.distortion(codes[few], texts[few]),
        "right": float(np.trace(plan)),
        "by_chance": 1 / len(plan),
    }
    return found


# The report


def analyze(corpus: Corpus, text: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Everything about a corpus, as plain numbers. text: what to compare with in place of the captions.

    streams: by name, the codes and (marked by ``kind: text``) the text, full length; equal_length: the same
    of the first stream of codes and the text, cut to the shorter one; granularity, words, alignment: where
    labels or captions are known. Raises LexelError when a text holds no words.
    """
    codes = code_streams(corpus)
    first = next(iter(codes))
    main, vocabulary = codes[first]
    captioned = all(corpus.captions) and len(set(corpus.captions)) > 1
    texts = pieces(text, len(corpus.captions)) if text is not None else list(corpus.captions)
    written = text_streams(texts, vocabulary) if text is not None or captioned else {}
    if text is not None and not written:
        raise LexelError("the text to compare with holds no words.")
    report: dict[str, Any] = {
        "pictures": len(corpus.indices),
        "positions": corpus.layout.positions,
        "codebook_sizes": list(corpus.layout.codebook_sizes),
        "compared_with": "the text" if text is not None else "the captions" if written else None,
        "streams": {name: {"kind": "codes", **describe(*pair, seed)} for name, pair in codes.items()},
        "equal_length": {},
    }
    for name, (tokens, size) in written.items():
        length = min(tokens.tokens, main.tokens)
        report["equal_length"][name] = {
            "tokens": length,
            "codes": _compared(main.first(length), vocabulary, seed),
            "text": _compared(tokens.first(length), size, seed),
        }
        report["streams"][name] = {"kind": "text", **describe(tokens.first(length).dense(), size, seed)}
    report["granularity"] = granularity(corpus, main, seed)
    if captioned:
        words = text_streams(corpus.captions, 0)["words"][0]
        report["words"] = word_presence(main, words, seed)
        report["alignment"] = text_alignment(main, words, seed)
    return report


def without_nan(value: Any) -> Any:
    """A report with None for what could not be computed, as JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _compared(tokens: TokenStream, vocabulary: int, seed: int) -> dict[str, Any]:
    """The figures that depend on length."""
    tokens = tokens.dense()
    counts = tokens.counts
    found = growth.innovation(tokens, seed=seed)
    return {
        "items": len(tokens.ids),
        "used": len(counts),
        "vocabulary": vocabulary,
        "bits": entropy.miller_madow(counts),
        "normalized": entropy.miller_madow(counts) / max(1.0, math.log2(vocabulary)),
        "huffman_gain": compression.huffman_gain(counts, vocabulary),
        "huffman_gain_used": compression.huffman_gain(counts, len(counts)),
        "lz78_bits": compression.lz78_bits(tokens.flat),
        "zipf_exponent": zipf.zipf_likelihood(counts).exponent,
        "zipf_r2": zipf.zipf_least_squares(counts).r2,
        "heaps_exponent": growth.heaps(tokens.flat).exponent,
        "n95": found.most[0],
        "bigram_perplexity": ngrams.held_out_perplexity(tokens, 2),
        "grammar_ratio": grammar.grammar_size(
            grammar.re_pair(tokens.first(MOST_GRAMMAR).items(), tokens.vocabulary)
        ).ratio,
    }
