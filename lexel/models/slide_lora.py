"""Slide-LoRA (TextHarmony, Zhao et al., arXiv:2407.16364): one low-rank expert for text, one for pictures,
one for both, on chosen projections.

Of a projection W the released code (bytedance/TextHarmony, models/moe) makes
``W x + sum_e g_e B_e A_e x`` over three experts (picture generation, text generation, shared). Its gate is
not learned: g is 1/2 for the expert of the task and 1/2 for the shared one, one choice per sample, by the
task that the data names; the rank is 32 on q, k, v and o, and the sum is not scaled by alpha / r.

Here the same halves are chosen per token, by its modality: a mixed sequence has both kinds, and a cached key
stays what it was. The sum is scaled by alpha / r, as LoRA's. With that the experts are no longer needed after
training: the text and the shared one add up to a weight for text tokens, the picture and the shared one to a
weight for picture tokens, which is a routed model (`lexel.models.routed`). That is what is exported.

e experts (picture, text, shared) · r rank · k inputs · n outputs
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.nn.decoder import DecoderLayer
from lexel.nn.routing import current_tokens, listen, parts, route_blocks

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
PICTURE, TEXT, SHARED = range(3)


class SlideLoRA(nn.Module):
    """A linear layer at rest with its three experts."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / r
        self.drop = nn.Dropout(dropout)
        weight = base.weight
        self.lora_in = nn.Parameter(weight.new_empty(3, r, weight.shape[1]))
        self.lora_out = nn.Parameter(weight.new_zeros(3, weight.shape[0], r))
        for expert in self.lora_in:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))

    @property
    def out_features(self) -> int:
        """n"""
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``[b, l, k] -> [b, l, n]``"""
        picture = current_tokens().mask
        gate = 0.5 * torch.stack([picture, ~picture, torch.ones_like(picture)], dim=-1).to(x.dtype)
        inner = torch.einsum("...k,erk->...er", self.drop(x), self.lora_in) * gate.unsqueeze(-1)
        return self.base(x) + self.scale * torch.einsum("...er,enr->...n", inner, self.lora_out)

    @torch.no_grad()
    def merged(self, expert: int) -> nn.Linear:
        """The layer of the tokens of one expert (`PICTURE` or `TEXT`), with the shared one."""
        made = copy.deepcopy(self.base)
        for e in (expert, SHARED):
            made.weight += 0.5 * self.scale * self.lora_out[e] @ self.lora_in[e]
        return made


def add_slide_lora(lm: nn.Module, targets: Sequence[str], r: int, alpha: float, dropout: float = 0.0) -> None:
    """Put experts on the projections of every block whose names end in `targets` (none: `TARGETS`), in place.
    Raises LexelError for another model than a `CausalLM`, a routed one, or an unknown target."""
    if type(lm) is not CausalLM:
        raise LexelError(f"Slide-LoRA needs a CausalLM, which routes tokens, got {type(lm).__name__}.")
    if lm.config.routed:
        raise LexelError("the language model is routed already; Slide-LoRA makes one.")
    targets = targets or TARGETS
    for module in lm.model.layers:
        block = cast(DecoderLayer, module)
        layers = {name: part for name, part in block.named_modules() if isinstance(part, nn.Linear)}
        names = [name for name in layers if any(f".{name}".endswith(f".{target}") for target in targets)]
        if missing := [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]:
            known = ", ".join(name.rpartition(".")[2] for name in layers)
            raise LexelError(f"adapter.targets names {missing}; the blocks' linear layers are {known}.")
        for name in names:
            above, _, own = name.rpartition(".")
            setattr(block.get_submodule(above), own, SlideLoRA(layers[name], r, alpha, dropout))
        listen(block)
    lm.config = replace(lm.config, routed=_adapted(block))


def _adapted(block: DecoderLayer) -> tuple[str, ...]:
    """The parts of a block with experts in them."""
    return tuple(
        name
        for name in parts(block)
        if any(isinstance(module, SlideLoRA) for module in block.get_submodule(name).modules())
    )


def merge_slide_lora(lm: nn.Module) -> None:
    """Turn experts into weights for text and for picture tokens, in place: a routed `CausalLM`."""
    for module in cast(CausalLM, lm).model.layers:
        block = cast(DecoderLayer, module)
        names = _adapted(block)
        experts = {name: block.get_submodule(name) for name in names}
        route_blocks([block], names)
        for name, part in experts.items():
            routed = block.get_submodule(name)
            routed.text, routed.picture = (_without(part, expert) for expert in (TEXT, PICTURE))


def _without(part: nn.Module, expert: int) -> nn.Module:
    """A copy of a part with plain layers for the tokens of `expert`."""
    if isinstance(part, SlideLoRA):
        return part.merged(expert)
    made = copy.deepcopy(part)
    for name, module in part.named_modules():
        if isinstance(module, SlideLoRA):
            above, _, own = name.rpartition(".")
            setattr(made.get_submodule(above), own, module.merged(expert))
    return made
