"""EAGLE draft heads: one decoder layer that guesses what a large language model says next from what that
model already computed.

* EAGLE-1 and EAGLE-2 (arXiv 2401.15077, 2406.16858): reads the target's last hidden state and predicts the
  next one; the target's own output layer makes tokens of it. The two differ in how trees are drafted only.
* LANTERN's drafter for LlamaGen (arXiv 2410.03355): the same with LlamaGen's rotary table.
* EAGLE-3 (arXiv 2503.01840): reads the inputs of three blocks of the target, has an output layer of its own,
  and may draft from a part of the vocabulary.

At position i a head reads the target's feature of token i and the id of token i + 1; what it says is about
token i + 2. Parameters have the published names (github.com/SafeAILab/EAGLE, github.com/jadohu/LANTERN).

b batch · l positions (q: new ones) · s keys · n tree nodes · d width · f feature width · v vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.catalog import Layout, Published, System
from lexel.errors import LexelError
from lexel.hub import Pretrained
from lexel.models.kv_cache import KVCache
from lexel.nn.attention import Extend, SelfAttention, additive_mask
from lexel.nn.decoder import DecoderLayer, SwiGLU, init_decoder
from lexel.nn.norm import RMSNorm
from lexel.nn.rope import RasterRotary, Rotary, rotate, rotate_interleaved

FEATURES = 3
"""Blocks of the target whose inputs an EAGLE-3 head reads."""

# (hidden [..., d], first id, id after the last or None for all) -> logits [..., ids]: `CausalLM.project`.
Project = Callable[[Tensor, int, int | None], Tensor]
# (layer, keys, values [b, g, q, e]) -> all keys and values [b, g, s, e]: `KVCache.append`.
Append = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class EagleConfig:
    """Size and form of an `Eagle`.

    kind: "eagle" (EAGLE-1 and 2, LANTERN) or "eagle3". vocab_size, dim: the target's vocabulary and this
    head's width, which for "eagle" is the target's too. kv_heads: None is as many as heads; head_dim: None is
    dim / heads. bias: of the input projection ("eagle").
    raster, raster_start: side of LlamaGen's rotary grid and the position where it begins (0: no grid, the
    head turns halves by `rope_axes` like `CausalLM`).
    draft_vocab: ids that an "eagle3" drafts from (None: all). target_dim: width of the target where it is not
    dim ("eagle3"). feature_layers: the three blocks of the target whose inputs it reads (empty: those of
    `default_feature_layers`). embedding: whether it holds the target's embedding table; without, give it
    with `adopt_embedding`. max_length: a new cache's default size. Raises ValueError when fields disagree.
    """

    vocab_size: int
    dim: int
    heads: int
    ffn_dim: int
    kind: Literal["eagle", "eagle3"] = "eagle"
    layers: int = 1
    kv_heads: int | None = None
    head_dim: int | None = None
    norm_eps: float = 1e-6
    rope_theta: float = 1e4
    rope_axes: tuple[float, float, float] = (1.0, 0.0, 0.0)
    raster: int = 0
    raster_start: int = 0
    bias: bool = True
    draft_vocab: int | None = None
    target_dim: int | None = None
    feature_layers: tuple[int, ...] = ()
    embedding: bool = True
    max_length: int = 2048

    def __post_init__(self) -> None:
        for name in ("rope_axes", "feature_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in ("eagle", "eagle3"):
            raise ValueError(f"kind is eagle or eagle3, got {self.kind!r}.")
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not divide into {self.heads} heads; set head_dim.")
        if self.kind == "eagle3" and self.layers != 1:
            raise ValueError(f"an EAGLE-3 head has 1 layer, got {self.layers}.")
        if self.kind == "eagle" and (self.draft_vocab or self.target_dim or self.feature_layers):
            raise ValueError("draft_vocab, target_dim and feature_layers belong to kind=eagle3.")
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}.")
        if self.draft_vocab is not None and not 0 < self.draft_vocab <= self.vocab_size:
            raise ValueError(f"draft_vocab must lie in 1..{self.vocab_size}, got {self.draft_vocab}.")
        if len(self.feature_layers) not in (0, FEATURES):
            raise ValueError(f"feature_layers names {FEATURES} blocks or none, got {self.feature_layers}.")

    @property
    def key_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head, resolved."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def form(self) -> tuple[str, str]:
        """What a published file's layout depends on."""
        return self.kind, "raster" if self.raster else "text"

    @property
    def outputs(self) -> int:
        """Ids that it drafts from."""
        return self.vocab_size if self.draft_vocab is None else self.draft_vocab

    @property
    def restricted(self) -> bool:
        """Whether it drafts from a part of the vocabulary only."""
        return self.outputs < self.vocab_size

    def layers_of(self, target_layers: int) -> tuple[int, ...]:
        """Which inputs of the target's blocks it reads, joined in this order; none for kind "eagle", which
        reads the hidden state after the final norm."""
        if self.kind == "eagle":
            return ()
        return self.feature_layers or default_feature_layers(target_layers)

    def build(self) -> Eagle:
        """A freshly initialised head."""
        return Eagle(self)


