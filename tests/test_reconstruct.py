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
from lexel.data.media import clip_rate, read_clip, read_wave, write_clip, write_wave
from lexel.errors import LexelError
from lexel.evaluate.metrics import psnr, sound_quality
from lexel.models.detokenizers.base import Detokenizer
from lexel.sample.bundle import load_tokenizer_of, tokenizer_folders
from lexel.sample.pipeline import Pipeline
from lexel.sample.reconstruct import (
    MARGIN,
    SIDE,
    drawer,
    enlarged,
    picture_strip,
    reconstruct,
    reconstruct_clip,
    reconstruct_sound,
    token_count,
)
from lexel.tokenizers import from_pretrained
from lexel.tokenizers.emu3 import Emu3Config
from lexel.tokenizers.open_magvit2 import OpenMagvit2VideoConfig
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.sound import SoundConfig
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


def moving(frames: int, side: int = 16) -> torch.Tensor:
    """A clip of a white square that moves."""
    video = torch.full((frames, 3, side, side), -0.5)
    for number in range(frames):
        video[number, :, 4:10, number % 8 : number % 8 + 6] = 1
    return video


@pytest.fixture(scope="module")
def emu3():
    config = Emu3Config(
        image_size=16, channels=32, channel_mult=(1, 1), res_blocks=1, attention_stages=(), latent=2,
        quantizer=QuantizerConfig("learned", codebook_size=16, cosine=False, entropy=0.0),
    )  # fmt: skip
    torch.manual_seed(0)
    return config.build().eval()


class TestClips:
    def test_a_tokenizer_of_clips_gets_what_it_takes(self, emu3):
        video = moving(10)
        found, tokens = reconstruct_clip(emu3, video)
        whole = emu3.decode_video(emu3.encode_video(video[None, :8])).clamp(-1, 1)[0]
        assert torch.equal(found, whole)
        assert tokens == 2 * 8 * 8
        with pytest.raises(LexelError, match="too short for Emu3Tokenizer"):
            reconstruct_clip(emu3, moving(3))

    def test_long_clips_in_pieces(self, emu3, monkeypatch):
        monkeypatch.setattr(type(emu3), "usable_frames", lambda self, frames: min(frames - frames % 4, 4))
        found, tokens = reconstruct_clip(emu3, moving(9))
        pieces = [emu3.decode_video(emu3.encode_video(moving(9)[None, i : i + 4])) for i in (0, 4)]
        assert torch.equal(found, torch.cat(pieces, dim=1)[0].clamp(-1, 1))
        assert tokens == 2 * 8 * 8

    def test_usable_frames_are_those_that_encode(self, emu3):
        video = OpenMagvit2VideoConfig(
            image_size=16, channels=32, channel_mult=(1, 2, 2, 2), res_blocks=1
        ).build()
        assert [emu3.usable_frames(t) for t in (0, 3, 4, 11)] == [0, 0, 4, 8]
        assert [video.usable_frames(t) for t in (0, 1, 4, 5, 17, 18)] == [0, 1, 1, 5, 17, 17]

    def test_a_tokenizer_of_pictures_goes_frame_by_frame(self, flexible):
        video = moving(3, 32)
        found, tokens = reconstruct_clip(flexible, video, 4)
        assert torch.equal(found, torch.stack([reconstruct(flexible, frame, 4)[0] for frame in video]))
        assert tokens == 12

    @pytest.mark.parametrize("name", ["frames", "clip.gif", "clip.mp4"])
    def test_the_command_writes_the_same_kind(self, name, emu3, tmp_path, capsys):
        emu3.save_pretrained(tmp_path / "emu3")
        write_clip(moving(9), tmp_path / name, 10)
        options = ["--tokenizer", str(tmp_path / "emu3"), "--json"]
        assert main(["reconstruct", str(tmp_path / name), *options]) == 0
        answer = json.loads(capsys.readouterr().out)
        written = tmp_path / name.replace(".", "-reconstructed.", 1)
        written = written if "." in name else tmp_path / "frames-reconstructed"
        assert (answer["clip"], answer["frames"], answer["tokens"]) == (str(written), 8, 128)
        given = read_clip(tmp_path / name, 9)
        expected = reconstruct_clip(emu3, given)[0]
        assert answer["psnr"] == pytest.approx(float(psnr(expected, given[:8]).mean()), abs=1e-3)
        found = read_clip(written)
        assert found.shape == expected.shape
        grey = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # video files thin out the colours
        assert float(((found - expected) * grey).sum(dim=1).abs().mean()) < 0.08
        if "." in name:
            assert clip_rate(written) == pytest.approx(10, rel=0.05)

    def test_another_ending_and_fewer_frames(self, emu3, tmp_path, capsys):
        emu3.save_pretrained(tmp_path / "emu3")
        write_clip(moving(9), tmp_path / "clip.gif", 10)
        options = ["--tokenizer", str(tmp_path / "emu3"), "--frames", "5", "--out", str(tmp_path / "a.webm")]
        assert main(["reconstruct", str(tmp_path / "clip.gif"), *options]) == 0
        assert "4 frames (1 left out), 64 tokens" in capsys.readouterr().out
        assert len(read_clip(tmp_path / "a.webm")) == 4

    def test_what_cannot_be_is_one_sentence(self, emu3, tiny_bundle, tmp_path, picture, capsys):
        emu3.save_pretrained(tmp_path / "emu3")
        write_clip(moving(2), tmp_path / "clip.gif")
        options = ["--tokenizer", tmp_path / "emu3"]
        assert "too short" in refused(capsys, tmp_path / "clip.gif", *options)
        assert "has 2 frames, 5 are needed" in refused(capsys, tmp_path / "clip.gif", *options, "--frames", 5)
        assert "strip of one picture" in refused(capsys, tmp_path / "clip.gif", *options, "--tokens", "4")
        assert "no number of tokens" in refused(capsys, tmp_path / "clip.gif", *options, "--length", "4")
        assert "are of clips" in refused(capsys, picture, "--bundle", tiny_bundle, "--frames", "4")


