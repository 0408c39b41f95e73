"""TokenFlow: scales that decode alone, published files, towers, and training on pixels and a teacher."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import resolved, train
from torch import Tensor

from lexel.document import Image, Text
from lexel.errors import LexelError
from lexel.nn.conv import ConvSizes
from lexel.sample.pipeline import Pipeline
from lexel.sample.reconstruct import reconstruct
from lexel.tokenizers import find_published, from_pretrained, load_published
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.tokenflow import CLIP_SCALES, TokenFlow, TokenFlowConfig, TowerConfig, positions_for
from lexel.tokenizers.vq import VQTokenizerConfig
from lexel.train.objectives.teachers import VisionTeacher
from lexel.train.objectives.tokenflow import SemanticConfig, TokenFlowObjectiveConfig
from lexel.train.settings import TokenizerStage
from lexel.train.stages import _fill_tower
from lexel.types import Codes
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden"
ROWS = {"tokenflow": "tokenflow-clipb-32k", "tokenflow_siglip": "tokenflow-siglip-32k"}
RESTING = {"decoder_vqkd", "decode_task_layer"}
SIZES = ConvSizes(8, (1,), 1, 8, False, True, 4, 0.0, 4)
TOWER = TowerConfig(width=16, layers=2, heads=2, hidden=32, patch=4, side=4)


def config(**options) -> TokenFlowConfig:
    values = {
        "image_size": 16,
        "tower": TOWER,
        "scales": (1, 2, 4),
        "semantic_dim": 6,
        "pixel_dim": 4,
        "quantizer": QuantizerConfig("learned", codebook_size=32, cosine=True, entropy=0.0),
        "encoder": SIZES,
        "decoder": SIZES,
        "feature_layers": 1,
        "feature_heads": 2,
        "feature_dim": 8,
    }
    return TokenFlowConfig(**{**values, **options})


def tokenizer(**options) -> TokenFlow:
    torch.manual_seed(0)
    return config(**options).build().eval()


def pictures(count: int = 2, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Scales


def test_every_number_of_scales_decodes_and_is_what_the_picture_begins_with() -> None:
    model, pixels = tokenizer(), pictures()
    full = model.encode(pixels)
    assert full.scales == ((1, 1), (2, 2), (4, 4))
    drawn = []
    for length in (1, 5, 21):
        codes = model.encode(pixels, length)
        assert torch.equal(codes.indices, full.indices[:, :length])
        drawn.append(model.decode(codes))
        # The scales follow from the number of codes where they are not named.
        assert torch.equal(model.decode(Codes(codes.indices)), drawn[-1])
    assert torch.equal(drawn[-1], model.decode(full))
    assert not torch.allclose(drawn[0], drawn[1])
    for wrong in (2, 6, 22):
        with pytest.raises(ValueError, match=r"makes 1, 5 or 21 codes, length="):
            model.encode(pixels, wrong)
        with pytest.raises(ValueError, match=r"end within a scale; give 1, 5 or 21"):
            model.decode(Codes(torch.zeros(1, wrong, 1, dtype=torch.long)))


def test_reconstruct_takes_numbers_of_codes_that_end_a_scale() -> None:
    model, picture = tokenizer(), pictures()[0]
    rebuilt, codes = reconstruct(model, picture, 5)
    assert codes.indices.shape == (1, 5, 1)
    assert torch.equal(rebuilt, model.decode(model.encode(picture[None], 5))[0].clamp(-1, 1))
    with pytest.raises(LexelError, match="1, 5 or 21 tokens per picture, 4 were asked for"):
        reconstruct(model, picture, 4)


def test_latents_are_the_sum_of_unit_rows_and_each_scale_codes_what_is_left() -> None:
    model, pixels = tokenizer(), pictures()
    codes = model.encode(pixels)
    rows = model.embed(codes)
    for half in rows.split((6, 4), dim=-1):
        torch.testing.assert_close(half.norm(dim=-1), torch.ones(2, 21))
    rest = model.latents(pixels)
    for start, side in ((0, 1), (1, 2), (5, 4)):
        cells = F.adaptive_avg_pool2d(rest, side).flatten(2).mT
        halves = zip(cells.split((6, 4), dim=-1), model.quantize.codebook.split((6, 4), dim=1))
        cosines = sum(F.cosine_similarity(a[:, :, None], b[None, None], dim=-1) for a, b in halves)
        assert torch.equal(cosines.argmax(-1), codes.indices[:, start : start + side**2, 0])
        chosen = rows[:, start : start + side**2].mT.reshape(2, 10, side, side)
        rest = rest - F.interpolate(chosen, (4, 4), mode="bicubic")
    left = model.latents(pixels).flatten(2).mT - model.understand(pixels)
    torch.testing.assert_close(left, rest.flatten(2).mT)


def test_inputs_of_the_next_scale_know_only_the_ones_before() -> None:
    model = tokenizer()
    codes = Codes(torch.randint(32, (2, 21, 1), generator=torch.Generator().manual_seed(0)))
    inputs = model.next_scale_inputs(codes)
    assert inputs.shape == (2, 20, 10)
    torch.testing.assert_close(inputs[:, :4], model.embed(codes)[:, :1].expand(-1, 4, -1))
    assert torch.equal(model.next_scale_inputs(Codes(codes.indices[:, :5])), inputs[:, :4])
    assert model.next_scale_inputs(Codes(codes.indices[:, :1])).shape == (2, 0, 10)
    other = codes.indices.clone()
    other[:, 5:] = 0
    assert torch.equal(model.next_scale_inputs(Codes(other)), inputs)


def test_rows_of_a_batch_equal_themselves_alone() -> None:
    model, pixels = tokenizer(), pictures()
    codes = model.encode(pixels)
    assert torch.equal(model.encode(pixels[1:]).indices, codes.indices[1:])
    torch.testing.assert_close(model.decode(codes)[1:], model.decode(codes[1:]))
    torch.testing.assert_close(model.decode_features(codes)[1:], model.decode_features(codes[1:]))
    with pytest.raises(ValueError, match="reads 16x16 pictures"):
        model.encode(pictures(side=20))


def test_lexels_own_format_keeps_everything(tmp_path: Path) -> None:
    model = tokenizer(tower=replace(TOWER, kind="siglip", activation="gelu"))
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert again.fingerprint() == model.fingerprint()
    assert torch.equal(again.encode(pictures()).indices, model.encode(pictures()).indices)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scales": (1, 2, 5)}, "scales must grow to 4"),
        ({"scales": (2, 1, 4)}, "scales must grow to 4"),
        ({"scales": ()}, "scales must grow to 4"),
        ({"decoder": replace(SIZES, stem=2)}, "the encoder makes 4 pixels one cell, the decoder 2"),
        ({"drop": 2.0}, r"drop is a share of steps in \[0, 1\], got 2.0"),
        ({"image_size": 20, "scales": (1, 5), "tower": replace(TOWER, kind="siglip")}, "reads 4 patches"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config(**options)
    with pytest.raises(ValueError, match="clip, siglip, got 'vitamin'"):
        TowerConfig(kind="vitamin")


@pytest.mark.parametrize("kind", ["vq", "fsq", "residual"])
def test_other_quantizers_round_both_halves_together(kind: str) -> None:
    options = {"fsq": {"levels": (4, 4)}, "residual": {"depth": 2}}.get(kind, {})
    model = tokenizer(quantizer=QuantizerConfig(kind, codebook_size=16, **options))
    codes = model.encode(pictures())
    assert codes.indices.shape == (2, 21, model.layout.k)
    assert model.decode(codes).shape == (2, 3, 16, 16)


# Towers


def test_a_larger_grid_interpolates_positions_by_a_factor() -> None:
    table = torch.randn(17, 6, generator=torch.Generator().manual_seed(0))
    assert positions_for(table, 4) is table
    larger = positions_for(table, 5)
    assert larger.shape == (26, 6)
    assert torch.equal(larger[0], table[0])
    grid = table[1:].T.reshape(1, 6, 4, 4)
    resized = F.interpolate(grid, size=(5, 5), mode="bicubic").flatten(2)[0].T
    assert (larger[1:] - resized).abs().max() > 0.01
    model = tokenizer(image_size=20, scales=(1, 5))
    assert model.decode(model.encode(pictures(side=20))).shape == (2, 3, 20, 20)


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> dict[str, str]:
    """Tiny CLIP and SigLIP, 4 x 4 patches of 16 pixels."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    text = {**sizes, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    folder = tmp_path_factory.mktemp("towers")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(
        folder / "clip"
    )
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder / "siglip")
    return {name: str(folder / name) for name in ("clip", "siglip")}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tower_starts_from_a_folder(towers, kind: str) -> None:
    activation = "quick_gelu" if kind == "clip" else "gelu_pytorch_tanh"
    model, pixels = tokenizer(tower=replace(TOWER, kind=kind, activation=activation)), pictures()
    fresh = model.read(pixels)
    model.load_tower(towers[kind])
    own = VisionTeacher(towers[kind], output="patches", layer=-1 if kind == "clip" else -2)
    shown = pixels if kind == "clip" else pixels.clamp(-1, 1)
    own.mean.fill_(0.5), own.std.fill_(0.5)  # CLIP's tower sees pixels in [-1, 1] as they come
    expected = own(shown)
    if kind == "clip":
        expected = own.network.post_layernorm(expected)
    torch.testing.assert_close(model.read(pixels), expected)
    assert not torch.allclose(model.read(pixels), fresh)


