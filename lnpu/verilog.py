"""The chip as Verilog: emission with a table of its ports, lint, and a check that it can be synthesised."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from amaranth.hdl import Shape
from amaranth.lib.wiring import Out

from lnpu.config import CONFIGS, ChipConfig, get_config
from lnpu.export.write import write_collateral
from lnpu.hdl import Block, emit_verilog
from lnpu.synth.yosys import SynthesisError, run_yosys
from lnpu.toolchain import CLOCK_GATE, RTL, ToolError, verilator_environment

__all__ = ["SynthesisError", "check_synthesis", "lint", "port_table", "write_verilog"]

WAIVERS = RTL / "lint_waivers.vlt"

_GROUPS = {
    "control": "AXI4-Lite slave: registers",
    "memory_read": "AXI4 master, reads",
    "memory_write": "AXI4 master, writes",
}
_CHANNELS = {"aw": "write address", "w": "write data", "b": "write response", "ar": "read address", "r": "read data"}
_FIELDS = {
    "valid": "{} is valid",
    "ready": "{} is accepted",
    "addr": "{}, in bytes",
    "len": "words in the burst, less one",
    "size": "log2 of the bytes in a word",
    "burst": "burst type, always INCR",
    "id": "transaction identifier ({})",
    "cache": "memory type ({})",
    "prot": "protection ({})",
    "data": "{}",
    "strb": "bytes of the write data to be written",
    "last": "last word of the burst ({})",
    "resp": "OKAY, SLVERR or DECERR ({})",
}
_SINGLE = {
    "clk": "clock; everything happens at its rising edge",
    "rst": "reset, synchronous, active high",
    "interrupt": "level: a program has ended, and interrupts are enabled",
}


def write_verilog(config: ChipConfig, directory: Path | None = None, *, top: Block | None = None) -> list[Path]:
    """Write a chip's Verilog, its port table (`PORTS.md`) and a list of its files (`files.f`).

    Beside a whole chip go the files of `lnpu.export.write.write_collateral`.

    Parameters
    ----------
    config : ChipConfig
        Configuration of the chip.
    directory : Path or None
        Where to (default: `rtl/<config.name>`).
    top : Block or None
        Write this block instead of `lnpu.chip.Chip(config=config)`.

    Returns
    -------
    list of Path
        The Verilog files, top module first, the models of SRAM and clock gate last.
    """
    chip = top is None
    if top is None:
        from lnpu.chip import Chip

        top = Chip(config=config)
    directory = RTL / config.name if directory is None else Path(directory)
    files = [*emit_verilog(top, directory), *sorted((RTL / "sram").glob("*.v")), CLOCK_GATE]
    (directory / "PORTS.md").write_text(port_table(top, config))
    (directory / "files.f").write_text("".join(f"{os.path.relpath(path, directory)}\n" for path in files))
    if chip:
        write_collateral(config, directory, files, top)
    return files


def port_table(top: Block, config: ChipConfig) -> str:
    """Markdown table of the ports of `top`."""
    ports: list[tuple[str, str, int, str]] = []
    if not top.combinational:
        ports += [(name, "input", 1, _SINGLE[name]) for name in ("clk", "rst")]
    for path, member, _ in top.signature.flatten(top):
        name = "__".join(map(str, path))
        direction = "output" if member.flow is Out else "input"
        ports.append((name, direction, Shape.cast(member.shape).width, _description(path)))
    groups = {name.split("__")[0] for name, *_ in ports}
    lines = [
        f"# Ports of {top.module_name}, configuration {config.name}",
        "",
        *(f"- `{group}__*`: {text}" for group, text in _GROUPS.items() if group in groups),
        "",
        "| port | direction | width | description |",
        "|---|---|---|---|",
        *(f"| `{name}` | {direction} | {width} | {text} |" for name, direction, width, text in ports),
        "",
    ]
    return "\n".join(lines)


def _description(path: Sequence[str | int]) -> str:
    name = str(path[-1])
    if len(path) == 1 or path[0] not in _GROUPS:
        return _SINGLE.get(name, "")
    for channel in sorted(_CHANNELS, key=len, reverse=True):
        field = name.removeprefix(channel)
        if field != name and field in _FIELDS:
            return _FIELDS[field].format(_CHANNELS[channel])
    return ""


def lint(files: Iterable[Path], *, top: str | None = None) -> list[str]:
    """Run `verilator --lint-only -Wall` with the waivers in `rtl/lint_waivers.vlt`.

    Parameters
    ----------
    files : iterable of Path
        Verilog files of one design.
    top : str or None
        Its top module (default: the name of the first file).

    Returns
    -------
    list of str
        What it found, each with its source lines; empty if the design is clean.
    """
    sources = [Path(path) for path in files]
    command = [
        "verilator", "--lint-only", "-Wall", "-Wno-fatal", "--no-timing", "--top-module", top or sources[0].stem,
        str(WAIVERS), *map(str, sources),
    ]  # fmt: skip
    result = subprocess.run(command, env=verilator_environment(), capture_output=True, text=True)
    text = re.sub(r"^ +\.\.\. (For warning|Use \"/\*|See the manual).*\n", "", result.stderr, flags=re.MULTILINE)
    found = re.split(r"^(?=%(?:Warning|Error))", text, flags=re.MULTILINE)[1:]
    if result.returncode and not found:
        found = [result.stderr.strip() or f"verilator ended with {result.returncode}"]
    return [item.rstrip() for item in found]


def check_synthesis(files: Iterable[Path], *, top: str | None = None) -> list[str]:
    """Let Yosys read a design and check that it is plain synchronous logic.

    Every module has its definition (`hierarchy -check`), and after `proc` there is no latch (but in the clock gate), no
    net with several drivers or none, and no combinational loop (`check -assert`).

    Parameters
    ----------
    files : iterable of Path
        Verilog files of one design.
    top : str or None
        Its top module (default: the name of the first file).

    Returns
    -------
    list of str
        Yosys' warnings.

    Raises
    ------
    SynthesisError
        If a check fails.
    ToolError
        If pyosys is not installed.
    """
    sources = [Path(path) for path in files]
    passes = [
        # The clock gate, with the one latch, is a black box.
        *(f'read_verilog {"-lib" if path.stem == CLOCK_GATE.stem else "-defer"} "{path}"' for path in sources),
        f"hierarchy -check -top {top or sources[0].stem}",
        "proc",
        "select -assert-none t:$dlatch t:$adlatch t:$dlatchsr t:$_DLATCH_* t:$_DLATCHSR_*",
        "flatten",
        "check -assert",
    ]
    return [line for line in run_yosys(passes).splitlines() if line.startswith("Warning:")]


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lnpu.verilog", description="Write the Verilog of a chip.")
    parser.add_argument("config", nargs="?", default="tiny", help=f"one of {', '.join(CONFIGS)} (default: tiny)")
    parser.add_argument("--directory", type=Path, help="where to (default: rtl/<config>)")
    parser.add_argument("--lint", action="store_true", help="run Verilator's lint on it, and Yosys' synthesis checks")
    arguments = parser.parse_args()
    try:
        config = get_config(arguments.config)
    except ValueError as error:
        parser.error(str(error))
    files = write_verilog(config, arguments.directory)
    print(f"{files[0].parent}: {len(files)} Verilog files, top module {files[0].stem}")
    if not arguments.lint:
        return 0
    findings = lint(files)
    print("\n".join([*findings, f"lint: {len(findings)} findings"]))
    try:
        warnings = check_synthesis(files)
    except ToolError as error:
        print(error)
        return 1
    print("\n".join([*warnings, f"synthesis check: passed, {len(warnings)} warnings"]))
    return bool(findings)


if __name__ == "__main__":
    sys.exit(_main())
