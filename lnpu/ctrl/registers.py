"""The chip's registers: one table, and the AXI4-Lite slave that implements it."""

from collections.abc import Callable
from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from lnpu.bus.axi_lite import AxiLiteSlave
from lnpu.config import ChipConfig
from lnpu.ctrl.counters import COUNTERS, Counters
from lnpu.hdl import Block, place
from lnpu.interfaces import axi_lite_signature

__all__ = ["COUNTER_BASE", "REGISTERS", "Field", "Register", "Registers", "control_signature", "register_table"]

COUNTER_BASE = 0x400
"""Offset of the first counter; each has 8 bytes, low word first."""

IDENTITY, VERSION = 0x4C4E5055, 0x0001_0000


@dataclass(frozen=True, kw_only=True)
class Field:
    """Bits of a register.

    Parameters
    ----------
    name : str
        Name in the register.
    low, width : int
        Place.
    access : str
        "r": read only. "rw": read and write. "w1c": read; writing a one clears. "w": writing a one acts; reads as zero.
    doc : str
        What it says or does.
    constant : callable or None
        Value of a read-only field that depends on the configuration alone.
    """

    name: str
    low: int
    width: int
    access: str
    doc: str
    constant: Callable[[ChipConfig], int] | None = None


@dataclass(frozen=True, kw_only=True)
class Register:
    """A 32-bit register at a byte offset. A register of which all fields are "r" refuses writes."""

    offset: int
    doc: str
    fields: tuple[Field, ...]
    stable: bool = False
    """Writes while the chip is busy are refused."""

    @property
    def writable(self) -> bool:
        """Whether any field can be written."""
        return any(field.access != "r" for field in self.fields)


def _shape(doc: str, *fields: tuple[str, int, int, Callable[[ChipConfig], int]]) -> dict:
    return {
        "doc": doc,
        "fields": tuple(
            Field(name=name, low=low, width=width, access="r", doc=f"`{name}`", constant=constant)
            for name, low, width, constant in fields
        ),
    }


def _word(name: str, access: str, doc: str, width: int = 32) -> tuple[Field, ...]:
    return (Field(name=name, low=0, width=width, access=access, doc=doc),)


