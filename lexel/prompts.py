"""The sequence forms of published unified models: what their prompts and training rows look like as ids.

A form is found by the kinds of a document's segments. For Liquid ``[Text, Image]`` is a picture to draw,
``[Image, Text, Text]`` a picture, a question and its answer. Everything before the last segment is the
condition, written as the form's template says; the last segment is what the model writes:

    codec = published_codec("liquid", text_tokenizer, {"image": layout})
    codec.prompt([Text("a red cat"), Image.blank()])
    # <bos> a red cat Generate an image based on this description. <boi>

`PromptCodec` is a `DocumentCodec`, so that prompts, guidance's unconditional twins, training rows and what
the sampler writes go the same way as for Lexel's own models. Templates were read in the published code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor

from lexel.document import Document, DocumentCodec, Image, Segment, Text, TextTokenizer, TokenSequence, Writer
from lexel.tokenizers.layout import CodeLayout
from lexel.vocabulary import Vocabulary, published_vocabulary


@dataclass(frozen=True)
class Form:
    """One kind of document.

    before: template of all that stands before the last segment; ``{0}``, ``{1}`` … are the segments,
    ``{instruction}`` one of the format's wordings, ``{eot}`` and the like the special token of that role.
    lead: stands between that and a text that the model writes. loss: on what the model writes ("last"), on
    every id ("all") or on codes only ("codes"). close: whether ``<eos>`` follows.
    """

    before: str
    lead: str = ""
    loss: Literal["last", "all", "codes"] = "last"
    close: bool = True


@dataclass(frozen=True)
class Format:
    """A published model's sequences.

    forms: by the kinds of the segments, ``"image text text"``. instructions: wordings to draw from in
    training, the first is that of inference. negative: text of the unconditional prompt where the vocabulary
    says "negative". square: see `DocumentCodec`. bos: whether sequences begin with ``<bos>``. plain:
    documents without a form of their own are written one segment after the other. sampling: published
    settings by modality, under the names of `SamplingConfig`. publisher: whose vocabulary
    (`lexel.vocabulary.PUBLISHERS`) it is; None: that of the same name.
    """

    forms: Mapping[str, Form]
    instructions: tuple[str, ...] = ("",)
    negative: str = ""
    square: tuple[int, int, int] | None = None
    bos: bool = True
    plain: bool = False
    sampling: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    publisher: str | None = None


def _chatml(system: str, user: str) -> str:
    turns = f"<|im_start|>system\n{system}{{eos}}\n<|im_start|>user\n{user}{{eos}}\n"
    return turns + "<|im_start|>assistant\n"


_MIO_STANDARD = (
    "You are MIO, an AI assistant capable of understanding and generating images, text, videos, and speech, "
    "selecting the appropriate modality according to the context."
)
_MIO_VOICE = (
    "You are MIO, an AI assistant capable of understanding images, text, videos, and speech, and generating "
    "speech. Please respond to the user with speech only, starting with {begin_speech} and ending with "
    "{end_speech}."
)

FORMATS: dict[str, Format] = {
    # FoundationVision/Liquid: liquid/train/train.py, evaluation/inference_{t2i,i2t,t2t}.py
    "liquid": Format(
        {
            "text image": Form("{0}{instruction}"),
            "image text": Form("{0}The caption of this image is:"),
            "text": Form("", loss="all", close=False),
            "image text text": Form("<start_of_turn>user\n{0}\n{1}<end_of_turn>\n<start_of_turn>model\n"),
            "text text": Form("<start_of_turn>user\n{0}<end_of_turn>\n<start_of_turn>model\n"),
        },
        instructions=(
            " Generate an image based on this description.",
            " Create an image that captures the provided description.",
            " Based on the previous text, produce a corresponding image.",
            " Please illustrate the above text with a picture.",
            " Translate the given description into a image.",
            " Construct a visual representation of the above description.",
            " Create a image that matches the text.",
            " Formulate a visual expression that reflects the narrative just provided.",
            " Give a visual depiction based on the above sentences.",
            " Create an image using the information mentioned above as guidance.",
        ),
        square=(122, 116, 104),
        sampling={"image": {"temperature": 0.99, "top_k": 4096, "top_p": 0.96, "guidance": 7.0}},
    ),
    # baaivision/Emu3: emu3/mllm/processing_emu3.py, emu3/train/datasets.py, image_generation.py
    "emu3": Format(
        {
            "text image": Form("{0}", loss="codes"),
            "image text": Form("You are a helpful assistant. USER: {0}Please describe the image. ASSISTANT:"),
            "image text text": Form("You are a helpful assistant. USER: {0}{1}. ASSISTANT:"),
        },
        negative=(
            "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
            "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
            "username, blurry."
        ),
        sampling={"image": {"top_k": 2048, "guidance": 3.0}},
    ),
    # facebookresearch/chameleon: chameleon/inference/chameleon.py and its examples; its guidance has a scale
    # for a picture in the prompt, too (1.2), which without one is this.
    "chameleon": Format(
        {
            "text text": Form("{0}{eot}"),
            "text image": Form("{0}{eot}"),
            "image text text": Form("{0}{1}{eot}"),
            "text image text": Form("{0}{1}{eot}"),
        },
        plain=True,
        sampling={
            "text": {"temperature": 0.7, "top_p": 0.9},
            "image": {"temperature": 0.7, "top_p": 0.9, "guidance": 3.0},
        },
    ),
    # AILab-CVC/SEED: scripts/seed_llama_inference_8B.py, MultiModalLLM/src/data/torchdata_sft.py
    "seed_llama": Format(
        {
            "text image": Form("USER: {0}\nASSISTANT:"),
            "text text": Form("USER: {0}\nASSISTANT:"),
            "image text text": Form("USER: {0}{1}\nASSISTANT:"),
            "image text image": Form("USER: {0}{1}\nASSISTANT:"),
        },
        plain=True,
        sampling={"text": {"top_p": 0.5}, "image": {"top_p": 0.5}},
    ),
    "seed_llama_14b": Format(
        {
            "text image": Form("[INST] {0} [/INST]\n"),
            "text text": Form("[INST] {0} [/INST]\n"),
            "image text text": Form("[INST] {0}{1} [/INST]\n"),
            "image text image": Form("[INST] {0}{1} [/INST]\n"),
        },
        plain=True,
        sampling={"text": {"top_p": 0.5}, "image": {"top_p": 0.5}},
        publisher="seed_llama",
    ),
    # MultiModalLLM/src/data/torchdata_train.py: pairs in either order, all of them supervised
    "seed_llama_pretrain": Format(
        {"text image": Form("{0}", loss="all"), "image text": Form("{0}", loss="all")},
        plain=True,
        sampling={"text": {"top_p": 0.5}, "image": {"top_p": 0.5}},
        publisher="seed_llama",
    ),
    # jy0205/LaVIT: LaVIT/models/lavit_for_{generation,understanding}.py
    "lavit": Format(
        {
            "text image": Form("{0}", close=False),
            "image text": Form("{0}"),
            "image text text": Form("{0}Question: {1} Answer:"),
        },
        bos=False,
        plain=True,
        sampling={"image": {"top_k": 50, "guidance": 4.0}},
    ),
    # MIO-Team/MIO: tokenization_mio.py, infer.py
    "mio": Format(
        {
            "text text": Form(_chatml(_MIO_STANDARD, "{0}")),
            "image text text": Form(_chatml(_MIO_STANDARD, "{1}\n{0}")),
            "text image": Form(_chatml(_MIO_STANDARD, "{0}")),
            "image text": Form(
                _chatml(
                    _MIO_STANDARD, "Please provide an accurate and detailed description of this image.\n{0}"
                )
            ),
            "speech text text": Form(_chatml(_MIO_STANDARD, "{1}\n{0}")),
            "text speech": Form(_chatml(_MIO_VOICE, "{0}")),
            "speech speech": Form(_chatml(_MIO_VOICE, "{0}")),
        },
        sampling={"text": {"top_p": 0.7}, "image": {"top_p": 0.7}, "speech": {"top_p": 0.7}},
    ),
    # deepseek-ai/Janus: janus/models/processing_vlm.py, janus/utils/conversation.py, generation_inference.py
    "janus": Format(
        {
            "text image": Form("<|User|>: {0}\n\n<|Assistant|>:"),
            "image text text": Form("<|User|>: {0}\n{1}\n\n<|Assistant|>:", lead=" "),
            "text text": Form("<|User|>: {0}\n\n<|Assistant|>:", lead=" "),
        },
        sampling={"image": {"guidance": 5.0}},
    ),
}

_FIELD = re.compile(r"\{(\w+)\}")
# Stand for pictures and for special tokens while a sequence is matched as a string: characters of private
# use, which are kept out of its texts.
_PICTURE, _SPECIAL = chr(0x100000), 0x100001
_KEPT_OUT = dict.fromkeys(range(0x100000, 0x101000), "\ufffd")


class VocabularyTokenizer(TextTokenizer, Protocol):
    """A text tokenizer that also tells its entries, as every transformers tokenizer does."""

    def get_vocab(self) -> dict[str, int]:
        """Token text → id."""
        ...


def published_codec(
    name: str, text_tokenizer: VocabularyTokenizer, layouts: Mapping[str, CodeLayout]
) -> PromptCodec:
    """The codec of a published model (a name of `FORMATS`) from its text tokenizer. layouts: of the
    modalities to be used, one codebook each: a raster for Liquid, Chameleon and Janus, one with
    ``row_end=True`` for Emu3, 32 codes for SEED-LLaMA and MIO, a flexible line for LaVIT. MIO's speech:
    a flexible line of four codebooks of 1024 codes in the sequential pattern, whose grammar keeps the streams
    in order and equally long, or one of 4096 codes (see `join_streams`).
    Raises ValueError for an unknown name, absent entries, or other codebooks."""
    sizes = {modality: layout.codebook_sizes for modality, layout in layouts.items()}
    publisher = FORMATS[name].publisher if name in FORMATS else None
    vocabulary = published_vocabulary(publisher or name, text_tokenizer.get_vocab(), sizes)
    return PromptCodec(replace(vocabulary, forms=name), text_tokenizer, layouts)


def make_codec(
    vocabulary: Vocabulary, text_tokenizer: TextTokenizer, layouts: Mapping[str, CodeLayout]
) -> DocumentCodec:
    """The codec that writes documents in the forms that `vocabulary` names."""
    kind = PromptCodec if vocabulary.forms else DocumentCodec
    return kind(vocabulary, text_tokenizer, layouts)


class PromptCodec(DocumentCodec):
    """Documents in a published model's forms, see the module docstring.

    In Janus's sequences pictures of the condition are ``<image_placeholder>`` ids, whose embeddings its own
    vision encoder gives; they come back from `parse` without codes. Raises ValueError where
    `vocabulary.forms` is unknown."""

    def __init__(
        self, vocabulary: Vocabulary, text_tokenizer: TextTokenizer, layouts: Mapping[str, CodeLayout]
    ) -> None:
        super().__init__(vocabulary, text_tokenizer, layouts)
        if vocabulary.forms not in FORMATS:
            raise ValueError(f"no published forms {vocabulary.forms!r}; known: {', '.join(FORMATS)}.")
        self.format = FORMATS[vocabulary.forms]
        self.wordings, self.square = len(self.format.instructions), self.format.square
        self.added = max((self._constants(form) for form in self.format.forms.values()), default=0)

    def _constants(self, form: Form) -> int:
        """How many tokens a form adds at most."""
        template, longest = form.before + form.lead, max(self.format.instructions, key=len)
        texts = [constant for constant, _ in _parts(template)]
        texts += [longest] if "{instruction}" in template else []
        roles = sum(name in self.vocabulary.special for _, name in _parts(template))
        return roles + sum(len(self.text_tokenizer.encode(text, add_special_tokens=False)) for text in texts)

    def form(self, document: Document) -> Form:
        """The form of a document, blanks included. Raises ValueError where the model has none."""
        kinds = " ".join(segment.modality for segment in document)
        if kinds in self.format.forms:
            return self.format.forms[kinds]
        # A single picture is one without its condition, which is written in the null form.
        if self.format.plain or kinds == "image":
            return Form("".join(f"{{{i}}}" for i in range(len(document) - 1)))
        known = ", ".join(f"[{kinds.replace(' ', ', ')}]" for kinds in self.format.forms)
        raise ValueError(
            f"{self.vocabulary.forms} has no form for [{kinds.replace(' ', ', ')}]; it has {known}."
        )

    def build(
        self,
        document: Document,
        supervise: str | int = "last",
        *,
        unconditional: bool = False,
        negative: str | None = None,
        wording: int = 0,
    ) -> TokenSequence:
        """A complete document as ids. `supervise` "last" or 1: loss as the form has it; "all": on every id.
        `unconditional`: the condition in the vocabulary's null form, a negative prompt being empty unless it
        is given. wording: which of the format's instructions. Errors as `DocumentCodec.build`, and where
        several segments, but not all, are to be supervised."""
        if supervise not in ("last", "all", 1):
            raise ValueError(
                f"{self.vocabulary.forms} supervises the last segment or all, not {supervise!r}."
            )
        form = self.form(document)
        if unconditional or (len(document) == 1 and document[0].modality != "text"):
            writer = self._null_prompt(document, "" if negative is None else negative)
        else:
            writer = self._conditional_prompt(document, wording)
        start, last = len(writer.rows), document[-1]
        if isinstance(last, Text):
            self._write_segment(writer, last, loss=True)
        else:
            self._write_picture(writer, last)
            start += len(self._of(last.modality)[0])
        if form.close:
            writer.special(self.vocabulary.special["eos"], loss=True)
        sequence = writer.sequence()
        loss = torch.arange(len(sequence)) >= start
        if form.loss == "all" or supervise == "all":
            loss[:] = True
        elif form.loss == "codes":
            loss &= self.vocabulary.modality_of(sequence.ids) > 0
        return TokenSequence(sequence.ids, sequence.modality, sequence.positions, loss)

    def _prompt(self, document: Document, *, null: bool, negative: str | None) -> TokenSequence:
        first = self._first_blank(document)
        if first < len(document) - 1:
            raise ValueError(
                f"{self.vocabulary.forms} writes one segment at a time; leave only the last one blank."
            )
        if null:
            writer = self._null_prompt(document, self.format.negative if negative is None else negative)
        elif first == 0 and isinstance(document[0], Image):
            writer = self._null_prompt(document, "")
        else:
            writer = self._conditional_prompt(document, 0)
        if isinstance(document[first], Image):
            for token in self._of(document[first].modality)[0]:
                writer.special(token, loss=False)
        return writer.sequence()

    def _begun(self) -> Writer:
        writer = Writer(self)
        if self.format.bos:
            writer.special(self.vocabulary.special["bos"], loss=False)
        return writer

    def _conditional_prompt(self, document: Document, wording: int) -> Writer:
        """All that stands before the last segment. What lies between two pictures or special tokens is
        encoded as one text, as the published code does."""
        writer, form, text = self._begun(), self.form(document), ""
        last = document[-1]
        for constant, name in _parts(form.before + (form.lead if isinstance(last, Text) else "")):
            text += constant
            if name == "instruction":
                text += self.format.instructions[wording]
            elif name.isdecimal() and isinstance(given := document[int(name)], Text):
                text += self._checked(given.text)
            elif name:
                self._write_text(writer, text)
                text = ""
                if name.isdecimal():
                    self._write_picture(writer, document[int(name)], condition=True)
                else:
                    writer.special(self.vocabulary.special[name], loss=False)
        self._write_text(writer, text)
        return writer

    def _null_prompt(self, document: Document, negative: str) -> Writer:
        form = self.vocabulary.null
        if form == "negative":
            return self._conditional_prompt([Text(negative), document[-1]], 0)
        writer = self._begun()
        if form == "special":
            writer.special(self.vocabulary.special["uncond"], loss=False)
        elif form == "padding" and len(document) > 1:
            condition = self._conditional_prompt(document, 0)
            for _ in range(len(condition.rows) - len(writer.rows)):
                writer.special(self.vocabulary.special["pad"], loss=False)
        return writer

    def _checked(self, text: str | None) -> str:
        """A text of the user's. Raises ValueError for one that would be read as a special token or a code."""
        if text is None:
            raise ValueError("a blank text cannot be written; use prompt() for a document to be completed.")
        for token in self.text_tokenizer.encode(text, add_special_tokens=False):
            if not bool(self._text_ids[token]):
                raise ValueError(
                    f"the text {text[:40]!r} holds {self.vocabulary.name(token)}, which is no text; "
                    "take it out."
                )
        return text

    def _write_text(self, writer: Writer, text: str) -> None:
        if text:
            writer.text(text, loss=False)

    def _write_segment(self, writer: Writer, segment: Segment, *, loss: bool) -> None:
        if isinstance(segment, Text):
            self._checked(segment.text)
        super()._write_segment(writer, segment, loss=loss)

    def _write_picture(self, writer: Writer, segment: Segment, condition: bool = False) -> None:
        if condition and "placeholder" in self.vocabulary.special:
            opening, slots, closing = self._of(segment.modality)
            seen = [self.vocabulary.special["placeholder"]] * len(slots)
            for token in (*opening, *seen, *closing):
                writer.special(token, loss=False)
        else:
            self._write_segment(writer, segment, loss=True)

    # Reading

    def parse(self, ids: Tensor) -> list[Segment]:
        """The ids of a whole document → the document, without what its form adds: the inverse of `build`.
        Ids that no form writes are read as they stand, see `segments`."""
        string, pictures = self._as_string(ids.tolist())
        # The forms that add most first: what they write fits those that add nothing as well.
        for kinds, form in sorted(self.format.forms.items(), key=lambda item: -len(item[1].before)):
            for document, wording in self._candidates(string, pictures, kinds.split(), form):
                if self._writes(document, wording, ids):
                    return document
        return self.segments(ids)

    def _writes(self, document: list[Segment], wording: int, ids: Tensor) -> bool:
        """Whether `document` is written as `ids`, padding behind them aside."""
        try:
            written = self.build(document, wording=wording).ids
        except ValueError:
            return False
        padding = ids[len(written) :] == self.vocabulary.special["pad"]
        return torch.equal(written, ids[: len(written)]) and bool(padding.all())

    def _candidates(
        self, string: str, pictures: list[Image], kinds: list[str], form: Form
    ) -> Iterator[tuple[list[Segment], int]]:
        """Documents of a form that a sequence may be, and the number of their instruction. Spaces beside a
        text may be the tokenizer's or the user's: what is meant shows when the document is written again."""
        for loose in (False, True):
            match = re.fullmatch(self._pattern(kinds, form, loose), string, re.DOTALL)
            if match is None:
                continue
            found = match.groupdict()
            wordings = range(self.wordings)
            wording = next((i for i in wordings if found.get(f"wording{i}") is not None), 0)
            for stripped in (False, True):
                document: list[Segment] = []
                for number, kind in enumerate(kinds):
                    name = f"segment{number}"
                    if kind == "text":
                        document.append(
                            Text(self._canonical(found[name].strip() if stripped else found[name]))
                        )
                    else:
                        document.append(pictures[string.count(_PICTURE, 0, match.start(name))])
                yield document, wording

    def _canonical(self, text: str) -> str:
        """A text as the tokenizer gives it back alone."""
        return self._decoded(self.text_tokenizer.encode(text, add_special_tokens=False))

    def _pattern(self, kinds: list[str], form: Form, loose: bool) -> str:
        """The regular expression of a form's sequences. loose: any spaces, or none, for those of the
        template, as tokenizers of words need it."""
        last = len(kinds) - 1
        lead = form.lead if kinds[last] == "text" else ""
        template = f"{{bos}}{form.before}{lead}{{{last}}}{{eos}}"
        absent = {"bos": not self.format.bos, "eos": not form.close}
        pattern = ""
        for constant, name in _parts(template):
            pattern += _literal(constant, loose)
            if name == "instruction":
                options = enumerate(self.format.instructions)
                groups = [f"(?P<wording{i}>{_literal(text, loose)})" for i, text in options]
                pattern += f"(?:{'|'.join(groups)})"
            elif name.isdecimal():
                pattern += f"(?P<segment{name}>{'.+?' if kinds[int(name)] == 'text' else _PICTURE})"
            elif name and not absent.get(name):
                pattern += self._stand_in(self.vocabulary.special[name])
        return pattern

    def _stand_in(self, token: int) -> str:
        """The character that a special token is in a sequence as a string."""
        return chr(_SPECIAL + sorted(self.vocabulary.special.values()).index(token))

    def _as_string(self, ids: list[int]) -> tuple[str, list[Image]]:
        """A sequence with one character for each picture and special token, and the pictures."""
        special = self.vocabulary.special
        while ids and ids[-1] == special["pad"] != special["eos"]:
            ids = ids[:-1]
        begins = {self.vocabulary.begin(modality): modality for modality in self.layouts}
        string, run, pictures, index = "", list[int](), list[Image](), 0
        while index < len(ids):
            token = ids[index]
            if bool(self._text_ids[token]):
                run.append(token)
                index += 1
                continue
            string, run = string + self._decoded(run), []
            if token in begins and self._is_picture(ids, index, begins[token]):
                picture, index = self._read_picture(ids, index, begins[token])
                pictures.append(picture)
                string += _PICTURE
            else:
                string += self._stand_in(token) if token in special.values() else "\ufffd"
                index += 1
        return string + self._decoded(run), pictures

    def _decoded(self, run: list[int]) -> str:
        return self.text_tokenizer.decode(run).translate(_KEPT_OUT) if run else ""

    def _is_picture(self, ids: list[int], index: int, modality: str) -> bool:
        """Whether codes follow what opens a picture; a template may name the opening alone."""
        start = index + len(self._of(modality)[0])
        follows = (*self.vocabulary.block(modality).tolist(), self.vocabulary.special.get("placeholder"))
        return start < len(ids) and ids[start] in follows

    def _read_picture(self, ids: list[int], index: int, modality: str) -> tuple[Image, int]:
        opening, slots, closing = self._of(modality)
        start = index + len(opening)
        if start < len(ids) and ids[start] == self.vocabulary.special.get("placeholder"):
            return Image(modality=modality), start + len(slots) + len(closing)
        return self._parse_picture(torch.tensor(ids)[:, None], index, modality)


