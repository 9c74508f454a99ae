"""Synthesis: cell libraries, netlists, buffers, static timing analysis, treemap."""

import gzip
import shutil
import subprocess

import pytest

from lnpu.mem.fifo import RegisterFifo
from lnpu.pe.pe import Pe
from lnpu.synth.fanout import limit_fanout
from lnpu.synth.liberty import OSU018, Latch, LibertyError, read_liberty
from lnpu.synth.macros import Macro, name_macros
from lnpu.synth.netlist import cell_models, synthesise, synthesise_blocks
from lnpu.synth.plots import squarify
from lnpu.synth.timing import critical_paths
from lnpu.synth.yosys import SynthesisError, run_yosys
from verif.resting import Resting
from verif.runner import run

LIBRARY = """
/* cell (ghost) { area : 1; } */
library (small) {
  time_unit : "1ps";
  capacitive_load_unit (1, ff);
  nom_voltage : 1.1;
  cell ("NAND2X1") { area : 4; pin(A) { direction : input; } pin(B) { direction : input; }
    pin(Y) { direction : output; function : "!(A B)"; } }
  cell (nand2b_1) { area : 3; pin(A) { direction : input; } pin(Y) { direction : output; function : "!(A)"; } }
  cell (BUF1) { pin(A) { direction : input; } pin(Y) { direction : output; function : "A"; } area : 5.5; }
  cell (DFF) { ff (Q, QN) { clocked_on : "CLK"; next_state : "D"; } area : 9;
    pin(Q) { direction : output; function : "Q"; } }
}
"""

needs_osu018 = pytest.mark.skipif(not OSU018.exists(), reason="needs qflow-tech-osu018")
needs_sta = pytest.mark.skipif(shutil.which("sta") is None, reason="needs opensta")


def write(path, text=LIBRARY):
    path.write_text(text)
    return path


def test_liberty(tmp_path):
    liberty = read_liberty(write(tmp_path / "small.lib"))
    assert liberty.name == "small"
    assert liberty.areas == {"NAND2X1": 4.0, "nand2b_1": 3.0, "BUF1": 5.5, "DFF": 9.0}
    assert liberty.nand2_area == 4.0
    assert liberty.sequential == {"DFF"}
    assert liberty.buffer == ("BUF1", "A", "Y")
    assert (liberty.time_unit, liberty.capacitance_unit, liberty.voltage) == (1e-12, 1e-15, 1.1)
    packed = tmp_path / "small.lib.gz"
    packed.write_bytes(gzip.compress(LIBRARY.encode()))
    assert read_liberty(packed).areas == liberty.areas
    assert "ghost" not in read_liberty(packed).plain(tmp_path).read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("library (small)", "lib (small)", "not a Liberty file"),
        ("area : 9;", "", "cell DFF has no area"),
        ('time_unit : "1ps";', "", "time_unit"),
        ("capacitive_load_unit (1, ff);", "", "capacitive_load_unit"),
        ("nom_voltage : 1.1;", "", "nom_voltage"),
        ('pin(Q) { direction : output; function : "Q"; } }\n}', "", "cell DFF are not closed"),
    ],
)
def test_bad_liberty(tmp_path, old, new, message):
    assert old in LIBRARY
    with pytest.raises(LibertyError, match=message):
        read_liberty(write(tmp_path / "bad.lib", LIBRARY.replace(old, new)))


