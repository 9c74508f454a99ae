"""Testbench of `DenseBuffer`: writes along rows and lanes while pairs of rows are read, and what of it is accessed."""

from dataclasses import dataclass, field

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from lnpu.config import ChipConfig
from lnpu.formats import LOW_BITS
from verif.agents import start
from verif.runner import parameters, rng
from verif.sparse_buffer_tb import BufferWriter

LOW = (1 << LOW_BITS) - 1


class Ports:
    """Two ports on a signal, of which any takes the first word of a cycle, the other one the second."""

    def __init__(self, signal, random) -> None:
        self._signal, self._random = signal, random
        self._words, self._free = [0, 0], [0, 1]

    def __len__(self) -> int:
        return len(self._signal) // 2

    def begin(self) -> None:
        """A new cycle: noise without `valid` on both."""
        size = len(self)
        self._words = [int.from_bytes(self._random.bytes(-(-size // 8)), "little") % (1 << size) & ~1 for _ in range(2)]
        self._free = [int(port) for port in self._random.permutation(2)]
        self._drive()

    def _drive(self) -> None:
        self._signal.value = self._words[0] | self._words[1] << len(self)

    def _put(self, word: int) -> None:
        self._words[self._free.pop()] = word
        self._drive()

    value = property(fset=_put)


class DenseWriter(BufferWriter):
    """Writes values of which a share `fp16` has low bits; knows a cycle's beats and when each value was written."""

    fp16 = 1.0

    def __init__(self, signal, config: ChipConfig, random) -> None:
        self._ports = Ports(signal, random)
        super().__init__(self._ports, config, config.dense_rows, config.lanes, random)
        self.now = 0
        self.when = np.full(self.data.shape, -1)
        self.last: list[tuple] = []
        self.idle()

    def values(self):
        """FP8 patterns, zeros among them, and FP16 patterns; of these half have a single low bit."""
        random, beat = self._random, self._config.beat
        high = random.integers(0x200, size=beat) << LOW_BITS
        low = np.where(random.random(beat) < 0.5, 1 << random.integers(LOW_BITS, size=beat), random.integers(LOW + 1))
        values = np.where(random.random(beat) < 0.2, 0, high) | np.where(random.random(beat) < self.fp16, low, 0)
        return values.astype(np.uint16)

    def beat(self, page, row, column, transpose, data, code, **fields) -> None:
        super().beat(page, row, column, transpose, data, code, **fields)
        beat = self._config.beat
        place = np.s_[page, row : row + beat, column] if transpose else np.s_[page, row, column : column + beat]
        self.when[place] = self.now
        self.last.append((page, row, column, transpose, data))

    def idle(self) -> None:
        """Before the beats of a cycle."""
        self._ports.begin()
        self.last = []


@dataclass
class Request:
    """Rows asked for in a cycle, on each port (None: not enabled), what they held, and what of it must be seen."""

    cycle: int
    page: int
    rows: list[int | None]
    data: list
    defined: list = field(default_factory=list)


class Bench:
    """Drives a `DenseBuffer` and checks it in every cycle."""

    def __init__(self, dut) -> None:
        self.dut = dut
        self.config = config = ChipConfig(**parameters()["config"])
        self.random = rng()
        for name in ("enable", "page", "row"):
            getattr(dut, name).value = 0
        self.writer = DenseWriter(dut.write, config, self.random)
        banks = list(np.ndindex(2, config.dense_banks, config.beat))
        self.low = {bank: getattr(dut, "low_{}_{}_{}".format(*bank)) for bank in banks}
        self.high = {bank: getattr(dut, "high_{}_{}_{}".format(*bank)) for bank in banks}
        self.requests: list[Request | None] = [None, None]
        self.low_reads = self.low_writes = 0
        self.edge = RisingEdge(dut.clk)

    async def fill(self, fp16: float) -> None:
        """Write all values of both pages; nothing is read."""
        self.writer.fp16 = fp16
        self.dut.enable.value = 0
        for beat in self.writer.fill():
            self.writer.idle()
            self.writer.beat(*beat)
            await self._cycle(None)

    async def work(self, cycles: int) -> None:
        """Random reads of one or two rows beside random writes, to one page or both, in most cycles."""
        config, random, writer, dut = self.config, self.random, self.writer, self.dut
        bits = (config.dense_rows - 1).bit_length()
        recent = [(0, 0)] * 4  # page and row written in the last cycles, this one's last
        for _ in range(cycles):
            page, first = int(random.integers(2)), int(random.integers(config.dense_rows))
            if random.random() < 0.5:
                page, first = recent[int(random.integers(4))]
            second, enable = int(random.integers(config.dense_rows)), int(random.integers(4))
            near = random.random() < 0.5
            if near or (enable == 3 and (first - second) % config.dense_banks == 0):  # else the other one is noise
                second = first ^ int(random.integers(1, config.dense_banks))
            dut.page.value, dut.enable.value, dut.row.value = page, enable, first | second << bits
            rows = [row if enable >> i & 1 else None for i, row in enumerate((first, second))]
            data = [writer.data[page, row].copy() if row is not None else None for row in rows]
            request = Request(writer.now, page, rows, data)
            writer.idle()
            if random.random() < 0.8:
                writer.random_beat()
                if random.random() < 0.5:
                    writer.random_beat(pages=(1 - writer.last[0][0],))
                recent = [*recent[len(writer.last) :], *(beat[:2] for beat in writer.last)]
            await self._cycle(request)
        writer.idle()
        dut.enable.value = 0
        await self._cycle(None)
        await self._cycle(None)

    async def _cycle(self, request: Request | None) -> None:
        # At the edge, signals still have the values of the cycle that ends.
        await self.edge
        before, self.requests = self.requests, [request, self.requests[0]]
        if before[0] is not None:  # values written in its cycle or in this one are not defined
            when = self.writer.when[before[0].page]
            before[0].defined = [when[row] < before[0].cycle if row is not None else None for row in before[0].rows]
        self._check_enables(before[0])
        if before[1] is not None:
            self._check_values(before[1])
        self.writer.now += 1

    def _check_values(self, request: Request) -> None:
        lanes = self.config.lanes
        words = np.frombuffer(int(self.dut.value.value).to_bytes(4 * lanes, "little"), dtype="<u2")
        for i, (row, want) in enumerate(zip(request.rows, request.data, strict=True)):
            got = words[i * lanes : (i + 1) * lanes]
            assert row is None or (got == want)[request.defined[i]].all(), f"cycle {request.cycle}: {got}, not {want}"

    def _check_enables(self, request: Request | None) -> None:
        """Low parts are read in words with low bits, and written in values with low bits; nowhere else."""
        beat, banks = self.config.beat, self.config.dense_banks
        groups = self.config.lanes // beat
        written: dict[tuple[int, int, int], int] = {}
        for page, row, column, transpose, data in self.writer.last:
            for e, value in enumerate(data):
                r, lane = (row + e, column) if transpose else (row, column + e)
                if value & LOW:
                    written[page, r % banks, (r + lane) % beat] = 1 << lane // beat
        for bank, sram in self.low.items():
            enable = int(sram.w_en.value)
            assert enable == written.get(bank, 0), f"cycle {self.writer.now}: low bits of bank {bank} written: {enable}"
            self.low_writes += enable.bit_count()
        for page, way in np.ndindex(2, banks):
            row = None
            if request is not None and request.page == page:
                row = next((r for r in request.rows if r is not None and r % banks == way), None)
            for c in range(beat):
                bank = page, way, c
                read = int(self.low[bank].r_en.value)
                self.low_reads += read
                assert int(self.high[bank].r_en.value) == (row is not None)
                if row is None:
                    assert not read, f"cycle {self.writer.now}: bank {bank} is read for no row"
                    continue
                lanes = [(c - row) % beat + beat * g for g in range(groups)]
                port = request.rows.index(row)
                if (self.writer.when[request.page, row, lanes] != request.cycle).all():
                    want = (request.data[port][lanes] & LOW).any()
                    assert read == want, f"cycle {self.writer.now}: low bits of bank {bank} read: {read}"


@cocotb.test()
async def reads_and_writes(dut):
    """Values and accesses, where all, few, half and then again few values are FP16: rewritten here and there."""
    bench = Bench(dut)
    await start(dut)
    await bench.fill(1.0)
    for fp16 in (1.0, 0.03, 0.5, 0.03):
        bench.writer.fp16 = fp16
        await bench.work(parameters()["cycles"] // 4)
    assert bench.low_reads and bench.low_writes


@cocotb.test()
async def low_bits_rest(dut):
    """Pages of FP16 are filled anew with FP8 and zeros: from then on nothing accesses low bits."""
    bench = Bench(dut)
    await start(dut)
    await bench.fill(1.0)
    bench.low_writes = 0
    await bench.fill(0.0)
    await bench.work(parameters()["cycles"] // 4)
    assert (bench.low_reads, bench.low_writes) == (0, 0)
