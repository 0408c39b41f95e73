"""Clips and sounds as files: a folder of frames, GIF, MP4 or WebM; WAV, FLAC, Ogg or MP3.

Folders of frames and GIFs go through Pillow, video files through PyAV, sounds through soundfile; the last two
are installed by the extra `media` (``pip install 'lexel[media]'``). Sounds are mixed to mono by the mean of
their channels and resampled by FFmpeg's libswresample (PyAV).

t frames of a clip, or samples of a sound · h w picture
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lexel.data.images import EXTENSIONS, load_frames, load_image, to_image, to_pixels
from lexel.errors import LexelError
from lexel.hub import write_atomically

# Ending → the container and codec that `write_clip` chooses.
VIDEOS = {
    ".mp4": ("mp4", "libx264"),
    ".mov": ("mov", "libx264"),
    ".mkv": ("matroska", "libx264"),
    ".webm": ("webm", "libvpx-vp9"),
}
SOUNDS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}
# A frame, and from when until when it is shown, in seconds.
Shown = tuple[Image.Image, float, float]
MAX_PIXELS = 128_000_000
"""Clips with more pixels than this, all frames together, are refused: 1.5 GB as floats."""


def is_clip(path: str | Path) -> bool:
    """Whether this is a folder (of frames), or by its ending a GIF or a video file."""
    path = Path(path)
    return path.is_dir() or path.suffix.lower() in (".gif", *VIDEOS)


def is_moving(path: str | Path) -> bool:
    """Whether this is a clip, and no GIF of a single frame. Raises LexelError for an unreadable GIF."""
    return is_clip(path) and (Path(path).suffix.lower() != ".gif" or clip_rate(path) is not None)


def is_sound(path: str | Path) -> bool:
    """Whether this is a sound file by its ending."""
    return Path(path).suffix.lower() in SOUNDS


# Clips


def read_clip(
    path: str | Path,
    frames: int | None = None,
    size: int | tuple[int, int] | None = None,
    fps: float | None = None,
    most: int | None = None,
) -> Tensor:
    """A clip as float ``[t, 3, h, w]`` in [-1, 1].

    path: a folder of pictures (in the order of their names), a GIF, or a video file. frames: how many, from
    the beginning (None: all). size: pixels of every frame, cropped and scaled as `to_pixels` does (None: as
    they are). fps: frames per second, by repeating or leaving out frames (None: those of the file). most:
    frames after which a longer clip is cut.
    Raises LexelError with one sentence for a missing, damaged or empty clip, for one with fewer than `frames`
    frames, of unequal sizes or too large, and where the extra `media` is not installed.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise LexelError(f"{path} does not exist.")
    if frames is not None and frames < 1:
        raise ValueError(f"a clip has at least one frame, {frames} were asked for.")
    pictures: Iterable[Image.Image]
    if path.is_dir():
        if fps is not None:
            raise LexelError(f"{path} is a folder of frames, which have no rate; leave fps out.")
        pictures = _folder_frames(path)
    else:
        shown = load_frames(path) if path.suffix.lower() == ".gif" else _video_frames(path)
        pictures = (picture for picture, _, _ in shown) if fps is None else _at_rate(shown, fps)
    return _stack(pictures if most is None else islice(pictures, most), path, frames, size)


def clip_rate(path: str | Path) -> float | None:
    """Frames per second of a clip, of a GIF by its shortest frame; None for a folder of frames and for a GIF
    of a single one. Raises LexelError as `read_clip` does."""
    path = Path(path).expanduser()
    if path.is_dir():
        return None
    if path.suffix.lower() == ".gif":
        spans = [until - start for _, start, until in load_frames(path)]
        return 1 / min(spans) if len(spans) > 1 else None
    with _opened(path) as (_, stream):
        return float(stream.average_rate or 25)


def write_clip(video: Tensor, path: str | Path, fps: float = 8) -> None:
    """Write float ``[t, 3, h, w]`` in about [-1, 1], by the ending of `path`: .gif (256 colours a frame,
    times in hundredths of a second, equal frames in a row as one that is shown longer), .mp4, .mov, .mkv
    (H.264) or .webm (VP9), and without one a folder of PNGs.
    Raises LexelError for another ending, an unwritable path, or a missing extra."""
    path = Path(path)
    if video.ndim != 4 or video.shape[1] != 3 or not len(video):
        raise ValueError(f"a clip must be [t, 3, h, w] with t > 0, got {list(video.shape)}.")
    pictures, ending = [to_image(frame) for frame in video], path.suffix.lower()
    if ending == ".gif":
        write_atomically(path, lambda temporary: _save_gif(pictures, temporary, fps))
    elif ending in VIDEOS:
        av = _extra("av")
        write_atomically(path, lambda temporary: _save_video(av, pictures, temporary, fps, *VIDEOS[ending]))
    elif not ending:
        for number, picture in enumerate(pictures):
            write_atomically(path / f"{number:04d}.png", partial(picture.save, format="PNG"))
    else:
        known = ", ".join((".gif", *VIDEOS))
        raise LexelError(f"{path}: clips are written as {known}, or as a folder, not as {ending}.")


