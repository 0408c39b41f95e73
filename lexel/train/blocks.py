"""The repeated blocks of a network: what is sharded, recomputed and compiled one by one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from lexel.errors import LexelError


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Elements of every `nn.ModuleList` that are called as modules and have parameters, outermost first."""
    for child in module.children():
        called = type(child).forward is not nn.Module.forward
        if isinstance(module, nn.ModuleList) and called and next(child.parameters(), None) is not None:
            yield child
        else:
            yield from blocks(child)


def recompute(network: nn.Module) -> None:
    """Activation checkpointing (Chen et al., arXiv:1604.06174) in place: of each block only the input is kept
    for the backward pass, which computes the block again. A third more arithmetic; the memory of a training
    step no longer grows with what a block keeps, only with its input. Results are the same, dropout
    included."""
    for block in blocks(network):
        if not isinstance(block.forward, partial):  # Lightning calls configure_model more than once
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(network: nn.Module) -> None:
    """`torch.compile` of each block in place: equal blocks share one compilation, and names of parameters
    stay. Raises LexelError where the CPU has no C++ compiler for it."""
    if next(network.parameters()).device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError) as error:
            raise LexelError("compile=true needs a C++ compiler (g++ or clang++) on a CPU.") from error
    for block in blocks(network):
        block.compile()