def test_towers_that_do_not_fit_are_named(towers, tmp_path: Path) -> None:
    with pytest.raises(LexelError, match="cannot be loaded as a CLIPVisionModel"):
        tokenizer().load_tower(tmp_path / "missing")
    with pytest.raises(LexelError, match=r"not built as tokenizer.tower says: .*expected \[17, 8\]"):
        tokenizer(tower=replace(TOWER, width=8)).load_tower(towers["clip"])
    other = VQTokenizerConfig(image_size=16, channels=8, channel_mult=(1,), stem=4, norm_groups=4).build()
    with pytest.raises(LexelError, match="belongs to a TokenFlow"):
        _fill_tower(other, TokenizerStage(tower=towers["clip"]))
    with pytest.raises(LexelError, match="holds a tower already"):
        _fill_tower(tokenizer(), TokenizerStage(tower=towers["clip"], init="somewhere"))


def test_nothing_reads_the_end_of_a_siglip_tower() -> None:
    model = tokenizer(tower=replace(TOWER, kind="siglip", activation="gelu"))
    resting = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in resting} == {"encoder", "post_layernorm", "head"}
    model.train()
    model(pictures()).features["semantic"].sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if name in resting)
    before = model.read(pictures())
    for name, p in model.named_parameters():
        if name in resting:
            p.data.zero_()
    assert torch.equal(model.read(pictures()), before)


