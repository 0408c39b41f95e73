"""From logits to probabilities: the one path used by plain decoding, drafting and verification alike.

Order: guidance → extra processors → temperature → top-k → top-p → min-p → softmax, on the ids that the
grammar allows. Speculation is lossless only with respect to the distribution the plain sampler would use, so
nothing else in Lexel filters logits.

n rows (any mixture of sequences and positions) · s ids of a support · v vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

# transformers' signature: (input_ids long [1, l], scores float [1, v]) -> scores float [1, v].
Processor = Callable[[Tensor, Tensor], Tensor]

Schedule = Literal["constant", "linear", "cosine", "log", "square", "square_root"]


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens of one modality are drawn.

    temperature: 0 is greedy (the arg-max, lowest id on ties). top_k: 0 keeps all; ids that tie with the k-th
    are kept. top_p: keep the smallest set of ids holding this probability. min_p: drop ids below this share
    of the most probable one. guidance: scale s of ``u + s·(c − u)`` on raw logits; 1 ignores the
    unconditional row. top_p_first: top-p before top-k (EAGLE, LANTERN) instead of after (LlamaGen).

    Over the codes of one picture: schedule: how guidance grows from 1 to its full scale (`guidance_share`);
    guidance_steps: how many codes are guided, the others by the conditional row alone (None: all of them;
    LlamaGen's cfg_interval k is k + 2 here). `at` says what holds for one code.
    further: settings of columns 1, 2, … of models with several codes per position (empty: as column 0); these
    cannot have any of their own. Raises ValueError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    guidance: float = 1.0
    top_p_first: bool = False
    schedule: Schedule = "constant"
    guidance_steps: int | None = None
    further: tuple[SamplingConfig, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "further", tuple(self.further))
        for name in ("temperature", "top_k", "top_p", "min_p", "guidance"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}.")
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
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule is one of {', '.join(get_args(Schedule))}, got {self.schedule!r}.")
        if self.guidance_steps is not None and self.guidance_steps < 1:
            raise ValueError(f"guidance_steps must be at least 1 (None: all), got {self.guidance_steps}.")
        if any(not isinstance(config, SamplingConfig) or config.further for config in self.further):
            raise ValueError(f"further holds the settings of one column each, got {self.further}.")

    @property
    def guided(self) -> bool:
        """Whether the unconditional row is needed anywhere."""
        return self.guidance != 1.0 or any(config.guided for config in self.further)

    @property
    def varies(self) -> bool:
        """Whether the settings differ from code to code of a picture."""
        own = self.schedule != "constant" or self.guidance_steps is not None
        return own or any(config.varies for config in self.further)

    def at(self, step: int, steps: int) -> SamplingConfig:
        """The settings for code number `step` (from 0) of a picture of `steps` codes, with nothing left that
        varies."""
        if not self.varies:
            return self
        guided = self.guidance_steps is None or step < self.guidance_steps
        share = guidance_share(self.schedule, step, steps) if guided else 0.0
        return replace(
            self,
            guidance=self.guidance if share == 1.0 else 1.0 + (self.guidance - 1.0) * share,
            schedule="constant",
            guidance_steps=None,
            further=tuple(config.at(step, steps) for config in self.further),
        )

    def column(self, column: int) -> SamplingConfig:
        """The settings of one column."""
        return self.further[column - 1] if column and self.further else self

    def with_every(self, **changes: Any) -> SamplingConfig:
        """These settings with some fields changed, in the further columns too."""
        return replace(self, **changes, further=tuple(replace(x, **changes) for x in self.further))


def guidance_share(schedule: Schedule, step: int, steps: int) -> float:
    """How much of the guidance beyond 1 is in force at code `step` (from 0) of `steps`, from 0 to 1: ELM's
    schedules (github.com/Pepper-lll/LMforImageGeneration) in r = (step + 1) / steps. Its "square_root" alone
    counts from 0: the first code is not guided."""
    r = (step + 1) / steps
    if schedule == "linear":
        return r
    if schedule == "cosine":
        return math.cos((r - 1) * math.pi / 2)
    if schedule == "log":
        return math.log1p(r * (math.e - 1))
    if schedule == "square":
        return r**2
    if schedule == "square_root":
        return math.sqrt(step / steps)
    return 1.0


@dataclass(frozen=True)
class Distribution:
    """n distributions over the vocabulary, each kept on its support only.

    ids: long ``[n, s]``, strictly ascending in each row, an expanded view where all rows share a support
    (operations between such rows need no search); padding is an id from `size` up, of probability 0.
    probs: float ``[n, s]`` (at least float32), summing to 1, or all 0 for a row without a distribution (NaN
    for one from logits that are not finite). size: the vocabulary's.
    """

    ids: Tensor
    probs: Tensor
    size: int

    @staticmethod
    def certain(tokens: Tensor, size: int) -> Distribution:
        """One-hot on `tokens` long ``[n]``; a row without a distribution where a token is `size`."""
        return Distribution(tokens[:, None], (tokens < size).float()[:, None], size)

    @staticmethod
    def cat(parts: Sequence[Distribution]) -> Distribution:
        """All rows of `parts`, one part after the other, padded to the widest support."""
        if len(parts) == 1:
            return parts[0]
        probs = [part.probs for part in parts]
        first = parts[0]
        if all(first._same_support(part) for part in parts):
            together = torch.cat(probs)
            return Distribution(first.ids[:1].expand(len(together), -1), together, first.size)
        dtype = torch.promote_types(probs[0].dtype, probs[-1].dtype)
        rows, width = sum(len(part) for part in parts), max(part.ids.shape[1] for part in parts)
        # A padding id lies in the column of its own number past the vocabulary, so rows ascend.
        ids = torch.arange(first.size, first.size + width, device=first.ids.device).repeat(rows, 1)
        padded = probs[0].new_zeros(rows, width, dtype=dtype)
        start = 0
        for part in parts:
            end = start + len(part)
            ids[start:end, : part.ids.shape[1]] = part.ids
            padded[start:end, : part.ids.shape[1]] = part.probs
            start = end
        return Distribution(ids, padded, first.size)

    def __len__(self) -> int:
        return len(self.probs)

    def __getitem__(self, rows: Tensor | slice) -> Distribution:
        """Some rows: their numbers (long), a mask (bool) or a slice."""
        probs = self.probs[rows]
        ids = self.ids[:1].expand(len(probs), -1) if self._shared else self.ids[rows]
        return Distribution(ids, probs, self.size)

    @property
    def _shared(self) -> bool:
        """Whether all rows have one support in memory."""
        return len(self.ids) == 1 or (len(self.ids) > 1 and self.ids.stride(0) == 0)

    def _same_support(self, other: Distribution) -> bool:
        """Whether all rows of both have the same support, by place in memory and not by value."""
        mine, theirs = self.ids, other.ids
        same = mine.shape[1] == theirs.shape[1] and mine.data_ptr() == theirs.data_ptr()
        return same and self._shared and other._shared

    def _find(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of `tokens` ``[n, m]`` in their rows' supports, and whether they lie there."""
        tokens = tokens.contiguous()
        support = self.ids[0] if self._shared else self.ids.contiguous()
        column = torch.searchsorted(support, tokens)
        column = column.clamp(max=self.ids.shape[1] - 1)
        return column, self.ids.gather(1, column) == tokens

    def at(self, tokens: Tensor) -> Tensor:
        """Probabilities of `tokens` long ``[n]`` or ``[n, m]``, in their shape; 0 outside the support."""
        if tokens.ndim == 1:
            return self.at(tokens[:, None])[:, 0]
        if not self.probs.numel():
            return self.probs.new_zeros(tokens.shape)
        if 16 * tokens.shape[1] > self.ids.shape[1]:  # many: looking up beats searching
            return self._dense().gather(1, tokens)
        column, found = self._find(tokens)
        return torch.where(found, self.probs.gather(1, column), 0)

    def draw(self, uniforms: Tensor) -> Tensor:
        """Ids long ``[n]`` at `uniforms` float64 ``[n]`` in [0, 1), see `draw`; `size` where there is no
        distribution, or NaN."""
        width = self.ids.shape[1]
        if not width:
            return torch.full((len(self),), self.size, device=self.ids.device)
        column = draw(self.probs, uniforms)[:, None]
        ids = self.ids.gather(1, column.clamp(max=width - 1))
        return torch.where(column < width, ids, self.size)[:, 0]

    def dense(self) -> Tensor:
        """Float ``[n, v]``."""
        return self._dense()[:, : self.size]

    def _dense(self) -> Tensor:
        """With room for padding ids: float ``[n, v + width]``."""
        room = self.probs.new_zeros(len(self), self.size + self.ids.shape[1])
        return room.scatter_(1, self.ids, self.probs)

    def peaks(self) -> Distribution:
        """One-hot on the most probable id of each row, the first of equal ones; empty rows stay empty."""
        best = self.ids.gather(1, self.probs.argmax(dim=-1, keepdim=True))[:, 0]
        return Distribution.certain(torch.where(self.probs.sum(dim=-1) > 0, best, self.size), self.size)

    def minus(self, other: Distribution) -> Distribution:
        """The residual ``norm(max(0, p − q))``. Where rounding leaves nothing, p itself: a uniform fallback
        could emit ids that the grammar forbids."""
        return self.excess(other).normalised(self)

    def without(self, tokens: Tensor) -> Distribution:
        """`tokens` long ``[n]`` or ``[n, m]`` excluded (ids outside the support change nothing) and the rest
        renormalised; all 0 where nothing is left."""
        return self.zeroed(tokens).normalised()

    def excess(self, other: Distribution) -> Distribution:
        """The weights ``max(0, p − q)``, not renormalised."""
        q = other.probs
        if not self._same_support(other):
            width = max(self.ids.shape[1], other.ids.shape[1])
            room = q.new_zeros(len(self), self.size + width)
            # Faster than searching one support in the other by an order of magnitude.
            q = room.scatter_(1, other.ids, q).gather(1, self.ids)
        return Distribution(self.ids, (self.probs - q).clamp_(min=0), self.size)

    def zeroed(self, tokens: Tensor) -> Distribution:
        """The weights with those of `tokens` (see `without`) set to 0, not renormalised."""
        if not self.probs.numel():
            return self
        column, found = self._find(tokens[:, None] if tokens.ndim == 1 else tokens)
        width = self.ids.shape[1]
        out = torch.zeros(len(self), width + 1, dtype=torch.bool, device=self.ids.device)
        out.scatter_(1, torch.where(found, column, width), True)  # misses fall into the last column
        return Distribution(self.ids, self.probs.masked_fill(out[:, :width], 0), self.size)

    def normalised(self, otherwise: Distribution | None = None) -> Distribution:
        """Divided by the sums of the rows; rows of zeros become those of `otherwise` (same ids), if given."""
        total = self.probs.sum(dim=-1, keepdim=True)
        fallback = self.probs if otherwise is None else otherwise.probs
        return Distribution(self.ids, torch.where(total > 0, self.probs / total, fallback), self.size)

    def to(self, device: torch.device | str) -> Distribution:
        """On another device; a shared support stays shared."""
        ids = self.ids[:1].to(device).expand(len(self), -1) if self._shared else self.ids.to(device)
        return Distribution(ids, self.probs.to(device), self.size)