def default_feature_layers(layers: int) -> tuple[int, ...]:
    """The published choice 2, L / 2 and L - 3 of a target with L blocks; the last three of a shallow one."""
    if layers >= 2 * FEATURES:
        return 2, layers // 2, layers - 3
    return tuple(max(0, layers - before) for before in (3, 2, 1))


class MidLayer(nn.Module):
    """EAGLE-3's block: attention reads embedding and feature side by side, each normalised by itself, and
    adds to the feature as it came."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.self_attn = _attention(config, 2 * config.dim)
        self.mlp = SwiGLU(config.dim, config.ffn_dim)
        self.hidden_norm = RMSNorm(config.dim, config.norm_eps)
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        embedded: Tensor,
        feature: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        extend: Extend | None,
    ) -> Tensor:
        """Two ``[b, l, d] -> [b, l, d]``; the rest as for `SelfAttention`."""
        both = torch.cat([self.input_layernorm(embedded), self.hidden_norm(feature)], dim=-1)
        x = feature + self.self_attn(both, rotation, mask, causal=causal, extend=extend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Eagle(nn.Module, Pretrained):
    """A draft head. Its embedding table is the target's and does not learn. `d2t`: target id minus draft id,
    and `t2d`: which target ids can be drafted, are there with a restricted vocabulary."""

    model_type: ClassVar[str] = "eagle"
    config_class: ClassVar[type] = EagleConfig

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim) if config.embedding else None
        if config.kind == "eagle":
            self.fc = nn.Linear(2 * config.dim, config.dim, bias=config.bias)
            self.layers = nn.ModuleList(_layer(config, index) for index in range(config.layers))
        else:
            self.fc = nn.Linear(FEATURES * (config.target_dim or config.dim), config.dim, bias=False)
            self.midlayer = MidLayer(config)
            self.norm = RMSNorm(config.dim, config.norm_eps)
            self.lm_head = nn.Linear(config.dim, config.outputs, bias=False)
        if config.restricted:
            self.d2t: Tensor
            self.t2d: Tensor
            self.register_buffer("d2t", torch.zeros(config.outputs, dtype=torch.long))
            self.register_buffer("t2d", torch.arange(config.vocab_size) < config.outputs)
        self.rotary: nn.Module = (
            RasterRotary(config.head_width, config.rope_theta, config.raster, config.raster_start)
            if config.raster
            else Rotary(config.head_width, config.rope_theta, config.rope_axes)
        )
        init_decoder(self, config.layers)
        if config.bias and config.kind == "eagle":
            nn.init.zeros_(self.fc.bias)
        if self.embed_tokens is not None:
            self.embed_tokens.requires_grad_(False)

    def adopt_embedding(self, table: Tensor) -> None:
        """Take the target's embedding table ``[v, d]``: for published files that leave it out, and before
        training. Raises LexelError when it has another shape."""
        if tuple(table.shape) != (self.config.vocab_size, self.config.dim):
            raise LexelError(
                f"the draft head needs an embedding table of {self.config.vocab_size} ids and width "
                f"{self.config.dim}, got {list(table.shape)}."
            )
        like = next(self.parameters())
        weight = table.detach().to(like.device, like.dtype, copy=True)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=True)
        self.config = replace(self.config, embedding=True)

    def new_cache(
        self, batch: int, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache of `batch` rows, as `CausalLM.new_cache`."""
        config, weight = self.config, self.fc.weight
        slots = max_length or config.max_length
        return KVCache(
            config.layers,
            batch,
            config.key_heads,
            slots,
            config.head_width,
            device=weight.device,
            dtype=dtype or weight.dtype,
        )

    def forward(
        self,
        ids: Tensor,
        features: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
        append: Append | None = None,
    ) -> Tensor:
        """``[b, l, d]``: for "eagle" a guess of the target's next feature, for "eagle3" what `project` reads
        and the next step takes as its feature.

        ids: long ``[b, l]``, each one ahead of its feature. features: ``[b, l, f]``, the target's or this
        head's own outputs; "eagle3" projects those that are not as wide as itself. positions: long
        ``[b, l, 3]``, None counts from what the cache holds. cache: the rows go on at their lengths, and it
        grows by l. mask: bool (True: may look) or additive float ``[b, l, s]``; None is causal.
        append: another store of keys and values than a cache; goes with positions and a mask.
        Raises LexelError when the head has no embedding table or the cache is full."""
        if self.embed_tokens is None:
            raise LexelError(
                "this draft head's file holds no embedding; give it the target's with "
                "adopt_embedding(weight)."
            )
        embedded = self.embed_tokens(ids)
        features = features.to(embedded.dtype)
        new = ids.shape[1]
        if positions is None:
            positions = _counted(ids, cache)
        if mask is None and cache is not None and any(cache.host_lengths):
            mask = cache.visible(new)
        causal = mask is None and (cache is None or not any(cache.host_lengths))
        additive = None if mask is None else additive_mask(mask, embedded.dtype)
        cos, sin = self.rotary(positions)
        rotation = cos.to(embedded.dtype), sin.to(embedded.dtype)
        append = cache.append if cache is not None else append
        extend = [None if append is None else partial(append, index) for index in range(self.config.layers)]
        if self.config.kind == "eagle":
            x = self.fc(torch.cat([embedded, features], dim=-1))
            for layer, store in zip(self.layers, extend):
                x = layer(x, rotation, additive, causal=causal, extend=store)
        else:
            # The width alone decides, as published.
            if features.shape[-1] != self.config.dim:
                features = self.fc(features)
            x = self.midlayer(embedded, features, rotation, additive, causal, extend[0])
        if cache is not None:
            cache.advance(new)
        return x

    def features(self, layers: Sequence[int], hidden: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """What it reads of the target, ``[b, l, f]``: its last hidden states, or for "eagle3" the inputs of
        the blocks `layers` (`EagleConfig.layers_of`) side by side. hidden, inputs: from the target's `decode`
        with these layers, which gives each block once, in ascending order."""
        if self.config.kind == "eagle":
            return hidden
        by_layer = dict(zip(sorted(set(layers)), inputs, strict=True))
        return torch.cat([by_layer[layer] for layer in layers], dim=-1)

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., outputs]`` of an "eagle3" head over the ids that it drafts from (`draft_ids`)."""
        return self.lm_head(self.norm(hidden))

    def draft_ids(self) -> Tensor | None:
        """Long ``[outputs]``: the target's id of each draft id; None when they are the same."""
        return (
            torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t if self.config.restricted else None
        )

    def project(
        self, hidden: Tensor, target: Project | None = None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Logits ``[..., stop - start]`` of the target's ids start .. stop - 1 (None: to the last); -inf for
        ids that the head cannot draft. target: the target's `project`, which "eagle" needs.
        Raises ValueError without it."""
        if self.config.kind == "eagle":
            if target is None:
                raise ValueError("an EAGLE-1 or 2 head has no output layer; give it the target's project.")
            return target(hidden, start, stop)
        ids = self.draft_ids()
        if ids is None:
            return F.linear(self.norm(hidden), self.lm_head.weight[start:stop])
        logits = self.draft_logits(hidden)
        every = logits.new_full((*logits.shape[:-1], self.config.vocab_size), -torch.inf)
        return every.index_copy_(-1, ids, logits)[..., start:stop]


def _attention(config: EagleConfig, width: int) -> SelfAttention:
    return SelfAttention(
        width,
        config.heads,
        config.key_heads,
        config.head_width,
        out_dim=config.dim,
        turn=rotate_interleaved if config.raster else rotate,
    )


def _layer(config: EagleConfig, index: int) -> DecoderLayer:
    """A block of EAGLE-1 and 2; the first one's input is not normalised."""
    layer = DecoderLayer(
        _attention(config, config.dim), config.ffn_dim, norm_eps=config.norm_eps, dropout=0.0
    )
    if index == 0:
        layer.input_layernorm = nn.Identity()  # type: ignore[assignment]
    return layer


def _counted(ids: Tensor, cache: KVCache | None) -> Tensor:
    """Long ``[b, l, 3]``: indices that go on where the cache's rows end."""
    index = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    if cache is not None:
        index = index + cache.lengths[:, None]
    return F.pad(index[..., None], (0, 2))


class EagleState:
    """What a head has read of several sequences, and the trees that grow behind them.

    `read` commits the target's features; `expand` guesses below that, one level of a tree after the other,
    in slots of the cache that the next `read` overwrites. Rows come and go as in `KVCache`. Rows of a guided
    pair are rows like any other.
    """

    def __init__(self, eagle: Eagle, rows: int, max_length: int, dtype: torch.dtype | None = None) -> None:
        """max_length: tokens of a sequence and nodes read behind it."""
        self.eagle = eagle
        self.cache = eagle.new_cache(rows, max_length, dtype)
        self.known = [0] * rows
        self._seen: Tensor | None = None  # bool [b, n, t]: which tree slots the last level's nodes see
        self._hidden: Tensor | None = None  # [b, n, d]: their outputs
        self._level = 0

    def read(
        self,
        ids: Tensor,
        features: Tensor,
        positions: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Forget the trees, read ids long ``[b, q]`` with the target's features ``[b, q, f]`` (positions long
        ``[b, q, 3]``) and return the outputs after the last of each row, ``[b, d]``.
        counts: how many of the q are real in each row, the others being padding behind them (None: all); the
        output of a row without any means nothing."""
        new = [ids.shape[1]] * len(ids) if counts is None else list(counts)
        if min(new) < 0 or not 1 <= max(new) <= ids.shape[1]:
            raise ValueError(f"rows read up to {ids.shape[1]} tokens and one reads any, got counts {new}.")
        self.cache.crop(self.known)
        out = self.eagle(ids, features, positions, self.cache)
        self.known = [have + more for have, more in zip(self.known, new)]
        self.cache.crop(self.known)
        last = torch.tensor(new, device=out.device) - 1
        self._hidden = out[torch.arange(len(out), device=out.device), last][:, None]
        self._seen = torch.zeros(len(out), 1, 0, dtype=torch.bool, device=out.device)
        self._level = 0
        return self._hidden[:, 0]

    def expand(self, ids: Tensor, parents: Tensor, positions: Tensor | None = None) -> Tensor:
        """Read the next level of each row's tree, ids long ``[b, n]``: node i hangs below number ``parents[r,
        i]`` of the level before (0 is the only one after `read`), whose output is its feature. positions long
        ``[b, n, 3]``; None counts levels. Returns the nodes' outputs ``[b, n, d]``."""
        if self._seen is None or self._hidden is None:
            raise ValueError("a tree grows from what was read; call read first.")
        rows, nodes = ids.shape
        if positions is None:
            index = torch.tensor(self.known, device=ids.device) + self._level
            positions = F.pad(index[:, None, None].expand(-1, nodes, 1), (0, 2))
        if nodes == 1 and self._seen.shape[-1] == self._level:  # a chain so far: plain causal attention
            features, mask = self._hidden, None
            self._seen = self._seen.new_ones(rows, 1, self._level + 1)
        else:
            features = self._hidden.gather(1, parents[..., None].expand(-1, -1, self._hidden.shape[-1]))
            above = self._seen.gather(1, parents[..., None].expand(-1, -1, self._seen.shape[-1]))
            own = torch.eye(nodes, dtype=torch.bool, device=ids.device).expand(rows, -1, -1)
            self._seen = torch.cat([above, own], dim=-1)
            mask = self._mask(self._seen)
        self._hidden = self.eagle(ids, features, positions, self.cache, mask)
        self._level += 1
        return self._hidden

    def _mask(self, seen: Tensor) -> Tensor:
        """Bool ``[b, n, s]``: all that is known, then the tree slots of `seen` ``[b, n, t]`` behind it."""
        _, nodes, slots = seen.shape
        known = torch.tensor(self.known, device=seen.device)[:, None]
        span = self.cache.span(nodes)
        mask = (torch.arange(span, device=seen.device) < known)[:, None].repeat(1, nodes, 1)
        at = known + torch.arange(slots, device=seen.device)
        return mask.scatter_(2, at[:, None].expand(-1, nodes, -1), seen)

    def join(self, other: EagleState) -> None:
        """Append the rows of another state of the same head; trees are forgotten."""
        self.cache.crop(self.known)
        other.cache.crop(other.known)
        self.cache.join(other.cache)
        self.known += other.known
        self._seen = self._hidden = None

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes the old row ``rows[i]``; the others are dropped, and trees forgotten."""
        self.cache.crop(self.known)
        self.cache.reorder(torch.tensor(list(rows), dtype=torch.long))
        self.known = [self.known[row] for row in rows]
        self._seen = self._hidden = None


# Published heads


def _configure(arguments: Mapping[str, Any]) -> EagleConfig:
    """What all published heads share. Raises ValueError for what this implementation lacks."""
    if arguments["rope_scaling"] is not None:
        raise ValueError(f"rope_scaling {arguments['rope_scaling']} is not supported; only null is.")
    if arguments["qkv_bias"]:
        raise ValueError("qkv_bias is not supported; only false is.")
    if arguments["hidden_act"] != "silu":
        raise ValueError(f"hidden_act {arguments['hidden_act']!r} is not supported; only 'silu' is.")
    return EagleConfig(
        vocab_size=arguments["vocab_size"],
        dim=arguments["hidden_size"],
        heads=arguments["num_attention_heads"],
        kv_heads=arguments["num_key_value_heads"],
        ffn_dim=arguments["intermediate_size"],
        norm_eps=arguments["rms_norm_eps"],
        rope_theta=arguments["rope_theta"],
        max_length=arguments["max_position_embeddings"],
    )


def _eagle(arguments: Mapping[str, Any]) -> EagleConfig:
    config = _configure(arguments)
    return replace(config, layers=arguments["num_hidden_layers"], bias=arguments["bias"])


def _eagle3(arguments: Mapping[str, Any]) -> EagleConfig:
    outputs, vocabulary = arguments["draft_vocab_size"], arguments["vocab_size"]
    return replace(
        _configure(arguments),
        kind="eagle3",
        draft_vocab=None if outputs == vocabulary else outputs,
        target_dim=arguments["target_hidden_size"],
    )


# input_type -> side of the picture, and positions before it.
RASTERS = {"c2i": (24, 0), "t2i": (16, 119), "t2i2": (32, 119)}


def _lantern(arguments: Mapping[str, Any]) -> EagleConfig:
    if arguments["input_type"] not in RASTERS:
        raise ValueError(f"input_type is one of {', '.join(RASTERS)}, got {arguments['input_type']!r}.")
    side, start = RASTERS[arguments["input_type"]]
    # The table's base is fixed in the reference, whatever its config says.
    return replace(_eagle(arguments), rope_theta=1e4, raster=side, raster_start=start)


def _as_stored(config: EagleConfig, names: Container[str]) -> EagleConfig:
    """Some files leave the target's embedding out; the reference then copies it from the target."""
    return replace(config, embedding="embed_tokens.weight" in names)


ARGUMENTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "hidden_act": "silu",
    "qkv_bias": False,
    "bias": True,
}
_LAYOUT = Layout(
    ignored={
        r"d2t|t2d": "the identity: this head drafts from the whole vocabulary",
        r".*rotary_emb\.inv_freq": "made from the config",
        r"lm_head\.weight": "of the target, beside an EAGLE-1 or 2 head",
    }
)
_EAGLE = "github.com/SafeAILab/EAGLE"


def _row(name: str, repository: str, parameters: int, source: str, **arguments: Any) -> Published:
    lantern = "lantern" in name
    return Published(
        name=name,
        repository=repository,
        file="",
        arguments=arguments,
        parameters=parameters,
        tokens="–",
        codebook="–",
        code_licence="Chameleon Research License" if lantern else "Apache-2.0",
        weight_licence="not checked",
        source=source,
    )


def _sizes(width: int, hidden: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_attention_heads": heads}
    return {**sizes, "num_key_value_heads": kv_heads, **more}


_FIRST = f"arXiv 2401.15077, 2406.16858, {_EAGLE}"
_SMALL, _LARGE = _sizes(4096, 11008, 32, 32), _sizes(5120, 13824, 40, 40)
_LLAMAGEN = _sizes(1280, 3584, 20, 20, vocab_size=16384)
SYSTEMS = (
    System(
        name="eagle",
        arguments=ARGUMENTS,
        configure=_eagle,
        rows=(
            _row("eagle-llama-2-chat-7b", "yuhuili/EAGLE-llama2-chat-7B", 367_009_792, _FIRST, **_SMALL),
            _row("eagle-llama-2-chat-13b", "yuhuili/EAGLE-llama2-chat-13B", 533_473_280, _FIRST, **_LARGE),
            _row(
                "eagle-llama-2-chat-70b",
                "yuhuili/EAGLE-llama2-chat-70B",
                1_252_016_128,
                _FIRST,
                **_sizes(8192, 28672, 64, 8, rms_norm_eps=1e-5),
            ),
            _row("eagle-vicuna-7b", "yuhuili/EAGLE-Vicuna-7B-v1.3", 367_009_792, _FIRST, **_SMALL),
            _row("eagle-vicuna-13b", "yuhuili/EAGLE-Vicuna-13B-v1.3", 533_473_280, _FIRST, **_LARGE),
            _row(
                "eagle-vicuna-33b",
                "yuhuili/EAGLE-Vicuna-33B-v1.3",
                770_192_384,
                _FIRST,
                **_sizes(6656, 17920, 52, 13),
            ),
        ),
        layouts=(_LAYOUT,),
        container="",
        as_stored=_as_stored,
        reads_config=True,
    ),
    System(
        name="eagle3",
        arguments={**ARGUMENTS, "rms_norm_eps": 1e-5, "draft_vocab_size": None, "target_hidden_size": None},
        configure=_eagle3,
        rows=(
            _row(
                "eagle3-llama-3.1-8b",
                "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
                950_026_240,
                f"arXiv 2503.01840, {_EAGLE}",
                **_sizes(4096, 14336, 32, 8, vocab_size=128256, draft_vocab_size=32000),
            ),
        ),
        layouts=(replace(_LAYOUT, ignored={k: v for k, v in _LAYOUT.ignored.items() if "lm_head" not in k}),),
        container="",
        as_stored=_as_stored,
        reads_config=True,
    ),
    System(
        name="lantern_llamagen",
        arguments={**ARGUMENTS, "input_type": "t2i"},
        configure=_lantern,
        rows=tuple(
            _row(
                f"lantern-llamagen-{kind}",
                f"jadohu/{repository}",
                44_567_040,
                "arXiv 2410.03355, 2502.06352, github.com/jadohu/LANTERN",
                **_LLAMAGEN,
                input_type=kind,
            )
            for kind, repository in (("t2i", "llamagen_drafter"), ("t2i2", "llamagen2_drafter"))
        ),
        layouts=(_LAYOUT,),
        container="",
        as_stored=_as_stored,
        reads_config=True,
    ),
)