def _stack(
    pictures: Iterable[Image.Image], path: Path, frames: int | None, size: int | tuple[int, int] | None
) -> Tensor:
    found: list[Tensor] = []
    for picture in pictures:
        found.append(to_pixels(picture, (picture.height, picture.width) if size is None else size))
        if found[-1].shape != found[0].shape:
            raise LexelError(f"{path}: its frames have different sizes; give a size to scale them to.")
        if len(found) * found[0][0].numel() > MAX_PIXELS:
            raise LexelError(f"{path}: more than {MAX_PIXELS} pixels; give a number of frames or a size.")
        if len(found) == frames:
            break
    if not found:
        raise LexelError(f"{path} holds no frames.")
    if frames is not None and len(found) < frames:
        raise LexelError(f"{path} has {len(found)} frames, {frames} are needed.")
    return torch.stack(found)


def _folder_frames(path: Path) -> Iterator[Image.Image]:
    for file in sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS):
        yield load_image(file)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A video file and its video; what PyAV says of a bad one becomes one sentence."""
    av = _extra("av")
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise LexelError(f"{path} holds no video.")
            yield file, file.streams.video[0]
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LexelError(f"{path} cannot be read as a video: {reason}.") from error


def _video_frames(path: Path) -> Iterator[Shown]:
    with _opened(path) as (file, stream):
        seconds, before, since = 1 / float(stream.average_rate or 25), None, 0.0
        for number, frame in enumerate(file.decode(stream)):
            start = number * seconds if frame.time is None else frame.time
            if before is not None:
                yield before.to_image(), since, start
            before, since = frame, start
        if before is not None:
            yield before.to_image(), since, since + seconds


def _at_rate(shown: Iterator[Shown], fps: float) -> Iterator[Image.Image]:
    """The frame that is shown at 0, 1 / fps, 2 / fps … seconds after the first one appears."""
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}.")
    tick, beginning = 0, None
    for picture, start, until in shown:
        beginning = start if beginning is None else beginning
        while (tick + 0.25) / fps < until - beginning:  # files round their times: a quarter of a tick is none
            yield picture
            tick += 1


def _save_gif(pictures: list[Image.Image], path: Path, fps: float) -> None:
    first, *rest = pictures
    duration = max(20, round(100 / fps) * 10)  # browsers slow down what is shorter than 20 ms
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0)


def _save_video(
    av: Any, pictures: list[Image.Image], path: Path, fps: float, container: str, codec: str
) -> None:
    first = pictures[0]
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = first.size
        # Chroma at half the resolution plays everywhere but needs even sides.
        stream.pix_fmt = "yuv444p" if first.width % 2 or first.height % 2 else "yuv420p"
        stream.options = {"crf": "12"} | ({"b": "0"} if codec == "libvpx-vp9" else {})
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode())


# Sounds


def read_wave(path: str | Path, rate: int) -> Tensor:
    """A sound file as float ``[1, t]`` in [-1, 1] with `rate` samples a second: the mean of its channels,
    resampled where the file has another rate.
    Raises LexelError with one sentence for a missing, damaged or empty file and for a missing extra."""
    soundfile = _extra("soundfile")
    path = Path(path).expanduser()
    if not path.is_file():
        raise LexelError(f"{path} is a folder, not a sound." if path.is_dir() else f"{path} does not exist.")
    try:
        samples, found = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise LexelError(f"{path} cannot be read as a sound: {str(error).rstrip('.')}.") from error
    if not len(samples):
        raise LexelError(f"{path} holds no samples.")
    wave = torch.from_numpy(samples).mean(dim=1)[None]
    return resample(wave, found, rate).clamp(-1, 1)


def write_wave(wave: Tensor, path: str | Path, rate: int) -> None:
    """Write float ``[1, t]`` in about [-1, 1] (clipped) as .wav or .flac with 16 bits a sample, .ogg or .mp3.
    Raises LexelError for another ending, an unwritable path, or a missing extra."""
    soundfile, path = _extra("soundfile"), Path(path)
    if wave.ndim != 2 or len(wave) != 1 or not wave.shape[1]:
        raise ValueError(f"a sound must be [1, t] with t > 0, got {list(wave.shape)}.")
    if path.suffix.lower() not in SOUNDS:
        raise LexelError(f"{path}: sounds are written as {', '.join(SOUNDS)}, not as {path.suffix or path}.")
    samples = wave[0].detach().float().cpu().clamp(-1, 1).numpy()
    kind = SOUNDS[path.suffix.lower()]
    write_atomically(path, lambda temporary: soundfile.write(str(temporary), samples, rate, format=kind))


def resample(wave: Tensor, rate: int, wanted: int) -> Tensor:
    """Float ``[1, t]`` at `rate` samples a second → ``[1, t * wanted / rate]`` (rounded up), through
    libswresample. Raises LexelError where the extra `media` is missing."""
    if rate == wanted:
        return wave
    av = _extra("av")
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=wanted)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave.numpy()), format="fltp", layout="mono")
    frame.sample_rate = rate
    pieces = [piece.to_ndarray() for piece in [*resampler.resample(frame), *resampler.resample(None)]]
    length = -(-wave.shape[1] * wanted // rate)
    found = torch.from_numpy(np.concatenate(pieces, axis=1))[:, :length]
    return torch.nn.functional.pad(found, (0, length - found.shape[1]))


def _extra(name: str) -> Any:
    """The package `name` of the extra `media`."""
    try:
        if name == "av":
            import av

            return av
        import soundfile

        return soundfile
    except ModuleNotFoundError:
        raise LexelError(f"this file needs the package {name}: pip install 'lexel[media]'.") from None