def target_distribution(
    cond: Tensor,
    uncond: Tensor | None,
    config: SamplingConfig,
    ids: Tensor | None = None,
    *,
    processors: Sequence[Processor] = (),
    contexts: Sequence[Tensor] | None = None,
    size: int | None = None,
) -> Distribution:
    """The distributions of the next id in n rows.

    cond, uncond: raw logits ``[n, s]`` of the two rows of guidance, at the allowed ids long ``[s]``
    (ascending; None: all of them). config: settings of one place (`SamplingConfig.at`). size: the
    vocabulary's, needed with `ids`. processors: transformers' logits processors, called row by row with
    ``contexts[i]``, the ids long ``[l]`` before row i, and the guided scores of the whole vocabulary (−inf
    where not allowed). On the CPU a filter shrinks the support to what it keeps; on other devices it only
    sets probabilities to 0, which needs no synchronisation.
    Raises ValueError when guidance lacks the unconditional logits, processors lack contexts, or ids lack
    the vocabulary's size.
    """
    if ids is not None and size is None:
        raise ValueError("target_distribution needs the vocabulary's size beside the allowed ids.")
    size = cond.shape[-1] if size is None else size
    scores = cond if cond.dtype == torch.float64 else cond.float()
    if config.guidance != 1.0:
        if uncond is None:
            raise ValueError(f"guidance {config.guidance} needs the unconditional row's logits.")
        base = uncond.to(scores.dtype)
        scores = (scores - base).mul_(config.guidance).add_(base)
    ids = (_every(size, cond.device) if ids is None else ids).expand(len(scores), -1)
    if processors:
        scores = _process(scores, ids, size, processors, contexts)
    if config.temperature == 0:
        return _greedy(scores, ids, size)
    if config.temperature != 1.0:
        scores = scores / config.temperature
    top = [(_below_top_k, config.top_k, 0), (_below_top_p, config.top_p, 1.0)]
    if config.top_p_first:
        top.reverse()
    for below, value, off in [*top, (_below_min_p, config.min_p, 0.0)]:
        if value != off:
            ids, scores = _drop(ids, scores, below(scores, value), size)
    return Distribution(ids, scores.softmax(dim=-1), size)


