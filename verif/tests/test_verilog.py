"""Emission of the Verilog, its port table, lint and the synthesis check."""

from pathlib import Path

import pytest
from amaranth.hdl import Module, Signal
from amaranth.lib.wiring import In, Out

from lnpu.config import PAPER, TINY
from lnpu.hdl import Block, Sram, place
from lnpu.toolchain import CLOCK_GATE, RTL
from lnpu.verilog import SynthesisError, check_synthesis, lint, port_table, write_verilog
from verif.fake_chip import FakeChip


class Counter(Block):
    """A block with the constructs that the waivers are about."""

    def __init__(self) -> None:
        super().__init__({"enable": In(1), "mode": In(2), "value": Out(8)})

    def elaborate(self, platform):
        m = Module()
        step = Signal(4)
        with m.Switch(self.mode):
            with m.Case(1):
                m.d.comb += step.eq(3)
            with m.Case(2):
                m.d.comb += step.eq(self.value[2:] >> self.mode)
        with m.If(self.enable & (self.mode == 0)):
            m.d.sync += self.value.eq(self.value + step - 5)
        return m


class Pair(Block):
    """Two counters and a memory."""

    def __init__(self) -> None:
        super().__init__({"enable": In(1), "value": Out(8)})

    def elaborate(self, platform):
        m = Module()
        counters = [place(m, f"counter{i}", Counter()) for i in range(2)]
        m.submodules.memory = memory = Sram(depth=16, width=8)
        m.d.comb += [counter.enable.eq(self.enable) for counter in counters]
        m.d.comb += [
            counters[1].mode.eq(counters[0].value),
            memory.w_en.eq(1),
            memory.w_data.eq(counters[1].value),
            memory.r_en.eq(1),
            memory.r_addr.eq(counters[0].value),
            self.value.eq(memory.r_data),
        ]
        return m


def test_files(tmp_path):
    files = write_verilog(TINY, tmp_path, top=Pair())
    sram = RTL / "sram" / "lnpu_sram_1r1w.v"
    assert files == [tmp_path / "lnpu_pair.v", tmp_path / "lnpu_counter.v", sram, CLOCK_GATE]
    listed = [(tmp_path / line).resolve() for line in (tmp_path / "files.f").read_text().splitlines()]
    assert listed == [path.resolve() for path in files]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write_verilog(TINY, tmp_path, top=Pair())
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("config", [TINY, PAPER], ids=lambda config: config.name)
def test_port_table(config):
    top = FakeChip(config=config)
    text = port_table(top, config)
    assert "| `clk` | input | 1 | clock; everything happens at its rising edge |" in text
    assert f"| `memory_read__rdata` | input | {config.axi_bits} | read data |" in text
    assert f"| `memory_write__wstrb` | output | {config.axi_bits // 8} | bytes of the write data" in text
    assert "| `control__awready` | output | 1 | write address is accepted |" in text
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 2 + len(list(top.signature.flatten(top)))
    assert all(row[4].strip() for row in rows), "a port without description"
    check_synthesis(write_verilog_here(top, config))


def write_verilog_here(top: Block, config) -> list[Path]:
    directory = Path(__file__).resolve().parent.parent.parent / "build" / "verilog-test" / config.name
    return write_verilog(config, directory, top=top)


@pytest.mark.parametrize("top", [Pair, lambda: FakeChip(config=TINY)], ids=["pair", "chip"])
def test_clean_design(tmp_path, top):
    files = write_verilog(TINY, tmp_path, top=top())
    assert lint(files) == []
    assert check_synthesis(files) == []


def test_waivers_do_not_cover_other_verilog(tmp_path):
    path = tmp_path / "lnpu_hand.v"
    path.write_text("module lnpu_hand(input clk, input [3:0] a, output b);\n  assign b = !a;\nendmodule\n")
    found = lint([path])
    assert len(found) == 2
    assert any("UNUSEDSIGNAL" in item and "'clk'" in item for item in found)
    assert any("WIDTHTRUNC" in item for item in found)


@pytest.mark.parametrize("body, rule", [
    ("always @* if (a) q = b;", "LATCH"),
    ("assign q = a; assign q = b;", "MULTIDRIVEN"),
    ("assign q = a & missing;", "Can't find definition"),
])  # fmt: skip
def test_lint_finds(tmp_path, body, rule):
    path = broken(tmp_path, body)
    assert any(rule in item for item in lint([path])), lint([path])


@pytest.mark.parametrize("body, message", [
    ("always @* if (a) q = b;", "dlatch"),
    ("always @(posedge clk) q <= a; always @(posedge clk) q <= b;", "Found and reported"),
    ("wire x; wire y; assign x = y ^ a; assign y = x & b; always @* q = x;", "logic loop"),
    ("wire x; always @* q = a & x;", "no driver"),
    ("nowhere sub(.a(a));", "nowhere"),
])  # fmt: skip
def test_synthesis_check_finds(tmp_path, body, message):
    with pytest.raises(SynthesisError, match=message):
        check_synthesis([broken(tmp_path, body)])


def broken(directory: Path, body: str) -> Path:
    kind = "output q" if body.startswith("assign") else "output reg q"
    path = directory / "lnpu_broken.v"
    text = f"/* Generated by Amaranth Yosys */\nmodule lnpu_broken(input clk, input a, input b, {kind});\n"
    path.write_text(f"{text}  {body}\nendmodule\n")
    return path
