"""LlamaGen's GPTs and LARP's generators against recorded numbers: logits with and without a cache, guidance,
filters, and whole pictures drawn greedily through the sampler.

b batch · n code positions · k codes per position · K codes of a column
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.checkpoints import read_checkpoint, save_checkpoint
from lexel.document import TokenSequence
from lexel.models import find_published, load_published
from lexel.models.raster_lm import RasterLM
from lexel.sample.conditional import Condition, conditional_prompts, continued, draw, raster_codec
from lexel.sample.logits import SamplingConfig, target_distribution
from lexel.types import TokenBatch
from lexel.verify.fixture import Fixture

GREEDY = SamplingConfig(temperature=0.0)


@torch.no_grad()
def llamagen_c2i(fixture: Fixture) -> dict[str, Tensor]:
    """The class-conditional GPT, the filters of its sampler and its rotary table."""
    lm = _llamagen("llamagen-gpt-c2i-b-256", fixture)
    labels = fixture.input("cond_idx").tolist()
    return llamagen(lm, fixture, labels) | filters(fixture) | {"freqs_cis": rotary_table(lm)}


@torch.no_grad()
def llamagen_t2i(fixture: Fixture) -> dict[str, Tensor]:
    """The caption-conditional GPT; features are recorded with padding on the left."""
    lm = _llamagen("llamagen-gpt-t2i-xl-256", fixture)
    padded, mask = fixture.input("caption_emb"), fixture.input("emb_mask").bool()
    ours = llamagen(lm, fixture, [features[real] for features, real in zip(padded, mask)])
    if "logits_full_nomask" in fixture:
        prompts, _ = conditional_prompts(lm, list(padded))
        ours["logits_full_nomask"] = teacher_forced(lm, prompts, fixture.input("tokens"))[0]
    if "freqs_cis" in fixture:
        ours["freqs_cis"] = rotary_table(lm)
    return ours


def _llamagen(row: str, fixture: Fixture) -> RasterLM:
    return load_published(row, fixture.weights(), find_published(row)[0].known(fixture.config))


def llamagen(lm: RasterLM, fixture: Fixture, conditions: Sequence[Condition]) -> dict[str, Tensor]:
    """What both kinds record."""
    tokens, scale = fixture.input("tokens"), fixture.config["cfg_scale"]
    prompts, nulls = conditional_prompts(lm, conditions)
    assert nulls is not None
    full, uncond = (teacher_forced(lm, some, tokens)[0] for some in (prompts, nulls))
    cached = torch.cat([teacher_forced(lm, some, tokens, cached=True)[0] for some in (prompts, nulls)])
    guided = SamplingConfig(temperature=0.0, guidance=max(1.0, scale))  # at 1 and below there is none
    ours = {
        "logits_full": full,
        "logits_full_uncond": uncond,
        "logits_cached": cached,
        "logits_cfg": uncond + (full - uncond) * scale,
        "loss": F.cross_entropy(full.flatten(0, 1), tokens.flatten()),
        "greedy_nocfg": drawn(lm, conditions, GREEDY),
        "greedy_cfg": drawn(lm, conditions, guided),
    }
    if (interval := fixture.config.get("cfg_interval")) is not None:
        # Code 0 comes from the prompt, decode step i makes code i + 1; the last guided one is i = interval.
        steps = interval + 2 if interval >= 0 else None
        ours["greedy_cfg_interval"] = drawn(lm, conditions, replace(guided, guidance_steps=steps))
    return ours


@torch.no_grad()
def larp(fixture: Fixture) -> dict[str, Tensor]:
    """The class-conditional model and the one for frame prediction, in one file under two prefixes."""
    lm = _larp(fixture, "larp-l-long-ar", "class_cond.", "args")
    prompts, _ = conditional_prompts(lm, fixture.input("cond").tolist())
    settings = SamplingConfig(temperature=0.0, guidance=fixture.config.get("cfg_scale", 1.25))
    ours = {
        "logits": _continued(lm, prompts, fixture.input("idx")),
        "greedy_tokens": drawn(lm, fixture.input("greedy_class").tolist(), settings),
    }
    if "fp_cond" in fixture:
        lm = _larp(fixture, "larp-l-long-ar-fp", "frame_prediction.", "frame_prediction_args")
        prompts, _ = conditional_prompts(lm, list(fixture.input("fp_cond")))
        ours["fp_logits"] = _continued(lm, prompts, fixture.input("idx"))
    return ours


def _larp(fixture: Fixture, row: str, prefix: str, arguments: str) -> RasterLM:
    """One of the two models, through a file of its own as the hub has it."""
    state = read_checkpoint(fixture.weights())
    own = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    path = fixture.scratch / row / "model.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(own, path)
    return load_published(row, path, find_published(row)[0].known(fixture.config[arguments]))


def _continued(lm: RasterLM, prompts: Sequence[TokenSequence], codes: Tensor) -> Tensor:
    """Logits ``[b, n + 1, K]`` after the condition and after each of the codes long ``[b, n]``."""
    return teacher_forced(lm, prompts, F.pad(codes, (0, 1)))[0]


def teacher_forced(
    lm: RasterLM, prompts: Sequence[TokenSequence], codes: Tensor, cached: bool = False
) -> tuple[Tensor, ...]:
    """Logits ``[b, n, K_j]`` of each column's codes long ``[b, n]`` or ``[b, n, k]`` behind the prompts,
    given the true ones before them. cached: the prompt in one pass, then one position at a time."""
    codes = codes.reshape(*codes.shape[:2], -1)
    ids = codes + torch.tensor(lm.config.code_offsets)
    rows = [_row_logits(lm, prompt, row, cached) for prompt, row in zip(prompts, ids)]
    return tuple(torch.stack(column) for column in zip(*rows))


def _row_logits(lm: RasterLM, prompt: TokenSequence, ids: Tensor, cached: bool) -> list[Tensor]:
    """Per column ``[n, K_j]`` of ids long ``[n, k]``."""
    batch = continuation(lm, prompt, ids[:-1])
    if cached:
        cache = lm.new_cache(1, batch.ids.shape[1])
        cuts = [0, *range(len(prompt), batch.ids.shape[1] + 1)]
        steps = [lm.decode(_slice(batch, a, b), cache)[0] for a, b in pairwise(cuts)]
        hidden = torch.cat(steps, dim=1)
    else:
        hidden, _ = lm.decode(batch)
    hidden = hidden[0, len(prompt) - 1 :]
    first = lm.project(hidden, 0, lm.config.codebook_sizes[0])
    return [first, *(lm.code_logits(hidden, ids) if lm.config.columns > 1 else ())]


def continuation(lm: RasterLM, prompt: TokenSequence, ids: Tensor) -> TokenBatch:
    """A prompt and ids long ``[n, k]`` behind it, as a batch of one."""
    return raster_codec(lm.config).collate([continued(prompt, ids)])


def _slice(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    """Positions start .. stop - 1; continuous inputs stand in the first piece."""
    return TokenBatch(
        batch.ids[:, start:stop],
        batch.modality[:, start:stop],
        batch.positions[:, start:stop],
        embeds=batch.embeds if start == 0 else None,
        embed_index=batch.embed_index if start == 0 else None,
    )


def drawn(lm: RasterLM, conditions: Sequence[Condition], settings: SamplingConfig) -> Tensor:
    """Codes long ``[b, n]`` of the sampler, of models with one code per position."""
    return draw(lm, conditions, sampling=settings).indices[..., 0]


def filters(fixture: Fixture) -> dict[str, Tensor]:
    """``filter_probs_NAME``: what the settings NAME of the fixture make of ``filter_logits``."""
    if "filter_logits" not in fixture:
        return {}
    logits = fixture.input("filter_logits")
    return {
        f"filter_probs_{name}": target_distribution(logits, None, SamplingConfig(**settings)).dense()
        for name, settings in fixture.config["filters"].items()
    }


def rotary_table(lm: RasterLM) -> Tensor:
    """Cosines and sines ``[l, e / 2, 2]`` of every position."""
    index = torch.arange(lm.config.max_length)
    cos, sin = lm.rotary(F.pad(index[None, :, None], (0, 2)))
    return torch.stack([cos[0, 0], sin[0, 0]], dim=-1)
