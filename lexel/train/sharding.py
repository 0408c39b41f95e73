"""FSDP2: splitting a network over processes, and putting it together again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lexel.train.blocks import blocks


def shard(network: nn.Module, mesh: Any, half: bool = False) -> None:
    """FSDP2 in place: each block of a repeated stack (an element of an `nn.ModuleList` that is called as a
    module) is one group of parameters, the rest another. The methods that Lexel's networks are called by
    beside `forward` gather the parameters too. half: parameters are gathered in bfloat16, half the traffic
    (each process keeps its share in float32, and gradients are summed in float32)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if any(hasattr(parameter, "device_mesh") for parameter in network.parameters()):
        return  # Lightning calls configure_model once per trainer function
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    for block in blocks(network):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)
    losses = ("loss", "loss_of", "flow", "predict_proxy", "draft_logits")
    for name in ("encode", "decode", "embed", "draw", *losses):
        if hasattr(network, name):
            register_fsdp_forward_method(network, name)


def whole(network: nn.Module) -> Any:
    """An unsharded copy of the network (the network itself where it is not sharded)."""
    if not any(hasattr(parameter, "device_mesh") for parameter in network.parameters()):
        return network
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(network, options=options)
    # A network of transformers is not made from a config of ours.
    blank: Any = getattr(network, "blank", None)
    copied: Any = type(network)(network.config) if blank is None else blank()
    if state:  # only the first process receives it
        copied.load_state_dict(state)
    return copied
