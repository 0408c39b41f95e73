"""`lexel reconstruct`: a picture, clip or sound through its tokens and back."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexel.cli.arguments import (
    add_bundle,
    add_command,
    add_json,
    at_least,
    find_device,
    load_pipeline,
    parse_counts,
)
from lexel.cli.output import save_picture, show, write_png
from lexel.errors import LexelError

if TYPE_CHECKING:
    from lexel.models.detokenizers.base import Detokenizer
    from lexel.tokenizers.base import Tokenizer
    from lexel.types import Codes

DEFAULT_RATE = 8.0
"""Frames per second of what is written from a folder of frames."""


def add(commands: Any) -> None:
    """The command's arguments."""
    reconstruct = add_command(
        commands, "reconstruct", _run, "send a picture, clip or sound through its tokens and back",
        "lexel reconstruct photo.png --out photo-tokens.png\n"
        "  lexel reconstruct photo.png --tokenizer outputs/flexible/tokenizer --tokens 1,4,16,64\n"
        "  lexel reconstruct clip.mp4 --tokenizer open-magvit2-video --frames 17\n"
        "  lexel reconstruct speech.wav --tokenizer mimi",
    )  # fmt: skip
    reconstruct.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="picture, clip (folder of frames, .gif, .mp4, .webm, …) or sound (.wav, .flac, .ogg, .mp3)",
    )
    reconstruct.add_argument(
        "--tokenizer",
        metavar="NAME_OR_DIR",
        help="published name, tokenizer or bundle folder, hub id, or name within --bundle "
        "(default: the bundle's own)",
    )
    reconstruct.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="local file or folder of a published name (default: the hub's)",
    )
    reconstruct.add_argument(
        "--config", type=Path, metavar="JSON", help="hyper-parameters that differ from the published ones"
    )
    counts = reconstruct.add_mutually_exclusive_group()
    counts.add_argument("--length", type=at_least(1), help="tokens to keep (flexible tokenizers only)")
    counts.add_argument(
        "--tokens",
        type=parse_counts,
        metavar="N,N,…",
        help="write a strip: the original, then the picture from that many tokens, for each number",
    )
    reconstruct.add_argument(
        "--frames", type=at_least(1), help="of a clip, from its beginning (default: all)"
    )
    reconstruct.add_argument(
        "--fps", type=at_least(0.1, float), help="frames per second of a clip (default: the file's)"
    )
    reconstruct.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: NAME-reconstructed of the same kind, NAME-strip.png; clips are written by the ending "
        "(.gif, .mp4, .webm, or none for a folder of frames)",
    )
    reconstruct.add_argument(
        "--detokenizer",
        nargs="?",
        const="",
        metavar="NAME_OR_DIR",
        help="draw with this detokenizer (published name, folder or hub id); without a name: the bundle's",
    )
    reconstruct.add_argument(
        "--detokenizer-checkpoint", type=Path, metavar="FILE", help="local file of its published name"
    )
    reconstruct.add_argument("--steps", type=at_least(1), help="of a decoder that samples (default: its own)")
    reconstruct.add_argument("--guidance", type=at_least(0.0, float), help="of such a decoder; 1 is none")
    reconstruct.add_argument("--seed", type=at_least(0), help="of its noise (default: always the same)")
    for add_options in (add_bundle, add_json):
        add_options(reconstruct)


def _run(arguments: argparse.Namespace) -> None:
    from lexel.data.media import is_moving, is_sound
    from lexel.tokenizers.sound import SoundTokenizer

    tokenizer, decode = _tokenizer_and_decoder(arguments)
    if isinstance(tokenizer, SoundTokenizer):
        _reconstruct_sound(arguments, tokenizer)
    elif is_sound(arguments.file):
        raise LexelError(
            f"{arguments.file} is a sound; name a tokenizer of sounds, such as --tokenizer mimi."
        )
    elif is_moving(arguments.file):
        _reconstruct_clip(arguments, tokenizer, decode)
    elif arguments.frames or arguments.fps:
        raise LexelError(f"{arguments.file} is a picture; --frames and --fps are of clips.")
    else:
        _reconstruct_picture(arguments, tokenizer, decode)


def _reconstruct_picture(
    arguments: argparse.Namespace, tokenizer: Tokenizer, decode: Callable[[Codes], Any] | None
) -> None:
    from lexel.data.images import read_pixels
    from lexel.evaluate.metrics import psnr
    from lexel.sample.reconstruct import picture_strip, reconstruct, token_count

    pixels = read_pixels(arguments.file, tokenizer.image_size)
    shown = []
    for count in arguments.tokens or [arguments.length]:
        picture, codes = reconstruct(tokenizer, pixels, count, decode)
        size = (picture.shape[1], picture.shape[2])  # a detokenizer may have its own
        original = pixels if size == pixels.shape[1:] else read_pixels(arguments.file, size)
        shown.append((picture, token_count(codes), float(psnr(picture[None], original[None])[0])))
    path = arguments.out or _beside(arguments.file, "strip" if arguments.tokens else "reconstructed", ".png")
    results = [{"tokens": tokens, "psnr": decibels} for _, tokens, decibels in shown]
    lines = [f"{tokens} token{'s' * (tokens != 1)}, {decibels:.1f} dB" for _, tokens, decibels in shown]
    if arguments.tokens:
        labels = ["original", *(line.replace(", ", "\n") for line in lines)]
        write_png(picture_strip([pixels, *(picture for picture, _, _ in shown)], labels), path)
        values = {"strip": str(path), "reconstructions": results}
        show(arguments, values, "\n".join([f"{path}:", *lines]))
    else:
        save_picture(shown[0][0], path)
        show(arguments, {"picture": str(path), **results[0]}, f"{path}: {lines[0]}")


