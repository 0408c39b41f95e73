"""Stable unCLIP as a detokenizer of image embeddings, on a tiny pipeline in diffusers' format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PictureFile
from torch import Tensor

from lexel.cli import main
from lexel.errors import LexelError
from lexel.models import detokenizers
from lexel.models.detokenizers.unclip import UnClipConfig, UnClipDetokenizer
from lexel.nn.eva_vit import EvaConfig
from lexel.tokenizers.seed import SeedConfig, vq
from lexel.types import Codes

F, SIDE = 6, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What diffusers' `save_pretrained` writes for a stable unCLIP pipeline."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        StableUnCLIPImg2ImgPipeline,
        UNet2DConditionModel,
    )
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    path = tmp_path_factory.mktemp("unclip")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>"]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    normalizer = StableUnCLIPImageNormalizer(F)
    with torch.no_grad():
        normalizer.mean += torch.randn(1, F)
        normalizer.std += torch.rand(1, F)
    StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(crop_size=8, size=8),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(**sizes, projection_dim=F, image_size=8, patch_size=4)
        ),
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=5),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                **sizes, vocab_size=3, max_position_embeddings=5,
                bos_token_id=0, eos_token_id=1, pad_token_id=1,
            )
        ),
        unet=UNet2DConditionModel(
            sample_size=SIDE // 2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(8, 16),
            layers_per_block=1, attention_head_dim=(2, 4), norm_num_groups=4, cross_attention_dim=8,
            class_embed_type="projection", projection_class_embeddings_input_dim=2 * F,
            use_linear_projection=True,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
            clip_sample=False, steps_offset=1,
        ),
        vae=AutoencoderKL(
            block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, sample_size=SIDE,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
    ).save_pretrained(path / "pipeline")  # fmt: skip
    return path / "pipeline"


@pytest.fixture(scope="module")
def model(folder: Path) -> UnClipDetokenizer:
    loaded = detokenizers.load_published("unclip-sd-2-1", folder)
    assert isinstance(loaded, UnClipDetokenizer)
    return loaded


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(count: int = 3) -> Tensor:
    return torch.randn(count, 1, F, generator=seeded(5))


def test_pictures_are_those_of_the_pipeline(folder: Path, model: UnClipDetokenizer) -> None:
    from diffusers import StableUnCLIPImg2ImgPipeline

    pipeline: Any = StableUnCLIPImg2ImgPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(3, *model.noise_shape, generator=seeded(1))
    feature_noise = torch.randn(3, F, generator=seeded(2))  # what the pipeline draws first
    expected = pipeline(
        prompt=[""] * 3, image_embeds=features()[:, 0], num_inference_steps=4, guidance_scale=10.0,
        noise_level=0, latents=noise, generator=seeded(2), output_type="pt",
    ).images  # fmt: skip
    ours = model.decode(features(), steps=4, noise=noise, feature_noise=feature_noise)
    assert ours.shape == (3, 3, SIDE, SIDE)
    torch.testing.assert_close((ours + 1) / 2, expected)
    assert model.image_size == (SIDE, SIDE)
    assert (model.config.steps, model.config.guidance, model.config.level) == (20, 10.0, 0)


def test_equal_seeds_give_equal_pictures_and_rows_stand_alone(model: UnClipDetokenizer) -> None:
    first = model.decode(features(), steps=2, generator=seeded(3))
    assert torch.equal(first, model.decode(features(), steps=2, generator=seeded(3)))
    assert not torch.equal(first, model.decode(features(), steps=2, generator=seeded(4)))
    noise = torch.randn(3, *model.noise_shape, generator=seeded(1))
    together = model.decode(features(), steps=2, noise=noise)
    alone = model.decode(features()[1:2], steps=2, noise=noise[1:2])
    torch.testing.assert_close(alone, together[1:2], atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], model.decode(features().flip(0), steps=2, noise=noise)[0])


def test_guidance_goes_away_from_zeros_or_from_another_embedding(model: UnClipDetokenizer) -> None:
    noise = torch.randn(3, *model.noise_shape, generator=seeded(1))
    plain, guided = (model.decode(features(), steps=2, noise=noise, guidance=g) for g in (1.0, 4.0))
    negative = torch.randn(1, 1, F, generator=seeded(6))
    away = model.decode(features(), steps=2, noise=noise, guidance=4.0, negative_features=negative)
    assert not torch.allclose(plain, guided)
    assert not torch.allclose(guided, away)
    # Away from itself there is nowhere to go.
    same = model.decode(features(), steps=2, noise=noise, guidance=4.0, negative_features=features())
    torch.testing.assert_close(same, plain, atol=1e-5, rtol=0)


def test_it_draws_seeds_codes(folder: Path, tmp_path: Path, capsys) -> None:
    """`lexel reconstruct` with both networks in Lexel's format or the pipeline's."""
    torch.manual_seed(0)
    tokenizer = SeedConfig(
        vit=EvaConfig(image_size=16, patch=8, width=16, layers=1, heads=2), queries=4, width=24, layers=1,
        heads=2, hidden=32, decode_layers=1, block_heads=2, token_size=4, features=F, quantizer=vq(16),
    ).build()  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "seed")
    PictureFile.new("RGB", (32, 16), "red").save(tmp_path / "photo.png")
    arguments = ["reconstruct", str(tmp_path / "photo.png"), "--tokenizer", str(tmp_path / "seed")]
    assert main([*arguments, "--out", str(tmp_path / "no.png")]) != 0
    assert "detokenizer" in capsys.readouterr().err
    arguments += ["--detokenizer", "unclip-sd-2-1", "--detokenizer-checkpoint", str(folder), "--steps", "2"]
    assert main([*arguments, "--out", str(tmp_path / "drawn.png")]) == 0, capsys.readouterr().err
    assert (tmp_path / "drawn.png").is_file()


def test_lexel_format_round_trip(model: UnClipDetokenizer, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = detokenizers.from_pretrained(tmp_path)
    assert again.fingerprint() == model.fingerprint()
    drawn = [one.decode(features(1), steps=2, generator=seeded()) for one in (model, again)]
    assert torch.equal(*drawn)


def test_bad_input_is_named(model: UnClipDetokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"condition must be features \[b, 1, 6\], got \[3, 1, 7\]"):
        model.decode(torch.zeros(3, 1, 7))
    with pytest.raises(ValueError, match="got Codes"):
        model.decode(Codes(torch.zeros(1, 32, 1, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"noise must be \[3, 4, 8, 8\]"):
        model.decode(features(), noise=torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"scheduler\.kind must be one of .*, got 'os'"):
        UnClipConfig({}, {}, {"kind": "os"}, {})
    with pytest.raises(LexelError, match="no folder of a stable unCLIP pipeline"):
        detokenizers.load_published("unclip-sd-2-1", tmp_path)
    with pytest.raises(LexelError, match="does not exist"):
        detokenizers.load_published("unclip-sd-2-1", tmp_path / "none")
    with pytest.raises(LexelError, match="towers that drawing does not need"):
        detokenizers.export_published(model, "unclip-sd-2-1", tmp_path)


def test_without_the_hub_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr("lexel.hub.snapshot_download", offline)
    with pytest.raises(
        LexelError, match="stable-diffusion-2-1-unclip is neither a local folder nor reachable"
    ):
        detokenizers.load_published("unclip-sd-2-1")


def test_the_row_states_what_it_is() -> None:
    system, row = detokenizers.find_published("unclip-sd-2-1")
    with torch.device("meta"):
        built = system.config(row.arguments).build()
    assert sum(p.numel() for p in built.parameters()) == row.parameters
    assert built.image_size == (768, 768)
    assert built.noise_shape == (4, 96, 96)
    assert built.config.features == 1024
