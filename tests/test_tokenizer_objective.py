"""The tokenizer objective: each term's formula, the adversarial schedule, and who receives gradients."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from lexel.errors import LexelError
from lexel.models.discriminator import PatchDiscriminatorConfig
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.vq import VQTokenizer, VQTokenizerConfig
from lexel.train.objectives.perceptual import FeatureDistance, PerceptualConfig, RandomFeatures
from lexel.train.objectives.tokenizer import (
    RepresentationTerm,
    TokenizerObjective,
    TokenizerObjectiveConfig,
    adaptive_weight,
    psnr,
    worst_pixel_error,
)
from lexel.types import Codes, QuantizerOutput, TokenizerOutput

PATCH = PatchDiscriminatorConfig(channels=4, layers=2)


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fake, pixels = torch.rand(2, 2, 3, 16, 16, generator=generator) * 2 - 1
    return fake, pixels


def as_output(fake: Tensor, losses: dict[str, Tensor] | None = None) -> TokenizerOutput:
    quantized = torch.zeros(len(fake), 4, 6)
    codes = torch.zeros(len(fake), 4, 1, dtype=torch.long)
    quantizer = QuantizerOutput(quantized, codes, losses or {}, {"usage": torch.tensor(0.5)})
    return TokenizerOutput(fake, Codes(codes, (2, 2)), quantizer, quantized)


def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizerConfig(
        image_size=16, channels=8, channel_mult=(1,), res_blocks=0, z_channels=8, embed_dim=4,
        attention=False, norm_groups=4, stem=4, encoder="patch", encoder_channels=8,
        quantizer=QuantizerConfig(codebook_size=8),
    ).build()  # fmt: skip


def objective(**options) -> TokenizerObjective:
    torch.manual_seed(0)
    return TokenizerObjectiveConfig(discriminator=PATCH, **options).build()


def test_reconstruction_terms_are_weighted_sums() -> None:
    fake, pixels = pair()
    built = objective(l1=0.5, l2=2.0, worst_pixels=3.0, worst_share=0.1, quantizer=0.25)
    loss, metrics = built.generator_loss(
        as_output(fake, {"commitment": torch.tensor(4.0)}), pixels, 0, torch.zeros(1)
    )
    error = fake - pixels
    worst = worst_pixel_error(error, 0.1)
    expected = 0.5 * error.abs().mean() + 2 * (error**2).mean() + 3 * worst + 0.25 * 4
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["worst_pixels"], 3 * worst)
    assert metrics["commitment"] == 4
    assert metrics["usage"] == 0.5
    assert not any(value.requires_grad for value in metrics.values())


def test_worst_pixels_of_a_known_error() -> None:
    # 100 pixels, one wrong by 1 in all colours and one by 0.5 in a single colour.
    error = torch.zeros(1, 3, 10, 10)
    error[0, :, 0, 0] = 1.0
    error[0, 1, 5, 5] = -0.5
    assert worst_pixel_error(error, 0.01).item() == pytest.approx(1.0)
    assert worst_pixel_error(error, 0.02).item() == pytest.approx((1 + 0.5 / 3) / 2)
    assert worst_pixel_error(error, 1.0).item() == pytest.approx(error.abs().mean().item())
    # Never fewer than one pixel, and each picture has its own worst.
    assert worst_pixel_error(error, 1e-6).item() == pytest.approx(1.0)
    both = torch.cat([error, torch.zeros_like(error)])
    assert worst_pixel_error(both, 0.01).item() == pytest.approx(0.5)


def test_psnr_of_a_known_error() -> None:
    pixels = torch.zeros(1, 3, 4, 4)
    assert psnr(pixels + 0.2, pixels).item() == pytest.approx(20.0, abs=1e-4)
    assert psnr(pixels + 5, pixels + 1).item() == pytest.approx(100 + 6.0206, abs=1e-3)  # clamped


@pytest.mark.parametrize("adaptive", [False, True])
def test_adversarial_term_starts_at_its_step(adaptive: bool) -> None:
    model, (_, pixels) = tokenizer(), pair()
    built = objective(adversarial=0.5, adversarial_start=3, adaptive=adaptive).eval()
    plain = objective()
    output = model(pixels)
    for step in (0, 2):
        loss, _ = built.generator_loss(output, pixels, step, model.last_layer)
        expected, _ = plain.generator_loss(output, pixels, step, model.last_layer)
        assert torch.equal(loss, expected)
        assert not built.is_adversarial(step)
        assert built.discriminator_loss(output, pixels, step)[0] == 0
    loss, metrics = built.generator_loss(output, pixels, 3, model.last_layer)
    expected, _ = plain.generator_loss(output, pixels, 3, model.last_layer)
    scale = metrics["adversarial_scale"] if adaptive else 1.0
    torch.testing.assert_close(loss, expected + 0.5 * scale * metrics["adversarial"])
    assert built.is_adversarial(3)
    assert built.discriminator_loss(output, pixels, 3)[0] > 0


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction = (weight * torch.tensor([6.0, 8.0])).sum()  # gradient norm 10
    adversarial = (weight * torch.tensor([0.0, 2.0])).sum()  # gradient norm 2
    scale = adaptive_weight(reconstruction, adversarial, weight)
    assert scale.item() == pytest.approx(10 / (2 + 1e-4))
    assert not scale.requires_grad
    (reconstruction + scale * adversarial).backward()  # both graphs are still there
    # No gradient at all would divide by almost nothing: at most 1e4.
    weight.grad = None
    silent = (weight * 0).sum()
    assert adaptive_weight((weight * 6).sum(), silent, weight) == 1e4
    assert adaptive_weight((weight * 6).sum(), silent, weight, most=1.0) == 1


def test_adaptive_scale_equalises_the_two_gradients() -> None:
    model, (_, pixels) = tokenizer(), pair()
    built = objective(adversarial=1.0, adaptive=True).eval()
    assert built.discriminator is not None
    built.discriminator.main[-1].weight.data *= 100  # so that the 1e-4 in the denominator is nothing
    output = model(pixels)
    _, metrics = built.generator_loss(output, pixels, 0, model.last_layer)
    adversarial = -built.discriminator(output.reconstruction).mean()
    pulls = [
        torch.autograd.grad(loss, model.last_layer, retain_graph=True)[0].norm()
        for loss in (
            (output.reconstruction - pixels).pow(2).mean(),
            metrics["adversarial_scale"] * adversarial,
        )
    ]
    torch.testing.assert_close(pulls[0], pulls[1], rtol=2e-2, atol=0)


def test_gradients_go_to_one_side_only() -> None:
    model, (_, pixels) = tokenizer(), pair()
    built = objective(adversarial=1.0)
    assert built.discriminator is not None
    output = model(pixels)
    built.generator_loss(output, pixels, 0, model.last_layer)[0].backward()
    assert all(p.grad is None and p.requires_grad for p in built.discriminator.parameters())
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    model.zero_grad()
    built.discriminator_loss(output, pixels, 0)[0].backward()
    assert all(p.grad is not None for p in built.discriminator.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_hinge_loss_formula() -> None:
    fake, pixels = pair()
    built = objective(adversarial=1.0).eval()
    assert built.discriminator is not None
    loss, metrics = built.discriminator_loss(as_output(fake), pixels, 0)
    real_logits, fake_logits = built.discriminator(pixels), built.discriminator(fake)
    expected = 0.5 * ((1 - real_logits).clamp(min=0).mean() + (1 + fake_logits).clamp(min=0).mean())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["logits_real"], real_logits.mean())


def test_discriminator_learns_to_tell_two_textures_apart() -> None:
    torch.manual_seed(0)
    built = objective(adversarial=1.0)
    optimizer = torch.optim.Adam(built.parameters(), 3e-3, betas=(0.5, 0.9))
    stripes = torch.arange(16).remainder(2).mul(2.0).sub(1).expand(8, 3, 16, 16)
    for _ in range(40):
        loss, _ = built.discriminator_loss(as_output(stripes.mT), stripes, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


def test_published_discriminator_names_and_verdict_grid() -> None:
    network = PatchDiscriminatorConfig().build()
    parameters = {key: tuple(p.shape) for key, p in network.named_parameters()}
    assert [key.split(".")[1] for key in parameters] == [
        "0", "0", "2", "3", "3", "5", "6", "6", "8", "9", "9", "11", "11",
    ]  # fmt: skip
    assert parameters["main.0.weight"] == (64, 3, 4, 4)
    assert parameters["main.8.weight"] == (512, 256, 4, 4)
    assert parameters["main.11.weight"] == (1, 512, 4, 4)
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1, 2, 2)


def test_no_discriminator_and_no_features_at_weight_zero() -> None:
    built = objective()
    assert list(built.state_dict()) == []
    fake, pixels = pair()
    loss, metrics = built.discriminator_loss(as_output(fake), pixels, 10**6)
    assert loss == 0
    assert metrics == {}


def test_rounding_starts_after_the_unrounded_steps() -> None:
    built = objective(unrounded_steps=5)
    assert [built.rounds(step) for step in (0, 4, 5)] == [False, False, True]


def test_feature_distance_is_zero_for_equal_and_grows_with_blur() -> None:
    distance = PerceptualConfig(channels=8, levels=2).build()
    _, pixels = pair()
    assert distance(pixels, pixels) == 0
    soft = [nn.functional.avg_pool2d(pixels, k, 1, k // 2, count_include_pad=False) for k in (3, 5)]
    near, far = (distance(x, pixels).item() for x in soft)
    assert 0 < near < far
    fake = soft[0].clone().requires_grad_(True)
    distance(fake, pixels).backward()
    assert fake.grad is not None
    assert fake.grad.abs().sum() > 0
    assert list(distance.parameters()) == []


def test_random_features_follow_from_the_seed_alone() -> None:
    first = RandomFeatures(4, 2, seed=1)
    torch.manual_seed(99)
    _, pixels = pair()
    assert torch.equal(first(pixels)[1], RandomFeatures(4, 2, seed=1)(pixels)[1])
    assert not torch.equal(first(pixels)[1], RandomFeatures(4, 2, seed=2)(pixels)[1])
    assert first.state_dict() == {}


def test_a_user_network_is_frozen_and_stays_in_eval_mode() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.noise = nn.Dropout(0.9)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.noise(self.conv(x)),)

    fake, pixels = pair()
    distance = FeatureDistance(Features()).train()
    assert not any(p.requires_grad for p in distance.parameters())
    assert torch.equal(distance(fake, pixels), distance(fake, pixels))


def test_missing_lpips_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(LexelError, match=r"install lexel\[eval\]"):
        TokenizerObjectiveConfig(perceptual=1.0, features=PerceptualConfig("lpips-vgg")).build()


def test_representation_loss_is_infonce_against_the_teacher() -> None:
    class Teacher(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return pixels.mean((2, 3))

    _, pixels = pair()
    plain = as_output(pixels)
    tokens = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    output = TokenizerOutput(pixels, plain.codes, plain.quantizer, plain.latents, {"sem": tokens})
    term = RepresentationTerm(Teacher(), "sem", weight=0.5)
    loss = term(output, pixels)
    predicted, target = tokens[:, 0], pixels.mean((2, 3))
    cosine = nn.functional.cosine_similarity(predicted[:, None], target[None], dim=-1)
    expected = -0.5 * (cosine.diagonal() - cosine.logsumexp(1)).mean()
    torch.testing.assert_close(loss, expected)
    built = TokenizerObjective(TokenizerObjectiveConfig(l2=0.0), [term])
    total, metrics = built.generator_loss(output, pixels, 0, torch.zeros(1))
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(metrics["representation_sem"], expected.detach())
    total.backward()
    assert tokens.grad is not None
    assert tokens.grad[:, 1:].abs().sum() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"worst_share": 0.0}, "worst_share"), ({"l2": -1.0}, "negative"), ({"worst_share": 1.5}, r"\(0, 1\]")],
)
def test_impossible_weights_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerObjectiveConfig(**options)
