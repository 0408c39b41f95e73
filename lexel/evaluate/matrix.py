"""How well a model turns every modality into every other one, measured exactly on procedural scenes.

For each ordered pair X→Y the model is given X of a held-out scene and writes Y, and what it wrote is compared
with the scene itself. Beside that stand the chance level (what it wrote, compared with other scenes), the
ceiling (the scene's own Y through its tokenizer and back), a specialist where there is one, and chains: Y
written after a modality in between.

A pair may be impossible to get right: a segmentation does not tell colours. The figures do not correct that;
chance and specialist show it.

h w picture
"""

from __future__ import annotations

import html
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image as PictureFile
from PIL import ImageDraw, ImageFont
from torch import Tensor

from lexel.data.any_to_any import Pair, all_pairs, pair_name
from lexel.data.captions import describes_exactly, parse_caption
from lexel.data.checker import picture_shows
from lexel.data.example import Example
from lexel.data.images import to_image
from lexel.data.modalities import (
    read_depth,
    read_edges,
    read_segmentation,
    render_view,
    structured_values,
)
from lexel.data.shapes import ShapesConfig
from lexel.document import Document, Image, Segment, Text
from lexel.errors import LexelError
from lexel.evaluate.html import cards, figure, page, picture, table
from lexel.hub import write_atomically
from lexel.sample.bundle import write_json, write_text
from lexel.sample.pipeline import Pipeline
from lexel.tokenizers.structured import FIELDS, Box

BOX_OVERLAP, COLOR_TOLERANCE, DEPTH_TOLERANCE, OVERLAP = 0.5, 32, 0.1, 0.5
CHAINS = (("text", "boxes", "image"), ("text", "segmentation", "image"), ("edges", "segmentation", "text"))
"""Modalities in a row; the last is scored, beside the direct way from the first."""
SHOWN, SHIFTS = 3, 4


# What is right


def caption_quality(text: str, example: Example) -> float:
    """1 for a true caption that names every object with colour and shape."""
    return float(describes_exactly(text.strip(), _scene(example).objects))


def picture_quality(pixels: Tensor, example: Example) -> float:
    """1 for a picture in which the checker finds all that the example's first caption says."""
    claim = parse_caption(example.captions[0])
    return float(claim is not None and picture_shows(pixels, claim))


def segmentation_quality(pixels: Tensor, example: Example) -> float:
    """Of the pixels that either calls an object, the share on whose shape both agree."""
    found = read_segmentation(pixels)
    true = read_segmentation(_view(example, "segmentation", pixels))
    return _share((found == true) & (true > 0), (found > 0) | (true > 0))


def depth_quality(pixels: Tensor, example: Example) -> float:
    """Of the pixels that either puts before the background, the share of equal nearness within
    `DEPTH_TOLERANCE`."""
    found, true = read_depth(pixels), read_depth(_view(example, "depth", pixels))
    seen, there = found > DEPTH_TOLERANCE, true > DEPTH_TOLERANCE
    return _share(((found - true).abs() <= DEPTH_TOLERANCE) & there, seen | there)


def edges_quality(pixels: Tensor, example: Example) -> float:
    """F1 of the edge pixels, each of which may be off by one pixel."""
    found, true = read_edges(pixels), read_edges(_view(example, "edges", pixels))
    precision, recall = _share(found & _widened(true), found), _share(true & _widened(found), true)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boxes_quality(found: Sequence[Box], example: Example) -> float:
    """F1 of the boxes: one is right with the object's class and an overlap (intersection over union) of at
    least `BOX_OVERLAP`."""
    true = structured_values("boxes", example)
    return _matched(found, true, lambda a, b: a.name == b.name and box_overlap(a, b) >= BOX_OVERLAP)


def palette_quality(found: Sequence[tuple[int, int, int]], example: Example) -> float:
    """F1 of the colours: one is right within `COLOR_TOLERANCE` of 255 in every channel."""

    def near(a: Sequence[int], b: Sequence[int]) -> bool:
        return max(abs(x - y) for x, y in zip(a, b)) <= COLOR_TOLERANCE

    return _matched(found, structured_values("palette", example), near)


