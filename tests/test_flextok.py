"""FlexTok: published configs, masking, sampling, training, at debug size."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lexel import tokenizers
from lexel.errors import LexelError
from lexel.tokenizers import load_published
from lexel.tokenizers.flextok import (
    APG,
    FLEXTOK,
    FlexTok,
    FlexTokConfig,
    HalfConfig,
    VAEConfig,
    causal_last,
    sincos,
)
from lexel.train.objectives.flextok import AlignmentConfig, FlowObjectiveConfig, sample_times
from lexel.train.settings import TokenizerStage
from lexel.train.stages import _fill_vae
from lexel.train.tokenizer_module import TokenizerModule
from lexel.types import Codes
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden" / "flextok"
ROW = "flextok-d18-d28-in1k"
HALF = HalfConfig(dim=32, depth=2, head_dim=16)
PIXELS = FlexTokConfig(
    image_size=16, vae=None, encoder=replace(HALF, patch=(4, 4)), decoder=replace(HALF, patch=(4, 4)),
    registers=6, levels=(5, 5, 5), frequencies=16, steps=3, guidance=3.0,
)  # fmt: skip
SMALL_VAE = VAEConfig(
    latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=0.5
)
LATENT = replace(PIXELS, vae=SMALL_VAE, encoder=HALF, decoder=HALF)


def awake(config: FlexTokConfig, seed: int = 0) -> FlexTok:
    """A tokenizer whose zero-initialised gates and heads are random: something reaches the output."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = config.build()
        for value in model.parameters():
            if value.requires_grad and not value.any():
                torch.nn.init.normal_(value, std=0.2)
    return model.eval()


def pictures(count: int = 3, h: int = 16, w: int = 16) -> Tensor:
    return torch.rand(count, 3, h, w, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module", params=["pixels", "vae"])
def model(request) -> FlexTok:
    return awake(PIXELS if request.param == "pixels" else LATENT)


# ---- published files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The fixture's weights and config sections."""
    fixture = Fixture(GOLDEN, tmp_path_factory.mktemp("weights"))
    return fixture.weights(), {k: v for k, v in fixture.config.items() if k in FLEXTOK.arguments}


def test_a_folders_own_config_is_used(published, tmp_path: Path) -> None:
    path, sections = published
    (tmp_path / "model.safetensors").write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**sections, "_run": {"steps": 4}}))
    loaded = load_published(ROW, tmp_path)
    assert loaded.fingerprint() == load_published(ROW, path, sections).fingerprint()
    assert loaded.config.vae.scaling_factor == sections["vae"]["scaling_factor"]
    assert loaded.image_size == (24, 24)


def test_a_files_own_header_is_used_and_never_run(published, tmp_path: Path) -> None:
    path, sections = published
    header = {name: str(value) for name, value in sections.items()} | {"format": "pt"}
    save_file(load_file(path), tmp_path / "one.safetensors", metadata=header)
    loaded = load_published(ROW, tmp_path / "one.safetensors")
    assert loaded.fingerprint() == load_published(ROW, path, sections).fingerprint()
    touched = tmp_path / "touched"
    hostile = header | {"vae": f"__import__('pathlib').Path({str(touched)!r}).touch()"}
    save_file(load_file(path), tmp_path / "two.safetensors", metadata=hostile)
    with pytest.raises(LexelError):
        load_published(ROW, tmp_path / "two.safetensors")
    assert not touched.exists()


@pytest.mark.parametrize(
    ("half", "module", "change", "message"),
    [
        ("encoder", "enc_seq_packer", {"mask_mode": "full"}, "enc_seq_packer.mask_mode is 'full'"),
        ("decoder", "dec_transformer", {"adaLN_expansion": 1}, "adaLN_expansion is 1"),
        ("decoder", "dec_to_patches", {"_target_": "os.system"}, "dec_to_patches._target_ is 'os.system'"),
        ("decoder", "dec_patches_posemb_module", {"posemb_scaling": "interpolate"}, "posemb_scaling"),
        ("encoder", "enc_transformer", {"dim": 65}, "multiple of 4"),
    ],
)
def test_a_config_of_another_network_is_refused(published, half, module, change, message) -> None:
    path, sections = published
    changed = copy.deepcopy(sections)
    changed[half]["module_dict"][module] |= change
    with pytest.raises(LexelError, match=message):
        load_published(ROW, path, changed)


def test_without_the_scaling_factor_no_picture_is_coded(published) -> None:
    path, sections = published
    loaded = load_published(ROW, path, {**sections, "vae": {**sections["vae"], "scaling_factor": None}})
    with pytest.raises(LexelError, match=r"scaling factor.*config\.json"):
        loaded.encode(torch.zeros(1, 3, 24, 24))