REGISTERS: dict[str, Register] = {
    "ID": Register(offset=0x000, **_shape("Identity", ("id", 0, 32, lambda _: IDENTITY))),
    "VERSION": Register(offset=0x004, **_shape("Version of this interface", ("version", 0, 32, lambda _: VERSION))),
    "SHAPE0": Register(
        offset=0x008,
        **_shape(
            "Shape of the chip",
            ("cores", 0, 8, lambda config: config.cores),
            ("lanes", 8, 8, lambda config: config.lanes),
            ("beat", 16, 8, lambda config: config.beat),
            ("axi_bytes", 24, 8, lambda config: config.axi_bits // 8),
        ),
    ),
    "SHAPE1": Register(
        offset=0x00C,
        **_shape(
            "Sparse buffer",
            ("rows", 0, 16, lambda config: config.rows),
            ("depth", 16, 16, lambda config: config.depth),
        ),
    ),
    "SHAPE2": Register(
        offset=0x010,
        **_shape(
            "Dense buffer, partial sums",
            ("dense_rows", 0, 16, lambda config: config.dense_rows),
            ("psum_rows", 16, 16, lambda config: config.psum_rows),
        ),
    ),
    "SHAPE3": Register(
        offset=0x014,
        **_shape(
            "Vector memory, accumulators",
            ("vmem_rows", 0, 17, lambda config: config.vmem_rows),
            ("acc_bits", 24, 8, lambda config: config.acc_bits),
        ),
    ),
    "CONTROL": Register(
        offset=0x040,
        doc="Starts and stops programs; a write of which any part is refused does nothing",
        fields=(
            Field(name="start", low=0, width=1, access="w", doc="Start the program; refused while busy"),
            Field(name="abort", low=1, width=1, access="w", doc="Stop the program; nothing if there is none"),
            Field(name="clear", low=2, width=1, access="w", doc="Clear the counters; refused while busy"),
        ),
    ),
    "STATUS": Register(
        offset=0x044,
        doc="State of the program",
        fields=(
            Field(name="busy", low=0, width=1, access="r", doc="A program runs"),
            Field(name="done", low=1, width=1, access="w1c", doc="A program ended at END"),
            Field(name="error", low=2, width=1, access="w1c", doc="A program ended with an error"),
        ),
    ),
    "INTERRUPT": Register(
        offset=0x048,
        doc="Interrupt = enable and (done or error)",
        fields=_word("enable", "rw", "Interrupt enable", 1),
    ),
    "ERROR": Register(
        offset=0x04C, doc="How the last program ended", fields=_word("code", "r", "Error code; 0 after END", 4)
    ),
    "ERROR_COMMAND": Register(
        offset=0x050,
        doc="Where the last program ended",
        fields=_word("command", "r", "Index of the command last started"),
    ),
    "ERROR_DETAIL": Register(
        offset=0x054, doc="All errors of the last program", fields=_word("detail", "r", "Bit c: error code c", 16)
    ),
    "FLAGS": Register(
        offset=0x058,
        doc="Numerical events",
        fields=(
            Field(name="rounded", low=0, width=1, access="w1c", doc="A rounded result was infinite or NaN"),
            Field(name="stored", low=1, width=1, access="w1c", doc="An infinite or NaN element was stored"),
        ),
    ),
    "PROGRAM": Register(
        offset=0x060,
        doc="Where the program is",
        fields=_word("address_low", "rw", "Byte address, a multiple of 64"),
        stable=True,
    ),
    "PROGRAM_HIGH": Register(
        offset=0x064,
        doc="Where the program is",
        fields=_word("address_high", "rw", "Bits 32 and up of the byte address", 8),
        stable=True,
    ),
    "PROGRAM_LENGTH": Register(
        offset=0x068, doc="How long the program is", fields=_word("length", "rw", "Commands"), stable=True
    ),
}
"""All registers but the counters, which are at `COUNTER_BASE` in the order of `COUNTERS`."""


def register_table() -> str:
    """The register map as a Markdown table, a line a field."""
    lines = ["| offset | register | bits | field | access | content |", "|---|---|---|---|---|---|"]
    for name, register in REGISTERS.items():
        for field in register.fields:
            high = field.low + field.width - 1
            bits = f"{high}:{field.low}" if field.width > 1 else f"{field.low}"
            lines.append(
                f"| {register.offset:#05x} | {name} | {bits} | {field.name} | {field.access} | {field.doc} |"
            )  # fmt: skip
    for number, (name, doc) in enumerate(COUNTERS.items()):
        lines.append(f"| {COUNTER_BASE + 8 * number:#05x} | COUNTER[{number}] | 63:0 | {name} | r | {doc} |")
    return "\n".join(lines) + "\n"


def control_signature(config: ChipConfig) -> wiring.Signature:
    """Link between the registers and the command processor, seen by the registers.

    Members
    -------
    start, abort : Out(1)
        Pulses. `start` only while not `busy`; in a cycle with both, `abort` is for nothing.
    program : Out(config.address_bits); length : Out(32)
        Byte address and number of commands of the program; stable while `busy`.
    busy : In(1)
        Set from the cycle after `start` up to the cycle of `done` or `error`.
    done, error : In(1)
        Pulse in the last cycle of `busy`: the program ended at END, or with an error.
    code, command, detail : In
        With `done` and `error`: error code, index of the command last started, one bit for each code that came up.
    """
    return wiring.Signature({
        "start": Out(1),
        "abort": Out(1),
        "program": Out(config.address_bits),
        "length": Out(32),
        "busy": In(1),
        "done": In(1),
        "error": In(1),
        "code": In(4),
        "command": In(32),
        "detail": In(16),
    })  # fmt: skip


assert Counters.HOST_LATENCY <= AxiLiteSlave.LOOK_UP, "the host would read a counter before its value is there"


class Registers(Block):
    """The register file behind the AXI4-Lite slave: `REGISTERS`, and the counters from `COUNTER_BASE`.

    Answers OKAY, or SLVERR for: any access to another address, a write to a read-only register or a counter, a write
    to CONTROL with `start` or `clear` while busy, a write to PROGRAM, PROGRAM_HIGH or PROGRAM_LENGTH while busy. What
    is refused changes nothing. Bits without a field read as zero and ignore writes, as do bits of PROGRAM_HIGH beyond
    the chip's addresses. Bytes that are not strobed keep their value. A flag or status bit that is set and cleared in
    one cycle is set.

    The two halves of a counter are read one after the other: while a program runs, the low half may wrap in between.

    Parameters
    ----------
    config : ChipConfig
        Shape of the chip.

    Members
    -------
    axi : In(axi_lite_signature())
    control : Out(control_signature(config))
    clear : Out(1)
        Pulse: clear the counters.
    flags : In(2)
        Pulses that set the bits of FLAGS.
    counter_index : Out(range(len(COUNTERS))); counter_value : In(64)
        The value must be that of the index once this has been the same for `AxiLiteSlave.LOOK_UP` cycles.
    interrupt : Out(1)
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__({
            "axi": In(axi_lite_signature()),
            "control": Out(control_signature(config)),
            "clear": Out(1),
            "flags": In(2),
            "counter_index": Out(range(len(COUNTERS))),
            "counter_value": In(64),
            "interrupt": Out(1),
        })  # fmt: skip

    def elaborate(self, platform):
        m = Module()
        control = self.control
        bus = place(m, "slave", AxiLiteSlave())
        wiring.connect(m, wiring.flipped(self.axi), bus.axi)

        # Values of all fields, by (register, field)
        values: dict[tuple[str, str], Value] = {}
        for name, register in REGISTERS.items():
            for field in register.fields:
                if field.constant is not None:
                    values[name, field.name] = Const(field.constant(self.config), field.width)
                elif field.access == "w":
                    values[name, field.name] = Const(0, field.width)
                elif (name, field.name) != ("STATUS", "busy"):
                    values[name, field.name] = Signal(field.width, name=f"{name.lower()}_{field.name}")
        values["STATUS", "busy"] = control.busy

        # What a write does: which register, which of its bits
        mask = Cat(bit.replicate(8) for bit in bus.write_strobe)
        written = Signal(32)  # ones among the strobed bits
        m.d.comb += written.eq(bus.write_data & mask)
        m.d.comb += bus.write_refused.eq(1)
        accepted = {}
        for name, register in REGISTERS.items():
            if not register.writable:
                continue
            here = bus.write_address == register.offset // 4
            accepted[name] = Signal(name=f"write_{name.lower()}")
            refused = Signal(name=f"refuse_{name.lower()}")
            if register.stable:
                m.d.comb += refused.eq(control.busy)
            if name == "CONTROL":
                m.d.comb += refused.eq(control.busy & (written[0] | written[2]))
            m.d.comb += accepted[name].eq(bus.write & here & ~refused)
            with m.If(here):
                m.d.comb += bus.write_refused.eq(refused)
            for field in register.fields:
                bits = slice(field.low, field.low + field.width)
                value = values[name, field.name]
                if field.access == "rw":
                    with m.If(accepted[name]):
                        m.d.sync += value.eq((value & ~mask[bits]) | written[bits])
                elif field.access == "w1c":
                    with m.If(accepted[name]):
                        m.d.sync += value.eq(value & ~written[bits])

        m.d.comb += [
            control.start.eq(accepted["CONTROL"] & written[0]),
            control.abort.eq(accepted["CONTROL"] & written[1]),
            self.clear.eq(accepted["CONTROL"] & written[2]),
            control.program.eq(Cat(values["PROGRAM", "address_low"], values["PROGRAM_HIGH", "address_high"])),
            control.length.eq(values["PROGRAM_LENGTH", "length"]),
        ]
        high = values["PROGRAM_HIGH", "address_high"][max(self.config.address_bits - 32, 0) :]
        m.d.sync += high.eq(0)  # overrides a write: the chip has no such address bits

        # What the chip does to registers; later than the writes, so that setting wins over clearing.
        with m.If(control.done):
            m.d.sync += values["STATUS", "done"].eq(1)
        with m.If(control.error):
            m.d.sync += values["STATUS", "error"].eq(1)
        with m.If(control.done | control.error):
            m.d.sync += [
                values["ERROR", "code"].eq(control.code),
                values["ERROR_COMMAND", "command"].eq(control.command),
                values["ERROR_DETAIL", "detail"].eq(control.detail),
            ]
        for bit, name in enumerate(("rounded", "stored")):
            with m.If(self.flags[bit]):
                m.d.sync += values["FLAGS", name].eq(1)
        m.d.sync += self.interrupt.eq(
            values["INTERRUPT", "enable"] & (values["STATUS", "done"] | values["STATUS", "error"])
        )

        # Reads
        first = COUNTER_BASE // 4
        counter = Signal(range(len(COUNTERS)))
        is_counter = (bus.read_address >= first) & (bus.read_address < first + 2 * len(COUNTERS))
        m.d.comb += [
            counter.eq((bus.read_address - first) >> 1),
            self.counter_index.eq(Mux(is_counter, counter, 0)),
            bus.read_refused.eq(~is_counter),
            bus.read_data.eq(Mux(bus.read_address[0], self.counter_value[32:], self.counter_value[:32])),
        ]
        with m.Switch(bus.read_address):
            for name, register in REGISTERS.items():
                with m.Case(register.offset // 4):
                    word = Const(0, 32)
                    for field in register.fields:
                        word |= values[name, field.name] << field.low
                    m.d.comb += [bus.read_data.eq(word), bus.read_refused.eq(0)]
        return m
