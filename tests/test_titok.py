"""TiTok and its kin: reading the published configs, what each form can and cannot do, MaskGIT-VQGAN's quirks,
and the published trainings at debug size."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import lexel.train.cli  # noqa: F401  (registers the schema)
from lexel.data.sampler import Draw
from lexel.errors import LexelError
from lexel.models.blur_discriminator import Blur, BlurDiscriminatorConfig
from lexel.tokenizers import find_published, from_pretrained, load_published
from lexel.tokenizers.maskgit_vqgan import MaskGITConfig, MaskGITVQGAN, ResidualBlock
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.titok import TextGuidance, TiTok, TiTokConfig, TiTokVAE, TiTokVAEConfig
from lexel.train.batches import Batches
from lexel.train.cli import resolve
from lexel.train.fit import fit
from lexel.train.objectives.perceptual import LogitDistance, PerceptualConfig
from lexel.train.objectives.titok import ProxyObjective, ProxyObjectiveConfig
from lexel.train.settings import LoggerSettings, Run, TrainerSettings
from lexel.train.tokenizer_module import TokenizerModule, freeze
from lexel.types import Codes
from lexel.verify import verify
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden"
PROXY = MaskGITConfig(
    image_size=16, channels=8, channel_mult=(1, 2, 2), res_blocks=1, z_channels=8,
    quantizer=QuantizerConfig("learned", codebook_size=16, cosine=False, entropy=0.0),
)  # fmt: skip
SMALL: dict[str, Any] = {
    "image_size": 16, "patch": 4, "latents": 6, "width": 32, "layers": 2, "heads": 2, "token_size": 4,
}  # fmt: skip


def make(config: Any) -> Any:
    torch.manual_seed(0)
    return config.build().eval()


def pictures(count: int = 2, seed: int = 1) -> Tensor:
    """Smooth pictures that differ, ``[count, 3, 16, 16]``."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 3, generator=generator) * 1.8 - 0.9
    return nn.functional.interpolate(coarse, (16, 16), mode="bilinear")


# The reference's config


def hub_folder(fixture: str, target: Path, **changes: Any) -> Path:
    """A fixture as a hub repository lays it out."""
    given = Fixture(GOLDEN / fixture, target)
    weights = given.weights()
    state = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True)
    weights.unlink()
    save_file(state, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({**given.config, **changes}))
    return target


def test_a_hub_folder_is_read_by_its_own_config(tmp_path: Path) -> None:
    config = {"optimizer": {"_target_": "os.system"}, "losses": {"discriminator_start": 20000}}
    model = load_published("titok-l-32", hub_folder("titok", tmp_path, **config))
    assert isinstance(model, TiTok)
    assert (model.config.latents, model.config.width, model.config.proxy is not None) == (16, 48, True)
    # What is given by hand comes last, nested or flat.
    with pytest.raises(LexelError, match=r"latent_tokens is \[16, 48\], expected \[17, 48\]"):
        load_published("titok-l-32", tmp_path, {"num_latent_tokens": 17})


def test_every_form_is_chosen_by_its_config(tmp_path: Path) -> None:
    kinds = {
        "titok/vae": "titok-s-128",
        "titok/direct_rgb": "titok-ll-32-vae",
        "one_d_piece": "one-d-piece-l-256",
    }
    found = {}
    for fixture, row in kinds.items():
        folder = tmp_path / row
        folder.mkdir()
        found[fixture] = load_published(row, hub_folder(fixture, folder))
    assert isinstance(found["titok/vae"], TiTokVAE)
    assert cast(TiTok, found["titok/direct_rgb"]).config.proxy is None
    assert found["one_d_piece"].layout.flexible
    assert not found["titok/direct_rgb"].layout.flexible


def test_a_silent_config_means_legacy_codes_with_a_pixel_decoder() -> None:
    system, row = find_published("titok-bl-64-vae")
    config = system.config(row.arguments, {"model": {"vq_model": {"token_size": 12}}})
    assert isinstance(config, TiTokConfig)
    assert config.proxy == MaskGITConfig()
    assert config.pixel_decoder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": {"vq_model": {"use_l2_nrom": True}}}, "no argument use_l2_nrom"),
        ({"vit_enc_model_size": "huge"}, "vit_enc_model_size must be one of small, base, large"),
        ({"is_legacy": False}, "finetune_decoder needs is_legacy"),
        ({"quantize_mode": "fsq"}, "vq or vae"),
        ({"model": 3}, "no config of the reference's"),
        ({"vit_dec_patch_size": 8}, "cells are 16 pixels wide, the decoder's patches 8"),
        ({"pixel_decoder": {"num_resolutions": 4}}, "num_resolutions 4 with 5"),
        ({"proxy_codebook": {"embedding_dim": 8}}, "embedding_dim 8 is not z_channels 256"),
    ],
)
def test_configs_that_contradict_themselves_are_one_sentence(config, message: str) -> None:
    system, row = find_published("titok-s-128")
    with pytest.raises(LexelError, match=message):
        system.config(row.arguments, config)


