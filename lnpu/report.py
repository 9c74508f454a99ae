"""The report of a training step: one HTML page with its plots inside, and the same figures as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from lnpu.page import (
    PRECISIONS,
    card,
    image,
    in_a_row,
    legend,
    new_figure,
    number,
    page,
    percent,
    section,
    stacked_bars,
    table,
)

__all__ = ["PHASES", "render_report", "write_report"]

PHASES = {
    "ff": "feed-forward",
    "bp": "error back-propagation",
    "wg": "weight gradient",
    "update": "weight update",
    "vector": "vector unit",
}
"""Phases of a training step, by the name that the report uses."""

_COLOURS = {"ff": "#0072b2", "bp": "#d55e00", "wg": "#009e73", "update": "#cc79a7", "vector": "#8c8c8c"}
_REQUIRED = ("network", "config", "mismatches", "elements", "cycles", "ema_bits", "ops")
_OP_FIELDS = (
    "mismatches", "elements", "cycles", "macs_dense", "macs_issued", "utilization", "mac16", "mac8", "skipped_zero",
    "skipped_padding",
)  # fmt: skip


def write_report(directory: Path | str, report: Mapping[str, Any]) -> Path:
    """Write `index.html` and `report.json`.

    Parameters
    ----------
    directory : path
        Where to; it is made if it is missing.
    report : mapping
        Required: `network` and `config` (names); `mismatches` of `elements` compared with the golden model; `cycles`;
        `ema_bits`, the bits on the memory bus: ``{"fgmp": ..., "fp16": ...}``, the second being what the same schedule
        takes in plain FP16; `ops`, a list of dicts with `layer`, `phase` (see `PHASES`), `mismatches`, `elements`,
        `cycles`, `macs_dense`, `macs_issued`, `utilization` (of the array's peak, 0 to 1), `mac16`, `mac8`,
        `skipped_zero` and `skipped_padding` (streamed elements); numbers that do not apply may be left out.

        Optional: `ema_by_kind`, ``{kind: {"read", "write", "plain_read", "plain_write"}}`` in bits; `precision`,
        ``{kind: {"zero", "underflow", "fp8", "fp16"}}`` in elements, where `zero` are those that were zero before
        they were encoded and `underflow` the others that became zero; `steps`, a list of ``{"loss": ...}`` and other
        numbers; `settings`, a dict of anything.

    Returns
    -------
    Path
        The HTML page.

    Raises
    ------
    ValueError
        If a required entry is missing or a phase is unknown.
    """
    directory = Path(directory)
    page = render_report(report)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(json.dumps(report, indent=2, default=_plain) + "\n")
    path = directory / "index.html"
    path.write_text(page)
    return path


def render_report(report: Mapping[str, Any]) -> str:
    """The HTML page of a report (see `write_report`)."""
    _validate(report)
    ops = [{**dict.fromkeys(_OP_FIELDS, 0), **op} for op in report["ops"]]
    array_ops = [op for op in ops if op["macs_issued"] or op["macs_dense"]]
    title = f"Training step of {report['network']} on LNPU, configuration {_config_name(report['config'])}"
    parts = [_cards(report, ops)]

    def add(heading: str, explanation: str, *content: str) -> None:
        parts.append(section(heading, explanation, *content))

    if ops:
        add("Cycles", "Clock cycles of every layer, by phase.", image("Cycles by layer and phase", *_plot_cycles(ops)))
    if array_ops:
        add(
            "Utilisation of the array",
            "Multiply-accumulates issued, in percent of what the array could issue in the same cycles.",
            image("Utilisation by layer and phase", *_plot_utilisation(array_ops)),
        )
        add(
            "Zero skipping",
            "Left: what became of the multiply-accumulates of a dense computation. Right: the streamed elements that "
            "took no cycle, by the reason.",
            image("Zeros skipped by source", *_plot_skipping(array_ops)),
        )
    if report.get("precision"):
        add(
            "Precision",
            "How the elements of each kind of tensor were stored.",
            image("Precision by kind of tensor", *_plot_precision(report["precision"])),
        )
    if report.get("ema_by_kind"):
        add(
            "External memory access",
            "Bits on the memory bus by kind of tensor: as encoded, and what the same transfers take in plain FP16.",
            image("External memory access by kind of tensor", *_plot_ema(report["ema_by_kind"])),
            _ema_table(report["ema_by_kind"]),
        )
    if steps := report.get("steps"):
        content = [image("Loss by step", *_plot_loss(steps))] if sum("loss" in step for step in steps) > 1 else []
        add("Steps", "Figures of every step.", *content, _steps_table(steps))
    if ops:
        add("Operations", "Every operation, in the order it ran.", _ops_table(ops))
    if settings := report.get("settings"):
        rows = [(str(key), number(value)) for key, value in settings.items()]
        add("Settings", "What this report was made with.", table(("setting", "value"), rows, text_columns=2))
    return page(title, parts)


def _validate(report: Mapping[str, Any]) -> None:
    if missing := [key for key in _REQUIRED if key not in report]:
        raise ValueError(f"report must have {', '.join(_REQUIRED)}, but lacks {', '.join(missing)}")
    if missing := [key for key in ("fgmp", "fp16") if key not in report["ema_bits"]]:
        raise ValueError(f"ema_bits must have fgmp and fp16, but lacks {', '.join(missing)}")
    for op in report["ops"]:
        if "layer" not in op or op.get("phase") not in PHASES:
            raise ValueError(f"an op must have a layer and a phase of {', '.join(PHASES)}, not {dict(op)!r}")


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"report values must be JSON or NumPy values, not {type(value).__name__}")


# Page


def _config_name(config: Any) -> str:
    return str(config.get("name", "custom") if isinstance(config, Mapping) else config)


def _bits(value: float) -> str:
    for unit, size in (("Gbit", 1e9), ("Mbit", 1e6), ("kbit", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.0f} bit"


def _cards(report: Mapping[str, Any], ops: Sequence[Mapping[str, Any]]) -> str:
    mismatches, elements, bits = report["mismatches"], report["elements"], report["ema_bits"]
    dense, issued = (sum(op[key] for op in ops) for key in ("macs_dense", "macs_issued"))
    products = sum(op["mac16"] + op["mac8"] for op in ops)
    exact = mismatches == 0 and elements > 0
    cards = [
        card(
            "bit-exact" if exact else f"{number(mismatches)} mismatches",
            f"{number(elements)} elements compared with the golden model",
            "good" if exact else "bad",
        ),
        card(number(report["cycles"]), "cycles"),
        card(_bits(bits["fgmp"]), f"external memory access; plain FP16: {_bits(bits['fp16'])}"),
    ]
    if bits["fp16"]:
        change = bits["fgmp"] / bits["fp16"] - 1
        cards.append(card(f"{100 * change:+.1f}%", "external memory access against plain FP16"))
    if dense:
        cards.append(card(percent(max(0, dense - issued), dense), f"of {number(dense)} dense MACs skipped"))
    if products:
        cards.append(card(percent(sum(op["mac8"] for op in ops), products), "of the products in FP8"))
    losses = [step["loss"] for step in report.get("steps") or [] if "loss" in step]
    if losses:
        change_text = f"loss, from {losses[0]:.4g} in {len(losses)} steps" if len(losses) > 1 else "loss"
        cards.append(card(f"{losses[-1]:.4g}", change_text))
    return in_a_row(cards)


def _ops_table(ops: Sequence[Mapping[str, Any]]) -> str:
    headings = (
        "layer", "phase", "mismatches", "elements", "cycles", "MACs, dense", "MACs, issued", "utilisation",
        "FP16 products", "FP8 products", "zeros skipped", "padding skipped",
    )  # fmt: skip
    rows = []
    for op in ops:
        numbers = [number(op[key]) for key in _OP_FIELDS]
        uses_array = bool(op["macs_issued"] or op["macs_dense"])
        numbers[_OP_FIELDS.index("utilization")] = f"{100 * op['utilization']:.1f}%" if uses_array else "-"
        rows.append((str(op["layer"]), op["phase"], *numbers))
    totals = [number(sum(op[key] for op in ops)) for key in _OP_FIELDS]
    totals[_OP_FIELDS.index("utilization")] = ""
    rows.append(("total", "", *totals))

    def kind(row: int) -> str:
        if row == len(ops):
            return "total"
        return "bad" if ops[row]["mismatches"] else ""

    return table(headings, rows, text_columns=2, row_class=kind)


def _ema_table(kinds: Mapping[str, Mapping[str, float]]) -> str:
    rows = []
    totals = dict.fromkeys(("read", "write", "plain_read", "plain_write"), 0.0)
    for kind, entry in kinds.items():
        for key in totals:
            totals[key] += entry.get(key, 0)
        rows.append((kind, entry))
    rows.append(("total", totals))

    def cells(kind: str, entry: Mapping[str, float]) -> tuple[str, ...]:
        read, write, plain_read, plain_write = (entry.get(key, 0) for key in totals)
        plain = plain_read + plain_write
        ratio = f"{100 * (read + write) / plain - 100:+.1f}%" if plain else "-"
        return (kind, *(_bits(value) for value in (read, write, plain_read, plain_write)), ratio)

    headings = ("kind", "read", "written", "read, plain FP16", "written, plain FP16", "change")
    return table(headings, [cells(*row) for row in rows], row_class=lambda row: "total" if row == len(rows) - 1 else "")


def _steps_table(steps: Sequence[Mapping[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for step in steps for key in step if key != "step"))
    rows = [
        (str(step.get("step", index)), *(number(step[key]) if key in step else "" for key in keys))
        for index, step in enumerate(steps)
    ]
    return table(("step", *keys), rows)


# Plots


def _layers(ops: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(op["layer"]) for op in ops))


def _by_layer(axis: Axes, layers: Sequence[str], label: str) -> None:
    """A row a layer, the first at the top; values to the right."""
    axis.set_yticks(range(len(layers)), layers, fontsize=9)
    axis.set_ylim(len(layers) - 0.4, -0.6)
    axis.set_ylabel("layer")
    axis.set_xlabel(label)
    axis.set_xlim(left=0)
    axis.grid(axis="x", color="#e1e4e8")


def _phases(ops: Sequence[Mapping[str, Any]]) -> list[str]:
    return [phase for phase in PHASES if any(op["phase"] == phase for op in ops)]


def _plot_cycles(ops: Sequence[Mapping[str, Any]]) -> tuple[Figure, float]:
    layers, phases = _layers(ops), _phases(ops)
    figure, (axis,) = new_figure(1.4 + 0.26 * len(layers))
    left = [0.0] * len(layers)
    for phase in phases:
        cycles = [
            float(sum(op["cycles"] for op in ops if str(op["layer"]) == layer and op["phase"] == phase))
            for layer in layers
        ]
        axis.barh(range(len(layers)), cycles, left=left, height=0.72, color=_COLOURS[phase], label=PHASES[phase])
        left = [a + b for a, b in zip(left, cycles, strict=True)]
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    _by_layer(axis, layers, "cycles")
    legend(axis, len(phases))
    return figure, 10


def _plot_utilisation(ops: Sequence[Mapping[str, Any]]) -> tuple[Figure, float]:
    layers, phases = _layers(ops), _phases(ops)
    figure, (axis,) = new_figure(1.4 + (0.1 + 0.11 * len(phases)) * len(layers))
    height = 0.8 / len(phases)
    for index, phase in enumerate(phases):
        position, value = [], []
        for row, layer in enumerate(layers):
            chosen = [op for op in ops if str(op["layer"]) == layer and op["phase"] == phase]
            cycles = sum(op["cycles"] for op in chosen)
            if cycles:
                position.append(row - 0.4 + height * (index + 0.5))
                value.append(100 * sum(op["utilization"] * op["cycles"] for op in chosen) / cycles)
        axis.barh(position, value, height=0.9 * height, color=_COLOURS[phase], label=PHASES[phase])
    _by_layer(axis, layers, "utilisation (% of peak)")
    axis.set_xlim(0, max(100, axis.get_xlim()[1]))
    axis.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    legend(axis, len(phases))
    return figure, 10


def _plot_skipping(ops: Sequence[Mapping[str, Any]]) -> tuple[Figure, float]:
    phases = _phases(ops)
    figure, (macs, elements) = new_figure(1.6 + 0.5 * len(phases), columns=2)
    rows = range(len(phases))

    def total(key: str) -> list[float]:
        return [float(sum(op[key] for op in ops if op["phase"] == phase)) for phase in phases]

    dense, fp16, fp8 = total("macs_dense"), total("mac16"), total("mac8")
    skipped = [max(0.0, d - a - b) for d, a, b in zip(dense, fp16, fp8, strict=True)]
    whole = [max(a + b + c, 1.0) for a, b, c in zip(fp16, fp8, skipped, strict=True)]
    stacked_bars(macs, rows, whole, [
        ("FP16", PRECISIONS["fp16"][1], fp16), ("FP8", PRECISIONS["fp8"][1], fp8), ("skipped", "#d9d9d9", skipped),
    ])  # fmt: skip
    macs.set_xlabel("dense multiply-accumulates (%)")

    left = [0.0] * len(phases)
    for label, colour, values in (
        ("zeros", "#8c8c8c", total("skipped_zero")),
        ("padding", "#c9b458", total("skipped_padding")),
    ):
        elements.barh(rows, values, left=left, height=0.6, color=colour, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    elements.xaxis.set_major_formatter(EngFormatter(sep=""))
    elements.xaxis.set_major_locator(MaxNLocator(5))
    elements.set_xlabel("streamed elements skipped")
    elements.set_xlim(left=0)
    elements.grid(axis="x", color="#e1e4e8")
    legend(elements, 2)
    for axis in (macs, elements):
        axis.set_yticks(rows, [PHASES[phase] for phase in phases], fontsize=9)
        axis.set_ylim(len(phases) - 0.5, -0.5)
    return figure, 10


def _plot_precision(precision: Mapping[str, Mapping[str, float]]) -> tuple[Figure, float]:
    kinds = [kind for kind, entry in precision.items() if any(entry.values())] or list(precision)
    figure, (axis,) = new_figure(1.3 + 0.42 * len(kinds))
    whole = [float(sum(precision[kind].get(key, 0) for key in PRECISIONS)) or 1.0 for kind in kinds]
    series = [
        (label, colour, [float(precision[kind].get(key, 0)) for kind in kinds])
        for key, (label, colour) in PRECISIONS.items()
    ]
    stacked_bars(axis, range(len(kinds)), whole, series)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=9)
    axis.set_ylim(len(kinds) - 0.5, -0.5)
    axis.set_ylabel("kind of tensor")
    axis.set_xlabel("elements stored (%)")
    return figure, 10


def _plot_ema(kinds: Mapping[str, Mapping[str, float]]) -> tuple[Figure, float]:
    names = [kind for kind, entry in kinds.items() if any(entry.values())] or list(kinds)
    figure, (axis,) = new_figure(1.4 + 0.55 * len(names))
    series = (
        (-0.2, "read", "FGMP, read", "#0072b2"), (-0.2, "write", "FGMP, written", "#56b4e9"),
        (0.2, "plain_read", "plain FP16, read", "#8c8c8c"), (0.2, "plain_write", "plain FP16, written", "#c4c4c4"),
    )  # fmt: skip
    left = {offset: [0.0] * len(names) for offset, *_ in series}
    for offset, key, label, colour in series:
        values = [float(kinds[name].get(key, 0)) for name in names]
        rows = [row + offset for row in range(len(names))]
        axis.barh(rows, values, left=left[offset], height=0.36, color=colour, label=label)
        left[offset] = [a + b for a, b in zip(left[offset], values, strict=True)]
    axis.xaxis.set_major_formatter(EngFormatter(unit="bit"))
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_ylabel("kind of tensor")
    axis.set_xlabel("bits on the memory bus")
    axis.set_xlim(left=0)
    axis.grid(axis="x", color="#e1e4e8")
    legend(axis, 4)
    return figure, 10


def _plot_loss(steps: Sequence[Mapping[str, Any]]) -> tuple[Figure, float]:
    figure, (axis,) = new_figure(3.0)
    points = [(step.get("step", index), step["loss"]) for index, step in enumerate(steps) if "loss" in step]
    axis.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, color="#0072b2")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.grid(color="#e1e4e8")
    return figure, 10
