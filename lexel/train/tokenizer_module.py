"""Training a tokenizer by an objective, with a discriminator from its start step on.

b batch · h w picture
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lexel.train.module import Metrics, StageModule, freeze
from lexel.train.objectives.base import Objective
from lexel.train.settings import TokenizerStage


class TokenizerModule(StageModule):
    """Tokenizer and objective. Batches are what `Objective.collate` makes.

    Lightning's automatic optimisation runs the training unless the objective holds a discriminator: then both
    optimizers step by hand, the discriminator on the same reconstruction as the tokenizer.
    preview: pixels ``[m, 3, h, w]`` whose reconstructions make the sample grid.
    """

    stage: TokenizerStage

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        stage: TokenizerStage,
        seed: int = 0,
        preview: Tensor | None = None,
    ) -> None:
        objective.prepare(network)
        resting = freeze(network, stage.frozen)
        super().__init__(network, stage, seed)
        self._resting = resting
        self.objective = objective
        self.automatic_optimization = objective.discriminator is None
        self.preview = preview

    @property
    def has_idle_parameters(self) -> bool:
        """With a discriminator each backward pass reaches only one of the two networks."""
        return self.objective.discriminator is not None

    def frozen(self) -> list[nn.Module]:
        """Parts that do not learn keep their statistics too."""
        return [*super().frozen(), *self._resting]

    def compute(self, network: Any, batch: Any) -> tuple[Tensor, Metrics]:
        """The tokenizer's own loss."""
        output = self.objective.predict(network, batch, self.step)
        return self.objective.generator_loss(output, batch, self.step, network.last_layer)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        """One batch; with a discriminator both losses and both optimizers."""
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        network: Any = self.network
        step, last = self.step, (self.consumed + 1) % self.stage.accumulate == 0
        output = self.objective.predict(network, batch, step)
        optimizers, schedules = self.optimizers(), self.lr_schedulers()
        loss, metrics = self.objective.generator_loss(output, batch, step, network.last_layer)
        self.check_loss(loss)
        self._learn(loss, optimizers[0], schedules[0], last)  # type: ignore[index]
        if self.objective.judges(step):
            other, more = self.objective.discriminator_loss(output, batch, step)
            self.check_loss(other)
            self._learn(other, optimizers[1], schedules[1], last)  # type: ignore[index]
            metrics = {**metrics, **more}
        elif self.objective.is_adversarial(step) and last:
            schedules[1].step()  # type: ignore[index]
        self.consumed += 1
        self.collect({"loss": loss.detach(), **metrics})
        return None

    def _learn(self, loss: Tensor, optimizer: Any, schedule: Any, last: bool) -> None:
        """Add the gradient of one micro-batch; after the last one of a step clip it and step."""
        self.manual_backward(loss / self.stage.accumulate)
        if last:
            if self.stage.clip:
                self.clip_gradients(optimizer, self.stage.clip, "norm")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """What the objective measures, with the weights that will be exported."""
        output = self.objective.observe(self.exported, batch)
        self._validation.append(self.objective.measure(output, batch))
        return {"codes": output.codes.indices}

    def configure_optimizers(self) -> Any:
        """One optimizer over the tokenizer, and one over the discriminator if there is one."""
        own = dict(self.network.named_parameters())
        discriminator = self.objective.discriminator
        theirs = {} if discriminator is None else dict(discriminator.named_parameters())
        known = {id(parameter) for parameter in theirs.values()}
        heads = {f"objective.{k}": p for k, p in self.objective.named_parameters() if id(p) not in known}
        first = self.optimizer_for({**own, **heads}.items(), self.stage.lr, self.objective.rate)
        if discriminator is None:
            return first
        return [first, self.optimizer_for(theirs.items(), self.stage.discriminator_lr)]

    def pictures(self, network: Any, count: int) -> Tensor | None:
        """The preview pictures above their reconstructions; of clips the frames, each clip above its own.
        None where a detokenizer would have to draw."""
        if self.preview is None or not network.draws_pixels:
            return None
        pixels = self.preview[:count].to(self.device)
        if pixels.ndim == 5:
            drawn = network.decode_video(network.encode_video(pixels))
            return torch.stack([pixels, drawn], 1).flatten(0, 1)
        return torch.stack([pixels, network.decode(network.encode(pixels))])
