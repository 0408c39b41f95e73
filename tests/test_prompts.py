"""Published sequence forms: what they look like as ids, and that reading inverts writing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lexel.document import Grammar, Image, Text
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.prompts import (
    FORMATS,
    PromptCodec,
    emu3_grid,
    join_streams,
    make_codec,
    published_codec,
    split_streams,
)
from lexel.sample.decode import generate
from lexel.sample.liquid import published_sampling
from lexel.sample.logits import SamplingConfig
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes
from lexel.vocabulary import PUBLISHERS, Vocabulary, published_vocabulary

CODES, SPEECH = 24, 16
SPECIAL = {
    "liquid": ("<start_of_turn>", "<end_of_turn>"),
    "mio": ("<|im_start|>",),
    "janus": ("<|User|>", "<|Assistant|>"),
}
LAYOUTS = {
    "liquid": CodeLayout((CODES,), grid=(2, 3)),
    "emu3": CodeLayout((CODES,), grid=(3, 2), row_end=True),
    "chameleon": CodeLayout((CODES,), grid=(2, 2)),
    "seed_llama": CodeLayout((CODES,), length=4),
    "seed_llama_14b": CodeLayout((CODES,), length=4),
    "seed_llama_pretrain": CodeLayout((CODES,), length=4),
    "lavit": CodeLayout((CODES,), length=5, flexible=True),
    "mio": CodeLayout((CODES,), length=4),
    "janus": CodeLayout((CODES,), grid=(2, 2)),
}


def chameleon_name(code):
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def text_tokenizer(name):
    """Every byte, then the names that the published tokenizer has; Llama's descendants write ▁ for a space
    and put one before every text."""
    name = FORMATS[name].publisher or name
    publisher = PUBLISHERS[name]
    llama = name in ("seed_llama", "lavit", "mio")
    characters = sorted({*map(chr, range(32, 127)), "\n", "▁"}) if llama else None
    alphabet = characters or sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    if llama:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    added = [texts[0] for texts in publisher.special.values()]
    for modality, (_, form) in publisher.codes.items():
        size = CODES if modality == "image" else SPEECH
        if form is not None:
            added += [chameleon_name(i) if form == "IMGIMG" else form.format(i) for i in range(size)]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in [*added, *SPECIAL.get(name, ())]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def codec_of(name):
    layouts = {"image": LAYOUTS[name]}
    if name == "mio":
        layouts["speech"] = CodeLayout((SPEECH,), length=12, flexible=True)
    return published_codec(name, text_tokenizer(name), layouts)


CODECS = {name: codec_of(name) for name in FORMATS}
KINDS = [(name, kinds) for name in FORMATS for kinds in ("image", *FORMATS[name].forms)]


def segment(codec, kind, seed, text):
    if kind == "text":
        return Text(text)
    layout = codec.layouts[kind]
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(layout.codebook_sizes[0], (1, layout.positions, 1), generator=generator)
    lengths = torch.randint(1, layout.positions + 1, (1,), generator=generator) if layout.flexible else None
    if lengths is not None:
        indices = indices * (torch.arange(layout.positions) < lengths)[:, None]
    return Image(Codes(indices, layout.grid, None, lengths), modality=kind)


def same(one, two):
    if isinstance(one, Text) or isinstance(two, Text):
        return one == two
    if one.codes is None or two.codes is None:
        return one.modality == two.modality
    lengths = [None if x.codes.lengths is None else x.codes.lengths.tolist() for x in (one, two)]
    return torch.equal(one.codes.indices, two.codes.indices) and lengths[0] == lengths[1]


WORDS = st.text("abc xyz.,:?!*0123456789\n", min_size=1, max_size=20)


@pytest.mark.parametrize(("name", "kinds"), KINDS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), texts=st.lists(WORDS, min_size=3, max_size=3))
def test_reading_inverts_writing(name, kinds, seed, texts):
    codec = CODECS[name]
    if codec.text_tokenizer.decode(codec.text_tokenizer.encode(" a")) != " a":
        texts = [text.strip() or "a" for text in texts]  # this tokenizer does not keep them
    document = [segment(codec, kind, seed + i, texts[i]) for i, kind in enumerate(kinds.split())]
    sequence = codec.build(document)
    read = codec.parse(sequence.ids)
    assert len(read) == len(document)
    assert all(same(one, two) for one, two in zip(read, document)), (read, document)
    padded = torch.cat([sequence.ids, torch.full((3,), codec.vocabulary.special["pad"])])
    assert all(same(one, two) for one, two in zip(codec.parse(padded), document))


@pytest.mark.parametrize(("name", "kinds"), KINDS)
def test_a_prompt_begins_its_training_row_and_the_loss_is_behind_it(name, kinds):
    codec = CODECS[name]
    document = [segment(codec, kind, i, "two words") for i, kind in enumerate(kinds.split())]
    row = codec.build(document)
    blank = Text.blank() if isinstance(document[-1], Text) else Image.blank(document[-1].modality)
    if kinds == "text" or (kinds == "image" and codec.vocabulary.null == "negative"):
        return  # nothing to condition on; an empty prompt in training, a negative one in sampling
    prompt = codec.prompt([*document[:-1], blank]) if len(document) > 1 else codec.unconditional([blank])
    assert row.ids[: len(prompt)].tolist() == prompt.ids.tolist()
    if FORMATS[name].forms.get(kinds, FORMATS["liquid"].forms["text image"]).loss == "last":
        assert row.loss_mask.tolist() == [i >= len(prompt) for i in range(len(row))]


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_grammar_lets_through_is_read(name):
    codec = CODECS[name]
    document = [Text("a cat"), Image.blank()]
    prompt = codec.prompt(document)
    grammar = Grammar(codec, codec.plan(document))
    state, ids = grammar.start(prompt), list(prompt.ids.tolist())
    generator = torch.Generator().manual_seed(0)
    while not grammar.done(state):
        allowed = grammar.allowed(state).nonzero()[:, 0]
        token = int(allowed[torch.randint(len(allowed), (1,), generator=generator)])
        state = grammar.advance(state, token)
        ids.append(token)
    picture = codec.segments(torch.tensor(ids[len(prompt) - len(codec.scripts["image"][0]) :]))[0]
    closing = codec.scripts["image"][2]
    ids += [token for token in closing if token not in ids[len(prompt) :]]
    form = codec.form(document)
    whole = codec.parse(torch.tensor([*ids, *([codec.vocabulary.special["eos"]] if form.close else [])]))
    assert len(whole) == 2
    assert whole[0] == Text("a cat")
    assert same(whole[1], picture)


def names(codec, ids):
    """Ids as the text tokenizer's texts, codes as their numbers."""
    vocabulary, special = codec.vocabulary, codec.vocabulary.special
    roles = {token: f"<{role}>" for role, token in special.items()}
    image = {token: f"#{code}" for code, token in enumerate(vocabulary.block("image").tolist())}
    return "".join(roles.get(i) or image.get(i) or codec.text_tokenizer.decode([i]) for i in ids.tolist())


