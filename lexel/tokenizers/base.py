"""What every tokenizer satisfies: pixels to codes and back.

b batch · n positions · k codebooks per position · d latent width
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lexel.hub import Pretrained
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes, TokenizerOutput, check_pixels, check_video


class Tokenizer(nn.Module, Pretrained, ABC):
    """Base of all tokenizers. `layout` says how codes become a sequence, `image_size` is the trained (h, w).

    Laws: `encode` and `decode` are deterministic, and in eval mode a row of a batch equals that row alone.
    """

    layout: CodeLayout
    image_size: tuple[int, int]

    @property
    def has_decoder(self) -> bool:
        """Whether it can draw; some published files hold an encoder alone."""
        return True

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes per codebook."""
        return self.layout.codebook_sizes

    @torch.no_grad()
    def encode(self, pixels: Tensor, length: int | None = None) -> Codes:
        """Float ``[b, 3, h, w]`` in [-1, 1] to codes. `length` (flexible tokenizers only) keeps that many
        positions. Raises ValueError on a wrong shape, size or length."""
        self._check_size(check_pixels(pixels))
        self.layout_length(length)
        return self._encode(pixels, length)

    @torch.no_grad()
    def decode(self, codes: Codes) -> Tensor:
        """Codes to float ``[b, 3, h, w]`` in about [-1, 1] (not clamped)."""
        return self._decode(self.embed(codes), codes)

    def layout_length(self, length: int | None) -> int:
        """`length`, or every position when None. Raises ValueError when this tokenizer cannot have it."""
        full = self.layout.positions
        if length is None or (self.layout.flexible and 1 <= length <= full):
            return full if length is None else length
        what = f"between 1 and {full} codes" if self.layout.flexible else f"always {full} codes"
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

    @abstractmethod
    def _encode(self, pixels: Tensor, length: int | None) -> Codes: ...

    @abstractmethod
    def _decode(self, latents: Tensor, codes: Codes) -> Tensor: ...

    @abstractmethod
    def _check_size(self, pixels: Tensor) -> None: ...


class VideoTokenizer(Tokenizer):
    """A tokenizer of clips too. `encode` and `decode` handle single pictures, the methods here whole clips;
    codes of a clip run through time first: ``n = frames * h * w``, `Codes.frames` set."""

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
    def _encode_video(self, video: Tensor) -> Codes: ...

    @abstractmethod
    def _decode_video(self, latents: Tensor, codes: Codes) -> Tensor: ...
