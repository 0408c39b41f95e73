"""Small models of several codes per position, and what the tests of all their families do with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from lexel.checkpoints import read_checkpoint
from lexel.models import export_published, find_published, load_published, published_systems
from lexel.models.raster_lm import RasterLM
from lexel.verify import verify
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden"


def tiny(system: str, seed: int = 0, scale: float = 0.3, **arguments) -> RasterLM:
    """A random model of a system, in eval mode, whose logits are far from even."""
    lm = published_systems()[system].config(arguments).build().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return lm


def assert_keys_are_consumed_exactly(system: str, rows: dict[str, str]) -> None:
    """rows: name of a list in the fixture's `published_keys.json` → name of the row that it describes."""
    lists = json.loads((GOLDEN / system / "published_keys.json").read_text())
    assert set(lists) == set(rows)
    for name, row in rows.items():
        found, published = find_published(row)
        with torch.device("meta"):
            model = found.config(published.arguments).build()
        layout = found.layouts[0]
        expected = {layout.prefix + key: tuple(shape) for key, shape in lists[name]}
        assert layout.shapes(model) == expected, row
        assert sum(p.numel() for p in model.parameters()) == published.parameters, row


def assert_export_is_exact(system: str, row: str, tmp_path: Path) -> None:
    """A file of the published layout, loaded and written again, is the same to the bit; so is our format."""
    fixture = Fixture(GOLDEN / system, tmp_path)
    known = find_published(row)[0].known(fixture.config.get("args", fixture.config))
    lm = load_published(row, fixture.weights(), known)
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"again{suffix}"
        export_published(lm, row, path)
        prefix = find_published(row)[0].layouts[0].prefix
        again = {k.removeprefix(prefix): v for k, v in read_checkpoint(path).items()}
        first = read_checkpoint(fixture.weights())
        assert set(again) == set(first)
        assert all(torch.equal(again[key], first[key]) for key in first)
        assert load_published(row, path, known).fingerprint() == lm.fingerprint()
    lm.save_pretrained(tmp_path / "own")
    assert RasterLM.from_pretrained(tmp_path / "own").fingerprint() == lm.fingerprint()


def assert_a_damaged_weight_is_noticed(system: str, key: str, tmp_path: Path) -> None:
    """Verification fails when one tensor of the file is 1 % off."""
    folder = Path(shutil.copytree(GOLDEN / system, tmp_path / "damaged"))
    rule = json.loads((folder / "weights.json").read_text())
    rule["tensors"][key]["scale"] *= 1.01
    (folder / "weights.json").write_text(json.dumps(rule))
    assert not verify(system, folder).passed
