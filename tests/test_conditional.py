"""Pictures of classes and captions through the sampler, in Python and from the shell."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_t5 import tiny_t5

import lexel.sample.generator
from lexel.cli import main
from lexel.errors import LexelError
from lexel.models.raster_lm import RasterLM, RasterLMConfig
from lexel.sample.conditional import conditional_prompts, draw, raster_codec
from lexel.sample.drafters import ModelDrafter
from lexel.sample.logits import SamplingConfig
from lexel.sample.strategies import make_drafter, strategies
from lexel.sample.stream import Stream
from lexel.tokenizers import find_published, load_published
from lexel.verify.fixture import Fixture
from lexel.verify.raster import teacher_forced

CLASSES = RasterLMConfig((24,), dim=32, layers=2, heads=4, side=4, num_classes=5)
CAPTIONS = replace(CLASSES, condition="caption", condition_length=6, caption_dim=16)
GREEDY = SamplingConfig(temperature=0.0, guidance=3.0)


def built(config: RasterLMConfig, seed: int = 0) -> RasterLM:
    torch.manual_seed(seed)
    lm = config.build()
    for tensor in lm.state_dict().values():
        tensor.normal_(std=0.4)
    return lm.eval()


def given(lm: RasterLM) -> list:
    """Conditions of the model's kind; captions of several lengths."""
    if lm.config.condition == "class":
        return [1, 4, 0]
    torch.manual_seed(2)
    return [torch.randn(length, 16) for length in (2, 6, 1)]


@pytest.fixture(scope="module", params=["class", "caption"])
def lm(request) -> RasterLM:
    return built(CLASSES if request.param == "class" else CAPTIONS)


