"""Clips and sounds as files: what is written is read again; bad files are one sentence."""

from __future__ import annotations

import builtins
import math
from pathlib import Path

import pytest
import torch

from lexel.data.images import to_image
from lexel.data.media import (
    clip_rate,
    is_clip,
    is_sound,
    read_clip,
    read_wave,
    resample,
    write_clip,
    write_wave,
)
from lexel.errors import LexelError


def moving_square(frames: int = 8, height: int = 32, width: int = 48) -> torch.Tensor:
    """A white square on a coloured ground, two pixels further right in every frame."""
    ground = torch.tensor([-0.6, 0.1, 0.5])[:, None, None]
    video = ground.expand(frames, 3, height, width).clone()
    for number in range(frames):
        video[number, :, 8:24, 4 + 2 * number : 20 + 2 * number] = 1
    return video


def tone(rate: int, seconds: float = 0.5, hertz: float = 220) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(int(rate * seconds)) / rate)[None]


def mean_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().mean())


@pytest.fixture
def without(monkeypatch):
    """A function that makes a package look absent."""

    def hide(name: str) -> None:
        real = builtins.__import__

        def guarded(wanted, *args, **kwargs):
            if wanted == name:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return real(wanted, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", guarded)

    return hide


class TestClips:
    @pytest.mark.parametrize(
        ("name", "error"), [("frames", 0.005), ("clip.gif", 0.02), ("clip.mp4", 0.03), ("clip.webm", 0.03)]
    )
    def test_what_is_written_is_read_again(self, name: str, error: float, tmp_path: Path):
        video = moving_square()
        write_clip(video, tmp_path / name, fps=10)
        assert is_clip(tmp_path / name)
        found = read_clip(tmp_path / name)
        assert found.shape == video.shape
        assert float(found.min()) >= -1
        assert float(found.max()) <= 1
        assert mean_error(found, video) < error
        for number in range(len(video)):  # in order: no frame is nearer to another one
            distances = (found[number] - video).abs().mean(dim=(1, 2, 3))
            assert int(distances.argmin()) == number
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
    def test_odd_sides(self, name: str, tmp_path: Path):
        write_clip(moving_square(2, 31, 45), tmp_path / name)
        assert read_clip(tmp_path / name).shape == (2, 3, 31, 45)

    def test_frames_and_size(self, tmp_path: Path):
        write_clip(moving_square(), tmp_path / "frames")
        found = read_clip(tmp_path / "frames", frames=5, size=16)
        assert found.shape == (5, 3, 16, 16)
        assert read_clip(tmp_path / "frames", frames=5)[4].equal(read_clip(tmp_path / "frames")[4])

    @pytest.mark.parametrize("name", ["clip.gif", "clip.mp4"])
    def test_rates(self, name: str, tmp_path: Path):
        write_clip(moving_square(), tmp_path / name, fps=10)
        assert clip_rate(tmp_path / name) == pytest.approx(10, rel=0.02)
        whole = read_clip(tmp_path / name)
        assert read_clip(tmp_path / name, fps=5).equal(whole[::2])
        assert read_clip(tmp_path / name, fps=20).equal(whole.repeat_interleave(2, dim=0))
        assert read_clip(tmp_path / name, fps=20, frames=3).equal(whole[[0, 0, 1]])

    def test_equal_frames_come_back_at_the_rate_of_the_clip(self, tmp_path: Path):
        still = moving_square(4)[[0, 0, 0, 1, 2, 2]]
        for name in ("clip.gif", "clip.mp4"):
            write_clip(still, tmp_path / name, fps=10)
            found = read_clip(tmp_path / name, fps=clip_rate(tmp_path / name))
            distances = (found[:, None] - moving_square(4)[None, :3]).abs().mean(dim=(2, 3, 4))
            assert distances.argmin(dim=1).tolist() == [0, 0, 0, 1, 2, 2]

    def test_times_that_files_round(self, tmp_path: Path):
        write_clip(moving_square(8), tmp_path / "clip.mkv", fps=29.97)  # times in milliseconds
        rate = clip_rate(tmp_path / "clip.mkv")
        assert rate == pytest.approx(29.97, rel=0.01)
        assert read_clip(tmp_path / "clip.mkv", fps=rate).equal(read_clip(tmp_path / "clip.mkv"))

    def test_tiny_frames(self, tmp_path: Path):
        for name in ("a.mp4", "a.webm", "a.gif"):
            write_clip(moving_square(2, 12, 12), tmp_path / name)
            assert read_clip(tmp_path / name).shape == (2, 3, 12, 12)

    def test_a_folder_has_no_rate(self, tmp_path: Path):
        write_clip(moving_square(2), tmp_path / "frames")
        assert clip_rate(tmp_path / "frames") is None
        with pytest.raises(LexelError, match="leave fps out"):
            read_clip(tmp_path / "frames", fps=3)

    def test_bad_clips_are_one_sentence(self, tmp_path: Path):
        write_clip(moving_square(3), tmp_path / "short.mp4")
        with pytest.raises(LexelError, match="has 3 frames, 5 are needed"):
            read_clip(tmp_path / "short.mp4", frames=5)
        (tmp_path / "empty").mkdir()
        with pytest.raises(LexelError, match="holds no frames"):
            read_clip(tmp_path / "empty")
        for name in ("text.mp4", "text.gif"):
            (tmp_path / name).write_text("this is no clip")
            with pytest.raises(LexelError, match=f"{name} cannot be read as a"):
                read_clip(tmp_path / name)
        (tmp_path / "nothing.mp4").touch()
        with pytest.raises(LexelError, match="cannot be read"):
            read_clip(tmp_path / "nothing.mp4")
        with pytest.raises(LexelError, match="does not exist"):
            read_clip(tmp_path / "missing.mp4")
        write_wave(tone(8000), tmp_path / "sound.wav", 8000)
        (tmp_path / "sound.wav").rename(tmp_path / "sound.mp4")
        with pytest.raises(LexelError, match="holds no video"):
            read_clip(tmp_path / "sound.mp4")

    def test_unequal_and_too_large_frames(self, tmp_path: Path, monkeypatch):
        folder = tmp_path / "frames"
        write_clip(moving_square(2), folder)
        to_image(torch.zeros(3, 8, 8)).save(folder / "9.png")
        with pytest.raises(LexelError, match="different sizes"):
            read_clip(folder)
        assert len(read_clip(folder, size=8)) == 3
        monkeypatch.setattr("lexel.data.media.MAX_PIXELS", 100)
        with pytest.raises(LexelError, match="more than 100 pixels"):
            read_clip(folder, size=8)

    def test_unknown_endings_and_shapes(self, tmp_path: Path):
        with pytest.raises(LexelError, match=r"written as \.gif, \.mp4"):
            write_clip(moving_square(2), tmp_path / "clip.txt")
        with pytest.raises(ValueError, match="must be"):
            write_clip(torch.zeros(0, 3, 8, 8), tmp_path / "clip.gif")

    def test_without_the_extra(self, without, tmp_path: Path):
        (tmp_path / "clip.mp4").touch()
        without("av")
        with pytest.raises(LexelError, match=r"pip install 'lexel\[media\]'"):
            read_clip(tmp_path / "clip.mp4")
        with pytest.raises(LexelError, match=r"pip install 'lexel\[media\]'"):
            write_clip(moving_square(2), tmp_path / "other.mp4")
        write_clip(moving_square(2), tmp_path / "clip.gif")  # needs none


class TestSounds:
    @pytest.mark.parametrize(("name", "error"), [("a.wav", 1e-4), ("a.flac", 1e-4), ("a.ogg", 0.02)])
    def test_what_is_written_is_read_again(self, name: str, error: float, tmp_path: Path):
        wave = tone(16000)
        write_wave(wave, tmp_path / name, 16000)
        assert is_sound(tmp_path / name)
        found = read_wave(tmp_path / name, 16000)
        assert found.shape == wave.shape
        assert mean_error(found, wave) < error

    @pytest.mark.parametrize(("rate", "wanted"), [(44100, 24000), (16000, 24000), (24000, 16000)])
    def test_resampling_keeps_the_tone_in_time(self, rate: int, wanted: int):
        found, expected = resample(tone(rate), rate, wanted), tone(wanted)
        assert found.shape == expected.shape
        inside = slice(wanted // 50, -wanted // 50)  # away from the ends, where the filter runs out
        assert float((found - expected)[:, inside].abs().max()) < 0.01

    def test_stereo_becomes_the_mean(self, tmp_path: Path):
        import soundfile

        left, right = tone(8000)[0], tone(8000, hertz=330)[0]
        soundfile.write(tmp_path / "two.wav", torch.stack([left, right], dim=1).numpy(), 8000, "FLOAT")
        assert torch.allclose(read_wave(tmp_path / "two.wav", 8000)[0], (left + right) / 2)

    def test_bad_sounds_are_one_sentence(self, tmp_path: Path):
        with pytest.raises(LexelError, match="does not exist"):
            read_wave(tmp_path / "missing.wav", 8000)
        with pytest.raises(LexelError, match="is a folder"):
            read_wave(tmp_path, 8000)
        (tmp_path / "text.wav").write_text("this is no sound")
        with pytest.raises(LexelError, match=r"text\.wav cannot be read as a sound"):
            read_wave(tmp_path / "text.wav", 8000)
        import soundfile

        soundfile.write(tmp_path / "empty.wav", torch.zeros(0).numpy(), 8000)
        with pytest.raises(LexelError, match="no samples"):
            read_wave(tmp_path / "empty.wav", 8000)
        with pytest.raises(LexelError, match=r"\.wav, \.flac"):
            write_wave(tone(8000), tmp_path / "a.txt", 8000)
        with pytest.raises(ValueError, match="must be"):
            write_wave(torch.zeros(2, 5), tmp_path / "a.wav", 8000)

    def test_without_the_extra(self, without, tmp_path: Path):
        without("soundfile")
        with pytest.raises(LexelError, match=r"pip install 'lexel\[media\]'"):
            read_wave(tmp_path / "a.wav", 8000)
