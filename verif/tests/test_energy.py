"""Energy: power tables, toggles, netlists by hand, the PE in gates, OpenSTA, sums of a step."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lnpu.compiler.cycles import Mix
from lnpu.compiler.program import Program
from lnpu.config import PAPER, TINY
from lnpu.ctrl.commands import Command, Opcode, Target
from lnpu.energy.account import COMPONENTS, Costs, macro_bytes, step_energy
from lnpu.energy.activity import Activity, read_saif
from lnpu.energy.counts import count_events, count_wakes
from lnpu.energy.efficiency import SPARSITIES, peak_efficiency
from lnpu.energy.gates import Cell, Gates
from lnpu.energy.memory import DRAM_BIT, NODE_45, NODE_65, Node, node_of, sram_bit
from lnpu.energy.power import PowerModel
from lnpu.energy.registers import uncore_flip_flops
from lnpu.energy.tables import PowerTables
from lnpu.energy.tiles import Tile, Tiles
from lnpu.energy.workloads import measure_pe, pe_bench
from lnpu.export.srams import srams
from lnpu.synth.liberty import OSU018, LibertyError, read_liberty
from lnpu.synth.macros import Macro
from lnpu.synth.yosys import run_yosys
from lnpu.verilog import write_verilog

BUILD = Path(__file__).resolve().parents[2] / "build" / "energy"
needs_library = pytest.mark.skipif(not OSU018.exists(), reason="needs Debian's qflow-tech-osu018")

LIBRARY = """
library (two) {
  time_unit : "1ns"; voltage_unit : "1V"; leakage_power_unit : "1nW"; capacitive_load_unit (1, pf); nom_voltage : 2.0;
  power_lut_template (by_load) { variable_1 : total_output_net_capacitance; variable_2 : input_transition_time; }
  power_lut_template (by_slew) { variable_1 : input_transition_time; variable_2 : total_output_net_capacitance; }
  cell (NAND2) { area : 2; cell_leakage_power : 3;
    pin (A) { direction : input; capacitance : 0.01; }
    pin (B) { direction : input; capacitance : 0.02; }
    pin (Y) { direction : output; function : "!(A B)";
      internal_power () { related_pin : "A";
        rise_power (by_load) { index_1 ("0, 0.1"); index_2 ("0.1, 0.3"); values ("1, 2", "3, 4"); }
        fall_power (by_slew) { index_1 ("0.1, 0.3"); index_2 ("0, 0.1"); values ("1, 3", "2, 4"); } }
      internal_power () { related_pin : "B";
        rise_power (by_load) { index_1 ("0, 0.1"); index_2 ("0.1, 0.3"); values ("5, 5", "5, 5"); }
        fall_power (by_load) { index_1 ("0, 0.1"); index_2 ("0.1, 0.3"); values ("7, 7", "7, 7"); } } } }
  cell (DFF) { area : 8; leakage_power () { value : 5; when : "D"; } leakage_power () { value : 7; when : "!D"; }
    ff (IQ, IQN) { clocked_on : "CK"; next_state : "D"; }
    pin (CK) { direction : input; capacitance : 0.05; clock : true;
      internal_power () { rise_power (by_slew) { index_1 ("0.1, 0.3"); values ("2, 4"); }
                          fall_power (by_slew) { index_1 ("0.1, 0.3"); values ("0, 0"); } } }
    pin (D) { direction : input; capacitance : 0.03; }
    pin (Q) { direction : output; function : "IQ";
      internal_power () { related_pin : "CK";
        rise_power (by_load) { index_1 ("0, 0.1"); index_2 ("0.1, 0.3"); values ("1, 1", "1, 1"); }
        fall_power (by_load) { index_1 ("0, 0.1"); index_2 ("0.1, 0.3"); values ("1, 1", "1, 1"); } } } }
}
"""


@pytest.fixture
def library(tmp_path):
    path = tmp_path / "two.lib"
    path.write_text(LIBRARY)
    return read_liberty(path)


def test_two_cells_by_hand(library):
    """A NAND drives a flip-flop: a = net 2, b = net 3, y = net 4, clock = net 5, q = net 6."""
    cells = [Cell("n", "NAND2", {"A": [2], "B": [3], "Y": [4]}), Cell("part.f", "DFF", {"CK": [5], "D": [4], "Q": [6]})]
    gates = Gates("two", cells, [], {"a": [2], "b": [3]}, {"q": [6]}, 5)
    model = PowerModel(gates, PowerTables(library), group=lambda name: name.split(".")[0], slew=0.2e-9)
    energy = model.energy(Activity({2: 30, 3: 10, 4: 20, 5: 200, 6: 4}, 100))
    pico = 1e-12
    # A table at slew 0.2 (between 0.1 and 0.3) and load 0.03 (of 0 to 0.1): 1.5 + 0.3 * 2; of B: (5 + 7) / 2.
    internal = 20 * (30 * 2.1 + 10 * 6) / 40
    assert energy["n"].internal == pytest.approx(internal * pico / 100)
    assert energy["n"].switching == pytest.approx((30 * 0.01 + 10 * 0.02) * 0.5 * 4 * pico / 100)
    assert energy["n"].clock == 0
    assert energy["part"].internal == pytest.approx(4 * 1 * pico / 100)
    assert energy["part"].switching == pytest.approx(20 * 0.03 * 0.5 * 4 * pico / 100)
    assert energy["part"].clock == pytest.approx(200 * (0.05 * 0.5 * 4 + (3 + 0) / 2) * pico / 100)
    assert model.leakage == pytest.approx({"n": 3e-9, "part": 6e-9})
    assert model.clocked == 1
    assert energy["n"].total == pytest.approx(energy["n"].internal + energy["n"].switching)


def test_unknown_cell_and_units(library, tmp_path):
    with pytest.raises(LibertyError, match="no cell XOR9"):
        PowerTables(library)["XOR9"]
    path = tmp_path / "bare.lib"
    path.write_text(LIBRARY.replace('leakage_power_unit : "1nW";', ""))
    with pytest.raises(LibertyError, match="leakage_power_unit"):
        PowerTables(read_liberty(path))
    with pytest.raises(ValueError, match="feature size of library two"):
        node_of(library)
    assert node_of(library, 90) == Node(90, 2.0)


def test_saif():
    text = """(SAIFILE (DURATION 20)
      (INSTANCE bench (NET
        (n12
           (T0 15) (T1 5) (TZ 0) (TX 0) (TB 0) (TC 7))
        (other (T0 1) (T1 1) (TZ 0) (TX 0) (TB 0) (TC 9))
        (n3 (T0 0) (T1 20) (TZ 0) (TX 0) (TB 0) (TC 1)))))"""
    assert read_saif(text) == {12: 7, 3: 1}


def test_scaling():
    assert NODE_45.scale_to(NODE_45) == 1
    assert Node(180, 1.8).scale_to(NODE_65) == pytest.approx(65 / 180 / 1.8**2)
    assert sram_bit(8192, NODE_45) == pytest.approx(10e-12 / 64)
    assert sram_bit(32768, NODE_45) == pytest.approx(20e-12 / 64)  # the source's second figure
    assert sram_bit(10, NODE_45) == sram_bit(1024, NODE_45)
    assert macro_bytes(PAPER)["dense_high"] == 48 * 36 / 8


def test_srams_and_flip_flops_are_those_of_the_rtl(tmp_path):
    """Sizes of macros against the Verilog's; flip-flops outside the cores against a count of the flat design."""
    files = write_verilog(TINY, tmp_path)
    shapes = srams(files)
    sizes = macro_bytes(TINY)
    found = {shape.depth * shape.width / 8 for shape in shapes}
    assert set(sizes.values()) <= found, sizes
    assert shapes[Macro(TINY.psum_rows, 102, 102)] == 16
    flat = {}
    for top in ("lnpu_chip", "lnpu_core"):
        reads = [f'read_verilog -defer "{path}"' for path in files]
        log = run_yosys(
            [
                *reads,
                f"hierarchy -top {top}",
                "blackbox *lnpu_sram_1r1w* *lnpu_clock_gate",
                "proc",
                "flatten",
                "stat -width",
            ]
        )
        flat[top] = sum(int(n) * int(bits) for n, bits in re.findall(r"(\d+) +\$s?dffe?_(\d+)\b", log))
    outside = uncore_flip_flops(TINY, tmp_path)
    assert outside > 20000 and flat["lnpu_chip"] - TINY.cores * flat["lnpu_core"] == outside


