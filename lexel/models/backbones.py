"""Pretrained text models of transformers as `CausalLM`, and back: Llama, Mistral, Qwen2, Qwen3, Gemma and
Gemma-2.

A folder of transformers holds `config.json` and the weights in one or several safetensors files. Parameters
of these families have the same names in `CausalLM`, so that only the config is translated. `FAMILIES` says
how; transformers' own config classes fill in what a file leaves out. What a family can express and `CausalLM`
cannot is refused by its name, and so is the reverse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lexel.errors import LexelError
from lexel.hub import CONFIG_FILE, WEIGHTS_FILE, mismatches, read_config, resolve_folder, write_atomically
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.nn.decoder import Activation
from lexel.nn.rope import RopeScaling

SHARD_BYTES = 5 * 10**9
"""Largest weight file that `save_backbone` writes."""

COMMON = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "hidden_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_length": "max_position_embeddings",
}
"""Our property → transformers' key, for all families."""

FIELDS = {"key_heads": "kv_heads", "head_width": "head_dim", "hidden_width": "ffn_dim"}
"""Property → the field that sets it, where they differ."""

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# Other names of the same tensor, and what holds nothing: tables that are computed.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")
_INDEX = f"{WEIGHTS_FILE}.index.json"
OUTPUT = "lm_head.weight"


class Vocabulary(Protocol):
    """What is asked of a `lexel.vocabulary.Vocabulary` here."""

    special: Mapping[str, int]

    @property
    def size(self) -> int: ...

    def name(self, token: int) -> str: ...


class UnsupportedBackbone(LexelError):
    """A config of a native family asks for something that `CausalLM` does not have."""


@dataclass(frozen=True)
class Family:
    """One of transformers' architectures. architecture: its class; read: its config → our fields beside the
    common ones; write: our config → its keys beside the common ones."""

    architecture: str
    read: Callable[[Any], dict[str, Any]]
    write: Callable[[CausalLMConfig], dict[str, Any]]


