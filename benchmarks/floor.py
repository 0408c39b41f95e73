"""The floor of a decoding step: the time to read every weight that one pass uses from memory once.

    python -m benchmarks.floor

No step that reads its weights can be quicker, whatever its batch; a pass over few tokens is as good as the
ratio of its time to this one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from benchmarks.common import parser, report, run, table
from lexel.models.causal_lm import CausalLM, CausalLMConfig

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
PASSES = 20
CHUNK = 2**20  # floats read by one call; small enough to time calls, large enough to hide them


def weight_bytes(lm: CausalLM, dtype: str = "float32") -> int:
    """Bytes of the weights that a pass multiplies by: blocks and output table, without heads for further
    columns or positions; of the embedding table a pass reads only its tokens' rows, so it does not count
    unless it is the output table too. int8 has a float32 scale per output channel."""
    table = lm.model.embed_tokens.weight if lm.lm_head is None else lm.lm_head.weight
    weights = [p for p in lm.model.layers.parameters() if p.ndim == 2] + [table]
    scales = 4 * sum(len(w) for w in weights) if dtype == "int8" else 0
    return BYTES[dtype] * sum(w.numel() for w in weights) + scales


def read_seconds(size: int, threads: int = 1) -> float:
    """Seconds to read `size` bytes that were last read one such pass ago: the quickest of several passes of
    torch's sum over them (other programs only ever slow it down)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = torch.ones(max(1, size // 4)).split(CHUNK * threads)
        times = []
        for _ in range(PASSES):
            started = time.perf_counter()
            for part in parts:
                part.sum()
            times.append(time.perf_counter() - started)
        return min(times)
    finally:
        torch.set_num_threads(before)


def memory_floor(lm: CausalLM, dtype: str = "float32", threads: int = 1) -> float:
    """Seconds to stream all weights of one pass of `lm`, kept as `dtype` (float32, bfloat16 or int8), read
    on this machine's processor. Small models stay in its caches, as they do when they decode."""
    return read_seconds(weight_bytes(lm, dtype), threads)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.floor``: GB/s and the floors of models of three sizes."""
    options = parser(str(__doc__).splitlines()[0], "floor").parse_args(arguments)
    widths = (128,) if options.quick else (128, 512, 1024)
    rows = []
    for dim in widths:
        lm = CausalLMConfig(vocab_size=8 * dim, dim=dim, layers=6, heads=dim // 64).build()
        for dtype in BYTES:
            seconds = memory_floor(lm, dtype, torch.get_num_threads())
            size = weight_bytes(lm, dtype)
            rows.append(
                [
                    f"dim {dim}",
                    dtype,
                    f"{size / 1e6:.1f}",
                    f"{1e3 * seconds:.2f}",
                    f"{size / seconds / 1e9:.1f}",
                ]
            )
    report(options, {"floor": rows}, table(["model", "dtype", "MB", "ms", "GB/s"], rows))


if __name__ == "__main__":
    run(main)
