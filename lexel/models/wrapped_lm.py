"""Any decoder of transformers as a language model of Lexel, with the calls of `CausalLM`.

The network stays as transformers built it and is saved in transformers' own format. Lexel hands it explicit
attention masks, position ids and a cache, and takes its last hidden states. What a class may do differently
(where the logits are scaled, whether it obeys masks and positions) is not read from a table of names: every
network is tried on a few tokens when it is wrapped, and refused where the results disagree.

b batch · l positions (q: new ones) · s keys · g key/value heads · e head width · v vocabulary · d width
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.utils import logging

from lexel.errors import LexelError
from lexel.hub import CONFIG_FILE, Pretrained, read_config, resolve_folder, write_atomically
from lexel.models.kv_cache import KVCache
from lexel.nn.attention import additive_mask, within_window
from lexel.nn.spans import see_given
from lexel.types import LMOutput, TokenBatch

TOLERANCE = 1e-3
"""Of the largest logit: how far two passes may disagree that should be equal (rounding of float32)."""

LOW_PRECISION = 5e-2
"""The same for weights of 16 bits."""


@dataclass(frozen=True)
class WrappedLMConfig:
    """What training and sampling ask of a `WrappedLM`, read from the network, whose own config is in charge.

    max_length: the shortest of what the network has positions for, what its stretched rotary embeddings
    reach, and its sliding window where Lexel cannot put it into the masks.
    One code per position; no nested widths and no heads for later tokens. bidirectional: as in
    `CausalLMConfig`.
    """

    vocab_size: int
    dim: int
    layers: int
    max_length: int
    pad_id: int = 0
    bidirectional: tuple[tuple[int, int], ...] = ()
    architecture: str = ""
    columns: int = 1
    ffn_widths: tuple[float, ...] = (1.0,)
    future_heads: int = 0
    head: str = "single"
    codebook_sizes: tuple[int, ...] = ()
    code_offsets: tuple[int, ...] = ()


class SharedCache(Cache):
    """A `KVCache` as transformers' networks expect one; with None, nothing is kept."""

    def __init__(self, cache: KVCache | None) -> None:
        super().__init__(layers=[])
        self.cache = cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[b, g, q, e]`` to a layer; all keys and values so far, ``[b, g, s, e]``, in the dtype they
        came in."""
        if self.cache is None:
            return key_states, value_states
        whole = self.cache.append(layer_idx, _grown(key_states, self.cache), _grown(value_states, self.cache))
        return tuple(  # type: ignore[return-value]
            stored[:, : new.shape[1], :, : new.shape[3]].to(new.dtype)
            for stored, new in zip(whole, (key_states, value_states))
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row; networks use it for positions and masks that they are not given."""
        return 0 if self.cache is None else max(self.cache.host_lengths, default=0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """See `get_seq_length`."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(keys, offset of the first one)."""
        return self.get_seq_length() + query_length, 0


class WrappedLM(nn.Module, Pretrained):
    """A transformers network with a language-model head, as `lexel.sample` and `lexel.train` want it.

    network: any attention-based `AutoModelForCausalLM`. bidirectional: see `CausalLMConfig`. Raises
    LexelError naming the class when it cannot be used: it does not take position ids or keep keys and values
    in the cache it is given (state-space models), scales logits in an unknown way, or disagrees with itself
    when tokens are fed through the cache, in rows of different lengths or as a tree.
    """

    model_type: ClassVar[str] = "transformers"
    config_class: ClassVar[type] = WrappedLMConfig
    config: WrappedLMConfig
    head: None = None
    future: None = None

    def __init__(self, network: PreTrainedModel, bidirectional: Sequence[Sequence[int]] = ()) -> None:
        super().__init__()
        if not isinstance(network, PreTrainedModel):
            raise LexelError(f"a WrappedLM holds a network of transformers, got {type(network).__name__}.")
        self.network = network
        _check_form(network)
        if network.config._attn_implementation not in ("sdpa", "eager"):
            network.set_attn_implementation("sdpa")
        self._scaling: tuple[str, float] = ("none", 1.0)
        self._heads, self._width = 0, 0
        self._window: int | None = None
        if bidirectional:
            network.config.lexel_bidirectional = [list(pair) for pair in bidirectional]
        self._read_config()
        _try(self)
        self._read_config()

    def _read_config(self) -> None:
        config = self.network.config
        table = self._table
        pad = getattr(config, "pad_token_id", None)
        # transformers keeps what it does not know.
        spans = getattr(config, "lexel_bidirectional", ())
        self.config = WrappedLMConfig(
            vocab_size=table.shape[0],
            dim=int(config.hidden_size),
            layers=int(config.num_hidden_layers),
            max_length=_reach(config, self._window is not None),
            pad_id=0 if pad is None or pad < 0 else int(pad),
            bidirectional=tuple((int(m), int(end)) for m, end in spans),
            architecture=type(self.network).__name__,
        )

    @property
    def model(self) -> nn.Module:
        """Raises LexelError: what a `CausalLM` has inside."""
        raise LexelError(
            f"{self.config.architecture} is not made of a CausalLM's parts, which EAGLE heads and the "
            "grouped acceptance read; choose another way to draft, or a native backbone."
        )

    @property
    def _table(self) -> Tensor:
        return cast(Tensor, self.network.get_input_embeddings().weight)

    def new_cache(
        self, batch: int, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache; arguments as for `CausalLM.new_cache`."""
        weight = self._table
        return KVCache(
            self.config.layers,
            batch,
            self._heads,
            max_length or self.config.max_length,
            self._width,
            device=weight.device,
            dtype=dtype or weight.dtype,
        )

    def forward(
        self,
        batch: TokenBatch,
        cache: KVCache | None = None,
        width: float | None = None,
        select: Tensor | None = None,
        future: bool = False,
    ) -> LMOutput:
        """Logits of the position after each of the batch's; arguments as for `CausalLM.forward`."""
        hidden, _ = self.decode(batch, cache, width)
        return LMOutput(self.project(hidden if select is None else hidden[select]), hidden)

    def decode(
        self,
        batch: TokenBatch,
        cache: KVCache | None = None,
        width: float | None = None,
        layers: Sequence[int] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states ``[b, l, d]`` that `project` reads, and the inputs of the blocks numbered `layers`;
        as `CausalLM.decode`. Raises LexelError for a narrower `width`, and when the cache is full."""
        if width not in (None, 1.0):
            raise LexelError(f"{self.config.architecture} has no nested widths, asked for {width}.")
        if batch.ids.ndim == 3:
            raise LexelError(
                f"{self.config.architecture} reads one code per position, got {batch.ids.shape[2]}."
            )
        if cache is None and batch.loss_mask is not None:
            batch = see_given(batch, self.config.bidirectional)
        new = batch.ids.shape[1]
        if cache is not None:
            cache.span(new)
        output = self.network.base_model(
            **self._inputs(batch),
            attention_mask=self._masks(batch, cache),
            position_ids=batch.positions[..., 0],
            past_key_values=SharedCache(cache),
            use_cache=cache is not None,
            output_hidden_states=bool(layers),
            return_dict=True,
        )
        if cache is not None:
            cache.advance(new)
        return output.last_hidden_state, tuple(output.hidden_states[layer] for layer in layers)

    def _inputs(self, batch: TokenBatch) -> dict[str, Tensor]:
        if batch.embeds is None or batch.embed_index is None:
            return {"input_ids": batch.ids}
        x = self.network.get_input_embeddings()(batch.ids)
        return {"inputs_embeds": x.index_put(tuple(batch.embed_index.unbind(1)), batch.embeds.to(x.dtype))}

    def _masks(self, batch: TokenBatch, cache: KVCache | None) -> Tensor | dict[str, Tensor] | None:
        """What the network gets for a mask: one ``[b, 1, q, s]`` for all blocks, or one for each kind of
        block; None: plain causal attention."""
        new = batch.ids.shape[1]
        span = new if cache is None else cache.span(new)
        visible = batch.attention_mask
        if cache is not None and visible is not None:
            if visible.shape[2] < span:
                raise ValueError(f"attention_mask covers {visible.shape[2]} slots, {span} are in use.")
            visible = visible[:, :, :span]
        if cache is not None and visible is None and any(cache.host_lengths):
            visible = cache.visible(new)
        if self._window is None or span <= self._window:
            return None if visible is None else self._mask(visible, batch)
        start = torch.zeros(1, dtype=torch.long) if cache is None else cache.lengths
        own = start.to(batch.ids.device)[:, None] + torch.arange(new, device=batch.ids.device)
        if visible is None:
            visible = torch.arange(span, device=own.device) <= own[..., None]
        near = self._mask(within_window(visible, own, self._window), batch)
        if set(self.network.config.layer_types) == {"sliding_attention"}:
            return near
        return {"full_attention": self._mask(visible, batch), "sliding_attention": near}

    def _mask(self, visible: Tensor, batch: TokenBatch) -> Tensor:
        """``[b or 1, q, s]`` → ``[b, 1, q, s]``, which networks of transformers take as it is."""
        visible = visible.expand(len(batch.ids), -1, -1)
        if self.network.config._attn_implementation == "sdpa" and visible.dtype == torch.bool:
            return visible.unsqueeze(1)
        return additive_mask(visible, self.network.dtype)

    def project(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits ``[..., v]`` of hidden states ``[..., d]``, or only those of the ids start .. stop - 1, with
        the scaling of the network's own head."""
        head = self.network.get_output_embeddings()
        if start == 0 and stop in (None, self.config.vocab_size):
            return self._scaled(head(hidden))
        bias = getattr(head, "bias", None)
        return self._scaled(
            F.linear(hidden, head.weight[start:stop], None if bias is None else bias[start:stop])
        )

    def _scaled(self, logits: Tensor) -> Tensor:
        kind, value = self._scaling
        if kind == "cap":
            return value * torch.tanh(logits / value)
        return logits * value if kind == "factor" else logits

    def resize_token_embeddings(self, size: int) -> None:
        """Give the tables `size` rows by transformers' own method, without its draws: the caller fills the
        added rows."""
        self.network.resize_token_embeddings(size, mean_resizing=False)
        self._read_config()

    def blank(self) -> WrappedLM:
        """A network of the same form with random weights, in eval mode."""
        return WrappedLM(type(self.network)(copy.deepcopy(self.network.config))).eval()

    def set_pad(self, pad_id: int) -> None:
        """Note the id of padding in the network's config."""
        self.network.config.pad_token_id = pad_id
        self._read_config()

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: torch.dtype | None = None, **_: Any
    ) -> None:
        """Write `config.json` and `model.safetensors` as transformers does; `dtype` casts floating weights.
        Raises LexelError when the disk refuses."""
        state = None if dtype is None else _cast(self.network.state_dict(), dtype)
        try:
            with _quietly():  # in one file, like every part of a bundle
                self.network.save_pretrained(save_directory, state_dict=state, max_shard_size="10TB")
        except OSError as error:
            raise LexelError(f"could not write {save_directory}: {error.strerror or error}.") from error
        if dtype is not None:  # transformers writes the network's own
            path = Path(save_directory) / CONFIG_FILE
            values = {**read_config(path.parent), "dtype": str(dtype).removeprefix("torch.")}
            write_atomically(path, lambda file: _write_json(file, values))

    @classmethod
    def from_pretrained(cls, name: str | Path, **_: Any) -> WrappedLM:  # type: ignore[override]
        """Load a local folder or hub id of a causal language model in transformers' format, in eval mode and
        float32. No code of the repository is run. Raises LexelError when it is none or does not fit."""
        folder = resolve_folder(name)
        try:
            with _quietly():
                network = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, use_safetensors=True
                )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise LexelError(f"{name} is no language model of transformers ({_first_line(error)})") from error
        return cls(network).eval()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating tensors in `dtype`; those that were one stay one (tied tables)."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    for value in state.values():
        if (key := (value.data_ptr(), value.shape)) not in made:
            made[key] = value.to(dtype) if value.is_floating_point() else value
    return {name: made[value.data_ptr(), value.shape] for name, value in state.items()}


def _grown(new: Tensor, cache: KVCache) -> Tensor:
    """``[b, g, q, e]`` padded to the cache's heads and width: layers, and keys and values, may differ."""
    heads, width = cache.keys.shape[2] - new.shape[1], cache.keys.shape[4] - new.shape[3]
    return F.pad(new, (0, width, 0, 0, 0, heads)) if heads or width else new


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _check_form(network: PreTrainedModel) -> None:
    """LexelError when the network is no decoder below a table of logits, or lacks an argument that Lexel
    steers it by."""
    name = type(network).__name__
    if getattr(network.config, "is_encoder_decoder", False) or network.base_model is network:
        raise LexelError(f"{name} is not a decoder with a language-model head on it; it cannot be wrapped.")
    taken = inspect.signature(network.base_model.forward).parameters
    for wanted in ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values"):
        if wanted not in taken:
            raise LexelError(f"{name} takes no {wanted}; only decoders that do can be wrapped.")
    if not hasattr(network.get_output_embeddings(), "weight"):
        raise LexelError(f"{name} has no output table over the vocabulary; it cannot be wrapped.")


def _reach(config: Any, windowed: bool) -> int:
    """Positions over which what the masks say is what the network does. windowed: they have its windows."""
    names = ["max_position_embeddings", "window_size", "attention_chunk_size"]
    limits = [getattr(config, name, None) for name in names + ([] if windowed else ["sliding_window"])]
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in ropes.values() if isinstance(value, dict)]
    for rope in [ropes, *nested]:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            limits.append(rope.get("original_max_position_embeddings"))
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known, default=2048)


