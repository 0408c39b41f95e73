"""Results while they are generated: a text so far, a picture as far as it is drawn.

    for partial in pipe.stream([Text("a red circle"), Image.blank()], count=4):
        show(partial.row, partial.segment.pixels)

k codebooks · l generated tokens · h w picture
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as Steps
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lexel.document import Document, DocumentCodec, Image, Segment, Text
from lexel.sample.codes import codes_so_far, concat_codes, known_pixels
from lexel.sample.decode import Meter
from lexel.sample.generator import Generator, Request, Ticket
from lexel.types import Codes, DecodeStats, GenerationOutput

if TYPE_CHECKING:
    from lexel.sample.pipeline import Pipeline

# Ids, log-probabilities and statistics of all documents -> the output.
Finish = Callable[[list[Tensor], list[Tensor], DecodeStats], GenerationOutput]


@dataclass(frozen=True)
class Job:
    """A document to complete: with codes for its pictures, the modalities of its blanks, and the request."""

    document: list[Segment]
    plan: tuple[str, ...]
    request: Request


@dataclass(frozen=True, eq=False)
class Partial:
    """How far one document is.

    row: which one; tokens: generated so far; total: the most that it may take (a text may end earlier);
    document: the given segments and the generated ones, the last of them as far as it goes: an unfinished
    picture has pixels, grey where nothing is drawn, and codes whose `lengths` count the known positions (no
    codes before the first)."""

    row: int
    tokens: int
    total: int
    document: Document

    @property
    def segment(self) -> Segment:
        """The last segment, the one that grows."""
        return self.document[-1]

    @property
    def done(self) -> bool:
        """Whether no token will follow."""
        return self.tokens == self.total


class Partials(Iterator[Partial]):
    """Partial results as they come. The last one of a document is exactly what `Pipeline.generate` returns of
    it (with a detokenizer only that one is drawn by it); then `output` is all that it returns. Whoever stops
    early cancels the rest.

    every: tokens of a document between two partial results; None: a row of a picture's grid, an eighth of a
    line of codes, each token of a text. Raises ValueError when it is below 1."""

    def __init__(
        self, pipeline: Pipeline, queue: Generator, jobs: Sequence[Job], finish: Finish, every: int | None
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 token, got {every}.")
        self.pipeline, self.queue, self.jobs = pipeline, queue, jobs
        self.finish, self.every = finish, every
        self.output: GenerationOutput | None = None
        self._steps = self._run()

    def __next__(self) -> Partial:
        """The next partial result."""
        return next(self._steps)

    def close(self) -> None:
        """Cancel what is not done."""
        self._steps.close()

    def wait(self) -> GenerationOutput:
        """The result alone. Call this or iterate, once."""
        meter, tickets = self._submit()
        self.queue.wait(tickets)
        self.output = self.finish(*meter.results(tickets))
        return self.output

    def _submit(self) -> tuple[Meter, list[Ticket]]:
        return Meter(self.queue), [self.queue.submit(job.request) for job in self.jobs]

    def _run(self) -> Steps[Partial, None, None]:
        meter, tickets = self._submit()
        rows = [_Progress(self.pipeline.codec, job, self.every) for job in self.jobs]
        heard, due = set[int](), list[int]()
        news: Any = self.queue.stream(tickets)
        with closing(news):
            for number, ids in news:
                if number in heard:  # another round has begun: show what the last one brought
                    yield from self._shown(rows, due)
                    heard, due = set(), []
                heard.add(number)
                if rows[number].extend(ids.reshape(len(ids), -1).tolist()):
                    due.append(number)
        self.output = self.finish(*meter.results(tickets))
        for number, (document, length) in enumerate(zip(self.output.documents, self.output.lengths)):
            yield Partial(number, length, length, document)

    def _shown(self, rows: Sequence[_Progress], numbers: Sequence[int]) -> Iterator[Partial]:
        """The documents `numbers` as they are now, their pictures decoded together."""
        generated = [rows[number].generated() for number in numbers]
        places, codes = [], []
        for i, segments in enumerate(generated):
            for j, segment in enumerate(segments):
                # Other modalities are drawn when they are done.
                if isinstance(segment, Image) and segment.pixels is None and segment.modality == "image":
                    if segment.codes is None:
                        segments[j] = replace(
                            segment, pixels=torch.zeros(3, *self.pipeline.tokenizer.image_size)
                        )
                    else:
                        places.append((i, j))
                        codes.append(segment.codes)
        for (i, j), pixels in zip(places, self._pixels(codes)):
            generated[i][j] = replace(generated[i][j], pixels=pixels)  # type: ignore[arg-type]
        for number, segments in zip(numbers, generated):
            row = rows[number]
            row.finished = segments[: len(row.finished)]
            tokens = len(row.ids)
            yield Partial(number, tokens, tokens + row.remaining, row.given + segments)

    def _pixels(self, codes: Sequence[Codes]) -> Sequence[Tensor]:
        """Pictures ``[3, h, w]`` of codes, grey where none are known; all grey without a decoder."""
        size = self.pipeline.tokenizer.image_size
        if not codes or not self.pipeline.tokenizer.draws_pixels:
            return [torch.zeros(3, *size) for _ in codes]
        together = concat_codes([_counted(one) for one in codes])
        flexible = self.pipeline.tokenizer.layout.flexible
        pixels = self.pipeline.decode(together if flexible else replace(together, lengths=None)).cpu()
        return list(pixels * known_pixels(together, (pixels.shape[2], pixels.shape[3])))


def _counted(codes: Codes) -> Codes:
    """With `lengths`: whole pictures have all their positions."""
    if codes.lengths is not None:
        return codes
    return replace(codes, lengths=torch.full((len(codes),), codes.indices.shape[1]))


class _Progress:
    """One document under way. It follows the tokens that it is told, not the queue's own row: another thread
    may be moving that."""

    def __init__(self, codec: DocumentCodec, job: Job, every: int | None) -> None:
        self.codec, self.job, self.every = codec, job, every
        self.grammar = job.request.policy.grammar
        self.state = self.grammar.start(job.request.prompt)
        self.given = [segment for segment in job.document if not segment.is_blank]
        self.finished: list[Segment] = []
        self.ids: list[list[int]] = []
        self._open: list[list[int]] = []  # what the open segment holds: ids of a text, steps of a picture
        self._due = self._pace()

    @property
    def remaining(self) -> int:
        """How many more tokens may come at most."""
        return self.grammar.remaining(self.state)

    def extend(self, tokens: Sequence[list[int]]) -> bool:
        """Take in new tokens ``[l, k]``; whether there is enough new to be shown."""
        ended = False
        for token in tokens:
            ended |= self._append(token)
        due = ended or len(self.ids) >= self._due
        if due:
            self._due = len(self.ids) + self._pace()
        return due

    def _append(self, token: list[int]) -> bool:
        """Whether `token` ended a segment."""
        before, self.state = self.state, self.grammar.advance(self.state, token[0])
        text = before.modality == "text"
        self.ids.append(token)
        if self.state.segment == before.segment:
            if text or (self.grammar.columns(before) and self.state.slot == before.slot + 1):
                self._open.append(token)
            return False
        # What closes a text may open the picture behind it.
        ids = torch.tensor(self.ids[: len(self.ids) - text], dtype=torch.long).reshape(-1, len(token))
        plan = self.job.plan[: self.state.segment]
        done = completed(self.codec, self.job, ids, plan)
        self.finished += done[len(self.finished) :]
        self._open = []
        return True

    def _pace(self) -> int:
        modality = self.state.modality
        if self.every is not None:
            return self.every
        if modality == "text":
            return 1
        layout = self.codec.layouts[modality]
        return max(1, layout.steps // (8 if layout.grid is None else layout.grid[0]))

    def generated(self) -> list[Segment]:
        """The finished segments and the open one, still without pixels."""
        if self.grammar.done(self.state):
            return list(self.finished)
        modality = self.state.modality
        if modality == "text":
            text = self.codec.text_tokenizer.decode([token[0] for token in self._open])
            return [*self.finished, Text(text)]
        return [*self.finished, Image(self._codes(modality), modality=modality)]

    def _codes(self, modality: str) -> Codes | None:
        if not self._open:
            return None
        layout = self.codec.layouts[modality]
        if layout.streams and layout.flexible:
            return None  # no position has all its codes before the last stream
        flat = self.codec.vocabulary.to_codes(torch.tensor([self._open]), layout, modality)
        return codes_so_far(flat[0], layout)


def completed(
    codec: DocumentCodec, job: Job, ids: Tensor, plan: Sequence[str] | None = None
) -> list[Segment]:
    """The segments of `plan` (all of the job's blanks when None) read back from generated `ids`, long ``[l]``
    or ``[l, k]``."""
    plan, prompt = job.plan if plan is None else plan, job.request.prompt.ids
    opening = len(codec.scripts[job.plan[0]][0]) if job.plan[0] != "text" else 0
    opened = prompt[len(prompt) - opening :]
    written = codec.segments(torch.cat([opened, ids.reshape(-1, *opened.shape[1:])]))
    segments: list[Segment] = []
    for modality in plan:
        # An empty text leaves no ids behind, but it has a place in the document.
        empty = not written or written[0].modality != modality
        segments.append(Text("") if empty else written.pop(0))
    return segments
