"""The chip with its SRAMs replaced by wrappers around macros, as `docs/integration.md` says."""

import re
from pathlib import Path

import pytest

import lnpu.sim.build
import verif.runner
from lnpu.config import TINY
from lnpu.export.srams import srams
from lnpu.fgmp.decoder import Decoder
from lnpu.hdl import emit_verilog
from lnpu.synth.macros import Macro
from lnpu.toolchain import RTL
from lnpu.verilog import lint
from verif.runner import run
from verif.tests.test_chip import simulate
from verif.tests.test_compiler import random_job
from verif.tests.test_fpga import Memory

ROOT = Path(__file__).parent.parent.parent
FOUNDRY = ROOT / "verif" / "foundry"
WRAPPED = [(1024, 128), (128, 32), (256, 76), (64, 102), (128, 408), (2048, 16), (32, 64), (32, 72)]


def test_chip(monkeypatch):
    """Random convolutions in three phases: the same results with macros that promise little."""
    monkeypatch.setattr(lnpu.sim.build, "RTL", FOUNDRY)
    config = TINY.replace(name="foundry")
    for seed in range(3):
        simulate(random_job(config, seed), stall=0.2 * (seed % 2), seed=seed)


def test_decoder_under_stalls(monkeypatch):
    """Its output is that of a macro, which must hold while nobody takes it."""
    monkeypatch.setattr(verif.runner, "RTL", FOUNDRY)
    shape = {"axi_bits": TINY.axi_bits, "beat": TINY.beat}
    run(Decoder(config=TINY), "verif.decoder_tb", only="random_stalls", config=shape, srams="foundry")


def test_every_wrapped_shape_is_in_the_chip(tmp_path):
    from lnpu.chip import Chip

    found = {(macro.depth, macro.width) for macro in srams(emit_verilog(Chip(config=TINY), tmp_path))}
    assert found >= set(WRAPPED)


def elaborate(tmp_path, sources, macro):
    """What Verilator finds in a memory of this shape: errors only."""
    block = Memory(depth=macro.depth, width=macro.width, granularity=macro.granularity)
    found = lint([*emit_verilog(block, tmp_path / "rtl"), *sources])
    return [item for item in found if item.startswith("%Error")]


@pytest.mark.parametrize("depth, width, granularity", [(512, 64, 16), (1024, 64, 64), (2048, 32, 32)])
def test_missing_shape_stops(tmp_path, depth, width, granularity):
    sources = sorted((FOUNDRY / "sram").glob("*.v"))
    found = elaborate(tmp_path, sources, Macro(depth, width, granularity))
    assert any("lnpu_sram_of_this_shape_is_missing" in item for item in found)
    assert not elaborate(tmp_path, sources, Macro(1024, 128, 128))


def test_wrapper_in_the_documentation(tmp_path):
    """It compiles, has the ports of the model, and stops at a shape that it does not know."""
    text = (ROOT / "docs" / "integration.md").read_text()
    wrapper = re.search(r"```verilog\n(module lnpu_sram_1r1w .*?endmodule\n)```", text, re.DOTALL)
    assert wrapper is not None
    (tmp_path / "wrapper.v").write_text(wrapper[1])
    (tmp_path / "macro.v").write_text("""module MACRO_1024X128 (
    input wire CLK, input wire WEB, input wire [127:0] BWEB, input wire [9:0] WA, input wire [127:0] D,
    input wire REB, input wire [9:0] RA, output wire [127:0] Q);
    foundry_sram_1r1w #(.WORDS(1024), .BITS(128), .ADDRESS(10)) cells (
        .CLK(CLK), .PD(1'b0), .TEST(1'b0), .WEB(WEB), .BWEB(BWEB), .WA(WA), .D(D), .REB(REB), .RA(RA), .Q(Q));
endmodule
""")
    sources = [tmp_path / "wrapper.v", tmp_path / "macro.v", FOUNDRY / "sram" / "foundry_macros.v"]
    assert not elaborate(tmp_path, sources, Macro(1024, 128, 128))
    found = elaborate(tmp_path, sources, Macro(1024, 64, 64))
    assert any("lnpu_sram_of_this_shape_is_missing" in item for item in found)

    def ports(text):
        return re.findall(r"(?:input|output)\s+(?:wire|reg)\s+(?:\[.*?\])?\s*(\w+)", text)

    assert ports(wrapper[1]) == ports((RTL / "sram" / "lnpu_sram_1r1w.v").read_text())
