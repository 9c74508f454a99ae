"""Critical paths of netlists, from the static timing analyser OpenSTA."""

import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lnpu.synth.liberty import Liberty
from lnpu.synth.macros import Macro
from lnpu.synth.netlist import Netlist
from lnpu.synth.yosys import SynthesisError
from lnpu.toolchain import CLOCK_GATE, ToolError

__all__ = ["GROUPS", "TimingError", "TimingPath", "check_tools", "critical_paths", "macro_library", "period"]

GROUPS = {
    "register": ("register", "register"),
    "to_macro": ("register", "macro"),
    "from_macro": ("macro", "register"),
    "macro": ("macro", "macro"),
    "input": ("input", "register"),
    "input_to_macro": ("input", "macro"),
    "output": ("register", "output"),
    "macro_to_output": ("macro", "output"),
    "through": ("input", "output"),
}
"""Groups of paths: what they start at and what they end at."""

_PERIOD = 1e-6
"""Clock period of the analysis in seconds, longer than any path; a path needs this less its slack."""


class TimingError(SynthesisError):
    """OpenSTA refused a netlist; the message ends with the end of its log."""


@dataclass(frozen=True)
class TimingPath:
    """The slowest path of a group.

    Attributes
    ----------
    delay : float
        What it takes of a clock period in ns: from the clock's edge (or the input) to the output, or with the
        register's setup time.
    start, end : str
        Pin or port where it starts and ends, with the instances that it is in.
    """

    delay: float
    start: str
    end: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def check_tools() -> None:
    """Raise `ToolError`, naming the Debian package to install, unless OpenSTA is on PATH."""
    if shutil.which("sta") is None:
        raise ToolError("missing system tool: run `apt-get install opensta` (or your system's equivalent)")


