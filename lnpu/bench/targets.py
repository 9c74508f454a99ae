"""What the chip should reach, beside what the benchmark has measured."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lnpu.bench.cases import PHASES, Case
from lnpu.bench.operation import Result

if TYPE_CHECKING:
    from lnpu.bench.runs import Results

__all__ = ["Line", "Measured", "balance", "lines", "memory_bound", "speed_ups"]

_RESIDENT = "of the peak, from operands on the chip to the last product"
_WHOLE = "of the peak, with loads and stores"
_MEMORY = "words a cycle on the busier channel of the bus, worst of those bound by it"
_LAYERS = "of the peak, with loads and stores, worst of those that the roofline calls bound by products"
_SKIPPING = "of the ideal (products of non-zeros alone), cycles of the cores, worst"
_SKIPPING_WHOLE = "of the ideal (products of non-zeros alone), with loads and stores, worst"
_FEWER = "times fewer cycles of the cores than FP16 with as many zeros, worst"
_FASTER = "times faster than FP16 with as many zeros, with loads and stores, worst"
_BALANCE = "of the speed with as many zeros evenly spread, worst"
_LOCKSTEP = "of the cycles when no core begins a step before all are done, worst"

_GATED = "of the products under a mask of which half is zero come to lanes at rest"
_MASKED = "of the cycles of the cores without a mask, where it masks every second line as a whole"

_GEMMS = (96, 192, 512)
_SKIPPED = ((0.5, 0.92, 0.97), (0.75, 0.88, 0.95), (0.9, 0.8, 0.9))
_FP8 = ((0.0, 1.95, 3.9), (0.5, 1.8, 3.5))

Measured = list[tuple[str, float]]
"""Names of cases, and the figure of each."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A target.

    Parameters
    ----------
    title, measure : str
        What it is about, and what its figures are.
    unit : str
        "%" (figures are shares), "x" (ratios) or "" (counts, of which the least is best).
    target, goal : float or None
        What must be reached, and what is hoped for; None where the figure is only shown.
    measured : float or None
        The worst of the cases; None if none has run.
    cases : tuple of str
        The cases that count, the worst one first.
    """

    title: str
    measure: str
    unit: str
    target: float | None
    goal: float | None
    measured: float | None
    cases: tuple[str, ...]

    @property
    def status(self) -> str:
        """ "goal met", "target met", "missed", "not run", or "" where there is no target."""
        if self.measured is None:
            return "not run"
        if self.target is None or self.goal is None:
            return ""
        sign = 1 if self.unit else -1
        if sign * self.measured >= sign * self.goal:
            return "goal met"
        return "target met" if sign * self.measured >= sign * self.target else "missed"

    def text(self, figure: float | None) -> str:
        """One of its figures for people."""
        if figure is None:
            return "-"
        return f"{figure:.1%}" if self.unit == "%" else f"{figure:.2f}x" if self.unit == "x" else f"{figure:,.0f}"

    def __str__(self) -> str:
        figures = [f"{name} {self.text(getattr(self, name))}" for name in ("target", "goal") if getattr(self, name)]
        about = f" ({', '.join(figures)})" if figures else ""
        found = "not run" if self.measured is None else self.text(self.measured)
        status = f": {self.status}" if self.measured is not None and self.status else ""
        return f"{self.title}, {self.measure}: {found}{about}{status}"


def lines(results: "Results") -> list[Line]:
    """All targets, with what `results` says about them."""
    return list(_lines(results))


def _lines(results: "Results") -> Iterator[Line]:
    for phase in PHASES:
        title = f"3x3 layers, dense FP16, {phase.upper()}"
        yield _line(title, _LAYERS, "%", 0.95, 0.994, _compute_bound(results, phase))
    for size in _GEMMS:
        title = f"GEMM {size}x{size}x{size}, dense FP16"
        yield _line(title, _RESIDENT, "%", 0.95, 0.994, _gemm(results, size, "resident"))
        yield _line(title, _WHOLE, "%", None, None, _gemm(results, size, "compiled"))
    yield _line("layers bound by the bus", _MEMORY, "%", 0.9, 0.97, memory_bound(results))
    small = [(one.case.name, float(one.mismatches)) for one in results.found.values() if one.case.group == "tiny"]
    yield _line("shapes smaller than the array", "wrong elements", "", 0, 0, small)
    for sparsity, target, goal in _SKIPPED:
        for phase in ("ff", "wg"):
            title, layers = f"FP16, {sparsity:.0%} zeros, {phase.upper()}", _layers(results, phase, "fp16", sparsity)
            measured = [(one.case.name, results.metrics(one)) for one in layers]
            yield _line(title, _SKIPPING, "%", target, goal, [(name, found.cores) for name, found in measured])
            yield _line(title, _SKIPPING_WHOLE, "%", None, None, [(name, one.utilisation) for name, one in measured])
    for sparsity, target, goal in _FP8:
        for phase in PHASES:
            title = f"FP8, {f'{sparsity:.0%} zeros' if sparsity else 'dense'}, {phase.upper()}"
            yield _line(title, _FEWER, "x", target, goal, speed_ups(results, phase, sparsity, "core_busy"))
            yield _line(title, _FASTER, "x", None, None, speed_ups(results, phase, sparsity, "cycles"))
    yield _line("BP under the mask of a ReLU", _GATED, "%", None, None, _gated(results))
    yield _line("BP under the mask of a ReLU", _MASKED, "%", None, None, _masked(results))
    title = "zeros not evenly spread"
    yield _line(title, _BALANCE, "%", 0.8, 0.95, [(name, even) for name, even, _ in balance(results)])
    yield _line(title, _LOCKSTEP, "%", None, None, [(name, lockstep) for name, _, lockstep in balance(results)])


def _line(title: str, measure: str, unit: str, target: float | None, goal: float | None, found: Measured) -> Line:
    ordered = sorted(found, key=lambda entry: entry[1], reverse=not unit or measure == _LOCKSTEP)
    worst = ordered[0][1] if ordered else None
    return Line(
        title=title,
        measure=measure,
        unit=unit,
        target=target,
        goal=goal,
        measured=worst,
        cases=tuple(name for name, _ in ordered),
    )


def _gemm(results: "Results", size: int, program: str) -> Measured:
    def wanted(case: Case) -> bool:
        shape = case.shape
        return (
            case.group == "gemm" and (shape.batch, shape.channels, shape.outputs) == (size, size, size)
            and (case.streamed, case.resident, case.program) == ("fp16", "fp16", program)
        )  # fmt: skip

    return [(one.case.name, results.metrics(one).utilisation) for one in _chosen(results, wanted)]


def memory_bound(results: "Results") -> Measured:
    """Share of the busier channel of the bus, of whole operations that it bounds."""
    found = []
    for result in _chosen(results, lambda case: case.group == "memory"):
        metrics = results.metrics(result)
        if metrics.bound_by != "products":
            found.append((result.case.name, metrics.of_roofline))
    return found


def _layers(results: "Results", phase: str, format_: str, sparsity: float) -> Iterable[Result]:
    """Layers with both operands in a format, and this share of zeros."""

    def wanted(case: Case) -> bool:
        formats = case.streamed, case.resident
        return (case.group, case.phase, case.sparsity) == ("layer", phase, sparsity) and formats == (format_, format_)

    return _chosen(results, wanted)


def _compute_bound(results: "Results", phase: str) -> Measured:
    """Share of the peak, of dense 3x3 layers of many channels whose roofline is that of the products."""
    found = []
    for result in _layers(results, phase, "fp16", 0.0):
        metrics, shape = results.metrics(result), result.case.shape
        wide = min(shape.channels, shape.outputs) >= results.config.lanes
        if shape.kernel == 3 and shape.stride == 1 and wide and metrics.bound_by == "products":
            found.append((result.case.name, metrics.utilisation))
    return found


def speed_ups(results: "Results", phase: str, sparsity: float, counter: str) -> Measured:
    """FP16 over FP8 with as many zeros: ratios of a counter, of the layers for which both have run."""
    return [
        (result.case.name, plain.counters[counter] / result.counters[counter])
        for result in _layers(results, phase, "fp8", sparsity)
        if (plain := results.found.get(replace(result.case, streamed="fp16", resident="fp16").name))
        and result.counters[counter]
    ]


def _gated(results: "Results") -> Measured:
    return [
        (result.case.name, result.counters["gated"] / (result.counters["mac16"] + result.counters["mac8"]))
        for result in _chosen(results, lambda case: case.mask == "random")
    ]


def _masked(results: "Results") -> Measured:
    return [
        (result.case.name, result.counters["core_busy"] / plain.counters["core_busy"])
        for result in _chosen(results, lambda case: case.mask == "lines")
        if (plain := results.found.get(replace(result.case, mask="").name))
    ]


def balance(results: "Results") -> list[tuple[str, float, float]]:
    """Cases whose zeros are not evenly spread: speed against evenly spread ones, and cycles against those in lockstep.

    Speed is products a cycle, for the products inside the image are not quite as many.
    """
    found = []
    for result in _chosen(results, lambda case: case.zeros != "random" and case.program == "compiled"):
        even = results.found.get(replace(result.case, zeros="random").name)
        lockstep = results.found.get(replace(result.case, program="lockstep").name)
        if even and lockstep:
            share = results.metrics(result).utilisation / results.metrics(even).utilisation
            found.append((result.case.name, share, result.counters["cycles"] / lockstep.counters["cycles"]))
    return found


def _chosen(results: "Results", wanted: Callable[[Case], bool]) -> Iterable[Result]:
    return (result for result in results.found.values() if wanted(result.case))
