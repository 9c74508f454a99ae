"""What a report of the study needs of its results, small enough to be published: two JSON files."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lnpu.study.names import COUNTS, STUDY_NAMES

__all__ = ["compact_gradients", "compact_training", "read_compact", "write_compact"]

TRAINING, GRADIENTS = "training.json", "gradients.json"

_CURVES = {"train_loss": 4, "test_loss": 4, "test_accuracy": 4, "loss_scale": 0, "skipped": 0}
"""Digits of a curve's values."""

_NUMBERS = len(COUNTS)


def _round(value: float | None, digits: int) -> float | int | None:
    if value is None:
        return None
    return round(value, digits) if digits else round(value)


def _shares(counts: Sequence[int]) -> list[float]:
    """Shares of zeros, underflows, FP8 and FP16 in the elements."""
    parts = counts[:4]
    return [round(part / max(sum(parts), 1), 4) for part in parts]


def _bits(counts: Sequence[int]) -> float:
    """Encoded bits of an element: header, masks, payload and the byte in the length table; not the padding of runs."""
    named = dict(zip(COUNTS, counts, strict=True))
    elements = sum(counts[:4])
    size = 2 * named["blocks"] + 8 * named["masked"] + named["precision"] + named["payload"]
    return round(8 * size / max(elements, 1), 3)


def _total(rows: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*(row[:_NUMBERS] for row in rows), strict=True)]


def compact_training(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of finished runs.

    Parameters
    ----------
    results : sequence of mapping
        Of `lnpu.study.runs.train`, all with the same settings but for format and seed.

    Returns
    -------
    dict
        `settings`; `runs`, for each its format, seed and curves by epoch; by format: `kinds`, for each kind of tensor
        `shares` (zero, underflow, FP8, FP16) and `bits` an element by epoch, over all seeds; `layers`, for each
        tensor its kind, and shares and bits after the last epoch; `traces`, for each tensor its kind, and scale, lo
        and hi by epoch of the first seed.

    Raises
    ------
    ValueError
        If there are no results, settings differ, or a run is there twice.
    """
    if not results:
        raise ValueError("there are no results")
    settings = [
        {name: value for name, value in result["run"].items() if name not in ("format", "seed")} for result in results
    ]
    if any(one != settings[0] for one in settings):
        differ = [name for name in settings[0] if len({json.dumps(one.get(name)) for one in settings}) > 1]
        raise ValueError(f"results differ in {', '.join(differ)}: a report is of one study")
    order = {name: index for index, name in enumerate(STUDY_NAMES)}
    results = sorted(results, key=lambda result: (order[result["run"]["format"]], result["run"]["seed"]))
    names = [(result["run"]["format"], result["run"]["seed"]) for result in results]
    if len(set(names)) < len(names):
        raise ValueError("a run is there twice")
    study: dict[str, Any] = {"settings": settings[0], "runs": [], "kinds": {}, "layers": {}, "traces": {}}
    for result in results:
        curves = {name: [_round(epoch[name], digits) for epoch in result["epochs"]] for name, digits in _CURVES.items()}
        seconds = round(sum(epoch["seconds"] for epoch in result["epochs"]))
        study["runs"].append(
            {"format": result["run"]["format"], "seed": result["run"]["seed"], "seconds": seconds} | curves
        )
    for name in dict.fromkeys(format_ for format_, _ in names):
        epochs = [
            [record["tensors"] for record in result["epochs"]] for result in results if result["run"]["format"] == name
        ]
        if name != "fp32":
            study["kinds"][name] = _by_kind(epochs)
            study["layers"][name] = _by_tensor([run[-1] for run in epochs])
        if traces := _traces(epochs[0]):
            study["traces"][name] = traces
    return study


def _by_kind(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for epoch in zip(*runs, strict=True):
        for kind in dict.fromkeys(entry["kind"] for entry in epoch[0].values()):
            counts = _total(entry["counts"] for run in epoch for entry in run.values() if entry["kind"] == kind)
            found = kinds.setdefault(kind, {"shares": [], "bits": []})
            found["shares"].append(_shares(counts))
            found["bits"].append(_bits(counts))
    return kinds


def _by_tensor(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tensors = {}
    for name, entry in runs[0].items():
        counts = _total(run[name]["counts"] for run in runs)
        tensors[name] = {"kind": entry["kind"], "shares": _shares(counts), "bits": _bits(counts)}
    return tensors


def _traces(epochs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    traces = {}
    for name, entry in epochs[0].items():
        if all("state" in epoch[name] for epoch in epochs):
            states = zip(*(epoch[name]["state"] for epoch in epochs), strict=True)
            traces[name] = {"kind": entry["kind"]} | {
                field: list(values) for field, values in zip(("scale", "lo", "hi"), states, strict=True)
            }
    return traces


def compact_gradients(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of gradient errors.

    Parameters
    ----------
    results : sequence of mapping
        Of `lnpu.study.gradient_error.measure`, with the same settings but for the seed.

    Returns
    -------
    dict
        As of `measure`, by layer the mean over the seeds; besides, for each case `by_seed`, the mean of `distance`
        over the layers for each seed.

    Raises
    ------
    ValueError
        If there are no results, or settings differ.
    """
    if not results:
        raise ValueError("there are no results")
    settings = []
    for result in results:
        training = {name: value for name, value in result["run"]["training"].items() if name != "seed"}
        settings.append({**result["run"], "training": training})
    if any(one != settings[0] for one in settings):
        raise ValueError("gradients are of different settings: a report is of one study")
    records = []
    for epoch in zip(*(result["epochs"] for result in results), strict=True):
        noise = [record["noise"] for record in epoch if record["noise"] is not None]
        cases = []
        for same in zip(*(record["cases"] for record in epoch), strict=True):
            case = {name: same[0][name] for name in ("kind", "share", "flush")}
            case |= {name: _means([one[name] for one in same]) for name in ("distance", "error")}
            cases.append(case | {"by_seed": _digits([float(np.mean(one["distance"])) for one in same])})
        records.append({"epoch": epoch[0]["epoch"], "noise": _means(noise) if noise else None, "cases": cases})
    return {"settings": settings[0], "seeds": len(results), "layers": results[0]["layers"], "epochs": records}


def _digits(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.3g}") for value in values]


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return _digits(np.mean(rows, axis=0))


def read_compact(directory: Path) -> dict[str, Any] | None:
    """`training` and `gradients` (None if they are missing) that `write_compact` has left; None if there is neither."""
    found = {}
    for name, file in (("training", TRAINING), ("gradients", GRADIENTS)):
        path = directory / file
        found[name] = json.loads(path.read_text()) if path.exists() else None
    return found if any(found.values()) else None


def write_compact(directory: Path, study: Mapping[str, Any]) -> None:
    """Write the two files from which a report can be drawn again; the folder is made if it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, file in (("training", TRAINING), ("gradients", GRADIENTS)):
        if study.get(name) is not None:
            # A line for each entry: differences between versions can be read.
            parts = [f"{json.dumps(key)}:{_lines(value)}" for key, value in study[name].items()]
            (directory / file).write_text("{" + ",\n".join(parts) + "}\n")


def _lines(value: Any) -> str:
    dumps = lambda one: json.dumps(one, separators=(",", ":"), allow_nan=False)  # noqa: E731
    if isinstance(value, dict) and any(isinstance(one, dict) for one in value.values()):
        return "{\n" + ",\n".join(f"{json.dumps(key)}:{_lines(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return "[\n" + ",\n".join(_lines(one) for one in value) + "]"
    return dumps(value)
