"""Pictures through a tokenizer and back: the strip, the command, and bundles of several tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_pipeline
from PIL import Image as PictureFile

from lexel.cli import main
from lexel.data.images import to_image
from lexel.errors import LexelError
from lexel.evaluate.metrics import psnr
from lexel.sample.bundle import load_tokenizer_of, tokenizer_folders
from lexel.sample.pipeline import Pipeline
from lexel.sample.reconstruct import MARGIN, SIDE, enlarged, picture_strip, reconstruct, token_count
from lexel.tokenizers import from_pretrained
from lexel.types import Codes


@pytest.fixture(scope="module")
def flexible():
    return build_tiny_pipeline("flexible").tokenizer


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def picture(tmp_path: Path, pixels) -> Path:
    path = tmp_path / "picture.png"
    to_image(pixels).save(path)
    return path


@pytest.fixture
def bundle(tiny_bundle: Path, flexible, tmp_path: Path) -> Path:
    """The tiny bundle (16 tokens always) with a further tokenizer "short" (up to 6)."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    flexible.save_pretrained(folder / "tokenizers" / "short")
    return folder


def refused(capsys, *arguments: object) -> str:
    assert main(["reconstruct", *(str(a) for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line


class TestReconstruct:
    def test_is_decode_of_encode_at_that_length(self, flexible, pixels):
        for tokens in (1, 4, 6, None):
            rebuilt, codes = reconstruct(flexible, pixels, tokens)
            expected = flexible.decode(flexible.encode(pixels[None], tokens)).clamp(-1, 1)[0]
            assert torch.equal(rebuilt, expected)
            assert token_count(codes) == (tokens or 6)

    def test_a_fixed_tokenizer_takes_its_own_number_only(self, tiny_pipeline, pixels):
        full, _ = reconstruct(tiny_pipeline.tokenizer, pixels)
        assert torch.equal(reconstruct(tiny_pipeline.tokenizer, pixels, 16)[0], full)
        with pytest.raises(LexelError, match="always 16 tokens per picture, 4 were asked for"):
            reconstruct(tiny_pipeline.tokenizer, pixels, 4)

    def test_a_flexible_tokenizer_says_how_far_it_goes(self, flexible, pixels):
        for tokens in (0, 7):
            with pytest.raises(LexelError, match="1 to 6 tokens per picture"):
                reconstruct(flexible, pixels, tokens)

    def test_an_encoder_alone_cannot_draw(self, flexible, pixels, monkeypatch):
        monkeypatch.setattr(type(flexible), "has_decoder", False)
        with pytest.raises(LexelError, match="encoder alone"):
            reconstruct(flexible, pixels)

    def test_selected_tokens_are_counted(self):
        keep = torch.tensor([[True, False, True, False]])
        assert token_count(Codes(torch.zeros(1, 4, 1, dtype=torch.long), (2, 2), keep=keep)) == 2


class TestStrip:
    def test_pictures_stand_side_by_side_in_order_with_a_label_below(self):
        colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]])
        pictures = [colour[:, None, None].expand(3, 8, 8) for colour in colours]
        strip = picture_strip(pictures, ["original", "1 token\n3.2 dB", "2 tokens\n9.9 dB"])
        array = np.asarray(strip)
        assert strip.width == MARGIN + 3 * (SIDE + MARGIN)
        for number, colour in enumerate(colours):
            left = MARGIN + number * (SIDE + MARGIN)
            inside = array[MARGIN : MARGIN + SIDE, left : left + SIDE]
            assert (inside == ((colour + 1) * 127.5).numpy().astype(np.uint8)).all()
            label = array[MARGIN + SIDE + 1 :, left : left + SIDE]
            assert (label < 100).any(), "the label is written below its picture"
        assert (array[:, :MARGIN] == 255).all()

    def test_large_pictures_keep_their_size(self):
        assert picture_strip([torch.zeros(3, 300, 400)], [""]).width == 400 + 2 * MARGIN


