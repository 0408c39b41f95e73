"""Documents with holes: what is hidden, how often, and that nothing is lost."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lexel.data.denoising import (
    DENOISERS,
    ROLES,
    SPANS,
    Denoiser,
    denoise,
    draw_hole,
    hide_codes,
    holes_of,
    runs_of,
    spans,
    with_holes,
    without_holes,
)
from lexel.data.documents import DocumentDataset, Mixture
from lexel.data.sampler import Draw
from lexel.data.text_tokenizer import train_text_tokenizer
from lexel.data.tokenized import CodeExample
from lexel.document import DocumentCodec, Image, Text
from lexel.errors import LexelError
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes
from lexel.vocabulary import Vocabulary

TEXT = train_text_tokenizer(["a red circle left of a small blue square, 4*6"] * 3, 280)
SHAPES = {
    "raster": {"codebook_sizes": (32,), "grid": (4, 6)},
    "row_end": {"codebook_sizes": (32,), "grid": (4, 6), "row_end": True},
    "parallel": {"codebook_sizes": (8, 16), "grid": (4, 6)},
    "interleaved": {"codebook_sizes": (8, 16), "grid": (4, 6), "pattern": "interleaved"},
    "delayed": {"codebook_sizes": (8, 16), "grid": (4, 6), "pattern": "delayed"},
    "line": {"codebook_sizes": (32,), "length": 10},
    "flexible": {"codebook_sizes": (32,), "length": 10, "flexible": True},
    "scales": {"codebook_sizes": (32,), "scales": ((1, 1), (2, 2), (4, 4))},
}


def codec_of(name: str, roles: tuple[str, ...] = ROLES) -> DocumentCodec:
    layout = CodeLayout(**SHAPES[name])  # type: ignore[arg-type]
    extra = ("img", "eol", "eof") if layout.row_end else ()
    vocabulary = Vocabulary.build(len(TEXT), {"image": layout.codebook_sizes}, roles=(*extra, *roles))
    return DocumentCodec(vocabulary, TEXT, {"image": layout})


CODECS = {name: codec_of(name) for name in SHAPES}


def picture(codec: DocumentCodec, rng: random.Random) -> Image:
    layout = codec.layouts["image"]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    indices = torch.stack(
        [torch.randint(size, (1, layout.positions), generator=generator) for size in layout.codebook_sizes],
        -1,
    )
    lengths = torch.tensor([rng.randint(1, layout.positions)]) if layout.flexible else None
    if lengths is not None:
        indices[:, int(lengths) :] = 0
    return Image(Codes(indices, layout.grid, layout.scales, lengths))


def a_document(codec: DocumentCodec, rng: random.Random) -> list:
    texts = ["a red circle", "", "a small blue square left of a red circle and nothing else"]
    return [
        [Text(rng.choice(texts)), picture(codec, rng)],
        [picture(codec, rng), Text(texts[2])],
        [Text(texts[0]), picture(codec, rng), Text(texts[2]), picture(codec, rng)],
        [Text(texts[2])],
    ][rng.randrange(4)]


@given(st.sampled_from(sorted(SHAPES)), st.integers(0, 2**32))
def test_filling_the_holes_restores_the_document(name, seed):
    codec, rng = CODECS[name], random.Random(seed)
    whole = codec.build(a_document(codec, rng), supervise="all")
    corrupted = denoise(codec, whole, rng)
    assert torch.equal(without_holes(codec, corrupted.ids), whole.ids)
    codec.parse(without_holes(codec, corrupted.ids))
    first = corrupted.ids if corrupted.ids.ndim == 1 else corrupted.ids[:, 0]
    special = codec.vocabulary.special
    sep = first.tolist().index(special["sep"])
    assert torch.equal(corrupted.loss_mask, torch.arange(len(first)) > sep), (
        "loss on the targets, all of them"
    )
    assert first[1] in [special[mode] for mode in ("mode_r", "mode_s", "mode_x")]
    assert first[-1] == special["eos"]
    assert corrupted.positions[:, 0].tolist() == list(range(len(first)))
    assert len(first) == len(whole) + 2 + 2 * len(groups(codec, corrupted))


def groups(codec: DocumentCodec, corrupted) -> list[list[int]]:
    """Places of the tokens of each group behind the separator."""
    first = corrupted.ids if corrupted.ids.ndim == 1 else corrupted.ids[:, 0]
    special = codec.vocabulary.special
    markers = {special[f"span_{i}"] for i in range(SPANS)}
    found: list[list[int]] = []
    for place in range(first.tolist().index(special["sep"]) + 1, len(first) - 1):
        if int(first[place]) in markers:
            found.append([])
        else:
            found[-1].append(place)
    return found


@given(st.sampled_from(sorted(SHAPES)), st.integers(0, 2**32))
def test_holes_keep_within_a_modality_and_within_whole_rows(name, seed):
    codec, rng = CODECS[name], random.Random(seed)
    layout = codec.layouts["image"]
    whole = codec.build(a_document(codec, rng))
    corrupted = denoise(codec, whole, rng)
    first = corrupted.ids if corrupted.ids.ndim == 1 else corrupted.ids[:, 0]
    # Further columns of a delayed picture may be alone at a place: their first is padding.
    legal = codec.vocabulary.mask("text") | codec.vocabulary.mask("image")
    legal[codec.vocabulary.special["pad"]] = layout.pattern == "delayed"
    for group in groups(codec, corrupted):
        assert group, "no hole is empty"
        assert legal[first[group]].all(), "only text and codes are hidden"
        assert len(corrupted.modality[group].unique()) == 1
        marker = group[0] - 1
        assert corrupted.modality[marker] == corrupted.modality[group[0]]
        assert torch.equal(corrupted.positions[marker, 1:], corrupted.positions[group[0], 1:])
        rows = corrupted.positions[group, 1]
        if rows[0] > 0 and layout.grid is not None and layout.pattern != "delayed":
            assert len(group) % (layout.grid[1] * (layout.k if layout.columns == 1 else 1)) == 0, "whole rows"
            assert corrupted.positions[group[0], 2] == 1


@given(st.sampled_from(sorted(SHAPES)), st.integers(0, 2**32))
def test_hidden_codes_keep_their_row_and_column(name, seed):
    """Sorting given and target codes by their places gives the picture's own places."""
    codec, rng = CODECS[name], random.Random(seed)
    whole = codec.build([Text("a red circle"), picture(codec, rng)])
    corrupted = denoise(codec, whole, rng)

    def codes(sequence):
        first = sequence.ids if sequence.ids.ndim == 1 else sequence.ids[:, 0]
        rows = zip(first.tolist(), sequence.positions[:, 1:].tolist())
        return sorted((place, token) for token, place in rows if codec.vocabulary.mask("image")[token])

    assert codes(whole) == codes(corrupted)


