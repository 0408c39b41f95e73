"""4M's tokenizers against recorded numbers: codes, latents, what decoders draw, and DDIM's pictures.

b batch · c channels · d latent width · h w grid
"""

from __future__ import annotations

import re
from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from lexel.tokenizers import load_published
from lexel.tokenizers.fourm import FOURM_VQ, FourM, FourMTokenizer
from lexel.tokenizers.fourm_divae import FOURM_DIVAE, FourMDiVAE
from lexel.verify.fixture import Fixture

SAMPLED = re.compile(r"recon_(ddim|ddpm)(\d+)")
# ImageNet's mean and deviation, in which pictures of a tokenizer with undo_std are recorded.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@torch.no_grad()
def vq(fixture: Fixture) -> dict[str, Tensor]:
    """Of pictures, maps and vectors (`input`) or class maps (`labels`), and of other sizes of them."""
    arguments = {**FOURM_VQ.arguments, **given_arguments(fixture)}
    model = cast(FourM, load_published(FOURM_VQ.rows[0].name, fixture.weights(), arguments))
    ours = coding_tensors(model, fixture)
    for suffix, values in inputs(fixture).items():
        if model.decoder is not None:
            ours[f"recon{suffix}"] = model.draw(model.quantized(model.encode_values(values)))
    return ours


@torch.no_grad()
def divae(fixture: Fixture) -> dict[str, Tensor]:
    """The same, what the U-Net predicts at recorded times, the noise levels, and sampled pictures."""
    arguments = {**FOURM_DIVAE.arguments, **given_arguments(fixture)}
    model = cast(FourMDiVAE, load_published(FOURM_DIVAE.rows[0].name, fixture.weights(), arguments))
    ours = coding_tensors(model, fixture)
    codes, diffusion = model.encode_values(inputs(fixture)[""]), model.config.diffusion
    ours["alphas_cumprod"] = diffusion.alphas()
    ours["final_alpha_cumprod"] = diffusion.scheduler(1, "ddim").final_alpha_cumprod
    if "noisy" in fixture:
        noisy, times, quantized = fixture.input("noisy"), fixture.input("timesteps"), model.quantized(codes)
        ours["denoised"] = model.denoise(noisy, times, quantized)
        if "cond_mask" in fixture:
            hidden = fixture.input("cond_mask").bool()
            ours["denoised_masked"] = model.denoise(noisy, times, quantized, hidden)
    for name in fixture.recorded:
        if found := SAMPLED.fullmatch(name):
            sampler, steps = found[1], int(found[2])
            ours[f"{sampler}_timesteps"] = diffusion.scheduler(steps, sampler).timesteps
            noise = fixture.input("init_noise")
            ours[name] = model.decode_values(codes, steps=steps, sampler=sampler, noise=noise)
    return ours


def coding_tensors(model: FourMTokenizer, fixture: Fixture) -> dict[str, Tensor]:
    """For every input, with its suffix: `latent` and `quant` ``[b, d, h, w]``; `indices` ``[b, h, w]``, with
    several heads ``[b, k, h, w]``."""
    ours = {}
    for suffix, values in inputs(fixture).items():
        codes = model.encode_values(values)
        h = cast("tuple[int, int]", codes.grid)[0]
        indices = rearrange(codes.indices, "b (h w) k -> b k h w", h=h)
        ours[f"latent{suffix}"] = model.latents(values)
        ours[f"indices{suffix}"] = indices[:, 0] if indices.shape[1] == 1 else indices
        ours[f"quant{suffix}"] = model.quantized(codes)
    return ours


def given_arguments(fixture: Fixture) -> dict[str, object]:
    """The reference's arguments, and the sizes of networks that are not its own presets."""
    sizes = {name: fixture.config[name] for name in ("vit_sizes", "unet") if name in fixture.config}
    return {**fixture.config["args"], **sizes}


def inputs(fixture: Fixture) -> dict[str, Tensor]:
    """Recorded inputs by what follows ``input`` or ``labels`` in their names ("", "_larger"); of a tokenizer
    that undoes ImageNet's standardisation, in [-1, 1]."""
    names = [re.fullmatch(r"(?:input|labels)((?:_.*)?)", name) for name in fixture.recorded]
    given = {found[1]: fixture.input(found[0]) for found in names if found}
    if not fixture.config["args"].get("undo_std"):
        return given
    mean, deviation = (torch.tensor(one)[:, None, None] for one in (MEAN, DEVIATION))
    return {suffix: 2 * (values * deviation + mean) - 1 for suffix, values in given.items()}
