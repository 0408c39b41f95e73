"""TiTok's first training stage: predict the codes that a frozen VQGAN gives the same picture, no pixel.

Paper 2406.07550; the published trainings of TiTok and One-D-Piece start with it and then fine-tune the
decoder on pixels (`TokenizerObjective`, with ``stages.tokenizer.frozen``).

b batch · k proxy codes · h w grid of proxy codes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lexel.errors import LexelError
from lexel.hub import mismatches
from lexel.tokenizers import from_pretrained, list_published, load_published
from lexel.tokenizers.maskgit_vqgan import MaskGITVQGAN
from lexel.tokenizers.titok import ProxyOutput, TiTok
from lexel.train.objectives.base import Metrics, Objective


@dataclass(frozen=True)
class ProxyObjectiveConfig:
    """proxy: whose codes are predicted: a published name, or folder or hub id of a trained `maskgit_vqgan`.
    file: local copy of the published weights (None: from the hub). quantizer: weight of the quantizer's own
    losses."""

    proxy: str = "maskgit-vqgan-f16"
    file: str | None = None
    quantizer: float = 1.0
    adversarial: ClassVar[float] = 0.0  # there is no discriminator

    def build(self) -> ProxyObjective:
        """The objective, with its proxy loaded. Raises LexelError when that cannot be had."""
        published = self.proxy in [row.name for row in list_published()]
        proxy = load_published(self.proxy, self.file) if published else from_pretrained(self.proxy)
        if not isinstance(proxy, MaskGITVQGAN):
            raise LexelError(f"the proxy must be a MaskGIT-VQGAN, {self.proxy} is a {type(proxy).__name__}.")
        return ProxyObjective(self, proxy)


class ProxyObjective(Objective):
    """Stands where `TokenizerObjective` stands. The proxy is part of no state dict and no checkpoint."""

    def __init__(self, config: ProxyObjectiveConfig, proxy: MaskGITVQGAN) -> None:
        super().__init__()
        self.config = config
        self._proxy = (proxy.eval().requires_grad_(False),)  # in a tuple it is no submodule

    @torch.no_grad()
    def prepare(self, network: Any) -> None:
        """Give the tokenizer the proxy's codebook and decoder, where they rest: so it can draw already.
        Raises LexelError when it has no place for them, or one of another size."""
        if not isinstance(network, TiTok) or not network.has_pixel_decoder:
            raise LexelError("objective/tokenizer=proxy trains a TiTok with a proxy (tokenizer=titok) only.")
        for own, given in (("pixel_quantize", "quantize"), ("pixel_decoder", "decoder")):
            module, state = network.get_submodule(own), self._proxy[0].get_submodule(given).state_dict()
            expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
            if problems := mismatches(expected, {key: tuple(value.shape) for key, value in state.items()}):
                raise LexelError(f"tokenizer.proxy is not built like {self.config.proxy}: {problems}.")
            module.load_state_dict(state)
            module.requires_grad_(False)

    def predict(self, network: Any, pixels: Tensor, step: int) -> ProxyOutput:
        """The tokenizer's training pass up to the logits."""
        return network.predict_proxy(pixels)

    def generator_loss(
        self, output: ProxyOutput, pixels: Tensor, step: int, last_layer: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Cross-entropy of the proxy's codes (nats) plus the quantizer's losses; scalar and detached
        metrics, among them the share of codes guessed right."""
        proxy = self._proxy[0].to(pixels.device)
        h, w = output.logits.shape[2:]
        codes = rearrange(proxy.encode(pixels).indices, "b (h w) 1 -> b h w", h=h, w=w)
        loss = F.cross_entropy(output.logits.float(), codes)
        metrics = {
            "cross_entropy": loss.detach(),
            "accuracy": (output.logits.argmax(1) == codes).float().mean(),
        }
        for name, value in output.quantizer.losses.items():
            loss = loss + self.config.quantizer * value
            metrics[name] = value.detach()
        return loss, {**metrics, **output.quantizer.metrics, "loss": loss.detach()}