class TestCommand:
    def test_strip_of_a_flexible_tokenizer_folder(self, flexible, tmp_path, picture, pixels, capsys):
        flexible.save_pretrained(tmp_path / "tokenizer")
        out = tmp_path / "strip.png"
        options = ["--tokenizer", str(tmp_path / "tokenizer"), "--tokens", "1,6", "--out", str(out), "--json"]
        assert main(["reconstruct", str(picture), *options]) == 0
        answer = json.loads(capsys.readouterr().out)
        read = torch.from_numpy(np.array(PictureFile.open(picture))).permute(2, 0, 1) / 127.5 - 1
        rebuilt = {tokens: reconstruct(flexible, read, tokens)[0] for tokens in (1, 6)}
        assert answer == {
            "strip": str(out),
            "reconstructions": [
                {"tokens": tokens, "psnr": pytest.approx(float(psnr(one[None], read[None])))}
                for tokens, one in rebuilt.items()
            ],
        }
        array = np.asarray(PictureFile.open(out))
        for number, one in enumerate([read, rebuilt[1], rebuilt[6]]):
            left = MARGIN + number * (SIDE + MARGIN)
            shown = array[MARGIN : MARGIN + SIDE, left : left + SIDE]
            assert (shown == np.asarray(enlarged(to_image(one)))).all()

    def test_strip_has_a_name_of_its_own_and_any_picture_is_cropped(self, tiny_bundle, tmp_path, capsys):
        wide = tmp_path / "wide.png"
        PictureFile.new("RGB", (90, 50), "teal").save(wide)
        assert main(["reconstruct", str(wide), "--bundle", str(tiny_bundle), "--tokens", "16"]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert first == f"{tmp_path / 'wide-strip.png'}:"
        assert second.startswith("16 tokens, ")
        assert second.endswith(" dB")
        assert (tmp_path / "wide-strip.png").is_file()

    def test_a_tokenizer_of_the_bundle_by_name(self, bundle, picture, capsys):
        options = ["--bundle", str(bundle), "--tokenizer", "short", "--tokens", "2", "--json"]
        assert main(["reconstruct", str(picture), *options]) == 0
        assert json.loads(capsys.readouterr().out)["reconstructions"][0]["tokens"] == 2

    def test_a_bundle_as_tokenizer_is_its_own(self, bundle, picture, tmp_path):
        for name, option in (("a.png", "--bundle"), ("b.png", "--tokenizer")):
            assert (
                main(["reconstruct", str(picture), option, str(bundle), "--out", str(tmp_path / name)]) == 0
            )
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    def test_a_published_name_with_a_local_file(self, picture, tmp_path, capsys):
        from lexel.tokenizers import export_published
        from lexel.tokenizers.bae import BAE

        sizes = {
            "nf": 8,
            "res_blocks": 1,
            "codebook_size": 6,
            "ch_mult": [1, 2],
            "img_size": 16,
            "emb_dim": 8,
        }
        export_published(BAE.config(sizes).build(), "elm-bae-16", tmp_path / "weights.th")
        (tmp_path / "sizes.json").write_text(json.dumps(sizes))
        options = ["--checkpoint", str(tmp_path / "weights.th"), "--config", str(tmp_path / "sizes.json")]
        tokens = ["--tokenizer", "elm-bae-16", "--tokens", "64", "--json"]
        assert main(["reconstruct", str(picture), *tokens, *options]) == 0
        assert json.loads(capsys.readouterr().out)["reconstructions"][0]["tokens"] == 64
        assert "elm-bae-16" not in refused(capsys, picture, *tokens[:2], "--checkpoint", picture)

    def test_what_cannot_be_is_one_sentence(self, bundle, picture, tmp_path, capsys):
        own = ["--bundle", bundle]
        assert "always 16" in refused(capsys, picture, *own, "--tokens", "4,16")
        assert "1 to 6" in refused(capsys, picture, *own, "--tokenizer", "short", "--tokens", "1,7")
        assert "lexel published" in refused(capsys, picture, *own, "--tokenizer", "nobody")
        assert "does not exist" in refused(capsys, picture, "--tokenizer", tmp_path / "nowhere")
        assert "published" in refused(capsys, picture, *own, "--checkpoint", "x.pt")
        options = ["--tokenizer", "short", "--detokenizer"]
        assert "leave --tokenizer out" in refused(capsys, picture, *own, *options)
        assert not list(tmp_path.glob("*-strip.png"))

    @pytest.mark.parametrize("tokens", ["", "1,,2", "0", "2,-1", "many", "1.5"])
    def test_counts_that_are_none_stop_at_once(self, tokens, capsys):
        with pytest.raises(SystemExit) as done:
            main(["reconstruct", "x.png", "--tokens", tokens])
        assert done.value.code == 2
        assert "numbers from 1 like 1,4,16" in capsys.readouterr().err


class TestBundleOfSeveral:
    def test_further_tokenizers_are_saved_and_loaded(self, bundle, flexible, tmp_path):
        pipe = Pipeline.from_pretrained(bundle)
        assert list(pipe.tokenizers) == ["short"]
        assert pipe.tokenizers["short"].fingerprint() == flexible.fingerprint()
        pipe.tokenizers["second"] = pipe.tokenizer
        pipe.save_pretrained(tmp_path / "copy")
        assert list(tokenizer_folders(tmp_path / "copy")) == ["second", "short"]
        again = Pipeline.from_pretrained(tmp_path / "copy")
        assert again.tokenizers["second"].fingerprint() == pipe.tokenizer.fingerprint()
        assert from_pretrained(tmp_path / "copy" / "tokenizers" / "short").layout.flexible

    def test_bundles_without_the_folder_are_as_before(self, tiny_bundle):
        assert tokenizer_folders(tiny_bundle) == {}
        assert Pipeline.from_pretrained(tiny_bundle).tokenizers == {}

    def test_names_are_folder_names(self, tiny_pipeline, flexible):
        with pytest.raises(LexelError, match=r"cannot be called .\.\./short"):
            Pipeline(
                tiny_pipeline.tokenizer,
                tiny_pipeline.lm,
                tiny_pipeline.codec,
                tokenizers={"../short": flexible},
            )

    def test_names_within_a_bundle_come_before_folders(self, bundle, flexible, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        build_tiny_pipeline("flexible", seed=1).tokenizer.save_pretrained(tmp_path / "short")
        assert load_tokenizer_of("short", bundle=bundle).fingerprint() == flexible.fingerprint()
        assert load_tokenizer_of("short").fingerprint() != flexible.fingerprint()