def test_liberty_without(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.lib"):
        read_liberty(tmp_path / "none.lib")
    with pytest.raises(LibertyError, match="nand2"):
        _ = read_liberty(write(tmp_path / "a.lib", LIBRARY.replace("NAND2X1", "NOR2X1"))).nand2_area


LATCHES = """
  cell (LATR) { area : 2; latch (IQ, IQN) { data_in : "D"; enable : "!GN"; clear : "!R"; }
    pin(Q) { direction : output; function : "IQ"; } }
  cell (LATP) { area : 5; latch ("IQ","IQN") { enable : "G"; data_in : "D"; } pin("D") { direction : input; }
    pin("Q") { direction : output; function : "IQ"; } }
  cell (LATN) { area : 7; latch (IQ, IQN) { data_in : "D"; enable : "(!GN)"; } pin(D) { direction : input; }
    pin(QN) { direction : output; function : "IQN"; } pin(Q) { direction : output; function : "IQ"; } }
  cell (DFF)"""


def test_latch(tmp_path):
    """The latch of clock gates: without reset, and open while its enable is low if there is such a one."""
    text = LIBRARY.replace("  cell (DFF)", LATCHES)
    liberty = read_liberty(write(tmp_path / "latches.lib", text))
    assert set(liberty.latches) == {"LATP", "LATN"}
    assert liberty.latch == ("LATN", Latch(data="D", enable="GN", low=True, output="Q"))
    assert liberty.clocks == {"DFF": "CLK"}
    with pytest.raises(LibertyError, match="needs a latch"):
        _ = read_liberty(write(tmp_path / "small.lib")).latch


def test_macro_names():
    text = """  lnpu_sram_1r1w #(
    .ADDR_BITS(32'd5),
    .DEPTH(32'd32),
    .GRANULARITY(32'd8),
    .WIDTH(32'd64)
  ) buffer (
    .clk(clk)
  );
"""
    named, macros = name_macros(text)
    assert macros == {Macro(depth=32, width=64, granularity=8)}
    assert named == "  lnpu_sram_32x64_8 buffer (\n    .clk(clk)\n  );\n"


def test_fanout(tmp_path):
    """Nets with 42 and 11 pins, ports among them; the trees drive every pin once, and no net more than 8."""
    liberty = read_liberty(write(tmp_path / "small.lib"))
    directions = {"A": "input", "B": "input", "Y": "output"}
    cells = {
        f"gate{i}": {
            "type": "NAND2X1",
            "port_directions": directions,
            "connections": {"A": [3], "B": [2], "Y": [9 + i]},
        }
        for i in range(40)
    }
    ports = {
        "clk": {"direction": "input", "bits": [2]},
        "i": {"direction": "input", "bits": [3]},
        "o": {"direction": "output", "bits": [3, 9]},
        "many": {"direction": "output", "bits": [60]},
    }
    cells["wide"] = {"type": "NAND2X1", "port_directions": directions, "connections": {"A": [3], "B": [2], "Y": [60]}}
    for i in range(10):
        cells[f"reader{i}"] = {
            "type": "NAND2X1",
            "port_directions": directions,
            "connections": {"A": [60], "B": [2], "Y": [70 + i]},
        }
    names = {"o": {"bits": [3, 9]}, "many": {"bits": [60]}, "open": {"bits": [80, 82]}}
    module = {"ports": ports, "cells": cells, "netnames": names}
    assert limit_fanout(module, liberty, 8) >= 6
    driver, loads = {}, {}
    for name, cell in module["cells"].items():
        for pin, (bit,) in cell["connections"].items():
            if cell["port_directions"][pin] == "output":
                assert bit not in driver
                driver[bit] = (name, cell["connections"]["A"][0])
            else:
                loads[bit] = loads.get(bit, 0) + 1
    assert loads.pop(2) == 51  # the clock
    assert max(loads.values()) <= 8
    assert loads[3] <= 4  # the port itself: a block is a small load to its neighbours
    assert not {80, 82} & set(driver)  # a name of nets that nothing is connected to stays so

    def source(bit):
        while bit != 3:
            name, bit = driver[bit]
            assert name.startswith("_fanout")
        return bit

    assert {source(module["cells"][f"gate{i}"]["connections"]["A"][0]) for i in range(40)} == {3}
    assert ports["o"]["bits"][0] != 3
    assert source(ports["o"]["bits"][0]) == 3
    # A port has one net, whether a tree of its own drives it or not.
    assert ports["many"]["bits"][0] != 60
    assert all(names[port]["bits"] == ports[port]["bits"] for port in ("o", "many"))


@needs_osu018
def test_area_and_paths(tmp_path):
    liberty = read_liberty()
    netlist = synthesise(RegisterFifo(shape=4, depth=4), liberty, tmp_path)
    assert netlist.area == sum(liberty.areas[cell] * count for cell, count in netlist.cells.items()) > 0
    flops = sum(count for cell, count in netlist.cells.items() if cell in liberty.sequential)
    assert flops >= 16
    assert 0 < netlist.sequential < netlist.area
    record = netlist.path.stat().st_mtime_ns
    assert synthesise(RegisterFifo(shape=4, depth=4), liberty, tmp_path) == netlist
    assert netlist.path.stat().st_mtime_ns == record


@needs_osu018
def test_equivalent(tmp_path):
    """The gates and the RTL of a FIFO, with the models of the cells, proven equal by induction."""
    liberty = read_liberty()
    block = RegisterFifo(shape=2, depth=2)
    netlist = synthesise(block, liberty, tmp_path)
    rtl = tmp_path / "rtl" / block.module_name / f"{block.module_name}.v"
    script = [
        f"read_verilog {rtl}", "proc", "flatten", f"rename {block.module_name} gold",
        f"read_verilog {netlist.path}", f"read_verilog {cell_models(liberty, tmp_path)}", "proc",
        f"flatten {block.module_name}", f"rename {block.module_name} gate", "setattr -unset init w:*",
        "equiv_make gold gate equiv", "hierarchy -top equiv", "opt_clean", "equiv_simple -undef", "equiv_induct",
    ]  # fmt: skip
    run_yosys([*script, "equiv_status -assert"])


@needs_osu018
@needs_sta
def test_path_order(tmp_path):
    """A PE's adder is slower than a FIFO, and a PE's slowest path ends in the register of its sum."""
    liberty = read_liberty()
    delays = {}
    for block in (RegisterFifo(shape=4, depth=4), Pe(acc_bits=97)):
        netlist = synthesise(block, liberty, tmp_path)
        paths = critical_paths(netlist.top, {netlist.top: netlist}, liberty, tmp_path / "sta")
        assert paths["register"].end.endswith("/D")
        delays[netlist.top] = paths["register"].delay
    small, large = delays.values()
    assert 0.5 < small < large < 100


@needs_osu018
@needs_sta
def test_clock_gate(tmp_path):
    """A latch and an AND; the clock reaches what is behind it, and its enable is the end of a path."""
    liberty = read_liberty()
    netlists = synthesise_blocks(Resting(), liberty, tmp_path)
    assert {"LATCH", "AND2X2"} <= netlists["lnpu_clock_gate"].cells.keys()
    assert netlists["lnpu_resting"].children == {"lnpu_nibble": 1, "lnpu_clock_gate": 1}
    paths, inner = (
        critical_paths(top, netlists, liberty, tmp_path / "sta" / top) for top in ("lnpu_resting", "lnpu_nibble")
    )
    assert paths["register"].start.startswith("counter/")
    assert paths["register"].delay == pytest.approx(inner["register"].delay)
    folder = tmp_path / "sta" / "lnpu_resting"
    (folder / "more.tcl").write_text((folder / "timing.tcl").read_text() + "report_checks -to gate/enable\n")
    result = subprocess.run(["sta", "-no_splash", "-exit", "more.tcl"], cwd=folder, capture_output=True, text=True)
    assert "rising clock gating-check end-point" in result.stdout
    assert critical_paths("lnpu_clock_gate", netlists, liberty, tmp_path / "sta" / "gate") == {}


@needs_osu018
def test_clock_gate_in_gates():
    """The counter behind the gate in gates: it counts the cycles in which it may."""
    run(Resting(), "verif.resting_tb", gates=read_liberty())


def test_refused(tmp_path):
    with pytest.raises(SynthesisError, match="read_verilog"):
        run_yosys([f"read_verilog {tmp_path / 'none.v'}"])


def test_treemap():
    areas = [6.0, 6.0, 4.0, 3.0, 2.0, 2.0, 1.0]
    boxes = squarify(areas, (0.0, 0.0, 6.0, 4.0))
    assert [w * h for _, _, w, h in boxes] == pytest.approx(areas)
    for i, (x, y, w, h) in enumerate(boxes):
        assert x >= -1e-9 and x + w <= 6 + 1e-9 and y >= -1e-9 and y + h <= 4 + 1e-9
        for left, bottom, width, height in boxes[:i]:
            overlap_x = min(x + w, left + width) - max(x, left)
            assert overlap_x < 1e-9 or min(y + h, bottom + height) - max(y, bottom) < 1e-9
    with pytest.raises(ValueError, match="descending"):
        squarify([1.0, 2.0], (0.0, 0.0, 1.0, 1.0))