# Trying a network


class _Shapes(SharedCache):
    """Notes the largest number of heads and width that a network stores, and the layers that store."""

    def __init__(self) -> None:
        super().__init__(None)
        self.heads, self.width, self.stored = 0, 0, set[int]()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.stored.add(layer_idx)
        self.heads = max(self.heads, key_states.shape[1], value_states.shape[1])
        self.width = max(self.width, key_states.shape[3], value_states.shape[3])
        return key_states, value_states


@torch.no_grad()
def _try(lm: WrappedLM) -> None:
    """Learn how the network scales its logits and what it caches; LexelError when it cannot be used."""
    name, training = lm.config.architecture, lm.network.training
    lm.network.eval()
    length = min(6, lm.config.max_length)
    device = lm._table.device
    # Ids far apart: special ones (padding has a zero row in some tables) are no good sample.
    ids = (torch.arange(1, length + 1, device=device) * 7919 % lm.config.vocab_size)[None]
    try:
        shapes = _Shapes()
        own = lm.network(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=shapes,
            use_cache=True,
            position_ids=torch.arange(length, device=device)[None],
        ).logits
        if shapes.stored != set(range(lm.config.layers)):
            raise LexelError(
                f"{name} stores keys and values of {len(shapes.stored)} of its {lm.config.layers} layers in "
                "the cache it is given; only decoders of attention alone can be wrapped."
            )
        lm._heads, lm._width = shapes.heads, shapes.width
        hidden, _ = lm.decode(_batch(ids))
        lm._scaling = _scaling(lm, hidden, own)
        _try_cache(lm, ids, own)
        lm._window = _window(lm, ids)
    except LexelError:
        raise
    except Exception as error:  # whatever a network does with a cache, masks or positions it does not expect
        raise LexelError(
            f"{name} cannot be wrapped: it fails with explicit masks, positions and cache "
            f"({type(error).__name__}: {_first_line(error) if str(error) else ''})."
        ) from error
    finally:
        lm.network.train(training)


