"""Chameleon's VQGAN: its own loaders, the file without decoder, transformers' class, training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor

import lexel.train.cli  # noqa: F401  (registers the schema)
from lexel.errors import LexelError
from lexel.tokenizers import export_published, find_published, from_pretrained, load_published
from lexel.tokenizers.chameleon import ChameleonConfig
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.vq import JANUS_TRANSFORMERS
from lexel.train.objectives.tokenizer import TokenizerObjectiveConfig
from lexel.types import Codes
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def file(tmp_path: Path):
    """(path, arguments) of the fixture's vqgan.ckpt."""
    fixture = Fixture(GOLDEN / "chameleon_vq", tmp_path)
    return fixture.weights(), fixture.config["vqgan_params"]


def encoder_file(path: Path, prefix: str) -> Path:
    """The same weights as transformers keeps them, beside those of a language model."""
    state = torch.load(path, weights_only=True)["state_dict"]
    kept = {prefix + name: value for name, value in state.items() if not name.startswith("decoder.")}
    other = {"model.layers.0.weight": torch.zeros(2)} if prefix else {}
    torch.save({**kept, **other}, path.with_name("hf.bin"))
    return path.with_name("hf.bin")


def test_training_only_keys_are_ignored(file) -> None:
    path, arguments = file
    content = torch.load(path, weights_only=True)
    wanted = load_published("chameleon-vq", path, arguments).fingerprint()
    content["state_dict"] |= {
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1),
        "loss.discriminator.main.0.weight": torch.zeros(1),
    }
    torch.save(content, path)
    assert load_published("chameleon-vq", path, arguments).fingerprint() == wanted
    content["state_dict"]["surprise"] = torch.zeros(1)
    torch.save(content, path)
    with pytest.raises(LexelError, match="unknown surprise"):
        load_published("chameleon-vq", path, arguments)


@pytest.mark.parametrize("prefix", ["model.vqmodel.", ""])
def test_transformers_files_encode_but_cannot_draw(file, prefix: str, tmp_path: Path) -> None:
    path, arguments = file
    whole = load_published("chameleon-vq", path, arguments)
    half = load_published("chameleon-vq", encoder_file(path, prefix), arguments)
    pixels = torch.rand(2, 3, 16, 32) * 2 - 1
    codes = half.encode(pixels)
    assert torch.equal(codes.indices, whole.encode(pixels).indices)
    assert whole.has_decoder
    assert not half.has_decoder
    for call in (lambda: half.decode(codes), lambda: half(pixels)):
        with pytest.raises(LexelError, match=r"no decoder.*vqgan\.ckpt"):
            call()
    with pytest.raises(LexelError, match="no decoder"):
        export_published(half, "chameleon-vq", tmp_path / "out.ckpt")
    half.save_pretrained(tmp_path / "half")
    again = from_pretrained(tmp_path / "half")
    assert not again.has_decoder
    assert again.fingerprint() == half.fingerprint()


def test_a_file_with_half_a_decoder_is_refused(file) -> None:
    path, arguments = file
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["decoder.conv_out.bias"]
    torch.save(content, path)
    with pytest.raises(LexelError, match=r"missing decoder\.conv_out\.bias"):
        load_published("chameleon-vq", path, arguments)


@pytest.mark.parametrize(
    "changes", [{}, {"attn_resolutions": [16], "num_res_blocks": 2, "ch_mult": [2, 1, 3]}]
)
def test_transformers_class_gives_the_same_codes(changes: dict) -> None:
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

    torch.manual_seed(0)
    reference = ChameleonVQVAE(
        ChameleonVQVAEConfig(
            embed_dim=8,
            num_embeddings=50,
            latent_channels=16,
            resolution=32,
            base_channels=32,
            channel_multiplier=changes.get("ch_mult", [1, 2]),
            num_res_blocks=changes.get("num_res_blocks", 1),
            attn_resolutions=changes.get("attn_resolutions"),
        )
    )
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():  # codes among the latents, so that all are used
        latents = reference.quant_conv(reference.encoder(pixels)).movedim(1, -1).reshape(-1, 8)
        reference.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:50]])
    config = ChameleonConfig(
        image_size=32,
        channels=32,
        channel_mult=changes.get("ch_mult", (1, 2)),
        res_blocks=changes.get("num_res_blocks", 1),
        z_channels=16,
        embed_dim=8,
        attn_resolutions=changes.get("attn_resolutions", ()),
        quantizer=QuantizerConfig("learned", codebook_size=50, cosine=False, entropy=0.0),
        decoder=False,
    )
    ours = config.build().eval()
    ours.load_state_dict(reference.state_dict())
    with torch.no_grad():
        output = reference.encode(pixels)
        torch.testing.assert_close(ours.encoder(pixels), output.last_hidden_state, rtol=1e-4, atol=1e-5)
    codes = ours.encode(pixels)
    assert torch.equal(codes.indices.flatten(), output.image_tokens.flatten())
    assert len(codes.indices.unique()) > 20


