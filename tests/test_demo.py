"""The demo: its pictures of tokens, and the real page through gradio's client, on a random bundle."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_pipeline
from PIL import Image as PictureFile

from lexel.data.images import to_image
from lexel.types import Codes

pytestmark = pytest.mark.slow  # importing gradio alone takes seconds

# In a process of its own: gradio and its client leave event loops and sockets to the garbage collector.
CLIENT = """
import json, sys
from gradio_client import Client, handle_file
url, picture = sys.argv[1:]
client = Client(url, verbose=False)
gallery, tokens, line = client.predict("a red circle", 2, 5, 0.6, 1.5, "nested", False, api_name="/draw")
again = client.predict("a red circle", 2, 5, 0.6, 1.5, "nested", False, api_name="/draw")[0]
seen, rebuilt, codes = client.predict(handle_file(picture), 16, False, api_name="/reconstruct")
other = client.predict(handle_file(picture), 2, False, "short", api_name="/reconstruct")[1]
caption, _, described = client.predict(handle_file(picture), 0, 0, "jacobi", api_name="/describe")
try:
    client.predict("  ", 1, 0, 1.0, 1.0, "plain", False, api_name="/draw")
    refusal = None
except Exception as error:
    refusal = str(error)
print(json.dumps({
    "gallery": [x["image"] for x in gallery], "again": [x["image"] for x in again], "tokens": tokens,
    "line": line, "seen": seen, "rebuilt": rebuilt, "codes": codes, "other": other, "caption": caption,
    "described": described, "refusal": refusal,
}))
"""


def read(path: str) -> np.ndarray:
    return np.asarray(PictureFile.open(path).convert("RGB"))


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle with a second tokenizer, of up to 6 tokens, called "short"."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    build_tiny_pipeline("flexible").tokenizer.save_pretrained(folder / "tokenizers" / "short")
    return folder


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[str]:
    """The address of the page of a bundle, while it is up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lexel.cli", "demo", "--bundle", str(bundle), "--port", str(port)]
    command += options
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:  # blocks until the page is up, ends when the process dies
            if f":{port}" in line:
                break
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture
def server(bundle: Path):
    with serving(bundle) as url:
        yield url


def test_page_draws_describes_and_reconstructs(server: str, tiny_pipeline, tmp_path: Path):
    from lexel.document import Image, Text
    from lexel.sample.demo import enlarged

    pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    to_image(pixels).save(tmp_path / "picture.png")
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, server, str(tmp_path / "picture.png")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])

    expected = tiny_pipeline(
        [Text("a red circle"), Image.blank()],
        count=2, seed=5, temperature=0.6, guidance=1.5, decoding="nested",
    )  # fmt: skip
    for path, again, document in zip(answer["gallery"], answer["again"], expected.documents):
        picture = np.asarray(enlarged(to_image(document[-1].pixels)))
        assert (read(path) == picture).all(), "the page shows the pipeline's pixels, without loss"
        assert (read(again) == picture).all()
    assert "tokens accepted per step" in answer["line"]
    assert "per second" in answer["line"]
    seen = tiny_pipeline.read_picture(tmp_path / "picture.png")
    assert (read(answer["seen"]) == np.asarray(enlarged(to_image(seen)))).all()
    rebuilt = tiny_pipeline.reconstruct(seen)
    assert (read(answer["rebuilt"]) == np.asarray(enlarged(to_image(rebuilt)))).all()
    short = build_tiny_pipeline("flexible").tokenizer
    rebuilt = short.decode(short.encode(seen[None], 2))[0]
    assert (read(answer["other"]) == np.asarray(enlarged(to_image(rebuilt)))).all()
    assert answer["caption"] == tiny_pipeline.describe(seen, decoding="plain")
    assert "Write what to draw" in answer["refusal"]


