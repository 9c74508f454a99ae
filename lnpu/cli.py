"""The `lnpu` command."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from golden.fgmp import POLICIES, Policy
from lnpu.bench.cases import SETS
from lnpu.config import CONFIGS, get_config
from lnpu.study.names import STUDY_NAMES
from lnpu.toolchain import ToolError

__all__ = ["main"]

_OPERATIONS = {
    "conv2d": ("x", "w"),
    "conv2d-input-grad": ("dy", "w"),
    "conv2d-weight-grad": ("x", "dy"),
    "linear": ("x", "w"),
    "linear-input-grad": ("dy", "w"),
    "linear-weight-grad": ("x", "dy"),
}


_GRADIENT_EPOCHS, _GRADIENT_SEEDS = (1, 3, 6), 2


def _format(text: str) -> str | Policy:
    """A format of the command line: "fp16", "fp8", or LO:HI[:SCALE[:BELOW[:ABOVE]]]."""
    if text in POLICIES:
        return text
    parts = text.split(":")
    if not 2 <= len(parts) <= 5:
        raise argparse.ArgumentTypeError(f"must be fp16, fp8 or LO:HI[:SCALE[:BELOW[:ABOVE]]], not {text!r}")
    try:
        names = dict(zip(("below", "above"), parts[3:], strict=False))
        scale = int(parts[2]) if len(parts) > 2 else 0
        return Policy.between(float(parts[0]), float(parts[1]), scale=scale, **names)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas, not {text!r}") from None


def _config_argument(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--config", default=default, help=f"configuration: {', '.join(CONFIGS)}")


def _data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", help="CIFAR-10's own files (folder or archive) or an .npz; without: scikit-learn's digits"
    )


def _network_arguments(parser: argparse.ArgumentParser, *, width: int, image: int, batch: int) -> None:
    """Images, and the ResNet-18 that is trained on them."""
    _data_argument(parser)
    parser.add_argument("--width", type=int, default=width, help="channels of the first stage (64 in the paper)")
    parser.add_argument("--image", type=int, default=image, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=batch, help="images a step")


def _step_arguments(parser: argparse.ArgumentParser, *, config: str, width: int, image: int, batch: int) -> None:
    """A training step on a simulated chip."""
    _config_argument(parser, config)
    _network_arguments(parser, width=width, image=image, batch=batch)
    parser.add_argument("--stem", default="cifar", choices=("cifar", "imagenet"), help="first layers")
    parser.add_argument("--formats", default="dynamic", help="dynamic, fgmp, fp16 or fp8")
    parser.add_argument("--dense", action="store_true", help="no zeros from ReLU: batch norms begin with beta = 8")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and the order of images")
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate")
    parser.add_argument("--loss-scale", type=float, default=1024.0, help="factor on the loss gradient")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lnpu", description="LNPU: an open deep-learning training processor")
    commands = parser.add_subparsers(dest="command", required=True)
    names = ", ".join(CONFIGS)

    train = commands.add_parser(
        "train-step",
        help="training steps of ResNet-18 on the simulated chip, compared bit for bit with the golden model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _step_arguments(train, config="tiny", width=8, image=8, batch=16)
    train.add_argument("--steps", type=int, default=3, help="training steps")
    train.add_argument("--stall", type=float, default=0.0, help="probability of a stall a cycle on every AXI channel")
    train.add_argument(
        "-o", "--output", type=Path, default=Path("build/reports/train_step"), help="folder of the report"
    )

    replay = commands.add_parser(
        "replay",
        help="every operation of a training step in a simulation of its own, compared bit for bit",
        description="Runs every operation of a training step of ResNet-18 on the simulated chip, each from the golden "
        "model's operands, side by side. Finished operations are kept, so a run that was killed goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _step_arguments(replay, config="paper", width=64, image=32, batch=1)
    replay.add_argument("--acc-bits", type=int, help="accumulator width (default: the configuration's)")
    replay.add_argument("--step", type=int, default=1, help="which step; those before are the golden model's alone")
    replay.add_argument("--only", metavar="REGEX", help='only where "PROGRAM LAYER PHASE" has a match')
    replay.add_argument("--distinct", action="store_true", help="only one operation of each layer shape and phase")
    replay.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes on this machine")
    replay.add_argument(
        "--scheduler",
        help="address of a running Dask scheduler whose workers see the folder of results (default: a cluster on this "
        "machine)",
    )
    replay.add_argument("--results", type=Path, default=Path("build/replay"), help="folder of the results")
    replay.add_argument("--json", type=Path, metavar="FILE", help="write the report to this file")

    verilog = commands.add_parser(
        "verilog", help="write the chip's Verilog", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    _config_argument(verilog, "tiny")
    verilog.add_argument("-o", "--output", type=Path, help="folder (default: rtl/CONFIG)")
    verilog.add_argument("--lint", action="store_true", help="lint it with Verilator")
    verilog.add_argument("--synthesise", action="store_true", help="check with Yosys that it can be synthesised")

    integration = commands.add_parser(
        "integration",
        help="write the Verilog, and with PeakRDL the C header and HTML of the registers",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _config_argument(integration, "tiny")
    integration.add_argument("-o", "--output", type=Path, help="folder (default: rtl/CONFIG)")

    export = commands.add_parser(
        "export-step",
        help="memory image and C header of a training step for a host in C; check of the memory after it",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    soc = commands.add_parser(
        "soc",
        help="run a training step from C on the example system (examples/soc), compared bit for bit",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for parser_of_step in (export, soc):
        _config_argument(parser_of_step, "tiny")
        parser_of_step.add_argument("--batch", type=int, default=4, help="images in the step")
        parser_of_step.add_argument("--seed", type=int, default=0, help="of images and initial weights")
        parser_of_step.add_argument("-o", "--output", type=Path, default=Path("build/soc"), help="folder")
    export.add_argument("--check", type=Path, metavar="FILE", help="compare the memory in FILE with the golden model")

    op = commands.add_parser(
        "op",
        help="one operation on the simulated chip",
        description="Runs one operation on the simulated chip. Arrays are .npy files (float16 or float32): NCHW, OIHW.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    op.add_argument("operation", choices=_OPERATIONS)
    _config_argument(op, "tiny")
    for name in ("x", "w", "dy"):
        op.add_argument(f"--{name}", type=Path, help=f"operand {name} (.npy)")
        op.add_argument(
            f"--{name}-format",
            type=_format,
            default="fp16",
            metavar="FORMAT",
            help=f"format of {name}: fp16, fp8 or LO:HI[:SCALE[:BELOW[:ABOVE]]]",
        )
    op.add_argument("--stride", type=int, default=1)
    op.add_argument("--padding", type=int, default=0)
    op.add_argument("--input-shape", type=_shape, help="N,C,H,W of x (conv2d-input-grad)")
    op.add_argument("--kernel-shape", type=_shape, help="R,S of w (conv2d-weight-grad)")
    op.add_argument("--out", default="fp16", choices=("fp16", "fp32"), help="format of the result")
    op.add_argument("--out-scale", type=int, default=0, help="exponent that the result is divided by")
    op.add_argument("--stall", type=float, default=0.0, help="probability of a stall a cycle on every AXI channel")
    op.add_argument("--check", action="store_true", help="compare with the golden model; exit status 1 on a mismatch")
    op.add_argument("-o", "--output", type=Path, required=True, help="result (.npy)")

    study = commands.add_parser(
        "fgmp-study",
        help="train ResNet-18 in FP32, FP16, FP8 and FGMP, emulated in PyTorch, and compare",
        description="Trains ResNet-18 in several formats and seeds. Finished runs are kept, killed ones resume.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _data_argument(study)
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

    bench = commands.add_parser(
        "bench",
        help="speed of single operations on the simulated chip, each compared bit for bit with the golden model",
        description="Measures cycles of single operations against the peak of the cores and of the bus. Results are "
        "kept: of a run that was stopped, or of more cases, only what is missing is run. Exit status 1 on a mismatch, "
        "or if a case takes 2% more cycles than the baseline.",
    )
    bench.add_argument("--config", help=f"configuration: {names} (default: paper, tiny for the small set)")
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

    energy = commands.add_parser(
        "energy",
        help="energy of events in gates, and of a training step with FGMP and without",
        description="Synthesises PE, core, encoder and decoder, simulates their gates with real operands, and puts the "
        "energy of a training step of ResNet-18 together. What is finished is kept in the folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _config_argument(energy, "paper")
    energy.add_argument("--liberty", type=Path, help="cell library, .lib or .lib.gz (default: osu018)")
    energy.add_argument("--nm", type=float, help="feature size of the library's technology (default: by its name)")
    _network_arguments(energy, width=64, image=32, batch=16)
    energy.add_argument("--warm-up", type=int, default=16, help="steps of the golden model before it")
    energy.add_argument("--folder", type=Path, default=Path("build/energy"), help="netlists, simulations, results")
    energy.add_argument("--json", type=Path, metavar="FILE", help="results (default: build/energy/LIBRARY.json)")
    energy.add_argument("--report", type=Path, metavar="FILE", help="page (default: build/reports/energy/LIBRARY.html)")

    synth = commands.add_parser(
        "synth",
        help="area and critical paths of a chip in a cell library, by block",
        description="Synthesises every distinct block of a chip, finds the slowest paths of each, and compares the PE "
        "with its peers. Finished blocks are kept: a run that was stopped goes on.",
    )
    synth.add_argument("--config", default="tiny", help=f"configuration: {names} (default: tiny)")
    synth.add_argument("--liberty", type=Path, metavar="FILE", help="cell library, .lib or .lib.gz (default: osu018)")
    synth.add_argument("--only", metavar="REGEX", help="critical paths of just the blocks in whose names this is found")
    synth.add_argument("--json", type=Path, metavar="FILE", help="results (default: build/synth/CONFIG-LIBRARY.json)")
    synth.add_argument(
        "--report", type=Path, metavar="FILE", help="page of HTML (default: build/reports/synth/CONFIG-LIBRARY.html)"
    )

    fpga = commands.add_parser(
        "fpga",
        help="the chip through synthesis, place and route for a Lattice ECP5",
        description="Synthesises the chip with Yosys, places and routes it with nextpnr, and reports what it takes and "
        "how fast it is. Exit status 1 if a clock is slower than the frequency.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _config_argument(fpga, "edge")
    fpga.add_argument("--block", default="chip", help="a block alone, as core, load or vector")
    fpga.add_argument("--device", default="85k", help="25k, 45k or 85k")
    fpga.add_argument("--package", default="CABGA756", help="package of the device")
    fpga.add_argument("--speed", type=int, default=6, help="speed grade, 6 to 8; 8 is the fastest")
    fpga.add_argument("--frequency", type=float, default=50.0, help="clock to aim at, in MHz")
    fpga.add_argument("--seed", type=int, default=1, help="of the placer")
    fpga.add_argument("--pack-only", action="store_true", help="stop after packing: utilisation alone")
    fpga.add_argument("--work", type=Path, default=Path("build/fpga"), help="folder of Verilog, netlist and logs")
    fpga.add_argument("-o", "--output", type=Path, default=Path("build/reports/fpga"), help="folder of the report")

    info = commands.add_parser("info", help="configurations, or one in detail with its register map")
    info.add_argument("config", nargs="?", help=f"one of {names}")
    info.add_argument("--registers", action="store_true", help="print the register map")
    info.add_argument("--commands", action="store_true", help="print the fields of the commands")
    return parser


def _train_step(arguments: argparse.Namespace) -> int:
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from lnpu.train_step import Settings, run

    names = (
        "config",
        "data",
        "width",
        "image",
        "batch",
        "steps",
        "stem",
        "formats",
        "dense",
        "seed",
        "rate",
        "loss_scale",
        "stall",
    )
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    columns = (
        TextColumn("{task.description:<48}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(text: str, part: float) -> None:
            if text not in tasks:
                for task in tasks.values():
                    bars.update(task, completed=1.0)
                tasks[text] = bars.add_task(text, total=1.0)
            bars.update(tasks[text], completed=part)

        report = run(settings, arguments.output, progress)
    ema = report["ema_bits"]
    for number, step in enumerate(report["steps"], start=1):
        print(f"step {number}: loss {step['loss']:.6f} (golden {step['golden_loss']:.6f}), {step['cycles']:,} cycles")
    print(
        f"{report['mismatches']} mismatches in {report['elements']:,} elements, {report['cycles']:,} cycles, "
        f"utilisation {report['utilization']:.1%}, "
        f"{report['skipped_zero'] + report['skipped_padding']:,} zeros skipped, "
        f"EMA {ema['fgmp'] / ema['fp16'] - 1:+.1%} against FP16, report {report['report']}"
    )
    if report["ema_unpredicted_bits"]:
        print(f"external memory access differs from the golden model's by {report['ema_unpredicted_bits']:,} bits")
    return 1 if report["mismatches"] or report["ema_unpredicted_bits"] else 0


def _replay(arguments: argparse.Namespace) -> int:
    from lnpu.train_step import Settings

    if importlib.util.find_spec("distributed") is None:
        raise ToolError("distributed missing: run `pip install 'lnpu[study]'` or `make setup-study`")
    from lnpu.replay.run import replay, table

    config = get_config(arguments.config)
    if arguments.acc_bits is not None:
        config = config.replace(acc_bits=arguments.acc_bits)
    for name in ("step", "workers"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(arguments, name)!r}")
    names = ("config", "data", "width", "image", "batch", "stem", "formats", "dense", "seed", "rate", "loss_scale")
    settings = Settings(
        **{name: getattr(arguments, name) for name in names},
        steps=arguments.step,
        memory=1 << config.address_bits,
    )
    report = replay(
        settings,
        config,
        arguments.results,
        scheduler=arguments.scheduler,
        workers=arguments.workers,
        only=arguments.only,
        distinct=arguments.distinct,
        tell=lambda text: print(text, flush=True),
    )
    print(table(report))
    total = report["total"]
    print(
        f"{total.get('segments', 0)} segments, {total.get('mismatches', 0)} mismatches in "
        f"{total.get('elements', 0):,} elements, {total.get('unpredicted_bits', 0)} bits of memory access not as "
        f"predicted, {report['wrong']} segments wrong; {report['seconds']:,.0f} s, "
        f"all simulations {total['seconds']:,.0f} s"
    )
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["wrong"] else 0


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


def _verilog(arguments: argparse.Namespace) -> int:
    from lnpu.verilog import check_synthesis, lint, write_verilog

    files = write_verilog(get_config(arguments.config), arguments.output)
    print(f"{len(files)} files in {files[0].parent}")
    if arguments.lint:
        warnings = lint(files)
        print("\n".join(warnings) or "lint: no warnings")
        if warnings:
            return 1
    if arguments.synthesise:
        check_synthesis(files)
        print("synthesis: no latches, loops or multiple drivers")
    return 0


def _integration(arguments: argparse.Namespace) -> int:
    from lnpu.export.write import write_register_views
    from lnpu.verilog import write_verilog

    directory = write_verilog(get_config(arguments.config), arguments.output)[0].parent
    for path in write_register_views(directory):
        print(path)
    return 0


def _mismatches(tensors: dict[str, tuple[int, int]]) -> int:
    """Print the mismatches of tensors; the exit status."""
    for name, (wrong, count) in tensors.items():
        if wrong:
            print(f"{name}: {wrong} mismatches in {count:,} elements")
    wrong = sum(wrong for wrong, _ in tensors.values())
    print(f"{wrong} mismatches in {sum(count for _, count in tensors.values()):,} elements of {len(tensors)} tensors")
    return 1 if wrong else 0


def _export_step(arguments: argparse.Namespace) -> int:
    from lnpu.export.step import ExportedStep

    step = ExportedStep(get_config(arguments.config), batch=arguments.batch, seed=arguments.seed)
    if arguments.check is not None:
        return _mismatches(step.check(arguments.check.read_bytes()))
    for path in step.write(arguments.output):
        print(path)
    return 0


def _soc(arguments: argparse.Namespace) -> int:
    from lnpu.export.soc import run_soc

    result = run_soc(get_config(arguments.config), arguments.output, batch=arguments.batch, seed=arguments.seed)
    print(result.output, end="")
    return _mismatches(result.tensors)


def _load(name: str, path: Path | None) -> Any:
    if path is None:
        raise ValueError(f"--{name} is missing")
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--{name} must be an .npy file: {path}: {error}") from None


def _op(arguments: argparse.Namespace) -> int:
    import golden
    from lnpu.sim import Chip

    operation = arguments.operation
    operands = [_load(name, getattr(arguments, name)) for name in _OPERATIONS[operation]]
    options: dict[str, Any] = {
        f"{name}_format": getattr(arguments, f"{name}_format") for name in _OPERATIONS[operation]
    }
    options |= {"out": arguments.out, "out_scale": arguments.out_scale}
    if operation.startswith("conv2d"):
        options |= {"stride": arguments.stride, "padding": arguments.padding}
    if operation == "conv2d-input-grad":
        if arguments.input_shape is None:
            raise ValueError("--input-shape is missing")
        options["input_shape"] = arguments.input_shape
    if operation == "conv2d-weight-grad":
        if arguments.kernel_shape is None:
            raise ValueError("--kernel-shape is missing")
        options["kernel_shape"] = arguments.kernel_shape
    chip = Chip(arguments.config, stall=arguments.stall)
    function = operation.replace("-", "_")
    result = getattr(chip, function)(*operands, **options)
    np.save(arguments.output, result)
    products = chip.counters["mac16"] + chip.counters["mac8"]
    print(
        f"{arguments.output}: {result.dtype} {result.shape}, {chip.counters['cycles']:,} cycles, "
        f"{products:,} products, "
        f"{chip.counters['skipped_zero'] + chip.counters['skipped_padding']:,} zeros skipped"
    )
    if not arguments.check:
        return 0
    expected = getattr(golden, function)(*operands, **options)
    word = np.uint16 if result.dtype == np.float16 else np.uint32
    wrong = int((np.ascontiguousarray(result).view(word) != np.ascontiguousarray(expected).view(word)).sum())
    print(f"{wrong} mismatches in {result.size:,} elements")
    return 1 if wrong else 0


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


def _energy(arguments: argparse.Namespace) -> int:
    from lnpu.energy.report import lines, write_report
    from lnpu.energy.run import run
    from lnpu.energy.step import StepSettings
    from lnpu.results import write_json
    from lnpu.synth.liberty import read_liberty

    config = get_config(arguments.config)
    settings = StepSettings(
        data=arguments.data,
        width=arguments.width,
        image=arguments.image,
        batch=arguments.batch,
        warm_up=arguments.warm_up,
    )
    liberty = read_liberty(arguments.liberty)
    report = run(
        liberty, config, settings, arguments.folder, size=arguments.nm, progress=lambda text: print(text, flush=True)
    )
    json_path = arguments.json or Path(f"build/energy/{liberty.name}.json")
    report_path = arguments.report or Path(f"build/reports/energy/{liberty.name}.html")
    write_json(json_path, report)
    write_report(report_path, report)
    print("\n".join(lines(report)))
    print(f"results {json_path}, report {report_path}")
    return 0


def _synth(arguments: argparse.Namespace) -> int:
    from lnpu.synth.liberty import read_liberty
    from lnpu.synth.report import write_report
    from lnpu.synth.run import measure
    from lnpu.synth.timing import check_tools

    config = get_config(arguments.config)
    liberty = read_liberty(arguments.liberty)
    check_tools()
    title = f"{config.name}-{liberty.name}"
    result = measure(
        config, liberty, Path("build/synth"), only=arguments.only, progress=lambda text: print(text, flush=True)
    )
    json_path = arguments.json or Path(f"build/synth/{title}.json")
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(result, indent=1) + "\n")
    report_path = arguments.report or Path(f"build/reports/synth/{title}.html")
    print("\n".join(write_report(report_path, result)))
    print(f"results {json_path}, report {report_path}")
    return 0


def _fpga(arguments: argparse.Namespace) -> int:
    from lnpu.fpga.report import lines, write_report
    from lnpu.fpga.run import run

    config = get_config(arguments.config)
    names = ("block", "device", "package", "speed", "frequency", "seed", "pack_only")
    result = run(
        config,
        arguments.work / f"{config.name}-{arguments.block}",
        **{name: getattr(arguments, name) for name in names},
        tell=lambda text: print(text, flush=True),
    )
    path = write_report(arguments.output, result)
    print("\n".join(lines(result)))
    print(f"report {path}")
    return 0 if all(clock["achieved"] >= clock["asked"] for clock in result["clocks"].values()) else 1


def _info(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from lnpu.ctrl.commands import LAYOUTS
    from lnpu.ctrl.registers import register_table

    if arguments.registers:
        print(register_table(), end="")
    if arguments.commands:
        for opcode, layout in LAYOUTS.items():
            print(f"{opcode.name} ({opcode.value:#04x})")
            for name, place in layout:
                print(f"  [{place.offset + place.width - 1}:{place.offset}] {name}")
    configs = [get_config(arguments.config)] if arguments.config else list(CONFIGS.values())
    if arguments.config or not (arguments.registers or arguments.commands):
        for config in configs:
            print(f"{config.name}: {config.macs_fp16} FP16 MACs a cycle, {config.sram_bytes / 1024:.0f} KiB of SRAM")
            if arguments.config:
                for name, value in asdict(config).items():
                    print(f"  {name} = {value}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    run = {
        "train-step": _train_step,
        "replay": _replay,
        "fgmp-study": _fgmp_study,
        "verilog": _verilog,
        "integration": _integration,
        "export-step": _export_step,
        "soc": _soc,
        "op": _op,
        "bench": _bench,
        "energy": _energy,
        "synth": _synth,
        "fpga": _fpga,
        "info": _info,
    }[arguments.command]
    try:
        return run(arguments)
    except (ValueError, TypeError, MemoryError, OSError, ToolError) as error:
        print(f"lnpu {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
