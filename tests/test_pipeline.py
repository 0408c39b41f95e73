"""The pipeline and its bundle folder, on random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline, full_disk
from PIL import Image as PictureFile
from safetensors.torch import load_file

from lexel.data.images import to_image
from lexel.data.shapes import ShapesConfig
from lexel.document import DocumentCodec, Image, Text
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.models.detokenizers import from_pretrained as load_detokenizer
from lexel.sample.bundle import DecodingConfig, find_bundle, load_tokenizer_of
from lexel.sample.codes import code_map, concat_codes
from lexel.sample.logits import SamplingConfig
from lexel.sample.partial import completed
from lexel.sample.pipeline import Pipeline
from lexel.tokenizers import from_pretrained as load_tokenizer
from lexel.types import Codes
from lexel.vocabulary import Vocabulary

DRAW = [Text("a red circle"), Image.blank()]


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle folder to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


class TestGeneration:
    def test_every_direction_is_the_same_call(self, tiny_pipeline, pixels):
        picture = Image(pixels=pixels)
        drawn = tiny_pipeline(DRAW, seed=0).documents[0]
        described = tiny_pipeline([picture, Text.blank()], seed=0).documents[0]
        redrawn = tiny_pipeline([picture, Text("but blue"), Image.blank()], seed=0).documents[0]
        written = tiny_pipeline([Text.blank()], seed=0).documents[0]
        both = tiny_pipeline([Text.blank(), Image.blank()], seed=0, text_limit=8).documents[0]
        assert [s.modality for s in drawn] == ["text", "image"]
        assert [s.modality for s in described] == ["image", "text"]
        assert [s.modality for s in redrawn] == ["image", "text", "image"]
        assert [s.modality for s in written] == ["text"]
        assert [s.modality for s in both] == ["text", "image"]
        assert described[0].codes.indices.equal(tiny_pipeline.encode(pixels[None]).indices)

    def test_pictures_are_their_codes_decoded(self, tiny_pipeline):
        image = tiny_pipeline(DRAW, seed=3).documents[0][-1]
        with torch.no_grad():
            expected = tiny_pipeline.tokenizer.decode(image.codes).clamp(-1, 1)[0]
        torch.testing.assert_close(image.pixels, expected)

    def test_ids_are_the_documents_codes(self, tiny_pipeline):
        output = tiny_pipeline(DRAW, count=2, seed=3)
        layout, vocabulary = tiny_pipeline.codec.layouts["image"], tiny_pipeline.codec.vocabulary
        for document, ids, length in zip(output.documents, output.ids, output.lengths):
            expected = vocabulary.to_ids(layout.flatten(document[-1].codes), layout)[0, :, 0]
            assert ids.equal(expected)
            assert length == 16

    def test_a_seed_repeats_exactly_and_another_differs(self, tiny_pipeline):
        options = {"count": 4, "temperature": 1.0, "batch_size": 3}
        first, again, other = (tiny_pipeline(DRAW, seed=s, **options) for s in (5, 5, 6))
        assert all(a.equal(b) for a, b in zip(first.ids, again.ids))
        assert not all(a.equal(b) for a, b in zip(first.ids, other.ids))
        assert not first.ids[0].equal(first.ids[1])
        pixels = [[d[-1].pixels for d in o.documents] for o in (first, again)]
        assert all(a.equal(b) for a, b in zip(*pixels))

    def test_a_seed_leaves_torchs_own_generator_alone(self, tiny_pipeline):
        before = torch.random.get_rng_state()
        tiny_pipeline(DRAW, seed=5, detokenizer=True, steps=1)
        assert torch.random.get_rng_state().equal(before)

    @pytest.mark.parametrize("decoding", ["nested", "jacobi", "drafter"])
    def test_greedy_speculation_is_greedy_decoding(self, tiny_pipeline, decoding):
        plain = tiny_pipeline(DRAW, temperature=0.0, decoding="plain")
        fast = tiny_pipeline(DRAW, temperature=0.0, decoding=decoding)
        assert fast.ids[0].equal(plain.ids[0])
        assert fast.stats.target_forwards <= plain.stats.target_forwards
        assert plain.stats.mean_accepted == 1.0

    def test_auto_is_the_bundles_own_choice(self, tiny_pipeline):
        eager = Pipeline(
            tiny_pipeline.tokenizer,
            tiny_pipeline.lm,
            tiny_pipeline.codec,
            decoding=DecodingConfig("jacobi", window=3),
        )
        assert eager.strategies[0] == "plain"
        assert {"nested", "jacobi"} <= set(eager.strategies)
        assert "drafter" not in eager.strategies
        chosen = eager(DRAW, seed=0)
        assert chosen.stats.mean_accepted > 1
        assert max(chosen.stats.accept_lengths) <= 4
        wide = eager(DRAW, seed=0, decoding="jacobi").stats
        assert max(wide.accept_lengths) > 4, "a named strategy has its usual window"

    def test_settings_come_from_the_bundle_then_the_call(self, tiny_pipeline):
        settings = tiny_pipeline._settings(("image",), None, None, None)
        assert settings == {"image": tiny_pipeline.sampling["image"]}
        changed = tiny_pipeline._settings(("text", "image"), SamplingConfig(top_k=5), 3.0, None)
        assert changed == dict.fromkeys(("text", "image"), SamplingConfig(top_k=5, guidance=3.0))
        with pytest.raises(ValueError, match="no modality sound"):
            tiny_pipeline(DRAW, sampling={"sound": SamplingConfig()})

    def test_greedy_rows_do_not_depend_on_their_neighbours(self, tiny_pipeline):
        texts = ["a red circle", "a blue square left of a red ring", "b"]
        documents = [[Text(text), Image.blank()] for text in texts]
        together = tiny_pipeline.generate(documents, temperature=0.0)
        for document, ids in zip(documents, together.ids):
            assert ids.equal(tiny_pipeline(document, temperature=0.0).ids[0])

    @pytest.mark.parametrize("decoding", ["plain", "jacobi"])
    def test_drawing_and_describing_in_one_call(self, tiny_pipeline, pixels, decoding):
        documents = [DRAW, [Image(pixels=pixels), Text.blank()], [Text("b"), Image.blank()]]
        output = tiny_pipeline.generate(documents, temperature=0.0, decoding=decoding, text_limit=8)
        assert [[s.modality for s in document] for document in output.documents] == [
            ["text", "image"],
            ["image", "text"],
            ["text", "image"],
        ]
        for document, ids in zip(documents, output.ids):
            assert ids.equal(tiny_pipeline(document, temperature=0.0, text_limit=8).ids[0])

    def test_detokenizer_draws_the_same_codes(self, tiny_pipeline):
        plain = tiny_pipeline(DRAW, seed=2).documents[0][-1]
        drawn, again = (
            tiny_pipeline(DRAW, seed=2, detokenizer=True, steps=2).documents[0][-1] for _ in range(2)
        )
        assert drawn.codes.indices.equal(plain.codes.indices)
        assert drawn.pixels.equal(again.pixels)
        assert not drawn.pixels.equal(plain.pixels)

    def test_a_caption_is_cut_where_the_context_ends(self, tiny_pipeline, pixels):
        """The random model never closes its text; it must stop at the context's end, not fail."""
        output = tiny_pipeline([Image(pixels=pixels), Text.blank()], text_limit=1000)
        prompt = 1 + 1 + 16 + 1
        assert output.lengths[0] <= tiny_pipeline.lm.config.max_length - prompt

    def test_an_empty_text_keeps_its_place(self, tiny_pipeline, pixels):
        document = [Image(pixels=pixels), Text.blank(), Text.blank()]
        (job,) = tiny_pipeline._jobs([document], None, None, None, 4, torch.Generator())
        eos = torch.tensor([tiny_pipeline.codec.vocabulary.special["eos"]] * 2)
        written = completed(tiny_pipeline.codec, job, eos)
        assert [segment.text for segment in written] == ["", ""]

    @pytest.mark.parametrize("family", ["flexible", "factorized"])
    def test_other_families_draw_describe_and_survive_saving(self, family, tmp_path, pixels):
        pipe = build_tiny_pipeline(family)
        pipe.save_pretrained(tmp_path / "bundle")
        loaded = Pipeline.from_pretrained(tmp_path / "bundle")
        first, second = (p(DRAW, count=3, seed=1, temperature=1.0) for p in (pipe, loaded))
        assert all(a.equal(b) for a, b in zip(first.ids, second.ids))
        for document in first.documents:
            assert document[-1].pixels.shape == (3, 32, 32)
        assert pipe.describe(pixels, seed=0) == loaded.describe(pixels, seed=0)
        for strategy in pipe.strategies:
            drawn = pipe(DRAW, count=2, seed=2, temperature=0.0, decoding=strategy)
            assert drawn.ids[0].equal(pipe(DRAW, temperature=0.0, decoding="plain").ids[0])


