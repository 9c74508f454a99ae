"""The plots of the benchmark."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from lnpu.bench.cases import PHASES, Case
from lnpu.bench.operation import Result
from lnpu.bench.runs import Results
from lnpu.page import GRID, new_figure

__all__ = ["has_layers", "has_sparsities", "heat_map", "roofline", "speed_up"]

Plot = tuple[Figure, float]
"""A figure, and its width on a page in hundreds of pixels."""

_TITLES = {"ff": "FF", "bp": "BP", "wg": "WG"}
_FORMATS = {"fp16": ("FP16", "#0072b2"), "fp8": ("FP8", "#d55e00")}
_MARKERS = {"ff": "o", "bp": "s", "wg": "^"}
_INK = "#4b5560"


def _plain(axis: Axes, which: str, ticks: Sequence[float]) -> None:
    """Plain numbers at the ticks of a logarithmic axis."""
    one = getattr(axis, f"{which}axis")
    one.set_major_locator(FixedLocator(ticks))
    one.set_minor_locator(NullLocator())
    one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _powers(low: float, high: float, base: int) -> list[float]:
    first, last = np.floor(np.log(low) / np.log(base)), np.ceil(np.log(high) / np.log(base))
    return [float(base) ** power for power in np.arange(first, last + 1)]


def roofline(results: Results) -> Plot:
    """Products a cycle against products per byte on the bus, under the roofs of the cores and of the bus."""
    config = results.config
    peak, width = config.macs_fp16, config.axi_bits / 8
    figure, (axis,) = new_figure(6.0)
    whole = [result for result in results.found.values() if result.case.program == "compiled"]
    points = [(result, results.metrics(result)) for result in whole]
    points = [(result, metrics) for result, metrics in points if metrics.products]
    intensities = [metrics.intensity for _, metrics in points] or [1.0]
    rates = [metrics.products / metrics.cycles for _, metrics in points] or [1.0]
    left, right = min(intensities) / 2, max(4 * peak / width, 2 * max(intensities))
    bottom, top = min(rates) / 2, 4 * peak
    for roof, ways, style in ((2 * peak, 1, "-"), (2 * peak, 2, ":")):
        knee = roof / (ways * width)
        axis.plot([left, knee], [left * ways * width, roof], style, color=_INK, linewidth=1.2)
    for name, factor in (("fp16", 1), ("fp8", 2)):
        label, colour = _FORMATS[name]
        axis.plot([factor * peak / (2 * width), right], [factor * peak] * 2, color=colour, linewidth=1.2)
        axis.annotate(
            f"peak {label}\n{factor * peak:,}", (right, factor * peak), (5, 0), textcoords="offset points",
            ha="left", va="center", fontsize=9, color=colour, annotation_clip=False,
        )  # fmt: skip
    for result, metrics in points:
        case = result.case
        axis.plot(
            metrics.intensity, metrics.products / metrics.cycles, _MARKERS[case.phase],
            color=_FORMATS[case.streamed][1], markersize=6, alpha=0.75, markeredgewidth=1.0,
            markerfacecolor="none" if case.sparsity else None,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    _plain(axis, "x", [tick for tick in _powers(left, right, 4) if left <= tick <= right])
    _plain(axis, "y", [tick for tick in _powers(bottom, top, 4) if bottom <= tick <= top])
    axis.set_xlabel("intensity (products per byte on the bus)")
    axis.set_ylabel("products a cycle")
    axis.grid(color=GRID)
    handles = [
        *(Line2D([], [], color=_INK, marker=_MARKERS[phase], linestyle="", label=_TITLES[phase]) for phase in PHASES),
        *(
            Line2D([], [], color=colour, marker="D", linestyle="", label=f"{label} streamed")
            for label, colour in _FORMATS.values()
        ),
        Line2D([], [], color=_INK, marker="D", linestyle="", markerfacecolor="none", label="with zeros"),
        Line2D([], [], color=_INK, linestyle="-", label="bus, one way"),
        Line2D([], [], color=_INK, linestyle=":", label="bus, both ways"),
    ]
    axis.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=8, frameon=False, fontsize=9,
        columnspacing=1.2, handletextpad=0.4,
    )  # fmt: skip
    return figure, 10


def _dense_layers(results: Iterable[Result]) -> list[Result]:
    return [
        result
        for result in results
        if result.case.group == "layer" and not result.case.sparsity and result.case.streamed == result.case.resident
    ]


def _depth(case: Case) -> tuple[bool, int, int, int, int]:
    """Order of the layers in a network: by size of the image, then by channels."""
    shape = case.shape
    return shape.linear, -shape.image, shape.channels, -shape.kernel, shape.outputs


def has_layers(results: Results) -> bool:
    """Whether there is something for `heat_map`."""
    return bool(_dense_layers(results.found.values()))


def heat_map(results: Results) -> Plot:
    """Utilisation of the array by dense layers, phases and formats."""
    found = _dense_layers(results.found.values())
    layers = list(dict.fromkeys(result.case.shape.name for result in sorted(found, key=lambda one: _depth(one.case))))
    formats = [name for name in _FORMATS if any(result.case.streamed == name for result in found)]
    figure, axes = new_figure(1.2 + 0.36 * len(layers), columns=len(formats), width=2.6 + 2.9 * len(formats))
    picture = None
    for column, (axis, format_) in enumerate(zip(axes, formats, strict=True)):
        values = np.full((len(layers), len(PHASES)), np.nan)
        for row, layer in enumerate(layers):
            for number, phase in enumerate(PHASES):
                metrics = [
                    results.metrics(result)
                    for result in found
                    if (result.case.shape.name, result.case.phase, result.case.streamed) == (layer, phase, format_)
                ]
                if cycles := sum(one.cycles for one in metrics):
                    values[row, number] = 100 * sum(one.ideal for one in metrics) / cycles
        picture = axis.imshow(values, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
        for (row, number), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "white" if value > 60 else "#1b1f24"
                axis.text(number, row, f"{value:.0f}%", ha="center", va="center", fontsize=9, color=ink)
        axis.set_xticks(range(len(PHASES)), [_TITLES[phase] for phase in PHASES])
        axis.set_yticks(range(len(layers)), layers, fontsize=9)
        axis.tick_params(length=0, labelleft=column == 0)
        axis.spines[:].set_visible(False)
        axis.set_xticks(np.arange(len(PHASES) - 1) + 0.5, minor=True)
        axis.set_yticks(np.arange(len(layers) - 1) + 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=2)
        axis.tick_params(which="minor", length=0)
        axis.set_facecolor("#eef0f2")  # not measured
        axis.set_title(f"dense {_FORMATS[format_][0]}", fontsize=10)
    assert picture is not None
    bar = figure.colorbar(picture, ax=list(axes), label="utilisation", fraction=0.05, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure, 2.6 + 2.9 * len(formats)


Lines = Mapping[tuple[str, str], dict[str, list[Result]]]
"""Results of a layer and phase by format, by increasing sparsity; the first of FP16 is dense."""


def _lines(results: Results) -> Lines:
    lines: dict[tuple[str, str], dict[str, list[Result]]] = {}
    layers = [result for result in results.found.values() if result.case.group == "layer"]
    same = [result for result in layers if result.case.streamed == result.case.resident]
    for result in sorted(same, key=lambda one: (_depth(one.case), one.case.sparsity)):
        case = result.case
        key = f"{case.shape.name}, batch {case.shape.batch}", case.phase
        lines.setdefault(key, {}).setdefault(case.streamed, []).append(result)
    return {
        key: by_format
        for key, by_format in lines.items()
        if "fp16" in by_format
        and not by_format["fp16"][0].case.sparsity
        and any(len(line) > 1 for line in by_format.values())
    }


def has_sparsities(results: Results) -> bool:
    """Whether there is something for `speed_up`."""
    return bool(_lines(results))


def speed_up(results: Results) -> Plot:
    """Speed against the same operation in dense FP16, by sparsity: the whole operation, and the cores alone."""
    lines = _lines(results)
    layers = list(dict.fromkeys(layer for layer, _ in lines))
    phases = [phase for phase in PHASES if any(phase == one for _, one in lines)]
    figure, axes = new_figure(0.8 + 2.7 * len(layers), columns=len(phases), rows=len(layers))
    sparsity = np.linspace(0, 0.92, 47)
    for row, layer in enumerate(layers):
        for column, phase in enumerate(phases):
            axis = axes[row * len(phases) + column]
            by_format = lines.get((layer, phase), {})
            if not by_format:
                axis.set_axis_off()
                continue
            dense = by_format["fp16"][0]
            for format_ in [name for name in _FORMATS if name in by_format]:
                line, (label, colour) = by_format[format_], _FORMATS[format_]
                rate = 2 if format_ == "fp8" else 1
                ideal = rate / (1 - sparsity)
                axis.plot(100 * sparsity, ideal, color=colour, linestyle=":", linewidth=1.1, label=f"{label}, ideal")
                for counter, style, title in (("core_busy", "--", "cores"), ("cycles", "-", "whole operation")):
                    base = dense.counters[counter]
                    axis.plot(
                        [100 * one.case.sparsity for one in line],
                        [base / one.counters[counter] for one in line],
                        style, color=colour, linewidth=1.4 if style == "-" else 1.0, marker="o",
                        markersize=4 if style == "-" else 0, label=f"{label}, {title}",
                    )  # fmt: skip
            axis.set_yscale("log")
            axis.set_ylim(0.8, 26)
            axis.set_xlim(-3, 95)
            _plain(axis, "y", (1, 2, 4, 8, 16))
            axis.set_xticks((0, 25, 50, 75, 90))
            axis.xaxis.set_major_formatter(PercentFormatter(decimals=0))
            axis.grid(color=GRID)
            axis.set_title(f"{_TITLES[phase]}, {layer}", fontsize=9)
            axis.tick_params(labelleft=column == 0)
        axes[row * len(phases)].set_ylabel("speed-up over dense FP16", fontsize=9)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    figure.supxlabel("zeros in the streamed operand", fontsize=10)
    return figure, 10
