"""SEED-2: causal codes of a frozen vision model's tokens, the published files, and its trainings."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from torch import Tensor
from torch.utils.data import Dataset

import lexel.train.cli  # noqa: F401  (registers the schema)
from lexel.checkpoints import read_checkpoint
from lexel.data.example import Example
from lexel.data.sampler import Draw
from lexel.data.text_tokenizer import train_text_tokenizer
from lexel.errors import LexelError
from lexel.nn.eva_vit import EvaConfig
from lexel.nn.vision import VisionConfig
from lexel.prompts import published_codec
from lexel.tokenizers import export_published, find_published, from_pretrained, load_published
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.seed import SeedConfig, SeedTokenizer, configure, resized, vq
from lexel.train.batches import Batches
from lexel.train.callbacks import CodebookUsage
from lexel.train.cli import resolve
from lexel.train.fit import fit
from lexel.train.objectives.seed import ContrastiveObjectiveConfig, Met, SeedObjectiveConfig
from lexel.train.objectives.teachers import VisionTeacher
from lexel.train.settings import LoggerSettings, Run, TrainerSettings
from lexel.train.stages import fresh_network
from lexel.train.tokenizer_module import TokenizerModule
from lexel.types import Codes
from lexel.verify.fixture import Fixture
from lexel.vocabulary import PUBLISHERS

GOLDEN = Path(__file__).parent / "golden"
ROWS = {"seed": "seed-2", "seed_reverse": "seed-2-reverse"}
SMALL = SeedConfig(
    vit=EvaConfig(image_size=16, patch=8, width=16, layers=1, heads=2, mlp_ratio=2.0),
    queries=6, width=24, layers=2, heads=2, hidden=32, dropout=0.0, decode_layers=1, block_heads=2,
    token_size=4, features=10, quantizer=vq(16),
)  # fmt: skip


def make(config: SeedConfig = SMALL) -> SeedTokenizer:
    torch.manual_seed(0)
    return config.build().eval()


def pictures(count: int = 3, side: int = 16) -> Tensor:
    """Noise around a colour of each picture's own."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, 1], [-1, -1, 1], [1, 1, -1]])[:count, :, None, None]
    return (0.3 * torch.randn(count, 3, side, side, generator=generator) + 0.7 * colours).clamp(-1, 1)


@pytest.fixture(params=sorted(ROWS))
def published(request, tmp_path: Path) -> tuple[str, dict[str, Any], Path, SeedTokenizer]:
    """Row, arguments, folder of files and tokenizer at fixture size."""
    fixture = Fixture(GOLDEN / request.param, tmp_path)
    row = ROWS[request.param]
    arguments = find_published(row)[0].known(fixture.config)
    folder = fixture.weights_folder()
    return row, arguments, folder, load_published(row, folder, arguments)


# What it is


@pytest.mark.parametrize("head", ["down", "qformer"])
def test_pictures_become_a_fixed_line_of_codes_and_codes_an_embedding(head: Any) -> None:
    model = make(replace(SMALL, head=head))
    codes = model.encode(pictures())
    assert codes.indices.shape == (3, 6, 1)
    assert model.embed(codes).shape == (3, 6, 4)
    features = model.decode_features(codes)
    assert features.shape == (3, 1, 10)
    output = model(pictures())
    torch.testing.assert_close(output.reconstruction, features)
    assert torch.equal(output.codes.indices, codes.indices)
    alone = model.encode(pictures()[1:2])
    assert torch.equal(alone.indices, codes.indices[1:2])
    torch.testing.assert_close(model.decode_features(alone), features[1:2])


def test_several_codes_per_query() -> None:
    model = make(replace(SMALL, quantizer=QuantizerConfig("residual", codebook_size=16, depth=2)))
    codes = model.encode(pictures())
    assert codes.indices.shape == (3, 6, 2)
    assert model.decode_features(codes).shape == (3, 1, 10)


