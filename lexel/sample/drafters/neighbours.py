"""Guessing a code from the codes to its left and above, by a trained table and without any network.

* `TableGuess` gives Jacobi decoding the codes that enter its window (`JacobiDrafter(init=…)`).
* `TableDrafter` drafts a chain of them: far cheaper than a network, and less often right.

Both know codes of pictures only. A neighbour may lie in the row's own generated tokens or in the draft. Of
several codes per position each is guessed from the neighbours in its own codebook.

n codes · K codes of one codebook
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lexel.errors import LexelError
from lexel.models.neighbour_table import ABSENT, NeighbourTable
from lexel.sample.drafters.base import Drafter
from lexel.sample.logits import Distribution, SamplingConfig, target_distribution
from lexel.sample.policy import Choice, Place, Token
from lexel.sample.session import Proposal, Row, Session
from lexel.sample.stream import Prediction, Tree
from lexel.tokenizers.layout import CodeLayout


class Cell(NamedTuple):
    """A place to guess a code for, and the tokens drafted between it and the row's last known token."""

    row: Row
    place: Place
    drafted: Sequence[Token]


class TableGuess:
    """The table's distribution of a code, under the temperature and filters that the target is sampled with
    (guidance apart). Called as `lexel.sample.drafters.jacobi.Guess`."""

    def __init__(self, table: NeighbourTable) -> None:
        self.table = table
        self._books: dict[tuple[int, int], tuple[dict[int, int], Tensor | None, Tensor]] = {}

    def __call__(
        self, row: Row, place: Place, drafted: Sequence[Token], column: int = 0
    ) -> Distribution | None:
        """The distribution of one code; None where no code may come (text, ends of rows), and for the shifted
        columns of a delayed layout, whose neighbours the place does not tell."""
        if not self.knows(place, column) or (column and _layout(row, place).pattern == "delayed"):
            return None
        return self.distributions([Cell(row, place, drafted)], column)

    @staticmethod
    def knows(place: Place, column: int = 0) -> bool:
        """Whether a code may come at a place, in that column."""
        return bool(place.books) and place.books[column] is not None

    @torch.inference_mode()
    def distributions(self, cells: Sequence[Cell], column: int = 0) -> Distribution:
        """Of the codes in one column of n places, all `knows`."""
        groups: dict[tuple[SamplingConfig, int, int], list[int]] = {}
        for number, cell in enumerate(cells):
            key = cell.place.config, id(cell.place.choice), cell.place.books[column] or 0
            groups.setdefault(key, []).append(number)
        parts = [self._part([cells[number] for number in numbers], column) for numbers in groups.values()]
        order = torch.tensor([number for numbers in groups.values() for number in numbers])
        together = Distribution.cat(parts)
        return together if len(parts) == 1 else together[order.argsort().to(together.ids.device)]

    def _part(self, cells: Sequence[Cell], column: int) -> Distribution:
        """Of places with one codebook and one choice."""
        row, place, _ = cells[0]
        codes, order, ids = self._book(row, place, column)
        around = [self._around(cell, codes, column) for cell in cells]
        device = next(self.table.parameters()).device
        left, above, slot = torch.tensor(around, device=device).unbind(dim=1)
        logits = self.table(left, above, slot, place.books[column] or 0).to(ids.device)
        config = replace(place.config.column(column), guidance=1.0)
        vocabulary = row.policy.grammar.codec.vocabulary
        return target_distribution(
            logits if order is None else logits[:, order], None, config, ids, size=vocabulary.size
        )

    def _book(self, row: Row, place: Place, column: int) -> tuple[dict[int, int], Tensor | None, Tensor]:
        """Of a codebook: the code of each id, the codes in the order of ids (None: they are), the ids."""
        book, vocabulary = place.books[column] or 0, row.policy.grammar.codec.vocabulary
        key = id(vocabulary), book
        if key not in self._books:
            block = vocabulary.block(vocabulary.modalities[place.modality], book)
            sizes = self.table.config.codebook_sizes
            if book >= len(sizes) or sizes[book] != len(block):
                raise LexelError(
                    f"the neighbour table is for codebooks of {sizes} codes, the vocabulary's codebook "
                    f"{book} has {len(block)}; take both from the same training run."
                )
            ids, order = block.sort()
            ascending = bool((ids == block).all())
            self._books[key] = (
                {token: code for code, token in enumerate(block.tolist())},
                None if ascending else order.to(place.choice.ids.device),
                _shared(place.choice, ids) if column == 0 else ids.to(place.choice.ids.device),
            )
        return self._books[key]

    def _around(self, cell: Cell, codes: dict[int, int], column: int) -> tuple[int, int, int]:
        """The codes to the left and above (`ABSENT` where there is none), and the slot."""
        layout = _layout(cell.row, cell.place)
        index, line, across = cell.place.position
        stride = layout.k if layout.pattern == "interleaved" else 1
        grid = self.table.config.grid
        before = codes.get(_token(cell, index - stride, column), ABSENT) if across > 1 else ABSENT
        if grid is None:
            return before, ABSENT, across - 1
        per_row = grid[1] * stride + layout.row_end
        above = codes.get(_token(cell, index - per_row, column), ABSENT) if line > 1 else ABSENT
        return before, above, (line - 1) * grid[1] + across - 1


