"""The report of the study: one HTML page with its plots inside, and the same plots as pictures."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lnpu.page import card, image, in_a_row, new_figure, number, page, picture, section, table, text
from lnpu.study import plots
from lnpu.study.compact import compact_gradients, compact_training, read_compact
from lnpu.study.findings import LABELS, Accuracy, accuracies, accuracy_findings, ema_saving, gradient_findings

__all__ = ["read_study", "render_report", "study_of", "write_pictures", "write_report"]

_SETTINGS = {
    "width": "channels of the first stage",
    "image": "height and width of the images",
    "epochs": "epochs",
    "batch": "images a step",
    "rate": "greatest learning rate",
    "momentum": "momentum",
    "decay": "weight decay",
    "data": "digest of the images",
}


def read_study(directory: Path) -> dict[str, Any]:
    """Compact data of a results directory, or those that are in it already.

    Of results that a present run would not reuse, since formats have changed meanwhile, none is taken.

    Returns
    -------
    dict
        As of `study_of`.

    Raises
    ------
    ValueError
        If there is nothing, or it is of different studies.
    """
    found = read_compact(directory)
    if found is not None:
        return found
    from lnpu.study.gradient_error import GradientRun
    from lnpu.study.runs import Run

    results = []
    for path in sorted(directory.glob("*.json")):
        result = json.loads(path.read_text())
        fields = result["run"]
        run: Run | GradientRun
        if "training" in fields:
            run = GradientRun(**fields | {"training": Run(**fields["training"]), "epochs": tuple(fields["epochs"])})
        else:
            run = Run(**fields)
        if run.name == path.stem:
            results.append(result)
    if not results:
        raise ValueError(f"no results in {directory}")
    return study_of(results)


def study_of(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Compact data of results of `lnpu.study.runs.train` and `lnpu.study.gradient_error.measure`.

    Returns
    -------
    dict
        `training` and `gradients`, see `lnpu.study.compact`; None for what is missing.

    Raises
    ------
    ValueError
        If results are of different studies.
    """
    trainings: list[Mapping[str, Any]] = []
    gradients: list[Mapping[str, Any]] = []
    for result in results:
        (gradients if "training" in result["run"] else trainings).append(result)
    return {
        "training": compact_training(trainings) if trainings else None,
        "gradients": compact_gradients(gradients) if gradients else None,
    }


def write_report(directory: Path, study: Mapping[str, Any], plain_bits: Mapping[str, float] | None = None) -> Path:
    """Write `index.html`.

    Parameters
    ----------
    directory : path
        Where to; it is made if it is missing.
    study : mapping
        Of `read_study`.
    plain_bits : mapping of str to float or None
        As of `ema_saving`: bits that a training step of the full network moves in plain FP16, by kind.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ValueError
        As of `ema_saving`.
    """
    content = render_report(study, plain_bits)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "index.html"
    path.write_text(content)
    return path


def write_pictures(directory: Path, study: Mapping[str, Any]) -> list[Path]:
    """Write the main plots as PNG."""
    training, gradients = study.get("training"), study.get("gradients")
    figures = {}
    if training is not None:
        figures["accuracy"] = plots.curves(training)
        if training["kinds"]:
            figures["bits"] = plots.bits(training)
        if any(name in training["kinds"] for name in ("fgmp", "dynamic")):
            figures["shares"] = plots.shares(training)
    if gradients is not None:
        figures["gradients"] = plots.gradient_sweep(gradients)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (figure, _) in figures.items():
        paths.append(directory / f"{name}.png")
        picture(paths[-1], figure)
    return paths


def render_report(study: Mapping[str, Any], plain_bits: Mapping[str, float] | None = None) -> str:
    """The page of a study (see `write_report`)."""
    training, gradients = study.get("training"), study.get("gradients")
    parts: list[str] = []
    if training is not None:
        parts += _training_parts(training, plain_bits)
    if gradients is not None:
        parts += _gradient_parts(gradients)
    return page("Training with FGMP: accuracy, size and gradients", parts)


