"""What the figures of a study say, in plain words: every sentence is computed from the compact data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LABELS",
    "Accuracy",
    "accuracies",
    "accuracy_findings",
    "distances",
    "ema_saving",
    "gradient_findings",
    "removed",
]

LABELS = {
    "fp32": "FP32",
    "fp16": "FP16",
    "fp8": "FP8 only",
    "fgmp": "FGMP, fixed limits",
    "dynamic": "FGMP, dynamic",
}
"""Formats of the study for people."""

_KINDS = {
    "activation": "activations",
    "preactivation": "preactivations",
    "weight": "weights",
    "error": "errors",
    "gradient": "weight gradients",
    "momentum": "momenta",
    "all": "all kinds",
}


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy of a format after the last epoch, in percent.

    Attributes
    ----------
    format : str
    runs : int
    mean, spread : float
        Over seeds; the spread is the standard deviation (n - 1), NaN of one run.
    difference, uncertainty : float
        Against FP16 in points, and what the spreads of both make of it: sqrt(a^2 + b^2). NaN without FP16.
    """

    format: str
    runs: int
    mean: float
    spread: float
    difference: float
    uncertainty: float

    @property
    def verdict(self) -> str:
        """Whether the difference to FP16 exceeds the spread, in words."""
        if self.format == "fp16" or np.isnan(self.difference):
            return ""
        if np.isnan(self.uncertainty):
            return "a single run: the spread is unknown"
        if abs(self.difference) <= self.uncertainty:
            return "within the spread"
        return "better, beyond the spread" if self.difference > 0 else "worse, beyond the spread"


