"""The statistics of tokens: identities that hold exactly, and parameters that come back from synthetic
sources."""

from __future__ import annotations

import math

import numpy as np
import pytest

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
from lexel.evaluate.tokens.stream import SCANS, TokenStream

TOLERANCE = 0.02


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def zipf_tokens(random: np.random.Generator, a: float, b: float, ranks: int, tokens: int) -> np.ndarray:
    p = (np.arange(1, ranks + 1) + b) ** -a
    return random.choice(ranks, tokens, p=p / p.sum())


# Sequences and orders


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (8, 2), (1, 1), (7, 7)])
def test_a_scan_visits_every_cell_once(scan: str, grid: tuple[int, int]):
    order = stream.scan_order(*grid, scan)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))


def test_scans_by_hand():
    assert stream.scan_order(2, 3, "column").tolist() == [0, 3, 1, 4, 2, 5]
    assert stream.scan_order(2, 3, "snake").tolist() == [0, 1, 2, 5, 4, 3]
    assert stream.scan_order(2, 2, "z-order").tolist() == [0, 1, 2, 3]
    assert stream.scan_order(4, 4, "z-order").tolist()[:6] == [0, 1, 4, 5, 2, 3]
    with pytest.raises(ValueError, match="a scan is one of row, column"):
        stream.scan_order(2, 2, "spiral")


@pytest.mark.parametrize("scan", ["snake", "hilbert"])
def test_neighbours_on_a_continuous_curve_touch(scan: str):
    row, column = np.divmod(stream.scan_order(8, 8, scan), 8)
    steps = np.abs(np.diff(row)) + np.abs(np.diff(column))
    assert (steps == 1).all()


def test_a_pyramid_is_read_grid_by_grid():
    codes = TokenStream(np.arange(5)[None], np.ones((1, 5), bool), 5, ((1, 1), (2, 2)))
    assert codes.read("column").flat.tolist() == [0, 1, 3, 2, 4]
    first, second = stream.neighbours(codes, "columns")
    assert list(zip(first.tolist(), second.tolist())) == [(1, 3), (2, 4)]
    with pytest.raises(ValueError, match="on a grid"):
        TokenStream.of([[0, 1]], 2).read("row")


def test_ngrams_by_hand():
    items = TokenStream.of([[0, 1, 0, 1], [1, 0]], 2)
    assert stream.ngrams(items, 1).tolist() == [0, 1, 0, 1, 1, 0]
    assert np.bincount(stream.ngrams(items, 2)).tolist() == [2, 2], "01 and 10 twice; nothing across items"
    assert len(stream.ngrams(items, 4)) == 1
    # A dropped token: its neighbours become neighbours, as in the sequence that a model reads.
    dropped = TokenStream(np.array([[0, 9, 1]]), np.array([[True, False, True]]), 10)
    assert len(stream.ngrams(dropped, 2)) == 1
    assert dropped.dense().flat.tolist() == [0, 1]
    assert dropped.dense().vocabulary == 2


def test_blocks_by_hand():
    ids = np.array([[0, 1, 0, 1, 0, 1, 0, 1, 0]])
    codes = TokenStream(ids, np.ones_like(ids, bool), 2, ((3, 3),))
    assert stream.blocks(codes).tolist() == [0, 1, 1, 0]


def test_first_tokens_cut_the_last_item():
    items = TokenStream.of([[0, 1, 2], [3, 4], [5]], 6)
    assert [x.tolist() for x in items.first(4).items()] == [[0, 1, 2], [3]]


