"""`lexel verify SYSTEM --checkpoint FILE`: a downloaded file against what its row needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lexel.cli import main
from lexel.errors import LexelError
from lexel.tokenizers import find_published
from lexel.verify import verify_checkpoint
from lexel.verify.checkpoint import picture_size, sample_pictures
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A small Chameleon checkpoint and its hyper-parameters."""
    fixture = Fixture(GOLDEN / "chameleon_vq", tmp_path)
    return fixture.weights(), fixture.config["vqgan_params"]


def test_a_file_that_fits(file) -> None:
    path, arguments = file
    content = torch.load(path, weights_only=True)
    state = {k: v.half() for k, v in content["state_dict"].items()}
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(1)}, "global_step": 5}, path)
    report = verify_checkpoint("chameleon_vq", path, config=arguments)
    assert report.passed
    assert (report.found, report.ignored, report.missing, report.unknown) == (len(state), 1, (), ())
    assert report.dtypes == {"float16": len(state)}
    assert report.copy == "under 'state_dict'"
    assert report.size == (32, 32)
    assert set(report.psnr or {}) == {"shapes 0", "shapes 1", "gradient"}
    assert "trained weights" in report.note  # they are random


def test_the_psnr_is_that_of_encoding_and_decoding(file, monkeypatch) -> None:
    from lexel.tokenizers.chameleon import ChameleonTokenizer

    path, arguments = file
    picture = sample_pictures((32, 32))["gradient"]
    monkeypatch.setattr(ChameleonTokenizer, "decode", lambda self, codes: picture[None])
    quality = verify_checkpoint("chameleon_vq", path, config=arguments).psnr or {}
    assert quality["gradient"] == pytest.approx(100)
    assert quality["shapes 0"] < 20


def test_what_does_not_fit_is_listed_and_exits_with_1(file, tmp_path: Path, capsys) -> None:
    path, arguments = file
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    state["renamed"] = state.pop("quant_conv.bias")
    state["decoder.conv_in.bias"] = torch.zeros(7)
    torch.save(content, path)
    (tmp_path / "sizes.json").write_text(json.dumps(arguments))
    command = ["verify", "chameleon_vq", "--checkpoint", str(path), "--config", str(tmp_path / "sizes.json")]
    assert main(command) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text
    assert "unknown        renamed" in text
    assert "missing        quant_conv.bias" in text
    assert "decoder.conv_in.bias: [7], expected [64]" in text
    assert main([*command, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["missing"], report["unknown"], report["passed"]) == (
        ["quant_conv.bias"],
        ["renamed"],
        False,
    )


def test_published_sizes_are_the_default(file) -> None:
    report = verify_checkpoint("chameleon_vq", file[0])
    assert not report.passed
    assert report.parameters == report.expected == find_published("chameleon-vq")[1].parameters
    assert report.misshaped["encoder.conv_in.weight"] == "[32, 3, 3, 3], expected [128, 3, 3, 3]"


def test_a_file_without_decoder_fits_but_draws_nothing(file, tmp_path: Path) -> None:
    path, arguments = file
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save({f"model.vqmodel.{k}": v for k, v in state.items() if "decoder" not in k}, path)
    report = verify_checkpoint("chameleon_vq", path, config=arguments)
    assert report.passed
    assert report.psnr is None
    assert "no decoder" in report.note


def test_the_copy_that_was_read_is_named(tmp_path: Path) -> None:
    fixture = Fixture(GOLDEN / "llamagen_vq", tmp_path)
    path = fixture.weights()
    arguments = {
        k: v for k, v in fixture.config.items() if k in find_published("llamagen-vq-16")[0].arguments
    }
    content = torch.load(path, weights_only=True)
    torch.save({**content, "ema": content["model"]}, path)

    def copy(key: str | None) -> str:
        report = verify_checkpoint("llamagen_vq", path, "llamagen-vq-16", arguments, key, size=32)
        assert report.size == (32, 32)
        return report.copy

    assert (copy(None), copy("model")) == ("under 'ema'", "under 'model'")


def test_the_row_must_be_clear(file) -> None:
    with pytest.raises(LexelError, match=r"--name.*llamagen-vq-8"):
        verify_checkpoint("llamagen_vq", file[0])
    with pytest.raises(LexelError, match="it has: chameleon-vq"):
        verify_checkpoint("chameleon_vq", file[0], "chameleon")
    with pytest.raises(LexelError, match=r"there are: .*chameleon_vq"):
        verify_checkpoint("chameleon", file[0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "either a FOLDER"),
        (["tests", "--checkpoint", "x.pt"], "either a FOLDER"),
        (["tests", "--name", "chameleon-vq"], "belong to --checkpoint"),
        (["--checkpoint", "absent.pt"], "absent.pt does not exist"),
        (["--checkpoint", "absent.pt", "--config", "absent.json"], "absent.json is not readable JSON"),
    ],
)
def test_wrong_calls_are_one_sentence(options: list[str], sentence: str, capsys) -> None:
    assert main(["verify", "chameleon_vq", *options]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
def test_pictures_are_the_same_at_every_call_and_all_different(size: tuple[int, int]) -> None:
    pictures, again = sample_pictures(size), sample_pictures(size)
    assert all(torch.equal(picture, again[name]) for name, picture in pictures.items())
    assert all(picture.shape == (3, *size) and picture.abs().max() <= 1 for picture in pictures.values())
    assert len({picture.sum().item() for picture in pictures.values()}) == len(pictures)


def test_large_tokenizers_are_tried_at_256() -> None:
    for row, size in (("chameleon-vq", 256), ("emu3-vision-tokenizer", 256), ("llamagen-vq-16", 256)):
        system, published = find_published(row)
        with torch.device("meta"):
            assert picture_size(system.config(published.arguments).build()) == (size, size)
