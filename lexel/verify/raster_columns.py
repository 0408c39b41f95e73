"""FQGAN's, ELM's and Open-MAGVIT2's autoregressive models, which have several codes per position, against
recorded numbers: logits of every column with and without a cache, and whole pictures drawn greedily.

b batch · n code positions · k codes per position · K_j codes of column j · d width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lexel.document import TokenSequence
from lexel.models import find_published, load_published
from lexel.models.raster_lm import RasterLM
from lexel.sample.conditional import conditional_prompts, draw
from lexel.sample.logits import SamplingConfig
from lexel.verify.fixture import Fixture
from lexel.verify.raster import continuation, teacher_forced


def fqgan_dual(fixture: Fixture) -> dict[str, Tensor]:
    """FQGAN's model of two codes per position: visual, semantic."""
    return fqgan(_load("fqgan-ar-dual-b", fixture, fixture.config), fixture)


def fqgan_triple(fixture: Fixture) -> dict[str, Tensor]:
    """FQGAN's model of three codes per position."""
    return fqgan(_load("fqgan-ar-triple-b", fixture, fixture.config), fixture)


@torch.no_grad()
def fqgan(lm: RasterLM, fixture: Fixture) -> dict[str, Tensor]:
    """Contexts, logits, loss and greedy pictures; columns are numbered from 1 in the records."""
    columns = range(1, lm.config.columns + 1)
    tokens = torch.stack([fixture.input(f"tokens_{i}") for i in columns], dim=-1)
    labels = fixture.input("cond_idx").tolist()
    prompts, nulls = conditional_prompts(lm, labels)
    assert nulls is not None
    scales = _per_column(fixture.config["cfg_scale"], lm.config.columns)
    full, uncond = (teacher_forced(lm, some, tokens) for some in (prompts, nulls))
    cached = [teacher_forced(lm, some, tokens, cached=True) for some in (prompts, nulls)]
    losses = [F.cross_entropy(own.flatten(0, 1), tokens[..., j].flatten()) for j, own in enumerate(full)]
    greedy = [SamplingConfig(temperature=0.0, guidance=max(1.0, scale)) for scale in scales]
    drawn = draw(lm, labels, sampling=_joined(greedy)).indices
    ours = {
        "context": contexts(lm, prompts, tokens),
        "context_uncond": contexts(lm, nulls, tokens),
        "loss": torch.stack(losses).mean(),
    }
    for j, i in enumerate(columns):
        ours |= {
            f"logits_{i}_full": full[j],
            f"logits_{i}_full_uncond": uncond[j],
            f"logits_{i}_cached": torch.cat([rows[j] for rows in cached]),
            f"logits_{i}_cfg": uncond[j] + (full[j] - uncond[j]) * scales[j],
            f"greedy_cfg_{i}": drawn[..., j],
        }
    return ours


@torch.no_grad()
def elm(fixture: Fixture) -> dict[str, Tensor]:
    """Logits after the class label and after each of the given codes, sub-code behind sub-code."""
    arguments = fixture.config["args"]
    row = "elm-ar-l-1-16" if arguments["token_each"] == 1 else "elm-ar-l-2-10"
    lm = _load(row, fixture, arguments)
    codes = fixture.input("idx")
    codes = codes.reshape(*codes.shape[:2], -1)
    prompts, _ = conditional_prompts(lm, fixture.input("cond").tolist())
    columns = teacher_forced(
        lm, prompts, F.pad(codes, (0, 0, 0, 1))
    )  # what follows the last one is asked too
    return {"logits": rearrange(torch.stack(columns, dim=2), "b n k v -> b (n k) v")}


@torch.no_grad()
def open_magvit2(fixture: Fixture) -> dict[str, Tensor]:
    """Logits of both parts, given the true ones before them."""
    lm = _load("open-magvit2-ar-b", fixture, fixture.config["args"])
    codes = torch.stack([fixture.input("idx_pre"), fixture.input("idx_post")], dim=-1)
    prompts, _ = conditional_prompts(lm, fixture.input("cond").tolist())
    pre, post = teacher_forced(lm, prompts, codes)
    return {"logits_pre": pre, "logits_post": post}


def _load(row: str, fixture: Fixture, config: Mapping[str, Any]) -> RasterLM:
    return load_published(row, fixture.weights(), find_published(row)[0].known(config))


def contexts(lm: RasterLM, prompts: Sequence[TokenSequence], codes: Tensor) -> Tensor:
    """Hidden states ``[b, n, d]`` before each of the codes long ``[b, n, k]``."""
    ids = codes + torch.tensor(lm.config.code_offsets)
    batches = [continuation(lm, prompt, row[:-1]) for prompt, row in zip(prompts, ids)]
    return torch.cat([lm.decode(batch)[0][:, -codes.shape[1] :] for batch in batches])


def _per_column(scale: float | Sequence[float], columns: int) -> list[float]:
    return list(scale) if isinstance(scale, Sequence) else [scale] * columns


def _joined(columns: Sequence[SamplingConfig]) -> SamplingConfig:
    """The settings of all columns as one."""
    first = columns[0]
    return SamplingConfig(first.temperature, guidance=first.guidance, further=tuple(columns[1:]))
