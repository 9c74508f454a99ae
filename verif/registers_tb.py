"""Tests of the registers (test plan: verif/plans/registers.md)."""

import itertools
from collections import deque

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge
from cocotbext.axi import AxiLiteBus, AxiLiteMaster

from lnpu.bus.axi_lite import AxiLiteSlave
from lnpu.config import ChipConfig
from lnpu.ctrl.counters import COUNTERS
from lnpu.ctrl.registers import COUNTER_BASE, REGISTERS
from verif.agents import start
from verif.axi_agents import OKAY, SLVERR, AxiLiteDriver
from verif.runner import parameters, rng

CONFIG = ChipConfig(**parameters()["config"])
HIGH_MASK = (1 << (CONFIG.address_bits - 32)) - 1
OFFSETS = {name: register.offset for name, register in REGISTERS.items()}

# The map of docs/architecture.md once more, independent of the table: offset -> value after reset.
AFTER_RESET = {
    0x000: 0x4C4E5055,
    0x004: 0x00010000,
    0x008: CONFIG.cores | CONFIG.lanes << 8 | CONFIG.beat << 16 | CONFIG.axi_bits // 8 << 24,
    0x00C: CONFIG.rows | CONFIG.depth << 16,
    0x010: CONFIG.dense_rows | CONFIG.psum_rows << 16,
    0x014: CONFIG.vmem_rows | CONFIG.acc_bits << 24,
    **dict.fromkeys((0x040, 0x044, 0x048, 0x04C, 0x050, 0x054, 0x058, 0x060, 0x064, 0x068), 0),
}
WRITABLE = {0x040, 0x044, 0x048, 0x058, 0x060, 0x064, 0x068}
STORAGE = {0x048: 1, 0x060: 0xFFFFFFFF, 0x064: HIGH_MASK, 0x068: 0xFFFFFFFF}


class Bench:
    """Registers with a driver and a model of the counters; counts the pulses."""

    def __init__(self, dut, *, stall: float = 0.0, seed: int = 1) -> None:
        self.dut = dut
        self.random = rng(seed)
        self.driver = AxiLiteDriver(dut, "axi", stall=stall, seed=seed)
        self.counters = [int(self.random.integers(1 << 48)) for _ in COUNTERS]
        self.pulses = {"start": 0, "abort": 0, "clear": 0}
        for name in ("busy", "done", "error", "code", "command", "detail"):
            getattr(dut, f"control__{name}").value = 0
        dut.flags.value = 0
        dut.counter_value.value = 0
        cocotb.start_soon(self._watch())

    async def _watch(self) -> None:
        dut, edge = self.dut, RisingEdge(self.dut.clk)
        signals = {"start": dut.control__start, "abort": dut.control__abort, "clear": dut.clear}
        indices: deque[int] = deque([0], AxiLiteSlave.LOOK_UP)
        while True:
            await edge
            for name, signal in signals.items():
                self.pulses[name] += int(signal.value)
            indices.append(int(dut.counter_index.value))
            steady = len(set(indices)) == 1
            dut.counter_value.value = self.counters[indices[-1]] if steady else int(self.random.integers(1 << 48))

    async def read(self, name: str) -> int:
        """Value of a register; the response must be OKAY."""
        value, response = await self.driver.read(OFFSETS[name])
        assert response == OKAY, name
        return value

    async def pulse(self, **values: int) -> None:
        """Give inputs their values for a cycle, then 0."""
        for name, value in values.items():
            getattr(self.dut, name).value = value
        await RisingEdge(self.dut.clk)
        for name in values:
            getattr(self.dut, name).value = 0

    async def state(self) -> list[int]:
        """All registers."""
        return [await self.read(name) for name in REGISTERS]


async def begin(dut, **options) -> Bench:
    bench = Bench(dut, **options)
    await start(dut)
    return bench


