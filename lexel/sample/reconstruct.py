"""Pictures through any tokenizer and back, and such pictures side by side.

h w picture
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image as PictureFile
from PIL import ImageDraw, ImageFont
from torch import Tensor

from lexel.data.images import to_image
from lexel.errors import LexelError
from lexel.tokenizers.base import Tokenizer
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
    if decode is None and not tokenizer.has_decoder:
        raise LexelError(f"this {type(tokenizer).__name__} holds an encoder alone; it cannot draw.")
    device = next(tokenizer.parameters()).device
    codes = tokenizer.encode(pixels[None].to(device), _length(tokenizer, tokens))
    return (decode or tokenizer.decode)(codes)[0].clamp(-1, 1).cpu(), codes.to("cpu")


def _length(tokenizer: Tokenizer, tokens: int | None) -> int | None:
    """What `Tokenizer.encode` wants to hear."""
    layout = tokenizer.layout
    if tokens is None or (not layout.flexible and tokens == layout.positions):
        return None
    if layout.flexible and 1 <= tokens <= layout.positions:
        return tokens
    able = f"1 to {layout.positions}" if layout.flexible else f"always {layout.positions}"
    raise LexelError(f"this tokenizer writes {able} tokens per picture, {tokens} were asked for.")


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
