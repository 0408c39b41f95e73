"""Compiled kernels for decoding on a CPU: `kernels.cpp`, built once per machine by its C++ compiler.

Products of up to a dozen rows read their weight from memory once, at the machine's speed, and a decoder block
is two calls instead of some thirty operations. All of it is optional: without a compiler `load_kernels` says
why, and the products of `lexel.nn.products` remain.

b batch · l queries · s keys · h heads · g key/value heads · e head width · d width
r rows · k inputs · n outputs
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.errors import LexelError
from lexel.machine import cache_folder

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-w")
PANEL = 32
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
TIMEOUT = 120  # seconds for the compiler

_pointer, _long, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class _Matrix(ctypes.Structure):
    _fields_ = (("data", _pointer), ("scale", _pointer), ("kind", _long), ("n", _long), ("k", _long))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("qkv", "out", "inner", "outer")),
        *((name, _pointer) for name in ("norm1", "norm2", "q_norm", "k_norm")),
        *((name, _float) for name in ("eps1", "eps2", "eps_heads")),
        *((name, _long) for name in ("heads", "groups", "width", "interleaved")),
    )


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[n, k]`` → int8 ``[n, k]`` and float32 scales ``[n]``: the nearest of 255 levels between plus
    and minus each row's largest value."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Kernels:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.product = _function(library.lexel_product, "pppp ll")
        self.open = _function(library.lexel_open, "pppp l ppp lll")
        self.close = _function(library.lexel_close, "ppppp llll p ll p llll")
        self._normalize = _function(library.lexel_normalize, "pp f p ll")

    def normalize(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of float32 ``[..., d]``."""
        x = x.contiguous()
        y = torch.empty_like(x)
        d = x.shape[-1]
        self._normalize(x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), x.numel() // d, d)
        return y


def _function(found: Any, arguments: str) -> Callable[..., None]:
    """A C function without a result, taking pointers, longs and floats in this order."""
    kinds = {"p": _pointer, "l": _long, "f": _float}
    found.argtypes = [kinds[letter] for letter in arguments.replace(" ", "")]
    found.restype = None
    return found


