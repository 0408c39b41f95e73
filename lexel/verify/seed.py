"""SEED-2 against recorded numbers, with the released head and with that of the training code.

b batch · n codes
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lexel.tokenizers import find_published, load_published
from lexel.tokenizers.seed import SeedTokenizer
from lexel.types import Codes
from lexel.verify.fixture import Fixture


def seed(fixture: Fixture) -> dict[str, Tensor]:
    """All steps from the picture to the image embedding, and back from `random_indices`."""
    return _tensors(fixture, "seed-2")


def seed_reverse(fixture: Fixture) -> dict[str, Tensor]:
    """The same with the second Q-Former as head."""
    return _tensors(fixture, "seed-2-reverse")


@torch.no_grad()
def _tensors(fixture: Fixture, row: str) -> dict[str, Tensor]:
    system, _ = find_published(row)
    model = cast(SeedTokenizer, load_published(row, fixture.weights_folder(), system.known(fixture.config)))
    image = fixture.input("image")  # already normalised
    pixels = 2 * (image * model.deviation + model.mean) - 1
    codes = model.encode(pixels)
    output = model(pixels)
    told = model.decode_task_layer(model.embed(codes))
    given = Codes(fixture.input("random_indices")[..., None])
    return {
        "vit_features": model.visual_encoder(image),
        "image_embeds": model.see(pixels),
        "query_output": output.queries,
        "query_output_down": output.latents,
        "indices": codes.indices[..., 0],
        "quantized": model.embed(codes),
        "query_output_up": told,
        "blocks_image_output": model.mixed(told),
        "image_embedding": model.decode_features(codes)[:, 0],
        "recon_query_output": output.rebuilt,
        "random_image_embedding": model.decode_features(given)[:, 0],
    }
