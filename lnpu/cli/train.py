"""Training steps on the simulated chip: `train-step`, and `replay`, operation by operation."""

import argparse
import importlib.util
import json
import os
from pathlib import Path

from lnpu.cli.arguments import Subparsers, step_arguments
from lnpu.config import get_config
from lnpu.toolchain import ToolError

__all__ = ["add"]


def add(commands: Subparsers) -> None:
    """Add the commands."""
    train = commands.add_parser(
        "train-step",
        help="training steps of ResNet-18 on the simulated chip, compared bit for bit with the golden model",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    step_arguments(train, config="tiny", width=8, image=8, batch=16)
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
    step_arguments(replay, config="paper", width=64, image=32, batch=1)
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
    train.set_defaults(run=_train_step)
    replay.set_defaults(run=_replay)


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