def test_the_computed_position_table_is_the_published_one() -> None:
    stored = load_file(GOLDEN / "explicit.safetensors")["encoder.module_dict.enc_posemb_module.posembs"]
    torch.testing.assert_close(sincos(*stored.shape[1:]), stored)
    assert sincos(8, 2, 3).shape == (1, 8, 2, 3)


@pytest.mark.parametrize("channels", [4, 8, 16])
def test_published_vaes_have_these_keys(channels: int) -> None:
    lists = json.loads((GOLDEN / "published_keys.json").read_text())
    expected = {key: tuple(shape) for key, shape in lists[f"flextok_vae_c{channels}"]["keys"]}
    with torch.device("meta"):
        state = VAEConfig(latent_channels=channels).build().state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


# ---- the laws --------------------------------------------------------------------------------------------


def test_codes_fit_the_layout_and_decode_to_the_picture_size(model: FlexTok) -> None:
    codes = model.encode(pictures())
    assert torch.equal(model.layout.unflatten(model.layout.flatten(codes)).indices, codes.indices)
    drawn = model.decode(codes)
    assert drawn.shape == pictures().shape
    assert torch.equal(drawn, model.decode(codes))
    torch.testing.assert_close(model(pictures()).reconstruction, drawn)


def test_a_row_of_a_batch_is_that_row_alone(model: FlexTok) -> None:
    codes = model.encode(pictures())
    mixed = Codes(codes.indices, lengths=torch.tensor([1, 4, 6]))
    together = model.decode(mixed)
    for row, length in enumerate((1, 4, 6)):
        assert torch.equal(model.encode(pictures()[row : row + 1]).indices[0], codes.indices[row])
        alone = model.decode(Codes(codes.indices[row : row + 1, :length]))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_what_is_cut_off_does_not_matter_and_what_is_kept_does(model: FlexTok) -> None:
    codes = model.encode(pictures(), length=3)
    other = codes.indices.clone()
    other[:, 3:] = 7
    torch.testing.assert_close(model.decode(codes), model.decode(Codes(other, lengths=codes.lengths)))
    other[:, 2] = (other[:, 2] + 1) % 125
    assert not torch.allclose(model.decode(codes), model.decode(Codes(other, lengths=codes.lengths)))


def test_a_register_does_not_see_later_ones(model: FlexTok) -> None:
    latents = model.latents(pictures())
    before = model.registers(latents)
    held = model.encoder.module_dict["enc_register_module"].registers
    with torch.no_grad():
        held[3] += 1
        after = model.registers(latents)
        held[3] -= 1
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])
    assert causal_last(2, 2, torch.device("cpu")).int().tolist() == [
        [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1],
    ]  # fmt: skip


def test_smaller_pictures_and_other_shapes_work_and_larger_ones_do_not(model: FlexTok) -> None:
    codes = model.encode(pictures(h=8, w=16))
    assert model.decode(codes, size=(8, 16)).shape == (3, 3, 8, 16)
    for size in ((16, 32), (6, 16)):
        with pytest.raises(ValueError, match="picture sides"):
            model.encode(pictures(1, *size))


