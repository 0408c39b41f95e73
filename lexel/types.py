"""The values that travel between the links of the chain.

Shape legend, used library-wide:
b batch · n code positions · k codebooks per position · l sequence length · s key length ·
v vocabulary · d width · h w grid or picture.

`pixels` is always float ``[b, 3, h, w]`` in [-1, 1]; a tokenizer's own range, mean and
resolution live in its config and are applied inside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lexel.document import Document


def check_pixels(pixels: Tensor) -> Tensor:
    """Return `pixels` if it is a float ``[b, 3, h, w]`` batch in [-1, 1], else raise ValueError."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"pixels must be float [b, 3, h, w] in [-1, 1], got {pixels.dtype} {tuple(pixels.shape)}; "
            "convert uint8 pictures with x / 127.5 - 1."
        )
    return pixels


def check_video(video: Tensor) -> Tensor:
    """Return `video` if it is a float ``[b, t, 3, h, w]`` batch in [-1, 1], else raise ValueError."""
    if video.ndim != 5 or video.shape[2] != 3 or not video.is_floating_point():
        raise ValueError(
            f"a video must be float [b, t, 3, h, w] in [-1, 1], got {video.dtype} {tuple(video.shape)}."
        )
    return video


@dataclass(frozen=True)
class Codes:
    """Discrete codes of a batch of pictures (or clips, or sounds).

    indices: long ``[b, n, k]``, k codebooks per position (VQ 1, factorized 2-3, residual depth).
    grid: ``(h, w)`` of raster tokenizers, row-major, ``n == h * w``.
    scales: ``((h, w), ...)`` of multi-scale tokenizers, coarse first, ``n == sum(h * w)``.
    frames: latent frames of a clip, time before rows and columns: ``n == frames * h * w`` (codes without a
    place in the clip, LARP's, have no grid and any number).
    lengths: long ``[b]``, codes in use per row for flexible 1D tokenizers; the rest is ignored.
    keep: bool ``[b, n]``, positions kept by a dynamic selector (LaVIT).
    Raises ValueError when a shape or dtype disagrees.
    """

    indices: Tensor
    grid: tuple[int, int] | None = None
    scales: tuple[tuple[int, int], ...] | None = None
    lengths: Tensor | None = None
    keep: Tensor | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        if self.indices.ndim != 3 or self.indices.dtype != torch.long:
            raise ValueError(
                f"Codes.indices must be long [b, n, k], got {self.indices.dtype} {tuple(self.indices.shape)}."
            )
        b, n, _ = self.indices.shape
        cells = (self.frames or 1) * (self.grid[0] * self.grid[1] if self.grid else 0)
        if self.grid is not None and cells != n:
            times = f" times {self.frames} frames" if self.frames else ""
            raise ValueError(f"Codes.grid {self.grid}{times} holds {cells} positions, got {n}.")
        if self.scales is not None and sum(h * w for h, w in self.scales) != n:
            raise ValueError(f"Codes.scales {self.scales} do not add up to {n} positions.")
        if self.lengths is not None:
            if self.lengths.shape != (b,):
                raise ValueError(f"Codes.lengths must be [{b}], got {tuple(self.lengths.shape)}.")
            if b and (int(self.lengths.min()) < 1 or int(self.lengths.max()) > n):
                raise ValueError(f"Codes.lengths must lie in 1..{n}, got {self.lengths.tolist()}.")
        if self.keep is not None and self.keep.shape != (b, n):
            raise ValueError(f"Codes.keep must be bool [{b}, {n}], got {tuple(self.keep.shape)}.")

    def __len__(self) -> int:
        return self.indices.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Codes:
        """Rows of the batch (a slice or a long/bool tensor), still a batch."""
        return Codes(
            self.indices[rows],
            self.grid,
            self.scales,
            None if self.lengths is None else self.lengths[rows],
            None if self.keep is None else self.keep[rows],
            self.frames,
        )

    def to(self, device: torch.device | str) -> Codes:
        """The same codes on another device."""
        return Codes(
            self.indices.to(device),
            self.grid,
            self.scales,
            None if self.lengths is None else self.lengths.to(device),
            None if self.keep is None else self.keep.to(device),
            self.frames,
        )


