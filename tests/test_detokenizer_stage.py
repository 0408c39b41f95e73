"""The detokenizer's stage: every layout, frozen parts by name, larger pictures, captions, distillation."""

import json
from functools import partial

import pytest
import torch
from conftest import build_tiny_pipeline
from hydra import compose, initialize_config_module
from test_detokenizers import VAES, condition, noises, seeded, text_folder, vae_folder  # noqa: F401
from torch import nn

from lexel.data.example import Example, stack_captioned
from lexel.document import Image, Text
from lexel.errors import LexelError
from lexel.models.detokenizers import from_pretrained
from lexel.models.detokenizers.diffusion import DiffusionDetokenizerConfig
from lexel.sample.bundle import TRAINED_ON_FILE
from lexel.sample.detokenize import detokenize
from lexel.tokenizers.layout import CodeLayout
from lexel.train.chain import run_chain
from lexel.train.cli import resolve
from lexel.train.detokenizer_module import DetokenizerModule, DistilledModule, student_config
from lexel.train.detokenizers import complete_detokenizer
from lexel.train.settings import DetokenizerStage
from lexel.types import Codes

SHORT = ["task=detokenizer", "examples=4", "stages.detokenizer.steps=1", "stages.detokenizer.batch_size=2"]
SHORT += ["stages.detokenizer.validate_every=0", "stages.detokenizer.sample_every=1"]
SHORT += ["stages.detokenizer.sample_count=2", "stages.detokenizer.steps_to_decode=1"]
NARROW = ["detokenizer.channels=[32]", "detokenizer.layers=1", "detokenizer.head_dim=16"]
NARROW += ["detokenizer.condition_dim=16"]


def settled(*overrides):
    with initialize_config_module("lexel.conf", version_base="1.3"):
        return resolve(compose("train", overrides=list(overrides)))


def train(output, *overrides):
    """Run the stage and load what it wrote."""
    run_chain(settled(*SHORT, *overrides, f"output={output}"))
    return from_pretrained(output / "detokenizer")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tiny_pipeline().tokenizer.save_pretrained(folder)
    return folder


class Stub:
    """A tokenizer as far as a detokenizer's config needs it."""

    image_size = (32, 32)

    def __init__(self, layout, features=None):
        self.layout, self.features = layout, features

    def encode(self, pixels):
        return Codes(torch.zeros(len(pixels), self.layout.positions, self.layout.k, dtype=torch.long))

    def decode_features(self, codes):
        return torch.zeros(len(codes), *self.features)


LAYOUTS = {
    "raster": CodeLayout((7,), grid=(4, 4)),
    "two": CodeLayout((7, 5), grid=(8, 8)),
    "line": CodeLayout((7,), length=6),
    "flexible": CodeLayout((7,), length=6, flexible=True),
    "scales": CodeLayout((7,), scales=((1, 1), (2, 2), (4, 4))),
}


