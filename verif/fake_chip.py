"""A stand-in for the chip, with its ports: it copies memory. It tests the simulation harness, not the chip.

A program is an array of 64-byte commands, of which it reads the first 32 bytes:

- opcode 0: end
- opcode 2: copy `words` AXI words (a multiple of `config.burst_beats`) from `source` to `dest`

The flags of a command break rules of AXI on purpose, so that a test can see the harness notice.
"""

from amaranth.hdl import Array, Cat, Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.ctrl.counters import COUNTERS
from lnpu.hdl import Block
from lnpu.interfaces import Error, axi_lite_signature, axi_read_signature, axi_write_signature

__all__ = ["FAULTS", "FakeChip", "copy_command", "end_command"]

FAULTS = {"none": 0, "no_last": 1, "unstable_address": 2, "unstable_data": 3, "hang": 4, "wrong_size": 5}

_LAYOUT = data.StructLayout({"opcode": 8, "fault": 8, "source": 64, "dest": 64, "words": 32})


def copy_command(source: int, dest: int, words: int, *, fault: str = "none") -> bytes:
    """A copy, which breaks a rule of AXI unless `fault` is "none"."""
    fields = {"opcode": 2, "fault": FAULTS[fault], "source": source, "dest": dest, "words": words}
    return _LAYOUT.const(fields).as_value().value.to_bytes(64, "little")


def end_command() -> bytes:
    """The end of a program."""
    return bytes(64)


_READS, _WRITES = (list(COUNTERS).index(name) for name in ("read_beats", "write_beats"))


