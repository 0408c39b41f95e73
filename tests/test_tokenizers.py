"""Laws of every tokenizer family, at debug size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lexel import tokenizers
from lexel.errors import LexelError
from lexel.nn.conv import ConvSizes, Encoder, PatchEncoder
from lexel.nn.vit import MultiheadAttention
from lexel.tokenizers.bae import BAETokenizerConfig
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.factorized import FactorizedTokenizerConfig, disentanglement
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.titok import TiTok, TiTokConfig
from lexel.tokenizers.vq import VQTokenizerConfig
from lexel.types import Codes

SMALL = QuantizerConfig(codebook_size=16, cosine=False)
RASTER = {
    "image_size": 16, "channels": 8, "channel_mult": (1, 2), "res_blocks": 1, "z_channels": 8, "embed_dim": 4,
    "norm_groups": 4, "stem": 2,
}  # fmt: skip
CONFIGS = {
    "vq": VQTokenizerConfig(**RASTER, quantizer=SMALL),
    "vq-patch": VQTokenizerConfig(
        **RASTER, quantizer=SMALL, encoder="patch", encoder_channels=16, overlap=1, middle=False
    ),
    "vq-residual": VQTokenizerConfig(
        **RASTER, quantizer=QuantizerConfig("residual", codebook_size=16, depth=2)
    ),
    "vq-fsq": VQTokenizerConfig(**RASTER, quantizer=QuantizerConfig("fsq", levels=(5, 5))),
    "factorized-2": FactorizedTokenizerConfig(
        **RASTER, quantizer=SMALL, branches=2, adapter_layers=1, adapter_heads=2
    ),
    "factorized-3": FactorizedTokenizerConfig(**RASTER, quantizer=SMALL, branches=3, adapter_layers=0),
    "bae": BAETokenizerConfig(
        image_size=16,
        channels=8,
        channel_mult=(1, 2, 2),
        res_blocks=1,
        attention=(8,),
        embed_dim=16,
        norm_groups=4,
        quantizer=QuantizerConfig("bernoulli", codebook_size=64, groups=(3, 3)),
    ),
    "flexible": TiTokConfig(
        image_size=16,
        patch=4,
        latents=6,
        width=32,
        layers=2,
        heads=2,
        token_size=4,
        quantizer=SMALL,
        tail_drop="batch",
    ),
}
each_family = pytest.mark.parametrize("name", CONFIGS)


def make(name: str) -> Tokenizer:
    torch.manual_seed(0)
    tokenizer: Tokenizer = CONFIGS[name].build()
    return tokenizer.eval()


def pictures(count: int = 4, size: int = 16, seed: int = 0) -> Tensor:
    """Discs of random colour on random backgrounds, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.linspace(-1, 1, size)
    colours = torch.rand(2, count, 3, 1, 1, generator=generator) * 2 - 1
    centre = torch.rand(2, count, 1, 1, generator=generator) - 0.5
    inside = ((where[:, None] - centre[0]) ** 2 + (where - centre[1]) ** 2 < 0.2)[:, None]
    return torch.where(inside, colours[0], colours[1])


@each_family
def test_codes_fit_the_layout_and_decode_to_the_picture_size(name: str) -> None:
    tokenizer = make(name)
    codes = tokenizer.encode(pictures())
    back = tokenizer.layout.unflatten(tokenizer.layout.flatten(codes))
    assert torch.equal(back.indices, codes.indices)
    assert back.grid == codes.grid
    assert tokenizer.decode(codes).shape == pictures().shape
    assert tokenizer.embed(codes).shape[:2] == codes.indices.shape[:2]


@each_family
def test_forward_in_eval_is_decode_of_encode(name: str) -> None:
    tokenizer = make(name)
    output = tokenizer(pictures())
    codes = tokenizer.encode(pictures())
    assert torch.equal(output.codes.indices, codes.indices)
    torch.testing.assert_close(output.reconstruction, tokenizer.decode(codes))


