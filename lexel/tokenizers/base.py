"""What every tokenizer satisfies: pixels to codes and back.

b batch · n positions · k codebooks per position · d latent width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lexel.errors import LexelError
from lexel.hub import Pretrained
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes, TokenizerOutput, check_pixels, check_video


class Tokenizer(nn.Module, Pretrained, ABC):
    """Base of all tokenizers. `layout` says how codes become a sequence, `image_size` is the trained (h, w).

    Laws: `encode` and `decode` are deterministic, and in eval mode a row of a batch equals that row alone.
    """

    layout: CodeLayout
    image_size: tuple[int, int]
    decodes_in_steps: ClassVar[bool] = False
    """Whether the decoder is a flow or diffusion model, whose `decode` takes `steps`."""

    @property
    def has_decoder(self) -> bool:
        """Whether it can draw; some published files hold an encoder alone."""
        return True

    @property
    def draws_pixels(self) -> bool:
        """Whether `decode` makes pictures. The codes of some tokenizers stand for features of a vision model
        (`decode_features`), which a detokenizer draws."""
        return self.has_decoder

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes per codebook."""
        return self.layout.codebook_sizes

    @torch.no_grad()
    def encode(self, pixels: Tensor, length: int | None = None) -> Codes:
        """Float ``[b, 3, h, w]`` in [-1, 1] to codes. `length` (flexible and multi-scale tokenizers) keeps
        that many positions, see `CodeLayout.lengths`. Raises ValueError on a wrong shape, size or length."""
        self._check_size(check_pixels(pixels))
        self.layout_length(length)
        return self._encode(pixels, length)

    @torch.no_grad()
    def decode(self, codes: Codes) -> Tensor:
        """Codes to float ``[b, 3, h, w]`` in about [-1, 1] (not clamped)."""
        return self._decode(self.embed(codes), codes)

    def decode_features(self, codes: Codes) -> Tensor:
        """Codes to the features ``[b, m, f]`` that they stand for, which a detokenizer of features draws.
        Raises LexelError for a tokenizer of pixels alone."""
        raise LexelError(f"codes of {type(self).__name__} stand for no features; use embed or decode.")

    def understand(self, pixels: Tensor) -> Tensor:
        """Pixels to continuous features ``[b, n, d]`` for a language model that reads pictures unrounded.
        Raises LexelError for a tokenizer that has no such path."""
        raise LexelError(f"{type(self).__name__} has no continuous features; use encode and embed.")

    def layout_length(self, length: int | None) -> int:
        """`length`, or every position when None. Raises ValueError when this tokenizer cannot have it."""
        if length is None or length in self.layout.lengths:
            return self.layout.positions if length is None else length
        what = f"{self.layout.described_lengths} codes"
        raise ValueError(f"{type(self).__name__} makes {what}, length={length} was asked for.")

    @abstractmethod
    def embed(self, codes: Codes) -> Tensor:
        """Codes to quantized latents ``[b, n, d]``: what relaxed acceptance measures distance in."""

    @abstractmethod
    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """Training pass. `quantize=False` skips the rounding (a start-up phase that lets encoder and decoder
        find colours first, while codebooks already follow the latents); `generator` draws dropped lengths.
        """

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's last convolution, for the adaptive adversarial weight."""

    def no_pixels(self) -> LexelError:
        """Why it draws no pictures, and what does."""
        return LexelError(
            f"codes of {type(self).__name__} stand for features, not pixels; draw them with a detokenizer "
            "(lexel reconstruct --detokenizer, lexel.models.detokenizers)."
        )

    @abstractmethod
    def _encode(self, pixels: Tensor, length: int | None) -> Codes: ...

    @abstractmethod
    def _decode(self, latents: Tensor, codes: Codes) -> Tensor: ...

    @abstractmethod
    def _check_size(self, pixels: Tensor) -> None: ...


def needs_detokenizer(tokenizer: Tokenizer) -> LexelError:
    """The error of a tokenizer that is asked for pixels and has none."""
    return tokenizer.no_pixels()


class VideoTokenizer(Tokenizer):
    """A tokenizer of clips too. `encode` and `decode` handle single pictures, the methods here whole clips;
    codes of a clip have `Codes.frames` set, and on a grid run through time first: ``n = frames * h * w``."""

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Codes:
        """Float ``[b, t, 3, h, w]`` in [-1, 1] to codes. Raises ValueError on a wrong shape or a number of
        frames that the network cannot take."""
        return self._encode_video(check_video(video))

    @torch.no_grad()
    def decode_video(self, codes: Codes) -> Tensor:
        """Codes with `frames` to float ``[b, t, 3, h, w]`` in about [-1, 1] (not clamped)."""
        if codes.frames is None:
            raise ValueError("these codes are of a picture (Codes.frames is None); use decode.")
        return self._decode_video(self.embed(codes), codes)

    @abstractmethod
    def usable_frames(self, frames: int) -> int:
        """Of a clip of so many frames, how many `encode_video` takes at once, from the first; 0: too few."""

    @abstractmethod
    def _encode_video(self, video: Tensor) -> Codes: ...

    @abstractmethod
    def _decode_video(self, latents: Tensor, codes: Codes) -> Tensor: ...
