"""A language model with its weights packed for decoding: the same functions, fewer and quicker products.

`pack` copies the tree of modules but not the weights: what holds products is replaced by what holds them
joined (query, key and value; gate and up), in the layouts that `lexel.nn.products` finds quickest for the
number of rows at hand; everything else is shared with the model it came from.

b batch · l positions · h heads · g key/value heads · e head width · d width · v vocabulary
k inputs · n outputs
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.nn.attention import Extend, SelfAttention, attend
from lexel.nn.decoder import ACTIVATIONS, DecoderLayer, SwiGLU, nested_width
from lexel.nn.kernels import Block, Kernels, load_kernels
from lexel.nn.norm import RMSNorm
from lexel.nn.products import Precision, Product
from lexel.nn.rope import rotate, rotate_interleaved

N = TypeVar("N", bound=nn.Module)

FEW = 64
"""Positions up to which whole blocks may be compiled; longer inputs are bound by arithmetic, not by calls."""

RANGES = 8
"""Ranges of ids whose output weights are packed; `project` slices the table for any further one."""


def pack(lm: N, dtype: Precision = "float32", compile: bool = False) -> N:
    """The same network, for inference only, with `SelfAttention`, `SwiGLU` and `nn.Linear` packed; works for
    a `CausalLM` (then with a packed `project`) and for draft heads.

    dtype: what the weights of products are kept in. "float32": results equal the unpacked model's but for the
    order of sums. "bfloat16": weights and inputs of products are rounded; residual stream, norms, attention
    and cache stay float32 on a CPU. "int8": weights are rounded to 255 levels per output channel, inputs to
    bfloat16. Embeddings are looked up in the model's own table.
    compile: also offer compiled kernels (see `lexel.nn.kernels`).

    The packed model is a snapshot: weights changed afterwards are not seen, and it can be neither trained nor
    saved nor moved. Raises LexelError for an unknown dtype.
    """
    total = sum(p.numel() for p in lm.parameters()) * {"float32": 4, "bfloat16": 2}.get(dtype, 1)
    packed, packer = None, _Packer(dtype, total, None)
    if compile:
        try:
            compiling = _Packer(dtype, total, load_kernels())
            packed = compiling.copy(lm)
            _check(packed)
            packer = compiling
        except LexelError as reason:
            packed = None
            logging.getLogger(__name__).warning("decoding without compiled kernels: %s", reason)
    packed = packed or packer.copy(lm)
    if isinstance(packed, CausalLM):
        packed.__class__ = _form(type(packed))
        cast(Snapshot, packed)._open(packer, cast(CausalLM, lm).fingerprint)
    return packed.eval()


def _form(kind: type[CausalLM]) -> type[CausalLM]:
    """What a packed language model of a class becomes; subclasses keep their own `project`."""
    return PackedLM if kind is CausalLM else type(f"Packed{kind.__name__}", (Snapshot, kind), {})


@torch.no_grad()
def _check(packed: nn.Module) -> None:
    """Raises LexelError when a compiled block disagrees with the same block's separate products."""
    layer = next((m for m in packed.modules() if isinstance(m, PackedLayer)), None)
    if layer is None:
        return
    source = torch.Generator().manual_seed(0)
    width = layer.post_attention_layernorm.weight.numel()
    x = torch.randn(2, 3, width, generator=source)
    angles = torch.randn(2, 1, 3, layer.self_attn.head_dim // 2, generator=source)
    rotation = angles.cos(), angles.sin()
    compiled = layer.compiled(x, rotation, None, True, None, None)
    expected = layer.separate(x, rotation, None, True, None, None)
    error = float((compiled - expected).abs().max() / expected.abs().max())
    tolerance = 1e-4 if layer.mlp.dtype == "float32" else 0.05
    if not error < tolerance:
        raise LexelError(f"a compiled block is wrong by {error:.2g} of its largest output on this machine.")


def plain(weight: Tensor) -> bool:
    """Whether compiled kernels can read it."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()


class _Packer:
    """Replaces modules. total: bytes of the weights that a step streams."""

    def __init__(self, dtype: Precision, total: int, kernels: Kernels | None) -> None:
        self.dtype, self.total, self.kernels = dtype, total, kernels

    def product(self, *weights: Tensor) -> Product:
        return Product(weights, self.dtype, self.total, self.kernels)

    def copy(self, module: Any) -> Any:
        """A packed module, or a copy whose children are; parameters and buffers are the same tensors."""
        if type(module) is SelfAttention:
            return PackedAttention(module, self)
        if type(module) is SwiGLU:
            return PackedSwiGLU(module, self)
        if type(module) is nn.Linear:
            return PackedLinear(module, self)
        if type(module) is RMSNorm and self.kernels is not None and plain(module.weight):
            return PackedNorm(module, self.kernels)
        if type(module) is DecoderLayer and self.kernels is not None and PackedLayer.fits(module):
            return PackedLayer(module, self)
        made = copy.copy(module)
        made._modules = {
            name: None if child is None else self.copy(child) for name, child in module._modules.items()
        }
        return made


class PackedLinear(nn.Module):
    """`nn.Linear`; `weight` is the layer's own."""

    def __init__(self, linear: nn.Linear, packer: _Packer) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._product = packer.product(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., k] -> [..., n]``"""
        return _plus(self._product(x), self.bias)


class PackedNorm(nn.Module):
    """`RMSNorm` in one compiled call, for float32."""

    def __init__(self, norm: RMSNorm, kernels: Kernels) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        if norm.offset:
            self.weight = nn.Parameter(norm.weight.detach() + norm.offset)
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d] -> [..., d]``"""
        if x.dtype != torch.float32:
            return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)
        return self._kernels.normalize(x, self.weight, self.eps)


