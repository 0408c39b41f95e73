"""The demo: its pictures of tokens, and the real page through gradio's client, on a random bundle."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
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


@pytest.fixture
def server(bundle: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lexel.cli", "demo", "--bundle", str(bundle), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:  # blocks until the page is up, ends when the process dies
            if f":{port}" in line:
                break
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(10)


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
    length, detokenizer = actions.choose("short")
    assert (length.maximum, length.value, length.visible, detokenizer.visible) == (6, 6, True, False)
    length, detokenizer = actions.choose(OWN)
    assert (length.maximum, length.visible, detokenizer.visible) == (16, False, True)