@lru_cache(maxsize=16)
def _every(size: int, device: torch.device) -> Tensor:
    """All ids; one tensor, so that distributions over all ids are seen to share their support."""
    return torch.arange(size, device=device)


def _process(
    scores: Tensor, ids: Tensor, size: int, processors: Sequence[Processor], contexts: Sequence[Tensor] | None
) -> Tensor:
    if contexts is None or len(contexts) != len(scores):
        raise ValueError(f"logits processors need the ids before each of the {len(scores)} rows.")
    rows = []
    dense = scores.new_full((len(scores), size), -torch.inf).scatter_(1, ids, scores)
    for row, context in zip(dense, contexts):
        processed = row[None]
        for processor in processors:
            processed = processor(context[None], processed)
        rows.append(processed)
    return torch.cat(rows).gather(1, ids)


def _greedy(scores: Tensor, ids: Tensor, size: int) -> Distribution:
    """One id per row; `max` returns the first of equal values, and NaN where there is one."""
    best, column = scores.max(dim=-1, keepdim=True)
    return Distribution(ids.gather(1, column), best.isfinite().to(scores.dtype), size)


# What each filter drops, as transformers' warper of that name does; NaN is never dropped, so that damaged
# logits stay visible.


def _below_top_k(scores: Tensor, k: float) -> Tensor:
    """Below the k-th largest score; what ties with it is kept."""
    if k >= scores.shape[-1]:
        return scores == -torch.inf
    return scores < scores.topk(int(k), sorted=False).values.amin(dim=-1, keepdim=True)


