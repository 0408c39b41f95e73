"""Figures of a report as rows, as text and as a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lexel.sample.pipeline import Pipeline

_MEASURES = ("accuracy_", "exact_")
_UNITS = {"psnr": "{:.1f} dB", "mean_accepted": "{:.2f}", "speedup": "{:.2f}×", "peak_memory_mb": "{:.0f} MB"}

_HEADER = """---
library_name: lexel
license: apache-2.0
pipeline_tag: any-to-any
tags: [image-tokenizer, text-to-image, image-to-text, autoregressive]
---

# A Lexel bundle
"""

_USE = """
```python
from lexel import Image, Pipeline, Text

pipe = Pipeline.from_pretrained("this folder")
picture = pipe([Text("a red circle"), Image.blank()], seed=0).documents[0][-1].pixels
print(pipe.describe(picture))
```
"""


@dataclass(frozen=True)
class Figure:
    """name: dotted key of the report; value and chance: formatted, chance empty where there is none."""

    name: str
    value: str
    chance: str = ""


def figures(report: Mapping[str, Any]) -> list[Figure]:
    """Every number of a report in its order; chance levels stand beside their accuracies."""
    flat = _flatten(report)
    rows = []
    for name, value in flat.items():
        head, _, last = name.rpartition(".")
        if last.startswith("chance_"):
            continue
        measure = next((m for m in _MEASURES if last.startswith(m)), None)
        chance = flat.get(f"{head}.chance_{last.removeprefix(measure)}") if measure else None
        rows.append(Figure(name, _format(head, last, value), "" if chance is None else f"{chance:.1%}"))
    return rows


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = value
    return flat


def _format(head: str, last: str, value: float) -> str:
    if last.startswith((*_MEASURES, "agreement_")) or last == "codebook_usage":
        return f"{value:.1%}"
    if head == "seconds":
        return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
    return _UNITS[last].format(value) if last in _UNITS else f"{value:.4g}"


def figures_table(report: Mapping[str, Any]) -> str:
    """The figures as aligned plain text."""
    rows = figures(report)
    width = max((len(row.name) for row in rows), default=0)
    values = max((len(row.value) for row in rows), default=0)
    lines = [
        f"{row.name:<{width}}  {row.value:>{values}}" + (f"   chance {row.chance}" if row.chance else "")
        for row in rows
    ]
    return "\n".join(lines)


def model_card(pipeline: Pipeline, report: Mapping[str, Any] | None = None, notes: str = "") -> str:
    """The README.md of a bundle in the hub's form: what is inside, how to use it, the measured figures.
    notes: markdown about the training (data, time, machine) that goes in front of the figures."""
    config, layout = pipeline.lm.config, pipeline.tokenizer.layout
    height, width = pipeline.tokenizer.image_size
    parts = {
        "tokenizer": pipeline.tokenizer,
        "language model": pipeline.lm,
        "detokenizer": pipeline.detokenizer,
        **{f"drafter `{name}`": drafter for name, drafter in pipeline.drafters.items()},
    }
    sampling = "; ".join(
        f"{name}: temperature {s.temperature:g}, guidance {s.guidance:g}"
        for name, s in pipeline.sampling.items()
    )
    lines = [
        _HEADER,
        f"Pictures of {height}x{width} pixels as {layout.order} "
        f"({' + '.join(map(str, layout.codebook_sizes))} codes), and one decoder-only model of "
        f"{config.layers} layers, width {config.dim} and context {config.max_length} that reads and writes "
        "text and pictures.\n",
        *(f"- {name}: {_size(part)} million parameters" for name, part in parts.items() if part is not None),
        f"- sampling: {sampling}; decoding: {pipeline.decoding.strategy}",
        _USE,
    ]
    if notes:
        lines += ["## Training\n", notes.strip(), ""]
    if report is not None:
        lines.append(f"## Figures\n\n`lexel evaluate`, {report['count']} held-out examples of each kind.\n")
        lines += ["| figure | value | chance |", "|---|---:|---:|"]
        rows = [row for row in figures(report) if row.name != "count"]
        lines += [f"| `{row.name}` | {row.value} | {row.chance} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _size(part: Any) -> str:
    return f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f}"
