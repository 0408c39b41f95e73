"""Matrix products with few rows, each by the quickest of several methods, found by measuring.

Decoding multiplies every weight with one to a few dozen rows; what counts is how fast the weight streams from
memory, and a library's default product is two to four times slower at that than the machine.

r rows · k inputs · n outputs
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

import lexel.machine as machine
from lexel.errors import LexelError
from lexel.nn.kernels import Kernels, Panels, quantize_rows

Precision = Literal["float32", "bfloat16", "int8"]
Run = Callable[[Tensor], Tensor]  # [r, k] → [r, n]

BUCKETS = (1, 2, 3, 4, 8, 16, 32, 64, 128)
"""A number of rows is measured as the next larger of these; the last one stands for all above it."""

COLD = 40 * 2**20
"""Bytes that do not stay in a core's caches between two uses: measurements stream so much, or the model."""

PASSES = 8
"""Times that each method is measured; the quickest counts, since other programs only ever slow it down."""

RECORD = "products"
"""Where choices are remembered, see `lexel.machine`."""

TIE = 0.8
"""A method must take so small a share of the time of one above it in the list to be preferred: those above
come with fewer copies of the weight, or (compiled ones) with blocks that are quicker than their products."""

PADDED = 4
"""Rows that oneDNN's product is given at least: it is slower on one or two."""

# (n, k, dtype, bytes streamed, threads, bucket) → name of the method
_CHOSEN: dict[tuple[int, int, str, int, int, int], str] = {}
# Why methods were left out, by (dtype, name).
_FAILED: dict[tuple[str, str], str] = {}


