"""Saving and loading: bit-exact, strict about keys, and a failed write keeps the previous file."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lexel.errors import LexelError
from lexel.hub import Pretrained, write_atomically


@dataclass(frozen=True)
class Inner:
    widths: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class ToyConfig:
    dim: int = 3
    inner: Inner = dataclasses.field(default_factory=Inner)
    name: str | None = None


class Toy(nn.Module, Pretrained):
    model_type = "toy"
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.dim, config.inner.widths[-1])
        self.register_buffer("count", torch.tensor([7]))


def test_round_trip_is_bit_exact(tmp_path):
    toy = Toy(ToyConfig(dim=5, inner=Inner((2, 4)), name="x"))
    toy.save_pretrained(tmp_path)
    back = Toy.from_pretrained(tmp_path)
    assert back.config == toy.config
    assert not back.training
    assert all(torch.equal(a, b) for a, b in zip(toy.state_dict().values(), back.state_dict().values()))
    assert back.fingerprint() == toy.fingerprint()


def test_bfloat16_files_load_as_float32_and_are_stable(tmp_path):
    Toy(ToyConfig()).save_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    once = Toy.from_pretrained(tmp_path / "a")
    once.save_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    assert once.linear.weight.dtype == torch.float32
    assert Toy.from_pretrained(tmp_path / "b").fingerprint() == once.fingerprint()


def test_a_changed_weight_or_config_changes_the_fingerprint():
    torch.manual_seed(0)
    toy = Toy(ToyConfig())
    before = toy.fingerprint()
    with torch.no_grad():
        toy.linear.weight[0, 0] += 1
    assert toy.fingerprint() != before


def test_an_unknown_option_and_wrong_weights_are_listed(tmp_path):
    toy = Toy(ToyConfig())
    toy.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dimm": 1}))
    with pytest.raises(LexelError, match="no option dimm"):
        Toy.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "dim": 4}))
    with pytest.raises(LexelError, match=r"linear.weight is \[2, 3\], expected \[2, 4\]"):
        Toy.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "other"}))
    with pytest.raises(LexelError, match="holds a 'other' model"):
        Toy.from_pretrained(tmp_path)
    with pytest.raises(LexelError, match="does not exist"):
        Toy.from_pretrained(tmp_path / "nowhere")


def test_damaged_weights_are_named(tmp_path):
    Toy(ToyConfig()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(LexelError, match="not a readable safetensors file"):
        Toy.from_pretrained(tmp_path)


def test_a_failed_write_keeps_the_previous_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("before")

    def full_disk(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(LexelError, match="No space left on device"):
        write_atomically(target, full_disk)
    assert target.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_options_at_their_defaults_do_not_count_in_the_fingerprint():
    @dataclass(frozen=True)
    class Grown(ToyConfig):
        new_option: int = 0

    torch.manual_seed(0)
    toy = Toy(ToyConfig(dim=5))
    before = toy.fingerprint()
    toy.config = Grown(dim=5)
    assert toy.fingerprint() == before
    toy.config = Grown(dim=5, new_option=1)
    assert toy.fingerprint() != before


def test_files_are_readable_by_others(tmp_path):
    Toy(ToyConfig()).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
