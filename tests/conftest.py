"""One thread per process, nothing leaves the machine, and a tiny random bundle for whoever needs one."""

from __future__ import annotations

import os
import tempfile

os.environ.update(
    LEXEL_CACHE=tempfile.mkdtemp(),
    OMP_NUM_THREADS="1",
    WANDB_MODE="offline",
    HF_HUB_OFFLINE="1",
    GRADIO_ANALYTICS_ENABLED="False",
)

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from lexel.sample.pipeline import Pipeline

torch.set_num_threads(1)


def build_tiny_pipeline(family: str = "vq", *, seed: int = 0) -> Pipeline:
    """Random weights, 32x32 pictures. `vq`: 4x4 codes out of 16, a two-layer model with a nested half width,
    detokenizer and drafter; `flexible`: up to 6 codes; `factorized`: 4x4 positions of 2 codes."""
    from lexel.data.text_tokenizer import train_text_tokenizer
    from lexel.document import DocumentCodec
    from lexel.models.causal_lm import CausalLMConfig
    from lexel.models.detokenizers.diffusion import DiffusionDetokenizerConfig
    from lexel.sample.bundle import DecodingConfig
    from lexel.sample.pipeline import Pipeline
    from lexel.vocabulary import Vocabulary

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _tiny_tokenizer_config(family).build()
        text = train_text_tokenizer(["a red circle", "a blue square left of a red ring"], 280)
        vocabulary = Vocabulary.build(len(text), {"image": tokenizer.codebook_sizes})
        codec = DocumentCodec(vocabulary, text, {"image": tokenizer.layout})
        sizes: dict[str, Any] = {"vocab_size": vocabulary.size, "dim": 32, "heads": 2, "max_length": 96}
        if codec.columns > 1:
            offsets = [int(vocabulary.block("image", j)[0]) for j in range(codec.columns)]
            sizes |= {"head": "parallel", "codebook_sizes": tokenizer.codebook_sizes, "code_offsets": offsets}
            sizes |= {"pad_id": vocabulary.special["pad"]}
        parts: dict[str, Any] = {}
        if family == "vq":
            parts["drafter"] = CausalLMConfig(**sizes, layers=1).build().eval()
            parts["detokenizer"] = DiffusionDetokenizerConfig(
                (16,), grid=(4, 4), patch=4, channels=(8, 16), condition_dim=16
            ).build().eval()  # fmt: skip
        lm = CausalLMConfig(**sizes, layers=2, ffn_widths=(0.5, 1.0)).build()
    return Pipeline(tokenizer.eval(), lm.eval(), codec, decoding=DecodingConfig("plain"), **parts)


def _tiny_tokenizer_config(family: str) -> Any:
    from lexel.tokenizers.factorized import FactorizedTokenizerConfig
    from lexel.tokenizers.quantizers import QuantizerConfig
    from lexel.tokenizers.titok import TiTokConfig
    from lexel.tokenizers.vq import VQTokenizerConfig

    small = QuantizerConfig(codebook_size=16)
    if family == "flexible":
        return TiTokConfig(
            image_size=32,
            patch=8,
            latents=6,
            width=32,
            layers=1,
            heads=2,
            token_size=4,
            quantizer=small,
            tail_drop="batch",
        )
    raster: dict[str, Any] = {
        "image_size": 32, "channels": 8, "channel_mult": (1, 1), "res_blocks": 1, "z_channels": 8,
        "embed_dim": 4, "attention": False, "norm_groups": 4, "stem": 4, "quantizer": small,
    }  # fmt: skip
    if family == "factorized":
        return FactorizedTokenizerConfig(**raster, branches=2, adapter_layers=0)
    return VQTokenizerConfig(**raster, encoder="patch", encoder_channels=16)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond `room` bytes within the block, as if the disk were full."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def tiny_pipeline() -> Pipeline:
    """A random pipeline with every part; do not change it."""
    return build_tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_bundle(tiny_pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `tiny_pipeline`; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return folder
