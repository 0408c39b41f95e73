"""Plain measures of pictures, codes and processes.

b batch · n code positions · k codebooks · h w picture
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence

import torch
from einops import reduce
from torch import Tensor

from lexel.types import Codes


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per picture, float ``[b]``, of pixels ``[b, 3, h, w]`` in [-1, 1]
    (peak to peak 2). Pictures are clipped to the range first; equal ones give 100 dB, the cap.
    Raises ValueError when the shapes differ."""
    if first.shape != second.shape:
        raise ValueError(
            f"psnr compares pictures of one shape, got {list(first.shape)}, {list(second.shape)}."
        )
    difference = (first.clamp(-1, 1) - second.clamp(-1, 1)) / 2
    error = reduce(difference.double().square(), "b c h w -> b", "mean")
    return -10 * error.clamp_min(1e-10).log10()


def sound_quality(found: Tensor, original: Tensor) -> dict[str, float]:
    """Of a sound ``[1, t]`` against the original, in dB: signal-to-noise ratio (snr), and the scale-invariant
    signal-to-distortion ratio (si_sdr), which forgives another loudness and a constant offset."""
    from torchmetrics.functional.audio import (
        scale_invariant_signal_distortion_ratio,
        signal_noise_ratio,
    )

    si_sdr = scale_invariant_signal_distortion_ratio(found, original, zero_mean=True)
    return {"si_sdr": float(si_sdr[0]), "snr": float(signal_noise_ratio(found, original)[0])}


class CodebookUsage:
    """Counts how often each code occurs. sizes: codes per codebook."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.counts = [torch.zeros(size, dtype=torch.long) for size in sizes]

    def update(self, codes: Codes) -> None:
        """Add a batch; codes beyond a row's length are left out."""
        indices = codes.indices.cpu()
        inside = torch.ones(indices.shape[:2], dtype=torch.bool)
        if codes.lengths is not None:
            inside = torch.arange(indices.shape[1]) < codes.lengths.cpu()[:, None]
        for count, column in zip(self.counts, indices[inside].unbind(dim=1)):
            count += torch.bincount(column, minlength=len(count))

    @property
    def usage(self) -> float:
        """Share of the codes that occurred at all, averaged over codebooks."""
        return sum(float((count > 0).double().mean()) for count in self.counts) / len(self.counts)

    @property
    def perplexity(self) -> float:
        """2 to the entropy of the code distribution (the number of codes if all were equally frequent),
        averaged over codebooks."""
        total = 0.0
        for count in self.counts:
            share = count[count > 0].double() / count.sum()
            total += math.exp(float(-(share * share.log()).sum()))
        return total / len(self.counts)


def peak_memory_mb() -> float:
    """The most memory this process has held so far, in MB (10^6 bytes); on CUDA plus the device's."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return (resident + device) / 1e6
