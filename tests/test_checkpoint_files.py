"""Checkpoints of several files: read as one, written apart."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lexel.catalog import Layout, Published, System, export, load, locate
from lexel.errors import LexelError


@dataclass(frozen=True)
class TwoConfig:
    """A network of two parts, the second optional."""

    width: int = 3
    second: bool = True

    def build(self) -> Two:
        """With fresh weights."""
        return Two(self)


class Two(nn.Module):
    """Two linear layers, each in a file of its own under the same names."""

    def __init__(self, config: TwoConfig) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Linear(config.width, 2)
        self.second = nn.Linear(config.width, 4) if config.second else None


def as_stored(config: TwoConfig, names: Container[str]) -> TwoConfig:
    """Without the second part where its file is missing."""
    return replace(config, second="parts/second.bin:weight" in names)


ROW = Published("two", "user/two", "", {}, 0, "", "", "", "", "")
SYSTEM = System(
    "two",
    {"width": 3},
    lambda arguments: TwoConfig(**arguments),
    (ROW,),
    (
        Layout(
            rules=((r"^first\.", "first.pt:"), (r"^second\.", "parts/second.bin:")),
            ignored={r"first\.pt:counter": "counts steps"},
        ),
    ),
    container="",
    as_stored=as_stored,
    files={"first.pt": "", "parts/second.bin": ""},
    optional=("parts/second.bin",),
)


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, Two]:
    """A written checkpoint and the network it holds."""
    torch.manual_seed(0)
    network = TwoConfig().build()
    export(network, SYSTEM, ROW, tmp_path)
    return tmp_path, network


def test_reads_what_it_wrote(folder: tuple[Path, Two]) -> None:
    path, network = folder
    state = torch.load(path / "first.pt", weights_only=True)
    assert set(state) == {"weight", "bias"}
    torch.save(state | {"counter": torch.zeros(1)}, path / "first.pt")
    for place in (path, path / "first.pt", path / "parts" / "second.bin"):
        again = load(SYSTEM, ROW, place)
        for name, value in network.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)


def test_optional_files_may_be_missing(folder: tuple[Path, Two]) -> None:
    path, network = folder
    (path / "parts" / "second.bin").unlink()
    again: Any = load(SYSTEM, ROW, path)
    assert again.second is None
    assert torch.equal(again.first.weight, network.first.weight)
    half = replace(network.config, second=False).build()
    export(half, SYSTEM, ROW, path / "half")
    assert not (path / "half" / "parts").exists()


def test_a_needed_file_is_named(folder: tuple[Path, Two]) -> None:
    path, _ = folder
    (path / "first.pt").unlink()
    with pytest.raises(LexelError, match=r"holds no first\.pt; a checkpoint of two needs them"):
        locate(SYSTEM, path)


def test_unknown_keys_are_named_with_their_file(folder: tuple[Path, Two]) -> None:
    path, _ = folder
    torch.save(
        {"weight": torch.zeros(4, 3), "bias": torch.zeros(4), "scale": torch.ones(1)},
        path / "parts/second.bin",
    )
    with pytest.raises(LexelError, match=r"unknown parts/second\.bin:scale"):
        load(SYSTEM, ROW, path)


def test_offline_the_row_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(LexelError, match=r"first\.pt of user/two could not be fetched .* give a folder"):
        load(SYSTEM, ROW)
