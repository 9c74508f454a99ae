"""Area, timing and energy of gates, and an FPGA: `energy`, `synth`, `fpga`."""

import argparse
import json
from pathlib import Path

from lnpu.cli.arguments import CONFIG_NAMES, Subparsers, config_argument, network_arguments
from lnpu.config import get_config

__all__ = ["add"]


def add(commands: Subparsers) -> None:
    """Add the commands."""
    energy = commands.add_parser(
        "energy",
        help="energy of events in gates, and of a training step with FGMP and without",
        description="Synthesises PE, core, encoder and decoder, simulates their gates with real operands, and puts the "
        "energy of a training step of ResNet-18 together. What is finished is kept in the folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    config_argument(energy, "paper")
    energy.add_argument("--liberty", type=Path, help="cell library, .lib or .lib.gz (default: osu018)")
    energy.add_argument("--nm", type=float, help="feature size of the library's technology (default: by its name)")
    network_arguments(energy, width=64, image=32, batch=16)
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
    synth.add_argument("--config", default="tiny", help=f"configuration: {CONFIG_NAMES} (default: tiny)")
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
    config_argument(fpga, "edge")
    fpga.add_argument("--block", default="chip", help="a block alone, as core, load or vector")
    fpga.add_argument("--device", default="85k", help="25k, 45k or 85k")
    fpga.add_argument("--package", default="CABGA756", help="package of the device")
    fpga.add_argument("--speed", type=int, default=6, help="speed grade, 6 to 8; 8 is the fastest")
    fpga.add_argument("--frequency", type=float, default=50.0, help="clock to aim at, in MHz")
    fpga.add_argument("--seed", type=int, default=1, help="of the placer")
    fpga.add_argument("--pack-only", action="store_true", help="stop after packing: utilisation alone")
    fpga.add_argument("--work", type=Path, default=Path("build/fpga"), help="folder of Verilog, netlist and logs")
    fpga.add_argument("-o", "--output", type=Path, default=Path("build/reports/fpga"), help="folder of the report")
    energy.set_defaults(run=_energy)
    synth.set_defaults(run=_synth)
    fpga.set_defaults(run=_fpga)


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
