"""Models with several codes per position: the columns after the first, by the model's own head, with the
settings and guidance of each column (`SamplingConfig.further`).

n positions · k columns · d width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lexel.document import State
from lexel.sample.logits import Distribution, target_distribution
from lexel.sample.policy import Place
from lexel.sample.session import Session, unguided
from lexel.sample.stream import Prediction, Tree

Books = tuple[int | None, ...]


@dataclass(frozen=True)
class Cell:
    """A position whose columns are asked for: the sequence, the column of the `Prediction` it is read from,
    its place, and the ids that stand there already."""

    row: int
    position: int
    place: Place
    ids: tuple[int, ...]


class Columns:
    """The further columns of the sequences of a session, read from the target's or a drafter's passes."""

    def __init__(self, session: Session) -> None:
        self.session, self.count = session, session.columns
        self.vocabulary = session.rows[0].policy.grammar.codec.vocabulary
        self._codes: dict[tuple[int, int], frozenset[int]] = {}

    def books(self, place: Place, token: int) -> Books:
        """The codebook of each column beside `token`. A flexible picture's end may stand where a code might;
        it has no further columns, like text."""
        nothing: Books = (None,) * self.count
        if not place.books or place.books[0] is None:
            return place.books or nothing
        key = place.modality, place.books[0]
        if key not in self._codes:
            block = self.vocabulary.block(self.vocabulary.modalities[place.modality], place.books[0])
            self._codes[key] = frozenset(block.tolist())
        return place.books if token in self._codes[key] else nothing

    def complete(
        self, prediction: Prediction, cells: Sequence[Cell]
    ) -> tuple[list[tuple[int, ...]], list[tuple[Distribution, ...]]]:
        """Sample what is missing: per cell all k ids, and the distributions (of one row) of the missing
        ones."""
        done: list[tuple[int, ...]] = [cell.ids for cell in cells]
        drawn: list[list[Distribution]] = [[] for _ in cells]
        if not cells:
            return done, []
        for column in range(min(len(cell.ids) for cell in cells), self.count):
            here = [i for i in range(len(cells)) if len(done[i]) == column]
            if not here:
                continue
            now = [Cell(cells[i].row, cells[i].position, cells[i].place, done[i]) for i in here]
            probs = self._column(prediction, now, column, next_only=True)
            uniforms = self.session.uniforms(1, {cell.row for cell in now})[:, 0][
                torch.tensor([cell.row for cell in now])
            ]
            for i, token, number in zip(
                here, probs.draw(uniforms.to(probs.probs.device)).tolist(), range(len(here))
            ):
                done[i] = (*done[i], token)
                drawn[i].append(probs[number : number + 1])
        return done, [tuple(line) for line in drawn]

    def targets(self, prediction: Prediction, trees: Sequence[Tree], nodes: int) -> tuple[Distribution, ...]:
        """Per column after the first ``b · nodes`` distributions (empty past a tree's end): of each drafted
        token's code there, given its codes before it."""
        cells, order = [], []
        for row, tree in enumerate(trees):
            policy = self.session.rows[row].policy
            for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents)):
                place = policy.place(_state(tree, parent))
                cells.append(Cell(row, parent + 1, place, token.ids))
                order.append(row * nodes + node)
        return tuple(
            self.session.arranged(
                [self._column(prediction, cells, column, next_only=False)] if cells else [],
                order,
                len(trees) * nodes,
            )
            for column in range(1, self.count)
        )

    def _column(
        self, prediction: Prediction, cells: Sequence[Cell], column: int, *, next_only: bool
    ) -> Distribution:
        """The distributions of one column of the cells, given their ids before it."""
        groups: dict[tuple, list[int]] = {}
        for number, cell in enumerate(cells):
            book = self.books(cell.place, cell.ids[0])[column]
            config = cell.place.config.column(column)
            groups.setdefault((config, cell.place.modality, book), []).append(number)
        parts, order = [], []
        for (config, modality, book), numbers in groups.items():
            order += numbers
            if book is None:  # text, or delay padding
                parts.append(self._padding(len(numbers), prediction.hidden))
                continue
            some = [cells[number] for number in numbers]
            guided = config.guidance != 1.0 and prediction.guided
            logits, twins = self._logits(prediction, some, column, next_only, guided)
            ids = self.vocabulary.block(self.vocabulary.modalities[modality], book).to(logits.device)
            size = self.vocabulary.size
            settings = config if guided else unguided(config)
            parts.append(target_distribution(logits, twins, settings, ids, size=size))
        return self.session.arranged(parts, order, len(cells))

    def _padding(self, count: int, like: Tensor) -> Distribution:
        ids = torch.full((count, 1), self.vocabulary.special["pad"], device=like.device)
        return Distribution(ids, torch.ones(count, 1, device=like.device), self.vocabulary.size)

    def _logits(
        self, prediction: Prediction, cells: Sequence[Cell], column: int, next_only: bool, guided: bool
    ) -> tuple[Tensor, Tensor | None]:
        lm, device = prediction.lm, prediction.hidden.device
        where = torch.tensor([cell.row for cell in cells]), torch.tensor([cell.position for cell in cells])
        at = [prediction.cond.cpu()[where]] + ([prediction.uncond.cpu()[where]] if guided else [])
        features = prediction.rows(torch.cat(at).to(device))
        pad = self.vocabulary.special["pad"]
        ids = torch.tensor([(*cell.ids, *[pad] * self.count)[: self.count] for cell in cells], device=device)
        ids = ids.repeat(len(at), 1)
        assert lm.head is not None
        if next_only:
            logits = lm.head.next_logits(features, lm.local_codes(ids)[:, :column])
        else:
            logits = lm.code_logits(features, ids)[column - 1]
        return logits[: len(cells)], logits[len(cells) :] if guided else None


def _state(tree: Tree, parent: int) -> State:
    return tree.states[parent + 1]
