"""The plots of the study, from its compact data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from lnpu.page import GRID, PRECISIONS, legend, new_figure
from lnpu.study.findings import LABELS, distances

__all__ = ["bits", "curves", "gradient_layers", "gradient_sweep", "layer_mixes", "shares", "traces"]

_COLOURS = {"fp32": "#8c8c8c", "fp16": "#0072b2", "fp8": "#d55e00", "fgmp": "#009e73", "dynamic": "#cc79a7"}
_KINDS = ("activation", "preactivation", "error", "weight", "gradient", "momentum")
_FGMP = ("fgmp", "dynamic")

Plot = tuple[Figure, float]
"""A figure, and its width on a page in hundreds of pixels."""


def _epochs(axis: Axes, last: bool = True) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.grid(color=GRID)
    if last:
        axis.set_xlabel("epoch")


def _kinds(found: Mapping[str, Any]) -> list[str]:
    return [kind for kind in _KINDS if any(kind in kinds for kinds in found.values())]


def curves(training: Mapping[str, Any]) -> Plot:
    """Test accuracy and training loss by epoch: mean over the seeds, and between which values they lie."""
    figure, (accuracy, loss) = new_figure(4.2, columns=2)
    for axis, name, factor, label in (
        (accuracy, "test_accuracy", 100.0, "test accuracy (%)"),
        (loss, "train_loss", 1.0, "training loss"),
    ):
        for format_, title in LABELS.items():
            rows = [run[name] for run in training["runs"] if run["format"] == format_]
            if not rows:
                continue
            values = factor * np.array(rows, float)  # None, an infinite loss, becomes NaN
            epochs = np.arange(1, values.shape[1] + 1)
            colour = _COLOURS[format_]
            axis.plot(epochs, values.mean(0), color=colour, label=title, linewidth=1.6)
            axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
        _epochs(axis)
        axis.set_ylabel(label)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    return figure, 10


def shares(training: Mapping[str, Any]) -> Plot:
    """What the elements of each kind became, by epoch."""
    found = {name: training["kinds"][name] for name in _FGMP if name in training["kinds"]}
    kinds = _kinds(found)
    figure, axes = new_figure(0.6 + 2.1 * len(found), columns=len(kinds), rows=len(found))
    for row, (name, by_kind) in enumerate(found.items()):
        for column, kind in enumerate(kinds):
            axis = axes[row * len(kinds) + column]
            if kind not in by_kind:
                axis.set_axis_off()
                continue
            values = 100 * np.array(by_kind[kind]["shares"])
            axis.stackplot(
                np.arange(1, len(values) + 1),
                values.T,
                colors=[colour for _, colour in PRECISIONS.values()],
                labels=[label for label, _ in PRECISIONS.values()],
            )
            axis.set_ylim(0, 100)
            axis.margins(x=0)
            _epochs(axis, last=row == len(found) - 1)
            axis.yaxis.set_major_formatter(PercentFormatter(decimals=0))
            axis.tick_params(labelleft=column == 0)
            if row == 0:
                axis.set_title(kind, fontsize=10)
        axes[row * len(kinds)].set_ylabel(LABELS[name])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure, 10


def bits(training: Mapping[str, Any]) -> Plot:
    """Encoded bits an element by kind, format and epoch."""
    found = training["kinds"]
    kinds = _kinds(found)
    figure, axes = new_figure(3.2, columns=len(kinds))
    for column, (axis, kind) in enumerate(zip(axes, kinds, strict=True)):
        for name, by_kind in found.items():
            if kind in by_kind:
                values = by_kind[kind]["bits"]
                axis.plot(range(1, len(values) + 1), values, color=_COLOURS[name], label=LABELS[name], linewidth=1.6)
        axis.axhline(16, color="#4b5560", linewidth=0.8, linestyle=":")
        axis.set_ylim(0, 17.5)
        axis.tick_params(labelleft=column == 0)
        axis.set_title(kind, fontsize=10)
        _epochs(axis)
    axes[0].set_ylabel("bits an element")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure, 10


def layer_mixes(tensors: Mapping[str, Mapping[str, Any]]) -> Plot:
    """What the elements of each tensor became after the last epoch (`layers` of a format)."""
    kinds = [kind for kind in _KINDS if any(entry["kind"] == kind for entry in tensors.values())]
    rows = {kind: [name for name, entry in tensors.items() if entry["kind"] == kind] for kind in kinds}
    most = max(len(names) for names in rows.values())
    figure, axes = new_figure(1.0 + 0.17 * most, columns=len(kinds), width=14.0)
    for axis, kind in zip(axes, kinds, strict=True):
        left = np.zeros(len(rows[kind]))
        for index, (label, colour) in enumerate(PRECISIONS.values()):
            values = np.array([100 * tensors[name]["shares"][index] for name in rows[kind]])
            axis.barh(range(len(values)), values, left=left, height=0.8, color=colour, label=label)
            left = left + values
        axis.set_yticks(range(len(left)), [_short(name) for name in rows[kind]], fontsize=7)
        axis.set_ylim(most - 0.4, -0.6)
        axis.set_xlim(0, 100)
        axis.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        axis.set_title(kind, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure, 10


def _short(name: str) -> str:
    for prefix in ("d.", "g.", "w.", "momentum."):
        name = name.removeprefix(prefix)
    return name.replace("layer", "l")


def _magnitudes(patterns: Sequence[int]) -> NDArray[np.float64]:
    """log2 of positive FP16 patterns."""
    values = np.array(patterns, np.uint16).view(np.float16).astype(np.float64)
    return np.log2(np.where(values > 0, values, np.nan))


def traces(tensors: Mapping[str, Mapping[str, Any]]) -> Plot:
    """Scale, hi and lo of every tensor by epoch (`traces` of a format), and their median."""
    kinds = [kind for kind in _KINDS if any(entry["kind"] == kind for entry in tensors.values())]
    fields = {"scale": "scale (exponent)", "hi": "log2 hi", "lo": "log2 lo"}
    figure, axes = new_figure(6.4, columns=len(kinds), rows=len(fields))
    for row, (field, label) in enumerate(fields.items()):
        for column, kind in enumerate(kinds):
            axis = axes[row * len(kinds) + column]
            lines = np.array(
                [
                    entry[field] if field == "scale" else _magnitudes(entry[field])
                    for entry in tensors.values()
                    if entry["kind"] == kind
                ],
                float,
            )
            epochs = np.arange(1, lines.shape[1] + 1)
            axis.plot(epochs, lines.T, color=_COLOURS["dynamic"], alpha=0.3, linewidth=0.7)
            axis.plot(epochs, np.median(lines, axis=0), color="#1b1f24", linewidth=1.6)
            axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            _epochs(axis, last=row == len(fields) - 1)
            if row == 0:
                axis.set_title(kind, fontsize=10)
        axes[row * len(kinds)].set_ylabel(label)
    return figure, 10


def _cases(gradients: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [case for epoch in gradients["epochs"] for case in epoch["cases"]]


def gradient_sweep(gradients: Mapping[str, Any]) -> Plot:
    """Distance of the weight gradients from FP32 by share of FP16, for one kind of tensor at a time and for all."""
    swept = list(dict.fromkeys(case["kind"] for case in _cases(gradients) if case["share"] is not None))
    figure, axes = new_figure(5.6, columns=3, rows=math.ceil(len(swept) / 3))
    noise = [np.mean(epoch["noise"]) for epoch in gradients["epochs"] if epoch["noise"] is not None]
    found = sorted({case["share"] for case in _cases(gradients)} - {None})
    # FP16 alone may be orders of magnitude closer than everything else: that is off the scale.
    floor = min(1e-5, *(float(distances(gradients, kind, found[-2]).mean()) / 2 for kind in swept))
    for axis, kind in zip(axes, swept, strict=False):
        flushes = sorted({case["flush"] for case in _cases(gradients) if case["kind"] == kind})
        for flush, style in zip(flushes, ("-", "--"), strict=False):
            values = np.array([distances(gradients, kind, share, flush) for share in found])  # [share, epoch, seed]
            for number, epoch in enumerate(gradients["epochs"]):
                colour = ("#56b4e9", "#0072b2", "#1b1f24", "#8c8c8c")[number % 4]
                label = f"epoch {epoch['epoch']}" + (f", {flush:.0%} of errors flushed" if flush else "")
                mean = np.maximum(values[:, number].mean(1), floor)
                axis.plot(range(len(found)), mean, style, color=colour, marker="o", markersize=3, label=label)
        if noise:
            axis.axhline(float(np.mean(noise)), color="#c9252d", linewidth=0.9, linestyle=":", label="another batch")
        axis.set_yscale("log")
        axis.set_ylim(floor / 1.5, 2)
        axis.set_xticks(range(len(found)), [f"{share:.0%}" for share in found], fontsize=8)
        axis.set_title(kind, fontsize=10)
        axis.grid(color=GRID)
    for axis in axes[len(swept) :]:
        axis.set_axis_off()
    axes[0].set_ylabel("1 - cosine to FP32")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.supxlabel("non-zeros that stay FP16", fontsize=10)
    return figure, 10


def gradient_layers(gradients: Mapping[str, Any]) -> Plot:
    """Relative error of each layer's weight gradient by format, mean over the epochs."""
    layers = gradients["layers"]
    figure, (axis,) = new_figure(4.0)
    for name, title in LABELS.items():
        rows = [case["error"] for case in _cases(gradients) if case["kind"] == name]
        if rows:
            values = np.mean(rows, axis=0)
            axis.plot(range(len(layers)), values, color=_COLOURS[name], marker="o", markersize=4, label=title)
    axis.set_xticks(range(len(layers)), [_short(name) for name in layers], rotation=60, ha="right", fontsize=8)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylabel("relative error")
    axis.grid(color=GRID)
    legend(axis, 4)
    return figure, 10
