"""The report of `lexel.evaluate.analysis` as a page and as lines for a terminal."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lexel.evaluate.html import cards, curves, page, table

PUBLISHED = {"bits": (10.7, 9.0), "huffman_gain": (0.029, 0.349)}
"""What "Analyzing the Language of Visual Tokens" gives for visual tokens and for text (its
entropies: 10.7 ± 1.9 and 9.0 ± 0.9 bits)."""

COMPARED = {
    "items": ("items", "pictures, captions or pieces of text that hold this many tokens"),
    "used": ("different tokens", "that occur"),
    "vocabulary": ("vocabulary", "codes of the codebook; words that occur; ids of the BPE"),
    "bits": ("entropy, bits", "of single tokens, Miller-Madow corrected"),
    "normalized": ("entropy / log2 V", "1 would be all tokens equally often"),
    "huffman_gain": ("Huffman gain", "1 - mean code length / ceil(log2 V)"),
    "huffman_gain_used": ("Huffman gain, used codes", "the same with V the tokens that occur"),
    "lz78_bits": ("LZ78, bits per token", "c log2 c / N for c phrases"),
    "zipf_exponent": ("Zipf exponent", "maximum likelihood over ranks; natural text is near 1"),
    "zipf_r2": ("Zipf R²", "of the least-squares line in log-log"),
    "heaps_exponent": ("Heaps exponent", "V(m) ~ m^beta; 0 is a vocabulary that is soon complete"),
    "n95": ("items to 95 %", "until 95 % of the tokens that occur have been met, mean of random orders"),
    "bigram_perplexity": ("bigram perplexity", "of held-out items, interpolated Kneser-Ney"),
    "grammar_ratio": ("Re-Pair size", "symbols of grammar and rest per token; 1 is no structure"),
}
_SHARES = {"normalized", "huffman_gain", "huffman_gain_used", "zipf_r2", "grammar_ratio"}


def summary(report: Mapping[str, Any]) -> str:
    """The report's main figures, some lines."""
    name, codes = _first(report)
    health, packed = codes["health"], codes["compression"]
    half, most = codes["growth"]["n50"][0], codes["growth"]["n95"][0]
    lines = [
        f"{report['pictures']} pictures, {codes['tokens']} tokens ({name}), vocabulary {codes['vocabulary']}",
        f"used {health['used']} ({health['utilization']:.1%}), effective {health['effective']:.0f}, "
        f"entropy {codes['entropy']['corrected']:.2f} bits, Huffman gain {packed['huffman_gain']:.1%}",
        f"Zipf exponent {codes['zipf']['exponent']:.2f}, "
        f"Heaps exponent {codes['growth']['heaps_exponent']:.2f}, "
        f"50 % of the used codes in {half:.0f} pictures, 95 % in {most:.0f}",
    ]
    for kind, row in report["equal_length"].items():
        mine, text = row["codes"], row["text"]
        lines.append(
            f"at {row['tokens']} tokens, codes against {kind}: "
            f"entropy {mine['bits']:.2f} / {text['bits']:.2f} bits, "
            f"Huffman gain {mine['huffman_gain']:.1%} / {text['huffman_gain']:.1%}, "
            f"Zipf {mine['zipf_exponent']:.2f} / {text['zipf_exponent']:.2f}"
        )
    return "\n".join(lines)


def render_analysis(report: Mapping[str, Any], title: str) -> str:
    """The HTML page."""
    _, codes = _first(report)
    body = [f"<h1>{html.escape(title)}</h1>", _introduction(report)]
    if report["equal_length"]:
        body.append(_comparison(report))
    body += ["<h2>Curves</h2>", cards(_charts(report), 300)]
    body += ["<h2>Codebook and single tokens</h2>", _streams(report)]
    body += ["<h2>What a token says about the next</h2>", _dependence(codes)]
    body += ["<h2>n-grams by reading order</h2>", _scans(codes)]
    body += ["<h2>Laws of how often a token occurs</h2>", _laws(report)]
    if report["granularity"] or report.get("words"):
        body += ["<h2>Do tokens stand for things?</h2>", _meaning(report)]
    if report.get("alignment"):
        body += ["<h2>Do codes and captions order the pictures alike?</h2>", _alignment(report["alignment"])]
    return page(title, body)


