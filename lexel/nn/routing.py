"""Weights of their own for picture tokens: each token uses those of its modality, attention is shared.

LlamaFusion (Shi et al., arXiv:2412.15188): there is no learned router, the modality of the position decides.

b batch · l positions · h heads · e head width
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from lexel.errors import LexelError
from lexel.nn.attention import SelfAttention
from lexel.nn.decoder import DecoderLayer

HEADS_FIRST = ("q_norm", "k_norm")
"""Parts whose input is ``[b, h, l, e]``."""


class Tokens(NamedTuple):
    """Which tokens of a batch are pictures'. mask: bool ``[b, l]``; picture, text: long, the places of either
    kind among all ``b · l``; back: long ``[b · l]``, where each place is when text follows pictures."""

    mask: Tensor
    picture: Tensor
    text: Tensor
    back: Tensor

    @classmethod
    def of(cls, modality: Tensor) -> Tokens:
        """From long ``[b, l]``: 0 is text, everything else a picture (what closes one included). The host
        waits for the device once, here, and not in every part of every block."""
        mask = modality > 0
        picture, text = (kind.flatten().nonzero()[:, 0] for kind in (mask, ~mask))
        return cls(mask, picture, text, torch.cat([picture, text]).argsort())


_TOKENS: ContextVar[Tokens | None] = ContextVar("tokens", default=None)


def current_tokens() -> Tokens:
    """Those of the block that is running. Raises LexelError outside of a routed block."""
    tokens = _TOKENS.get()
    if tokens is None:
        raise LexelError("routed weights are called by a block that was told which tokens are pictures.")
    return tokens


class Routed(nn.Module):
    """A part of a block twice: `text` for tokens of modality 0, `picture` for those of every other one. Only
    what a token needs is computed, so an input of text alone gives exactly what `text` alone gives."""

    def __init__(self, text: nn.Module, picture: nn.Module, heads_first: bool = False) -> None:
        super().__init__()
        self.text, self.picture, self.heads_first = text, picture, heads_first

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """``[..., d] -> [..., d']``; further arguments as for the part."""
        tokens = current_tokens()
        if not len(tokens.picture):
            return self.text(x, *args)
        if not len(tokens.text):
            return self.picture(x, *args)
        rows = rearrange(x, "b h l e -> (b l) h e" if self.heads_first else "b l d -> (b l) d")
        drawn, written = self.picture(rows[tokens.picture], *args), self.text(rows[tokens.text], *args)
        out = torch.cat([drawn, written])[tokens.back]
        pattern = "(b l) h e -> b h l e" if self.heads_first else "(b l) d -> b l d"
        return rearrange(out, pattern, b=len(x))


class RoutedAttention(SelfAttention):
    """`SelfAttention` with routed parts (a class of its own, so that nobody joins their products)."""


class _RoutedBlock:
    """What a routed block adds to its class."""

    def forward(self, *args: Any, tokens: Tokens, **options: Any) -> Tensor:
        """As the block's. It is told of the tokens by an argument, not from around the whole network, so that
        it knows them when the backward pass computes the block again."""
        before = _TOKENS.set(tokens)
        try:
            return super().forward(*args, **options)  # type: ignore[misc]
        finally:
            _TOKENS.reset(before)


def parts(block: DecoderLayer) -> tuple[str, ...]:
    """Names of what can be routed in a block: every projection and norm, the feed-forward as a whole."""
    names = []
    for name, child in block.named_children():
        inside = child.named_children() if isinstance(child, SelfAttention) else [("", child)]
        names += [
            f"{name}.{below}".rstrip(".")
            for below, part in inside
            if next(part.parameters(), None) is not None
        ]
    return tuple(names)


def listen(block: DecoderLayer) -> None:
    """Make a block, in place, one that is told which tokens are pictures."""
    if isinstance(block, _RoutedBlock):
        return
    cls = type(block)
    block.__class__ = type(f"Routed{cls.__name__}", (_RoutedBlock, cls), {})
    if type(block.self_attn) is not SelfAttention:
        raise LexelError(f"a {type(block.self_attn).__name__} has no routed form.")
    block.self_attn.__class__ = RoutedAttention


def route_blocks(blocks: Iterable[nn.Module], names: Sequence[str]) -> None:
    """Give each block, in place, copies of its parts `names` for picture tokens. Raises LexelError for a part
    that a block does not have."""
    for module in blocks if names else ():
        block = cast(DecoderLayer, module)
        if unknown := sorted(set(names) - set(parts(block))):
            raise LexelError(f"a block has no part {', '.join(unknown)}; it has: {', '.join(parts(block))}.")
        for name in names:
            above, _, own = name.rpartition(".")
            parent = block.get_submodule(above)
            text = getattr(parent, own)
            setattr(parent, own, Routed(text, copy.deepcopy(text), own in HEADS_FIRST))
        listen(block)