def test_codebooks_are_joined(random: np.random.Generator):
    columns = [random.integers(0, 2**40, 100) // 2**38 for _ in range(3)]
    whole = stream.joined(columns)
    assert len(np.unique(whole)) == len(np.unique(np.stack(columns, 1), axis=0))
    assert whole.max() == len(np.unique(whole)) - 1


def test_wrong_ids_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.3, got 1\.\.4"):
        TokenStream.of([[1, 4]], 4)
    with pytest.raises(ValueError, match="do not hold 3 positions"):
        TokenStream(np.zeros((1, 3), np.int64), np.ones((1, 3), bool), 1, ((2, 2),))


# Laws of frequency


@pytest.mark.parametrize("a", [0.7, 1.0, 1.3])
def test_zipf_exponent_is_recovered(random: np.random.Generator, a: float):
    counts = np.bincount(zipf_tokens(random, a, 0.0, 500, 200_000))
    by_likelihood = zipf.zipf_likelihood(counts)
    assert by_likelihood.exponent == pytest.approx(a, rel=TOLERANCE)
    assert by_likelihood.ks < 0.01
    by_line = zipf.zipf_least_squares(counts)
    assert by_line.exponent == pytest.approx(a, rel=TOLERANCE)
    assert by_line.r2 > 0.99


def test_exact_frequencies_give_the_exact_exponent():
    counts = (1e9 * np.arange(1, 300) ** -1.1).astype(np.int64)
    assert zipf.zipf_least_squares(counts).exponent == pytest.approx(1.1, abs=1e-4)
    assert zipf.zipf_likelihood(counts).exponent == pytest.approx(1.1, abs=1e-4)


def test_zipf_mandelbrot_is_recovered(random: np.random.Generator):
    law = zipf.zipf_mandelbrot(np.bincount(zipf_tokens(random, 1.2, 10.0, 1000, 2_000_000)))
    assert law.exponent == pytest.approx(1.2, rel=TOLERANCE)
    assert law.shift == pytest.approx(10.0, rel=5 * TOLERANCE), "exponent and shift trade off"
    assert law.ks < 0.005


def test_equal_frequencies_have_exponent_zero():
    assert zipf.zipf_likelihood(np.full(50, 100)).exponent == pytest.approx(0, abs=1e-5)


def yule_counts(random: np.random.Generator, rho: float, types: int) -> np.ndarray:
    # Geometric with success exp(-W), W exponential of rate rho, is Yule-Simon.
    return random.geometric(np.exp(-random.exponential(1 / rho, types)))


@pytest.mark.parametrize("rho", [1.2, 2.0])
def test_yule_simon_is_recovered(random: np.random.Generator, rho: float):
    counts = yule_counts(random, rho, 40_000)
    law = zipf.yule_simon(counts)
    assert law.parameters["rho"] == pytest.approx(rho, rel=TOLERANCE)
    for other in (zipf.type_zipf(counts), zipf.log_normal(counts)):
        z, p = zipf.vuong(counts, law, other)
        assert z > 2
        assert p < 0.05
    assert zipf.vuong(counts, law, law) == (0.0, 1.0)


def test_the_laws_of_counts_are_recovered(random: np.random.Generator):
    k = np.arange(1, 1001)
    p = k**-1.8
    assert zipf.type_zipf(random.choice(k, 100_000, p=p / p.sum())).parameters["exponent"] == pytest.approx(
        1.8, rel=TOLERANCE
    )
    # Beyond 10,000 the normalising sum goes in steps.
    far = np.repeat([1, 50_000], [1, 1])
    exact = -2 * 0.5 * math.log(50_000)
    law = zipf.type_zipf(far)
    s = law.parameters["exponent"]
    assert law.likelihood == pytest.approx(
        s * exact - 2 * math.log((np.arange(1, 50_001.0) ** -s).sum()), rel=1e-5
    )
    counts = np.maximum(1, np.round(np.exp(random.normal(4.0, 0.7, 20_000)))).astype(np.int64)
    fitted = zipf.log_normal(counts)
    assert fitted.parameters["mu"] == pytest.approx(4.0, rel=TOLERANCE)
    assert fitted.parameters["sigma"] == pytest.approx(0.7, rel=TOLERANCE)
    assert zipf.vuong(counts, fitted, zipf.yule_simon(counts))[0] > 2


def test_benford(random: np.random.Generator):
    shares, chi, p = zipf.benford((10 ** random.uniform(0, 6, 5000)).astype(np.int64))
    assert shares.sum() == pytest.approx(1)
    assert p > 0.001
    _, chi, p = zipf.benford(np.repeat(np.arange(1, 10), 100))
    expected = 900 * np.log10(1 + 1 / np.arange(1, 10))
    assert chi == pytest.approx(((100 - expected) ** 2 / expected).sum())
    assert p < 1e-6
    assert zipf.benford(np.array([999, 1000, 1]))[0].tolist() == pytest.approx(
        [2 / 3, 0, 0, 0, 0, 0, 0, 0, 1 / 3]
    )


# Growth


@pytest.mark.parametrize("exponent", [0.4, 0.7])
def test_heaps_is_recovered(random: np.random.Generator, exponent: float):
    wanted = np.floor(5 * np.arange(1, 60_001) ** exponent).astype(np.int64)
    fresh = np.diff(np.minimum(wanted, np.arange(1, 60_001)), prepend=0) > 0
    known = np.cumsum(fresh)
    tokens = np.where(fresh, known - 1, (random.random(60_000) * known).astype(np.int64))
    law = growth.heaps(tokens)
    assert growth.distinct(tokens)[-1] == known[-1]
    assert law.exponent == pytest.approx(exponent, rel=TOLERANCE)
    assert law.factor == pytest.approx(5, rel=5 * TOLERANCE)
    assert law.r2 > 0.999


def test_innovation_by_hand():
    same = TokenStream.of([[0, 1, 2, 3]] * 5, 4)
    found = growth.innovation(same)
    assert found.curve.tolist() == [4] * 5
    assert found.half == found.most == (1.0, 1.0, 1.0)
    apart = growth.innovation(TokenStream.of([[i] for i in range(20)], 20))
    assert apart.curve.tolist() == list(range(1, 21))
    assert apart.half == (10.0, 10.0, 10.0)
    assert apart.most == (19.0, 19.0, 19.0)


# Entropy


def test_entropies_by_hand():
    assert entropy.entropy(np.array([1, 1, 2, 0])) == pytest.approx(1.5)
    assert entropy.miller_madow(np.array([1, 1, 2])) == pytest.approx(1.5 + 2 / (8 * math.log(2)))
    health = entropy.health(np.array([5, 5, 0]), 4)
    assert (health.used, health.dead, health.utilization) == (2, 2, 0.5)
    assert health.effective == pytest.approx(2)


def test_miller_madow_halves_the_bias(random: np.random.Generator):
    counts = np.bincount(random.integers(0, 1000, 4000))
    true = math.log2(1000)
    assert abs(entropy.miller_madow(counts) - true) < abs(entropy.entropy(counts) - true) / 2


def test_a_markov_source_is_recovered(random: np.random.Generator):
    chain = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.05, 0.15, 0.8]])
    stationary = np.linalg.matrix_power(chain, 200)[0]
    rate = -(stationary[:, None] * chain * np.log2(chain)).sum()
    state, tokens = np.zeros(500, np.int64), []
    steps = np.cumsum(chain, 1)
    for _ in range(200):
        state = (random.random(500)[:, None] > steps[state]).sum(1)
        tokens.append(state)
    ids = np.stack(tokens, 1)
    items = TokenStream(ids, np.ones_like(ids, bool), 3)
    found = entropy.dependence(items, "sequence")
    assert found.conditional == pytest.approx(rate, rel=TOLERANCE)
    assert found.corrected == pytest.approx(rate, rel=TOLERANCE)
    single = -(stationary * np.log2(stationary)).sum()
    assert found.information == pytest.approx(single - rate, rel=TOLERANCE)
    assert found.by_chance < 0.001
    blocks = entropy.block_entropies(items, 3)
    assert blocks[2] == pytest.approx((single + 2 * rate) / 3, rel=TOLERANCE)
    perplexity = ngrams.held_out_perplexity(items, 2)
    assert math.log2(perplexity) == pytest.approx(rate, rel=TOLERANCE)
    # 100,000 tokens are few for Lempel-Ziv, whose rate comes from above.
    assert rate < compression.lz78_bits(items.flat) < 1.5 * rate


