"""One id space for text and every modality's codes: nothing else in Lexel adds or subtracts an offset.

The five published forms are one class with different blocks:

1. one offset (Liquid, SEED-LLaMA, LaVIT): a block right after the text ids;
2. named entries inside a BPE (Chameleon's ``IMGIMG…``, MIO's ``<img0>``): a block with a table of ids;
3. separate embedding and head (Janus): a block whose modality is listed in `separate`, so that a model
   keeps its own table for it (`tables` tells which);
4. several codes per position (FQGAN): one block per codebook;
5. positional grammar (Emu3): the special tokens ``img``, ``eol`` and ``eof`` exist, and the grammar in
   `lexel.document` places them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lexel.tokenizers.layout import EMPTY, CodeLayout

NullForm = Literal["special", "padding", "negative", "prefix"]
REQUIRED = ("pad", "bos", "eos")


@dataclass(frozen=True)
class CodeBlock:
    """The ids of one codebook: ``offset + code``, or ``table[code]`` for named entries inside a BPE.

    name_format turns a code into its token text, e.g. ``"<img_{:05d}>"``."""

    modality: str
    codebook: int
    size: int
    offset: int | None = None
    table: tuple[int, ...] | None = None
    name_format: str = ""

    def __post_init__(self) -> None:
        if (self.offset is None) == (self.table is None):
            raise ValueError(
                f"block {self.modality}/{self.codebook} needs either an offset or a table of ids."
            )
        if self.table is not None and (len(self.table) != self.size or len(set(self.table)) != self.size):
            raise ValueError(
                f"block {self.modality}/{self.codebook} needs {self.size} different ids in its table."
            )
        if not self.name_format:
            object.__setattr__(self, "name_format", f"<{self.modality}_{self.codebook}_{{}}>")

    @property
    def ids(self) -> Tensor:
        """Long ``[size]``: the id of each code."""
        if self.table is not None:
            return torch.tensor(self.table)
        assert self.offset is not None
        return torch.arange(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class Vocabulary:
    """Every id range of a model.

    text_size: ids ``[0, text_size)`` belong to the text tokenizer (special tokens and table blocks may lie
    inside). special: role → id; roles: pad, bos, eos, uncond, and per modality boi/eoi (image) or
    ``begin_<modality>``/``end_<modality>``, plus img, eol, eof for positional grammars.
    null: how guidance's unconditional prompt is written: the ``uncond`` token in place of the condition,
    pad ids in its place, a negative prompt, or only the prefix of the picture.
    forms: the published sequence forms that documents are written in (`lexel.prompts`); "" for Lexel's own.
    Raises ValueError when ids collide or a required role is missing.
    """

    text_size: int
    special: Mapping[str, int]
    blocks: tuple[CodeBlock, ...] = ()
    separate: tuple[str, ...] = ()
    null: NullForm = "special"
    text_name_format: str = field(default="<text_{}>")
    forms: str = ""

    def __post_init__(self) -> None:
        roles = REQUIRED + (("uncond",) if self.null == "special" else ())
        if missing := [role for role in roles if role not in self.special]:
            raise ValueError(f"the vocabulary lacks the special token(s) {', '.join(missing)}.")
        taken = torch.cat(
            [torch.tensor(sorted(set(self.special.values())))] + [block.ids for block in self.blocks]
        )
        if len(taken.unique()) != len(taken):
            raise ValueError("special tokens and code blocks overlap; every id may have one owner.")
        if len({(block.modality, block.codebook) for block in self.blocks}) != len(self.blocks):
            raise ValueError("two blocks claim the same codebook of the same modality.")

    @classmethod
    def build(
        cls,
        text_size: int,
        codebooks: Mapping[str, Sequence[int]],
        *,
        roles: Sequence[str] = (),
        separate: Sequence[str] = (),
        null: NullForm = "special",
    ) -> Vocabulary:
        """Lay out a new vocabulary: text, then pad/bos/eos/uncond and each modality's begin/end (and extra
        `roles` such as ``eol``), then one block per codebook, e.g. ``codebooks={"image": (4096, 4096)}``."""
        names = ["pad", "bos", "eos", "uncond"]
        for modality in codebooks:
            names += [_begin(modality), _end(modality)]
        special = {name: text_size + i for i, name in enumerate([*names, *roles])}
        offset, blocks = text_size + len(special), []
        for modality, sizes in codebooks.items():
            for codebook, size in enumerate(sizes):
                blocks.append(CodeBlock(modality, codebook, size, offset))
                offset += size
        return cls(text_size, special, tuple(blocks), tuple(separate), null)

    def with_roles(self, roles: Sequence[str]) -> Vocabulary:
        """This vocabulary with further special tokens behind all its ids (those that it has already stay), so
        that a trained model keeps what it knows and only gains rows."""
        missing = [role for role in roles if role not in self.special]
        added = {role: self.size + i for i, role in enumerate(missing)}
        return replace(self, special={**self.special, **added})

    @cached_property
    def size(self) -> int:
        """Number of ids (one past the largest)."""
        ends = [self.text_size, *(i + 1 for i in self.special.values())]
        return max(ends + [int(block.ids.max()) + 1 for block in self.blocks])

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """``("text", …)`` then every modality with codes, in block order; `modality_of` indexes this."""
        return ("text", *dict.fromkeys(block.modality for block in self.blocks))

    @cached_property
    def _blocks(self) -> dict[tuple[str, int], Tensor]:
        return {(block.modality, block.codebook): block.ids for block in self.blocks}

    @cached_property
    def _owner(self) -> tuple[Tensor, Tensor]:
        """Long ``[size]`` each: index of the block owning an id (-1: none), and the code it stands for."""
        owner = torch.full((self.size,), -1)
        code = torch.full((self.size,), EMPTY)
        for index, block in enumerate(self.blocks):
            owner[block.ids] = index
            code[block.ids] = torch.arange(block.size)
        return owner, code

    def begin(self, modality: str) -> int:
        """Id that opens a segment of `modality` (``boi`` for images)."""
        return self._role(_begin(modality))

    def end(self, modality: str) -> int:
        """Id that closes a segment of `modality` (``eoi`` for images)."""
        return self._role(_end(modality))

    def _role(self, role: str) -> int:
        if role not in self.special:
            raise ValueError(f"the vocabulary has no {role} token; it has {', '.join(self.special)}.")
        return self.special[role]

    def block(self, modality: str, codebook: int = 0) -> Tensor:
        """Long ``[K]``: ids of codes 0..K-1 of one codebook. Raises ValueError for an unknown one."""
        if (modality, codebook) not in self._blocks:
            known = ", ".join(f"{m}/{j}" for m, j in self._blocks)
            raise ValueError(f"no block for {modality}/{codebook}; the vocabulary has {known or 'none'}.")
        return self._blocks[modality, codebook]

    def codebook_sizes(self, modality: str) -> tuple[int, ...]:
        """Sizes of the codebooks of `modality`, in order."""
        return tuple(block.size for block in self.blocks if block.modality == modality)

    def check_layout(self, modality: str, layout: CodeLayout) -> None:
        """Raises ValueError unless `layout` has exactly this vocabulary's codebooks."""
        if self.codebook_sizes(modality) != tuple(layout.codebook_sizes):
            raise ValueError(
                f"the vocabulary holds {modality} codebooks {self.codebook_sizes(modality)}, "
                f"the tokenizer has {tuple(layout.codebook_sizes)}; use the one the model was trained with."
            )

    def to_ids(self, flat: Tensor, layout: CodeLayout, modality: str = "image") -> Tensor:
        """Flat codes ``[b, t, c]`` of `layout` → ids of the same shape; EMPTY becomes pad."""
        ids = torch.empty_like(flat)
        for columns, codebook in self._cells(flat.shape[1], layout):
            codes = flat[columns]
            ids[columns] = self.block(modality, codebook).to(flat.device)[codes.clamp(min=0)]
        return ids.masked_fill(flat == EMPTY, self.special["pad"])

    def to_codes(self, ids: Tensor, layout: CodeLayout, modality: str = "image") -> Tensor:
        """Ids ``[b, t, c]`` → flat codes, pad becomes EMPTY. Raises ValueError naming the first id that is
        not a code of the codebook expected at its place: nothing is ever clamped into range."""
        owner, code = (x.to(ids.device) for x in self._owner)
        flat = code[ids]
        for columns, codebook in self._cells(ids.shape[1], layout):
            index = next(
                i for i, b in enumerate(self.blocks) if (b.modality, b.codebook) == (modality, codebook)
            )
            wrong = (owner[ids[columns]] != index) & (ids[columns] != self.special["pad"])
            if bool(wrong.any()):
                name = self.name(int(ids[columns][wrong][0]))
                raise ValueError(f"{name} stands where a code of {modality}/{codebook} is expected.")
        return flat

    def _cells(self, steps: int, layout: CodeLayout) -> list[tuple[Any, int]]:
        """Index expressions into ``[b, t, c]`` and the codebook that each addresses."""
        if layout.pattern == "interleaved":
            return [((slice(None), slice(j, steps, layout.k)), j) for j in range(layout.k)]
        if layout.pattern == "sequential":
            each = steps // layout.k if layout.flexible else layout.positions
            return [((slice(None), slice(j * each, (j + 1) * each)), j) for j in range(layout.k)]
        return [((slice(None), slice(None), j), j) for j in range(layout.k)]

    def modality_of(self, ids: Tensor) -> Tensor:
        """Index into `modalities` of each id; special tokens count as text (0)."""
        owner, _ = self._owner
        table = torch.tensor([0, *(self.modalities.index(block.modality) for block in self.blocks)])
        return table.to(ids.device)[owner.to(ids.device)[ids] + 1]

    def mask(self, kind: str, codebook: int | None = None) -> Tensor:
        """Bool ``[size]``: the ids of "text", of "special", or of a modality (optionally one codebook)."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        special = torch.tensor(list(self.special.values()))
        if kind == "special":
            mask[special] = True
        elif kind == "text":
            mask[: self.text_size] = True
            mask[special] = False
            mask[self._owner[0] >= 0] = False
        else:
            books = range(len(self.codebook_sizes(kind))) if codebook is None else (codebook,)
            for j in books:
                mask[self.block(kind, j)] = True
        return mask

    def tables(self) -> list[tuple[str, int, int]]:
        """Embedding tables a model needs as (name, first id, size): one for everything joint, one more for
        each modality in `separate` (Janus). Separate blocks must be contiguous."""
        ranges = []
        for modality in self.separate:
            ids = torch.cat([block.ids for block in self.blocks if block.modality == modality])
            if int(ids.max() - ids.min()) + 1 != len(ids):
                raise ValueError(f"the ids of the separate modality {modality} are not contiguous.")
            ranges.append((modality, int(ids.min()), len(ids)))
        return [("joint", 0, self.size - sum(size for _, _, size in ranges)), *ranges]

    def name(self, token: int) -> str:
        """A readable, unique name of an id. Raises ValueError outside the vocabulary."""
        if not 0 <= token < self.size:
            raise ValueError(f"id {token} is outside the vocabulary of {self.size}.")
        for role, value in self.special.items():
            if value == token:
                return f"<{role}>"
        owner, code = (int(x[token]) for x in self._owner)
        if owner >= 0:
            return self.blocks[owner].name_format.format(code)
        return self.text_name_format.format(token)

    def id(self, name: str) -> int:
        """The inverse of `name`. Raises ValueError for a name nobody owns."""
        if name not in self._ids:
            raise ValueError(f"no token is named {name!r}.")
        return self._ids[name]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {self.name(token): token for token in range(self.size)}

    def to_json(self) -> str:
        """The vocabulary as JSON text; `from_json` restores an equal one."""
        return json.dumps({**asdict(self), "special": dict(self.special)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Restore what `to_json` wrote."""
        values = json.loads(text)
        blocks = tuple(
            CodeBlock(**{**block, "table": None if block["table"] is None else tuple(block["table"])})
            for block in values.pop("blocks")
        )
        return cls(**{**values, "blocks": blocks, "separate": tuple(values["separate"])})


