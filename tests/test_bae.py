"""ELM's binary autoencoder: published arguments, bits drawn and thresholded, sub-codes, and its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from lexel.errors import LexelError
from lexel.models.discriminator import PatchDiscriminatorConfig
from lexel.tokenizers import export_published, find_published, load_published
from lexel.tokenizers.bae import BAE, BAETokenizer, BAETokenizerConfig
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.quantizers.bernoulli import Bernoulli, code_loss
from lexel.train.objectives.tokenizer import TokenizerObjectiveConfig

SMALL = {
    "nf": 8, "res_blocks": 1, "codebook_size": 6, "emb_dim": 16, "ch_mult": (1, 2), "img_size": 16,
    "attn_resolutions": (8,),
}  # fmt: skip


def make(**arguments) -> BAETokenizer:
    torch.manual_seed(0)
    return cast(BAETokenizer, BAE.config({**SMALL, **arguments}).build().eval())


def pictures(height: int = 16, width: int = 16, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


# The published arguments


def test_generator_multiplies_its_blocks_not_its_width() -> None:
    one, two = make(), make(gen_mul=2.5)
    assert len(two.generator.blocks) == len(one.generator.blocks) + 2 + 1  # 2 residual, 1 attention
    assert two.last_layer.shape == one.last_layer.shape
    assert len(two.encoder.blocks) == len(one.encoder.blocks)


def test_without_norm_first_the_generator_starts_with_its_convolution() -> None:
    assert isinstance(make(norm_first=False).generator.blocks[0], torch.nn.Conv2d)
    assert isinstance(make().generator.blocks[0], torch.nn.GroupNorm)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantizer": "gumbel"}, "always 'binary'"),
        ({"n_channels": 1}, "3 channels"),
        ({"token_each": 4}, "codes of 6 bits do not split into token_each=4"),
        ({"img_size": 15}, "no multiple"),
        ({"code_dim": 3}, "no argument code_dim"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(LexelError, match=message):
        make(**arguments)


def test_published_rows_say_how_their_codes_are_split() -> None:
    sizes = {
        name: BAE.config(find_published(name)[1].arguments).quantizer
        for name in ("elm-bae-16", "elm-bae-16-deter", "elm-bae-20", "elm-bae-24")
    }
    assert [quantizer.codebook_sizes for quantizer in sizes.values()] == [
        (2**16,), (2**16,), (2**10, 2**10), (2**12, 2**12),
    ]  # fmt: skip
    assert [quantizer.deterministic for quantizer in sizes.values()] == [False, True, False, False]


def test_a_file_keeps_what_nothing_uses(tmp_path: Path) -> None:
    # The shortcut of blocks of constant width and the variance's head: there, never trained, written back.
    model, path = make(), tmp_path / "binaryae_ema.th"
    export_published(model, "elm-bae-16", path)
    state = torch.load(path, weights_only=True)
    idle = {key for key in state if ".conv_out." in key or ".logsigma." in key}
    assert "ae.encoder.blocks.1.conv_out.weight" in idle
    assert "ae.generator.logsigma.2.bias" in idle
    torch.save({**state, "disc.main.0.weight": torch.ones(1), "perceptual.x": torch.ones(2)}, path)
    again = load_published("elm-bae-16", path, SMALL)
    assert again.fingerprint() == model.fingerprint()
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert not any("logsigma" in key for key in trained)
    assert "encoder.blocks.1.conv_out.weight" not in trained
    assert "encoder.blocks.3.nin_shortcut.weight" in trained


# Codes


def test_codes_do_not_depend_on_how_they_are_split() -> None:
    whole, split = make(), make(token_each=3)
    split.load_state_dict(whole.state_dict())
    codes, parts = whole.encode(pictures()), split.encode(pictures())
    assert parts.indices.shape == (2, 64, 3)
    merged = (parts.indices[..., 0] * 4 + parts.indices[..., 1]) * 4 + parts.indices[..., 2]
    assert torch.equal(merged, codes.indices[..., 0])
    assert torch.equal(whole.decode(codes), split.decode(parts))


def test_a_code_is_the_sum_of_the_rows_of_its_bits() -> None:
    rows = torch.randn(3, 5)
    for tanh in (False, True):
        quantizer = QuantizerConfig("bernoulli", codebook_size=8, tanh=tanh).build(5)
        quantizer.embed.weight.data.copy_(rows)  # type: ignore[union-attr, operator]
        found = quantizer.decode(torch.tensor([[[0b110], [0b001]]]))[0]
        # Most significant bit first.
        active = torch.stack([rows[0] + rows[1], rows[2]])
        expected = active - (rows.sum(0) - active) if tanh else active
        torch.testing.assert_close(found, expected)


def test_pictures_of_other_shapes_carry_their_grid() -> None:
    model = make()
    codes = model.encode(pictures(16, 24))
    assert codes.grid == (8, 12)
    assert model.decode(codes).shape == (2, 3, 16, 24)


def test_drawn_bits_follow_their_probabilities_and_repeat_from_a_seed() -> None:
    # An untrained model's probabilities are near 1/2: thresholding would be off by as much. The means of 400
    # draws of 768 bits stay within five standard deviations (all of them, but for 1 seed in 2,000).
    model = make()
    draws = [model.draw(pictures(), torch.Generator().manual_seed(seed)).indices for seed in range(400)]
    bits = torch.stack([cast(Bernoulli, model.quantize).factorizer.to_bits(one) for one in draws]).float()
    latents, _ = model._latents(pictures())
    chances = cast(Bernoulli, model.quantize).probabilities(latents)
    assert (bits.mean(0) - chances).abs().max() < 5 * (0.25 / 400) ** 0.5
    assert torch.equal(model.draw(pictures(), torch.Generator().manual_seed(7)).indices, draws[7])
    assert not torch.equal(draws[7], draws[8])


def test_training_draws_and_evaluation_does_not() -> None:
    model = make().train()
    one, same, other = (
        model(pictures(), generator=torch.Generator().manual_seed(seed)).codes.indices for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    deterministic = make(deterministic=True).train()
    assert torch.equal(deterministic(pictures()).codes.indices, deterministic.encode(pictures()).indices)
    model.eval()
    assert torch.equal(model(pictures()).codes.indices, model.encode(pictures()).indices)


def test_the_gradient_of_a_drawn_code_is_that_of_its_probabilities() -> None:
    quantizer = QuantizerConfig("bernoulli", codebook_size=64).build(4).train()
    x = torch.randn(2, 9, 4, requires_grad=True)
    upstream = torch.randn(2, 9, 4)
    (drawn,) = torch.autograd.grad(quantizer(x).quantized, x, upstream)
    (smooth,) = torch.autograd.grad(quantizer.bypass(x), x, upstream)
    torch.testing.assert_close(drawn, smooth)


def test_code_loss_takes_the_sigmoid_a_second_time() -> None:
    # s(0) (1 - s(0)) = 1/4; at probability 1 it is s(1) (1 - s(1)).
    s = torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(code_loss(torch.tensor([[[0.0, 1.0]]])), (0.25 + s * (1 - s)) / 2)
    x = torch.randn(1, 5, 4)
    quantizer = QuantizerConfig("bernoulli", codebook_size=64, commitment=0.5).build(4).train()
    torch.testing.assert_close(quantizer(x).losses["code"], 0.5 * code_loss(quantizer.values(x)))  # type: ignore[operator]
    without = QuantizerConfig("bernoulli", codebook_size=64, commitment=0.0).build(4).train()
    assert without(x).losses == {}


def test_codes_of_other_quantizers_are_not_drawn() -> None:
    config = BAETokenizerConfig(16, 8, (1, 2), 1, 1, (), 4, norm_groups=4, quantizer=QuantizerConfig())
    with pytest.raises(ValueError, match="vq quantizer are not drawn"):
        config.build().draw(pictures())


def test_24_bits_in_one_code_cost_no_table() -> None:
    quantizer = QuantizerConfig("bernoulli", codebook_size=2**24, deterministic=True).build(4).train()
    assert sum(p.numel() for p in quantizer.parameters()) == 24 * (4 + 1) + 24 * 4
    output = quantizer(torch.randn(2, 9, 4))
    assert output.metrics["perplexity"] > 1


# Its recipe


def test_overfits_one_batch_with_its_objective() -> None:
    torch.manual_seed(0)
    model = make(codebook_size=8, attn_resolutions=()).train()
    objective = TokenizerObjectiveConfig(
        l1=0.5, l2=0.0, perceptual=0.1, adversarial=1.0, adversarial_start=60, adaptive=True,
        adaptive_max=1.0, discriminator=PatchDiscriminatorConfig(8, 1),
    ).build()  # fmt: skip
    assert objective.discriminator is not None
    where = torch.linspace(-1, 1, 16)
    x = torch.stack([where.expand(3, 16, 16), where[:, None].expand(3, 16, 16)]) * 0.8
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 5e-3)
    losses, scales = [], []
    for step in range(70):
        loss, metrics = objective.generator_loss(model(x), x, step, model.last_layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(metrics["l1"].item())
        scales += [metrics["adversarial_scale"].item()] if "adversarial_scale" in metrics else []
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10]), losses
    assert len(scales) == 10
    assert max(scales) <= 1.0
