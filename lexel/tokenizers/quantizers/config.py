"""Which quantizer, chosen by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lexel.tokenizers.quantizers.base import Quantizer

KINDS = ("vq", "fsq", "lfq", "simvq", "residual", "learned", "bernoulli", "sign", "ibq", "stochastic")


@dataclass(frozen=True)
class QuantizerConfig:
    """Names a quantizer of vector-quantize-pytorch and the options of its kind.

    kind: `vq` (EMA codebook), `fsq` (finite scalar, 2309.15505), `lfq` (lookup-free, 2310.05737), `simvq`
    (frozen codebook through a learned map, 2411.02038), `residual` (`depth` EMA codebooks, 2107.03312),
    `learned` (a codebook that gradients train, as in the published LlamaGen, FQGAN and TiTok files),
    `bernoulli` (one probability per bit, 2410.16257), `sign` (LFQ as Open-MAGVIT2 publishes it, 2409.04410),
    `ibq` (a differentiable choice of the row, 2412.02692), `stochastic` (`learned` by direction, whose
    training draws the row by likeness, LARP, 2410.21264).
    codebook_size: codes per codebook (a power of two for `lfq`, `sign` and `bernoulli`; `fsq` takes the
    product of `levels`).
    cosine: compare directions, not distances (`vq`, `learned`); latents and codes then have unit length.
    commitment: weight of the pull of latents towards their codes (all but `fsq`; of ELM's code loss for
    `bernoulli`, 0 as published; of the pull of rows towards latents for `ibq`, whose other half counts 1).
    pull: weight of the pull of rows towards their latents (`learned`, `stochastic`).
    decay: EMA decay of codebooks (`vq`, `residual`).
    dead_below: a code whose EMA count per batch falls below this is moved onto a random latent of the
    batch (`vq`, `residual`); 0 never.
    kmeans_init: start the codebooks from k-means on the first training batch (`vq`, `residual`).
    rotation: rotation trick (2410.06424) in place of the straight-through gradient (`vq`, `simvq`).
    entropy: weight of the entropy term (`lfq`, `learned`, `sign`, `ibq`); entropy_gamma: of its diversity
    half (`lfq`, `sign`, `ibq`); entropy_certainty: of its other half, and temperature: of its soft assignment
    (`sign`, `ibq`), or of the draw (`stochastic`, published 0.03; below 0: a parameter, at first 0.1).
    groups: bits of each sub-code that a code is cut into; none: whole codes (`bernoulli`, `sign`).
    deterministic: training thresholds the bits too instead of drawing them (`bernoulli`); tanh: bits count
    -1 and 1 instead of 0 and 1 (`bernoulli`).
    Raises ValueError on an unknown kind or options that contradict it.
    """

    kind: str = "vq"
    codebook_size: int = 256
    levels: tuple[int, ...] = ()
    depth: int = 1
    cosine: bool = True
    commitment: float = 0.25
    pull: float = 1.0
    decay: float = 0.9
    dead_below: float = 0.1
    kmeans_init: bool = False
    rotation: bool = False
    entropy: float = 0.1
    entropy_gamma: float = 1.0
    entropy_certainty: float = 1.0
    temperature: float = 0.01
    groups: tuple[int, ...] = ()
    deterministic: bool = False
    tanh: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "groups", tuple(self.groups))
        if self.kind not in KINDS:
            raise ValueError(f"quantizer kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.kind == "fsq" and (not self.levels or min(self.levels) < 3):
            raise ValueError(f"fsq needs levels of at least 3 each, e.g. (8, 5, 5), got {self.levels}.")
        if self.kind != "fsq" and self.levels:
            raise ValueError(f"levels belong to fsq, not to {self.kind}.")
        if self.kind in ("lfq", "sign", "bernoulli") and self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"{self.kind} needs a power of two as codebook_size, got {self.codebook_size}.")
        if self.groups and (
            self.kind not in ("bernoulli", "sign") or 1 << sum(self.groups) != self.codebook_size
        ):
            raise ValueError(
                f"groups cut a bernoulli or sign code into sub-codes; {self.groups} do not fit "
                f"{self.kind} with {self.codebook_size} codes."
            )
        if self.codebook_size < 2 or self.depth < 1:
            raise ValueError(
                f"codebook_size must be at least 2 and depth 1, got {self.codebook_size}, {self.depth}."
            )
        if self.kind == "stochastic" and (not self.cosine or not self.temperature or self.entropy):
            raise ValueError(
                "stochastic needs cosine, a temperature other than 0 and entropy 0, got "
                f"{self.cosine}, {self.temperature} and {self.entropy}."
            )
        if self.depth > 1 and self.kind != "residual":
            raise ValueError(f"depth {self.depth} belongs to residual, not to {self.kind}.")
        if self.rotation and self.kind not in ("vq", "simvq"):
            raise ValueError(f"rotation belongs to vq and simvq, not to {self.kind}.")

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes per codebook, one entry per code of a position."""
        if self.kind == "fsq":
            return (math.prod(self.levels),)
        if self.groups:
            return tuple(1 << bits for bits in self.groups)
        return (self.codebook_size,) * self.depth

    def build(self, dim: int) -> Quantizer:
        """The quantizer for latents of width `dim`."""
        # vector-quantize-pytorch takes over a second to import: only when one is built.
        from lexel.tokenizers.quantizers import bernoulli, ibq, learned, scalar, sign, stochastic, vector

        kinds: dict[str, Callable[[int, QuantizerConfig], Quantizer]] = {
            "vq": vector.VQ,
            "residual": vector.Residual,
            "simvq": vector.Sim,
            "fsq": scalar.FiniteScalar,
            "lfq": scalar.LookupFree,
            "learned": learned.Learned,
            "bernoulli": bernoulli.Bernoulli,
            "sign": sign.Sign,
            "ibq": ibq.IndexBackpropagation,
            "stochastic": stochastic.Stochastic,
        }
        return kinds[self.kind](dim, self)