class TestPictures:
    def test_reconstruct_is_decode_of_encode(self, tiny_pipeline, pixels):
        with torch.no_grad():
            codes = tiny_pipeline.tokenizer.encode(pixels[None])
            expected = tiny_pipeline.tokenizer.decode(codes).clamp(-1, 1)[0]
        torch.testing.assert_close(tiny_pipeline.reconstruct(pixels), expected)

    def test_files_pil_pictures_and_pixels_are_equal(self, tiny_pipeline, pixels, tmp_path):
        to_image(pixels).save(tmp_path / "picture.png")
        from_file = tiny_pipeline.read_picture(tmp_path / "picture.png")
        with PictureFile.open(tmp_path / "picture.png") as file:
            assert tiny_pipeline.read_picture(file).equal(from_file)
        assert (from_file - pixels).abs().max() <= 1 / 255 + 1e-6
        assert tiny_pipeline.read_picture(pixels) is pixels

    def test_flexible_lengths(self, pixels):
        pipe = build_tiny_pipeline("flexible")
        short, full = pipe.reconstruct(pixels, 1), pipe.reconstruct(pixels)
        assert not short.equal(full)
        assert pipe.encode(pixels[None], 2).lengths.tolist() == [2]
        with pytest.raises(LexelError, match="1 to 6 tokens"):
            pipe.reconstruct(pixels, 7)

    def test_a_fixed_tokenizer_refuses_a_length(self, tiny_pipeline, pixels):
        with pytest.raises(LexelError, match="always 16 tokens"):
            tiny_pipeline.reconstruct(pixels, 4)

    def test_code_map_lays_codebooks_below_each_other(self):
        grid = Codes(torch.arange(12).reshape(1, 6, 2), grid=(2, 3))
        assert code_map(grid).tolist() == [[0, 2, 4], [6, 8, 10], [1, 3, 5], [7, 9, 11]]
        line = Codes(torch.arange(5).reshape(1, 5, 1), lengths=torch.tensor([4]))
        assert code_map(line).tolist() == [[0, 1], [2, 3], [-1, -1]]

    def test_concat_codes(self):
        parts = [Codes(torch.full((n, 3, 1), n), lengths=torch.full((n,), n)) for n in (1, 2)]
        both = concat_codes(parts)
        assert both.indices[:, 0, 0].tolist() == [1, 2, 2]
        assert both.lengths.tolist() == [1, 2, 2]
        with pytest.raises(ValueError, match="no codes"):
            concat_codes([])


