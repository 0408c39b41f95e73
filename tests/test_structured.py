"""Codecs of structured values: error bounds, bins, 4M's text, and that every sampled sequence is one."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lexel.document import DocumentCodec, Grammar, Image
from lexel.tokenizers.structured import (
    FIELDS,
    STRUCTURED,
    Box,
    BoxCodec,
    LayersCodec,
    MetadataCodec,
    PaletteCodec,
    StructuredCodec,
    caption_metadata,
    palette_of,
    picture_metadata,
)
from lexel.vocabulary import Vocabulary

CLASSES = ("cat", "traffic light", "dog")
CODECS: tuple[StructuredCodec, ...] = (
    BoxCodec(CLASSES, bins=32, most=3),
    PaletteCodec(),
    MetadataCodec(),
    LayersCodec(CLASSES, most=4),
)
UNIT = st.floats(0, 1)
BOXES = st.lists(st.builds(Box, UNIT, UNIT, UNIT, UNIT, st.sampled_from(CLASSES)), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(BOXES, st.sampled_from([2, 10, 64, 1000]))
def test_boxes_come_back_within_half_a_bin(boxes: list[Box], bins: int) -> None:
    codec = BoxCodec(CLASSES, bins)
    found = codec.decode(codec.encode([boxes]))[0]
    expected = sorted(boxes, key=lambda box: sum(round(c * (bins - 1)) ** 2 for c in box[:2]))
    assert [box.name for box in found] == [box.name for box in expected]
    errors = [abs(a - b) for one, other in zip(found, expected) for a, b in zip(one[:4], other[:4])]
    assert max(errors) <= 1 / (2 * (bins - 1)) + 1e-12
    assert codec.decode(codec.encode([found]))[0] == found
    assert codec.from_string(codec.to_string(boxes)) == found


def test_boxes_are_written_as_in_4m() -> None:
    boxes = [Box(0.5, 0.5, 1.2, 0.75, "traffic light"), Box(0.0, 0.1, 0.25, -0.3, "cat")]
    expected = "v0=0 v1=100 v2=250 v3=0 cat v0=500 v1=500 v2=999 v3=749 traffic light"
    assert BoxCodec(CLASSES).to_string(boxes) == expected
    assert BoxCodec(CLASSES).layout.codebook_sizes == (1000, 1000, 1000, 1000, 3)


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=7))
def test_a_palette_of_whole_numbers_comes_back(colors: list[tuple[int, int, int]]) -> None:
    codec = PaletteCodec()
    assert codec.decode(codec.encode([colors]))[0] == colors
    assert codec.from_string(codec.to_string(colors)) == colors
    assert codec.to_string(colors).startswith(f"v1={len(colors)} v0={colors[0][0]}")


def _reference_bin(name: str, x: float) -> int:
    """4M's rule, written again from its description."""
    ranges = {
        "colorfulness": (0, 150),
        "brightness": (0, 255),
        "contrast": (0, 127),
        "saturation": (0, 255),
        "entropy": (0, 10),
        "walkability": (0, 1),
        "objectness": (0, 1),
        "geometric_complexity": (0, 0.75),
        "occlusion_score": (0, 0.25),
    }
    if name in ranges:
        low, high = ranges[name]
        return int((max(low, min(x, high)) - low) / (high - low) * 49)
    if name == "watermark_score":
        return int(x >= 0.5)
    if name == "aesthetic_score":
        return int(x >= 4.5) + int(x >= 5.5)
    return max(0, min(int(x) // 32 if "original" in name else int(x), 999))


@given(st.sampled_from(sorted(FIELDS)), st.floats(-50, 40000))
def test_metadata_bins_are_those_of_the_table(name: str, x: float) -> None:
    bin = FIELDS[name].bin(x)
    assert bin == _reference_bin(name, x)
    assert FIELDS[name].bin(FIELDS[name].value(bin)) == bin


def test_metadata_fields_have_4ms_ids_and_text() -> None:
    codec = MetadataCodec()
    assert list(FIELDS)[9:14] == ["colorfulness", "brightness", "contrast", "saturation", "entropy"]
    assert len(FIELDS) == 21
    assert codec.codebook_sizes == (21, 1000)
    values = [("n_coco_instances", 3), ("brightness", 255.0), ("aesthetic_score", 5.0)]
    text = codec.to_string(values)
    assert text == "v1=7 v0=3 v1=10 v0=49 v1=20 v0=1"
    assert codec.to_string(codec.from_string(text)) == text
    assert codec.item_codes(codec.decode(codec.encode([values]))[0]) == codec.item_codes(values)


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match="no class 'bird'"):
        BoxCodec(CLASSES).encode([[Box(0, 0, 1, 1, "bird")]])
    with pytest.raises(ValueError, match="1 to 7 items, got 8"):
        PaletteCodec().encode([[(0, 0, 0)] * 8])
    with pytest.raises(ValueError, match="1 to 16 items, got 0"):
        BoxCodec(CLASSES).encode([[]])
    with pytest.raises(ValueError, match="no metadata field 'mood'"):
        MetadataCodec().encode([[("mood", 1)]])
    with pytest.raises(ValueError, match="at least 2 bins"):
        BoxCodec(CLASSES, bins=1)
    for codec in (BoxCodec(CLASSES), PaletteCodec(), MetadataCodec()):
        for text in ("v7=1", "", "v0=1 v1=2"):
            with pytest.raises(ValueError, match="is not text of this kind"):
                codec.from_string(text)
    with pytest.raises(ValueError, match="holds 1 colours"):
        PaletteCodec().from_string("v1=2 v0=1 v0=2 v0=3")
    with pytest.raises(ValueError, match="0 to 20, got 21"):
        MetadataCodec().from_string("v1=21 v0=0")


def test_fingerprints_tell_codecs_apart() -> None:
    prints = {codec.fingerprint() for codec in (*CODECS, BoxCodec(CLASSES, 33, 3), LayersCodec(CLASSES, 3))}
    assert len(prints) == len(CODECS) + 2
    assert PaletteCodec().fingerprint() == PaletteCodec().fingerprint()
    assert {codec.kind for codec in CODECS} == set(STRUCTURED)


class _Letters:
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 97 for letter in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in token_ids)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.kind)
def test_whatever_the_grammar_lets_through_decodes(codec: StructuredCodec) -> None:
    vocabulary = Vocabulary.build(26, {codec.kind: codec.codebook_sizes})
    documents = DocumentCodec(vocabulary, _Letters(), {codec.kind: codec.layout})
    rng = random.Random(0)
    lengths = set()
    for _ in range(20):
        grammar = Grammar(documents, (codec.kind,))
        prompt = documents.prompt([Image.blank(codec.kind)])
        state, ids = grammar.start(prompt), prompt.ids.tolist()
        while not grammar.done(state):
            options = grammar.allowed(state).nonzero()[:, 0].tolist()
            end = vocabulary.end(codec.kind)
            token = end if end in options and rng.random() < 0.4 else rng.choice(options)
            state, ids = grammar.advance(state, token), [*ids, token]
        (segment,) = documents.parse(torch.tensor(ids))
        assert isinstance(segment, Image)
        assert segment.codes is not None
        (values,) = codec.decode(segment.codes)
        lengths.add(len(values))
        assert 1 <= len(values) <= codec.length
        if codec.kind in ("palette", "layers"):  # their values are written as they come
            assert torch.equal(codec.encode([values]).indices, segment.codes.indices)
    assert len(lengths) > 1


