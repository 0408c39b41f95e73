"""Liquid's language model (arXiv 2412.04332, github.com/FoundationVision/Liquid): Gemma-7B over text and the
codes of Chameleon's picture tokenizer, in transformers' format. The whole of it, prompts and pictures
included, is `lexel.sample.liquid`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexel.catalog import Layout, Published, System
from lexel.models.backbones import load_backbone, native, save_backbone
from lexel.models.causal_lm import CausalLM, CausalLMConfig

# The published config.json. It says nothing of tied tables (Gemma's are) and `hidden_act` "gelu", which
# Gemma's own code reads as the tanh approximation.
ARGUMENTS: dict[str, Any] = {
    "model_type": "gemma",
    "vocab_size": 264192,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def configure(arguments: Mapping[str, Any]) -> CausalLMConfig:
    """A config of transformers → ours."""
    config = native(arguments)
    if config is None:
        raise ValueError(f"model_type {arguments['model_type']!r} is no native backbone")
    return config


def write(lm: CausalLM, folder: str | Path) -> None:
    """The folder of transformers, without a text tokenizer."""
    save_backbone(lm, folder)


LIQUID = System(
    name="liquid",
    arguments=ARGUMENTS,
    configure=configure,
    layouts=(Layout(),),
    rows=(
        Published(
            name="liquid-7b",
            repository="Junfeng5/Liquid_V1_7B",
            file="",
            arguments={},
            parameters=8_562_846_720,
            tokens="32x32",
            codebook="256000 + 8192",
            code_licence="MIT",
            weight_licence="not stated",
            source="arXiv 2412.04332, github.com/FoundationVision/Liquid",
            size=512,
            fid="5.47 (MJHQ-30K)",
            tokenizer="chameleon-vq",
        ),
    ),
    opens=load_backbone,
    writes=write,
)
SYSTEMS = (LIQUID,)
