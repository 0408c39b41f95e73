"""Flexible 1D tokenizer: a picture as a line of codes of which any prefix decodes.

TiTok (arXiv 2406.07550, bytedance/1d-tokenizer, Apache-2.0) in its direct-RGB form, with One-D-Piece's tail
token drop (arXiv 2501.10064): in training the quantized latents are cut to a random length after the
quantizer, so early codes learn to carry the whole picture and later ones detail. Nothing is padded: the
decoder's sequence gets shorter. Module names are TiTok's; weights start from torch's defaults (TiTok's fixed
standard deviation of 0.02 leaves narrow networks at the mean picture for hundreds of steps).

b batch · n codes · N their maximum · d latent width
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lexel.nn.vit import LatentDecoder, LatentEncoder
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.types import Codes, TokenizerOutput


@dataclass(frozen=True)
class FlexibleTokenizerConfig:
    """image_size, patch: picture and patch side in pixels. latents: N, the longest code.
    width, layers, heads: of both transformers unless `decoder_*` say otherwise (0: the same).
    token_size: width of the quantized latents.
    tail_drop: what draws the length in training: `batch` (one per call, as published), `sample` (one per
    picture) or `none`.
    Raises ValueError when image_size is no multiple of patch, or tail_drop is unknown.
    """

    image_size: int = 256
    patch: int = 16
    latents: int = 128
    width: int = 512
    layers: int = 8
    heads: int = 8
    decoder_width: int = 0
    decoder_layers: int = 0
    decoder_heads: int = 0
    token_size: int = 12
    tail_drop: str = "batch"
    quantizer: QuantizerConfig = field(default_factory=lambda: QuantizerConfig(codebook_size=4096))

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch {self.patch}.")
        if self.tail_drop not in ("batch", "sample", "none"):
            raise ValueError(f"tail_drop must be batch, sample or none, got {self.tail_drop!r}.")

    def build(self) -> FlexibleTokenizer:
        """The tokenizer with fresh weights."""
        return FlexibleTokenizer(self)


class FlexibleTokenizer(Tokenizer):
    """See the module docstring. ``encode: [b, 3, h, w] -> Codes [b, N, k]`` with `lengths`."""

    model_type: ClassVar[str] = "flexible"
    config_class: ClassVar[type] = FlexibleTokenizerConfig
    config: FlexibleTokenizerConfig

    def __init__(self, config: FlexibleTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = (config.image_size, config.image_size)
        self.layout = CodeLayout(
            config.quantizer.codebook_sizes, length=config.latents, flexible=config.tail_drop != "none"
        )
        size, patch, latents, token = config.image_size, config.patch, config.latents, config.token_size
        self.encoder = LatentEncoder(size, patch, config.width, config.layers, config.heads, latents, token)
        self.latent_tokens = nn.Parameter(config.width**-0.5 * torch.randn(latents, config.width))
        self.quantize = config.quantizer.build(token)
        self.decoder = LatentDecoder(
            size,
            patch,
            config.decoder_width or config.width,
            config.decoder_layers or config.layers,
            config.decoder_heads or config.heads,
            latents,
            token,
        )

    @property
    def last_layer(self) -> nn.Parameter:
        """See `Tokenizer.last_layer`."""
        return cast(nn.Parameter, self.decoder.conv_out.weight)

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """See `Tokenizer.forward`. In training mode, lengths are drawn uniformly from 1..N. The quantizer
        sees all N latents whatever is dropped."""
        latents = self._latents(pixels)
        output = self.quantize(latents, quantize)
        lengths = self._draw_lengths(len(pixels), generator).to(pixels.device)
        codes = Codes(output.indices, lengths=lengths if self.layout.flexible else None)
        return TokenizerOutput(self._decode(output.quantized, codes), codes, output, latents)

    def embed(self, codes: Codes) -> Tensor:
        """See `Tokenizer.embed`; positions beyond a row's length are embedded like any code and ignored by
        `decode`."""
        return self.quantize.decode(codes.indices)

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        indices = self.quantize.encode(self._latents(pixels).float())
        if not self.layout.flexible:
            return Codes(indices)
        return Codes(indices, lengths=indices.new_full((len(pixels),), self.layout_length(length)))

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        lengths = codes.lengths
        if lengths is not None:
            longest = int(lengths.max())
            latents = latents[:, :longest]
            lengths = None if bool((lengths == longest).all()) else lengths
        # The published network works in [0, 1].
        return self.decoder(latents, lengths) * 2 - 1

    def _latents(self, pixels: Tensor) -> Tensor:
        return self.encoder((pixels + 1) / 2, self.latent_tokens)

    def _draw_lengths(self, count: int, generator: torch.Generator | None) -> Tensor:
        full, kind = self.config.latents, self.config.tail_drop
        if not self.training or kind == "none":
            return torch.full((count,), full)
        # On the generator's own device, CPU by default: the same draw whatever the pixels' device.
        device = "cpu" if generator is None else generator.device
        draws = 1 if kind == "batch" else count
        return torch.randint(1, full + 1, (draws,), generator=generator, device=device).expand(count)

    def _check_size(self, pixels: Tensor) -> None:
        if tuple(pixels.shape[2:]) != self.image_size:
            raise ValueError(f"pictures must be {self.image_size}, got {tuple(pixels.shape[2:])}.")