class TestBundle:
    def test_round_trip_is_bit_exact(self, tiny_pipeline, tiny_bundle):
        loaded = Pipeline.from_pretrained(tiny_bundle)
        for part in ("tokenizer", "lm", "detokenizer", "drafter"):
            own, other = (getattr(p, part).state_dict() for p in (tiny_pipeline, loaded))
            assert own.keys() == other.keys()
            assert all(own[key].equal(other[key]) for key in own)
            assert not getattr(loaded, part).training
        assert loaded.sampling == tiny_pipeline.sampling
        assert loaded.decoding == tiny_pipeline.decoding
        assert loaded.codec.layouts == tiny_pipeline.codec.layouts
        assert loaded.codec.vocabulary == tiny_pipeline.codec.vocabulary
        first, second = (p(DRAW, count=2, seed=9, temperature=1.0) for p in (tiny_pipeline, loaded))
        assert all(a.equal(b) for a, b in zip(first.ids, second.ids))

    def test_each_part_loads_alone(self, tiny_pipeline, tiny_bundle):
        fingerprint = tiny_pipeline.tokenizer.fingerprint()
        assert load_tokenizer(tiny_bundle / "tokenizer").fingerprint() == fingerprint
        assert load_tokenizer_of(tiny_bundle).fingerprint() == fingerprint
        assert load_tokenizer_of(tiny_bundle / "tokenizer").fingerprint() == fingerprint
        assert CausalLM.from_pretrained(tiny_bundle / "lm").config == tiny_pipeline.lm.config
        assert load_detokenizer(tiny_bundle / "detokenizer").config == tiny_pipeline.detokenizer.config

    def test_weights_are_safetensors_only(self, tiny_bundle):
        names = {path.suffix for path in tiny_bundle.rglob("*") if path.is_file()}
        assert names <= {".json", ".safetensors", ".md"}

    def test_half_precision_is_a_fixed_point(self, tiny_pipeline, tmp_path):
        """Saved in bfloat16, loaded and saved again: the same numbers."""
        tiny_pipeline.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
        loaded = Pipeline.from_pretrained(tmp_path / "half")
        stored = load_file(tmp_path / "half" / "lm" / "model.safetensors")
        assert {value.dtype for value in stored.values()} == {torch.bfloat16}
        loaded.save_pretrained(tmp_path / "again", dtype=torch.bfloat16)
        again = load_file(tmp_path / "again" / "lm" / "model.safetensors")
        assert all(stored[key].equal(again[key]) for key in stored)

    def test_another_tokenizer_is_refused(self, copied):
        build_tiny_pipeline(seed=1).tokenizer.save_pretrained(copied / "tokenizer")
        with pytest.raises(LexelError, match="trained on the codes of tokenizer"):
            Pipeline.from_pretrained(copied)

    def test_another_bundles_lm_is_refused(self, copied, tmp_path):
        build_tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
        shutil.rmtree(copied / "lm")
        shutil.copytree(tmp_path / "other" / "lm", copied / "lm")
        with pytest.raises(LexelError, match=r"lm was trained on .* take both from the same bundle"):
            Pipeline.from_pretrained(copied)

    def test_mismatched_parts_are_refused_at_once(self, tiny_pipeline):
        other = build_tiny_pipeline("flexible")
        with pytest.raises(LexelError, match=r"line of 6 .* 4x4 raster"):
            Pipeline(other.tokenizer, tiny_pipeline.lm, tiny_pipeline.codec)
        big = Vocabulary.build(500, {"image": (16,)})
        codec = DocumentCodec(big, tiny_pipeline.codec.text_tokenizer, tiny_pipeline.codec.layouts)
        with pytest.raises(LexelError, match=r"knows .* ids, but the vocabulary has"):
            Pipeline(tiny_pipeline.tokenizer, tiny_pipeline.lm, codec)
        with pytest.raises(LexelError, match="tokenizer deadbeef"):
            Pipeline(
                tiny_pipeline.tokenizer, tiny_pipeline.lm, tiny_pipeline.codec,
                tokenizer_fingerprint="deadbeef",
            )  # fmt: skip

    @pytest.mark.parametrize("name", ["bundle.json", "vocabulary.json", "text_tokenizer/tokenizer.json"])
    @pytest.mark.parametrize("content", [None, "", "{]", "[]", '{"format": 99}'])
    def test_damaged_files_are_named(self, copied, name, content):
        if content is None:
            (copied / name).unlink()
        else:
            (copied / name).write_text(content)
        with pytest.raises(LexelError) as error:
            Pipeline.from_pretrained(copied)
        assert name.split("/")[0] in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("part", ["tokenizer", "lm", "detokenizer", "drafter"])
    def test_a_missing_or_cut_part_is_named(self, copied, part):
        weights = copied / part / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        with pytest.raises(LexelError, match=part):
            Pipeline.from_pretrained(copied)
        shutil.rmtree(copied / part)
        with pytest.raises(LexelError, match=part):
            Pipeline.from_pretrained(copied)

    def test_an_unknown_setting_is_named(self, copied):
        values = json.loads((copied / "bundle.json").read_text())
        values["sampling"]["image"]["temprature"] = 1.0
        (copied / "bundle.json").write_text(json.dumps(values))
        with pytest.raises(LexelError, match="temprature"):
            Pipeline.from_pretrained(copied)

    def test_a_missing_bundle_says_what_to_do(self, tmp_path, monkeypatch):
        with pytest.raises(LexelError, match="does not exist"):
            Pipeline.from_pretrained(tmp_path / "nothing")
        with pytest.raises(LexelError, match="is not a bundle"):
            Pipeline.from_pretrained(tmp_path)
        monkeypatch.setattr("lexel.sample.bundle.SHIPPED", "absent")
        with pytest.raises(LexelError, match="lexel-train"):
            find_bundle(None)

    def test_a_full_disk_leaves_the_old_bundle_whole(self, copied):
        before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
        other = build_tiny_pipeline(seed=1)
        for room in (100, 5_000, 120_000):  # fails at the tokenizer's config, at a network, at the LM
            with full_disk(room), pytest.raises(LexelError, match="what was there before is kept"):
                other.save_pretrained(copied)
            assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before

    def test_the_card_is_written(self, tiny_pipeline, tmp_path):
        tiny_pipeline.save_pretrained(tmp_path, card="# hello\n")
        assert (tmp_path / "README.md").read_text() == "# hello\n"


