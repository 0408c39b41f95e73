"""The stages of a chain with many modalities: a tokenizer per view, aligned codes, one language model over
everything, and specialists that learn one pair alone.

    output/tokenizer, codes/             the picture, as in every chain
    output/views/NAME/tokenizer, codes/  segmentation, edges, depth: chains of their own
    output/structured/NAME/              codes of boxes, palette, metadata, layers
    output/lm/  output/specialists/text_to_image/
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexel.data.any_to_any import AnyToAnyDataset, Pair, all_pairs, pair_name, parse_pair
from lexel.data.modalities import VIEWS, structured_codecs, structured_values
from lexel.data.shapes import ShapesConfig
from lexel.data.tokenized import TokenizedDataset, tokenize_values
from lexel.document import DocumentCodec
from lexel.errors import LexelError
from lexel.tokenizers.layout import CodeLayout
from lexel.train.chain import Chain, say
from lexel.train.record import plain
from lexel.train.settings import LMStage, Parts
from lexel.train.sources import UNSEEN_SEED
from lexel.vocabulary import Vocabulary

if TYPE_CHECKING:
    from lexel.sample.pipeline import Pipeline
    from lexel.tokenizers.base import Tokenizer
    from lexel.tokenizers.structured import StructuredCodec

SPLITS = ("train", "validation")


# What the modalities are


def check(chain: Chain) -> None:
    """Raise LexelError for modalities that the data cannot show."""
    names = chain.run.any_to_any.modalities
    if not isinstance(chain.run.data, ShapesConfig):
        raise LexelError("any_to_any.modalities are read from procedural scenes; use data=shapes.")
    if chain.run.stages.lm.bundle is not None:
        raise LexelError(
            "with any_to_any.modalities a model starts from weights of the same vocabulary, "
            "stages.lm.init=DIR, and not from stages.lm.bundle."
        )
    known = (*VIEWS[1:], *structured_codecs())
    if wrong := [name for name in names if name not in known or names.count(name) > 1]:
        raise LexelError(
            f"any_to_any.modalities names {wrong[0]!r}; it may name, each once: {', '.join(known)}."
        )


def views(chain: Chain) -> dict[str, Chain]:
    """A chain of its own for each modality that is drawn like a picture."""
    run = chain.run
    return {
        name: Chain(
            replace(
                run,
                data=replace(run.data, view=name),
                output=str(run.folder / "views" / name),
                parts=Parts(),
                codes=replace(run.codes, folder=None) if run.codes.folder else run.codes,
            )
        )
        for name in run.any_to_any.modalities
        if name in VIEWS
    }


def tokenizers(chain: Chain) -> dict[str, Tokenizer]:
    """The trained tokenizers of the views."""
    return {name: view.tokenizer for name, view in views(chain).items()}


def codecs(chain: Chain) -> dict[str, StructuredCodec]:
    """The codecs of the structured modalities."""
    settings = chain.run.any_to_any
    every = structured_codecs(settings.bins, chain.run.data.max_objects)
    return {name: every[name] for name in settings.modalities if name in every}


def layouts(chain: Chain) -> dict[str, CodeLayout]:
    """Of every modality with codes, the picture first. Several codebooks per position follow each other,
    since the modalities do not have equally many."""
    every: dict[str, Any] = {"image": chain.tokenizer, **tokenizers(chain), **codecs(chain)}
    found = {name: coder.layout for name, coder in every.items()}
    names = ("image", *chain.run.any_to_any.modalities)
    return {
        name: replace(found[name], pattern="interleaved") if found[name].k > 1 else found[name]
        for name in names
    }


# Stages


def run_tokenizers(chain: Chain) -> None:
    """Train the views' tokenizers, with the settings of the picture's."""
    from lexel.train.stages import run_tokenizer

    check(chain)
    for name, view in views(chain).items():
        say(f"tokenizer of {name}:")
        view.run.any_to_any = replace(view.run.any_to_any, modalities=[])
        run_tokenizer(view)


def run_lms(chain: Chain) -> None:
    """Write every modality's codes, then train the language model and the specialists."""
    check(chain)
    settings = chain.run.any_to_any
    chain.tokenize()
    for view in views(chain).values():
        view.tokenize()
    _write_structured(chain)
    _train_lm(chain, "lm", [parse_pair(pair) for pair in settings.pairs])
    for pair in specialist_pairs(chain):
        _train_lm(chain, specialist_name(pair), [pair])


def specialist_pairs(chain: Chain) -> list[Pair]:
    """The pairs that get a language model of their own."""
    settings = chain.run.any_to_any
    if "all" in settings.specialists:
        return all_pairs(["text", "image", *settings.modalities])
    return [parse_pair(pair) for pair in settings.specialists]


def specialist_name(pair: Pair) -> str:
    """Where a specialist lies in the run's folder."""
    return f"specialists/{pair_name(pair)}"


def _write_structured(chain: Chain) -> None:
    codes = chain.run.codes
    found = codecs(chain)
    counts = {"train": codes.count, "validation": codes.validation_count}
    settings = {
        "codecs": {name: codec.fingerprint() for name, codec in found.items()},
        "data": chain.run.data,
        "examples": chain.run.examples,
        "counts": counts,
    }

    def work(folder: Path) -> dict[str, Any]:
        from torch.utils.data import Subset

        for split, count in counts.items():
            source: Any = chain.source(split)
            rows = source if count is None else Subset(source, range(min(count, len(source))))
            for name, codec in found.items():
                say(f"structured: writing {len(rows)} {split} rows of {name}")
                tokenize_values(codec, rows, partial(structured_values, name), folder / name / split)
        return {}

    if found:
        chain.stage("structured", plain(settings), work, together=False, keep_previous=False)


