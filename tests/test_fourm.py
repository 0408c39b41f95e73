"""4M's VQ tokenizers: values of every kind, published files, training, at debug size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lexel.cli import main
from lexel.data.shapes import ShapesConfig
from lexel.data.tokenized import tokenize_values
from lexel.errors import LexelError
from lexel.tokenizers import export_published, from_pretrained, load_published
from lexel.tokenizers.fourm import FOURM_VQ, FourM, FourMConfig, NetworkConfig, network
from lexel.tokenizers.quantizers.fourm import CodebookConfig
from lexel.types import Codes
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden"
ROW = "4m-semseg-4k-224-448"
VIT = NetworkConfig(width=32, depth=1, heads=2, grid=(4, 4))
BOOK = CodebookConfig(codebook_size=24, dim=8)
PICTURES = FourMConfig((16, 16), patch=(4, 4), encoder=VIT, decoder=VIT, decoder_patch=(4, 4), quantizer=BOOK)
LABELS = replace(PICTURES, channels=6, labels=5, post_mlp=True)
FEATURES = replace(PICTURES, channels=10, patch=(1, 1), decoder_patch=(1, 1))
MLP = NetworkConfig("bottleneck", width=16, depth=2)
HEADS = CodebookConfig("memcodes", 24, dim=16, heads=4)
VECTORS = FourMConfig(
    (16, 16), 7, patch=(1, 1), decoder_patch=(1, 1), encoder=MLP, decoder=MLP, quantizer=HEADS
)
KINDS = {"pixels": PICTURES, "labels": LABELS, "map": FEATURES, "vector": VECTORS}


def awake(config: FourMConfig) -> FourM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return config.build().eval()


def values_of(kind: str, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "labels":
        return torch.randint(5, (count, 16, 16), generator=generator)
    shape = {"pixels": (3, 16, 16), "map": (10, 4, 4), "vector": (7,)}[kind]
    return torch.rand(count, *shape, generator=generator) * 2 - 1


def given(name: str, folder: Path) -> tuple[Path, dict[str, object]]:
    """Weights and arguments of a fixture."""
    fixture = Fixture(GOLDEN / name, folder)
    sizes = {"vit_sizes": fixture.config["vit_sizes"]} if "vit_sizes" in fixture.config else {}
    return fixture.weights(), {**FOURM_VQ.arguments, **fixture.config["args"], **sizes}


# ---- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_values_go_through_codes_and_come_back_in_their_own_shape(kind: str) -> None:
    model, values = awake(KINDS[kind]), values_of(kind)
    assert model.config.modality == kind
    codes = model.encode_values(values)
    assert codes.indices.shape == (3, *((1, 4) if kind == "vector" else (16, 1)))
    back = model.decode_values(codes)
    assert back.shape == values.shape
    assert back.dtype == values.dtype
    model.layout.flatten(codes)
    alone = model.encode_values(values[1:2])
    assert torch.equal(alone.indices, codes.indices[1:2])


def test_only_pictures_have_encode_and_decode() -> None:
    model, pixels = awake(PICTURES), values_of("pixels")
    codes = model.encode(pixels)
    assert model.draws_pixels
    assert torch.equal(codes.indices, model.encode_values(pixels).indices)
    assert torch.equal(model.decode(codes), model.decode_values(codes))
    for kind, words in (("labels", "class maps of 5 classes"), ("map", "maps of 10 channels")):
        other = awake(KINDS[kind])
        assert not other.draws_pixels
        with pytest.raises(LexelError, match=f"{words}, not pictures; use encode_values"):
            other.encode(pixels)
        with pytest.raises(LexelError, match="decode_values"):
            other.decode(codes)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("labels", torch.zeros(1, 16, 16), "class maps are long"),
        ("labels", torch.full((1, 16, 16), 5), r"classes must lie in 0..4, got 5..5"),
        ("map", torch.zeros(1, 9, 4, 4), r"float \[b, 10, h, w\], got .*\(1, 9, 4, 4\)"),
        ("vector", torch.zeros(2, 6), r"float \[b, 7\]"),
        ("pixels", torch.zeros(1, 3, 18, 16), r"multiples of \(4, 4\), got \(18, 16\)"),
    ],
)
def test_wrong_values_are_refused(kind: str, values: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        awake(KINDS[kind]).encode_values(values)


def test_other_sizes_need_the_grid_of_their_codes() -> None:
    model = awake(PICTURES)
    codes = model.encode(torch.zeros(1, 3, 8, 24))
    assert codes.grid == (2, 6)
    assert model.decode(codes).shape == (1, 3, 8, 24)
    with pytest.raises(ValueError, match="12 codes do not fill a 4x4 grid"):
        model.decode(Codes(codes.indices))


def test_positions_of_another_grid_are_interpolated() -> None:
    """A table read at its own size is taken as it is; at another it is stretched, not cut."""
    encoder = awake(PICTURES).encoder
    grid = torch.zeros(1, 32, 8, 8)
    encoder.blocks = torch.nn.Sequential()
    own, large = encoder.tokens(grid[:, :, :4, :4]), encoder.tokens(grid)
    assert torch.equal(own[0].T.reshape(32, 4, 4), encoder.pos_emb[0])
    cut = large[0].T.reshape(32, 8, 8)[:, :4, :4]
    assert not torch.allclose(cut, encoder.pos_emb[0], atol=0.1)


def test_values_become_a_folder_of_codes(tmp_path: Path) -> None:
    model, data = awake(VECTORS), ShapesConfig(size=32, count=5).build("train")
    vectors = {data[i].key: row for i, row in enumerate(values_of("vector", 5))}
    stored = tokenize_values(model, data, lambda example: vectors[example.key], tmp_path)
    assert stored[3].codes.tolist() == model.encode_values(values_of("vector", 5)).indices[3].tolist()


# ---- quantizers ------------------------------------------------------------------------------------------


def test_the_stored_row_is_returned_not_its_direction() -> None:
    quantizer = BOOK.build().eval()
    quantizer._codebook.embed.mul_(3)
    latents = torch.randn(2, 5, 8)
    indices = quantizer.encode(latents)
    rows = quantizer.decode(indices)
    assert torch.allclose(rows.norm(dim=-1), torch.full((2, 5), 3.0))
    assert torch.equal(indices, quantizer.encode(latents * 7))


@pytest.mark.parametrize("replacement", ["latents", "split"])
def test_dead_codes_are_moved(replacement: str) -> None:
    config = replace(BOOK, decay=0.0, dead_below=0.5, replacement=replacement)
    quantizer = config.build().train()
    before = quantizer._codebook.embed.clone()
    latents = torch.nn.functional.normalize(torch.randn(1, 200, 8), dim=-1)
    quantizer(latents)
    after, used = quantizer._codebook.embed, quantizer._codebook.cluster_size > 0
    assert not torch.equal(before, after)
    if replacement == "latents":
        assert (after[~used] @ latents[0].T).amax(1).allclose(torch.ones(int((~used).sum())), atol=1e-5)
    still = replace(config, dead_below=0.0).build().train()
    still._codebook.embed.copy_(before)
    still(latents)
    assert torch.allclose(still._codebook.embed[~used], before[~used], atol=1e-6)


def test_memcodes_draw_from_the_generator_and_carry_a_gradient() -> None:
    model = awake(VECTORS).train()
    draws = [model(values_of("vector"), generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    same, other = (torch.equal(draws[0].codes.indices, one.codes.indices) for one in draws[1:])
    assert same
    assert not other
    draws[0].reconstruction.square().sum().backward()
    assert float(model.encoder.linear_in.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("kind", ["pixels", "map", "vector"])
def test_a_few_values_are_learned_by_heart(kind: str) -> None:
    torch.manual_seed(0)
    model, values = KINDS[kind].build().train(), values_of(kind, 2)
    values = values[..., None, None] if kind == "vector" else values
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    errors = []
    for _ in range(40):
        output = model(values)
        error = (output.reconstruction - values).square().mean()
        optimizer.zero_grad()
        (error + sum(output.quantizer.losses.values())).backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.7 * errors[0]


# ---- published files -------------------------------------------------------------------------------------


def test_a_config_in_the_files_header_is_used(tmp_path: Path) -> None:
    path, arguments = given("fourm_vq_semseg", tmp_path)
    header = {name: str(value) for name, value in arguments.items()} | {"domain": "semseg_coco"}
    header |= {"sync_codebook": "true", "ckpt_path": "null"}
    save_file(load_file(path), tmp_path / "own.safetensors", header)
    assert load_published(ROW, tmp_path / "own.safetensors").config.labels == 7


def test_a_file_of_the_encoder_alone_codes_and_does_not_draw(tmp_path: Path) -> None:
    path, arguments = given("fourm_vq_semseg", tmp_path)
    whole = load_published(ROW, path, arguments)
    state = {k: v for k, v in load_file(path).items() if not k.startswith(("decoder.", "post_quant_proj."))}
    save_file(state, tmp_path / "half.safetensors")
    half = load_published(ROW, tmp_path / "half.safetensors", arguments)
    labels = torch.randint(7, (1, 16, 24))
    codes = half.encode_values(labels)
    assert torch.equal(codes.indices, whole.encode_values(labels).indices)
    assert not half.has_decoder
    with pytest.raises(LexelError, match="encoder alone"):
        half.decode_values(codes)
    with pytest.raises(LexelError, match="no decoder"):
        export_published(half, ROW, tmp_path / "out.safetensors")
    half.save_pretrained(tmp_path / "lexel")
    assert from_pretrained(tmp_path / "lexel").fingerprint() == half.fingerprint()


def test_training_files_are_read_too(tmp_path: Path) -> None:
    path, arguments = given("fourm_vq_global", tmp_path)
    state = load_file(path)
    averaged = {key: value + 1 for key, value in state.items()}
    torch.save({"model": state, "model_ema": averaged, "epoch": 3}, tmp_path / "checkpoint.pth")
    raw = load_published(ROW, tmp_path / "checkpoint.pth", arguments)
    ema = load_published(ROW, tmp_path / "checkpoint.pth", arguments, key="model_ema")
    assert torch.equal(raw.quant_proj.bias + 1, ema.quant_proj.bias)


def test_a_diffusion_decoder_is_another_system(tmp_path: Path) -> None:
    path, arguments = given("fourm_vq", tmp_path)
    with pytest.raises(LexelError, match="unet_patched is a diffusion decoder: load this file by the name"):
        load_published(ROW, path, {**arguments, "dec_type": "unet_patched"})
    with pytest.raises(LexelError, match="quant_type is lucid or memcodes, got 'fsq'"):
        load_published(ROW, path, {**arguments, "quant_type": "fsq"})


def test_network_names() -> None:
    assert network("vit_l_dec", "decoder", None, (2, 2)) == NetworkConfig("vit", 1024, 24, 16, 4.0, (2, 2))
    mlp = network("BottleneckMLP/B_6-Wi_1024-E_2", "encoder", None, (1, 1))
    assert (mlp.kind, mlp.width, mlp.depth, mlp.ratio) == ("bottleneck", 1024, 6, 2.0)
    with pytest.raises(ValueError, match="'vit_x_enc' is no network"):
        network("vit_x_enc", "encoder", None, (1, 1))


def test_reconstructing_a_picture_with_a_tokenizer_of_maps_says_why_not(tmp_path: Path, capsys) -> None:
    awake(LABELS).save_pretrained(tmp_path / "maps")
    from lexel.data.images import to_image

    to_image(values_of("pixels")[0]).save(tmp_path / "picture.png")
    code = main(["reconstruct", str(tmp_path / "picture.png"), "--tokenizer", str(tmp_path / "maps")])
    assert code == 2
    assert "class maps of 5 classes, not pictures; use encode_values" in capsys.readouterr().err
