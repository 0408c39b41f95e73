"""Documents from any modalities to any others, over aligned codes of the same examples.

Each document draws some modalities of one example in random order, the first of them inputs and the rest
targets, as 4M does (arXiv 2312.06647). Only the targets are learned, and not what opens a segment: which
modality comes is the user's choice. A caption ends with ``<eos>`` alone, so among targets it comes last.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.utils.data import Dataset

from lexel.data.sampler import Draw, mix_seed
from lexel.data.tokenized import CodeExample, TokenizedDataset
from lexel.document import DocumentCodec, Image, Segment, Text, TokenSequence
from lexel.errors import LexelError

Pair = tuple[str, str]
CodeRows = TokenizedDataset | Sequence[CodeExample]


def parse_pair(text: str) -> Pair:
    """``"text_to_image"`` as (input, target). Raises ValueError for anything else."""
    parts = text.split("_to_")
    if len(parts) != 2 or not all(parts) or parts[0] == parts[1]:
        raise ValueError(f"a pair is written like text_to_image, two different modalities, got {text!r}.")
    return parts[0], parts[1]


def pair_name(pair: Pair) -> str:
    """The inverse of `parse_pair`."""
    return "_to_".join(pair)


def all_pairs(modalities: Sequence[str]) -> list[Pair]:
    """Every ordered pair of different modalities."""
    return [(source, target) for source in modalities for target in modalities if source != target]


class AnyToAnyDataset(Dataset[TokenSequence]):
    """Documents of random (inputs → targets) splits; everything random comes from (seed, draw.counter).

    codes: per modality of the model, row i of every one belongs to the same example; captions come with
    them, as the modality "text". segments: how likely documents of 2, 3, … segments are (relative weights);
    the number of targets is then drawn from 1 to all but one. pairs: only documents of these
    (input, target) pairs, all equally likely. drop: share of documents in the vocabulary's unconditional
    form, which keeps the last segment only.

    ``dataset[Draw(index, counter)]`` is a `TokenSequence`; batch them with ``codec.collate`` or `pack`.
    Raises LexelError for codes of a modality that the model does not have, and for codes of different
    examples; ValueError for pairs of unknown modalities and weights that make no sense.
    """

    def __init__(
        self,
        codes: Mapping[str, CodeRows],
        codec: DocumentCodec,
        *,
        segments: Sequence[float] = (0.5, 0.3, 0.2),
        pairs: Sequence[Pair] = (),
        drop: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.codes, self.codec, self.pairs = dict(codes), codec, tuple(pairs)
        self.drop, self.seed = drop, seed
        self.modalities = ("text", *codes)
        self.segments = tuple(segments)[: len(self.modalities) - 1]
        self._check()
        opening = [codec.vocabulary.begin(modality) for modality in codec.layouts]
        self._opening = torch.tensor(opening)

    def _check(self) -> None:
        known = ("text", *self.codec.layouts)
        if unknown := [name for name in self.codes if name not in known]:
            raise LexelError(
                f"the data has codes of the modality {unknown[0]!r}, which the model does not have; "
                f"it has {', '.join(known)}."
            )
        if not self.codes:
            raise ValueError("any-to-any needs codes of at least one modality besides the captions.")
        if wrong := [name for pair in self.pairs for name in pair if name not in self.modalities]:
            raise ValueError(
                f"a pair names {wrong[0]!r}, but the data has only {', '.join(self.modalities)}."
            )
        if not self.segments or min(self.segments) < 0 or sum(self.segments) <= 0:
            raise ValueError(f"segments are weights >= 0, not all zero, got {self.segments}.")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop is a share in [0, 1], got {self.drop}.")
        (first, rows), *others = self.codes.items()
        for name, other in others:
            ends = [len(other) == len(rows)]
            ends += [other[i].key == rows[i].key for i in (0, len(rows) - 1) if ends[0]]
            if not all(ends):
                raise LexelError(
                    f"the codes of {first} and {name} are not of the same examples; write them again from "
                    "one data set."
                )

    def __len__(self) -> int:
        return len(next(iter(self.codes.values())))

    def __getitem__(self, draw: Draw) -> TokenSequence:
        inputs, targets, dropped = self.document(draw)
        sequence = self.codec.build([*inputs, *targets], len(targets), unconditional=dropped)
        wanted = sequence.loss_mask & ~torch.isin(sequence.first, self._opening)
        wanted[-1] = isinstance(targets[-1], Text)
        return replace(sequence, loss_mask=wanted)

    def document(self, draw: Draw) -> tuple[list[Segment], list[Segment], bool]:
        """The drawn inputs and targets, and whether the inputs are dropped."""
        rng = random.Random(mix_seed(self.seed, draw.counter))
        # Drawn whether used or not, so that other pairs or weights move nothing else.
        dropped, caption = rng.random() < self.drop, rng.random()
        inputs, targets = self.split(rng)
        segments = [
            [self._segment(name, draw.index, caption) for name in names] for names in (inputs, targets)
        ]
        return segments[0], segments[1], dropped

    def split(self, rng: random.Random) -> tuple[list[str], list[str]]:
        """Names of the inputs and of the targets of one document."""
        if self.pairs:
            source, target = rng.choice(self.pairs)
            return [source], [target]
        count = 2 + rng.choices(range(len(self.segments)), self.segments)[0]
        chosen = rng.sample(self.modalities, count)
        targets = chosen[: rng.randint(1, count - 1)]
        targets.sort(key=lambda name: name == "text")
        return chosen[len(targets) :], targets

    def _segment(self, modality: str, index: int, caption: float) -> Segment:
        if modality == "text":
            captions = next(iter(self.codes.values()))[index].captions
            return Text(captions[int(caption * len(captions))])
        return Image(self.codes[modality][index].batch(self.codec.layouts[modality]), modality=modality)