def codes(chain: Chain, split: str) -> dict[str, TokenizedDataset]:
    """The aligned codes of a split, by modality."""
    found = {"image": chain.codes(split)}
    found |= {name: view.codes(split) for name, view in views(chain).items()}
    for name, codec in codecs(chain).items():
        folder = chain.run.folder / "structured" / name / split
        found[name] = TokenizedDataset(folder, codec.fingerprint())
    return found


def _train_lm(chain: Chain, name: str, pairs: Sequence[Pair]) -> None:
    """Train a language model on documents of the pairs (none: random splits) into the folder `name`."""
    from lexel.train import stages

    run, stage, settings = chain.run, chain.run.stages.lm, chain.run.any_to_any
    inputs = {
        "network": run.lm,
        "objective": run.objective["lm"],
        "codes": chain.codes_settings(),
        "views": {view: own.fingerprint for view, own in views(chain).items()},
        "structured": {codec: own.fingerprint() for codec, own in codecs(chain).items()},
        "segments": settings.segments,
        "pairs": pairs,
    }

    def work(folder: Path) -> dict[str, Any]:
        from lexel.train.codec import batching, complete_lm, reading, save_codec
        from lexel.train.lm_module import LMModule

        say(f"{name}: {'random splits' if not pairs else ', '.join(map(pair_name, pairs))}")
        codec = build_codec(reading(stage, run.lm), chain.codes("train").captions(), layouts(chain))
        config = complete_lm(run.lm, codec)
        check_length(codec, chain.codes("train").captions(), len(settings.segments) + 1, config.max_length)
        save_codec(codec, folder, chain.fingerprint)
        objective = _objective(run.objective["lm"], codec.vocabulary.modalities)
        network = stages.fresh_network(config, run.seed, stage.init)
        module = LMModule(network, objective, stage, run.seed, vocabulary=codec.vocabulary)
        sets = [
            AnyToAnyDataset(
                codes(chain, split),
                codec,
                segments=settings.segments,
                pairs=pairs,
                drop=stage.drop,
                seed=run.seed + offset * UNSEEN_SEED,
            )
            for offset, split in enumerate(SPLITS)
        ]
        return stages.train_network(chain, name, module, folder, sets[0], sets[1], batching(codec, stage))

    stages.training_stage(chain, name, work, stage=stage, **inputs)


def _objective(make: Any, modalities: Sequence[str]) -> Any:
    """The objective; weights of modalities that this run leaves out are left out too."""
    known = {*VIEWS, *structured_codecs()} - set(modalities)
    weights = {name: w for name, w in make.keywords.get("weights", {}).items() if name not in known}
    return make(modalities, weights=weights)


def build_codec(stage: LMStage, captions: Iterable[str], layouts: Mapping[str, CodeLayout]) -> DocumentCodec:
    """A codec with a block of ids per codebook of every modality behind the text."""
    from lexel.train import codec

    text = codec.build_codec(stage, captions, None).text_tokenizer
    books = {name: layout.codebook_sizes for name, layout in layouts.items()}
    return DocumentCodec(Vocabulary.build(len(text), books), text, layouts)  # type: ignore[arg-type]


def check_length(codec: DocumentCodec, captions: Iterable[str], segments: int, limit: int) -> None:
    """Raise LexelError when the longest document of `segments` segments does not fit into `limit`
    positions."""
    text: Any = codec.text_tokenizer
    some = islice(captions, 2000)
    lengths = [max((len(text.encode(c, add_special_tokens=False)) for c in some), default=0)]
    lengths += [sum(map(len, script)) for script in codec.scripts.values()]
    if (needed := 2 + sum(sorted(lengths)[-segments:])) > limit:
        raise LexelError(
            f"a document of {segments} segments may need {needed} positions, the language model has {limit}: "
            "raise lm.max_length, or shorten any_to_any.segments."
        )


# The end of the chain


def parts(chain: Chain) -> dict[str, Any]:
    """What a pipeline of this chain needs besides the usual."""
    if not chain.run.any_to_any.modalities:
        return {}
    return {"tokenizers": tokenizers(chain), "structured": codecs(chain)}


def specialists(chain: Chain, pipeline: Pipeline) -> dict[Pair, Pipeline]:
    """The trained specialists, each with the pipeline's other parts."""
    from lexel.sample.pipeline import Pipeline
    from lexel.train.codec import load_codec
    from lexel.train.stages import load_lm

    found = {}
    for pair in specialist_pairs(chain):
        folder = chain.run.folder / specialist_name(pair)
        found[pair] = Pipeline(
            pipeline.tokenizer,
            load_lm(folder).to(pipeline.device),
            load_codec(folder),
            sampling=pipeline.sampling,
            tokenizers=pipeline.tokenizers,
            structured=pipeline.structured,
        )
    return found


def report(chain: Chain, pipeline: Pipeline) -> None:
    """The matrix of a finished chain, written into the run's folder, see `write_matrix`."""
    from lexel.evaluate.matrix import measure_matrix, write_matrix

    settings = chain.run.any_to_any
    say(f"evaluate: the matrix, {settings.count} held-out scenes per pair")
    found = measure_matrix(
        pipeline,
        chain.run.data,
        count=settings.count,
        seed=chain.run.seed,
        batch_size=chain.run.evaluation.batch_size,
        specialists=specialists(chain, pipeline),
    )
    write_matrix(chain.run.folder, found, pipeline)
