"""Training the language model on documents in every direction, and a small one that imitates it.

b batch · l positions · v vocabulary · m positions that have a target
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.data.sampler import mix_seed
from lexel.errors import LexelError
from lexel.train.adapters import merged, prepare
from lexel.train.module import Metrics, StageModule, freeze
from lexel.train.objectives.lm import NextTokenObjective, predicting
from lexel.train.objectives.next_all import NextAllObjective
from lexel.train.processes import mean_over_processes
from lexel.train.settings import DrafterStage, LMStage
from lexel.types import LMOutput, TokenBatch
from lexel.vocabulary import Vocabulary

Draw = Callable[[nn.Module, int], Tensor]


class LMModule(StageModule):
    """Causal LM and next-token objective. Batches are `TokenBatch`.

    With ``stage.narrow`` a step trains one of the nested narrower networks instead of the full one, with that
    probability; all processes agree on which. draw: ``(network, count) -> pictures [r, c, 3, h, w]`` for the
    sample grid. The network gets the stage's adapter, and gradients where the stage trains it, in place
    (`lexel.train.adapters`); vocabulary: which rows of its tables are those of added ids.
    """

    stage: LMStage

    def __init__(
        self,
        network: nn.Module,
        objective: NextTokenObjective,
        stage: LMStage,
        seed: int = 0,
        draw: Draw | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        prepare(network, stage, vocabulary)
        resting = freeze(network, stage.frozen)
        super().__init__(network, stage, seed)
        self._resting = resting
        self.objective = objective
        if isinstance(objective, NextAllObjective):
            config: Any = network.config
            objective.prepare(config.dim)
        self.draw = draw

    @property
    def has_idle_parameters(self) -> bool:
        """Heads of further tokens that the objective does not train, weights for pictures in a batch of
        text."""
        config: Any = self.network.config
        idle = config.future_heads > 0 and not self.objective.future_weight
        return idle or bool(getattr(config, "routed", ()))

    def frozen(self) -> list[nn.Module]:
        """Parts that do not learn stay in eval mode."""
        return [*super().frozen(), *self._resting]

    def plain(self, network: nn.Module) -> nn.Module:
        """With adapters and learned rows merged into the weights."""
        return merged(network)

    def compute(self, network: Any, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Cross-entropy of the targets, by modality in the metrics."""
        width = self.width() if network is self.network else None
        output = network(
            batch, width=width, select=predicting(batch), future=self.objective.future_weight > 0
        )
        loss, metrics = self._loss(network, output, batch)
        return loss, metrics if width is None else {f"narrow_{key}": value for key, value in metrics.items()}

    def _loss(self, network: Any, output: LMOutput, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        config: Any = self.network.config
        more = {"project": network.project} if isinstance(self.objective, NextAllObjective) else {}
        return self.objective(output, batch, code_offsets=config.code_offsets, pad_id=config.pad_id, **more)

    def configure_optimizers(self) -> Any:
        """One optimizer over the network and the objective's own head, if it has one."""
        named = [*self.network.named_parameters(), *self.objective.named_parameters()]
        return self.optimizer_for(named, self.stage.lr)

    def configure_model(self) -> None:
        """See `StageModule.configure_model`. Raises LexelError when the objective's head would have to be
        sharded."""
        super().configure_model()
        if self.device_mesh is not None and any(True for _ in self.objective.parameters()):
            raise LexelError("objective/lm=next_all has a head that is not sharded; train with trainer=ddp.")

    def width(self) -> float | None:
        """The feed-forward width that this step trains; None is the full one."""
        config: Any = self.network.config
        narrower = config.ffn_widths[:-1]
        rng = random.Random(mix_seed(self.seed, self.step))
        return rng.choice(narrower) if narrower and rng.random() < self.stage.narrow else None

    def pictures(self, network: Any, count: int) -> Tensor | None:
        """Pictures drawn from captions."""
        return None if self.draw is None else self.draw(network, count)


class DrafterModule(LMModule):
    """Distils a frozen LM (`teacher`) into a small one over the same vocabulary:
    ``distill · KL(teacher ‖ network) + (1 - distill) · cross-entropy`` over the targets' positions."""

    stage: DrafterStage

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module,
        objective: NextTokenObjective,
        stage: DrafterStage,
        seed: int = 0,
    ) -> None:
        super().__init__(network, objective, stage, seed)
        # In a tuple the teacher is no submodule: it stays out of checkpoints.
        self._teacher = (teacher.eval().requires_grad_(False),)

    def on_fit_start(self) -> None:
        """Bring the teacher to the network's device."""
        self._teacher[0].to(self.device)

    def compute(self, network: Any, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Distillation and cross-entropy."""
        select = predicting(batch)
        output = network(batch, select=select, future=self.objective.future_weight > 0)
        with torch.no_grad():
            target = self._teacher[0](batch, select=select)
        loss, metrics = self._loss(network, output, batch)
        divergence = kl_divergence(target.logits, output.logits)
        for theirs, ours in zip(target.code_logits, output.code_logits, strict=True):
            divergence = divergence + kl_divergence(theirs, ours)
        share = self.stage.distill
        agreement = (target.logits.argmax(-1) == output.logits.argmax(-1)).float().mean()
        more = {"kl": divergence.detach(), "agreement": agreement}
        return share * divergence + (1 - share) * loss, {**metrics, **more}


def kl_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Mean over rows (of all processes) of KL(softmax(target) ‖ softmax(logits)), both ``[m, v]``."""
    first, second = (x.float().log_softmax(-1) for x in (target, logits))
    count = mean_over_processes(second.new_tensor(float(len(second))))
    return F.kl_div(second, first, reduction="sum", log_target=True) / count
