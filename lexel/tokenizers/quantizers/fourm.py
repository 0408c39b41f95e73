"""4M's two quantizers (apple/ml-4m, Apache-2.0), under the names that its files keep.

`EMAVQ` is lucidrains' vector quantizer with one difference that matters: the row that is returned is the
stored one, which moving averages keep near unit length, not exactly at it. `Memcodes` (lucidrains' NWT) has
one small codebook per head, looked at through learned keys and answered with learned values.

b batch · n positions · k heads (codes per position) · d latent width · e = d/k · K codebook size
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.tokenizers.quantizers.base import Quantizer, nearest_code

EPS = 1e-5  # of the smoothed counts of a Euclidean codebook
SPLIT_NOISE = 1e-10


@dataclass(frozen=True)
class CodebookConfig:
    """kind: `ema` or `memcodes`. heads: codes per position; those of `ema` share one codebook and each has a
    latent of width `dim` of its own. cosine: compare directions, not distances; unit_latents: latents are of
    unit length for the commitment loss too. decay: of the moving averages. dead_below: codes used less per
    batch, on average, are moved (0: never) onto random latents of the batch (`replacement` `latents`) or
    beside the most used codes (`split`). commitment: weight of the pull of latents towards their codes.
    Everything from `cosine` on belongs to `ema`. Raises ValueError on an unknown kind or replacement."""

    kind: str = "ema"
    codebook_size: int = 16384
    dim: int = 32
    heads: int = 1
    cosine: bool = True
    unit_latents: bool = False
    decay: float = 0.99
    dead_below: float = 0.25
    replacement: str = "latents"
    commitment: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("ema", "memcodes"):
            raise ValueError(f"the quantizer is ema or memcodes, got {self.kind!r}.")
        if self.replacement not in ("latents", "split"):
            raise ValueError(f"dead codes are replaced by latents or split, got {self.replacement!r}.")
        if self.kind == "memcodes" and self.dim % self.heads:
            raise ValueError(f"{self.heads} heads do not divide latents of width {self.dim}.")

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes per codebook, one entry per code of a position."""
        return (self.codebook_size,) * self.heads

    def build(self) -> Quantizer:
        """The quantizer with fresh weights."""
        return EMAVQ(self) if self.kind == "ema" else Memcodes(self)


class EMACodebook(nn.Module):
    """Rows ``[K, d]`` that follow the latents by moving averages."""

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        rows = nn.init.kaiming_uniform_(torch.empty(config.codebook_size, config.dim))
        self.register_buffer("initted", torch.ones(1))  # of a start by k-means; nothing reads it
        self.register_buffer("cluster_size", torch.zeros(config.codebook_size))
        self.register_buffer("embed", F.normalize(rows, dim=-1) if config.cosine else rows)
        self.embed: Tensor
        self.cluster_size: Tensor
        if not config.cosine:
            self.register_buffer("embed_avg", self.embed.clone())
            self.embed_avg: Tensor

    def nearest(self, latents: Tensor) -> Tensor:
        """``[..., d] -> long [...]``."""
        if not self.config.cosine:
            return nearest_code(latents, self.embed, cosine=False)
        return nearest_code(F.normalize(latents, dim=-1), F.normalize(self.embed, dim=-1), cosine=True)

    @torch.no_grad()
    def follow(self, latents: Tensor, indices: Tensor) -> None:
        """One step of the averages towards `latents` ``[..., d]`` and their codes, of all processes."""
        flat, chosen = latents.reshape(-1, latents.shape[-1]), indices.reshape(-1)
        if self.config.cosine:
            flat = F.normalize(flat, dim=-1)
        counts = torch.bincount(chosen, minlength=len(self.embed)).to(flat)
        sums = torch.zeros_like(self.embed).index_add_(0, chosen, flat)
        for value in (counts, sums):
            _add_up(value)
        self.cluster_size.lerp_(counts, 1 - self.config.decay)
        if self.config.cosine:
            means = F.normalize(sums / counts.clamp_min(1)[:, None], dim=-1)
            kept = F.normalize(self.embed, dim=-1)
            self.embed.lerp_(torch.where(counts[:, None] > 0, means, kept), 1 - self.config.decay)
        else:
            self.embed_avg.lerp_(sums, 1 - self.config.decay)
            total = self.cluster_size.sum()
            smooth = (self.cluster_size + EPS) / (total + len(self.embed) * EPS) * total
            self.embed.copy_(self.embed_avg / smooth[:, None])
        self._replace_dead(latents.reshape(-1, latents.shape[-1]))

    def _replace_dead(self, latents: Tensor) -> None:
        dead = self.cluster_size < self.config.dead_below
        count = int(dead.sum())
        if self.config.dead_below == 0 or not count:
            return
        if self.config.replacement == "split":
            rows = self.embed[self.cluster_size.argsort(descending=True)[:count]]
            rows = rows + SPLIT_NOISE * torch.randn_like(rows)
        else:
            order = torch.randperm(len(latents), device=latents.device)
            rows = latents[order[torch.arange(count, device=latents.device) % len(latents)]]
        # Of unit length in a Euclidean codebook too, as published.
        self.embed[dead] = F.normalize(rows, dim=-1)
        if _several():
            dist.broadcast(self.embed, 0)


