"""Metrics against closed forms, the evaluation's keys and laws, and the pages it leaves behind."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image as PictureFile

from lexel.data.folder import FolderConfig
from lexel.data.images import to_image
from lexel.data.shapes import ShapesConfig
from lexel.errors import LexelError
from lexel.evaluate.card import figures, figures_table, model_card
from lexel.evaluate.evaluate import evaluate_bundle
from lexel.evaluate.html import curves, thin
from lexel.evaluate.metrics import CodebookUsage, psnr
from lexel.evaluate.report import read_curves, samples_grid, stage_curves, write_report
from lexel.types import Codes


class TestMetrics:
    def test_psnr_of_a_constant_error(self):
        black, grey = -torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
        assert psnr(black, grey).tolist() == pytest.approx([20 * math.log10(2)] * 2)

    def test_psnr_clips_and_caps(self):
        white = torch.ones(1, 3, 4, 4)
        assert psnr(white * 3, white).item() == pytest.approx(100.0)

    def test_psnr_refuses_other_shapes(self):
        with pytest.raises(ValueError, match="one shape"):
            psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 5, 4))

    def test_usage_and_perplexity(self):
        usage = CodebookUsage((8, 4))
        # Codebook 0 uses 4 of 8 equally often, codebook 1 one of 4.
        first = torch.arange(8) % 4
        usage.update(Codes(torch.stack([first, torch.zeros(8, dtype=torch.long)], dim=1)[None]))
        assert usage.usage == pytest.approx((4 / 8 + 1 / 4) / 2)
        assert usage.perplexity == pytest.approx((4 + 1) / 2)

    def test_codes_beyond_the_length_do_not_count(self):
        usage = CodebookUsage((4,))
        usage.update(Codes(torch.tensor([[[0], [1], [2]]]), lengths=torch.tensor([2])))
        assert usage.counts[0].tolist() == [1, 1, 0, 0]


@pytest.fixture(scope="module")
def report(tiny_pipeline):
    return evaluate_bundle(tiny_pipeline, ShapesConfig(count=64), count=4, batch_size=3)


def _numbers(report: dict) -> dict:
    """What must not depend on the clock."""
    clocked = ("seconds", "peak_memory_mb", "speculative")
    kept = {key: value for key, value in report.items() if key not in clocked}
    return {**kept, "text_to_image": {**kept["text_to_image"], "pictures_per_second": 0}}


class TestEvaluation:
    def test_every_promised_key_is_there_with_its_chance_level(self, report):
        accuracies = {
            "tokenizer": ["accuracy_one_object", "accuracy_two_objects"],
            "text_to_image": ["accuracy_one_object", "accuracy_two_objects", "accuracy_unseen_pairs"],
            "image_to_text": ["exact_one_object", "exact_two_objects"],
            "detokenizer": ["accuracy_one_object"],
        }
        for group, names in accuracies.items():
            for name in names:
                assert 0 <= report[group][name] <= 1
                assert 0 < report[group][f"chance_{name.split('_', 1)[1]}"] < 0.1
        assert {"psnr", "codebook_usage"} <= report["tokenizer"].keys()
        assert "psnr" in report["detokenizer"]
        assert set(report["speculative"]) == {"nested", "jacobi", "drafter"}
        for drafter in report["speculative"].values():
            assert drafter["mean_accepted"] >= 1
            assert drafter["speedup"] > 0
        assert report["peak_memory_mb"] > 50
        assert all(seconds > 0 for seconds in report["seconds"].values())
        json.dumps(report)

    def test_same_seed_same_figures(self, report, tiny_pipeline):
        again = evaluate_bundle(tiny_pipeline, ShapesConfig(count=64), count=4, batch_size=3)
        assert _numbers(again) == _numbers(report)

    def test_a_perfect_tokenizer_is_scored_perfect(self, tiny_pipeline, monkeypatch):
        """With the codes' pictures replaced by the originals, the checker must find every claim."""
        data = ShapesConfig(count=64, textured=0.0)
        originals = [e.pixels for kind in ("one", "two") for e in data.scenes(kind, 6, 0)]

        def encode(pixels, length=None):
            number = [next(i for i, o in enumerate(originals) if torch.equal(o, p)) for p in pixels]
            # The number of the picture, written in base 16 into the first code (there are 12).
            indices = torch.zeros(len(number), 16, 1, dtype=torch.long)
            indices[:, 0, 0] = torch.tensor(number)
            return Codes(indices, grid=(4, 4))

        def decode(codes, **_):
            return torch.stack([originals[int(i) % 12] for i in codes.indices[:, 0, 0]])

        monkeypatch.setattr(tiny_pipeline, "encode", encode)
        monkeypatch.setattr(tiny_pipeline, "decode", decode)
        report = evaluate_bundle(tiny_pipeline, data, count=6, batch_size=4)
        assert report["tokenizer"]["accuracy_one_object"] == 1.0
        assert report["tokenizer"]["accuracy_two_objects"] >= 5 / 6
        assert report["tokenizer"]["psnr"] == pytest.approx(100.0)

    def test_nll_is_the_models_cross_entropy(self, report, tiny_pipeline):
        """A random model's loss per code is near that of a uniform guess over the vocabulary."""
        uniform = math.log(tiny_pipeline.codec.vocabulary.size)
        assert report["nll"]["image"] == pytest.approx(uniform, rel=0.15)
        assert report["nll"]["text"] == pytest.approx(uniform, rel=0.15)

    def test_another_picture_size_is_refused(self, tiny_pipeline):
        with pytest.raises(LexelError, match=r"64x64.*32x32"):
            evaluate_bundle(tiny_pipeline, ShapesConfig(size=64), count=2)

    def test_a_folder_has_no_checker(self, tiny_pipeline, folder_data):
        report = evaluate_bundle(tiny_pipeline, folder_data, count=3)
        assert "text_to_image" not in report
        assert {"tokenizer", "detokenizer", "nll", "speculative"} <= report.keys()


