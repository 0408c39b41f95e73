"""What a tokenizer is trained on: reconstruction, perceptual, adversarial and quantizer terms.

VQGAN's objective (arXiv 2012.09841) with LlamaGen's options, plus a term on the worst pixels: a plain mean
lets small objects on a large plain background vanish for hundreds of steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.errors import LexelError
from lexel.models.blur_discriminator import BlurDiscriminator, BlurDiscriminatorConfig
from lexel.models.clip_discriminator import ClipDiscriminator, ClipDiscriminatorConfig
from lexel.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from lexel.train.objectives.base import Metrics, Objective, psnr
from lexel.train.objectives.lecam import LeCam
from lexel.train.objectives.perceptual import PerceptualConfig
from lexel.train.objectives.teachers import VisionTeacher
from lexel.types import TokenizerOutput


@dataclass(frozen=True)
class RepresentationConfig:
    """A teacher for one branch of a tokenizer with feature heads (FQGAN).

    teacher: hub id or local folder of a vision model, see `VisionTeacher`. branch: whose feature head it
    supervises (`sem`, `sem_mid`, …). weight: of the loss. size: side of the pictures the teacher is shown
    (None: its own).
    """

    teacher: str
    branch: str
    weight: float = 0.5
    size: int | None = None

    def build(self) -> RepresentationTerm:
        """The term with its teacher loaded. Raises LexelError when that cannot be had."""
        return RepresentationTerm(VisionTeacher(self.teacher, self.size), self.branch, self.weight)


@dataclass(frozen=True)
class TokenizerObjectiveConfig:
    """Weights of the terms; a term of weight 0 costs nothing and builds no network.

    l1, l2: mean absolute / squared error. worst_pixels: weight of the mean absolute error of the worst
    `worst_share` of each picture's pixels. perceptual: weight of the `features` distance.
    adversarial: weight of the hinge PatchGAN from step `adversarial_start` on; `adaptive` scales it so that
    its gradient at the decoder's last layer is as large as the reconstruction's (VQGAN), by a factor of at
    most `adaptive_max` (VQGAN 1e4, ELM 1).
    non_saturating: the tokenizer's side of the game is softplus(-x) of each picture's mean verdict x in place
    of -x (Open-MAGVIT2, IBQ); the discriminator's stays the hinge.
    lecam: weight of the `LeCam` term of the discriminator.
    discriminator_weight: of the discriminator's own loss; it matters through gradient clipping only
    (LlamaGen: 0.5, VQGAN: 1).
    quantizer: weight of the quantizer's own losses.
    representation: teachers of the tokenizer's feature heads.
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
    adaptive_max: float = 1e4
    discriminator: PatchDiscriminatorConfig | BlurDiscriminatorConfig | ClipDiscriminatorConfig = field(
        default_factory=PatchDiscriminatorConfig
    )
    non_saturating: bool = False
    lecam: float = 0.0
    discriminator_weight: float = 1.0
    quantizer: float = 1.0
    representation: tuple[RepresentationConfig, ...] = ()
    unrounded_steps: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "representation", tuple(self.representation))
        if not 0 < self.worst_share <= 1:
            raise ValueError(f"worst_share must lie in (0, 1], got {self.worst_share}.")
        weights = (self.l1, self.l2, self.worst_pixels, self.perceptual, self.adversarial, self.quantizer)
        if min(weights) < 0:
            raise ValueError(f"weights must not be negative, got {weights}.")

    def build(self) -> TokenizerObjective:
        """The objective, with its frozen networks loaded."""
        return TokenizerObjective(self, [term.build() for term in self.representation])


