"""One function per stage: build network, data and module, train, export. `lexel.train.chain` calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lexel.data.example import stack_pixels
from lexel.data.sampler import DrawnDataset
from lexel.errors import LexelError
from lexel.hub import decode_config
from lexel.sample.bundle import BUNDLE_FILE
from lexel.train.chain import WEIGHTS, Chain, is_leader
from lexel.train.finish import write_bundle
from lexel.train.record import plain

if TYPE_CHECKING:
    from lexel.document import DocumentCodec
    from lexel.models.causal_lm import CausalLM
    from lexel.train.module import StageModule
    from lexel.train.settings import LMStage, StageSettings, TokenizerStage


def run_tokenizer(chain: Chain) -> None:
    """Train the tokenizer on the source's pictures."""
    run = chain.run
    _need_pictures(chain)
    config, objective = run.tokenizer, run.objective["tokenizer"]
    if objective.adversarial and run.trainer.strategy == "fsdp2":
        raise LexelError("a discriminator is not sharded by fsdp2; train a GAN tokenizer with trainer=ddp.")

    def work(folder: Path) -> dict[str, Any]:
        from lexel.train.callbacks import CodebookUsage
        from lexel.train.tokenizer_module import TokenizerModule

        network = fresh_network(config, run.seed, run.stages.tokenizer.init)
        _check_clips(run.data, network)
        _fill_vae(network, run.stages.tokenizer)
        _fill_tower(network, run.stages.tokenizer)
        module = TokenizerModule(network, objective.build(), run.stages.tokenizer, run.seed, _preview(chain))
        usage = [CodebookUsage(network.codebook_sizes)]
        collate = module.objective.collate
        return train_network(chain, "tokenizer", module, folder, *pictures_of(chain), collate, usage)

    training_stage(chain, "tokenizer", work, network=config, objective=objective)
    if run.any_to_any.modalities:
        from lexel.train.any_to_any import run_tokenizers

        run_tokenizers(chain)


def run_lm(chain: Chain) -> None:
    """Tokenize the data if need be, then train the language model on documents."""
    run, stage = chain.run, chain.run.stages.lm
    if run.any_to_any.modalities:
        from lexel.train.any_to_any import run_lms

        return run_lms(chain)
    train_lm(chain, "lm", stage)


def train_lm(
    chain: Chain,
    name: str,
    stage: LMStage,
    *,
    captions: Callable[[], Iterable[str]] | None = None,
    bundle: bool = False,
) -> None:
    """Train the stage's language model in the run's folder `name`: a new one, or that of ``stage.bundle``.

    captions: what a new text tokenizer is trained on (default: the stage's own); bundle: end in a bundle, in
    the folder of that name.
    """
    from lexel.data.denoising import ROLES
    from lexel.train.codec import has_holes
    from lexel.train.sources import Sources
    from lexel.train.start import start_of

    run, sources = chain.run, Sources(chain, stage)
    sources.tokenize()
    start = None if stage.bundle is None else start_of(stage.bundle)
    if start is not None and has_holes(stage):
        start = start.with_roles(ROLES)
    inputs: dict[str, Any] = {"objective": run.objective["lm"], **sources.settings()}
    inputs |= {"network": run.lm} if start is None else {"start": start.lm.fingerprint()}

    def work(folder: Path) -> dict[str, Any]:
        from lexel.train.codec import build_codec, complete_lm, reading, save_codec
        from lexel.train.lm_module import LMModule

        layout = chain.tokenizer.layout if sources.pictured or bundle else None
        few = stage.captions_for_vocabulary
        if start is None:
            codec = build_codec(reading(stage, run.lm), (captions or sources.captions)(), layout)
            config = complete_lm(run.lm, codec)
            sources.check_length(codec, few, config.max_length)
            network = fresh_network(config, run.seed, stage.init)
        else:
            torch.manual_seed(run.seed)
            codec, network = start.codec, start.network(layout, sources.positions(start.codec, few))
        save_codec(codec, folder, chain.fingerprint if codec.layouts else None)
        objective = run.objective["lm"](codec.vocabulary.modalities)
        draw = _drawing(chain, codec, sources.pictured)
        module = LMModule(network, objective, stage, run.seed, draw, codec.vocabulary)
        facts = _train_documents(chain, name, module, folder, codec, stage)
        if bundle and is_leader():
            write_bundle(chain, folder, folder / "bundle")
        return facts

    makes = [run.folder / name / "bundle" / BUNDLE_FILE] if bundle else []
    training_stage(chain, name, work, stage=stage, makes=makes, **inputs)


