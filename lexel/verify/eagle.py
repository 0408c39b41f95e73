"""EAGLE's and LANTERN's draft heads against recorded numbers: forward passes, and drafting round by round.

b batch · l positions · s keys · d width · f feature width · v vocabulary · g tree nodes
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.checkpoints import read_checkpoint
from lexel.errors import LexelError
from lexel.models import find_published, load_published
from lexel.models.eagle import Eagle, EagleState
from lexel.sample.draft_trees import (
    DraftedTree,
    Expand,
    TreeShape,
    dynamic_tree,
    most_probable,
    static_tree,
    tree_shape,
)
from lexel.verify.fixture import Fixture

LISTED = 10
"""Children that a static tree's fixture records of each expanded node."""

Logits = Callable[[Tensor], Tensor]


@torch.no_grad()
def heads(fixture: Fixture) -> dict[str, Tensor]:
    """Outputs and logits of single passes, and the trees of successive drafting rounds."""
    model = _load(fixture)
    logits = _logits(model, fixture)
    ours = passes(model, fixture, logits)
    prefixes = {m[1] for m in map(re.compile(r"(.*)round\d+\.").match, fixture.recorded) if m}
    for prefix in sorted(prefixes):
        ours |= rounds(model, fixture, prefix, logits)
    return ours


def _load(fixture: Fixture) -> Eagle:
    """The head, with the recorded embedding of the target where its file holds none."""
    config, path = fixture.config, fixture.weights()
    row = "lantern-llamagen-t2i" if "input_type" in config else "eagle-llama-2-chat-7b"
    if any(name.startswith("midlayer.") for name in read_checkpoint(path)):
        row = "eagle3-llama-3.1-8b"
    model = load_published(row, path, {**_unpublished(row), **find_published(row)[0].known(config)})
    if model.embed_tokens is None:
        names = [name for name in fixture.recorded if "embed" in name]
        if not names:
            raise LexelError(
                f"{fixture.folder}: neither the weights nor the records hold an embedding table."
            )
        model.adopt_embedding(fixture.input(names[0]))
    return model


def _unpublished(row: str) -> dict[str, object]:
    """A fixture's config stands for a whole config file: what it leaves out has the reference's default, not
    the value of the published head."""
    system, published = find_published(row)
    return {name: system.arguments[name] for name in published.arguments}


def _logits(model: Eagle, fixture: Fixture) -> Logits:
    """Output of the head → logits ``[..., v]`` as recorded: over draft ids for EAGLE-3."""
    if model.config.kind == "eagle3":
        return model.draft_logits
    return partial(F.linear, weight=fixture.input("head_weight"))


def passes(model: Eagle, fixture: Fixture, logits: Logits) -> dict[str, Tensor]:
    """`forward`, `continue` (two more positions on top of it) and `forward_masked` (with padding)."""
    ours = {}
    if "forward.input_ids" in fixture:
        ids, features = fixture.input("forward.input_ids"), fixture.input("forward.hidden_states")
        cache = model.new_cache(*ids.shape)
        ours["forward.output"] = model(ids, features, cache=cache)
        ours["forward.logits"] = logits(ours["forward.output"])
        if "forward_masked.attention_mask" in fixture:
            mask = published_mask(fixture.input("forward_masked.attention_mask").bool())
            ours["forward_masked.output"] = model(ids, features, mask=mask)
        if "continue.input_ids" in fixture:
            more = fixture.input("continue.input_ids")
            cache.reserve(ids.shape[1] + more.shape[1])
            ours["continue.output"] = model(more, fixture.input("continue.hidden_states"), cache=cache)
            ours["continue.logits"] = logits(ours["continue.output"])
    return ours


def published_mask(real: Tensor) -> Tensor:
    """Additive mask ``[b, l, l]`` of a padding mask bool ``[b, l]``, as the reference makes it: the lowest
    float, once for padding and once for what comes later. Where both meet the sum is -inf, so what stands
    before the first real token attends evenly to all that is barred only once."""
    lowest = torch.finfo(torch.float32).min
    length = real.shape[1]
    later = torch.full((length, length), lowest).triu(1)
    return later + torch.zeros(len(real), length, length).masked_fill(~real[:, None], lowest)


