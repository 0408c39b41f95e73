"""The smaller models inside a language model with nested feed-forward widths: MatFormer (Devvrit et al.,
arXiv:2310.07707).

A model with ``lm.ffn_widths=[0.25,1.0]`` whose training steps sometimes use the narrower width
(``stages.lm.narrow``) holds one that can draft for it (``decoding="nested"``) or be taken out: `extract`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lexel.models.causal_lm import CausalLM
from lexel.nn.decoder import SwiGLU, nested_width


@torch.no_grad()
def extract(lm: CausalLM, width: float) -> CausalLM:
    """The nested submodel at the fraction `width` of the feed-forward as a model of its own, an ordinary one
    of one width: its logits are ``lm(batch, width=width)``, bit for bit. In eval mode, on the model's device
    and in its dtype; it shares no memory with `lm`, and ``save_pretrained`` writes it as any other.
    Raises ValueError for a width outside (0, 1], or a factorized head, whose own feed-forward is as wide as
    the model's and is not nested."""
    if lm.config.head == "factorized":
        raise ValueError(
            "a factorized head is as wide as the whole model; its nested model cannot stand alone."
        )
    units = nested_width(lm.config.hidden_width, width)
    state = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    for name, part in lm.named_modules():
        if isinstance(part, SwiGLU):
            for row in ("gate_proj.weight", "up_proj.weight", "gate_proj.bias", "up_proj.bias"):
                if f"{name}.{row}" in state:
                    state[f"{name}.{row}"] = state[f"{name}.{row}"][:units].clone()
            down = f"{name}.down_proj.weight"
            state[down] = state[down][:, :units].clone()
    config = replace(lm.config, ffn_dim=units, ffn_widths=(1.0,))
    with torch.random.fork_rng():  # new modules draw their weights from the global generator
        small = config.build()
    weight = lm.model.embed_tokens.weight
    small = small.to(weight.device, weight.dtype)
    small.load_state_dict(state)
    return small.eval()
