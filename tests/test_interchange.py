"""The interchange grid: every tokenizer × language model × detokenizer that `lexel-train` makes at debug size
is one bundle that draws and describes.

Each tokenizer is trained once, each language model and detokenizer once per tokenizer; then every triple is
put together, saved, loaded and used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from runs import resolved, train
from test_pretrained import backbone

from lexel.document import Image, Text
from lexel.sample.pipeline import Pipeline
from lexel.tokenizers import from_pretrained as load_tokenizer
from lexel.train.chain import Chain
from lexel.train.finish import assemble

TOKENIZERS = {
    "vq": ["quantizer=vq"],
    "residual": ["tokenizer=vq", "quantizer=residual"],
    "factorized": ["tokenizer.channels=16", "tokenizer.z_channels=16"],
    "flexible": ["tokenizer.width=32", "tokenizer.layers=1", "tokenizer.latents=8", "quantizer=fsq"],
    "bae": ["quantizer=bernoulli", "tokenizer.channels=16"],
    "ibq": ["quantizer=ibq"],
    "open_magvit2": ["quantizer=sign", "tokenizer.channels=16"],
    "maskgit_vqgan": ["quantizer=learned", "quantizer.cosine=false"],
    "emu3": [],
    "flextok": ["objective/tokenizer=flow", "tokenizer.registers=8", "tokenizer.steps=2"],
    "tokenflow": [
        "quantizer=learned",
        "objective/tokenizer=tokenflow",
        "objective.tokenizer.adversarial=0",
        "objective.tokenizer.perceptual=0",
    ],
    "seed": ["quantizer=learned", "objective/tokenizer=seed", "objective.tokenizer.teacher={teacher}"],
    "lavit": ["quantizer=vq", "objective/tokenizer=lavit"],
}
"""Name of the tokenizer → its options; of the last two pixels come from a detokenizer only."""

LMS = {
    "native": ["lm=debug"],
    "interleaved": ["lm=debug", "stages.lm.pattern=interleaved"],
    "pretrained": ["lm=pretrained", "lm.source={source}", "lm.max_length=512"],
    "wrapped": [
        "lm=pretrained",
        "lm.source={source}",
        "lm.max_length=512",
        "lm.native=false",
        "stages.lm.pattern=interleaved",
    ],
}
SMALL_DIT = ["detokenizer.channels=[32]", "detokenizer.head_dim=16", "detokenizer.layers=1"]
DETOKENIZERS = {
    "none": [],
    "flow": ["detokenizer=flow", "detokenizer.channels=[8,16]"],
    "diffusion": ["detokenizer=diffusion", "detokenizer.channels=[8,16]"],
    "dit": ["detokenizer=dit", *SMALL_DIT],
    "joint": ["detokenizer=joint", *SMALL_DIT],
}

STEPS = {
    "steps": 2,
    "batch_size": 2,
    "warmup": 1,
    "validate_every": 0,
    "sample_every": 0,
    "checkpoint_every": 0,
}
SMALL = [
    "threads=1",
    "memory_mb=8",
    "codes.count=8",
    "codes.validation_count=4",
    "codes.workers=0",
    "stages.lm.captions_for_vocabulary=32",
    *(
        f"stages.{stage}.{key}={value}"
        for stage in ("tokenizer", "lm", "detokenizer")
        for key, value in STEPS.items()
    ),
]


def teacher(folder: Path) -> Path:
    """A tiny CLIP with random weights."""
    sides = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    picture = {**sides, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=sides, vision_config=picture, projection_dim=64)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def grid_of(name: str, source: Path, folder: Path) -> dict[str, list[str]]:
    """Train one tokenizer and all that reads its codes; the overrides that name the parts of every triple."""
    options = [option.format(teacher=teacher(folder / "clip")) for option in TOKENIZERS[name]]
    own = options if any(o.startswith("tokenizer=") for o in options) else [f"tokenizer={name}", *options]
    train("task=tokenizer", f"output={folder / 'tokenizer'}", *own, *SMALL)
    tokenizer = f"parts.tokenizer={folder / 'tokenizer' / 'tokenizer'}"
    lms, detokenizers = {}, {}
    for lm, more in LMS.items():
        more = [option.format(source=source) for option in more]
        train("task=lm", f"output={folder / lm}", tokenizer, *more, *SMALL)
        lms[lm] = [f"parts.lm={folder / lm / 'lm'}"]
    draws = load_tokenizer(folder / "tokenizer" / "tokenizer").draws_pixels
    drawn_by = DETOKENIZERS if draws else {**DETOKENIZERS, "features": ["detokenizer=features", *SMALL_DIT]}
    for detokenizer, more in drawn_by.items():
        if detokenizer == "none" and not draws:
            continue
        detokenizers[detokenizer] = []
        if more:
            train("task=detokenizer", f"output={folder / detokenizer}", tokenizer, *more, *SMALL)
            detokenizers[detokenizer] = [f"parts.detokenizer={folder / detokenizer / 'detokenizer'}"]
    return {
        f"{lm} {detokenizer}": [tokenizer, *lms[lm], *detokenizers[detokenizer]]
        for lm in lms
        for detokenizer in detokenizers
    }


def works(pipe: Pipeline, detokenizer: bool) -> None:
    """One picture of a text and one text of a picture."""
    document = [Text("a red circle"), Image.blank()]
    options: dict[str, Any] = {"steps": 2, "detokenizer": True} if detokenizer else {}
    output = pipe.generate([document], seed=0, decoding="plain", **options)
    drawn: Any = output.documents[0][-1]
    assert drawn.pixels.shape == (3, *pipe.tokenizer.image_size)
    assert drawn.pixels.isfinite().all()
    picture = Image(pixels=drawn.pixels.clamp(-1, 1))
    described: Any = pipe([picture, Text.blank()], seed=0, text_limit=4)
    assert isinstance(described.documents[0][-1].text, str)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_triple_is_a_bundle(name: str, tmp_path: Path) -> None:
    source = backbone(tmp_path / "text")
    for triple, parts in grid_of(name, source, tmp_path).items():
        chain = Chain(resolved("task=evaluate", f"output={tmp_path / 'whole'}", *parts))
        folder = tmp_path / "bundles" / triple
        assemble(chain).save_pretrained(folder)
        works(Pipeline.from_pretrained(folder), detokenizer="none" not in triple)