def metadata_quality(found: Sequence[tuple[str, float]], example: Example) -> float:
    """Share of the fields whose value is in the right bin; a field that is missing is wrong."""
    true, written = structured_values("metadata", example), dict(reversed(found))
    right = [name in written and FIELDS[name].bin(written[name]) == FIELDS[name].bin(x) for name, x in true]
    return sum(right) / len(right)


def layers_quality(found: Sequence[str], example: Example) -> float:
    """1 for all the objects in the right order, nearest first."""
    return float(list(found) == structured_values("layers", example))


@dataclass(frozen=True)
class Measure:
    """quality: what was written and an example → 0..1. right: the least quality of a right answer; the score
    is then the share of right answers, without it the mean quality."""

    text: str
    quality: Callable[[Any, Example], float]
    right: float | None = 1.0

    def score(self, qualities: Sequence[float]) -> float:
        """Of several answers."""
        values = qualities if self.right is None else [float(q >= self.right) for q in qualities]
        return sum(values) / max(1, len(values))


MEASURES: dict[str, Measure] = {
    "text": Measure("captions that are true and name every object with colour and shape", caption_quality),
    "image": Measure("pictures that show all that the first caption says", picture_quality),
    "segmentation": Measure(
        f"pixels of objects agree in shape to at least {OVERLAP}", segmentation_quality, OVERLAP
    ),
    "edges": Measure(f"F1 of edge pixels (off by one allowed) of at least {OVERLAP}", edges_quality, OVERLAP),
    "depth": Measure(
        f"pixels of objects agree in nearness (within {DEPTH_TOLERANCE}) to at least {OVERLAP}",
        depth_quality,
        OVERLAP,
    ),
    "boxes": Measure(f"every object with its class and an overlap of at least {BOX_OVERLAP}", boxes_quality),
    "palette": Measure(f"every colour within {COLOR_TOLERANCE} of 255", palette_quality),
    "metadata": Measure("mean share of fields in the right bin", metadata_quality, None),
    "layers": Measure("all objects in the right order", layers_quality),
}


def box_overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    if width <= 0 or height <= 0:
        return 0.0
    union = (a.x1 - a.x0) * (a.y1 - a.y0) + (b.x1 - b.x0) * (b.y1 - b.y0) - width * height
    return width * height / union


def _matched(found: Sequence[Any], true: Sequence[Any], same: Callable[[Any, Any], bool]) -> float:
    """F1 of a one-to-one matching, each found item taking the first true one that is left and fits."""
    left, hits = list(true), 0
    for item in found:
        match = next((number for number, other in enumerate(left) if same(item, other)), None)
        if match is not None:
            left.pop(match)
            hits += 1
    return 2 * hits / max(1, len(found) + len(true))


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.sum() / whole.sum()) if bool(whole.any()) else 0.0


def _widened(mask: Tensor) -> Tensor:
    """With the eight neighbours of every pixel."""
    return F.max_pool2d(mask[None, None].float(), 3, 1, 1)[0, 0] > 0


def _scene(example: Example) -> Any:
    return example.truth


def _view(example: Example, view: str, like: Tensor) -> Tensor:
    return render_view(_scene(example), view, like.shape[-1])


# Measuring


@dataclass
class Matrix:
    """report: plain numbers, see `measure_matrix`; examples: the first held-out scenes; written: what the
    model wrote of them, by pair."""

    report: dict[str, Any]
    examples: list[Example]
    written: dict[Pair, list[Segment]] = field(default_factory=dict)


