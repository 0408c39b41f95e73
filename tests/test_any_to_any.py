"""Documents from any modalities to any others, the chain that trains on them, and its bundle."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lexel.data.any_to_any import AnyToAnyDataset, all_pairs, pair_name, parse_pair
from lexel.data.sampler import Draw
from lexel.data.tokenized import CodeExample
from lexel.document import DocumentCodec, Image, Text
from lexel.errors import LexelError
from lexel.sample.pipeline import Pipeline
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.structured import Box
from lexel.vocabulary import Vocabulary


class Letters:
    """A text tokenizer of 26 letters."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - 97 for letter in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in token_ids)


LAYOUTS = {
    "image": CodeLayout((8,), grid=(2, 2)),
    "boxes": CodeLayout((4, 3), length=2, flexible=True, pattern="interleaved"),
    "depth": CodeLayout((5,), grid=(1, 2)),
}
CODEC = DocumentCodec(
    Vocabulary.build(26, {name: layout.codebook_sizes for name, layout in LAYOUTS.items()}),
    Letters(),
    LAYOUTS,
)


def rows(layout: CodeLayout, count: int = 5) -> list[CodeExample]:
    """Row i holds the caption `iii…` and codes that tell the row."""
    codes = [
        torch.full((layout.positions, layout.k), row % min(layout.codebook_sizes)) for row in range(count)
    ]
    return [
        CodeExample(f"row{row}", (chr(97 + row) * 2, chr(97 + row) * 3), code, 1 if layout.flexible else None)
        for row, code in enumerate(codes)
    ]


CODES = {name: rows(layout) for name, layout in LAYOUTS.items()}


def test_documents_hold_every_modality_once_of_one_example() -> None:
    data = AnyToAnyDataset(CODES, CODEC, segments=(1, 1, 1))
    seen: Counter[tuple[str, str]] = Counter()
    for counter in range(300):
        inputs, targets, dropped = data.document(Draw(counter % 5, counter))
        names = [segment.modality for segment in (*inputs, *targets)]
        assert len(set(names)) == len(names) >= 2
        assert inputs
        assert targets
        assert not dropped
        assert "text" not in [segment.modality for segment in targets[:-1]]
        for segment in (*inputs, *targets):
            if isinstance(segment, Text):
                assert segment.text is not None
                assert set(segment.text) == {chr(97 + counter % 5)}
            else:
                assert torch.equal(segment.codes.indices[0], CODES[segment.modality][counter % 5].codes)
        seen.update((one, other) for one in {*names[: len(inputs)]} for other in {*names[len(inputs) :]})
    assert set(seen) == set(all_pairs(("text", *LAYOUTS))), "every pair occurs"


def test_only_the_targets_content_is_learned() -> None:
    special = CODEC.vocabulary.special
    for target, end in (("depth", None), ("boxes", "end_boxes"), ("text", "eos")):
        data = AnyToAnyDataset(CODES, CODEC, pairs=[("image", target)])
        sequence = data[Draw(2, 0)]
        learned = [CODEC.vocabulary.name(i) for i in sequence.ids[sequence.loss_mask].tolist()]
        if target == "depth":
            assert learned == ["<depth_0_2>", "<depth_0_2>", "<end_depth>"]
        elif target == "boxes":
            assert learned == ["<boxes_0_2>", "<boxes_1_2>", "<end_boxes>"]
        else:
            assert set(learned[:-1]) == {"<text_2>"}
            assert learned[-1] == "<eos>"
        assert end is None or special[end] in sequence.ids[sequence.loss_mask]
        assert sequence.ids[0] == special["bos"]
        assert CODEC.parse(sequence.ids)[-1].modality == target


def test_several_targets_are_all_learned() -> None:
    data = AnyToAnyDataset(CODES, CODEC, segments=(0, 0, 1))
    counters = [c for c in range(200) if len(data.document(Draw(0, c))[1]) == 3]
    sequence, (inputs, targets, _) = data[Draw(0, counters[0])], data.document(Draw(0, counters[0]))
    known = CODEC.build([*inputs, *targets[:-1]], "all")
    begins = [CODEC.vocabulary.begin(name) for name in LAYOUTS]
    assert not any(int(i) in begins for i in sequence.ids[sequence.loss_mask])
    assert sequence.loss_mask[: len(known) - 1].any(), "the targets before the last count too"
    first = len(CODEC.build(inputs)) - 1
    assert not sequence.loss_mask[:first].any()


