"""Guidance of a sampler: the prediction given the condition is pushed away from the one without it.

b batch · c channels · h w picture or latent grid
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

GUIDERS = ("none", "cfg", "apg")
Scale = float | Callable[[float], float]
# (conditional prediction [b, c, h, w], null prediction, t) -> the guided prediction.
Guide = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (arXiv 2410.02416): the difference of the two predictions gets `momentum`,
    is cut to a norm of `threshold` (0: never), and its part along the conditional prediction is scaled by
    `eta`. Defaults are FlexTok's."""

    momentum: float = -0.5
    threshold: float = 2.5
    eta: float = 0.0


def check_guider(name: str) -> str:
    """The name itself. Raises ValueError for one that is not in `GUIDERS`."""
    if name not in GUIDERS:
        raise ValueError(f"guider must be one of {', '.join(GUIDERS)}, got {name!r}.")
    return name


def make_guide(kind: str, scale: Scale, apg: APG) -> Guide | None:
    """The guide of one run of a sampler (APG's momentum belongs to the run); None where nothing is guided.

    kind: `none`, `cfg` (``u + w (c - u)``) or `apg`; scale: w, or a function of t."""
    if kind == "none" or scale == 1.0:
        return None
    value = scale if callable(scale) else lambda time: scale
    if kind == "cfg":
        return lambda given, free, time: free + value(time) * (given - free)
    # diffusers' function, not its guider class: that one is experimental, keeps its momentum from run to run
    # unless its own pipeline prepares it, and leaves the momentum alone in steps of scale 1.
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    momentum = MomentumBuffer(apg.momentum)

    def guided(given: Tensor, free: Tensor, time: float) -> Tensor:
        # Its "original formulation" starts from the conditional prediction, hence the scale - 1.
        return normalized_guidance(
            given,
            free,
            value(time) - 1,
            momentum,
            apg.eta,
            apg.threshold,
            use_original_formulation=True,
        )

    return guided
