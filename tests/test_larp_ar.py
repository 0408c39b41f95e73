"""LARP's generators: published files and frame prediction. The numbers of the published code are checked by
test_verify.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lexel.checkpoints import read_checkpoint, save_checkpoint
from lexel.errors import LexelError
from lexel.models import export_published, find_published, larp_ar, load_published
from lexel.sample.conditional import draw
from lexel.sample.logits import SamplingConfig
from lexel.verify.fixture import Fixture

GOLDEN = Path(__file__).parent / "golden" / "larp_ar"
# Row → its prefix and arguments in the fixture, and the name of its list of keys.
MODELS = {
    "larp-l-long-ar": ("class_cond.", "args", "LARP-L-long-AR (class-conditional UCF101)"),
    "larp-l-long-ar-fp": (
        "frame_prediction.",
        "frame_prediction_args",
        "LARP-L-long-AR-FP (K600 frame prediction)",
    ),
}


@pytest.fixture(params=MODELS)
def loaded(request, tmp_path: Path):
    """(row, arguments, folder as the hub has it, model)"""
    prefix, arguments, _ = MODELS[request.param]
    fixture = Fixture(GOLDEN, tmp_path)
    state = read_checkpoint(fixture.weights())
    folder = tmp_path / "hub"
    folder.mkdir()
    own = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    save_checkpoint(own, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**fixture.config[arguments], "token_dropout_p": 0.1}))
    return request.param, fixture.config[arguments], folder, load_published(request.param, folder)


class TestFiles:
    @pytest.mark.parametrize("name", MODELS)
    def test_full_size_key_lists_are_consumed_exactly(self, name: str) -> None:
        system, row = find_published(name)
        recorded = json.loads((GOLDEN / "published_keys.json").read_text())[MODELS[name][2]]
        with torch.device("meta"):
            model = system.config(row.arguments).build()
        assert system.layouts[0].shapes(model) == {key: tuple(shape) for key, shape in recorded}

    def test_every_list_and_row_is_checked(self) -> None:
        lists = json.loads((GOLDEN / "published_keys.json").read_text())
        assert {one[2] for one in MODELS.values()} == set(lists)
        assert {row.name for row in larp_ar.SYSTEMS[0].rows} == set(MODELS)

    def test_the_config_beside_the_weights_is_read(self, loaded) -> None:
        row, arguments, folder, model = loaded
        assert model.config.steps == arguments["max_seq_len"]
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({"config": content}))
        assert load_published(row, folder).fingerprint() == model.fingerprint()

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_what_is_written_is_what_was_read(self, loaded, suffix: str, tmp_path: Path) -> None:
        row, arguments, folder, model = loaded
        export_published(model, row, tmp_path / f"again{suffix}")
        before, after = read_checkpoint(folder), read_checkpoint(tmp_path / f"again{suffix}")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert (
            load_published(row, tmp_path / f"again{suffix}", arguments).fingerprint() == model.fingerprint()
        )
        with pytest.raises(LexelError, match="another kind of model"):
            export_published(model, next(name for name in MODELS if name != row), tmp_path / "x.pt")


class TestDrawing:
    def test_clips_of_classes_and_of_first_frames(self, loaded) -> None:
        row, _, _, model = loaded
        greedy = SamplingConfig(temperature=0.0)
        if row == "larp-l-long-ar":
            codes = draw(model, [0, 3], sampling=greedy)
            with pytest.raises(LexelError, match="0 to 6"):
                draw(model, [8])
        else:
            given = torch.arange(40).reshape(2, 20) % 64
            codes = draw(model, list(given), sampling=greedy)
            # With the separator behind the codes it is the same condition.
            again = draw(model, [torch.cat([given[0], torch.tensor([64])])], sampling=greedy)
            assert torch.equal(again.indices, codes.indices[:1])
            with pytest.raises(LexelError, match="20 codes below 64, got \\[19\\]"):
                draw(model, [given[0, 1:]])
            with pytest.raises(LexelError, match="20 codes below 64"):
                draw(model, [given[0] + 60])
            with pytest.raises(LexelError, match="no null form"):
                draw(model, [given[0]], sampling=SamplingConfig(guidance=2.0))
        assert codes.indices.shape == (2, 20, 1)
        assert codes.grid is None
        assert not torch.equal(codes.indices[0], codes.indices[1])
