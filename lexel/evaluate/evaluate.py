"""Measure a bundle on held-out data: one nested report of plain numbers.

For the procedural `shapes` the checker reads pictures back into objects, so "the picture shows what the text
asked" is a figure, with the chance level beside it. Any other source gives reconstruction quality, codebook
use, likelihoods and decoding statistics.

Everything but `seconds`, `speedup` and memory is a pure function of (bundle, data, count, seed, batch_size).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.data.captions import Claim, describes_exactly
from lexel.data.checker import picture_shows
from lexel.data.example import Example, stack_pixels
from lexel.data.scene import Scene
from lexel.data.shapes import ShapesConfig, chance_accuracy
from lexel.document import Document, Image, Text
from lexel.errors import LexelError
from lexel.evaluate.consistency import consistency
from lexel.evaluate.metrics import CodebookUsage, peak_memory_mb, psnr
from lexel.sample.codes import concat_codes
from lexel.sample.pipeline import Pipeline
from lexel.types import Codes, TokenBatch

if TYPE_CHECKING:
    from rich.progress import Progress

KINDS: tuple[tuple[Literal["one", "two", "unseen"], str], ...] = (
    ("one", "one_object"),
    ("two", "two_objects"),
    ("unseen", "unseen_pairs"),
)
"""Kinds of held-out scenes, and how the report calls them."""

SPECULATIVE_PROMPTS = 16
ALWAYS_COMPARED = ("plain", "nested", "jacobi")
"""Strategies that the report compares besides the bundle's trained drafters."""
LIKELIHOOD_EXAMPLES = 256


