"""`lexel analyze`: every kind of codes, text of the same length, the page and the command."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lexel.cli import main
from lexel.data.example import stack_pixels
from lexel.data.shapes import ShapesConfig
from lexel.data.tokenized import write_codes
from lexel.errors import LexelError
from lexel.evaluate.analysis import (
    Corpus,
    analyze,
    code_streams,
    collect,
    pieces,
    scene_cells,
    text_streams,
    without_nan,
    words_of,
)
from lexel.evaluate.analysis_page import render_analysis, summary
from lexel.evaluate.html import curves
from lexel.sample.bundle import load_tokenizer_of
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes

EXAMPLES = [ShapesConfig(size=32).build("train")[i] for i in range(24)]


class Brightness:
    """A tokenizer of known codes: 4 x 4 cells of 8 pixels, their mean brightness in 16 steps."""

    layout = CodeLayout((16,), grid=(4, 4))

    def to(self, device: object) -> Brightness:
        return self

    def eval(self) -> Brightness:
        return self

    def encode(self, pixels: Tensor) -> Codes:
        cells = torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 8).flatten(1)
        return Codes(((cells + 1) * 7.99).long()[..., None], (4, 4))


def _corpus(layout: CodeLayout, seed: int = 0, pictures: int = 24) -> Corpus:
    random = np.random.default_rng(seed)
    sizes = layout.codebook_sizes
    indices = np.stack([random.integers(0, size, (pictures, layout.positions)) for size in sizes], -1)
    lengths = random.integers(2, layout.positions + 1, (pictures, 1)) if layout.flexible else layout.positions
    used = np.arange(layout.positions) < np.broadcast_to(lengths, (pictures, 1))
    captions = tuple(example.captions[0] for example in EXAMPLES[:pictures])
    return Corpus(indices, used, layout, captions)


def _finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize(
    "layout",
    [
        CodeLayout((64,), grid=(4, 4)),
        CodeLayout((64,), length=12),
        CodeLayout((64,), length=12, flexible=True),
        CodeLayout((32,), scales=((1, 1), (2, 2), (3, 3))),
        CodeLayout((2**40, 2**30), grid=(3, 5)),
    ],
    ids=["grid", "1d", "flexible", "scales", "huge codebooks"],
)
def test_every_layout_is_analyzed(layout: CodeLayout):
    report = analyze(_corpus(layout))
    several = len(layout.codebook_sizes) > 1
    names = list(report["streams"])
    assert names[0] == ("all codebooks" if several else "codes")
    assert ("codebook 2" in names) == several
    codes = report["streams"][names[0]]
    assert codes["health"]["used"] + codes["health"]["dead"] == math.prod(layout.codebook_sizes)
    assert ("rows" in codes["entropy"]["along"]) == (layout.length is None)
    assert next(iter(codes["ngrams"])) == ("row" if layout.length is None else "sequence")
    assert len(codes["entropy"]["bits_by_position"]) == layout.positions
    assert _finite(without_nan(report))
    page = render_analysis(report, "a <title>")
    assert "a &lt;title&gt;" in page
    assert summary(report).startswith("24 pictures")


def test_known_codes_have_known_figures():
    corpus = collect(Brightness(), EXAMPLES, batch_size=10)  # type: ignore[arg-type]
    report = analyze(corpus)
    codes = report["streams"]["codes"]
    wanted = Brightness().encode(stack_pixels(EXAMPLES)).indices.flatten()
    p = torch.bincount(wanted).double() / len(wanted)
    assert codes["entropy"]["bits"] == pytest.approx(float(-(p[p > 0] * p[p > 0].log2()).sum()))
    assert codes["tokens"] == 24 * 16
    assert codes["vocabulary"] == 16
    assert report["granularity"]["shape"]["labels"] > 3
    assert report["granularity"]["object"]["nmi"] > report["granularity"]["object"]["by_chance"]["nmi"]
    assert report["words"]["cramers_v"] > 0.2
    assert report["alignment"]["pairs"] == 24


def test_the_cells_of_a_scene_show_its_objects():
    cells = scene_cells(EXAMPLES, CodeLayout((2,), scales=((1, 1), (8, 8))))
    assert set(cells) == {"object", "color", "shape", "part"}
    for row, example in enumerate(EXAMPLES):
        found = set(cells["object"][row, 1:]) - {0}
        assert len(found) == len({(x.color, x.shape) for x in example.truth.objects}), "each object has cells"  # type: ignore[union-attr]
    assert len(np.unique(cells["part"])) > len(np.unique(cells["object"])) > len(np.unique(cells["shape"]))
    assert not scene_cells(EXAMPLES, CodeLayout((2,), length=4)), "1D codes have no cells"


def test_text_is_compared_at_equal_length():
    corpus = _corpus(CodeLayout((600,), grid=(4, 4)))
    text = "the cat sat on the mat, and the dog lay on the rug. " * 200
    report = analyze(corpus, text)
    assert report["compared_with"] == "the text"
    assert set(report["equal_length"]) == {"words", "BPE"}
    for row in report["equal_length"].values():
        assert row["tokens"] == 24 * 16, "the longer text is cut"
    words = report["equal_length"]["words"]
    assert words["text"]["huffman_gain"] > words["codes"]["huffman_gain"] - 0.1
    assert words["text"]["bits"] < words["codes"]["bits"]
    short = analyze(corpus, "a short text of ten words is all there is")
    assert short["equal_length"]["words"]["tokens"] == 10
    assert short["equal_length"]["words"]["codes"]["items"] == 1
    with pytest.raises(LexelError, match="holds no words"):
        analyze(corpus, "  ")


def test_words():
    assert words_of("Don't stop: 3 red circles.") == ["don't", "stop", ":", "3", "red", "circles", "."]
    assert "".join(pieces("a b c d e", 2)).replace(" ", "") == "abcde"
    assert text_streams(["a b", "b"], 100).keys() == {"words"}, "too few ids for a BPE"
    assert text_streams([""], 600) == {}


def test_pictures_without_captions():
    corpus = _corpus(CodeLayout((64,), grid=(4, 4)))
    report = analyze(Corpus(corpus.indices, corpus.used, corpus.layout, ("",) * 24))
    assert report["equal_length"] == {}
    assert "alignment" not in report
    assert "<h2>Curves" in render_analysis(report, "")
    with pytest.raises(LexelError, match="at least 8 pictures, got 3"):
        collect(Brightness(), EXAMPLES[:3])  # type: ignore[arg-type]


def test_dropped_positions_do_not_count():
    corpus = _corpus(CodeLayout((64,), grid=(4, 4)))
    used = np.random.default_rng(1).random(corpus.used.shape) < 0.5
    tokens, _ = code_streams(Corpus(corpus.indices, used, corpus.layout, corpus.captions))["codes"]
    assert tokens.tokens == used.sum()
    report = analyze(Corpus(corpus.indices, used, corpus.layout, corpus.captions))
    assert report["streams"]["codes"]["tokens"] == used.sum()


def test_logarithmic_axes():
    drawn = curves("counts", {"a": [(1, 1000), (100, 10), (10, 0)]}, log=True)
    assert ">1,000<" in drawn
    assert ">100<" in drawn
    assert drawn.count(",") >= 2
    points = drawn.split('points="')[1].split('"')[0].split()
    assert len(points) == 2, "what is not positive is left out"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline"):
            assert self.open.pop() == tag


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("It was the best of times, it was the worst of times. " * 400)
    command = ["analyze", "shipped", "shapes", "--count", "16", "--device", "cpu"]
    assert main([*command, "--json", "a.json", "--out", "a.html"]) == 0
    assert "16 pictures, 1024 tokens (codes), vocabulary 512" in capsys.readouterr().out
    report = json.loads(Path("a.json").read_text())
    assert _finite(report)
    assert report["compared_with"] == "the captions"
    parser = _Tags()
    parser.feed(Path("a.html").read_text())
    assert parser.open == []
    assert "http" not in Path("a.html").read_text(), "nothing outside the page"

    write_codes(load_tokenizer_of(None), ShapesConfig(count=16).build("train"), "codes")
    command[2] = "codes"
    assert main([*command, "--text", "book.txt", "--json", "-"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["pictures"] == 16
    assert written["compared_with"] == "the text"
    assert Path("analysis.html").is_file()

    assert main(["analyze", "shipped", "nowhere"]) == 2
    assert "data folder nowhere does not exist" in capsys.readouterr().err
