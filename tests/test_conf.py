"""Every YAML that ships composes, has only known keys, and builds what it points at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

import lexel.train.cli  # noqa: F401  (registers the schema)
from lexel.errors import LexelError
from lexel.train.cli import NEEDED, resolve
from lexel.train.codec import build_codec, complete_lm
from lexel.train.detokenizers import complete_detokenizer
from lexel.train.settings import STAGES, LMStage, Run

CONF = Path(str(resources.files("lexel.conf")))
CHOICES = [
    (str(path.parent.relative_to(CONF)), path.stem)
    for path in sorted(CONF.rglob("*.yaml"))
    if path.parent != CONF and "hydra" not in path.parts
]


@contextmanager
def _conf() -> Iterator[None]:
    with initialize_config_module("lexel.conf", version_base="1.3"):
        yield


def _compose(*overrides: str) -> DictConfig:
    with _conf():
        return compose("train", overrides=list(overrides))


def _overrides(group: str, choice: str, folder: Path) -> list[str]:
    composed, needed = _compose(f"{group}={choice}"), []
    if OmegaConf.is_missing(composed.data, "root"):
        needed.append(f"data.root={folder}")
    if OmegaConf.is_missing(composed.stages.detokenizer, "distil"):
        needed.append(f"stages.detokenizer.distil={folder}")
    return [f"{group}={choice}", *needed]


def _resolve(*overrides: str) -> Run:
    return resolve(_compose(*overrides))


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda x: x)
def test_every_choice_of_every_group_composes_and_instantiates(
    group: str, choice: str, tmp_path: Path
) -> None:
    overrides = _overrides(group, choice, tmp_path)
    if (group, choice) == ("data", "text"):
        overrides.append("task=lm")
    run = _resolve(*overrides)
    for name in {name for stage in run.task.stages for name in NEEDED[stage]}:
        assert getattr(run, name) is not None


def _with_defaults(group: str, choice: str) -> Any:
    """A file with those of its group that its defaults name below it."""
    node = OmegaConf.load(CONF / group / f"{choice}.yaml")
    below = [_with_defaults(group, name) for name in node.pop("defaults", []) if name != "_self_"]
    return OmegaConf.merge(*below, node)


FILLED_IN = {"vocab_size", "codebook_sizes", "code_offsets", "pad_id", "grid", "image_size", "length"}
FILLED_IN |= {"target_dim", "embedding", "text_size", "scales", "flexible", "feature_dim"}
"""Fields of network configs that the run fills in from the vocabulary and the tokenizer."""

BACKBONES = {"activation", "qkv_bias", "out_bias", "ffn_bias", "norm_offset", "sandwich_norm", "embed_scale"}
BACKBONES |= {"attention_scale", "attention_softcap", "logit_softcap", "windows", "rope_scaling", "routed"}
"""Fields of language models that tell the form of a pretrained text model (`lm=pretrained` sets them)."""


@pytest.mark.parametrize(
    ("group", "choice"), [c for c in CHOICES if c[0] in ("data", "tokenizer", "lm", "drafter", "detokenizer")]
)
def test_every_field_of_a_config_can_be_overridden(group: str, choice: str) -> None:
    node = _with_defaults(group, choice)
    fields = {f.name for f in dataclasses.fields(get_class(node["_target_"]))}
    assert fields - FILLED_IN - BACKBONES <= set(node) - {"_target_"}, "missing in the YAML"
    assert set(node) - fields <= {"_target_", "_partial_"}, "not a field"


@pytest.mark.parametrize("task", [choice for group, choice in CHOICES if group == "task"])
def test_every_task_names_known_stages(task: str) -> None:
    assert set(_resolve(f"task={task}").task.stages) <= set(STAGES)


NO_PICTURES = {"vq16", "larp"}
"""Tokenizers that are too large for a test, or have no codes of single pictures."""


@pytest.mark.parametrize("quantizer", [choice for group, choice in CHOICES if group == "quantizer"])
@pytest.mark.parametrize("tokenizer", [c for g, c in CHOICES if g == "tokenizer" and c not in NO_PICTURES])
def test_networks_of_every_tokenizer_and_quantizer_fit_together(tokenizer: str, quantizer: str) -> None:
    overrides = [f"tokenizer={tokenizer}", f"quantizer={quantizer}", "lm=debug", "task=chain_with_drafter"]
    if (tokenizer, quantizer) == ("factorized", "residual"):
        with pytest.raises(LexelError, match="one codebook"):
            _resolve(*overrides)
        return
    run = _resolve(*overrides)
    network = run.tokenizer.build().eval()
    pixels = torch.zeros(1, 3, *run.data.image_size)
    codes = network.encode(pixels)
    codec = build_codec(LMStage(), ["a red circle"], network.layout)
    assert complete_lm(run.lm, codec).build().config.vocab_size == codec.vocabulary.size
    assert complete_lm(run.drafter, codec).columns == codec.columns
    detokenizer = complete_detokenizer(run.detokenizer, network).build()
    assert detokenizer.decode(codes, steps=1).shape == pixels.shape
    if network.draws_pixels:
        assert network.decode(codes).shape == pixels.shape


def test_a_published_size_tokenizer_has_llamagens_parameters() -> None:
    config = _resolve(
        "task=tokenizer", "tokenizer=vq16", "data.size=256", "quantizer.codebook_size=16384"
    ).tokenizer
    with torch.device("meta"):
        count = sum(p.numel() for p in config.build().parameters())
    assert 70e6 < count < 73e6


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sed=3", "sed"),
        ("seed=abc", "seed"),
        ("stages.lm.step=3", "step"),
        ("stages.lm.steps=many", "steps"),
        ("tokenizer.dmi=3", "dmi"),
        ("data=flowers", "flowers"),
        ("lm=huge", "huge"),
    ],
)
def test_typos_and_wrong_types_are_refused_by_name(override: str, named: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        _compose(override)
    assert named in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stages.lm.steps=0", "stages.lm.steps must be at least 1"),
        ("stages.tokenizer.ema=1.5", "stages.tokenizer.ema"),
        ("stages.lm.precision=fp8", "stages.lm.precision"),
        ("task.stages=[tokeniser]", "tokeniser"),
        ("trainer.devices=2", "trainer=ddp"),
        ("trainer.strategy=zero", "trainer.strategy"),
        ("quantizer.codebook_size=1", "codebook_size must be at least 2"),
        ("data.size=7", "32..256"),
        ("examples=0", "examples"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises((LexelError, ValueError), match="(?s)" + sentence.replace(".", r"\.")):
        _resolve(override)


def test_a_users_own_folder_of_configs_is_found(tmp_path: Path) -> None:
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "mine.yaml").write_text("defaults: [debug]\ndim: 48\nheads: 3\n")
    run = _resolve(f"hydra.searchpath=[file://{tmp_path}]", "lm=mine", "task=lm")
    assert (run.lm.keywords["dim"], run.lm.keywords["layers"]) == (48, 2)


def test_a_typo_in_a_users_own_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "mine.yaml").write_text("defaults: [debug]\ndmi: 48\n")
    with pytest.raises(LexelError, match=r"'lm'.*'dmi'"):
        _resolve(f"hydra.searchpath=[file://{tmp_path}]", "lm=mine", "task=lm")


def test_nothing_below_the_entry_point_is_a_hydra_object() -> None:
    run = _resolve("experiment=quickstart")

    def check(value: Any) -> None:
        assert not type(value).__module__.startswith("omegaconf")
        if isinstance(value, partial):
            check(value.keywords)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)
        for item in vars(value).values() if hasattr(value, "__dataclass_fields__") else ():
            check(item)

    check(run)


def test_stages_share_one_optimizer_choice_and_can_differ() -> None:
    run = _resolve("optimizer=sgd", "stages.lm.optimizer={_target_: torch.optim.Adam, _partial_: true}")
    assert run.stages.tokenizer.optimizer.func is torch.optim.SGD
    assert run.stages.lm.optimizer.func is torch.optim.Adam
