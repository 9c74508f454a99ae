"""Speed of single operations: `bench`."""

import argparse
import os
from pathlib import Path

from lnpu.bench.cases import SETS
from lnpu.cli.arguments import CONFIG_NAMES, Subparsers
from lnpu.config import get_config

__all__ = ["add"]


def add(commands: Subparsers) -> None:
    """Add the commands."""
    bench = commands.add_parser(
        "bench",
        help="speed of single operations on the simulated chip, each compared bit for bit with the golden model",
        description="Measures cycles of single operations against the peak of the cores and of the bus. Results are "
        "kept: of a run that was stopped, or of more cases, only what is missing is run. Exit status 1 on a mismatch, "
        "or if a case takes 2% more cycles than the baseline.",
    )
    bench.add_argument("--config", help=f"configuration: {CONFIG_NAMES} (default: paper, tiny for the small set)")
    bench.add_argument("--set", default="full", choices=SETS, help="cases (default: full)")
    bench.add_argument("--batch", type=int, metavar="N", help="images of the layers (default: by their size)")
    bench.add_argument("--only", metavar="REGEX", help="just the cases in whose names this is found")
    bench.add_argument("--json", type=Path, metavar="FILE", help="results (default: build/bench/CONFIG-SET.json)")
    bench.add_argument(
        "--report", type=Path, metavar="FILE", help="page of HTML (default: build/reports/bench/CONFIG-SET.html)"
    )
    bench.add_argument("--report-only", action="store_true", help="show the results in the JSON file, run nothing")
    bench.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="cycles to compare with (default: for the small set on tiny, benchmarks/baseline.json)",
    )
    bench.add_argument("--update-baseline", action="store_true", help="make these results the baseline")
    bench.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from lnpu.bench.baseline import BASELINE, compare, read_baseline, write_baseline
    from lnpu.bench.cases import cases_of, select
    from lnpu.bench.operation import Result
    from lnpu.bench.report import HEADINGS, line, write_report
    from lnpu.bench.runs import Results, read_results, run
    from lnpu.bench.targets import lines

    config = get_config(arguments.config or ("tiny" if arguments.set == "small" else "paper"))
    title = f"{config.name}-{arguments.set}"
    results_path = arguments.json or Path(f"build/bench/{title}.json")
    report_path = arguments.report or Path(f"build/reports/bench/{title}.html")
    standard = {case.name: case for case in cases_of(arguments.set, config)}
    baseline_path = arguments.baseline or (BASELINE if title == "tiny-small" and not arguments.batch else None)
    if arguments.update_baseline and baseline_path is None:
        raise ValueError("--update-baseline needs the small set on tiny with its own batches, or a --baseline")

    def show(results: Results, result: Result) -> None:
        print(line(results, result), flush=True)

    if arguments.report_only:
        results = read_results(results_path)
        results = results.chosen(select(results.found, arguments.only))
        print(HEADINGS)
        for result in results.found.values():
            show(results, result)
    else:
        cases = {case.name: case for case in cases_of(arguments.set, config, arguments.batch)}
        chosen = [cases[name] for name in select(cases, arguments.only)]
        if baseline_path is not None and not arguments.update_baseline:
            read_baseline(baseline_path, Results(config=config, set=arguments.set, sources=""))
        print(HEADINGS)
        results = run(config, arguments.set, chosen, results_path, progress=show)
    wrong = [name for name, result in results.found.items() if result.mismatches]
    print("\n".join(str(target) for target in lines(results) if target.measured is not None))
    comparison = None
    if baseline_path is not None and not (arguments.update_baseline and not baseline_path.exists()):
        comparison = compare(read_baseline(baseline_path, results), results)
        print("\n".join(comparison.lines()))
        if (comparison.improvements or comparison.missing) and not arguments.update_baseline:
            print("run with --update-baseline to make these the baseline")
    write_report(report_path, results, comparison)
    elements = sum(result.elements for result in results.found.values())
    print(f"{len(results.found)} cases, {len(wrong)} with mismatches in {elements:,} elements, report {report_path}")
    for name in wrong:
        print(f"mismatches in {name}")
    if wrong:
        return 1
    if arguments.update_baseline and baseline_path is not None:
        write_baseline(baseline_path, results, standard)
        print(f"baseline {os.path.relpath(baseline_path)} written")
        return 0
    return 1 if comparison is not None and comparison.regressions else 0