def run_drafter(chain: Chain) -> None:
    """Train what drafts for the language model: the kind that ``run.drafter`` configures."""
    from lexel.models.causal_lm import CausalLMConfig
    from lexel.models.eagle import EagleConfig
    from lexel.models.neighbour_table import NeighbourTableConfig

    kinds = {CausalLMConfig: _distil, EagleConfig: _distil, NeighbourTableConfig: _neighbours}
    kinds[chain.run.drafter.func](chain)


def _distil(chain: Chain) -> None:
    """A small language model that imitates the trained one, or a draft head."""
    from lexel.models.eagle import EagleConfig
    from lexel.train.codec import complete_lm, load_codec

    run, stage = chain.run, chain.run.stages.drafter
    if chain.has_pictures:
        chain.tokenize()
    folder_of_lm = chain.part_folder("lm")
    codec, lm = load_codec(folder_of_lm), load_lm(folder_of_lm)
    inputs: dict[str, Any] = {"network": run.drafter, "teacher": lm.fingerprint()}
    config: Any
    if run.drafter.func is EagleConfig:
        from lexel.train.eagle_module import complete_eagle

        config = complete_eagle(run.drafter, lm.config)
    else:
        config = complete_lm(run.drafter, codec)
        inputs["objective"] = run.objective["lm"]
    if config.max_length < lm.config.max_length:
        raise LexelError(
            f"the drafter has {config.max_length} positions, the language model {lm.config.max_length}; "
            f"set drafter.max_length={lm.config.max_length}."
        )

    def work(folder: Path) -> dict[str, Any]:
        module = _drafter_module(chain, config, codec, lm)
        return _train_documents(chain, "drafter", module, folder, codec, stage)

    training_stage(chain, "drafter", work, **inputs)


def _drafter_module(chain: Chain, config: Any, codec: DocumentCodec, lm: CausalLM) -> StageModule:
    from lexel.models.eagle import EagleConfig
    from lexel.train.eagle_module import EagleModule, take_over
    from lexel.train.lm_module import DrafterModule

    run, stage = chain.run, chain.run.stages.drafter
    network = fresh_network(config, run.seed, stage.init)
    if isinstance(config, EagleConfig):
        return EagleModule(take_over(network, lm, output=stage.init is None), lm, stage, run.seed)
    return DrafterModule(network, lm, run.objective["lm"](codec.vocabulary.modalities), stage, run.seed)


def _neighbours(chain: Chain) -> None:
    """The table of neighbouring codes, fitted to the tokenized pictures; no language model is needed."""
    run, stage = chain.run, chain.run.stages.drafter
    _need_pictures(chain)
    chain.tokenize()
    layout = chain.tokenizer.layout
    length = layout.positions if layout.grid is None else None
    config = run.drafter(codebook_sizes=layout.codebook_sizes, grid=layout.grid, length=length)

    def work(folder: Path) -> dict[str, Any]:
        from lexel.sample.bundle import TRAINED_ON_FILE, write_json
        from lexel.train.neighbour_module import NeighbourModule, stack_codes

        module = NeighbourModule(fresh_network(config, run.seed, stage.init), stage, run.seed)
        write_json(folder / TRAINED_ON_FILE, {"tokenizer": chain.fingerprint})
        train, validation = (DrawnDataset(chain.codes(split)) for split in ("train", "validation"))
        collate = partial(stack_codes, layout=layout)
        return train_network(chain, "drafter", module, folder, train, validation, collate)

    training_stage(chain, "drafter", work, network=config, codes=chain.codes_settings())