class FakeChip(Block):
    """Copies memory with pipelined bursts; registers, errors and counters as far as `Simulator` looks at them.

    Parameters
    ----------
    config : ChipConfig
        `axi_bits`, `address_bits` and `burst_beats` count.

    Members
    -------
    control : In(axi_lite_signature())
    memory_read : Out(axi_read_signature(config))
    memory_write : Out(axi_write_signature(config))
    interrupt : Out(1)
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "control": In(axi_lite_signature()),
                "memory_read": Out(axi_read_signature(config)),
                "memory_write": Out(axi_write_signature(config)),
                "interrupt": Out(1),
            }
        )

    @property
    def module_name(self) -> str:
        """The chip's."""
        return "lnpu_chip"

    def elaborate(self, platform):
        m = Module()
        config, read, write = self.config, self.memory_read, self.memory_write
        word_bytes = config.axi_bits // 8
        size = word_bytes.bit_length() - 1
        fetch_beats = 64 // word_bytes
        burst_bytes = word_bytes * config.burst_beats

        busy, done, error, enable = Signal(), Signal(), Signal(), Signal()
        code, detail, index = Signal(4), Signal(16), Signal(32)
        program, length = Signal(64), Signal(32)
        counters = Array(Signal(64, name=f"counter{i}") for i in range(_WRITES + 1))
        start = Signal()
        m.d.comb += self.interrupt.eq(enable & (done | error))

        self._registers(
            m, busy=busy, done=done, error=error, enable=enable, code=code, detail=detail, index=index,
            program=program, length=length, counters=counters, start=start,
        )  # fmt: skip

        command = Signal(_LAYOUT)
        raw = Signal(512)
        m.d.comb += command.eq(raw[: _LAYOUT.size])
        read_left, write_left, words_left, responses_left = Signal(32), Signal(32), Signal(32), Signal(32)
        beat = Signal(range(config.burst_beats))
        m.submodules.fifo = fifo = SyncFIFOBuffered(width=config.axi_bits, depth=4 * config.burst_beats)
        copying = Signal()
        failed_read, failed_write = Signal(), Signal()

        m.d.comb += [
            read.arsize.eq(Mux(command.fault == FAULTS["wrong_size"], 0, size)),
            read.arburst.eq(1),
            write.awsize.eq(size),
            write.awburst.eq(1),
            write.awlen.eq(config.burst_beats - 1),
            write.wstrb.eq((1 << word_bytes) - 1),
            write.bready.eq(1),
        ]
        with m.If(busy):
            m.d.sync += counters[0].eq(counters[0] + 1)
        with m.If(read.rvalid & read.rready):
            m.d.sync += counters[_READS].eq(counters[_READS] + 1)
        with m.If(write.wvalid & write.wready):
            m.d.sync += counters[_WRITES].eq(counters[_WRITES] + 1)

        address_read, address_write = Signal(64), Signal(64)
        fetching = Signal()
        with m.FSM(name="program"):
            with m.State("idle"), m.If(start):
                m.d.sync += [busy.eq(1), index.eq(0), code.eq(0), detail.eq(0), failed_read.eq(0)]
                m.d.sync += failed_write.eq(0)
                m.next = "ask"
            with m.State("ask"):
                with m.If(index == length):
                    m.d.sync += [code.eq(Error.LENGTH.value), detail.eq(1 << Error.LENGTH.value)]
                    m.next = "fail"
                with m.Else():
                    m.d.comb += [
                        read.arvalid.eq(1),
                        read.araddr.eq(program + (index << 6)),
                        read.arlen.eq(fetch_beats - 1),
                        read.arsize.eq(size),
                    ]
                    with m.If(read.arready):
                        m.next = "fetch"
            with m.State("fetch"):
                m.d.comb += [read.rready.eq(1), fetching.eq(1)]
                with m.If(read.rvalid):
                    m.d.sync += raw.eq(Cat(raw[config.axi_bits :], read.rdata))
                    with m.If(read.rlast):
                        m.next = "decode"
            with m.State("decode"):
                m.d.sync += [
                    address_read.eq(command.source),
                    address_write.eq(command.dest),
                    read_left.eq(command.words // config.burst_beats),
                    write_left.eq(command.words // config.burst_beats),
                    responses_left.eq(command.words // config.burst_beats),
                    words_left.eq(command.words),
                    beat.eq(0),
                ]
                with m.Switch(command.opcode):
                    with m.Case(0):
                        m.d.sync += [busy.eq(0), done.eq(1)]
                        m.next = "idle"
                    with m.Case(2):
                        m.next = "copy"
                    with m.Default():
                        m.d.sync += [code.eq(Error.OPCODE.value), detail.eq(1 << Error.OPCODE.value)]
                        m.next = "fail"
            with m.State("copy"):
                m.d.comb += copying.eq(1)
                hang = command.fault == FAULTS["hang"]
                with m.If((responses_left == 0) & ~hang):
                    with m.If(failed_read | failed_write):
                        m.d.sync += [
                            code.eq(Mux(failed_read, Error.READ.value, Error.WRITE.value)),
                            detail.eq(failed_read << Error.READ.value | failed_write << Error.WRITE.value),
                        ]
                        m.next = "fail"
                    with m.Else():
                        m.d.sync += index.eq(index + 1)
                        m.next = "ask"
            with m.State("fail"):
                m.d.sync += [busy.eq(0), error.eq(1)]
                m.next = "idle"

        with m.If(copying):
            wobble = Signal()
            m.d.sync += wobble.eq(~wobble)
            unstable = (command.fault == FAULTS["unstable_address"]) & wobble
            m.d.comb += [
                read.arvalid.eq(read_left != 0),
                read.araddr.eq(address_read ^ (unstable << 12)),
                read.arlen.eq(config.burst_beats - 1),
                read.rready.eq(fifo.w_rdy),
                fifo.w_en.eq(read.rvalid),
                fifo.w_data.eq(read.rdata),
                write.awvalid.eq(write_left != 0),
                write.awaddr.eq(address_write),
                write.wvalid.eq(fifo.r_rdy),
                write.wdata.eq(fifo.r_data ^ ((command.fault == FAULTS["unstable_data"]) & wobble)),
                write.wlast.eq((beat == config.burst_beats - 1) & (command.fault != FAULTS["no_last"])),
                fifo.r_en.eq(write.wready),
            ]
            with m.If(read.arvalid & read.arready):
                m.d.sync += [read_left.eq(read_left - 1), address_read.eq(address_read + burst_bytes)]
            with m.If(read.rvalid & read.rready & read.rresp[1]):
                m.d.sync += failed_read.eq(1)
            with m.If(write.awvalid & write.awready):
                m.d.sync += [write_left.eq(write_left - 1), address_write.eq(address_write + burst_bytes)]
            with m.If(write.wvalid & write.wready):
                m.d.sync += beat.eq(Mux(beat == config.burst_beats - 1, 0, beat + 1))
            with m.If(write.bvalid):
                m.d.sync += responses_left.eq(responses_left - 1)
                with m.If(write.bresp[1]):
                    m.d.sync += failed_write.eq(1)
        return m

    def _registers(self, m, *, busy, done, error, enable, code, detail, index, program, length, counters, start):
        control = self.control
        with m.FSM(name="register_write"):
            with m.State("idle"), m.If(control.awvalid & control.wvalid):
                m.d.comb += [control.awready.eq(1), control.wready.eq(1)]
                value = control.wdata
                m.d.sync += control.bresp.eq(0)
                with m.Switch(control.awaddr):
                    with m.Case(0x040):
                        with m.If(value[0] & ~busy):
                            m.d.comb += start.eq(1)
                        with m.If(value[0] & busy):
                            m.d.sync += control.bresp.eq(2)
                        with m.If(value[2]):
                            m.d.sync += [counter.eq(0) for counter in counters]
                    with m.Case(0x044):
                        m.d.sync += [done.eq(done & ~value[1]), error.eq(error & ~value[2])]
                    with m.Case(0x048):
                        m.d.sync += enable.eq(value[0])
                    with m.Case(0x060):
                        m.d.sync += program[:32].eq(value)
                    with m.Case(0x064):
                        m.d.sync += program[32:].eq(value)
                    with m.Case(0x068):
                        m.d.sync += length.eq(value)
                    with m.Default():
                        m.d.sync += control.bresp.eq(2)
                m.next = "respond"
            with m.State("respond"):
                m.d.comb += control.bvalid.eq(1)
                with m.If(control.bready):
                    m.next = "idle"
        with m.FSM(name="register_read"):
            with m.State("idle"):
                m.d.comb += control.arready.eq(1)
                with m.If(control.arvalid):
                    m.d.sync += control.rresp.eq(0)
                    with m.Switch(control.araddr):
                        with m.Case(0x000):
                            m.d.sync += control.rdata.eq(0x4C4E5055)
                        with m.Case(0x044):
                            m.d.sync += control.rdata.eq(Cat(busy, done, error))
                        with m.Case(0x048):
                            m.d.sync += control.rdata.eq(enable)
                        for offset, value in ((0x04C, code), (0x050, index), (0x054, detail), (0x068, length)):
                            with m.Case(offset):
                                m.d.sync += control.rdata.eq(value)
                        with m.Case(0x058):
                            m.d.sync += control.rdata.eq(0)
                        with m.Case("01----------"):
                            number = control.araddr[3:10]
                            counter = Mux(number < len(counters), counters[number], 0)
                            m.d.sync += control.rdata.eq(Mux(control.araddr[2], counter[32:], counter[:32]))
                        with m.Default():
                            m.d.sync += control.rresp.eq(2)
                    m.next = "respond"
            with m.State("respond"):
                m.d.comb += control.rvalid.eq(1)
                with m.If(control.rready):
                    m.next = "idle"