PICTURE = "#0#1#2#3#4#5"
EXPECTED = {
    "liquid": {
        "text image": "<bos>hi Generate an image based on this description.<boi>PICTURE<eoi><eos>",
        "image": "<bos><uncond><boi>PICTURE<eoi><eos>",
        "image text": "<bos><boi>PICTURE<eoi>The caption of this image is:hi<eos>",
        "text": "<bos>hi",
        "image text text": "<bos><start_of_turn>user\n<boi>PICTURE<eoi>\nhi<end_of_turn>\n"
        "<start_of_turn>model\nhi<eos>",
    },
    "emu3": {
        "text image": "<bos>hi<boi>3*2<img>#0#1<eol>#2#3<eol>#4#5<eol><eof><eoi><eos>",
        "image": "<bos><boi>3*2<img>#0#1<eol>#2#3<eol>#4#5<eol><eof><eoi><eos>",
        "image text text": "<bos>You are a helpful assistant. USER: "
        "<boi>3*2<img>#0#1<eol>#2#3<eol>#4#5<eol><eof><eoi>hi. ASSISTANT:hi<eos>",
    },
    "chameleon": {
        "text image": "<bos>hi<eot><boi>PICTURE<eoi><eos>",
        "image text text": "<bos><boi>PICTURE<eoi>hi<eot>hi<eos>",
        "image": "<bos><boi>PICTURE<eoi><eos>",
    },
    "janus": {
        "text image": "<bos><|User|>: hi\n\n<|Assistant|>:<boi>PICTURE<eoi><eos>",
        "image text text": "<bos><|User|>: <boi>"
        + 4 * "<placeholder>"
        + "<eoi>\nhi\n\n<|Assistant|>: hi<eos>",
    },
}


