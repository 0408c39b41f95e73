"""LlamaGen's GPTs: published files and captions. The numbers of the published code are checked by
test_verify.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_t5 import tiny_t5

from lexel.checkpoints import read_checkpoint
from lexel.errors import LexelError
from lexel.models import export_published, find_published, llamagen_gpt, load_published
from lexel.models.caption_encoder import CaptionEncoder, clean_caption, left_padded
from lexel.sample.conditional import conditional_prompts
from lexel.types import TokenBatch
from lexel.verify.checkpoint import verify_checkpoint
from lexel.verify.fixture import Fixture
from lexel.verify.raster import teacher_forced

GOLDEN = Path(__file__).parent / "golden"
ROWS = {"llamagen_gpt_c2i": "llamagen-gpt-c2i-b-256", "llamagen_gpt_t2i": "llamagen-gpt-t2i-xl-256"}


@pytest.fixture(params=ROWS)
def loaded(request, tmp_path: Path):
    """(row, arguments, weight file, model)"""
    fixture = Fixture(GOLDEN / request.param, tmp_path)
    row = ROWS[request.param]
    arguments = find_published(row)[0].known(fixture.config)
    return row, arguments, fixture.weights(), load_published(row, fixture.weights(), arguments)


class TestFiles:
    @pytest.mark.parametrize("row", [row for system in llamagen_gpt.SYSTEMS for row in system.rows])
    def test_full_size_key_lists_are_consumed_exactly(self, row) -> None:
        system, _ = find_published(row.name)
        kind, size = row.name.split("-")[2:4]
        lists = json.loads((GOLDEN / system.name / "published_keys.json").read_text())
        with torch.device("meta"):
            model = system.config(row.arguments).build()
        recorded = lists[f"GPT-{size.upper()}-{kind}"]
        assert system.layouts[0].shapes(model) == {key: tuple(shape) for key, shape in recorded}
        assert f"{model.config.side}x{model.config.side}" == row.tokens

    def test_every_recorded_list_has_a_row(self) -> None:
        for system in llamagen_gpt.SYSTEMS:
            lists = json.loads((GOLDEN / system.name / "published_keys.json").read_text())
            sizes = {row.name.split("-")[3] for row in system.rows}
            assert {name.split("-")[1].lower() for name in lists} == sizes

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_what_is_written_is_what_was_read(self, loaded, suffix: str, tmp_path: Path) -> None:
        row, arguments, path, model = loaded
        export_published(model, row, tmp_path / f"again{suffix}")
        before, after = read_checkpoint(path), read_checkpoint(tmp_path / f"again{suffix}")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        again = load_published(row, tmp_path / f"again{suffix}", arguments)
        assert again.fingerprint() == model.fingerprint()

    @pytest.mark.parametrize("nesting", ["model", "module", "state_dict", ""])
    def test_nestings_and_leftovers_of_generating(self, loaded, nesting: str, tmp_path: Path) -> None:
        row, arguments, path, model = loaded
        state = read_checkpoint(path)
        state["freqs_cis"] = torch.zeros(17, 8, 2)
        state["layers.0.attention.kv_cache.k_cache"] = torch.zeros(2, 4, 24, 16)
        torch.save({nesting: state} if nesting else state, tmp_path / "other.pt")
        again = load_published(row, tmp_path / "other.pt", arguments)
        assert again.fingerprint() == model.fingerprint()

    def test_a_file_that_does_not_fit_is_refused_by_name(self, loaded, tmp_path: Path) -> None:
        row, arguments, path, _ = loaded
        state = read_checkpoint(path)
        state["layers.0.attention.wqkv.weight"] = state["layers.0.attention.wqkv.weight"][:-1]
        del state["layers.1.attention.wo.weight"]
        torch.save({"model": state}, tmp_path / "bad.pt")
        wrong = (
            r"missing layers\.1\.attention\.wo\.weight; layers\.0\.attention\.wqkv\.weight is \[191, 64\], "
        )
        with pytest.raises(LexelError, match=wrong + r"expected \[192, 64\]"):
            load_published(row, tmp_path / "bad.pt", arguments)

    def test_a_model_is_not_written_as_another_kind(self, loaded, tmp_path: Path) -> None:
        row, _, _, model = loaded
        other = next(name for name in ROWS.values() if name != row)
        with pytest.raises(LexelError, match="another kind of model"):
            export_published(model, other, tmp_path / "x.pt")
        with pytest.raises(LexelError, match="EagleConfig"):
            export_published(model, "eagle-vicuna-7b", tmp_path / "x.pt")

    def test_a_download_is_checked_by_name_and_shape(self, loaded) -> None:
        row, arguments, path, _ = loaded
        report = verify_checkpoint(find_published(row)[0].name, path, row, arguments)
        assert report.passed
        assert report.found == len(read_checkpoint(path))
        assert "draws nothing" in report.table()

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"block_size": 17}, "square number"),
            ({"model_type": "t2v"}, "c2i or t2i"),
            ({"dims": 3}, "no argument"),
        ],
    )
    def test_arguments_that_make_no_sense(self, wrong, message: str) -> None:
        with pytest.raises(LexelError, match=message):
            llamagen_gpt.SYSTEMS[0].config(wrong)

    def test_the_width_of_the_feed_forward(self) -> None:
        for arguments, width in (
            ({"dim": 3200}, 8704),
            ({"dim": 64, "multiple_of": 8}, 176),
            ({"dim": 64, "multiple_of": 8, "ffn_dim_multiplier": 1.3}, 224),
        ):
            config = llamagen_gpt.SYSTEMS[0].config({"n_head": 4, **arguments})
            assert config.hidden_width == width


class TestCaptions:
    def test_leaving_padding_out_changes_nothing(self, tmp_path: Path) -> None:
        """The publisher's code reads 120 positions and masks the padding, all but its view of itself."""
        fixture = Fixture(GOLDEN / "llamagen_gpt_t2i", tmp_path)
        row = ROWS["llamagen_gpt_t2i"]
        lm = load_published(row, fixture.weights(), find_published(row)[0].known(fixture.config))
        padded, real = fixture.input("caption_emb")[:2], fixture.input("emb_mask")[:2].bool()
        prompts, _ = conditional_prompts(lm, [features[mask] for features, mask in zip(padded, real)])
        codes = fixture.input("tokens")[:2]
        length = 120 + codes.shape[1] - 1
        ids = torch.nn.functional.pad(codes[:, :-1], (120, 0))
        positions = torch.zeros(2, length, 3, dtype=torch.long)
        positions[..., 0] = torch.arange(length)
        seen = torch.ones(length, length, dtype=torch.bool).tril().repeat(2, 1, 1)
        seen[:, :, :120] &= real[:, None]
        seen |= torch.eye(length, dtype=torch.bool)
        with torch.no_grad():
            embeds = lm.model.condition(padded).flatten(0, 1)
            index = torch.cartesian_prod(torch.arange(2), torch.arange(120))
            batch = TokenBatch(ids, torch.zeros_like(ids), positions, seen, None, embeds, index)
            hidden, _ = lm.decode(batch)
            expected = lm.project(hidden[:, 119:], 0, 96)
            torch.testing.assert_close(teacher_forced(lm, prompts, codes)[0], expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        ("caption", "clean"),
        [
            ("A <b>Photo</b> of an astronaut &amp; more!", "a photo of an astronaut more!"),
            ("see https://x.com/abc  jc6640 10x20 cat.jpg 'quoted' @me #123", "see 'quoted"),
            ("this-is-my-cute-cat_very", "this is my cute cat very"),
            ("a well-known cat", "a well-known cat"),
            ("漢字 cat — dog “x”", 'cat - dog "x"'),
            ("free shipping Worldwide: 1.2.3.4 (nice) [x] {y}", "worldwide: nice x y"),
            ("<script>alert(1)</script>a+cat%20<person>", "a cat person"),
            ("  ", ""),
        ],
    )  # fmt: skip
    def test_cleaning(self, caption: str, clean: str) -> None:
        assert clean_caption(caption) == clean

    def test_broken_encodings_are_mended_by_whom_one_likes(self) -> None:
        assert clean_caption("a cafe\u0301") == "a caf\u00e9"
        assert clean_caption("naÃ¯ve", lambda text: text.replace("ã¯", "ï")) == "naïve"

    def test_features_are_those_of_the_caption_alone(self, tmp_path: Path) -> None:
        encoder = CaptionEncoder.from_pretrained(tiny_t5(tmp_path))
        short, long = encoder.encode(["A Cat", "a red cat and a dog"])
        assert (short.shape, long.shape) == ((3, 16), (7, 16))  # with the end of the text
        torch.testing.assert_close(encoder.encode(["a  cat"])[0], short)
        padded, mask = left_padded([short, long], 9)
        assert mask.sum(1).tolist() == [3, 7]
        assert torch.equal(padded[0, 6:], short)
        assert not padded[0, :6].any()

    def test_no_more_than_120_tokens(self, tmp_path: Path) -> None:
        encoder = CaptionEncoder.from_pretrained(tiny_t5(tmp_path))
        assert encoder.encode(["cat " * 200])[0].shape == (120, 16)

    def test_a_missing_encoder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(LexelError, match="nothing-here could not be loaded"):
            CaptionEncoder.from_pretrained(tmp_path / "nothing-here")
