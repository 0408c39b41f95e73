"""The examples and the Python in the docs run, on a tiny bundle of random weights."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_packaging import PAGES, ROOT, blocks

from lexel.data import FolderConfig, TokenizedDataset, tokenize_dataset
from lexel.data.images import to_image
from lexel.sample.bundle import find_bundle, load_tokenizer_of
from lexel.tokenizers import from_pretrained

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example's `main` with arguments and returns what it printed."""

    def call(name: str, *arguments: object) -> str:
        _module(name).main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return call


def test_every_example_says_how_to_start_it() -> None:
    for path in EXAMPLES:
        assert f"\npython examples/{path.name} " in path.read_text(encoding="utf-8"), path.name


def test_any_to_any(run: Callable[..., str], tiny_bundle: Path) -> None:
    printed = run("any_to_any", "--bundle", tiny_bundle, "--out", "pictures")
    directions = [line.split(":")[0] for line in printed.splitlines() if ": " in line]
    assert directions[:4] == [f"draw-{number}" for number in range(4)]
    for direction in ("describe", "redraw", "invent"):
        assert direction in directions
    written = {path.name for path in Path("pictures").iterdir()}
    assert {"draw-0-1.png", "redraw-0.png", "redraw-2.png", "invent-1.png"} <= written


def test_speculative(run: Callable[..., str], tiny_bundle: Path) -> None:
    printed = run("speculative", "--bundle", tiny_bundle, "--count", 2)
    for name in ("plain", "nested", "jacobi", "drafter"):
        assert f"{name}: greedy tokens equal" in printed
    rows = {line.split()[0]: line.split() for line in printed.splitlines()[1:5]}
    assert float(rows["plain"][1]) == 1.0
    assert int(rows["plain"][2]) == 2 * 16


def test_own_tokenizer(run: Callable[..., str]) -> None:
    assert run("own_tokenizer", "--out", "own") == "64 codes, equal after loading: True\n"


def test_folder_data(run: Callable[..., str], tiny_bundle: Path) -> None:
    printed = run("folder_data", "--bundle", tiny_bundle, "--count", 5, "--out", "made")
    assert "5 pictures" in printed
    assert "100% agree" in printed
    assert len(TokenizedDataset("made/codes", load_tokenizer_of(tiny_bundle).fingerprint())) == 5
    assert len(list(Path("made").glob("rebuilt-*.png"))) == 4


def test_train_tokenizer_by_hand(run: Callable[..., str]) -> None:
    printed = run("train_tokenizer_by_hand", "--steps", 21, "--out", "trained")
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in printed.splitlines()[:2])
    assert last < 0.8 * first
    assert from_pretrained("trained").layout.positions == 64


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_in_the_docs_runs(
    page: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page's blocks one after the other. The bundle that they name, the pictures and their codes exist."""
    # What loads a published checkpoint needs the file: tests/test_published.py does that with small ones.
    code = [text for text in blocks(page, "python") if "load_published(" not in text]
    if not code:
        return
    for name in ("lexel.sample.bundle", "lexel.sample.pipeline"):
        monkeypatch.setattr(f"{name}.find_bundle", lambda bundle: find_bundle(bundle or tiny_bundle))
    shutil.copytree(tiny_bundle, tmp_path / "outputs" / "quickstart" / "bundle")
    (tmp_path / "pictures").mkdir()
    to_image(torch.zeros(3, 32, 32)).save(tmp_path / "pictures" / "0000.png")
    pictures = FolderConfig("pictures", size=32, validation_share=0.0).build("train")
    tokenize_dataset(load_tokenizer_of(tiny_bundle), pictures, "codes")
    names: dict[str, object] = {"__name__": "docs"}
    for number, text in enumerate(code, start=1):
        exec(compile(text, f"{page.name} (block {number})", "exec"), names)
