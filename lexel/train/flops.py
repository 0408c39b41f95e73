"""How much arithmetic a training step asks for, and what share of the machine's it gets.

b batch · l positions · s keys
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lexel.machine import processor, recall, remember
from lexel.train.objectives.lm import predicting
from lexel.types import TokenBatch

RATES = "matrix_rates"
_SIDE, _SIDE_ON_CUDA = 1024, 8192


def tokens(batch: TokenBatch, pad_id: int) -> Tensor:
    """How many positions of a batch are not padding, as a scalar tensor."""
    return (batch.first != pad_id).sum()


def training_flops(network: Any, batch: TokenBatch) -> Tensor:
    """Floating point operations of forward and backward for a batch of documents, scalar float64:

    ``6 · (block weights · tokens + output weights · targets) + 12 · layers · heads · e · pairs``

    with `pairs` the (query, key) pairs that may look at each other: PaLM's model flops (arXiv:2204.02311,
    appendix B), with the output's share only where a target is predicted, since no other logits are computed,
    and the attention's only where a document is causal. What is recomputed to save memory does not count.
    """
    config = network.config
    read, targets = tokens(batch, config.pad_id).double(), predicting(batch).sum().double()
    pairs = attended(batch, config.pad_id)
    width = config.heads * config.head_width
    inner, output = weights(network)
    return 6 * (inner * read + output * targets) + 12 * config.layers * width * pairs


def attended(batch: TokenBatch, pad_id: int) -> Tensor:
    """The (query, key) pairs of a batch that may look at each other, padding left out; scalar float64."""
    real = batch.first != pad_id
    if batch.attention_mask is not None:
        seen = batch.attention_mask if batch.attention_mask.dtype == torch.bool else batch.attention_mask == 0
        return (seen & real[:, :, None]).sum().double()
    lengths = real.sum(1).double()
    return (lengths * (lengths + 1) / 2).sum()


_COUNTED: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()


def weights(network: nn.Module) -> tuple[int, int]:
    """Numbers in the matrices of the blocks and heads, and in the output's matrix; counted once per
    network."""
    if network not in _COUNTED:
        _COUNTED[network] = _count(network)
    return _COUNTED[network]


def _count(network: nn.Module) -> tuple[int, int]:
    inner = sum(
        part.weight.numel()
        for name, part in network.named_modules()
        if isinstance(part, nn.Linear) and name != "lm_head"
    )
    config: Any = network.config
    return inner, config.vocab_size * config.dim


@cache
def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product on this machine: the best of several, and of what was
    remembered of earlier processes, since other work only slows one down. Measured per device, kind of number
    and number of threads. `mfu` is relative to this: no data sheet is believed, and none is needed."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{processor()} {device}"
    key = (
        f"{where}; {torch.get_num_threads() if device == 'cpu' else 1} threads; {dtype}; {torch.__version__}"
    )
    known, measured = float(recall(RATES).get(key, 0.0)), _measure(device, dtype)
    if measured > known:
        remember(RATES, {key: measured})
    return max(measured, known)


def _measure(device: str, dtype: torch.dtype) -> float:
    side = _SIDE_ON_CUDA if device == "cuda" else _SIDE
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