def _random_tiles():
    """FP16 numbers of a normal distribution, and E4M3 numbers."""
    random = np.random.default_rng(1)
    values = random.standard_normal((100, 64)).astype(np.float16).view(np.uint16) | 1
    coarse = (values & 0xFF80) | 0x0200
    codes = np.full(values.shape, 3, np.uint8)
    dense = random.standard_normal((192, 64)).astype(np.float16).view(np.uint16)
    return Tiles({"dense16": Tile(values, codes), "dense8": Tile(coarse, codes - 1)}, dense, {})


@needs_library
def test_pe():
    """An idle cycle takes less than an FP8 product, this less than an FP16 product; two in a cycle more than one."""
    bench = pe_bench(read_liberty(), BUILD)
    found = measure_pe(bench, _random_tiles())
    assert 0 < found["idle"] < found["pair"] / 2 < found["fp16"]
    assert found["pair"] > found["fp16"] - found["idle"]
    # An idle PE's energy is that of its clock pins.
    stimulus = bench.stimulus(40)
    energies, _ = bench.run(stimulus, 20)
    assert sum(one.switching + one.internal for one in energies.values()) == 0
    assert sum(one.clock for one in energies.values()) == pytest.approx(found["idle"], rel=1e-3)


@needs_library
def test_pe_adds_exactly():
    """The gates that are measured compute: the sum of FP16 products of small integers."""
    bench = pe_bench(read_liberty(), BUILD)
    random = np.random.default_rng(2)
    a, b = (random.integers(-50, 51, 100) for _ in range(2))
    stimulus = bench.stimulus(104)
    stimulus.set("enable", 1, slice(0, 100))
    stimulus.set("load", 1, slice(0, 1))
    for port, values in (("a", a), ("b", b)):
        stimulus.set(port, values.astype(np.float16).view(np.uint16), slice(0, 100))
    _, outputs = bench.run(stimulus, 1)
    bits = outputs["psum_o"][-1][:97].astype(object)
    value = sum(int(bit) << place for place, bit in enumerate(bits)) - (int(bits[96]) << 97)
    assert value == int(a @ b) << 48