def _read_windows(theirs: Any) -> tuple[int | None, ...]:
    """Window of every block, from `layer_types` and `sliding_window`; empty where all see everything."""
    kinds = theirs.layer_types
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        _refuse(theirs, "layer_types", unknown[0])
    windows = tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _write_windows(config: CausalLMConfig) -> dict[str, Any]:
    windows = config.windows or (None,) * config.layers
    lengths = {window for window in windows if window is not None}
    return {
        "sliding_window": min(lengths, default=None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def _write_qwen_windows(config: CausalLMConfig) -> dict[str, Any]:
    windows = config.windows or (None,) * config.layers
    first = next((index for index, window in enumerate(windows) if window is not None), config.layers)
    return {
        **_write_windows(config),
        "use_sliding_window": bool(any(windows)),
        "max_window_layers": first,  # the same for programs that do not know layer_types
    }


def _read_gemma(theirs: Any) -> dict[str, Any]:
    if getattr(theirs, "use_bidirectional_attention", None):
        _refuse(theirs, "use_bidirectional_attention", True)
    bias = bool(theirs.attention_bias)
    return {
        "qkv_bias": bias,
        "out_bias": bias,
        "norm_offset": 1.0,
        "embed_scale": theirs.hidden_size**0.5,
    }


def _read_gemma2(theirs: Any) -> dict[str, Any]:
    scalar = theirs.query_pre_attn_scalar
    return {
        **_read_gemma(theirs),
        "sandwich_norm": True,
        "attention_scale": None if scalar == theirs.head_dim else scalar**-0.5,
        "attention_softcap": theirs.attn_logit_softcapping,
        "logit_softcap": theirs.final_logit_softcapping,
        "windows": _read_windows(theirs),
    }


def _write_gemma(config: CausalLMConfig) -> dict[str, Any]:
    return {"attention_bias": config.out_bias, "hidden_activation": "gelu_pytorch_tanh"}


def _write_gemma2(config: CausalLMConfig) -> dict[str, Any]:
    scale = config.attention_scale
    return {
        **_write_gemma(config),
        **_write_windows(config),
        "query_pre_attn_scalar": config.head_width if scale is None else round(scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _attention_bias(theirs: Any) -> dict[str, Any]:
    return {"qkv_bias": bool(theirs.attention_bias), "out_bias": bool(theirs.attention_bias)}


# model_type → how its config is read and written. A config that several fit is written as the first of them.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        lambda theirs: {**_attention_bias(theirs), "ffn_bias": bool(theirs.mlp_bias)},
        lambda config: {"attention_bias": config.out_bias, "mlp_bias": config.ffn_bias},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        lambda theirs: {
            "windows": (theirs.sliding_window,) * theirs.num_hidden_layers if theirs.sliding_window else ()
        },
        lambda config: {"sliding_window": config.windows[0] if config.windows else None},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        lambda theirs: {"qkv_bias": True, "windows": _read_windows(theirs)},
        _write_qwen_windows,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        lambda theirs: {**_attention_bias(theirs), "qk_norm": True, "windows": _read_windows(theirs)},
        lambda config: {**_write_qwen_windows(config), "attention_bias": config.out_bias},
    ),
    "gemma": Family("GemmaForCausalLM", _read_gemma, _write_gemma),
    "gemma2": Family("Gemma2ForCausalLM", _read_gemma2, _write_gemma2),
}


def native(config: Mapping[str, Any]) -> CausalLMConfig | None:
    """Our config for a parsed `config.json` of transformers; None when its `model_type` is not one of
    `FAMILIES`. Raises LexelError naming the field when the file asks for something that `CausalLM` does not
    have (an unknown kind of rotary scaling, quantised weights, …) or transformers itself refuses it."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return None
    theirs = _theirs(config)
    act = getattr(theirs, "hidden_activation", None) or theirs.hidden_act
    if act not in ACTIVATIONS:
        _refuse(theirs, "hidden_act", act)
    if getattr(theirs, "quantization_config", None):
        _refuse(theirs, "quantization_config", theirs.quantization_config)
    values: dict[str, Any] = {
        FIELDS.get(ours, ours): getattr(theirs, name, None) for ours, name in COMMON.items()
    }
    if values["head_dim"] is None:
        values["head_dim"] = theirs.hidden_size // theirs.num_attention_heads
    pad = theirs.pad_token_id
    try:
        return CausalLMConfig(
            **values,
            **family.read(theirs),
            **_read_rope(theirs),
            activation=ACTIVATIONS[act],
            pad_id=0 if pad is None or pad < 0 else pad,
        )
    except ValueError as error:
        raise LexelError(f"this {config['model_type']} config makes no sense: {error}") from error


def _theirs(config: Mapping[str, Any]) -> Any:
    """transformers' config object, with its defaults filled in."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:  # validation raises a wide family
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise LexelError(f"transformers refuses this {config['model_type']} config: {reason}") from error


def _read_rope(theirs: Any) -> dict[str, Any]:
    rope = dict(theirs.rope_parameters)
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse(theirs, "partial_rotary_factor", rope["partial_rotary_factor"])
    if kind == "default":
        return {"rope_theta": theta}
    if kind == "linear":
        return {"rope_theta": theta, "rope_scaling": RopeScaling("linear", float(rope["factor"]))}
    if kind != "llama3":
        _refuse(theirs, "rope_type", kind)
    scaling = RopeScaling(
        "llama3",
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope["original_max_position_embeddings"]),
    )
    return {"rope_theta": theta, "rope_scaling": scaling}


def _refuse(theirs: Any, name: str, value: Any) -> NoReturn:
    raise UnsupportedBackbone(
        f"{theirs.model_type} models with {name}={value!r} are not among the native backbones; they can be "
        "used as transformers runs them (lexel.models.wrapped_lm, or lm.native=false in training)."
    )


def exported(config: CausalLMConfig, family: str | None = None) -> dict[str, Any]:
    """The `config.json` of transformers for a `CausalLM` of this config, of the named family or else of the
    first that has all it needs; keys have the names that every version of transformers reads.

    Nested widths, dropout and heads for later tokens are training's matter and are left out. Raises
    LexelError naming the fields that no family has (several codes per position, rotary shares of rows, …).
    """
    wanted = replace(
        config,
        kv_heads=config.key_heads,
        head_dim=config.head_width,
        ffn_dim=config.hidden_width,
        ffn_widths=(1.0,),
        dropout=0.0,
        future_heads=0,
    )
    fewest: list[str] | None = None
    for name in [family, *FAMILIES] if family in FAMILIES else FAMILIES:
        values = _written(config, str(name))
        try:
            found = native(values)
        except LexelError:  # a family may forbid sizes that others allow
            continue
        differing = [key for key, value in vars(wanted).items() if value != getattr(found, key)]
        if not differing:
            return values
        if fewest is None or len(differing) < len(fewest):
            fewest = differing
    what = ", ".join(f"{key}={getattr(wanted, key)!r}" for key in fewest or ["dim", "heads"])
    raise LexelError(
        f"no family of transformers ({', '.join(FAMILIES)}) has {what}; save_pretrained keeps it."
    )


def _written(config: CausalLMConfig, name: str) -> dict[str, Any]:
    """The config of a family that comes closest; `exported` checks that it says the same."""
    family, scaling = FAMILIES[name], config.rope_scaling
    rope: dict[str, Any] | None = None
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope = {
            **(rope or {}),
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.trained_length,
        }
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation]
    return {
        "architectures": [family.architecture],
        "model_type": name,
        **{theirs: getattr(config, ours) for ours, theirs in COMMON.items()},
        "hidden_act": activation,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "pad_token_id": config.pad_id,
        **family.write(config),
    }


