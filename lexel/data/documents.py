"""Tokenized pictures and captions as training documents in every direction."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from torch.utils.data import Dataset

from lexel.data.denoising import denoise, draw_hole, hide_codes, with_holes
from lexel.data.example import Example
from lexel.data.sampler import Draw, mix_seed
from lexel.data.tokenized import CodeExample, TokenizedDataset
from lexel.document import DocumentCodec, Image, Segment, Text, TokenSequence


@dataclass(frozen=True)
class Mixture:
    """How often each kind of document is drawn (relative weights, not all zero).

    text_to_image: caption, then picture (loss on the picture); image_to_text: picture, then caption (loss on
    the caption); text / image: one alone; denoise: one of the first two (or plain text, where there are no
    pictures) with holes in captions and pictures, by UL2's mixture of denoisers; infill: caption, then a
    picture with a hole that is to be filled. See `lexel.data.denoising` for both: they need its `ROLES` in
    the vocabulary.
    """

    text_to_image: float = 1.0
    image_to_text: float = 1.0
    text: float = 0.0
    image: float = 0.0
    denoise: float = 0.0
    infill: float = 0.0

    def __post_init__(self) -> None:
        if min(astuple(self)) < 0 or sum(astuple(self)) <= 0:
            raise ValueError(f"The weights of a mixture must be >= 0 and not all zero, got {self}.")


_TEMPLATES = tuple(f.name for f in fields(Mixture))


class DocumentDataset(Dataset[TokenSequence]):
    """Documents drawn from tokenized pictures and plain text; everything random comes from (seed,
    draw.counter).

    codes: the pictures; codec: writes documents as ids; mixture: which kinds, how often; drop: share of
    text-to-picture documents whose caption is written in the vocabulary's unconditional form, for guidance
    (Ho & Salimans 2022); text: a source of plain text (`TextConfig`) that text-only documents come from
    instead of from captions. One of several captions is drawn. A picture without captions is always a picture
    alone. With ``codes=None`` all documents are text and `mixture` has no part.

    ``dataset[Draw(index, counter)]`` is a `TokenSequence`; batch them with ``codec.collate`` or `pack`.
    Raises ValueError without any source or with `drop` outside [0, 1].
    """

    def __init__(
        self,
        codes: TokenizedDataset | Sequence[CodeExample] | None,
        codec: DocumentCodec,
        mixture: Mixture | None = None,
        drop: float = 0.1,
        seed: int = 0,
        text: Dataset[Example] | None = None,
        modality: str = "image",
        supervise: str = "last",
    ) -> None:
        if codes is None and text is None:
            raise ValueError("DocumentDataset needs codes, text or both.")
        if not 0 <= drop <= 1:
            raise ValueError(f"drop is a share in [0, 1], got {drop}.")
        self.codes = codes
        self.codec = codec
        self.mixture = mixture or Mixture()
        self.drop = drop
        self.seed = seed
        self.text = text
        self.modality = modality
        self.supervise = supervise
        if codes is not None and modality not in codec.layouts:
            known = ", ".join(codec.vocabulary.modalities)
            raise ValueError(f"the data are {modality!r} codes, the vocabulary has {known}.")

    def __len__(self) -> int:
        return len(self.text if self.codes is None else self.codes)  # type: ignore[arg-type]

    def __getitem__(self, draw: Draw) -> TokenSequence:
        rng = random.Random(mix_seed(self.seed, draw.counter))
        template = rng.choices(_TEMPLATES, astuple(self.mixture))[0]
        document, unconditional = self.document(template, draw, rng)
        wording = rng.randrange(self.codec.wordings) if self.codec.wordings > 1 else 0
        sequence = self.codec.build(document, self.supervise, unconditional=unconditional, wording=wording)
        if template == "denoise":
            return denoise(self.codec, sequence, rng)
        if template == "infill" and isinstance(document[-1], Image):
            missing = draw_hole(self.codec.layouts[self.modality], rng)
            hidden = hide_codes(self.codec, sequence, missing)
            # A flexible picture may be too short to have anything there.
            return with_holes(self.codec, sequence, hidden) if hidden.any() else sequence
        return sequence

    def name(self, draw: Draw) -> str:
        """The key of the picture (or, without pictures, the text) that a draw is about, for messages."""
        source: Any = self.text if self.codes is None else self.codes
        return str(source[draw.index].key)

    def document(self, template: str, draw: Draw, rng: random.Random) -> tuple[list[Segment], bool]:
        """A document of the kind `template`, and whether its caption is to be written in the unconditional
        form."""
        # Drawn whether used or not, so that a change of the mixture's weights moves nothing else.
        dropped, caption_draw = rng.random() < self.drop, rng.random()
        if self.codes is None:
            assert self.text is not None
            return [_plain_text(self.text, draw.index)], False
        if template == "text" and self.text is not None:
            return [_plain_text(self.text, rng.randrange(len(self.text)))], False  # type: ignore[arg-type]
        example = self.codes[draw.index]
        image = Image(example.batch(self.codec.layouts[self.modality]), modality=self.modality)
        if template == "image" or not example.captions:
            return [image], False
        caption = Text(example.captions[int(caption_draw * len(example.captions))])
        if template == "text":
            return [caption], False
        if template == "image_to_text" or (template == "denoise" and rng.random() < 0.5):
            return [image, caption], False
        return [caption, image], dropped and template != "denoise"


def _plain_text(source: Dataset[Example], index: int) -> Text:
    return Text(source[index].captions[0])
