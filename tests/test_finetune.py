"""From a bundle to a model of a user's captioned pictures in one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PictureFile
from runs import resolved, train
from safetensors.torch import load_file

from lexel.document import Image, Text
from lexel.sample.pipeline import Pipeline
from lexel.train import start
from lexel.train.chain import Chain

COLOURS = ("red", "green", "blue", "black", "orange", "purple")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: pictures of another size than the bundle's, with captions longer than it has seen."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for number in range(24):
        colour = COLOURS[number % len(COLOURS)]
        PictureFile.new("RGB", (50, 40), colour).save(folder / f"{number:02d}.png")
        lines.append(
            json.dumps({"file_name": f"{number:02d}.png", "text": f"{colour} paper number {number}"})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def _arguments(pictures: Path, bundle: Path, output: Path, *more: str) -> list[str]:
    return [
        "experiment=finetune", "debug=fast", "data=folder", f"data.root={pictures}", f"bundle={bundle}",
        f"output={output}", "threads=1", "data.validation_share=0.2", "codes.workers=0",
        "stages.lm.steps=4", "stages.lm.batch_size=2", "stages.lm.sample_every=0", *more,
    ]  # fmt: skip


def test_one_command_ends_in_a_bundle_and_a_report(
    pictures: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(*_arguments(pictures, tiny_bundle, tmp_path))
    told = capsys.readouterr().out
    assert "data: pictures are read at 32x32, the size of the bundle's" in told
    assert "dB PSNR" in told
    assert "warning: below 20 dB" in told, "a random tokenizer shows nothing"
    assert "task=chain" in told
    assert run.data.image_size == (32, 32)
    for name in ("report.json", "index.html", "samples.png", "tokenizer_check.png", "bundle/bundle.json"):
        assert (tmp_path / name).is_file()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tokenizer"]["psnr"] > 0
    made = Pipeline.from_pretrained(tmp_path / "bundle")
    given = Pipeline.from_pretrained(tiny_bundle)
    assert made.codec.vocabulary == given.codec.vocabulary
    assert made.tokenizer.fingerprint() == given.tokenizer.fingerprint()
    assert made.detokenizer is not None
    assert made.lm.fingerprint() != given.lm.fingerprint()
    assert made.sampling["text"] == given.sampling["text"]
    assert made.sampling["image"].temperature == 0.9, "the experiment's own"
    drawn = made([Text("red paper number 3"), Image.blank()], seed=0).documents[0]
    assert drawn[-1].pixels.shape == (3, 32, 32)  # type: ignore[union-attr]
    # Again: everything is there.
    train(*_arguments(pictures, tiny_bundle, tmp_path))
    assert capsys.readouterr().out.count("finished before, reused") == 3


def test_a_tokenizer_may_be_fine_tuned_first(pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    more = ["task=chain", "stages.tokenizer.steps=2", "stages.detokenizer.steps=2", "evaluation.prompts=1"]
    run = train(*_arguments(pictures, tiny_bundle, tmp_path, *more))
    made, given = (Pipeline.from_pretrained(path) for path in (tmp_path / "bundle", tiny_bundle))
    assert made.tokenizer.config == given.tokenizer.config
    assert made.tokenizer.fingerprint() != given.tokenizer.fingerprint()
    for part in ("tokenizer", "lm", "detokenizer"):
        new, old = (
            load_file(path / part / "model.safetensors") for path in (tmp_path / "bundle", tiny_bundle)
        )
        assert new.keys() == old.keys()
        # They went on from the bundle's weights: a few small steps away.
        learned = [key for key in new if new[key].is_floating_point() and "quantize" not in key]
        far = {key for key in learned if (new[key] - old[key]).abs().max() > 0.1}
        assert not far
    assert run.parts.tokenizer is None


def test_a_lora_leaves_what_it_does_not_train(pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    train(*_arguments(pictures, tiny_bundle, tmp_path, "task=lm", "stages.lm.adapter.kind=lora"))
    new, old = (load_file(path / "lm" / "model.safetensors") for path in (tmp_path, tiny_bundle))
    assert new.keys() == old.keys()
    moved = {key for key in new if not torch.equal(new[key], old[key])}
    assert moved
    assert not any("norm" in key for key in moved)


def test_the_language_model_grows_where_captions_need_it(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        PictureFile.new("RGB", (32, 32), COLOURS[number]).save(folder / f"{number}.png")
    rows = ({"file_name": f"{n}.png", "text": f"{n} " + "zyx" * 60} for n in range(4))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(*_arguments(folder, tiny_bundle, tmp_path / "out", "task=lm", "stages.lm.steps=1"))
    assert "lm: 96 → " in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "lm" / "config.json").read_text())
    assert config["max_length"] > 96


def test_a_tokenizer_that_shows_the_pictures_raises_no_warning(
    tiny_bundle: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    run = resolved(*_arguments(pictures, tiny_bundle, tmp_path))
    start.begin(run)
    monkeypatch.setattr(start, "RECOGNISABLE", 1.0)
    quality = start.look(Chain(run))
    told = capsys.readouterr().out
    assert quality is not None
    assert 1.0 < quality < 20.0
    assert f"at {quality:.1f} dB PSNR" in told
    assert "warning" not in told


def test_without_a_bundle_named_it_is_the_shipped_one(pictures: Path, tmp_path: Path) -> None:
    run = resolved("experiment=finetune", "data=folder", f"data.root={pictures}", f"output={tmp_path}")
    assert run.bundle == "shipped"
    start.begin(run)
    assert run.parts.tokenizer is not None
    assert Path(run.parts.tokenizer) == start.bundle_folder("shipped") / "tokenizer"
    assert run.stages.lm.bundle == str(start.bundle_folder("shipped"))
    assert run.data.size == 32


def test_what_the_user_names_wins_over_the_bundle(pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    run = resolved(*_arguments(pictures, tiny_bundle, tmp_path, "parts.tokenizer=mine", "task=evaluate"))
    start.begin(run)
    assert run.parts.tokenizer == "mine"
    assert run.parts.lm == str(tiny_bundle / "lm")
