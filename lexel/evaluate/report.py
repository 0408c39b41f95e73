"""What a run leaves to look at: `report.json`, `samples.png` and a self-contained `index.html`.

b batch · h w picture
"""

from __future__ import annotations

import csv
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PictureFile
from PIL import ImageDraw, ImageFont
from torch import Tensor

from lexel.data.captions import describes_exactly, parse_caption
from lexel.data.checker import picture_shows
from lexel.data.example import Example, stack_pixels
from lexel.data.images import to_image
from lexel.data.shapes import ShapesConfig
from lexel.document import Document, Image, Text
from lexel.evaluate.card import figures
from lexel.evaluate.evaluate import held_out
from lexel.evaluate.html import cards, curves, figure, page, picture, table
from lexel.hub import write_atomically
from lexel.sample.bundle import write_json, write_text
from lexel.sample.pipeline import Pipeline

PROMPTS, PER_PROMPT, DESCRIBED, REBUILT = 12, 4, 12, 12
EXAMPLE_SEED = 1_000_003
"""Seed of the examples on show: others than those that the figures are measured on."""


@dataclass(frozen=True)
class Drawn:
    """A prompt and its pictures ``[n, 3, h, w]``; right: per picture what the checker says, None without."""

    prompt: str
    pictures: Tensor
    right: tuple[bool | None, ...]


@dataclass(frozen=True)
class Described:
    """A held-out picture ``[3, h, w]``, what the model wrote, and whether that is exactly right (or None)."""

    pixels: Tensor
    caption: str
    right: bool | None


@dataclass(frozen=True)
class Showcase:
    """Examples of everything a bundle does. rebuilt: original, tokenizer's and (or None) detokenizer's
    pictures, float ``[b, 3, h, w]`` each."""

    drawn: tuple[Drawn, ...]
    described: tuple[Described, ...]
    rebuilt: tuple[Tensor, Tensor, Tensor | None]


@torch.inference_mode()
def show(pipeline: Pipeline, data: Any, *, seed: int = 0) -> Showcase:
    """Let a bundle draw, describe and rebuild some held-out examples of a data source config.
    Raises LexelError when the source has no held-out pictures."""
    examples, prompts = _examples(data)
    drawn = []
    if prompts:
        documents: list[Document] = [
            [Text(prompt), Image.blank()] for prompt in prompts for _ in range(PER_PROMPT)
        ]
        output = pipeline.generate(documents, seed=seed, decoding="plain")
        pixels = torch.stack([document[-1].pixels for document in output.documents])  # type: ignore[union-attr, misc]
        for number, prompt in enumerate(prompts):
            pictures = pixels[number * PER_PROMPT : (number + 1) * PER_PROMPT]
            drawn.append(Drawn(prompt, pictures, tuple(_shows(p, prompt, data) for p in pictures)))
    originals = stack_pixels(examples)
    codes = pipeline.encode(originals)
    detokenized = None
    if pipeline.detokenizer is not None:
        generator = torch.Generator(pipeline.device).manual_seed(seed)
        detokenized = pipeline.decode(codes, detokenizer=True, generator=generator).cpu()
    described = []
    if prompts:  # a source without captions has no describing model
        blanks: list[Document] = [
            [Image(codes=codes[row : row + 1].to("cpu")), Text.blank()] for row in range(DESCRIBED)
            if row < len(examples)
        ]  # fmt: skip
        for document, example in zip(
            pipeline.generate(blanks, seed=seed, decoding="plain").documents, examples
        ):
            caption = pipeline.caption(document)
            assert example.pixels is not None
            described.append(Described(example.pixels, caption, _exact(caption, example)))
    rebuilt = (originals[:REBUILT], pipeline.decode(codes).cpu()[:REBUILT], detokenized)
    return Showcase(tuple(drawn), tuple(described), rebuilt)


def _examples(data: Any) -> tuple[list[Example], list[str]]:
    """Held-out examples, and prompts to draw."""
    most = max(PROMPTS, DESCRIBED, REBUILT)
    if not isinstance(data, ShapesConfig):
        examples = held_out(data, most)
        return examples, [e.captions[0] for e in examples if e.captions][:PROMPTS]
    third = PROMPTS // 3
    prompts = [
        text for kind in ("one", "two", "unseen") for text, _ in data.prompts(kind, third, EXAMPLE_SEED)
    ]
    half = most // 2
    examples = data.scenes("one", half, EXAMPLE_SEED) + data.scenes("two", most - half, EXAMPLE_SEED)
    return examples, prompts


def _shows(pixels: Tensor, prompt: str, data: Any) -> bool | None:
    claim = parse_caption(prompt) if isinstance(data, ShapesConfig) else None
    return None if claim is None else picture_shows(pixels, claim)


def _exact(caption: str, example: Example) -> bool | None:
    objects = getattr(example.truth, "objects", None)
    return None if objects is None else describes_exactly(caption, objects)


