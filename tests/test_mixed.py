"""Sources with weights in one stream: pure, resumable, in the asked shares, nothing twice within an epoch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from lexel.data.interleaved import InterleavedDataset
from lexel.data.mixed import BLOCK, MixedDataset, block_counts
from lexel.data.sampler import Draw, ResumableSampler, name_of
from lexel.data.text_tokenizer import train_text_tokenizer
from lexel.data.tokenized import CodeExample
from lexel.document import DocumentCodec, Image, Text
from lexel.tokenizers.layout import CodeLayout
from lexel.vocabulary import Vocabulary


class Named(Dataset[Any]):
    """Items that say what was drawn."""

    def __init__(self, title: str, count: int) -> None:
        self.title, self.count = title, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, draw: Draw) -> tuple[str, int, int]:
        return self.title, draw.index, draw.counter

    def name(self, draw: Draw) -> str:
        return f"{self.title}-{draw.index}"


def mixed(seed: int = 0, **weights: float) -> MixedDataset:
    return MixedDataset({n: Named(n, 5 + len(n)) for n in weights}, weights, seed)


def drawn(dataset: MixedDataset, counters: Any) -> list[Any]:
    return [dataset[Draw(0, counter)] for counter in counters]


@given(st.lists(st.floats(0.001, 1e4), min_size=1, max_size=40))
def test_a_block_is_full_and_no_source_is_left_out(weights: list[float]) -> None:
    counts = block_counts(weights)
    assert sum(counts) == BLOCK
    assert min(counts) >= 1
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    if min(exact) >= 1:
        assert max(abs(a - b) for a, b in zip(counts, exact, strict=True)) < 1


def test_shares_are_the_weights_in_every_block() -> None:
    dataset = mixed(a=1.0, bb=3.0)
    for block in (0, 7):
        counts = Counter(item[0] for item in drawn(dataset, range(block * BLOCK, (block + 1) * BLOCK)))
        assert counts == {"a": BLOCK // 4, "bb": 3 * BLOCK // 4}
    # The order is not the blocks': within a hundred draws both come in about their shares.
    few = Counter(item[0] for item in drawn(dataset, range(100)))
    assert 10 <= few["a"] <= 40


def test_a_source_is_gone_through_without_repetition_across_blocks() -> None:
    dataset = mixed(a=1.0, bbbb=1.0)
    indices = [item[1] for item in drawn(dataset, range(BLOCK - 40, BLOCK + 60)) if item[0] == "bbbb"]
    earlier = BLOCK // 2 - sum(dataset.place(c)[0] == "bbbb" for c in range(BLOCK - 40, BLOCK))
    skipped = -earlier % 9  # to the start of an epoch of nine
    epochs = [indices[i : i + 9] for i in range(skipped, len(indices) - 8, 9)]
    assert len(epochs) >= 3
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_draw_is_a_function_of_seed_and_counter() -> None:
    there = drawn(mixed(a=1.0, bb=2.0), range(30))
    back = drawn(mixed(a=1.0, bb=2.0), reversed(range(30)))[::-1]
    assert there == back
    assert [item[2] for item in there] == list(range(30))
    assert drawn(mixed(1, a=1.0, bb=2.0), range(30)) != there


def test_two_processes_and_a_resumed_run_see_the_same_stream() -> None:
    dataset = mixed(a=1.0, bb=2.0)
    length = len(dataset)
    one = ResumableSampler(length, 6)
    two = [ResumableSampler(length, 3, rank=rank, world_size=2, start_batch=4) for rank in range(2)]
    for number in range(4, 8):
        whole = sorted(dataset[draw] for draw in one.batch(number))
        parts = sorted(dataset[draw] for sampler in two for draw in sampler.batch(number))
        assert whole == parts


def test_a_draw_is_named_by_source_and_example() -> None:
    dataset = mixed(a=1.0, bb=2.0)
    source, index, _ = dataset[Draw(0, 12)]
    assert name_of(dataset, Draw(0, 12)) == f"{source}: {source}-{index}"


def test_a_source_without_weight_is_left_out_even_when_it_is_empty() -> None:
    dataset = MixedDataset({"a": Named("a", 3), "none": Named("none", 0)}, {"a": 1.0, "none": 0.0})
    assert dataset.names == ("a",)
    assert {item[0] for item in drawn(dataset, range(50))} == {"a"}


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({}, "at least one source"),
        ({"a": 0.0, "b": 0.0}, "sources a, b are all zero"),
        ({"a": 1.0, "b": -1.0}, "'b' must be >= 0, got -1.0"),
        ({"a": float("nan")}, "'a' must be >= 0, got nan"),
        ({"a": 1.0, "empty": 1.0}, "the source 'empty' is empty"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(weights: dict[str, float], sentence: str) -> None:
    sources = {name: Named(name, 0 if name == "empty" else 3) for name in weights}
    with pytest.raises(ValueError, match=sentence):
        MixedDataset(sources, weights)


# Interleaved documents


def test_an_interleaved_document_has_its_pictures_in_turn_and_loss_on_everything() -> None:
    text = train_text_tokenizer(["caption of picture number 0 1 2 3"] * 5, 300)
    layout = CodeLayout((32,), grid=(2, 3))
    codec = DocumentCodec(Vocabulary.build(len(text), {"image": (32,)}), text, {"image": layout})
    codes = [CodeExample(f"{i}", (f"caption {i}",), torch.randint(32, (6, 1))) for i in range(20)]
    dataset = InterleavedDataset(codes, codec, 3, seed=1)
    orders = set()
    for index in range(20):
        sequence = dataset[Draw(index, index)]
        document = codec.parse(sequence.ids)
        pictures = [part for part in document if isinstance(part, Image)]
        captions = [part.text for part in document if isinstance(part, Text)]
        assert len(pictures) == len(captions) == 3
        for picture, caption in zip(pictures, captions, strict=True):
            assert torch.equal(picture.codes.indices[0], codes[int(caption.split()[-1])].codes)  # type: ignore
        assert captions[0] == f"caption {index}"
        # That a document begins with a picture is given, not learned.
        assert sequence.loss_mask[2:].all()
        assert not sequence.loss_mask[0]
        orders.add(isinstance(document[0], Image))
        assert torch.equal(sequence.ids, dataset[Draw(index, index)].ids)
    assert orders == {True, False}
    assert dataset.name(Draw(4, 0)) == "4"
    with pytest.raises(ValueError, match="at least one picture"):
        InterleavedDataset(codes, codec, 0)