@torch.inference_mode()
def measure_matrix(
    pipeline: Pipeline,
    data: ShapesConfig,
    *,
    pairs: Sequence[Pair] | None = None,
    count: int = 64,
    seed: int = 0,
    batch_size: int = 64,
    specialists: Mapping[Pair, Pipeline] | None = None,
) -> Matrix:
    """The matrix of a bundle on the first `count` validation scenes of `data`.

    pairs: None is every ordered pair of the model's modalities. specialists: models of one pair each.
    The report holds `pairs` (by name: score, chance and, where there is one, specialist), `ceiling` by
    modality, `chains` (score, direct), `measures` (what the scores count), `count`, `seconds`. Scores are
    shares in 0..1. Everything but `seconds` is a pure function of the arguments.
    Raises LexelError for a bundle whose pictures are of another size, or with a modality without measure."""
    if tuple(data.image_size) != tuple(pipeline.tokenizer.image_size):
        raise LexelError(
            f"the scenes are drawn at {data.image_size}, the bundle's pictures are "
            f"{pipeline.tokenizer.image_size} (height, width); set the data's size."
        )
    modalities = ("text", *pipeline.codec.layouts)
    if unknown := sorted(set(modalities) - set(MEASURES)):
        raise LexelError(
            f"the matrix does not know how to measure {unknown[0]}; it measures {', '.join(MEASURES)}."
        )
    if wrong := [name for pair in pairs or () for name in pair if name not in modalities]:
        raise LexelError(f"the model has no modality {wrong[0]!r}; it has {', '.join(modalities)}.")
    started = time.perf_counter()
    dataset = data.build("validation")
    run = _Run(pipeline, [dataset[index] for index in range(min(count, len(dataset)))], seed, batch_size)
    ceiling = {name: run.score(name, run.through(name))[0] for name in modalities}
    matrix = Matrix({}, run.examples[:SHOWN])
    measured: dict[str, dict[str, float]] = {}
    for pair in pairs or all_pairs(modalities):
        written = run.write((pair[0], pair[1]))
        matrix.written[pair] = written[:SHOWN]
        score, chance = run.score(pair[1], written)
        measured[pair_name(pair)] = {"score": score, "chance": chance}
        if specialists and pair in specialists:
            alone = run.write((pair[0], pair[1]), specialists[pair])
            measured[pair_name(pair)]["specialist"] = run.score(pair[1], alone)[0]
    chains = {}
    for chain in CHAINS:
        if set(chain) <= set(modalities) and pairs is None:
            score, _ = run.score(chain[-1], run.write(chain))
            direct = measured[pair_name((chain[0], chain[-1]))]["score"]
            chains["_to_".join(chain)] = {"score": score, "direct": direct}
    matrix.report = {
        "count": len(run.examples),
        "modalities": list(modalities),
        "measures": {name: MEASURES[name].text for name in modalities},
        "ceiling": ceiling,
        "pairs": measured,
        "chains": chains,
        "seconds": time.perf_counter() - started,
    }
    return matrix


@dataclass
class _Run:
    """The held-out examples and how a pipeline is asked about them."""

    pipeline: Pipeline
    examples: list[Example]
    seed: int
    batch_size: int
    _given: dict[str, list[Segment]] = field(default_factory=dict)

    def given(self, modality: str) -> list[Segment]:
        """The examples themselves in a modality, encoded."""
        if modality not in self._given:
            self._given[modality] = self._encode(modality)
        return self._given[modality]

    def _encode(self, modality: str) -> list[Segment]:
        if modality == "text":
            return [Text(example.captions[0]) for example in self.examples]
        if modality in self.pipeline.structured:
            values = [structured_values(modality, example) for example in self.examples]
            return [self.pipeline.segment(modality, value) for value in values]
        view = "picture" if modality == "image" else modality
        size = self.pipeline.tokenizer.image_size[0]
        pixels = torch.stack([render_view(_scene(example), view, size) for example in self.examples])
        codes = self.pipeline.tokenizer_of(modality).encode(pixels.to(self.pipeline.device)).to("cpu")
        return [Image(codes[row : row + 1], modality=modality) for row in range(len(codes))]

    def through(self, modality: str) -> list[Segment]:
        """The examples through the modality's tokenizer and back."""
        segments: list[Any] = self.given(modality)
        if modality == "text" or modality in self.pipeline.structured:
            return segments
        return [
            Image(s.codes, self.pipeline.decode(s.codes, modality=modality)[0].cpu(), modality)
            for s in segments
        ]

    def write(self, way: Sequence[str], pipeline: Pipeline | None = None) -> list[Segment]:
        """The last modality of `way`, written from the first by way of those between."""
        blanks = [Text.blank() if name == "text" else Image.blank(name) for name in way[1:]]
        documents: list[Document] = [[segment, *blanks] for segment in self.given(way[0])]
        output = (pipeline or self.pipeline).generate(
            documents, seed=self.seed, batch_size=self.batch_size, decoding="plain"
        )
        return [document[-1] for document in output.documents]

    def score(self, modality: str, written: Sequence[Segment]) -> tuple[float, float]:
        """The score, and the chance level: the score beside the next few examples instead of the own."""
        measure, answers = MEASURES[modality], [self._answer(segment) for segment in written]
        count = len(self.examples)

        def score(shift: int) -> float:
            others = [self.examples[(row + shift) % count] for row in range(count)]
            return measure.score([measure.quality(a, e) for a, e in zip(answers, others)])

        shifts = range(1, min(SHIFTS, count - 1) + 1)
        return score(0), sum(map(score, shifts)) / max(1, len(shifts))

    def _answer(self, segment: Segment) -> Any:
        if isinstance(segment, Text):
            return segment.text or ""
        return segment.pixels if segment.pixels is not None else self.pipeline.values(segment)


