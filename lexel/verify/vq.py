"""LlamaGen's and Janus's VQ tokenizers, and LlamaGen's discriminator, against recorded numbers.

b batch · c channels · h w grid · n = h*w positions
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lexel.catalog import Layout
from lexel.checkpoints import read_checkpoint
from lexel.models.discriminator import PatchDiscriminatorConfig
from lexel.tokenizers import find_published, load_published
from lexel.tokenizers.quantizers.learned import Learned
from lexel.tokenizers.vq import LLAMAGEN_ARGUMENTS, QuantizedRaster, VQTokenizer
from lexel.types import Codes
from lexel.verify.fixture import Fixture


def llamagen(fixture: Fixture) -> dict[str, Tensor]:
    """Codes, latents, pictures, losses and gradients of the tokenizer; logits of the discriminator."""
    config = fixture.config
    arguments = {name: config[name] for name in LLAMAGEN_ARGUMENTS if name in config}
    path = fixture.weights()
    model = cast(VQTokenizer, load_published("llamagen-vq-16", path, arguments, config.get("use_key")))
    image = fixture.input("image")
    ours = tokenizer_tensors(model, image)
    ours["indices"] = rearrange(ours["indices"], "b h w -> b (h w)")
    ours["codebook_vectors"] = _map(model.embed(model.encode(image)), ours["latent"])
    ours["decoded"] = model.decode(model.encode(image))
    if "random_indices" in fixture:
        given = fixture.input("random_indices")
        ours["random_decoded"] = model.decode(Codes(given[..., None], tuple(ours["latent"].shape[2:])))  # type: ignore[arg-type]
    ours |= training_tensors(model, image)
    if "disc_logits_real" in fixture:
        sizes = PatchDiscriminatorConfig(config["disc_ndf"], config["disc_n_layers"])
        ours |= discriminator_tensors(sizes, fixture, ours["recon"])
    return ours


def janus(fixture: Fixture) -> dict[str, Tensor]:
    """Codes as published (transformers' class normalises nothing), latents and pictures."""
    path, row = fixture.weights(), "janus-vq-16"
    arguments = find_published(row)[0].known(fixture.config["reference_args"])
    return raster_tensors(cast(VQTokenizer, load_published(row, path, arguments)), fixture)


def raster_tensors(model: QuantizedRaster, fixture: Fixture) -> dict[str, Tensor]:
    """Codes of `image`, the latents on the way, pictures of its codes and of `given_indices`."""
    ours = tokenizer_tensors(model, fixture.input("image"))
    given = fixture.input("given_indices")
    codes = Codes(rearrange(given, "b h w -> b (h w) 1"), (given.shape[1], given.shape[2]))
    return {
        "indices": ours["indices"],
        "latent": ours["encoder_out"],
        "pre_quant": ours["latent"],
        "quant": ours["quant"],
        "recon": ours["recon"],
        "decoded_from_given": model.decode(codes),
    }


@torch.no_grad()
def tokenizer_tensors(model: QuantizedRaster, image: Tensor) -> dict[str, Tensor]:
    """`encoder_out`, `latent` (after quant_conv), `quant`, all ``[b, c, h, w]``; `indices` ``[b, h, w]``;
    `recon`, the forward pass's picture."""
    encoded = model.encoder(image)
    latent = model.quant_conv(encoded)
    output = model(image)
    return {
        "encoder_out": encoded,
        "latent": latent,
        "indices": _map(output.codes.indices, latent)[:, 0],
        "quant": _map(output.quantizer.quantized, latent),
        "recon": output.reconstruction,
    }


def training_tensors(model: VQTokenizer, image: Tensor) -> dict[str, Tensor]:
    """Losses in training mode, and gradients of their sum with the squared error."""
    model.train()
    pixels = image.clone().requires_grad_(True)
    output = model(pixels)
    losses = output.quantizer.losses
    error = F.mse_loss(output.reconstruction, image)
    entropy = losses.get("entropy", torch.zeros(()))
    model.zero_grad()
    (error + losses["codebook"] + losses["commitment"] + entropy).backward()
    model.eval()
    return {
        "train_recon_mse": error,
        "train_vq_loss": losses["codebook"],
        "train_commit_loss": losses["commitment"],
        "train_entropy_loss": entropy,
        "grad_image": cast(Tensor, pixels.grad),
        "grad_codebook": cast(Tensor, cast(Learned, model.quantize).embedding.weight.grad),
        "grad_quant_conv": cast(Tensor, model.quant_conv.weight.grad),
    }


@torch.no_grad()
def discriminator_tensors(
    config: PatchDiscriminatorConfig, fixture: Fixture, fake: Tensor
) -> dict[str, Tensor]:
    """PatchGAN's logits in eval mode and its hinge losses."""
    path = fixture.weights()
    network = config.build()
    Layout().load(network, read_checkpoint(path, key="discriminator"), str(path))
    network.eval()
    on_real, on_fake = network(fixture.input("image")), network(fake)
    return {
        "disc_logits_real": on_real,
        "disc_logits_fake": on_fake,
        "disc_hinge": 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()),
        "gen_hinge": -on_fake.mean(),
    }


def _map(positions: Tensor, like: Tensor) -> Tensor:
    """``[b, n, c] -> [b, c, h, w]`` on the grid of `like`."""
    return rearrange(positions, "b (h w) c -> b c h w", h=like.shape[2])
