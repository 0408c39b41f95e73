"""Emu3's vision tokenizer: pictures and clips, transformers' class and layout, training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from einops import rearrange
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from torch import Tensor

import lexel.train.cli  # noqa: F401  (registers the schema)
from lexel.errors import LexelError
from lexel.tokenizers import find_published, from_pretrained, load_published
from lexel.tokenizers.emu3 import TRANSFORMERS, Emu3Config, Emu3Tokenizer
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.train.objectives.tokenizer import TokenizerObjectiveConfig
from lexel.types import Codes
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def file(tmp_path: Path):
    """(path, arguments) of the fixture's weights."""
    fixture = Fixture(GOLDEN / "emu3_vq", tmp_path)
    return fixture.weights(), fixture.config["reference_config"]


def small(**changes) -> Emu3Config:
    sizes = {
        "image_size": 16,
        "channels": 32,
        "channel_mult": (1, 2),
        "res_blocks": 1,
        "attention_stages": (1,),
        "quantizer": QuantizerConfig("learned", codebook_size=64, cosine=False, entropy=0.0),
    }
    return Emu3Config(**(sizes | changes))


def random_model(config: Emu3Config) -> Emu3Tokenizer:
    """In eval mode, with running statistics and codes that are not the initial ones."""
    torch.manual_seed(0)
    model = config.build().eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_()
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    return model


def pixels(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_transformers_layout_is_read_with_and_without_its_prefix(file) -> None:
    path, arguments = file
    model = load_published("emu3-vision-tokenizer", path, arguments)
    for prefix in ("model.vqmodel.", ""):
        state = {prefix + k.removeprefix("model.vqmodel."): v for k, v in TRANSFORMERS.export(model).items()}
        other = {"text_model.norm.weight": torch.zeros(2)} if prefix else {}
        save_file({**state, **other}, path.with_name("hf.safetensors"))
        again = load_published("emu3-vision-tokenizer", path.with_name("hf.safetensors"), arguments)
        assert again.fingerprint() == model.fingerprint()


def test_the_fixtures_key_map_is_ours(file) -> None:
    path, arguments = file
    model = load_published("emu3-vision-tokenizer", path, arguments)
    rule = Fixture(GOLDEN / "emu3_vq", path.parent).config["hf_keys"]
    published, ours = load_file(path), TRANSFORMERS.export(model)
    squeezed = set(rule["squeeze_1x1"])
    expected = {
        theirs: published[key][:, :, 0, 0] if key in squeezed else published[key]
        for key, theirs in rule["map"].items()
    }
    assert set(expected) == set(ours)
    assert all(torch.equal(ours[key], value) for key, value in expected.items())


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_transformers_class_gives_the_same_codes_and_pictures(frames: int) -> None:
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    ours = random_model(small(frames_per_code=frames))
    reference = Emu3VQVAE(
        Emu3VQVAEConfig(
            codebook_size=64,
            temporal_downsample_factor=frames,
            base_channels=32,
            channel_multiplier=[1, 2],
            num_res_blocks=1,
            attn_resolutions=[1],
            hidden_size=64,
        )
    ).eval()
    reference.load_state_dict(ours.state_dict())
    picture, clip = pixels(2, 3, 8, 12), pixels(1, 3 * frames, 3, 8, 12)
    with torch.no_grad():
        theirs = torch.stack(reference.encode(picture, torch.tensor([[8, 12]] * 2)).image_tokens)
        drawn = reference.decode(theirs)
        of_clip = torch.stack(list(reference.encode(clip, torch.tensor([[8, 12]])).image_tokens))
        moving = reference.decode(of_clip)
    codes = ours.encode(picture)
    assert torch.equal(codes.indices[..., 0], theirs.flatten(1))
    assert len(codes.indices.unique()) > 5
    torch.testing.assert_close(ours.decode(codes), drawn, rtol=1e-4, atol=1e-5)
    codes = ours.encode_video(clip)
    assert (codes.frames, codes.grid) == (3, (4, 6))
    assert torch.equal(codes.indices[..., 0], of_clip.flatten(1))
    torch.testing.assert_close(ours.decode_video(codes), moving, rtol=1e-4, atol=1e-5)


def test_attention_of_a_stage_has_that_stages_width() -> None:
    """BAAI's class can have it in any stage; transformers' only where the width is the middle's."""
    model = random_model(small(channel_mult=(1, 2, 1), attention_stages=(0, 1, 2), image_size=32))
    assert model.encoder.down_block.down[1].attn[0].q_proj.weight.shape == (64, 64)
    assert model.decoder.up_block.up[1].attn[1].q_proj.weight.shape == (64, 64)
    assert model.encoder.down_block.down[0].attn[0].q_proj.weight.shape == (32, 32)
    block, norm = model.encoder.down_block.down[1].attn[0], model.encoder.down_block.down[1].attn_norms[0]
    x = pixels(2, 64, 3, 5)
    flat = rearrange(norm(x), "b c h w -> b (h w) c")
    weights = torch.softmax(block.q_proj(flat) @ block.k_proj(flat).transpose(1, 2) / 8, -1)
    torch.testing.assert_close(block(flat)[0], block.out_proj(weights @ block.v_proj(flat)))
    picture = pixels(1, 3, 16, 24)
    assert model.decode(model.encode(picture)).shape == picture.shape


def test_a_picture_is_the_first_frame_of_a_still_clip() -> None:
    model, picture = random_model(small()), pixels(2, 3, 8, 12)
    still = picture[:, None].expand(-1, 4, -1, -1, -1)
    codes, of_clip = model.encode(picture), model.encode_video(still)
    assert torch.equal(codes.indices, of_clip.indices)
    torch.testing.assert_close(model.decode(codes), model.decode_video(of_clip)[:, 0])


def test_time_is_causal() -> None:
    """What comes later changes neither the codes nor the frames before it."""
    model, clip = random_model(small()), pixels(1, 8, 3, 8, 8)
    first, both = model.encode_video(clip[:, :4]), model.encode_video(clip)
    assert torch.equal(both.indices[:, :16], first.indices)
    torch.testing.assert_close(
        model.decode_video(both)[:, :4], model.decode_video(first), rtol=1e-4, atol=1e-5
    )


def test_shapes_it_cannot_take_are_named() -> None:
    model = small().build()
    with pytest.raises(ValueError, match="multiples of 2"):
        model.encode(pixels(1, 3, 7, 8))
    with pytest.raises(ValueError, match="multiples of 2"):
        model.encode_video(pixels(1, 4, 3, 8, 7))
    with pytest.raises(ValueError, match="frames must be a multiple of 4, got 6"):
        model.encode_video(pixels(1, 6, 3, 8, 8))
    with pytest.raises(ValueError, match="clip of 2 latent frames"):
        model.decode(Codes(torch.zeros(1, 8, 1, dtype=torch.long), (2, 2), frames=2))
    with pytest.raises(ValueError, match="do not fill a 8x8 grid"):
        model.decode(Codes(torch.zeros(1, 4, 1, dtype=torch.long)))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"embed_dim": 8}, "must be equal"),
        ({"double_z": True}, "double_z can only be False"),
        ({"temporal_downsample_factor": 3}, "power of two"),
        ({"ch": 48}, "multiple of 32"),
    ],
)
def test_arguments_it_cannot_have_are_named(arguments: dict, sentence: str, file) -> None:
    with pytest.raises(LexelError, match=sentence):
        load_published("emu3-vision-tokenizer", file[0], arguments)