def _training_parts(training: Mapping[str, Any], plain_bits: Mapping[str, float] | None) -> list[str]:
    found = accuracies(training)
    kinds = training["kinds"]
    saving = {name: ema_saving(_bits(by_kind), plain_bits) for name, by_kind in kinds.items()} if plain_bits else {}
    parts = [
        _cards(found, kinds, saving),
        section(
            "In short", "Means over seeds, and over epochs for the size in memory.", _list(accuracy_findings(training))
        ),
        section(
            "Accuracy",
            "Test accuracy and training loss by epoch: lines are means over the seeds, bands reach from the least to "
            "the greatest.",
            image("Accuracy and loss by epoch", *plots.curves(training)),
        ),
        section(
            "Final accuracy",
            "After the last epoch. The spread is the standard deviation over the seeds, that of a difference "
            "sqrt(a^2 + b^2) of the spreads of both. With so few seeds the verdict is an indication, not a test.",
            _accuracy_table(found),
        ),
    ]
    if any(name in kinds for name in ("fgmp", "dynamic")):
        parts.append(
            section(
                "FP16, FP8 and zeros",
                "What the elements of each kind of tensor were stored as, in the last 8 steps of every epoch, over all "
                "seeds.",
                image("Shares by kind and epoch", *plots.shares(training)),
            )
        )
    if kinds:
        parts.append(
            section(
                "Size in memory",
                "Encoded bits an element: header, masks, payload and the byte in the length table; without encoding it "
                "would be 16 (dotted). The table has the mean over all epochs, and the change against 16 bits.",
                image("Bits an element by kind and epoch", *plots.bits(training)),
                _bits_table(kinds),
            )
        )
    if saving:
        parts.append(_ema_section(saving))
    for name in ("fgmp", "dynamic"):
        if name in training["layers"]:
            parts.append(
                section(
                    f"Layer by layer: {LABELS[name]}",
                    "What the elements of each tensor were stored as in the last epoch.",
                    image(f"Shares by tensor, {LABELS[name]}", *plots.layer_mixes(training["layers"][name])),
                )
            )
    if "dynamic" in training["traces"]:
        parts.append(
            section(
                "The controller",
                "Scale and limits that it has chosen at the end of every epoch, first seed: a thin line for every "
                "tensor, in black their median. An element is FP16 beyond hi and, of errors, zero below lo, both times "
                "2 to the scale.",
                image("Scale, hi and lo by epoch", *plots.traces(training["traces"]["dynamic"])),
            )
        )
    parts.append(section("Runs", "Every run, after the last epoch.", _runs_table(training)))
    rows = [(label, number(training["settings"][name])) for name, label in _SETTINGS.items()]
    parts.append(section("Settings", "The same for all runs.", table(("setting", "value"), rows)))
    return parts