def _first(report: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    return next(iter(report["streams"].items()))


def _introduction(report: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{size:,}" for size in report["codebook_sizes"])
    many = (
        f"{len(report['codebook_sizes'])} codebooks of {sizes}"
        if len(report["codebook_sizes"]) > 1
        else sizes
    )
    text = (
        f"{report['pictures']:,} pictures of up to {report['positions']:,} positions, codes: {many}. "
        "Definitions: docs/analysis.md."
    )
    return f'<p class="note">{html.escape(text)}</p>'


def _comparison(report: Mapping[str, Any]) -> str:
    parts = []
    for kind, row in report["equal_length"].items():
        note = f"{row['tokens']:,} tokens of each; text: {report['compared_with'].removeprefix('the ')}."
        lines = []
        for key, (name, meaning) in COMPARED.items():
            published = PUBLISHED.get(key)
            cells = [_number(key, row["codes"][key]), _number(key, row["text"][key])]
            cells += ["", ""] if published is None else [_number(key, value) for value in published]
            lines.append([f'{name} <span style="color:var(--soft)">{html.escape(meaning)}</span>', *cells])
        head = ("figure", "codes", html.escape(kind), "paper: codes", "paper: text")
        title = f"<h2>Beside text of the same length: {html.escape(kind)}</h2>"
        parts += [title, f'<p class="note">{html.escape(note)}</p>', table(head, lines)]
    return "".join(parts)


def _number(key: str, value: float) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if key in _SHARES:
        return f"{value:.1%}" if "gain" in key else f"{value:.3f}"
    return f"{value:,.0f}" if float(value).is_integer() or value >= 1000 else f"{value:.2f}"


def _charts(report: Mapping[str, Any]) -> list[str]:
    streams = report["streams"]
    _, codes = _first(report)
    scan = next(iter(codes["ngrams"]))
    grams = {f"n = {g}": row["ranks"] for g, row in codes["ngrams"][scan].items()}
    growing = {name: row["growth"]["curve"] for name, row in streams.items()}
    perplexity = {
        name: [(int(g), row["perplexity"]) for g, row in grams_of.items() if row["perplexity"] is not None]
        for name, grams_of in codes["ngrams"].items()
    }
    blocks = {name: list(enumerate(row["entropy"]["blocks"], 1)) for name, row in streams.items()}
    places = {
        name: list(enumerate(row["entropy"]["bits_by_position"], 1))
        for name, row in streams.items()
        if row["kind"] == "codes"
    }
    return [
        curves("Frequency by rank", {name: row["ranks"] for name, row in streams.items()}, log=True),
        curves(f"Frequency by rank, n-grams of codes ({scan})", grams, log=True),
        curves("Different tokens after so many items", growing, log=True),
        curves("Bits per token of blocks of n tokens", blocks),
        curves("Held-out perplexity of an n-gram model", {k: v for k, v in perplexity.items() if v}),
        curves("Entropy by position, bits", places),
    ]


def _streams(report: Mapping[str, Any]) -> str:
    columns = [_stream(row) for row in report["streams"].values()]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return table(("", *map(html.escape, report["streams"])), rows)


def _stream(row: Mapping[str, Any]) -> dict[str, str]:
    """The figures of one stream, as the table shows them."""
    health, packed, zipf, growth = row["health"], row["compression"], row["zipf"], row["growth"]
    return {
        "tokens": f"{row['tokens']:,}",
        "vocabulary": f"{row['vocabulary']:,}",
        "used": f"{health['used']:,} ({health['utilization']:.1%})",
        "effective tokens, 2 to the entropy": f"{health['effective']:,.1f}",
        "share of the commonest hundredth": f"{health['top_share']:.1%}",
        "entropy, bits (Miller-Madow)": f"{row['entropy']['corrected']:.2f}",
        "arithmetic bound, H / log2 V": f"{packed['arithmetic_bound']:.3f}",
        "Huffman, bits per token": f"{packed['huffman_bits']:.2f} of {packed['plain_bits']}",
        "Huffman gain": f"{packed['huffman_gain']:.1%}",
        "LZ78, bits per token": f"{packed['lz78_bits']:.2f}",
        "LZMA, bits per token": f"{packed['lzma_bits']:.2f}",
        "Zipf exponent (KS)": f"{zipf['exponent']:.2f} ({zipf['ks']:.3f})",
        "Zipf by least squares (R²)": f"{zipf['exponent_least_squares']:.2f} ({zipf['r2']:.3f})",
        "Zipf-Mandelbrot exponent, shift (KS)": f"{zipf['mandelbrot_exponent']:.2f}, "
        f"{zipf['mandelbrot_shift']:.1f} ({zipf['mandelbrot_ks']:.3f})",
        "Heaps exponent (R²)": f"{growth['heaps_exponent']:.2f} ({growth['heaps_r2']:.3f})",
        "items to 50 % of the used tokens": _interval(growth["n50"]),
        "items to 95 %": _interval(growth["n95"]),
        "Re-Pair, symbols per token": f"{row['grammar']['ratio']:.3f}",
        "Re-Pair, bits per token": f"{row['grammar']['bits']:.2f}",
        "mean height of its trees": f"{row['grammar']['depth']:.2f}",
        "rules whose left, right part is a rule": f"{row['grammar']['left']:.0%}, "
        f"{row['grammar']['right']:.0%}",
    }


def _interval(values: Sequence[float]) -> str:
    return f"{values[0]:.0f} ({values[1]:.0f}–{values[2]:.0f})"


def _dependence(codes: Mapping[str, Any]) -> str:
    names = {"sequence": "in the sequence", "rows": "to the right", "columns": "below"}
    rows = [
        [
            names[name],
            *(f"{row[key]:.2f}" for key in ("conditional", "corrected", "information", "by_chance")),
        ]
        for name, row in codes["entropy"]["along"].items()
    ]
    note = (
        "In bits. Information that shuffled tokens show too is estimation error: short texts look more "
        "regular than they are."
    )
    head = ("next token", "entropy given this one", "Miller-Madow", "information", "after shuffling")
    return f'<p class="note">{note}</p>{table(head, rows)}'


def _scans(codes: Mapping[str, Any]) -> str:
    head = ("order", "n", "different", "once", "bits per token", "Zipf", "R²", "KS", "Huffman", "Benford χ²",
            "perplexity")  # fmt: skip
    rows = []
    for scan, grams in codes["ngrams"].items():
        for g, row in grams.items():
            if g == "1" and scan != next(iter(codes["ngrams"])):
                continue  # single tokens are the same in every order
            perplexity = "–" if row["perplexity"] is None else f"{row['perplexity']:.1f}"
            rows.append([
                "any" if g == "1" else scan, g, f"{row['types']:,}", f"{row['once']:.0%}",
                f"{row['bits_per_token']:.2f}",
                f"{row['zipf_exponent']:.2f}", f"{row['zipf_r2']:.3f}", f"{row['zipf_ks']:.3f}",
                f"{row['huffman_gain']:.1%}", f"{row['benford_chi_square']:,.0f}", perplexity,
            ])  # fmt: skip
    note = "Huffman: against the n-grams that occur. Perplexity per token, every fifth item held out."
    return f'<p class="note">{note}</p><div style="overflow-x:auto">{table(head, rows)}</div>'


def _laws(report: Mapping[str, Any]) -> str:
    head = ("", "Yule-Simon rho", "zeta exponent", "log-normal", "Yule-Simon against zeta, z",
            "against log-normal, z", "Benford χ², p")  # fmt: skip
    rows = []
    for name, row in report["streams"].items():
        yule, benford = row["yule_simon"], row["benford"]
        zeta, normal = yule["zipf"], yule["log_normal"]
        rows.append([
            html.escape(name), f"{yule['rho']:.2f}", f"{zeta['exponent']:.2f}",
            f"{normal['mu']:.2f} ± {normal['sigma']:.2f}", f"{zeta['vuong_z']:+.1f}",
            f"{normal['vuong_z']:+.1f}",
            f"{benford['chi_square']:,.0f}, {benford['p']:.2g}",
        ])  # fmt: skip
    note = "Vuong's z: above 2 Yule-Simon fits better, below -2 the other law."
    return f'<p class="note">{note}</p>{table(head, rows)}'


def _meaning(report: Mapping[str, Any]) -> str:
    head = ("tokens against", "labels", "purity", "NMI", "Cramer's V", "purity, shuffled", "NMI, shuffled",
            "V, shuffled")  # fmt: skip
    rows = []
    for level, row in report["granularity"].items():
        figures = [row[key] for key in ("purity", "nmi", "cramers_v")]
        chance = [row["by_chance"][key] for key in ("purity", "nmi", "cramers_v")]
        rows.append(
            [
                f"{level} at the cell (background left out)",
                str(row["labels"]),
                *(f"{x:.3f}" for x in (*figures, *chance)),
            ]
        )
    words = report.get("words")
    if words:
        cells = [f"{words['cramers_v']:.3f}", "", "", f"{words['by_chance']:.3f}"]
        rows.append(["words of the caption (best token's presence)", str(words["words"]), "", "", *cells])
    return table(head, rows)


def _alignment(found: Mapping[str, Any]) -> str:
    names = {
        "procrustes": "Procrustes residual",
        "mutual_neighbours": "mutual nearest neighbours",
        "distortion": "difference of the distances between items",
    }
    rows = [
        [name, f"{found['matched'][key]:.3f}", f"{found['by_chance'][key]:.3f}"]
        for key, name in names.items()
    ]
    plan = found["gromov_wasserstein"]
    note = (
        f"{found['pairs']:,} pictures and captions, each the mean of its tokens' PPMI + SVD embeddings. "
        f"Gromov-Wasserstein distance {plan['distance']:.3f} (the true pairs cost {plan['true_pairs']:.3f}); "
        f"its plan puts {plan['right']:.1%} on the true pairs, {plan['by_chance']:.1%} by chance."
    )
    return f'<p class="note">{note}</p>{table(("", "matched", "captions shuffled"), rows)}'