def test_a_query_sees_earlier_queries_only() -> None:
    for causal in (True, False):
        model = make(replace(SMALL, causal=causal))
        before = model.read(model.see(pictures()))
        with torch.no_grad():
            model.query_tokens[:, 4:] += torch.randn(2, 24)
        after = model.read(model.see(pictures()))
        assert not torch.allclose(before[:, 4:], after[:, 4:])
        assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6) is causal


def test_the_reference_is_causal_with_exactly_32_queries() -> None:
    arguments = find_published("seed-2")[0].arguments
    assert configure(arguments).causal
    assert not configure({**arguments, "num_query_token": 16}).causal


def test_it_draws_no_pixels() -> None:
    model = make()
    assert not model.draws_pixels
    with pytest.raises(LexelError, match="draw them with a detokenizer"):
        model.decode(model.encode(pictures()))


def test_bad_input_is_named() -> None:
    model = make()
    with pytest.raises(ValueError, match="reads 16x16 pictures, got 32x32"):
        model.encode(pictures(side=32))
    with pytest.raises(ValueError, match=r"\[1, 5, 1\], expected \[b, 6, 1\]"):
        model.decode_features(Codes(torch.zeros(1, 5, 1, dtype=torch.long)))
    with pytest.raises(ValueError, match="head must be down or qformer, got 'up'"):
        replace(SMALL, head="up")
    with pytest.raises(ValueError, match="block_heads 7 must divide the width 24"):
        replace(SMALL, block_heads=7)


def test_its_codes_are_those_that_seed_llama_knows() -> None:
    """32 codes of 8192, one column: `<img>`, 32 ids, `</img>`."""
    with torch.device("meta"):
        layout = find_published("seed-2")[0].config().build().layout
    assert (layout.codebook_sizes, layout.length, layout.flexible) == ((8192,), 32, False)
    publisher = PUBLISHERS["seed_llama"]
    names = [texts[0] for texts in publisher.special.values()]
    entries = {name: i for i, name in enumerate(names)}
    entries |= {f"<img_{code:05d}>": 32000 + code for code in range(8192)}

    class Words:
        def get_vocab(self) -> dict[str, int]:
            return entries

        def encode(self, text: str, **_: Any) -> list[int]:
            return [0] * len(text)

    codec = published_codec("seed_llama", Words(), {"image": layout})  # type: ignore[arg-type]
    codec.vocabulary.check_layout("image", layout)
    assert codec.vocabulary.block("image").flatten().tolist() == list(range(32000, 32000 + 8192))


# Published files


def test_full_size_key_lists_are_consumed_exactly() -> None:
    lists = json.loads((GOLDEN / "seed" / "published_keys.json").read_text())
    vit = next(value for name, value in lists.items() if name.startswith("eva_vit_g.pth"))
    reverse = next(value for name, value in lists.items() if "Reverse" in name)
    for row, rest in (("seed-2", lists["seed_quantizer.pt"]), ("seed-2-reverse", reverse)):
        expected = {f"seed_quantizer.pt:{key}": tuple(shape) for key, shape in rest}
        expected |= {f"eva_vit_g.pth:{key}": tuple(shape) for key, shape in vit}
        system, published = find_published(row)
        with torch.device("meta"):
            model = system.config(published.arguments).build()
        assert system.layouts[0].shapes(model) == expected


def test_export_and_load_again_changes_nothing(published, tmp_path: Path) -> None:
    row, arguments, folder, model = published
    export_published(model, row, tmp_path / "back")
    for name in ("seed_quantizer.pt", "eva_vit_g.pth"):
        ours, theirs = read_checkpoint(tmp_path / "back" / name), read_checkpoint(folder / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if "position_ids" not in key)
        assert all("intermediate.dense" in key for key in theirs if key not in ours)
    again = load_published(row, tmp_path / "back", arguments)
    assert again.fingerprint() == model.fingerprint()
    model.save_pretrained(tmp_path / "lexel")
    assert from_pretrained(tmp_path / "lexel").fingerprint() == model.fingerprint()


