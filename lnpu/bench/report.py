"""What the benchmark shows: a line of text for every case, and a page of HTML."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lnpu.bench.baseline import Comparison
from lnpu.bench.cases import PHASES
from lnpu.bench.operation import Result
from lnpu.bench.plots import has_layers, has_sparsities, heat_map, roofline, speed_up
from lnpu.bench.runs import LATENCY, Results
from lnpu.bench.targets import balance, lines, memory_bound
from lnpu.page import card, image, in_a_row, number, page, section, table

__all__ = ["HEADINGS", "line", "render_report", "write_report"]

_COLUMNS = ("MMAC", "ideal", "cycles", "utilisation", "cores", "of roofline", "bound by", "bus")

_WIDTH = 58

HEADINGS = f"{'case':<{_WIDTH}}" + "".join(f"{name:>{max(10, len(name) + 2)}}" for name in _COLUMNS)
"""The line over the lines of `line`."""

_EXPLANATION = (
    "Ideal: the cycles that the products of non-zero elements take at the peak rate of their precision. Utilisation: "
    "ideal over the cycles of the whole operation, with its loads, drains and stores. Cores: ideal over the cycles in "
    "which the cores were busy. Of the roofline: the most of ideal, words read and words written, over the cycles; "
    "bound by: which of them that is. Where it is words, this is the share of that channel of the bus that is used. "
    "Bus: words a cycle on both data channels together (200% at most). MMAC: millions of dense multiply-accumulates."
)


def _cells(results: Results, result: Result) -> tuple[str, ...]:
    metrics = results.metrics(result)
    return (
        f"{metrics.macs / 1e6:.3f}",
        f"{metrics.ideal:,.0f}",
        f"{metrics.cycles:,}",
        f"{metrics.utilisation:.1%}",
        f"{metrics.cores:.1%}",
        f"{metrics.of_roofline:.1%}",
        metrics.bound_by,
        f"{metrics.bus:.1%}",
    )


def line(results: Results, result: Result) -> str:
    """A case as a line of text."""
    cells = zip(_COLUMNS, _cells(results, result), strict=True)
    text = f"{result.case.name:<{_WIDTH}}" + "".join(f"{cell:>{max(10, len(name) + 2)}}" for name, cell in cells)
    return f"{text}  {result.mismatches:,} MISMATCHES" if result.mismatches else text


def write_report(path: Path, results: Results, comparison: Comparison | None = None) -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(results, comparison))


def render_report(results: Results, comparison: Comparison | None = None) -> str:
    """The page of HTML: figures, plots, every case, the comparison with the baseline, settings."""
    found = list(results.found.values())
    parts = [_cards(results, found)]
    if found:
        explanation = (
            "What the chip should reach, and the worst of the cases that count. Resident: the products are a "
            "program of their own, before which the buffers have been filled. Cores: cycles in which they were busy."
        )
        parts.append(section("Targets", explanation, _targets(results)))
        explanation = (
            "Every case under what the cores and the bus allow. The bus has a channel for each direction: the solid "
            "line is for traffic in one of them, the dotted one for as much in both."
        )
        parts.append(section("Roofline", explanation, image("Roofline", *roofline(results))))
    if has_layers(results):
        explanation = "Of the peak in that precision, over all cycles of the operation, nothing skipped but padding."
        parts.append(section("Utilisation of layers", explanation, image("Utilisation", *heat_map(results))))
    if has_sparsities(results):
        explanation = (
            "Cycles of the same operation in dense FP16 over those with zeros, and in FP8: of the whole operation, of "
            "the cores alone, and what they would be if just the non-zeros took cycles."
        )
        parts.append(section("Zero skipping", explanation, image("Speed-up by sparsity", *speed_up(results))))
    parts += [part for part in (_bound_by_the_bus(results), _small(results, found), _balance(results)) if part]
    if comparison is not None:
        parts.append(section("Baseline", comparison.lines()[0], _changes(comparison)))
    if found:
        parts.append(section("Cases", _EXPLANATION, _cases(results, found)))
    settings = [("set", results.set), ("sources", results.sources)]
    settings += [(name, number(value)) for name, value in asdict(results.config).items()]
    explanation = f"The memory answers after {LATENCY} cycles and never stalls."
    parts.append(section("Settings", explanation, table(("setting", "value"), settings, text_columns=2)))
    return page(f"Speed of LNPU, configuration {results.config.name}, {results.set} set", parts)


def _cards(results: Results, found: Sequence[Result]) -> str:
    wrong, elements = (sum(getattr(result, name) for result in found) for name in ("mismatches", "elements"))
    exact = elements > 0 and not wrong
    cards = [
        card(
            "bit-exact" if exact else f"{number(wrong)} mismatches",
            f"{number(elements)} elements compared with the golden model",
            "good" if exact else "bad",
        ),
        card(number(len(found)), "cases"),
        card(number(results.config.macs_fp16), "FP16 products a cycle at peak"),
    ]
    for format_, label in (("fp16", "FP16"), ("fp8", "FP8")):
        dense = [
            results.metrics(result)
            for result in found
            if result.case.group == "layer" and not result.case.sparsity and result.case.streamed == format_
            and result.case.resident == format_
        ]  # fmt: skip
        if cycles := sum(metrics.cycles for metrics in dense):
            share = sum(metrics.ideal for metrics in dense) / cycles
            cards.append(card(f"{share:.1%}", f"of the peak in all dense {label} layers together"))
    return in_a_row(cards)


def _targets(results: Results) -> str:
    """Targets, goals, measured figures, and whether they are reached."""
    found = lines(results)
    rows = []
    for one in found:
        cases = f"{one.cases[0]}{f' and {len(one.cases) - 1} more' if len(one.cases) > 1 else ''}" if one.cases else "-"
        figures = (one.text(figure) for figure in (one.target, one.goal, one.measured))
        rows.append((one.title, one.measure, *figures, one.status, cases))
    headings = ("what", "measure", "target", "goal", "measured", "", "worst case")
    return table(headings, rows, text_columns=2, row_class=lambda row: "bad" if found[row].status == "missed" else "")


def _bound_by_the_bus(results: Results) -> str:
    """Cases of the group "memory" that the bus bounds, and all of them together."""
    chosen = [(name, results.metrics(results.found[name])) for name, _ in memory_bound(results)]
    if not chosen:
        return ""
    rows = [
        (name, one.bound_by, f"{one.bound:,.0f}", f"{one.cycles:,}", f"{one.of_roofline:.1%}") for name, one in chosen
    ]
    bound, cycles = sum(one.bound for _, one in chosen), sum(one.cycles for _, one in chosen)
    rows.append(("all", "", f"{bound:,.0f}", f"{cycles:,}", f"{bound / cycles:.1%}"))
    headings = ("case", "bound by", "words", "cycles", "bus used")
    content = table(headings, rows, row_class=lambda row: "total" if row == len(chosen) else "")
    return section("Bound by the bus", "Words on the busier channel of the bus, and cycles of the operation.", content)


def _small(results: Results, found: Sequence[Result]) -> str:
    """What shapes smaller than the array cost."""
    small = [(result, results.metrics(result)) for result in found if result.case.group == "tiny"]
    if not small:
        return ""
    explanation = (
        "What it costs when a shape does not fill the array: cycles of the cores (their average) and of the whole "
        "operation, against the cycles in which the whole array would do the products."
    )
    rows = []
    for result, one in small:
        busy = result.counters["core_busy"] / results.config.cores
        ratios = [f"{part / one.ideal:,.1f}" if one.ideal else "-" for part in (busy, one.cycles)]
        rows.append((result.case.name, f"{one.ideal:,.1f}", f"{busy:,.0f}", f"{one.cycles:,}", *ratios))
    headings = ("case", "ideal", "cores", "cycles", "cores/ideal", "cycles/ideal")
    return section("Small shapes", explanation, table(headings, rows))


def _balance(results: Results) -> str:
    """What zeros cost that are not evenly spread, and what it would be with cores in lockstep."""
    found = balance(results)
    if not found:
        return ""
    explanation = (
        "The same layer with half of the streamed operand zeros, not evenly spread: all of every second image, of "
        "every second pair of lines, or of pairs of lines drawn by lot. Speed is products a cycle against those of "
        "zeros that are evenly spread. In lockstep no core begins its next step before all have done their last one, "
        "which is what it would be without cores that run ahead."
    )
    rows = [
        (
            name,
            *(f"{results.found[one].counters['cycles']:,}" for one in (name, f"{name}/lockstep")),
            f"{of_lockstep:.1%}",
            f"{share:.1%}",
        )
        for name, share, of_lockstep in found
    ]
    headings = ("case", "cycles", "in lockstep", "of lockstep", "speed against evenly spread")
    return section("Zeros not evenly spread", explanation, table(headings, rows))


def _changes(comparison: Comparison) -> str:
    slower = comparison.regressions
    changes = [change for change in comparison.changes if change.after != change.before]
    changes.sort(key=lambda change: change.after / change.before, reverse=True)
    rows = [(one.name, number(one.before), number(one.after), f"{one.after / one.before - 1:+.1%}") for one in changes]
    rows += [(name, "-", "-", "new") for name in comparison.missing]
    if not rows:
        return ""
    return table(
        ("case", "cycles of the baseline", "cycles", "change"),
        rows,
        row_class=lambda row: "bad" if row < len(changes) and changes[row] in slower else "",
    )


def _cases(results: Results, found: Sequence[Result]) -> str:
    ordered = sorted(
        found,
        key=lambda one: (
            one.case.group, one.case.shape.name, PHASES.index(one.case.phase), one.case.streamed, one.case.sparsity,
        ),
    )  # fmt: skip
    rows = []
    for result in ordered:
        metrics, counters = results.metrics(result), result.counters
        busy = (f"{counters[f'{unit}_busy'] / max(1, metrics.cycles):.0%}" for unit in ("load", "drain", "store"))
        rows.append(
            (
                result.case.name,
                *_cells(results, result),
                f"{metrics.bus_read:.1%}",
                f"{metrics.bus_write:.1%}",
                f"{metrics.intensity:.1f}",
                *busy,
                number(result.mismatches),
            )
        )
    headings = (
        "case", *_COLUMNS, "reads", "writes", "products/byte", "LOAD busy", "DRAIN busy", "STORE busy", "mismatches",
    )  # fmt: skip
    return table(headings, rows, row_class=lambda row: "bad" if ordered[row].mismatches else "")