@dataclass(frozen=True)
class QuantizerOutput:
    """What every quantizer returns.

    quantized: float ``[b, n, d]`` with a straight-through gradient; indices: long ``[b, n, k]``;
    losses: named scalar terms to add to the objective; metrics: named detached scalars to log.
    """

    quantized: Tensor
    indices: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerOutput:
    """What a tokenizer's training forward returns: reconstruction ``[b, 3, h, w]`` in about
    [-1, 1], the codes, the quantizer's output and the encoder's latents ``[b, n, d]``; features: by branch
    of the tokenizer, tokens ``[b, l, f]`` that a teacher supervises: the first one (FQGAN) or each
    (TokenFlow); empty where none does."""

    reconstruction: Tensor
    codes: Codes
    quantizer: QuantizerOutput
    latents: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenBatch:
    """A batch of mixed text/picture sequences for the language model.

    ids: long ``[b, l]``, or ``[b, l, k]`` with several codes per position (text sits in column 0,
    the other columns of a text position hold the pad id).
    modality: long ``[b, l]``, index into `Vocabulary.modalities` (0 is text, special tokens included).
    positions: long ``[b, l, 3]``: index in the document, row and column in the picture from 1 (0 in text).
    attention_mask: bool ``[b, l, s]``, True where a query may look; None is plain causal.
    loss_mask: bool ``[b, l]``, True where the id at this position is a training target.
    embeds / embed_index: float ``[m, d]`` continuous inputs and long ``[m, 2]`` (row, position) they replace.
    documents: long ``[b, l]``, in packed rows the number of each position's document (-1: padding), where
    attention is causal inside each; `attention_mask` then says the same at more cost.
    """

    ids: Tensor
    modality: Tensor
    positions: Tensor
    attention_mask: Tensor | None = None
    loss_mask: Tensor | None = None
    embeds: Tensor | None = None
    embed_index: Tensor | None = None
    documents: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.ids.shape[:2])
        if self.ids.dtype != torch.long or self.ids.ndim not in (2, 3):
            raise ValueError(
                f"TokenBatch.ids must be long [b, l(, k)], got {self.ids.dtype} {tuple(self.ids.shape)}."
            )
        if tuple(self.modality.shape) != shape:
            raise ValueError(f"TokenBatch.modality must be {list(shape)}, got {list(self.modality.shape)}.")
        if tuple(self.positions.shape) != (*shape, 3):
            raise ValueError(f"TokenBatch.positions must be {[*shape, 3]}, got {list(self.positions.shape)}.")
        if self.loss_mask is not None and tuple(self.loss_mask.shape) != shape:
            raise ValueError(f"TokenBatch.loss_mask must be {list(shape)}, got {list(self.loss_mask.shape)}.")
        if self.attention_mask is not None and tuple(self.attention_mask.shape[:2]) != shape:
            raise ValueError(
                f"TokenBatch.attention_mask must be [{shape[0]}, {shape[1]}, s], "
                f"got {list(self.attention_mask.shape)}."
            )

    @property
    def first(self) -> Tensor:
        """Long ``[b, l]``: the ids of column 0, all there are with one code per position."""
        return self.ids if self.ids.ndim == 2 else self.ids[..., 0]

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        return TokenBatch(*(None if x is None else x.to(device) for x in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class LMOutput:
    """logits: float ``[b, l, v]`` for the next position's first column; hidden: ``[b, l, d]`` after the
    final norm; code_logits: for k codes per position, the k-1 further columns, ``[b, l, K_j]`` over the
    codebook's own indices (column j given the true columns before it); future_logits: of the tokens after the
    next one, nearest first, ``[b, l, v]`` each, where they were asked for; future_code_logits: of their
    further columns, like code_logits."""

    logits: Tensor
    hidden: Tensor
    code_logits: tuple[Tensor, ...] = ()
    future_logits: tuple[Tensor, ...] = ()
    future_code_logits: tuple[tuple[Tensor, ...], ...] = ()


@dataclass(frozen=True)
class DecodeStats:
    """accept_lengths: tokens gained by each target forward and row (plain decoding: all ones);
    target_forwards / draft_forwards: network calls; seconds: wall time of the decode loop."""

    accept_lengths: tuple[int, ...] = ()
    target_forwards: int = 0
    draft_forwards: int = 0
    seconds: float = 0.0

    @property
    def mean_accepted(self) -> float:
        """Mean number of tokens gained per row and target forward (1.0 is plain decoding)."""
        return sum(self.accept_lengths) / max(1, len(self.accept_lengths))


@dataclass(frozen=True)
class GenerationOutput:
    """documents: one per sample; ids: generated ids per sample, long ``[l]`` or ``[l, k]``;
    lengths: their lengths; logprobs: float ``[l]`` per sample under the sampled distribution, or None."""

    documents: list[Document]
    ids: list[Tensor]
    lengths: list[int]
    logprobs: list[Tensor] | None
    stats: DecodeStats
