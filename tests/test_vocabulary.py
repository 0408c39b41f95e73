"""Laws of the vocabulary: every id has one owner, and codes and names survive the way to ids and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes
from lexel.vocabulary import PUBLISHERS, CodeBlock, Vocabulary, named_block, preset, published_vocabulary


def one_offset() -> Vocabulary:
    return Vocabulary.build(20, {"image": (16,)})


def inside_a_bpe() -> Vocabulary:
    entries = {f"<img{i}>": 19 - i for i in range(8)} | {"a": 0}
    block = named_block(entries, "image", 0, 8, "<img{}>")
    special = {"pad": 20, "bos": 21, "eos": 22, "boi": 23, "eoi": 24}
    return Vocabulary(20, special, (block,), null="prefix")


def separate_tables() -> Vocabulary:
    return Vocabulary.build(20, {"image": (16,)}, separate=("image",), null="padding")


def several_codes() -> Vocabulary:
    return Vocabulary.build(20, {"image": (4, 8), "sound": (5,)})


def positional() -> Vocabulary:
    return Vocabulary.build(20, {"image": (16,)}, roles=("img", "eol", "eof"), null="negative")


FORMS = [one_offset, inside_a_bpe, separate_tables, several_codes, positional]


@pytest.mark.parametrize("form", FORMS)
def test_every_id_has_exactly_one_owner_and_one_name(form):
    vocabulary = form()
    kinds = ["text", "special", *vocabulary.modalities[1:]]
    owners = sum(vocabulary.mask(kind).long() for kind in kinds)
    assert (owners == 1).all()
    names = [vocabulary.name(token) for token in range(vocabulary.size)]
    assert [vocabulary.id(name) for name in names] == list(range(vocabulary.size))


@pytest.mark.parametrize("form", FORMS)
def test_json_round_trip(form):
    vocabulary = form()
    restored = Vocabulary.from_json(vocabulary.to_json())
    assert restored == vocabulary
    assert restored.size == vocabulary.size


@pytest.mark.parametrize("pattern", ["parallel", "interleaved", "delayed"])
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_to_codes_inverts_to_ids(form, pattern, seed):
    vocabulary = form()
    sizes = vocabulary.codebook_sizes("image")
    layout = CodeLayout(sizes, grid=(2, 3), pattern=pattern)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randint(0, k, (2, 6), generator=generator) for k in sizes], dim=2)
    flat = layout.flatten(Codes(indices, (2, 3)))
    ids = vocabulary.to_ids(flat, layout)
    assert torch.equal(vocabulary.to_codes(ids, layout), flat)
    image = vocabulary.modalities.index("image")
    assert (vocabulary.modality_of(ids[flat >= 0]) == image).all()


def test_an_id_of_another_codebook_is_refused_by_name():
    vocabulary = several_codes()
    layout = CodeLayout((4, 8), length=2)
    ids = vocabulary.to_ids(torch.tensor([[[1, 2], [3, 4]]]), layout)
    with pytest.raises(ValueError, match=r"<image_1_2> stands where a code of image/0"):
        vocabulary.to_codes(ids.flip(2), layout)


def test_separate_modalities_get_their_own_table():
    assert one_offset().tables() == [("joint", 0, 42)]
    assert separate_tables().tables() == [("joint", 0, 26), ("image", 26, 16)]


def test_overlapping_ids_are_refused():
    with pytest.raises(ValueError, match="overlap"):
        Vocabulary(4, {"pad": 4, "bos": 5, "eos": 6, "uncond": 7}, (CodeBlock("image", 0, 4, 6),))
    with pytest.raises(ValueError, match="lacks the special token"):
        Vocabulary(4, {"pad": 4})


@pytest.mark.parametrize(("name", "size"), [("liquid", 264192), ("emu3", 184622), ("lavit", 48386)])
def test_published_sizes(name, size):
    vocabulary = preset(name)
    assert vocabulary.size == size
    assert vocabulary.name(vocabulary.block("image")[-1].item()) == vocabulary.blocks[0].name_format.format(
        vocabulary.blocks[0].size - 1
    )


def test_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match="use the one the model was trained with"):
        one_offset().check_layout("image", CodeLayout((17,), length=4))


def entries_of(publisher, size):
    """A text tokenizer's entries with the published names and `size` codes of each modality."""
    texts = ["a", "b", *(alternatives[-1] for alternatives in publisher.special.values())]
    for modality, (_, form) in publisher.codes.items():
        if form is not None and form != "IMGIMG":
            texts += [form.format(code) for code in range(size[modality])]
    return {text: number for number, text in enumerate(texts)}


@pytest.mark.parametrize("name", sorted(set(PUBLISHERS) - {"chameleon"}))
def test_published_vocabularies_are_found_in_their_tokenizers(name):
    publisher = PUBLISHERS[name]
    size = dict.fromkeys(publisher.codes, 12)
    entries = entries_of(publisher, size)
    vocabulary = published_vocabulary(name, entries, size)
    assert vocabulary.forms == name
    assert vocabulary.codebook_sizes("image") == (12,)
    assert all(vocabulary.special[role] in entries.values() for role in publisher.special)
    for modality, (_, form) in publisher.codes.items():
        first = int(vocabulary.block(modality)[0])
        expected = len(entries) + len(publisher.behind) if form is None else entries[form.format(0)]
        assert first == expected
    assert vocabulary.tables()[0][2] == vocabulary.size - 12 * len(publisher.separate)
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


@pytest.mark.parametrize("name", ["liquid", "lavit"])
def test_presets_are_what_the_published_tokenizers_give(name):
    """With as many entries as published, and the named ones at their published ids."""
    constant, publisher = preset(name), PUBLISHERS[name]
    entries = {f"text {i}": i for i in range(constant.text_size)}
    for role, (text, *_) in publisher.special.items():
        del entries[f"text {constant.special[role]}"]
        entries[text] = constant.special[role]
    found = published_vocabulary(name, entries)
    assert found.special == constant.special
    assert found.null == constant.null
    assert found.size == constant.size
    assert torch.equal(found.block("image"), constant.block("image"))


def test_absent_codes_and_tokens_are_named():
    publisher = PUBLISHERS["seed_llama"]
    entries = entries_of(publisher, {"image": 12})
    with pytest.raises(ValueError, match=r"<img_00012>"):
        published_vocabulary("seed_llama", entries, {"image": 13})
    del entries["</img>"]
    with pytest.raises(ValueError, match=r"no </img>, which is seed_llama's eoi"):
        published_vocabulary("seed_llama", entries, {"image": 12})
    with pytest.raises(ValueError, match="code 0"):
        published_vocabulary("chameleon", entries_of(PUBLISHERS["chameleon"], {}), {"image": 3})
    with pytest.raises(ValueError, match="published_vocabulary"):
        preset("mio")