# Reporting


def write_matrix(folder: Path | str, matrix: Matrix, pipeline: Pipeline) -> None:
    """Write ``matrix.json``, ``matrix.txt``, ``matrix.html`` and, where anything was drawn, ``matrix.png``
    into `folder`. Raises LexelError when the disk refuses."""
    folder = Path(folder)
    write_json(folder / "matrix.json", matrix.report)
    write_text(folder / "matrix.txt", matrix_text(matrix.report) + "\n")
    write_text(folder / "matrix.html", matrix_page(matrix, pipeline))
    grid = matrix_grid(matrix, pipeline)
    if grid is not None:
        write_atomically(folder / "matrix.png", lambda path: grid.save(path, format="PNG"))


def matrix_text(report: Mapping[str, Any]) -> str:
    """The matrix as text: inputs down, targets across; each cell is score/chance, and /specialist."""
    names = report["modalities"]
    rows = [["from \\ to", *names]]
    rows += [[source, *(_cell(report, source, target) for target in names)] for source in names]
    rows.append(["ceiling", *(f"{report['ceiling'][name]:.2f}" for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += [
        f"{name}: {way['score']:.2f}, direct {way['direct']:.2f}" for name, way in report["chains"].items()
    ]
    lines += [f"{name}: {text}" for name, text in report["measures"].items()]
    return "\n".join(lines)


def _cell(report: Mapping[str, Any], source: str, target: str) -> str:
    found = report["pairs"].get(pair_name((source, target)))
    if found is None:
        return "-"
    return "/".join(f"{found[key]:.2f}" for key in ("score", "chance", "specialist") if key in found)


def matrix_page(matrix: Matrix, pipeline: Pipeline, title: str = "Any to any") -> str:
    """The matrix as a self-contained HTML page with what the model wrote of a few scenes."""
    report = matrix.report
    names = report["modalities"]
    rows = [
        [html.escape(source), *(_colored(report, source, target) for target in names)] for source in names
    ]
    rows.append(["ceiling", *(f"{report['ceiling'][name]:.2f}" for name in names)])
    measures = [[html.escape(name), html.escape(text)] for name, text in report["measures"].items()]
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="note">Each row is what the model is given of {report["count"]} held-out scenes, each '
        "column what it writes. Large: the score; small: chance, and the specialist where one was trained. "
        "Ceiling: the scene's own modality through its tokenizer and back.</p>",
        table(("from \\ to", *names), rows),
    ]
    if report["chains"]:
        ways = [
            [html.escape(name.replace("_to_", " → ")), f"{way['score']:.2f}", f"{way['direct']:.2f}"]
            for name, way in report["chains"].items()
        ]
        body += ["<h2>In steps</h2>", table(("chain", "score", "direct"), ways)]
    body += ["<h2>What the scores count</h2>", table(("modality", "right"), measures)]
    body += ["<h2>Examples</h2>", *_examples(matrix, pipeline)]
    return page(title, body)


def _colored(report: Mapping[str, Any], source: str, target: str) -> str:
    found = report["pairs"].get(pair_name((source, target)))
    if found is None:
        return ""
    small = f"{found['chance']:.2f}"
    if "specialist" in found:
        small += f" · {found['specialist']:.2f}"
    share = round(100 * found["score"])
    return (
        f'<span style="background: color-mix(in srgb, var(--c) {share}%, transparent); padding: 0 .3rem">'
        f"{found['score']:.2f}</span><br><small>{small}</small>"
    )


def _examples(matrix: Matrix, pipeline: Pipeline) -> list[str]:
    """For each scene shown a card per input: all that was written from it."""
    body = []
    for number, example in enumerate(matrix.examples):
        sources = dict.fromkeys(source for source, _ in matrix.written)
        shown = []
        for source in sources:
            found = {t: segments[number] for (s, t), segments in matrix.written.items() if s == source}
            drawn = {name: segment.pixels for name, segment in found.items() if isinstance(segment, Image)}
            pictures = [picture(pixels, 72, name) for name, pixels in drawn.items() if pixels is not None]
            texts = [
                f"<b>{name}</b> {_worded(segment, pipeline)}"
                for name, segment in found.items()
                if drawn.get(name) is None
            ]
            shown.append(figure(pictures, f"from <b>{html.escape(source)}</b><br>{'<br>'.join(texts)}"))
        assert example.pixels is not None
        own = figure([picture(example.pixels, 144)], html.escape(example.captions[0]))
        body += [own, cards(shown, 320)]
    return body


def matrix_grid(matrix: Matrix, pipeline: Pipeline, side: int = 80) -> PictureFile.Image | None:
    """What was drawn of the scenes shown as one picture: inputs down, and across, for each scene, everything
    drawn from it; the first row is the scenes' own. None when nothing was drawn."""
    sources = list(dict.fromkeys(source for source, _ in matrix.written))
    targets = list(dict.fromkeys(target for _, target in matrix.written))
    targets = [name for name in targets if name not in ("text", *pipeline.structured)]
    if not targets or not matrix.examples:
        return None
    gap, line, left = 4, 16, 92
    block = len(targets) * (side + gap) + 2 * gap
    size = (left + len(matrix.examples) * block, 2 * line + (len(sources) + 1) * (side + gap))
    canvas = PictureFile.new("RGB", size, "#ffffff")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for row, source in enumerate(["(the scene)", *sources]):
        top = 2 * line + row * (side + gap)
        draw.text((gap, top + side // 2 - 6), source, fill="#1d2329", font=font)
        for number, example in enumerate(matrix.examples):
            for column, target in enumerate(targets):
                corner = (left + number * block + column * (side + gap), top)
                if row == 0:
                    draw.text((corner[0], line), target, fill="#66707a", font=font)
                pixels = (
                    _drawn_pixels(matrix, source, target, number) if row else _own_pixels(example, target)
                )
                if pixels is not None:
                    tile = to_image(pixels).resize((side, side), PictureFile.Resampling.NEAREST)
                    canvas.paste(tile, corner)
    for number, example in enumerate(matrix.examples):
        fits = textwrap.shorten(example.captions[0], block // 6, placeholder="…")
        draw.text((left + number * block, 1), fits, fill="#1d2329", font=font)
    return canvas


def _own_pixels(example: Example, target: str) -> Tensor:
    assert example.pixels is not None
    return _view(example, "picture" if target == "image" else target, example.pixels)


def _drawn_pixels(matrix: Matrix, source: str, target: str, number: int) -> Tensor | None:
    segments = matrix.written.get((source, target))
    segment = segments[number] if segments else None
    return segment.pixels if isinstance(segment, Image) else None


def _worded(segment: Segment, pipeline: Pipeline) -> str:
    if isinstance(segment, Text):
        return html.escape(segment.text or "(nothing)")
    values = pipeline.values(segment)
    if segment.modality == "palette":
        return "".join(
            f'<span style="background: rgb{color}; padding: 0 .6rem; margin-right: 2px"></span>'
            for color in values
        )
    if segment.modality == "boxes":
        return html.escape("; ".join(f"{b.name} " + ",".join(f"{x:.2f}" for x in b[:4]) for b in values))
    return html.escape(
        ", ".join(value if isinstance(value, str) else f"{value[0]} {value[1]:.3g}" for value in values)
    )
