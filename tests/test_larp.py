"""LARP: the published file with and without its prior, every variant of its arguments, drawn codes, shorter
clips; the prior on its own; the training recipe."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from lexel.cli import main
from lexel.data.clips import ClipsConfig
from lexel.data.example import stack_pixels
from lexel.data.media import read_clip
from lexel.errors import LexelError
from lexel.models.clip_discriminator import ClipDiscriminatorConfig
from lexel.tokenizers import export_published, find_published, from_pretrained, load_published
from lexel.tokenizers.larp import LARP, LARPConfig
from lexel.tokenizers.prior_loss import CodePrior, PriorConfig
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.quantizers.stochastic import Stochastic
from lexel.tokenizers.titok import TiTokConfig
from lexel.train.objectives.larp import LarpObjective, LarpObjectiveConfig, LarpOutput
from lexel.train.settings import TokenizerStage
from lexel.train.tokenizer_module import TokenizerModule
from lexel.types import Codes
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden" / "larp"
ROW = "larp-l-long"
QUANTIZER = QuantizerConfig("stochastic", codebook_size=32, temperature=0.03, entropy=0.0)
PRIOR = PriorConfig(width=16, layers=1, heads=2, max_length=8)
SMALL: dict[str, Any] = {
    "image_size": 8, "frames": 4, "patch": 4, "frame_patch": 2, "latents": 6, "width": 32, "layers": 1,
    "heads": 2, "latent_width": 4, "quantizer": QUANTIZER, "prior": PRIOR,
}  # fmt: skip


def small(**changes: Any) -> LARP:
    torch.manual_seed(0)
    return LARPConfig(**{**SMALL, **changes}).build()


def clips(count: int = 2, frames: int = 4, size: int = 8) -> Tensor:
    data = ClipsConfig(size=32, frames=frames, count=count).build("train")
    video = stack_pixels([data[i] for i in range(count)])
    return F.interpolate(video.flatten(0, 1), (size, size)).unflatten(0, (count, frames))


# The published file


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """(path, arguments) of the fixture's weights."""
    fixture = Fixture(GOLDEN, tmp_path)
    return fixture.weights(), find_published(ROW)[0].known(fixture.config)


def without_prior(path: Path) -> dict[str, Tensor]:
    return {name: value for name, value in load_file(path).items() if not name.startswith("prior_model.")}


def test_full_size_keys_are_consumed_with_and_without_the_prior() -> None:
    (listed,) = json.loads((GOLDEN / "published_keys.json").read_text()).values()
    keys = {name: tuple(shape) for name, shape in listed}
    system, row = find_published(ROW)
    for arguments, expected in (
        ({}, keys),
        ({"prior_name": "none"}, {k: v for k, v in keys.items() if not k.startswith("prior_model.")}),
    ):
        with torch.device("meta"):
            model = system.config(row.arguments, arguments).build()
        assert system.layouts[0].shapes(model) == expected


def test_a_file_without_the_prior_loads_and_is_written_again(file, tmp_path: Path) -> None:
    path, arguments = file
    whole = cast(LARP, load_published(ROW, path, arguments))
    save_file(without_prior(path), tmp_path / "bare.safetensors")
    bare = cast(LARP, load_published(ROW, tmp_path / "bare.safetensors", arguments))
    assert bare.prior_model is None
    assert whole.prior_model is not None
    video = clips(1, 8, 12)
    assert torch.equal(bare.encode_video(video).indices, whole.encode_video(video).indices)
    for model, expected in ((whole, load_file(path)), (bare, without_prior(path))):
        export_published(model, ROW, tmp_path / "out.safetensors")
        written = load_file(tmp_path / "out.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], value) for name, value in expected.items())


def test_a_hub_folder_is_read_by_its_own_config(file, tmp_path: Path) -> None:
    path, _ = file
    folder = tmp_path / "hub"
    folder.mkdir()
    config = json.loads((GOLDEN / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config["args"], "prior_tiny": config["prior_tiny"]}))
    save_file(load_file(path), folder / "model.safetensors")
    model = cast(LARP, load_published(ROW, folder))
    assert (model.config.latents, model.config.width) == (20, 64)
    model.save_pretrained(tmp_path / "lexel")
    assert from_pretrained(tmp_path / "lexel").fingerprint() == model.fingerprint()


