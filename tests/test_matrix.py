"""The matrix: what its scores count, chance, ceiling, and the pages."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PictureFile

from lexel.data.modalities import CLASSES, render_view, structured_codecs, structured_values
from lexel.data.shapes import ShapesConfig
from lexel.data.text_tokenizer import train_text_tokenizer
from lexel.document import DocumentCodec, Image, Text
from lexel.errors import LexelError
from lexel.evaluate import matrix
from lexel.evaluate.matrix import MEASURES, Matrix, box_overlap, matrix_page, matrix_text, measure_matrix
from lexel.models.causal_lm import CausalLMConfig
from lexel.sample.pipeline import Pipeline
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.structured import Box
from lexel.tokenizers.vq import VQTokenizerConfig
from lexel.types import DecodeStats, GenerationOutput
from lexel.vocabulary import Vocabulary

DATA = ShapesConfig(count=8, max_objects=2, object_weights=(0.0, 1.0), partial=0.0, textured=0.0)
EXAMPLES = [DATA.build("validation")[index] for index in range(4)]


def truth(modality: str, example: Any) -> Any:
    """The right answer."""
    if modality == "text":
        return example.captions[0]
    if modality in ("image", "segmentation", "edges", "depth"):
        return render_view(example.truth, "picture" if modality == "image" else modality, 32)
    return structured_values(modality, example)


@pytest.mark.parametrize("modality", MEASURES)
def test_the_truth_is_right_and_another_scene_is_not(modality: str) -> None:
    measure = MEASURES[modality]
    own = [measure.quality(truth(modality, e), e) for e in EXAMPLES]
    other = [measure.quality(truth(modality, a), b) for a, b in pairwise(EXAMPLES)]
    assert own == pytest.approx([1.0] * 4)
    assert measure.score(own) == pytest.approx(1)
    assert measure.score(other) < (0.6 if modality == "metadata" else 0.4)


def test_boxes_need_class_and_overlap() -> None:
    quality, example = MEASURES["boxes"].quality, EXAMPLES[0]
    first, second = truth("boxes", example)
    wide = first.x1 - first.x0
    near = first._replace(x0=first.x0 + wide / 4, x1=first.x1 + wide / 4)
    far = first._replace(x0=first.x0 + wide / 2, x1=first.x1 + wide / 2)
    assert box_overlap(first, near) == pytest.approx(0.6)
    assert box_overlap(first, far) == pytest.approx(1 / 3)
    assert quality([near, second], example) == 1
    assert quality([far, second], example) == 0.5
    wrong = next(name for name in CLASSES if name not in (first.name, second.name))
    assert quality([first._replace(name=wrong), second], example) == 0.5
    assert quality([first, second, second], example) == pytest.approx(0.8)
    assert quality([first], example) == pytest.approx(2 / 3)
    assert box_overlap(Box(0, 0, 0.1, 0.1, "a"), Box(0.5, 0.5, 1, 1, "a")) == 0


def test_a_shifted_edge_counts_and_a_thick_one_does_not_cheat() -> None:
    quality, example = MEASURES["edges"].quality, EXAMPLES[0]
    true = truth("edges", example)
    assert quality(true.roll(1, 2), example) == pytest.approx(1)
    assert quality(true.roll(5, 2), example) < 0.7
    assert quality(torch.ones_like(true), example) < 0.6
    assert quality(-torch.ones_like(true), example) == 0


def test_colours_may_be_off_by_the_tolerance() -> None:
    quality, example = MEASURES["palette"].quality, EXAMPLES[0]
    colors = truth("palette", example)
    moved = [tuple(min(255, c + 32) for c in color) for color in colors]
    assert quality(moved, example) == 1
    assert quality([tuple((c + 40) % 256 for c in color) for color in colors], example) == 0
    assert quality(colors[:1], example) == pytest.approx(2 / (1 + len(colors)))


def test_metadata_and_layers() -> None:
    example = EXAMPLES[0]
    fields = truth("metadata", example)
    assert MEASURES["metadata"].quality(fields[:3], example) == pytest.approx(3 / len(fields))
    assert MEASURES["metadata"].quality([(fields[0][0], 9), *fields], example) == pytest.approx(
        1 - 1 / len(fields)
    ), "of a field written twice the first counts"
    layers = truth("layers", example)
    assert MEASURES["layers"].quality(layers[::-1], example) == 0


def tiny(modalities: tuple[str, ...] = ("boxes", "depth")) -> Pipeline:
    """An untrained pipeline with the modalities."""
    torch.manual_seed(0)
    quantizer = QuantizerConfig("vq", codebook_size=8)
    config = VQTokenizerConfig(
        image_size=32, channels=8, channel_mult=(1,), stem=16, res_blocks=0, z_channels=8, embed_dim=4,
        attention=False, middle=False, norm_groups=2, encoder="patch", encoder_channels=8,
        quantizer=quantizer,
    )  # fmt: skip
    coders: dict[str, Any] = {"image": config.build().eval(), "depth": config.build().eval()}
    coders |= structured_codecs(16, 2)
    layouts = {name: coders[name].layout for name in ("image", *modalities)}
    vocabulary = Vocabulary.build(256, {name: layout.codebook_sizes for name, layout in layouts.items()})
    codec = DocumentCodec(vocabulary, train_text_tokenizer(["a"], 256), layouts)
    lm = CausalLMConfig(vocabulary.size, dim=8, layers=1, heads=2, max_length=160).build().eval()
    return Pipeline(
        coders["image"],
        lm,
        codec,
        tokenizers={"depth": coders["depth"]} if "depth" in modalities else {},
        structured={name: coders[name] for name in modalities if name in structured_codecs()},
    )


def oracle(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, right: set[str]) -> None:
    """Let the pipeline answer the modalities of `right` with the truth of the scene, others as scene 0 is."""
    keys = {example.captions[0]: number for number, example in enumerate(EXAMPLES)}

    def generate(documents: Any, **_: Any) -> GenerationOutput:
        found = []
        for row, document in enumerate(documents):
            number = keys.get(getattr(document[0], "text", None), row)
            answers = []
            for blank in document[1:]:
                example = EXAMPLES[number if blank.modality in right else 0]
                value = truth(blank.modality, example)
                if blank.modality == "text":
                    answers.append(Text(value))
                elif blank.modality in pipeline.structured:
                    answers.append(pipeline.segment(blank.modality, value))
                else:
                    answers.append(Image(pixels=value, modality=blank.modality))
            found.append([document[0], *answers])
        return GenerationOutput(found, [], [], None, DecodeStats())

    monkeypatch.setattr(pipeline, "generate", generate)


def test_scores_of_an_oracle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe = tiny()
    oracle(pipe, monkeypatch, {"text", "boxes"})
    special = tiny()
    oracle(special, monkeypatch, {"depth"})
    found = measure_matrix(pipe, DATA, count=4, specialists={("boxes", "depth"): special})
    report = found.report
    assert report["count"] == 4
    assert len(report["pairs"]) == 4 * 3
    for name, figures in report["pairs"].items():
        target = name.rpartition("_to_")[2]
        expected = 1.0 if target in ("text", "boxes") else 0.25
        assert figures["score"] == pytest.approx(expected), name
        assert figures["chance"] <= 0.34, name
    assert report["pairs"]["boxes_to_depth"]["specialist"] == 1
    assert report["ceiling"]["boxes"] == report["ceiling"]["text"] == 1
    assert report["chains"] == {"text_to_boxes_to_image": {"score": 0.25, "direct": 0.25}}
    text = matrix_text(report)
    assert "1.00/0.00" in text
    assert len([line for line in text.splitlines() if line.startswith(("text ", "boxes "))]) == 2
    matrix.write_matrix(tmp_path, found, pipe)
    assert json.loads((tmp_path / "matrix.json").read_text()) == report
    shown = (tmp_path / "matrix.html").read_text()
    assert shown.count("<img") >= 3
    with PictureFile.open(tmp_path / "matrix.png") as grid:
        assert grid.width > 3 * 64
        assert len(grid.convert("RGB").getcolors(1 << 20)) > 10
    assert "In steps" in shown
    assert "<script" not in shown


def test_an_untrained_model_is_measured_too() -> None:
    pipe = tiny()
    pairs = [("text", "boxes"), ("boxes", "depth"), ("depth", "text")]
    first = measure_matrix(pipe, DATA, pairs=pairs, count=2)
    again = measure_matrix(pipe, DATA, pairs=pairs, count=2)
    drop = {"seconds"}
    assert {k: v for k, v in first.report.items() if k not in drop} == {
        k: v for k, v in again.report.items() if k not in drop
    }
    assert set(first.report["pairs"]) == {"text_to_boxes", "boxes_to_depth", "depth_to_text"}
    assert "<h2>Examples</h2>" in matrix_page(first, pipe)


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(LexelError, match="set the data's size"):
        measure_matrix(tiny(), replace(DATA, size=64))
    pipe = tiny(())
    pipe.codec.layouts["smell"] = pipe.codec.layouts["image"]
    with pytest.raises(LexelError, match="does not know how to measure smell"):
        measure_matrix(pipe, DATA)
    with pytest.raises(LexelError, match="no modality 'smell'; it has text, image, boxes, depth"):
        measure_matrix(tiny(), DATA, pairs=[("text", "smell")])
    assert Matrix({}, []).written == {}


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lexel.cli import main

    pipe = tiny()
    pipe.scenes = DATA
    pipe.save_pretrained(tmp_path / "bundle")
    command = ["matrix", "--bundle", str(tmp_path / "bundle"), "--count", "2", "--device", "cpu"]
    assert main([*command, "--pairs", "text_to_boxes", "boxes_to_depth", "--out", str(tmp_path)]) == 0
    assert "ceiling" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "matrix.json").read_text())["pairs"]) == {
        "text_to_boxes",
        "boxes_to_depth",
    }
    assert main([*command, "--pairs", "boxes"]) == 2
    assert "written like text_to_image" in capsys.readouterr().err
