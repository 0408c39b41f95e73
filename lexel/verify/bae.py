"""ELM's binary autoencoder against recorded numbers.

b batch · c bits · d latent width · h w grid · n = h*w positions · k sub-codes
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from lexel.tokenizers import load_published
from lexel.tokenizers.bae import ARGUMENTS, BAETokenizer
from lexel.tokenizers.quantizers.bernoulli import Bernoulli, code_loss
from lexel.types import Codes
from lexel.verify.fixture import Fixture


@torch.no_grad()
def bae(fixture: Fixture) -> dict[str, Tensor]:
    """Probabilities, bits, codes whole and in parts, latents and pictures. Where the models draw their bits
    at random, the recorded draw is an input and all that follows from it is computed."""
    given = {**fixture.config, **fixture.config.get("args", {})}
    arguments = {name: given[name] for name in ARGUMENTS if name in given}
    model = cast(BAETokenizer, load_published("elm-bae-16", fixture.weights(), arguments))
    quantizer = cast(Bernoulli, model.quantize)

    image = fixture.input("image") * 2 - 1
    encoded = model.encoder((image + 1) / 2)
    latents = rearrange(encoded, "b d h w -> b (h w) d")
    h, w = encoded.shape[2:]
    codes = model.encode(image)
    if not quantizer.deterministic and "bits" in fixture:
        drawn = rearrange(fixture.input("bits"), "b c h w -> b (h w) c") > 0
        codes = Codes(quantizer.factorizer.from_bits(drawn), (h, w))
    bits = quantizer.factorizer.to_bits(codes.indices)
    maps = {
        "bit_probs": quantizer.probabilities(latents),
        "bits": bits * 2 - 1 if quantizer.tanh else bits,
        "quant": model.embed(codes),
    }
    return {
        "encoder_out": encoded,
        **{name: rearrange(value, "b (h w) c -> b c h w", h=h) for name, value in maps.items()},
        "sub_indices": codes.indices,
        "full_indices": quantizer.factorizer.merge(codes.indices)[..., 0],
        "code_loss": code_loss(quantizer.values(latents)),
        "recon": (model.decode(codes) + 1) / 2,
    }
