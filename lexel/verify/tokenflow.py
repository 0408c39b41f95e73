"""TokenFlow against recorded numbers, with CLIP's or SigLIP's tower.

b batch · n codes of all scales · d latent width · g side of the latent grid
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from lexel.tokenizers import find_published, load_published
from lexel.tokenizers.tokenflow import TokenFlow
from lexel.types import Codes
from lexel.verify.fixture import Fixture

STRIDE = 17
"""Every such row and column of the large picture is recorded as `recon_strided`."""


def clip(fixture: Fixture) -> dict[str, Tensor]:
    """With CLIP's tower."""
    return _tensors(fixture, "tokenflow-clipb-32k")


def siglip(fixture: Fixture) -> dict[str, Tensor]:
    """With SigLIP's."""
    return _tensors(fixture, "tokenflow-siglip-32k")


@torch.no_grad()
def _tensors(fixture: Fixture, row: str) -> dict[str, Tensor]:
    system, _ = find_published(row)
    model = cast(TokenFlow, load_published(row, fixture.weights(), system.known(fixture.config)))
    image = fixture.input("image")
    latents, codes = model.latents(image), model.encode(image)
    semantic = model.config.semantic_dim
    ours = {
        "semantic_vit_features": model.read(image),
        "semantic_latent": rearrange(latents[:, :semantic], "b d h w -> b (h w) d"),
        "pixel_latent": latents[:, semantic:],
        "indices": codes.indices[..., 0],
        "latent": rearrange(model.understand(image), "b (h w) d -> b d h w", h=model.config.grid),
        "next_scale_inputs": model.next_scale_inputs(codes),
    }
    fewer = model.encode(image, model.layout.lengths[-2]) if len(model.layout.lengths) > 1 else codes
    drawn = {"": codes, "partial_": fewer}
    if "random_indices" in fixture:
        drawn["random_"] = Codes(fixture.input("random_indices")[..., None])
    for name, given in drawn.items():
        total = model.accumulate(model.embed(given), given)
        ours[f"{name}semantic_recon"] = model.decode_features(given)
        ours[f"{name}recon_native"] = model.draw_native(total)
        ours[f"{name}recon"] = model.decode(given)
        ours[f"{name}recon_strided"] = ours[f"{name}recon"][:, :, ::STRIDE, ::STRIDE]
    # Of large pictures only the first ones are recorded.
    return {
        name: value[: len(fixture.recorded[name])] if "recon" in name else value
        for name, value in ours.items()
        if name in fixture
    }
