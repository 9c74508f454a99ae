"""The whole chip between Python agents: AXI memory with random stalls on every channel, registers over AXI4-Lite.

The native simulation (`lnpu.sim`, `verif/tests/test_chip.py`) does the long runs; this bench sees the pins, by agents
of its own, and checks the protocols, the interrupt and the registers.
"""

from random import Random

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from lnpu.config import ChipConfig
from lnpu.ctrl.commands import Command, Opcode, Unit
from lnpu.ctrl.counters import COUNTERS
from lnpu.interfaces import Error
from lnpu.sim.simulator import Register
from verif.agents import start
from verif.axi_agents import OKAY, SLVERR, AxiLiteDriver, AxiMemory
from verif.runner import parameters, rng
from verif.tests.test_compiler import POLICIES, ConvolutionJob, random_shape

MEMORY = 1 << 19
LIMIT = 200_000
"""Cycles that a program may take."""
START, ABORT, CLEAR = 1, 2, 4
BUSY, DONE, ERROR = 1, 2, 4


class Bench:
    """The chip, its memory and its host."""

    def __init__(self, dut, random: np.random.Generator) -> None:
        self.dut = dut
        self.config = ChipConfig(**parameters()["config"])
        self.rng = random
        self.edge = RisingEdge(dut.clk)
        self.data = bytearray(MEMORY)
        self.bad: set[int] = set()
        seed = int(random.integers(1 << 30))
        pick = Random(seed)
        common = {"latency": pick.choice([1, 5, 30]), "fail": self._respond, "max_beats": self.config.burst_beats}
        stalls = {channel: pick.choice([0.0, 0.2, 0.6]) for channel in ("ar", "r", "aw", "w", "b")}
        dut._log.info("stalls %s, %s", stalls, common["latency"])
        self.reads = AxiMemory(dut, "memory_read", self.data, stall=stalls, seed=seed, **common)
        self.writes = AxiMemory(dut, "memory_write", self.data, stall=stalls, seed=seed + 1, **common)
        self.host = AxiLiteDriver(dut, "control", stall=0.3, seed=seed)

    def _respond(self, address: int, write: bool) -> int:
        return SLVERR if address in self.bad else OKAY

    def load(self, job: ConvolutionJob) -> None:
        """Put the memory image of a job into the memory."""
        self.data[:] = job.memory.tobytes()

    def job(self, **options) -> ConvolutionJob:
        """A random small convolution."""
        shape = random_shape(self.rng, 4_000, (1, 3, 4, 7, 16, 20))
        names = ("x", "w", "dy", "y", "dx", "dw")
        policies = {name: POLICIES[str(self.rng.choice(list(POLICIES)))] for name in names}
        self.dut._log.info("%s %s", shape, policies)
        return ConvolutionJob(self.config, shape, policies, self.rng, memory_bytes=MEMORY, **options)

    async def read(self, offset: int) -> int:
        """A register; the answer must be OKAY."""
        value, response = await self.host.read(offset)
        assert response == OKAY, f"read of {offset:#x}: {response}"
        return value

    async def write(self, offset: int, value: int, expected: int = OKAY) -> None:
        """Write a register."""
        response = await self.host.write(offset, value, skew=int(self.rng.integers(-3, 4)))
        assert response == expected, f"write of {value:#x} to {offset:#x}: {response}"

    async def begin(self, address: int, commands: int) -> None:
        """Start a program, with the interrupt enabled."""
        assert not int(self.dut.interrupt.value)
        await self.write(Register.PROGRAM, address)
        await self.write(Register.PROGRAM + 4, 0)
        await self.write(Register.PROGRAM_LENGTH, commands)
        await self.write(Register.INTERRUPT, 1)
        await self.write(Register.CONTROL, START)

    async def finish(self, status: int) -> None:
        """Wait for the interrupt; STATUS must be `status`, and clearing that takes the interrupt away."""
        for _ in range(LIMIT):
            if int(self.dut.interrupt.value):
                break
            await self.edge
        else:
            raise TimeoutError(f"no interrupt after {LIMIT} cycles")
        assert self.reads.idle and self.writes.idle, "the program ended with transfers outstanding"
        ended, code = await self.read(Register.STATUS), Error(await self.read(Register.ERROR))
        assert ended == status, f"the program ended with status {ended}, {code}"
        await self.write(Register.STATUS, DONE | ERROR)
        assert await self.read(Register.STATUS) == 0
        assert not int(self.dut.interrupt.value)

    async def fail(self, error: Error, commands: list[bytes | Command], at: int, last: int | None = None) -> None:
        """Run a program that must end with this error, the command last started being `at` (or up to `last`)."""
        raw = b"".join(command.encode() if isinstance(command, Command) else command for command in commands)
        address = MEMORY - 4096
        self.data[address : address + len(raw)] = raw
        await self.begin(address, len(commands))
        await self.finish(ERROR)
        assert await self.read(Register.ERROR) == error.value
        assert at <= await self.read(Register.ERROR_COMMAND) <= (at if last is None else last)
        assert await self.read(Register.ERROR_DETAIL) == 1 << error.value

    async def run(self, job: ConvolutionJob) -> None:
        """Run a job and compare all of memory with what it must be."""
        self.load(job)
        await self.begin(job.address, len(job.program.commands))
        await self.finish(DONE)
        assert await self.read(Register.ERROR) == await self.read(Register.ERROR_DETAIL) == 0
        assert await self.read(Register.ERROR_COMMAND) == len(job.program.commands) - 1
        job.check(np.frombuffer(self.data, np.uint8))

    async def counter(self, name: str) -> int:
        """A performance counter."""
        offset = Register.COUNTER + 8 * list(COUNTERS).index(name)
        return await self.read(offset) | await self.read(offset + 4) << 32


