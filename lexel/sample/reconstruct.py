"""Pictures, clips and sounds through any tokenizer and back, and such pictures side by side.

h w picture · t frames of a clip, or samples of a sound
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image as PictureFile
from PIL import ImageDraw, ImageFont
from torch import Tensor

from lexel.data.images import to_image
from lexel.errors import LexelError
from lexel.models.detokenizers.base import Detokenizer
from lexel.sample.detokenize import detokenize
from lexel.tokenizers.base import Tokenizer, VideoTokenizer, needs_detokenizer
from lexel.tokenizers.sound import SoundTokenizer
from lexel.types import Codes

SIDE = 256
"""Pictures smaller than this are shown enlarged, pixel by pixel."""

MARGIN, LINE = 10, 18


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer,
    pixels: Tensor,
    tokens: int | None = None,
    decode: Callable[[Codes], Tensor] | None = None,
) -> tuple[Tensor, Codes]:
    """A picture ``[3, h, w]`` in [-1, 1] at the tokenizer's size, through `tokens` tokens (None: all) and
    back, on the CPU, and its codes. decode: what draws the codes, the tokenizer itself unless told otherwise.
    Raises LexelError when the tokenizer cannot make that many tokens, or cannot draw at all."""
    check_draws(tokenizer, decode)
    device = next(tokenizer.parameters()).device
    layout = tokenizer.layout
    if tokens is not None and tokens not in layout.lengths:
        raise LexelError(
            f"this tokenizer writes {layout.described_lengths} tokens per picture, {tokens} were asked for."
        )
    codes = tokenizer.encode(pixels[None].to(device), tokens)
    return (decode or tokenizer.decode)(codes)[0].clamp(-1, 1).cpu(), codes.to("cpu")


@torch.no_grad()
def reconstruct_clip(
    tokenizer: Tokenizer,
    video: Tensor,
    tokens: int | None = None,
    decode: Callable[[Codes], Tensor] | None = None,
) -> tuple[Tensor, int]:
    """A clip ``[t, 3, h, w]`` in [-1, 1] through a tokenizer and back, on the CPU, and the tokens in all.

    Tokenizers of clips get as many frames at once as they take (frames at the end that fill no piece are left
    out), tokenizers of pictures frame by frame, each through `tokens` tokens, drawn by `decode`.
    Raises LexelError for a clip that is too short, for options of pictures with a tokenizer of clips, and as
    `reconstruct` does."""
    if not isinstance(tokenizer, VideoTokenizer):
        frames = [reconstruct(tokenizer, frame, tokens, decode) for frame in video]
        return torch.stack([frame for frame, _ in frames]), sum(token_count(codes) for _, codes in frames)
    if tokens is not None or decode is not None:
        raise LexelError("a tokenizer of clips takes no number of tokens and no detokenizer.")
    device = next(tokenizer.parameters()).device
    pieces, count, begun = [], 0, 0
    while used := tokenizer.usable_frames(len(video) - begun):
        codes = tokenizer.encode_video(video[None, begun : begun + used].to(device))
        pieces.append(tokenizer.decode_video(codes)[0].clamp(-1, 1).cpu())
        count, begun = count + codes.indices.shape[1], begun + used
    if not pieces:
        raise LexelError(f"a clip of {len(video)} frame(s) is too short for {type(tokenizer).__name__}.")
    return torch.cat(pieces), count


@torch.no_grad()
def reconstruct_sound(tokenizer: SoundTokenizer, wave: Tensor) -> tuple[Tensor, Codes]:
    """A sound ``[1, t]`` in [-1, 1] at the tokenizer's rate through its codes and back, on the CPU and as
    long, and the codes."""
    device = next(tokenizer.parameters()).device
    codes = tokenizer.encode_sound(wave[None].to(device))
    found = tokenizer.decode_sound(codes)[0, :, : wave.shape[1]].clamp(-1, 1).cpu()
    return F.pad(found, (0, wave.shape[1] - found.shape[1])), codes.to("cpu")


def check_draws(tokenizer: Tokenizer, decode: Callable[[Codes], Tensor] | None = None) -> None:
    """Raises LexelError for a tokenizer that cannot draw where nothing else does."""
    if decode is None and not tokenizer.has_decoder:
        raise LexelError(f"this {type(tokenizer).__name__} holds an encoder alone; it cannot draw.")
    if decode is None and not tokenizer.draws_pixels:
        raise needs_detokenizer(tokenizer)


def drawer(
    tokenizer: Tokenizer,
    detokenizer: Detokenizer | None = None,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
) -> Callable[[Codes], Tensor] | None:
    """What draws the tokenizer's codes: `detokenizer` where one is given, else the tokenizer's own decoder.

    steps, guidance: of their sampler (None: its own); seed: of its noise (None: always the same). None is
    returned for a tokenizer's own decoder without options. Raises LexelError for options of a decoder that
    draws in one step."""
    sampler: dict[str, Any] = {"steps": steps, "guidance": guidance}
    options = {name: value for name, value in sampler.items() if value is not None}
    if detokenizer is None and not tokenizer.decodes_in_steps:
        if options:
            raise LexelError(
                f"{type(tokenizer).__name__} draws in one pass; it takes no {next(iter(options))}."
            )
        return None
    if detokenizer is None and not options and seed is None:
        return None
    decode: Callable[..., Tensor] = tokenizer.decode
    if detokenizer is not None:
        decode = partial(detokenize, tokenizer, detokenizer)

    def draw(codes: Codes) -> Tensor:
        if detokenizer is None and seed is None:  # such decoders have a noise of their own
            return decode(codes, **options)
        generator = torch.Generator(codes.indices.device).manual_seed(seed or 0)
        return decode(codes, generator=generator, **options)

    return draw


def token_count(codes: Codes) -> int:
    """Positions that the codes of one picture use."""
    if codes.lengths is not None:
        return int(codes.lengths[0])
    return codes.indices.shape[1] if codes.keep is None else int(codes.keep[0].sum())


def enlarged(picture: PictureFile.Image) -> PictureFile.Image:
    """The picture with every pixel repeated until its longer side is about `SIDE`."""
    factor = max(1, SIDE // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), PictureFile.Resampling.NEAREST)


def picture_strip(pictures: Sequence[Tensor], labels: Sequence[str]) -> PictureFile.Image:
    """Pictures ``[3, h, w]`` in [-1, 1], enlarged where small, side by side on white, each with its label
    (lines separated by newlines) below."""
    shown = [enlarged(to_image(pixels)) for pixels in pictures]
    width, height = max(one.width for one in shown), max(one.height for one in shown)
    lines = max(label.count("\n") + 1 for label in labels)
    size = (MARGIN + len(shown) * (width + MARGIN), height + 2 * MARGIN + lines * LINE)
    strip = PictureFile.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(14)
    for number, (picture, label) in enumerate(zip(shown, labels, strict=True)):
        left = MARGIN + number * (width + MARGIN)
        strip.paste(picture, (left, MARGIN))
        place = (left + width / 2, MARGIN + height + MARGIN / 2)
        draw.multiline_text(place, label, fill="black", font=font, anchor="ma", align="center")
    return strip
