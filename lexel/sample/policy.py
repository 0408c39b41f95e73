"""What a request allows: its grammar, its sampling settings, and from both the distributions of its tokens.

v vocabulary · s ids that may come next
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lexel.document import Grammar, State
from lexel.errors import LexelError
from lexel.sample.logits import Processor, SamplingConfig


class Token(NamedTuple):
    """One position: its id in each column, its modality and its (index, row, column). embed: a continuous
    input ``[d]`` that stands in place of the ids; only prompts have any."""

    ids: tuple[int, ...]
    modality: int
    position: tuple[int, int, int]
    embed: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """The ids that may come next at some place: long ``[s]``, ascending, on the model's device; as a set; and
    as a range of ids (start, stop) to project onto."""

    ids: Tensor
    members: frozenset[int]
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        """Whether the range holds nothing else."""
        return self.stop - self.start == len(self.members)


class Place(NamedTuple):
    """What the grammar and the settings say about the next token at one state: all that is asked at every
    step, looked up once. config: the settings of this very place; books: the codebook of each column, empty
    for text and special tokens; after: the state after whatever id is chosen, None where it depends on the
    id."""

    modality: int
    position: tuple[int, int, int]
    config: SamplingConfig
    choice: Choice
    books: tuple[int | None, ...]
    after: State | None


class Policy:
    """The places of a grammar under sampling settings. Policies over the same vocabulary share `choices`.

    Raises LexelError when `sampling` names a modality that the model does not have, or has settings of
    another number of columns than it has."""

    def __init__(
        self,
        grammar: Grammar,
        sampling: Mapping[str, SamplingConfig],
        processors: Sequence[Processor] = (),
        device: torch.device | str = "cpu",
        choices: dict[bytes, Choice] | None = None,
    ) -> None:
        known = grammar.codec.vocabulary.modalities
        if unknown := sorted(set(sampling) - set(known)):
            raise LexelError(f"no modality {', '.join(unknown)} to sample; the model has {', '.join(known)}.")
        self.grammar, self.processors, self.device = grammar, tuple(processors), torch.device(device)
        for name, layout in grammar.codec.layouts.items():
            further = len(sampling.get(name, SamplingConfig()).further)
            if further not in (0, layout.columns - 1):
                raise LexelError(
                    f"{name} has {layout.columns} code(s) per position, sampling settings are given for "
                    f"{1 + further}; let further hold one entry per code after the first, or none."
                )
        self.configs = tuple(sampling.get(name, SamplingConfig()) for name in known)
        self._places: dict[State, Place] = {}
        # The grammar caches its masks: their id() stands for them while they are kept here.
        self._masks: dict[int, tuple[Tensor, Choice]] = {}
        self._choices = {} if choices is None else choices

    @property
    def guided(self) -> bool:
        """Whether any modality of the plan needs the unconditional rows."""
        names = self.grammar.codec.vocabulary.modalities
        return any(config.guided for name, config in zip(names, self.configs) if name in self.grammar.plan)

    def place(self, state: State) -> Place:
        """What is known about the next token at `state`, which must not be done."""
        place = self._places.get(state)
        if place is None:
            modality = self.grammar.modality(state)
            choice = self._choice(self.grammar.allowed(state))
            place = self._places[state] = Place(
                modality,
                self.grammar.position(state),
                self._config(modality, state),
                choice,
                self.grammar.columns(state),
                None if self.grammar.branches(state) else self.grammar.advance(state, choice.start),
            )
        return place

    def _config(self, modality: int, state: State) -> SamplingConfig:
        """The settings at `state`: those that change over a picture depend on the code's number in it."""
        config, step = self.configs[modality], self.grammar.step(state)
        return config if step is None else config.at(*step)

    def advance(self, state: State, token: int) -> State:
        """The state after `token`. Raises ValueError when it is not allowed."""
        place = self.place(state)
        if place.after is not None and token in place.choice.members:
            return place.after
        return self.grammar.advance(state, token)

    def token(self, state: State, ids: tuple[int, ...]) -> Token:
        """The token `ids` at the place that `state` says comes next."""
        place = self.place(state)
        return Token(ids, place.modality, place.position)

    def _choice(self, mask: Tensor) -> Choice:
        if id(mask) not in self._masks:
            key = mask.numpy().tobytes()
            if key not in self._choices:
                ids = mask.nonzero()[:, 0]
                members = ids.tolist()
                self._choices[key] = Choice(
                    ids.to(self.device), frozenset(members), members[0], members[-1] + 1
                )
            self._masks[id(mask)] = mask, self._choices[key]
        return self._masks[id(mask)][1]
