"""What of a draft is accepted. Speculation has two halves: a `Drafter` proposes, an `Acceptance` decides.

`exact` is lossless chain speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv
2302.01318): the tokens are distributed exactly as the target's own, whatever the drafter proposes.

b rows · g drafted tokens (padded) · v vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lexel.sample.logits import Uniform, draw


@dataclass(frozen=True)
class Draft:
    """Drafted tokens as acceptance sees them.

    ids: long ``[b, g]``; lengths: long ``[b]``, tokens in use per row; probs: float ``[b, g, v]``, the
    distribution each token was *actually* drawn from; bonus: bool ``[b]``, whether the target also predicts
    a token after the row's last drafted one (not when the draft already ends the generation).
    """

    ids: Tensor
    lengths: Tensor
    probs: Tensor
    bonus: Tensor


@dataclass(frozen=True)
class Verdict:
    """accepted: long ``[b]``, leading drafted tokens that stand; extra: long ``[b]``, the token the target
    puts after them (v where there is none); kept: bool ``[b, g]``, the test of each position on its own."""

    accepted: Tensor
    extra: Tensor
    kept: Tensor


class Acceptance(Protocol):
    """Decides which drafted tokens stand; `exact` is lossless, relaxed rules fit the same signature."""

    def __call__(self, target: Tensor, draft: Draft, uniform: Uniform) -> Verdict:
        """target: float ``[b, g + 1, v]``, the target's distribution at each drafted position and after."""
        ...


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """Weights ``max(0, p − q)`` ``[n, v]`` (not normalised) to draw from after a rejection. Where rounding
    leaves nothing, p itself: a uniform fallback could emit ids the grammar forbids."""
    weights = (target - draft).clamp(min=0)
    return torch.where(weights.sum(dim=-1, keepdim=True) > 0, weights, target)


def exact(target: Tensor, draft: Draft, uniform: Uniform) -> Verdict:
    """Accept token x while ``u < min(1, p(x) / q(x))``; at the first rejection draw from the residual; after
    a fully accepted draft draw a bonus token from p. With no drafted tokens this is plain sampling."""
    rows, drafted = draft.ids.shape
    row = torch.arange(rows, device=target.device)
    chosen = draft.ids[..., None]
    p = target[:, :drafted].gather(-1, chosen)[..., 0]
    q = draft.probs.gather(-1, chosen)[..., 0]
    inside = torch.arange(drafted, device=target.device) < draft.lengths[:, None]
    kept = (uniform(rows, drafted) * q < p) & inside
    accepted = kept.long().cumprod(dim=1).sum(dim=1)
    weights = target[row, accepted]
    if drafted:
        rejected = accepted < draft.lengths
        proposed = draft.probs[row, accepted.clamp(max=drafted - 1)]
        weights = residual(weights, proposed * rejected[:, None])
    extra = draw(weights, uniform(rows))
    surplus = (accepted == draft.lengths) & ~draft.bonus
    return Verdict(accepted, extra.masked_fill(surplus, target.shape[-1]), kept)


def recouple(target: Tensor, draft: Draft, verdict: Verdict, uniform: Uniform) -> Tensor:
    """Redraw every drafted position from its target distribution, keeping as many tokens as that allows.

    Maximal coupling (MC-SJD): position j keeps its token when its own test passed and is otherwise drawn
    from the residual, so it is distributed as ``target[:, j]`` and equals the old token with probability
    1 − TV(p, q). The last column is drawn afresh. Returns long ``[b, g + 1]``."""
    rows, drafted, size = draft.probs.shape
    weights = torch.cat([residual(target[:, :drafted], draft.probs), target[:, drafted:]], dim=1)
    fresh = draw(weights.reshape(-1, size), uniform(rows * (drafted + 1))).reshape(rows, drafted + 1)
    fresh[:, :drafted] = torch.where(verdict.kept, draft.ids, fresh[:, :drafted])
    return fresh
