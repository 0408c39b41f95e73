"""4M's DiVAE: noise levels, sampling, sizes, published files, the command, at debug size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lexel.cli import main
from lexel.data.images import to_image
from lexel.errors import LexelError
from lexel.tokenizers import load_published
from lexel.tokenizers.fourm import FourMConfig, NetworkConfig
from lexel.tokenizers.fourm_divae import (
    FOURM_DIVAE,
    DiffusionConfig,
    FourMDiVAE,
    FourMDiVAEConfig,
    UNetConfig,
)
from lexel.tokenizers.quantizers.fourm import CodebookConfig
from lexel.types import Codes
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden" / "fourm_divae"
ROW = "4m-rgb-16k-224-448"
SMALL = FourMDiVAEConfig(
    (16, 16),
    patch=(4, 4),
    encoder=NetworkConfig(width=32, depth=1, heads=2, grid=(4, 4)),
    quantizer=CodebookConfig(codebook_size=24, dim=8),
    unet=UNetConfig(patch=(2, 2), width=32, mult=(1, 1), blocks=1, attention=(2,)),
    diffusion=DiffusionConfig(steps=3),
)
GREY = replace(SMALL, channels=1)


def awake(config: FourMDiVAEConfig) -> FourMDiVAE:
    """A tokenizer whose zero-initialised layers are random: codes and noise reach the output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = config.build()
        for value in model.decoder.parameters():
            if not value.any():
                torch.nn.init.normal_(value, std=0.05)
    return model.eval()


def pictures(count: int = 3, h: int = 16, w: int = 16) -> Tensor:
    return torch.rand(count, 3, h, w, generator=torch.Generator().manual_seed(1)) * 2 - 1


def given(folder: Path) -> tuple[Path, dict[str, object]]:
    """Weights and arguments of the fixture."""
    fixture = Fixture(GOLDEN, folder)
    sizes = {name: fixture.config[name] for name in ("vit_sizes", "unet")}
    return fixture.weights(), {**FOURM_DIVAE.arguments, **fixture.config["args"], **sizes}


# ---- noise levels and times ------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "shifted_cosine:0.5"])
def test_noise_levels_fall_to_nothing(schedule: str) -> None:
    alphas = DiffusionConfig(schedule=schedule).alphas()
    assert alphas.shape == (1000,)
    assert (alphas.diff() <= 0).all()
    assert float(alphas[0]) > 0.99
    assert float(alphas[-1]) == 0
    if schedule in ("linear", "scaled_linear"):
        assert float(DiffusionConfig(schedule=schedule, zero_terminal_snr=False).alphas()[-1]) > 0


def test_a_larger_shift_is_noisier() -> None:
    less, more = (DiffusionConfig(schedule=f"shifted_cosine:{s}").alphas()[1:-1] for s in (0.5, 2.0))
    assert (less >= more).all()
    assert float(less[499] - more[499]) > 0.2


def test_times_start_at_pure_noise_for_ddim_and_end_at_none_for_ddpm() -> None:
    config = DiffusionConfig()
    assert config.times(4, "ddim") == [999, 749, 499, 249]
    assert len(config.times(6, "ddim")) == 7  # 1000 // 6 = 166 leaves a remainder
    assert config.times(4, "ddpm") == [750, 500, 250, 0]
    with pytest.raises(ValueError, match=r"steps must lie in 1..1000, got 0"):
        config.times(0, "ddim")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="noise schedule must be one of linear"):
        DiffusionConfig(schedule="cosine")
    with pytest.raises(ValueError, match="prediction must be one of sample"):
        DiffusionConfig(prediction="x0")
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        UNetConfig(width=48)


