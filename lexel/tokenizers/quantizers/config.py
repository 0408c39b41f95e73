"""Which quantizer, chosen by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lexel.tokenizers.quantizers.base import Quantizer

KINDS = ("vq", "fsq", "lfq", "simvq", "residual", "learned")


@dataclass(frozen=True)
class QuantizerConfig:
    """Names a quantizer of vector-quantize-pytorch and the options of its kind.

    kind: `vq` (EMA codebook), `fsq` (finite scalar, 2309.15505), `lfq` (lookup-free, 2310.05737), `simvq`
    (frozen codebook through a learned map, 2411.02038), `residual` (`depth` EMA codebooks, 2107.03312),
    `learned` (a codebook that gradients train, as in the published LlamaGen, FQGAN and TiTok files).
    codebook_size: codes per codebook (a power of two for `lfq`; `fsq` takes the product of `levels`).
    cosine: compare directions, not distances (`vq`, `learned`); latents and codes then have unit length.
    commitment: weight of the pull of latents towards their codes (all but `fsq`).
    decay: EMA decay of codebooks (`vq`, `residual`).
    dead_below: a code whose EMA count per batch falls below this is moved onto a random latent of the
    batch (`vq`, `residual`); 0 never.
    kmeans_init: start the codebooks from k-means on the first training batch (`vq`, `residual`).
    rotation: rotation trick (2410.06424) in place of the straight-through gradient (`vq`, `simvq`).
    entropy: weight of the entropy term (`lfq`, `learned`); entropy_gamma: of its diversity half (`lfq`).
    Raises ValueError on an unknown kind or options that contradict it.
    """

    kind: str = "vq"
    codebook_size: int = 256
    levels: tuple[int, ...] = ()
    depth: int = 1
    cosine: bool = True
    commitment: float = 0.25
    decay: float = 0.9
    dead_below: float = 0.1
    kmeans_init: bool = False
    rotation: bool = False
    entropy: float = 0.1
    entropy_gamma: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if self.kind not in KINDS:
            raise ValueError(f"quantizer kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.kind == "fsq" and (not self.levels or min(self.levels) < 3):
            raise ValueError(f"fsq needs levels of at least 3 each, e.g. (8, 5, 5), got {self.levels}.")
        if self.kind != "fsq" and self.levels:
            raise ValueError(f"levels belong to fsq, not to {self.kind}.")
        if self.kind == "lfq" and self.codebook_size & (self.codebook_size - 1):
            raise ValueError(f"lfq needs a power of two as codebook_size, got {self.codebook_size}.")
        if self.codebook_size < 2 or self.depth < 1:
            raise ValueError(
                f"codebook_size must be at least 2 and depth 1, got {self.codebook_size}, {self.depth}."
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
        return (self.codebook_size,) * self.depth

    def build(self, dim: int) -> Quantizer:
        """The quantizer for latents of width `dim`."""
        # vector-quantize-pytorch takes over a second to import: only when one is built.
        from lexel.tokenizers.quantizers import learned, scalar, vector

        kinds: dict[str, Callable[[int, QuantizerConfig], Quantizer]] = {
            "vq": vector.VQ,
            "residual": vector.Residual,
            "simvq": vector.Sim,
            "fsq": scalar.FiniteScalar,
            "lfq": scalar.LookupFree,
            "learned": learned.Learned,
        }
        return kinds[self.kind](dim, self)