def test_parts_of_other_trainings_are_left_unread_and_unknown_blocks_are_not(published) -> None:
    row, arguments, folder, model = published
    file = folder / "seed_quantizer.pt"
    state = {key: value.clone() for key, value in read_checkpoint(file).items()}  # they lie in the file
    extra = [
        "Qformer.cls.predictions.bias",
        "Qformer.bert.embeddings.word_embeddings.weight",
        "blocks_text.0.w",
    ]
    torch.save({**state, **dict.fromkeys(extra, torch.ones(1))}, file)
    assert load_published(row, folder, arguments).fingerprint() == model.fingerprint()
    torch.save({**state, "blocks.7.norm1.weight": torch.ones(1)}, file)
    with pytest.raises(LexelError, match=r"unknown seed_quantizer.pt:blocks\.7\.norm1\.weight"):
        load_published(row, folder, arguments)
    torch.save({key: value for key, value in state.items() if key != "query_tokens"}, file)
    with pytest.raises(LexelError, match=r"missing seed_quantizer.pt:query_tokens"):
        load_published(row, folder, arguments)
    file.unlink()
    with pytest.raises(LexelError, match=r"holds no seed_quantizer\.pt"):
        load_published(row, folder, arguments)


def test_positions_are_resized_to_larger_pictures(published) -> None:
    row, arguments, folder, model = published
    side = 2 * arguments["img_size"]
    large = load_published(row, folder, {**arguments, "img_size": side})
    assert large.encode(pictures(1, side)).indices.shape == (1, 32, 1)
    small_table, table = (m.visual_encoder.pos_embed for m in (model, large))
    torch.testing.assert_close(table[:, 0], small_table[:, 0])
    torch.testing.assert_close(table[:, 1:].mean(), small_table[:, 1:].mean(), atol=0.02, rtol=0)
    same = resized({"pos_embed": small_table}, model.config.vit)
    assert same["pos_embed"] is small_table


# Other vision models


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP, whose picture half is a vision model."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        text_config={**sizes, "vocab_size": 40, "max_position_embeddings": 8},
        projection_dim=10,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return folder


def seeing(clip: Path, **options: Any) -> SeedConfig:
    return replace(SMALL, vit=None, vision=VisionConfig.read(str(clip), **options))