@needs_library
def test_simulations_at_a_time():
    """Benches made and run side by side, as tests and workers do, do not meet in their files."""
    random = np.random.default_rng(3)
    values = [random.integers(-50, 51, (2, 200)) for _ in range(8)]

    def total(ab):
        bench = pe_bench(read_liberty(), BUILD)
        stimulus = bench.stimulus(204)
        stimulus.set("enable", 1, slice(0, 200))
        stimulus.set("load", 1, slice(0, 1))
        for port, one in zip("ab", ab, strict=True):
            stimulus.set(port, one.astype(np.float16).view(np.uint16), slice(0, 200))
        bits = bench.run(stimulus, 1)[1]["psum_o"][-1][:97]
        return sum(int(bit) << place for place, bit in enumerate(bits)) - (int(bits[96]) << 97)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(total, values)) == [int(a @ b) << 48 for a, b in values]


@needs_library
@pytest.mark.skipif(shutil.which("sta") is None, reason="needs Debian's opensta")
def test_against_opensta(tmp_path):
    """A chain of inverters with uniform activity: internal and switching power."""
    library = read_liberty()
    count, rate, period = 8, 0.4, 10e-9
    text = "module chain(input clk, input a, output y);\n" + "".join(f"wire n{i};\n" for i in range(count - 1))
    nets = ["a", *(f"n{i}" for i in range(count - 1)), "y"]
    text += "".join(f"INVX1 u{i} (.A({nets[i]}), .Y({nets[i + 1]}));\n" for i in range(count)) + "endmodule\n"
    (tmp_path / "chain.v").write_text(text)
    (tmp_path / "power.tcl").write_text(
        f"read_liberty {library.plain(tmp_path)}\nread_verilog {tmp_path / 'chain.v'}\nlink_design chain\n"
        f"create_clock -name clk -period {period * 1e9} [get_ports clk]\nset_input_transition 0.06 [all_inputs]\n"
        f"set_power_activity -global -activity {rate / period} -duty 0.5\n"
        f"set_power_activity -input -activity {rate / period} -duty 0.5\nreport_power -digits 6\nexit\n"
    )
    result = subprocess.run(
        ["sta", "-no_splash", "-exit", str(tmp_path / "power.tcl")], capture_output=True, text=True, check=True
    )
    row = re.search(r"^Total\s+(\S+)\s+(\S+)\s+(\S+)", result.stdout, re.MULTILINE)
    assert row is not None, result.stdout
    internal, switching, leakage = map(float, row.groups())
    cells = [Cell(f"u{i}", "INVX1", {"A": [i], "Y": [i + 1]}) for i in range(count)]
    gates = Gates("chain", cells, [], {"a": [0]}, {"y": [count]}, None)
    model = PowerModel(gates, PowerTables(library), slew=0.06e-9)
    energy = model.energy(Activity(dict.fromkeys(range(count + 1), 40), 100))["all"]
    # OpenSTA 2 adds the tables of rising and falling for every change, which is either.
    assert 2 * energy.internal / period == pytest.approx(internal, rel=0.02)
    # OpenSTA leaves out the net that the port drives.
    assert energy.switching / period * (count - 1) / count == pytest.approx(switching, rel=0.01)
    assert model.leakage["all"] == pytest.approx(leakage, rel=0.01)