VARIANTS: dict[str, dict[str, Any]] = {
    "frames one by one": {"temporal_patch_size": 1, "decoder_temporal_patch_size": 1},
    "all learned": {
        "learned_encoder_patch_pe": True,
        "learned_decoder_latent_pe": True,
        "learned_decoder_patch_query_embed": True,
    },
    "all typed": {
        "use_encoder_patch_token_type_embed": True,
        "use_encoder_latent_query_token_type_embed": True,
        "use_decoder_latent_token_type_embed": True,
    },
    "fixed queries": {
        "learned_encoder_latent_query_embed": False,
        "encoder_query_gaussian_init": False,
        "latent_pe_scale_factor": 100,
    },
    "narrow decoder": {"decoder_hidden_size": 32, "decoder_num_heads": 2, "decoder_depth": 1},
    "learned temperature": {"stochastic_temperature": -1.0},
    "nearest by distance": {"stochastic": False, "l2_normalized": False},
    **{f"norm {norm}": {"norm": norm} for norm in ("bn_bn", "bn_b", "ln_d", "ln_nd", "ln_d_na")},
    "no prior": {"prior_name": "none"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_codes_clips_and_survives_both_formats(name: str, tmp_path: Path) -> None:
    system, _ = find_published(ROW)
    arguments = {**Fixture(GOLDEN, tmp_path).config["args"], "prior_tiny": {"n_layer": 1, "n_head": 2}}
    arguments["prior_tiny"]["n_embd"] = 16
    config = system.config(arguments, VARIANTS[name])
    torch.manual_seed(0)
    model = config.build()
    torch.nn.init.normal_(model.decoder.linear.weight, std=0.1)
    model(clips(3, 8, 12))  # running statistics
    model.eval()
    video = clips(2, 8, 12)
    codes = model.encode_video(video)
    alone = model.encode_video(video[1:])
    assert torch.equal(alone.indices, codes.indices[1:])
    assert model.decode_video(codes).shape == video.shape
    half = model.encode_video(video[:, :4])
    assert half.indices.shape == codes.indices.shape
    assert model.decode_video(half).shape == video[:, :4].shape
    given = {**system.known(arguments), **VARIANTS[name]}
    export_published(model, ROW, tmp_path / "model.safetensors")
    assert load_published(ROW, tmp_path / "model.safetensors", given).fingerprint() == model.fingerprint()
    model.save_pretrained(tmp_path / "own")
    assert from_pretrained(tmp_path / "own").fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_patch_size": 4}, "decoder_patch_size must equal"),
        ({"patch_size": 7, "decoder_patch_size": 7}, "no multiple of patches"),
        ({"transformer_name": "transformer_encoder_fused"}, "transformer_name must be"),
        ({"regularizer": "skl"}, "regularizer must be vq"),
        ({"prior_name": "gptc-Q"}, "prior_model must be one of gptc-L"),
        ({"stochastic": True, "l2_normalized": False}, "stochastic needs cosine"),
        ({"norm": "bn"}, "norm must be one of"),
        ({"in_channels": 1}, "in_channels must be 3"),
        ({"learned_encoder_latent_query_embed": False}, "encoder_query_gaussian_init needs"),
        ({"prior_max_seq_len": 8}, "prior has 8 positions for 1024 codes"),
    ],
)
def test_arguments_that_cannot_be_are_one_sentence(changes, message: str) -> None:
    system, row = find_published(ROW)
    with pytest.raises(LexelError, match=message):
        system.config(row.arguments, changes)


# Codes


def test_codes_are_drawn_by_their_chances() -> None:
    model = small().eval()
    video = clips(1)
    quantize = cast(Stochastic, model.bottleneck.quantize)
    chances = quantize.chances(model.latents(video))[0, 0]
    # A temperature at which several rows are likely.
    quantize.temperature = 0.5
    flat = quantize.chances(model.latents(video))[0, 0]
    assert flat.max() < chances.max()
    generator = torch.Generator().manual_seed(1)
    drawn = model.draw(video.expand(512, -1, -1, -1, -1), generator).indices[:, 0, 0]
    found = torch.bincount(drawn, minlength=32) / 512
    assert (found - flat).abs().max() < 5 * (flat.max() * (1 - flat.max()) / 512).sqrt()
    again = model.draw(video.expand(512, -1, -1, -1, -1), torch.Generator().manual_seed(1))
    assert torch.equal(again.indices[:, 0, 0], drawn)
    assert model.encode_video(video).indices[0, 0, 0] == chances.argmax()


def test_a_network_in_training_draws_and_in_eval_mode_does_not() -> None:
    model = small()
    cast(Stochastic, model.bottleneck.quantize).temperature = 10.0
    video = clips(4)
    first, second = (
        model(video, generator=torch.Generator().manual_seed(seed)).codes.indices for seed in (0, 1)
    )
    assert not torch.equal(first, second)
    assert torch.equal(model(video, generator=torch.Generator().manual_seed(0)).codes.indices, first)
    model.eval()
    assert torch.equal(model(video).codes.indices, model.encode_video(video).indices)