async def bench_of(dut, default_seed: int) -> Bench:
    """Agents, clock, reset."""
    bench = Bench(dut, rng(default_seed))
    await start(dut)
    return bench


@cocotb.test
async def convolutions(dut):
    """Random convolutions in the three phases, one after the other; counters of the bus."""
    bench = await bench_of(dut, 1)
    for _ in range(6):
        await bench.write(Register.CONTROL, CLEAR)
        beats = bench.reads.read_beats, bench.writes.write_beats
        await bench.run(bench.job())
        assert await bench.counter("read_beats") == bench.reads.read_beats - beats[0]
        assert await bench.counter("write_beats") == bench.writes.write_beats - beats[1]


@cocotb.test
async def errors(dut):
    """Malformed programs: code, command, detail, interrupt; good programs in between."""
    bench = await bench_of(dut, 2)
    good = bench.job(phases=("ff",))
    nop, end = Command(Opcode.NOP), Command(Opcode.END)
    await bench.fail(Error.OPCODE, [nop, b"\xee" + bytes(63), end], 1)
    await bench.run(good)
    await bench.fail(Error.FIELD, [nop, nop, Command(Opcode.MULTIPLY, cores=0), end], 2)
    await bench.fail(Error.LENGTH, [nop, nop], 1)
    await bench.run(good)
    load = {"address": 0, "line_count": 1, "line_rows": 4, "pitch": 64, "vmem": bench.config.vmem_rows - 8}
    store = load | {"address": MEMORY - 8192}
    beyond = Command(Opcode.STORE_RAW, **store | {"vmem": bench.config.vmem_rows})
    wait = Command(Opcode.NOP, wait_units=1 << Unit.STORE_RAW)
    await bench.fail(Error.RANGE, [beyond, wait, end], 0, 1)
    # Errors of the bus may be reported just after the unit has become idle: the next command can have started.
    bench.bad = {8}
    await bench.fail(Error.READ, [Command(Opcode.LOAD_RAW, **load), Command(Opcode.NOP, wait_units=1), end], 0, 1)
    bench.bad = {store["address"] + 16}
    await bench.fail(Error.WRITE, [Command(Opcode.STORE_RAW, **store), wait, end], 0, 1)
    bench.bad = set()
    await bench.run(good)


@cocotb.test
async def registers_and_abort(dut):
    """Writes while busy are refused, abort stops the program, the interrupt can be disabled."""
    bench = await bench_of(dut, 3)
    job = bench.job(phases=("wg",))
    bench.load(job)
    await bench.write(Register.CONTROL, ABORT)
    await bench.begin(job.address, len(job.program.commands))
    assert await bench.read(Register.STATUS) == BUSY
    for offset, value in ((Register.CONTROL, START), (Register.CONTROL, CLEAR), (Register.PROGRAM, 0)):
        await bench.write(offset, value, SLVERR)
    await bench.write(Register.CONTROL, ABORT)
    await bench.finish(ERROR)
    assert await bench.read(Register.ERROR) == Error.ABORTED.value
    for offset in (0x018, 0x3FC, 0xFF8):
        assert (await bench.host.read(offset))[1] == SLVERR
    await bench.write(Register.ID, 1, SLVERR)
    assert await bench.read(Register.ID) == 0x4C4E5055
    await bench.run(job)
