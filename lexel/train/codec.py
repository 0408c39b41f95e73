"""The document codec of a training run: text tokenizer, vocabulary and layouts, saved beside the LM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexel.data.denoising import ROLES
from lexel.document import DocumentCodec, TokenSequence
from lexel.errors import LexelError
from lexel.hub import decode_config
from lexel.prompts import make_codec
from lexel.sample.bundle import (
    BUNDLE_FILE,
    TRAINED_ON_FILE,
    VOCABULARY_FILE,
    BundleInfo,
    load_text_tokenizer,
    read_json,
    write_json,
    write_text,
)
from lexel.sample.bundle import load_codec as load_bundle_codec
from lexel.tokenizers.layout import CodeLayout
from lexel.train.settings import LMStage
from lexel.types import TokenBatch
from lexel.vocabulary import Vocabulary

if TYPE_CHECKING:
    from lexel.models.causal_lm import CausalLMConfig
    from lexel.models.pretrained import PretrainedConfig

LAYOUTS_FILE = "layouts.json"
_AROUND = 5
"""Most special tokens around a caption and a picture: bos, boi, eoi, eos, and one to spare."""


def reading(stage: LMStage, config: partial[Any]) -> LMStage:
    """The stage with the text tokenizer of the pretrained model that `config` starts from, unless it names
    one itself."""
    if not starts_from_text(config) or stage.text_tokenizer is not None:
        return stage
    return replace(stage, text_tokenizer=config.keywords["source"])


def starts_from_text(config: partial[Any]) -> bool:
    """Whether a language model's config names a pretrained text model."""
    from lexel.models.pretrained import PretrainedConfig

    return config.func is PretrainedConfig


def build_codec(stage: LMStage, captions: Iterable[str], layout: CodeLayout | None) -> DocumentCodec:
    """A new codec: a BPE trained on `captions` (or the tokenizer that the stage names), and one block of ids
    per codebook of `layout` (None: text only) behind the text."""
    from lexel.data.text_tokenizer import train_text_tokenizer

    text_tokenizer: Any
    if stage.text_tokenizer is not None:
        from transformers import AutoTokenizer

        try:
            text_tokenizer = AutoTokenizer.from_pretrained(stage.text_tokenizer)
        except (OSError, ValueError) as error:
            raise LexelError(
                f"the text tokenizer {stage.text_tokenizer} cannot be loaded: {error}"
            ) from error
    else:
        wanted = islice(captions, stage.captions_for_vocabulary)
        text_tokenizer = train_text_tokenizer(wanted, stage.text_vocabulary)
    if layout is None:
        roles = ROLES if has_holes(stage) else ()
        return DocumentCodec(Vocabulary.build(len(text_tokenizer), {}, roles=roles), text_tokenizer, {})
    changes: dict[str, Any] = {"pattern": stage.pattern} if stage.pattern else {}
    layout = replace(layout, row_end=stage.row_end, **changes)
    roles = ("eol",) if stage.row_end else ()
    roles += ROLES if has_holes(stage) else ()
    vocabulary = Vocabulary.build(len(text_tokenizer), {"image": layout.codebook_sizes}, roles=roles)
    return DocumentCodec(vocabulary, text_tokenizer, {"image": layout})


def has_holes(stage: LMStage) -> bool:
    """Whether the stage's documents may have holes (`lexel.data.denoising`)."""
    mixtures = [share.mixture for share in stage.sources.values()] or [stage.mixture]
    return any(mixture.get(kind, 0) > 0 for mixture in mixtures for kind in ("denoise", "infill"))


def save_codec(codec: DocumentCodec, folder: Path, fingerprint: str | None) -> None:
    """Write the codec into the LM's folder, with the fingerprint of the tokenizer that the LM is trained
    on."""
    tokenizer: Any = codec.text_tokenizer
    tokenizer.save_pretrained(str(folder / "text_tokenizer"))
    write_text(folder / VOCABULARY_FILE, codec.vocabulary.to_json())
    write_json(folder / LAYOUTS_FILE, {name: asdict(layout) for name, layout in codec.layouts.items()})
    write_json(folder / TRAINED_ON_FILE, {"tokenizer": fingerprint})