def run_detokenizer(chain: Chain) -> None:
    """Train the detokenizer on the frozen tokenizer's codes, or distil a trained one."""
    from lexel.train.detokenizers import distil_detokenizer, train_detokenizer

    _need_pictures(chain)
    (distil_detokenizer if chain.run.stages.detokenizer.distil else train_detokenizer)(chain)


def run_curriculum(chain: Chain) -> None:
    """Train the language model in several stages, each from the bundle of the one before."""
    from lexel.train.curriculum import follow

    follow(chain)


def run_self_assess(chain: Chain) -> None:
    """Rounds in which the language model draws, is judged, and learns to judge."""
    from lexel.train.self_assessment import assess

    _need_pictures(chain)
    assess(chain)


def run_evaluate(chain: Chain) -> None:
    """Bundle the parts, measure the bundle and write the report."""
    from lexel.train.finish import finish

    finish(chain)


def load_lm(folder: Path) -> CausalLM:
    """A trained language model."""
    from lexel.models import load_lm

    return load_lm(folder)


def training_stage(
    chain: Chain,
    name: str,
    work: Callable[[Path], Mapping[str, Any]],
    *,
    stage: StageSettings | None = None,
    makes: Sequence[Path] = (),
    **inputs: Any,
) -> None:
    """Run a training stage (default settings: those of its name) unless its network was trained with the same
    settings and inputs before and lies there, with all else that it `makes`."""
    settings = chain.common_settings(name, stage, **inputs)
    chain.stage(name, settings, work, makes=[chain.run.folder / name / WEIGHTS, *makes])


def train_network(
    chain: Chain,
    name: str,
    module: StageModule,
    folder: Path,
    train: Dataset[Any],
    validation: Dataset[Any] | Mapping[str, Dataset[Any]] | None,
    collate: Callable[[list[Any]], Any],
    callbacks: Iterable[Any] = (),
) -> dict[str, Any]:
    """Train, export the network into `folder` and return the facts for `done.json`."""
    from lexel.train.batches import Batches
    from lexel.train.fit import fit

    run = chain.run
    batches = Batches(train, validation, collate, module.stage, run.seed)
    fit(name, module, batches, folder, run.trainer, run.logger, list(callbacks))
    module.export(folder)
    return {"seconds": module.seconds, "steps": module.step, "metrics": plain(module.latest)}


def _train_documents(
    chain: Chain, name: str, module: StageModule, folder: Path, codec: DocumentCodec, stage: LMStage
) -> dict[str, Any]:
    from lexel.train.codec import batching
    from lexel.train.sources import Sources

    sources = Sources(chain, stage)
    train, validation = sources.documents(codec, "train"), sources.validation(codec)
    return train_network(chain, name, module, folder, train, validation, batching(codec, stage))


def fresh_network(config: Any, seed: int, init: str | None) -> Any:
    """A network with weights drawn from `seed`, or those of the folder or hub id `init`, which may lack the
    heads of further tokens."""
    torch.manual_seed(seed)
    network = config.build()
    if init is not None:
        from lexel.hub import WEIGHTS_FILE, load_weights, resolve_folder

        load_weights(network, resolve_folder(init) / WEIGHTS_FILE, optional="future.")
    return network


def _fill_vae(network: Any, stage: TokenizerStage) -> None:
    """Give a FlexTok's frozen VAE its weights; nothing to do for other tokenizers."""
    from lexel.tokenizers.flextok import FlexTok

    has_vae = isinstance(network, FlexTok) and network.vae is not None
    if stage.vae is not None and not has_vae:
        raise LexelError("stages.tokenizer.vae belongs to a FlexTok with a VAE (tokenizer.vae).")
    if stage.vae is not None:
        network.load_vae(stage.vae)
    elif has_vae and stage.init is None:
        raise LexelError(
            "the VAE is frozen and must come trained: set stages.tokenizer.vae to a folder or hub id, such "
            "as EPFL-VILAB/flextok_vae_c16, or tokenizer.vae=null to work on pixels."
        )


