"""Clips of moving shapes, clips on disk, and tokenizers of clips in the trainer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from PIL import Image

import lexel.train.cli  # noqa: F401  (registers the schema)
from lexel.data.clip_folder import ClipFolderConfig
from lexel.data.clips import DIRECTIONS, ClipsConfig, Motion, MovingScene
from lexel.data.scene import Background, Scene, SceneObject
from lexel.errors import LexelError
from lexel.tokenizers import from_pretrained
from lexel.train.chain import run_chain
from lexel.train.cli import resolve


def test_a_clip_is_a_function_of_its_number() -> None:
    first, again = (ClipsConfig(count=64).build("train") for _ in range(2))
    example = first[5]
    assert example.pixels is not None
    assert example.pixels.shape == (8, 3, 32, 32)
    assert torch.equal(example.pixels, again[5].pixels)
    assert first[-1].key == first[63].key
    assert not torch.equal(example.pixels, ClipsConfig(count=64, seed=1).build("train")[5].pixels)
    assert not torch.equal(example.pixels, ClipsConfig(count=64).build("validation")[5].pixels)
    assert torch.equal(example.pixels[0], example.truth.scene.render(32))
    longer = ClipsConfig(count=64, frames=12).build("train")[5].pixels
    assert torch.equal(longer[:8], example.pixels)


def test_objects_move_as_the_caption_says_and_bounce() -> None:
    thing = SceneObject.of("circle", "red", "small", (0.5, 0.5), 0.1, (1, 0, 0))
    moving = MovingScene(Scene((thing,), Background("light", (1, 1, 1))), (Motion("right", (0.15, 0.0)),))
    assert moving.caption() == "a red circle moving right"
    places = [moving.at(frame).objects[0].center[0] for frame in range(8)]
    reach = thing.box[2] - thing.center[0]
    assert places[:3] == pytest.approx([0.5, 0.65, 0.8])
    # 0.5 + 3 * 0.15 is beyond the last place, 1 - reach, by what it comes back.
    assert places[3] == pytest.approx(2 * (1 - reach) - 0.95)
    assert all(reach - 1e-9 <= place <= 1 - reach + 1e-9 for place in places)
    assert {moving.at(frame).objects[0].center[1] for frame in range(8)} == {0.5}
    every = ClipsConfig(count=200, max_objects=1).build("train")
    for index in range(0, 200, 10):
        (motion,) = every.moving(index).motions
        angle = DIRECTIONS.index(motion.direction) * math.tau / 8
        speed = math.hypot(*motion.velocity)
        assert motion.velocity == pytest.approx((speed * math.cos(angle), speed * math.sin(angle)))
        assert 0.02 <= speed <= 0.06


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "at least one frame"),
        ({"speed": (0.3, 0.1)}, "slowest and the fastest"),
        ({"size": 8}, "sizes 32..256"),
    ],
)
def test_impossible_clips_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipsConfig(**options)


def test_a_folder_of_clips(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (24, 16), (shade, 0, 0)) for shade in (0, 100, 200)]
    folder = tmp_path / "one"
    folder.mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / f"{number}.png")
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:], duration=100)
    (tmp_path / "one.txt").write_text("getting brighter\n")
    (tmp_path / "notes.md").write_text("not a clip")
    config = ClipFolderConfig(str(tmp_path), size=8, frames=3, validation_share=0.0)
    found = {example.key: example for example in map(config.build("train").__getitem__, range(2))}
    assert found["one"].captions == ("getting brighter",)
    assert found["two.gif"].captions == ()
    for example in found.values():
        assert example.pixels is not None
        assert example.pixels.shape == (3, 3, 8, 8)
        assert example.pixels[:, 0, 4, 4].tolist() == pytest.approx([-1, -0.2157, 0.5686], abs=0.02)
    with pytest.raises(LexelError, match="does not exist"):
        ClipFolderConfig(str(tmp_path / "none")).build("train")
    with pytest.raises(LexelError, match="splits are"):
        config.build("test")  # type: ignore[arg-type]


SMALL = {
    "larp_debug": [
        "tokenizer.width=16", "tokenizer.layers=1", "tokenizer.heads=2", "tokenizer.latents=4",
        "tokenizer.prior.width=16", "tokenizer.prior.layers=1", "objective.tokenizer.adversarial_start=1",
        "objective.tokenizer.discriminator.width=16", "objective.tokenizer.discriminator.layers=1",
    ],
    "open_magvit2_video_debug": ["tokenizer.channels=8", "tokenizer.norm_groups=4"],
    "emu3_video_debug": ["data.frames=4"],
}  # fmt: skip


@pytest.mark.parametrize("experiment", SMALL)
def test_tokenizers_of_clips_train(experiment: str, tmp_path: Path) -> None:
    stage = [
        "steps=2", "batch_size=2", "validate_every=2", "validation_batches=1", "sample_every=2",
        "sample_count=1", "warmup=0",
    ]  # fmt: skip
    overrides = [f"experiment={experiment}", f"output={tmp_path}", "data.count=64", *SMALL[experiment]]
    overrides += [f"stages.tokenizer.{setting}" for setting in stage]
    with initialize_config_module("lexel.conf", version_base="1.3"):
        run = resolve(compose("train", overrides=overrides))
    run_chain(run)
    folder = tmp_path / "tokenizer"
    frames = run.data.frames
    with Image.open(folder / "samples" / "step-000002.png") as grid:
        assert grid.size == (frames * 34 - 2, 2 * 34 - 2)  # a clip above its reconstruction
    assert "validation/psnr" in (folder / "metrics.csv").read_text()
    network = from_pretrained(folder)
    video = run.data.build("validation")[0].pixels[None]
    assert network.decode_video(network.encode_video(video)).shape == video.shape  # type: ignore[attr-defined]


def test_a_tokenizer_of_pictures_refuses_clips(tmp_path: Path) -> None:
    with initialize_config_module("lexel.conf", version_base="1.3"):
        composed = compose("train", overrides=["task=tokenizer", "data=clips", f"output={tmp_path}"])
    with pytest.raises(LexelError, match="VQTokenizer reads pictures; choose a tokenizer of clips"):
        run_chain(resolve(composed))
