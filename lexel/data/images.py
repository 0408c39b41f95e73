"""Reading pictures that may be anything, safely, into pixels; and pixels back into pictures.

h w height and width
"""

from __future__ import annotations

import io
import math
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lexel.errors import LexelError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# Only these decoders ever run: Pillow would otherwise also start outside programs (EPS → Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 64_000_000
"""Pictures with more pixels than this are refused before they are decoded."""

_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
)


def load_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """A picture file (or its bytes) as an upright RGB picture; transparency is laid on white.

    `name` is what messages call it. Raises LexelError with one sentence for a missing file, a folder,
    something that is no picture, a truncated or damaged one, and one with more than `MAX_PIXELS` pixels.
    """
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    try:
        with _open(source, name) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except _BROKEN as error:
        raise LexelError(f"{name} cannot be read as a picture: {_reason(error)}.") from error


def load_frames(path: str | Path) -> Iterator[tuple[Image.Image, float, float]]:
    """The frames of an animated picture (GIF) one by one, as `load_image` gives pictures, and from when until
    when each is shown, in seconds. Raises LexelError as `load_image` does."""
    try:
        with _open(path, str(path)) as file:
            time = 0.0
            for number in range(getattr(file, "n_frames", 1)):
                file.seek(number)
                file.load()
                until = time + (file.info.get("duration") or 100) / 1000  # what browsers do without one
                yield _to_rgb(file.copy()), time, until
                time = until
    except _BROKEN as error:
        raise LexelError(f"{path} cannot be read as a picture: {_reason(error)}.") from error


def verify_image(source: str | Path | bytes, name: str | None = None) -> None:
    """Read a picture to its last byte without keeping it; raises LexelError exactly like `load_image`.

    JPEGs are decoded at an eighth of their size, which finds truncation in a fraction of the time.
    """
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    try:
        with _open(source, name) as image:
            image.draft("RGB", (1, 1))
            image.load()
    except _BROKEN as error:
        raise LexelError(f"{name} cannot be read as a picture: {_reason(error)}.") from error


def to_pixels(image: Image.Image, size: int | tuple[int, int]) -> Tensor:
    """Float ``[3, h, w]`` in [-1, 1]: the largest centred part with the wanted proportions, scaled (bicubic).

    size: ``(h, w)``, or one number for a square: then the shorter side is resized to it and the longer
    cropped.
    """
    height, width = (size, size) if isinstance(size, int) else size
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    array = torch.from_numpy(np.array(fitted, dtype=np.uint8))
    return array.permute(2, 0, 1).contiguous().float() / 127.5 - 1


def on_square(image: Image.Image, size: tuple[int, int], colour: tuple[int, int, int]) -> Tensor:
    """Float ``[3, h, w]`` in [-1, 1]: the whole picture in the middle of a square of one colour, scaled
    (Lanczos), as Liquid reads pictures."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    height, width = size
    array = torch.from_numpy(np.array(square.resize((width, height), Image.Resampling.LANCZOS)))
    return array.permute(2, 0, 1).contiguous().float() / 127.5 - 1


def varied_pixels(
    image: Image.Image, size: int | tuple[int, int], crop: float, flip: bool, seed: int
) -> Tensor:
    """Float ``[3, h, w]`` in [-1, 1]: a random part of the picture, mirrored half of the time if `flip`.

    With crop < 1 the shorter side is resized to a random number of pixels between that of `size` and 1 / crop
    times as many (halved by averaging as often as possible, then bicubic) and a window of `size` is cut at a
    random place, as in ADM (openai/guided-diffusion) and LlamaGen; with crop 1 it is the centre, as in
    `to_pixels`. Everything random follows from `seed`.
    """
    rng = random.Random(seed)
    height, width = (size, size) if isinstance(size, int) else size
    if crop < 1:
        # The shorter side when the window just fits, then the drawn one.
        least = round(max(height / image.height, width / image.width) * min(image.size))
        shorter = rng.randint(least, math.ceil(least / crop))
        while min(image.size) >= 2 * shorter:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = shorter / min(image.size)
        scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(scaled, Image.Resampling.BICUBIC)
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
    pixels = to_pixels(image, (height, width))
    return pixels.flip(-1) if flip and rng.random() < 0.5 else pixels


def read_pixels(source: str | Path | bytes, size: int | tuple[int, int], name: str | None = None) -> Tensor:
    """`load_image`, then `to_pixels`."""
    return to_pixels(load_image(source, name), size)


def to_image(pixels: Tensor) -> Image.Image:
    """Float ``[3, h, w]`` in about [-1, 1] → an 8-bit RGB picture; values outside are clipped."""
    scaled = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(scaled.permute(1, 2, 0).numpy())


def _open(source: str | Path | bytes, name: str) -> Image.Image:
    """Open without decoding. Pillow warns from 89 million pixels on and fails at twice that; our limit is
    lower."""
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise LexelError(f"{name} is refused: more than {MAX_PIXELS} pixels; scale it down.") from error
    except FileNotFoundError:
        raise LexelError(f"{name} does not exist.") from None
    except IsADirectoryError:
        raise LexelError(f"{name} is a folder, not a picture.") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise LexelError(
            f"{name} is refused: {width}x{height} is more than {MAX_PIXELS} pixels; scale it down."
        )
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit greys: Pillow would clip them to white instead of scaling.
        grey = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((grey / 257 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not one of {', '.join(_FORMATS)}"
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