def _batch(
    ids: Tensor, first: int = 0, mask: Tensor | None = None, index: Tensor | None = None
) -> TokenBatch:
    """ids ``[b, l]`` at the positions first, first + 1, … (or `index`)."""
    at = first + torch.arange(ids.shape[1], device=ids.device) if index is None else index
    positions = torch.zeros((*ids.shape, 3), dtype=torch.long, device=ids.device)
    positions[..., 0] = at
    return TokenBatch(ids, torch.zeros_like(ids), positions, mask)


def _close(lm: WrappedLM, found: Tensor, wanted: Tensor) -> bool:
    tolerance = TOLERANCE if wanted.dtype in (torch.float32, torch.float64) else LOW_PRECISION
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-6))


def _scaling(lm: WrappedLM, hidden: Tensor, own: Tensor) -> tuple[str, float]:
    """How the network's own logits follow from its output table."""
    config = lm.network.config
    candidates: list[tuple[str, float]] = [("none", 1.0)]
    for name in ("logit_scale", "lm_head_multiplier"):
        if isinstance(value := getattr(config, name, None), float | int) and value:
            candidates.append(("factor", float(value)))
    if isinstance(value := getattr(config, "logits_scaling", None), float | int) and value:
        candidates.append(("factor", 1.0 / value))
    if isinstance(value := getattr(config, "final_logit_softcapping", None), float | int) and value:
        candidates.append(("cap", float(value)))
    for candidate in candidates:
        lm._scaling = candidate
        if _close(lm, lm.project(hidden), own):
            return candidate
    raise LexelError(
        f"the logits of {lm.config.architecture} are not its output table times its last hidden states, "
        "scaled or capped as its config says; it cannot be wrapped."
    )


