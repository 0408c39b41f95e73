"""Training a detokenizer on the codes of a frozen tokenizer.

b batch · h w picture
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lexel.tokenizers.base import Tokenizer
from lexel.train.module import Metrics, StageModule
from lexel.train.settings import DetokenizerStage
from lexel.types import Codes


class DetokenizerModule(StageModule):
    """Detokenizer and the frozen tokenizer whose codes it learns to read. Batches are pixels
    ``[b, 3, h, w]`` in [-1, 1]; preview: pixels ``[m, 3, h, w]`` of the sample grid."""

    stage: DetokenizerStage

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Tokenizer,
        stage: DetokenizerStage,
        seed: int = 0,
        preview: Tensor | None = None,
    ) -> None:
        super().__init__(network, stage, seed)
        # In a tuple the tokenizer is no submodule: it stays out of checkpoints.
        self._tokenizer = (tokenizer.eval().requires_grad_(False),)
        self.preview = preview

    @property
    def has_idle_parameters(self) -> bool:
        """The null condition learns only if it is sometimes given."""
        config: Any = self.network.config
        return config.null_dropout == 0

    def on_fit_start(self) -> None:
        """Bring the tokenizer to the network's device."""
        self._tokenizer[0].to(self.device)

    def compute(self, network: Any, batch: Tensor) -> tuple[Tensor, Metrics]:
        """The detokenizer's own loss."""
        return network.loss(batch, self._codes(batch))

    def _codes(self, pixels: Tensor) -> Codes:
        # Under autocast near-ties would fall to other codes than those the language model will write.
        with torch.autocast(pixels.device.type, enabled=False):
            return self._tokenizer[0].encode(pixels.float())

    def pictures(self, network: Any, count: int) -> Tensor | None:
        """The preview pictures, the tokenizer's reconstructions, and what the detokenizer makes of the
        codes."""
        if self.preview is None:
            return None
        pixels = self.preview[:count].to(self.device)
        codes = self._codes(pixels)
        drawn = network.decode(codes, steps=self.stage.steps_to_decode)
        return torch.stack([pixels, self._tokenizer[0].decode(codes), drawn])