def test_a_hub_folder_with_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(LexelError, match="no config of the reference's"):
        load_published("titok-s-128", tmp_path)


def test_usage_statistics_of_trainings_are_left_aside(tmp_path: Path) -> None:
    folder = hub_folder("titok/tatitok", tmp_path)
    state = load_file(folder / "model.safetensors")
    plain = load_published("tatitok-bl-64-vq", folder).fingerprint()
    save_file({**state, "quantize.embed_prob": torch.ones(70)}, folder / "model.safetensors")
    assert load_published("tatitok-bl-64-vq", folder, {"clustering_vq": True}).fingerprint() == plain


# Stages and forms


def test_a_first_stage_file_encodes_but_does_not_draw(tmp_path: Path) -> None:
    folder = hub_folder("titok", tmp_path)
    whole = cast(TiTok, load_published("titok-s-128", folder))
    state = load_file(folder / "model.safetensors")
    first = {key: value for key, value in state.items() if not key.startswith("pixel_")}
    save_file(first, folder / "weights.safetensors")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["model"]["vq_model"]["finetune_decoder"] = False
    (folder / "config.json").write_text(json.dumps(config))
    model = cast(TiTok, load_published("titok-s-128", folder))
    x = torch.rand(1, 3, 32, 32)
    codes = model.encode(x)
    assert torch.equal(codes.indices, whole.encode(x).indices)
    assert not model.has_decoder
    for draw in (lambda: model.decode(codes), lambda: model(x)):
        with pytest.raises(ValueError, match="it cannot draw"):
            draw()
    # The reference then returns the logits as its reconstruction.
    logits = model.predict_proxy(x).logits.detach().contiguous()
    save_file({"image": (x + 1) / 2, "recon": logits}, folder / "io.safetensors")
    report = verify("titok", folder)
    assert report.passed, report.table()


def test_legacy_prefixes_decode_as_if_they_were_all_there_is(tmp_path: Path) -> None:
    model = load_published("one-d-piece-s-256", hub_folder("one_d_piece", tmp_path))
    codes = model.encode(pictures())
    mixed = model.decode(Codes(codes.indices, lengths=torch.tensor([2, 17])))
    for row, length in enumerate((2, 17)):
        alone = model.decode(Codes(codes.indices[row : row + 1, :length]))
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed[0], model.decode(codes)[0], atol=0.1)


def test_tail_drop_cuts_after_the_quantizer_and_in_training_only() -> None:
    model = make(TiTokConfig(**SMALL, proxy=PROXY, tail_drop="batch"))
    seen = []
    model.decoder.decoder_embed.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    quantized = []
    model.quantize.register_forward_hook(lambda _, inputs, __: quantized.append(inputs[0].shape[1]))
    model(pictures())
    model.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        model.predict_proxy(pictures(), generator=generator)
    assert seen[0] == 6
    assert len(set(seen[1:])) > 3
    assert set(quantized) == {6}


def test_the_vae_makes_latents_and_says_so(tmp_path: Path) -> None:
    model = make(TiTokVAEConfig(**SMALL))
    x = pictures()
    mean = model.encode_latents(x)
    assert mean.shape == (2, 6, 4)
    torch.testing.assert_close(model.decode_latents(mean), model(x).reconstruction)
    draws = torch.stack([model.encode_latents(x, sample=True) for _ in range(400)])
    logvar = model.moments(x)[1].detach()
    assert (draws.var(0) / logvar.exp()).mean() == pytest.approx(1, abs=0.05)
    assert ((draws.mean(0) - mean) / (logvar / 2).exp()).abs().max() < 5 / 400**0.5
    same = [
        model.encode_latents(x, sample=True, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    ]
    assert torch.equal(*same)
    for use in (lambda: model.encode(x), lambda: model.decode(mean), lambda: model.layout):
        with pytest.raises(LexelError, match="encode_latents"):
            use()
    with pytest.raises(ValueError, match=r"pictures must be \(16, 16\)"):
        model.encode_latents(torch.zeros(1, 3, 8, 8))
    model.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).fingerprint() == model.fingerprint()