def load_backbone(name: str | Path, dtype: torch.dtype | None = None) -> CausalLM:
    """A text model of transformers (local folder or hub id) as a `CausalLM` in eval mode, its weights in
    `dtype` (None: float32, as all models of Lexel are loaded).

    Weight files are read one after the other, straight into place: memory holds one copy of the model.
    `source` of the model is the parsed `config.json`, which `save_backbone` starts from. Raises LexelError
    for a family that is not native, an unsupported config (see `native`), and weights that do not fit,
    listing them.
    """
    folder = resolve_folder(name, "backbone")
    values = read_config(folder)
    config = native(values)
    if config is None:
        raise LexelError(
            f"{folder} holds a {values.get('model_type')!r} model; native backbones are "
            f"{', '.join(FAMILIES)}."
        )
    with torch.device("meta"):
        lm = CausalLM(config)
    _fill(lm, _shards(folder), dtype or torch.float32)
    lm.source = values
    return lm.eval()


def _shards(folder: Path) -> list[Path]:
    """The weight files of a folder. Raises LexelError when there is none, or one is missing."""
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise LexelError(f"{folder / _INDEX} is not an index of weight files ({error}).") from error
        if outside := [name for name in names if Path(name).name != name]:
            raise LexelError(f"{folder / _INDEX} points outside its own folder: {outside[0]!r}.")
    else:
        names = [WEIGHTS_FILE]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise LexelError(
            f"{folder} lacks {missing[0]}; backbones are read from safetensors files only (transformers "
            "writes them with save_pretrained)."
        )
    return [folder / name for name in names]


def _fill(lm: CausalLM, shards: list[Path], dtype: torch.dtype) -> None:
    """Put the tensors of weight files in the place of the model's, cast to `dtype`."""
    expected = {key: tuple(value.shape) for key, value in lm.state_dict().items()}
    held: dict[Path, list[str]] = {}
    found: dict[str, tuple[int, ...]] = {}
    shard = shards[0]
    try:
        for shard in shards:
            with safe_open(shard, "pt") as file:
                held[shard] = [key for key in file.keys() if not _IGNORED.fullmatch(key)]  # noqa: SIM118
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in held[shard]}
        if lm.lm_head is None:
            found.pop(OUTPUT, None)  # some programs write the table of a tied model twice
        if problems := mismatches(expected, found):
            raise LexelError(f"{shards[0].parent} does not fit its config: {problems}.")
        state: dict[str, Tensor] = {}
        for shard, keys in held.items():
            with safe_open(shard, "pt") as file:
                # Copied, so that no parameter is a view into a file that may be replaced.
                state |= {key: file.get_tensor(key).to(dtype, copy=True) for key in keys if key in found}
        lm.load_state_dict(state, assign=True)
        for shard in (shard for shard, keys in held.items() if OUTPUT in keys and OUTPUT not in found):
            with safe_open(shard, "pt") as file:
                if not torch.equal(file.get_tensor(OUTPUT).to(dtype), lm.model.embed_tokens.weight):
                    raise LexelError(
                        f"{shard} holds an output table ({OUTPUT}) of its own, but the config ties it to the "
                        "embedding; set tie_word_embeddings to false."
                    )
    except (SafetensorError, OSError) as error:
        raise LexelError(f"{shard} is not a readable safetensors file ({error}).") from error