def test_any_vision_model_takes_the_vits_place(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    model = make(seeing(clip, mean=(0.5,) * 3, deviation=(0.5,) * 3))
    model.load_vision(clip)
    assert model.image_size == (16, 16)
    expected = CLIPModel.from_pretrained(clip).vision_model(pictures()).last_hidden_state
    torch.testing.assert_close(model.see(pictures()), model.ln_vision(expected))
    # It is part of what is saved: no folder is needed to read that again.
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert again.fingerprint() == model.fingerprint()
    assert torch.equal(again.encode(pictures()).indices, model.encode(pictures()).indices)


def test_a_vision_model_that_cannot_be_had_is_named(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(LexelError, match=f"{tmp_path}/none cannot be read"):
        make(seeing(clip)).load_vision(tmp_path / "none")
    other = seeing(clip).vision
    assert other is not None
    wide = replace(other, architecture={**other.architecture, "hidden_size": 32})
    with pytest.raises(LexelError, match="not built like the tokenizer's vision model"):
        make(replace(SMALL, vit=None, vision=wide)).load_vision(clip)
    with pytest.raises(ValueError, match="exactly one of vit and vision"):
        replace(SMALL, vit=None)


def test_a_vits_file_may_hold_more_than_is_used(tmp_path: Path) -> None:
    whole = make(replace(SMALL, vit=replace(SMALL.vit, layers=2)))
    torch.save({**whole.visual_encoder.state_dict(), "norm.weight": torch.ones(16)}, tmp_path / "vit.pth")
    model = make()
    model.load_vision(tmp_path / "vit.pth")
    own = model.visual_encoder.state_dict()
    assert all(torch.equal(value, whole.visual_encoder.state_dict()[key]) for key, value in own.items())


# Training


CAPTIONS = ("a red circle", "a blue square above a green one", "nothing", "two stars")
TINY: dict[str, Any] = {
    "data.root": ".", "data.size": 16, "quantizer.codebook_size": 32, "tokenizer.vit.patch": 8,
    "tokenizer.vit.width": 16, "tokenizer.vit.layers": 1, "tokenizer.vit.heads": 2, "tokenizer.queries": 6,
    "tokenizer.width": 24, "tokenizer.layers": 2, "tokenizer.heads": 2, "tokenizer.hidden": 32,
    "tokenizer.dropout": 0.0, "tokenizer.decode_layers": 1, "tokenizer.block_heads": 2,
    "tokenizer.token_size": 4, "tokenizer.features": 10, "objective.tokenizer.encoder": "null",
    "trainer": "cpu", "stages.tokenizer.precision": "32-true", "stages.tokenizer.warmup": 5,
    "stages.tokenizer.batch_size": 4, "stages.tokenizer.lr": 5e-3, "stages.tokenizer.validate_every": 20,
    "stages.tokenizer.validation_batches": 1, "stages.tokenizer.sample_every": 20,
}  # fmt: skip


class Pictures(Dataset[Example]):
    """Four captioned pictures, again and again."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, draw: Draw) -> Example:
        return Example(str(draw.index), (CAPTIONS[draw.index], "another"), pictures(4)[draw.index])


def settings(experiment: str, **choices: Any) -> Run:
    values = {"experiment": experiment, **TINY, **choices}
    with initialize_config_module("lexel.conf", version_base="1.3"):
        return resolve(compose("train", overrides=[f"{key}={value}" for key, value in values.items()]))


def trained(
    run: Run, folder: Path, steps: int, init: Path | None = None
) -> tuple[SeedTokenizer, TokenizerModule]:
    """The tokenizer after `steps` steps on one batch, through the trainer, with validation. Checks that
    exactly what is to learn does."""
    stage = run.stages.tokenizer
    stage.steps = steps
    network = fresh_network(run.tokenizer, 0, None if init is None else str(init))
    module = TokenizerModule(network, run.objective["tokenizer"].build(), stage, 0, pictures(2))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    batches = Batches(Pictures(), Pictures(), module.objective.collate, stage)
    usage = CodebookUsage(network.codebook_sizes)
    fit("tokenizer", module, batches, folder, TrainerSettings(), LoggerSettings(), [usage])
    learns = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {
        key for key, value in network.state_dict().items() if not torch.equal(value, before[key])
    } == learns
    assert not (folder / "samples").exists()  # there are no pixels to show
    return network.eval(), module


def logged(folder: Path) -> list[dict[str, float]]:
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, TokenizerModule]:
    """The folder of a tokenizer after the first stage on four pictures, and its module."""
    folder = tmp_path_factory.mktemp("stage1")
    run = settings(
        "seed_stage1", **{"objective.tokenizer.text_tokenizer": "null", "objective.tokenizer.blip2": "null"}
    )
    network, module = trained(run, folder, 40)
    network.save_pretrained(folder / "tokenizer")
    return folder, module


def test_the_first_stage_finds_each_pictures_caption(first) -> None:
    folder, module = first
    rows = [row for row in logged(folder) if "loss" in row]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    checked = [row for row in logged(folder) if "validation/accuracy" in row]
    assert checked[-1]["validation/accuracy"] == 1
    # The text's own parts learned with it and are no part of what is exported.
    text: Any = module.objective.text
    assert all((layer.norm.weight != 1).all() for layer in text.layers)
    assert not any("text" in key for key in read_checkpoint(folder / "tokenizer"))
    learned = {name.split(".")[0] for name, p in module.network.named_parameters() if p.requires_grad}
    assert learned == {"ln_vision", "qformer", "query_tokens"}


def test_the_second_stage_learns_the_teachers_embedding(first, clip: Path, tmp_path: Path) -> None:
    run = settings("seed_stage2", **{"objective.tokenizer.teacher": clip})
    network, _ = trained(run, tmp_path, 120, first[0] / "tokenizer")
    learned = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert not learned & {"visual_encoder", "ln_vision", "qformer", "query_tokens"}
    rows = [row for row in logged(tmp_path) if "loss" in row]
    assert rows[-1]["embedding"] < 0.25 * rows[0]["embedding"]
    assert rows[-1]["queries"] < 0.4 * rows[0]["queries"]
    checked = [row for row in logged(tmp_path) if "validation/cosine" in row]
    assert checked[-1]["validation/cosine"] > 0.85
    used = [
        row["validation/codebook_usage"] for row in logged(tmp_path) if "validation/codebook_usage" in row
    ]
    assert used[-1] > 3 / 32
    # Each picture's codes mean its own embedding.
    target = VisionTeacher(str(clip), None, "embedding")(pictures(4))
    drawn = network.decode_features(network.encode(pictures(4)))[:, 0]
    assert (drawn - target).norm() < 0.7 * (drawn.flip(0) - target).norm()


def test_the_second_stages_loss_is_the_published_sum(clip: Path) -> None:
    model = make().train()
    objective = SeedObjectiveConfig(teacher=str(clip)).build()
    objective.prepare(model)
    output = objective.predict(model, pictures(), 0)
    loss, metrics = objective.generator_loss(output, pictures(), 0, model.last_layer)
    target = VisionTeacher(str(clip), None, "embedding")(pictures())
    rows = model.embed(output.codes)
    commitment, codebook = (
        (rows.detach() - output.latents).pow(2).mean(),
        (rows - output.latents.detach()).pow(2),
    )
    distance = (output.reconstruction[:, 0] - target).pow(2).mean()
    cosine = torch.cosine_similarity(output.rebuilt, output.queries, dim=-1).mean()
    expected = 5 * (commitment + 0.25 * codebook.mean()) + 0.5 * distance + 2 * (1 - cosine)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["loss"], expected.detach())
    assert not list(objective.parameters())  # the teacher is nowhere to be trained or saved


def test_the_contrastive_loss_is_blip_2s() -> None:
    config = ContrastiveObjectiveConfig(text_tokenizer=None, blip2=None, smoothing=0.1, temperature=0.5)
    objective = config.build()
    one, two = (
        F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(n)), dim=1) for n in (1, 2)
    )
    loss, metrics = objective.generator_loss(Met(one, two), None, 0, one)
    logits = one @ two.T / 0.5

    def half(scores: Tensor) -> Tensor:
        logs = scores.log_softmax(1)
        return -(0.9 * logs.diagonal() + 0.1 * logs.mean(1)).mean()

    torch.testing.assert_close(loss, (half(logits) + half(logits.T)) / 2)
    assert metrics["accuracy"] == (logits.argmax(1) == torch.arange(3)).float().mean()


def test_captions_are_read_whole_and_padding_is_not() -> None:
    objective = ContrastiveObjectiveConfig(text_tokenizer=None, blip2=None, length=16).build()
    model = make()
    objective.prepare(model)
    objective.eval()
    told = objective.predict(model, (pictures(2), ["ab", "a longer caption, cut"]), 0).captions
    alone = objective.predict(model, (pictures(1), ["ab"]), 0).captions
    torch.testing.assert_close(told[:1], alone)
    other = objective.predict(model, (pictures(1), ["ac"]), 0).captions
    assert not torch.allclose(other, alone)
    same = objective.predict(model, (pictures(1), ["a longer caption"]), 0).captions
    assert (same - told[1:]).abs().max() < (same - alone).abs().max()
    with pytest.raises(ValueError, match="'x' has no caption"):
        objective.collate([Example("x", (), pictures(1)[0])])


def test_the_first_stage_starts_from_blip_2(tmp_path: Path) -> None:
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    config = Blip2Config(
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8,
        },
        qformer_config={
            "vocab_size": 258, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "encoder_hidden_size": 16, "max_position_embeddings": 20,
            "use_qformer_text_input": True,
        },
        num_query_tokens=6, image_text_hidden_size=12, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs: Any = Blip2ForImageTextRetrieval(config).eval()
    theirs.save_pretrained(tmp_path)
    options = {"text_tokenizer": None, "blip2": str(tmp_path), "length": 16}
    objective, model = ContrastiveObjectiveConfig(**options, width=12).build(), make()
    objective.prepare(model)
    objective.eval()
    ids, visible = objective.words(["a red circle"], 16)
    states = theirs.qformer(
        query_embeds=theirs.embeddings(input_ids=ids), query_length=0, attention_mask=visible
    ).last_hidden_state
    expected = F.normalize(theirs.text_projection(states[:, 0]), dim=-1)
    torch.testing.assert_close(
        objective.predict(model, (pictures(1), ["a red circle"]), 0).captions, expected
    )
    assert torch.equal(model.query_tokens, theirs.query_tokens)
    assert torch.equal(model.ln_vision.weight, theirs.vision_model.post_layernorm.weight)
    with pytest.raises(LexelError, match=r"does not fit: .*text\.projection"):
        ContrastiveObjectiveConfig(**options, width=13).build().prepare(make())
    with pytest.raises(LexelError, match="cannot be loaded"):
        ContrastiveObjectiveConfig(text_tokenizer=None, blip2=str(tmp_path / "no")).build().prepare(make())


def test_a_published_text_tokenizer_reads_the_captions(tmp_path: Path) -> None:
    words = train_text_tokenizer(CAPTIONS, 280)
    words.save_pretrained(str(tmp_path))
    objective = ContrastiveObjectiveConfig(text_tokenizer=str(tmp_path)).build()
    ids, visible = objective.words(CAPTIONS, 5)
    assert ids.shape == visible.shape == (4, 5)
    assert int(ids.max()) < objective.words.count
    assert (ids[:, 0] == ids[0, 0]).all()
    with pytest.raises(LexelError, match=r"text tokenizer .*none cannot be loaded"):
        ContrastiveObjectiveConfig(text_tokenizer=str(tmp_path / "none")).build()


def test_the_objectives_refuse_what_does_not_fit(clip: Path) -> None:
    objective = SeedObjectiveConfig(teacher=str(clip)).build()
    with pytest.raises(LexelError, match="tokenizer=seed"):
        objective.prepare(torch.nn.Linear(1, 1))
    with pytest.raises(LexelError, match=r"set tokenizer\.features=10"):
        objective.prepare(make(replace(SMALL, features=12)))
    with pytest.raises(LexelError, match=r"nowhere\.pth does not exist"):
        ContrastiveObjectiveConfig(text_tokenizer=None, encoder="nowhere.pth").build().prepare(make())


def test_the_debug_size_trains_against_a_frozen_clip(tmp_path: Path) -> None:
    """The teacher is built as `benchmarks.teacher` builds it, untrained."""
    from benchmarks import teacher

    model, words = teacher.build(32, 300, 1, 2), train_text_tokenizer(CAPTIONS, 280)
    teacher.save(model, words, tmp_path / "teacher")
    overrides = {
        "experiment": "seed_debug", "objective.tokenizer.teacher": tmp_path / "teacher",
        "objective.tokenizer.encoder": tmp_path / "teacher",
    }  # fmt: skip
    with initialize_config_module("lexel.conf", version_base="1.3"):
        run = resolve(compose("train", overrides=[f"{key}={value}" for key, value in overrides.items()]))
    network = run.tokenizer.build().train()
    objective = run.objective["tokenizer"].build()
    module = TokenizerModule(network, objective, run.stages.tokenizer)
    x = pictures(2, 32)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(8):
        loss, _ = module.compute(network, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
