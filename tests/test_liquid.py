"""Liquid as a whole: from its published folders to pictures, answers and training rows, and back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as Pictures
from safetensors.torch import load_file

from lexel.cli import main
from lexel.data.documents import DocumentDataset, Mixture
from lexel.data.images import on_square
from lexel.data.sampler import Draw
from lexel.data.tokenized import CodeExample
from lexel.document import DocumentCodec, Image, Text
from lexel.errors import LexelError
from lexel.models import export_published, find_published, load_published
from lexel.models.backbones import save_backbone
from lexel.prompts import FORMATS
from lexel.sample.bundle import load_text_tokenizer
from lexel.sample.liquid import (
    begin_liquid,
    load_liquid,
    load_vqgan,
    renamed_tokens,
    save_liquid,
    to_uint8,
)
from lexel.sample.logits import SamplingConfig
from lexel.sample.pipeline import Pipeline
from lexel.train.objectives.lm import NextTokenObjective
from lexel.verify.fixture import Fixture
from lexel.verify.liquid import read_row

GOLDEN = Path(__file__).parent / "golden"


def unpack(system, folder):
    """A fixture as the published folders."""
    fixture = Fixture(GOLDEN / system, folder)
    fixture.weights()
    for part in ("llm", "vqgan"):
        shutil.copytree(fixture.folder / part, folder / part, dirs_exist_ok=True)
    return fixture


@pytest.fixture(scope="module", params=["liquid", "liquid_llama"])
def opened(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    fixture = unpack(request.param, folder)
    return fixture, folder, load_liquid(folder / "llm", folder / "vqgan", image_size=8)


def test_published_keys_are_consumed_exactly():
    system, row = find_published("liquid-7b")
    with torch.device("meta"):
        model = system.config(row.arguments).build()
    (keys, *_) = json.loads((GOLDEN / "liquid" / "published_keys.json").read_text()).values()
    assert system.layouts[0].shapes(model) == {key: tuple(shape) for key, shape in keys["keys"]}


def test_the_model_alone_opens_by_its_published_name(opened, tmp_path):
    _, folder, pipe = opened
    lm = load_published("liquid-7b", folder / "llm")
    assert lm.fingerprint() == pipe.lm.fingerprint()
    export_published(lm, "liquid-7b", tmp_path)
    assert load_published("liquid-7b", tmp_path).fingerprint() == lm.fingerprint()
    with pytest.raises(LexelError, match=r"config\.json"):
        load_published("liquid-7b", folder / "llm", {"vocab_size": 7})


def test_published_settings_are_the_defaults(opened):
    _, _, pipe = opened
    assert pipe.sampling["image"] == SamplingConfig(temperature=0.99, top_k=4096, top_p=0.96, guidance=7.0)
    pictures = pipe.draw("a red cat", count=2, seed=0, decoding="plain")
    assert pictures.shape == (2, 3, 8, 8)
    again = pipe.draw("a red cat", count=2, seed=0, decoding="plain")
    assert torch.equal(pictures, again)


def test_an_answer_is_text(opened):
    fixture, _, pipe = opened
    picture = Image(pixels=fixture.recorded["i2t.image"][0])
    output = pipe([picture, Text("What colour?"), Text.blank()], text_limit=6, decoding="plain")
    assert isinstance(output.documents[0][-1], Text)
    assert bool(pipe.codec.vocabulary.mask("text")[output.ids[0][:-1]].all())
    assert isinstance(pipe.describe(fixture.recorded["i2t.image"][0], text_limit=4, decoding="plain"), str)


def test_ragged_rows_compute_what_left_padded_ones_do(opened):
    """transformers on the recorded batch, padding and position ids as published; ours has no padding."""
    from transformers import AutoModelForCausalLM

    fixture, folder, _ = opened
    theirs = AutoModelForCausalLM.from_pretrained(folder / "llm")
    mask = fixture.recorded["t2i.attention_mask"]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        logits = theirs(fixture.recorded["t2i.input_ids"], attention_mask=mask, position_ids=positions).logits
    cond, uncond = logits[:, -1].chunk(2)
    guided = uncond + fixture.config["guidance_scale"] * (cond - uncond)
    expected = fixture.recorded["t2i.cfg.first_logits"][:, 0]  # `lexel verify` compares ours with these
    assert (guided - expected).abs().max() < 1e-4 * expected.abs().max()


# Pictures


def test_pictures_are_padded_to_a_square_as_published():
    picture = Pictures.new("RGB", (20, 10), (255, 0, 0))
    pixels = on_square(picture, (8, 8), (122, 116, 104))
    assert pixels.shape == (3, 8, 8)
    grey = torch.tensor([122, 116, 104]) / 127.5 - 1
    assert torch.allclose(pixels[:, 0, :], grey[:, None].expand(3, 8), atol=0.03)
    assert torch.allclose(pixels[:, 4, 4], torch.tensor([1.0, -1.0, -1.0]), atol=0.03)
    same = Pictures.new("RGB", (8, 8), (1, 2, 3))
    assert torch.equal(on_square(same, (8, 8), (9, 9, 9))[:, 0, 0], torch.tensor([1, 2, 3]) / 127.5 - 1)


def test_the_pipeline_reads_files_that_way(opened, tmp_path):
    _, _, pipe = opened
    Pictures.new("RGB", (4, 16), (0, 0, 0)).save(tmp_path / "tall.png")
    pixels = pipe.read_picture(tmp_path / "tall.png")
    assert torch.allclose(pixels[:, 4, 0], torch.tensor([122, 116, 104]) / 127.5 - 1, atol=0.05)


def test_bytes_are_cut_off():
    pixels = torch.tensor([-1.0, 1.0, 0.999, 2.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_uint8(pixels)[0, 0].flatten().tolist() == [0, 255, 254, 255]


def test_another_size_leaves_attention_where_it_was(tmp_path):
    unpack("liquid", tmp_path)
    path = tmp_path / "vqgan" / "vqgan.yaml"
    path.write_text(path.read_text().replace("attn_resolutions: []", "attn_resolutions: [8]"))
    with pytest.raises(LexelError, match=r"missing .*attn"):  # the file was trained without
        load_vqgan(tmp_path / "vqgan", 32)


# Training rows


def test_training_rows_have_the_recorded_labels(opened):
    fixture, _, pipe = opened
    pictures = list(fixture.recorded["train.vq_codes"])
    rows = []
    for line in fixture.config["train_rows_as_tokens"]:
        document, unconditional, wording = read_row(line, pipe.codec, pictures)
        rows.append(pipe.codec.build(document, unconditional=unconditional, wording=wording))
    batch = pipe.codec.collate(rows)
    labels = batch.ids.masked_fill(~batch.loss_mask, -100)
    assert torch.equal(labels, fixture.recorded["train.labels"])
    output = pipe.lm(batch)
    loss, _ = NextTokenObjective()(output, batch, code_offsets=(), pad_id=0)
    assert loss.item() == pytest.approx(fixture.recorded["train.loss"].item(), rel=1e-5)


def test_recorded_rows_are_read_back(opened):
    fixture, _, pipe = opened
    for ids in fixture.recorded["train.input_ids"]:
        document = pipe.codec.parse(ids)
        kinds = " ".join(segment.modality for segment in document)
        assert kinds in FORMATS["liquid"].forms or kinds == "image"
        assert "Generate" not in "".join(s.text for s in document if isinstance(s, Text))


def test_documents_are_drawn_in_liquids_forms(opened):
    _, _, pipe = opened
    codes = [CodeExample("a", ("blue bird",), torch.arange(16)[:, None])]
    data = DocumentDataset(codes, pipe.codec, Mixture(1.0, 1.0), drop=0.1)
    rows = [data[Draw(0, counter)].ids for counter in range(400)]
    special = pipe.codec.vocabulary.special
    dropped = [row for row in rows if special["uncond"] in row]
    drawn = [row for row in rows if row[1] != special["boi"]]
    assert len(drawn) == pytest.approx(200, abs=40)
    assert len(dropped) == pytest.approx(20, abs=15)
    wordings = {tuple(row[3 : row.tolist().index(special["boi"])].tolist()) for row in drawn}
    assert len(wordings) == 11  # the ten instructions, and none where the text is dropped


# Bundles, export and a beginning


def test_a_bundle_keeps_the_forms(opened, tmp_path):
    _, _, pipe = opened
    pipe.save_pretrained(tmp_path)
    again = Pipeline.from_pretrained(tmp_path)
    document = [Text("a red cat"), Image.blank()]
    assert torch.equal(again.codec.prompt(document).ids, pipe.codec.prompt(document).ids)
    options = {"seed": 0, "decoding": "plain"}
    assert torch.equal(again.draw("blue bird", **options), pipe.draw("blue bird", **options))


def test_the_published_layout_is_written_and_opens_in_transformers(opened, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fixture, folder, pipe = opened
    save_liquid(pipe, tmp_path)
    again = load_liquid(tmp_path / "llm", tmp_path / "vqgan")
    assert again.lm.fingerprint() == pipe.lm.fingerprint()
    assert again.tokenizer.fingerprint() == pipe.tokenizer.fingerprint()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm", padding_side="left")
    assert len(tokenizer) == fixture.config["image_token_offset"]
    text = [
        prompt + " Generate an image based on this description.<boi>" for prompt in fixture.config["prompts"]
    ]
    ids = tokenizer([*text, *["<unconditional><boi>"] * 2], return_tensors="pt", padding=True).input_ids
    assert torch.equal(ids, fixture.recorded["t2i.input_ids"])
    keys = set(load_file(folder / "llm" / "model.safetensors"))
    assert set(load_file(tmp_path / "llm" / "model.safetensors")) == keys
    assert theirs.config.vocab_size == pipe.lm.config.vocab_size
    checkpoint = torch.load(tmp_path / "vqgan" / "vqgan.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {
        *torch.load(folder / "vqgan" / "vqgan.ckpt", weights_only=True)["state_dict"]
    }


def test_only_liquids_documents_are_written_so(opened, tmp_path):
    _, _, pipe = opened
    codec = DocumentCodec(
        replace(pipe.codec.vocabulary, forms=""), pipe.codec.text_tokenizer, pipe.codec.layouts
    )
    with pytest.raises(LexelError, match="only a model of Liquid's documents"):
        save_liquid(Pipeline(pipe.tokenizer, pipe.lm, codec), tmp_path)


def plain_gemma(folder):
    """The fixture's text tokenizer with Gemma's own names, and its model without codes."""
    unpack("liquid", folder)
    text = folder / "llm" / "tokenizer.json"
    for number, name in enumerate(("<boi>", "<eoi>", "<unconditional>")):
        text.write_text(text.read_text().replace(f'"{name}"', f'"<unused{number}>"'))
    lm = load_published("liquid-7b", folder / "llm")
    from lexel.models.extend import extend_vocabulary

    extend_vocabulary(lm, 128, 128)
    save_backbone(lm, folder / "llm")
    return folder


def test_liquid_begins_from_a_text_model(tmp_path):
    folder = plain_gemma(tmp_path)
    with pytest.raises(LexelError, match="has no <boi>"):
        load_liquid(folder / "llm", folder / "vqgan")
    pipe = begin_liquid(folder / "llm", folder / "vqgan", image_size=8)
    assert pipe.lm.config.vocab_size == 192
    assert pipe.codec.vocabulary.special["uncond"] == 9
    assert pipe.codec.text_tokenizer.encode("<boi>a", add_special_tokens=False) == [7, 29]
    table = pipe.lm.model.embed_tokens.weight
    assert torch.allclose(table[128:].mean(0), table[:128].mean(0), atol=1e-3)
    save_liquid(pipe, tmp_path / "written")
    assert load_liquid(tmp_path / "written/llm", tmp_path / "written/vqgan").lm.config == pipe.lm.config


def test_absent_tokens_are_named(tmp_path):
    unpack("liquid", tmp_path)
    with pytest.raises(LexelError, match="has no token <spare>"):
        renamed_tokens(load_text_tokenizer(tmp_path / "llm"), {"<spare>": "<new>"})


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(LexelError, match=r"vqgan\.yaml is not a readable VQGAN config"):
        load_vqgan(tmp_path)
    (tmp_path / "vqgan.yaml").write_text("model: [")
    with pytest.raises(LexelError, match=r"vqgan\.yaml is not a readable VQGAN config"):
        load_vqgan(tmp_path)


def test_the_command_draws_and_describes_from_the_published_folders(opened, tmp_path, capsys):
    _, folder, _ = opened
    options = ["--bundle", str(folder), "--decoding", "plain", "--seed", "0"]
    assert main(["sample", "a red cat", "--count", "1", "--out", str(tmp_path), *options]) == 0
    assert main(["describe", str(tmp_path / "0000.png"), *options]) == 0
    with Pictures.open(tmp_path / "0000.png") as picture:
        assert picture.size == (16, 16)  # the size that vqgan.yaml names
    capsys.readouterr()