def save_backbone(
    lm: CausalLM,
    folder: str | Path,
    vocabulary: Vocabulary | None = None,
    text_tokenizer: Any = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `lm` as a folder that ``transformers.AutoModelForCausalLM.from_pretrained`` (and any program that
    reads transformers' format) opens with equal logits.

    vocabulary: its pad, bos and eos ids go into the config. text_tokenizer: saved beside the weights; with a
    vocabulary, a token is added for every id behind the text, named as `Vocabulary.name` says, so that ids
    and tokens agree. dtype: of the weights written (None: as they are). Heads for later tokens are left out.
    Raises LexelError when no family of transformers can express the model (see `exported`), or the text
    tokenizer's ids are not the vocabulary's.
    """
    folder = Path(folder)
    source: dict[str, Any] = lm.source or {}
    values = source | exported(lm.config, source.get("model_type"))
    if vocabulary is not None:
        values |= {f"{role}_token_id": vocabulary.special.get(role) for role in ("pad", "bos", "eos")}
    weight = lm.model.embed_tokens.weight
    for name in {"dtype", "rope_parameters"} & set(values):
        del values[name]  # what later versions call torch_dtype, rope_theta and rope_scaling
    values["torch_dtype"] = str(dtype or weight.dtype).removeprefix("torch.")
    if text_tokenizer is not None:
        named = text_tokenizer if vocabulary is None else extended_tokenizer(text_tokenizer, vocabulary)
        named.save_pretrained(str(folder))
    _save_weights(lm, folder, dtype)
    text = json.dumps(values, indent=2) + "\n"
    write_atomically(folder / CONFIG_FILE, lambda path: _write_text(path, text))


def _save_weights(lm: CausalLM, folder: Path, dtype: torch.dtype | None) -> None:
    """One file, or several and their index, each cast and written before the next."""
    state = {key: value for key, value in lm.state_dict().items() if not key.startswith("future.")}
    groups: list[list[str]] = [[]]
    room = SHARD_BYTES
    for key, value in state.items():
        size = value.numel() * (dtype or value.dtype).itemsize
        if size > room and groups[-1]:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(key)
        room -= size
    count = len(groups)
    names = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    names = [WEIGHTS_FILE] if count == 1 else names
    for name, keys in zip(names, groups):
        part = {key: _stored(state[key], dtype) for key in keys}
        write_atomically(folder / name, lambda path: save_file(part, path, metadata={"format": "pt"}))  # noqa: B023
    (folder / _INDEX).unlink(missing_ok=True)
    if count > 1:
        total = sum(value.numel() * (dtype or value.dtype).itemsize for value in state.values())
        places = {key: name for name, keys in zip(names, groups) for key in keys}
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"
        write_atomically(folder / _INDEX, lambda path: _write_text(path, index))


def extended_tokenizer(text_tokenizer: Any, vocabulary: Vocabulary) -> Any:
    """A copy of a text tokenizer of transformers that knows every id of `vocabulary` behind its own, as a
    token of the name `Vocabulary.name`. Raises LexelError when its own ids are not the vocabulary's text."""
    if len(text_tokenizer) > vocabulary.size:
        raise LexelError(
            f"the text tokenizer has {len(text_tokenizer)} ids, the vocabulary only {vocabulary.size}; "
            "give the tokenizer that the vocabulary was built on."
        )
    made = deepcopy(text_tokenizer)
    names = [vocabulary.name(token) for token in range(len(made), vocabulary.size)]
    made.add_tokens(names, special_tokens=True)
    if names and made.convert_tokens_to_ids(names[-1]) != vocabulary.size - 1:
        raise LexelError(
            f"the text tokenizer already holds names of the vocabulary such as {names[0]!r}; give the "
            "tokenizer that the vocabulary was built on."
        )
    return made


def _stored(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.detach().to("cpu", dtype or value.dtype).contiguous()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
