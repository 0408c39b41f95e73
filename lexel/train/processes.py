"""What several training processes agree on. With one process each function returns what it was given."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor


def several() -> bool:
    """Whether this process trains together with others."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a detached scalar over the processes, which all call this.

    A loss ``sum / mean_over_processes(count)`` is, once the strategy has averaged the gradients of the
    processes, the mean over the targets of all of them, however many each one holds.
    """
    if not several():
        return value
    total = value.detach().float().clone()
    distributed.all_reduce(total)
    return (total / distributed.get_world_size()).to(
        value.dtype if value.is_floating_point() else total.dtype
    )


def anywhere(flag: Tensor | bool, device: torch.device) -> bool:
    """Whether `flag` holds in at least one process, which all call this."""
    if not several():
        return bool(flag)
    found = torch.as_tensor(flag, dtype=torch.float32, device=device).clone()
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return bool(found)


def gathered(value: Any) -> list[Any]:
    """Every process's `value` (something that pickles), in the order of the processes."""
    if not several():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
