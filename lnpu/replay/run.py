"""`lnpu replay`: every operation of a training step of ResNet-18 on the simulated chip, side by side."""

import hashlib
import math
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lnpu.cluster import run_jobs
from lnpu.config import ChipConfig
from lnpu.replay.plan import GoldenStep, load, plan
from lnpu.replay.simulate import Segment, simulate
from lnpu.report import PHASES
from lnpu.results import read_result
from lnpu.sim.build import build
from lnpu.train_step import Settings

__all__ = ["choose", "is_wrong", "line", "replay", "table"]

_SUMMED = ("cycles", "mac16", "mac8", "skipped_zero", "skipped_padding", "core_busy", "load_busy")


def choose(segments: Sequence[Segment], only: str | None = None, *, distinct: bool = False) -> list[Segment]:
    """Segments to run, in order.

    Parameters
    ----------
    only : str or None
        Regular expression that is searched for in "PROGRAM LAYER PHASE".
    distinct : bool
        Only operations of convolutions and linear layers, and of those with the same shape one in each phase.

    Raises
    ------
    ValueError
        If `only` is no regular expression, or none is left.
    """
    chosen = list(segments)
    if distinct:
        first: dict[tuple[Any, ...], Segment] = {}
        for segment in segments:
            if segment.shape is not None:
                first.setdefault((segment.phase, segment.shape), segment)
        chosen = list(first.values())
    if only is not None:
        try:
            pattern = re.compile(only)
        except re.error as error:
            raise ValueError(f"--only must be a regular expression: {only!r}: {error}") from None
        chosen = [segment for segment in chosen if pattern.search(segment.title)]
        if not chosen:
            raise ValueError(f"no segment matches {only!r}")
    return chosen


def is_wrong(result: Mapping[str, Any]) -> bool:
    """Whether a segment did anything else than the golden model."""
    return bool(result["errors"] or result["mismatches"] or result["unpredicted"] or result["stray"])


def line(result: Mapping[str, Any]) -> str:
    """A segment's result in a line."""
    text = f"{result['program']} {result['layer']} {result['phase']}: {result['counters'].get('cycles', 0):,} cycles, "
    text += f"{sum(result['mismatches'].values()):,} mismatches in {result['elements']:,} elements"
    if result["mismatches"]:
        text += f" ({', '.join(result['mismatches'])})"
    if result["unpredicted"]:
        text += f", traffic not as predicted: {', '.join(f'{a} {b:+,}' for a, b in result['unpredicted'].items())}"
    if result["stray"]:
        text += f", {result['stray']:,} bytes changed elsewhere"
    return "; ".join([text, *result["errors"]]) + f" ({result['seconds']:.0f} s)"