def test_janus_in_transformers_draws_the_same_but_encodes_otherwise(tmp_path: Path) -> None:
    """Its class normalises neither latents nor codes when it encodes; the published tokenizer does."""
    from transformers import JanusVQVAE, JanusVQVAEConfig

    fixture = Fixture(GOLDEN / "janus_vq", tmp_path)
    arguments = fixture.config["reference_args"]
    ours = load_published("janus-vq-16", fixture.weights(), arguments)
    side = ours.encode(fixture.input("image")).grid[0]
    reference = JanusVQVAE(
        JanusVQVAEConfig(
            embed_dim=arguments["codebook_embed_dim"],
            num_embeddings=arguments["codebook_size"],
            latent_channels=arguments["z_channels"],
            base_channels=arguments["ch"],
            channel_multiplier=arguments["encoder_ch_mult"],
            num_res_blocks=arguments["num_res_blocks"],
            num_patches=side,
        )
    ).eval()
    exported = JANUS_TRANSFORMERS.export(ours)
    reference.load_state_dict({name.removeprefix("model.vqmodel."): v for name, v in exported.items()})
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(arguments["codebook_size"], (2, side**2), generator=generator)
    with torch.no_grad():
        drawn = reference.decode(indices)
        other = reference.encode(fixture.input("image")).image_tokens
    torch.testing.assert_close(
        ours.decode(Codes(indices[..., None], (side, side))), drawn, rtol=1e-4, atol=1e-5
    )
    assert not torch.equal(other.flatten(), ours.encode(fixture.input("image")).indices.flatten())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ddconfig": {"chh": 3}}, "ddconfig has no chh"),
        ({"ddconfig": {"double_z": True}}, "double_z can only be False"),
        ({"ddconfig": {"in_channels": 1}}, "in_channels can only be 3"),
        ({"ddconfig": {"resolution": 500}}, "no multiple of the downsampling 16"),
        ({"n_embed": 1}, "codebook_size must be at least 2"),
    ],
)
def test_arguments_it_cannot_have_are_named(arguments: dict, sentence: str, file) -> None:
    with pytest.raises(LexelError, match=sentence):
        load_published("chameleon-vq", file[0], arguments)


def test_part_of_ddconfig_is_enough() -> None:
    system, row = find_published("chameleon-vq")
    config = system.config(row.arguments, {"ddconfig": {"resolution": 256}})
    assert (config.image_size, config.channels, config.grid) == (256, 128, (16, 16))


def test_the_recipe_has_the_published_sizes() -> None:
    with initialize_config_module("lexel.conf", version_base=None):
        node = compose("train", ["experiment=chameleon", "data.root=x"]).tokenizer
    system, row = find_published("chameleon-vq")
    assert instantiate(node, _convert_="all") == system.config(row.arguments)


def test_it_overfits_one_batch_and_every_parameter_learns() -> None:
    torch.manual_seed(0)
    config = ChameleonConfig(
        image_size=16,
        channels=16,
        channel_mult=(1, 2),
        res_blocks=1,
        z_channels=16,
        embed_dim=8,
        attn_resolutions=(8,),
        quantizer=QuantizerConfig("learned", codebook_size=64, cosine=False, entropy=0.0),
    )
    first, last, without = overfit(config.build(), torch.rand(2, 3, 16, 16) * 2 - 1)
    assert last < 0.2 * first
    assert without == []


def overfit(network, pixels: Tensor, steps: int = 80) -> tuple[float, float, list[str]]:
    """Squared error before and after some steps on one batch, and the parameters without gradient."""
    objective = TokenizerObjectiveConfig(l2=1.0, unrounded_steps=10).build()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    errors = []
    for step in range(steps):
        output = network(pixels, quantize=objective.rounds(step))
        loss, metrics = objective.generator_loss(output, pixels, step, network.last_layer)
        optimizer.zero_grad()
        loss.backward()
        if step == steps - 1:
            without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
        optimizer.step()
        errors.append(float(metrics["l2"]))
    return errors[0], errors[-1], without