class TestSounds:
    @pytest.fixture
    def codec(self, tmp_path) -> Path:
        config = {"model_type": "dac", "encoder_hidden_size": 4, "downsampling_ratios": [2, 5]}
        config |= {"decoder_hidden_size": 16, "n_codebooks": 4, "codebook_size": 8, "codebook_dim": 2}
        torch.manual_seed(0)
        SoundConfig({**config, "sampling_rate": 4000}, codebooks=3).build().save_pretrained(tmp_path / "dac")
        return tmp_path / "dac"

    @pytest.fixture
    def sound(self, tmp_path) -> Path:
        write_wave(0.5 * torch.sin(torch.arange(8001) / 9)[None], tmp_path / "tone.wav", 16000)
        return tmp_path / "tone.wav"

    def test_the_command(self, codec, sound, tmp_path, capsys):
        assert main(["reconstruct", str(sound), "--tokenizer", str(codec), "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        wave = read_wave(sound, 4000)
        expected, codes = reconstruct_sound(from_pretrained(codec), wave)
        written = read_wave(tmp_path / "tone-reconstructed.wav", 4000)
        assert written.shape == wave.shape == (1, 2001)
        assert float((written - expected).abs().max()) < 1e-4
        noise = float((expected - wave).square().sum())
        snr = 10 * np.log10(float(wave.square().sum()) / noise)
        assert answer.pop("snr") == pytest.approx(snr, abs=1e-3)
        assert answer.pop("si_sdr") < 0  # of random weights
        assert answer == {
            "sound": str(tmp_path / "tone-reconstructed.wav"),
            "seconds": 2001 / 4000,
            "tokens": codes.indices.shape[1],
            "codebooks": 3,
            "kilobits_per_second": pytest.approx(400 * 9 / 1000),
        }

    def test_another_loudness_is_forgiven_by_one_measure(self):
        wave = torch.sin(torch.arange(500) / 9)[None]
        quality = sound_quality(wave / 2, wave)
        assert quality["si_sdr"] > 60
        assert quality["snr"] == pytest.approx(20 * np.log10(2), abs=1e-3)

    def test_what_cannot_be_is_one_sentence(self, codec, sound, picture, tiny_bundle, tmp_path, capsys):
        assert "is a sound" in refused(capsys, sound, "--bundle", tiny_bundle)
        assert "reads sounds" in refused(capsys, picture, "--tokenizer", codec)
        assert "reads sounds" in refused(capsys, sound, "--tokenizer", codec, "--length", "3")
        assert "makes sounds" in refused(capsys, sound, "--tokenizer", codec, "--steps", "3")
        folder = tmp_path / "photos"
        folder.mkdir()
        shutil.copy(picture, folder)
        assert main(["tokenize", str(folder), "--out", str(tmp_path / "out"), "--tokenizer", str(codec)]) == 2
        assert "reads sounds, not pictures" in capsys.readouterr().err


class TestDetokenizers:
    def test_a_folder_by_name_draws_like_the_bundles_own(self, tiny_bundle, picture, tmp_path):
        own = ["reconstruct", str(picture), "--bundle", str(tiny_bundle), "--steps", "2", "--seed", "3"]
        assert main([*own, "--out", str(tmp_path / "a.png"), "--detokenizer"]) == 0
        named = ["--tokenizer", str(tiny_bundle), "--detokenizer", str(tiny_bundle / "detokenizer")]
        for name, seed in (("b.png", "3"), ("c.png", "4")):
            options = [*own[:2], *named, "--steps", "2", "--seed", seed, "--out", str(tmp_path / name)]
            assert main(options) == 0
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()

    def test_features_are_computed_for_a_detokenizer_that_reads_them(
        self, tiny_pipeline, pixels, monkeypatch
    ):
        class Painter(Detokenizer):
            reads = "features"
            image_size = (8, 8)

            def decode(self, condition, *, steps=None, guidance=None, noise=None, generator=None):
                self.seen = (condition, steps, guidance)
                return torch.rand(len(condition), 3, 8, 8, generator=generator) * 2 - 1

        tokenizer, painter = tiny_pipeline.tokenizer, Painter()
        with pytest.raises(LexelError, match="stand for no features"):
            reconstruct(tokenizer, pixels, None, drawer(tokenizer, painter))
        monkeypatch.setattr(type(tokenizer), "decode_features", lambda self, codes: codes.indices.float())
        drawn, codes = reconstruct(tokenizer, pixels, None, drawer(tokenizer, painter, steps=4, guidance=2.0))
        assert drawn.shape == (3, 8, 8)
        assert torch.equal(painter.seen[0], codes.indices.float())
        assert painter.seen[1:] == (4, 2.0)

    def test_a_tokenizer_that_does_not_draw_says_what_does(self, flexible, pixels, monkeypatch):
        monkeypatch.setattr(type(flexible), "draws_pixels", False)
        with pytest.raises(LexelError, match="draw them with a detokenizer"):
            reconstruct(flexible, pixels)

    def test_options_of_samplers_need_one(self, flexible, bundle, picture, capsys):
        assert drawer(flexible, seed=3) is None
        with pytest.raises(LexelError, match="draws in one pass; it takes no guidance"):
            drawer(flexible, guidance=2.0)
        assert "takes no steps" in refused(capsys, picture, "--bundle", bundle, "--steps", "4")
        named = ["--detokenizer", bundle / "detokenizer", "--detokenizer-checkpoint", "x.pt"]
        assert "published detokenizer" in refused(capsys, picture, "--bundle", bundle, *named)


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
