"""FSDP2: splitting a network over processes, and putting it together again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def shard(network: nn.Module, mesh: Any) -> None:
    """FSDP2 in place: each block of a repeated stack (an element of an `nn.ModuleList` that is called as a
    module) is one group of parameters, the rest another. The methods that Lexel's networks are called by
    beside `forward` gather the parameters too."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if any(hasattr(parameter, "device_mesh") for parameter in network.parameters()):
        return  # Lightning calls configure_model once per trainer function
    for block in _blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for name in ("encode", "decode", "embed", "loss", "flow", "predict_proxy", "draft_logits"):
        if hasattr(network, name):
            register_fsdp_forward_method(network, name)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        called = type(child).forward is not nn.Module.forward
        if isinstance(module, nn.ModuleList) and called and next(child.parameters(), None) is not None:
            yield child
        else:
            yield from _blocks(child)


def whole(network: nn.Module) -> Any:
    """An unsharded copy of the network (the network itself where it is not sharded)."""
    if not any(hasattr(parameter, "device_mesh") for parameter in network.parameters()):
        return network
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(network, options=options)
    copied = type(network)(network.config)
    if state:  # only the first process receives it
        copied.load_state_dict(state)
    return copied
