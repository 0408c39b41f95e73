import math
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lexel.data.documents import DocumentDataset, Mixture
from lexel.data.example import Example
from lexel.data.packing import pack
from lexel.data.sampler import Draw
from lexel.data.text_tokenizer import train_text_tokenizer
from lexel.data.tokenized import CodeExample
from lexel.document import DocumentCodec, Image, Text
from lexel.tokenizers.layout import CodeLayout
from lexel.vocabulary import Vocabulary

TEXT_TOKENIZER = train_text_tokenizer(["caption of picture number 0 1 2 3"] * 5, 300)
PLAIN = [Example(f"text:{i}", (f"plain text {i}",), None) for i in range(50)]


def codec_of(**shape):
    layout = CodeLayout(**shape)
    vocabulary = Vocabulary.build(len(TEXT_TOKENIZER), {"image": layout.codebook_sizes})
    return DocumentCodec(vocabulary, TEXT_TOKENIZER, {"image": layout})


CODEC = codec_of(codebook_sizes=(32,), grid=(2, 3))
GENERATOR = torch.Generator().manual_seed(0)
CODES = [
    CodeExample(f"{i}", (f"caption {i}a", f"caption {i}b"), torch.randint(32, (6, 1), generator=GENERATOR))
    for i in range(20)
]


def kind(codec, sequence):
    """Which template wrote a sequence, and whether its caption is in the unconditional form."""
    segments = codec.parse(sequence.ids)
    uncond = codec.vocabulary.special["uncond"] in sequence.ids[:2].tolist()
    return tuple(type(segment).__name__ for segment in segments), uncond


def sigma(draws, share):
    return math.sqrt(draws * share * (1 - share))