@pytest.mark.parametrize(("name", "kinds"), [(name, kinds) for name in EXPECTED for kinds in EXPECTED[name]])
def test_published_sequences(name, kinds):
    codec = CODECS[name]
    layout = codec.layouts["image"]
    codes = Image(Codes(torch.arange(layout.positions)[None, :, None], layout.grid))
    row = codec.build([Text("hi") if kind == "text" else codes for kind in kinds.split()])
    expected = EXPECTED[name][kinds].replace("PICTURE", PICTURE[: 2 * layout.positions])
    assert names(codec, row.ids) == expected


def test_llama_prompts():
    text = CODECS["seed_llama"].text_tokenizer
    prompt = CODECS["seed_llama"].prompt([Text("draw a dog"), Text.blank()])
    assert prompt.ids.tolist() == [
        CODECS["seed_llama"].vocabulary.special["bos"],
        *text.encode("USER: draw a dog\nASSISTANT:", add_special_tokens=False),
    ]
    lavit = CODECS["lavit"]
    drawn = lavit.prompt([Text("a dog"), Image.blank()])
    assert drawn.ids.tolist() == [*lavit.text_tokenizer.encode("a dog"), len(lavit.text_tokenizer)]
    assert lavit.vocabulary.block("image")[0] == len(lavit.text_tokenizer) + 2
    mio = CODECS["mio"].prompt([Text("sing"), Image.blank("speech")])
    string = CODECS["mio"].text_tokenizer.decode(mio.ids)
    assert "speech only" in string
    assert string.endswith("<spch>")


def test_unconditional_prompts():
    def null(name, **options):
        codec = CODECS[name]
        return names(codec, codec.unconditional([Text("a cat"), Image.blank()], **options).ids)

    assert null("liquid") == "<bos><uncond><boi>"
    assert null("chameleon") == "<bos><boi>"
    assert null("emu3").startswith("<bos>lowres, bad anatomy")
    assert null("emu3").endswith("blurry.<boi>3*2<img>")
    assert null("emu3", negative="grey") == "<bos>grey<boi>3*2<img>"
    janus = CODECS["janus"]
    whole = janus.prompt([Text("a cat"), Image.blank()]).ids
    padded = janus.unconditional([Text("a cat"), Image.blank()]).ids
    assert padded[[0, -1]].tolist() == whole[[0, -1]].tolist()
    assert padded[1:-1].tolist() == [janus.vocabulary.special["pad"]] * (len(whole) - 2)


def test_emu3_learns_codes_only_and_seed_everything():
    codec = CODECS["emu3"]
    row = codec.build([Text("hi"), segment(codec, "image", 0, "")])
    assert torch.equal(row.loss_mask, codec.vocabulary.modality_of(row.ids) > 0)
    assert int(row.loss_mask.sum()) == 6
    codec = CODECS["seed_llama_pretrain"]
    assert codec.build([Text("hi"), segment(codec, "image", 0, "")]).loss_mask.all()


def test_every_instruction_of_liquid_is_read():
    codec = CODECS["liquid"]
    document = [Text("a cat"), segment(codec, "image", 0, "")]
    rows = [codec.build(document, wording=i).ids for i in range(codec.wordings)]
    assert len({tuple(row.tolist()) for row in rows}) == 10
    assert all(codec.parse(row)[0] == Text("a cat") for row in rows)


def test_special_tokens_in_a_text_are_refused():
    with pytest.raises(ValueError, match=r"holds <boi>, which is no text"):
        CODECS["liquid"].prompt([Text("a <boi> cat"), Image.blank()])
    with pytest.raises(ValueError, match=r"<img3>"):
        CODECS["mio"].prompt([Text("a <img3> cat"), Image.blank()])


def test_documents_without_a_form_are_refused():
    with pytest.raises(ValueError, match=r"liquid has no form for \[image, image\]"):
        CODECS["liquid"].form([Image.blank(), Image.blank()])
    with pytest.raises(ValueError, match="leave only the last one blank"):
        CODECS["liquid"].prompt([Text("a"), Text.blank(), Text.blank()])
    with pytest.raises(ValueError, match=r"no entry|has no <boi>"):
        published_vocabulary("liquid", {"<pad>": 0, "<eos>": 1, "<bos>": 2})
    with pytest.raises(ValueError, match="no published vocabulary"):
        published_vocabulary("gpt", {})


