"""Completing pictures: kept codes stay, missing ones come from the one sampler with their own places."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import build_tiny_pipeline

from lexel.data.denoising import ROLES, hide_codes, with_holes
from lexel.document import DocumentCodec, Image, Text
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.sample.completion import cells_outside, completion
from lexel.sample.decode import generate
from lexel.sample.logits import SamplingConfig
from lexel.sample.pipeline import Pipeline
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes, TokenBatch


def with_infill(pipeline: Pipeline, **layout) -> Pipeline:
    """A random pipeline whose vocabulary has what documents with holes need."""
    vocabulary = pipeline.codec.vocabulary.with_roles((*ROLES, "eol"))
    layouts = {"image": replace(pipeline.codec.layouts["image"], **layout)}
    codec = DocumentCodec(vocabulary, pipeline.codec.text_tokenizer, layouts)
    torch.manual_seed(1)
    changes = {"vocab_size": vocabulary.size, "rope_axes": (0.5, 0.25, 0.25)}
    if codec.columns == 1:
        changes |= {"head": "single", "codebook_sizes": (), "code_offsets": ()}
    lm = CausalLM(replace(pipeline.lm.config, **changes)).eval()
    return Pipeline(pipeline.tokenizer, lm, codec, sampling={"image": SamplingConfig()})


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return with_infill(build_tiny_pipeline())


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


KEEP = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 1], [0, 0, 1, 1]]).bool()
FAMILIES = {
    "one codebook": ("vq", {}),
    "rows end": ("vq", {"row_end": True}),
    "two codebooks": ("factorized", {}),
    "interleaved": ("factorized", {"pattern": "interleaved"}),
    "flexible": ("flexible", {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_kept_codes_stay_and_the_missing_ones_are_drawn(name, pixels):
    family, layout = FAMILIES[name]
    pipe = with_infill(build_tiny_pipeline(family), **layout)
    codes = pipe.encode(pixels[None], 5 if family == "flexible" else None)
    n = codes.indices.shape[1]
    keep = KEEP.flatten()[-n:]
    output = pipe.complete(codes, keep, caption="a red circle", count=3, seed=0, guidance=1.5)
    drawn = torch.stack([document[-1].codes.indices[0] for document in output.documents])
    used = n if codes.lengths is None else int(codes.lengths)
    kept, missing = keep[:used].nonzero()[:, 0], (~keep[:used]).nonzero()[:, 0]
    assert (drawn[:, kept] == codes.indices[:, kept]).all()
    assert not (drawn[0, missing] == drawn[1, missing]).all()
    for document in output.documents:
        assert document[0] == Text("a red circle")
        assert document[-1].pixels.shape == (3, 32, 32)
        assert pipe.codec.layouts["image"].flatten(document[-1].codes) is not None
        if codes.lengths is not None:
            assert document[-1].codes.lengths.equal(codes.lengths)
    again = pipe.complete(codes, keep, caption="a red circle", count=3, seed=0, guidance=1.5)
    assert all(a.equal(b) for a, b in zip(output.ids, again.ids))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_every_code_is_drawn_from_the_models_own_distribution(pipe, pixels, guidance):
    """The log-probabilities are those of one plain forward pass over the training form of the result."""
    output = pipe.complete(pixels, KEEP, caption="a red circle", seed=4, guidance=guidance)
    document, ids = output.documents[0], output.ids[0]
    codec = pipe.codec

    def logits_of(unconditional: bool) -> torch.Tensor:
        whole = codec.build([Text("a red circle"), Image(document[-1].codes)], unconditional=unconditional)
        holed = with_holes(codec, whole, hide_codes(codec, whole, ~KEEP.flatten()))
        batch = codec.collate([holed])
        with torch.no_grad():
            logits = pipe.lm(TokenBatch(batch.ids, batch.modality, batch.positions)).logits[0]
        start = holed.ids.tolist().index(codec.vocabulary.special["sep"]) + 2
        assert holed.ids[start:-1].tolist() == ids.tolist()
        return logits[start - 1 : -2]

    cond, uncond = logits_of(False), logits_of(True)
    guided = uncond + guidance * (cond - uncond)
    total = 0.0
    for place, token in enumerate(ids.tolist()):
        allowed = codec.vocabulary.mask("image") if codec.vocabulary.mask("image")[token] else None
        if allowed is not None:
            probs = guided[place].masked_fill(~allowed, -torch.inf).log_softmax(-1)
            torch.testing.assert_close(output.logprobs[0][place], probs[token], atol=1e-4, rtol=1e-4)
            total += 1
        else:
            assert output.logprobs[0][place] == 0, "markers are certain"
    assert total == int((~KEEP).sum())


def test_targets_have_the_codebook_row_and_column_of_their_place(pipe, pixels):
    codes = pipe.encode(pixels[None])
    job = completion(pipe.codec, codes, KEEP.flatten(), "a red circle")
    grammar, state = job.grammar, job.grammar.start(job.prompt)
    block, places = pipe.codec.vocabulary.block("image"), []
    assert grammar.remaining(state) == int((~KEEP).sum()) + 2, "three holes, the first marker is given"
    while not grammar.done(state):
        allowed = grammar.allowed(state).nonzero()[:, 0]
        if len(allowed) > 1:
            assert allowed.equal(block)
            assert grammar.columns(state) == (0,)
            places.append(tuple(x - 1 for x in grammar.position(state)[1:]))
        with pytest.raises(ValueError, match="may not follow"):
            grammar.advance(state, pipe.codec.vocabulary.special["eos"])
        state = grammar.advance(state, int(allowed[0]))
    assert places == [tuple(place) for place in (~KEEP).nonzero().tolist()]
    assert grammar.remaining(state) == 0


def test_what_was_in_the_hole_does_not_matter(pipe, pixels):
    codes = pipe.encode(pixels[None])
    other = codes.indices.clone()
    other[0, ~KEEP.flatten()] = (other[0, ~KEEP.flatten()] + 1) % 16
    first = pipe.complete(codes, KEEP, seed=3)
    second = pipe.complete(Codes(other, codes.grid), KEEP, seed=3)
    assert first.ids[0].equal(second.ids[0])


@pytest.mark.parametrize("decoding", ["jacobi", "nested"])
def test_greedy_speculation_completes_alike(pipe, pixels, decoding):
    options = {"caption": "a red circle", "temperature": 0.0}
    plain = pipe.complete(pixels, KEEP, decoding="plain", **options)
    assert pipe.complete(pixels, KEEP, decoding=decoding, **options).ids[0].equal(plain.ids[0])


def test_without_a_caption_nothing_is_guided(pipe, pixels):
    output = pipe.complete(pixels, KEEP, seed=1)
    assert [segment.modality for segment in output.documents[0]] == ["image"]
    job = completion(pipe.codec, pipe.encode(pixels[None]), KEEP.flatten())
    assert job.prompt.ids.equal(job.null.ids)
    prompt = generate(pipe.lm, [job.prompt], job.grammar, generator=torch.Generator().manual_seed(0))[0][0]
    assert job.read(prompt).codes.indices.shape == (1, 16, 1)


def test_a_box_is_every_cell_that_it_touches(pipe, pixels):
    layout = pipe.codec.layouts["image"]
    assert cells_outside((8, 0, 16, 8), layout, (32, 32)).view(4, 4).tolist()[0] == [True, False, True, True]
    assert int((~cells_outside((7, 7, 9, 9), layout, (32, 32))).sum()) == 4
    assert not cells_outside((0, 0, 32, 32), layout, (32, 32)).any()
    wide = CodeLayout((16,), grid=(2, 4))
    assert cells_outside((0, 10, 5, 20), wide, (20, 40)).tolist() == [True] * 4 + [False] + [True] * 3
    output = pipe.complete(pixels, box=(8, 8, 24, 16), seed=0)
    changed = output.documents[0][-1].codes.indices != pipe.encode(pixels[None]).indices
    assert not changed.view(4, 4)[[0, 2, 3]].any()
    assert len(output.ids[0]) == 2


def test_impossible_requests_are_refused(pipe, pixels, tiny_pipeline):
    with pytest.raises(LexelError, match="not trained to complete pictures"):
        tiny_pipeline.complete(pixels, KEEP)
    with pytest.raises(ValueError, match="either keep or box"):
        pipe.complete(pixels)
    with pytest.raises(ValueError, match="nothing to draw"):
        pipe.complete(pixels, torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"bool \[16\], got \[9\]"):
        pipe.complete(pixels, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="x0,y0,x1,y1"):
        pipe.complete(pixels, box=(8, 8, 8, 16))
    with pytest.raises(LexelError, match="ZipAR"):
        pipe.complete(pixels, KEEP, decoding="zipar")
    with pytest.raises(ValueError, match="codes on a grid"):
        cells_outside((0, 0, 8, 8), CodeLayout((16,), length=5), (32, 32))


def test_the_command_paints_in_and_out(pipe, pixels, tmp_path, capsys):
    from lexel.cli import main
    from lexel.data.images import to_image

    pipe.save_pretrained(tmp_path / "bundle")
    picture = tmp_path / "picture.png"
    to_image(pixels).save(picture)
    fixed = ["--bundle", str(tmp_path / "bundle"), "--out", str(tmp_path), "--count", "2", "--seed", "1"]
    for part in ("--mask", "--keep"):
        assert main(["sample", "a red circle", "--inpaint", str(picture), part, "8,8,24,24", *fixed]) == 0
        assert "0001.png" in capsys.readouterr().out
    assert main(["sample", "", "--inpaint", str(picture), "--mask", "0,0,8,8", *fixed]) == 0
    assert main(["sample", "a", "--inpaint", str(picture), *fixed]) == 2
    assert "belong together" in capsys.readouterr().err
    assert main(["sample", "a", "--mask", "0,0,8,8", *fixed]) == 2
    assert main(["sample", "a", "--inpaint", str(picture), "--mask", "0,0,8,88", *fixed]) == 2
    assert "x1 <= 32" in capsys.readouterr().err