# Published files


def fixture_of(name: str, folder: Path) -> tuple[str, dict, Path]:
    fixture = Fixture(GOLDEN / name, folder)
    return ROWS[name], find_published(ROWS[name])[0].known(fixture.config), fixture.weights()


@pytest.mark.parametrize("nesting", ["ema", "model", "state_dict", None])
def test_files_of_every_nesting_load_with_their_training_arguments(nesting, tmp_path: Path) -> None:
    row, arguments, path = fixture_of("tokenflow", tmp_path)
    expected = load_published(row, path, arguments)
    state = torch.load(path, weights_only=True)["model"]
    # Averaged codebooks leave statistics beside the rows.
    state["quantize.embedding_vqkd.cluster_size"] = torch.ones(96)
    state["quantize.embedding_vqkd.initted"] = torch.ones(1)
    more = {"args": argparse.Namespace(lr=1e-4), "steps": 3}
    torch.save({nesting: state, **more} if nesting else state, tmp_path / "other.pt")
    assert load_published(row, tmp_path / "other.pt", arguments).fingerprint() == expected.fingerprint()
    del state["encode_task_layer.0.bias"]
    torch.save({"model": state}, tmp_path / "torn.pt")
    with pytest.raises(LexelError, match=r"missing encode_task_layer\.0\.bias"):
        load_published(row, tmp_path / "torn.pt", arguments)


def test_the_published_configurations_have_their_numbers_of_codes() -> None:
    clip, siglip = (find_published(row) for row in ROWS.values())
    assert clip[0].config().scales == CLIP_SCALES
    assert [clip[0].config(more).grid for more in ({}, {"infer_interpolate": True})] == [14, 16]
    lengths = [
        sum(side**2 for side in system.config(row.arguments, more).scales)
        for (system, row), more in ((clip, {"infer_interpolate": False}), (clip, {}), (siglip, {}))
    ]
    assert lengths == [560 + 1, 817, 2227]
    assert siglip[0].config().pixel_side == 432
    assert siglip[0].config().output_size == siglip[0].config().image_size == 384
    enhanced = clip[0].config({"enhanced_decoder": True}).decoder
    assert (enhanced.channels, enhanced.res_blocks) == (256, 4)