class TokenizerObjective(Objective):
    """Generator and discriminator losses of one step. Holds the discriminator (None at weight 0), the frozen
    feature network and any teachers; none of them is ever part of the tokenizer.

    Of clips ``[b, t, 3, h, w]`` every frame counts as a picture, but for a discriminator of clips."""

    def __init__(
        self, config: TokenizerObjectiveConfig, representation: Sequence[RepresentationTerm] = ()
    ) -> None:
        super().__init__()
        self.config = config
        self.perceptual = config.features.build() if config.perceptual else None
        self.discriminator: PatchDiscriminator | BlurDiscriminator | ClipDiscriminator | None = (
            config.discriminator.build() if config.adversarial else None
        )
        self.lecam = LeCam() if config.adversarial and config.lecam else None
        self.representation = tuple(representation)

    def rounds(self, step: int) -> bool:
        """Whether codes are rounded at this step: pass it to the tokenizer as `quantize`."""
        return step >= self.config.unrounded_steps

    def predict(self, network: Any, pixels: Tensor, step: int) -> TokenizerOutput:
        """The tokenizer's training pass on ``[b, 3, h, w]``, or on clips; what the losses are taken of."""
        return network(pixels, quantize=self.rounds(step))

    def is_adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part at this step; before, its optimizer need not step."""
        return self.discriminator is not None and step >= self.config.adversarial_start

    def generator_loss(
        self, output: TokenizerOutput, pixels: Tensor, step: int, last_layer: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The tokenizer's loss (scalar) and detached metrics. The discriminator receives no gradient.
        last_layer: the weight the adaptive factor measures gradients at (`Tokenizer.last_layer`)."""
        config, video = self.config, output.reconstruction.float()
        fake, pixels = as_pictures(video), as_pictures(pixels)
        terms = reconstruction_terms(fake, pixels, config)
        if self.perceptual is not None:
            terms["perceptual"] = config.perceptual * self.perceptual(fake, pixels)
        metrics = {name: value.detach() for name, value in terms.items()}
        loss = torch.stack(list(terms.values())).sum() if terms else fake.new_zeros(())
        if self.discriminator is not None and self.is_adversarial(step):
            with _frozen(self.discriminator):
                adversarial = generator_game(self.verdicts(video), config.non_saturating)
            metrics["adversarial"] = adversarial.detach()
            if config.adaptive:
                metrics["adversarial_scale"] = adaptive_weight(
                    loss, adversarial, last_layer, config.adaptive_max
                )
                adversarial = metrics["adversarial_scale"] * adversarial
            loss = loss + config.adversarial * adversarial
        for name, value in output.quantizer.losses.items():
            loss = loss + config.quantizer * value
            metrics[name] = value.detach()
        for term in self.representation:
            value = term(output, pixels)
            loss = loss + value
            metrics[f"representation_{term.branch}"] = value.detach()
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
        real, fake = self.verdicts(pixels), self.verdicts(output.reconstruction.detach().float())
        loss = self.discriminator_game(real, fake)
        metrics = {
            "discriminator": loss.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }
        if self.lecam is not None:
            term = self.lecam(real, fake)
            loss = loss + self.config.lecam * term
            metrics["lecam"] = term.detach()
        return self.config.discriminator_weight * loss, metrics

    def verdicts(self, pixels: Tensor) -> Tensor:
        """The discriminator's logits, float32."""
        assert self.discriminator is not None
        reads_clips = isinstance(self.discriminator, ClipDiscriminator)
        return self.discriminator(pixels if reads_clips else as_pictures(pixels)).float()

    def discriminator_game(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the discriminator makes small, of its logits: the hinge loss (scalar)."""
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class RepresentationTerm:
    """FQGAN's representation learning: codes of one branch predict a teacher's feature of the picture.

    Batch InfoNCE in one direction without temperature (arXiv 2411.16681), see `info_nce`; the features of the
    other pictures on the same device are the wrong answers. teacher: frozen module, pixels ``[b, 3, h, w]``
    in [-1, 1] to ``[b, f]``. No module itself, so that the teacher is part of no state dict, no optimizer and
    no checkpoint.
    """

    def __init__(self, teacher: nn.Module, branch: str, weight: float = 0.5) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.branch = branch
        self.weight = weight

    def __call__(self, output: TokenizerOutput, pixels: Tensor) -> Tensor:
        """Weighted scalar loss; the gradient reaches the tokenizer, not the teacher. Raises LexelError when
        the tokenizer has no feature head for the branch, or one of another width."""
        if self.branch not in output.features:
            has = ", ".join(output.features) or "none"
            raise LexelError(f"the tokenizer has no feature head for branch {self.branch!r}; it has: {has}.")
        predicted = output.features[self.branch][:, 0]
        with torch.no_grad():
            target = self.teacher.to(pixels.device)(pixels)
        if predicted.shape != target.shape:
            raise LexelError(
                f"the teacher of branch {self.branch!r} gives features of width {target.shape[1]}, the "
                f"tokenizer's head {predicted.shape[1]}; set tokenizer.feature_dims."
            )
        return self.weight * info_nce(predicted, target)


def as_pictures(pixels: Tensor) -> Tensor:
    """Clips ``[b, t, 3, h, w]`` as their frames ``[b*t, 3, h, w]``; pictures as they are."""
    return pixels if pixels.ndim == 4 else pixels.flatten(0, 1)


def info_nce(predicted: Tensor, target: Tensor) -> Tensor:
    """-log of the share of the right target: softmax over the batch of the cosines between each of
    `predicted` ``[b, f]`` and all of `target` ``[b, f]``, without temperature; scalar."""
    cosines = F.normalize(predicted.float(), dim=-1) @ F.normalize(target.float(), dim=-1).T
    return F.cross_entropy(cosines, torch.arange(len(target), device=target.device))


def generator_game(logits: Tensor, non_saturating: bool) -> Tensor:
    """What the tokenizer makes small: the negative mean of the discriminator's logits ``[b, 1, h, w]``, or
    the softplus of each picture's negative mean; scalar."""
    return F.softplus(-logits.flatten(1).mean(1)).mean() if non_saturating else -logits.mean()


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


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, most: float = 1e4
) -> Tensor:
    """|grad of reconstruction| / (|grad of adversarial| + 1e-4) at `last_layer`, at most `most`, detached
    (VQGAN, equation 7). Both graphs stay usable."""
    (wanted,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (wanted.norm() / (given.norm() + 1e-4)).clamp(max=most).detach()


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