class TestDraw:
    def test_greedy_codes_are_the_most_probable_ones(self, lm: RasterLM) -> None:
        """Against logits of both rows of guidance in one pass each, without the sampler."""
        drawn = draw(lm, given(lm), sampling=GREEDY)
        assert drawn.grid == (4, 4)
        prompts, nulls = conditional_prompts(lm, given(lm))
        with torch.no_grad():
            cond, uncond = (teacher_forced(lm, rows, drawn.indices)[0] for rows in (prompts, nulls))
        assert torch.equal((uncond + 3 * (cond - uncond)).argmax(-1), drawn.indices[..., 0])
        assert len(drawn.indices[..., 0].unique(dim=0)) == 3

    @pytest.mark.parametrize("decoding", ["jacobi", "jacobi-repeat", "sjd", "jacobi-gumbel", "lookup", "pac"])
    def test_every_drafting_strategy_gives_the_same_pictures(self, lm: RasterLM, decoding: str) -> None:
        drafter = make_drafter(strategies(lm, {}), lm, decoding, 3)
        plain = draw(lm, given(lm), sampling=GREEDY)
        assert torch.equal(draw(lm, given(lm), sampling=GREEDY, drafter=drafter).indices, plain.indices)

    def test_a_small_model_of_classes_drafts_for_a_large_one(self) -> None:
        large, small = built(CLASSES), built(replace(CLASSES, layers=1), seed=1)
        plain = draw(large, [1, 2], sampling=GREEDY)
        drafted = draw(large, [1, 2], sampling=GREEDY, drafter=ModelDrafter(small, 3))
        assert torch.equal(drafted.indices, plain.indices)

    def test_steps_of_fixed_size(self, lm: RasterLM, monkeypatch) -> None:
        """Passes as they are captured on CUDA; the first of a caption reads features and is not."""
        plain = draw(lm, given(lm), sampling=GREEDY)
        monkeypatch.setattr(lexel.sample.generator, "Stream", partial(Stream, graphed=True))
        assert torch.equal(draw(lm, given(lm), sampling=GREEDY).indices, plain.indices)

    def test_company_and_order_change_nothing(self, lm: RasterLM) -> None:
        together = draw(lm, given(lm), sampling=GREEDY)
        few = draw(lm, given(lm), sampling=GREEDY, rows=2)
        assert torch.equal(few.indices, together.indices)
        for row, condition in enumerate(given(lm)):
            alone = draw(lm, [condition], sampling=GREEDY)
            assert torch.equal(alone.indices[0], together.indices[row])

    def test_seeds(self, lm: RasterLM) -> None:
        first, again, other = (draw(lm, given(lm), seed=seed).indices for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_guidance_for_the_first_codes_only(self, lm: RasterLM) -> None:
        whole, none = (draw(lm, given(lm), sampling=replace(GREEDY, guidance=s)).indices for s in (3.0, 1.0))
        some = draw(lm, given(lm), sampling=replace(GREEDY, guidance_steps=5)).indices
        assert torch.equal(some[:, :5], whole[:, :5])
        assert not torch.equal(some, whole)
        assert not torch.equal(some, none)
        every = draw(lm, given(lm), sampling=replace(GREEDY, guidance_steps=16)).indices
        assert torch.equal(every, whole)

    def test_the_unconditional_row_has_the_null_class_or_the_rows_of_the_same_places(self) -> None:
        _, nulls = conditional_prompts(built(CLASSES), [3])
        assert nulls[0].ids.tolist() == [CLASSES.class_offset + 5]
        lm = built(CAPTIONS)
        prompts, nulls = conditional_prompts(lm, [torch.randn(2, 16)])
        assert prompts[0].positions[:, 0].tolist() == nulls[0].positions[:, 0].tolist() == [4, 5]
        expected = lm.model.condition(lm.model.condition.uncond[4:])
        torch.testing.assert_close(nulls[0].embeds, expected.detach())

    def test_several_codes_of_a_position(self) -> None:
        lm = built(replace(CLASSES, codebook_sizes=(24, 10), head="parallel"))
        codes = draw(lm, [1, 2], sampling=GREEDY)
        assert codes.indices.shape == (2, 16, 2)
        assert codes.indices.amax((0, 1)).tolist()[1] < 10
        jacobi = draw(lm, [1, 2], sampling=GREEDY, drafter=make_drafter(strategies(lm, {}), lm, "jacobi", 3))
        assert torch.equal(jacobi.indices, codes.indices)

    def test_the_vocabulary_is_the_models(self) -> None:
        codec = raster_codec(CLASSES)
        assert codec.vocabulary.size == CLASSES.vocab_size
        with pytest.raises(LexelError, match="reads no text"):
            codec.text_tokenizer.encode("a")

    @pytest.mark.parametrize(
        ("config", "condition", "message"),
        [
            (CLASSES, 6, "from 0 to 4"),
            (CLASSES, -1, "from 0 to 4"),
            (CLASSES, torch.randn(2, 16), "a class label"),
            (CAPTIONS, 3, r"features \[1 to 6, 16\]"),
            (CAPTIONS, torch.randn(7, 16), "got \\[7, 16\\]"),
            (CAPTIONS, torch.randn(0, 16), "got \\[0, 16\\]"),
            (CAPTIONS, torch.randn(2, 15), "got \\[2, 15\\]"),
        ],
    )
    def test_conditions_that_the_model_does_not_take(self, config, condition, message: str) -> None:
        with pytest.raises(LexelError, match=message):
            draw(built(config), [condition])

    def test_nothing_to_draw(self) -> None:
        with pytest.raises(LexelError, match="nothing to draw"):
            draw(built(CLASSES), [])


class TestCommand:
    @pytest.fixture
    def parts(self, tmp_path: Path) -> tuple[Path, Path, Path]:
        """Folders of a class model, a caption model, and the tokenizer of their codes."""
        fixture = Fixture(Path(__file__).parent / "golden" / "llamagen_vq", tmp_path)
        arguments = find_published("llamagen-vq-16")[0].known(fixture.config)
        tokenizer = load_published("llamagen-vq-16", fixture.weights(), arguments)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        for name, config in (("classes", CLASSES), ("captions", CAPTIONS)):
            sizes = tokenizer.codebook_sizes
            built(replace(config, codebook_sizes=sizes)).save_pretrained(tmp_path / name)
        return tmp_path / "classes", tmp_path / "captions", tmp_path / "tokenizer"

    def test_classes(self, parts, tmp_path: Path, capsys) -> None:
        classes, _, tokenizer = parts
        command = ["draw", str(classes), "--tokenizer", str(tokenizer), "--classes", "3,1", "--count", "2"]
        options = ["--guidance", "2", "--top-k", "9", "--device", "cpu"]
        assert main([*command, *options, "--out", str(tmp_path / "a"), "--json"]) == 0
        pictures = json.loads(capsys.readouterr().out)["pictures"]
        assert [one["of"] for one in pictures] == [3, 3, 1, 1]
        with Image.open(pictures[3]["picture"]) as picture:
            assert picture.width == picture.height
        assert main([*command, *options, "--out", str(tmp_path / "b")]) == 0
        for name in ("0000.png", "0003.png"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        jacobi = ["--decoding", "jacobi", "--temperature", "0", "--device", "cpu"]
        assert main([*command, *jacobi, "--out", str(tmp_path / "c")]) == 0

    def test_captions(self, parts, tmp_path: Path, capsys) -> None:
        _, captions, tokenizer = parts
        encoder = ["--caption-encoder", str(tiny_t5(tmp_path / "t5")), "--device", "cpu"]
        command = ["draw", str(captions), "--tokenizer", str(tokenizer), *encoder, "--out", str(tmp_path)]
        assert main([*command, "--captions", "a red cat", "dog", "--guidance", "7.5"]) == 0
        assert capsys.readouterr().out.split() == [str(tmp_path / f"000{n}.png") for n in (0, 1)]

    def test_what_does_not_fit_is_said(self, parts, tmp_path: Path, capsys) -> None:
        classes, captions, tokenizer = parts
        built(CLASSES).save_pretrained(tmp_path / "other")
        own = ["--tokenizer", str(tokenizer), "--device", "cpu", "--out", str(tmp_path)]
        for arguments, message in (
            ([str(captions), "--classes", "1", *own], "draws from a caption condition, not a class"),
            ([str(classes), "--classes", "9", *own], "from 0 to 4"),
            ([str(classes), "--classes", "1"], "--tokenizer: name the tokenizer"),
            ([str(tmp_path / "other"), "--classes", "1", *own], "draws codes of (24,)"),
            (["no-such-model", "--classes", "1"], "no published model 'no-such-model'"),
            ([str(classes), "--classes", "1", *own, "--decoding", "fast"], "decoding=fast"),
        ):
            assert main(["draw", *arguments]) == 2
            assert message in capsys.readouterr().err
