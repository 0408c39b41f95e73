"""The chain of stages: which run, which are reused, where each finds what it builds on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset, Subset

from lexel.data.example import Example
from lexel.errors import LexelError
from lexel.train.record import Options, StageRecord, field_defaults, plain
from lexel.train.settings import STAGES, Run

if TYPE_CHECKING:
    from lexel.data.tokenized import TokenizedDataset
    from lexel.tokenizers.base import Tokenizer
    from lexel.train.settings import StageSettings

WEIGHTS = "model.safetensors"


def run_chain(run: Run) -> None:
    """Run the stages of ``run.task`` in chain order. Raises LexelError (or ValueError) on the user's
    mistakes."""
    from lexel.train import curriculum, stages, start

    run.check()
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    run.folder.mkdir(parents=True, exist_ok=True)
    if run.bundle is not None:
        start.begin(run)
    chain = Chain(run)
    if "curriculum" in run.task.stages:
        curriculum.check(chain)
    if run.bundle is not None:
        start.look(chain)
    for name in STAGES:
        if name in run.task.stages:
            getattr(stages, f"run_{name}")(chain)


def is_leader() -> bool:
    """Whether this process writes what is written once (the first of a distributed run, or the only one)."""
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


def say(text: str) -> None:
    """One line for the user, from the first process only."""
    if is_leader():
        print(text, flush=True)


class Remembering(Dataset[Example]):
    """A source whose examples are kept once made, up to `limit` bytes of pixels: drawing or decoding a
    picture costs a CPU about a fifth of a small tokenizer's training step."""

    def __init__(self, source: Dataset[Example], limit: int) -> None:
        self.source = source
        self._limit = self._room = limit
        self._kept: dict[int, Example] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Each kept tensor would travel to a loading process through an open file of its own.
        return {**vars(self), "_kept": {}, "_room": self._limit}

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Example:
        if index in self._kept:
            return self._kept[index]
        example = self.source[index]
        size = 0 if example.pixels is None else example.pixels.nbytes
        if size <= self._room:
            self._kept[index] = example
            self._room -= size
        return example

    def varied(self, index: int, seed: int) -> Example:
        """A variation of an example, made anew each time."""
        # `examples` leaves the first so many: their numbers are the same below.
        source: Any = self.source.dataset if isinstance(self.source, Subset) else self.source
        return source.varied(index, seed)