def critical_paths(top: str, netlists: Mapping[str, Netlist], liberty: Liberty, folder: Path) -> dict[str, TimingPath]:
    """The slowest path of each group in a block and the blocks inside it.

    Gates as in the netlists, no wires, an ideal clock; inputs come at the clock's edge from an ideal driver, outputs
    have no load, and reset is no path. SRAM macros take neither access nor setup time: paths end at their inputs and
    begin anew at their outputs, so the period less the delay of a path is what a macro may take for its own part. The
    clock passes clock gates in no time; paths end at their enables.

    Parameters
    ----------
    top : str
        Module of the block.
    netlists : mapping of str to Netlist
        By module: `top` and all below it.
    liberty : Liberty
        The library that they are made of.
    folder : Path
        Where files go; the library goes beside it, for all blocks.

    Returns
    -------
    dict of str to TimingPath
        By group (see `GROUPS`); groups without paths are left out.

    Raises
    ------
    TimingError
        If OpenSTA refuses the netlist.
    ToolError
        If OpenSTA is not installed.
    """
    check_tools()
    if top == CLOCK_GATE.stem:
        return {}
    parts = _below(top, netlists)
    macros = sorted({macro for part in parts for macro, _ in part.macros})
    if not any(part.cells for part in parts):
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "macros.lib").write_text(macro_library(macros, gate=any(part.top == CLOCK_GATE.stem for part in parts)))
    (folder / "timing.tcl").write_text(_script(top, netlists, liberty.plain(folder.parent)))
    result = subprocess.run(
        ["sta", "-no_splash", "-exit", "timing.tcl"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    log = result.stdout + result.stderr
    if result.returncode or "\nFINISHED\n" not in log:
        raise TimingError(f"OpenSTA refused {top}:\n" + "\n".join(log.strip().splitlines()[-20:]))
    found = {}
    for line in log.splitlines():
        if line.startswith("PATH "):
            _, group, slack, start, end = line.split(" ", 4)
            seconds = _PERIOD - float(slack) * liberty.time_unit
            found[group] = TimingPath(delay=round(seconds * 1e9, 4), start=start, end=end)
    return found


def period(paths: Mapping[str, TimingPath]) -> float:
    """Shortest clock period in ns that the paths inside a block allow, if macros take no time; 0 without any."""
    inside = ("register", "to_macro", "from_macro", "macro")
    return max((paths[group].delay for group in inside if group in paths), default=0.0)


def macro_library(macros: Iterable[Macro], *, gate: bool = False) -> str:
    """A Liberty file of SRAM macros without access and setup times, and of a clock gate that takes no time either."""
    sizes = sorted({width for macro in macros for _, width in macro.ports.values()})
    types = "".join(
        f"  type (bits_{n}) {{ base_type : array; data_type : bit; "
        f"bit_width : {n}; bit_from : {n - 1}; bit_to : 0; }}\n"
        for n in sizes
    )
    cells = "".join(_macro_cell(macro) for macro in macros)
    return (
        'library (sram) {\n  delay_model : table_lookup;\n  time_unit : "1ns";\n  voltage_unit : "1V";\n'
        '  current_unit : "1mA";\n  pulling_resistance_unit : "1kohm";\n  leakage_power_unit : "1nW";\n'
        f"  capacitive_load_unit (1, pf);\n{types}{cells}{_gate_cell() if gate else ''}}}\n"
    )


def _macro_cell(macro: Macro) -> str:
    edges = "".join(f' {kind} (scalar) {{ values ("0"); }}' for kind in ("rise_constraint", "fall_constraint"))
    checks = f'timing () {{ related_pin : "clk"; timing_type : setup_rising;{edges} }}'
    delays = "cell_rise", "cell_fall", "rise_transition", "fall_transition"
    edges = "".join(f' {kind} (scalar) {{ values ("0"); }}' for kind in delays)
    access = f'timing () {{ related_pin : "clk"; timing_type : rising_edge;{edges} }}'
    pins = ["    pin (clk) { direction : input; clock : true; capacitance : 0; }\n"]
    for name, (direction, width) in macro.ports.items():
        if name == "clk":
            continue
        kind = f"bus ({name}) {{ bus_type : bits_{width};" if width > 1 else f"pin ({name}) {{"
        load = "capacitance : 0; " if direction == "input" else ""
        pins.append(f"    {kind} direction : {direction}; {load}{checks if direction == 'input' else access} }}\n")
    return f"  cell ({macro.name}) {{\n    area : 0;\n{''.join(pins)}  }}\n"


def _gate_cell() -> str:
    edges = "".join(f' {kind} (scalar) {{ values ("0"); }}' for kind in ("rise_constraint", "fall_constraint"))
    check = f'timing () {{ related_pin : "clk"; timing_type : setup_rising;{edges} }}'
    delays = "cell_rise", "cell_fall", "rise_transition", "fall_transition"
    edges = "".join(f' {kind} (scalar) {{ values ("0"); }}' for kind in delays)
    enables = "".join(
        f"    pin ({name}) {{ direction : input; capacitance : 0; {kind} : true; {check} }}\n"
        for name, kind in (("enable", "clock_gate_enable_pin"), ("test_enable", "clock_gate_test_pin"))
    )
    return (
        f"  cell ({CLOCK_GATE.stem}) {{\n    area : 0;\n    clock_gating_integrated_cell : latch_posedge_precontrol;\n"
        "    pin (clk) { direction : input; clock : true; clock_gate_clock_pin : true; capacitance : 0; }\n"
        f"{enables}    pin (gated_clk) {{ direction : output; clock_gate_out_pin : true; "
        f'timing () {{ related_pin : "clk"; timing_sense : positive_unate; timing_type : combinational;{edges} }} }}\n'
        "  }\n"
    )


def _below(top: str, netlists: Mapping[str, Netlist]) -> list[Netlist]:
    """The netlists of a block and of all below it, each once."""
    names = [top]
    for name in names:
        names += [child for child in netlists[name].children if child not in names]
    return [netlists[name] for name in names]


def _cell_paths(top: str, netlists: Mapping[str, Netlist]) -> tuple[list[str], list[str]]:
    """Hierarchical names of the SRAM macros in a block, and of the clock gates."""
    macros: list[str] = []
    gates: list[str] = []
    for instance, module in netlists[top].instances.items():
        if module == CLOCK_GATE.stem:
            gates.append(instance)
        elif module in netlists:
            for found, inner in zip((macros, gates), _cell_paths(module, netlists), strict=True):
                found += [f"{instance}/{path}" for path in inner]
        else:
            macros.append(instance)
    return macros, gates


def _script(top: str, netlists: Mapping[str, Netlist], library: Path) -> str:
    parts = _below(top, netlists)
    # An analyser sees that the latch of a clock gate is transparent, not that its enable must be there before the edge.
    macros, gates = _cell_paths(top, netlists)
    cells = [part for part in parts if part.top != CLOCK_GATE.stem]
    reads = "".join(f"read_verilog {{{part.path.resolve()}}}\n" for part in cells)
    searches = "".join(f"slowest {group} $from_{start} $to_{end}\n" for group, (start, end) in GROUPS.items())
    return f"""read_liberty {{{library}}}
{"read_liberty macros.lib" if len(cells) < len(parts) or any(part.macros for part in parts) else ""}
{reads}link_design {top}
create_clock -name clk -period {_PERIOD / 1e-9:g} [get_ports -quiet clk]
set from_input [list]
foreach port [all_inputs] {{
    if {{[lsearch {{clk rst}} [get_full_name $port]] < 0}} {{ lappend from_input $port }}
}}
set to_output [all_outputs]
if {{[llength $from_input]}} {{ set_input_delay 0 -clock clk $from_input }}
if {{[llength $to_output]}} {{ set_output_delay 0 -clock clk $to_output }}
if {{[llength [get_ports -quiet rst]]}} {{ set_false_path -from [get_ports rst] }}
foreach path {{{" ".join(macros)}}} {{ set macro($path) 1 }}
proc sort_pins {{pins registers macros}} {{
    global macro
    upvar $registers r $macros m
    set r [list]
    set m [list]
    foreach pin $pins {{
        set name [get_full_name $pin]
        if {{[info exists macro([string range $name 0 [expr {{[string last / $name] - 1}}]])]}} {{
            lappend m $pin
        }} else {{ lappend r $pin }}
    }}
}}
sort_pins [all_registers -clock_pins] from_register from_macro
sort_pins [all_registers -data_pins] to_register to_macro
foreach gate {{{" ".join(gates)}}} {{ lappend to_register [get_pins $gate/enable] }}
proc slowest {{group from to}} {{
    if {{![llength $from] || ![llength $to]}} {{ return }}
    foreach path [find_timing_paths -from $from -to $to] {{
        set start [get_full_name [get_property $path startpoint]]
        set end [get_full_name [get_property $path endpoint]]
        puts "PATH $group [get_property $path slack] $start $end"
    }}
}}
{searches}puts FINISHED
"""