def named_block(
    entries: Mapping[str, int], modality: str, codebook: int, size: int, name_format: str, first: int = 0
) -> CodeBlock:
    """A block whose ids are looked up by name in a text tokenizer's vocabulary (form 2), e.g.
    ``named_block(tokenizer.get_vocab(), "image", 0, 8192, "<img{}>")`` for MIO. first: number of code 0 in
    the names. Raises ValueError naming the first absent entry."""
    names = [name_format.format(first + code) for code in range(size)]
    if absent := [name for name in names if name not in entries]:
        raise ValueError(
            f"the text tokenizer has no entry {absent[0]!r} ({len(absent)} of {size} are absent)."
        )
    table = tuple(entries[name] for name in names)
    return CodeBlock(modality, codebook, size, table=table, name_format="" if first else name_format)


def _begin(modality: str) -> str:
    return "boi" if modality == "image" else f"begin_{modality}"


def _end(modality: str) -> str:
    return "eoi" if modality == "image" else f"end_{modality}"


# Ids read in the published repositories. Formats: the token text each publisher gives its codes.
PRESETS: dict[str, Vocabulary] = {
    # Junfeng5/Liquid_V1_7B: Gemma's 256000 ids, then 8192 codes; three <unused> tokens renamed.
    "liquid": Vocabulary(
        256000,
        {"pad": 0, "eos": 1, "bos": 2, "boi": 7, "eoi": 8, "uncond": 9},
        (CodeBlock("image", 0, 8192, 256000, name_format="<code_{}>"),),
        null="special",
        forms="liquid",
    ),
    # BAAI/Emu3-Gen: Qwen BPE and extras, then 32768 codes; a negative prompt is the unconditional form.
    "emu3": Vocabulary(
        151854,
        {
            "pad": 151643,
            "eol": 151846,
            "eof": 151847,
            "bos": 151849,
            "eos": 151850,
            "img": 151851,
            "boi": 151852,
            "eoi": 151853,
        },
        (CodeBlock("image", 0, 32768, 151854, name_format="<|visual token {:06d}|>"),),
        null="negative",
        forms="emu3",
    ),
    # LaVIT on Llama: picture start and end, then 16384 codes; Llama has no pad, its unk (0) serves.
    "lavit": Vocabulary(
        32000,
        {"pad": 0, "bos": 1, "eos": 2, "boi": 32000, "eoi": 32001},
        (CodeBlock("image", 0, 16384, 32002, name_format="<lavit_{}>"),),
        null="negative",
        forms="lavit",
    ),
}


