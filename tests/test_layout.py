"""Laws of code layouts: flatten and unflatten are inverse, and `allowed` describes what flatten writes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lexel.tokenizers.layout import EMPTY, PATTERNS, CodeLayout
from lexel.types import Codes


@st.composite
def layouts(draw):
    sizes = tuple(draw(st.lists(st.integers(2, 9), min_size=1, max_size=3)))
    pattern = draw(st.sampled_from(PATTERNS))
    order = draw(st.sampled_from(("grid", "length", "flexible", "scales")))
    if order == "grid":
        return CodeLayout(sizes, grid=(draw(st.integers(1, 4)), draw(st.integers(1, 4))), pattern=pattern)
    if order == "scales":
        scales = tuple((s, s) for s in range(1, draw(st.integers(2, 4))))
        return CodeLayout(sizes, scales=scales, pattern=pattern)
    flexible = order == "flexible" and pattern != "delayed"
    return CodeLayout(sizes, length=draw(st.integers(1, 7)), flexible=flexible, pattern=pattern)


@st.composite
def layouts_with_codes(draw):
    layout = draw(layouts())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(1, 3))
    indices = torch.stack(
        [torch.randint(0, k, (rows, layout.positions), generator=generator) for k in layout.codebook_sizes], 2
    )
    lengths = None
    if layout.flexible:
        lengths = torch.randint(1, layout.positions + 1, (rows,), generator=generator)
        indices = indices * (torch.arange(layout.positions) < lengths[:, None])[..., None]
    return layout, Codes(indices, layout.grid, layout.scales, lengths)


@settings(max_examples=200, deadline=None)
@given(layouts_with_codes())
def test_unflatten_inverts_flatten(case):
    layout, codes = case
    back = layout.unflatten(layout.flatten(codes))
    assert torch.equal(back.indices, codes.indices)
    assert (back.grid, back.scales) == (codes.grid, codes.scales)
    assert (back.lengths is None) == (codes.lengths is None)
    if codes.lengths is not None:
        assert torch.equal(back.lengths, codes.lengths)


@settings(max_examples=100, deadline=None)
@given(layouts_with_codes())
def test_allowed_names_the_codebook_of_every_written_cell(case):
    layout, codes = case
    flat = layout.flatten(codes)
    assert flat.shape[1:] == (layout.steps, layout.columns)
    for step in range(layout.steps):
        for column, codebook in enumerate(layout.allowed(step)):
            written = flat[:, step, column]
            if codebook is None:
                assert (written == EMPTY).all()
            else:
                assert (written < layout.codebook_sizes[codebook]).all()
                assert layout.flexible or (written >= 0).all()


@given(layouts())
def test_coordinates_stay_on_the_grid(layout):
    height, width = layout.grid or (layout.scales[-1] if layout.scales else (1, layout.positions))
    for step in range(layout.steps):
        row, column = layout.coordinates(step)
        assert 0 <= row < height
        assert 0 <= column < width


def test_delay_pattern_shifts_codebook_j_by_j_steps():
    layout = CodeLayout((9, 9), length=3, pattern="delayed")
    codes = Codes(torch.tensor([[[1, 4], [2, 5], [3, 6]]]))
    assert layout.flatten(codes)[0].tolist() == [[1, EMPTY], [2, 4], [3, 5], [EMPTY, 6]]


def test_the_sequential_pattern_writes_one_stream_after_the_other():
    layout = CodeLayout((9, 9), length=3, pattern="sequential")
    codes = Codes(torch.tensor([[[1, 4], [2, 5], [3, 6]]]))
    assert layout.flatten(codes)[0, :, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert [layout.allowed(step) for step in range(6)] == [(0,), (0,), (0,), (1,), (1,), (1,)]
    assert [layout.coordinates(step) for step in range(6)] == [(0, 0), (0, 1), (0, 2)] * 2
    assert (layout.columns, layout.streams) == (1, True)


def test_shorter_streams_leave_room_or_stand_close():
    layout = CodeLayout((9, 9), length=3, flexible=True, pattern="sequential")
    codes = Codes(torch.tensor([[[1, 4], [2, 5], [0, 0]]]), lengths=torch.tensor([2]))
    flat = layout.flatten(codes)
    assert flat[0, :, 0].tolist() == [1, 2, EMPTY, 4, 5, EMPTY]
    for written in (flat, flat[flat != EMPTY].reshape(1, -1, 1)):
        back = layout.unflatten(written)
        assert torch.equal(back.indices, codes.indices)
        assert back.lengths.tolist() == [2]
    with pytest.raises(ValueError, match="do not fill positions of 2 codes"):
        layout.unflatten(torch.ones(1, 3, 1, dtype=torch.long))


def test_a_shorter_flexible_sequence_is_a_prefix():
    layout = CodeLayout((9,), length=5, flexible=True)
    codes = layout.unflatten(torch.tensor([[[3], [4]], [[5], [EMPTY]]]))
    assert codes.lengths.tolist() == [2, 1]
    assert codes.indices[:, :2, 0].tolist() == [[3, 4], [5, 0]]


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ([[[1], [EMPTY], [2]]], "continue after an empty step"),
        ([[[1], [2], [9]]], "codes must lie below"),
        ([[[EMPTY], [EMPTY], [EMPTY]]], "must lie in 1"),
    ],
)
def test_broken_flexible_sequences_are_refused(flat, message):
    with pytest.raises(ValueError, match=message):
        CodeLayout((9,), length=3, flexible=True).unflatten(torch.tensor(flat))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"grid": (2, 2), "length": 4},
        {"grid": (2, 2), "flexible": True},
        {"length": 4, "row_end": True},
        {"length": 4, "pattern": "diagonal"},
        {"codebook_sizes": (4, 4), "grid": (2, 2), "row_end": True, "pattern": "sequential"},
    ],
)
def test_contradictory_layouts_are_refused(arguments):
    with pytest.raises(ValueError, match=r"[Ll]ayout|pattern|row_end"):
        CodeLayout(**{"codebook_sizes": (4,), **arguments})


def test_codes_check_their_shapes():
    indices = torch.zeros(2, 4, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="grid"):
        Codes(indices, grid=(3, 2))
    with pytest.raises(ValueError, match="lengths"):
        Codes(indices, lengths=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="long"):
        Codes(indices.float())