def load_codec(folder: Path) -> DocumentCodec:
    """The codec of a trained LM's folder, which may be a bundle's. LexelError when a file is missing or
    damaged."""
    if (folder.parent / BUNDLE_FILE).is_file():
        return load_bundle_codec(folder.parent, BundleInfo.read(folder.parent))
    try:
        vocabulary = Vocabulary.from_json((folder / VOCABULARY_FILE).read_text(encoding="utf-8"))
        layouts = {name: decode_config(CodeLayout, x) for name, x in read_json(folder / LAYOUTS_FILE).items()}
        return make_codec(vocabulary, load_text_tokenizer(folder / "text_tokenizer"), layouts)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise LexelError(f"{folder} holds no complete vocabulary ({error}); train its LM again.") from error


def batching(codec: DocumentCodec, stage: LMStage) -> Callable[[Sequence[TokenSequence]], TokenBatch]:
    """How a stage's documents become batches: packed into rows of ``stage.row_length`` tokens, or one to a
    row."""
    from lexel.data.packing import pack

    if not stage.row_length:
        return codec.collate
    return partial(pack, length=stage.row_length, pad=codec.vocabulary.special["pad"])


def complete_lm(config: partial[Any], codec: DocumentCodec) -> CausalLMConfig | PretrainedConfig:
    """The LM config with what the vocabulary decides filled in: ids, padding, several codes per position."""
    values: dict[str, Any] = {
        "vocab_size": codec.vocabulary.size,
        "pad_id": codec.vocabulary.special["pad"],
    }
    if codec.columns > 1:
        sizes = codec.layouts["image"].codebook_sizes
        offsets = tuple(int(codec.vocabulary.block("image", j)[0]) for j in range(len(sizes)))
        head = config.keywords.get("head", "single")
        values |= {
            "codebook_sizes": sizes,
            "code_offsets": offsets,
            "head": "factorized" if head == "single" else head,
        }
    else:
        values["head"] = "single"
    if starts_from_text(config):
        values["text_size"] = codec.vocabulary.text_size
    if modalities := config.keywords.get("bidirectional"):
        values["bidirectional"] = closing(modalities, codec.vocabulary)
    return config(**values)


def closing(modalities: Iterable[str], vocabulary: Vocabulary) -> tuple[tuple[int, int], ...]:
    """Modality names as a model's config has them (`CausalLMConfig.bidirectional`). Raises LexelError for one
    that the vocabulary does not have."""
    known = vocabulary.modalities
    if unknown := sorted(set(modalities) - set(known[1:])):
        raise LexelError(f"lm.bidirectional names {unknown}; the pictures' modalities are {list(known[1:])}.")
    return tuple((known.index(name), vocabulary.end(name)) for name in modalities)


def positions(codec: DocumentCodec, captions: Iterable[str], pictures: int = 1) -> tuple[int, str]:
    """How many positions a document of so many pictures, each with the longest of `captions`, needs (0: a
    text alone), and what it is made of."""
    text: Any = codec.text_tokenizer
    longest = max((len(text.encode(c, add_special_tokens=False)) for c in captions), default=0)
    around = _AROUND + codec.added + (_markers(codec, longest) if "sep" in codec.vocabulary.special else 0)
    if not pictures or not codec.layouts:
        return longest + around, f"the longest text ({longest} tokens)"
    slots = max(len(codec.scripts[name][1]) for name in codec.layouts)
    times = f"{pictures} times " if pictures > 1 else ""
    made = f"{times}the longest caption ({longest} tokens) and a picture ({slots})"
    return pictures * (longest + slots + around), made


def check_length(codec: DocumentCodec, captions: Iterable[str], limit: int, pictures: int = 1) -> None:
    """Raise LexelError when the documents of `positions` do not fit into `limit` of them."""
    needed, made = positions(codec, captions, pictures)
    if needed > limit:
        raise LexelError(
            f"{made} need {needed} positions, the language model has {limit}: raise lm.max_length "
            "(and drafter.max_length) or shorten them."
        )


def _markers(codec: DocumentCodec, longest: int) -> int:
    """Most special tokens of holes: mode, sep, and two for each hole. Every second token of a text may be
    one; a picture has at most one more than it has rows."""
    rows = sum(layout.grid[0] if layout.grid else layout.positions // 2 for layout in codec.layouts.values())
    return 2 + longest + 2 * (rows + 1)