class TestBadInput:
    def test_a_prompt_longer_than_the_context(self, tiny_pipeline):
        with pytest.raises(LexelError, match="context holds 96; shorten the prompt by"):
            tiny_pipeline([Text("xyz " * 100), Image.blank()])

    def test_the_message_names_the_shortfall(self, tiny_pipeline):
        """Exactly that many tokens less do fit."""
        codec = tiny_pipeline.codec
        fixed = len(codec.prompt([Text(""), Image.blank()]))
        most = 96 - fixed - 16
        assert len(codec.text_tokenizer.encode("z" * most, add_special_tokens=False)) == most
        tiny_pipeline([Text("z" * most), Image.blank()])
        with pytest.raises(LexelError, match="by 3 tokens"):
            tiny_pipeline([Text("z" * (most + 3)), Image.blank()])

    def test_documents_without_blanks(self, tiny_pipeline):
        with pytest.raises(ValueError, match="no blank"):
            tiny_pipeline([Text("a")])
        with pytest.raises(ValueError, match="count"):
            tiny_pipeline(DRAW, count=0)

    def test_unknown_or_impossible_decoding(self, tiny_pipeline):
        with pytest.raises(LexelError, match="no such strategy"):
            tiny_pipeline(DRAW, decoding="magic")
        bare = Pipeline(tiny_pipeline.tokenizer, tiny_pipeline.lm, tiny_pipeline.codec)
        with pytest.raises(LexelError, match=r"choose auto, plain, jacobi.* nested"):
            bare(DRAW, decoding="drafter")
        with pytest.raises(LexelError, match="no detokenizer"):
            bare(DRAW, detokenizer=True)

    def test_a_picture_of_another_size(self, tiny_pipeline):
        with pytest.raises(ValueError, match=r"\[3, 32, 32\]"):
            tiny_pipeline.reconstruct(torch.zeros(3, 16, 16))


def test_a_bundle_remembers_the_scenes_it_was_trained_on(tiny_pipeline, tmp_path):
    scenes = ShapesConfig(backgrounds=("dark",), variation=0.25)
    remembering = Pipeline(tiny_pipeline.tokenizer, tiny_pipeline.lm, tiny_pipeline.codec, scenes=scenes)
    remembering.save_pretrained(tmp_path)
    assert Pipeline.from_pretrained(tmp_path).scenes == scenes
