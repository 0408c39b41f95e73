"""Training a part of a language model: groups of weights by name, LoRA, and the rows of added ids alone.

The rows of special tokens and codes in the embedding and the output table are what a backbone has not learned
yet. Whatever else rests, a stage with an adapter trains them, and the rows of text stay bit for bit what they
were. (Liquid's published script puts LoRA on the projections and trains neither table: its codes keep the
vectors they were drawn with.)

Groups: ``embeddings`` (input table and learned positions), ``head`` (output table, heads of further codes and
tokens), ``attention``, ``ffn``, ``norms``, ``picture`` (weights for picture tokens of a routed model),
``new_rows`` (rows of the added ids in both tables), ``adapter`` (LoRA), ``all``. Anything else is a pattern
of parameter names, as ``model.layers.0.*``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.models.routed import is_picture_weight
from lexel.models.slide_lora import SlideLoRA, add_slide_lora, merge_slide_lora
from lexel.vocabulary import Vocabulary

if TYPE_CHECKING:
    from lexel.train.settings import AdapterSettings, LMStage

_ORIGINAL = ".parametrizations."
_ATTENTION = ("attention", "attn", "self_attn", "self_attention")
_LINEAR = ("Linear", "Conv1D")


def prepare(network: nn.Module, stage: LMStage, vocabulary: Vocabulary | None) -> None:
    """Bring the network, in place, into the form that the stage trains: with its adapter, and gradients only
    where it learns. Raises LexelError when adapter or groups do not fit the network."""
    adapter, wanted = stage.adapter, list(stage.trainable)
    if adapter.kind != "none":
        add_adapter(network, adapter)
        heads = [f"{name}.*" for name in ("head", "future") if getattr(network, name, None) is not None]
        wanted = ["adapter", "new_rows", *heads, *wanted]
    if wanted:
        train_only(network, wanted, vocabulary)


# LoRA


def add_adapter(network: nn.Module, settings: AdapterSettings) -> None:
    """Put LoRA (Hu et al., arXiv:2106.09685; peft's) or Slide-LoRA on the linear layers of the blocks, in
    place, and freeze everything else. targets: endings of their names (none: all of them, for Slide-LoRA the
    attention's projections). Raises LexelError for a target that no block has."""
    network.requires_grad_(False)
    if settings.kind == "slide_lora":
        add_slide_lora(network, settings.targets, settings.r, settings.alpha, settings.dropout)
        return
    from peft import LoraConfig, inject_adapter_in_model

    layers = {name: module for name, module in _blocks_of(network) if type(module).__name__ in _LINEAR}
    targets = [name for name in layers if not settings.targets or _ends(name, settings.targets)]
    if missing := [t for t in settings.targets if not any(_ends(name, [t]) for name in targets)]:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise LexelError(f"adapter.targets names {missing}; the blocks' linear layers are {known}.")
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=any(type(layers[name]).__name__ == "Conv1D" for name in targets),
    )
    inject_adapter_in_model(config, network)


def _ends(name: str, endings: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def _blocks_of(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules inside the stack of the network's blocks, with their full names."""
    count = network.config.layers  # type: ignore[union-attr]
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            yield from ((f"{name}.{below}", part) for below, part in module.named_modules() if below)
            return
    raise LexelError(f"{type(network).__name__} has no stack of {count} blocks to put an adapter on.")


# Rows of added ids


class AddedRows(nn.Module):
    """A table (``[v, d]`` or ``[v]``) of which only some rows learn: a parametrization of `torch.nn.utils`.
    The optimizer sees these rows alone, so that neither its decay nor its rounding reaches the others. Every
    use of the table copies it, which is little beside the product with it."""

    rows: Tensor

    def __init__(self, rows: Tensor, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows.to(table.device))
        self.learned = nn.Parameter(table.detach()[self.rows].clone())

    def forward(self, table: Tensor) -> Tensor:
        """The table with the learned rows in their places."""
        return table.index_copy(0, self.rows, self.learned.to(table.dtype))


def added_ids(vocabulary: Vocabulary) -> Tensor:
    """Long ``[n]``, ascending: the ids of special tokens and codes."""
    special = torch.tensor(sorted(set(vocabulary.special.values())), dtype=torch.long)
    return torch.cat([special, *(block.ids for block in vocabulary.blocks)]).unique()


def tables(network: nn.Module) -> dict[str, nn.Module]:
    """The tables over the vocabulary: "embeddings", and "head" where the output has one; tied networks of
    transformers have both, which share their weight. Empty where ids have several tables (`RasterLM`)."""
    inner: Any = getattr(network, "network", None)
    if inner is not None:
        return {"embeddings": inner.get_input_embeddings(), "head": inner.get_output_embeddings()}
    if not isinstance(network, CausalLM) or not isinstance(network.model.embed_tokens, nn.Embedding):
        return {}
    found = {"embeddings": network.model.embed_tokens, "head": network.lm_head}
    return {name: table for name, table in found.items() if table is not None}


def learn_rows(network: nn.Module, ids: Tensor, which: Sequence[str] = ("embeddings", "head")) -> None:
    """Let only the rows `ids` of the tables `which` learn, in place. Tied tables learn as one."""
    made: dict[int, AddedRows] = {}
    if not tables(network):
        raise LexelError(f"{type(network).__name__} has no table over one vocabulary with rows to train.")
    for name, table in tables(network).items():
        for part in ("weight", "bias"):
            value = getattr(table, part, None)
            if name not in which or not isinstance(value, nn.Parameter):
                continue
            if int(ids.max()) >= len(value):
                raise LexelError(
                    f"the vocabulary has ids up to {int(ids.max())}, the {name} of the network "
                    f"{len(value)} rows; extend it first (lexel.models.extend)."
                )
            value.requires_grad_(False)
            rows = made.setdefault(id(value), AddedRows(ids, value))
            parametrize.register_parametrization(table, part, rows)


# Groups


def train_only(network: nn.Module, groups: Sequence[str], vocabulary: Vocabulary | None = None) -> None:
    """Give gradients to the parameters in `groups` (names or patterns) and to no others, in place.

    vocabulary: which rows ``new_rows`` are; a table that is trained as a whole has them too. Raises
    LexelError for a group that the network has nothing of.
    """
    if "all" in groups:
        network.requires_grad_(True)
        return
    if "new_rows" in groups:
        if vocabulary is None:
            raise LexelError("new_rows needs the vocabulary that says which rows they are.")
        whole = {*groups} & {"embeddings", "head"}
        tied = len({id(table.weight) for table in tables(network).values()}) == 1
        which = [name for name in ("embeddings", "head") if name not in whole and not (tied and whole)]
        learn_rows(network, added_ids(vocabulary), which)
    known = {name: group_of(network, name) for name, _ in network.named_parameters()}
    for group in groups:
        found = [name for name in known if group == known[name] or fnmatchcase(name, group)]
        if not found and not (group == "new_rows" and "embeddings" in groups):
            raise LexelError(
                f"trainable names {group!r}, of which {type(network).__name__} has nothing; it has "
                f"{', '.join(sorted(set(known.values())))}, or give a pattern of parameter names."
            )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(g == known[name] or fnmatchcase(name, g) for g in groups))


def group_of(network: nn.Module, name: str) -> str:
    """The group of a parameter by its name; "other" for what is in none."""
    if name.endswith(".learned") and _ORIGINAL in name:
        return "new_rows"
    if "lora_" in name:
        return "adapter"
    if is_picture_weight(name):
        return "picture"
    if name.startswith(("head.", "future.")):
        return "head"
    path = name.split(_ORIGINAL)[0] if _ORIGINAL in name else name.rpartition(".")[0]
    owner = network.get_submodule(path)
    own = tables(network)
    if owner is own.get("head"):
        return "head"
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    if "norm" in type(owner).__name__.lower() or "norm" in path.rpartition(".")[2]:
        return "norms"
    parents = path.split(".")
    if any(part in _ATTENTION for part in parents):
        return "attention"
    inside = any(part.isdigit() for part in parents)
    return "ffn" if inside else "other"


# What is exported


def merged(network: nn.Module) -> nn.Module:
    """The network with plain weights: a copy with LoRA added to the layers and the learned rows in their
    tables, or the network itself where it has neither."""
    names = [name for name, _ in network.named_parameters()]
    if not any("lora_" in name or _ORIGINAL in name for name in names):
        return network
    made = copy.deepcopy(network).requires_grad_(False)
    _merge_lora(made)
    if any(isinstance(module, SlideLoRA) for module in made.modules()):
        merge_slide_lora(made)
    for module in list(made.modules()):
        if parametrize.is_parametrized(module):
            _merge_rows(module)
    return made.requires_grad_(True)


@torch.no_grad()
def _merge_rows(table: nn.Module) -> None:
    """Put the learned rows into the table's own weights. (torch's `remove_parametrizations` would take the
    parametrization out of the class, which the copied network shares with the one in training.)"""
    own: dict[str, nn.Parameter] = {}
    for part, whole in table.parametrizations.items():  # type: ignore[operator, union-attr]
        own[part] = whole.original
        own[part].copy_(getattr(table, part))
    del table.parametrizations
    table.__class__ = type(table).__bases__[0]
    for part, value in own.items():
        table.register_parameter(part, value)


def _merge_lora(network: nn.Module) -> None:
    if not any("lora_A" in name for name, _ in network.named_parameters()):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            above, _, own = name.rpartition(".")
            setattr(network.get_submodule(above), own, module.get_base_layer())
