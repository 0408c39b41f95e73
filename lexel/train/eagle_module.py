"""Training EAGLE draft heads behind a frozen language model.

* EAGLE-1 and 2 (arXiv 2401.15077): the head learns the target's next hidden state and, with less weight, the
  distribution that the target's output layer makes of it; its input features are disturbed.
* EAGLE-3 (arXiv 2503.01840): no feature loss. The head is run several times over the sequence, each time on
  its own outputs (training-time test), and learns the target's distributions.

Position i of the head stands for the target's feature of token i and the id of token i + 1.

b batch · l positions · p = l - 1 pairs · s keys · d width · v vocabulary · m pairs that count
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.models.eagle import Eagle, EagleConfig
from lexel.train.module import Metrics, StageModule
from lexel.train.objectives.lm import predicting
from lexel.train.settings import DrafterStage
from lexel.types import TokenBatch

NOISE_LENGTH = 512
"""Sequence length at which EAGLE's feature noise has the amplitude that is named; shorter ones get more."""


def complete_eagle(config: partial[EagleConfig], lm: CausalLMConfig) -> EagleConfig:
    """The head's config with what is null taken from its target. Raises LexelError for a target that it
    cannot serve or options that do not fit it."""
    if lm.columns > 1:
        raise LexelError(
            f"a draft head reads one code per position, the language model has {lm.columns}; "
            "train drafter=small_lm for it."
        )
    given = {name: value for name, value in config.keywords.items() if value is not None}
    if given.get("dim", lm.dim) != lm.dim:
        raise LexelError(
            f"an EAGLE head is as wide as its target ({lm.dim}), got drafter.dim={given['dim']}; "
            "set drafter.dim=null."
        )
    if given.get("draft_vocab"):
        raise LexelError(
            "heads for a part of the vocabulary can be loaded but are not trained; "
            "set drafter.draft_vocab=null."
        )
    values: dict[str, Any] = {
        "vocab_size": lm.vocab_size,
        "dim": lm.dim,
        "heads": lm.heads,
        "kv_heads": lm.kv_heads,
        "ffn_dim": lm.hidden_width,
        "norm_eps": lm.norm_eps,
        "rope_theta": lm.rope_theta,
        "rope_axes": lm.rope_axes,
        "max_length": lm.max_length,
    }
    if given.get("heads", lm.heads) == lm.heads:
        values["head_dim"] = lm.head_dim
    built = config.func(**{**values, **given})
    if wrong := [layer for layer in built.feature_layers if not 0 <= layer < lm.layers]:
        raise LexelError(
            f"drafter.feature_layers names {wrong}; the language model's blocks are 0..{lm.layers - 1}."
        )
    return built


@torch.no_grad()
def take_over(head: Eagle, lm: CausalLM, *, output: bool) -> Eagle:
    """Give a new head its target's embedding table and, with `output`, an EAGLE-3 head the target's final
    norm and output layer to start from."""
    head.adopt_embedding(lm.model.embed_tokens.weight)
    if output and head.config.kind == "eagle3" and not head.config.restricted:
        head.norm.load_state_dict(lm.model.norm.state_dict())
        table = lm.model.embed_tokens if lm.lm_head is None else lm.lm_head
        head.lm_head.weight.copy_(table.weight)
    return head


