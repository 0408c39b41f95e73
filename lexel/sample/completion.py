"""Pictures with holes: what is missing is drawn by the one sampler, what is there stays as it is.

The model reads a document with holes (`lexel.data.denoising`) up to ``<sep>`` and its first marker. `Infill`
then lets exactly the missing codes come, each from the codebook of its place and with its row and column, and
the markers between them.

h w grid of codes or picture · n code positions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lexel.data.denoising import check_roles, code_places, hide_codes, with_holes, without_holes
from lexel.document import DocumentCodec, Grammar, Image, Segment, Slot, State, Text, TokenSequence
from lexel.errors import LexelError
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes

Box = tuple[float, float, float, float]


class Infill(Grammar):
    """The grammar of what follows ``<sep> <span_0>``: `targets`, the missing codes of one picture and the
    markers between them, in order. Nothing depends on what is drawn, so every state has one successor."""

    def __init__(self, codec: DocumentCodec, modality: str, targets: Sequence[Slot]) -> None:
        super().__init__(codec, (modality,))
        self.targets = tuple(targets)

    def _slot(self, state: State) -> Slot | None:
        return self.targets[state.slot] if not self.done(state) else None

    def _may_end(self, state: State) -> bool:
        return False

    def advance(self, state: State, token: int) -> State:
        """The state after `token` (column 0). Raises ValueError when it is not allowed."""
        if not bool(self.allowed(state)[token]):
            name = self.codec.vocabulary.name(token)
            raise ValueError(f"{name} may not follow here (position {state.index}).")
        last = state.slot + 1 == len(self.targets)
        return State(int(last), state.slot + 1, state.index + 1, state.modality)

    def remaining(self, state: State) -> int:
        """How many more tokens come."""
        return len(self.targets) - state.slot


@dataclass(frozen=True)
class Completion:
    """A picture to complete: what the model reads, with and without its caption, and what may follow."""

    prompt: TokenSequence
    null: TokenSequence
    grammar: Infill

    def read(self, ids: Tensor) -> Image:
        """The whole picture from what was drawn, long ``[m]`` or ``[m, c]``."""
        codec = self.grammar.codec
        written = torch.cat([self.prompt.ids, ids.reshape(-1, *self.prompt.ids.shape[1:])])
        pictures = [x for x in codec.parse(without_holes(codec, written)) if isinstance(x, Image)]
        return pictures[-1]


def completion(
    codec: DocumentCodec, codes: Codes, keep: Tensor, caption: str | None = None, modality: str = "image"
) -> Completion:
    """What completes one picture. codes: a batch of one; those where `keep`, bool ``[n]``, is False are
    ignored and drawn anew. caption: what the whole picture shall show. Raises LexelError when the model was
    not trained to, ValueError when nothing is to be drawn or shapes disagree."""
    try:
        check_roles(codec.vocabulary)
    except ValueError as error:
        raise LexelError(f"this model was not trained to complete pictures: {error}") from None
    document: list[Segment] = [] if caption is None else [Text(caption)]
    document.append(Image(codes, modality=modality))
    prompt, targets = _prompt_and_targets(codec, document, ~keep, unconditional=caption is None)
    null, _ = _prompt_and_targets(codec, document, ~keep, unconditional=True)
    return Completion(prompt, null, Infill(codec, modality, targets))


def _prompt_and_targets(
    codec: DocumentCodec, document: Sequence[Segment], missing: Tensor, *, unconditional: bool
) -> tuple[TokenSequence, list[Slot]]:
    whole = codec.build(document, unconditional=unconditional)
    modality = document[-1].modality
    hidden = hide_codes(codec, whole, missing)
    if not hidden.any():
        raise ValueError("every code of the picture is kept; there is nothing to draw.")
    holed = with_holes(codec, whole, hidden)
    first = whole.first.tolist()
    places = code_places(codec, first, first.index(codec.vocabulary.begin(modality)), modality)
    steps = iter([step for step, place in enumerate(places) if hidden[place]])
    ids = holed.first.tolist()
    start = ids.index(codec.vocabulary.special["sep"]) + 2  # the first marker is certain
    special = set(codec.vocabulary.special.values())
    targets = []
    for place in range(start, len(ids) - 1):
        _, row, column = holed.positions[place].tolist()
        marker = ids[place] if ids[place] in special else None
        targets.append(Slot(marker, None if marker is not None else next(steps), row, column))
    prompt = TokenSequence(
        holed.ids[:start], holed.modality[:start], holed.positions[:start], holed.loss_mask[:start]
    )
    return prompt, targets


def cells_outside(box: Box, layout: CodeLayout, size: tuple[int, int]) -> Tensor:
    """Bool ``[n]``: the cells of a grid of codes that a box (x0, y0, x1, y1) in pixels of a picture of `size`
    (height, width) does not touch. Raises ValueError for an empty box, or one outside of the picture, or
    codes that do not lie on a grid."""
    if layout.grid is None:
        raise ValueError(f"a box needs codes on a grid, these are {layout.order}; give keep instead.")
    (x0, y0, x1, y1), (height, width) = box, size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(
            f"a box is x0,y0,x1,y1 with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}, got {box}."
        )
    h, w = layout.grid
    rows, columns = (torch.arange(count) * side / count for count, side in ((h, height), (w, width)))
    inside_y = (rows < y1) & (rows + height / h > y0)
    inside_x = (columns < x1) & (columns + width / w > x0)
    return ~(inside_y[:, None] & inside_x[None, :]).flatten()
