"""Documents: interleaved segments of text and pictures, as ids and back.

A document is a list of segments; everything a user does is document in, document out. `DocumentCodec`
writes a document as one sequence of ids and parses it back (``parse(build(d)) == d``); `Grammar` says which
id may come next, so that whatever is sampled always parses and always decodes: nothing is ever clamped.

A sequence is ``<bos> text <boi> codes <eoi> text … <eos>``. With the special tokens ``img``, ``eol`` and
``eof`` in the vocabulary and `row_end` in the layout a picture is written as Emu3 does:
``<boi> "H*W" <img> row <eol> row <eol> … <eof> <eoi>``.

l positions · c columns (codes per position) · v vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lexel.tokenizers.layout import EMPTY, CodeLayout
from lexel.types import Codes, TokenBatch
from lexel.vocabulary import Vocabulary


@dataclass(frozen=True)
class Text:
    """A text segment; `blank()` marks the place of text to be written."""

    text: str | None

    @classmethod
    def blank(cls) -> Text:
        """The place of a text that the model shall write."""
        return cls(None)

    @property
    def modality(self) -> str:
        """Always "text"."""
        return "text"

    @property
    def is_blank(self) -> bool:
        """Whether this is a place to fill."""
        return self.text is None


@dataclass(frozen=True, eq=False)
class Image:
    """A picture (or any other coded modality): `codes` for a batch of one, and/or `pixels` ``[3, h, w]`` in
    [-1, 1] that a tokenizer has yet to encode. Neither: a place to fill, see `blank`."""

    codes: Codes | None = None
    pixels: Tensor | None = None
    modality: str = "image"

    @classmethod
    def blank(cls, modality: str = "image") -> Image:
        """The place of a picture that the model shall draw."""
        return cls(modality=modality)

    @property
    def is_blank(self) -> bool:
        """Whether this is a place to fill."""
        return self.codes is None and self.pixels is None


Segment = Text | Image
Document = Sequence[Segment]


class TextTokenizer(Protocol):
    """What Lexel needs of a text tokenizer; every transformers tokenizer has it."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Text → ids."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """Ids → text."""
        ...


@dataclass(frozen=True)
class TokenSequence:
    """One document as numbers: ids long ``[l]`` (or ``[l, c]``), modality long ``[l]``, positions long
    ``[l, 3]`` and loss_mask bool ``[l]``, with the meanings of `TokenBatch`. embeds / embed_index: float
    ``[m, d]`` continuous inputs and long ``[m]``, the positions they replace."""

    ids: Tensor
    modality: Tensor
    positions: Tensor
    loss_mask: Tensor
    embeds: Tensor | None = None
    embed_index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def first(self) -> Tensor:
        """Long ``[l]``: the ids of column 0."""
        return self.ids if self.ids.ndim == 1 else self.ids[:, 0]


@dataclass(frozen=True)
class Slot:
    """One place of a picture's script: a fixed id (`fixed`), or a code step (`step`)."""

    fixed: int | None
    step: int | None
    row: int
    column: int