class Product:
    """``x -> x @ weight.T`` for a weight ``[n, k]`` that no longer changes, given in one or several parts
    (rows after rows); outputs in the input's dtype.

    dtype: what the weight is kept in; float32 products are exact but for the order of sums, bfloat16 and int8
    round the input to bfloat16. total: bytes of all weights that a step streams: what the caches are shared
    with. kernels: compiled products to choose from too. Copies in the layouts of chosen methods are made at
    their first use. Raises LexelError for another dtype.
    """

    def __init__(
        self, weights: Sequence[Tensor], dtype: Precision, total: int, kernels: Kernels | None = None
    ) -> None:
        if dtype not in get_args(Precision):
            raise LexelError(f"weights are packed as float32, bfloat16 or int8, got {dtype!r}.")
        self.weights = [weight.detach() for weight in weights]
        self.device = self.weights[0].device
        self.shape = sum(len(weight) for weight in weights), weights[0].shape[1]
        self.dtype: Precision = dtype
        self.total = total
        self.kernels = kernels
        self._methods: dict[str, Run] = {}
        self._by_rows: dict[tuple[int, int], Run] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., k] -> [..., n]``."""
        flat = x.reshape(-1, self.shape[1])
        key = len(flat), torch.get_num_threads()
        run = self._by_rows.get(key)
        if run is None:
            run = self._by_rows[key] = self.method(self.best(len(flat)))
        if self.device.type == "cpu":
            flat = flat.float()
        return run(flat).to(x.dtype).view(*x.shape[:-1], self.shape[0])

    def best(self, rows: int) -> str:
        """Name of the method for so many rows (see `choose`)."""
        if self.device.type != "cpu":
            return "device"
        return choose(*self.shape, self.dtype, rows, self.total, self.kernels)

    def method(self, name: str) -> Run:
        """That method of this weight; made when first asked for."""
        if name not in self._methods:
            weight = torch.cat(self.weights) if len(self.weights) > 1 else self.weights[0]
            self._methods[name] = _methods(self.dtype, self.kernels)[name](weight.float())
        return self._methods[name]


def choose(n: int, k: int, dtype: Precision, rows: int, total: int, kernels: Kernels | None) -> str:
    """Name of the quickest method for `rows` rows on this machine with torch's current number of threads;
    measured once, and remembered (`lexel.machine`)."""
    bucket = next((b for b in BUCKETS if rows <= b), BUCKETS[-1])
    cold = min(total, COLD) // 2**20
    key = n, k, f"{dtype}{'' if kernels is None else '+'}", cold, torch.get_num_threads(), bucket
    if key not in _CHOSEN:
        where = f"{machine.processor()}; torch {torch.__version__}"
        known = machine.recall(RECORD).get(where, {})
        name = known.get(str(key))
        if name not in _methods(dtype, kernels):
            times = measure(n, k, dtype, bucket, total, kernels)
            best = min(times.values())
            name = next(name for name, seconds in times.items() if seconds * TIE <= best)
            machine.remember(RECORD, {where: {**known, str(key): name}})
        _CHOSEN[key] = name
    return _CHOSEN[key]


@torch.no_grad()
def measure(
    n: int, k: int, dtype: Precision, rows: int, total: int, kernels: Kernels | None = None
) -> dict[str, float]:
    """Seconds of one product ``[rows, k] × [k, n]`` by every method that gives the right numbers here, while
    `total` bytes of weights (at most `COLD`) stream by."""
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=source) / k**0.5
    x = torch.randn(rows, k, generator=source)
    exact = F.linear(x, weight)
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
    copies = max(1, min(total, COLD) // (n * k * size))
    ready: dict[str, list[Run]] = {}
    for name, make in _methods(dtype, kernels).items():
        if name == "device" or (dtype, name) in _FAILED:
            continue
        try:
            runs = [make(weight.clone()) for _ in range(copies)]
            error = float((runs[0](x) - exact).abs().max())
        except (RuntimeError, ValueError, AttributeError) as reason:  # not in this build of torch
            _FAILED[dtype, name] = f"{type(reason).__name__}: {str(reason).splitlines()[0]}"
            continue
        if not error < (1e-3 if dtype == "float32" else 0.1):
            _FAILED[dtype, name] = f"wrong by {error:.2g} on {rows} × {k} × {n}"
            continue
        ready[name] = runs
    passes = [{name: _seconds(runs, x) for name, runs in ready.items()} for _ in range(PASSES)]
    return {name: min(times[name] for times in passes) for name in ready}


def _seconds(runs: list[Run], x: Tensor) -> float:
    started = time.perf_counter()
    for run in runs:
        run(x)
    return (time.perf_counter() - started) / len(runs)


def failures() -> dict[tuple[str, str], str]:
    """Methods that were tried and left out in this process, by (dtype, name), and why."""
    return dict(_FAILED)


def _methods(dtype: Precision, kernels: Kernels | None) -> dict[str, Callable[[Tensor], Run]]:
    """Makers of methods from a weight ``[n, k]``, preferred ones first; "device" is what is not measured."""
    made: dict[str, Callable[[Tensor], Run]] = {}
    if kernels is not None:
        made["panels"] = lambda weight: Panels(kernels, weight, dtype)
    if dtype == "float32":
        return made | {"blocked": _blocked, "transposed": _transposed, "rows": _rows, "device": _rows}
    if dtype == "bfloat16":
        return made | {
            "blocked": lambda weight: _rounded(_blocked(weight.bfloat16())),
            "rows": lambda weight: _rounded(_rows(weight.bfloat16())),
            "device": lambda weight: _rows(weight.bfloat16()),
        }
    return made | {
        "blocked": lambda weight: _int8(weight, _blocked),
        "rows": lambda weight: _int8(weight, _rows),
        "device": _int8_device,
    }


def _rows(weight: Tensor) -> Run:
    weight = weight.contiguous()
    return lambda x: F.linear(x.to(weight.dtype), weight)


def _transposed(weight: Tensor) -> Run:
    turned = weight.t().contiguous()
    return lambda x: x @ turned


def _blocked(weight: Tensor) -> Run:
    """oneDNN's own layout of the weight."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), BUCKETS[-2])

    def run(x: Tensor) -> Tensor:
        rows = len(x)
        if rows < PADDED - 1:
            x = F.pad(x, (0, 0, 0, PADDED - rows))
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")[:rows]

    return run


def _rounded(run: Run) -> Run:
    return lambda x: run(x.bfloat16()).float()


def _int8(weight: Tensor, layout: Callable[[Tensor], Run]) -> Run:
    """The levels as bfloat16, which holds them exactly. (`torch.ops.aten._weight_int8pack_mm` reads half the
    bytes, but is slower from three rows on and crashes on small weights.)"""
    levels, scale = quantize_rows(weight)
    run = _rounded(layout(levels.bfloat16()))
    return lambda x: run(x) * scale


def _int8_device(weight: Tensor) -> Run:
    levels, scale = quantize_rows(weight)
    return lambda x: F.linear(x, levels.to(x.dtype)) * scale.to(x.dtype)
