"""Bad input in training: one sentence that names the step, the source and the examples; the last good
checkpoint stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import resolved, train
from torch import Tensor, nn
from torch.utils.data import Dataset
from training_fakes import Toy, ToyConfig, ToyData, ToyModule, toy_stage

from lexel.data.documents import DocumentDataset
from lexel.data.mixed import MixedDataset
from lexel.data.sampler import Draw
from lexel.errors import LexelError
from lexel.sample.pipeline import Pipeline
from lexel.train.batches import Batches
from lexel.train.chain import Chain
from lexel.train.fit import fit
from lexel.train.settings import LMStage, LoggerSettings, Share, TrainerSettings
from lexel.train.sources import Sources
from lexel.train.start import Start


class Poisoned(ToyData):
    """One row is not a number."""

    def __init__(self, row: int) -> None:
        super().__init__(10)
        self.rows[row] = float("nan")

    def name(self, draw: Draw) -> str:
        return f"picture-{draw.index}.png"


class Breaking(ToyModule):
    """Its loss, or its gradient, is NaN in the step after `after`."""

    after = 7
    gradient_only = False

    def compute(self, network: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().compute(network, batch)
        if network is not self.network or self.step != self.after:
            return loss, metrics
        # The root's slope at zero is infinite: the loss stays finite, the weights do not.
        return (loss + (0 * loss).sqrt() if self.gradient_only else loss * float("nan")), metrics


def _train(folder: Path, module: ToyModule, data: Dataset[Any]) -> None:
    batches = Batches(data, ToyData(9), torch.stack, module.stage, seed=5)
    fit("toy", module, batches, folder, TrainerSettings(), LoggerSettings())


def _module(cls: type[ToyModule] = ToyModule, **changes: Any) -> Any:
    torch.manual_seed(0)
    return cls(Toy(ToyConfig()), toy_stage(**changes), seed=5)


def _checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def _is_whole(checkpoint: dict[str, Any]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in checkpoint["state_dict"].values())


def test_a_poisoned_batch_stops_the_run_and_is_named(tmp_path: Path) -> None:
    data = MixedDataset({"good": ToyData(), "bad": Poisoned(3)}, {"good": 1.0, "bad": 0.02}, seed=1)
    with pytest.raises(
        LexelError, match=r"toy: the loss is not finite at step \d+ .*bad: picture-3"
    ) as error:
        _train(tmp_path, _module(steps=400, ema=0.0, validate_every=0, sample_every=0), data)
    checkpoint = _checkpoint(tmp_path)
    assert _is_whole(checkpoint)
    assert str(tmp_path / "checkpoints" / "last.ckpt") in str(error.value)
    told = json.loads((tmp_path / "not_finite.json").read_text())
    assert "bad: picture-3.png" in told["examples"]
    assert len(told["examples"]) == 4
    step = int(str(error.value).split("step ")[1].split()[0])
    assert checkpoint["lexel"]["consumed"] // 2 <= step - 1


def test_a_network_that_breaks_keeps_the_checkpoint_before_it(tmp_path: Path) -> None:
    with pytest.raises(LexelError, match=r"not finite at step 8 \(a batch of 4 examples: example \d+, "):
        _train(tmp_path, _module(Breaking), ToyData())
    assert _checkpoint(tmp_path)["lexel"]["consumed"] == 10  # five steps of two batches
    assert _is_whole(_checkpoint(tmp_path))
    healed = _module()
    _train(tmp_path, healed, ToyData())
    never = _module()
    _train(tmp_path / "never", never, ToyData())
    assert all(map(torch.equal, healed.state_dict().values(), never.state_dict().values()))


def test_broken_weights_do_not_replace_a_checkpoint(tmp_path: Path) -> None:
    module = _module(Breaking, clip=0.0)
    module.after, module.gradient_only = 9, True  # the checkpoint after ten steps would hold NaN
    with pytest.raises(LexelError, match=r"the weights are not finite after step 10; the checkpoint before"):
        _train(tmp_path, module, ToyData())
    assert _checkpoint(tmp_path)["lexel"]["consumed"] == 10
    assert _is_whole(_checkpoint(tmp_path))


def test_a_run_that_breaks_at_once_says_that_nothing_is_kept(tmp_path: Path) -> None:
    module = _module(Breaking)
    module.after = 0
    with pytest.raises(LexelError, match=r"at step 1 .*there is no checkpoint yet"):
        _train(tmp_path, module, ToyData())


# Sources


def _chain(*overrides: str) -> Chain:
    return Chain(resolved("task=lm", "data=shapes", *overrides))


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ({"data": Share(weight=0.0)}, "are all zero"),
        ({"data": Share(weight=-1.0)}, "must be >= 0"),
        ({"words": Share()}, "no data source 'words'; the run has data: add sources.words"),
        ({"data": Share(pictures=0)}, "sources.data.pictures must be at least 1"),
        ({"data": Share(supervise="first")}, "must be last or all, got 'first'"),
        (
            {"data": Share(mixture={"speech_to_text": 1.0})},
            "mixture of 'data' names 'speech_to_text'; it knows",
        ),
        ({"data": Share(mixture={"text_to_image": 0.0, "image_to_text": 0.0})}, "not all zero"),
    ],
)
def test_sources_that_make_no_sense_are_refused(shares: dict[str, Share], sentence: str) -> None:
    with pytest.raises((LexelError, ValueError), match=sentence):
        Sources(_chain(), LMStage(sources=shares))


def test_a_text_source_has_no_pictures_to_interleave(tmp_path: Path) -> None:
    chain = _chain("+data@sources.words=text", f"sources.words.root={tmp_path}")
    with pytest.raises(LexelError, match=r"sources\.words\.pictures needs pictures"):
        Sources(chain, LMStage(sources={"words": Share(pictures=2)}))


def test_an_empty_source_is_named(tmp_path: Path) -> None:
    class Empty:
        def build(self, split: str) -> list[Any]:
            return []

    chain = _chain()
    chain.run.sources = {"nothing": Empty()}
    with pytest.raises(LexelError, match=r"'nothing' is empty: its train split has no example"):
        chain.source("train", "nothing")


def test_an_unknown_modality_is_named(tiny_pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="the data are 'speech' codes, the vocabulary has text, image"):
        DocumentDataset([], tiny_pipeline.codec, modality="speech")


def test_unknown_options_of_sources_are_named() -> None:
    with pytest.raises(ValueError, match=r"sources\.data has no option 'wieght'; it has source, weight"):
        resolved("task=lm", "+stages.lm.sources={data:{wieght:1}}")
    with pytest.raises(ValueError, match=r"sources\.data\.weight must be a number, got 'much'"):
        resolved("task=lm", "+stages.lm.sources.data.weight=much")


# What does not fit together


def test_a_backbone_and_a_vocabulary_that_do_not_fit_are_named(tiny_pipeline: Pipeline) -> None:
    from lexel.models.causal_lm import CausalLMConfig

    codec, layout = tiny_pipeline.codec, tiny_pipeline.tokenizer.layout
    small = CausalLMConfig(vocab_size=codec.vocabulary.size - 1, dim=8, layers=1, heads=1).build()
    with pytest.raises(LexelError, match=f"knows {codec.vocabulary.size - 1} ids, but its vocabulary has"):
        Start(Path("here"), codec, small).network(layout, (10, "a text"))
    other = replace(layout, codebook_sizes=(99,))
    with pytest.raises(LexelError, match="4x4 codes out of 16, the tokenizer writes 4x4 codes out of 99"):
        Start(Path("here"), codec, tiny_pipeline.lm).network(other, (10, "a text"))


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LexelError, match=r"is not a bundle"):
        train("experiment=finetune", f"bundle={tmp_path}", f"output={tmp_path}/out")
    with pytest.raises(LexelError, match=r"nowhere.* does not exist"):
        train("experiment=finetune", "bundle=./nowhere", f"output={tmp_path}/out")
