"""The training study: `fgmp-study`."""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from lnpu.cli.arguments import Subparsers, data_argument
from lnpu.study.names import STUDY_NAMES
from lnpu.toolchain import ToolError

__all__ = ["add"]

_GRADIENT_EPOCHS, _GRADIENT_SEEDS = (1, 3, 6), 2


def add(commands: Subparsers) -> None:
    """Add the commands."""
    study = commands.add_parser(
        "fgmp-study",
        help="train ResNet-18 in FP32, FP16, FP8 and FGMP, emulated in PyTorch, and compare",
        description="Trains ResNet-18 in several formats and seeds. Finished runs are kept, killed ones resume.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data_argument(study)
    study.add_argument("--formats", nargs="+", default=STUDY_NAMES, choices=STUDY_NAMES, help="formats to train in")
    study.add_argument("--seeds", type=int, default=3, help="runs in each format")
    study.add_argument("--width", type=int, default=16, help="channels of the first stage (64 in the paper)")
    study.add_argument("--image", type=int, help="height and width of the images (default: 16, of the digits 8)")
    study.add_argument("--epochs", type=int, default=30, help="passes over the training images")
    study.add_argument("--batch", type=int, default=64, help="images a step")
    study.add_argument("--rate", type=float, default=0.1, help="greatest learning rate")
    study.add_argument("--workers", type=int, default=2, help="processes on this machine")
    study.add_argument("--scheduler", help="address of a running Dask scheduler (default: a cluster on this machine)")
    study.add_argument("--only", choices=("training", "gradients"), help="do just this part")
    study.add_argument("--results", type=Path, default=Path("build/fgmp_study"), help="folder of the results")
    study.add_argument(
        "--report-only", action="store_true", help="draw the report of what is in RESULTS (or its compact data)"
    )
    study.add_argument("--data-out", type=Path, metavar="FOLDER", help="write compact data and pictures, to publish")
    study.add_argument(
        "--ema",
        type=Path,
        metavar="JSON",
        help="bits that a step of the full network moves in plain FP16, by kind of tensor, or a report of "
        "benchmarks/ema.py: adds an estimate",
    )
    study.add_argument(
        "-o", "--output", type=Path, default=Path("build/reports/fgmp_study"), help="folder of the report"
    )
    study.set_defaults(run=_fgmp_study)


def _fgmp_study(arguments: argparse.Namespace) -> int:
    from lnpu.study.compact import read_compact, write_compact
    from lnpu.study.findings import LABELS, accuracies
    from lnpu.study.report import read_study, write_pictures, write_report

    plain_bits = _plain_bits(arguments.ema) if arguments.ema is not None else None
    if not arguments.report_only or read_compact(arguments.results) is None:
        missing = [name for name in ("torch", "distributed") if importlib.util.find_spec(name) is None]
        if missing:
            raise ToolError(f"{' and '.join(missing)} missing: run `pip install 'lnpu[study]'` or `make setup-study`")
    study = read_study(arguments.results) if arguments.report_only else _run_study(arguments)
    if study["training"] is not None:
        for one in accuracies(study["training"]):
            verdict = f" ({one.difference:+.2f} points against FP16: {one.verdict})" if one.verdict else ""
            runs = f"+- {one.spread:.2f}% in {one.runs} runs" if one.runs > 1 else "in 1 run"
            print(f"{LABELS[one.format]:<18} test accuracy {one.mean:.2f}% {runs}{verdict}")
    print(f"report {write_report(arguments.output, study, plain_bits)}")
    if arguments.data_out is not None:
        write_compact(arguments.data_out, study)
        write_pictures(arguments.data_out, study)
    return 0


def _plain_bits(path: Path) -> dict[str, float]:
    try:
        bits = json.loads(path.read_text())
        return {str(kind): float(value) for kind, value in bits.get("plain_bits", bits).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"--ema must be a JSON file of bits by kind of tensor: {path}: {error}") from None


def _run_study(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compute what is missing; compact data of all results of this study."""
    from lnpu.results import read_result
    from lnpu.study.cluster import AnyRun, run_study
    from lnpu.study.data import load_data
    from lnpu.study.gradient_error import GradientRun
    from lnpu.study.report import study_of
    from lnpu.study.runs import Run

    digits = arguments.data is None
    image = arguments.image or (8 if digits else 16)
    data = load_data(arguments.data, image=image)
    numbers = {name: getattr(arguments, name) for name in ("width", "batch", "rate")}
    # A mirrored digit is another one, or none.
    numbers |= {"data": data.digest, "image": image, "flip": not digits, "padding": 1 if digits else 2}
    trainings = [
        Run(format=name, seed=seed, epochs=arguments.epochs, **numbers)
        for seed in range(arguments.seeds)
        for name in arguments.formats
    ]
    gradients = [
        GradientRun(
            training=Run(format="fp32", seed=seed, epochs=max(_GRADIENT_EPOCHS), **numbers), epochs=_GRADIENT_EPOCHS
        )
        for seed in range(min(arguments.seeds, _GRADIENT_SEEDS))
    ]
    runs: list[AnyRun] = [
        *(trainings if arguments.only != "gradients" else ()),
        *(gradients if arguments.only != "training" else ()),
    ]

    def progress(run: AnyRun, result: dict[str, Any]) -> None:
        accuracy = f": test accuracy {result['epochs'][-1]['test_accuracy']:.2%}" if isinstance(run, Run) else ""
        print(f"{run.title}{accuracy}", flush=True)

    run_study(
        runs, data, arguments.results, scheduler=arguments.scheduler, workers=arguments.workers, progress=progress
    )
    everything: list[AnyRun] = [*trainings, *gradients]
    results = [read_result(arguments.results, run) for run in everything]
    return study_of([result for result in results if result is not None])
