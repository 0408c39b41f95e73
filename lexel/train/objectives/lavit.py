"""What LaVIT's tokenizer is trained on: the frozen encoder's features again, from a share of the positions.

The publishers released no training code. This follows arXiv 2309.04669 (equation 4) and their answers to
questions: first selector and merger without rounding (`quantize` off), then all but the selector with a
codebook of 32 channels that starts from k-means and follows by a moving average.

b batch · n patches · f feature width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.errors import LexelError
from lexel.tokenizers.lavit import LaVIT, LaVITOutput
from lexel.train.objectives.base import Metrics, Objective


@dataclass(frozen=True)
class LaVITObjectiveConfig:
    """rate: share of positions that should be kept on average over a batch (so a picture may keep more than
    another); rate_weight: of the squared distance from it. quantize: whether codes are rounded. quantizer:
    weight of the codebook's own losses. encoder: weights of the frozen encoder, see `LaVIT.load_encoder`
    (None: those it has, from ``stages.tokenizer.init`` or random ones).
    Raises ValueError for a rate outside of 0..1."""

    rate: float = 1 / 3
    rate_weight: float = 2.0
    quantize: bool = True
    quantizer: float = 1.0
    encoder: str | None = None
    adversarial: ClassVar[float] = 0.0  # there is no discriminator

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is a share in (0, 1], got {self.rate}.")

    def build(self) -> LaVITObjective:
        """The objective."""
        return LaVITObjective(self)


class LaVITObjective(Objective):
    """mean(1 - cosine) + rate_weight * (rate - mean kept)^2, and the codebook's losses with `quantize`."""

    def __init__(self, config: LaVITObjectiveConfig) -> None:
        super().__init__()
        self.config = config

    def prepare(self, network: Any) -> None:
        """Load the encoder's weights. Raises LexelError for another tokenizer, one whose decoder makes
        features of another width, and weights that do not fit."""
        if not isinstance(network, LaVIT):
            raise LexelError("objective/tokenizer=lavit trains tokenizer=lavit only.")
        network.decoder()
        if network.config.features != network.config.encoder.width:
            raise LexelError(
                f"the decoder makes features of width {network.config.features}, the encoder's have "
                f"{network.config.encoder.width}; set tokenizer.feature_dim=0."
            )
        if self.config.encoder is not None:
            network.load_encoder(self.config.encoder)

    def predict(self, network: Any, batch: Tensor, step: int) -> LaVITOutput:
        """The tokenizer's training pass, its selection drawn with Gumbel noise."""
        return network(batch, quantize=self.config.quantize)

    def generator_loss(
        self, output: LaVITOutput, batch: Tensor, step: int, last_layer: Tensor
    ) -> tuple[Tensor, Metrics]:
        """See the class; scalar and detached metrics."""
        distance, rate = feature_distance(output), output.keep.mean()
        penalty = self.config.rate_weight * (self.config.rate - rate).square()
        loss = distance + penalty
        metrics = {"cosine": distance, "keep_rate": rate, "rate_penalty": penalty}
        if self.config.quantize:
            for name, value in output.quantizer.losses.items():
                loss = loss + self.config.quantizer * value
                metrics[name] = value
            metrics |= output.quantizer.metrics
        metrics["loss"] = loss
        return loss, {name: value.detach() for name, value in metrics.items()}

    def observe(self, network: Any, batch: Tensor) -> LaVITOutput:
        """The pass with noise, as in training, and with the same one in every validation."""
        return network(batch, quantize=self.config.quantize, noisy=True)

    def measure(self, output: Any, batch: Tensor) -> Metrics:
        """`cosine`: 1 - the cosine of features; `keep_rate`; `keep_rate_argmax`: the same without noise, as
        `encode` selects; `fewest` and `most`: codes of a picture."""
        counts = output.codes.lengths.float()
        return {
            "cosine": feature_distance(output),
            "keep_rate": output.keep.mean(),
            "keep_rate_argmax": (output.scores[..., 0] >= output.scores[..., 1]).float().mean(),
            "fewest": counts.min(),
            "most": counts.max(),
        }


def feature_distance(output: LaVITOutput) -> Tensor:
    """Mean over patches of 1 - the cosine of the reconstructed and the frozen features, 0 to 2; scalar."""
    with torch.autocast(output.target.device.type, enabled=False):
        ours, theirs = output.reconstruction.float(), output.target.float()
        return 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()