def test_pictures_are_shown_while_they_are_drawn(monkeypatch):
    from lexel.sample import demo

    monkeypatch.setattr(demo, "PAUSE", -1.0)
    pipe = build_tiny_pipeline()
    views = list(demo._Actions(pipe).draw("a red circle", 2, 5, 0.6, 1.5, "plain", False))
    assert len(views) > 3
    first, last = (np.asarray(views[number][0][0]) for number in (0, -1))
    side = len(first) // 4
    assert (first[side:] == 128).all(), "grey below the first row of codes"
    assert not (first[:side] == 128).all(axis=(1, 2)).any()
    assert not (last == 128).all(axis=(1, 2)).any()
    assert "tokens so far" in views[0][2]
    assert "per step" in views[-1][2]
    tokens = np.asarray(views[0][1])
    assert (tokens[-1] == 128).all()
    assert not (tokens[0] == 128).all()


def test_a_closed_page_cancels_its_pictures(monkeypatch):
    from lexel.sample import demo

    monkeypatch.setattr(demo, "PAUSE", -1.0)
    pipe = build_tiny_pipeline()
    drawing = demo._Actions(pipe).draw("a red circle", 2, 5, 0.6, 1.5, "plain", False)
    next(drawing)
    queue = pipe.engine.queue("plain", [], 64)
    assert queue.busy
    drawing.close()
    assert not queue.busy


def test_equal_codes_have_equal_colours_and_different_ones_differ():
    from lexel.sample.demo import tokens_picture

    codes = Codes(torch.tensor([[[3], [3], [7], [0]]]), grid=(2, 2))
    picture = np.asarray(tokens_picture(codes, (16,)))
    top_left, top_right, bottom_left, bottom_right = (
        picture[0, 0], picture[0, -1], picture[-1, 0], picture[-1, -1]
    )  # fmt: skip
    assert (top_left == top_right).all()
    assert len({tuple(c) for c in (top_left, bottom_left, bottom_right)}) == 3
    everything = Codes(torch.arange(256)[None, :, None], grid=(16, 16))
    assert len(np.unique(np.asarray(tokens_picture(everything, (256,))).reshape(-1, 3), axis=0)) > 250


def test_unused_places_of_a_short_line_are_grey():
    from lexel.sample.demo import tokens_picture

    codes = Codes(torch.zeros(1, 4, 1, dtype=torch.long), lengths=torch.tensor([1]))
    picture = np.asarray(tokens_picture(codes, (8,)))
    assert (picture[-1, -1] == 128).all()
    assert not (picture[0, 0] == 128).all()


def test_each_tokenizer_of_a_bundle_has_its_own_number_of_tokens(bundle: Path):
    from lexel.sample.demo import OWN, _Actions
    from lexel.sample.pipeline import Pipeline

    actions = _Actions(Pipeline.from_pretrained(bundle))
    assert list(actions.tokenizers) == [OWN, "short"]
    length, detokenizer, steps = actions.choose("short")
    assert (length.maximum, length.value, length.visible, detokenizer.visible) == (6, 6, True, False)
    assert not steps.visible
    length, detokenizer, _ = actions.choose(OWN)
    assert (length.maximum, length.visible, detokenizer.visible) == (16, False, True)


# Clips and sounds


@pytest.fixture(scope="module")
def further():
    """A tokenizer of clips and one of sounds, tiny and untrained."""
    from lexel.tokenizers.emu3 import Emu3Config
    from lexel.tokenizers.quantizers import QuantizerConfig
    from lexel.tokenizers.sound import SoundConfig

    torch.manual_seed(0)
    learned = QuantizerConfig("learned", codebook_size=16, cosine=False, entropy=0.0)
    sizes = {"channels": 32, "channel_mult": (1, 1), "res_blocks": 1, "attention_stages": (), "latent": 2}
    clips = Emu3Config(image_size=16, **sizes, quantizer=learned).build().eval()
    dac = {"encoder_hidden_size": 4, "downsampling_ratios": [2, 5], "decoder_hidden_size": 16}
    dac |= {"n_codebooks": 4, "codebook_size": 8, "codebook_dim": 2, "sampling_rate": 8000}
    return {"clips": clips, "sounds": SoundConfig({"model_type": "dac", **dac}).build().eval()}