def test_the_variant_without_published_weights_is_refused() -> None:
    with pytest.raises(LexelError, match=r"clipb_224 or siglip_384, got 'vitamin_xlarge_256' \(.*timm"):
        load_published("tokenflow-clipb-32k", "x.pt", {"teacher": "vitamin_xlarge_256"})
    with pytest.raises(LexelError, match="codebook_l2_norm=False"):
        load_published("tokenflow-clipb-32k", "x.pt", {"codebook_l2_norm": False})


# Training


def test_losses_are_means_over_scales() -> None:
    model, pixels = tokenizer(drop=0.0).train(), pictures()
    output = model(pixels)
    rest, terms = model.latents(pixels), []
    codebook = model.quantize.codebook
    start = 0
    for side in (1, 2, 4):
        cells = F.adaptive_avg_pool2d(rest, side).flatten(2).mT
        unit = torch.cat([F.normalize(half, dim=-1) for half in cells.split((6, 4), dim=-1)], dim=-1)
        chosen = codebook[output.codes.indices[:, start : start + side**2, 0]]
        terms.append((chosen - unit).square().mean())
        start += side**2
        rest = rest - F.interpolate(chosen.mT.reshape(2, 10, side, side), (4, 4), mode="bicubic")
    torch.testing.assert_close(output.quantizer.losses["codebook"], torch.stack(terms).mean())
    commitment = output.quantizer.losses["commitment"]
    torch.testing.assert_close(commitment, 0.25 * output.quantizer.losses["codebook"])
    assert set(output.quantizer.losses) == {"codebook", "commitment"}


def test_a_tenth_of_the_steps_drop_one_scale_but_never_the_first() -> None:
    model = tokenizer(scales=(1, 2, 3, 4), drop=0.3).train()
    generator = torch.Generator().manual_seed(0)
    seen = Counter(model._drawn_scales(generator) for _ in range(2000))
    assert set(seen) == {(1, 2, 3, 4), (1, 3, 4), (1, 2, 4), (1, 2, 3)}
    assert seen.pop((1, 2, 3, 4)) == pytest.approx(1400, abs=80)
    assert all(count == pytest.approx(200, abs=50) for count in seen.values())
    assert TokenFlowConfig().drop == 0.1
    first, second = (
        model(pictures(), generator=torch.Generator().manual_seed(seed)).codes.scales for seed in (0, 3)
    )
    assert first != second
    assert model.eval()(pictures()).codes.scales == ((1, 1), (2, 2), (3, 3), (4, 4))
    assert tokenizer(scales=(4,), drop=1.0).train()(pictures()).codes.scales == ((4, 4),)


def objective(towers, **options):
    semantic = SemanticConfig(towers["clip"])
    return TokenFlowObjectiveConfig(**{"semantic": semantic, **options}).build()


def test_the_semantic_term_is_one_minus_the_cosine_to_the_teachers_patches(towers) -> None:
    model, pixels = tokenizer(drop=0.0).train(), pictures()
    one = objective(towers)
    one.prepare(model)
    output = model(pixels)
    loss, metrics = one.generator_loss(output, pixels, 0, model.last_layer)
    target = VisionTeacher(towers["clip"], output="projected_patches")(pixels)
    expected = (
        1 - (F.normalize(output.features["semantic"], dim=-1) * F.normalize(target, dim=-1)).sum(-1).mean()
    )
    torch.testing.assert_close(metrics["semantic"], expected.detach())
    torch.testing.assert_close(
        loss, metrics["l2"] + metrics["codebook"] + metrics["commitment"] + expected, check_stride=False
    )
    assert one.state_dict() == {}
    assert "semantic" in one.measure(output, pixels)