def test_the_rate_and_the_length_of_holes_are_what_was_asked_for():
    """Means of independent draws within 4.5 standard errors (measured): a false alarm once in 150,000 choices
    of the seed for each of the comparisons."""
    rng, draws = random.Random(0), 2000
    for denoiser in DENOISERS:
        if denoiser.span is None:
            continue
        lines = [spans(600, denoiser.span, denoiser.rate, rng) for _ in range(draws // 10)]
        shares = [sum(b - a for a, b in line) / 600 for line in lines]
        assert_mean(shares, denoiser.rate)
        counts = [float(len(line)) for line in lines]
        assert_mean(counts, 600 * denoiser.rate / denoiser.span)
    # Short lines: the rate holds because numbers are rounded at random.
    for length, rate in ((1, 0.15), (5, 0.15), (7, 0.5)):
        assert_mean([sum(b - a for a, b in spans(length, 3, rate, rng)) for _ in range(draws)], rate * length)


def assert_mean(values: list[float], expected: float) -> None:
    mean = sum(values) / len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) / len(values))
    assert abs(mean - expected) <= 4.5 * error + 1e-9, (mean, expected)


def test_every_arrangement_of_holes_is_equally_likely():
    """Two holes of one unit in a line of 8: 21 arrangements, binomial counts within 5 sigma of each: a false
    alarm once in 80,000 choices of the seed."""
    rng, draws = random.Random(1), 6000
    counts = Counter(tuple(spans(8, 1, 0.25, rng)) for _ in range(draws))
    assert len(counts) == 21
    sigma = math.sqrt(draws * (1 / 21) * (20 / 21))
    assert all(abs(count - draws / 21) < 5 * sigma for count in counts.values())


@given(st.integers(1, 40), st.floats(1, 64), st.floats(0, 1), st.integers(0, 2**32))
def test_holes_lie_apart_within_the_line(length, mean, rate, seed):
    line = spans(length, mean, rate, random.Random(seed))
    edges = [edge for hole in line for edge in hole]
    assert edges == sorted(set(edges)), "ascending, not empty, never touching"
    assert not edges or (edges[0] >= 0 and edges[-1] <= length)


