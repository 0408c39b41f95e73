"""IBQ: the quantizer's gradient and losses against the definition, and that it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.tokenizers.ibq import IBQConfig, IBQTokenizer
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.quantizers.ibq import IndexBackpropagation


def quantizer(**options) -> IndexBackpropagation:
    torch.manual_seed(0)
    return IndexBackpropagation(4, QuantizerConfig("ibq", codebook_size=16, **options))


def by_definition(z: Tensor, rows: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Quantized latents and loss, with the one-hot matrices of the paper."""
    logits = z @ rows.T
    soft = logits.softmax(-1)
    hard = F.one_hot(logits.argmax(-1), len(rows)).to(z)
    quantized = (hard - soft.detach() + soft) @ rows
    chosen = hard @ rows
    loss = (quantized - z).pow(2).mean() + (chosen.detach() - z).pow(2).mean()
    return quantized, loss + beta * (chosen - z.detach()).pow(2).mean()


def test_values_losses_and_gradients_are_those_of_the_definition() -> None:
    model = quantizer(commitment=0.3, entropy=0.0).double()
    rows = model.embedding.weight
    z = torch.randn(2, 5, 4, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_(
        True
    )
    upstream = torch.randn(2, 5, 4, dtype=torch.double)
    # `learn` works in float32 rows; the definition is given the same ones.
    quantized, indices, losses = model.learn(z.float())
    expected, loss = by_definition(z.float(), rows.float(), 0.3)
    torch.testing.assert_close(quantized, expected)
    torch.testing.assert_close(torch.stack(list(losses.values())).sum(), loss)
    assert torch.equal(indices[..., 0], (z @ rows.T).argmax(-1))
    ours = (quantized * upstream).sum() + torch.stack(list(losses.values())).sum()
    theirs = (expected * upstream).sum() + loss
    for one, other in zip(
        torch.autograd.grad(ours, (z, rows)), torch.autograd.grad(theirs, (z, rows)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_every_row_is_trained() -> None:
    model = quantizer(entropy=0.0).train()
    output = model(torch.randn(1, 3, 4))  # three latents choose three rows at most
    output.quantized.sum().backward()
    assert model.embedding.weight.grad is not None
    assert (model.embedding.weight.grad.abs().sum(1) > 0).all()


def test_the_choice_is_the_plain_dot_product() -> None:
    model = quantizer().eval()
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.embedding.weight[3] = torch.tensor([1.0, 0, 0, 0])
        model.embedding.weight[5] = torch.tensor([9.0, 0, 0, 0])  # further away, but the larger product
    assert model.encode(torch.tensor([[[1.0, 0, 0, 0]]])).item() == 5


def test_entropy_weights_and_temperature() -> None:
    z = torch.randn(1, 6, 4)
    terms = [
        quantizer(entropy=1.0, entropy_certainty=c, entropy_gamma=g, temperature=t)
        .learn(z)[2]["entropy"]
        .item()
        for c, g, t in ((1, 0, 1), (0, 1, 1), (2, 3, 1), (1, 0, 1e-4))
    ]
    assert terms[0] > 0 > terms[1]
    assert terms[2] == pytest.approx(2 * terms[0] + 3 * terms[1], rel=1e-5)
    assert terms[3] == pytest.approx(0, abs=1e-3)  # every choice is sure


def tokenizer() -> IBQTokenizer:
    torch.manual_seed(0)
    return IBQConfig(
        image_size=8, channels=32, channel_mult=(1, 1), res_blocks=1, z_channels=8, embed_dim=8,
        attn_resolutions=(4,), quantizer=QuantizerConfig("ibq", codebook_size=32, entropy=0.05),
    ).build()  # fmt: skip


def test_it_overfits_one_batch_and_trains_everything() -> None:
    model = tokenizer()
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.5, 0.9))
    errors = []
    for _ in range(100):
        output = model(pixels)
        error = (output.reconstruction - pixels).abs().mean()
        optimizer.zero_grad()
        (error + torch.stack(list(output.quantizer.losses.values())).sum()).backward()
        if not errors:
            idle = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
            # A bias before a softmax over positions moves nothing.
            assert [k for k in idle if not k.endswith(".k.bias")] == []
        optimizer.step()
        errors.append(error.item())
    assert sum(errors[-5:]) / 5 < 0.5 * errors[0]
