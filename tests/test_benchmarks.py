"""Every benchmark command runs with --quick, keeps what is finished, and its arithmetic is right."""

from __future__ import annotations

import io
import json
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)


def _json(path: str) -> Any:
    return json.loads(Path(path).read_text())


def _vision_model(folder: str) -> str:
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes, image_size=28)).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def test_rate_quality(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.rate_quality import main

    model = _vision_model("vision")
    command = ["--quick", "--data", "shapes", "--entries", "vq", "bae", "--json", "a.json"]
    command += ["--teacher", model, "--features", model]
    main(command)
    first = _json("a.json")
    assert list(first["entries"]) == ["vq", "bae", "fq-dual-teacher"]
    for row in first["entries"].values():
        assert row["bits_per_picture"] == 64 * 12
        assert 0 < row["usage"] <= 1
        assert 0 <= row["entropy_bits"] <= 12
        assert row["rfid"] > 0
    assert "| BAE" in capsys.readouterr().out
    main(command)
    assert "reused" in capsys.readouterr().out
    assert _json("a.json")["entries"] == first["entries"]


def test_parameters_are_matched() -> None:
    from benchmarks import common, rate_quality

    entries = rate_quality.entries(1024)
    target = common.parameters(rate_quality.config(entries["vq"], 32, 64).build())
    for name in rate_quality.DEFAULT:
        made, count = rate_quality.match(entries[name], 32, 64, target, rate_quality.TOLERANCE)
        assert abs(count / target - 1) <= 0.05
        assert made.decoder_mult == (16,), "the decoder is the same"
    with pytest.raises(ValueError, match="cannot have 1000 parameters"):
        rate_quality.match(entries["ibq"], 32, 16, 1000, 0.05)
    rate_quality.match(entries["ibq"], 32, 16, 1000, inf)


def test_flexible_length() -> None:
    from benchmarks.flexible_length import main

    main(["--quick", "--data", "shapes", "--json", "b.json", "--plot", "b.png"])
    found = _json("b.json")
    assert list(found["entries"]) == ["tail-drop", "nested", "fixed-4", "fixed-2", "fixed-1"]
    assert list(found["entries"]["nested"]["lengths"]) == ["1", "2", "4"]
    assert list(found["entries"]["fixed-2"]["lengths"]) == ["2"]
    assert found["codecs"]["JPEG file"]["6"]["fits"] == 0, "headers alone are longer"
    with Image.open("b.png") as picture:
        assert picture.size == (1000, 620)


def test_nested_dropout_draws_powers_of_two() -> None:
    from benchmarks.flexible_length import LEVELS, NestedDropoutConfig
    from lexel.tokenizers.quantizers import QuantizerConfig

    sizes = {"image_size": 16, "patch": 8, "width": 8, "layers": 1, "heads": 1, "latents": 8}
    quantizer = QuantizerConfig("fsq", levels=LEVELS)
    network = NestedDropoutConfig(**sizes, tail_drop="sample", quantizer=quantizer).build()  # type: ignore[arg-type]
    lengths = network.train()(torch.zeros(64, 3, 16, 16)).codes.lengths
    assert lengths is not None
    assert set(lengths.tolist()) == {1, 2, 4, 8}
    assert network.eval()(torch.zeros(2, 3, 16, 16)).codes.lengths.tolist() == [8, 8]


def test_codecs_keep_to_their_budget() -> None:
    from benchmarks.codecs import at_budgets, best, codings, scan_bytes

    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    choices = codings(picture, "JPEG")
    assert best(choices, 10, bare=False) is None
    chosen = best(choices, 1000, bare=False)
    assert chosen is not None
    assert chosen.file <= 1000
    assert chosen.psnr == max(c.psnr for c in choices if c.file <= 1000)
    assert all(c.bare < c.file for c in choices)
    rows = at_budgets(picture[None], "WEBP", [10, 2000], bare=False)
    assert [row["fits"] for row in rows] == [0, 1]
    assert rows[0]["psnr"] is None
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")
    assert 0 < scan_bytes(stream.getvalue()) < 20, "a grey square is a few bits per block"


def test_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.throughput import main

    main(["--quick", "--json", "c.json"])
    rows = _json("c.json")["rows"]
    assert {(row["pair"], row["task"], row["batch"]) for row in rows} == {
        *((pair, task, batch) for pair in ("janus", "diffusers") for task in ("encode", "decode")
          for batch in (1, 2)),
        ("chameleon", "encode", 1), ("chameleon", "encode", 2),
    }  # fmt: skip
    assert all(row["equal"].startswith("100.0%") and row["ratio"] > 0 for row in rows)
    assert "Lexel / peer" in capsys.readouterr().out


def test_disagreement_is_an_error() -> None:
    import argparse
    from dataclasses import replace

    from benchmarks.throughput import agree, with_diffusers

    options = argparse.Namespace(size=32, device="cpu", seed=0)
    with torch.no_grad():
        ours, theirs = with_diffusers(32, 32)
        wrong = replace(theirs, decode=lambda codes: ours.decode(codes) + 0.1)  # type: ignore[misc]
        with pytest.raises(ValueError, match="draw pictures"):
            agree(ours, wrong, options)
