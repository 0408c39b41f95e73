"""LARP's clip tokenizer against recorded numbers.

b batch · t frames · n codes · d latent width · K codebook size
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lexel.tokenizers import find_published, load_published
from lexel.tokenizers.larp import LARP
from lexel.tokenizers.quantizers.learned import Learned
from lexel.tokenizers.quantizers.stochastic import Stochastic
from lexel.types import Codes
from lexel.verify.fixture import Fixture

ROW = "larp-l-long"


@torch.no_grad()
def larp(fixture: Fixture) -> dict[str, Tensor]:
    """Codes, latents and reconstructions of a clip and of its first half, and what the prior says."""
    arguments = find_published(ROW)[0].known(fixture.config)
    model = cast(LARP, load_published(ROW, fixture.weights(), arguments))
    video = rearrange(fixture.input("video"), "b c t h w -> b t c h w") * 2 - 1
    states = model.encoder((video + 1) / 2)
    latents, codes = model.bottleneck(states), model.encode_video(video)
    quantize = cast(Learned, model.bottleneck.quantize)
    quantized = model.embed(codes)
    ours = {
        "query_features": states,
        "projected_z": latents,
        "z_normalised": quantize.bypass(latents),
        "indices": codes.indices[..., 0],
        "codes": quantized,
        "quant_out": model.bottleneck.out_linear(quantized),
        "recon": _drawn(model, codes),
    }
    if isinstance(quantize, Stochastic):
        ours["vq_probs"] = quantize.chances(latents)
    if "half_indices" in fixture:
        half = model.encode_video(video[:, : video.shape[1] // 2])
        ours |= {"half_indices": half.indices[..., 0], "half_recon": _drawn(model, half)}
    if model.prior_model is not None:
        ours["prior_pred"] = model.prior_model.predict(quantized)
        ours["prior_logits"] = model.prior_model.logits(ours["prior_pred"], quantize.codebook)
        targets = codes.indices[:, 1:, 0]
        ours["prior_ce"] = F.cross_entropy(ours["prior_logits"].flatten(0, 1), targets.flatten())
    return ours


def _drawn(model: LARP, codes: Codes) -> Tensor:
    """``[b, 3, t, h, w]`` in [0, 1]."""
    return (rearrange(model.decode_video(codes), "b t c h w -> b c t h w") + 1) / 2