def preset(name: str) -> Vocabulary:
    """The vocabulary of a published model whose ids are public. Raises ValueError listing the known names."""
    if name not in PRESETS:
        raise ValueError(
            f"no vocabulary preset {name!r}; known: {', '.join(PRESETS)}. The vocabularies of "
            f"{', '.join(PUBLISHERS)} are made from their text tokenizers: see `published_vocabulary`."
        )
    return PRESETS[name]


@dataclass(frozen=True)
class Publisher:
    """Where a published model's ids are found in its text tokenizer.

    special: role → the tokenizer's text of it (alternatives: the first that the tokenizer has).
    codes: modality → number of codes, and the texts of their entries as a format; None: the codes stand
    behind all entries. behind: roles that stand between the two. separate, null: see `Vocabulary`."""

    special: Mapping[str, tuple[str, ...]]
    codes: Mapping[str, tuple[int, str | None]]
    null: NullForm
    behind: tuple[str, ...] = ()
    separate: tuple[str, ...] = ()


_LLAMA = {"pad": ("<unk>",), "bos": ("<s>",), "eos": ("</s>",)}
PUBLISHERS: dict[str, Publisher] = {
    "liquid": Publisher(
        {
            "pad": ("<pad>",),
            "eos": ("<eos>",),
            "bos": ("<bos>",),
            "boi": ("<boi>",),
            "eoi": ("<eoi>",),
            "uncond": ("<unconditional>",),
        },
        {"image": (8192, None)},
        "special",
    ),
    "emu3": Publisher(
        {
            "pad": ("<|endoftext|>",),
            "eol": ("<|extra_200|>",),
            "eof": ("<|extra_201|>",),
            "bos": ("<|extra_203|>",),
            "eos": ("<|extra_204|>",),
            "img": ("<|image token|>",),
            "boi": ("<|image start|>",),
            "eoi": ("<|image end|>",),
        },
        {"image": (32768, "<|visual token {:06d}|>")},
        "negative",
    ),
    # Codes are the entries IMGIMG…, see `_chameleon_block`.
    "chameleon": Publisher(
        {
            "pad": ("<pad>",),
            "bos": ("<s>",),
            "eos": ("</s>",),
            "boi": ("<racm3:break>",),
            "eoi": ("<eoss>",),
            "eot": ("<reserved08706>",),
        },
        {"image": (8192, "IMGIMG")},
        "prefix",
    ),
    "seed_llama": Publisher(
        {**_LLAMA, "boi": ("<img>",), "eoi": ("</img>",)}, {"image": (8192, "<img_{:05d}>")}, "prefix"
    ),
    "lavit": Publisher(_LLAMA, {"image": (16384, None)}, "negative", behind=("boi", "eoi")),
    # The instruct model ends a turn, and so what it writes, with <|im_end|>.
    "mio": Publisher(
        {
            "pad": ("<unk>",),
            "bos": ("<|startoftext|>", "<s>"),
            "eos": ("<|im_end|>",),
            "boi": ("<image>",),
            "eoi": ("</image>",),
            "begin_speech": ("<spch>",),
            "end_speech": ("</spch>",),
        },
        {"image": (8192, "<img{}>"), "speech": (4096, "<spch{}>")},
        "prefix",
    ),
    "janus": Publisher(
        {
            "pad": ("<｜▁pad▁｜>",),
            "bos": ("<｜begin▁of▁sentence｜>",),
            "eos": ("<｜end▁of▁sentence｜>",),
            "boi": ("<begin_of_image>",),
            "eoi": ("<end_of_image>",),
            "placeholder": ("<image_placeholder>",),
        },
        {"image": (16384, None)},
        "padding",
        separate=("image",),
    ),
}


