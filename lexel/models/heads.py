"""Heads beside the next-token softmax: further columns of a position, and further positions.

Column 0 is always a softmax over the whole vocabulary (text and pictures share it); columns 1..k-1 are
softmaxes over their codebook's own indices, because nothing else may stand there.

b batch · l positions · m = any number of positions · k codes per position · d width
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.nn.attention import SelfAttention
from lexel.nn.decoder import DecoderLayer, init_decoder
from lexel.nn.norm import RMSNorm
from lexel.nn.rope import Rotary


class CodeHead(nn.Module, ABC):
    """Logits of columns 1..k-1 from the decoder's hidden state and the codes already chosen there.

    codebook_sizes: sizes of all k codebooks, column 0 included."""

    def __init__(self, codebook_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.codebook_sizes = codebook_sizes

    @abstractmethod
    def forward(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        """Teacher forcing: hidden ``[m, d]`` and codebook-local codes long ``[m, k - 1]`` of columns
        0..k-2 → logits ``[m, K_j]`` for j = 1..k-1, each given the true columns before it."""

    @abstractmethod
    def next_logits(self, hidden: Tensor, chosen: Tensor) -> Tensor:
        """hidden ``[b, d]`` and codebook-local codes long ``[b, j]`` of columns 0..j-1 → logits
        ``[b, K_j]`` of column j. Raises ValueError unless 1 <= j < k."""

    def _column(self, chosen: Tensor) -> int:
        column = chosen.shape[-1]
        if not 1 <= column < len(self.codebook_sizes):
            raise ValueError(
                f"next_logits serves columns 1..{len(self.codebook_sizes) - 1}, got {column} chosen codes; "
                "column 0 is LMOutput.logits."
            )
        return column


class ParallelHead(CodeHead):
    """One linear layer per further column; given the hidden state, columns are independent (as in
    MusicGen, arXiv:2306.05284; meant for the delayed pattern, where time orders the columns)."""

    def __init__(self, dim: int, codebook_sizes: tuple[int, ...]) -> None:
        super().__init__(codebook_sizes)
        self.outputs = nn.ModuleList(nn.Linear(dim, size, bias=False) for size in codebook_sizes[1:])
        init_decoder(self, 1)

    def forward(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        return tuple(output(hidden) for output in self.outputs)

    def next_logits(self, hidden: Tensor, chosen: Tensor) -> Tensor:
        return self.outputs[self._column(chosen) - 1](hidden)


class FactorizedHead(CodeHead):
    """A small causal transformer over the short sequence [hidden, emb(code_0), .., emb(code_{k-2})], all
    positions folded into the batch: FQGAN's factorized autoregressive head (arXiv:2411.16681).

    Slot j ends in the logits of column j. Unlike FQGAN, column 0 does not pass through it (text shares that
    column's softmax), and the codes' embeddings are the head's own.
    """

    def __init__(
        self,
        dim: int,
        codebook_sizes: tuple[int, ...],
        *,
        layers: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        ffn_dim: int,
        norm_eps: float,
    ) -> None:
        super().__init__(codebook_sizes)
        self.embeddings = nn.ModuleList(nn.Embedding(size, dim) for size in codebook_sizes[:-1])
        self.layers = nn.ModuleList(
            DecoderLayer(
                SelfAttention(dim, heads, kv_heads, head_dim, norm_eps=norm_eps),
                ffn_dim,
                norm_eps=norm_eps,
                dropout=0.0,
            )
            for _ in range(layers)
        )
        self.norm = RMSNorm(dim, norm_eps)
        self.outputs = nn.ModuleList(nn.Linear(dim, size, bias=False) for size in codebook_sizes[1:])
        self.rotary = Rotary(head_dim)
        init_decoder(self, layers)

    def forward(self, hidden: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        slots = self._transform(hidden, codes)
        return tuple(output(slots[:, j]) for j, output in enumerate(self.outputs, start=1))

    def next_logits(self, hidden: Tensor, chosen: Tensor) -> Tensor:
        column = self._column(chosen)
        return self.outputs[column - 1](self._transform(hidden, chosen)[:, column])

    def _transform(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """``[m, d]`` and codes ``[m, j]`` → ``[m, 1 + j, d]`` after the norm."""
        inputs = [embed(codes[:, j]) for j, embed in zip(range(codes.shape[1]), self.embeddings)]
        x = torch.stack([hidden, *(e.to(hidden.dtype) for e in inputs)], dim=1)
        positions = torch.arange(x.shape[1], device=x.device)[None, :, None].expand(1, -1, 3)
        cos, sin = self.rotary(positions)
        for layer in self.layers:
            x = layer(x, (cos.to(x.dtype), sin.to(x.dtype)), causal=True)
        return self.norm(x)


class FutureHeads(nn.Module):
    """Hidden states for the tokens after the next one: head i makes of position t's final hidden state h one
    whose logits, by the output table of the language model, are those of token t + 1 + i (i from 1):
    ``h + silu(W_i h + b_i)``.

    This is Medusa's head (Cai et al., arXiv:2401.10774) with one output table for all, as in Gloeckle et al.
    (arXiv:2404.19737): Medusa's copy of the table per head would outweigh a small model. Gloeckle et al. give
    each head a transformer block on the trunk below the last layer instead; that is stronger where the model
    is trained with its heads from the start, but cannot be added to a trained model, and needs the keys of
    every position for each head. W and b start at zero, as Medusa's do: a new head repeats the next token's
    logits, and a trained model is unchanged by having heads.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(dim, dim) for _ in range(count))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def __len__(self) -> int:
        return len(self.heads)

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """``[..., d]`` after the final norm → one ``[..., d]`` per head, nearest token first."""
        return tuple(hidden + F.silu(head(hidden)) for head in self.heads)