def evaluate_bundle(
    pipeline: Pipeline,
    data: Any,
    *,
    count: int = 500,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[str, Any]:
    """The report of a bundle on a data source config (`ShapesConfig`, `FolderConfig`, `ShardsConfig`, …).

    count: held-out examples of each kind. Groups: `tokenizer`, `text_to_image`, `image_to_text` (shapes
    only), `detokenizer` (where the bundle has one), `speculative` per drafter, `nll` (nats per token given
    the other modality), `nested` (per nested width, agreement with the whole model), `seconds`,
    `peak_memory_mb`. Accuracies are shares in 0..1, `chance_*` the level a blind guess of the right kind
    reaches. Raises LexelError when the pictures' size is not the bundle's or the source has no held-out
    pictures.
    """
    if tuple(data.image_size) != tuple(pipeline.tokenizer.image_size):
        raise LexelError(
            f"the data's pictures are {data.image_size[0]}x{data.image_size[1]}, the bundle's "
            f"{pipeline.tokenizer.image_size[0]}x{pipeline.tokenizer.image_size[1]}; set the data's size."
        )
    from rich.console import Console
    from rich.progress import Progress

    with torch.inference_mode(), Progress(disable=not progress, console=Console(stderr=True)) as bars:
        run = Evaluation(pipeline, count, seed, batch_size, bars)
        if isinstance(data, ShapesConfig):
            run.measure_shapes(data)
        else:
            run.measure_pictures(held_out(data, count))
    return {**run.report, "seconds": run.seconds, "peak_memory_mb": peak_memory_mb(), "count": count}


def held_out(data: Any, count: int) -> list[Example]:
    """The first `count` held-out examples with pictures. Raises LexelError when there are none."""
    dataset = data.build("validation")
    examples = [dataset[index] for index in range(min(count, len(dataset)))]
    examples = [example for example in examples if example.pixels is not None]
    if not examples:
        raise LexelError("the data source has no held-out pictures to evaluate on.")
    return examples


class Evaluation:
    """One evaluation in progress; each `measure_*` adds its group to `report`."""

    def __init__(self, pipeline: Pipeline, count: int, seed: int, batch_size: int, bars: Progress) -> None:
        self.pipeline, self.count, self.seed, self.batch_size = pipeline, count, seed, batch_size
        self.bars = bars
        self.report: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}

    def measure_shapes(self, data: ShapesConfig) -> None:
        """Everything, with the checker's accuracies."""
        scenes = {kind: data.scenes(kind, self.count, self.seed) for kind, _ in KINDS[:2]}
        prompts = {kind: data.prompts(kind, self.count, self.seed) for kind, _ in KINDS}
        codes = self.measure_tokenizer(scenes["one"] + scenes["two"])
        halves = {"one": codes[: self.count], "two": codes[self.count :]}
        # prompts and scenes of one kind and seed are of the same scenes, in the same order.
        for kind, name in KINDS[:2]:
            shown = self._shown(halves[kind], prompts[kind], detokenizer=False)
            self._add("tokenizer", accuracy=shown, kind=kind, name=name)
        self.measure_text_to_image(prompts)
        self.measure_image_to_text(scenes, halves)
        if self.pipeline.detokenizer is not None:
            self.measure_detokenizer(scenes["one"], halves["one"])
            shown = self._shown(halves["one"], prompts["one"], detokenizer=True)
            self._add("detokenizer", accuracy=shown, kind="one", name="one_object")
        self.measure_likelihood(scenes["two"], halves["two"])
        self.measure_speculation([text for text, _ in prompts["two"]])

    def measure_pictures(self, examples: Sequence[Example]) -> None:
        """What needs no checker."""
        codes = self.measure_tokenizer(examples)
        if self.pipeline.detokenizer is not None:
            self.measure_detokenizer(examples, codes)
        captioned = [index for index, example in enumerate(examples) if example.captions]
        if captioned:
            chosen = [examples[index] for index in captioned]
            self.measure_likelihood(chosen, codes[torch.tensor(captioned)])
            self.measure_speculation([example.captions[0] for example in chosen])

    def measure_tokenizer(self, examples: Sequence[Example]) -> Codes:
        """`tokenizer`: psnr and codebook use. Returns the examples' codes."""
        usage, quality, parts = CodebookUsage(self.pipeline.tokenizer.codebook_sizes), [], []
        with self._timed("tokenizer"):
            for start in self._batches("Reconstructing", len(examples)):
                pixels = stack_pixels(examples[start : start + self.batch_size])
                parts.append(self.pipeline.encode(pixels).to("cpu"))
                usage.update(parts[-1])
                quality.append(psnr(self.pipeline.decode(parts[-1]).cpu(), pixels))
        self.report["tokenizer"] = {
            "psnr": float(torch.cat(quality).mean()),
            "codebook_usage": usage.usage,
            "codebook_perplexity": usage.perplexity,
            "tokens": self.pipeline.tokenizer.layout.positions,
        }
        return concat_codes(parts)

    def measure_text_to_image(self, prompts: dict[Any, list[tuple[str, Claim]]]) -> None:
        """`text_to_image`: how often the checker finds what the prompt asked for."""
        with self._timed("text_to_image"):
            for kind, name in KINDS:
                texts: list[Document] = [[Text(text), Image.blank()] for text, _ in prompts[kind]]
                shown = 0
                for documents, start in self._generated(f"Drawing {name.replace('_', ' ')}", texts):
                    claims = [claim for _, claim in prompts[kind][start : start + len(documents)]]
                    shown += sum(picture_shows(_pixels(d), c) for d, c in zip(documents, claims))
                self._add("text_to_image", accuracy=shown / len(texts), kind=kind, name=name)
        rate = len(KINDS) * self.count / self.seconds["evaluate_text_to_image"]
        self.report["text_to_image"]["pictures_per_second"] = rate

    def measure_image_to_text(self, scenes: dict[Any, list[Example]], codes: dict[Any, Codes]) -> None:
        """`image_to_text`: how often the caption is true and names every object with colour and shape."""
        with self._timed("image_to_text"):
            for kind, name in KINDS[:2]:
                blanks: list[Document] = [[Image(codes=c), Text.blank()] for c in _single(codes[kind])]
                right = 0
                for documents, start in self._generated(f"Describing {name.replace('_', ' ')}", blanks):
                    for document, example in zip(documents, scenes[kind][start:]):
                        scene = cast(Scene, example.truth)
                        right += describes_exactly(self.pipeline.caption(document), scene.objects)
                self._add("image_to_text", exact=right / len(blanks), kind=kind, name=name)

    def measure_detokenizer(self, examples: Sequence[Example], codes: Codes) -> None:
        """`detokenizer`: psnr of its reconstructions."""
        quality, generator = [], torch.Generator(self.pipeline.device).manual_seed(self.seed)
        with self._timed("detokenizer"):
            for start in self._batches("Detokenizing", len(examples)):
                rows = slice(start, start + self.batch_size)
                drawn = self.pipeline.decode(codes[rows], detokenizer=True, generator=generator)
                quality.append(psnr(drawn.cpu(), stack_pixels(examples[rows])))
        self.report["detokenizer"] = {"psnr": float(torch.cat(quality).mean())}

    def measure_likelihood(self, examples: Sequence[Example], codes: Codes) -> None:
        """`nll`: nats per picture position given the caption, and per text token given the picture."""
        pictures = [Image(codes=c) for c in _single(codes[:LIKELIHOOD_EXAMPLES])]
        texts = [Text(example.captions[0]) for example in examples[:LIKELIHOOD_EXAMPLES]]
        with self._timed("nll"):
            self.report["nll"] = {
                "image": self._nll("Scoring pictures", list(zip(texts, pictures)), "image"),
                "text": self._nll("Scoring captions", list(zip(pictures, texts)), "text"),
            }
        if self.pipeline.lm.config.ffn_widths[:-1]:
            self.measure_nested(list(zip(texts, pictures)), list(zip(pictures, texts)))

    def measure_nested(self, drawn: Sequence[Document], described: Sequence[Document]) -> None:
        """`nested`: per narrower feed-forward width, how much the submodel agrees with the whole model."""
        group = self.report["nested"] = {}
        with self._timed("nested"):
            for width in self.pipeline.lm.config.ffn_widths[:-1]:
                entries = group[f"{100 * width:g}_percent"] = {}
                for modality, documents in (("image", drawn), ("text", described)):
                    found = consistency(self.pipeline.lm, self._scored(documents, modality), width)
                    entries[f"agreement_{modality}"] = found.agreement
                    entries[f"kl_{modality}"] = found.divergence

    def _scored(self, documents: Sequence[Document], modality: str) -> Iterator[tuple[TokenBatch, Tensor]]:
        """Batches of documents, and the positions whose next token is a target of `modality`."""
        codec = self.pipeline.codec
        wanted = codec.vocabulary.mask(modality)
        for start in range(0, len(documents), self.batch_size):
            batch = codec.collate([codec.build(d) for d in documents[start : start + self.batch_size]])
            first = batch.first
            assert batch.loss_mask is not None
            yield batch, F.pad((batch.loss_mask & wanted[first])[:, 1:], (0, 1))

    def measure_speculation(self, texts: Sequence[str]) -> None:
        """`speculative`: tokens per target pass and speed against plain decoding, one picture at a time."""
        documents: list[Document] = [[Text(text), Image.blank()] for text in texts[:SPECULATIVE_PROMPTS]]
        group: dict[str, dict[str, float]] = {}
        with self._timed("speculative"):
            self.pipeline.generate(documents[:1], seed=self.seed, decoding="plain")  # warm up
            seconds = {}
            compared = [name for name in self.pipeline.strategies if name in ALWAYS_COMPARED]
            compared += [name for name in self.pipeline.drafters if name not in compared]
            for name in self._track("Comparing decoders", compared):
                output = self.pipeline.generate(documents, seed=self.seed, decoding=name, batch_size=1)
                seconds[name] = output.stats.seconds
                group[name] = {
                    "mean_accepted": output.stats.mean_accepted,
                    "speedup": seconds["plain"] / seconds[name],
                }
        self.report["speculative"] = {name: group[name] for name in group if name != "plain"}
        self.seconds["plain_per_picture"] = seconds["plain"] / len(documents)

    def _shown(self, codes: Codes, prompts: Sequence[tuple[str, Claim]], *, detokenizer: bool) -> float:
        """Share of decoded pictures in which the checker finds their prompt's claim."""
        generator = torch.Generator(self.pipeline.device).manual_seed(self.seed)
        shown = 0
        for start in range(0, len(codes), self.batch_size):
            rows = slice(start, start + self.batch_size)
            pixels = self.pipeline.decode(codes[rows], detokenizer=detokenizer, generator=generator).cpu()
            shown += sum(picture_shows(p, claim) for p, (_, claim) in zip(pixels, prompts[rows]))
        return shown / len(codes)

    def _nll(self, title: str, documents: Sequence[Document], modality: str) -> float:
        codec, device = self.pipeline.codec, self.pipeline.device
        wanted = codec.vocabulary.mask(modality)
        total, positions = 0.0, 0
        for start in self._batches(title, len(documents)):
            batch = codec.collate([codec.build(d) for d in documents[start : start + self.batch_size]])
            output = self.pipeline.lm(batch.to(device))
            ids = batch.ids if batch.ids.ndim == 3 else batch.ids[..., None]
            assert batch.loss_mask is not None
            mask = (batch.loss_mask & wanted[ids[..., 0]])[:, 1:]
            for column, logits in enumerate((output.logits, *output.code_logits)):
                target = ids[:, 1:, column][mask].to(device)
                if column:
                    target = self._local(target, modality, column)
                loss = F.cross_entropy(
                    logits[:, :-1][mask.to(device)].float(), target, ignore_index=-1, reduction="sum"
                )
                total += float(loss)
            positions += int(mask.sum())
        return total / max(1, positions)

    def _local(self, ids: Tensor, modality: str, column: int) -> Tensor:
        """Codes of one codebook's ids; -1 where nothing stands."""
        vocabulary = self.pipeline.codec.vocabulary
        if modality == "text":
            return torch.full_like(ids, -1)
        block = vocabulary.block(modality, column)
        table = torch.full((vocabulary.size,), -1)
        table[block] = torch.arange(len(block))
        return table.to(ids.device)[ids]

    def _add(self, group: str, *, kind: Any, name: str, **value: float) -> None:
        """One accuracy and its chance level."""
        entries = self.report.setdefault(group, {})
        for measure, share in value.items():
            entries[f"{measure}_{name}"] = share
        entries[f"chance_{name}"] = chance_accuracy(kind)

    def _generated(self, title: str, documents: Sequence[Document]) -> Iterator[tuple[list[Any], int]]:
        """Completed documents batch by batch, with the number of the first."""
        for start in self._batches(title, len(documents)):
            output = self.pipeline.generate(
                documents[start : start + self.batch_size],
                seed=self.seed + start,
                batch_size=self.batch_size,
                decoding="plain",
            )
            yield output.documents, start

    def _batches(self, title: str, total: int) -> Iterator[int]:
        return self._track(title, range(0, total, self.batch_size))

    def _track(self, title: str, items: Sequence[Any]) -> Iterator[Any]:
        yield from self.bars.track(items, total=len(items), description=title)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[f"evaluate_{name}"] = time.perf_counter() - started


def _single(codes: Codes) -> list[Codes]:
    """Each row as a batch of one."""
    return [codes[row : row + 1] for row in range(len(codes))]


def _pixels(document: Sequence[Any]) -> Tensor:
    """The pixels of a completed document's last picture."""
    return document[-1].pixels
