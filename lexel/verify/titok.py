"""TiTok, TA-TiTok, their VAEs, One-D-Piece and MaskGIT-VQGAN against recorded numbers. Which of them a folder
holds is read from its config.

b batch · n codes · N their maximum · d latent width · h w grid or picture
"""

from __future__ import annotations

from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from lexel.tokenizers import find_published, load_published
from lexel.tokenizers.maskgit_vqgan import MaskGITVQGAN
from lexel.tokenizers.titok import TiTok, TiTokVAE
from lexel.types import Codes
from lexel.verify.fixture import Fixture


def titok(fixture: Fixture) -> dict[str, Tensor]:
    """The proxy's tensors where the config describes one, else TiTok's."""
    if "pixel_vqgan" in fixture.config:
        return _proxy(fixture)
    reads_text = "text_guidance" in fixture
    model = _load(fixture, "tatitok-bl-128-vq" if reads_text else "titok-s-128")
    text = fixture.input("text_guidance") if reads_text else None
    if isinstance(model, TiTokVAE):
        return _continuous(model, fixture, text)
    ours = _tensors(model, fixture, text)
    if "random_tokens" in fixture:
        ours["recon_random"] = _from_tokens(model, fixture.input("random_tokens"), text)
    return ours


def one_d_piece(fixture: Fixture) -> dict[str, Tensor]:
    """TiTok's tensors, and pictures from the first codes alone."""
    model = cast(TiTok, _load(fixture, "one-d-piece-s-256"))
    ours = _tensors(model, fixture)
    latents = rearrange(ours["z_quantized"], "b d 1 n -> b n d")
    every = range(1, latents.shape[1] + 1)
    for length in fixture.config.get("lengths", every):
        kept = latents[:, :length]
        ours |= {f"{name}_{length}": value for name, value in _drawn(model, kept).items()}
        ours[f"recon_from_tokens_{length}"] = _from_tokens(model, ours["indices"][:, :, :length])
    return ours


def _load(fixture: Fixture, row: str) -> Any:
    system, _ = find_published(row)
    return load_published(row, fixture.weights(), system.known(fixture.config))


@torch.no_grad()
def _tensors(model: TiTok, fixture: Fixture, text: Tensor | None = None) -> dict[str, Tensor]:
    """`latent` and `z_quantized` ``[b, d, 1, N]``, `indices` ``[b, 1, N]``, what is drawn from them, and
    `recon_from_tokens`, drawn from the indices."""
    pixels = _pixels(fixture)
    latent = model.latents(pixels)
    codes = model.encode(pixels)
    quantized = model.embed(codes)
    indices = rearrange(codes.indices, "b n 1 -> b 1 n")
    ours = {"latent": _columns(latent), "indices": indices, "z_quantized": _columns(quantized)}
    ours["recon_from_tokens"] = _from_tokens(model, indices, text)
    return ours | _drawn(model, quantized, text)


@torch.no_grad()
def _drawn(model: TiTok | TiTokVAE, quantized: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
    """`recon` and, in the legacy form, `decoder_logits` ``[b, k, h, w]`` and the `pixel_states`
    ``[b, d, h, w]`` they stand for. Without the pixel decoder the logits are all the reference gives."""
    ours: dict[str, Tensor] = {}
    if model.config.proxy is not None:
        ours["decoder_logits"] = ours["recon"] = model.decoder(quantized, text=text)
    if model.has_pixel_decoder:
        ours["pixel_states"] = model.pixel_states(ours["decoder_logits"])
    if model.has_decoder:
        ours["recon"] = _unit(model.draw(quantized, text=text))
    return ours


def _from_tokens(model: TiTok, tokens: Tensor, text: Tensor | None = None) -> Tensor:
    """Tokens ``[b, 1, n]`` or ``[b, n]`` to the reference's picture."""
    codes = Codes(tokens.flatten(1)[..., None])
    return _drawn(model, model.embed(codes), text)["recon"]


@torch.no_grad()
def _continuous(model: TiTokVAE, fixture: Fixture, text: Tensor | None) -> dict[str, Tensor]:
    """`moments` ``[b, 2d, 1, N]``, `mean`, `logvar`, and `recon`, drawn from the mean."""
    pixels = _pixels(fixture)
    mean, logvar = model.moments(pixels)
    return {
        "moments": _columns(model.latents(pixels)),
        "mean": _columns(mean),
        "logvar": _columns(logvar),
        **_drawn(model, mean, text),
    }


@torch.no_grad()
def _proxy(fixture: Fixture) -> dict[str, Tensor]:
    """`latent` ``[b, d, h, w]``, row-major `indices` ``[b, h*w]``, `recon`."""
    model = cast(MaskGITVQGAN, _load(fixture, "maskgit-vqgan-f16"))
    pixels = _pixels(fixture)
    codes = model.encode(pixels)
    return {
        "latent": model.encoder(fixture.input("image")),
        "indices": codes.indices[..., 0],
        "recon": _unit(model.decode(codes)),
    }


def _pixels(fixture: Fixture) -> Tensor:
    return fixture.input("image") * 2 - 1


def _unit(pixels: Tensor) -> Tensor:
    return (pixels + 1) / 2


def _columns(latents: Tensor) -> Tensor:
    return rearrange(latents, "b n d -> b d 1 n")
