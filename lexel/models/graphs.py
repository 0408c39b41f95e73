"""Decoding steps of a fixed size as CUDA graphs: one launch a step, nothing in it waits for the host.

Everything that changes from step to step lies in buffers on the device: tokens, positions, the rows' lengths
and the tree of the new tokens. Keys and values go to the slots that the lengths name, and attention runs over
all slots of the cache, masked; the shapes never change.

b rows · q new tokens · n layers · g key/value heads · t slots · e head width · d width
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lexel.models.causal_lm import CausalLM
from lexel.models.kv_cache import KVCache
from lexel.types import TokenBatch

T = TypeVar("T")
WARM_UPS = 3


class GraphedStep(Generic[T]):
    """A pass of `lm` over `new` tokens behind every row of `cache`, followed by `after`, as one function with
    fixed shapes; on CUDA captured as a graph at the first call, elsewhere run as it is.

    after: makes of the hidden states ``[b, q, d]`` what is wanted (logits, probabilities, tokens: tensors in
    any nesting of tuples); it must not look at values on the host. width: as for `CausalLM.decode`.

    The cache's lengths are not advanced. What a call returns is overwritten by the next. When the cache's
    store moves or its number of rows changes, the step is captured again.
    """

    def __init__(
        self,
        lm: CausalLM,
        cache: KVCache,
        new: int,
        after: Callable[[Tensor], T],
        width: float | None = None,
    ) -> None:
        self.lm, self.cache, self.new, self.after, self.width = lm, cache, new, after, width
        self._captured: tuple[int, int] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: T

    @torch.inference_mode()
    def __call__(self, ids: Tensor, positions: Tensor, tree: Tensor | None = None) -> T:
        """ids: long ``[b, q]`` (or ``[b, q, k]``); positions: long ``[b, q, 3]``; tree: bool ``[b, q, q]``,
        which of the new tokens each one sees, itself included; None: those before it and itself.
        Raises LexelError when the cache is full."""
        self.cache.span(self.new)
        lengths = torch.tensor(self.cache.host_lengths)
        if tree is None:
            tree = torch.ones(self.new, self.new, dtype=torch.bool).tril_().expand(len(lengths), -1, -1)
        given = ids, positions, lengths, tree
        key = self.cache.keys.data_ptr(), self.cache.batch
        if self._captured != key:
            self._buffers = tuple(x.to(self.cache.keys.device, copy=True) for x in given)
            self._capture()
            self._captured = key
        for buffer, value in zip(self._buffers, given):
            buffer.copy_(value, non_blocking=True)
        if self._graph is None:
            return self.run(*self._buffers)
        self._graph.replay()
        return self._result

    def run(self, ids: Tensor, positions: Tensor, lengths: Tensor, tree: Tensor) -> T:
        """What is captured; all arguments on the device."""
        lm, cache = self.lm, self.cache
        rows = torch.arange(ids.shape[0], device=ids.device)[:, None]
        slots = lengths[:, None] + torch.arange(self.new, device=ids.device)
        x = lm._embed(TokenBatch(ids, ids if ids.ndim == 2 else ids[..., 0], positions))
        masks = lm.window_masks(visible(lengths, tree, slots, cache.max_length), slots, x.dtype)
        cos, sin = lm.rotary(positions)
        rotation = cos.to(x.dtype), sin.to(x.dtype)
        for index, (layer, (mask, _)) in enumerate(zip(lm.model.layers, masks)):
            extend = partial(_write, cache.keys[index], cache.values[index], rows, slots)
            x = layer(x, rotation, mask, extend=extend, width=self.width)
        return self.after(lm.model.norm(x))

    def _capture(self) -> None:
        self._graph = None
        if self.cache.keys.device.type != "cuda":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Slots beyond the lengths are written by every run: warming up changes nothing that counts.
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.run(*self._buffers)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = self.run(*self._buffers)


def capturable(lm: Any) -> bool:
    """Whether `GraphedStep` runs the network as its own `decode` does: blocks of a `CausalLM` one after the
    other, the same weights for every token."""
    return isinstance(lm, CausalLM) and not getattr(lm.config, "routed", False)


def visible(lengths: Tensor, tree: Tensor, slots: Tensor, total: int) -> Tensor:
    """Bool ``[b, q, t]``: each new token sees its row's slots ``< lengths[b]`` and, of the new ones at
    `slots` ``[b, q]``, those that `tree` ``[b, q, q]`` says."""
    places = torch.arange(total, device=lengths.device)
    old = (places < lengths[:, None, None]).expand(-1, tree.shape[1], -1)
    return old.scatter(2, slots[:, None, :].expand(tree.shape), tree)


def _write(
    keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Put ``[b, g, q, e]`` into the slots ``[b, q]`` of each row; all slots ``[b, g, t, e]`` are returned."""
    for store, value in ((keys, k), (values, v)):
        store[rows, :, slots] = value.transpose(1, 2).to(store.dtype)
    return keys[: len(rows)], values[: len(rows)]