# ---- decoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_decoding_is_deterministic_and_rows_stand_alone(sampler: str) -> None:
    model = awake(SMALL)
    codes = model.encode(pictures())
    drawn = model.decode(codes, sampler=sampler)
    assert drawn.shape == (3, 3, 16, 16)
    assert torch.equal(drawn, model.decode(codes, sampler=sampler))
    assert torch.allclose(drawn[1:2], model.decode(codes[1:2], sampler=sampler), atol=1e-4)
    other = model.decode(codes, sampler=sampler, generator=torch.Generator().manual_seed(3))
    assert not torch.allclose(drawn, other, atol=1e-3)
    again = model.decode(codes, sampler=sampler, generator=torch.Generator().manual_seed(3))
    assert torch.equal(other, again)


def test_steps_noise_codes_and_guidance_change_the_picture() -> None:
    model = awake(SMALL)
    codes = model.encode(pictures(1))
    drawn = model.decode(codes)
    assert torch.equal(drawn, model.decode(codes, steps=3))
    changed = {
        "steps": model.decode(codes, steps=5),
        "noise": model.decode(codes, noise=torch.ones(1, 3, 16, 16)),
        "guidance": model.decode(codes, guidance=3.0),
        "codes": model.decode(Codes((codes.indices + 1) % 24, codes.grid)),
    }
    for name, picture in changed.items():
        assert not torch.allclose(drawn, picture, atol=1e-3), name
    with pytest.raises(ValueError, match="sampler must be one of ddim, ddpm, got 'euler'"):
        model.decode(codes, sampler="euler")


class Oracle(torch.nn.Module):
    """A network that knows the clean picture, whatever it is asked to predict."""

    def __init__(self, clean: Tensor, alphas: Tensor, prediction: str) -> None:
        super().__init__()
        self.clean, self.alphas, self.prediction = clean, alphas, prediction

    def forward(self, x: Tensor, times: Tensor, latents: Tensor) -> Tensor:
        share = self.alphas[times][:, None, None, None]
        noise = (x - share.sqrt() * self.clean) / (1 - share).sqrt()
        velocity = share.sqrt() * noise - (1 - share).sqrt() * self.clean
        return {"sample": self.clean, "epsilon": noise, "v_prediction": velocity}[self.prediction]


def test_predictions_of_noise_and_velocity_find_the_same_picture() -> None:
    clean = pictures(1)
    for prediction in ("sample", "epsilon", "v_prediction"):
        diffusion = DiffusionConfig(
            schedule="linear", prediction=prediction, zero_terminal_snr=False, steps=5
        )
        model = awake(replace(SMALL, diffusion=diffusion))
        codes, alphas = model.encode(clean), diffusion.alphas()
        model.decoder = Oracle(clean, alphas, prediction)
        assert torch.allclose(model.decode(codes), clean, atol=2e-3), prediction


def test_hidden_cells_are_not_seen() -> None:
    model = awake(SMALL)
    codes = model.encode(pictures(1))
    noisy, times, latents = torch.randn(1, 3, 16, 16), torch.tensor([500]), model.quantized(codes)
    hidden = torch.zeros(1, 4, 4, dtype=torch.bool)
    hidden[0, 1, 2] = True
    changed = latents.clone()
    changed[0, :, 1, 2] += 5
    one, two = (model.denoise(noisy, times, which, hidden) for which in (latents, changed))
    assert torch.equal(one, two)
    assert not torch.equal(model.denoise(noisy, times, latents), model.denoise(noisy, times, changed))


def test_other_sizes() -> None:
    model = awake(SMALL)
    codes = model.encode(pictures(1, 8, 24))
    assert model.decode(codes).shape == (1, 3, 8, 24)
    assert model.decode(codes, size=(16, 48)).shape == (1, 3, 16, 48)
    with pytest.raises(ValueError, match=r"multiples of \(4, 4\), not \(10, 8\)"):
        model.decode(codes, size=(10, 8))


