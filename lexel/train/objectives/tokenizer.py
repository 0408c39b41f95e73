"""What a tokenizer is trained on: reconstruction, perceptual, adversarial and quantizer terms.

VQGAN's objective (arXiv 2012.09841) with LlamaGen's options, plus a term on the worst pixels: a plain mean
lets small objects on a large plain background vanish for hundreds of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from lexel.train.objectives.perceptual import PerceptualConfig
from lexel.types import TokenizerOutput

MAX_ADAPTIVE = 1e4
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class TokenizerObjectiveConfig:
    """Weights of the terms; a term of weight 0 costs nothing and builds no network.

    l1, l2: mean absolute / squared error. worst_pixels: weight of the mean absolute error of the worst
    `worst_share` of each picture's pixels. perceptual: weight of the `features` distance.
    adversarial: weight of the hinge PatchGAN from step `adversarial_start` on; `adaptive` scales it so that
    its gradient at the decoder's last layer is as large as the reconstruction's (VQGAN).
    quantizer: weight of the quantizer's own losses.
    unrounded_steps: steps at the start during which codes are not rounded (`quantize=False`).
    Raises ValueError on a share outside (0, 1] or negative weights.
    """

    l1: float = 0.0
    l2: float = 1.0
    worst_pixels: float = 0.0
    worst_share: float = 0.05
    perceptual: float = 0.0
    features: PerceptualConfig = field(default_factory=PerceptualConfig)
    adversarial: float = 0.0
    adversarial_start: int = 0
    adaptive: bool = False
    discriminator: PatchDiscriminatorConfig = field(default_factory=PatchDiscriminatorConfig)
    quantizer: float = 1.0
    unrounded_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.worst_share <= 1:
            raise ValueError(f"worst_share must lie in (0, 1], got {self.worst_share}.")
        weights = (self.l1, self.l2, self.worst_pixels, self.perceptual, self.adversarial, self.quantizer)
        if min(weights) < 0:
            raise ValueError(f"weights must not be negative, got {weights}.")

    def build(self, representation: Sequence[RepresentationTerm] = ()) -> TokenizerObjective:
        """The objective; `representation` terms bring their own teachers (FQGAN)."""
        return TokenizerObjective(self, representation)


class TokenizerObjective(nn.Module):
    """Generator and discriminator losses of one step. Holds the discriminator (None at weight 0), the frozen
    feature network and any teachers; none of them is ever part of the tokenizer."""

    def __init__(
        self, config: TokenizerObjectiveConfig, representation: Sequence[RepresentationTerm] = ()
    ) -> None:
        super().__init__()
        self.config = config
        self.perceptual = config.features.build() if config.perceptual else None
        self.discriminator: PatchDiscriminator | None = (
            config.discriminator.build() if config.adversarial else None
        )
        self.representation = nn.ModuleList(representation)

    def rounds(self, step: int) -> bool:
        """Whether codes are rounded at this step: pass it to the tokenizer as `quantize`."""
        return step >= self.config.unrounded_steps

    def is_adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part at this step; before, its optimizer need not step."""
        return self.discriminator is not None and step >= self.config.adversarial_start

    def generator_loss(
        self, output: TokenizerOutput, pixels: Tensor, step: int, last_layer: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The tokenizer's loss (scalar) and detached metrics. The discriminator receives no gradient.
        last_layer: the weight the adaptive factor measures gradients at (`Tokenizer.last_layer`)."""
        config, fake = self.config, output.reconstruction.float()
        terms = reconstruction_terms(fake, pixels, config)
        if self.perceptual is not None:
            terms["perceptual"] = config.perceptual * self.perceptual(fake, pixels)
        metrics = {name: value.detach() for name, value in terms.items()}
        loss = torch.stack(list(terms.values())).sum() if terms else fake.new_zeros(())
        if self.discriminator is not None and self.is_adversarial(step):
            with _frozen(self.discriminator):
                adversarial = -self.discriminator(fake).float().mean()
            metrics["adversarial"] = adversarial.detach()
            if config.adaptive:
                metrics["adversarial_scale"] = adaptive_weight(loss, adversarial, last_layer)
                adversarial = metrics["adversarial_scale"] * adversarial
            loss = loss + config.adversarial * adversarial
        for name, value in output.quantizer.losses.items():
            loss = loss + config.quantizer * value
            metrics[name] = value.detach()
        for index, term in enumerate(self.representation):
            value = term(output, pixels)
            loss = loss + value
            metrics[f"representation_{index}"] = value.detach()
        metrics |= output.quantizer.metrics
        metrics |= {"loss": loss.detach(), "psnr": psnr(fake.detach(), pixels)}
        return loss, metrics

    def discriminator_loss(
        self, output: TokenizerOutput, pixels: Tensor, step: int
    ) -> tuple[Tensor, Metrics]:
        """Hinge loss of the discriminator (scalar) on detached reconstructions; a constant 0 without
        discriminator and before its start step."""
        if self.discriminator is None or not self.is_adversarial(step):
            return pixels.new_zeros(()), {}
        real = self.discriminator(pixels).float()
        fake = self.discriminator(output.reconstruction.detach().float()).float()
        loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        return loss, {
            "discriminator": loss.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }


class RepresentationTerm(nn.Module):
    """FQGAN's representation learning: codes of one branch predict a teacher's feature of the picture.

    Batch InfoNCE in one direction without temperature (arXiv 2411.16681): -log softmax_j cos(p_i, t_j) at
    j = i. teacher: frozen module, pixels ``[b, 3, h, w]`` in [-1, 1] to ``[b, d]``; head: quantized latents
    ``[b, n, width]`` of the branch to ``[b, d]``; columns: (start, stop) of the branch in the concatenated
    latents.
    """

    def __init__(
        self, teacher: nn.Module, head: nn.Module, columns: tuple[int, int], weight: float = 0.5
    ) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.head = head
        self.columns = columns
        self.weight = weight

    def forward(self, output: TokenizerOutput, pixels: Tensor) -> Tensor:
        """Weighted scalar loss; the gradient reaches head and tokenizer, not the teacher."""
        with torch.no_grad():
            target = F.normalize(self.teacher(pixels).float(), dim=-1)
        predicted = F.normalize(self.head(output.quantizer.quantized[..., slice(*self.columns)]), dim=-1)
        return self.weight * F.cross_entropy(
            predicted.float() @ target.T, torch.arange(len(target), device=target.device)
        )


def reconstruction_terms(fake: Tensor, pixels: Tensor, config: TokenizerObjectiveConfig) -> dict[str, Tensor]:
    """The weighted pixel terms by name, each a scalar."""
    error = fake - pixels
    terms: dict[str, Tensor] = {}
    if config.l1:
        terms["l1"] = config.l1 * error.abs().mean()
    if config.l2:
        terms["l2"] = config.l2 * error.pow(2).mean()
    if config.worst_pixels:
        terms["worst_pixels"] = config.worst_pixels * worst_pixel_error(error, config.worst_share)
    return terms


def worst_pixel_error(error: Tensor, share: float) -> Tensor:
    """Mean over each picture's worst `share` of pixels (at least one) of the absolute error averaged over
    colours; error: float ``[b, 3, h, w]``. With share 1 it is the mean absolute error."""
    per_pixel = error.abs().mean(1).flatten(1)
    count = max(1, round(share * per_pixel.shape[1]))
    return per_pixel.topk(count, dim=1).values.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + 1e-4) at `last_layer`, at most 1e4, detached
    (VQGAN, equation 7). Both graphs stay usable."""
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (wanted.norm() / (given.norm() + 1e-4)).clamp(max=MAX_ADAPTIVE).detach()


@torch.no_grad()
def psnr(fake: Tensor, pixels: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of ``[b, 3, h, w]`` pairs in [-1, 1] (clamped), from the batch's mean
    squared error."""
    error = (fake.clamp(-1, 1) - pixels).pow(2).mean()
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradient for the module's parameters inside; gradients still flow through it to its input."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