def test_the_vae_clamps_its_log_variance() -> None:
    model = make(TiTokVAEConfig(**SMALL))
    with torch.no_grad():
        model.encoder.conv_out.bias[:4] = 100
        model.encoder.conv_out.bias[4:] = torch.tensor([100, 100, -100, -100])
    mean, logvar = model.moments(pictures())
    assert logvar.unique().tolist() == [-30, 20]
    assert mean.max() > 50


def test_text_states_are_required_where_they_are_read_and_refused_elsewhere() -> None:
    model = make(TiTokConfig(**SMALL, text=TextGuidance(3, 5)))
    codes, text = model.encode(pictures()), torch.randn(2, 3, 5)
    assert not torch.allclose(model.decode(codes, text), model.decode(codes, -text), atol=1e-3)
    torch.testing.assert_close(model(pictures(), text=text).reconstruction, model.decode(codes, text))
    with pytest.raises(ValueError, match=r"\[2, 3, 5\], none were given"):
        model.decode(codes)
    with pytest.raises(ValueError, match=r"got \[2, 2, 5\]"):
        model.decode(codes, text[:, :2])
    with pytest.raises(ValueError, match="reads no text"):
        make(TiTokConfig(**SMALL)).decode(codes, text)


def test_lengths_and_text_go_together() -> None:
    model = make(TiTokConfig(**SMALL, text=TextGuidance(3, 5), tail_drop="batch"))
    codes, text = model.encode(pictures()), torch.randn(2, 3, 5)
    mixed = model.decode(Codes(codes.indices, lengths=torch.tensor([2, 5])), text)
    alone = model.decode(Codes(codes.indices[:1, :2]), text[:1])
    torch.testing.assert_close(mixed[:1], alone, rtol=1e-4, atol=1e-5)


def test_captions_become_states_of_the_whole_context(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    end = "<|endoftext|>"
    vocabulary = ["!", "a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", end]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=6, eos_token_id=7, bos_token_id=6,
    )  # fmt: skip
    tower = CLIPTextModel(config).eval()
    tower.save_pretrained(tmp_path)
    text = TextGuidance(6, 16, str(tmp_path)).load()
    states = text(["ab", "a b a b a b a b"])
    ids = torch.tensor([[6, 5, 7, 0, 0, 0], [6, 3, 4, 3, 4, 7]])  # padded with 0, cut before the end token
    with torch.no_grad():
        torch.testing.assert_close(states, tower(input_ids=ids).last_hidden_state)
    with pytest.raises(LexelError, match="cannot be loaded"):
        TextGuidance(tower=str(tmp_path / "missing")).load()


# MaskGIT-VQGAN


def test_blocks_that_change_the_width_do_not_add_their_input() -> None:
    torch.manual_seed(0)
    block, x = ResidualBlock(8, 16, 0.0), torch.randn(1, 8, 4, 4)
    nn.init.zeros_(block.conv2.weight)
    assert not block(x).any()
    same = ResidualBlock(8, 8, 0.0)
    nn.init.zeros_(same.conv2.weight)
    assert torch.equal(same(x), x)


def test_the_proxy_takes_pictures_of_any_shape() -> None:
    model = make(PROXY)
    codes = model.encode(torch.rand(1, 3, 8, 24))
    assert codes.grid == (2, 6)
    assert model.decode(codes).shape == (1, 3, 8, 24)
    with pytest.raises(ValueError, match="multiples of 4"):
        model.encode(torch.rand(1, 3, 9, 8))


# The discriminator and the classifier


def test_the_blur_halves_and_keeps_constants_inside() -> None:
    blur = Blur()
    assert [blur(torch.ones(1, 2, side, 8)).shape[2:] for side in (8, 7)] == [(4, 4), (4, 4)]
    assert torch.allclose(blur(torch.ones(1, 2, 8, 8))[:, :, 1:-1, 1:-1], torch.ones(1))
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    torch.testing.assert_close(blur(ramp)[0, 0, 1, 1:3], torch.tensor([2.5, 4.5]))


def test_the_discriminator_judges_a_fixed_grid() -> None:
    discriminator = BlurDiscriminatorConfig(4, 2, 3).build()
    assert discriminator(torch.zeros(2, 3, 16, 24)).shape == (2, 1, 3, 3)
    with torch.device("meta"):
        full = BlurDiscriminatorConfig().build()
    assert full.blocks[-1][0].out_channels == 1024
    with pytest.raises(ValueError, match="positive"):
        BlurDiscriminatorConfig(stages=0)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny ConvNeXt."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = ConvNextConfig(patch_size=32, hidden_sizes=[8], depths=[1], num_stages=1, num_labels=5)
    network = ConvNextForImageClassification(config)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    return str(folder)


