"""LaVIT's two conditional U-Nets, from tiny folders in the published layouts."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image as PictureFile
from torch import Tensor

from lexel.cli import main
from lexel.errors import LexelError
from lexel.models import detokenizers
from lexel.models.detokenizers.lavit import SYSTEMS, LaVITDetokenizer
from lexel.nn.eva_vit import EvaConfig
from lexel.sample.detokenize import detokenize
from lexel.tokenizers.lavit import LaVIT, LaVITConfig
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.types import Codes

UNET = {
    "sample_size": 8, "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
LOW = {**UNET, "cross_attention_dim": 24, "attention_head_dim": 4}
HIGH = {
    **UNET, "cross_attention_dim": 32, "attention_head_dim": [2, 4], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 28 + 6 * 8,
}  # fmt: skip
VAE = {
    "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
SCHEDULER = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
ROWS = {"pixel_decoding": "lavit-7b-v2-512", "highres_pixel_decoding": "lavit-7b-v2-1024"}


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A copy of the publishers' repository, as far as its pixel decoders go."""
    root = tmp_path_factory.mktemp("release")
    torch.manual_seed(0)
    for part, unet in (("pixel_decoding", LOW), ("highres_pixel_decoding", HIGH)):
        network = UNet2DConditionModel(**unet)
        network.save_pretrained(root / part / "unet", safe_serialization=False)
        AutoencoderKL(**VAE).save_pretrained(root / part / "vae")
        DDIMScheduler(**SCHEDULER).save_pretrained(root / part / "scheduler")
    torch.save(torch.randn(1, 5, 24), root / "pixel_decoding" / "uncond_embeddings.bin")
    return root


