"""Open-MAGVIT2's picture and clip tokenizers against recorded numbers.

b batch · d bits · k groups · t latent frames · h w grid
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from lexel.tokenizers import find_published, load_published
from lexel.tokenizers.factorizer import CodeFactorizer
from lexel.tokenizers.open_magvit2 import OpenMagvit2, OpenMagvit2Video
from lexel.tokenizers.quantizers.sign import Sign, sign_entropies
from lexel.verify.fixture import Fixture


def image(fixture: Fixture) -> dict[str, Tensor]:
    """Both copies of the weights, the sub-codes and the losses."""
    path, row, config = fixture.weights(), "open-magvit2-256", fixture.config
    arguments = find_published(row)[0].known(config["args"])
    factorized = arguments if arguments.get("token_factorization") else config
    pixels = fixture.input("image")
    ours: dict[str, Tensor] = {}
    for key, suffix in ((None, ""), ("raw", "_raw")):
        model = cast(OpenMagvit2, load_published(row, path, arguments, key))
        found = tokenizer_tensors(model, pixels)
        if not suffix:
            ours |= training_tensors(model, pixels)
            if "factorized_bits" in factorized:
                factorizer = CodeFactorizer(tuple(factorized["factorized_bits"]), msb_first=False)
                parts = factorizer.split(found["indices"][..., None])
                ours |= {"indices_pre": parts[..., 0], "indices_post": parts[..., 1]}
        ours |= {name + suffix: value for name, value in found.items()}
    return ours


@torch.no_grad()
def tokenizer_tensors(model: OpenMagvit2, pixels: Tensor) -> dict[str, Tensor]:
    """`latent` and `quant` ``[b, d, h, w]``, whole `indices` ``[b, h, w]`` and `recon`, not clamped."""
    latent = model.encoder(pixels)
    codes = model.encode(pixels)
    whole = cast(Sign, model.quantize).factorizer.merge(codes.indices)
    h = latent.shape[2]
    return {
        "latent": latent,
        "indices": rearrange(whole, "b (h w) 1 -> b h w", h=h),
        "quant": rearrange(model.embed(codes), "b (h w) d -> b d h w", h=h),
        "recon": model.decode(codes),
    }


def training_tensors(model: OpenMagvit2, pixels: Tensor) -> dict[str, Tensor]:
    """The quantizer's losses in training mode, without their weights in the objective."""
    settings = model.config.quantizer
    output = model.train()(pixels)
    model.eval()
    losses = output.quantizer.losses
    each, mean = sign_entropies(output.latents, settings.temperature)
    return {
        "commit_loss": losses["commitment"] / settings.commitment,
        "entropy_aux_loss": losses["entropy"] / settings.entropy,
        "per_sample_entropy": each,
        "codebook_entropy": mean,
    }


@torch.no_grad()
def video(fixture: Fixture) -> dict[str, Tensor]:
    """Codes, latents and the decoded clip, in the reference's order ``[b, c, t, h, w]``."""
    path, row = fixture.weights(), "open-magvit2-video"
    arguments = find_published(row)[0].known(fixture.config["args"])
    model = cast(OpenMagvit2Video, load_published(row, path, arguments))
    clip = fixture.input("video")
    latent = model.encoder(clip)
    codes = model.encode_video(rearrange(clip, "b c t h w -> b t c h w"))
    t, h = latent.shape[2:4]
    return {
        "latent": latent,
        "indices": rearrange(codes.indices, "b (t h w) 1 -> b t h w", t=t, h=h),
        "quant": rearrange(model.embed(codes), "b (t h w) d -> b d t h w", t=t, h=h),
        "recon": rearrange(model.decode_video(codes), "b t c h w -> b c t h w"),
    }