def test_a_clip_has_a_length_and_a_picture_has_none() -> None:
    model = small().eval()
    codes = model.encode_video(clips(2, 2))
    assert codes.frames == 1
    assert model.decode_video(codes).shape == (2, 2, 3, 8, 8)
    for frames in (3, 6):
        with pytest.raises(ValueError, match=f"multiple of 2 frames, at most 4, got {frames}"):
            model.encode_video(clips(1, frames))
    with pytest.raises(ValueError, match="1 to 2 groups of frames"):
        model.decode_video(Codes(codes.indices, frames=3))
    with pytest.raises(ValueError, match=r"must be \(8, 8\)"):
        model.encode_video(clips(1, 4, 16))
    with pytest.raises(LexelError, match="use encode_video"):
        model.encode(clips(1)[:, 0])
    with pytest.raises(LexelError, match="decode_video"):
        model.decode(Codes(codes.indices))
    with pytest.raises(LexelError, match="not stochastic"):
        small(quantizer=QuantizerConfig("learned", codebook_size=8, entropy=0.0)).draw(clips(1))


def test_the_published_generator_draws_clips(file, tmp_path: Path) -> None:
    path, arguments = file
    scratch = tmp_path / "generator"
    scratch.mkdir()
    fixture = Fixture(GOLDEN.parent / "larp_ar", scratch)
    state = {name: x for name, x in load_file(fixture.weights()).items() if name.startswith("class_cond.")}
    save_file(
        {name.removeprefix("class_cond."): x for name, x in state.items()}, scratch / "model.safetensors"
    )
    (scratch / "lm.json").write_text(json.dumps(fixture.config["args"]))
    (scratch / "clips.json").write_text(json.dumps(arguments))
    files = ["--checkpoint", scratch / "model.safetensors", "--config", scratch / "lm.json"]
    files += ["--tokenizer-checkpoint", path, "--tokenizer-config", scratch / "clips.json"]
    main(["draw", "larp-l-long-ar", "--classes", "3", "--out", str(tmp_path / "out"), *map(str, files)])
    assert read_clip(tmp_path / "out" / "0000.gif").shape == (8, 3, 12, 12)


# The prior