def published_vocabulary(
    name: str, entries: Mapping[str, int], sizes: Mapping[str, int | Sequence[int]] | None = None
) -> Vocabulary:
    """The vocabulary of a published model from its text tokenizer.

    name: liquid, emu3, chameleon, seed_llama, lavit, mio or janus. entries: token text → id, a transformers
    tokenizer's ``get_vocab()``. sizes: modality → number of codes where it is not the published one; of
    named entries also several, one codebook's names behind the other's (MIO's speech as four of 1024).
    Raises ValueError for another name, for entries that the tokenizer lacks, and for several codebooks of
    codes without names.
    """
    if name not in PUBLISHERS:
        raise ValueError(f"no published vocabulary {name!r}; known: {', '.join(PUBLISHERS)}.")
    publisher, text_size = PUBLISHERS[name], len(entries)
    special = {}
    for role, texts in publisher.special.items():
        found = [entries[text] for text in texts if text in entries]
        if not found:
            raise ValueError(f"the text tokenizer has no {' or '.join(texts)}, which is {name}'s {role}.")
        special[role] = found[0]
    special |= {role: text_size + i for i, role in enumerate(publisher.behind)}
    offset, blocks = text_size + len(publisher.behind), []
    for modality, (published, text) in publisher.codes.items():
        given = (sizes or {}).get(modality, published)
        books = (given,) if isinstance(given, int) else tuple(given)
        size, named = books[0], text not in (None, "IMGIMG")
        if len(books) > 1 and not named:
            raise ValueError(f"{name} has one codebook of {modality}, not {len(books)}.")
        if text is None:
            blocks.append(CodeBlock(modality, 0, size, offset))
            offset += size
        elif text == "IMGIMG":
            blocks.append(_chameleon_block(entries, size))
        else:
            blocks += [
                named_block(entries, modality, j, size, text, sum(books[:j])) for j, size in enumerate(books)
            ]
    return Vocabulary(text_size, special, tuple(blocks), publisher.separate, publisher.null, forms=name)


def _chameleon_block(entries: Mapping[str, int], size: int) -> CodeBlock:
    """Chameleon writes code 1024 as ``IMGIMGBACEZ``: its digits as letters (A is 0), then one more letter.
    Raises ValueError naming the first absent code."""
    table = {}
    for text, token in entries.items():
        digits = text.removeprefix("IMGIMG")[:-1].translate(str.maketrans("ABCDEFGHIJ", "0123456789"))
        if text.startswith("IMGIMG") and digits.isdecimal():
            table[int(digits)] = token
    if absent := [code for code in range(size) if code not in table]:
        raise ValueError(
            f"the text tokenizer has no entry IMGIMG… for code {absent[0]} ({len(absent)} of {size} are "
            "absent)."
        )
    return CodeBlock("image", 0, size, table=tuple(table[code] for code in range(size)))