def test_dropout_works_in_training_only() -> None:
    model, picture = random_model(small(dropout=0.5)), pixels(1, 3, 8, 8)
    plain = random_model(small())
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(picture).reconstruction, plain(picture).reconstruction)
    model.train()
    assert not torch.allclose(model(picture).latents, model(picture).latents)


def test_lexel_folder_round_trip(tmp_path: Path) -> None:
    model = random_model(small())
    model.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).fingerprint() == model.fingerprint()


def test_the_recipe_has_the_published_sizes() -> None:
    with initialize_config_module("lexel.conf", version_base=None):
        node = compose("train", ["experiment=emu3", "data.root=x", "data.size=720"]).tokenizer
    system, row = find_published("emu3-vision-tokenizer")
    assert instantiate(node, _convert_="all") == system.config(row.arguments)


def test_gradients_pass_straight_through_the_codes() -> None:
    model = random_model(small()).train()
    output = model(pixels(2, 3, 8, 8))
    output.latents.retain_grad()
    output.quantizer.quantized.retain_grad()
    output.reconstruction.sum().backward()
    torch.testing.assert_close(output.latents.grad, output.quantizer.quantized.grad)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 4, 3, 4, 4)])
def test_it_overfits_one_batch_and_every_parameter_learns(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network, batch = small(frames_per_code=2).build(), pixels(*shape)
    objective = TokenizerObjectiveConfig(l2=1.0, unrounded_steps=10).build()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    errors = []
    for step in range(40):
        output = network(batch, quantize=objective.rounds(step))
        loss, metrics = objective.generator_loss(output, batch, step, network.last_layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(metrics["l2"]))
    assert errors[-1] < 0.4 * errors[0]
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