@cocotb.test()
async def every_offset(dut):
    """Reads of all 1024 words."""
    bench = await begin(dut)
    assert {register.offset for register in REGISTERS.values()} == set(AFTER_RESET)
    for offset in range(0, 0x1000, 4):
        value, response = await bench.driver.read(offset)
        number, half = divmod(offset - COUNTER_BASE, 8)
        if offset in AFTER_RESET:
            assert (value, response) == (AFTER_RESET[offset], OKAY), hex(offset)
        elif 0 <= number < len(COUNTERS):
            assert (value, response) == (bench.counters[number] >> 8 * half & 0xFFFFFFFF, OKAY), hex(offset)
        else:
            assert response == SLVERR, hex(offset)


@cocotb.test()
async def illegal_writes(dut):
    """Writes to every word without a writable register are refused and change nothing."""
    bench = await begin(dut)
    before = await bench.state()
    for offset in range(0, 0x1000, 4):
        if offset not in WRITABLE:
            assert await bench.driver.write(offset, 0xFFFFFFFF) == SLVERR, hex(offset)
            assert await bench.driver.write(offset, 0xFFFFFFFF, 0) == SLVERR, hex(offset)
    assert await bench.state() == before
    assert bench.pulses == {"start": 0, "abort": 0, "clear": 0}


@cocotb.test()
async def strobes(dut):
    """Random writes with random strobes to the storage registers, against a model; low address bits are ignored."""
    bench = await begin(dut, stall=0.3)
    model = dict.fromkeys(STORAGE, 0)
    for _ in range(150):
        offset = int(bench.random.choice(list(STORAGE)))
        value, strobe = int(bench.random.integers(1 << 32)), int(bench.random.integers(16))
        address = offset + int(bench.random.integers(4))
        skew = int(bench.random.integers(-4, 5))
        assert await bench.driver.write(address, value, strobe, skew=skew) == OKAY
        mask = sum(0xFF << 8 * byte for byte in range(4) if strobe >> byte & 1) & STORAGE[offset]
        model[offset] = model[offset] & ~mask | value & mask
        assert await bench.driver.read(address) == (model[offset], OKAY)
        assert int(dut.control__program.value) == model[0x060] | model[0x064] << 32
        assert int(dut.control__length.value) == model[0x068]
    assert {offset: (await bench.driver.read(offset))[0] for offset in STORAGE} == model


@cocotb.test()
async def channel_order(dut):
    """Address first, data first, together; back to back and with slow responses; reads at the same time."""
    bench = await begin(dut)
    for skew, stall in itertools.product((-5, -1, 0, 1, 5), (0.0, 0.6)):
        bench.driver.stall = stall
        for value in (0x12345678, 0x9ABCDEF0):
            writing = cocotb.start_soon(bench.driver.write(0x068, value, skew=skew))
            assert await bench.driver.read(0x000) == (0x4C4E5055, OKAY)
            assert await writing == OKAY
            assert await bench.read("PROGRAM_LENGTH") == value


@cocotb.test()
async def control(dut):
    """CONTROL: pulses of one cycle; refusals while busy; byte 0 alone acts."""
    bench = await begin(dut)
    names = ("start", "abort", "clear")
    for busy, value, strobe in itertools.product((0, 1), range(8), (0xF, 0x1, 0xE, 0x0)):
        dut.control__busy.value = busy
        bench.pulses = dict.fromkeys(names, 0)
        refused = busy and strobe & 1 and value & 0b101
        response = await bench.driver.write(0x040, value | 0xFFFFFF00, strobe)
        assert response == (SLVERR if refused else OKAY)
        acts = strobe & 1 and not refused
        assert bench.pulses == {name: (value >> bit & 1) * acts for bit, name in enumerate(names)}
        assert await bench.read("CONTROL") == 0
        assert await bench.read("STATUS") == busy


@cocotb.test()
async def program_while_busy(dut):
    bench = await begin(dut)
    for name in ("PROGRAM", "PROGRAM_HIGH", "PROGRAM_LENGTH"):
        assert await bench.driver.write(OFFSETS[name], 0x40) == OKAY
        before = await bench.read(name)
        dut.control__busy.value = 1
        for strobe in (0xF, 0x1, 0x0):
            assert await bench.driver.write(OFFSETS[name], 0xFFFFFFFF, strobe) == SLVERR
        assert await bench.read(name) == before
        dut.control__busy.value = 0
        assert await bench.driver.write(OFFSETS[name], 0) == OKAY
        assert await bench.read(name) == 0
    dut.control__busy.value = 1
    assert await bench.driver.write(OFFSETS["INTERRUPT"], 1) == OKAY


