"""Laws of documents: parse inverts build, and whatever the grammar lets through parses and decodes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lexel.document import DocumentCodec, Grammar, Image, Text
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes
from lexel.vocabulary import Vocabulary


class Letters:
    """A text tokenizer of one id per character."""

    alphabet = "abcdefghijklmnopqrstuvwxyz *0123456789"

    def encode(self, text, *, add_special_tokens=False):
        return [self.alphabet.index(character) for character in text]

    def decode(self, token_ids):
        return "".join(self.alphabet[i] for i in token_ids)


SIZE = len(Letters.alphabet)
CODECS = {
    "raster": DocumentCodec(
        Vocabulary.build(SIZE, {"image": (7,)}), Letters(), {"image": CodeLayout((7,), grid=(2, 3))}
    ),
    "rows": DocumentCodec(
        Vocabulary.build(SIZE, {"image": (7,)}, roles=("img", "eol", "eof"), null="negative"),
        Letters(),
        {"image": CodeLayout((7,), grid=(2, 3), row_end=True)},
    ),
    "flexible": DocumentCodec(
        Vocabulary.build(SIZE, {"image": (7,)}, null="prefix"),
        Letters(),
        {"image": CodeLayout((7,), length=4, flexible=True)},
    ),
    "interleaved": DocumentCodec(
        Vocabulary.build(SIZE, {"image": (3, 5)}, null="padding"),
        Letters(),
        {"image": CodeLayout((3, 5), grid=(2, 2), pattern="interleaved")},
    ),
    "delayed": DocumentCodec(
        Vocabulary.build(SIZE, {"image": (3, 5)}),
        Letters(),
        {"image": CodeLayout((3, 5), grid=(2, 2), pattern="delayed")},
    ),
    "sequential": DocumentCodec(
        Vocabulary.build(SIZE, {"image": (3, 5)}),
        Letters(),
        {"image": CodeLayout((3, 5), grid=(2, 2), pattern="sequential")},
    ),
    "streams": DocumentCodec(
        Vocabulary.build(SIZE, {"image": (3, 5, 4), "sound": (7,)}),
        Letters(),
        {
            "image": CodeLayout((3, 5, 4), length=4, flexible=True, pattern="sequential"),
            "sound": CodeLayout((7,), length=3, flexible=True, pattern="sequential"),
        },
    ),
    "two": DocumentCodec(
        Vocabulary.build(SIZE, {"image": (7,), "depth": (4,)}),
        Letters(),
        {"image": CodeLayout((7,), grid=(2, 2)), "depth": CodeLayout((4,), length=3)},
    ),
}


def picture(codec, seed, modality="image"):
    layout = codec.layouts[modality]
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack(
        [torch.randint(0, k, (1, layout.positions), generator=generator) for k in layout.codebook_sizes], 2
    )
    lengths = None
    if layout.flexible:
        lengths = torch.randint(1, layout.positions + 1, (1,), generator=generator)
        indices = indices * (torch.arange(layout.positions) < lengths[:, None])[..., None]
    return Image(Codes(indices, layout.grid, layout.scales, lengths), modality=modality)


def same(one, two):
    if isinstance(one, Text) or isinstance(two, Text):
        return one == two
    lengths = [None if x.codes.lengths is None else x.codes.lengths.tolist() for x in (one, two)]
    return torch.equal(one.codes.indices, two.codes.indices) and lengths[0] == lengths[1]


@st.composite
def documents(draw):
    name = draw(st.sampled_from(sorted(CODECS)))
    codec = CODECS[name]
    document = []
    for _ in range(draw(st.integers(1, 4))):
        if (document and isinstance(document[-1], Text)) or draw(st.booleans()):
            modality = draw(st.sampled_from(sorted(codec.layouts)))
            document.append(picture(codec, draw(st.integers(0, 999)), modality))
        else:
            document.append(Text(draw(st.text(alphabet="abc xyz", min_size=1, max_size=6))))
    return codec, document


@settings(max_examples=200, deadline=None)
@given(documents())
def test_parse_inverts_build(case):
    codec, document = case
    parsed = codec.parse(codec.build(document).ids)
    assert len(parsed) == len(document)
    assert all(same(a, b) for a, b in zip(parsed, document))


@settings(max_examples=100, deadline=None)
@given(documents())
def test_a_prompt_is_a_prefix_of_the_document_built_whole(case):
    codec, document = case
    for cut in range(len(document)):
        blank = [Image.blank(s.modality) if isinstance(s, Image) else Text.blank() for s in document[cut:]]
        prompt = codec.prompt([*document[:cut], *blank])
        whole = codec.build(document, supervise="all")
        assert torch.equal(whole.ids[: len(prompt)], prompt.ids)
        assert torch.equal(whole.positions[: len(prompt)], prompt.positions)
        assert torch.equal(whole.modality[: len(prompt)], prompt.modality)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(CODECS)),
    choices=st.lists(st.integers(0, 10**6), min_size=80, max_size=80),
    plan=st.lists(st.sampled_from(["text", "image"]), min_size=1, max_size=3),
)
def test_any_walk_the_grammar_allows_parses_and_agrees_with_build(name, choices, plan):
    codec = CODECS[name]
    plan = [m for i, m in enumerate(plan) if m != "text" or i == 0 or plan[i - 1] != "text"]
    grammar = Grammar(codec, plan, text_limit=3)
    prompt = codec.prompt([Image.blank() if plan[0] == "image" else Text.blank()])
    state, ids, positions, modalities = grammar.start(prompt), [], [], []
    for choice in choices:
        if grammar.done(state):
            break
        assert grammar.remaining(state) > 0
        options = grammar.allowed(state).nonzero()[:, 0]
        token = int(options[choice % len(options)])
        row = [token] + [codec.vocabulary.special["pad"]] * (codec.columns - 1)
        for column, book in enumerate(grammar.columns(state)[1:], start=1):
            if book is not None and codec.columns > 1:
                row[column] = int(codec.vocabulary.block("image", book)[choice % 3])
        ids.append(row)
        positions.append(list(grammar.position(state)))
        modalities.append(grammar.modality(state))
        after = grammar.advance(state, token)
        assert grammar.remaining(after) < grammar.remaining(state)
        state = after
    assert grammar.done(state)
    whole = torch.cat([prompt.ids.reshape(len(prompt), -1), torch.tensor(ids)])
    document = codec.parse(whole)
    assert [segment.modality for segment in document if segment.modality != "text"] == [
        m for m in plan if m != "text"
    ]
    if all(a.modality != "text" or b.modality != "text" for a, b in itertools.pairwise(document)):
        rebuilt = codec.build(document, supervise="all")
        assert torch.equal(rebuilt.ids.reshape(len(rebuilt), -1)[: len(whole)], whole)
        assert rebuilt.positions[len(prompt) : len(whole)].tolist() == positions
        assert rebuilt.modality[len(prompt) : len(whole)].tolist() == modalities


def test_a_token_outside_the_grammar_is_refused():
    codec = CODECS["raster"]
    grammar = Grammar(codec, ["image"])
    state = grammar.start(codec.prompt([Text("abc"), Image.blank()]))
    with pytest.raises(ValueError, match=r"<eos> may not follow"):
        grammar.advance(state, codec.vocabulary.special["eos"])


def test_loss_falls_on_the_last_segment_or_on_all():
    codec = CODECS["raster"]
    document = [Text("ab"), picture(codec, 0)]
    last, everything = codec.build(document), codec.build(document, supervise="all")
    assert last.loss_mask.tolist() == [False] * 3 + [True] * 9  # bos a b | boi, six codes, eoi, eos
    assert everything.loss_mask.tolist() == [False] + [True] * 11


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raster", ["bos", "uncond", "boi"]),
        ("flexible", ["bos", "boi"]),
        ("interleaved", ["bos", "pad", "pad", "boi"]),
    ],
)
def test_null_forms(name, expected):
    codec = CODECS[name]
    ids = codec.unconditional([Text("ab"), Image.blank()]).ids
    assert [codec.vocabulary.name(int(i)).strip("<>") for i in ids] == expected


def test_a_negative_prompt_is_the_null_form_of_emu3():
    codec = CODECS["rows"]
    sequence = codec.unconditional([Text("ab"), Image.blank()], negative="zz")
    assert torch.equal(sequence.ids, codec.prompt([Text("zz"), Image.blank()]).ids)


def test_emu3_form_writes_size_rows_and_ends():
    codec = CODECS["rows"]
    names = [codec.vocabulary.name(int(i)) for i in codec.build([picture(codec, 1)]).ids]
    marks = ["<bos>", "<boi>", "<img>", "<eol>", "<eol>", "<eof>", "<eoi>", "<eos>"]
    assert [n for n in names if not n.startswith(("<image", "<text"))] == marks


def test_unconditional_training_form_starts_like_the_unconditional_prompt():
    codec = CODECS["raster"]
    document = [Text("ab"), picture(codec, 0)]
    trained = codec.build(document, unconditional=True)
    prompt = codec.unconditional([Text("ab"), Image.blank()])
    assert torch.equal(trained.ids[: len(prompt)], prompt.ids)


def test_broken_documents_are_refused():
    codec = CODECS["raster"]
    ids = codec.build([picture(codec, 0)]).ids
    with pytest.raises(ValueError, match="ends after 2 of 6"):
        codec.parse(ids[:4])
    with pytest.raises(ValueError, match="no blank segment"):
        codec.prompt([Text("a")])
    with pytest.raises(ValueError, match="encode its pixels"):
        codec.build([Image(pixels=torch.zeros(3, 2, 2))])
    with pytest.raises(ValueError, match="no modality"):
        Grammar(codec, ["sound"])