def _costs():
    parts = {"core": 2e-12, "lane": 1e-12}
    core = dict.fromkeys(("clock", "visit", "fp16", "pair", "fill"), parts) | {"idle": {"core": 3e-13, "lane": 0.0}}
    core |= {f"{name}_masked": {"core": 2e-12, "lane": 1e-13} for name in ("fp16", "pair")}
    coding = {f"{way}_{kind}": 1e-12 for way in ("encoded", "decoded") for kind in ("zero", "fp8", "fp16")}
    return Costs({}, core, coding, 1e-13, 1000, Node(180, 1.8))


def test_step_adds_up():
    events = {"mac16": 640.0, "mac8": 256.0, "issue16": 10.0, "issue8": 4.0, "visits": 3, "cycles": 20.0,
              "core_cycles": 12.0, "memory_bits": 1000, "decoded_fp8": 5.0}  # fmt: skip
    found = step_energy(_costs(), PAPER, events)
    assert list(found) == list(COMPONENTS)
    pico = 1e-12
    assert found["products"] == pytest.approx((640 + 256 / 2 + 3 * 64) * pico)
    assert found["control"] == pytest.approx((10 + 4 / 2 + 3) * 2 * pico)
    assert found["clock_busy"] == pytest.approx(12 * (2 + 64) * pico)
    assert found["clock_idle"] == pytest.approx((20 * 12 - 12) * 0.3 * pico)
    assert found["clock_other"] == pytest.approx(20 * 1000 * 0.1 * pico)
    assert found["coding"] == pytest.approx(5 * pico)
    assert found["memory"] == pytest.approx(1000 * DRAM_BIT)
    ungated = step_energy(_costs(), PAPER, events, gates=False)
    assert ungated == found | {"clock_idle": pytest.approx((20 * 12 - 12) * (2 + 64) * pico)}
    awake = step_energy(_costs(), PAPER, events | {"core_wakes": 28.0})
    assert awake["clock_idle"] == pytest.approx((28 * (2 + 64) + 200 * 0.3) * pico)
    masked = step_energy(_costs(), PAPER, events | {"gated16": 100.0, "gated8": 56.0})
    assert masked == found | {"products": pytest.approx(found["products"] - 0.9 * (100 + 28) * pico)}


def test_peak_efficiency():
    rows = peak_efficiency(_costs(), PAPER)
    by = {(row["precision"], row["sparsity"]): row for row in rows}
    for (_, sparsity), row in by.items():
        assert row["done"] == pytest.approx(row["counted"] * (1 - sparsity))
        assert row["counted_65"] == pytest.approx(row["counted"] * 180 * 1.8**2 / 65)
    for kind in ("fp16", "fp8"):
        assert [by[kind, s]["counted"] for s in SPARSITIES] == sorted(by[kind, s]["counted"] for s in SPARSITIES)
    assert all(by["fp8", s]["counted"] > by["fp16", s]["counted"] for s in SPARSITIES)


def test_counts_of_a_convolution():
    """Events by hand of a MULTIPLY on a full page, and of its loads."""
    program = Program(TINY)
    program.commands = [
        Command(
            Opcode.LOAD, target=Target.SPARSE.value, cores=3, n_count=1, i_count=1, j_count=4, i_end=1, j_end=4,
            channel_beats=16, dest_j=1, line_blocks=4, pixel_j=1,
        ),
        Command(
            Opcode.MULTIPLY, cores=1, lanes=8, initialise=1, count_n=1, count_h=1, count_w=4, count_r=1, count_s=3,
            row_w=1, psum_w=1, kmask=(1 << 64) - 1,
        ),
    ]  # fmt: skip
    assert count_wakes(program) == [2 * 4 * 16]
    found = count_events(program, {}, Mix(nonzero=1.0, fp8=0.0))
    assert found["placed_sparse"] == 2 * 4 * 64  # into two cores
    assert found["decoded_fp16"] == 4 * 64
    assert found["visits"] == 12
    assert found["mac16"] == 12 * 64 * 8
    assert found["mac8"] == 0
    values = 12 * 64 * TINY.lanes
    assert (found["dense_high_read_bits"], found["dense_flag_read_bits"]) == (9 * values, values)
    assert found["dense_low_read_bits"] == 0  # nothing is resident
    assert found["psum_write_bits"] == 4 * TINY.lanes * 102  # a row for three visits
    assert found["psum_read_bits"] == 0
    half = count_events(program, {}, Mix(nonzero=0.5, fp8=1.0))
    assert half["mac8"] == pytest.approx(12 * 32 * 8)
    assert 12 * 16 < half["pair_cycles"] < 12 * 32