@dataclass
class Chain:
    """What the stages of one run share: its settings, its data and its finished parts, loaded when asked
    for."""

    run: Run
    _sources: dict[tuple[str, str], Dataset[Example]] = field(default_factory=dict)
    _tokenized: set[str] = field(default_factory=set)

    def data_of(self, name: str = "data") -> Any:
        """The config of a data source: the run's own ``data`` or one of its `sources`. LexelError for an
        unknown name."""
        if name == "data":
            return self.run.data
        if name not in self.run.sources:
            known = ", ".join(("data", *self.run.sources))
            raise LexelError(f"there is no data source {name!r}; the run has {known}: add sources.{name}.")
        return self.run.sources[name]

    def pictured(self, name: str = "data") -> bool:
        """Whether a data source has pictures (plain text has not)."""
        return hasattr(self.data_of(name), "image_size")

    def source(self, split: str, name: str = "data") -> Dataset[Example]:
        """The examples of a split, built once."""
        if (name, split) not in self._sources:
            source = self.data_of(name).build(split)
            if not len(source):
                raise LexelError(f"the data source {name!r} is empty: its {split} split has no example.")
            if hasattr(source, "problems") and is_leader():
                source.problems.report()
            few = self.run.examples
            if split == "train" and few is not None and few < len(source):
                source = Subset(source, range(few))
            self._sources[name, split] = Remembering(source, self.run.memory_mb * 2**20)
        return self._sources[name, split]

    @property
    def has_pictures(self) -> bool:
        """Whether the run's own data source has pictures."""
        return self.pictured()

    @property
    def device(self) -> str:
        """Where frozen networks work between trainings."""
        wants_cuda = self.run.trainer.accelerator in ("gpu", "cuda", "auto")
        return "cuda" if wants_cuda and torch.cuda.is_available() else "cpu"

    def common_settings(self, name: str, stage: StageSettings | None = None, **inputs: Any) -> dict[str, Any]:
        """The settings that decide a stage's weights: its own block (default: that of its name), the data,
        seed, processes and `inputs`."""
        from lexel.train.settings import weight_settings

        trainer, stage = self.run.trainer, stage or getattr(self.run.stages, name)
        return plain(
            {
                "stage": Options(plain(weight_settings(stage)), field_defaults(type(stage))),
                "data": self.run.data,
                "examples": self.run.examples,
                "seed": self.run.seed,
                "processes": trainer.devices * trainer.num_nodes,
                **inputs,
            }
        )

    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        work: Callable[[Path], Mapping[str, Any]],
        *,
        together: bool = True,
        keep_previous: bool = True,
        makes: Sequence[Path] = (),
    ) -> StageRecord:
        """Run `work` (which gets the stage's folder and returns facts for `done.json`) unless the stage has
        finished with the same settings. together: all processes of a distributed run take part; otherwise the
        first works and the others wait. keep_previous: move what other settings left aside, not delete it.
        makes: files without which a finished stage counts as unfinished."""
        record = StageRecord(name, self.run.folder / name, settings)
        if record.finished() is not None and all(path.exists() for path in makes):
            say(f"{name}: finished before, reused ({record.folder})")
            return record
        if is_leader():
            self._announce(record, keep_previous)
        if together or is_leader():
            facts = work(record.folder)
        if is_leader():
            record.finish(**facts)
        else:
            record.wait()
        return record

    def _announce(self, record: StageRecord, keep_previous: bool) -> None:
        if record.resumable():
            say(f"{record.name}: continuing in {record.folder}")
            return
        reason = record.begin(keep_previous=keep_previous)
        if reason is not None:
            where = f"; the old one is kept in {record.folder}.previous" if keep_previous else ""
            say(f"{record.name}: starting over, because {reason}{where}")

    def part_folder(self, name: str) -> Path:
        """The folder of a trained part: from `parts`, else this run's own. LexelError when there is none."""
        given = getattr(self.run.parts, name)
        if given is not None:
            from lexel.hub import resolve_folder

            return resolve_folder(given, name)
        folder = self.run.folder / name
        if not (folder / WEIGHTS).is_file():
            raise LexelError(
                f"there is no trained {name} in {folder}; run task={name} with the same output, "
                f"or name one with parts.{name}=DIR."
            )
        return folder

    def has_part(self, name: str) -> bool:
        """Whether a trained part is named or lies in this run's folder."""
        return getattr(self.run.parts, name) is not None or (self.run.folder / name / WEIGHTS).is_file()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The trained tokenizer, frozen, of the size of the run's pictures."""
        if self.has_pictures:
            self._check_size("data", self.tokenizer_of_any_size)
        return self.tokenizer_of_any_size

    @cached_property
    def tokenizer_of_any_size(self) -> Tokenizer:
        """The trained tokenizer, frozen, for stages that fit the pictures to it."""
        from lexel.tokenizers import from_pretrained

        return from_pretrained(self.part_folder("tokenizer")).requires_grad_(False)

    def _check_size(self, name: str, tokenizer: Tokenizer) -> None:
        size = tuple(self.data_of(name).image_size)
        if size != tuple(tokenizer.image_size):
            where = "data.size" if name == "data" else f"sources.{name}.size"
            raise LexelError(
                f"the pictures of {name!r} are {size}, the tokenizer's {tuple(tokenizer.image_size)} "
                f"(height, width); set {where} to the tokenizer's."
            )

    @cached_property
    def fingerprint(self) -> str:
        """Of the tokenizer."""
        return self.tokenizer_of_any_size.fingerprint()

    def codes_settings(self, name: str = "data") -> dict[str, Any]:
        """What decides the codes of a data source."""
        codes = self.run.codes
        if name == "data" and codes.folder is not None:
            return {"tokenizer": self.fingerprint, "folder": codes.folder}
        return plain(
            {
                "tokenizer": self.fingerprint,
                "data": self.data_of(name),
                "examples": self.run.examples,
                "count": codes.count,
                "validation_count": codes.validation_count,
            }
        )

    def tokenize(self, name: str = "data") -> None:
        """The stage that writes both splits' codes to ``codes/`` (``codes_<name>/`` for one of the run's
        `sources`), once per run, unless they are given."""
        from lexel.data.tokenized import tokenize_dataset

        codes = self.run.codes
        if name in self._tokenized or (name == "data" and codes.folder is not None):
            return
        self._tokenized.add(name)
        self._check_size(name, self.tokenizer)
        title = codes_folder(name)

        def work(folder: Path) -> dict[str, Any]:
            start = time.perf_counter()
            for split, count in (("train", codes.count), ("validation", codes.validation_count)):
                source = self.source(split, name)
                total = len(source)  # type: ignore[arg-type]
                say(f"{title}: tokenizing {min(count or total, total)} {split} pictures")
                tokenize_dataset(
                    self.tokenizer,
                    source if count is None else Subset(source, range(min(count, total))),
                    folder / split,
                    batch_size=codes.batch_size,
                    workers=codes.workers,
                    device=self.device,
                )
            return {"seconds": time.perf_counter() - start}

        self.stage(title, self.codes_settings(name), work, together=False, keep_previous=False)

    def codes(self, split: str, name: str = "data") -> TokenizedDataset:
        """The stored codes of a split (after `tokenize`). LexelError when they are another tokenizer's."""
        from lexel.data.store import join
        from lexel.data.tokenized import TokenizedDataset

        folder: Any = self.run.folder / codes_folder(name)
        if name == "data" and self.run.codes.folder is not None:
            folder = self.run.codes.folder
        return TokenizedDataset(join(folder, split), self.fingerprint)


def codes_folder(name: str) -> str:
    """Where the codes of a data source lie in the run's folder."""
    return "codes" if name == "data" else f"codes_{name}"