MEDIA_CLIENT = """
import json, sys
from gradio_client import Client, handle_file
url, clip, sound = sys.argv[1:]
client = Client(url, verbose=False)
tabs = [one["props"]["label"] for one in client.config["components"] if one["type"] == "tabitem"]
path = lambda given: given["video"] if isinstance(given, dict) else given
seen, rebuilt, line = client.predict(handle_file(clip), 6, "clips", api_name="/clip")
heard, found, codes, told = client.predict(handle_file(sound), "sounds", api_name="/sound")
print(json.dumps({
    "tabs": tabs, "seen": path(seen), "rebuilt": path(rebuilt), "line": line,
    "heard": heard, "found": found, "codes": codes, "told": told,
}))
"""


def test_page_with_tokenizers_of_clips_and_sounds(further, tiny_bundle: Path, tmp_path: Path):
    from lexel.data.media import read_clip, read_wave, write_clip, write_wave

    for name, one in further.items():
        one.save_pretrained(tmp_path / name)
    write_clip(torch.rand(9, 3, 16, 16) * 2 - 1, tmp_path / "clip.mp4", 10)
    write_wave(0.5 * torch.sin(torch.arange(4000) / 9)[None], tmp_path / "tone.wav", 8000)
    with serving(tiny_bundle, "--tokenizer", str(tmp_path / "clips"), str(tmp_path / "sounds")) as url:
        files = [str(tmp_path / "clip.mp4"), str(tmp_path / "tone.wav")]
        done = subprocess.run(
            [sys.executable, "-c", MEDIA_CLIENT, url, *files], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["tabs"] == ["Draw", "Describe", "Reconstruct", "Clips", "Sounds"]
    assert answer["line"] == "4 frames, 64 tokens"
    assert read_clip(answer["seen"]).shape == read_clip(answer["rebuilt"]).shape == (4, 3, 256, 256)
    wave = read_wave(tmp_path / "tone.wav", 8000)
    assert float((read_wave(answer["heard"], 8000) - wave).abs().max()) < 1e-3
    assert read_wave(answer["found"], 8000).shape == wave.shape
    assert answer["told"] == "400 tokens of 4 codes, 9.6 kilobits a second"


def test_clips_and_sounds_through_the_page(further, tmp_path: Path):
    import gradio as gr

    from lexel.data.media import read_clip, read_wave, write_clip, write_wave
    from lexel.sample.demo import _Actions

    actions = _Actions(build_tiny_pipeline(), further)
    write_clip(torch.rand(9, 3, 16, 16) * 2 - 1, tmp_path / "clip.mp4", 10)
    seen, rebuilt, line = actions.reconstruct_clip(str(tmp_path / "clip.mp4"), 6, "clips")
    assert line == "4 frames, 64 tokens"
    assert read_clip(seen).shape == read_clip(rebuilt).shape == (4, 3, 256, 256)

    write_wave(0.5 * torch.sin(torch.arange(4000) / 9)[None], tmp_path / "tone.wav", 8000)
    heard, found, codes, line = actions.reconstruct_sound(str(tmp_path / "tone.wav"), "sounds")
    assert heard[0] == found[0] == 8000
    assert np.abs(heard[1] / 32767 - read_wave(tmp_path / "tone.wav", 8000)[0].numpy()).max() < 1e-4
    assert found[1].shape == (4000,)
    assert codes.size[0] > 0
    assert line == "400 tokens of 4 codes, 9.6 kilobits a second"

    for act in (
        lambda: actions.reconstruct_clip(None, 4, "clips"),
        lambda: actions.reconstruct_sound(None, "sounds"),
    ):
        with pytest.raises(gr.Error, match="first"):
            act()
    with pytest.raises(gr.Error, match="too short"):
        actions.reconstruct_clip(str(tmp_path / "clip.mp4"), 2, "clips")


def test_steps_are_of_samplers_only(monkeypatch):
    from lexel.sample.demo import OWN, _Actions

    pipe = build_tiny_pipeline()
    assert not _Actions(pipe).choose(OWN)[2].visible
    monkeypatch.setattr(type(pipe.tokenizer), "decodes_in_steps", True)
    assert _Actions(pipe).choose(OWN)[2].visible