class EagleModule(StageModule):
    """A draft head and its frozen target. Batches are `TokenBatch`; what counts are the pairs whose target
    predicts a training token of the same document."""

    stage: DrafterStage

    def __init__(self, network: Eagle, target: CausalLM, stage: DrafterStage, seed: int = 0) -> None:
        super().__init__(network, stage, seed)
        # In a tuple the target is no submodule: it stays out of checkpoints.
        self._target = (target.eval().requires_grad_(False),)
        self._layers = network.config.layers_of(target.config.layers)

    def on_fit_start(self) -> None:
        """Bring the target to the network's device."""
        self._target[0].to(self.device)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By value or by norm, as the stage says."""
        self.clip_gradients(optimizer, gradient_clip_val, self.stage.clip_by)

    def compute(self, network: Any, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The published loss of the head's kind."""
        with torch.no_grad():
            hidden, inputs = self._target[0].decode(batch, layers=self._layers)
        features = network.features(self._layers, hidden, inputs)
        if network.config.kind == "eagle3":
            return self._unrolled(network, batch, hidden, features)
        return self._one_step(network, batch, hidden)

    def _one_step(self, network: Any, batch: TokenBatch, hidden: Tensor) -> tuple[Tensor, Metrics]:
        """EAGLE-1 and 2: ``SmoothL1 + token_weight · CE``."""
        features, following = hidden[:, :-1], hidden[:, 1:]
        if self.stage.noise and network is self.network:
            amplitude = self.stage.noise * NOISE_LENGTH / features.shape[1]
            features = features + (torch.rand_like(features) - 0.5) * amplitude
        out = network(batch.ids[:, 1:], features, batch.positions[:, 1:], mask=pair_mask(batch))
        counts = pairs(batch, 1)
        guessed, wanted = out[counts], following[counts]
        feature_loss = F.smooth_l1_loss(guessed.float(), wanted.float())
        project = self._target[0].project
        with torch.no_grad():
            target = project(wanted)
        token_loss, agreement = imitation(project(guessed), target)
        loss = feature_loss + self.stage.token_weight * token_loss
        metrics = {"feature": feature_loss.detach(), "token": token_loss.detach(), "agreement": agreement}
        return loss, metrics

    def _unrolled(
        self, network: Any, batch: TokenBatch, hidden: Tensor, features: Tensor
    ) -> tuple[Tensor, Metrics]:
        """EAGLE-3: ``Σ decay^i · CE_i`` over `unroll` steps. In step i the pair of token t + 1 has become the
        i-th node of a chain behind it: it sees what the pair saw in step 0, and its own earlier steps."""
        mask = pair_mask(batch)
        if mask is None:
            mask = torch.ones(batch.ids.shape[1] - 1, batch.ids.shape[1] - 1, dtype=torch.bool).tril()
            mask = mask.to(batch.ids.device)[None]
        own = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device).expand_as(mask)
        store, x = _Store(), features[:, :-1]
        loss = hidden.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        for step in range(self.stage.unroll):
            ids, positions = (earlier(whole[:, 1:], step) for whole in (batch.ids, batch.positions))
            seen = torch.cat([mask, *[own] * step], dim=-1)
            x = network(ids, x, positions, mask=seen, append=store)
            counts = pairs(batch, 1 + step)
            with torch.no_grad():
                target = self._target[0].project(earlier(hidden[:, 1:], step)[counts])
            logits = network.draft_logits(x[counts])
            step_loss, agreement = imitation(logits, target, getattr(network, "t2d", None))
            loss = loss + self.stage.unroll_decay**step * step_loss
            metrics |= {f"token_{step}": step_loss.detach(), f"agreement_{step}": agreement}
        return loss, metrics


class _Store:
    """Keys and values of all steps of the training-time test, with gradients."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.kept:
            before = self.kept[layer]
            keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
        self.kept[layer] = keys, values
        return keys, values


def earlier(x: Tensor, steps: int) -> Tensor:
    """``[b, l, ...]`` moved `steps` places to the front, zeros behind."""
    if steps >= x.shape[1]:
        return torch.zeros_like(x)
    return torch.cat([x[:, steps:], torch.zeros_like(x[:, :steps])], dim=1)


def pair_mask(batch: TokenBatch) -> Tensor | None:
    """Bool ``[b, p, p]``: which pairs (feature of token i, token i + 1) a pair sees: itself, and those before
    it whose two tokens its own token sees. None for plain causal attention."""
    if batch.attention_mask is None:
        return None
    seen = batch.attention_mask[:, 1:, :-1] & batch.attention_mask[:, 1:, 1:]
    return seen | torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)


def pairs(batch: TokenBatch, ahead: int) -> Tensor:
    """Bool ``[b, p]``: pairs i that count when the head guesses the feature of token ``i + ahead``: the
    target predicts a training token there, in the document of token i."""
    length = batch.ids.shape[1]
    known = predicting(batch)[:, ahead:]
    if batch.attention_mask is not None:
        known = known & batch.attention_mask.diagonal(-ahead, 1, 2)
    return F.pad(known, (0, length - 1 - known.shape[1]))


def imitation(logits: Tensor, target: Tensor, drafted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy ``-Σ softmax(target) · log softmax(logits)`` of rows ``[m, v]``, and the share whose
    most probable id agrees; both 0 without rows. drafted: bool ``[v]``, the ids that `logits` are about where
    these are not all; rows whose most probable target id is none of them do not count."""
    target = target.float()
    rows = torch.ones(len(target), dtype=torch.bool, device=target.device)
    if drafted is not None:
        rows = drafted[target.argmax(-1)]
        target = target[:, drafted]
    losses = -(target.softmax(-1) * logits.float().log_softmax(-1)).sum(-1)
    hits = (logits.detach().argmax(-1) == target.argmax(-1)) & rows
    count = rows.sum().clamp(min=1)
    return (losses * rows).sum() / count, hits.sum() / count