def test_use_by_position():
    used, bits = entropy.by_position(TokenStream.of([[0, 0, 1], [0, 1], [0, 2]], 3))
    assert used.tolist() == [1, 3, 1]
    assert bits.tolist() == pytest.approx([0, math.log2(3), 0])


# Compression


def test_huffman(random: np.random.Generator):
    assert sorted(compression.huffman_lengths(np.array([8, 4, 2, 1, 1])).tolist()) == [1, 2, 3, 4, 4]
    for size in (2, 3, 100):
        counts = random.integers(0, 50, size)
        counts[0] = 1
        counts[1] = 7
        lengths = compression.huffman_lengths(counts)
        assert (2.0 ** -lengths[counts > 0]).sum() == pytest.approx(1), "a full prefix code"
        bits, bound = compression.huffman_bits(counts), entropy.entropy(counts)
        assert bound <= bits + 1e-12
        assert bits < bound + 1
        assert compression.arithmetic_bound(counts, size) == pytest.approx(bound / math.log2(size))
    assert compression.huffman_gain(np.full(256, 3), 256) == 0
    assert compression.huffman_gain(np.full(256, 3), 1024) == pytest.approx(0.2)
    assert compression.huffman_lengths(np.array([0, 9])).tolist() == [0, 1]


def test_lempel_ziv_by_hand():
    # 0 | 01 | 010 | 1 | 011
    assert compression.lz78_phrases(np.array([0, 0, 1, 0, 1, 0, 1, 0, 1, 1])) == 5
    # 0 | 00 | 0, the last one an earlier phrase
    assert compression.lz78_phrases(np.zeros(4, np.int64)) == 3
    assert compression.lz78_phrases(np.zeros(0, np.int64)) == 0