@pytest.fixture(scope="module")
def folder_data(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(6):
        to_image(torch.rand(3, 32, 32, generator=generator) * 2 - 1).save(root / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"picture & <{number}>"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return FolderConfig(root=str(root), size=32, validation_share=0.5)


class TestCard:
    def test_accuracies_stand_beside_their_chance(self):
        report = {
            "text_to_image": {"accuracy_one_object": 0.9512, "chance_one_object": 0.01},
            "tokenizer": {"psnr": 27.123, "codebook_usage": 0.5},
            "speculative": {"nested": {"speedup": 1.5}},
        }
        rows = {row.name: (row.value, row.chance) for row in figures(report)}
        assert rows == {
            "text_to_image.accuracy_one_object": ("95.1%", "1.0%"),
            "tokenizer.psnr": ("27.1 dB", ""),
            "tokenizer.codebook_usage": ("50.0%", ""),
            "speculative.nested.speedup": ("1.50×", ""),
        }
        assert "chance 1.0%" in figures_table(report)

    def test_model_card_tells_what_is_inside(self, tiny_pipeline, report):
        card = model_card(tiny_pipeline, report, "Two minutes on two cores.")
        assert card.startswith("---\nlibrary_name: lexel\n")
        for expected in ("4x4 raster", "Two minutes", "`tokenizer.psnr`", "drafter", "32x32"):
            assert expected in card


class _Page(HTMLParser):
    """Collects tags and everything a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br", "line", "polyline"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_pipeline, report):
    folder = tmp_path_factory.mktemp("run")
    (folder / "lm").mkdir()
    rows = ["step,train/loss,validation/loss"]
    rows += [f"{step},{5 - step / 100},{'4.5' if step % 50 == 0 else ''}" for step in range(200)]
    (folder / "lm" / "metrics.csv").write_text("\n".join(rows) + "\n")
    write_report(folder, tiny_pipeline, ShapesConfig(count=64), report, title="a <tiny> run")
    return folder


class TestPages:
    def test_the_page_is_whole_and_fetches_nothing(self, run_folder: Path):
        parser = _Page()
        source = (run_folder / "index.html").read_text()
        parser.feed(source)
        assert parser.open == []
        assert parser.sources
        assert all(link.startswith("data:image/png;base64,") for link in parser.sources)
        for expected in ("a <tiny> run", "lm: loss", "tokenizer.psnr", "chance", "detokenizer"):
            assert expected in parser.text
        assert "url(" not in source

    def test_the_report_file_is_the_report(self, run_folder: Path, report):
        assert json.loads((run_folder / "report.json").read_text()) == report

    def test_the_grid_holds_the_pictures_unchanged(self, run_folder: Path, tiny_pipeline):
        from lexel.evaluate.report import show

        drawn = show(tiny_pipeline, ShapesConfig(count=64)).drawn
        with PictureFile.open(run_folder / "samples.png") as file:
            grid = file.convert("RGB")
        tile = to_image(drawn[0].pictures[1]).resize((128, 128), PictureFile.Resampling.NEAREST)
        left, top = 8 + 136, 8 + 22
        assert grid.crop((left, top, left + 128, top + 128)).tobytes() == tile.tobytes()
        assert samples_grid([]) is None
        long = replace(drawn[0], prompt="a very long prompt " * 20)
        assert samples_grid([long]).size[0] == grid.size[0]

    def test_captions_are_escaped(self, tmp_path: Path, tiny_pipeline, folder_data):
        write_report(tmp_path, tiny_pipeline, folder_data, {"count": 1})
        source = (tmp_path / "index.html").read_text()
        assert "picture &amp; &lt;" in source
        assert "picture & <" not in source

    def test_curves_keep_train_and_validation_in_one_chart(self, run_folder: Path):
        points = read_curves(run_folder / "lm" / "metrics.csv")
        assert len(points["train/loss"]) == 200
        assert points["validation/loss"] == [(s, 4.5) for s in (0, 50, 100, 150)]
        charts = stage_curves(run_folder)
        assert len(charts) == 1
        assert charts[0].count("<polyline") == 2

    def test_a_chart_is_valid_svg_within_its_box(self):
        chart = curves("x < y", {"a": [(0, 1.0), (10, math.nan), (20, 3.0)], "b": [(0, 2.0)]})
        svg = ElementTree.fromstring(chart[chart.index("<svg") : chart.index("</svg>") + 6])
        for line in svg.iter("polyline"):
            for point in line.get("points").split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= 340
                assert 0 <= y <= 170
        assert curves("empty", {"a": [(0, math.inf)]}) == ""

    def test_thinning_keeps_the_mean_and_the_end(self):
        points = [(float(i), float(i % 2)) for i in range(1000)]
        few = thin(points, 100)
        assert len(few) <= 101
        assert few[-1] == points[-1]
        assert sum(y for _, y in few[:-1]) / len(few[:-1]) == pytest.approx(0.5)
