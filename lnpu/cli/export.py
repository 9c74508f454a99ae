"""What others integrate: `verilog`, `integration`, `export-step`, `soc`."""

import argparse
from pathlib import Path
from typing import Any

from lnpu.cli.arguments import Subparsers, config_argument
from lnpu.config import get_config

__all__ = ["add"]


def add(commands: Subparsers) -> None:
    """Add the commands."""
    verilog = commands.add_parser(
        "verilog", help="write the chip's Verilog", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    config_argument(verilog, "tiny")
    verilog.add_argument("-o", "--output", type=Path, help="folder (default: rtl/CONFIG)")
    verilog.add_argument("--lint", action="store_true", help="lint it with Verilator")
    verilog.add_argument("--synthesise", action="store_true", help="check with Yosys that it can be synthesised")

    integration = commands.add_parser(
        "integration",
        help="write the Verilog, and with PeakRDL the C header and HTML of the registers",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    config_argument(integration, "tiny")
    integration.add_argument("-o", "--output", type=Path, help="folder (default: rtl/CONFIG)")

    export = commands.add_parser(
        "export-step",
        help="memory image and C header of training steps for a host in C; check of the memory after them",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    soc = commands.add_parser(
        "soc",
        help="run training steps from C on the example system (examples/soc), compared bit for bit",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for parser_of_step in (export, soc):
        config_argument(parser_of_step, "tiny")
        parser_of_step.add_argument("--batch", type=int, default=4, help="images in the step")
        parser_of_step.add_argument("--steps", type=int, default=2, help="training steps on the same images")
        parser_of_step.add_argument("--formats", default="dynamic", help="dynamic, fgmp, fp16 or fp8")
        parser_of_step.add_argument("--seed", type=int, default=0, help="of images and initial weights")
        parser_of_step.add_argument("-o", "--output", type=Path, default=Path("build/soc"), help="folder")
    export.add_argument("--check", type=Path, metavar="FILE", help="compare the memory in FILE with the golden model")
    verilog.set_defaults(run=_verilog)
    integration.set_defaults(run=_integration)
    export.set_defaults(run=_export_step)
    soc.set_defaults(run=_soc)


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


def _step_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("batch", "steps", "formats", "seed")}


def _export_step(arguments: argparse.Namespace) -> int:
    from lnpu.export.step import ExportedStep

    step = ExportedStep(get_config(arguments.config), **_step_options(arguments))
    if arguments.check is not None:
        return _mismatches(step.check(arguments.check.read_bytes()))
    for path in step.write(arguments.output):
        print(path)
    return 0


def _soc(arguments: argparse.Namespace) -> int:
    from lnpu.export.soc import run_soc

    result = run_soc(get_config(arguments.config), arguments.output, **_step_options(arguments))
    print(result.output, end="")
    return _mismatches(result.tensors)