@pytest.fixture(scope="module", params=sorted(ROWS))
def part(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(part: str, release: Path) -> LaVITDetokenizer:
    return detokenizers.load_published(ROWS[part], release)


def features(model: LaVITDetokenizer, count: int = 2, seed: int = 0) -> Tensor:
    """Conditions of nine patches as the tokenizer's `decode_features` makes them."""
    generator = torch.Generator().manual_seed(seed)
    if not model.config.is_pooled:
        return torch.randn(count, 9, 24, generator=generator)
    rows = torch.randn(count, 10, 32, generator=generator)
    rows[:, -1, 28:] = 0
    return rows


def noise(count: int = 2, h: int = 8, w: int = 8) -> Tensor:
    return torch.randn(count, 4, h, w, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def publishers(model: LaVITDetokenizer, condition: Tensor, start: Tensor, steps: int, scale: float) -> Tensor:
    """The sampling loop of the publishers' code, written again; sizes are those of the picture."""
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    h, w = (2 * n for n in start.shape[2:])
    options: dict[str, Any] = {}
    if model.config.is_pooled:
        pooled, states = condition[:, -1, :28], condition[:, :-1]
        states = torch.cat([torch.zeros_like(states), states])
        ids = torch.tensor([[h, w, 0, 0, h, w]]).repeat(2 * len(condition), 1)
        pooled = torch.cat([torch.zeros_like(pooled), pooled])
        options["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    else:
        null = torch.zeros_like(condition)
        null[:, : len(model.null)] = model.null
        mask = torch.ones(condition.shape[:2], dtype=torch.long)
        null_mask = torch.zeros_like(mask)
        null_mask[:, : len(model.null)] = 1
        states = torch.cat([null, condition])
        options["encoder_attention_mask"] = torch.cat([null_mask.bool(), mask.bool()])
    x = start * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([x] * 2), time)
        null_out, given = model.unet(both, time, encoder_hidden_states=states, **options).sample.chunk(2)
        x = scheduler.step(null_out + scale * (given - null_out), time, x).prev_sample
    return model.vae.decode(x / model.vae.config.scaling_factor).sample


def test_pictures_are_the_publishers(model: LaVITDetokenizer) -> None:
    condition, start = features(model), noise()
    ours = model.decode(condition, steps=3, guidance=5.0, noise=start)
    theirs = publishers(model, condition, start, 3, 5.0)
    assert ours.shape == (2, 3, 16, 16)
    assert torch.allclose(ours, theirs.clamp(-1, 1), atol=1e-5)


def test_the_stored_embedding_and_its_mask_matter(release: Path) -> None:
    model = detokenizers.load_published("lavit-7b-v2-512", release)
    assert torch.equal(
        model.null, torch.load(release / "pixel_decoding/uncond_embeddings.bin", weights_only=True)[0]
    )
    before = model.decode(features(model), steps=2, noise=noise())
    model.null = model.null + 1
    assert not torch.allclose(model.decode(features(model), steps=2, noise=noise()), before, atol=1e-3)


def test_a_row_of_a_batch_equals_that_row_alone(model: LaVITDetokenizer) -> None:
    condition, start = features(model), noise()
    both = model.decode(condition, steps=2, noise=start)
    alone = model.decode(condition[1:], steps=2, noise=start[1:])
    assert torch.allclose(alone[0], both[1], atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_noise_comes_from_the_generator(model: LaVITDetokenizer) -> None:
    condition = features(model)

    def drawn(seed: int) -> Tensor:
        return model.decode(condition, steps=1, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(7), drawn(7))
    assert torch.equal(drawn(7), model.decode(condition, steps=1, noise=noise()))
    assert not torch.equal(drawn(7), drawn(8))


def test_without_guidance_one_pass_is_enough(model: LaVITDetokenizer, monkeypatch) -> None:
    seen = []
    forward = model.unet.forward

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(x))
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(model.unet, "forward", counted)
    alone = model.decode(features(model), steps=1, guidance=1.0, noise=noise())
    nearly = model.decode(features(model), steps=1, guidance=1 + 1e-6, noise=noise())
    assert seen == [2, 4]
    assert torch.allclose(alone, nearly, atol=1e-4)


def test_other_sizes_and_what_the_picture_was_cut_from(model: LaVITDetokenizer) -> None:
    condition, start = features(model), noise(h=6, w=10)
    wide = model.decode(condition, steps=1, noise=start, size=(12, 20))
    assert wide.shape == (2, 3, 12, 20)
    told = model.decode(condition, steps=1, noise=start, size=(12, 20), original_size=(640, 480), crop=(8, 0))
    assert torch.equal(told, wide) != model.config.is_pooled
    with pytest.raises(ValueError, match=r"size must be multiples of 4, got \(12, 22\)"):
        model.decode(condition, size=(12, 22))
    with pytest.raises(ValueError, match=r"noise must be \[2, 4, 8, 8\]"):
        model.decode(condition, noise=noise(1))


def test_conditions_of_the_other_kind_are_refused(model: LaVITDetokenizer) -> None:
    with pytest.raises(ValueError, match=r"load the tokenizer with pixel_decoding='(low|high)res'"):
        model.decode(torch.zeros(1, 9, 30))
    with pytest.raises(ValueError, match="got Codes"):
        model.decode(Codes(torch.zeros(1, 9, 1, dtype=torch.long)))
    with pytest.raises(ValueError, match="at least"):
        model.decode(features(model)[:, :1])


def test_export_and_load_again_changes_nothing(model: LaVITDetokenizer, part: str, tmp_path: Path) -> None:
    detokenizers.export_published(model, ROWS[part], tmp_path)
    assert (tmp_path / part / "unet" / "diffusion_pytorch_model.bin").is_file()
    again = detokenizers.load_published(ROWS[part], tmp_path / part)
    assert again.fingerprint() == model.fingerprint()


def test_lexel_format_round_trip(model: LaVITDetokenizer, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = detokenizers.from_pretrained(tmp_path)
    assert again.fingerprint() == model.fingerprint()
    condition = features(model)
    pictures = [one.decode(condition, steps=2, noise=noise()) for one in (model, again)]
    assert torch.equal(*pictures)


def test_half_precision_networks_draw_in_float32(release: Path) -> None:
    """The published VAE of the 1024-pixel form overflows in float16; its U-Net runs in half precision."""
    model = detokenizers.load_published("lavit-7b-v2-1024", release)
    exact = model.decode(features(model), steps=1, noise=noise())
    model.half()
    seen = []
    model.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    half = model.decode(features(model), steps=1, noise=noise())
    assert seen == [torch.float32]
    assert model.vae.dtype == torch.float16
    assert half.dtype == torch.float32
    assert torch.allclose(half, exact, atol=0.05)


def tokenizer_for(part: str) -> LaVIT:
    torch.manual_seed(0)
    decoding = "lowres" if part == "pixel_decoding" else "highres"
    return LaVITConfig(
        vit=EvaConfig(image_size=16, patch=4, width=16, layers=1, heads=2), layers=1, heads=2, mlp_ratio=2.0,
        code_dim=4, quantizer=QuantizerConfig("learned", codebook_size=8, cosine=False), decoder_layers=1,
        lowres=24, highres=(12, 20, 28), pixel_decoding=decoding, understanding=(),
    ).build().eval()  # fmt: skip


def test_codes_are_drawn_through_the_pair(model: LaVITDetokenizer, part: str) -> None:
    tokenizer = tokenizer_for(part)
    codes = tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    drawn = detokenize(tokenizer, model, codes, steps=1, noise=noise())
    assert torch.equal(drawn, model.decode(tokenizer.decode_features(codes), steps=1, noise=noise()))
    assert drawn.shape == (2, 3, 16, 16)


def test_the_command_reconstructs_with_the_pair(model: LaVITDetokenizer, part: str, tmp_path: Path) -> None:
    tokenizer_for(part).save_pretrained(tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "unet")
    PictureFile.new("RGB", (40, 30), "red").save(tmp_path / "photo.png")
    command = ["reconstruct", str(tmp_path / "photo.png"), "--tokenizer", str(tmp_path / "tokenizer")]
    drawn = ["--detokenizer", str(tmp_path / "unet"), "--steps", "1", "--out", str(tmp_path / "out.png")]
    assert main([*command, *drawn]) == 0
    with PictureFile.open(tmp_path / "out.png") as picture:
        assert picture.size == (16, 16)
    assert main(command) == 2  # it draws nothing itself


def test_a_hostile_embedding_is_not_opened(release: Path, tmp_path: Path) -> None:
    import shutil

    class Hostile:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    copy = Path(shutil.copytree(release / "pixel_decoding", tmp_path / "copy"))
    torch.save(Hostile(), copy / "uncond_embeddings.bin")
    with pytest.raises(LexelError, match="not a readable tensor"):
        detokenizers.load_published("lavit-7b-v2-512", copy)
    assert not (tmp_path / "ran").exists()
    torch.save(torch.zeros(1, 5, 7), copy / "uncond_embeddings.bin")
    with pytest.raises(LexelError, match=r"one tensor \[1, rows, 24\]"):
        detokenizers.load_published("lavit-7b-v2-512", copy)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(LexelError, match="holds no pixel_decoding/unet"):
        detokenizers.load_published("lavit-7b-v2-512", tmp_path)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_rows_state_the_published_sizes(system) -> None:
    (row,) = system.rows
    with torch.device("meta"):
        model = system.config(row.arguments).build()
    assert sum(p.numel() for p in model.parameters()) == row.parameters
    assert model.image_size == (row.size, row.size)
    assert row in detokenizers.list_published()
    # What the tokenizer's published token decoder makes.
    assert (model.config.condition_width, model.config.pooled_width) == (
        (2048, 1280) if row.size == 1024 else (768, 0)
    )


def test_it_takes_what_the_base_class_promises() -> None:
    from lexel.models.detokenizers.base import Detokenizer

    promised = set(inspect.signature(Detokenizer.decode).parameters)
    assert promised <= set(inspect.signature(LaVITDetokenizer.decode).parameters)