def test_logit_distance_is_zero_for_equal_pictures_and_learns(classifier: str) -> None:
    distance = LogitDistance(classifier)
    x, y = pictures(2), pictures(2, seed=2).requires_grad_(True)
    assert distance(x, x).item() == 0
    value = distance(y, x)
    value.backward()
    assert value > 0
    assert y.grad is not None
    assert y.grad.any()
    mixed = PerceptualConfig("random", classifier=classifier, classifier_weight=0.1).build()
    alone = PerceptualConfig("random").build()
    torch.testing.assert_close(mixed(y, x), alone(y, x) + 0.1 * value)
    with pytest.raises(LexelError, match="cannot be loaded"):
        LogitDistance("/nowhere")
    with pytest.raises(ValueError, match="nothing to compare"):
        PerceptualConfig("none")


# Trainings


class Pictures(Dataset[Tensor]):
    """Two fixed pictures."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, draw: Draw) -> Tensor:
        return pictures()[draw.index]


DEBUG = {
    "data.root": "unused", "data.size": 16, "trainer": "cpu", "stages.tokenizer.batch_size": 2,
    "stages.tokenizer.warmup": 0, "stages.tokenizer.schedule": "constant",
    "stages.tokenizer.schedule_args": "{}",
    "stages.tokenizer.lr": 3e-3, "stages.tokenizer.ema": 0, "stages.tokenizer.precision": "32-true",
    "stages.tokenizer.validate_every": 0, "stages.tokenizer.sample_every": 0,
    "stages.tokenizer.checkpoint_every": 0, "quantizer.codebook_size": 16, "tokenizer.patch": 4,
    "tokenizer.latents": 6, "tokenizer.width": 32, "tokenizer.layers": 2, "tokenizer.heads": 2,
}  # fmt: skip
LEGACY = {
    "tokenizer.proxy.channels": 8, "tokenizer.proxy.channel_mult": "[1,2,2]", "tokenizer.proxy.res_blocks": 1,
    "tokenizer.proxy.z_channels": 8, "tokenizer.proxy.quantizer.codebook_size": 16,
}  # fmt: skip
DIRECT = {"tokenizer.decoder_width": 0, "tokenizer.decoder_layers": 0, "tokenizer.decoder_heads": 0}
ADVERSARIAL = {
    "objective.tokenizer.adversarial_start": 5, "objective.tokenizer.discriminator.channels": 8,
    "objective.tokenizer.discriminator.stages": 2, "objective.tokenizer.discriminator.grid": 4,
    "objective.tokenizer.features.features": "random",
}  # fmt: skip


def settings(experiment: str, **overrides: Any) -> Run:
    """A published experiment at debug size."""
    choices = {"experiment": experiment, **DEBUG, **overrides}
    with initialize_config_module("lexel.conf", version_base="1.3"):
        return resolve(compose("train", overrides=[f"{key}={value}" for key, value in choices.items()]))


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a VQGAN trained for a moment on the pictures, whose codes are then worth predicting."""
    folder = tmp_path_factory.mktemp("proxy")
    torch.manual_seed(0)
    model = PROXY.build().train()
    nn.init.normal_(model.quantize.embedding.weight)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        output = model(pictures())
        error = (output.reconstruction - pictures()).pow(2).mean()
        optimizer.zero_grad()
        (error + sum(output.quantizer.losses.values())).backward()
        optimizer.step()
        losses.append(error.item())
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5]), losses
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert model.encode(pictures()).indices.unique().numel() > 3
    model.save_pretrained(folder)
    return folder


def trained(
    run: Run, folder: Path, steps: int, init: nn.Module | None = None
) -> tuple[TiTok, list[dict[str, Any]]]:
    """The tokenizer after `steps` steps on one batch, and the metrics of every step. Checks that gradients
    reach exactly what is to learn."""
    stage = run.stages.tokenizer
    stage.steps = steps
    torch.manual_seed(0)
    network = run.tokenizer.build()
    if init is not None:
        network.load_state_dict(init.state_dict())
    module = TokenizerModule(network, run.objective["tokenizer"].build(), stage)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    collected: list[dict[str, Any]] = []

    def collect(metrics: Any) -> None:
        if "loss" in metrics:  # not the callbacks' own
            collected.append({key: float(value) for key, value in metrics.items()})

    module.collect = collect  # type: ignore[method-assign]
    fit(
        "tokenizer",
        module,
        Batches(Pictures(), None, torch.stack, stage),
        folder,
        TrainerSettings(),
        LoggerSettings(),
    )
    learns = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    moved = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == learns
    return network, collected


