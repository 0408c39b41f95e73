"""Every benchmark command runs with --quick, keeps what is finished, and its arithmetic is right."""

from __future__ import annotations

import io
import json
import math
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline
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


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle that knows its scenes and has a head that drafts."""
    from lexel.data.shapes import ShapesConfig
    from lexel.models.eagle import EagleConfig

    pipeline = build_tiny_pipeline()
    config = pipeline.lm.config
    pipeline.drafters["eagle"] = EagleConfig(config.vocab_size, config.dim, config.heads, 64).build().eval()
    pipeline.scenes = ShapesConfig(count=64)
    folder = tmp_path_factory.mktemp("bundles") / "drawing"
    pipeline.save_pretrained(folder)
    return folder


def test_sampling(drawing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.sampling import main
    from lexel.sample.pipeline import Pipeline

    main(
        [
            "--quick",
            "--bundle",
            str(drawing),
            "--factor",
            "2",
            "--seconds",
            "3",
            "--json",
            "d.json",
            "--pictures",
            "4",
        ]
    )
    found = _json("d.json")
    assert found["model"]["dim"] == 64
    assert found["model"]["tokens_per_picture"] == 16
    assert found["model"]["bytes"] == 4 * found["model"]["parameters"]
    assert 0 < found["entropy"]["sampled"] < math.log(16)
    rows = found["rows"]
    listed = ["strategy", "exact", "dtype", "threads", "batch", "guided", "pictures_per_second"]
    listed += ["mean_accepted", "verify_cost", "ratio_to_plain", "ratio_to_generate", "ratio_to_floor"]
    assert all(set(listed) <= set(row) and row["pictures_per_second"] > 0 for row in rows)
    first = [row for row in rows if row["batch"] == 1]
    plain = {row["dtype"]: row for row in first if row["strategy"] == "plain"}
    assert set(plain) == {"float32", "bfloat16", "int8"}
    assert all(
        row["ratio_to_plain"] == row["verify_cost"] == row["mean_accepted"] == 1 for row in plain.values()
    )
    known = {name for name in Pipeline.from_pretrained(drawing).strategies if not name.startswith("eagle")}
    ran = {row["strategy"] for row in first}
    assert ran >= known - {"zipar"}
    assert "eagle" not in ran, "a widened model's features are not those that the head reads"
    drafted = [row for row in first if row["strategy"] == "drafter"]
    assert all(row["draft_cost"] > 0 and 1 <= row["mean_accepted"] <= 5 for row in drafted)
    assert "| generate " in capsys.readouterr().out


def test_generate_draws_the_same_greedily() -> None:
    from benchmarks.peer import Peer
    from benchmarks.racing import Batch, Sampler, plainly
    from lexel.document import Image, Text
    from lexel.sample.logits import SamplingConfig

    pipeline = build_tiny_pipeline()
    torch.manual_seed(0)
    for weight in pipeline.lm.parameters():
        torch.nn.init.normal_(weight, float(weight.ndim == 1), 0.3)
    peer, config = Peer(pipeline), SamplingConfig(temperature=0.0, guidance=3.0)
    assert peer.name == "LlamaForCausalLM"
    documents = [[Text(text), Image.blank()] for text in ("a red circle", "a red ring")]
    prompts, nulls = (
        [make(d) for d in documents] for make in (pipeline.codec.prompt, pipeline.codec.unconditional)
    )
    assert peer.check(prompts[0]) < 1e-3
    ids = []
    for null in (nulls, None):
        batch = Batch(prompts, null)
        mine, _ = Sampler(pipeline, config).draw(plainly(pipeline.lm), batch, seed=0)
        theirs = peer.prepare(prompts, null, config if null else SamplingConfig(temperature=0.0))()
        assert torch.equal(torch.stack(mine), theirs)
        ids.append(theirs)
    assert not torch.equal(*ids), "guidance changes what is drawn"


def test_races_are_interleaved_and_keep_to_their_time() -> None:
    import time

    from benchmarks.racing import Entry, Run, Setting, race

    order: list[tuple[str, int]] = []

    def entry(name: str, needed: bool, seconds: float) -> Entry:
        def run(number: int, seed: int) -> Run:
            order.append((name, seed))
            time.sleep(seconds)
            return Run(seconds + seed, seconds + seed)

        return Entry(name, "float32", needed, run)  # type: ignore[arg-type]

    class Numbers:
        def batch(self, number: int, setting: Setting) -> int:
            return number

    entries = [entry("a", True, 0.02), entry("b", True, 0.02), entry("c", False, 0.0)]
    race(entries, Numbers(), Setting(1, 1, True), 0.0)  # type: ignore[arg-type]
    assert order == [("a", 0), ("b", 0)], "what is needed runs even without time"
    assert entries[0].median(lambda run: run.seconds) == 0.02
    assert not entries[2].measured
    order.clear()
    race(entries, Numbers(), Setting(1, 1, True), 0.3)  # type: ignore[arg-type]
    assert order[:9] == [(n, r) for r, names in enumerate(("abc", "abc", "cba")) for n in names]
    assert 0 not in entries[0].runs, "the first run does not count"
    order.clear()
    late = [entry("plain", True, 0.0), entry("a", True, 0.0)]
    race(late, Numbers(), Setting(1, 1, True), 0.0, latest=time.perf_counter())  # type: ignore[arg-type]
    assert order == [("plain", 0)], "and after the latest moment only what the rest is compared with"


def test_ratios_and_costs() -> None:
    from benchmarks.racing import Entry, Run
    from benchmarks.sampling import costs
    from lexel.types import DecodeStats

    def entry(*runs: Run) -> Entry:
        made = Entry("plain", "float32", True, None)  # type: ignore[arg-type]
        made.runs = dict(enumerate(runs))
        return made

    plain = entry(*(Run(t, t, 0.0, DecodeStats((1,) * 8, 8, 0, t)) for t in (8.0, 16.0, 80.0)))
    fast = entry(*(Run(t, t, 2.0, DecodeStats((4, 4), 2, 4, t)) for t in (4.0, 4.0, 8.0)))
    assert fast.ratio(plain, lambda run: run.seconds) == 4, "the median of 2, 4 and 10"
    found = costs(fast, plain)
    assert found == {"mean_accepted": 4, "verify_cost": 0.5, "draft_cost": 0.5}


def test_lossy_strategies_are_judged(drawing: Path) -> None:
    import argparse

    from benchmarks.judging import Judge
    from benchmarks.racing import Sampler, plainly
    from lexel.sample.logits import SamplingConfig
    from lexel.sample.pipeline import Pipeline

    options = argparse.Namespace(
        seed=0, feature_steps=1, features=None, device="cpu", out=Path("kept"), count=4, pictures=4
    )
    judge = Judge(Sampler(Pipeline.from_pretrained(drawing), SamplingConfig()), 4, options)
    plain = plainly(judge.sampler.pipeline.lm)
    same = judge.compare(plain)
    assert same["accuracy_change"] == same["feature_distance_change"] == 0
    assert same["pictures_judged"] == 4
    judge.sampler.config = SamplingConfig(temperature=0.0)
    assert judge.compare(plain)["feature_distance_change"] != 0


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


def test_windows_compares_every_strategy_at_several_windows(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import windows

    found, drawn = tmp_path / "windows.json", tmp_path / "windows.png"
    windows.main(["--quick", "--bundle", str(tiny_bundle), "--json", str(found), "--png", str(drawn)])
    rows = json.loads(found.read_text())
    assert {(row["strategy"], row["window"]) for row in rows} >= {("nested", 2), ("drafter", 4)}
    assert all(row["mean_accepted"] >= 1 and row["ratio_to_plain"] > 0 for row in rows)
    assert "plain" in capsys.readouterr().out
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_train_lm_compares_the_same_model_in_three_forms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import train_lm

    found = tmp_path / "train.json"
    train_lm.main(["--quick", "--threads", "1", "--json", str(found)])
    rows = {row["form"]: row for row in json.loads(found.read_text())["rows"]}
    assert rows.keys() == set(train_lm.FORMS)
    assert rows["transformers"]["ratio_to_transformers"] == 1
    assert all(row["mfu"] > 0 and row["peak_memory_mb"] >= 0 for row in rows.values())
    assert "tokens/s" in capsys.readouterr().out


def test_train_lm_refuses_models_that_differ() -> None:
    import argparse

    from benchmarks.train_lm import Contest
    from lexel.errors import LexelError

    options = argparse.Namespace(model="debug", device="cpu", dtype="float32", batch=2, row=None, seed=0)
    contest = Contest(options)
    contest.check()
    with torch.no_grad():
        contest.lm.lm_head.weight.mul_(30)
    with pytest.raises(LexelError, match="the models are not the same"):
        contest.check()


def test_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.teacher import main
    from lexel.train.objectives.teachers import VisionTeacher

    main(["--quick", "--out", "teacher", "--json", "t.json"])
    found = _json("t.json")["zero_shot"]
    assert found.keys() == {"one", "unseen"}
    assert all(0 <= share <= 1 for row in found.values() for share in row.values())
    assert "colour" in capsys.readouterr().out
    seen = VisionTeacher("teacher", output="embedding")
    assert seen.size == 32
    assert seen.mean.unique().tolist() == [0.5]
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert seen(pixels).shape == (2, 64)
    assert VisionTeacher("teacher", output="patches", layer=-2)(pixels).shape == (2, 16, 128)


@pytest.mark.slow
def test_understanding(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.understanding import main

    main(["--quick", "--json", "u.json", "--out", "u"])
    rows = _json("u.json")["candidates"]
    assert list(rows) == ["teacher, not rounded", "pixels", "semantic", "both"]
    assert "captions" not in rows["teacher, not rounded"]
    for name in ("pixels", "semantic", "both"):
        assert (rows[name]["positions"], rows[name]["codes"]) == (16, [256])
        assert rows[name]["nats"] > 0
    assert "unseen pairs" in capsys.readouterr().out


def test_a_probe_reads_what_is_there_and_nothing_else() -> None:
    from benchmarks.teacher import easy_scenes
    from benchmarks.understanding import probe, probe_examples

    examples = probe_examples(easy_scenes(32, 100), 600, 100)
    brightness = probe(lambda pixels: pixels.mean((2, 3))[:, None], examples)
    assert brightness["place"] < 0.3, "the mean colour says nothing of the place"
    assert brightness["color"] > 0.8
    nothing = probe(lambda pixels: torch.zeros(len(pixels), 1, 4), examples)
    assert nothing["both"] < 0.2


def test_larp_prior(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.larp_prior import entropy, main

    main(["--quick", "--json", "l.json"])
    rows = _json("l.json")["runs"]
    assert [row["weight"] for row in rows] == [0.06, 0.0]
    assert all(row["nll"] > 0 and 0 <= row["unigram"] <= math.log(256) for row in rows)
    assert "NLL per code" in capsys.readouterr().out
    assert entropy(torch.tensor([[0, 0], [1, 1]]), 4) == pytest.approx(math.log(2))


@pytest.mark.slow
def test_detokenizers(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.detokenizers import main

    main(["--quick", "--families", "raster", "--out", "out", "--json", "a.json"])
    rows = _json("a.json")["families"]["raster"]
    drawn = [f"{name}, {steps} steps" for name in ("detokenizer", "distilled") for steps in (1, 2)]
    assert list(rows) == ["own decoder", *drawn]
    for row in rows.values():
        assert 0 < row["psnr"] < 30
        assert 0 <= row["accuracy"] <= 1
        assert row["frechet"] > 0
        assert row["pictures_per_second"] > 0
    assert "| distilled, 2 steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no family 'cubist'; there are raster"):
        main(["--quick", "--families", "cubist"])
