"""Language model stages in order, each from the bundle that the one before it ended in."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain as chained
from typing import TYPE_CHECKING

from lexel.errors import LexelError
from lexel.train.settings import Curriculum, LMStage
from lexel.train.sources import Sources

if TYPE_CHECKING:
    from lexel.train.chain import Chain


def check(chain: Chain) -> None:
    """Find what is wrong with any stage before the first one runs. Raises LexelError or ValueError."""
    from lexel.train.codec import starts_from_text

    run = chain.run
    check_order(run.curriculum, trained=run.bundle is not None or starts_from_text(run.lm))
    _sources(chain)


def follow(chain: Chain) -> None:
    """Run the stages of ``run.curriculum`` in folders ``01_<name>``, ``02_<name>``, …; each leaves a bundle
    in its ``bundle/``. Finished ones are reused. The last one's language model is the run's from here on."""
    from lexel.train.stages import train_lm

    run, stages = chain.run, chain.run.curriculum.stages
    bundles: dict[str, str] = {}
    latest = run.bundle
    for number, name in enumerate(run.curriculum.order, 1):
        stage: LMStage = stages[name]
        stage.bundle = latest if stage.bundle is None else bundles.get(stage.bundle, stage.bundle)
        folder = f"{number:02d}_{name}"
        train_lm(chain, folder, stage, captions=lambda: _captions(chain), bundle=True)
        latest = bundles[name] = str(run.folder / folder / "bundle")
    run.parts.lm = f"{latest}/lm"


def _sources(chain: Chain) -> list[Sources]:
    curriculum = chain.run.curriculum
    return [Sources(chain, curriculum.stages[name]) for name in curriculum.order]


def _captions(chain: Chain) -> Iterator[str]:
    """What a new text tokenizer is trained on: the texts of all stages, since all share it."""
    sources = _sources(chain)
    for stage in sources:
        stage.tokenize()
    return chained.from_iterable(stage.captions() for stage in sources)


def check_order(curriculum: Curriculum, trained: bool = False) -> None:
    """Raise LexelError when the order makes no sense. trained: the first stage starts from a trained language
    model."""
    order, stages = curriculum.order, curriculum.stages
    known = ", ".join(stages) or "none"
    if not order:
        raise LexelError(f"curriculum.order is empty; name the stages to run (there is {known}).")
    if unknown := [name for name in order if name not in stages]:
        raise LexelError(f"curriculum.order names {unknown[0]!r}, but curriculum.stages has {known}.")
    if repeated := [name for place, name in enumerate(order) if name in order[:place]]:
        raise LexelError(f"curriculum.order names {repeated[0]!r} twice; give the second a name of its own.")
    for place, name in enumerate(order):
        stage = stages[name]
        if not (place or trained or stage.bundle or stage.init) and stage.adapter.kind != "none":
            raise LexelError(
                f"the stage {name!r} trains an adapter, but no stage before it has trained the language "
                "model; set bundle=DIR, take lm=pretrained, or put a stage without an adapter first."
            )
        start = stage.bundle
        if start in stages and start not in order[:place]:
            where = "comes later" if start in order else "is not in curriculum.order"
            raise LexelError(f"the stage {name!r} starts from the bundle of {start!r}, which {where}.")