def write_report(
    output: Path | str,
    pipeline: Pipeline,
    data: Any,
    report: Mapping[str, Any],
    *,
    title: str | None = None,
    seed: int = 0,
) -> None:
    """Write `report.json`, `samples.png` and `index.html` into `output`, with the training curves of every
    ``<output>/<stage>/metrics.csv`` there is. Raises LexelError when the disk refuses."""
    output = Path(output)
    showcase = show(pipeline, data, seed=seed)
    write_json(output / "report.json", dict(report))
    grid = samples_grid(showcase.drawn)
    if grid is not None:
        write_atomically(output / "samples.png", lambda path: grid.save(path, format="PNG"))
    write_text(output / "index.html", render_page(showcase, report, output, title or output.resolve().name))


def samples_grid(drawn: Sequence[Drawn], side: int = 128) -> PictureFile.Image | None:
    """One picture of all prompts and their pictures, two prompts per row; None when nothing was drawn."""
    if not drawn:
        return None
    gap, line, count = 8, 22, max(len(item.pictures) for item in drawn)
    width, height = count * (side + gap) + gap, side + line + 2 * gap
    rows = -(-len(drawn) // 2)
    canvas = PictureFile.new("RGB", (2 * width, rows * height + gap), "#ffffff")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for number, item in enumerate(drawn):
        left, top = number % 2 * width + gap, number // 2 * height + gap
        draw.text((left, top), _fitted(item.prompt, draw, font, width - 2 * gap), fill="#1d2329", font=font)
        for column, pixels in enumerate(item.pictures):
            tile = to_image(pixels).resize((side, side), PictureFile.Resampling.NEAREST)
            canvas.paste(tile, (left + column * (side + gap), top + line))
    return canvas


def _fitted(text: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    """`text`, cut at the end with an ellipsis until it is at most `width` pixels wide."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(f"{text}…", font=font) > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def render_page(showcase: Showcase, report: Mapping[str, Any], folder: Path, title: str) -> str:
    """The HTML page of a showcase, the report's figures and the curves found in `folder`'s stages."""
    body = [f"<h1>{html.escape(title)}</h1>", '<p class="note">Trained and measured by Lexel. '
            "Every example below is held out: the model never saw it in training.</p>"]  # fmt: skip
    if showcase.drawn:
        body += ["<h2>Drawn from text</h2>", cards(map(_drawn_card, showcase.drawn), 430)]
    if showcase.described:
        body += ["<h2>Described</h2>", cards(map(_described_card, showcase.described), 190)]
    body += ["<h2>Through the tokens and back</h2>", _rebuilt_cards(showcase)]
    body += ["<h2>Figures</h2>", _figures_table(report)]
    charts = stage_curves(folder)
    if charts:
        body += ["<h2>Training</h2>", cards(charts, 300)]
    return page(title, body)


def _mark(right: bool | None) -> str:
    if right is None:
        return ""
    return (
        '<span class="right" title="right">✓</span>'
        if right
        else '<span class="wrong" title="wrong">✗</span>'
    )


def _drawn_card(item: Drawn) -> str:
    marks = "".join(_mark(right) for right in item.right)
    return figure(
        [picture(p, title=item.prompt) for p in item.pictures], f"{html.escape(item.prompt)} {marks}"
    )


def _described_card(item: Described) -> str:
    return figure([picture(item.pixels)], f"{html.escape(item.caption) or '(nothing)'} {_mark(item.right)}")


def _rebuilt_cards(showcase: Showcase) -> str:
    original, rebuilt, detokenized = showcase.rebuilt
    names = ["original", "tokenizer"] + (["detokenizer"] if detokenized is not None else [])
    rows = [original, rebuilt] + ([detokenized] if detokenized is not None else [])
    note = f'<p class="note">Left to right: {", ".join(names)}.</p>'
    pictures = [
        figure([picture(row[number], 80, name) for name, row in zip(names, rows)], "")
        for number in range(len(original))
    ]
    return note + cards(pictures, 270)


def _figures_table(report: Mapping[str, Any]) -> str:
    rows = [[html.escape(row.name), row.value, row.chance] for row in figures(report)]
    return table(("figure", "value", "chance"), rows)


def stage_curves(folder: Path) -> list[str]:
    """One chart per quantity that the stages' `metrics.csv` hold: training and validation lines together."""
    charts = []
    for path in sorted(folder.glob("*/metrics.csv")):
        grouped: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for name, points in read_curves(path).items():
            group, _, rest = name.partition("/")
            quantity, line = (rest, group) if rest else (group, "train")
            grouped.setdefault(quantity, {})[line] = points
        charts += [
            curves(f"{path.parent.name}: {quantity}", lines) for quantity, lines in sorted(grouped.items())
        ]
    return [chart for chart in charts if chart]


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """(step, value) points per column of a `metrics.csv`; empty and damaged cells are left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            for name, cell in row.items():
                value = _number(cell)
                if name not in (None, "step", "epoch") and step is not None and value is not None:
                    found.setdefault(name, []).append((step, value))
    return found


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None
