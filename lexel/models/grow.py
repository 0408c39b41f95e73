"""Larger language models that start as exact copies of smaller ones.

Net2Net (Chen et al., arXiv:1511.05641) and bert2BERT (Chen et al., arXiv:2110.07143): channels, heads and
feed-forward units are repeated, what reads them is divided by the number of copies, and added blocks begin as
identities. The grown model gives the small one's logits, so training goes on from where the small one is, and
the cost of a larger network can be measured on distributions that are already known.

d width · f factor · h heads · e head width · m feed-forward width
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import repeat
from torch import Tensor, nn

from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.nn.decoder import DecoderLayer, nested_width

# Fields of a model's config that `widen` knows no rule for.
_NOT_GROWN = ("qkv_bias", "out_bias", "ffn_bias", "norm_offset", "sandwich_norm", "windows")


@torch.no_grad()
def widen(lm: CausalLM, factor: int, layers: int = 0, *, noise: float = 0.0, seed: int = 0) -> CausalLM:
    """`lm` with `factor` times its width, heads and feed-forward units, and `layers` blocks more, in eval
    mode, on its device and in its dtype: the same logits up to rounding, at full width and at every nested
    feed-forward width. Heads for later tokens (`future_heads`) are left out.

    noise: size of the differences between copies, as a share of their weights. Copies that are equal get
    equal gradients and would stay equal; noise that adds up to zero over the copies that a row reads parts
    them and changes no logit. seed: of the noise and of the added blocks.
    Raises ValueError for a factor below 1, a negative number of layers or noise, or a model with several
    codes per position or a form of Gemma's or Qwen2's, which are not grown.
    """
    if factor < 1 or layers < 0 or noise < 0:
        raise ValueError(
            f"widen needs a factor of at least 1 and no negative layers or noise, got {factor}, {layers}, "
            f"{noise}."
        )
    if lm.head is not None:
        raise ValueError(
            f"widen grows models with one code per position; this one has a {lm.config.head} head for "
            f"{lm.config.columns} codes."
        )
    if strange := [name for name in _NOT_GROWN if getattr(lm.config, name)]:
        raise ValueError(f"widen grows models of Llama's form; this one has {', '.join(strange)}.")
    random = torch.Generator().manual_seed(seed)
    weight = lm.model.embed_tokens.weight
    with torch.random.fork_rng():  # new modules draw their weights from the global generator
        torch.manual_seed(seed)
        grown = _config(lm.config, factor, layers).build().to(weight.device, weight.dtype)
    copies = _Copies(factor, noise, random)
    grown.model.embed_tokens.weight.copy_(repeat(weight, "v d -> v (f d)", f=factor))
    for old, new in zip(lm.model.layers, grown.model.layers):
        _widen_layer(old, new, copies)  # type: ignore[arg-type]
    for block in grown.model.layers[lm.config.layers :]:
        for last in (block.self_attn.o_proj, block.mlp.down_proj):  # type: ignore[union-attr]
            nn.init.zeros_(last.weight)  # type: ignore[union-attr, arg-type]
    norm: Tensor = repeat(lm.model.norm.weight, "d -> (f d)", f=factor)
    if lm.lm_head is None or grown.lm_head is None:
        norm = norm / factor  # the table that reads the last hidden state also embeds: it cannot be divided
    else:
        grown.lm_head.weight.copy_(copies.reading(lm.lm_head.weight))
    grown.model.norm.weight.copy_(norm)
    return grown.eval()


def _config(config: CausalLMConfig, factor: int, layers: int) -> CausalLMConfig:
    hidden = config.hidden_width
    units = [nested_width(hidden, width) for width in config.ffn_widths]
    widths = [
        # A fraction of the wider network may be rounded to other units than the copies of the narrow ones.
        width if nested_width(factor * hidden, width) == factor * count else count / hidden
        for width, count in zip(config.ffn_widths, units)
    ]
    return replace(
        config,
        dim=factor * config.dim,
        layers=config.layers + layers,
        heads=factor * config.heads,
        kv_heads=factor * config.key_heads,
        head_dim=config.head_width,
        ffn_dim=factor * hidden,
        ffn_widths=tuple(sorted(set(widths))),
        future_heads=0,
    )


class _Copies:
    """Weights repeated along one side, the noise that parts the copies along the other."""

    def __init__(self, factor: int, noise: float, random: torch.Generator) -> None:
        self.factor, self.noise, self.random = factor, noise, random

    def channels(self, weight: Tensor) -> Tensor:
        """``[n, d] -> [f·n, f·d]``: reads repeated channels, writes repeated outputs (copy after copy)."""
        return self.reading(repeat(weight, "n d -> (f n) d", f=self.factor))

    def units(self, weight: Tensor) -> Tensor:
        """``[m, d] -> [m·f, f·d]``: the copies of a unit lie side by side, so that the first units of the
        wide network are the narrow one's first."""
        return self.reading(repeat(weight, "m d -> (m f) d", f=self.factor))

    def from_units(self, weight: Tensor) -> Tensor:
        """``[d, m] -> [f·d, m·f]``: reads what `units` writes."""
        return self.reading(repeat(weight, "d m -> (f d) m", f=self.factor), side_by_side=True)

    def reading(self, weight: Tensor, side_by_side: bool = False) -> Tensor:
        """``[n, d] -> [n, f·d]`` (or ``[n, d·f]``): the sum over copies of an input is what `weight` gave."""
        share = (weight / self.factor)[..., None].expand(*weight.shape, self.factor)
        if self.noise and self.factor > 1:
            drawn = torch.randn(share.shape, generator=self.random).to(share)
            drawn = drawn - drawn.mean(-1, keepdim=True)
            share = share + self.noise * share.square().mean().sqrt() * drawn
        return share.flatten(1) if side_by_side else share.transpose(1, 2).flatten(1)


def _widen_layer(old: DecoderLayer, new: DecoderLayer, copies: _Copies) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        source, target = (getattr(layer.self_attn, name).weight for layer in (old, new))
        target.copy_(copies.channels(source))  # heads follow each other whole, key heads likewise
    for name in ("gate_proj", "up_proj"):
        getattr(new.mlp, name).weight.copy_(copies.units(getattr(old.mlp, name).weight))
    new.mlp.down_proj.weight.copy_(copies.from_units(old.mlp.down_proj.weight))
    for name in ("input_layernorm", "post_attention_layernorm"):
        getattr(new, name).weight.copy_(repeat(getattr(old, name).weight, "d -> (f d)", f=copies.factor))
    for name in ("q_norm", "k_norm"):
        if getattr(old.self_attn, name) is not None:
            getattr(new.self_attn, name).weight.copy_(getattr(old.self_attn, name).weight)
