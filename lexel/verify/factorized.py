"""FQGAN's tokenizers against recorded numbers.

b batch · d latent width · h w grid · n = h*w positions · f feature width
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lexel.tokenizers import find_published, load_published
from lexel.tokenizers.factorized import FactorizedTokenizer
from lexel.tokenizers.quantizers.learned import Learned
from lexel.train.objectives.tokenizer import info_nce
from lexel.types import Codes
from lexel.verify.fixture import Fixture


def dual(fixture: Fixture) -> dict[str, Tensor]:
    """Branches vis and sem."""
    return fqgan(fixture, "fqgan-dual-16")


def triple(fixture: Fixture) -> dict[str, Tensor]:
    """Branches vis, sem_mid and sem_high."""
    return fqgan(fixture, "fqgan-triple-16")


def fqgan(fixture: Fixture, row: str) -> dict[str, Tensor]:
    """Codes, latents, pictures, features, losses and gradients of the tokenizer."""
    config, system = fixture.config, find_published(row)[0]
    arguments = {name: config[name] for name in system.arguments if name in config}
    path = fixture.weights()
    model = cast(FactorizedTokenizer, load_published(row, path, arguments, config.get("use_key")))
    image = fixture.input("image")
    ours = branch_tensors(model, image) | feature_tensors(model, image, fixture)
    codes = model.encode(image)
    with torch.no_grad():
        ours["recon"] = model(image).reconstruction
    ours["decoded"] = model.decode(codes)
    if f"random_indices_{model.branch_names[0]}" in fixture:
        given = [fixture.input(f"random_indices_{branch}") for branch in model.branch_names]
        ours["random_decoded"] = model.decode(Codes(torch.stack(given, dim=-1), codes.grid))
    return ours | training_tensors(model, image)


@torch.no_grad()
def branch_tensors(model: FactorizedTokenizer, image: Tensor) -> dict[str, Tensor]:
    """Per branch: `encoder_out`, `latent` (after quant_conv) and `quant`, all ``[b, d, h, w]``, and `indices`
    ``[b, n]``; losses of the codebooks in training mode."""
    latents, (h, _) = model.branch_latents(image)
    codes = model.encode(image)
    ours: dict[str, Tensor] = {}
    for column, (branch, encoded) in enumerate(zip(model.branch_names, model.encoder(image), strict=True)):
        quantizer, latent = model.quantizer(branch), latents[branch]
        ours[f"encoder_out_{branch}"] = encoded
        ours[f"latent_{branch}"] = rearrange(latent, "b (h w) d -> b d h w", h=h)
        ours[f"indices_{branch}"] = codes.indices[..., column]
        ours[f"quant_{branch}"] = rearrange(quantizer(latent).quantized, "b (h w) d -> b d h w", h=h)
        losses = quantizer.train()(latent).losses
        quantizer.eval()
        ours[f"train_vq_loss_{branch}"] = losses["codebook"]
        ours[f"train_commit_loss_{branch}"] = losses["commitment"]
        ours[f"train_entropy_loss_{branch}"] = losses.get("entropy", torch.zeros(()))
    return ours


@torch.no_grad()
def feature_tensors(model: FactorizedTokenizer, image: Tensor, fixture: Fixture) -> dict[str, Tensor]:
    """What the feature heads predict, ``[b, 1 + n, f]``, and the loss against given targets ``[b, f]``."""
    ours: dict[str, Tensor] = {}
    for branch, tokens in model(image).features.items():
        name = f"semantic_feat{branch.removeprefix('sem')}"
        ours[name] = tokens
        if f"{name}_target" in fixture:
            ours[f"{name}_infonce"] = info_nce(tokens[:, 0], fixture.input(f"{name}_target"))
    return ours


def training_tensors(model: FactorizedTokenizer, image: Tensor) -> dict[str, Tensor]:
    """Errors in training mode, and gradients of squared error, quantizer losses and disentanglement."""
    model.train()
    pixels = image.clone().requires_grad_(True)
    output = model(pixels)
    error = F.mse_loss(output.reconstruction, image)
    model.zero_grad()
    torch.stack([error, *output.quantizer.losses.values()]).sum().backward()
    model.eval()
    rows = {
        f"grad_codebook_{branch}": cast(Learned, model.quantizer(branch)).embedding.weight.grad
        for branch in model.branch_names
    }
    return {
        "train_recon_mse": error,
        "train_disentangle_loss": output.quantizer.losses.get("disentangle", torch.zeros(())),
        "grad_image": cast(Tensor, pixels.grad),
        **cast(dict[str, Tensor], rows),
    }