def test_without_a_teacher_pixels_alone_are_learned() -> None:
    model, pixels = tokenizer().train(), pictures()
    plain = TokenFlowObjectiveConfig().build()
    plain.prepare(model)
    loss, metrics = plain.generator_loss(model(pixels), pixels, 0, model.last_layer)
    assert "semantic" not in metrics
    loss.backward()
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learning == reached == {name for name, _ in model.named_children()} - RESTING


def test_gradients_reach_both_encoders_both_decoders_and_both_halves(towers) -> None:
    model, pixels = tokenizer().train(), pictures()
    one = objective(towers)
    one.generator_loss(model(pixels), pixels, 0, model.last_layer)[0].backward()
    # A constant added to all keys leaves attention as it is.
    silent = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [key for key in silent if ".k_proj.bias" not in key] == []


def test_teachers_and_tokenizers_that_do_not_fit_are_named(towers) -> None:
    one = objective(towers)
    with pytest.raises(LexelError, match="trains tokenizer=tokenflow only"):
        one.prepare(torch.nn.Identity())
    with pytest.raises(
        LexelError, match="gives 4x4 features of width 8, the tokenizer predicts 4x4 of width 6"
    ):
        one.prepare(tokenizer(feature_dim=6))


def test_one_batch_is_learned_by_heart(towers) -> None:
    model, pixels = tokenizer(drop=0.0).train(), pictures(4)
    one = objective(towers, l2=4.0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    history = []
    for _ in range(70):
        optimizer.zero_grad()
        loss, metrics = one.generator_loss(model(pixels), pixels, 0, model.last_layer)
        loss.backward()
        optimizer.step()
        history.append({name: float(value) for name, value in metrics.items()})
    assert history[-1]["semantic"] < 0.5 * history[0]["semantic"]
    assert history[-1]["l2"] < 0.7 * history[0]["l2"]


def test_the_recipes_train_the_published_networks(tmp_path: Path) -> None:
    root = f"data.root={tmp_path}"
    for name, row in (("tokenflow", ROWS["tokenflow"]), ("tokenflow_siglip", ROWS["tokenflow_siglip"])):
        run, system = resolved(f"experiment={name}", root), find_published(row)[0]
        with torch.device("meta"):
            state = run.tokenizer.build().state_dict()
            expected = system.config().build().state_dict()
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
        assert run.tokenizer == system.config({}) or name == "tokenflow_siglip"
    decoder = resolved("experiment=tokenflow_decoder", root)
    with torch.device("meta"):
        network = decoder.tokenizer.build()
    frozen = decoder.stages.tokenizer.frozen
    assert {name.split(".")[0] for name in network.state_dict()} - set(frozen) == {"decoder"}
    assert decoder.stages.tokenizer.tower is None


@pytest.mark.slow
def test_a_language_model_over_its_codes_trains_draws_and_is_bundled(towers, tmp_path: Path) -> None:
    run = train(
        "experiment=tokenflow_debug", "task=chain", "task.stages=[tokenizer,lm,evaluate]", "debug=fast",
        "lm=debug", "threads=1", f"output={tmp_path}", "codes.count=16", "tokenizer.scales=[1,2,4]",
        "tokenizer.tower={patch: 8, side: 4}", "tokenizer.encoder.stem=8", "tokenizer.decoder.stem=8",
        "tokenizer.feature_dim=8",
        "objective.tokenizer.semantic={_target_: lexel.train.objectives.tokenflow.SemanticConfig, size: 16, "
        f"teacher: {towers['clip']}}}",
    )  # fmt: skip
    pipe = Pipeline.from_pretrained(run.folder / "bundle")
    assert isinstance(pipe.tokenizer, TokenFlow)
    drawn = pipe([Text("a red circle"), Image.blank()], seed=1).documents[0][-1]
    assert drawn.codes.scales == ((1, 1), (2, 2), (4, 4))
    assert torch.equal(pipe.tokenizer.decode(drawn.codes)[0].clamp(-1, 1), drawn.pixels)
    assert isinstance(pipe.describe(pictures(1, 32)[0]), str)
    pipe.save_pretrained(tmp_path / "again")
    again = Pipeline.from_pretrained(tmp_path / "again")
    assert again.tokenizer.fingerprint() == pipe.tokenizer.fingerprint()
    repeated = again([Text("a red circle"), Image.blank()], seed=1).documents[0][-1]
    assert torch.equal(repeated.codes.indices, drawn.codes.indices)
