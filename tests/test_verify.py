"""Published systems against the numbers of their own implementations (`tests/golden/`), and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lexel.cli import main
from lexel.verify import verify
from lexel.verify.compare import SYSTEMS, compare

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("system", sorted(path.name for path in GOLDEN.iterdir() if path.name in SYSTEMS))
def test_every_recorded_tensor_agrees(system: str) -> None:
    report = verify(system, GOLDEN / system)
    assert report.passed, "\n" + report.table()


def test_every_system_has_a_fixture() -> None:
    assert set(SYSTEMS) == {path.name for path in GOLDEN.iterdir()}


class TestTheRule:
    def test_floats_may_differ_by_a_ten_thousandth_of_the_largest(self) -> None:
        expected = torch.tensor([2.0, -10.0])
        assert compare("x", expected + torch.tensor([9e-4, 0]), expected).status == "close"
        assert compare("x", expected + torch.tensor([1.1e-3, 0]), expected).status == "different"
        assert compare("x", torch.full((2,), 9e-7), torch.zeros(2)).status == "close"
        assert compare("x", torch.full((2,), 2e-6), torch.zeros(2)).status == "different"

    def test_nan_never_agrees(self) -> None:
        assert not compare("x", torch.tensor([float("nan")]), torch.tensor([1.0])).passed

    def test_integers_must_be_identical(self) -> None:
        expected = torch.tensor([3, 4])
        assert compare("x", expected, expected).status == "equal"
        assert compare("x", torch.tensor([3, 5]), expected).reason == "1 of 2 differ"

    def test_shapes_must_be_identical_but_for_scalars(self) -> None:
        assert compare("x", torch.ones(3, 1), torch.ones(1, 3)).status == "different"
        assert compare("x", torch.tensor(1.0), torch.ones(1)).status == "close"

    def test_what_is_not_recomputed_fails_unless_it_was_an_input(self) -> None:
        assert not compare("x", None, torch.ones(1)).passed
        assert compare("x", None, torch.ones(1), is_input=True).passed


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llamagen_vq", tmp_path / "fixture"))


class TestCommand:
    def test_a_correct_fixture_exits_with_0(self, capsys) -> None:
        assert main(["verify", "janus_vq", str(GOLDEN / "janus_vq"), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["passed"]
        assert {one["status"] for one in report["tensors"]} == {"close", "equal", "input"}

    def test_a_wrong_or_unknown_tensor_exits_with_1_and_is_named(self, copy: Path, capsys) -> None:
        tensors = load_file(copy / "io.safetensors")
        tensors["recon"] *= 1.01
        tensors["surprise"] = torch.ones(2)
        save_file(tensors, copy / "io.safetensors")
        assert main(["verify", "llamagen_vq", str(copy)]) == 1
        table = capsys.readouterr().out
        assert "FAILED (2 of 22)" in table
        assert [line.split()[0] for line in table.splitlines() if "different" in line] == ["recon"]
        assert [line.split()[0] for line in table.splitlines() if "missing" in line] == ["surprise"]

    def test_a_wrong_record_of_decisions_is_named(self, tmp_path: Path, capsys) -> None:
        """LANTERN's records are lists of cases beside tensors, with no network."""
        folder = Path(shutil.copytree(GOLDEN / "lantern", tmp_path / "fixture"))
        cases = json.loads((folder / "tree.json").read_text())
        cases[3]["lossless"]["uniforms_used"] += 1
        (folder / "tree.json").write_text(json.dumps(cases))
        tensors = load_file(folder / "single.safetensors")
        tensors["accept"][5] ^= 1
        save_file(tensors, folder / "single.safetensors")
        assert main(["verify", "lantern", str(folder)]) == 1
        wrong = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "different" in line]
        assert wrong == ["single.accept", f"tree.{cases[3]['id']}.lossless.uniforms_used"]
        (folder / "chain.json").unlink()
        assert main(["verify", "lantern", str(folder)]) == 2
        assert "holds no chain.json" in capsys.readouterr().err

    def test_weights_may_lie_in_a_file(self, copy: Path, tmp_path: Path) -> None:
        from lexel.verify.fixture import write_by_rule

        shutil.copy(write_by_rule(copy, tmp_path), copy / "weights.pt")
        (copy / "weights.json").unlink()
        assert main(["verify", "llamagen_vq", str(copy)]) == 0

    @pytest.mark.parametrize("broken", ["config.json", "io.safetensors", "weights.json"])
    def test_a_fixture_without_its_parts_is_one_sentence(self, copy: Path, broken: str, capsys) -> None:
        (copy / broken).unlink()
        assert main(["verify", "llamagen_vq", str(copy)]) == 2
        assert broken in capsys.readouterr().err

    def test_an_unknown_system_names_the_known_ones(self, copy: Path, capsys) -> None:
        assert main(["verify", "llamagen", str(copy)]) == 2
        assert "llamagen_vq" in capsys.readouterr().err