def _reconstruct_clip(
    arguments: argparse.Namespace, tokenizer: Tokenizer, decode: Callable[[Codes], Any] | None
) -> None:
    from lexel.data.media import clip_rate, read_clip, write_clip
    from lexel.evaluate.metrics import psnr
    from lexel.sample.reconstruct import reconstruct_clip

    file = arguments.file
    if arguments.tokens:
        raise LexelError(f"{file} is a clip; --tokens makes a strip of one picture.")
    rate = arguments.fps or clip_rate(file) or DEFAULT_RATE
    fps = None if file.is_dir() else rate
    given = read_clip(file, arguments.frames, tokenizer.image_size, fps)
    video, tokens = reconstruct_clip(tokenizer, given, arguments.length, decode)
    size, original = (video.shape[2], video.shape[3]), given
    if size != given.shape[2:]:
        original = read_clip(file, len(given), size, fps)
    decibels = float(psnr(video, original[: len(video)]).mean())
    path = arguments.out or _beside(file, "reconstructed", file.suffix)
    write_clip(video, path, rate)
    values = {"clip": str(path), "frames": len(video), "tokens": tokens, "psnr": decibels}
    left_out = f" ({len(given) - len(video)} left out)" if len(given) > len(video) else ""
    line = f"{path}: {len(video)} frames{left_out}, {tokens} tokens, {decibels:.1f} dB per frame"
    show(arguments, values, line)


def _reconstruct_sound(arguments: argparse.Namespace, tokenizer: Any) -> None:
    from lexel.data.media import is_sound, read_wave, write_wave
    from lexel.evaluate.metrics import sound_quality
    from lexel.sample.reconstruct import reconstruct_sound

    given = {"length": arguments.length, "tokens": arguments.tokens, "frames": arguments.frames}
    if wrong := [name for name, value in {**given, "fps": arguments.fps}.items() if value]:
        raise LexelError(f"--{wrong[0]} is of pictures and clips; this tokenizer reads sounds.")
    if not is_sound(arguments.file):
        raise LexelError(f"this tokenizer reads sounds (.wav, .flac, .ogg, .mp3), not {arguments.file}.")
    wave = read_wave(arguments.file, tokenizer.sample_rate)
    found, codes = reconstruct_sound(tokenizer, wave)
    path = arguments.out or _beside(arguments.file, "reconstructed", arguments.file.suffix)
    write_wave(found, path, tokenizer.sample_rate)
    _, positions, codebooks = codes.indices.shape
    quality = sound_quality(found, wave)
    values = {
        "sound": str(path),
        "seconds": wave.shape[1] / tokenizer.sample_rate,
        "tokens": positions,
        "codebooks": codebooks,
        "kilobits_per_second": tokenizer.bandwidth,
        **quality,
    }
    line = (
        f"{path}: {values['seconds']:.2f} s, {positions} tokens of {codebooks} codes "
        f"({tokenizer.bandwidth:.3g} kbit/s), SI-SDR {quality['si_sdr']:.1f} dB, SNR {quality['snr']:.1f} dB"
    )
    show(arguments, values, line)


def _beside(file: Path, what: str, ending: str) -> Path:
    return file.with_name(f"{file.stem}-{what}{ending}")


def _tokenizer_and_decoder(arguments: argparse.Namespace) -> tuple[Tokenizer, Callable[[Codes], Any] | None]:
    """The tokenizer that is asked for, and what draws its codes (None: itself)."""
    from lexel.sample.bundle import load_tokenizer_of, read_json
    from lexel.sample.reconstruct import drawer
    from lexel.tokenizers.sound import SoundTokenizer

    detokenizer: Detokenizer | None
    if arguments.detokenizer == "":
        if arguments.tokenizer or arguments.checkpoint:
            raise LexelError(
                "--detokenizer without a name is the bundle's, which knows the bundle's own tokenizer only; "
                "leave --tokenizer out, or name a detokenizer."
            )
        pipe = load_pipeline(arguments)
        if pipe.detokenizer is None:
            raise LexelError("this bundle has no detokenizer; leave it off, or train one and add it.")
        tokenizer, detokenizer = pipe.tokenizer, pipe.detokenizer
    else:
        device = find_device(arguments.device)
        tokenizer = load_tokenizer_of(
            arguments.tokenizer,
            bundle=arguments.bundle,
            checkpoint=arguments.checkpoint,
            config=read_json(arguments.config) if arguments.config else None,
        ).to(device)
        detokenizer = _detokenizer(arguments)
        detokenizer = None if detokenizer is None else detokenizer.to(device)
    options = {"steps": arguments.steps, "guidance": arguments.guidance}
    if isinstance(tokenizer, SoundTokenizer):
        if detokenizer is not None or any(value is not None for value in options.values()):
            raise LexelError(
                "this tokenizer makes sounds; --detokenizer, --steps and --guidance draw pictures."
            )
        return tokenizer, None
    return tokenizer, drawer(tokenizer, detokenizer, seed=arguments.seed, **options)


def _detokenizer(arguments: argparse.Namespace) -> Detokenizer | None:
    """The one that --detokenizer names."""
    from lexel.models.detokenizers import from_pretrained, list_published, load_published

    if arguments.detokenizer is None:
        return None
    if arguments.detokenizer in {row.name for row in list_published()}:
        return load_published(arguments.detokenizer, arguments.detokenizer_checkpoint)
    if arguments.detokenizer_checkpoint is not None:
        raise LexelError("--detokenizer-checkpoint needs the name of a published detokenizer.")
    return from_pretrained(arguments.detokenizer)