def test_documents_are_hidden_at_the_denoisers_rate_in_both_modalities():
    """Within 4.5 standard errors, as above; pictures of 4 rows hide whole rows, texts tokens."""
    codec, rng = CODECS["raster"], random.Random(2)
    whole = codec.build([Text("a small blue square left of a red circle"), picture(codec, rng)])
    text, rows = runs_of(codec, whole)
    assert (len(rows), rows[0][1] - rows[0][0]) == (4, 6)
    hidden = torch.stack([Denoiser("mode_x", 8, 0.5).hide(codec, whole, rng) for _ in range(1500)]).float()
    for run in (text, rows):
        assert_mean(hidden[:, run[0][0] : run[-1][1]].mean(1).tolist(), 0.5)


def test_the_tail_belongs_to_the_last_segment():
    codec, rng = CODECS["raster"], random.Random(3)
    for document, last in (
        ([Text("a red circle"), picture(codec, rng)], 1),
        ([picture(codec, rng), Text("a b")], 1),
    ):
        whole = codec.build(document)
        units = runs_of(codec, whole)[last]
        for _ in range(20):
            (hole,) = holes_of(Denoiser("mode_s", None, 0.25).hide(codec, whole, rng))
            assert hole[1] == units[-1][1]
            assert hole[0] in [start for start, _ in units]


def test_a_hole_in_a_picture_is_a_rectangle_or_all_but_one():
    rng, layout, outside = random.Random(4), CodeLayout((8,), grid=(5, 7)), 0
    for _ in range(400):
        missing = draw_hole(layout, rng).view(5, 7)
        assert missing.any()
        box = [edge for axis in (1, 0) for edge in _range(missing.any(axis))]
        filled = missing[box[0] : box[1], box[2] : box[3]]
        if not filled.all():
            box = [edge for axis in (1, 0) for edge in _range((~missing).any(axis))]
            assert not missing[box[0] : box[1], box[2] : box[3]].any()
            outside += 1
    assert 40 < outside < 140
    line = draw_hole(CodeLayout((8,), length=9), rng)
    assert line.shape == (9,)


def _range(flags: torch.Tensor) -> tuple[int, int]:
    places = flags.nonzero()[:, 0]
    return int(places[0]), int(places[-1]) + 1


@pytest.mark.parametrize(
    "name", ["raster", "row_end", "parallel", "interleaved", "line", "flexible", "scales"]
)
def test_exactly_the_missing_codes_are_targets(name):
    codec, rng = CODECS[name], random.Random(5)
    layout = codec.layouts["image"]
    image = picture(codec, rng)
    whole = codec.build([Text("a red circle"), image])
    used = layout.positions if image.codes.lengths is None else int(image.codes.lengths)
    missing = torch.rand(layout.positions, generator=torch.Generator().manual_seed(6)) < 0.5
    missing[0] = True
    corrupted = with_holes(codec, whole, hide_codes(codec, whole, missing))
    assert torch.equal(without_holes(codec, corrupted.ids), whole.ids)
    each = layout.k if layout.pattern == "interleaved" else 1
    targets = [place for group in groups(codec, corrupted) for place in group]
    assert len(targets) == int(missing[:used].sum()) * each
    wanted = [layout.coordinates(p * each) for p in range(used) if missing[p] for _ in range(each)]
    assert (corrupted.positions[targets, 1:] - 1).tolist() == [list(place) for place in wanted]


def test_documents_of_the_mixture_have_holes_and_others_are_as_before():
    codec = CODECS["raster"]
    codes = [CodeExample("0", ("a red circle", "a blue square"), torch.arange(24)[:, None] % 32)]
    special = codec.vocabulary.special

    def draw(mixture: Mixture, count: int = 60):
        dataset = DocumentDataset(codes, codec, mixture, drop=0.5)
        return [dataset[Draw(0, counter)] for counter in range(count)]

    plain, with_zero = draw(Mixture(1, 1)), draw(Mixture(1, 1, 0, 0, 0, 0))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(plain, with_zero))
    assert not any(special["sep"] in s.ids for s in plain)
    for sequence in draw(Mixture(0, 0, denoise=1)):
        assert special["sep"] in sequence.ids
        assert special["uncond"] not in sequence.ids
        codec.parse(without_holes(codec, sequence.ids))
    dropped = 0
    for sequence in draw(Mixture(0, 0, infill=1)):
        assert sequence.ids[1] == special["mode_x"]
        sep = sequence.ids.tolist().index(special["sep"])
        text = codec.vocabulary.mask("text")[sequence.ids]
        assert not text[sep:].any(), "captions are given"
        unconditional = bool(sequence.ids[2] == special["uncond"])
        assert unconditional != bool(text.any())
        dropped += unconditional
    assert 15 < dropped < 45
    alone = DocumentDataset(None, codec, Mixture(0, 0, denoise=1), text=[example("some plain text")])
    assert special["sep"] in alone[Draw(0, 0)].ids


