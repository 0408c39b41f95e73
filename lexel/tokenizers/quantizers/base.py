"""The contract every quantizer satisfies, and the arithmetic they share.

vector-quantize-pytorch supplies training (EMA codebooks, dead-code replacement, straight-through and
rotation gradients, entropy terms). In eval mode and in `encode`, look-ups are our own: they never change
the codebook, agree with the library's, and cost less (no distances kept, no [n, K] one-hot).

b batch · n positions · k codebooks per position · d latent width · K codebook size
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lexel.types import QuantizerOutput

LOOKUP_CHUNK = 1 << 24  # distances computed at once: 64 MiB of float32


class Quantizer(nn.Module, ABC):
    """Latents ``[b, n, d]`` to codes ``[b, n, k]`` and back.

    Always computed in float32, whatever autocast says: near-ties would flip codes otherwise.
    Laws: eval ``forward(x).quantized == decode(encode(x))``; `encode` and `decode` never change the state;
    in training the gradient of `quantized` with respect to `latents` is the identity (times the derivative
    of the bounding function for `fsq` and the unit-length projection for cosine `vq`), unless the rotation
    trick is on, and but for `ibq`, which goes back through its choice.
    """

    def __init__(self, dim: int, codebook_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.dim = dim
        self.codebook_sizes = codebook_sizes

    def forward(self, latents: Tensor, quantize: bool = True) -> QuantizerOutput:
        """Quantize float ``[b, n, d]``. `quantize=False` returns the latents bounded as codes are but not
        rounded, while codebooks keep learning from them: the start-up phase of training."""
        if latents.ndim != 3 or latents.shape[2] != self.dim:
            raise ValueError(f"latents must be [b, n, {self.dim}], got {tuple(latents.shape)}.")
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            if self.training:
                quantized, indices, losses = self.learn(latents)
            else:
                indices = self.encode(latents)
                quantized, losses = self.decode(indices), {}
            if not quantize:
                quantized = self.bypass(latents)
            return QuantizerOutput(quantized, indices, losses, self.statistics(indices))

    def statistics(self, indices: Tensor) -> dict[str, Tensor]:
        """Usage and perplexity of ``[b, n, k]`` codes, averaged over the k codebooks."""
        each = [code_statistics(indices[..., j], size) for j, size in enumerate(self.codebook_sizes)]
        return {name: torch.stack([one[name] for one in each]).mean() for name in each[0]}

    @abstractmethod
    def learn(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Training step on float32 ``[b, n, d]``: straight-through quantized ``[b, n, d]``, long
        ``[b, n, k]`` and the named loss terms; updates codebook statistics."""

    @abstractmethod
    def encode(self, latents: Tensor) -> Tensor:
        """Float ``[b, n, d]`` to long ``[b, n, k]``, without side effects."""

    @abstractmethod
    def decode(self, indices: Tensor) -> Tensor:
        """Long ``[b, n, k]`` to float ``[b, n, d]``."""

    @abstractmethod
    def bypass(self, latents: Tensor) -> Tensor:
        """``[b, n, d]`` in the region where codes live (unit sphere, bounded box), not rounded."""


@torch.no_grad()
def nearest_code(latents: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """Index of the nearest row of `codebook` ``[K, d]`` for each of `latents` ``[..., d]``: the largest
    cosine (rows of unit length), else the smallest Euclidean distance. Long ``[...]``, lowest index on ties.
    """
    flat = latents.reshape(-1, latents.shape[-1]).to(codebook.dtype)
    # argmin |x - e|^2 = argmax x.e - |e|^2 / 2, which needs no |x|^2 and no square root.
    offset = codebook.new_zeros(1) if cosine else codebook.pow(2).sum(1) / 2
    rows = max(1, LOOKUP_CHUNK // codebook.shape[0])
    found = [(chunk @ codebook.T - offset).argmax(1) for chunk in flat.split(rows)]
    return torch.cat(found).view(latents.shape[:-1])


@torch.no_grad()
def code_statistics(indices: Tensor, size: int) -> dict[str, Tensor]:
    """`usage`: share of the `size` codes that occur in this batch, 0..1; `perplexity`: exp of the entropy
    of their frequencies, 1..size (both scalars)."""
    counts = torch.unique(indices, return_counts=True)[1].float()  # not one per code: there may be 2^24
    entropy = torch.special.entr(counts / counts.sum()).sum()
    return {"usage": counts.new_tensor(len(counts) / size), "perplexity": entropy.exp()}
