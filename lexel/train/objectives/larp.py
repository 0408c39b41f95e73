"""LARP's objective (arXiv 2410.21264): reconstruction, a smoothed logistic GAN and the autoregressive prior,
which makes codes that a language model can predict. It trains any tokenizer with one code per position, of
clips or of pictures; LARP brings its prior, another tokenizer gets one here that is not exported.

b batch · n code positions · K codes
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.errors import LexelError
from lexel.tokenizers.larp import LARP
from lexel.tokenizers.prior_loss import CodePrior, PriorConfig
from lexel.tokenizers.quantizers.stochastic import Stochastic
from lexel.train.objectives.base import Metrics
from lexel.train.objectives.tokenizer import TokenizerObjective, TokenizerObjectiveConfig
from lexel.types import Codes, TokenizerOutput

NOISE, MOST = 0.15, 0.3  # of the discriminator's targets: their deviation from 0 and 1, and its bound


@dataclass(frozen=True)
class LarpObjectiveConfig(TokenizerObjectiveConfig):
    """TokenizerObjectiveConfig, whose discriminator has a logistic loss with targets moved a little towards
    each other at random, and:

    prior: weight of the prior's cross-entropy (0: none); prior_rate: factor of its learning rate;
    prior_sizes: the prior of a tokenizer that brings none. steps: of the whole training, for the ramp of
    drawn inputs and the temperature. discriminator_every: steps from one update of the discriminator to the
    next.
    temperature: the quantizer's at first and in the end, linear over `temperature_share` of the training
    (empty: its own throughout).
    Raises ValueError on values that make no sense.
    """

    prior: float = 0.06
    prior_rate: float = 50.0
    prior_sizes: PriorConfig = field(default_factory=PriorConfig)
    steps: int = 1000
    discriminator_every: int = 5
    temperature: tuple[float, ...] = ()
    temperature_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "temperature", tuple(self.temperature))
        if self.steps < 1 or self.discriminator_every < 1 or self.prior < 0 or not self.prior_rate > 0:
            raise ValueError(
                "steps, discriminator_every and prior_rate must be positive, prior not negative."
            )
        if self.temperature and (len(self.temperature) != 2 or min(self.temperature) <= 0):
            raise ValueError(f"temperature is its first and last value, above 0, got {self.temperature}.")
        if not 0 < self.temperature_share <= 1:
            raise ValueError(f"temperature_share must lie in (0, 1], got {self.temperature_share}.")

    def build(self) -> LarpObjective:
        """The objective, with its frozen networks loaded."""
        return LarpObjective(self, [term.build() for term in self.representation])

    def temperature_at(self, step: int) -> float:
        """The quantizer's temperature at a step (where `temperature` is given)."""
        first, last = self.temperature
        return first + (last - first) * min(1.0, step / (self.temperature_share * self.steps))


@dataclass(frozen=True)
class LarpOutput(TokenizerOutput):
    """A training pass with what the prior says of it: its cross-entropy (scalar, unweighted) and metrics."""

    prior: Tensor | None = None
    prior_metrics: Metrics = field(default_factory=dict)


class LarpObjective(TokenizerObjective):
    """See the module docstring. Raises LexelError for a tokenizer of several codes per position."""

    config: LarpObjectiveConfig

    def prepare(self, network: Any) -> None:
        """Make the prior of a tokenizer that brings none."""
        if not self.config.prior or (isinstance(network, LARP) and network.prior_model is not None):
            return
        if network.layout.k > 1:
            raise LexelError(
                f"the prior reads one code per position, this tokenizer has {network.layout.k}; set "
                "objective.tokenizer.prior=0."
            )
        self.prior_model = self.config.prior_sizes.build(_codebook(network).shape[1])

    def rate(self, name: str) -> float:
        """The prior learns faster."""
        return self.config.prior_rate if "prior_model." in name else 1.0

    def predict(self, network: Any, pixels: Tensor, step: int) -> TokenizerOutput:
        """The tokenizer's training pass, and the prior's on its codes."""
        if self.config.temperature:
            for module in network.modules():
                if isinstance(module, Stochastic):
                    module.temperature = self.config.temperature_at(step)
        output = super().predict(network, pixels, step)
        if not self.config.prior:
            return output
        prior: CodePrior = self.prior_model if hasattr(self, "prior_model") else network.prior_model
        rows = _codebook(network)
        if prior.config.cosine:
            rows = F.normalize(rows, dim=-1)  # LARP's are of unit length, another tokenizer's may not be
        codes, indices = output.quantizer.quantized, output.codes.indices[..., 0]
        loss, metrics = prior.loss(codes, indices, rows, step / self.config.steps)
        return LarpOutput(**vars(output), prior=loss, prior_metrics=metrics)

    def generator_loss(
        self, output: TokenizerOutput, pixels: Tensor, step: int, last_layer: Tensor
    ) -> tuple[Tensor, Metrics]:
        """See `Objective.generator_loss`."""
        loss, metrics = super().generator_loss(output, pixels, step, last_layer)
        if isinstance(output, LarpOutput) and output.prior is not None:
            loss = loss + self.config.prior * output.prior
            metrics |= {"prior": output.prior.detach(), **output.prior_metrics, "loss": loss.detach()}
        return loss, metrics

    def judges(self, step: int) -> bool:
        """Every so many steps."""
        return self.is_adversarial(step) and step % self.config.discriminator_every == 0

    def discriminator_game(self, real: Tensor, fake: Tensor) -> Tensor:
        """The sum of two cross-entropies, with targets near 1 and 0."""
        near_one, near_zero = (
            (NOISE * torch.randn_like(logits).abs()).clamp(max=MOST) for logits in (real, fake)
        )
        return F.binary_cross_entropy_with_logits(real, 1 - near_one) + F.binary_cross_entropy_with_logits(
            fake, near_zero
        )


def _codebook(network: Any) -> Tensor:
    """All rows ``[K, d]``."""
    size = network.codebook_sizes[0]
    indices = torch.arange(size, device=network.last_layer.device)
    with torch.no_grad():
        return network.embed(Codes(indices[None, :, None]))[0]