def loss_of(prior: CodePrior, progress: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The loss of some codes and its gradient with respect to them."""
    generator = torch.Generator().manual_seed(3)
    rows = F.normalize(torch.randn(16, 4, generator=generator), dim=-1)
    indices = torch.randint(16, (2, 8), generator=generator)
    codes = rows[indices].requires_grad_()
    loss, _ = prior.eval().loss(codes, indices, rows, progress, torch.Generator().manual_seed(seed))
    (gradient,) = torch.autograd.grad(loss, codes)
    return loss.detach(), gradient


def make_prior(**changes: Any) -> CodePrior:
    torch.manual_seed(0)
    return PriorConfig(**{"width": 16, "layers": 1, "heads": 2, "max_length": 8, **changes}).build(4)


def test_the_ramp_rises_to_its_share() -> None:
    config = PriorConfig(mix=0.5, ramp=0.25)
    assert [config.mixed(p) for p in (0.0, 0.125, 0.25, 1.0)] == [0.0, 0.25, 0.5, 0.5]
    assert PriorConfig(mix=1.0, ramp=0.0).mixed(0.0) == 1.0


def test_a_second_round_on_the_same_inputs_changes_nothing() -> None:
    once, twice = loss_of(make_prior(rounds=1))[0], loss_of(make_prior(rounds=2, mix=0.0, ramp=0.0))[0]
    assert torch.allclose(once, twice)
    # At the start of the ramp nothing is mixed in either; later it is.
    assert torch.allclose(once, loss_of(make_prior(), progress=0.0)[0])
    assert not torch.allclose(once, loss_of(make_prior(), progress=1.0)[0])


def test_the_last_round_alone_counts_where_it_is_told_so() -> None:
    prior = make_prior(mix=1.0, ramp=0.0)
    both = loss_of(prior)[0]
    first = loss_of(make_prior(rounds=1))[0]
    last = loss_of(make_prior(mix=1.0, ramp=0.0, average=False))[0]
    assert torch.allclose(both, (first + last) / 2)
    silent, gradient = loss_of(make_prior(mix=1.0, ramp=0.0, last_only=True))
    assert torch.allclose(silent, last)
    # Every input but the first is drawn, so only that one has a gradient.
    assert gradient[:, 0].abs().max() > 0
    assert not gradient[:, 1:].any()


def test_cosine_logits_bound_the_loss_from_below() -> None:
    prior, rows = make_prior(), F.normalize(torch.randn(16, 4), dim=-1)
    logits = prior.logits(prior.predict(rows[None, :8]), rows)
    assert logits.abs().max() <= 1 + 1e-6
    assert logits.shape == (1, 7, 16)
    assert loss_of(prior)[0] > math.log(1 + 15 * math.exp(-2))


def test_a_prediction_knows_only_what_came_before() -> None:
    prior, codes = make_prior().eval(), torch.randn(1, 8, 4)
    changed = codes.clone()
    changed[:, 5] += 1
    before, after = prior.predict(codes), prior.predict(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


# Training


def objective(**changes: Any) -> LarpObjective:
    options = {"l1": 1.0, "l2": 0.0, "quantizer": 0.1, "steps": 10, "prior_rate": 2.0, **changes}
    return LarpObjectiveConfig(**options).build()


def test_the_priors_gradient_reaches_the_encoder() -> None:
    model, goal = small(), objective()
    output = goal.predict(model, clips(), 5)
    assert isinstance(output, LarpOutput)
    assert output.prior is not None
    output.prior.backward()
    assert model.encoder.embed.weight.grad.abs().max() > 0
    assert model.prior_model.head.weight.grad.abs().max() > 0
    assert model.bottleneck.quantize.embedding.weight.grad is None  # rows are constants to it
    assert model.decoder.linear.weight.grad is None
    loss, metrics = goal.generator_loss(output, clips(), 5, model.last_layer)
    without, _ = objective(prior=0.0).generator_loss(output, clips(), 5, model.last_layer)
    assert loss.item() == pytest.approx(0.06 * metrics["prior"].item() + without.item(), rel=1e-2)


def test_the_prior_learns_faster_and_a_foreign_tokenizer_gets_one() -> None:
    torch.manual_seed(0)
    pictures = TiTokConfig(
        image_size=8, patch=4, latents=4, width=16, layers=1, heads=2, token_size=4,
        quantizer=QuantizerConfig("fsq", levels=(4, 4)),
    ).build()  # fmt: skip
    goal = objective(prior_sizes=PRIOR)
    module = TokenizerModule(pictures, goal, TokenizerStage(optimizer=torch.optim.Adam, ema=0.0, lr=0.01))
    groups = module.configure_optimizers()["optimizer"].param_groups
    priors = {id(parameter) for parameter in goal.prior_model.parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group["initial_lr"] == (0.02 if id(parameter) in priors else 0.01)
    assert sum(len(group["params"]) for group in groups) == len([*pictures.parameters()]) + len(priors)
    output = goal.predict(pictures, clips(2)[:, 0], 0)
    output.prior.backward()
    assert pictures.encoder.patch_embed.weight.grad.abs().max() > 0
    pictures.layout = type(pictures.layout)((4, 4), length=4)
    with pytest.raises(LexelError, match="one code per position, this tokenizer has 2"):
        goal.prepare(pictures)


def test_the_quantizers_temperature_is_annealed() -> None:
    model, goal = small(), objective(temperature=(1.0, 0.1), temperature_share=0.5)
    for step, expected in ((0, 1.0), (2, 0.64), (5, 0.1), (9, 0.1)):
        goal.predict(model, clips(), step)
        assert cast(Stochastic, model.bottleneck.quantize).temperature == pytest.approx(expected)


def test_the_discriminator_judges_clips_every_fifth_step() -> None:
    judge = ClipDiscriminatorConfig(
        image_size=8, frames=4, patch=4, frame_patch=2, width=16, layers=1, heads=2
    )
    goal = objective(adversarial=0.3, non_saturating=True, lecam=0.001, discriminator=judge)
    assert [goal.judges(step) for step in range(6)] == [True, False, False, False, False, True]
    model, video = small(), clips()
    output = goal.predict(model, video, 0)
    loss, metrics = goal.discriminator_loss(output, video, 0)
    loss.backward()
    assert model.encoder.embed.weight.grad is None
    assert goal.discriminator.embed.weight.grad.abs().max() > 0
    # Both cross-entropies at logits near 0: about 2 ln 2.
    assert metrics["discriminator"].item() == pytest.approx(
        2 * math.log(2), abs=2 * goal.discriminator(video).abs().max().item() + 0.5
    )
    with pytest.raises(ValueError, match=r"judges clips \[b, 4, 3, 8, 8\]"):
        goal.discriminator(video[:, :2])


def test_it_overfits_one_batch_through_drawn_codes() -> None:
    model, goal = small(norm="bn_b", learned=("queries", "latents")), objective(l1=0.0, l2=4.0, steps=200)
    coarse = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    video = F.interpolate(coarse, (8, 8), mode="bilinear")[:, None].repeat(1, 4, 1, 1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(200):
        output = goal.predict(model, video, step)
        loss, _ = goal.generator_loss(output, video, step, model.last_layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    rebuilt = model.decode_video(model.encode_video(video))
    error, alike = ((other - video).pow(2).mean().item() for other in (rebuilt, video.mean(0)))
    assert error < 0.2 * alike
    assert len(model.encode_video(video).indices.unique()) > 2