class Panels:
    """``[r, k] -> [r, n]`` by a weight ``[n, k]`` in panels. Raises ValueError for an odd k that is to be
    rounded."""

    def __init__(self, kernels: Kernels, weight: Tensor, dtype: str) -> None:
        n, k = weight.shape
        pair = 1 if dtype == "float32" else 2
        if k % pair:
            raise ValueError(f"{dtype} panels hold pairs of inputs, got {k}.")
        self.scale = None
        if dtype == "int8":
            weight, self.scale = quantize_rows(weight)
        elif dtype == "bfloat16":
            weight = weight.bfloat16()
        padded = F.pad(weight, (0, 0, 0, -n % PANEL))
        self.data = padded.reshape(-1, PANEL, k // pair, pair).transpose(1, 2).contiguous()
        scale = 0 if self.scale is None else self.scale.data_ptr()
        self.matrix = _Matrix(self.data.data_ptr(), scale, KINDS[dtype], n, k)
        self._outputs, self._inputs = n, k
        self._kernel, self._address = kernels.product, ctypes.addressof(self.matrix)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float().contiguous()
        if x.shape[-1] != self._inputs:
            raise ValueError(f"the weight takes {self._inputs} inputs, got {x.shape[-1]}.")
        rows = len(x)
        y = torch.empty(rows, self._outputs)
        self._kernel(self._address, x.data_ptr(), 0, y.data_ptr(), rows, torch.get_num_threads())
        return y


class Block:
    """A pre-norm decoder block, in two calls around the place where a cache takes the new keys and values.

    matrices: joined query, key and value; output; joined gate and up; down. norms: of attention (None in the
    place of its weight: there is none) and feed-forward, and of the heads' queries and keys or None; each a
    weight and its epsilon."""

    def __init__(
        self,
        kernels: Kernels,
        matrices: tuple[Panels, Panels, Panels, Panels],
        norms: tuple[tuple[Tensor | None, float], tuple[Tensor, float]],
        head_norms: tuple[Tensor, Tensor, float] | None,
        heads: int,
        groups: int,
        width: int,
        interleaved: bool = False,
    ) -> None:
        self._kernels, self._kept = kernels, (matrices, norms, head_norms)
        self._heads, self._groups, self._width = heads, groups, width
        (first, first_eps), (second, second_eps) = norms
        q_norm, k_norm, eps = head_norms or (None, None, 0.0)
        self._block = _Block(
            *(panels.matrix for panels in matrices),
            *(0 if norm is None else norm.data_ptr() for norm in (first, second, q_norm, k_norm)),
            *(first_eps, second_eps, eps, heads, groups, width, interleaved),
        )
        self._address = ctypes.addressof(self._block)

    def open(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Contiguous float32 ``[b, l, d]`` and ``[b, 1, l, e / 2]`` (or 1 for b, l, e / 2) → the new queries
        ``[b, h, l, e]``, and keys and values ``[b, g, l, e]``."""
        rows, new, _ = x.shape
        q = torch.empty(rows, self._heads, new, self._width)
        k = torch.empty(rows, self._groups, new, self._width)
        v = torch.empty(rows, self._groups, new, self._width)
        cos, sin = (part.expand(-1, 1, new, self._width // 2).contiguous() for part in (cos, sin))
        turn = cos.stride(0) if cos.shape[0] > 1 else 0
        self._kernels.open(
            *(self._address, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), turn),
            *(q.data_ptr(), k.data_ptr(), v.data_ptr(), rows, new, torch.get_num_threads()),
        )
        return q, k, v

    def close(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """``[b, l, d]`` after attention of `q` to all keys and values ``[b, g, s, e]`` (rows of e contiguous)
        and feed-forward; mask: additive float ``[b or 1, 1, l, s]``."""
        rows, new, _ = x.shape
        y = torch.empty_like(x)
        k, v = (kept if kept.stride()[2:] == (self._width, 1) else kept.contiguous() for kept in (k, v))
        place, row, line = 0, 0, 0
        if mask is not None:
            mask = mask.expand(rows, 1, new, k.shape[2])
            mask = mask if mask.stride(3) == 1 else mask.contiguous()
            place, row, line = mask.data_ptr(), mask.stride(0), mask.stride(2)
        self._kernels.close(
            *(self._address, x.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr()),
            *(k.stride(0), k.stride(1), v.stride(0), v.stride(1), place, row, line),
            *(y.data_ptr(), rows, new, k.shape[2], torch.get_num_threads()),
        )
        return y


@cache
def load_kernels() -> Kernels:
    """The library, built on first use (about two seconds) and kept in the user's cache folder for this
    machine. Raises LexelError, naming what is missing, when there is no compiler, it fails, or products by
    the library are wrong."""
    kernels = Kernels(_built())
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, generator=source)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.05), ("int8", 0.05)):
        panels = Panels(kernels, weight, dtype)
        for rows in (1, 2, 5, 13, 30):
            x = torch.randn(rows, 24, generator=source)
            error = (panels(x) - x @ weight.t()).abs().max() / weight.norm(dim=1).max()
            if not float(error) < tolerance:
                raise LexelError(
                    f"compiled {dtype} products are wrong by {float(error):.2g} on this machine."
                )
    return kernels


def _built() -> Path:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        raise LexelError("no C++ compiler found (c++, g++, clang++); install one or set CXX.")
    if ctypes.sizeof(_long) != 8 or os.name != "posix":
        raise LexelError(f"compiled kernels need a 64-bit POSIX system, this is {platform.platform()}.")
    flags = [*FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]
    text = SOURCE.read_bytes()
    digest = hashlib.sha256("\0".join([compiler, *flags, _processor()]).encode() + text).hexdigest()[:16]
    folder = cache_folder()
    path = folder / f"kernels-{digest}.so"
    if path.is_file():
        return path
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        command = [compiler, *flags, str(SOURCE), "-o", str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise LexelError(f"{compiler} could not build {SOURCE.name}: {reason}")
        temporary.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LexelError(f"{SOURCE.name} could not be built: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _processor() -> str:
    """What code for this very processor depends on: a home folder may be shared by unequal machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor() or platform.machine()
    lines = cpuinfo.read_text(errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
