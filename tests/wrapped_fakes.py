"""Tiny random networks of transformers' classes, whose distributions are far from uniform."""

import torch
import transformers
from transformers.utils import logging

from lexel.models.wrapped_lm import WrappedLM

logging.set_verbosity_error()
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "pad_token_id": 0}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
FAMILIES = {
    "GPT2": GPT,
    "GPTNeoX": SIZES,
    "OPT": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 8,
        "do_layer_norm_before": False,
    },
    "Phi": SIZES,
    "Falcon": {k: v for k, v in SIZES.items() if k != "intermediate_size"} | {"alibi": False},
    "Olmo2": GROUPED,
    "Cohere": GROUPED | {"logit_scale": 0.3},
    "Cohere2": GROUPED | {"logit_scale": 0.3, "num_hidden_layers": 4, "sliding_window": 3},
    "Gemma3Text": GROUPED | {"head_dim": 8, "sliding_window": 4, "num_hidden_layers": 6},
    "Starcoder2": GROUPED | {"sliding_window": 40},
    "StableLm": GROUPED,
    "GPTJ": GPT | {"rotary_dim": 4},
    "Granite": GROUPED | {"logits_scaling": 4.0},
    "Gemma2": GROUPED | {"head_dim": 8, "final_logit_softcapping": 5.0},
    "DeepseekV3": GROUPED
    | {
        "num_key_value_heads": 2,
        "moe_intermediate_size": 16,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 6,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
}


def network(name, size, seed=0, **changes):
    """A random network of a family over `size` ids."""
    torch.manual_seed(seed)
    options = {"vocab_size": size, "bos_token_id": 1, "eos_token_id": 2, **FAMILIES.get(name, {}), **changes}
    config = getattr(transformers, f"{name}Config")(**options)
    built = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return built.eval()


def wrapped(name, kit, **changes):
    """The same, wrapped, over the ids of a codec."""
    return WrappedLM(network(name, kit.vocabulary.size, **changes)).eval()