def example(text: str):
    from lexel.data.example import Example

    return Example("x", (text,), None)


def test_impossible_requests_are_refused():
    codec, rng = CODECS["raster"], random.Random(7)
    whole = codec.build([Text("a"), picture(codec, rng)])
    with pytest.raises(ValueError, match="nothing is hidden"):
        with_holes(codec, whole, torch.zeros(len(whole), dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bool \[24\]"):
        hide_codes(codec, whole, torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="no picture"):
        hide_codes(codec, codec.build([Text("a")]), torch.ones(24, dtype=torch.bool))
    delayed = CODECS["delayed"]
    with pytest.raises(ValueError, match="delayed"):
        hide_codes(delayed, delayed.build([picture(delayed, rng)]), torch.ones(24, dtype=torch.bool))
    with pytest.raises(ValueError, match="no <sep>"):
        without_holes(codec, whole.ids)
    corrupted = denoise(codec, whole, rng).ids
    last = [i for i, token in enumerate(corrupted.tolist()) if token == codec.vocabulary.special["span_0"]][
        -1
    ]
    with pytest.raises(ValueError, match="follow <sep> to fill them"):
        without_holes(codec, torch.cat([corrupted[:last], corrupted[last + 1 :]]))
    bare = codec_of("raster", roles=())
    with pytest.raises(ValueError, match=r"mixture\.infill"):
        denoise(bare, bare.build([Text("a red circle")]), rng)


def test_the_vocabulary_gets_the_roles_when_the_mixture_asks(tmp_path):
    from lexel.train.codec import build_codec, check_length
    from lexel.train.settings import LMStage

    layout = CodeLayout((32,), grid=(4, 6))
    plain = build_codec(LMStage(text_vocabulary=280), ["a red circle"] * 3, layout)
    assert "sep" not in plain.vocabulary.special
    stage = LMStage(text_vocabulary=280, mixture={"text_to_image": 1.0, "infill": 0.5})
    holes = build_codec(stage, ["a red circle"] * 3, layout)
    assert set(ROLES) < set(holes.vocabulary.special)
    check_length(plain, ["a red circle"], 40)
    with pytest.raises(LexelError, match=r"raise lm\.max_length"):
        check_length(holes, ["a red circle"], 40)
    check_length(holes, ["a red circle"], 60)


def test_a_stage_that_was_recorded_without_holes_is_still_finished(tmp_path):
    from lexel.train.record import Options, StageRecord, field_defaults, plain
    from lexel.train.settings import LMStage, weight_settings

    def record(**mixture: float) -> StageRecord:
        stage = LMStage()
        stage.mixture |= mixture
        options = Options(plain(weight_settings(stage)), field_defaults(LMStage))
        return StageRecord("lm", tmp_path, {"stage": options})

    now = record()
    before = plain(weight_settings(LMStage()))
    before["mixture"] = {k: v for k, v in before["mixture"].items() if k not in ("denoise", "infill")}
    old = StageRecord("lm", tmp_path, {"stage": before})
    old.begin()
    old.finish()
    assert now.finished() is not None
    assert record(infill=0.5).finished() is None
    assert record(infill=0.5).reason() == "stage.mixture.infill: 0.0 → 0.5"


def test_a_trained_model_gets_the_roles_and_keeps_what_it_knows(tiny_bundle):
    from lexel.train.start import start_of

    before = start_of(str(tiny_bundle))
    after = start_of(str(tiny_bundle)).with_roles(ROLES)
    known = before.codec.vocabulary.size
    assert after.codec.vocabulary.size == known + len(ROLES) == after.lm.config.vocab_size
    old, new = (start.lm.model.embed_tokens.weight for start in (before, after))
    assert torch.equal(new[:known], old[:known])
    whole = before.codec.build([Text("a red circle")])
    assert torch.equal(whole.ids, after.codec.build([Text("a red circle")]).ids)
    assert len(denoise(after.codec, whole, random.Random(0))) > len(whole)
    assert after.with_roles(ROLES) is after