def _fill_tower(network: Any, stage: TokenizerStage) -> None:
    """Give a TokenFlow's semantic encoder its first weights, where the stage names any."""
    if stage.tower is None:
        return
    from lexel.tokenizers.tokenflow import TokenFlow

    if not isinstance(network, TokenFlow):
        raise LexelError("stages.tokenizer.tower belongs to a TokenFlow (tokenizer=tokenflow).")
    if stage.init is not None:
        raise LexelError("stages.tokenizer.init holds a tower already; leave stages.tokenizer.tower null.")
    network.load_tower(stage.tower)


def _check_clips(data: Any, network: Any) -> None:
    """Raise LexelError for a source of clips and a tokenizer of pictures."""
    from lexel.tokenizers.base import VideoTokenizer

    if hasattr(data, "frames") and not isinstance(network, VideoTokenizer):
        raise LexelError(
            f"the data are clips, but {type(network).__name__} reads pictures; choose a tokenizer of clips "
            "(tokenizer=larp, open_magvit2_video or emu3), or data of pictures."
        )


def _need_pictures(chain: Chain) -> None:
    if not chain.has_pictures:
        raise LexelError(
            "this stage needs pictures, but the data source holds only text; train task=lm on it."
        )


def pictures_of(chain: Chain) -> tuple[Dataset[Any], Dataset[Any]]:
    """Training pictures, varied from draw to draw where the source is told so, and validation pictures."""
    seed = chain.run.seed if getattr(chain.run.data, "varies", False) else None
    return DrawnDataset(chain.source("train"), seed), DrawnDataset(chain.source("validation"))


def _preview(chain: Chain) -> Tensor:
    """The first validation pictures, for the sample grids."""
    source: Any = chain.source("validation")
    return stack_pixels([source[index] for index in range(min(16, len(source)))])


def _drawing(
    chain: Chain, codec: DocumentCodec, pictured: Sequence[str]
) -> Callable[[nn.Module, int], Tensor] | None:
    """What draws the LM's sample grid: the first validation captions of the first source with pictures, with
    the pipeline's default sampling; None where the tokenizer has no pixels to show."""
    if not pictured or not chain.tokenizer.draws_pixels:
        return None
    from lexel.document import Image, Text

    examples = _first(chain.codes("validation", pictured[0]), 64)
    captions = [example.captions[0] for example in examples if example.captions]
    if not captions:
        return None

    def draw(network: Any, count: int) -> Tensor:
        from lexel.sample.pipeline import Pipeline

        device = next(network.parameters()).device
        pipeline = Pipeline(chain.tokenizer.to(device), network, codec)
        documents: list[Any] = [[Text(caption), Image.blank()] for caption in captions[:count]]
        drawn: Any = pipeline.generate(
            documents, seed=0, sampling=sampling_of(chain), decoding="plain"
        ).documents
        return torch.stack([document[-1].pixels for document in drawn])[None]

    return draw


def _first(dataset: Any, count: int) -> list[Any]:
    return [dataset[index] for index in range(min(count, len(dataset)))]


def sampling_of(chain: Chain) -> Mapping[str, Any]:
    """The run's sampling settings over those of the bundle it starts from, or the pipeline's defaults."""
    from lexel.sample.logits import SamplingConfig
    from lexel.sample.pipeline import DEFAULT_SAMPLING
    from lexel.train.start import bundle_sampling

    given = chain.run.evaluation.sampling
    further = dict.fromkeys(chain.run.any_to_any.modalities, SamplingConfig(temperature=0.0))
    defaults = {**DEFAULT_SAMPLING, **further, **bundle_sampling(chain.run.bundle)}
    if unknown := sorted(set(given) - set(defaults)):
        raise LexelError(f"evaluation.sampling knows {', '.join(defaults)}, got {', '.join(unknown)}.")
    return {
        name: decode_config(SamplingConfig, {**asdict(default), **given.get(name, {})})
        for name, default in defaults.items()
    }
