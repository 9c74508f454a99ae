"""Pages of HTML with tables and plots inside, of one style for all reports."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

__all__ = [
    "GRID",
    "PRECISIONS",
    "card",
    "image",
    "in_a_row",
    "legend",
    "new_figure",
    "number",
    "page",
    "percent",
    "picture",
    "section",
    "stacked_bars",
    "table",
    "text",
]

PRECISIONS = {
    "zero": ("zero", "#d9d9d9"),
    "underflow": ("underflow to zero", "#999999"),
    "fp8": ("FP8", "#56b4e9"),
    "fp16": ("FP16", "#e69f00"),
}
"""What an element is stored as: label and colour."""

GRID = "#e1e4e8"
"""Colour of grid lines."""

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1b1f24; background: #f6f7f9;
       margin: 0; }
main { max-width: 1320px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 0 0 8px; }
p { margin: 0 0 10px; color: #4b5560; }
section { background: #fff; border: 1px solid #e1e4e8; border-radius: 8px; padding: 18px 20px; margin: 16px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 16px 0; }
.card { background: #fff; border: 1px solid #e1e4e8; border-radius: 8px; padding: 12px 16px; }
.card b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.card span { color: #4b5560; font-size: 13px; }
.card.good b { color: #1a7f37; } .card.bad b { color: #c9252d; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 8px; text-align: right; border-bottom: 1px solid #e9ecef; white-space: nowrap; }
th { color: #4b5560; font-weight: 600; border-bottom: 2px solid #d0d5da; }
th.text, td.text { text-align: left; }
td.text { white-space: normal; }
tr.bad td { background: #fdecec; }
tr.total td { font-weight: 600; border-top: 2px solid #d0d5da; }
"""


def text(value: Any) -> str:
    """As text in HTML."""
    return html.escape(str(value))


def number(value: Any) -> str:
    """A number for people; what is none as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return str(value)
    x = float(value)
    return f"{x:,.0f}" if x.is_integer() and abs(x) < 1e15 else f"{x:.6g}"


def percent(part: float, whole: float) -> str:
    """A share in percent, "-" of nothing."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def card(value: str, label: str, kind: str = "") -> str:
    """A figure in large print over its label; `kind`: "", "good" or "bad"."""
    return f'<div class="card {kind}"><b>{text(value)}</b><span>{text(label)}</span></div>'


def in_a_row(found: Iterable[str]) -> str:
    """Cards in a row."""
    return f'<div class="cards">{"".join(found)}</div>'


def section(heading: str, explanation: str, *content: str) -> str:
    """A part of a page; `content` is HTML."""
    return f"<section><h2>{text(heading)}</h2><p>{text(explanation)}</p>{''.join(content)}</section>"


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n<body><main><h1>{text(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: int = 1,
    row_class: Callable[[int], str] = lambda row: "",
) -> str:
    """A table; the first `text_columns` columns are aligned to the left, `row_class` is "total", "bad" or ""."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="text">{text(value)}</{tag}>' if i < text_columns else f"<{tag}>{text(value)}</{tag}>"
            for i, value in enumerate(values)
        )

    body = []
    for index, row in enumerate(rows):
        kind = row_class(index)
        body.append(f'<tr class="{kind}">{cells("td", row)}</tr>' if kind else f"<tr>{cells('td', row)}</tr>")
    head = f"<thead><tr>{cells('th', headings)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{"".join(body)}</tbody></table></div>'


def image(alt: str, figure: Figure, width: float) -> str:
    """A plot as SVG inside the page, `width` in hundreds of pixels."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lnpu", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{text(alt)}" width="{width * 100:.0f}" src="data:image/svg+xml;base64,{data}">'


def new_figure(height: float, columns: int = 1, width: float = 10.0, rows: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """An empty plot (sizes in inches) and its axes, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    return figure, axes


def picture(path: Path, figure: Figure, dpi: int = 80) -> None:
    """Write a plot as PNG."""
    figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})


def legend(axis: Axes, columns: int) -> None:
    """A legend over the axes."""
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False, fontsize=9)


def stacked_bars(
    axis: Axes, rows: Iterable[int], whole: Sequence[float], series: Sequence[tuple[str, str, Sequence[float]]]
) -> None:
    """Horizontal bars of 100%, with the share written into every part that is wide enough."""
    left = [0.0] * len(whole)
    for label, colour, values in series:
        shares = [100 * value / total for value, total in zip(values, whole, strict=True)]
        bars = axis.barh(list(rows), shares, left=left, height=0.6, color=colour, label=label)
        axis.bar_label(bars, [f"{s:.0f}%" if s >= 6 else "" for s in shares], label_type="center", fontsize=8)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axis.set_xlim(0, 100)
    axis.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    legend(axis, len(series))