class DocumentCodec:
    """Writes documents as id sequences with one vocabulary, one text tokenizer and a layout per modality.

    wordings: in how many ways a document may be written; added: most tokens that the writing adds to its
    texts; square: the colour of the square that pictures of other proportions are laid on before they are
    read (None: they are cropped). The three are those of published models (`lexel.prompts`).
    Raises ValueError when a layout's codebooks are not the vocabulary's, or layouts differ in columns.
    """

    wordings: int = 1
    added: int = 0
    square: tuple[int, int, int] | None = None

    def __init__(
        self, vocabulary: Vocabulary, text_tokenizer: TextTokenizer, layouts: Mapping[str, CodeLayout]
    ):
        for modality, layout in layouts.items():
            vocabulary.check_layout(modality, layout)
        widths = {layout.columns for layout in layouts.values()} or {1}
        if len(widths) > 1:
            raise ValueError(
                f"all modalities must have equally many codes per position, got {sorted(widths)}."
            )
        self.vocabulary, self.text_tokenizer, self.layouts = vocabulary, text_tokenizer, dict(layouts)
        self.columns = widths.pop()
        self.scripts = {modality: self._script(modality) for modality in layouts}
        self._text_ids = vocabulary.mask("text")

    def _script(self, modality: str) -> tuple[tuple[int, ...], tuple[Slot, ...], tuple[int, ...]]:
        """(opening ids, slots of codes and end-of-row tokens, closing ids) of one picture."""
        special, layout = self.vocabulary.special, self.layouts[modality]
        opening = [self.vocabulary.begin(modality)]
        if "img" in special and layout.grid is not None:
            header = f"{layout.grid[0]}*{layout.grid[1]}"
            opening += [*self.text_tokenizer.encode(header, add_special_tokens=False), special["img"]]
        slots = []
        per_row = layout.steps // layout.grid[0] if layout.row_end and layout.grid is not None else 0
        for step in range(layout.steps):
            row, column = layout.coordinates(step)
            slots.append(Slot(None, step, row + 1, column + 1))
            if per_row and (step + 1) % per_row == 0:
                slots.append(Slot(special["eol"], None, row + 1, column + 2))
        closing = ([special["eof"]] if layout.row_end and "eof" in special else []) + [
            self.vocabulary.end(modality)
        ]
        return tuple(opening), tuple(slots), tuple(closing)

    def build(
        self,
        document: Document,
        supervise: str | int = "last",
        *,
        unconditional: bool = False,
        negative: str | None = None,
        wording: int = 0,
    ) -> TokenSequence:
        """A complete document as ids. `supervise`: loss on the "last" segment and what closes it, on so many
        last segments, or on "all" ids after ``<bos>``. `unconditional` writes every segment but the last in
        the vocabulary's null form; wording: which of the `wordings`.
        Raises ValueError on blanks, missing codes or unknown modalities."""
        writer = Writer(self)
        writer.special(self.vocabulary.special["bos"], loss=False)
        if unconditional:
            self._write_null(writer, document[:-1], negative)
        for number, segment in enumerate(document):
            last = number == len(document) - 1
            if unconditional and not last:
                continue
            counted = isinstance(supervise, int) and number >= len(document) - supervise
            self._write_segment(writer, segment, loss=last or counted or supervise == "all")
        writer.special(self.vocabulary.special["eos"], loss=True)
        return writer.sequence()

    def prompt(self, document: Document) -> TokenSequence:
        """Ids up to where generation starts: all segments before the first blank one, and what opens it
        (``<boi>`` for a picture). Raises ValueError when nothing is blank."""
        return self._prompt(document, null=False, negative=None)

    def unconditional(self, document: Document, *, negative: str | None = None) -> TokenSequence:
        """The prompt of guidance's unconditional row, in the vocabulary's null form."""
        return self._prompt(document, null=True, negative=negative)

    def plan(self, document: Document) -> tuple[str, ...]:
        """Modalities to generate: those of the first blank segment and all after it (which must be blank)."""
        first = self._first_blank(document)
        if any(not segment.is_blank for segment in document[first:]):
            raise ValueError(
                "every segment after the first blank one must be blank: generation runs to the right."
            )
        return tuple(segment.modality for segment in document[first:])

    def _first_blank(self, document: Document) -> int:
        for number, segment in enumerate(document):
            if segment.is_blank:
                return number
        raise ValueError("the document has no blank segment: append Image.blank() or Text.blank().")

    def _prompt(self, document: Document, *, null: bool, negative: str | None) -> TokenSequence:
        first = self._first_blank(document)
        writer = Writer(self)
        writer.special(self.vocabulary.special["bos"], loss=False)
        if null:
            self._write_null(writer, document[:first], negative)
        else:
            for segment in document[:first]:
                self._write_segment(writer, segment, loss=False)
        if isinstance(document[first], Image):
            for token in self._of(document[first].modality)[0]:
                writer.special(token, loss=False)
        return writer.sequence()

    def _write_null(self, writer: Writer, condition: Document, negative: str | None) -> None:
        form, special = self.vocabulary.null, self.vocabulary.special
        if form == "special":
            writer.special(special["uncond"], loss=False)
        elif form == "negative":
            writer.text(negative or "", loss=False)
        elif form == "padding":
            replaced = Writer(self)
            for segment in condition:
                self._write_segment(replaced, segment, loss=False)
            for _ in range(len(replaced.rows)):
                writer.special(special["pad"], loss=False)

    def _write_segment(self, writer: Writer, segment: Segment, *, loss: bool) -> None:
        if isinstance(segment, Text):
            if segment.text is None:
                raise ValueError(
                    "a blank text cannot be written; use prompt() for a document to be completed."
                )
            writer.text(segment.text, loss=loss)
            return
        opening, slots, closing = self._of(segment.modality)
        if segment.codes is None:
            raise ValueError(
                "a picture without codes cannot be written; encode its pixels with the tokenizer first."
            )
        layout = self.layouts[segment.modality]
        flat = layout.flatten(segment.codes)
        if len(flat) != 1:
            raise ValueError(f"an Image holds the codes of one picture, got a batch of {len(flat)}.")
        ids = self.vocabulary.to_ids(flat, layout, segment.modality)[0].tolist()
        written = (flat[0] != EMPTY).any(dim=1).tolist()
        length = layout.positions if segment.codes.lengths is None else int(segment.codes.lengths[0])
        used = layout.steps_for(length) if layout.flexible else layout.steps
        for number, token in enumerate(opening):
            # Only <boi> is a decision of the model; what else opens a picture follows from its size.
            writer.special(token, loss=loss and number == 0 and writer.supervise_opening)
        modality = self.vocabulary.modalities.index(segment.modality)
        for slot in slots:
            if slot.step is None:
                writer.append([slot.fixed or 0], modality, slot.row, slot.column, loss)
            elif written[slot.step]:
                # What ends a stream stands where its next code would have stood.
                turn = layout.streams and slot.step == layout.positions and length < layout.positions
                at = slots[length] if turn else slot
                writer.append(ids[slot.step], modality, at.row, at.column, loss)
        # A flexible picture's end, too; behind streams it is certain.
        ends = layout.flexible and not layout.streams and used < len(slots)
        early = slots[used] if ends else Slot(None, None, 0, 0)
        for token in closing:
            writer.append([token], modality, early.row, early.column, loss)

    def _of(self, modality: str) -> tuple[tuple[int, ...], tuple[Slot, ...], tuple[int, ...]]:
        if modality not in self.scripts:
            raise ValueError(
                f"the model has no modality {modality!r}; it has text, {', '.join(self.scripts)}."
            )
        return self.scripts[modality]

    def parse(self, ids: Tensor) -> list[Segment]:
        """The ids of a whole document → the document, see `segments`."""
        return self.segments(ids)

    def segments(self, ids: Tensor) -> list[Segment]:
        """Ids ``[l]`` or ``[l, c]`` of any part of a document → its segments. Ids after the first ``<eos>``
        and pads are ignored, a picture cut off at the end is an error. Raises ValueError on ids that no
        document produces."""
        rows = ids[:, None] if ids.ndim == 1 else ids
        special = self.vocabulary.special
        begins = {self.vocabulary.begin(modality): modality for modality in self.layouts}
        document: list[Segment] = []
        text: list[int] = []
        index = 0
        while index < len(rows):
            token = int(rows[index, 0])
            if token == special["eos"]:
                break
            if token in begins:
                document += self._flush(text)
                picture, index = self._parse_picture(rows, index, begins[token])
                document.append(picture)
                continue
            if bool(self._text_ids[token]):
                text.append(token)
            elif token not in (special["bos"], special["pad"], special.get("uncond")):
                raise ValueError(f"{self.vocabulary.name(token)} cannot stand in a text (position {index}).")
            index += 1
        return document + self._flush(text)

    def _flush(self, text: list[int]) -> list[Segment]:
        segments: list[Segment] = [Text(self.text_tokenizer.decode(text))] if text else []
        text.clear()
        return segments

    def _parse_picture(self, rows: Tensor, index: int, modality: str) -> tuple[Image, int]:
        opening, slots, closing = self._of(modality)
        layout = self.layouts[modality]
        index += len(opening)
        codes: list[Tensor] = []
        for slot in slots:
            if index < len(rows) and layout.flexible and int(rows[index, 0]) == closing[0]:
                break
            if index >= len(rows):
                if layout.streams and layout.flexible and codes:
                    break  # the length of the first stream told the end
                raise ValueError(f"the {modality} ends after {len(codes)} of {layout.steps} codes.")
            if slot.step is not None:
                codes.append(rows[index])
            elif int(rows[index, 0]) != slot.fixed:
                raise ValueError(
                    f"{self.vocabulary.name(int(rows[index, 0]))} stands in place of an end of row."
                )
            index += 1
        flat = self.vocabulary.to_codes(torch.stack(codes)[None], layout, modality)
        for token in closing:
            index += int(index < len(rows) and int(rows[index, 0]) == token)
        return Image(codes=layout.unflatten(flat), modality=modality), index

    def collate(self, sequences: Sequence[TokenSequence]) -> TokenBatch:
        """Right-padded batch. Plain causal attention is enough: no real token sees the padding after it."""
        if not sequences:
            raise ValueError("cannot collate an empty list of sequences.")

        def pad(tensors: list[Tensor], value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        given = [
            (s.embeds, torch.stack([torch.full_like(s.embed_index, row), s.embed_index], dim=1))
            for row, s in enumerate(sequences)
            if s.embeds is not None and s.embed_index is not None
        ]
        return TokenBatch(
            ids=pad([s.ids for s in sequences], self.vocabulary.special["pad"]),
            modality=pad([s.modality for s in sequences], 0),
            positions=pad([s.positions for s in sequences], 0),
            loss_mask=pad([s.loss_mask for s in sequences], 0),
            embeds=torch.cat([embeds for embeds, _ in given]) if given else None,
            embed_index=torch.cat([index for _, index in given]) if given else None,
        )


class Writer:
    """Collects rows of (ids, modality, row, column, loss) and turns them into a `TokenSequence`."""

    def __init__(self, codec: DocumentCodec) -> None:
        self.codec = codec
        self.rows: list[tuple[list[int], int, int, int, bool]] = []

    @property
    def supervise_opening(self) -> bool:
        """`<boi>` after text is a decision worth learning; after an unconditional prefix it is not."""
        return len(self.rows) > 1

    def append(self, ids: list[int], modality: int, row: int, column: int, loss: bool) -> None:
        padding = [self.codec.vocabulary.special["pad"]] * (self.codec.columns - len(ids))
        self.rows.append((ids + padding, modality, row, column, loss))

    def special(self, token: int, *, loss: bool) -> None:
        self.append([token], 0, 0, 0, loss)

    def text(self, text: str, *, loss: bool) -> None:
        for token in self.codec.text_tokenizer.encode(text, add_special_tokens=False):
            self.append([token], 0, 0, 0, loss)

    def sequence(self) -> TokenSequence:
        ids, modality, rows, columns, loss = (list(x) for x in zip(*self.rows))
        index = range(len(ids))
        tensor = torch.tensor(ids)
        return TokenSequence(
            ids=tensor[:, 0] if self.codec.columns == 1 else tensor,
            modality=torch.tensor(modality),
            positions=torch.tensor([list(p) for p in zip(index, rows, columns)]),
            loss_mask=torch.tensor(loss),
        )


@dataclass(frozen=True)
class State:
    """Where a sequence being generated stands: which plan entry, which slot of its picture (or how many text
    tokens), and the index of the next token in the document. length: positions of a sound written in streams
    (`CodeLayout.streams`), once the second one tells that it is shorter than the layout."""

    segment: int
    slot: int
    index: int
    modality: str
    length: int | None = None


class Grammar:
    """Which ids may come next while the modalities of `plan` are generated after a prompt.

    Text may run to `text_limit` tokens and is closed by what comes after it (``<eos>``, or the opening of
    the next picture). A picture's codes come from exactly the codebook its layout expects at that step. The
    end of a final picture needs no token: generation is done with its last code (flexible pictures may also
    end with ``<eoi>``; where codebooks are written one after the other, the first code of the second one ends
    the first, and the others are as long). States are small, hashable and immutable: rolling back is keeping
    an old state.
    """

    def __init__(self, codec: DocumentCodec, plan: Sequence[str], *, text_limit: int = 256) -> None:
        if not plan:
            raise ValueError("the plan is empty; name at least one modality to generate.")
        for modality in plan:
            if modality != "text":
                codec._of(modality)
        self.codec, self.plan, self.text_limit = codec, tuple(plan), text_limit
        self._masks: dict[object, Tensor] = {}

    def start(self, prompt: TokenSequence) -> State:
        """The state after `prompt`, which ends where the first planned segment's content starts."""
        return State(0, 0, int(prompt.positions[-1, 0]) + 1, self.plan[0])

    def done(self, state: State) -> bool:
        """Whether the plan is fulfilled."""
        return state.segment >= len(self.plan)

    def modality(self, state: State) -> int:
        """Index in `Vocabulary.modalities` of the next token: picks its sampling settings."""
        if state.modality == "text" or state.slot < 0:  # what opens a picture counts as text
            return 0
        return self.codec.vocabulary.modalities.index(state.modality)

    def position(self, state: State) -> tuple[int, int, int]:
        """(index, row, column) of the next token, as in `TokenBatch.positions`."""
        slot = self._slot(state)
        return (state.index, slot.row, slot.column) if slot is not None else (state.index, 0, 0)

    def step(self, state: State) -> tuple[int, int] | None:
        """(number of the next code in its picture, codes of the picture); None where no code follows."""
        slot = self._slot(state)
        if slot is None or slot.step is None:
            return None
        return slot.step, self.codec.layouts[state.modality].steps

    def _opening(self, segment: int) -> tuple[int, ...]:
        if segment >= len(self.plan) or self.plan[segment] == "text":
            return ()
        return self.codec._of(self.plan[segment])[0]

    def _slot(self, state: State) -> Slot | None:
        if state.modality == "text":
            return None
        slots = self.codec._of(state.modality)[1]
        return slots[state.slot] if 0 <= state.slot < len(slots) else None

    def _may_end(self, state: State) -> bool:
        """Whether a flexible picture may be closed instead of receiving its next code."""
        slot, layout = self._slot(state), self.codec.layouts.get(state.modality)
        return bool(slot is not None and slot.step and layout is not None and layout.may_end(slot.step))

    def _may_turn(self, state: State) -> bool:
        """Whether the second stream of a flexible sound may begin instead of the next code of the first."""
        slot, layout = self._slot(state), self.codec.layouts.get(state.modality)
        if slot is None or slot.step is None or layout is None or not (layout.streams and layout.flexible):
            return False
        return 0 < slot.step < layout.positions

    def branches(self, state: State) -> bool:
        """Whether the state after the next token depends on which of the allowed ids it is."""
        return state.modality == "text" or self._may_end(state) or self._may_turn(state)

    def allowed(self, state: State) -> Tensor:
        """Bool ``[v]``: ids that may come next (for k columns: in column 0). Cached; do not modify.
        Raises ValueError when the state is done."""
        if self.done(state):
            raise ValueError("the plan is fulfilled; nothing may come next.")
        key = self._key(state)
        if key not in self._masks:
            self._masks[key] = self._mask(key)
        return self._masks[key]

    def _key(self, state: State) -> tuple:
        """What the mask depends on: equal keys, equal masks."""
        if state.modality == "text":
            opening = self._opening(state.segment + 1)
            end = opening[0] if opening else self.codec.vocabulary.special["eos"]
            return ("end", end) if state.slot >= self.text_limit else ("text", end)
        slot = self._slot(state)
        if slot is None:
            return ("fixed", self._pending(state))
        if slot.step is None:
            return ("fixed", slot.fixed)
        layout = self.codec.layouts[state.modality]
        closing = self.codec._of(state.modality)[2][0] if self._may_end(state) else None
        codebook = layout.allowed(slot.step)[0]
        return ("code", state.modality, codebook, closing, 1 if self._may_turn(state) else None)

    def _pending(self, state: State) -> int:
        """The certain id before (slot < 0) or after (slot past the end) a picture's slots."""
        if state.slot < 0:
            return self.codec._of(state.modality)[0][state.slot]
        slots = self.codec._of(state.modality)[1]
        return self.codec._of(state.modality)[2][state.slot - len(slots)]

    def _mask(self, key: tuple) -> Tensor:
        vocabulary = self.codec.vocabulary
        mask = torch.zeros(vocabulary.size, dtype=torch.bool)
        if key[0] in ("fixed", "end"):
            mask[key[1]] = True
        elif key[0] == "text":
            mask |= vocabulary.mask("text")
            mask[key[1]] = True
        elif key[2] is None:  # delay padding
            mask[vocabulary.special["pad"]] = True
        else:
            mask[vocabulary.block(key[1], key[2])] = True
            if key[3] is not None:
                mask[key[3]] = True
            if key[4] is not None:
                mask[vocabulary.block(key[1], key[4])] = True
        return mask

    def columns(self, state: State) -> tuple[int | None, ...]:
        """Codebook expected in each column of the next position; empty for text and special tokens."""
        slot = self._slot(state)
        if slot is None or slot.step is None:
            return ()
        return self.codec.layouts[state.modality].allowed(slot.step)

    def advance(self, state: State, token: int) -> State:
        """The state after `token` (column 0). Raises ValueError when it is not allowed."""
        if not bool(self.allowed(state)[token]):
            raise ValueError(
                f"{self.codec.vocabulary.name(token)} may not follow here (position {state.index})."
            )
        index = state.index + 1
        if state.modality == "text":
            if bool(self.codec._text_ids[token]):
                return State(state.segment, state.slot + 1, index, "text")
            return self._enter(state.segment + 1, index, skip=1)
        _, slots, closing = self.codec._of(state.modality)
        slot, length = state.slot + 1, state.length
        if self._may_end(state) and token == closing[0]:
            slot = len(slots) + 1
        elif self._slot(state) is not None and self.codec.layouts[state.modality].streams:
            slot, length = self._next_in_streams(state, token)
        last = state.segment == len(self.plan) - 1
        if slot >= len(slots) + len(closing) or (slot >= len(slots) and last):
            return self._enter(state.segment + 1, index, skip=0)
        return State(state.segment, slot, index, state.modality, length)

    def _next_in_streams(self, state: State, token: int) -> tuple[int, int | None]:
        """The slot after `token`, and the sound's length where it is known to be shorter than the layout."""
        layout, slot, length = self.codec.layouts[state.modality], state.slot, state.length
        second = ("second stream", state.modality)
        if second not in self._masks:
            self._masks[second] = self.codec.vocabulary.mask(state.modality, 1)
        if self._may_turn(state) and bool(self._masks[second][token]):
            slot, length = layout.positions, state.slot
        stream, place = divmod(slot, layout.positions)
        if length is not None and place + 1 == length:
            return (stream + 1) * layout.positions, length
        return slot + 1, length

    def _enter(self, segment: int, index: int, *, skip: int) -> State:
        """The start of plan entry `segment`; `skip` of its opening ids are already written."""
        if segment >= len(self.plan):
            return State(segment, 0, index, "text")
        opening = len(self._opening(segment))
        return State(segment, min(0, skip - opening) if opening else 0, index, self.plan[segment])

    def remaining(self, state: State) -> int:
        """How many more tokens may come at most."""
        total, segment, slot = 0, state.segment, state.slot
        while segment < len(self.plan):
            modality = self.plan[segment]
            opening = len(self._opening(segment)) if segment != state.segment else max(0, -slot)
            if modality == "text":
                # The closing token is the next picture's first opening id, or <eos>.
                total += self.text_limit - max(0, slot) + (0 if self._opening(segment + 1) else 1)
            else:
                _, slots, closing = self.codec._of(modality)
                last = segment == len(self.plan) - 1
                total += opening + len(slots) + (0 if last else len(closing)) - max(0, slot)
            segment, slot = segment + 1, 0
        return total
