"""Stages of a language model in order: from bundle to bundle, reused, resumed, refused in one sentence."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import resolved, train
from safetensors.torch import load_file

from lexel.document import Image, Text
from lexel.errors import LexelError
from lexel.sample.pipeline import Pipeline
from lexel.train.callbacks.metrics_file import MetricsFile
from lexel.train.curriculum import check_order
from lexel.train.record import Options, differences, plain
from lexel.train.settings import AdapterSettings, Curriculum, LMStage

PRESETS = {
    "curriculum_liquid": ["01_pretraining"],
    "curriculum_mio": ["01_alignment", "02_interleaved", "03_speech", "04_supervised"],
    "curriculum_seed_llama": ["01_pretraining", "02_instructions"],
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    lines = (f"It was the {i}th of May, and the clocks said {i % 12}.\n" for i in range(300))
    path.write_text("".join(lines))
    return path


def _short(words: Path, bundle: Path, output: Path) -> list[str]:
    return [
        "debug=fast", "threads=1", f"sources.words.root={words}", f"output={output}", f"bundle={bundle}",
        "data.count=64", "codes.count=16", "codes.validation_count=8", "curriculum.every.steps=3",
        "curriculum.every.batch_size=2", "curriculum.every.sample_every=0", "task.stages=[curriculum]",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_goes_from_bundle_to_bundle(
    preset: str, words: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    train(f"experiment={preset}", *_short(words, tiny_bundle, tmp_path))
    folders = sorted(path.name for path in tmp_path.iterdir() if re.match(r"\d\d_", path.name))
    assert folders == PRESETS[preset]
    before = load_file(tiny_bundle / "lm" / "model.safetensors")
    for name in folders:
        bundle = tmp_path / name / "bundle"
        pipeline = Pipeline.from_pretrained(bundle)
        assert pipeline.detokenizer is not None, "the bundle's detokenizer goes along"
        after = load_file(bundle / "lm" / "model.safetensors")
        assert before.keys() == after.keys(), "an adapter is merged"
        assert any(not torch.equal(before[key], after[key]) for key in before)
        before = after
    document = pipeline([Text("a red circle"), Image.blank()], seed=0).documents[0]
    assert document[-1].pixels.shape == (3, 32, 32)  # type: ignore[union-attr]


SMALL = {
    "first": {"steps": 4, "lr": 0.001, "sources": {"pairs": {"source": "data"}, "words": {"weight": 0.5}}},
    "second": {"steps": 3, "lr": 0.0005},
}


def _two(words: Path, bundle: Path, output: Path, **changes: Any) -> list[str]:
    stages = {name: {**settings, **changes.get(name, {})} for name, settings in SMALL.items()}
    every = {"batch_size": 2, "sample_every": 0, "validate_every": 2, "validation_batches": 1,
             "checkpoint_every": 2, "warmup": 1, "log_every": 1}  # fmt: skip
    return [
        "task.stages=[curriculum]", "+data@sources.words=text", f"sources.words.root={words}",
        f"output={output}", f"bundle={bundle}", "data.count=64", "codes.count=16", "codes.validation_count=8",
        "threads=1", f"+curriculum.stages={_hydra(stages)}", f"+curriculum.every={_hydra(every)}",
        "curriculum.order=[first,second]", "codes.workers=0",
    ]  # fmt: skip


def _hydra(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _weights(output: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(output / stage / "model.safetensors")


def _equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def finished(words: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("curriculum") / "out"
    train(*_two(words, tiny_bundle, output))
    return output


def test_each_source_is_validated_by_itself(finished: Path) -> None:
    rows = MetricsFile(finished / "01_first" / "metrics.csv").rows()
    told = [row for row in rows if row["validation/loss"]]
    assert [row["step"] for row in told] == ["2", "4"]
    for row in told:
        pairs, text = float(row["validation/pairs/loss"]), float(row["validation/words/loss"])
        assert float(row["validation/loss"]) == pytest.approx((pairs + text) / 2, rel=1e-4)
        assert pairs != text
    other = MetricsFile(finished / "02_second" / "metrics.csv").rows()
    assert not any("/words/" in key for key in other[0])


def test_finished_stages_are_reused_and_a_changed_one_changes_those_after_it(
    finished: Path, words: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    train(*_two(words, tiny_bundle, finished))
    assert capsys.readouterr().out.count("finished before, reused") == 3  # the codes, two stages
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    train(*_two(words, tiny_bundle, finished, second={"lr": 0.0001}))
    told = capsys.readouterr().out
    assert "01_first: finished before, reused" in told
    assert "02_second: starting over, because stage.lr: 0.0005 → 0.0001" in told
    train(*_two(words, tiny_bundle, finished, first={"lr": 0.002}, second={"lr": 0.0001}))
    told = capsys.readouterr().out
    assert "01_first: starting over, because stage.lr" in told
    assert "02_second: starting over, because start:" in told


def test_a_stage_killed_in_the_middle_ends_as_if_it_had_not_been(
    words: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(*_two(words, tiny_bundle, tmp_path / "whole"))
    from lexel.train.lm_module import LMModule

    compute, calls = LMModule.compute, []

    def crash(self: Any, network: Any, batch: Any) -> Any:
        calls.append(self.step)
        if self.step == 3 and network is self.network:
            raise RuntimeError("crash")
        return compute(self, network, batch)

    monkeypatch.setattr(LMModule, "compute", crash)
    with pytest.raises(RuntimeError, match="crash"):
        train(*_two(words, tiny_bundle, tmp_path / "killed"))
    assert not (tmp_path / "killed" / "01_first" / "bundle").exists()
    monkeypatch.setattr(LMModule, "compute", compute)
    train(*_two(words, tiny_bundle, tmp_path / "killed"))
    for stage in ("01_first", "02_second"):
        assert _equal(_weights(tmp_path / "whole", stage), _weights(tmp_path / "killed", stage))


def test_a_stage_may_start_from_an_earlier_one(words: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = [*_two(words, tiny_bundle, tmp_path), "+curriculum.stages.third={steps:2,bundle:first}"]
    train(*arguments, "curriculum.order=[first,second,third]")
    settings = json.loads((tmp_path / "03_third" / "settings.json").read_text())["settings"]
    assert settings["stage"]["bundle"] == str(tmp_path / "01_first" / "bundle")


def test_a_lora_stage_keeps_the_rest_as_it_was(words: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    lora = {"adapter": {"kind": "lora", "r": 2}}
    train(*_two(words, tiny_bundle, tmp_path, second=lora))
    before, after = _weights(tmp_path, "01_first"), _weights(tmp_path, "02_second")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("attn" in key for key in moved)
    assert not any("norm" in key for key in moved)


# Orders that make no sense


def _curriculum(order: list[str], **stages: LMStage) -> Curriculum:
    named = {"a": LMStage(), "b": LMStage(), **stages}
    return Curriculum(order=order, stages=named)


@pytest.mark.parametrize(
    ("curriculum", "sentence"),
    [
        (_curriculum([]), r"curriculum.order is empty; name the stages to run \(there is a, b\)"),
        (_curriculum(["a", "c"]), "names 'c', but curriculum.stages has a, b"),
        (_curriculum(["a", "b", "a"]), "names 'a' twice"),
        (
            _curriculum(["a", "b"], a=LMStage(bundle="b")),
            "'a' starts from the bundle of 'b', which comes later",
        ),
        (_curriculum(["a"], a=LMStage(bundle="b")), "of 'b', which is not in curriculum.order"),
        (
            _curriculum(["a"], a=LMStage(adapter=AdapterSettings("lora"))),
            "'a' trains an adapter, but no stage",
        ),
    ],
)
def test_an_order_that_makes_no_sense_is_one_sentence(curriculum: Curriculum, sentence: str) -> None:
    with pytest.raises(LexelError, match=sentence):
        check_order(curriculum)


def test_an_adapter_may_come_after_a_full_stage_or_a_bundle() -> None:
    lora = LMStage(adapter=AdapterSettings("lora"))
    check_order(_curriculum(["a", "b"], b=lora))
    check_order(_curriculum(["b"], b=lora), trained=True)


def test_a_mistake_in_the_last_stage_is_told_before_the_first_runs(
    words: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    wrong = {"sources": {"nowhere": {"weight": 1.0}}}
    with pytest.raises(LexelError, match="no data source 'nowhere'; the run has data, words"):
        train(*_two(words, tiny_bundle, tmp_path, second=wrong))
    assert not list(tmp_path.iterdir()), "not even the codes are written"
    with pytest.raises(LexelError, match=r"curriculum\.stages\.second: .*stpes"):
        resolved(*_two(words, tiny_bundle, tmp_path, second={"stpes": 3}))
    with pytest.raises(ValueError, match=r"curriculum\.stages\.second\.lr must be positive"):
        resolved(*_two(words, tiny_bundle, tmp_path, second={"lr": 0}))
    with pytest.raises(LexelError, match=r"nowhere.* does not exist"):
        train(*_two(words, tmp_path / "nowhere", tmp_path))


# Records


def test_an_option_that_an_old_record_lacks_counts_as_its_default() -> None:
    stage = LMStage(optimizer=partial(torch.optim.AdamW, weight_decay=0.1))
    new = plain({"stage": stage, "data": {"a": 1}})
    old = json.loads(json.dumps(new))
    del old["stage"]["adapter"], old["stage"]["supervise" if "supervise" in old["stage"] else "row_length"]
    del old["stage"]["optimizer"]["weight_decay"]
    assert differences(old, new) == ["stage.optimizer.weight_decay: 0.01 → 0.1"]
    other = plain({"stage": replace(stage, row_length=64), "data": {"a": 1}})
    assert "stage.row_length: 0 → 64" in differences(old, other)
    # What is no option of anything has no default, and one that is gone counts as changed.
    assert differences({}, {"a": None}) == ["a: (not set) → None"]
    assert differences({"a": 1, "b": 2}, Options({"a": 1}, {"a": 1, "b": 2})) == ["b: 2 → (not set)"]


def test_a_stage_finished_before_an_option_existed_is_reused(tmp_path: Path) -> None:
    from lexel.train.record import StageRecord

    settings = plain({"stage": LMStage(steps=7)})
    record = StageRecord("lm", tmp_path / "lm", settings)
    record.begin()
    record.finish(seconds=1.0)
    for name in ("done.json", "settings.json"):
        content = json.loads((tmp_path / "lm" / name).read_text())
        del content["settings"]["stage"]["narrow"]
        content["hash"] = "of an older version"
        (tmp_path / "lm" / name).write_text(json.dumps(content))
    assert record.finished() is not None
    assert record.resumable()
    assert record.reason() is None
    changed = StageRecord("lm", tmp_path / "lm", plain({"stage": LMStage(steps=7, narrow=0.5)}))
    assert changed.finished() is None
    assert changed.reason() == "stage.narrow: 0.0 → 0.5"