@pytest.mark.parametrize(("vocabulary", "width"), [(256, 8), (257, 16), (70_000, 32)])
def test_lzma(random: np.random.Generator, vocabulary: int, width: int):
    noise = random.integers(0, vocabulary, 20_000)
    assert math.log2(vocabulary) * 0.98 < compression.lzma_bits(noise, vocabulary) < width * 1.01
    assert compression.lzma_bits(np.zeros(20_000, np.int64), vocabulary) < 0.1


# n-gram models


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one(random: np.random.Generator, order: int):
    vocabulary = 6
    train = TokenStream.of([random.integers(0, 5, 30) for _ in range(4)], vocabulary)
    for context in ([0, 1], [5, 5], []):
        items = [[*context, token] for token in range(vocabulary)]
        test = TokenStream.of(items, vocabulary)
        log_p = ngrams.kneser_ney(train, test, order).reshape(vocabulary, -1)[:, -1]
        assert (2**log_p).sum() == pytest.approx(1, abs=1e-12)
        assert np.isfinite(log_p).all()


def test_kneser_ney_by_hand():
    train, test = TokenStream.of([[0, 0, 1]], 2), TokenStream.of([[1]], 2)
    # Unigrams: counts 2 and 1, one seen once and one twice: D = 1/3.
    discount = 1 / 3
    expected = (1 - discount) / 3 + discount * 2 / 3 * 0.5
    assert 2 ** ngrams.kneser_ney(train, test, 1)[0] == pytest.approx(expected)


def test_too_few_items_have_no_perplexity():
    assert math.isnan(ngrams.held_out_perplexity(TokenStream.of([[0, 1]], 2), 2))
    with pytest.raises(ValueError, match="order of at least 1"):
        ngrams.kneser_ney(TokenStream.of([[0]], 2), TokenStream.of([[0]], 2), 0)


# Grammar


def test_re_pair_expands_back(random: np.random.Generator):
    items = [
        random.choice(6, int(random.integers(0, 80)), p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05]) for _ in range(20)
    ]
    items += [np.zeros(9, np.int64), np.tile([0, 1, 2], 7)]
    made = grammar.re_pair(items, 6)
    for before, after in zip(items, made.expand(), strict=True):
        assert before.tolist() == after.tolist()
    left = np.concatenate([np.stack([x[:-1], x[1:]], 1) for x in made.items if len(x) > 1])
    _, times = np.unique(left, axis=0, return_counts=True)
    runs = sum((x[2:] == x[1:-1]).astype(int) @ (x[1:-1] == x[:-2]) for x in made.items if len(x) > 2)
    assert times.max() - runs <= 1, "no pair occurs twice"