@pytest.mark.parametrize("choice", ["flow", "dit", "joint", "diffusion"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_completes_every_detokenizer(layout, choice):
    small = ["detokenizer.channels=[16,16]"] if choice in ("flow", "diffusion") else NARROW
    run = settled("task=detokenizer", f"detokenizer={choice}", *small)
    config = complete_detokenizer(run.detokenizer, Stub(LAYOUTS[layout]))
    assert config.positions == LAYOUTS[layout].positions
    assert config.flexible == (layout == "flexible")
    assert config.raster == (layout in ("raster", "two"))
    net = config.build().eval()
    assert net.decode(condition(config, 1), steps=1).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(("layout", "features"), [("line", (9, 5)), ("raster", (16, 5))])
@pytest.mark.parametrize("kind", ["concat", "cross"])
def test_features_complete_it_too(layout, features, kind):
    config = partial(
        DiffusionDetokenizerConfig,
        reads="features",
        condition=kind,
        patch=2,
        channels=(16, 16),
        condition_dim=16,
    )
    done = complete_detokenizer(config, Stub(LAYOUTS[layout], features))
    assert (done.positions, done.feature_dim) == features
    assert done.raster == (layout == "raster")
    net = done.build().eval()
    assert net.reads == "features"
    codes = Codes(torch.zeros(1, LAYOUTS[layout].positions, 1, dtype=torch.long))
    drawn = detokenize(Stub(LAYOUTS[layout], features), net, codes, text=["left out"], steps=1)
    assert drawn.shape == (1, 3, 32, 32)


def test_the_stage_trains_a_joint_transformer(tokenizer_folder, tmp_path):
    net = train(tmp_path, "detokenizer=joint", *NARROW, f"parts.tokenizer={tokenizer_folder}")
    assert (net.config.condition, net.config.grid, net.config.codebook_sizes) == ("joint", (4, 4), (16,))
    assert list((tmp_path / "detokenizer" / "samples").glob("*.png"))
    assert "tokenizer" in json.loads((tmp_path / "detokenizer" / TRAINED_ON_FILE).read_text())


def test_the_stage_reads_captions_and_draws_latents(tokenizer_folder, text_folder, tmp_path):  # noqa: F811
    vae_folder("AutoencoderTiny", tmp_path / "vae")
    named = [f"detokenizer.text={text_folder}", f"detokenizer.vae={tmp_path / 'vae'}", "detokenizer.patch=2"]
    shorter = "detokenizer.text_length=8"
    net = train(
        tmp_path, "detokenizer=captioned", shorter, *NARROW, *named, f"parts.tokenizer={tokenizer_folder}"
    )
    assert net.reads_text
    assert net.config.space == (2, 4)
    drawn = net.decode(condition(net.config, 2), steps=1, text=["a red circle", None], generator=seeded())
    assert drawn.shape == (2, 3, 32, 32)
    again = ["stages.detokenizer.steps=2", f"stages.detokenizer.distil={tmp_path}/detokenizer"]
    student = train(tmp_path / "student", *again, f"parts.tokenizer={tokenizer_folder}")
    assert student.text.tokenizer is not None
    states = net.vae.state_dict()
    assert all(torch.equal(value, states[key]) for key, value in student.vae.state_dict().items())


def test_the_stage_trains_on_pictures_larger_than_the_tokenizers(tokenizer_folder, tmp_path):
    larger = [
        "detokenizer=super_resolution",
        "detokenizer.channels=[16]",
        f"parts.tokenizer={tokenizer_folder}",
    ]
    net = train(tmp_path, *larger, "data.size=128")
    assert (net.image_size, net.config.tokenizer_size) == ((128, 128), (32, 32))
    with pytest.raises(LexelError, match=r"detokenizer.scale=4; set data.size"):
        train(tmp_path / "small", *larger)


def test_a_frozen_part_must_come_trained(tokenizer_folder, tmp_path):
    with pytest.raises(LexelError, match="VAE"):
        train(tmp_path, f"parts.tokenizer={tokenizer_folder}", f"detokenizer.vae={tmp_path / 'none'}")


def test_a_super_resolving_detokenizers_tokenizer_sees_reduced_pictures():
    tokenizer = build_tiny_pipeline().tokenizer
    config = DiffusionDetokenizerConfig(
        (16,), (4, 4), image_size=(128, 128), scale=4, patch=8, channels=(8, 16)
    )
    module = DetokenizerModule(config.build(), tokenizer, DetokenizerStage(ema=0.0))
    small = torch.rand(2, 3, 32, 32, generator=seeded()) * 2 - 1
    large = small.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    found = module._codes(module.network, large)
    assert torch.equal(found.indices, tokenizer.encode(small).indices)


def test_captions_travel_with_their_pictures():
    pixels = torch.zeros(3, 4, 4)
    batch, captions = stack_captioned([Example("a", ("one", "two"), pixels), Example("b", (), pixels)])
    assert batch.shape == (2, 3, 4, 4)
    assert captions == ["one", None]


# In the pipeline


class Listening(nn.Module):
    """A detokenizer that notes the captions it is given."""

    reads, reads_text, image_size = "codes", True, (32, 32)

    def decode(self, codes, *, text=None, steps=None, generator=None):
        self.heard = text
        return torch.zeros(len(codes), 3, 32, 32)


def test_a_pipeline_tells_the_detokenizer_what_it_draws():
    pipe = build_tiny_pipeline()
    pipe.detokenizer = Listening()
    pipe([Text("a red circle"), Image.blank()], count=2, detokenizer=True, seed=0)
    assert pipe.detokenizer.heard == ["a red circle", "a red circle"]


def test_a_detokenizer_stands_in_for_a_tokenizer_that_does_not_draw(monkeypatch):
    pipe = build_tiny_pipeline()
    codes = pipe.encode(torch.zeros(1, 3, 32, 32))
    drawn = pipe.decode(codes, detokenizer=True, generator=seeded())
    assert not torch.equal(pipe.decode(codes, generator=seeded()), drawn)
    monkeypatch.setattr(type(pipe.tokenizer), "draws_pixels", False)
    assert torch.equal(pipe.decode(codes, generator=seeded()), drawn)


# Distillation


def test_a_teacher_is_not_overwritten_and_must_be_of_the_same_codes(tokenizer_folder, tmp_path):
    train(tmp_path, "detokenizer=dit", *NARROW, f"parts.tokenizer={tokenizer_folder}")
    distil = f"stages.detokenizer.distil={tmp_path}/detokenizer"
    with pytest.raises(LexelError, match="choose another output"):
        train(tmp_path, distil, f"parts.tokenizer={tokenizer_folder}")
    build_tiny_pipeline(seed=1).tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(LexelError, match="trained on the codes of tokenizer"):
        train(tmp_path / "student", distil, f"parts.tokenizer={tmp_path / 'other'}")


def test_a_student_draws_in_one_step_what_its_teacher_draws_in_many():
    """Of a teacher that knows pictures of the distribution N(0.2, 0.5²) per pixel: it draws 0.2 + 0.5 z from
    noise z in many steps, and 0.2, their mean, in one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"image_size": (8, 8), "patch": 1, "channels": (32,), "condition_dim": 8}
        config = DiffusionDetokenizerConfig((16,), (4, 4), null_dropout=0.0, **sizes)
        teacher, student = config.build(), config.build().train()

        def estimate(x, times, given):
            t = times[:, None, None, None]
            return 0.2 + (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2) * (x - (1 - t) * 0.2)

        teacher.denoise = estimate
        stage = DetokenizerStage(ema=0.0, steps_to_decode=1, times_per_pair=2, teacher_steps=20)
        assert student_config(teacher, stage).steps == 1
        module = DistilledModule(student, teacher, build_tiny_pipeline().tokenizer, stage)
        codes = Codes(torch.zeros(8, 16, 1, dtype=torch.long), (4, 4))
        module._condition = lambda network, pixels: codes
        optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
        for _ in range(100):
            loss, _ = module.compute(student, (torch.zeros(8, 3, 8, 8), [None] * 8))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    noise = noises(teacher, 8)
    truth = teacher.draw(codes, steps=20, noise=noise)
    one = [
        (net.eval().draw(codes, steps=1, noise=noise) - truth).square().mean() for net in (teacher, student)
    ]
    assert float(one[1]) < 0.25 * float(one[0])


def test_a_drawing_is_learned_from_at_several_times_with_its_own_noise(monkeypatch):
    config = DiffusionDetokenizerConfig(
        (16,), (4, 4), image_size=(8, 8), patch=1, channels=(16,), condition_dim=8
    )
    teacher, student = config.build(), config.build()
    module = DistilledModule(
        student, teacher, build_tiny_pipeline().tokenizer, DetokenizerStage(ema=0.0, times_per_pair=3)
    )
    codes = Codes(torch.arange(32).reshape(2, 16, 1) % 16, (4, 4))
    module._condition = lambda network, pixels: codes
    heard = {}

    def draw(condition, *, steps, guidance, noise, text):
        heard.update(steps=steps, guidance=guidance, text=text)
        return noise * 2

    def loss_of(clean, condition, *, text, noise):
        assert torch.equal(clean, noise * 2)
        assert torch.equal(condition.indices, codes.indices.repeat(3, 1, 1))
        return clean.mean(), {}

    monkeypatch.setattr(teacher, "draw", draw)
    monkeypatch.setattr(student, "loss_of", loss_of)
    module.compute(student, (torch.zeros(2, 3, 8, 8), ["a", None]))
    assert heard == {"steps": 25, "guidance": None, "text": None}