def test_counts_of_masks():
    """Products in masked lanes, by the mask of the core's page; accesses of the mask store."""
    program = Program(TINY)
    load = {"n_count": 1, "i_count": 1, "i_end": 1, "dest_j": 1, "pixel_j": 1, "line_blocks": 4}
    mask = load | {"cores": 3, "j_count": 4, "j_end": 4, "channel_beats": 2}
    multiply = {
        "lanes": 8, "initialise": 1, "count_n": 1, "count_h": 1, "count_w": 4, "count_r": 1, "count_s": 3,
        "psum_w": 1, "kmask": (1 << 64) - 1,
    }  # fmt: skip
    program.commands = [
        Command(
            Opcode.LOAD, target=Target.SPARSE.value, cores=3, j_count=4, j_end=4, channel_beats=16, table=64, **load
        ),
        Command(Opcode.LOAD, target=Target.MASK.value, page=0, table=128, **mask),
        Command(Opcode.LOAD, target=Target.MASK_DENSE.value, page=1, table=256, **mask),
        Command(Opcode.MULTIPLY, cores=1, masked=1, mask_page=0, **multiply),
        Command(Opcode.MULTIPLY, cores=2, masked=1, mask_page=1, **multiply),
        Command(Opcode.MULTIPLY, cores=2, **multiply),
    ]
    found = count_events(program, {64: Mix(fp8=0.0), 128: Mix(nonzero=0.75), 256: Mix(nonzero=0.5)})
    products = 12 * found["issue16"] / 36 * 8
    assert found["mac16"] == 3 * products
    assert found["gated16"] == pytest.approx((0.25 + 0.5) * products)
    assert found["gated8"] == 0
    assert found["mask_write_bits"] == 2 * 2 * 4 * (8 + 2)
    assert found["mask_read_bits"] == 2 * (12 * 2 + 4 * 8)
    assert count_wakes(program) == [2 * 4 * 16 + 2 * 2 * 4 * 2]


@pytest.mark.parametrize("fp16", [0.0, 0.1, 0.5])
def test_counts_of_dense_rows(fp16):
    """Low bits of the resident operand: written by value, read by word of two values; each page has its own mix."""
    load = {
        "target": Target.DENSE.value, "cores": 2, "n_count": 1, "i_count": 1, "j_count": 64, "i_end": 1, "j_end": 64,
        "channel_beats": 2, "dest_j": 1, "line_blocks": 64, "pixel_j": 1,
    }  # fmt: skip
    multiply = {
        "lanes": 8, "initialise": 1, "count_n": 1, "count_h": 1, "count_w": 1, "count_r": 1, "count_s": 1,
        "kmask": (1 << 64) - 1,
    }  # fmt: skip
    program = Program(TINY)
    program.commands = [
        Command(
            Opcode.LOAD, target=Target.SPARSE.value, cores=3, n_count=1, i_count=1, j_count=1, i_end=1, j_end=1,
            channel_beats=16, dest_j=1, line_blocks=1, pixel_j=1, table=64,
        ),
        Command(Opcode.LOAD, page=0, table=128, **load),
        Command(Opcode.LOAD, page=1, table=256, **load),
        Command(Opcode.MULTIPLY, cores=2, dense_page=0, **multiply),
        Command(Opcode.MULTIPLY, cores=2, dense_page=1, **multiply),
        Command(Opcode.MULTIPLY, cores=1, dense_page=0, **multiply),  # a core that nothing was loaded into
    ]  # fmt: skip
    mixes = {64: Mix(), 128: Mix(nonzero=0.5, fp8=1 - 2 * fp16), 256: Mix(fp8=0.0)}
    found = count_events(program, mixes)
    values = 64 * 8
    assert found["dense_high_write_bits"] == 2 * 9 * values
    assert found["dense_flag_write_bits"] == 2 * values
    assert found["dense_low_write_bits"] == pytest.approx(7 * (fp16 + 1) * values)
    assert found["dense_high_read_bits"] == pytest.approx(3 * 9 * values)
    assert found["dense_low_read_bits"] == pytest.approx(7 * (1 - (1 - fp16) ** 2 + 1) * values)
    assert found["placed_dense"] == 2 * values