@cocotb.test()
async def end_of_program(dut):
    """STATUS, ERROR..., interrupt after `done` and after every `error`."""
    bench = await begin(dut)
    for enable, code in itertools.product((0, 1), range(9)):
        await bench.driver.write(OFFSETS["INTERRUPT"], enable)
        command, detail = int(bench.random.integers(1 << 32)), int(bench.random.integers(1 << 16))
        await bench.pulse(control__done=code == 0, control__error=code != 0, control__code=code,
                          control__command=command, control__detail=detail)  # fmt: skip
        await ClockCycles(dut.clk, 3)
        assert int(dut.interrupt.value) == enable
        bit = 4 if code else 2
        assert await bench.read("STATUS") == bit
        assert await bench.read("ERROR") == code
        assert await bench.read("ERROR_COMMAND") == command
        assert await bench.read("ERROR_DETAIL") == detail
        assert await bench.driver.write(OFFSETS["STATUS"], 0xFF ^ bit) == OKAY
        assert await bench.driver.write(OFFSETS["STATUS"], 0xFF, 0xE) == OKAY
        assert await bench.read("STATUS") == bit
        assert await bench.driver.write(OFFSETS["STATUS"], bit) == OKAY
        assert await bench.read("STATUS") == 0
        assert int(dut.interrupt.value) == 0
        assert await bench.read("ERROR") == code  # stays until the next program ends


@cocotb.test()
async def interrupt_enable(dut):
    bench = await begin(dut)
    await bench.pulse(control__done=1)
    await ClockCycles(dut.clk, 3)
    for enable in (1, 0, 1):
        await bench.driver.write(OFFSETS["INTERRUPT"], enable)
        await ClockCycles(dut.clk, 2)
        assert int(dut.interrupt.value) == enable


@cocotb.test()
async def flags(dut):
    bench = await begin(dut)
    for value in (1, 2, 3):
        await bench.pulse(flags=value)
        await ClockCycles(dut.clk, 2)
        assert await bench.read("FLAGS") == value
        await bench.driver.write(OFFSETS["FLAGS"], ~value & 0xFFFFFFFF)
        assert await bench.read("FLAGS") == value
        await bench.driver.write(OFFSETS["FLAGS"], value)
        assert await bench.read("FLAGS") == 0
    # Set and cleared in one cycle: set
    dut.flags.value = 3
    await bench.driver.write(OFFSETS["FLAGS"], 3)
    dut.flags.value = 0
    assert await bench.read("FLAGS") == 3


@cocotb.test()
async def counters(dut):
    """Reads of counters in random order while they change."""
    bench = await begin(dut, stall=0.3)
    for _ in range(100):
        number, half = int(bench.random.integers(len(COUNTERS))), int(bench.random.integers(2))
        bench.counters[number] = int(bench.random.integers(1 << 63))
        value = await bench.driver.read(COUNTER_BASE + 8 * number + 4 * half)
        assert value == (bench.counters[number] >> 32 * half & 0xFFFFFFFF, OKAY)


@cocotb.test()
async def against_cocotbext_axi(dut):
    """An independent AXI4-Lite master, with writes and reads under way side by side."""
    bench = await begin(dut)
    master = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "axi_"), dut.clk, dut.rst)
    await ClockCycles(dut.clk, 2)
    for value in (0x11223344, 0xDEADBEEF):
        write = master.init_write(0x068, value.to_bytes(4, "little"))
        read = master.init_read(0x000, 12)
        await write.wait()
        await read.wait()
        assert int(write.data.resp) == OKAY
        assert read.data.data == b"".join(AFTER_RESET[offset].to_bytes(4, "little") for offset in (0, 4, 8))
        assert int.from_bytes((await master.read(0x068, 4)).data, "little") == value
    assert int((await master.write(0x000, bytes(4))).resp) == SLVERR
    assert bench.pulses["start"] == 0