def _shared(choice: Choice, ids: Tensor) -> Tensor:
    """The ids of a choice that holds nothing else: rows of one support are compared without a search."""
    return choice.ids if len(choice.ids) == len(ids) else ids.to(choice.ids.device)


def _layout(row: Row, place: Place) -> CodeLayout:
    codec = row.policy.grammar.codec
    return codec.layouts[codec.vocabulary.modalities[place.modality]]


def _token(cell: Cell, index: int, column: int) -> int:
    """The id in a column at an index of the document, -1 where it is not known."""
    place = index - len(cell.row.prompt)
    known = len(cell.row.ids)
    if place < 0 or place >= known + len(cell.drafted):
        return -1
    return (cell.row.ids[place] if place < known else cell.drafted[place - known].ids)[column]


class TableDrafter(Drafter):
    """Chains of up to `window` positions drawn from a table."""

    def __init__(self, table: NeighbourTable, window: int = 4) -> None:
        super().__init__(window)
        self.guess = TableGuess(table)

    def admit(self, session: Session, rows: list[Row], prompts: Prediction | None) -> None:
        """Raises LexelError for a layout that delays the codes of a position."""
        layouts = session.rows[0].policy.grammar.codec.layouts.values()
        if session.columns > 1 and any(layout.pattern == "delayed" for layout in layouts):
            raise LexelError(
                "neighbour tables draft whole positions, this model delays their codes; use decoding=jacobi."
            )

    def propose(self, session: Session) -> Proposal:
        """See `Drafter.propose`."""
        trees = [Tree.line([], [row.state]) for row in session.rows]
        parts = [list[Distribution]() for _ in range(session.columns)]
        owners = list[tuple[int, int]]()
        for step in range(self.window):
            cells = {
                number: Cell(row, row.policy.place(tree.states[-1]), tree.tokens)
                for number, (row, tree) in enumerate(zip(session.rows, trees))
                if len(tree.tokens) == step < self.limit(row) and not row.policy.grammar.done(tree.states[-1])
            }
            cells = {number: cell for number, cell in cells.items() if self.guess.knows(cell.place)}
            if not cells:
                break
            owners += [(number, step) for number in cells]
            columns = [self._draw(session, list(cells.values()), c, parts[c]) for c in range(len(parts))]
            for (number, cell), ids in zip(cells.items(), zip(*columns)):
                state = trees[number].states[-1]
                trees[number].tokens.append(cell.row.policy.token(state, ids))
                trees[number].states.append(cell.row.policy.advance(state, ids[0]))
        trees = [Tree.line(tree.tokens, tree.states) for tree in trees]
        if not owners:
            return Proposal(trees)
        longest = max(len(tree.tokens) for tree in trees)
        order = [number * longest + step for number, step in owners]
        return Proposal(trees, tuple(session.arranged(part, order, len(trees) * longest) for part in parts))

    def _draw(
        self, session: Session, cells: Sequence[Cell], column: int, parts: list[Distribution]
    ) -> list[int]:
        """The ids of one column of the cells; their distributions are added to `parts`."""
        parts.append(self.guess.distributions(cells, column))
        uniforms = torch.tensor([cell.row.random.random() for cell in cells], dtype=torch.float64)
        return parts[-1].draw(uniforms.to(session.device)).tolist()
