"""IBQ's tokenizer against recorded numbers.

b batch · c channels · h w grid · n = h*w positions · K codebook size
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from lexel.tokenizers import find_published, load_published
from lexel.tokenizers.ibq import IBQTokenizer
from lexel.tokenizers.quantizers.ibq import IndexBackpropagation
from lexel.tokenizers.quantizers.learned import assignment_entropies
from lexel.verify.fixture import Fixture


def ibq(fixture: Fixture) -> dict[str, Tensor]:
    """Both copies of the weights, and the losses."""
    path, row = fixture.weights(), "ibq-262144"
    arguments = find_published(row)[0].known(fixture.config["args"])
    pixels = fixture.input("image")
    ours: dict[str, Tensor] = {}
    for key, suffix in ((None, ""), ("raw", "_raw")):
        model = cast(IBQTokenizer, load_published(row, path, arguments, key))
        ours |= {name + suffix: value for name, value in tokenizer_tensors(model, pixels).items()}
        if not suffix:
            ours |= training_tensors(model, pixels)
    return ours


@torch.no_grad()
def tokenizer_tensors(model: IBQTokenizer, pixels: Tensor) -> dict[str, Tensor]:
    """`latent` and `quant` ``[b, c, h, w]``, `indices` ``[b, h, w]``, `logits` ``[b, h, w, K]`` and
    `recon`, not clamped."""
    latent = model.quant_conv(model.encoder(pixels))
    codes = model.encode(pixels)
    h = latent.shape[2]
    return {
        "latent": latent,
        "logits": cast(IndexBackpropagation, model.quantize).logits(rearrange(latent, "b c h w -> b h w c")),
        "indices": rearrange(codes.indices, "b (h w) 1 -> b h w", h=h),
        "quant": rearrange(model.embed(codes), "b (h w) c -> b c h w", h=h),
        "recon": model.decode(codes),
    }


@torch.no_grad()
def training_tensors(model: IBQTokenizer, pixels: Tensor) -> dict[str, Tensor]:
    """The quantizer's losses in training mode, without their weights in the objective. The network stays in
    eval mode, where its dropout is off."""
    settings, quantizer = model.config.quantizer, cast(IndexBackpropagation, model.quantize)
    latents = rearrange(model.quant_conv(model.encoder(pixels)), "b c h w -> b (h w) c")
    losses = quantizer.train()(latents).losses
    quantizer.eval()
    logits = rearrange(quantizer.logits(latents), "b n k -> (b n) k")
    each, mean = assignment_entropies(logits, settings.temperature)
    found = {
        "quant_loss": losses["quantized"] + losses["commitment"] + losses["codebook"],
        "per_sample_entropy": each,
        "codebook_entropy": mean,
    }
    if settings.entropy:
        found["entropy_loss"] = losses["entropy"] / settings.entropy
    return found