def test_depth_and_edges_are_grey_pictures() -> None:
    model = awake(GREY)
    grey = pictures().mean(1, keepdim=True)
    codes = model.encode(grey.expand(-1, 3, -1, -1))
    assert torch.equal(codes.indices, model.encode_values(grey).indices)
    drawn = model.decode(codes)
    assert drawn.shape == (3, 3, 16, 16)
    assert torch.equal(drawn[:, 0], drawn[:, 2])
    assert torch.equal(drawn[:, :1], model.decode_values(codes))
    assert model.draws_pixels


# ---- training pass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_the_training_pass_reaches_encoder_and_decoder(prediction: str) -> None:
    model = awake(replace(SMALL, diffusion=DiffusionConfig(prediction=prediction))).train()
    output = model(pictures())
    assert output.reconstruction.shape == (3, 3, 16, 16)
    assert torch.isfinite(output.reconstruction).all()
    output.reconstruction.square().mean().backward()
    assert float(model.quant_proj.weight.grad.abs().sum()) > 0
    assert float(model.last_layer.grad.abs().sum()) > 0


def test_evaluation_reconstructs_what_decode_draws() -> None:
    model = awake(SMALL)
    output = model(pictures())
    assert torch.equal(output.reconstruction, model.decode(output.codes))


# ---- published files and the command ---------------------------------------------------------------------


def test_a_config_in_the_files_header_is_used(tmp_path: Path) -> None:
    path, arguments = given(tmp_path)
    save_file(load_file(path), tmp_path / "own.safetensors", {k: str(v) for k, v in arguments.items()})
    config = load_published(ROW, tmp_path / "own.safetensors").config
    assert config.unet.mult == (1, 1)
    assert config.diffusion.sampler == "ddim"


def test_a_file_of_the_encoder_alone_codes_and_does_not_draw(tmp_path: Path) -> None:
    path, arguments = given(tmp_path)
    state = {key: value for key, value in load_file(path).items() if not key.startswith("decoder.")}
    save_file(state, tmp_path / "half.safetensors")
    half = load_published(ROW, tmp_path / "half.safetensors", arguments)
    codes = half.encode(pictures(1, 16, 16))
    assert not half.has_decoder
    assert not half.draws_pixels
    with pytest.raises(LexelError, match="encoder alone"):
        half.decode(codes)


def test_other_decoders_are_named(tmp_path: Path) -> None:
    path, arguments = given(tmp_path)
    with pytest.raises(
        LexelError, match="dec_type uvit_b_p4_f16 is not known here: a DiVAE has unet_patched"
    ):
        load_published(ROW, path, {**arguments, "dec_type": "uvit_b_p4_f16"})
    with pytest.raises(LexelError, match="class maps and vectors belong to a VQVAE"):
        load_published(ROW, path, {**arguments, "n_labels": 4})


def test_reconstruct_takes_steps(tmp_path: Path, capsys) -> None:
    awake(SMALL).save_pretrained(tmp_path / "divae")
    to_image(pictures(1)[0]).save(tmp_path / "picture.png")
    command = ["reconstruct", str(tmp_path / "picture.png"), "--tokenizer", str(tmp_path / "divae"), "--json"]
    found = {}
    for steps in ("2", "7"):
        assert main([*command, "--steps", steps, "--out", str(tmp_path / f"{steps}.png")]) == 0
        found[steps] = json.loads(capsys.readouterr().out)["psnr"]
    assert found["2"] != found["7"]
    assert (tmp_path / "7.png").is_file()


def test_steps_are_not_for_a_decoder_of_one_pass(tmp_path: Path, capsys) -> None:
    half = SMALL.encoder
    config = FourMConfig((16, 16), patch=(4, 4), encoder=half, decoder=half, decoder_patch=(4, 4))
    config.build().save_pretrained(tmp_path / "vq")
    to_image(pictures(1)[0]).save(tmp_path / "picture.png")
    command = ["reconstruct", str(tmp_path / "picture.png"), "--tokenizer", str(tmp_path / "vq")]
    assert main([*command, "--steps", "4"]) == 2
    assert "FourM draws in one pass" in capsys.readouterr().err