def test_a_draw_is_a_pure_function_of_seed_and_counter() -> None:
    data, other = AnyToAnyDataset(CODES, CODEC, seed=1), AnyToAnyDataset(CODES, CODEC, seed=2)
    again = AnyToAnyDataset(CODES, CODEC, seed=1)
    draws = [Draw(c % 5, c) for c in range(40)]
    assert all(torch.equal(data[d].ids, again[d].ids) for d in reversed(draws))
    assert any(not torch.equal(data[d].ids, other[d].ids) for d in draws)
    dropped = AnyToAnyDataset(CODES, CODEC, drop=1.0, pairs=[("text", "image")])[draws[0]]
    assert int(dropped.ids[1]) == CODEC.vocabulary.special["uncond"]


def test_pairs_are_named() -> None:
    assert parse_pair("text_to_image") == ("text", "image")
    assert all(parse_pair(pair_name(pair)) == pair for pair in all_pairs(("text", *LAYOUTS)))
    assert len(all_pairs(("a", "b", "c"))) == 6
    for wrong in ("text", "text_to_text", "_to_image", "a_to_b_to_c"):
        with pytest.raises(ValueError, match="written like text_to_image"):
            parse_pair(wrong)


def test_unknown_modalities_and_misaligned_codes_are_refused() -> None:
    with pytest.raises(
        LexelError, match="modality 'smell', which the model does not have; it has text, image"
    ):
        AnyToAnyDataset({**CODES, "smell": CODES["depth"]}, CODEC)
    with pytest.raises(LexelError, match="image and depth are not of the same examples"):
        AnyToAnyDataset({**CODES, "depth": CODES["depth"][:4]}, CODEC)
    with pytest.raises(LexelError, match="not of the same examples"):
        AnyToAnyDataset({**CODES, "depth": CODES["depth"][::-1]}, CODEC)
    with pytest.raises(ValueError, match="a pair names 'smell'"):
        AnyToAnyDataset(CODES, CODEC, pairs=[("text", "smell")])
    with pytest.raises(ValueError, match="segments are weights"):
        AnyToAnyDataset(CODES, CODEC, segments=(0.0,))
    with pytest.raises(ValueError, match="drop is a share"):
        AnyToAnyDataset(CODES, CODEC, drop=2)


def test_build_supervises_as_many_segments_as_asked() -> None:
    document = [Text("ab"), Image(CODES["image"][0].batch(LAYOUTS["image"])), Text("c")]
    counts = [int(CODEC.build(document, supervise).loss_mask.sum()) for supervise in (1, 2, 3)]
    assert counts[0] == int(CODEC.build(document).loss_mask.sum()) == 2  # c, eos
    assert counts[1] == counts[0] + 6  # boi, four codes, eoi
    assert counts[2] == counts[1] + 2 == int(CODEC.build(document, "all").loss_mask.sum())


# The chain

TINY = [
    "experiment=any_to_any",
    "debug=fast",
    "threads=1",
    "data.count=24",
    "codes.count=24",
    "codes.validation_count=8",
    "stages.tokenizer.steps=2",
    "stages.tokenizer.batch_size=4",
    "stages.lm.steps=2",
    "stages.lm.batch_size=4",
    "tokenizer.channels=16",
    "tokenizer.encoder_channels=16",
    "tokenizer.z_channels=16",
    "tokenizer.norm_groups=4",
    "quantizer.codebook_size=16",
    "lm.dim=16",
    "lm.layers=1",
    "stages.lm.text_vocabulary=300",
    "any_to_any.modalities=[depth,boxes,layers]",
    "any_to_any.specialists=[text_to_boxes]",
]


def train(folder: Path, *overrides: str) -> None:
    """Run the experiment in this process."""
    from hydra import compose, initialize_config_module

    from lexel.train.chain import run_chain
    from lexel.train.cli import resolve

    with initialize_config_module("lexel.conf", version_base="1.3"):
        run_chain(resolve(compose("train", overrides=[*TINY, *overrides, f"output={folder}"])))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("any")
    train(folder, "task.stages=[tokenizer,lm]")
    return folder


def pipeline(folder: Path) -> Pipeline:
    """The trained parts."""
    from hydra import compose, initialize_config_module

    from lexel.train.chain import Chain
    from lexel.train.cli import resolve
    from lexel.train.finish import assemble

    with initialize_config_module("lexel.conf", version_base="1.3"):
        run = resolve(compose("train", overrides=[*TINY, "task=evaluate", f"output={folder}"]))
    return assemble(Chain(run))