def replay(
    settings: Settings,
    config: ChipConfig,
    directory: Path,
    *,
    scheduler: str | None = None,
    workers: int = 2,
    only: str | None = None,
    distinct: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run the segments of the last of the settings' steps that have no result in the directory yet.

    Parameters
    ----------
    settings : Settings
    config : ChipConfig
        Overrides the settings' named one.
    directory : path
        A JSON file for each finished segment; while segments run also the images of memory, which workers read.
    scheduler, workers
        See `lnpu.cluster.run_jobs`.
    only, distinct
        See `choose`.
    tell : callable
        Called with a line of text when something has happened.

    Returns
    -------
    dict
        `settings`, `chip`, `loss` and `overflow` of the golden step; `key`, of all segments; `segments`, the results;
        `failed`, exceptions by segment; `rows`, `phases` and `total`, sums by layer and phase, by phase and over all;
        `wrong`, how many segments differ or have failed; `seconds` of this call.

    Raises
    ------
    ValueError
        If settings make no sense together, or no segment is left.
    OSError
        If there is no such data, or the scheduler cannot be reached.
    """
    started = time.perf_counter()
    directory = directory.resolve()
    images = load(settings)
    golden_step = GoldenStep.compute(settings, config, images)
    tell(f"golden model: step {settings.steps} of {settings.batch} images, loss {golden_step.loss:.6f}")
    if golden_step.overflow:
        tell("errors or gradients overflow in this step: a smaller loss scale would be of more interest")
    segments = choose(plan(golden_step), only, distinct=distinct)
    key = hashlib.sha256("".join(segment.name for segment in segments).encode()).hexdigest()[:12]
    todo = [segment for segment in segments if read_result(directory, segment) is None]
    done = len(segments) - len(todo)
    tell(f"{len(segments)} segments, {done} of them finished before")
    failed: dict[str, str] = {}
    if todo:
        build(config)
        folder = directory / f"memory-{key}"
        try:
            golden_step.write(folder)

            def progress(segment: Segment, result: dict[str, Any]) -> None:
                nonlocal done
                done += 1
                tell(f"[{done}/{len(segments)}] {line(result)}")

            failed = run_jobs(
                sorted(todo, key=lambda segment: -segment.cost),
                simulate,
                (config, str(folder)),
                directory,
                prefix="replay",
                scheduler=scheduler,
                workers=workers,
                progress=progress,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    titles = {segment.name: segment.title for segment in segments}
    failed = {titles[name]: error.replace(str(directory), directory.name) for name, error in failed.items()}
    for title, error in failed.items():
        tell(f"{title} has failed: {error}")
    results = [result for segment in segments if (result := read_result(directory, segment)) is not None]
    report = _report(results, config)
    return {
        "settings": {name: value for name, value in asdict(settings).items() if name not in ("data", "memory")},
        "chip": asdict(config),
        "key": key,
        "overflow": golden_step.overflow,
        "loss": golden_step.loss if math.isfinite(golden_step.loss) else None,
        **report,
        "failed": failed,
        "wrong": len(failed) + sum(is_wrong(result) for result in results),
        "seconds": round(time.perf_counter() - started, 1),
        "segments": results,
    }


def _report(results: Sequence[Mapping[str, Any]], config: ChipConfig) -> dict[str, Any]:
    """Sums by layer and phase, by phase, and over all."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    phases: dict[str, dict[str, Any]] = {phase: defaultdict(int) for phase in PHASES}
    total: dict[str, Any] = defaultdict(int)
    for result in results:
        place = (result["layer"], result["phase"])
        for entry in (rows.setdefault(place, defaultdict(int)), phases[result["phase"]], total):
            entry["segments"] += 1
            entry["wrong"] += is_wrong(result)
            entry["elements"] += result["elements"]
            entry["mismatches"] += sum(result["mismatches"].values())
            entry["unpredicted_bits"] += sum(map(abs, result["unpredicted"].values()))
            entry["macs_dense"] += result["macs_dense"]
            entry["seconds"] += result["seconds"]
            for name in _SUMMED:
                entry[name] += result["counters"].get(name, 0)
            for name, bits in result["traffic"].items():
                direction = name.partition("_bits_")[0]
                entry[f"{direction}_bits"] += bits
    return {
        "rows": [{"layer": layer, "phase": phase} | _derived(row, config) for (layer, phase), row in rows.items()],
        "phases": {phase: _derived(entry, config) for phase, entry in phases.items() if entry},
        "total": _derived(total, config),
    }


def _derived(entry: Mapping[str, Any], config: ChipConfig) -> dict[str, Any]:
    """Add cycles that products alone would take: those that were issued, and all in FP16."""
    cycles, dense = entry.get("cycles", 0), config.ideal_cycles(entry.get("macs_dense", 0), 0)
    ideal = config.ideal_cycles(entry.get("mac16", 0), entry.get("mac8", 0))
    return {
        **entry,
        "seconds": round(entry.get("seconds", 0), 1),
        "ideal_cycles": round(ideal, 1),
        "dense_cycles": round(dense, 1),
        "utilization": ideal / cycles if cycles else 0.0,
        "of_dense": cycles / dense if dense else None,
    }


def table(report: Mapping[str, Any]) -> str:
    """Cycles by layer and phase, by phase and in all, as text."""
    heads = ("layer", "phase", "cycles", "ideal", "ideal/cycles", "dense FP16", "cycles/dense", "mismatches", "wrong")
    lines: list[tuple[str, ...]] = [heads]

    def add(layer: str, phase: str, entry: Mapping[str, Any]) -> None:
        products = bool(entry["macs_dense"])
        lines.append((
            layer,
            phase,
            f"{entry['cycles']:,}",
            f"{entry['ideal_cycles']:,.0f}" if products else "",
            f"{entry['utilization']:.1%}" if products else "",
            f"{entry['dense_cycles']:,.0f}" if products else "",
            f"{entry['of_dense']:.1%}" if products else "",
            f"{entry['mismatches']:,}",
            f"{entry['wrong']:,}" if entry["wrong"] else "",
        ))  # fmt: skip

    for row in report["rows"]:
        add(row["layer"], row["phase"], row)
    for phase, entry in report["phases"].items():
        add("all", phase, entry)
    if report["total"].get("segments"):
        add("all", "", report["total"])
    widths = [max(len(entry[column]) for entry in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(entry, widths, strict=True))
        ).rstrip()
        for entry in lines
    )