def test_a_vocabulary_remembers_its_forms():
    codec = CODECS["liquid"]
    again = Vocabulary.from_json(codec.vocabulary.to_json())
    assert isinstance(make_codec(again, codec.text_tokenizer, codec.layouts), PromptCodec)


def test_chameleon_codes_are_named_by_letters():
    codec = CODECS["chameleon"]
    entries = codec.text_tokenizer.get_vocab()
    assert int(codec.vocabulary.block("image")[21]) == entries["IMGIMGCBZ"]


def test_speech_streams():
    codes = torch.randint(1024, (1, 5, 4))
    line = join_streams(codes)[0, :, 0]
    assert line[:5].tolist() == codes[0, :, 0].tolist()
    assert (line[15:] >= 3072).all()
    assert torch.equal(split_streams(line), codes)
    assert torch.equal(split_streams(line[:5]), codes[..., :1])
    with pytest.raises(ValueError, match="equal length"):
        split_streams(line[:-1])
    with pytest.raises(ValueError, match="stand in order"):
        split_streams(line.flip(0))


def test_speech_streams_are_a_sequential_layout():
    """The ids of MIO's one line of codes, and a grammar that keeps the streams in order and equally long."""
    layout = CodeLayout((4,) * 4, length=5, flexible=True, pattern="sequential")
    layouts = {"image": LAYOUTS["mio"], "speech": layout}
    codec = published_codec("mio", text_tokenizer("mio"), layouts)
    assert codec.vocabulary.blocks[2].ids.tolist() == [
        codec.text_tokenizer.get_vocab()[f"<spch{i}>"] for i in range(4, 8)
    ]
    codes = Codes(torch.randint(4, (1, 3, 4)))
    document = [Text("sing"), Image(layout.padded(codes), modality="speech")]
    line = join_streams(codes.indices, 4)
    one = Image(CODECS["mio"].layouts["speech"].padded(Codes(line)), modality="speech")
    assert torch.equal(codec.build(document).ids, CODECS["mio"].build([Text("sing"), one]).ids)
    read = codec.parse(codec.build(document).ids)[1]
    assert read.codes.lengths.tolist() == [3]
    assert torch.equal(read.codes.indices[:, :3], codes.indices)


def test_texts_may_hold_any_characters():
    codec = CODECS["liquid"]
    document = [Text("a \U00100000 cat \U00100001 €"), segment(codec, "image", 0, "")]
    assert codec.parse(codec.build(document).ids)[1].codes is not None


def test_what_a_form_adds_is_counted():
    codec = CODECS["liquid"]
    text, longest = Text("hi"), max(FORMATS["liquid"].instructions, key=len)
    wording = FORMATS["liquid"].instructions.index(longest)
    row = codec.build([text, segment(codec, "image", 0, "")], wording=wording)
    assert len(row) <= len(codec.text_tokenizer.encode("hi")) + 6 + 4 + codec.added


@pytest.mark.parametrize("name", FORMATS)
def test_published_settings_are_settings(name):
    assert set(published_sampling(name)) <= {"text", "image", "speech"}


def test_a_picture_of_nothing_has_the_null_prompt():
    codec = CODECS["liquid"]
    assert names(codec, codec.prompt([Image.blank()]).ids) == "<bos><uncond><boi>"


def test_emu3_grids():
    assert emu3_grid(1, 1) == (90, 90)
    assert emu3_grid(16, 9) == (68, 120)


@pytest.mark.parametrize("name", FORMATS)
def test_the_one_sampler_draws_them(name):
    """Guided pictures of a random model, side by side, with the published filters."""
    codec = CODECS[name]
    torch.manual_seed(0)
    size, pad = codec.vocabulary.size, codec.vocabulary.special["pad"]
    config = CausalLMConfig(vocab_size=size, dim=16, layers=1, heads=2, max_length=512, pad_id=pad)
    documents = [[Text(text), Image.blank()] for text in ("a cat", "two dogs on a house")]
    sampling = published_sampling(name).get("image", SamplingConfig())
    ids, _, _ = generate(
        CausalLM(config).eval(),
        [codec.prompt(document) for document in documents],
        Grammar(codec, ("image",)),
        unconditional=[codec.unconditional(document) for document in documents],
        sampling={"image": sampling},
        generator=torch.Generator().manual_seed(0),
    )
    opening = torch.tensor(codec.scripts["image"][0])
    for row in ids:
        (picture,) = codec.segments(torch.cat([opening, row]))
        assert picture.codes.indices.shape[1] == codec.layouts["image"].positions