def _window(lm: WrappedLM, ids: Tensor) -> int | None:
    """The network's sliding window where Lexel's masks can have it, tried with one of two tokens; None where
    there is none or they cannot (then sequences are no longer than it)."""
    config = lm.network.config
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or ())
    if not window or "sliding_attention" not in kinds or kinds - {"full_attention", "sliding_attention"}:
        return None
    try:
        config.sliding_window = lm._window = 2
        own = lm.network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        if not _close(lm, lm.project(lm.decode(_batch(ids))[0]), own):
            return None
        _try_cache(lm, ids, own)
        return int(window)
    except Exception:  # a network that does not take a mask for each kind of block
        return None
    finally:
        config.sliding_window, lm._window = window, None


def _try_cache(lm: WrappedLM, ids: Tensor, own: Tensor) -> None:
    """The same tokens in pieces, in rows of different lengths, then two branches side by side."""
    name, length = lm.config.architecture, ids.shape[1]
    half = length // 2
    cache = lm.new_cache(2, length + 2)
    lm.decode(_batch(ids[:, :half].expand(2, -1)), cache)
    cache.crop([half, half - 1])
    rows = torch.cat([ids[:, half : half + 2], ids[:, half - 1 : half + 1]])
    index = torch.tensor([[half, half + 1], [half - 1, half]], device=ids.device)
    step = lm.project(lm.decode(_batch(rows, index=index), cache)[0])
    if not _close(lm, step, torch.cat([own[:, half : half + 2], own[:, half - 1 : half + 1]])):
        raise LexelError(
            f"{name} does not give the same logits through a cache whose rows differ in length; its "
            "attention depends on more than the masks and position ids it is given, and it cannot be wrapped."
        )
    # A tree: token `half`, and beside it the true continuation after a wrong sibling.
    cache = lm.new_cache(1, length + 2)
    lm.decode(_batch(ids[:, :half]), cache)
    wrong = (ids[:, half : half + 1] + 1) % lm.config.vocab_size
    tree = torch.cat([wrong, ids[:, half : half + 2]], dim=1)
    mask = torch.ones(1, 3, half + 3, dtype=torch.bool, device=ids.device).tril(half)
    mask[:, 1:, half] = False
    index = torch.tensor([[half, half, half + 1]], device=ids.device)
    step = lm.project(lm.decode(_batch(tree, mask=mask, index=index), cache)[0])
    if not _close(lm, step[:, 1:], own[:, half : half + 2]):
        raise LexelError(
            f"{name} does not give the same logits in a tree of tokens; its attention depends on more than "
            "the masks and position ids it is given, and it cannot be wrapped."
        )
