"""Documents of several captioned pictures in turn, as web pages have them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch.utils.data import Dataset

from lexel.data.sampler import Draw, mix_seed
from lexel.data.tokenized import CodeExample, TokenizedDataset
from lexel.document import DocumentCodec, Image, Segment, Text, TokenSequence


class InterleavedDataset(Dataset[TokenSequence]):
    """Documents of `pictures` captioned pictures, all drawn from (seed, draw.counter) but the first, which
    is the draw's. The document's first picture is before or after its caption, and the others like it. The
    loss is on everything. Pictures without captions stand alone.

    ``dataset[Draw(index, counter)]`` is a `TokenSequence`. Raises ValueError for fewer than one picture.
    """

    def __init__(
        self,
        codes: TokenizedDataset | Sequence[CodeExample],
        codec: DocumentCodec,
        pictures: int,
        seed: int = 0,
        modality: str = "image",
    ) -> None:
        if pictures < 1:
            raise ValueError(f"an interleaved document has at least one picture, got {pictures}.")
        self.codes, self.codec, self.pictures = codes, codec, pictures
        self.seed, self.modality = seed, modality

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, draw: Draw) -> TokenSequence:
        rng = random.Random(mix_seed(self.seed, draw.counter))
        picture_first = rng.random() < 0.5
        others = [rng.randrange(len(self.codes)) for _ in range(self.pictures - 1)]
        document: list[Segment] = []
        for index in (draw.index, *others):
            example = self.codes[index]
            image = Image(example.batch(self.codec.layouts[self.modality]), modality=self.modality)
            pair: list[Segment] = [Text(rng.choice(example.captions)), image] if example.captions else [image]
            document += pair[::-1] if picture_first else pair
        return self.codec.build(document, supervise="all")

    def name(self, draw: Draw) -> str:
        """The key of the document's first picture, for messages."""
        return self.codes[draw.index].key
