"""The table of neighbouring codes: its formula, its edges, and that it learns what it can express."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import _tiny_tokenizer_config as tiny_tokenizer_config

from lexel.data.tokenized import CodeExample
from lexel.errors import LexelError
from lexel.models.neighbour_table import NeighbourTable, NeighbourTableConfig
from lexel.tokenizers.layout import CodeLayout
from lexel.train.neighbour_module import stack_codes
from lexel.types import Codes


def filled(config: NeighbourTableConfig) -> NeighbourTable:
    torch.manual_seed(0)
    table = config.build()
    for parameter in table.parameters():
        torch.nn.init.normal_(parameter)
    return table


def test_logits_are_sums_of_rows_and_absent_neighbours_have_their_own() -> None:
    table = filled(NeighbourTableConfig((5, 3), grid=(2, 4)))
    left, above, slot = torch.tensor([1, -1, 2]), torch.tensor([0, 2, -1]), torch.tensor([7, 0, 3])
    for codebook, size in enumerate((5, 3)):
        a, b, c = (part[codebook].weight for part in (table.left, table.above, table.slot))
        assert [len(x) for x in (a, b, c)] == [size + 1, size + 1, 8]
        expected = torch.stack([a[1] + b[0] + c[7], a[size] + b[2] + c[0], a[2] + b[size] + c[3]])
        torch.testing.assert_close(table(left, above, slot, codebook), expected)


def test_neighbours_in_the_raster_and_in_a_line() -> None:
    indices = torch.arange(6)[None, :, None]
    left, above = filled(NeighbourTableConfig((6,), grid=(2, 3))).neighbours(indices)
    assert left[0, :, 0].tolist() == [-1, 0, 1, -1, 3, 4]
    assert above is not None
    assert above[0, :, 0].tolist() == [-1, -1, -1, 0, 1, 2]
    left, above = filled(NeighbourTableConfig((6,), length=6)).neighbours(indices[:, :4])
    assert left[0, :, 0].tolist() == [-1, 0, 1, 2]
    assert above is None


def test_the_loss_is_the_cross_entropy_of_each_code_in_use() -> None:
    table = filled(NeighbourTableConfig((4, 5), length=3))
    indices = torch.stack([torch.randint(4, (2, 3)), torch.randint(5, (2, 3))], dim=-1)
    loss = table.loss(Codes(indices, lengths=torch.tensor([3, 1])))
    assert loss.shape == (4, 2)  # 3 codes of the first picture, 1 of the second
    rows = [(0, 0), (0, 1), (0, 2), (1, 0)]
    for row, (picture, slot) in enumerate(rows):
        for j in range(2):
            left = indices[picture, slot - 1, j] if slot else torch.tensor(-1)
            logits = table(left[None], None, torch.tensor([slot]), j)[0]
            torch.testing.assert_close(loss[row, j], -logits.log_softmax(-1)[indices[picture, slot, j]])


def pictures(table: NeighbourTable, count: int) -> Codes:
    """Codes drawn from a table, one after the other."""
    size = table.config.codebook_sizes[0]
    height, width = table.config.grid or (1, 0)
    drawn = torch.full((count, height + 1, width + 1), -1)  # an edge of absent neighbours above and left
    for slot in range(table.config.slots):
        row, column = slot // width + 1, slot % width + 1
        logits = table(drawn[:, row, column - 1], drawn[:, row - 1, column], torch.full((count,), slot))
        assert logits.shape == (count, size)
        drawn[:, row, column] = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    return Codes(drawn[:, 1:, 1:].reshape(count, -1, 1), (height, width))


@torch.no_grad()
def figure(table: NeighbourTable, codes: Codes) -> float:
    return float(table.loss(codes).mean())


def test_it_finds_the_table_that_drew_the_pictures() -> None:
    config = NeighbourTableConfig((6,), grid=(4, 4))
    truth, table = filled(config).requires_grad_(False), config.build()
    codes, held_out = pictures(truth, 1000), pictures(truth, 300)
    assert figure(table, held_out) == pytest.approx(math.log(6), rel=1e-6)  # it knows nothing yet
    optimizer = torch.optim.Adam(table.parameters(), lr=0.1)
    for _ in range(100):
        loss = table.loss(codes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = figure(truth, held_out)
    assert best < 0.8 * math.log(6)
    assert best - 0.01 < figure(table, held_out) < best + 0.03


def test_a_table_survives_its_folder(tmp_path: Path) -> None:
    table = filled(NeighbourTableConfig((5, 3), grid=(2, 4)))
    table.save_pretrained(tmp_path)
    loaded = NeighbourTable.from_pretrained(tmp_path)
    assert loaded.config == table.config
    assert loaded.fingerprint() == table.fingerprint()


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="exactly one of grid and length"):
        NeighbourTableConfig((4,))
    with pytest.raises(ValueError, match="exactly one of grid and length"):
        NeighbourTableConfig((4,), grid=(2, 2), length=4)
    with pytest.raises(ValueError, match="must not be empty"):
        NeighbourTableConfig((), length=4)
    with pytest.raises(ValueError, match="codes above"):
        filled(NeighbourTableConfig((4,), grid=(2, 2)))(torch.tensor([0]), None, torch.tensor([1]))


def test_stored_codes_of_a_flexible_tokenizer_keep_their_lengths() -> None:
    layout = CodeLayout((4,), length=3, flexible=True)
    examples = [CodeExample(str(n), (), torch.full((3, 1), n), length=n + 1) for n in range(3)]
    codes = stack_codes(examples, layout)
    assert codes.lengths is not None
    assert codes.lengths.tolist() == [1, 2, 3]
    assert codes.indices[:, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("family", ["vq", "factorized", "flexible"])
def test_the_stage_trains_and_exports_it(family: str, tmp_path: Path) -> None:
    from lexel.data.shapes import ShapesConfig
    from lexel.train.chain import run_chain
    from lexel.train.settings import DrafterStage, Run, Stages, Task

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer_config(family).build()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    stage = DrafterStage(
        steps=20, batch_size=8, lr=0.1, warmup=1, ema=0.0, validate_every=20, validation_batches=1,
        optimizer=partial(torch.optim.Adam),
    )  # fmt: skip
    run = Run(
        task=Task(["drafter"]),
        output=str(tmp_path),
        data=ShapesConfig(count=40),
        drafter=partial(NeighbourTableConfig),
        stages=Stages(drafter=stage),
    )
    run.codes.validation_count, run.codes.workers = 8, 0
    run_chain(run)
    table = NeighbourTable.from_pretrained(tmp_path / "drafter")
    assert table.config.codebook_sizes == tokenizer.codebook_sizes
    assert (table.config.grid, table.config.slots) == (tokenizer.layout.grid, tokenizer.layout.positions)
    assert any(bool(p.any()) for p in table.parameters())
    trained_on = json.loads((tmp_path / "drafter" / "trained_on.json").read_text())
    assert trained_on == {"tokenizer": tokenizer.fingerprint()}
    run.codes.folder = str(tmp_path)
    with pytest.raises(LexelError, match="manifest"):
        run_chain(run)  # other codes are another input: it does not count as finished
