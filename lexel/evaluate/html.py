"""Small pieces of self-contained HTML: pictures as data URIs, curves as inline SVG, tables.

Nothing refers to anything outside the page, and colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from lexel.data.images import to_image

Series = Mapping[str, Sequence[tuple[float, float]]]

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2329; --soft: #66707a; --line: #d9dee3;
  --panel: #f5f7f9; --a: #2563c9; --b: #c2562d; --c: #2d8a57; --d: #8a4fb5; --e: #b08a1e; --f: #4a8c99; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e8ec; --soft: #98a3ad;
  --line: #353c44; --panel: #1d2227; --a: #7aa7f0; --b: #ea9068; --c: #6cc596; --d: #c096e2; --e: #dcbb5c;
  --f: #83c2cf; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p.note, figcaption, td.soft, th { color: var(--soft); } p.note { margin: 0 0 1rem; max-width: 46rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; } td, th { padding: .3rem .75rem .3rem 0;
  border-bottom: 1px solid var(--line); } td.number, th.number { text-align: right; }
.cards { display: grid; gap: .75rem; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .75rem; }
figure { margin: 0; overflow-wrap: anywhere; } figcaption { font-size: .85rem; margin-top: .4rem; }
img { image-rendering: pixelated; border-radius: 4px; display: block; }
.row { display: flex; gap: 4px; flex-wrap: wrap; } .right { color: var(--c); } .wrong { color: var(--b); }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 11px system-ui; }
.legend { font-size: .8rem; display: flex; flex-wrap: wrap; gap: .2rem .8rem; color: var(--soft); }
""".strip()

_COLORS = ("--a", "--b", "--c", "--d", "--e", "--f")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 340, 170, 44, 22, 8


def page(title: str, body: Sequence[str]) -> str:
    """A whole HTML document of `body`'s pieces."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def picture(pixels: Tensor, side: int = 96, title: str = "") -> str:
    """An ``<img>`` of pixels ``[3, h, w]`` in [-1, 1], shown `side` screen pixels high."""
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    label = html.escape(title, quote=True)
    return f'<img src="data:image/png;base64,{data}" height="{side}" alt="{label}" title="{label}">'


def figure(pictures: Sequence[str], caption: str) -> str:
    """Pictures side by side in a card with a caption below (the caption may hold HTML)."""
    return (
        f'<figure class="card"><div class="row">{"".join(pictures)}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def cards(contents: Iterable[str], width: int) -> str:
    """Cards in as many equal columns, at least `width` screen pixels wide, as fit."""
    columns = f"repeat(auto-fill, minmax(min(100%, {width}px), 1fr))"
    return f'<div class="cards" style="grid-template-columns: {columns}">{"".join(contents)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers; cells may hold HTML."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if column else ''}>{cell}</{tag}>" for column, cell in enumerate(row)
        )

    lines = [f"<tr>{cells(head, 'th')}</tr>", *(f"<tr>{cells(row, 'td')}</tr>" for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def curves(title: str, series: Series, *, log: bool = False) -> str:
    """A card with one line chart, a line per name of `series` (points (x, y), not finite ones left out).
    log: both axes are logarithmic; points that are not positive are left out."""
    if log:
        series = {
            name: [(math.log10(x), math.log10(y)) for x, y in points if x > 0 and y > 0]
            for name, points in series.items()
        }
    lines = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    high = high if high > low else low + (abs(low) or 1.0)
    first, last = min(xs), max(max(xs), min(xs) + 1)
    plot_w, plot_h = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - _TOP

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - first) / (last - first) * plot_w,
            _TOP + (high - y) / (high - low) * plot_h,
        )

    parts = []
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        _, y = place(first, value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">'
            f"{_tick(value, log)}</text>"
        )
    for x, anchor in ((first, "start"), (last, "end")):
        parts.append(
            f'<text x="{place(x, low)[0]:.1f}" y="{_HEIGHT - 5}" text-anchor="{anchor}">'
            f"{_tick(x, True) if log else format(x, '.0f')}</text>"
        )
    legend = []
    for number, (name, line) in enumerate(lines.items()):
        color = f"var({_COLORS[number % len(_COLORS)]})"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in thin(line)))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        legend.append(f'<span><span style="color:{color}">■</span> {html.escape(name)}</span>')
    return (
        f'<div class="card"><strong>{html.escape(title)}</strong>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)}">'
        f'{"".join(parts)}</svg><div class="legend">{"".join(legend)}</div></div>'
    )


def _tick(value: float, log: bool) -> str:
    if not log:
        return f"{value:.3g}"
    value = 10**value
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def thin(points: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """At most about `most` points: neighbours are averaged, the last one is kept."""
    size = -(-len(points) // most)
    if size < 2:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [*means, points[-1]]
