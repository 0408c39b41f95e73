"""What every recipe of a tokenizer gives: its training pass, its loss and what validation measures.

b batch · h w picture
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lexel.data.example import Example, stack_pixels
from lexel.types import TokenizerOutput

Metrics = dict[str, Tensor]


class Objective(nn.Module, ABC):
    """Losses of one step of a tokenizer's training. Its parameters, if it has any, learn with the tokenizer
    and are part of no exported network; a frozen teacher belongs in a tuple, where it is no submodule.

    discriminator: a network that learns against the tokenizer, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.discriminator: Any = None

    def prepare(self, network: Any) -> None:
        """Called with the fresh tokenizer before it is trained."""

    def collate(self, examples: Sequence[Example]) -> Any:
        """Examples to the batch that all methods below are given: by default pixels ``[b, 3, h, w]`` in
        [-1, 1] (clips ``[b, t, 3, h, w]``). Raises ValueError for an example that lacks what is needed."""
        return stack_pixels(examples)

    @abstractmethod
    def predict(self, network: Any, batch: Any, step: int) -> Any:
        """The tokenizer's training pass: what the losses are taken of."""

    @abstractmethod
    def generator_loss(
        self, output: Any, batch: Any, step: int, last_layer: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The tokenizer's loss (scalar) and detached metrics; output: what `predict` gave, last_layer:
        `Tokenizer.last_layer`."""

    def is_adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part at this step."""
        return False

    def judges(self, step: int) -> bool:
        """Whether the discriminator also learns at this step."""
        return self.is_adversarial(step)

    def rate(self, name: str) -> float:
        """By how much the learning rate of a parameter differs from the stage's, a factor; objective's own
        parameters are named ``objective.…``."""
        return 1.0

    def discriminator_loss(self, output: Any, batch: Any, step: int) -> tuple[Tensor, Metrics]:
        """The discriminator's loss (scalar) and detached metrics; a constant 0 without one."""
        return torch.zeros(()), {}

    def observe(self, network: Any, batch: Any) -> TokenizerOutput:
        """The pass that validation measures: by default the network's own, with rounding."""
        return network(batch)

    def measure(self, output: TokenizerOutput, batch: Any) -> Metrics:
        """What validation reports of the output of `observe`: by default how near the pixels are."""
        fake = output.reconstruction.float()
        return {"psnr": psnr(fake, batch), "l1": (fake - batch).abs().mean()}


@torch.no_grad()
def psnr(fake: Tensor, pixels: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pairs of any one shape in [-1, 1] (clamped), from the batch's mean
    squared error."""
    error = (fake.clamp(-1, 1) - pixels).pow(2).mean()
    return 10 * torch.log10(4 / error.clamp(min=1e-10))