def _list(sentences: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{text(sentence)}</li>' for sentence in sentences)}</ul>"


def _bits(by_kind: Mapping[str, Mapping[str, Any]]) -> dict[str, Sequence[float]]:
    return {kind: entry["bits"] for kind, entry in by_kind.items()}


def _points(value: float, digits: int = 2) -> str:
    return "-" if np.isnan(value) else f"{value:+.{digits}f}"


def _cards(found: Sequence[Accuracy], kinds: Mapping[str, Any], saving: Mapping[str, Sequence[float]]) -> str:
    cards = []
    for one in found:
        if one.format in ("fp8", "fgmp", "dynamic") and not np.isnan(one.difference):
            verdict = f": {one.verdict}" if one.verdict else ""
            cards.append(card(f"{one.difference:+.2f} points", f"{LABELS[one.format]} against FP16{verdict}"))
    for kind in ("activation", "error", "weight"):
        if kind in kinds.get("dynamic", {}):
            mean = np.mean(kinds["dynamic"][kind]["bits"])
            cards.append(card(f"{mean:.2f} bits", f"{kind} element, {LABELS['dynamic']}"))
    if "dynamic" in saving:
        label = "external memory access saved, full network (estimate)"
        cards.append(card(f"{100 * float(np.mean(saving['dynamic'])):.1f}%", label))
    return in_a_row(cards) if cards else ""


def _accuracy_table(found: Sequence[Accuracy]) -> str:
    rows = []
    for one in found:
        spread = "-" if np.isnan(one.spread) else f"{one.spread:.2f}"
        difference, uncertainty = ("", "") if one.format == "fp16" else map(_points, (one.difference, one.uncertainty))
        rows.append(
            (
                LABELS[one.format],
                str(one.runs),
                f"{one.mean:.2f}%",
                spread,
                difference,
                uncertainty.removeprefix("+"),
                one.verdict,
            )
        )
    headings = ("format", "runs", "mean", "spread", "against FP16 (points)", "its spread", "verdict")
    return table(headings, rows)


def _bits_table(kinds: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(kind for by_kind in kinds.values() for kind in by_kind))
    rows = []
    for name, by_kind in kinds.items():
        cells = [LABELS[name]]
        for kind in names:
            mean = float(np.mean(by_kind[kind]["bits"])) if kind in by_kind else 16.0
            cells.append(f"{mean:.2f} ({100 * (mean / 16 - 1):+.0f}%)")
        rows.append(cells)
    return table(("format", *names), rows)


def _ema_section(saving: Mapping[str, Sequence[float]]) -> str:
    figure, (axis,) = new_figure(3.0)
    for name, values in saving.items():
        axis.plot(range(1, len(values) + 1), [100 * value for value in values], label=LABELS[name])
    axis.set_xlabel("epoch")
    axis.set_ylabel("saved (%)")
    axis.legend(frameon=False, fontsize=9, ncols=4)
    rows = [
        (LABELS[name], *(f"{100 * value:.1f}%" for value in (values[0], values[-1], float(np.mean(values)))))
        for name, values in saving.items()
    ]
    return section(
        "External memory access of the full network",
        "An estimate: what every kind of tensor takes of the full network's traffic in plain FP16, times the bits an "
        "element that this study measured. Words of the bus that are not used whole are not in it.",
        image("External memory access saved by epoch", figure, 10),
        table(("format", "first epoch", "last epoch", "all epochs"), rows),
    )


def _runs_table(training: Mapping[str, Any]) -> str:
    rows = []
    for run in training["runs"]:
        losses = [run[name][-1] for name in ("train_loss", "test_loss")]
        rows.append(
            (
                LABELS[run["format"]],
                str(run["seed"]),
                f"{100 * run['test_accuracy'][-1]:.2f}%",
                *("-" if loss is None else f"{loss:.4f}" for loss in losses),
                f"2^{run['loss_scale'][-1]}",
                str(run["skipped"][-1]),
                f"{run['seconds']:,}",
            )
        )
    headings = ("format", "seed", "test accuracy", "training loss", "test loss", "loss scale", "skipped", "seconds")
    return table(headings, rows)


def _gradient_parts(gradients: Mapping[str, Any]) -> list[str]:
    epochs = ", ".join(str(record["epoch"]) for record in gradients["epochs"])
    return [
        section(
            "What FP16 elements buy in a weight gradient",
            "Weight gradients against FP32 at the same parameters and images, along a training in FP32 (after epochs "
            f"{epochs}; {gradients['seeds']} seeds, {gradients['settings']['batches']} batches each): 1 - cosine, mean "
            "over the layers. Each tensor has the best power-of-two scale, the largest of its non-zeros stay FP16, all "
            "others become FP8; the other kinds of tensors are FP32.",
            image("1 - cosine by share of FP16", *plots.gradient_sweep(gradients)),
            _list(gradient_findings(gradients)),
        ),
        section(
            "Weight gradients by layer",
            "Relative error (norm of the difference) of the formats of the study, mean over the same epochs and seeds.",
            image("Relative error by layer and format", *plots.gradient_layers(gradients)),
        ),
    ]