def rounds(model: Eagle, fixture: Fixture, prefix: str, logits: Logits) -> dict[str, Tensor]:
    """Drafting round after round with one cache, dynamic trees or (prefix ``static.``) a fixed one."""
    ours: dict[str, Tensor] = {}
    state: EagleState | None = None
    guide = partial(guided, scale=fixture.config.get("cfg_scale", 1.0))
    number = 0
    while f"{prefix}round{number}.input_ids" in fixture:
        name = f"{prefix}round{number}"
        ids = fixture.input(f"{name}.input_ids")
        features = fixture.input(f"{name}.hidden_states")
        if state is None:
            state = EagleState(model, len(ids), model.config.max_length + ids.shape[1])
        pair = len(ids)
        out = state.read(ids[:, 1:][:, state.known[0] :], features)
        expand = _expansion(state, pair, lambda hidden: guide(logits(hidden)), model)
        root = _in_target(guide(logits(out)), model)
        if "static" in prefix:
            ours |= static_tables(root, expand, fixture, name)
        else:
            settings = fixture.config
            tree = dynamic_tree(
                root.log_softmax(-1),
                partial(_log_probs, expand),
                width=settings["top_k"],
                depth=settings["depth"],
                nodes=settings["total_tokens"] - 1,
            )
            ours |= {f"{name}.{key}": value for key, value in tree_tables(tree, ids[:1, -1:]).items()}
        number += 1
    return ours


def guided(logits: Tensor, scale: float) -> Tensor:
    """The conditional row's logits, drawn away from the unconditional one's where there are two."""
    if len(logits) == 1:
        return logits
    cond, uncond = logits.chunk(2)
    return uncond + scale * (cond - uncond)


def _expansion(state: EagleState, rows: int, logits: Logits, model: Eagle) -> Expand:
    """`expand` for one tree that all rows of the head read."""

    def expand(tokens: Tensor, parents: Tensor) -> Tensor:
        hidden = state.expand(tokens.expand(rows, -1), parents.expand(rows, -1))
        return _in_target(logits(hidden), model)

    return expand


def _log_probs(expand: Expand, tokens: Tensor, parents: Tensor) -> Tensor:
    return expand(tokens, parents).log_softmax(-1)


def _in_target(logits: Tensor, model: Eagle) -> Tensor:
    """Logits over draft ids → over the target's ids."""
    ids = model.draft_ids()
    if ids is None:
        return logits
    every = logits.new_full((*logits.shape[:-1], model.config.vocab_size), -torch.inf)
    return every.index_copy_(-1, ids, logits)


def tree_tables(tree: DraftedTree, last: Tensor) -> dict[str, Tensor]:
    """The tree of row 0 as recorded, the last known token being its root."""
    paths = tree.paths(0)
    longest = max(map(len, paths))
    return {
        "draft_tokens": torch.cat([last, tree.tokens[:1]], dim=1),
        "tree_mask": tree.visible[:1, None].float(),
        "tree_position_ids": tree.depths[0],
        "retrieve_indices": torch.tensor([path + [-1] * (longest - len(path)) for path in paths]),
    }


def static_tables(scores: Tensor, expand: Expand, fixture: Fixture, name: str) -> dict[str, Tensor]:
    """The best tokens of every expanded node of a fixed tree, and their logits."""
    choices = fixture.config["tree_choices"]
    shape = tree_shape(choices) if isinstance(choices, str) else TreeShape.of(choices)
    listed: list[tuple[Tensor, Tensor]] = []

    def choose(scores: Tensor, count: int) -> Tensor:
        best = scores[0].topk(LISTED)
        listed.append((best.indices, best.values))
        return most_probable(scores, count)

    static_tree(scores, expand, shape, choose)
    tokens, values = (torch.cat(column) for column in zip(*listed))
    return {f"{name}.tree_topk_tokens": tokens, f"{name}.tree_topk_logits": values}