def test_re_pair_by_hand():
    made = grammar.re_pair([np.tile([0, 1], 8)], 2)
    assert made.rules == ((0, 1), (2, 2), (3, 3))
    assert [x.tolist() for x in made.items] == [[4, 4]]
    size = grammar.grammar_size(made)
    assert (size.rules, size.symbols, size.depth) == (3, 8, 3.0)
    assert size.ratio == 0.5
    assert grammar.re_pair([np.array([0, 0, 0])], 1).rules == (), "two overlapping pairs are one"
    assert grammar.re_pair([np.array([0, 1]), np.array([1, 0])], 2).rules == (), "nothing across items"


# Labels


def test_agreement_of_equal_and_of_independent_labels(random: np.random.Generator):
    tokens = random.integers(0, 5, 20_000)
    same = labels.agreement(tokens, 7 - tokens)
    assert (same.purity, same.nmi, same.cramers_v) == pytest.approx((1, 1, 1))
    other = labels.agreement(tokens, random.integers(0, 4, 20_000))
    assert other.purity < 0.3
    assert other.nmi < 0.001
    assert other.cramers_v < 0.03


def test_cramers_v_by_hand():
    table = np.array([[10, 20], [30, 40]])
    tokens, marks = np.repeat([0, 0, 1, 1], table.reshape(-1)), np.repeat([0, 1, 0, 1], table.reshape(-1))
    found = labels.agreement(tokens, marks)
    assert found.cramers_v == pytest.approx(0.0890870806)
    assert found.purity == pytest.approx(0.6)
    assert math.isnan(labels.agreement(tokens, np.zeros(100, np.int64)).nmi)
    has_token = np.repeat([[True], [True], [False], [False]], [10, 20, 30, 40], 0)
    has_label = np.repeat([[True], [False], [True], [False]], [10, 20, 30, 40], 0)
    assert labels.presence_v(has_token, has_label)[0, 0] == pytest.approx(0.0890870806)
    assert labels.presence_v(np.ones((4, 1), bool), has_label[::30])[0, 0] == 0


# Alignment


def test_a_turned_copy_is_aligned(random: np.random.Generator):
    x = random.normal(size=(60, 8))
    turn = np.linalg.qr(random.normal(size=(8, 8)))[0]
    y = 3 * x @ turn + 5
    rotation, residual = alignment.procrustes(x, y)
    assert residual == pytest.approx(0, abs=1e-6)
    assert np.allclose(rotation, turn, atol=1e-6)
    assert alignment.mutual_neighbours(x, y) == 1
    assert alignment.distortion(x, y) == pytest.approx(0, abs=1e-6)
    assert alignment.distortion(x, y[::-1]) > 0.2
    assert alignment.procrustes(x, random.normal(size=(60, 8)))[1] > 0.8
    assert alignment.mutual_neighbours(x, random.normal(size=(60, 8))) < 0.35
    cost, plan = alignment.gromov_wasserstein(x, y)
    assert plan.sum() == pytest.approx(1, abs=1e-6)
    assert cost < alignment.gromov_wasserstein(x, random.uniform(size=(60, 2)))[0]


def test_words_of_one_topic_are_near(random: np.random.Generator):
    # Two topics of five tokens each, which never mix within an item.
    items = [random.integers(0, 5, 12) + 5 * (i % 2) for i in range(200)]
    embedded = alignment.embed_tokens(TokenStream.of(items, 11), width=4)
    apart = alignment.distances(embedded[:10])
    within = max(apart[:5, :5].max(), apart[5:, 5:].max())
    assert within < apart[:5, 5:].min()
    assert not embedded[10].any()
    means = alignment.item_means(TokenStream.of(items, 11), embedded)
    assert np.allclose(means[0], embedded[items[0]].mean(0))
