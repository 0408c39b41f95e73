"""Decoding strategies by name: which drafter a bundle's parts allow, and how it is made.

Every strategy samples the same distribution under exact acceptance; they differ in speed only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.models.eagle import Eagle
from lexel.models.neighbour_table import NeighbourTable
from lexel.sample.draft_trees import TreeShape, tree_shape
from lexel.sample.drafters import (
    Drafter,
    EagleDrafter,
    EagleStaticDrafter,
    EagleTreeDrafter,
    HeadsDrafter,
    JacobiDrafter,
    LookupDrafter,
    ModelDrafter,
    NestedDrafter,
    PacDrafter,
    TableDrafter,
    TableGuess,
)
from lexel.sample.drafters.jacobi import Guess, Init

PLAIN = "plain"


@dataclass(frozen=True)
class Strategy:
    """One way to draft. make: (target in the form it runs in, window) -> drafter; window: the usual one."""

    make: Callable[[CausalLM, int], Drafter]
    window: int
    about: str


def _on_cpu(lm: CausalLM) -> bool:
    """Where the cost of a pass grows with its tokens from a handful on; elsewhere dozens are nearly free."""
    return next(lm.parameters()).device.type == "cpu"


def _builtin(lm: CausalLM) -> dict[str, Strategy]:
    """What needs no further part."""
    wide = 4 if _on_cpu(lm) else 16  # the released demos' window
    found = {
        "jacobi": Strategy(
            lambda lm, window: JacobiDrafter(window), wide, "Jacobi window, random start, maximal coupling"
        ),
        "jacobi-repeat": Strategy(
            lambda lm, window: JacobiDrafter(window, init="repeat"), wide, "the same, started from the left"
        ),
        "jacobi-gumbel": Strategy(
            lambda lm, window: JacobiDrafter(window, coupling="gumbel"),
            wide,
            "Jacobi window, Gumbel coupling",
        ),
        "sjd": Strategy(
            lambda lm, window: JacobiDrafter(window, coupling="independent"), wide, "as first published"
        ),
    }
    found["lookup"] = Strategy(
        lambda lm, window: LookupDrafter(window), 8, "texts copied from what came before; pictures plainly"
    )
    if lm.config.columns == 1:
        found["pac"] = Strategy(
            lambda lm, window: _pac(lm, window, "repeat"), wide, "Jacobi window that begins as a tree"
        )
    if lm.config.future_heads:
        found["heads"] = Strategy(
            lambda lm, window: HeadsDrafter(lm, window),
            lm.config.future_heads,
            "the model's heads for later tokens",
        )
    if len(lm.config.ffn_widths) > 1:
        found["nested"] = Strategy(
            lambda lm, window: NestedDrafter(lm, window=window), 4, "the model's own narrow slice"
        )
    return found


def _of_model(name: str, model: Any, columns: int) -> dict[str, Strategy]:
    """What a trained drafter called `name` is used as, for a model with so many codes per position."""
    if isinstance(model, CausalLM):
        return {name: Strategy(lambda lm, window: ModelDrafter(model, window), 4, "a small language model")}
    if isinstance(model, NeighbourTable):
        found = {
            name: Strategy(
                lambda lm, window: TableDrafter(model, window), 4, "codes from their neighbours alone"
            ),
            f"jacobi-{name}": Strategy(
                lambda lm, window: JacobiDrafter(window, TableGuess(model)),
                4,
                "Jacobi window, started from them",
            ),
        }
        if columns == 1:
            found[f"pac-{name}"] = Strategy(
                lambda lm, window: _pac(lm, window, TableGuess(model)), 4, "the same, beginning as a tree"
            )
        return found
    if isinstance(model, Eagle):
        return {
            name: Strategy(
                lambda lm, window: EagleDrafter(lm, model, window), 4, "an EAGLE head, one guess each"
            ),
            f"{name}-tree": Strategy(
                lambda lm, window: EagleTreeDrafter(lm, model, window, *_tree_size(lm)),
                4,
                "the same, a tree of its most probable guesses",
            ),
            f"{name}-static": Strategy(
                lambda lm, window: EagleStaticDrafter(lm, model, _tree_shape(lm).clipped(window)),
                5,
                "the same, a tree of fixed shape",
            ),
        }
    raise LexelError(f"{type(model).__name__} is no drafter that decoding knows.")


def _pac(lm: CausalLM, window: int, init: Init | Guess) -> PacDrafter:
    """With a tree as published where a pass costs the same for many nodes."""
    width, depth = (2, 1) if _on_cpu(lm) else (3, 2)
    return PacDrafter(window, width, min(depth, window), init)


def _tree_size(lm: CausalLM) -> tuple[int, int]:
    """Width and nodes of EAGLE-2's tree: as published where a pass costs the same for many nodes."""
    return (2, 8) if _on_cpu(lm) else (10, 60)


def _tree_shape(lm: CausalLM) -> TreeShape:
    if not _on_cpu(lm):
        return tree_shape("mc_sim_7b_63")
    return TreeShape.of(tuple(map(int, path)) for path in ("0", "1", "2", "00", "01", "10", "000", "0000"))


def strategies(lm: CausalLM, drafters: Mapping[str, Any]) -> dict[str, Strategy]:
    """Every drafting strategy for a model and its trained drafters, by name ("plain" is not one)."""
    found = _builtin(lm)
    for name, model in drafters.items():
        found |= _of_model(name, model, lm.config.columns)
    return found


def make_drafter(
    known: Mapping[str, Strategy], lm: CausalLM, name: str, window: int | None
) -> Drafter | None:
    """The drafter of one of `known` strategies, None for plain decoding. window: None for the usual one.
    Raises LexelError for an unknown name."""
    if name == PLAIN:
        return None
    if name not in known:
        raise LexelError(
            f"decoding={name}: this bundle's parts do not allow it or there is no such strategy; choose "
            f"auto, {', '.join((PLAIN, *known))}."
        )
    return known[name].make(lm, window or known[name].window)