@pytest.mark.slow
def test_a_chain_trains_tokenizers_model_and_specialists(trained: Path, tmp_path: Path) -> None:
    made = {p.parent.relative_to(trained).as_posix() for p in trained.rglob("model.safetensors")}
    assert made == {"tokenizer", "views/depth/tokenizer", "lm", "specialists/text_to_boxes"}
    pipe = pipeline(trained)
    assert list(pipe.codec.layouts) == ["image", "depth", "boxes", "layers"]
    document: list[Any] = [Text("a red circle"), Image.blank("boxes"), Image.blank("depth"), Image.blank()]
    _, boxes, depth, drawn = pipe(document, seed=1, decoding="plain").documents[0]
    assert pipe.values(boxes)
    assert all(isinstance(box, Box) for box in pipe.values(boxes))
    assert depth.modality == "depth"
    assert depth.pixels.shape == drawn.pixels.shape == (3, 32, 32)
    given = pipe.segment("boxes", [Box(0.1, 0.2, 0.3, 0.4, "red circle")])
    assert pipe.values(given)[0].name == "red circle"
    back = pipe([given, Image(pixels=depth.pixels, modality="depth"), Text.blank()], seed=1, text_limit=4)
    assert isinstance(back.documents[0][-1], Text)
    pipe.save_pretrained(tmp_path / "bundle")
    again = Pipeline.from_pretrained(tmp_path / "bundle")
    same = again(document, seed=1, decoding="plain").documents[0]
    assert again.values(same[1]) == pipe.values(boxes)
    assert torch.equal(same[2].pixels, depth.pixels)
    refuse = tmp_path / "bundle" / "tokenizers" / "depth"
    streamed = list(again.stream(document, seed=1, decoding="plain"))
    assert torch.equal(streamed[-1].segment.pixels, drawn.pixels)
    pipe.tokenizer.save_pretrained(refuse)
    with pytest.raises(LexelError, match=r"trained on the codes of tokenizer .* for depth"):
        Pipeline.from_pretrained(tmp_path / "bundle")


@pytest.mark.slow
def test_wrong_modalities_get_a_sentence(trained: Path, tmp_path: Path) -> None:
    pipe = pipeline(trained)
    with pytest.raises(LexelError, match="no structured modality depth; this bundle has boxes, layers"):
        pipe.values(Image.blank("depth"))
    with pytest.raises(LexelError, match="boxes is no picture for this bundle"):
        pipe.tokenizer_of("boxes")
    with pytest.raises(ValueError, match="the model has no modality 'smell'"):
        pipe([Text("a"), Image.blank("smell")])
    with pytest.raises(LexelError, match="has a modality depth, but there is no tokenizer or codec depth"):
        Pipeline(pipe.tokenizer, pipe.lm, pipe.codec, structured=pipe.structured)
    other = shutil.copytree(trained, tmp_path / "other")
    with pytest.raises(LexelError, match=r"stages.lm.init=DIR, and not from stages.lm.bundle"):
        train(other, "task.stages=[lm]", "stages.lm.bundle=shipped")
    with pytest.raises(LexelError, match="names 'smell'; it may name, each once: segmentation, edges"):
        train(tmp_path, "any_to_any.modalities=[smell]")
    with pytest.raises(
        LexelError, match=r"may need .* positions, the language model has 40: raise lm.max_length"
    ):
        train(other, "task.stages=[lm]", "lm.max_length=40")


def test_splits_follow_the_weights() -> None:
    data = AnyToAnyDataset(CODES, CODEC, segments=(0, 1))
    rng = random.Random(0)
    sizes = {sum(map(len, data.split(rng))) for _ in range(50)}
    assert sizes == {3}


@pytest.mark.slow
def test_the_chain_ends_in_a_bundle_and_a_matrix(trained: Path) -> None:
    train(trained, "task.stages=[evaluate]", "any_to_any.count=2", "evaluation.prompts=1")
    report = json.loads((trained / "matrix.json").read_text())
    assert set(report["pairs"]["text_to_boxes"]) == {"score", "chance", "specialist"}
    assert "specialist" not in report["pairs"]["boxes_to_text"]
    assert (trained / "matrix.html").is_file()
    assert (trained / "index.html").is_file()
    info = json.loads((trained / "bundle" / "bundle.json").read_text())
    assert set(info["structured"]) == {"boxes", "layers"}
    assert set(info["views"]) == {"depth"}
    assert info["sampling"]["boxes"]["temperature"] == 0
