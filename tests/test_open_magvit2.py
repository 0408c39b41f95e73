"""Open-MAGVIT2: the quantizer's arithmetic, both networks' laws, Lightning files, and that they learn."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lexel.errors import LexelError
from lexel.tokenizers import load_published, published_systems
from lexel.tokenizers.open_magvit2 import (
    OpenMagvit2,
    OpenMagvit2Config,
    OpenMagvit2Video,
    OpenMagvit2VideoConfig,
)
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.quantizers.sign import sign_entropies
from lexel.types import Codes

ARGUMENTS = {
    "ddconfig": {"z_channels": 6, "resolution": 8, "ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1},
    "n_embed": 64,
    "embed_dim": 6,
}


def image_tokenizer(**options) -> OpenMagvit2:
    torch.manual_seed(0)
    settings = {"groups": (2, 4)} if options.pop("grouped", False) else {}
    return OpenMagvit2Config(
        image_size=8, channels=8, channel_mult=(1, 2), res_blocks=1, embed_dim=6, norm_groups=4,
        quantizer=QuantizerConfig("sign", codebook_size=64, **settings),
    ).build()  # fmt: skip


def video_tokenizer() -> OpenMagvit2Video:
    torch.manual_seed(0)
    return OpenMagvit2VideoConfig(
        image_size=8, channels=8, channel_mult=(1, 2, 1), res_blocks=1, embed_dim=6, norm_groups=4,
        quantizer=QuantizerConfig("sign", codebook_size=64),
    ).build()  # fmt: skip


def pictures(count: int = 2, height: int = 8, width: int = 12) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def clips(frames: int = 5) -> Tensor:
    """Two clips of a square that moves to the right."""
    clip = torch.full((2, frames, 3, 8, 8), -0.8)
    for t in range(frames):
        clip[0, t, 0, 2:5, t % 6 : t % 6 + 3] = 0.9
        clip[1, t, 2, t % 6 : t % 6 + 3, 3:6] = 0.9
    return clip


class TestEntropies:
    @staticmethod
    def brute_force(latents: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """By the definition, over all 2^d codes."""
        bits = latents.shape[-1]
        codes = (torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1
        logits = 2 * latents.flatten(0, 1) @ (codes * 2.0 - 1).to(latents).T / temperature
        shares, logs = F.softmax(logits, dim=-1), F.log_softmax(logits, dim=-1)
        mean = shares.mean(0)
        return -(shares * logs).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum()

    @pytest.mark.parametrize("bits", [1, 2, 5, 10])
    @pytest.mark.parametrize("scale", [0.002, 0.05, 1.0])
    def test_products_of_bits_equal_the_sum_over_all_codes(self, bits: int, scale: float) -> None:
        latents = torch.randn(2, 20, bits, generator=torch.Generator().manual_seed(bits)).double() * scale
        latents.requires_grad_(True)
        ours, theirs = sign_entropies(latents), self.brute_force(latents, 0.01)
        torch.testing.assert_close(ours, theirs)
        for one, other in zip(ours, theirs, strict=True):
            (gradient,) = torch.autograd.grad(one, latents, retain_graph=True)
            (expected,) = torch.autograd.grad(other, latents, retain_graph=True)
            torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=1e-5)

    def test_eighteen_bits_need_little_memory(self) -> None:
        # By the definition this is 1024 * 2^18 floats, a gigabyte; two halves are 1024 * 2 * 2^9.
        latents = torch.randn(4, 256, 18, requires_grad=True)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            each, mean = sign_entropies(latents)
        (each - mean).backward()
        assert max(sizes) <= 1024 * 2**9
        assert 0 < each < mean < 18 * torch.tensor(2.0).log()

    def test_the_extremes(self) -> None:
        sure = torch.full((1, 4, 3), 10.0)
        assert [float(x) for x in sign_entropies(sure)] == pytest.approx([0, 0], abs=1e-4)
        assert float(sign_entropies(torch.zeros(1, 4, 3))[0]) == pytest.approx(3 * 0.6931472, rel=1e-5)


def test_a_channel_is_a_bit_least_significant_first() -> None:
    quantizer = QuantizerConfig("sign", codebook_size=8).build(3)
    latents = torch.tensor([[[0.1, -0.1, -0.1], [-5.0, 0.1, 3.0], [0.0, -1.0, 1.0]]])
    assert quantizer.encode(latents)[0, :, 0].tolist() == [1, 6, 4]
    assert quantizer.decode(torch.tensor([[[6]]])).tolist() == [[[-1, 1, 1]]]


def test_sub_codes_are_the_same_picture() -> None:
    whole, parts = image_tokenizer(), image_tokenizer(grouped=True)
    parts.load_state_dict(whole.state_dict())
    codes = parts.eval().encode(pictures())
    assert parts.codebook_sizes == (4, 16)
    assert torch.equal(codes.indices[..., 0] + 4 * codes.indices[..., 1],
                       whole.eval().encode(pictures()).indices[..., 0])  # fmt: skip
    assert torch.equal(parts.decode(codes), whole.decode(whole.encode(pictures())))


class TestPictures:
    def test_shapes_and_sizes(self) -> None:
        model = image_tokenizer().eval()
        codes = model.encode(pictures())
        assert codes.indices.shape == (2, 24, 1)
        assert codes.grid == (4, 6)
        assert model.decode(codes).shape == (2, 3, 8, 12)
        for tokenizer in (model, video_tokenizer()):
            for bad in (pictures(height=9), pictures(height=2, width=2)):
                with pytest.raises(ValueError, match=r"multiples of \d, of two cells"):
                    tokenizer.encode(bad)

    def test_it_overfits_one_batch(self) -> None:
        model, pixels = image_tokenizer(), pictures()
        first, last = overfit(model, pixels, 100)
        assert last < 0.6 * first


class TestClips:
    @pytest.mark.parametrize("frames", [1, 3, 5])
    def test_shapes(self, frames: int) -> None:
        model = video_tokenizer().eval()
        codes = model.encode_video(clips(frames))
        assert codes.frames == (frames + 1) // 2
        assert codes.indices.shape == (2, codes.frames * 4, 1)
        assert model.decode_video(codes).shape == (2, frames, 3, 8, 8)

    def test_a_picture_is_a_clip_of_one_frame(self) -> None:
        model = video_tokenizer().eval()
        pixels = clips()[:, 0]
        codes, clip_codes = model.encode(pixels), model.encode_video(pixels[:, None])
        assert torch.equal(codes.indices, clip_codes.indices)
        assert codes.frames is None
        assert torch.equal(model.decode(codes), model.decode_video(clip_codes)[:, 0])
        assert model(pixels).reconstruction.shape == pixels.shape

    def test_convolutions_see_no_later_frame(self) -> None:
        model, clip = video_tokenizer().eval(), clips().movedim(1, 2)
        changed = clip.clone()
        changed[:, :, 3:] += 1.0
        conv = model.encoder.conv_in
        assert torch.equal(conv(clip)[:, :, :3], conv(changed)[:, :, :3])
        assert not torch.equal(conv(clip)[:, :, 3], conv(changed)[:, :, 3])

    def test_bad_clips_are_one_sentence(self) -> None:
        model = video_tokenizer().eval()
        with pytest.raises(ValueError, match=r"1 \+ a multiple of 2 frames, got 4"):
            model.encode_video(clips(4))
        with pytest.raises(ValueError, match="do not fill 3 frames"):
            model._decode_video(torch.zeros(1, 4, 6), Codes(torch.zeros(1, 4, 1).long(), frames=3))
        with pytest.raises(ValueError, match=r"Codes.frames"):
            model.decode_video(Codes(torch.zeros(1, 4, 1).long(), (2, 2)))

    def test_it_overfits_one_batch(self) -> None:
        first, last = overfit(video_tokenizer(), clips(), 60)
        assert last < 0.5 * first


def overfit(model: nn.Module, pixels: Tensor, steps: int) -> tuple[float, float]:
    """First and last reconstruction error; checks that gradients reach every parameter."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, betas=(0.5, 0.9))
    errors = []
    for _ in range(steps):
        output = model(pixels)
        error = (output.reconstruction - pixels).abs().mean()
        loss = error + torch.stack(list(output.quantizer.losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        if not errors:
            idle = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
            assert idle == []
        optimizer.step()
        errors.append(error.item())
    return errors[0], sum(errors[-5:]) / 5


class Training(lightning.LightningModule):
    """As SEED-Voken's training keeps its networks: `encoder`, `decoder`, `loss`, an averaged copy."""

    def __init__(self, network: OpenMagvit2, lossconfig: dict) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network"])
        self.encoder, self.decoder, self.quantize = network.encoder, network.decoder, network.quantize
        self.loss = nn.Module()
        self.loss.discriminator = nn.Conv2d(3, 1, 4)
        average = {k.replace(".", ""): v.detach() + 1 for k, v in self.named_parameters()}
        self.model_ema = nn.Module()
        for name, value in average.items():
            self.model_ema.register_buffer(name, value)
        self.model_ema.register_buffer("decay", torch.tensor(0.999))
        self.model_ema.register_buffer("num_updates", torch.tensor(-1, dtype=torch.int))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        quantized, _, _ = self.quantize.learn(self.encoder(batch).flatten(2).mT)
        return (self.decoder(quantized.mT.unflatten(2, (4, 4))) - batch).abs().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.encoder.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]


@pytest.fixture(scope="module")
def lightning_file(tmp_path_factory) -> Path:
    """A file that Lightning itself wrote: callbacks, hyper_parameters, optimizer_states, loops, …"""
    folder = tmp_path_factory.mktemp("lightning")
    torch.manual_seed(0)
    network = published_systems()["open_magvit2_lfq"].config(ARGUMENTS).build()
    training = Training(network, {"params": {"disc_start": 0}})
    keeping = lightning.callbacks.ModelCheckpoint(folder / "kept", save_last=True)
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[keeping],
    )  # fmt: skip
    trainer.fit(training, DataLoader(pictures(2, 8, 8), batch_size=2))  # type: ignore[arg-type]
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.filterwarnings("ignore")
class TestLightningFiles:
    def test_the_averaged_copy_comes_first_and_key_chooses(self, lightning_file: Path) -> None:
        content = torch.load(lightning_file, weights_only=True)
        assert {"callbacks", "hyper_parameters", "optimizer_states", "lr_schedulers", "loops"} <= set(content)
        state, key = content["state_dict"], "encoder.mid_block.0.conv1.weight"
        averaged = load_published("open-magvit2-256", lightning_file, ARGUMENTS).state_dict()[key]
        assert torch.equal(averaged, state["model_ema." + key.replace(".", "")])
        raw = load_published("open-magvit2-256", lightning_file, ARGUMENTS, key="raw").state_dict()[key]
        assert torch.equal(raw, state[key])
        assert not torch.equal(raw, averaged)

    def test_a_file_without_an_average_gives_the_raw_weights(
        self, lightning_file: Path, tmp_path: Path
    ) -> None:
        state = torch.load(lightning_file, weights_only=True)["state_dict"]
        kept = {k: v for k, v in state.items() if not k.startswith("model_ema.")}
        torch.save({"state_dict": kept}, tmp_path / "raw.ckpt")
        loaded = load_published("open-magvit2-256", tmp_path / "raw.ckpt", ARGUMENTS)
        assert torch.equal(loaded.state_dict()["encoder.conv_in.weight"], state["encoder.conv_in.weight"])
        with pytest.raises(LexelError, match="no averaged weights"):
            load_published("open-magvit2-256", tmp_path / "raw.ckpt", ARGUMENTS, key="ema")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_embed": 128}, "n_embed 128 must be 2\\^embed_dim"),
        ({"ddconfig": {"z_channels": 7}}, "z_channels"),
        ({"ddconfig": {"double_z": True}}, "double_z must be False"),
        ({"ddconfig": {"chh": 7}}, "no argument chh"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_are_one_sentence(wrong: dict, message: str) -> None:
    with pytest.raises(LexelError, match=message):
        published_systems()["open_magvit2_lfq"].config(ARGUMENTS, wrong)


def test_factorized_arguments_give_sub_codes() -> None:
    config = published_systems()["open_magvit2_lfq"].config(
        {"token_factorization": True, "factorized_bits": [6, 12]}
    )
    assert config.quantizer.codebook_sizes == (64, 4096)
