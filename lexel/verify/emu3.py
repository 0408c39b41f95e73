"""Emu3's vision tokenizer against recorded numbers.

b batch · t frames · u latent frames · c channels · h w grid · n = u*h*w positions
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from lexel.tokenizers import find_published, load_published
from lexel.tokenizers.emu3 import Emu3Tokenizer
from lexel.types import Codes
from lexel.verify.fixture import Fixture


@torch.no_grad()
def emu3(fixture: Fixture) -> dict[str, Tensor]:
    """Codes, latents and reconstructions of pictures and of a clip."""
    row = "emu3-vision-tokenizer"
    arguments = find_published(row)[0].known(fixture.config["reference_config"])
    model = cast(Emu3Tokenizer, load_published(row, fixture.weights(), arguments))
    image, given = fixture.input("image"), fixture.input("given_indices")
    codes = model.encode(image)
    still = image[:, None].expand(-1, model.config.frames_per_code, -1, -1, -1)
    grid = (given.shape[1], given.shape[2])
    ours = {
        "indices": _map(codes)[:, 0],
        "image_latent": model.encoder(still),
        "image_pre_quant": model.latents(still),
        "recon": model.decode(codes),
        "decoded_from_given": model.decode(Codes(rearrange(given, "b h w -> b (h w) 1"), grid)),
    }
    if "video" in fixture:
        video = fixture.input("video")
        codes = model.encode_video(video)
        ours["video_indices"] = _map(codes)
        ours["video_pre_quant"] = model.latents(video)
        ours["video_recon"] = model.decode_video(codes)
    return ours


def _map(codes: Codes) -> Tensor:
    """``[b, u*h*w, 1] -> [b, u, h, w]``."""
    assert codes.grid is not None
    return rearrange(codes.indices, "b (u h w) 1 -> b u h w", u=codes.frames or 1, h=codes.grid[0])
