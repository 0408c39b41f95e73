"""FQGAN: files with and without feature heads, teachers, and the published recipes (LlamaGen's too)."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lexel.train.cli  # noqa: F401  (registers the schema)
from lexel.errors import LexelError
from lexel.tokenizers import export_published, find_published, load_published
from lexel.tokenizers.factorized import FEATURE_HEADS, FactorizedTokenizer, FactorizedTokenizerConfig
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.train.chain import run_chain
from lexel.train.cli import resolve
from lexel.train.objectives.teachers import CLIP_STATISTICS, IMAGENET_STATISTICS, VisionTeacher
from lexel.train.objectives.tokenizer import RepresentationConfig, TokenizerObjectiveConfig
from lexel.train.settings import Run
from lexel.types import Codes
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden"
KINDS = {"fqgan_dual": "fqgan-dual-16", "fqgan_triple": "fqgan-triple-16"}


# Published files


@pytest.mark.parametrize("row", ["fqgan-dual-16", "fqgan-dual-8", "fqgan-triple-16", "fqgan-triple-8"])
def test_full_size_key_lists_without_heads_are_consumed_exactly(row: str) -> None:
    system, published = find_published(row)
    lists = json.loads((GOLDEN / system.name / "published_keys.json").read_text())
    keys = lists[f"VQ-{row.rpartition('-')[2]}-no_feat_head"]
    with torch.device("meta"):
        model = system.config(published.arguments, {"with_clip_supervision": False}).build()
    assert system.layouts[0].shapes(model) == {key: tuple(shape) for key, shape in keys}


@pytest.fixture(params=sorted(KINDS))
def small(request, tmp_path: Path):
    """(row, arguments, path of a small published file with heads)."""
    fixture = Fixture(GOLDEN / request.param, tmp_path)
    row = KINDS[request.param]
    arguments = {k: v for k, v in fixture.config.items() if k in find_published(row)[0].arguments}
    return row, arguments, fixture.weights()


def heads_of(model: FactorizedTokenizer) -> set[str]:
    return {name.split(".")[0] for name in model.state_dict() if "feat_pred" in name}


def test_files_load_with_and_without_heads(small, tmp_path: Path) -> None:
    row, arguments, path = small
    full: Any = load_published(row, path, arguments)
    assert heads_of(full) == set(FEATURE_HEADS[full.config.branches].values())
    state = torch.load(path, weights_only=True)["model"]
    bare_file = tmp_path / "bare.safetensors"
    save_file({k: v for k, v in state.items() if "feat_pred" not in k}, bare_file)
    bare: Any = load_published(row, bare_file, arguments)
    ignoring: Any = load_published(row, path, {**arguments, "with_clip_supervision": False})
    pixels = torch.rand(2, 3, *full.image_size) * 2 - 1
    for model in (bare, ignoring):
        assert heads_of(model) == set()
        assert model(pixels).features == {}
        assert torch.equal(model.encode(pixels).indices, full.encode(pixels).indices)
    export_published(bare, row, tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)["model"]
    assert set(again) == {k for k in state if "feat_pred" not in k}


def test_a_torn_head_is_an_error_that_lists_the_key(small, tmp_path: Path) -> None:
    row, arguments, path = small
    state = torch.load(path, weights_only=True)["model"]
    torn = next(key for key in state if key.endswith("feat_pred.ln_post.bias") or "head.ln_post.bias" in key)
    del state[torn]
    save_file(state, tmp_path / "torn.safetensors")
    with pytest.raises(LexelError, match=f"missing {torn}"):
        load_published(row, tmp_path / "torn.safetensors", arguments)


def test_codes_come_in_the_order_of_the_concatenation(small) -> None:
    row, arguments, path = small
    model: Any = load_published(row, path, arguments)
    assert model.branch_names[0] == "vis"
    pixels = torch.rand(1, 3, *model.image_size) * 2 - 1
    codes = model.encode(pixels)
    latents, _ = model.branch_latents(pixels)
    for column, branch in enumerate(model.branch_names):
        own = model.quantizer(branch).encode(latents[branch])[..., 0]
        assert torch.equal(codes.indices[..., column], own)
    swapped = Codes(codes.indices.flip(-1), codes.grid)
    assert not torch.allclose(model.decode(codes), model.decode(swapped), atol=1e-3)


def test_a_head_per_semantic_branch_is_needed() -> None:
    with pytest.raises(ValueError, match="one width for each of sem_mid, sem_high"):
        FactorizedTokenizerConfig(branches=3, feature_dims=(8,))


# Teachers

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def teachers(tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny random models."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        Dinov2Config,
        Dinov2Model,
        ResNetConfig,
        ResNetModel,
    )

    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    text = {**SIZES, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    both = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    both.save_pretrained(folder / "clip")
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(folder / "clip-vision")
    dino = {**SIZES, "hidden_size": 24, "image_size": 70, "patch_size": 14}
    Dinov2Model(Dinov2Config(**dino)).save_pretrained(folder / "dino")
    values = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7],
        "crop_size": {"height": 28, "width": 28},
    }
    (folder / "dino" / "preprocessor_config.json").write_text(
        json.dumps({**values, "size": {"shortest_edge": 32}})
    )
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])).save_pretrained(
        folder / "resnet"
    )
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", ["clip", "clip-vision"])
def test_clip_gives_the_class_token_before_its_last_norm(teachers, pixels: Tensor, name: str) -> None:
    from transformers import CLIPVisionModel

    teacher = VisionTeacher(str(teachers[name]))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CLIP_STATISTICS)
    shown = (F.interpolate((pixels + 1) / 2, (32, 32), mode="nearest") - mean) / std
    reference = CLIPVisionModel.from_pretrained(teachers[name]).eval()
    expected = reference(shown, output_hidden_states=True).hidden_states[-1][:, 0]
    torch.testing.assert_close(teacher(pixels), expected)


def test_dinov2_gives_the_class_token_after_it_as_its_preprocessor_says(teachers, pixels: Tensor) -> None:
    from transformers import Dinov2Model

    teacher = VisionTeacher(str(teachers["dino"]))
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    shown = (F.interpolate((pixels + 1) / 2, (28, 28), mode="nearest") - mean) / std
    reference = Dinov2Model.from_pretrained(teachers["dino"]).eval()
    torch.testing.assert_close(teacher(pixels), reference(shown).last_hidden_state[:, 0])
    assert VisionTeacher(str(teachers["dino"]), 42).size == 42


def test_without_a_preprocessor_file_imagenets_statistics_are_used(teachers, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(teachers["dino"] / name)
    teacher = VisionTeacher(str(tmp_path))
    assert teacher.size == 70
    assert teacher.mean.flatten().tolist() == pytest.approx(IMAGENET_STATISTICS[0])


def test_teachers_that_cannot_teach_are_named(teachers, pixels: Tensor, tmp_path: Path) -> None:
    with pytest.raises(LexelError, match=r"resnet has no class token"):
        VisionTeacher(str(teachers["resnet"]))(pixels)
    with pytest.raises(LexelError, match=r"missing cannot be loaded"):
        VisionTeacher(str(tmp_path / "missing"))


def tokenizer(branches: int = 2, **options: Any) -> FactorizedTokenizer:
    torch.manual_seed(0)
    return FactorizedTokenizerConfig(
        image_size=16, channels=8, channel_mult=(1, 2), decoder_mult=(1, 1), res_blocks=1, z_channels=8,
        embed_dim=4, norm_groups=4, branches=branches, adapter_layers=1, adapter_heads=2, feature_layers=1,
        feature_heads=2, quantizer=QuantizerConfig("learned", codebook_size=8, entropy=0.03),
        **{"feature_dims": (16,) if branches == 2 else (24, 16), **options},
    ).build()  # fmt: skip


def terms(teachers: dict[str, Path], *pairs: tuple[str, str]) -> TokenizerObjectiveConfig:
    return TokenizerObjectiveConfig(
        representation=tuple(RepresentationConfig(str(teachers[name]), branch) for name, branch in pairs)
    )


def test_the_representation_loss_is_infonce_of_the_class_tokens(teachers) -> None:
    model, batch = tokenizer(), torch.rand(4, 3, 16, 16) * 2 - 1
    objective = terms(teachers, ("clip", "sem")).build()
    output = model(batch)
    _, metrics = objective.generator_loss(output, batch, 0, model.last_layer)
    target = VisionTeacher(str(teachers["clip"]))(batch)
    cosine = F.cosine_similarity(output.features["sem"][:, :1], target[None], dim=-1)
    expected = -0.5 * torch.stack([cosine[i, i] - cosine[i].exp().sum().log() for i in range(4)]).mean()
    torch.testing.assert_close(metrics["representation_sem"], expected.detach())


@pytest.mark.parametrize("branches", [2, 3])
def test_gradients_reach_every_parameter_and_no_teacher(teachers, branches: int) -> None:
    model, batch = tokenizer(branches).train(), torch.rand(4, 3, 16, 16) * 2 - 1
    pairs = [("clip", "sem")] if branches == 2 else [("dino", "sem_mid"), ("clip", "sem_high")]
    objective = terms(teachers, *pairs).build()
    objective.generator_loss(model(batch), batch, 0, model.last_layer)[0].backward()
    # A constant added to all keys leaves attention as it is: its gradient is zero but for rounding.
    silent = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [key for key in silent if not key.endswith(".k.bias")] == []
    assert list(objective.parameters()) == []
    assert objective.state_dict() == {}
    for term in objective.representation:
        assert not any(p.requires_grad or p.grad is not None for p in term.teacher.parameters())
        assert not term.teacher.training


def test_heads_and_teachers_that_do_not_fit_are_named(teachers) -> None:
    model, batch = tokenizer(), torch.rand(2, 3, 16, 16)
    for name, branch, message in (
        ("clip", "sem_mid", r"no feature head for branch 'sem_mid'; it has: sem"),
        ("dino", "sem", r"features of width 24, the tokenizer's head 16"),
    ):
        with pytest.raises(LexelError, match=message):
            terms(teachers, (name, branch)).build().generator_loss(model(batch), batch, 0, model.last_layer)


def test_the_discriminators_own_weight() -> None:
    model, batch = tokenizer().eval(), torch.rand(2, 3, 16, 16)
    losses = []
    for weight in (1.0, 0.5):
        torch.manual_seed(0)
        objective = TokenizerObjectiveConfig(adversarial=0.5, discriminator_weight=weight).build().eval()
        objective.discriminator.main = nn.Sequential(*list(objective.discriminator.main)[:2])
        losses.append(objective.discriminator_loss(model(batch), batch, 0)[0])
    torch.testing.assert_close(losses[1], losses[0] / 2)


# The published recipes

RECIPES = {
    "llamagen_vq": [],
    "fqgan_dual": [("clip", "sem", 16)],
    "fqgan_triple": [("dino", "sem_mid", 24), ("clip", "sem_high", 16)],
}


def composed(*overrides: str) -> Run:
    with initialize_config_module("lexel.conf", version_base="1.3"):
        return resolve(compose("train", overrides=list(overrides)))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_recipes_are_the_published_ones(name: str, tmp_path: Path) -> None:
    run = composed(f"experiment={name}", f"data.root={tmp_path}")
    system, row = find_published(f"{name.replace('_', '-')}-16")
    published = system.config(row.arguments)
    assert run.tokenizer == replace(published, decoder_mult=())
    assert published.decoder_mult == published.channel_mult
    stage, objective = run.stages.tokenizer, run.objective["tokenizer"]
    fqgan = name != "llamagen_vq"
    assert stage.batch_size * stage.accumulate == (256 if fqgan else 128)
    assert (stage.lr, stage.discriminator_lr) == ((2e-4, 2e-4) if fqgan else (1e-4, 1e-4))
    assert (stage.schedule, stage.warmup, stage.clip) == ("constant", 0, 1.0)
    assert stage.optimizer.func is torch.optim.Adam
    assert stage.optimizer.keywords == {"betas": [0.9, 0.95]}
    assert (objective.l2, objective.perceptual, objective.features.features) == (1.0, 1.0, "lpips-vgg")
    assert (objective.adversarial, objective.adversarial_start, objective.adaptive) == (0.5, 20000, False)
    assert (run.data.size, run.data.crop, run.data.flip) == (256, 0.8, True)
    assert [(term.branch, term.weight, term.size) for term in objective.representation] == [
        (branch, 0.5, 224) for _, branch, _ in RECIPES[name]
    ]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Nine pictures of four coloured squares."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(9):
        squares = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(squares.repeat(8, 0).repeat(8, 1)).save(folder / f"{number}.png")
    return folder


def debug_size(name: str, teachers: dict[str, Path], pictures: Path, output: Path) -> list[str]:
    """Overrides that make a recipe tiny; the discriminator starts after 50 of 60 steps."""
    stage = {"steps": 60, "accumulate": 1, "lr": 4e-3, "precision": "32-true", "sample_every": 0}
    sizes = {"channels": 16, "channel_mult": "[1,1]", "res_blocks": 1, "z_channels": 16, "norm_groups": 4}
    objective = {"features.features": "random", "adversarial_start": 50, "discriminator.channels": 4}
    objective["discriminator.layers"] = 1
    pairs = RECIPES[name]
    if pairs:
        sizes |= {
            f"{part}_{what}": 1 + (what == "heads")
            for part in ("adapter", "feature")
            for what in ("layers", "heads")
        }
        sizes["feature_dims"] = str([width for *_, width in pairs])
    for index, (teacher, _, _) in enumerate(pairs):
        objective[f"representation.{index}.teacher"] = teachers[teacher]
        objective[f"representation.{index}.size"] = "null"
    return [
        f"experiment={name}", "debug=overfit", "trainer=cpu", f"data.root={pictures}", "data.size=16",
        "data.crop=1.0", "data.flip=false", f"output={output}", "quantizer.codebook_size=32",
        *(f"stages.tokenizer.{k}={v}" for k, v in stage.items()),
        *(f"tokenizer.{k}={v}" for k, v in sizes.items()),
        *(f"objective.tokenizer.{k}={v}" for k, v in objective.items()),
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_at_debug_size_overfits_one_batch(
    name: str, teachers, pictures: Path, tmp_path: Path
) -> None:
    run_chain(composed(*debug_size(name, teachers, pictures, tmp_path)))
    folder = tmp_path / "tokenizer"
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    before = next(row for row in reversed(rows) if int(row["step"]) <= 50)
    for term, share in (("l2", 0.4), ("perceptual", 0.4)):
        assert float(before[term]) < share * float(rows[0][term])
    assert rows[-1]["discriminator"]
    for _, branch, _ in RECIPES[name]:
        column = f"representation_{branch}"
        assert float(rows[-1][column]) < float(rows[0][column])
    stored = load_file(folder / "model.safetensors")
    kept = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any("teacher" in key or "vision" in key for key in [*stored, *kept])