def _below_top_p(scores: Tensor, p: float) -> Tensor:
    """The least probable ids that together hold at most 1 − p; never the most probable one. Of equal ones the
    lower ids go first (transformers leaves that to an unstable sort)."""
    ascending, order = scores.sort(dim=-1, stable=True)
    below = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    below[:, -1] = False
    return below.scatter(1, order, below)


def _below_min_p(scores: Tensor, p: float) -> Tensor:
    """Less probable than p times the most probable id."""
    probs = scores.softmax(dim=-1)
    return probs < p * probs.amax(dim=-1, keepdim=True)


def _drop(ids: Tensor, scores: Tensor, below: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The supports and scores without what is `below` (bool ``[n, s]``). Rows keep different numbers of ids
    where scores tie or the filter goes by probability; the shorter ones are padded."""
    if scores.device.type != "cpu":
        return ids, scores.masked_fill(below, -torch.inf)
    row, column = below.logical_not_().nonzero(as_tuple=True)  # row by row, columns ascending: no sort
    count, width = len(scores), scores.shape[1]
    if len(row) == count * width:
        return ids, scores
    kept = ids[row, column], scores[row, column]
    if len(row) % count == 0:
        width = len(row) // count
        if bool((row.view(count, width)[:, [0, -1]] == torch.arange(count)[:, None]).all()):
            return kept[0].view(count, width), kept[1].view(count, width)
    counts = row.bincount(minlength=count)
    width = int(counts.max())
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    support = torch.arange(size, size + width).repeat(count, 1)
    support[row, place] = kept[0]
    padded = scores.new_full((count, width), -torch.inf)
    padded[row, place] = kept[1]
    return support, padded


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Columns long ``[n]`` drawn from non-negative weights ``[n, v]`` (sums need not be 1) by inverting the
    cumulative sum at `uniforms` ``[n]`` in [0, 1). A weight of 0 is never drawn; a row of zeros (or NaN)
    gives v, one past the last column."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    # Below 1 by more than float64 rounding, so that u · total stays below the total.
    at = uniforms.double().clamp(max=1 - 2.0**-40)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True)[:, 0]
