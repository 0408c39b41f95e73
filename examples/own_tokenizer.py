"""A tokenizer of one's own: linear patches around one of Lexel's quantizers (docs/tokenizers.md trains it).

python examples/own_tokenizer.py --out outputs/own
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from lexel.data import ShapesConfig
from lexel.tokenizers import from_pretrained, register
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.types import Codes, TokenizerOutput


@dataclass(frozen=True)
class PatchConfig:
    image_size: int = 32
    patch: int = 4
    dim: int = 16
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def build(self) -> "PatchTokenizer":
        return PatchTokenizer(self)


@register
class PatchTokenizer(Tokenizer):
    model_type, config_class = "patch", PatchConfig

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        side = config.image_size // config.patch
        self.config, self.image_size = config, (config.image_size, config.image_size)
        self.layout = CodeLayout(config.quantizer.codebook_sizes, grid=(side, side))
        self.encoder = nn.Conv2d(3, config.dim, config.patch, config.patch)
        self.quantize = config.quantizer.build(config.dim)
        self.decoder = nn.ConvTranspose2d(config.dim, 3, config.patch, config.patch)

    def forward(
        self, pixels: Tensor, *, quantize: bool = True, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        latents = self._latents(pixels)
        output = self.quantize(latents, quantize)
        codes = Codes(output.indices, self.layout.grid)
        return TokenizerOutput(self._decode(output.quantized, codes), codes, output, latents)

    def embed(self, codes: Codes) -> Tensor:
        return self.quantize.decode(codes.indices)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.weight

    def _latents(self, pixels: Tensor) -> Tensor:
        return rearrange(self.encoder(pixels), "b d h w -> b (h w) d")

    def _encode(self, pixels: Tensor, length: int | None) -> Codes:
        return Codes(self.quantize.encode(self._latents(pixels)), self.layout.grid)

    def _decode(self, latents: Tensor, codes: Codes) -> Tensor:
        return self.decoder(rearrange(latents, "b (h w) d -> b d h w", h=self.layout.grid[0]))

    def _check_size(self, pixels: Tensor) -> None:
        if tuple(pixels.shape[2:]) != self.image_size:
            raise ValueError(f"pictures must be {self.image_size}, got {tuple(pixels.shape[2:])}.")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/own"))
    out = parser.parse_args(argv).out
    tokenizer = PatchConfig().build().eval()
    pixels = ShapesConfig(size=32).build("train")[0].pixels[None]
    codes = tokenizer.encode(pixels)
    tokenizer.save_pretrained(out)
    same = from_pretrained(out).decode(codes).equal(tokenizer.decode(codes))
    print(f"{codes.indices.shape[1]} codes, equal after loading: {same}")


if __name__ == "__main__":
    main()