class PackedAttention(nn.Module):
    """`SelfAttention` with one product for queries, keys and values."""

    def __init__(self, attention: SelfAttention, packer: _Packer) -> None:
        super().__init__()
        self.head_dim = attention.head_dim
        self.turn = attention.turn
        self.scale, self.softcap = attention.scale, attention.softcap
        norms = attention.q_norm, attention.k_norm
        self.q_norm, self.k_norm = (None if norm is None else packer.copy(norm) for norm in norms)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        self.heads, self.kv_heads, _ = (p.out_features // self.head_dim for p in projections)
        self._qkv = packer.product(*(p.weight for p in projections))
        self._out = packer.product(attention.o_proj.weight)
        self._qkv_bias = _joined(*(p.bias for p in projections))
        self._out_bias = attention.o_proj.bias

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        extend: Extend | None = None,
    ) -> Tensor:
        """As `SelfAttention.forward`."""
        heads, groups = self.heads, self.kv_heads
        joined = _plus(self._qkv(x), self._qkv_bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turned, v = joined[:, : heads + groups], joined[:, heads + groups :]
        if self.q_norm is not None and self.k_norm is not None:
            turned = torch.cat([self.q_norm(turned[:, :heads]), self.k_norm(turned[:, heads:])], dim=1)
        turned = self.turn(turned, rotation)
        q, k = turned[:, :heads], turned[:, heads:]
        if extend is not None:
            k, v = extend(k, v)
        out = attend(q, k, v, mask, causal, self.scale, self.softcap)
        return _plus(self._out(out.transpose(1, 2).flatten(-2)), self._out_bias)

    def products(self) -> tuple[Product, Product]:
        """Query, key and value joined, and output."""
        return self._qkv, self._out


def _joined(*biases: Tensor | None) -> Tensor | None:
    """The biases of joined products; None where there are none."""
    there = [bias for bias in biases if bias is not None]
    return torch.cat(there) if there else None


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


class PackedSwiGLU(nn.Module):
    """`SwiGLU` with one product for gate and up; every width in use has its own contiguous copy."""

    def __init__(self, mlp: SwiGLU, packer: _Packer) -> None:
        super().__init__()
        self._packer, self.dtype = packer, packer.dtype
        self._weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        self._biases = mlp.gate_proj.bias, mlp.up_proj.bias, mlp.down_proj.bias
        self.activate = ACTIVATIONS[mlp.activation]
        self.hidden = mlp.gate_proj.out_features
        self._widths: dict[int, tuple[Product, Product]] = {}

    def forward(self, x: Tensor, width: float | None = None) -> Tensor:
        """As `SwiGLU.forward`."""
        inner, outer = self.products(width)
        gate, up = inner(x).chunk(2, dim=-1)
        gate_bias, up_bias, down_bias = self._biases
        if gate_bias is not None:
            units = gate.shape[-1]
            gate, up = gate + gate_bias[:units], up + up_bias[:units]
        return _plus(outer(self.activate(gate).mul_(up)), down_bias)

    def products(self, width: float | None) -> tuple[Product, Product]:
        """Gate and up joined, and down, of that width."""
        units = nested_width(self.hidden, width)
        if units not in self._widths:
            gate, up, down = self._weights
            self._widths[units] = (
                self._packer.product(gate[:units], up[:units]),
                self._packer.product(down[:, :units]),
            )
        return self._widths[units]


class PackedLayer(nn.Module):
    """`DecoderLayer` by compiled kernels where those are the quickest for the number of positions."""

    def __init__(self, layer: DecoderLayer, packer: _Packer) -> None:
        super().__init__()
        self.self_attn = PackedAttention(layer.self_attn, packer)
        self.mlp = PackedSwiGLU(layer.mlp, packer)
        self.input_layernorm = packer.copy(layer.input_layernorm)
        self.post_attention_layernorm = packer.copy(layer.post_attention_layernorm)
        self._kernels = cast(Kernels, packer.kernels)
        self._blocks: dict[float | None, Block] = {}
        self._best: dict[tuple[int, int], bool] = {}

    @staticmethod
    def fits(layer: DecoderLayer) -> bool:
        """Whether there are kernels for a layer of this form; draft heads do not normalise the input."""
        return (
            type(layer.input_layernorm) in (RMSNorm, nn.Identity)
            and type(layer.post_attention_layernorm) is RMSNorm
            and type(layer.self_attn) is SelfAttention
            and layer.self_attn.turn in (rotate, rotate_interleaved)
            and layer.self_attn.scale is None
            and layer.self_attn.softcap is None
            and layer.mlp.activation == "silu"
            and all(part.bias is None for part in layer.modules() if isinstance(part, nn.Linear))
            and plain(layer.post_attention_layernorm.weight)
        )

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        extend: Extend | None = None,
        width: float | None = None,
    ) -> Tensor:
        """As `DecoderLayer.forward`."""
        key = x.shape[0] * x.shape[1], torch.get_num_threads()
        compiled = self._best.get(key)
        if compiled is None:
            few = key[0] <= FEW
            compiled = self._best[key] = few and self.mlp.products(None)[0].best(key[0]) == "panels"
        run = self.compiled if compiled and x.dtype == torch.float32 else self.separate
        return run(x, rotation, mask, causal, extend, width)

    def compiled(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        extend: Extend | None,
        width: float | None,
    ) -> Tensor:
        """As `forward`, by two compiled calls."""
        block = self._blocks.get(width)
        if block is None:
            block = self._blocks[width] = self._block(width)
        x = x.contiguous()
        q, k, v = block.open(x, *rotation)
        if extend is not None:
            k, v = extend(k, v)
        if causal and x.shape[1] > 1:
            mask = _triangle(x.shape[1])
        if mask is not None and mask.shape[1] > 1:
            raise ValueError(f"a mask is the same for all heads, got {list(mask.shape)}.")
        return block.close(x, q, k.float(), v.float(), mask)

    def separate(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        extend: Extend | None,
        width: float | None,
    ) -> Tensor:
        """As `forward`, product by product."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, causal=causal, extend=extend)
        return x + self.mlp(self.post_attention_layernorm(x), width)

    def _block(self, width: float | None) -> Block:
        attention = self.self_attn
        products = attention.products() + self.mlp.products(width)
        before, after = (
            (None, 0.0) if isinstance(norm, nn.Identity) else (norm.weight.detach(), norm.eps)
            for norm in (self.input_layernorm, self.post_attention_layernorm)
        )
        heads = attention.q_norm, attention.k_norm
        return Block(
            self._kernels,
            cast(Any, tuple(product.method("panels") for product in products)),
            (before, cast(Any, after)),
            (heads[0].weight.detach(), heads[1].weight.detach(), heads[0].eps)
            if heads[0] and heads[1]
            else None,
            attention.heads,
            attention.kv_heads,
            attention.head_dim,
            attention.turn is rotate_interleaved,
        )


@lru_cache(maxsize=64)
def _triangle(length: int) -> Tensor:
    """Additive ``[1, 1, l, l]``: nothing sees what comes after it."""
    return torch.full((1, 1, length, length), float("-inf")).triu_(1)


class Snapshot(nn.Module):
    """What every packed language model has in common."""

    _packer: _Packer
    _ranges: dict[tuple[int, int], Product]
    _fingerprint: Callable[[], str]

    def _open(self, packer: _Packer, fingerprint: Callable[[], str]) -> None:
        self._packer, self._ranges, self._fingerprint = packer, {}, fingerprint

    def fingerprint(self) -> str:
        """That of the model it was packed from."""
        return self._fingerprint()

    def train(self, mode: bool = True) -> Snapshot:
        """Raises LexelError for `mode`: packed weights do not learn."""
        if mode:
            raise LexelError("a packed model cannot be trained; train the model it was packed from.")
        return super().train(False)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Raises LexelError."""
        raise LexelError("a packed model cannot be saved; save the model it was packed from.")

    def _apply(self, fn: Any, recurse: bool = True) -> Snapshot:
        raise LexelError("a packed model cannot be moved or cast; move the model and pack it there.")


class PackedLM(Snapshot, CausalLM):
    """A `CausalLM` made by `pack`."""

    def project(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """As `CausalLM.project`; the rows of the first `RANGES` ranges asked for are packed."""
        table = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        key = start, len(table) if stop is None else stop
        product = self._ranges.get(key)
        if product is None:
            if len(self._ranges) == RANGES:
                return self._cap(F.linear(hidden, table[start:stop].to(hidden.dtype)))
            product = self._ranges[key] = self._packer.product(table[slice(*key)])
        return self._cap(product(hidden))
