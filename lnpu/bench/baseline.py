"""The baseline: cycles of an earlier version, which a later one must not exceed."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lnpu.bench.runs import Results
from lnpu.toolchain import RTL

__all__ = ["BASELINE", "TOLERANCE", "Change", "Comparison", "compare", "read_baseline", "write_baseline"]

BASELINE = RTL.parent / "benchmarks" / "baseline.json"
"""The baseline of this version: the small set on `tiny`."""

TOLERANCE = 0.02
"""Part of its cycles by which a case may become slower."""


@dataclass(frozen=True)
class Change:
    """Cycles of a case in the baseline and now."""

    name: str
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.name}: {self.before:,} -> {self.after:,} cycles ({self.after / self.before - 1:+.1%})"


@dataclass(frozen=True)
class Comparison:
    """Changes of the cases that are in the baseline, and the names of those that are not."""

    changes: list[Change]
    missing: list[str]

    @property
    def regressions(self) -> list[Change]:
        """Cases slower by more than the tolerance."""
        return [change for change in self.changes if change.after > (1 + TOLERANCE) * change.before]

    @property
    def improvements(self) -> list[Change]:
        """Cases that have become faster, however little."""
        return [change for change in self.changes if change.after < change.before]

    def lines(self) -> list[str]:
        """What there is to say about it."""
        equal = sum(change.after == change.before for change in self.changes)
        slower, faster = self.regressions, self.improvements
        within = len(self.changes) - equal - len(slower) - len(faster)
        found = [
            f"against the baseline: {equal} equal, {len(faster)} faster, {within} slower within {TOLERANCE:.0%}, "
            f"{len(slower)} slower by more"
        ]
        found += [f"faster  {change}" for change in faster]
        found += [f"SLOWER  {change}" for change in slower]
        found += [f"not in the baseline  {name}" for name in self.missing]
        return found


def read_baseline(path: Path, results: Results) -> dict[str, int]:
    """Cycles by case.

    Raises
    ------
    ValueError
        If the file cannot be read, or is of another set or configuration than `results`.
    """
    try:
        content = json.loads(path.read_text())
        owner = content["set"], content["config"]
        cycles = {str(name): int(count) for name, count in content["cycles"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no baseline: {error!r}") from None
    if owner != (results.set, results.config.name):
        raise ValueError(
            f"{path} is a baseline of set {owner[0]} on {owner[1]}, not of {results.set} on {results.config.name}"
        )
    if bad := [name for name, count in cycles.items() if count < 1]:
        raise ValueError(f"{path} is no baseline: cycles of {bad[0]} must be at least 1")
    return cycles


def compare(baseline: dict[str, int], results: Results) -> Comparison:
    """Results against a baseline."""
    cycles = {name: result.counters["cycles"] for name, result in results.found.items()}
    return Comparison(
        [Change(name, baseline[name], count) for name, count in cycles.items() if name in baseline],
        [name for name in cycles if name not in baseline],
    )


def write_baseline(path: Path, results: Results, names: Iterable[str]) -> None:
    """Write the results' cycles as the baseline; of the others of `names`, all of the set, it keeps what it has."""
    before = read_baseline(path, results) if path.exists() else {}
    now = before | {name: result.counters["cycles"] for name, result in results.found.items()}
    cycles = {name: now[name] for name in names if name in now}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"set": results.set, "config": results.config.name, "cycles": cycles}
    path.write_text(json.dumps(content, indent=1) + "\n")
