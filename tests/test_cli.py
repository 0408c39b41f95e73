"""The `lexel` command: results, help, and one sentence with exit code 2 for every kind of bad input."""

from __future__ import annotations

import json
import shlex
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_pipeline, full_disk
from PIL import Image as PictureFile

from lexel.cli import build_parser, main
from lexel.cli.output import save_picture
from lexel.data.images import to_image

COMMANDS = ("sample", "draw", "describe", "reconstruct", "tokenize", "evaluate", "demo")


@pytest.fixture
def bundle(tiny_bundle: Path) -> list[str]:
    return ["--bundle", str(tiny_bundle)]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    path = tmp_path / "picture.png"
    to_image(pixels).save(path)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The sentence that a refused command prints."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("lexel: error: ")
    assert captured.out == ""
    return lines[0]


class TestCommands:
    def test_sample_writes_png_pictures_that_the_seed_repeats(self, bundle, tmp_path, capsys, tiny_pipeline):
        from lexel.document import Image, Text

        for name in ("first", "second"):
            arguments = ["sample", "a red circle", *bundle, "--count", "3", "--seed", "7"]
            assert main([*arguments, "--out", str(tmp_path / name)]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[:3] == [str(tmp_path / "first" / f"000{i}.png") for i in range(3)]
        expected = tiny_pipeline([Text("a red circle"), Image.blank()], count=3, seed=7)
        for number, document in enumerate(expected.documents):
            first, second = (tmp_path / name / f"000{number}.png" for name in ("first", "second"))
            assert first.read_bytes() == second.read_bytes()
            with PictureFile.open(first) as file:
                assert file.format == "PNG"
                assert (np.asarray(file) == np.asarray(to_image(document[-1].pixels))).all()

    def test_sample_json_is_machine_readable(self, bundle, tmp_path, capsys):
        options = ["--decoding", "jacobi", "--detokenizer", "--steps", "1", "--json"]
        assert main(["sample", "a", *bundle, "--count", "1", "--out", str(tmp_path), *options]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["pictures"] == [str(tmp_path / "0000.png")]
        assert answer["mean_accepted"] >= 1

    def test_stream_writes_the_pictures_while_they_are_drawn(self, bundle, tmp_path, capsys, monkeypatch):
        seen: list[np.ndarray] = []
        save = save_picture

        def saved(pixels, path):
            save(pixels, path)
            with PictureFile.open(path) as file:
                seen.append(np.asarray(file))

        arguments = ["sample", "a", *bundle, "--count", "2", "--seed", "3", "--decoding", "plain"]
        assert main([*arguments, "--out", str(tmp_path / "plain"), "--batch-size", "1"]) == 0
        monkeypatch.setattr("lexel.cli.sample.save_picture", saved)
        out = tmp_path / "streamed"
        assert main([*arguments, "--out", str(out), "--batch-size", "1", "--stream"]) == 0
        assert (seen[0][8:] == 128).all(), "the first row of codes, grey below"
        assert not (seen[0][:8] == 128).all()
        for name in ("0000.png", "0001.png"):
            assert (out / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
        captured = capsys.readouterr()
        assert captured.err.rstrip().endswith("2 of 2 pictures, 32 tokens")
        assert "tokens" not in captured.out

    def test_describe(self, bundle, picture, capsys, tiny_pipeline):
        expected = tiny_pipeline.describe(picture)
        assert main(["describe", str(picture), *bundle]) == 0
        assert capsys.readouterr().out == f"{expected}\n"
        assert main(["describe", str(picture), str(picture), *bundle, "--json"]) == 0
        captions = json.loads(capsys.readouterr().out)["captions"]
        assert captions == [{"picture": str(picture), "text": expected}] * 2

    def test_reconstruct(self, bundle, picture, capsys, tiny_pipeline):
        assert main(["reconstruct", str(picture), *bundle, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        written = picture.with_name("picture-reconstructed.png")
        assert answer["picture"] == str(written)
        assert answer["tokens"] == 16
        with PictureFile.open(written) as file:
            assert (np.asarray(file) == np.asarray(to_image(tiny_pipeline.reconstruct(picture)))).all()

    def test_tokenize_and_check(self, tiny_bundle, picture, tmp_path, capsys, tiny_pipeline):
        from lexel.data.tokenized import TokenizedDataset

        folder = tmp_path / "photos"
        folder.mkdir()
        for number in range(3):
            shutil.copy(picture, folder / f"{number}.png")
        out = tmp_path / "codes"
        arguments = ["tokenize", str(folder), "--out", str(out), "--tokenizer", str(tiny_bundle), "--check"]
        assert main([*arguments, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["pictures"] == 3
        assert answer["check"]["passed"]
        stored = TokenizedDataset(out, tiny_pipeline.tokenizer.fingerprint())
        with torch.no_grad():
            codes = tiny_pipeline.tokenizer.encode(tiny_pipeline.read_picture(picture)[None])
        assert stored[1].codes.equal(codes.indices[0])

    def test_evaluate_writes_the_report_and_a_card(self, bundle, tmp_path, capsys):
        out, card = tmp_path / "report.json", tmp_path / "card.md"
        arguments = ["evaluate", *bundle, "--count", "2", "--json", str(out), "--card", str(card)]
        assert main(arguments) == 0
        report = json.loads(out.read_text())
        assert report["count"] == 2
        assert "text_to_image.accuracy_one_object" in capsys.readouterr().out
        assert "tokenizer.psnr" in card.read_text()


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_an_example_that_parses(self, command, capsys):
        with pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0
        text = capsys.readouterr().out
        for example in text.split("example:\n")[1].strip().splitlines():
            words = shlex.split(example)
            assert words[:2] == ["lexel", command]
            build_parser().parse_args(words[1:])

    def test_wrong_arguments_exit_with_2(self, capsys):
        for arguments in (
            [],
            ["sample"],
            ["sample", "a", "--count", "0"],
            ["sample", "a", "--temperature", "-1"],
        ):
            with pytest.raises(SystemExit) as done:
                main(arguments)
            assert done.value.code == 2
            assert "lexel" in capsys.readouterr().err

    def test_version(self, capsys):
        import lexel

        with pytest.raises(SystemExit):
            main(["--version"])
        assert capsys.readouterr().out == f"lexel {lexel.__version__}\n"


def bomb(path: Path, side: int = 30_000) -> Path:
    """A PNG of side x side pixels in a few hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * ((side // 8 + 1) * side), 9)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    return path


class TestBadInput:
    def test_missing_or_wrong_bundle(self, tmp_path, capsys):
        assert "does not exist" in refused(capsys, "sample", "a", "--bundle", tmp_path / "none")
        assert "not a bundle" in refused(capsys, "sample", "a", "--bundle", tmp_path)

    def test_no_bundle_shipped(self, capsys, monkeypatch):
        monkeypatch.setattr("lexel.sample.bundle.SHIPPED", "absent")
        assert "--bundle DIR" in refused(capsys, "sample", "a")

    def test_mismatched_parts(self, tiny_bundle, tmp_path, capsys):
        copied = shutil.copytree(tiny_bundle, tmp_path / "bundle")
        build_tiny_pipeline(seed=1).tokenizer.save_pretrained(copied / "tokenizer")
        assert "same bundle" in refused(capsys, "sample", "a", "--bundle", copied)

    def test_prompt_longer_than_the_context(self, bundle, tmp_path, capsys):
        assert "shorten" in refused(capsys, "sample", "word " * 200, *bundle, "--out", tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_unreadable_pictures(self, bundle, tmp_path, picture, capsys):
        text = tmp_path / "text.png"
        text.write_text("not a picture")
        cut = tmp_path / "cut.png"
        cut.write_bytes(picture.read_bytes()[:200])
        for path in (text, cut, tmp_path / "missing.png", tmp_path):
            for command in ("describe", "reconstruct"):
                assert str(path) in refused(capsys, command, path, *bundle)

    def test_decompression_bomb(self, bundle, tmp_path, capsys):
        message = refused(capsys, "describe", bomb(tmp_path / "bomb.png"), *bundle)
        assert "refused" in message
        assert "pixels" in message

    def test_empty_and_missing_data(self, tiny_bundle, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        options = ["--out", tmp_path / "codes", "--tokenizer", tiny_bundle]
        assert "no usable picture" in refused(capsys, "tokenize", tmp_path / "empty", *options)
        assert "does not exist" in refused(capsys, "tokenize", tmp_path / "none", *options)
        assert not (tmp_path / "codes").exists()
        data = ["--data", tmp_path / "empty"]
        assert "no usable picture" in refused(capsys, "evaluate", "--bundle", tiny_bundle, *data)

    def test_another_tokenizers_codes_are_not_overwritten(self, tiny_bundle, tmp_path, picture, capsys):
        (tmp_path / "photos").mkdir()
        shutil.copy(picture, tmp_path / "photos")
        out = ["--out", str(tmp_path / "codes")]
        assert main(["tokenize", str(tmp_path / "photos"), *out, "--tokenizer", str(tiny_bundle)]) == 0
        capsys.readouterr()
        build_tiny_pipeline(seed=1).tokenizer.save_pretrained(tmp_path / "other")
        other = ["--tokenizer", tmp_path / "other"]
        assert "another folder" in refused(capsys, "tokenize", tmp_path / "photos", *out, *other)

    def test_impossible_length_device_and_strategy(self, bundle, picture, capsys, tmp_path):
        assert "always 16" in refused(capsys, "reconstruct", picture, *bundle, "--length", 3)
        assert "no device" in refused(capsys, "describe", picture, *bundle, "--device", "abacus")
        unknown = refused(capsys, "describe", picture, *bundle, "--decoding", "magic")
        assert "magic" in unknown
        assert "auto, plain, jacobi" in unknown
        bare = tmp_path / "bare"
        shutil.copytree(bundle[1], bare)
        values = json.loads((bare / "bundle.json").read_text())
        values["parts"] = ["tokenizer", "lm"]
        (bare / "bundle.json").write_text(json.dumps(values))
        message = refused(capsys, "sample", "a", "--bundle", bare, "--decoding", "drafter")
        assert "choose auto, plain, jacobi" in message

    def test_full_disk(self, bundle, tmp_path, capsys):
        (tmp_path / "0000.png").write_bytes(b"old")
        with full_disk(1000):
            message = refused(capsys, "sample", "a", *bundle, "--out", tmp_path, "--count", 1)
        assert "could not write" in message
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]

    def test_out_is_a_file(self, bundle, picture, capsys):
        assert "error" in refused(capsys, "sample", "a", *bundle, "--out", picture, "--count", 1)
