"""Self-attention of decoders.

b batch · l queries · s keys · h heads · g key/value heads · e head width · d width
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lexel.nn.norm import RMSNorm
from lexel.nn.rope import rotate
from lexel.nn.varlen import Documents

Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Rotate = Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245) with rotary positions and, on request,
    RMS-normalised queries and keys per head (as in Qwen3). Parameters are named as in transformers' Llama.
    out_dim: width of the output where it is not the input's; turn: which pairs of a head are rotated;
    qkv_bias, out_bias: of the projections; scale, softcap: see `attend`; norm_offset: of `RMSNorm`.

    Raises ValueError when the heads do not divide into the key/value heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        out_dim: int | None = None,
        turn: Rotate = rotate,
        qkv_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        norm_offset: float = 0.0,
    ) -> None:
        super().__init__()
        if heads % kv_heads:
            raise ValueError(f"{heads} heads cannot share {kv_heads} key/value heads evenly.")
        self.head_dim = head_dim
        self.turn = turn
        self.scale, self.softcap = scale, softcap
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(heads * head_dim, out_dim or dim, bias=out_bias)
        self.q_norm = RMSNorm(head_dim, norm_eps, norm_offset) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps, norm_offset) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        extend: Extend | None = None,
    ) -> Tensor:
        """``[b, l, d] -> [b, l, d]``. rotation: (cos, sin) of `Rotary`; mask: additive float broadcastable to
        ``[b, h, l, s]``; causal: the plain lower triangle instead of a mask; extend: stores the new keys and
        values ``[b, g, l, e]`` and returns all of them, ``[b, g, s, e]`` (a cache's `append`)."""
        q, k, v = (
            rearrange(project(x), "b l (h e) -> b h l e", e=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.turn(q, rotation), self.turn(k, rotation)
        if extend is not None:
            k, v = extend(k, v)
        out = attend(q, k, v, mask, causal, self.scale, self.softcap)
        return self.o_proj(rearrange(out, "b h l e -> b l (h e)"))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | Documents | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Scaled dot-product attention of ``q [b, h, l, e]`` to ``k, v [b, g, s, e]``, h a multiple of g; mask as
    `additive_mask` makes it, or `Documents` of packed rows (without softcap). scale: of the scores, None is
    1 / sqrt(e); softcap: bound c of the scores, which become c·tanh(score / c) (Gemma-2). Runs in the values'
    dtype, under autocast on a CPU in float32: torch's bfloat16 kernel there is up to three times slower on
    short sequences."""
    grouped = q.shape[1] != k.shape[1]
    autocast = torch.is_autocast_enabled(q.device.type)
    dtype = torch.float32 if autocast and q.device.type == "cpu" else v.dtype
    if isinstance(mask, Tensor):
        mask = mask.to(dtype)
    with torch.autocast(q.device.type, enabled=autocast and q.device.type != "cpu"):
        if isinstance(mask, Documents):
            out = mask.attend(q.to(dtype), k.to(dtype), v.to(dtype), scale)
        elif softcap is not None:
            out = _attend_capped(q.to(dtype), k.to(dtype), v.to(dtype), mask, causal, scale, softcap)
        else:
            out = F.scaled_dot_product_attention(
                q.to(dtype),
                k.to(dtype),
                v.to(dtype),
                mask,
                is_causal=causal,
                scale=scale,
                enable_gqa=grouped,
            )
    return out if autocast else out.to(q.dtype)


def _attend_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, softcap: float
) -> Tensor:
    """`attend` in the open: torch's fused attention cannot bound its scores."""
    q = rearrange(q, "b (g n) l e -> b g n l e", g=k.shape[1])
    scores = torch.einsum("bgnle,bgse->bgnls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    if mask is not None:
        scores = scores + mask.unsqueeze(2)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return rearrange(torch.einsum("bgnls,bgse->bgnle", weights, v), "b g n l e -> b (g n) l e")


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool ``[b, l, s]`` (True: may look) → float ``[b, 1, l, s]`` of 0 and -inf; float masks only change
    dtype. Made once per forward, where passing booleans would convert them again in every layer."""
    if visible.dtype != torch.bool:
        return visible.to(dtype).unsqueeze(1)
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill_(~visible, float("-inf")).unsqueeze(1)


def within_window(visible: Tensor, own: Tensor, window: int) -> Tensor:
    """Of what each query may see, the last `window` slots up to its own, and any after it.

    visible: bool ``[b, l, s]`` (or float, -inf: may not look); own: long ``[b or 1, l]``, each query's slot;
    the result is of visible's kind. Slots that a query does not see do not count: in a packed row, in a row
    with gaps and along the branch of a tree, a window is as many tokens long as it is in the sequence alone.
    """
    sees = visible if visible.dtype == torch.bool else ~visible.isneginf()
    slots = torch.arange(visible.shape[-1], device=visible.device)
    past = sees & (slots <= own[..., None])
    following = past.flip(-1).cumsum(-1).flip(-1) - past.long()  # seen slots between this one and the query
    inside = following < window
    return visible & inside if visible.dtype == torch.bool else visible.masked_fill(~inside, float("-inf"))
