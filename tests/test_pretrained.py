"""A text model of transformers becomes a model over text and pictures, in one run of `lexel-train`."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from runs import train

from lexel.data.text_tokenizer import train_text_tokenizer
from lexel.document import Image, Text
from lexel.errors import LexelError
from lexel.models import load_lm
from lexel.models.backbones import save_backbone
from lexel.models.causal_lm import CausalLM
from lexel.models.pretrained import PretrainedConfig
from lexel.models.wrapped_lm import WrappedLM
from lexel.sample.bundle import find_bundle
from lexel.sample.pipeline import Pipeline
from lexel.tokenizers import from_pretrained as load_tokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.train.codec import build_codec, complete_lm, load_codec, reading
from lexel.train.settings import LMStage
from lexel.types import TokenBatch

ROWS = 320
"""Of the backbone's tables: more than its text tokenizer has ids."""

SQUARE = CodeLayout((4,), grid=(2, 2))
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32},
}


def backbone(folder: Path, kind: str = "qwen2") -> Path:
    """A tiny text model and its text tokenizer, as transformers saves them."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](
        vocab_size=ROWS,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **KINDS[kind],
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    captions = [f"a {size} {colour} {shape}" for size in "12" for colour in "rgb" for shape in "xyz"]
    train_text_tokenizer(captions * 5, 280).save_pretrained(folder)
    return folder


def ids_of(source: Path) -> int:
    return len(transformers.AutoTokenizer.from_pretrained(source))


def config_of(source: Path, layout: CodeLayout = SQUARE, **settings: Any) -> PretrainedConfig:
    """What a run makes of ``lm=pretrained`` and these settings."""
    config = partial(PretrainedConfig, **{"source": str(source), "max_length": 256, **settings})
    completed = complete_lm(config, build_codec(reading(LMStage(), config), (), layout))
    assert isinstance(completed, PretrainedConfig)
    return completed


def run(source: Path, output: Path, *more: str) -> None:
    """Three steps on shapes, with the codes of the shipped tokenizer."""
    train(
        f"parts.tokenizer={find_bundle(None) / 'tokenizer'}",
        "lm=pretrained",
        f"lm.source={source}",
        "lm.init=mean_covariance",
        "lm.max_length=200",
        "stages.lm.steps=3",
        "stages.lm.batch_size=4",
        "stages.lm.validation_batches=1",
        "stages.lm.sample_every=0",
        "codes.count=16",
        "codes.validation_count=4",
        "codes.workers=0",
        "evaluation.prompts=1",
        f"output={output}",
        *more,
    )


def draws(pipe: Pipeline) -> None:
    document = [Text("a red circle"), Image.blank()]
    drawn: Any = pipe.generate([document], seed=0, decoding="plain").documents[0]
    assert drawn[-1].pixels.shape == (3, *pipe.tokenizer.image_size)


def test_a_run_from_a_text_model(tmp_path: Path):
    source = backbone(tmp_path / "text")
    run(source, tmp_path / "run", "task.stages=[lm]")
    folder = tmp_path / "run" / "lm"
    tokenizer = load_tokenizer(find_bundle(None) / "tokenizer")
    made = Pipeline(tokenizer, load_lm(folder), load_codec(folder))
    made.save_pretrained(tmp_path / "bundle")
    pipe = Pipeline.from_pretrained(tmp_path / "bundle")
    vocabulary = pipe.codec.vocabulary
    assert type(pipe.lm) is CausalLM
    assert vocabulary.text_size == ids_of(source)
    assert pipe.lm.config.vocab_size == vocabulary.size > ROWS
    assert pipe.lm.config.pad_id == vocabulary.special["pad"]
    draws(pipe)

    # The trained model opens in transformers again, and its text tokenizer there names every id.
    save_backbone(pipe.lm, tmp_path / "served", vocabulary, pipe.codec.text_tokenizer)
    served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    named = transformers.AutoTokenizer.from_pretrained(tmp_path / "served")
    assert len(named) == vocabulary.size == served.config.vocab_size
    boi, last = vocabulary.begin("image"), vocabulary.size - 1
    assert named.convert_tokens_to_ids([vocabulary.name(boi), vocabulary.name(last)]) == [boi, last]
    assert served.config.eos_token_id == vocabulary.special["eos"]
    ids = torch.randint(vocabulary.size, (1, 12))
    positions = torch.zeros(1, 12, 3, dtype=torch.long)
    positions[..., 0] = torch.arange(12)
    with torch.no_grad():
        found = pipe.lm(TokenBatch(ids, torch.zeros_like(ids), positions)).logits
        torch.testing.assert_close(found, served(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "native"), [("qwen2", "true"), ("qwen2", "false"), ("gpt2", "true")])
def test_a_run_ends_in_a_bundle(kind: str, native: str, tmp_path: Path):
    source = backbone(tmp_path / "text", kind)
    run(source, tmp_path / "run", "task.stages=[lm,evaluate]", f"lm.native={native}")
    pipe = Pipeline.from_pretrained(tmp_path / "run" / "bundle")
    assert pipe.lm.config.vocab_size == pipe.codec.vocabulary.size
    draws(pipe)


@pytest.mark.parametrize("settings", [{}, {"head": "parallel"}, {"head_layers": 2}], ids=str)
def test_several_codes_per_position_get_a_new_head(settings: dict[str, Any], tmp_path: Path):
    lm = config_of(backbone(tmp_path / "text"), CodeLayout((16, 8), grid=(2, 2)), **settings).build()
    assert lm.config.columns == 2
    assert lm.config.head == settings.get("head", "factorized")
    lm.save_pretrained(tmp_path / "lm")
    assert load_lm(tmp_path / "lm").fingerprint() == lm.fingerprint()


def test_what_else_a_text_model_can_get(tmp_path: Path):
    settings = {"routed": True, "future_heads": 2, "bidirectional": ["image"]}
    lm = config_of(backbone(tmp_path / "text"), **settings).build()
    assert lm.config.routed
    assert len(lm.config.bidirectional) == 1
    assert lm.future is not None
    lm.save_pretrained(tmp_path / "lm")
    assert load_lm(tmp_path / "lm").fingerprint() == lm.fingerprint()
    half = config_of(tmp_path / "text", dtype="bfloat16", future_heads=1).build()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_small_vocabulary_takes_the_rows_that_no_token_has(tmp_path: Path):
    source = backbone(tmp_path / "text")
    lm = config_of(source).build()
    assert lm.config.vocab_size == ids_of(source) + 6 + 4 < ROWS
    assert lm.config.pad_id == ids_of(source)


def test_what_does_not_fit_is_said_in_one_sentence(tmp_path: Path):
    source = backbone(tmp_path / "text")
    with pytest.raises(LexelError, match=r"has 512 positions; set lm\.max_length=512 or less"):
        config_of(source, max_length=513).build()
    with pytest.raises(LexelError, match="no room for routed weights"):
        config_of(source, native=False, routed=True).build()
    with pytest.raises(ValueError, match=r"lm\.dtype is float32"):
        config_of(source, dtype="int8")
    other = train_text_tokenizer(["abc abd abe"] * 3, 256)
    other.add_tokens([f"<{n}>" for n in range(100)])
    other.save_pretrained(tmp_path / "other")
    codec = build_codec(LMStage(text_tokenizer=str(tmp_path / "other")), (), SQUARE)
    config = complete_lm(partial(PretrainedConfig, source=str(source), max_length=64), codec)
    with pytest.raises(LexelError, match=r"has \d+ ids, but the backbone's table holds 320: they do not"):
        config.build()


def test_any_language_model_is_opened_by_what_its_config_says(tmp_path: Path):
    assert type(load_lm(find_bundle(None) / "lm")) is CausalLM
    assert type(load_lm(backbone(tmp_path / "qwen2"))) is CausalLM
    assert type(load_lm(backbone(tmp_path / "gpt2", "gpt2"))) is WrappedLM
    yarn = backbone(tmp_path / "yarn")
    config = json.loads((yarn / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    (yarn / "config.json").write_text(json.dumps(config))
    assert type(load_lm(yarn)) is WrappedLM
    seeing = WrappedLM(WrappedLM.from_pretrained(tmp_path / "qwen2").network, [(1, 300)])
    seeing.save_pretrained(tmp_path / "again")
    again = load_lm(tmp_path / "again")
    assert type(again) is WrappedLM
    assert again.config.bidirectional == ((1, 300),)