def test_a_batch_is_its_rows() -> None:
    codec = LayersCodec(CLASSES, most=4)
    rows = [["dog"], ["cat", "dog", "cat"]]
    codes = codec.encode(rows)
    assert codes.indices.shape == (2, 4, 1)
    assert codec.decode(codes) == rows
    assert codec.decode(codes[1:]) == rows[1:]


def _flat(*colors: tuple[int, int, int]) -> torch.Tensor:
    """A picture of equal vertical stripes, but the first stripe one column wider for each after it."""
    widths = [8 - number for number in range(len(colors))]
    stripes = [torch.tensor(c).view(3, 1, 1).expand(3, 4, w) for c, w in zip(colors, widths)]
    return torch.cat(stripes, 2) / 127.5 - 1


def test_the_palette_of_flat_colours_is_those_colours() -> None:
    colors = [(250, 240, 10), (0, 128, 255), (7, 9, 200)]
    assert palette_of(_flat(*colors), 3) == colors
    assert palette_of(_flat(*colors), 7) == colors, "there are no more than three"
    assert len(palette_of(_flat(*colors), 2)) == 2
    with pytest.raises(ValueError, match="1 to 7 colours, got 8"):
        palette_of(_flat(*colors), 8)


def test_metadata_of_known_pictures() -> None:
    grey = picture_metadata(torch.zeros(3, 4, 8))
    assert grey["brightness"] == pytest.approx(127.5)
    assert grey["original_width"] == 8
    assert grey["contrast"] == grey["entropy"] == 0
    assert grey["saturation"] == grey["colorfulness"] == pytest.approx(0, abs=1e-9)
    red = picture_metadata(_flat((255, 0, 0)))
    assert red["saturation"] == 255
    assert red["brightness"] == pytest.approx(0.299 * 255)
    # rg = 255, yb = 127.5 everywhere.
    assert red["colorfulness"] == pytest.approx(0.3 * (255**2 + 127.5**2) ** 0.5)
    halves = picture_metadata(torch.cat([-torch.ones(3, 4, 4), torch.ones(3, 4, 4)], 2))
    assert halves["entropy"] == 1
    assert halves["contrast"] == pytest.approx(127.5)
    assert caption_metadata("A cat. Two dogs!") == {
        "caption_n_chars": 16,
        "caption_n_words": 4,
        "caption_n_sentences": 2,
    }