class EMAVQ(Quantizer):
    """See the module docstring. With several heads, linear maps to and from k latents of the full width."""

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config.dim, config.codebook_sizes)
        self.config = config
        self._codebook = EMACodebook(config)
        wide = config.dim * config.heads
        several = config.heads > 1
        self.project_in = nn.Linear(config.dim, wide) if several else nn.Identity()
        self.project_out = nn.Linear(wide, config.dim) if several else nn.Identity()

    def learn(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Quantizer.learn`; loss `commitment`."""
        split = self._split(latents)
        indices = self._codebook.nearest(split)
        codes = F.embedding(indices, self._codebook.embed)
        self._codebook.follow(split.detach(), indices)
        loss = self.config.commitment * F.mse_loss(codes, split)
        return self._join(split + (codes - split).detach()), indices, {"commitment": loss}

    def encode(self, latents: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        return self._codebook.nearest(self._split(latents.float()))

    def decode(self, indices: Tensor) -> Tensor:
        """See `Quantizer.decode`."""
        return self._join(F.embedding(indices, self._codebook.embed))

    def bypass(self, latents: Tensor) -> Tensor:
        """The latents, of unit length where codes are compared by direction."""
        split = self._split(latents)
        return self._join(F.normalize(split, dim=-1) if self.config.cosine else split)

    def _split(self, latents: Tensor) -> Tensor:
        """``[b, n, d] -> [b, n, k, d]``."""
        split = rearrange(self.project_in(latents), "b n (k d) -> b n k d", d=self.dim)
        return F.normalize(split, dim=-1) if self.config.unit_latents else split

    def _join(self, split: Tensor) -> Tensor:
        return self.project_out(rearrange(split, "b n k d -> b n (k d)"))


class HeadMap(nn.Module):
    """A linear map per head, ``[k, K, e] -> [k, K, e]``."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(heads, width, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x @ self.weight


class Memcodes(Quantizer):
    """See the module docstring. Code j of a position is the key with the largest dot product with part j of
    the latent; its vector is the concatenation of the values. Training draws the choice (Gumbel, straight
    through), from `generator` where one is set."""

    generator: torch.Generator | None = None

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config.dim, config.codebook_sizes)
        self.heads = config.heads
        width = config.dim // config.heads
        self.codes = nn.Parameter(torch.randn(config.heads, config.codebook_size, width))
        self.to_k = HeadMap(config.heads, width)
        self.to_v = HeadMap(config.heads, width)

    def logits(self, latents: Tensor) -> Tensor:
        """``[b, n, d] -> [b, n, k, K]``."""
        parts = rearrange(latents, "b n (k e) -> b n k e", k=self.heads)
        return torch.einsum("bnke,kje->bnkj", parts * parts.shape[-1] ** -0.5, self.to_k(self.codes))

    def learn(self, latents: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Quantizer.learn`; no loss of its own. The gradient goes back through the choice."""
        logits = self.logits(latents)
        device = logits.device if self.generator is None else self.generator.device
        uniform = torch.rand(logits.shape, generator=self.generator, device=device).to(logits)
        tiny = torch.finfo(logits.dtype).tiny
        noise = -torch.log(-torch.log(uniform.clamp(tiny, 1 - torch.finfo(logits.dtype).eps)))
        soft = (logits + noise).softmax(-1)
        indices = soft.argmax(-1)
        hard = F.one_hot(indices, soft.shape[-1]).to(soft)
        chosen = hard + soft - soft.detach()
        mixed = torch.einsum("bnkj,kje->bnke", chosen, self.to_v(self.codes))
        return rearrange(mixed, "b n k e -> b n (k e)"), indices, {}

    def encode(self, latents: Tensor) -> Tensor:
        """See `Quantizer.encode`."""
        return self.logits(latents.float()).argmax(-1)

    def decode(self, indices: Tensor) -> Tensor:
        """See `Quantizer.decode`."""
        values = self.to_v(self.codes)
        chosen = [values[head][indices[..., head]] for head in range(self.heads)]
        return torch.cat(chosen, -1)

    def bypass(self, latents: Tensor) -> Tensor:
        """The latents."""
        return latents


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _add_up(value: Tensor) -> None:
    if _several():
        dist.all_reduce(value)