def accuracies(training: Mapping[str, Any]) -> list[Accuracy]:
    """Of all formats, in the order of the study."""
    last: dict[str, list[float]] = {}
    for run in training["runs"]:
        last.setdefault(run["format"], []).append(100 * run["test_accuracy"][-1])
    moments = {
        name: (float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"))
        for name, values in last.items()
    }
    mean16, spread16 = moments.get("fp16", (float("nan"), float("nan")))
    return [
        Accuracy(name, len(last[name]), mean, spread, mean - mean16, float(np.hypot(spread, spread16)))
        for name, (mean, spread) in moments.items()
    ]


def accuracy_findings(training: Mapping[str, Any]) -> Iterator[str]:
    """What each format costs in accuracy and takes in memory."""
    found = accuracies(training)
    known = [one for one in found if one.verdict and not np.isnan(one.uncertainty)]
    if known and all(abs(one.difference) <= one.uncertainty for one in known):
        least = max(one.uncertainty for one in known)
        yield (
            f"No format differs from FP16 beyond the spread over seeds: this study cannot tell them apart. Differences "
            f"of less than about {least:.1f} points would not show in it."
        )
    for one in found:
        if not one.verdict:
            continue
        text = f"{LABELS[one.format]}: {one.mean:.2f}% test accuracy, {one.difference:+.2f} points against FP16"
        if not np.isnan(one.uncertainty):
            text += f", with a spread of {one.uncertainty:.2f} over seeds"
        text += f": {one.verdict}"
        if by_kind := training["kinds"].get(one.format):
            text += "; bits an element: "
            text += ", ".join(f"{_KINDS[kind]} {np.mean(entry['bits']):.2f}" for kind, entry in by_kind.items())
        yield text + "."


def ema_saving(bits: Mapping[str, Sequence[float]], plain: Mapping[str, float]) -> list[float]:
    """External memory access that a network would save, by epoch.

    Parameters
    ----------
    bits : mapping of str to sequence of float
        Encoded bits an element of each kind of tensor, by epoch.
    plain : mapping of str to float
        Bits that a training step of the network moves in plain FP16, by kind; kinds that are not in `bits` (FP32
        copies, programs) save nothing.

    Returns
    -------
    list of float
        1 - encoded / plain. Memory words that are not used whole are not in it.

    Raises
    ------
    ValueError
        If nothing is moved, or no kind is known.
    """
    known = [kind for kind in bits if plain.get(kind)]
    total = sum(plain.values())
    if not known or total <= 0:
        raise ValueError(
            f"plain bits must be of {', '.join(bits)} among others, not of {', '.join(plain) or 'nothing'}"
        )
    saved = np.sum([plain[kind] * (1 - np.asarray(bits[kind]) / 16) for kind in known], axis=0) / total
    return [float(one) for one in saved]


def distances(gradients: Mapping[str, Any], kind: str, share: float | None, flush: float = 0.0) -> NDArray[np.float64]:
    """1 - cosine [epochs, seeds] of a case, mean over the layers."""
    return np.array(
        [
            case["by_seed"]
            for epoch in gradients["epochs"]
            for case in epoch["cases"]
            if case["kind"] == kind and case["share"] == share and case["flush"] == flush
        ]
    )


def removed(gradients: Mapping[str, Any], kind: str, share: float, flush: float = 0.0) -> tuple[float, float]:
    """Part of FP8's distance that so many FP16 elements remove: mean over epochs and seeds, and its standard error."""
    before, after = (distances(gradients, kind, one, flush).ravel() for one in (0.0, share))
    parts = 1 - after / np.maximum(before, 1e-12)
    error = float(np.std(parts, ddof=1) / np.sqrt(len(parts))) if len(parts) > 1 else float("nan")
    return float(parts.mean()), error


def _shares(gradients: Mapping[str, Any]) -> list[float]:
    shares = {case["share"] for epoch in gradients["epochs"] for case in epoch["cases"]} - {None}
    return sorted(shares)


def _flushes(gradients: Mapping[str, Any]) -> list[float]:
    return sorted({case["flush"] for epoch in gradients["epochs"] for case in epoch["cases"]} - {0.0})


def gradient_findings(gradients: Mapping[str, Any]) -> Iterator[str]:
    """Where FP8 alone loses, what FP16 elements buy there and at which share, and where nothing."""
    swept = list(dict.fromkeys(c["kind"] for c in gradients["epochs"][0]["cases"] if c["share"] is not None))
    kinds = [kind for kind in swept if kind != "all"]
    noise = [np.mean(epoch["noise"]) for epoch in gradients["epochs"] if epoch["noise"] is not None]
    fp8 = {kind: float(distances(gradients, kind, 0.0).mean()) for kind in swept}
    fp16 = {kind: float(distances(gradients, kind, 1.0).mean()) for kind in swept}
    ranked = sorted(kinds, key=lambda kind: -fp8[kind])
    listed = ", ".join(f"{_KINDS[kind]} {fp8[kind]:.2g}" for kind in ranked)
    text = f"Where FP8 alone loses: 1 - cosine of the weight gradients when one kind of tensor is all FP8: {listed}"
    if "all" in swept:
        text += f"; with all kinds in FP8 {fp8['all']:.2g}, in FP16 {fp16['all']:.2g}"
    yield text + "."
    if noise and "all" in swept:
        yield (
            f"For comparison, the gradients of two batches at the same parameters differ by {np.mean(noise):.2g}: FP8 "
            f"alone adds a deviation of {100 * fp8['all'] / np.mean(noise):.1f}% of that."
        )
    if formats := [name for name in LABELS if distances(gradients, name, None).size]:
        listed = ", ".join(f"{LABELS[name]} {distances(gradients, name, None).mean():.2g}" for name in formats)
        yield f"The formats of the study, as they are: {listed}."
    for kind in (*ranked, *(("all",) if "all" in swept else ())):
        yield _bought(gradients, kind, fp8, fp16)
    for flush in _flushes(gradients):
        with8, with16 = (float(distances(gradients, "error", share, flush).mean()) for share in (0.0, 1.0))
        yield (
            f"Flushing {flush:.0%} of the errors to zero takes their distance from {fp8['error']:.2g} to {with8:.2g} "
            f"in FP8 and from {fp16['error']:.2g} to {with16:.2g} in FP16: "
            + (
                "what is lost by flushing, FP16 elements do not bring back."
                if with16 > 0.5 * with8
                else "FP16 elements bring most of it back."
            )
        )


def _bought(gradients: Mapping[str, Any], kind: str, fp8: Mapping[str, float], fp16: Mapping[str, float]) -> str:
    """A sentence on one kind."""
    parts = {share: removed(gradients, kind, share) for share in _shares(gradients) if 0 < share < 1}
    sure = [share for share, (part, error) in parts.items() if part > 2 * error and part >= 0.05]
    half = next((share for share, (part, _) in parts.items() if part >= 0.5), None)
    name = _KINDS[kind]
    if kind != "all" and fp8[kind] < 0.05 * max(fp8.values()):
        return (
            f"{name.capitalize()}: FP8 alone costs hardly anything ({fp8[kind]:.2g}), so FP16 elements have nothing to "
            "win here."
        )
    figures = ", ".join(f"{share:.0%} remove {100 * part:.0f}%" for share, (part, _) in parts.items())
    text = f"{name.capitalize()}: of the distance of FP8 alone, so many of the largest non-zeros in FP16: {figures}. "
    text += f"Half of it takes {half:.0%} in FP16" if half is not None else "No share below 100% removes half of it"
    if nothing := [share for share in parts if share not in sure]:
        listed = ", ".join(f"{share:.0%}" for share in nothing)
        text += f"; at {listed} the gain is below 5% or within twice its standard error"
    return text + "."
