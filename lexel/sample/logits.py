"""From logits to probabilities: the one path used by plain decoding, drafting and verification alike.

Order: guidance → grammar mask → extra processors → temperature → top-k → top-p → min-p → softmax.
Speculation is lossless only with respect to the distribution the plain sampler would use, so nothing else
in Lexel filters logits.

n rows (any mixture of sequences and positions) · v vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# transformers' signature: (input_ids long [1, l], scores float [1, v]) -> scores float [1, v].
Processor = Callable[[Tensor, Tensor], Tensor]
# A source of uniforms: a shape -> float64 in [0, 1). Tests inject their own.
Uniform = Callable[..., Tensor]


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens of one modality are drawn.

    temperature: 0 is greedy (the arg-max, lowest id on ties). top_k: 0 keeps all. top_p: keep the smallest
    set of ids holding this probability. min_p: drop ids below this share of the most probable one.
    guidance: scale s of ``u + s·(c − u)`` on raw logits; 1 ignores the unconditional row.
    Raises ValueError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}.")
        if self.top_k < 0 or int(self.top_k) != self.top_k:
            raise ValueError(f"top_k must be a whole number, 0 to keep all ids, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}.")
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance must be a finite number from 0, got {self.guidance}.")


@lru_cache(maxsize=64)
def _warpers(config: SamplingConfig) -> tuple[Callable[..., Tensor], ...]:
    from transformers.generation import logits_process as hf

    warpers: list[Callable[..., Tensor]] = []
    if config.temperature != 1.0:
        warpers.append(hf.TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k > 0:
        warpers.append(hf.TopKLogitsWarper(int(config.top_k)))
    if config.top_p < 1.0:
        warpers.append(hf.TopPLogitsWarper(config.top_p))
    if config.min_p > 0.0:
        warpers.append(hf.MinPLogitsWarper(config.min_p))
    return tuple(warpers)


def target_distribution(
    cond: Tensor,
    uncond: Tensor | None,
    config: SamplingConfig,
    allowed: Tensor | None = None,
    *,
    processors: Sequence[Processor] = (),
    contexts: Sequence[Tensor] | None = None,
) -> Tensor:
    """Probabilities float ``[n, v]`` (at least float32) of the next id.

    cond, uncond: raw logits ``[n, v]`` of the two rows of guidance. allowed: bool ``[n or 1, v]`` from the
    grammar. processors: transformers' logits processors, called row by row with ``contexts[i]``, the ids
    long ``[l]`` before row i. Raises ValueError when guidance lacks the unconditional logits, or processors
    lack contexts.
    """
    logits = cond if cond.dtype == torch.float64 else cond.float()
    if config.guidance != 1.0:
        if uncond is None:
            raise ValueError(f"guidance {config.guidance} needs the unconditional row's logits.")
        base = uncond.to(logits.dtype)
        logits = base + config.guidance * (logits - base)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if processors:
        logits = _process(logits, processors, contexts)
    if config.temperature == 0:
        return _greedy(logits)
    ids = logits.new_empty(len(logits), 0, dtype=torch.long)  # the warpers ignore it
    for warper in _warpers(config):
        logits = warper(ids, logits)
    return logits.softmax(dim=-1)


def _process(logits: Tensor, processors: Sequence[Processor], contexts: Sequence[Tensor] | None) -> Tensor:
    if contexts is None or len(contexts) != len(logits):
        raise ValueError(f"logits processors need the ids before each of the {len(logits)} rows.")
    rows = []
    for row, context in zip(logits, contexts):
        scores = row[None]
        for processor in processors:
            scores = processor(context[None], scores)
        rows.append(scores)
    return torch.cat(rows)


def _greedy(logits: Tensor) -> Tensor:
    """One-hot of the arg-max; `Tensor.argmax` does not promise which of equal values it returns."""
    index = torch.arange(logits.shape[-1], device=logits.device)
    best = logits.amax(dim=-1, keepdim=True)
    first = torch.where(logits == best, index, logits.shape[-1]).amin(dim=-1, keepdim=True)
    return (index == first).to(logits.dtype)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Ids long ``[n]`` drawn from non-negative weights ``[n, v]`` (sums need not be 1) by inverting the
    cumulative sum at ``uniforms`` ``[n]`` in [0, 1). An id of weight 0 is never drawn; a row of zeros (or
    NaN) gives v, one past the last id."""
    cumulative = weights.double().cumsum(dim=-1)
    # Below 1 by more than float64 rounding, so that u · total stays below the total.
    at = uniforms.double().clamp(max=1 - 2.0**-40)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True)[:, 0]


def uniform_source(generator: torch.Generator | None, device: torch.device) -> Uniform:
    """Uniforms drawn from `generator` (or the global one), moved to `device`."""
    at = generator.device if generator is not None else device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=at, dtype=torch.float64).to(device)

    return uniform