def test_saving_and_loading_is_bit_exact(model: FlexTok, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = tokenizers.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.fingerprint() == model.fingerprint()


def test_the_posterior_can_be_sampled() -> None:
    model = awake(LATENT)
    mean, logvar = model.posterior(pictures())
    noise = torch.randn_like(mean)
    torch.testing.assert_close(
        model.latents(pictures(), noise), 0.5 * (mean + torch.exp(0.5 * logvar) * noise)
    )
    drawn = [model.encode(pictures(), generator=torch.Generator().manual_seed(s)).indices for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# ---- sampling --------------------------------------------------------------------------------------------


def guided(model: FlexTok, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return model.draw(model.encode(pictures()), generator=generator, **options)


def test_guidance_is_taken_from_the_velocities(model: FlexTok) -> None:
    codes, x = model.encode(pictures()), torch.randn(3, model.config.channels, *_latent(model))
    times = torch.ones(3)
    with torch.no_grad():
        given, free = model.velocity(x, times, codes), model.velocity(x, times, None)
    drawn = model.draw(codes, noise=x, steps=1, guider="cfg", guidance=2.5)
    torch.testing.assert_close(drawn, x - (free + 2.5 * (given - free)), rtol=1e-4, atol=1e-4)
    # One APG step by hand, picture by picture.
    drawn = model.draw(codes, noise=x, steps=1, guider="apg", guidance=2.5, apg=APG(threshold=0.1))
    for row in range(3):
        difference = (given - free)[row]
        difference = difference * min(1.0, 0.1 / float(difference.norm()))
        along = given[row] / given[row].norm()
        difference = difference - (difference * along).sum() * along
        torch.testing.assert_close(drawn[row], x[row] - (given[row] + 1.5 * difference), rtol=1e-4, atol=1e-4)


def _latent(model: FlexTok) -> tuple[int, int]:
    return (16 // model.config.downsampling,) * 2


def test_scales_may_follow_the_time_and_one_switches_off(model: FlexTok) -> None:
    plain = guided(model, guider="none", guidance=9.0)
    assert torch.equal(guided(model, guider="cfg", guidance=1.0), plain)
    torch.testing.assert_close(guided(model, guider="cfg", guidance=lambda t: 1.0), plain)
    seen: list[float] = []
    guided(model, guider="apg", steps=4, guidance=lambda t: seen.append(t) or 2.0)
    assert seen == pytest.approx([1.0, 0.75, 0.5, 0.25])
    with pytest.raises(ValueError, match="none, cfg, apg"):
        guided(model, guider="pag")
    with pytest.raises(ValueError, match="steps"):
        guided(model, steps=0)


def test_momentum_starts_anew_in_every_run(model: FlexTok) -> None:
    first = guided(model, guider="apg", guidance=3.0)
    assert torch.equal(first, guided(model, guider="apg", guidance=3.0))
    assert not torch.allclose(first, guided(model, guider="apg", guidance=3.0, apg=APG(momentum=0.0)))


# ---- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PIXELS, LATENT], ids=["pixels", "vae"])
def test_the_gradient_reaches_all_but_the_vae(config: FlexTokConfig) -> None:
    model = awake(replace(config, null_dropout=0.5)).train()
    torch.manual_seed(0)
    flow = model.flow(pictures(8), torch.rand(8))
    (flow.velocity - flow.target).square().mean().backward()
    silent = [
        k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert silent == []
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert all(
        k.startswith("vae.") or k.endswith(("enc_posemb_module.posembs", "dec_patches_posemb_module.posembs"))
        for k in frozen
    )
    assert any(k.startswith("vae.") for k in frozen) == (config.vae is not None)


def test_the_flow_runs_from_latents_to_noise() -> None:
    model = awake(LATENT)
    noise = torch.randn(3, 4, 8, 8)
    flow = model.flow(pictures(), torch.tensor([0.0, 0.5, 1.0]), noise=noise)
    torch.testing.assert_close(flow.target, noise - model.latents(pictures()))
    codes = model.encode(pictures())
    x = torch.stack([model.latents(pictures())[0], torch.zeros_like(noise[0]), noise[2]])
    x[1] = 0.5 * (noise[1] + model.latents(pictures())[1])
    with torch.no_grad():
        expected = model.velocity(x, torch.tensor([0.0, 0.5, 1.0]), codes)
    torch.testing.assert_close(flow.velocity, expected, rtol=1e-4, atol=1e-5)
    assert flow.codes.lengths.tolist() == [6, 6, 6]


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("uniform", [1 / 6] * 6),
        ("pow2", [1 / 3, 1 / 3, 0, 1 / 3, 0, 0]),
        ("uniform_pow2", [1 / 6, 1 / 6, 0, 2 / 6, 0, 2 / 6]),
    ],
)
def test_tail_drop_draws_the_published_distributions(kind: str, shares: list[float]) -> None:
    # Six counts out of 3000: each within four standard deviations.
    model = replace(PIXELS, tail_drop=kind).build().train()
    drawn = model._draw_lengths(3000, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=7)[1:].tolist()
    for count, share in zip(counts, shares):
        assert abs(count - 3000 * share) <= 4 * (3000 * share * (1 - share)) ** 0.5
    assert model.eval()._draw_lengths(3, None).tolist() == [6, 6, 6]


def test_null_dropout_has_its_share_and_rests_in_eval() -> None:
    model = replace(PIXELS, null_dropout=0.3).build().train()
    share = model._draw_null(2000, torch.Generator().manual_seed(0)).float().mean()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5
    assert not model.eval()._draw_null(100, None).any()


def test_times_follow_their_distributions() -> None:
    torch.manual_seed(0)
    like = torch.zeros(20000, 1)
    normal = sample_times("logit_normal", like).logit()
    assert abs(normal.mean()) < 0.03
    assert abs(normal.std() - 1) < 0.03
    assert abs(sample_times("uniform", like).var() - 1 / 12) < 0.003
    torch.manual_seed(0)
    plain = sample_times("mode", like)
    torch.manual_seed(0)
    bent = sample_times("mode", like, 1.29)
    torch.testing.assert_close(plain, 1 - _again(like))
    assert bent.min() >= 0
    assert bent.max() <= 1
    # SD3's mode sampling gathers times in the middle.
    assert (bent - 0.5).abs().mean() < (plain - 0.5).abs().mean()
    # Stratified: one time in every eighth of the normal distribution.
    shares = torch.special.ndtr(sample_times("stratified", torch.zeros(8, 1)).logit())
    assert (shares * 8).floor().tolist() == list(range(8))


def _again(like: Tensor) -> Tensor:
    torch.manual_seed(0)
    return torch.rand(len(like))


def test_overfits_one_batch_through_the_training_module() -> None:
    torch.manual_seed(0)
    half = HalfConfig(dim=32, depth=1, head_dim=16)
    config = replace(PIXELS, image_size=8, encoder=half, decoder=half, registers=3, feature_layer=0)
    module = TokenizerModule(config.build(), FlowObjectiveConfig().build(), TokenizerStage(ema=0.0))
    network: Any = module.network.train()
    x = torch.nn.functional.interpolate(pictures(2, 2, 2), scale_factor=4)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 5e-3)
    errors = []
    for _ in range(100):
        loss, metrics = module.compute(network, x.repeat(8, 1, 1, 1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        errors.append(float(metrics["flow"]))
    assert sum(errors[-10:]) < 0.2 * sum(errors[:5]) * 2
    network.eval()
    drawn = network.decode(network.encode(x), guider="none", steps=8)
    # Each code draws its own picture, not the mean of both.
    assert (drawn - x).square().mean() < 0.25 * (drawn.flip(0) - x).square().mean()


def test_the_objective_refuses_other_tokenizers() -> None:
    objective = FlowObjectiveConfig().build()
    with pytest.raises(LexelError, match="tokenizer=flextok"):
        objective.prepare(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="logit_normal"):
        FlowObjectiveConfig(times="cosine")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A tiny random DINOv2 on disk."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("teacher")
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    ).save_pretrained(folder)
    return str(folder)


def test_alignment_trains_its_projection_and_stays_out_of_the_checkpoint(teacher: str) -> None:
    term = AlignmentConfig(teacher, weight=0.5, size=28, hidden=8)
    objective = FlowObjectiveConfig(alignment=term).build()
    model = awake(LATENT).train()
    module = TokenizerModule(model, objective, TokenizerStage(ema=0.0))
    loss, metrics = module.compute(model, pictures())
    torch.testing.assert_close(loss.detach(), metrics["flow"] + 0.5 * metrics["alignment"])
    assert 0 < metrics["alignment"] < 2
    loss.backward()
    assert objective.alignment is not None
    assert all(p.grad is not None and p.grad.any() for p in objective.alignment.parameters())
    assert set(objective.state_dict()) == {
        f"alignment.head.{i}.{w}" for i in (0, 2, 4) for w in ("weight", "bias")
    }
    assert not any("alignment" in key for key in model.state_dict())
    aligned = objective.alignment._teacher[0](pictures())
    assert aligned.shape == (3, 16, 4, 4)


def test_the_vae_comes_from_a_diffusers_folder(tmp_path: Path) -> None:
    donor, stage = awake(LATENT, seed=1), TokenizerStage()
    donor.vae.vae.save_pretrained(tmp_path)
    model = awake(LATENT)
    with pytest.raises(LexelError, match=r"stages\.tokenizer\.vae"):
        _fill_vae(model, stage)
    stage.vae = str(tmp_path)
    _fill_vae(model, stage)
    assert torch.equal(model.latents(pictures()), donor.latents(pictures()))
    with pytest.raises(LexelError, match=r"tokenizer\.vae"):
        _fill_vae(awake(PIXELS), stage)
    other = awake(replace(LATENT, vae=replace(SMALL_VAE, latent_channels=8)))
    with pytest.raises(LexelError, match="is not this VAE"):
        other.load_vae(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 18}, "no multiple of the encoder's patches"),
        ({"tail_drop": "always"}, "uniform, pow2"),
        ({"guider": "pag"}, "none, cfg, apg"),
        ({"feature_layer": 2}, "none of the 2 decoder blocks"),
        ({"encoder": HalfConfig(dim=32, head_dim=16, patch=(4, 4), grid=(2, 2))}, "too small"),
    ],
)
def test_contradictory_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PIXELS, **change)