@given(st.integers(0, 19), st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_document_says_what_its_picture_is(index, counter, seed):
    dataset = DocumentDataset(CODES, CODEC, Mixture(1, 1, 1, 1), drop=0.3, seed=seed)
    sequence = dataset[Draw(index, counter)]
    for segment in CODEC.parse(sequence.ids):
        if isinstance(segment, Image):
            assert torch.equal(segment.codes.indices[0], CODES[index].codes)
        else:
            assert segment.text in CODES[index].captions
    assert len(sequence) == len(sequence.modality) == len(sequence.positions) == len(sequence.loss_mask)
    assert torch.equal(sequence.ids, dataset[Draw(index, counter)].ids)


def test_templates_captions_and_drops_have_their_shares():
    """Binomial counts within 4.5 sigma: a false alarm once in 20,000 choices of the seed."""
    mixture, drop, draws = Mixture(4, 3, 2, 1), 0.25, 4000
    dataset = DocumentDataset(CODES, CODEC, mixture, drop, seed=1)
    sequences = [dataset[Draw(0, counter)] for counter in range(draws)]
    counts = Counter(kind(CODEC, sequence) for sequence in sequences)
    expected = {
        (("Text", "Image"), False): 0.4 * (1 - drop),
        (("Image",), True): 0.4 * drop,
        (("Image", "Text"), False): 0.3,
        (("Text",), False): 0.2,
        (("Image",), False): 0.1,
    }
    assert set(counts) == set(expected)
    for what, share in expected.items():
        assert abs(counts[what] - draws * share) < 4.5 * sigma(draws, share), what
    texts = [s.text for q in sequences for s in CODEC.parse(q.ids) if isinstance(s, Text)]
    first = sum(text == "caption 0a" for text in texts)
    assert abs(first - len(texts) / 2) < 4.5 * sigma(len(texts), 0.5)


def test_the_loss_is_on_what_the_template_generates():
    for mixture, generated in ((Mixture(1, 0), "image"), (Mixture(0, 1), "text")):
        sequence = DocumentDataset(CODES, CODEC, mixture, drop=0)[Draw(3, 5)]
        is_code = CODEC.vocabulary.mask("image")[sequence.ids]
        is_text = CODEC.vocabulary.mask("text")[sequence.ids]
        supervised, free = (is_code, is_text) if generated == "image" else (is_text, is_code)
        assert sequence.loss_mask[supervised].all()
        assert not sequence.loss_mask[free].any()


def test_only_seed_and_counter_matter():
    def kinds(seed, offset=0):
        dataset = DocumentDataset(CODES, CODEC, Mixture(1, 1), seed=seed)
        return [kind(CODEC, dataset[Draw(0, i + offset)]) for i in range(64)]

    assert kinds(0) == kinds(0)
    assert kinds(0) != kinds(1)
    assert kinds(0) != kinds(0, offset=64)


def test_plain_text_replaces_captions_in_text_only_documents():
    dataset = DocumentDataset(CODES, CODEC, Mixture(0, 0, 1, 0), text=PLAIN)
    texts = {CODEC.parse(dataset[Draw(0, i)].ids)[0].text for i in range(100)}
    assert texts <= {example.captions[0] for example in PLAIN}
    assert len(texts) > 30
    alone = DocumentDataset(None, CODEC, text=PLAIN)
    assert len(alone) == 50
    assert CODEC.parse(alone[Draw(7, 0)].ids) == [Text("plain text 7")]


def test_pictures_without_captions_stand_alone():
    silent = [CodeExample("x", (), CODES[0].codes)]
    dataset = DocumentDataset(silent, CODEC, Mixture(1, 1, 1, 1), drop=0)
    assert {kind(CODEC, dataset[Draw(0, i)]) for i in range(30)} == {(("Image",), False)}


@pytest.mark.parametrize("pattern", ["parallel", "interleaved", "delayed"])
def test_several_codebooks_and_flexible_lengths(pattern):
    codec = codec_of(codebook_sizes=(8, 16), grid=(2, 2), pattern=pattern)
    codes = [CodeExample("x", ("c",), torch.tensor([[1, 2], [3, 4], [5, 6], [7, 15]]))]
    image = codec.parse(DocumentDataset(codes, codec, Mixture(0, 0, 0, 1))[Draw(0, 0)].ids)[0]
    assert torch.equal(image.codes.indices[0], codes[0].codes)
    codec = codec_of(codebook_sizes=(8,), length=4, flexible=True)
    codes = [CodeExample("x", ("c",), torch.tensor([[1], [2], [3], [4]]), length=2)]
    image = codec.parse(DocumentDataset(codes, codec, Mixture(0, 0, 0, 1))[Draw(0, 0)].ids)[0]
    assert image.codes.indices[0, :2, 0].tolist() == [1, 2]
    assert image.codes.lengths.tolist() == [2]


def test_packed_documents_parse_back():
    dataset = DocumentDataset(CODES, CODEC, Mixture(1, 1), drop=0)
    sequences = [dataset[Draw(i, i)] for i in range(20)]
    special = CODEC.vocabulary.special
    batch = pack(sequences, 64, special["pad"])
    found = set()
    for row in batch.ids:
        starts = (row == special["bos"]).nonzero()[:, 0].tolist()
        for start in starts:
            image = next(s for s in CODEC.parse(row[start:]) if isinstance(s, Image))
            found.add(tuple(image.codes.indices.flatten().tolist()))
    assert found == {tuple(example.codes.flatten().tolist()) for example in CODES}


def test_it_travels_to_workers():
    dataset = DocumentDataset(CODES, CODEC, Mixture(1, 1), text=PLAIN)
    again = ForkingPickler.loads(ForkingPickler.dumps(dataset))
    assert torch.equal(again[Draw(4, 9)].ids, dataset[Draw(4, 9)].ids)


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="not all zero"):
        Mixture(0, 0)
    with pytest.raises(ValueError, match=">= 0"):
        Mixture(1, -1)
    with pytest.raises(ValueError, match="share"):
        DocumentDataset(CODES, CODEC, drop=1.5)
    with pytest.raises(ValueError, match="needs codes, text or both"):
        DocumentDataset(None, CODEC)
