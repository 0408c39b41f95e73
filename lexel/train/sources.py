"""Where the documents of a language model's stage come from: the run's data, or several sources by weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from lexel.data.documents import DocumentDataset, Mixture
from lexel.data.interleaved import InterleavedDataset
from lexel.data.mixed import MixedDataset, check_weights
from lexel.errors import LexelError
from lexel.train.record import plain
from lexel.train.settings import LMStage, Share

if TYPE_CHECKING:
    from lexel.document import DocumentCodec
    from lexel.train.chain import Chain

UNSEEN_SEED = 1
"""Added to the seed of validation documents."""

KINDS = {f.name for f in fields(Mixture)}
"""Kinds of documents."""

DATA = "data"
"""What the run's own data source is called."""


class Sources:
    """The sources that one stage draws from, those of weight 0 left out. Raises LexelError for an unknown
    name, ValueError for weights or documents that make no sense."""

    def __init__(self, chain: Chain, stage: LMStage) -> None:
        self.chain = chain
        self.single = not stage.sources
        shares = stage.sources or {DATA: Share(mixture=stage.mixture, drop=stage.drop)}
        check_weights({name: share.weight for name, share in shares.items()})
        self.shares = {name: share for name, share in shares.items() if share.weight > 0}
        self.data = {name: share.source or name for name, share in self.shares.items()}
        for name, share in self.shares.items():
            chain.data_of(self.data[name])  # there is one
            share.check(name)
            if unknown := sorted(set(share.mixture) - KINDS):
                raise LexelError(
                    f"the mixture of {name!r} names {unknown[0]!r}; it knows {', '.join(sorted(KINDS))}."
                )
            Mixture(**share.mixture)
            if share.pictures > 1 and not chain.pictured(self.data[name]):
                raise LexelError(f"sources.{name}.pictures needs pictures, but it holds only text.")

    @property
    def pictured(self) -> list[str]:
        """The data sources that have pictures."""
        return [name for name in dict.fromkeys(self.data.values()) if self.chain.pictured(name)]

    def tokenize(self) -> None:
        """Have the codes of every source with pictures."""
        for name in self.pictured:
            self.chain.tokenize(name)

    def settings(self) -> dict[str, Any]:
        """What decides the documents, beside the stage's own settings."""
        codes = {name: self.chain.codes_settings(name) for name in self.pictured}
        if self.single:
            return {"codes": codes[DATA]} if codes else {}
        data = {name: plain(self.chain.data_of(name)) for name in dict.fromkeys(self.data.values())}
        return {"sources": data, "codes": codes}

    def captions(self) -> Iterator[str]:
        """Every training caption and text."""
        for name in dict.fromkeys(self.data.values()):
            yield from self._captions(name)

    def _captions(self, name: str) -> Iterable[str]:
        if self.chain.pictured(name):
            return self.chain.codes("train", name).captions()
        texts: Any = self.chain.source("train", name)
        return (caption for index in range(len(texts)) for caption in texts[index].captions)

    def check_length(self, codec: DocumentCodec, few: int, limit: int) -> None:
        """Raise LexelError when a document does not fit into `limit` positions. Of each source the first few
        (`few`) captions are looked at."""
        from lexel.train.codec import check_length

        for captions, pictures in self._longest(few):
            check_length(codec, captions, limit, pictures)

    def positions(self, codec: DocumentCodec, few: int) -> tuple[int, str]:
        """How many positions the longest document needs, and what it is made of."""
        from lexel.train.codec import positions

        return max(positions(codec, captions, pictures) for captions, pictures in self._longest(few))

    def _longest(self, few: int) -> Iterator[tuple[Iterable[str], int]]:
        """Some captions of each source, and how many pictures its documents have."""
        for name, share in self.shares.items():
            pictures = share.pictures if self.chain.pictured(self.data[name]) else 0
            yield islice(self._captions(self.data[name]), few), pictures

    def documents(self, codec: DocumentCodec, split: str) -> Dataset[Any]:
        """The documents of a split: of one source, or mixed."""
        found = {name: self._documents(name, codec, split) for name in self.shares}
        if self.single:
            return found[DATA]
        weights = {name: share.weight for name, share in self.shares.items()}
        return MixedDataset(found, weights, self.chain.run.seed)

    def validation(self, codec: DocumentCodec) -> Dataset[Any] | dict[str, Dataset[Any]]:
        """The validation documents; of several sources each by itself."""
        if self.single:
            return self.documents(codec, "validation")
        return {name: self._documents(name, codec, "validation") for name in self.shares}

    def _documents(self, name: str, codec: DocumentCodec, split: str) -> Dataset[Any]:
        chain, share, data = self.chain, self.shares[name], self.data[name]
        seed = chain.run.seed + (UNSEEN_SEED if split == "validation" else 0)
        if not chain.pictured(data):
            return DocumentDataset(
                None, codec, seed=seed, text=chain.source(split, data), supervise=share.supervise
            )
        codes = chain.codes(split, data)
        if share.pictures > 1:
            return InterleavedDataset(codes, codec, share.pictures, seed, share.modality)
        mixture = Mixture(**share.mixture)
        return DocumentDataset(
            codes, codec, mixture, share.drop, seed, modality=share.modality, supervise=share.supervise
        )
