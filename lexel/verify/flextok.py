"""FlexTok against recorded numbers: VAE, codes, velocities, features and sampled pictures.

b batch · c latent channels · h w latent grid · k codes kept
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor

from lexel.tokenizers import load_published
from lexel.tokenizers.flextok import APG, FLEXTOK, FlexTok
from lexel.types import Codes
from lexel.verify.fixture import Fixture

SAMPLED = re.compile(r"(latents|recon)_(none|cfg|apg)_(mixed|k\d+|kfull)")
PROBED = re.compile(r"probe_(velocity|repa_features)_(null|mixed|k\d+|kfull)")


@torch.no_grad()
def flextok(fixture: Fixture) -> dict[str, Tensor]:
    """Everything recorded, whichever lengths and guiders it is recorded for. Sampling and probes use the
    codes computed here."""
    config = fixture.config
    arguments = {name: config[name] for name in FLEXTOK.arguments if name in config}
    model = cast(FlexTok, load_published("flextok-d18-d28-in1k", fixture.weights(), arguments))
    image = fixture.input("image")
    codes = model.encode(image)
    ours = coding_tensors(model, fixture, image)
    for name in fixture.recorded:
        if found := SAMPLED.fullmatch(name):
            what, mode, length = found.groups()
            latents = sampled(model, fixture, keep(codes, length, config["_run"]), mode)
            ours[name] = latents if what == "latents" else model.pictures(latents)
        if found := PROBED.fullmatch(name):
            what, length = found.groups()
            given = None if length == "null" else keep(codes, length, config["_run"])
            x, times = fixture.input("probe_xt"), fixture.input("probe_t")
            evaluate = model.velocity if what == "velocity" else model.features
            ours[name] = evaluate(x, times, given)
    return ours


def coding_tensors(model: FlexTok, fixture: Fixture, image: Tensor) -> dict[str, Tensor]:
    """From pixels to codes, by the posterior's mean and, with recorded noise, by a sample of it."""
    mean, logvar = model.posterior(image)
    latents = model.latents(image)
    codes = model.encode(image)
    ours = {
        "posterior_mean": mean,
        "posterior_logvar": logvar,
        "latents": latents,
        "vae_roundtrip": model.pictures(latents),
        "enc_registers": model.registers(latents),
        "indices": codes.indices[..., 0],
        "quants": model.embed(codes),
    }
    if "posterior_noise" in fixture:
        noise = fixture.input("posterior_noise")
        ours["latents_sampled"] = model.latents(image, noise)
        ours["indices_sampled"] = model.encode(image, noise=noise).indices[..., 0]
    return ours


def keep(codes: Codes, length: str, run: dict[str, Any]) -> Codes:
    """The codes with ``k4`` of them kept, ``kfull`` or, ``mixed``, as many per row as `run` says."""
    count, n, _ = codes.indices.shape
    lengths = (
        run["mixed_lengths"] if length == "mixed" else [n if length == "kfull" else int(length[1:])] * count
    )
    return Codes(codes.indices, lengths=torch.tensor(lengths))


def sampled(model: FlexTok, fixture: Fixture, codes: Codes, mode: str) -> Tensor:
    """Latents ``[b, c, h, w]`` from the recorded noise."""
    run = fixture.config["_run"]
    values = run.get("apg", {})
    apg = APG(
        values.get("momentum", APG.momentum),
        values.get("norm_threshold", APG.threshold),
        values.get("eta", APG.eta),
    )
    guidance = 1.0 if mode == "none" else run[f"{mode}_guidance_scale"]
    return model.draw(
        codes, steps=run["steps"], guidance=guidance, guider=mode, apg=apg, noise=fixture.input("noise")
    )