def _parts(template: str) -> Iterator[tuple[str, str]]:
    """A template as constants and the fields behind them, the last one without ("")."""
    pieces = _FIELD.split(template)
    yield from zip(pieces[::2], [*pieces[1::2], ""])


def _literal(text: str, loose: bool) -> str:
    if not loose:
        return re.escape(text)
    words = [re.escape(word) for word in re.findall(r"<[^<>\s]*>|[^<\s]+|<", text)]
    return r"\s*".join(["", *words, ""]) if words or text else ""


def emu3_grid(width: int, height: int, area: int = 720 * 720) -> tuple[int, int]:
    """The (h, w) of the codes that Emu3 draws for a ratio of sides such as 16:9, one for each 8x8 pixels of a
    picture of about `area` pixels."""
    scale = (area / (width * height)) ** 0.5 / 8
    return round(height * scale), round(width * scale)


# MIO's speech: SpeechTokenizer's streams (content, then timbre) one after the other, each in its own range


def join_streams(codes: Tensor, size: int = 1024) -> Tensor:
    """Codes long ``[b, n, k]`` of k streams → one line long ``[b, k·n, 1]``: all of the first stream, then
    all of the second, each shifted by `size` more than the one before it."""
    streams = codes + size * torch.arange(codes.shape[-1])
    return rearrange(streams, "b n k -> b (k n) 1")


def split_streams(line: Tensor, size: int = 1024) -> Tensor:
    """The inverse of `join_streams` for one line long ``[m]`` → ``[1, n, k]``. Raises ValueError, as the
    published detokenizer does, unless the streams have equal lengths and stand in order."""
    count = int(line.max()) // size + 1 if len(line) else 0
    if count == 0 or len(line) % count:
        raise ValueError(f"{len(line)} codes are not {count} streams of equal length.")
    streams = rearrange(line, "(k n) -> 1 n k", k=count)
    if not bool((streams // size == torch.arange(count)).all()):
        raise ValueError("the streams of this speech do not stand in order: content, then each timbre.")
    return streams % size
