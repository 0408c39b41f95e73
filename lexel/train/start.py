"""Runs that start from a bundle: each part that the task trains goes on from the bundle's, the others are the
bundle's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lexel.data.example import stack_pixels
from lexel.errors import LexelError
from lexel.prompts import make_codec
from lexel.sample.bundle import BundleInfo, find_bundle, load_codec
from lexel.train.chain import is_leader, say
from lexel.train.settings import Run

if TYPE_CHECKING:
    from lexel.document import DocumentCodec
    from lexel.sample.logits import SamplingConfig
    from lexel.tokenizers.layout import CodeLayout
    from lexel.train.chain import Chain

SHIPPED = "shipped"
"""What the bundle that comes with Lexel is called."""

LOOKED_AT = 64
"""Pictures that `look` reconstructs."""

RECOGNISABLE = 20.0
"""Decibels of PSNR below which a reconstruction has lost what its picture shows."""


def bundle_folder(name: str) -> Path:
    """The folder of a bundle: `SHIPPED`, a folder or a hub id. LexelError when there is none."""
    return find_bundle(None if name == SHIPPED else name)


def bundle_sampling(name: str | None) -> Mapping[str, SamplingConfig]:
    """The sampling defaults of a bundle; none without one."""
    return {} if name is None else BundleInfo.read(bundle_folder(name)).sampling


@dataclass(frozen=True)
class Start:
    """A bundle's language model, and what gives its ids a meaning."""

    folder: Path
    codec: DocumentCodec
    lm: Any

    def network(self, layout: CodeLayout | None, needed: tuple[int, str]) -> Any:
        """The language model, ready to be trained on documents of the tokenizer's `layout` (None: text) that
        need so many positions (and why). Raises LexelError when they do not fit."""
        own = self.codec.layouts.get("image")
        if layout is not None and (own is None or geometry(own) != geometry(layout)):
            raise LexelError(
                f"the language model of {self.folder} was trained on pictures of {described(own)}, the "
                f"tokenizer writes {described(layout)}; take both from the same bundle."
            )
        if self.lm.config.vocab_size < self.codec.vocabulary.size:
            raise LexelError(
                f"the language model of {self.folder} knows {self.lm.config.vocab_size} ids, but its "
                f"vocabulary has {self.codec.vocabulary.size}; the bundle is damaged."
            )
        if needed[0] > self.lm.config.max_length:
            say(f"lm: {self.lm.config.max_length} → {needed[0]} positions, because of {needed[1]}")
            self.lm.config = dataclasses.replace(self.lm.config, max_length=needed[0])
        return self.lm.requires_grad_(True)

    def with_roles(self, roles: Sequence[str]) -> Start:
        """The same with ids for further special tokens behind all others, where the vocabulary lacks them."""
        from lexel.models.extend import extend_vocabulary

        known = self.codec.vocabulary
        vocabulary = known.with_roles(roles)
        if vocabulary.size == known.size:
            return self
        extend_vocabulary(self.lm, vocabulary.size, known.size, "random", torch.Generator().manual_seed(0))
        codec = make_codec(vocabulary, self.codec.text_tokenizer, self.codec.layouts)
        return dataclasses.replace(self, codec=codec)


def start_of(name: str) -> Start:
    """The start that a bundle is. LexelError when it is none, or incomplete."""
    from lexel.train.stages import load_lm

    folder = bundle_folder(name)
    return Start(folder, load_codec(folder, BundleInfo.read(folder)), load_lm(folder / "lm"))


def geometry(layout: CodeLayout) -> tuple[Any, ...]:
    """What two layouts must share for the same language model."""
    return tuple(layout.codebook_sizes), layout.grid, layout.length, layout.scales, layout.flexible


def described(layout: CodeLayout | None) -> str:
    """A layout in words."""
    if layout is None:
        return "no codes at all"
    shape = "x".join(map(str, layout.grid)) if layout.grid else str(layout.positions)
    return f"{shape} codes out of {' and '.join(map(str, layout.codebook_sizes))}"


def begin(run: Run) -> None:
    """Take over from ``run.bundle`` what the run does not name itself, and have pictures read at the bundle's
    size. LexelError when it is no bundle."""
    from lexel.models.detokenizers import from_pretrained as load_detokenizer
    from lexel.tokenizers import from_pretrained as load_tokenizer

    assert run.bundle is not None
    folder, trained, stages, parts = bundle_folder(run.bundle), run.task.stages, run.stages, run.parts
    info, tokenizer = BundleInfo.read(folder), load_tokenizer(folder / "tokenizer")
    has_detokenizer = "detokenizer" in info.parts
    if "tokenizer" in trained:
        run.tokenizer = tokenizer.config
        stages.tokenizer.init = stages.tokenizer.init or str(folder / "tokenizer")
    else:
        parts.tokenizer = parts.tokenizer or str(folder / "tokenizer")
    if "lm" in trained:
        stages.lm.bundle = stages.lm.bundle or str(folder)
    elif "curriculum" not in trained:
        parts.lm = parts.lm or str(folder / "lm")
    if has_detokenizer and "detokenizer" in trained:
        config: Any = load_detokenizer(folder / "detokenizer").config
        kind: Any = type(config)
        run.detokenizer = partial(kind, **vars(config))
        stages.detokenizer.init = stages.detokenizer.init or str(folder / "detokenizer")
    elif has_detokenizer and "tokenizer" not in trained:
        parts.detokenizer = parts.detokenizer or str(folder / "detokenizer")
    size = tuple(tokenizer.image_size)
    run.data = resized(run.data, size, "data")
    run.sources = {name: resized(data, size, name) for name, data in run.sources.items()}


def resized(data: Any, size: tuple[int, ...], name: str) -> Any:
    """A data source that gives pictures of `size` (h, w); text stays as it is."""
    if not hasattr(data, "image_size") or tuple(data.image_size) == size:
        return data
    say(f"{name}: pictures are read at {size[0]}x{size[1]}, the size of the bundle's")
    return dataclasses.replace(data, size=size[0] if size[0] == size[1] else size)


@torch.inference_mode()
def look(chain: Chain) -> float | None:
    """PSNR in dB of the first pictures through the tokenizer that the run starts from; said, and warned about
    when it is too low to learn from. ``tokenizer_check.png`` shows some. None without pictures."""
    if not chain.has_pictures or not is_leader():
        return None
    from lexel.evaluate.metrics import psnr
    from lexel.tokenizers import from_pretrained as load_tokenizer
    from lexel.train.callbacks.pictures import grid

    assert chain.run.bundle is not None
    tokenizer = load_tokenizer(chain.run.parts.tokenizer or bundle_folder(chain.run.bundle) / "tokenizer")
    source: Any = chain.source("train")
    pixels = stack_pixels([source[index] for index in range(min(LOOKED_AT, len(source)))])
    rebuilt = tokenizer.decode(tokenizer.encode(pixels)).clamp(-1, 1)
    quality = float(psnr(rebuilt, pixels).mean())
    path = chain.run.folder / "tokenizer_check.png"
    grid(torch.stack([pixels[:8], rebuilt[:8]])).save(path)
    say(f"tokenizer: it shows {len(pixels)} of the pictures at {quality:.1f} dB PSNR, see {path}")
    if quality < RECOGNISABLE and "tokenizer" not in chain.run.task.stages:
        say(
            f"warning: below {RECOGNISABLE:.0f} dB the bundle's tokenizer cannot show these pictures, so nor "
            "can the language model; add task=chain to fine-tune the tokenizer first, or start from a bundle "
            "that was trained on pictures more like them."
        )
    return quality
