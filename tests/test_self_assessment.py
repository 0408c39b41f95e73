"""Rounds of drawing, judging and learning to judge."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline

from lexel.data.checker import picture_shows
from lexel.data.sampler import Draw
from lexel.data.shapes import ShapesConfig
from lexel.document import Image, Text
from lexel.errors import LexelError
from lexel.sample.pipeline import Pipeline
from lexel.sample.verdict import ANSWERS, QUESTION, draw_best, own_verdicts, verdict_document
from lexel.train.chain import run_chain
from lexel.train.objectives.lm import NextTokenObjective
from lexel.train.self_assessment import (
    ExactChecker,
    VerdictDocuments,
    Verdicts,
    draw_and_judge,
    evaluator_of,
    measure,
)
from lexel.train.settings import Codes, Run, SelfAssessStage, Stages, Task
from lexel.types import Codes as CodesOf

CAPTIONS = ["a red circle", "a blue square", "a green ring"]


class Reds:
    """Says that what is mostly red is right; cannot judge green."""

    def judge(self, caption: str, pixels: torch.Tensor) -> bool | None:
        return None if "green" in caption else bool(pixels[0].mean() > pixels[2].mean())


def long_pipeline(length: int = 160) -> Pipeline:
    pipeline = build_tiny_pipeline()
    config = pipeline.lm.config
    torch.manual_seed(3)
    from dataclasses import replace

    pipeline.lm = replace(config, max_length=length).build().eval()
    pipeline.drafters.clear()
    return pipeline


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return long_pipeline()


def some_codes(count: int, seed: int = 0) -> CodesOf:
    generator = torch.Generator().manual_seed(seed)
    return CodesOf(torch.randint(16, (count, 16, 1), generator=generator), grid=(4, 4))


def half_codes(count: int, seed: int = 0) -> CodesOf:
    """Every second picture of codes below 8, the others of codes from 8."""
    codes = some_codes(count, seed).indices % 8
    return CodesOf(codes + 8 * (torch.arange(count) % 2)[:, None, None], grid=(4, 4))


def test_the_checker_judges_by_reading_the_picture():
    dataset = ShapesConfig(count=8).build("train")
    example = dataset[0]
    right = [ExactChecker().judge(caption, example.pixels) for caption in example.captions]
    assert right == [True] * len(right)
    other = ExactChecker().judge("a purple star", example.pixels)
    from lexel.data.captions import parse_caption

    assert other == picture_shows(example.pixels, parse_caption("a purple star"))
    assert ExactChecker().judge("what is this", example.pixels) is None
    assert isinstance(evaluator_of(ShapesConfig()), ExactChecker)
    with pytest.raises(LexelError, match="needs an evaluator"):
        evaluator_of(object())


def test_pictures_are_judged_as_they_are_decoded(pipe):
    verdicts = draw_and_judge(pipe, CAPTIONS * 3, Reds(), seed=1, temperature=1.0)
    assert verdicts.captions == tuple(CAPTIONS[:2] * 3), "what cannot be judged is left out"
    with torch.no_grad():
        pixels = pipe.tokenizer.decode(verdicts.codes).clamp(-1, 1)
    assert verdicts.right == tuple(bool(p[0].mean() > p[2].mean()) for p in pixels)
    with pytest.raises(LexelError, match="could judge none"):
        draw_and_judge(pipe, ["green"], Reds())


def test_verdicts_are_documents_with_the_loss_on_the_answer(pipe, tmp_path):
    verdicts = Verdicts(("a", "b", "c", "d"), some_codes(4), (True, True, True, False))
    verdicts.write(tmp_path)
    again = Verdicts.read(tmp_path, pipe.tokenizer.layout)
    assert (again.captions, again.right) == (verdicts.captions, verdicts.right)
    assert again.codes.indices.equal(verdicts.codes.indices)
    dataset = VerdictDocuments(again, pipe.codec)
    text, wrong = pipe.codec.text_tokenizer, 0
    for counter in range(200):
        sequence = dataset[Draw(0, counter)]
        first, image, last = pipe.codec.parse(sequence.ids)
        row = verdicts.captions.index(first.text)
        answer = ANSWERS[verdicts.right[row]]
        assert last.text == QUESTION + answer
        assert image.codes.indices.equal(verdicts.codes.indices[row : row + 1])
        learned = sequence.ids[sequence.loss_mask].tolist()
        assert learned == [*text.encode(answer), pipe.codec.vocabulary.special["eos"]]
        wrong += not verdicts.right[row]
    # Binomial(200, 1/2) within 4.5 sigma: a false alarm once in 150,000 choices of the seed.
    assert abs(wrong - 100) < 4.5 * 50**0.5


def test_a_verdict_is_the_models_own_probability(pipe):
    codes = some_codes(5)
    pictures = [codes[i : i + 1] for i in range(5)]
    belief = own_verdicts(pipe, ["a red circle"] * 5, pictures, batch_size=2)
    by_hand = []
    for answer in ANSWERS:
        sequence = pipe.codec.build(verdict_document("a red circle", pictures[3], answer))
        with torch.no_grad():
            logits = pipe.lm(pipe.codec.collate([sequence])).logits[0].log_softmax(-1)
        places = sequence.loss_mask.nonzero()[:, 0].tolist()
        by_hand.append(sum(logits[place - 1, sequence.ids[place]] for place in places))
    torch.testing.assert_close(belief[3], torch.stack(by_hand).softmax(0)[1])
    assert len(set(belief.tolist())) == 5
    best = draw_best(pipe, "a red circle", 6, seed=0, temperature=1.0)
    many = pipe([Text("a red circle"), Image.blank()], count=6, seed=0, temperature=1.0).documents
    drawn = [document[-1].codes for document in many]
    expected = own_verdicts(pipe, ["a red circle"] * 6, drawn).argmax()
    assert best.codes.indices.equal(drawn[int(expected)].indices)


def test_a_model_learns_to_judge_what_it_is_told():
    """Right pictures hold codes below 8, wrong ones the others; unseen ones of both kinds are judged."""
    pipe = long_pipeline()
    codes = half_codes(256)
    right = tuple(i % 2 == 0 for i in range(256))
    data = VerdictDocuments(Verdicts(("a",) * 256, codes, right), pipe.codec)
    objective = NextTokenObjective(pipe.codec.vocabulary.modalities)
    optimizer = torch.optim.AdamW(pipe.lm.train().parameters(), lr=5e-3)
    for step in range(40):
        batch = pipe.codec.collate([data[Draw(0, 16 * step + i)] for i in range(16)])
        loss, _ = objective(pipe.lm(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipe.lm.eval()
    unseen = half_codes(64, seed=9)
    belief = own_verdicts(pipe, ["a"] * 64, [unseen[i : i + 1] for i in range(64)])
    hits = (belief > 0.5) == (torch.arange(64) % 2 == 0)
    assert hits.float().mean() > 0.9


def test_measured_is_what_it_says(pipe):
    class Odd:
        """Right is what begins with an odd number of bright pixels; deterministic in the picture."""

        def judge(self, caption: str, pixels: torch.Tensor) -> bool | None:
            return bool(pixels.sum() > pixels.flip(0).roll(3, 1).abs().sum() - 1e9) and bool(
                int(pixels.flatten()[:7].sum() * 1000) % 2
            )

    figures = measure(pipe, CAPTIONS, Odd(), seed=2)
    assert 0 <= figures["drawing"] <= figures["any_of"] <= 1
    assert figures["best_of"] <= figures["any_of"]
    assert figures["chance_verdict"] == 0.5
    with pytest.raises(LexelError, match="every held-out caption"):
        measure(pipe, CAPTIONS, Reds())


def a_run(output: Path, bundle: Path, **changes) -> Run:
    stage = {
        "steps": 3, "batch_size": 4, "warmup": 1, "validate_every": 0, "sample_every": 0, "captions": 6,
        "held_out": 2, "rounds": 2, "checkpoint_every": 2, "log_every": 1, "ema": 0.0,
        "optimizer": partial(torch.optim.AdamW, weight_decay=0.1),
    }  # fmt: skip
    return Run(
        task=Task(["self_assess"]),
        output=str(output),
        data=ShapesConfig(count=32),
        objective={"lm": NextTokenObjective},
        stages=Stages(self_assess=SelfAssessStage(**{**stage, **changes})),
        codes=Codes(count=16, validation_count=8, workers=0),
        bundle=str(bundle),
    )


@pytest.mark.slow
def test_rounds_end_in_bundles_and_are_reused(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "bundle")
    run_chain(a_run(tmp_path / "run", tmp_path / "bundle"))
    first = json.loads((tmp_path / "run" / "self_assessment.json").read_text())["rounds"]
    assert len(first) == 3, "before, and after each round"
    bundles = [Pipeline.from_pretrained(tmp_path / "run" / f"self_assess_{i}" / "bundle") for i in (1, 2)]
    weights = [p.lm.fingerprint() for p in (pipe, *bundles)]
    assert len(set(weights)) == 3
    capsys.readouterr()
    run_chain(a_run(tmp_path / "run", tmp_path / "bundle"))
    said = capsys.readouterr().out
    for name in ("verdicts_1", "self_assess_1", "verdicts_2", "self_assess_2"):
        assert f"{name}: finished before, reused" in said
    assert json.loads((tmp_path / "run" / "self_assessment.json").read_text())["rounds"] == first
    run_chain(a_run(tmp_path / "run", tmp_path / "bundle", captions=5, rounds=1))
    assert "verdicts_1: starting over, because settings.captions: 6 → 5" in capsys.readouterr().out


def test_impossible_rounds_are_refused(pipe):
    with pytest.raises(ValueError, match="share lies between"):
        SelfAssessStage(share=1.0).check("self_assess")
    with pytest.raises(ValueError, match=r"self_assess\.rounds must be at least 1"):
        SelfAssessStage(rounds=0).check("self_assess")
    documents = VerdictDocuments(Verdicts(("a red circle",), some_codes(1), (True,)), pipe.codec)
    documents.check_length(len(documents[Draw(0, 0)]))
    with pytest.raises(LexelError, match=r"larger lm\.max_length"):
        documents.check_length(len(documents[Draw(0, 0)]) - 1)