@pytest.fixture(scope="module")
def first(proxy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TiTok, list[dict[str, Any]]]:
    """TiTok after its first stage."""
    folder = tmp_path_factory.mktemp("stage1")
    run = settings("titok_stage1", **LEGACY, **{"objective.tokenizer.proxy": proxy})
    return trained(run, folder, 90)


def test_the_first_stage_learns_the_proxys_codes(first, proxy: Path) -> None:
    model, metrics = first
    assert metrics[-1]["cross_entropy"] < 0.3 * metrics[0]["cross_entropy"]
    assert metrics[-1]["accuracy"] > 0.9
    # And so it draws what the proxy draws.
    teacher, x = cast(MaskGITVQGAN, from_pretrained(proxy)), pictures()
    model.eval()
    drawn, target = model.decode(model.encode(x)), teacher.decode(teacher.encode(x))
    assert (drawn - target).pow(2).mean() < 0.2 * target.var()
    assert not {name for name, p in model.named_parameters() if not p.requires_grad and "pixel_" not in name}


def test_the_second_stage_learns_the_picture_with_the_encoder_at_rest(
    first, tmp_path: Path, classifier: str
) -> None:
    run = settings(
        "titok_stage2", **LEGACY, **ADVERSARIAL, **{"objective.tokenizer.features.classifier": classifier}
    )
    start = copy.deepcopy(first[0])
    nn.init.normal_(
        start.pixel_decoder.conv_out.weight, std=0.2
    )  # the proxy's decoder is too good to show it
    model, metrics = trained(run, tmp_path, 40, init=start)
    assert metrics[-1]["l2"] < 0.2 * metrics[0]["l2"]
    assert metrics[-1]["discriminator"] > 0
    rests = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert rests == {"encoder", "latent_tokens", "quantize"}


def test_one_stage_learns_the_picture_directly(tmp_path: Path, classifier: str) -> None:
    run = settings(
        "titok_direct",
        **DIRECT,
        **ADVERSARIAL,
        **{"objective.tokenizer.features.classifier": classifier, "tokenizer.token_size": 4},
    )
    _, metrics = trained(run, tmp_path, 50)
    assert metrics[-1]["l2"] < 0.25 * metrics[0]["l2"]
    assert metrics[-1]["lecam"] >= 0


def test_one_d_piece_learns_with_any_number_of_codes(proxy: Path, tmp_path: Path) -> None:
    run = settings("one_d_piece", **LEGACY, **{"objective.tokenizer.proxy": proxy})
    assert run.tokenizer.tail_drop == "batch"
    model, metrics = trained(run, tmp_path, 70)
    last = sum(one["cross_entropy"] for one in metrics[-20:]) / 20
    assert last < 0.5 * metrics[0]["cross_entropy"]
    model.eval()
    second = settings("titok_stage2", **LEGACY, **ADVERSARIAL, **{"tokenizer.tail_drop": "batch"})
    second.objective["tokenizer"] = type(second.objective["tokenizer"])(l2=1.0, quantizer=0.0)
    painted, metrics = trained(second, tmp_path / "second", 15, init=model)
    assert metrics[-1]["l2"] < metrics[0]["l2"]
    assert painted.eval().encode(pictures(), length=3).lengths.tolist() == [3, 3]


def test_a_tokenizer_without_the_proxys_place_is_refused(proxy: Path, tmp_path: Path) -> None:
    objective = ProxyObjectiveConfig(str(proxy)).build()
    with pytest.raises(LexelError, match="tokenizer=titok"):
        objective.prepare(make(TiTokConfig(**SMALL)))
    other = MaskGITConfig(**{**vars(PROXY), "z_channels": 4})
    with pytest.raises(LexelError, match=r"embedding.weight is \[16, 8\], expected \[16, 4\]"):
        objective.prepare(make(TiTokConfig(**SMALL, proxy=other)))
    make(TiTokConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(LexelError, match="must be a MaskGIT-VQGAN"):
        ProxyObjectiveConfig(str(tmp_path)).build()
    assert not list(objective.parameters())
    assert isinstance(objective, ProxyObjective)


def test_unknown_parts_cannot_rest() -> None:
    with pytest.raises(LexelError, match=r"\['encodr'\].*encoder, decoder"):
        freeze(make(TiTokConfig(**SMALL)), ["encodr"])


def test_a_copy_of_a_fixture_elsewhere_needs_no_folder_name(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "titok" / "tatitok", tmp_path / "anything")
    assert verify("titok", tmp_path / "anything").passed
