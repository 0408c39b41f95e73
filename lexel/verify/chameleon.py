"""Chameleon's VQGAN against recorded numbers."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from lexel.tokenizers import find_published, load_published
from lexel.tokenizers.chameleon import ChameleonTokenizer
from lexel.verify.fixture import Fixture
from lexel.verify.vq import raster_tensors


def chameleon(fixture: Fixture) -> dict[str, Tensor]:
    """Codes, latents and pictures."""
    row = "chameleon-vq"
    arguments = find_published(row)[0].known(fixture.config["vqgan_params"])
    model = load_published(row, fixture.weights(), arguments)
    return raster_tensors(cast(ChameleonTokenizer, model), fixture)