@each_family
def test_a_row_of_a_batch_is_that_row_alone(name: str) -> None:
    tokenizer = make(name)
    codes = tokenizer.encode(pictures())
    alone = torch.cat([tokenizer.encode(row[None]).indices for row in pictures()])
    assert torch.equal(codes.indices, alone)
    rows = torch.cat([tokenizer.decode(codes[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(tokenizer.decode(codes), rows, rtol=1e-4, atol=1e-5)


@each_family
def test_saving_and_loading_is_bit_exact(name: str, tmp_path: Path) -> None:
    tokenizer = make(name)
    tokenizer.train()(pictures())  # codebook statistics move
    tokenizer.eval().save_pretrained(tmp_path)
    loaded = tokenizers.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.config == tokenizer.config
    assert loaded.fingerprint() == tokenizer.fingerprint()
    codes = tokenizer.encode(pictures())
    assert torch.equal(loaded.encode(pictures()).indices, codes.indices)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


@each_family
@pytest.mark.parametrize("quantize", [True, False])
def test_gradient_reaches_every_parameter(name: str, quantize: bool) -> None:
    tokenizer = make(name).train()
    output = tokenizer(pictures(), quantize=quantize, generator=torch.Generator().manual_seed(0))
    (output.reconstruction.pow(2).mean() + sum(output.quantizer.losses.values())).backward()
    silent = [key for key, p in tokenizer.named_parameters() if p.requires_grad and _is_silent(p)]
    assert silent == []
    assert tokenizer.last_layer.grad is not None


def _is_silent(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is None or not parameter.grad.any()


@each_family
def test_unrounded_pass_lets_more_through_than_the_rounded(name: str) -> None:
    tokenizer = make(name)
    rounded = tokenizer(pictures(), quantize=True)
    smooth = tokenizer(pictures(), quantize=False)
    assert torch.equal(rounded.latents, smooth.latents)
    assert not torch.equal(rounded.quantizer.quantized, smooth.quantizer.quantized)
    assert torch.equal(rounded.codes.indices, smooth.codes.indices)


@each_family
def test_overfits_one_batch(name: str) -> None:
    tokenizer = make(name).train()
    x = pictures(2)
    start = (tokenizer(x).reconstruction - x).pow(2).mean().item()
    flexible = name == "flexible"  # every second step sees less than half of its codes
    steps = 200 if flexible else 150
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3 if flexible else 5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        output = tokenizer(x, quantize=step >= 30, generator=generator)
        loss = (output.reconstruction - x).pow(2).mean() + sum(output.quantizer.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tokenizer.eval()
    reached = (tokenizer.decode(tokenizer.encode(x)) - x).pow(2).mean().item()
    assert reached < 0.1 * start


def test_published_llamagen_names() -> None:
    with torch.device("meta"):
        keys = set(VQTokenizerConfig().build().state_dict())
    published = {
        "encoder.conv_in.weight", "encoder.conv_blocks.0.res.1.norm1.weight",
        "encoder.conv_blocks.2.res.0.nin_shortcut.weight", "encoder.conv_blocks.3.downsample.conv.bias",
        "encoder.conv_blocks.4.attn.1.proj_out.weight", "encoder.mid.1.q.weight", "encoder.mid.2.conv2.bias",
        "encoder.norm_out.bias", "encoder.conv_out.weight", "quant_conv.weight", "post_quant_conv.bias",
        "decoder.conv_blocks.0.attn.2.k.weight", "decoder.conv_blocks.3.upsample.conv.weight",
        "decoder.conv_blocks.4.res.2.conv2.weight", "decoder.mid.0.norm1.weight", "decoder.conv_out.bias",
    }  # fmt: skip
    assert published <= keys
    assert "encoder.conv_blocks.4.downsample.conv.weight" not in keys
    # The published VQ-16 has 344 tensors, two of them the quantizer's.
    assert len([key for key in keys if not key.startswith("quantize.")]) == 342


def test_convolutional_codes_of_another_size_carry_their_grid() -> None:
    tokenizer = make("vq")
    codes = tokenizer.encode(torch.zeros(1, 3, 8, 24))
    assert codes.grid == (2, 6)
    assert tokenizer.decode(codes).shape == (1, 3, 8, 24)


def receptive_field(encoder: torch.nn.Module, size: int) -> int:
    """Pixels of one row that change the latent in the middle."""
    x = torch.rand(1, 3, size, size).requires_grad_(True)
    latents = encoder(x)
    middle = latents.shape[2] // 2
    latents[0, :, middle, middle].sum().backward()
    assert x.grad is not None
    return int(x.grad[0].abs().sum((0, 1)).ne(0).sum())


def test_patch_encoder_sees_its_patch_and_the_overlap_only() -> None:
    torch.manual_seed(0)
    assert receptive_field(PatchEncoder(4, 16, 2, 8, overlap=0), 32) == 4
    assert receptive_field(PatchEncoder(4, 16, 2, 8, overlap=1), 32) == 6
    conv = Encoder(ConvSizes(8, (1, 2), 1, 8, attention=False, groups=4, stem=2))
    assert receptive_field(conv, 32) == 32


def test_fused_attention_equals_torchs() -> None:
    torch.manual_seed(0)
    reference = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    ours = MultiheadAttention(16, 4)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 5, 16)
    visible = torch.tensor([[True] * 5, [True, True, True, False, False]])
    expected, _ = reference(x, x, x, key_padding_mask=~visible, need_weights=False)
    torch.testing.assert_close(ours(x, visible), expected)


# ---- factorized ------------------------------------------------------------------------------------------


def test_disentanglement_measures_the_angle() -> None:
    a = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    b = torch.tensor([[[0.0, 2.0], [3.0, 0.0]]])
    assert disentanglement([a, b]).item() == pytest.approx(0.5)
    assert disentanglement([a, a, a]).item() == pytest.approx(1.0)


def test_disentanglement_is_a_training_loss_with_its_weight() -> None:
    tokenizer = make("factorized-2").train()
    output = tokenizer(pictures())
    a, b = output.quantizer.quantized.chunk(2, dim=-1)
    expected = 0.1 * disentanglement([a, b])
    torch.testing.assert_close(output.quantizer.losses["disentangle"], expected)
    assert "disentangle" not in make("factorized-2")(pictures()).quantizer.losses


# ---- flexible --------------------------------------------------------------------------------------------


def test_any_prefix_decodes_as_if_it_were_all_there_is() -> None:
    tokenizer = make("flexible")
    codes = tokenizer.encode(pictures())
    for length in range(1, 7):
        cut = Codes(codes.indices[:, :length])
        noise = codes.indices.clone()
        noise[:, length:] = 0
        padded = Codes(noise, lengths=torch.full((4,), length))
        torch.testing.assert_close(tokenizer.decode(padded), tokenizer.decode(cut))
        shorter = tokenizer.encode(pictures(), length=length)
        assert torch.equal(shorter.indices, codes.indices)
        torch.testing.assert_close(tokenizer.decode(shorter), tokenizer.decode(cut))


def test_rows_of_different_lengths_decode_as_alone() -> None:
    tokenizer = make("flexible")
    indices = tokenizer.encode(pictures()).indices
    codes = Codes(indices, lengths=torch.tensor([1, 3, 6, 4]))
    together = tokenizer.decode(codes)
    for row, length in enumerate((1, 3, 6, 4)):
        alone = tokenizer.decode(Codes(indices[row : row + 1, :length]))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["batch", "sample"])
def test_tail_drop_draws_every_length_equally(kind: str) -> None:
    # 1200 draws from 6 lengths: chi-square with 5 degrees of freedom below its 1 - 1e-4 quantile, 25.7.
    tokenizer = TiTok(
        TiTokConfig(
            image_size=4, patch=4, latents=6, width=8, layers=1, heads=1, token_size=4, quantizer=SMALL,
            tail_drop=kind,
        )
    ).train()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    drawn = [
        tokenizer._draw_lengths(count, generator) for count in ([1] * 1200 if kind == "batch" else [300] * 4)
    ]
    counts = torch.bincount(torch.cat(drawn), minlength=7)[1:].float()
    assert ((counts - 200) ** 2 / 200).sum() < 25.7
    batch = tokenizer._draw_lengths(50, generator)
    assert (batch.unique().numel() == 1) == (kind == "batch")


def test_tail_drop_repeats_from_a_seed_and_rests_in_eval() -> None:
    tokenizer = make("flexible").train()
    draws = [
        tokenizer(pictures(), generator=torch.Generator().manual_seed(3)).codes.lengths.tolist()
        for _ in range(2)
    ]
    assert draws[0] == draws[1]
    assert tokenizer.eval()(pictures()).codes.lengths.tolist() == [6] * 4


# ---- refusals --------------------------------------------------------------------------------------------


def test_wrong_sizes_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        make("vq").encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match="convert uint8"):
        make("vq").encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"pictures must be \(16, 16\)"):
        make("flexible").encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="always 16 codes"):
        make("vq").encode(pictures(), length=4)
    with pytest.raises(ValueError, match="1 to 6 codes"):
        make("flexible").encode(pictures(), length=7)
    with pytest.raises(ValueError, match="4x4 grid"):
        make("vq").decode(Codes(torch.zeros(1, 5, 1, dtype=torch.long)))


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: VQTokenizerConfig(image_size=20), "no multiple of the downsampling 16"),
        (lambda: VQTokenizerConfig(encoder="vit"), "conv or patch"),
        (lambda: FactorizedTokenizerConfig(branches=4), "2 or 3"),
        (lambda: FactorizedTokenizerConfig(quantizer=QuantizerConfig("residual", depth=2)), "one codebook"),
        (lambda: TiTokConfig(patch=7), "no multiple of patch"),
        (lambda: TiTokConfig(tail_drop="always"), "batch, sample or none"),
    ],
)
def test_contradictory_configs_are_refused(make_config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config()


def test_a_folder_of_another_family_is_refused(tmp_path: Path) -> None:
    make("vq").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"vq"', '"var"', 1))
    with pytest.raises(LexelError, match=r"'var' model; tokenizers are .*factorized.*titok.*vq"):
        tokenizers.from_pretrained(tmp_path)


def test_a_class_of_ones_own_registers_once() -> None:
    from lexel import tokenizers
    from lexel.tokenizers.vq import VQTokenizer

    class Own(VQTokenizer):
        model_type = "own"

    try:
        assert tokenizers.register(Own) is Own
        assert tokenizers.register(Own) is Own
        with pytest.raises(ValueError, match="'vq' is taken"):
            tokenizers.register(VQTokenizer)
    finally:
        tokenizers._REGISTERED.pop("own", None)
