"""StoreUnit: random walks against a model of memory, byte for byte; malformed commands; throughput."""

from collections import deque
from dataclasses import dataclass, field
from random import Random

import cocotb
import numpy as np
from cocotb.triggers import ClockCycles, RisingEdge
from cocotb.utils import get_sim_time

from golden.fgmp import Policy, quantize, to_fp16
from golden.memory import encode_block as golden_block
from lnpu.config import BLOCK, ChipConfig
from lnpu.ctrl.commands import Command, Opcode
from lnpu.interfaces import Error
from lnpu.mem.store import store_events
from verif.agents import Source, start, unpack
from verif.encoder_tb import HALF_HI, HALF_LO, encode_block, placed, sum_of_tops
from verif.quantizer_tb import ABOVE, BELOW, reference
from verif.runner import parameters, rng

PERIOD = 10
WINDOW = 1 << 21
CLASSES = ("zero", "underflow", "fp8", "fp16")


@dataclass
class Stall:
    """Probabilities that a read is not granted, a request is not taken, a data word is not taken."""

    read: float = 0.0
    request: float = 0.0
    data: float = 0.0


@dataclass
class Totals:
    """Sums of the unit's events."""

    counts: dict = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))
    nonfinite: int = 0
    top: int = 0
    plain_bits: dict = field(default_factory=dict)


class Bench:
    """The unit between a model of the vector memory and one of the memory's writer."""

    def __init__(self, dut, *, seed: int = 0, stall: Stall | None = None) -> None:
        self.config = ChipConfig(lanes=16, **parameters())
        self.layout = store_events(self.config)
        self.dut = dut
        self.stall = stall or Stall()
        self.random = Random(seed)
        self.commands = Source(dut, "command", seed=seed)
        self.base = (0xA5 << 32) & ((1 << self.config.address_bits) - 1)
        self.image = bytearray(self.random.randbytes(WINDOW))
        self.vmem = np.zeros((1 << 16, self.config.beat), np.float32)
        self.requests: list[tuple[int, int, int]] = []
        self.errors: list[int] = []
        self.reads = self.words = 0
        self.latency, self.overlaps = 12, 0
        self.totals = Totals()
        self.taken = 0  # commands
        self.dynamic = False
        self.edge = RisingEdge(dut.clk)

    async def begin(self) -> None:
        """Reset; start the models."""
        self.dut.read__request__ready.value = 0
        self.dut.read__row.value = 0
        self.dut.memory__request__ready.value = 0
        self.dut.memory__data__ready.value = 0
        self.dut.memory__idle.value = self.dut.memory__fenced.value = 1
        await start(self.dut)
        for agent in (self._vector_memory, self._memory, self._watch):
            cocotb.start_soon(agent())

    async def _vector_memory(self) -> None:
        dut, draw = self.dut, self.random.random
        waiting = None
        while True:
            ready = draw() >= self.stall.read
            dut.read__request__ready.value = int(ready)
            await self.edge
            valid = int(dut.read__request__valid.value)
            address = int(dut.read__request__payload.value) if valid else None
            assert waiting is None or address == waiting, "a read request changed"
            waiting = None if ready else address
            if valid and ready:
                self.reads += 1
                dut.read__row.value = int.from_bytes(self.vmem[address].tobytes(), "little")

    async def _memory(self) -> None:
        """Like AxiWriter: takes words of requests taken in an earlier cycle; acknowledges some time later, in order.
        Checks what the unit says of commands whose writes are not acknowledged."""
        dut, draw = self.dut, self.random.random
        step = self.config.axi_bits // 8
        bits = self.config.address_bits
        mask = (1 << bits) - 1
        owed: list[list[int]] = []  # address, words, command
        answers: deque[tuple[int, int]] = deque()  # cycle of the answer at the earliest, command
        past = now = 0
        waiting = None
        while True:
            take_request = draw() >= self.stall.request
            take_data = bool(owed) and draw() >= self.stall.data
            dut.memory__request__ready.value = int(take_request)
            dut.memory__data__ready.value = int(take_data)
            dut.memory__idle.value = int(not owed and not answers)
            dut.memory__fenced.value = int(past == 0)
            await self.edge
            ready, fence = int(dut.command__ready.value), int(dut.memory__fence.value)
            commands = [request[2] for request in owed] + [answer[1] for answer in answers]
            assert not ready or not owed, "ready, but there are words to send"
            assert int(dut.busy.value) == (not ready or bool(commands))
            assert int(dut.earlier.value) == any(command < self.taken for command in commands)
            self.overlaps += not ready and bool(int(dut.earlier.value))
            now += 1
            if answers and answers[0][0] <= now:
                answers.popleft()
                past = max(0, past - 1)
            if fence:
                past = len(answers)
            asked = int(dut.memory__request__payload.value) if int(dut.memory__request__valid.value) else None
            assert waiting is None or asked == waiting, "a memory request changed"
            waiting = None if take_request else asked
            if int(dut.memory__data__valid.value) and take_data:
                payload = int(dut.memory__data__payload.value)
                data, strobe = payload & ((1 << 8 * step) - 1), payload >> 8 * step
                address = (owed[0][0] - self.base) & mask
                assert 0 <= address <= WINDOW - step, hex(owed[0][0])
                for byte in range(step):
                    if strobe >> byte & 1:
                        self.image[address + byte] = data >> 8 * byte & 0xFF
                self.words += 1
                owed[0][0] += step
                owed[0][1] -= 1
                if not owed[0][1]:
                    answers.append((now + self.random.randrange(1, self.latency), owed.pop(0)[2]))
            if asked is not None and take_request:
                address, words, kind = asked & mask, asked >> bits & 0xFFFF, asked >> bits + 16
                assert address % step == 0 and words
                owed.append([address, words, self.taken])
                self.requests.append((address - self.base & mask, words, kind))

    async def _watch(self) -> None:
        dut = self.dut
        while True:
            await self.edge
            error = int(dut.error.value)
            busy = int(dut.busy.value)
            if error:
                assert busy
                self.errors.append(error)
            event = unpack(self.layout, int(dut.events.value))
            self._count(event, busy)
            if event["plain_bits"]:
                assert busy
                bits = self.totals.plain_bits
                bits[event["kind"]] = bits.get(event["kind"], 0) + event["plain_bits"]
            if int(dut.command__valid.value) and int(dut.command__ready.value):
                self.taken += 1
                command = Command.decode(int(dut.command__payload.value).to_bytes(64, "little"))
                self.dynamic = command.opcode == Opcode.STORE and command.fields["tensor"] != 0

    def _count(self, event: dict, busy: int) -> None:
        """Events of the encoder."""
        for name in CLASSES:
            self.totals.counts[name] += event[name]
        assert event["dynamic"] == self.dynamic or not busy
        self.totals.nonfinite += event["nonfinite"]
        self.totals.top += event["top"]

    async def run(self, command: Command, timeout: int = 60_000) -> int:
        """Run a command to its end; returns the cycles that the unit was busy."""
        return await self.run_all([command], timeout)

    async def run_all(self, commands: list[Command], timeout: int = 60_000) -> int:
        """Run commands one behind the other, to the end of the last; returns the cycles from the first one's start."""
        begin = get_sim_time("ns") + PERIOD
        await self.commands.put([int.from_bytes(command.encode(), "little") for command in commands])
        self.dut.command__payload.value = self.random.getrandbits(512)  # noise without `valid`
        await self.edge
        assert int(self.dut.busy.value)
        for _ in range(timeout):
            await self.edge
            if not int(self.dut.busy.value):
                assert int(self.dut.memory__idle.value)
                return int((get_sim_time("ns") - begin) / PERIOD)
        raise TimeoutError(f"still busy after {timeout} cycles")


def walk(command: dict, beat: int):
    """(block number, rows of its 64 elements or None for a filling row) of a STORE, in its order."""
    shared = 1 << command["log2_block_pixels"]
    rows = BLOCK // shared // beat
    for n in range(command["n_count"]):
        for i in range(command["i_count"]):
            line = command["line"] + n * command["line_n"] + i * command["line_i"]
            for j in range(0, command["j_count"], shared):
                pixel = command["pixel"] + j
                block = line * command["line_blocks"] + pixel // shared
                source = []
                for k in range(j, j + shared):
                    row = (
                        command["source"] + n * command["source_n"] + i * command["source_i"] + k * command["source_j"]
                    )
                    source += [(row + b) & 0xFFFF if k < command["j_count"] else None for b in range(rows)]
                yield block, source


@dataclass
class Expected:
    """What a STORE should do beside what it writes."""

    requests: list = field(default_factory=list)  # of words of blocks
    tables: int = 0  # requests for a word of the table
    errors: list = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    cycles: int = 0  # of the data port, at most

    @property
    def words(self) -> int:
        return sum(words for _, words, _ in self.requests) + self.tables


def expect_store(bench: Bench, command: dict, image: bytearray) -> Expected:
    """Apply a STORE to the model."""
    policy = tuple(command[name] for name in ("lo", "hi", "below", "above"))
    golden_policy = Policy(0, policy[0], policy[1], BELOW[policy[2]], ABOVE[policy[3]])
    zeros = np.zeros(bench.config.beat, np.float32)
    step = bench.config.axi_bits // 8
    expected = Expected()
    totals = expected.totals
    sequences: list[tuple[int, list[bytes]]] = []  # address, blocks that lie one behind the other
    before, table_word = None, None
    for block, rows in walk(command, bench.config.beat):
        x = np.concatenate([zeros if row is None else bench.vmem[row] for row in rows])
        v = to_fp16(x, command["scale"], bool(command["saturate"]))
        raw = encode_block(v, policy)
        bits, codes, _ = quantize(v, golden_policy)
        assert golden_block(bits, codes) == raw
        within = block % (1 << command["log2_run"])
        if not within or block - 1 != before:
            sequences.append((command["slots"] - bench.base + 160 * (block - within), []))
            expected.errors += [Error.FIELD.value] if within else []
        at, blocks = sequences[-1]
        at += sum(map(len, blocks))
        image[at : at + len(raw)] = raw
        blocks.append(raw)
        place = command["table"] - bench.base + block
        image[place] = len(raw)
        expected.tables += place // step != table_word
        before, table_word = block, place // step
        codes, _, _, underflow = reference(v, *policy)
        totals.counts["zero"] += int(((codes == 0) & ~underflow).sum())
        totals.counts["underflow"] += int(underflow.sum())
        totals.counts["fp8"] += int((codes == 2).sum())
        totals.counts["fp16"] += int((codes == 3).sum())
        totals.nonfinite += int(((v & 0x7FFF) >= 0x7C00).reshape(-1, bench.config.beat).any(1).sum())
        totals.top += sum_of_tops(v, bench.config.beat)
        totals.plain_bits[command["kind"]] = totals.plain_bits.get(command["kind"], 0) + 16 * BLOCK
    for at, blocks in sequences:
        places = placed(blocks, [False] * (len(blocks) - 1) + [True], step)
        assert sum(place["words"] for place in places) == -(-sum(map(len, blocks)) // step)
        for place in places:
            if place["words"]:
                expected.requests.append((at, place["words"], command["kind"]))
                at += step * place["words"]
            expected.cycles += place["cycles"]
    expected.cycles += expected.tables
    return expected


def fill(bench: Bench, random: np.random.Generator, scale: int = 0) -> None:
    """Vector memory of all kinds of FP32 values: zeros, those that FP16 holds after scaling, the rest of FP32."""
    shape = (4096, bench.config.beat)  # repeated
    fitting = random.integers(0, 1 << 16, shape).astype(np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        close = (random.standard_normal(shape) * 2.0 ** random.integers(-12, 12, shape) * 2.0**scale).astype(np.float32)
    anything = random.integers(0, 1 << 32, shape, dtype=np.uint64).astype(np.uint32).view(np.float32)
    chosen = random.choice(4, shape, p=[0.3, 0.25, 0.4, 0.05])
    rows = np.select([chosen == 0, chosen == 1, chosen == 2], [np.float32(0), fitting, close], anything)
    # Some rows all zero, some dense.
    rows[random.random(shape[0]) < 0.2] = 0
    dense = random.random(shape[0]) < 0.2
    rows[dense] = close[dense]
    bench.vmem = np.tile(rows, (16, 1))


def most_run(config: ChipConfig) -> int:
    """Largest `log2_run`."""
    return min(4, (config.axi_bits // 8).bit_length() - 1)


def random_store(bench: Bench, random: np.random.Generator, log2: int | None = None) -> dict:
    """A STORE whose blocks lie in the window."""
    most = (BLOCK // bench.config.beat).bit_length() - 1
    log2 = int(random.integers(0, most + 1)) if log2 is None else log2
    shared = 1 << log2

    def pick(low: int, high: int) -> int:
        return int(random.integers(low, high))

    lo, hi = sorted(pick(0, 0x7C00) for _ in range(2))
    if pick(0, 2):
        lo, hi = HALF_LO, HALF_HI
    j_count = pick(1, 4 * shared + 1) if shared > 1 else pick(1, 9)
    counts = {"n_count": pick(1, 4), "i_count": pick(1, 4), "j_count": j_count}
    run = pick(0, most_run(bench.config) + 1)
    shape = {
        "line": pick(0, 9),
        "line_n": pick(0, 7),
        "line_i": pick(0, 7),
        "pixel": shared * pick(0, 4),
        "line_blocks": pick(1, 60),
    }
    blocks = -(-j_count // shared)
    match pick(0, 4):
        case 0:  # lines of whole runs
            shape["pixel"] = shared * (pick(0, 3) << run)
            shape["line_blocks"] = pick(1, 4) << run
        case 1 | 2:  # lines that follow one another without a gap, in runs as they come
            counts |= {"i_count": pick(1, 9), "j_count": shared * (blocks - 1) + pick(1, shared + 1)}
            shape |= {"line_blocks": blocks, "line_i": 1, "line_n": counts["i_count"] + pick(0, 2) * pick(0, 3)}
            shape |= {"pixel": 0, "line": pick(0, 3) << run}
    return (
        counts
        | shape
        | {
            "log2_run": run,
            "log2_block_pixels": log2,
            "slots": bench.base + 32 * pick(0, 64),
            "table": bench.base + WINDOW - 16384 + 32 * pick(0, 64),
            "kind": pick(0, 8),
            "tensor": pick(0, 2) * pick(1, 256),
            "scale": pick(-64, 65),
            "lo": lo,
            "hi": hi,
            "below": pick(0, 3),
            "above": pick(0, 2),
            "saturate": pick(0, 2),
            "source": pick(0, 1 << 16),
            "source_n": pick(-(1 << 15), 1 << 15),
            "source_i": pick(-300, 300),
            "source_j": pick(-20, 60),
        }
    )


async def check(bench: Bench, command: dict) -> tuple[int, Expected]:
    """Run a STORE and compare memory, requests, errors and events with the model."""
    image = bytearray(bench.image)
    expected = expect_store(bench, command, image)
    bench.requests.clear()
    bench.words, bench.totals = 0, Totals()
    cycles = await bench.run(Command(Opcode.STORE, **command))
    assert bench.errors == expected.errors, (bench.errors, expected.errors, command)
    bench.errors.clear()
    if bench.image != image:
        differing = [k for k in range(WINDOW) if bench.image[k] != image[k]]
        raise AssertionError(f"{len(differing)} bytes differ, the first at {differing[0]:#x}, of {command}")
    first_of_table = command["table"] - bench.base
    assert [one for one in bench.requests if one[0] < first_of_table] == expected.requests
    assert len(bench.requests) == len(expected.requests) + expected.tables
    assert bench.words == expected.words
    assert bench.totals == expected.totals
    return cycles, expected


STALLS = {
    "none": Stall(),
    "reads": Stall(read=0.7),
    "requests": Stall(request=0.9),
    "data": Stall(data=0.7),
    "all": Stall(0.4, 0.5, 0.4),
}


@cocotb.test(timeout_time=500, timeout_unit="us")
@cocotb.parametrize(stall=list(STALLS))
async def random_walks(dut, stall):
    """Random geometries, runs, policies and scales, in every way that pixels share blocks."""
    random = rng(21)
    bench = Bench(dut, seed=1, stall=STALLS[stall])
    await bench.begin()
    most = (BLOCK // bench.config.beat).bit_length() - 1
    errors = 0
    for log2 in [*range(most + 1), *range(most + 1), *[None] * 12]:
        command = random_store(bench, random, log2)
        fill(bench, random, command["scale"])
        _, expected = await check(bench, command)
        errors += bool(expected.errors)
    assert errors > 2


@cocotb.test(timeout_time=500, timeout_unit="us")
@cocotb.parametrize(stall=["none", "all"])
async def one_behind_the_other(dut, stall):
    """A command begins when the words of the one before have been sent, however late their answers are."""
    random = rng(22)
    bench = Bench(dut, seed=8, stall=STALLS[stall])
    await bench.begin()
    fill(bench, random)
    bench.latency = 150
    commands = [random_store(bench, random) for _ in range(25)]
    image = bytearray(bench.image)
    expected = [expect_store(bench, command, image) for command in commands]
    await bench.run_all([Command(Opcode.STORE, **command) for command in commands])
    assert bench.errors == [error for one in expected for error in one.errors]
    assert bench.image == image
    assert bench.words == sum(one.words for one in expected)
    for name in CLASSES:
        assert bench.totals.counts[name] == sum(one.totals.counts[name] for one in expected), name
    assert sum(bench.totals.plain_bits.values()) == sum(sum(one.totals.plain_bits.values()) for one in expected)
    assert bench.overlaps > 500, f"{bench.overlaps} cycles of a command before the answers of the one before"


def one_line(bench: Bench, blocks: int, run: int, **changes) -> dict:
    """A STORE of `blocks` blocks of a pixel each, rows one after the other."""
    rows = BLOCK // bench.config.beat
    return {
        "slots": bench.base + 160 * 32,
        "table": bench.base + WINDOW - 4096,
        "n_count": 1,
        "i_count": 1,
        "j_count": blocks,
        "line": 0,
        "line_n": 1,
        "line_i": 1,
        "pixel": 0,
        "line_blocks": blocks,
        "log2_block_pixels": 0,
        "log2_run": run,
        "kind": 1,
        "scale": 0,
        "saturate": 0,
        "lo": HALF_LO,
        "hi": HALF_HI,
        "below": 0,
        "above": 0,
        "source": 0,
        "source_n": blocks * rows,
        "source_i": blocks * rows,
        "source_j": rows,
    } | changes


@cocotb.test(timeout_time=500, timeout_unit="us")
@cocotb.parametrize(stall=["none", "requests", "data"])
async def sizes_of_runs(dut, stall):
    """Runs of only empty blocks; runs that end with a word or a byte before or behind it; partial runs."""
    bench = Bench(dut, seed=9, stall=STALLS[stall])
    await bench.begin()
    step = bench.config.axi_bits // 8
    most = most_run(bench.config)
    run = 1 << most
    bench.vmem[:] = 0  # blocks of a byte
    _, expected = await check(bench, one_line(bench, 3 * run, most))
    assert len(expected.requests) == 3
    await check(bench, one_line(bench, run - 1, most))
    await check(bench, one_line(bench, 1, most))
    await check(bench, one_line(bench, 5, 0))
    seen = set()
    for odd in (-1, 0, 1):
        for full in (0, 1, run // 2):
            # `full` blocks of FP16, then empty ones, and one that makes up the wanted total.
            bench.vmem[:] = 0
            flat = bench.vmem.reshape(-1)
            flat[: BLOCK * full] = 1000.0
            rest = run - full - 1
            nonzeros = 1 + (odd - (129 * full + rest + 10)) % step
            flat[BLOCK * (run - 1) : BLOCK * (run - 1) + nonzeros] = 1.0
            _, expected = await check(bench, one_line(bench, run, most))
            total = 129 * full + rest + 9 + nonzeros
            assert total % step == odd % step
            seen.add(total % step)
            assert sum(words for _, words, _ in expected.requests) == -(-total // step)
    assert len(seen) == 3


@cocotb.test(timeout_time=500, timeout_unit="us")
async def astray(dut):
    """Blocks that do not begin or continue a run are reported, one by one; the command and the next one end."""
    random = rng(29)
    bench = Bench(dut, seed=10, stall=Stall(0.1, 0.1, 0.1))
    await bench.begin()
    fill(bench, random)
    last = (1 << most_run(bench.config)) - 1
    for name, errors, changes in (
        ("start", 1, {"pixel": 1}),
        ("start at the last block", 1, {"pixel": last}),
        ("first of the run", 0, {"pixel": last + 1}),
        ("steps", 3, {"j_count": 1, "n_count": 4, "line_n": 1, "line_blocks": 2, "pixel": 0}),
        ("one line again and again", 3, {"j_count": 2, "n_count": 3, "line_n": 0, "pixel": 1}),
        ("the same block", 4, {"j_count": 1, "n_count": 2, "i_count": 2, "line_n": 0, "line_i": 0, "pixel": 1}),
        ("same place of the next run", 2, {"j_count": 1, "n_count": 2, "line_blocks": last + 1, "pixel": 1}),
    ):
        command = one_line(bench, 3, most_run(bench.config)) | {"line_blocks": 1} | changes
        _, expected = await check(bench, command)
        assert len(expected.errors) == errors, (name, expected.errors)
        if random.random() < 0.5:
            await check(bench, random_store(bench, random))


@cocotb.test(timeout_time=500, timeout_unit="us")
async def strides_far_apart(dut):
    """Block numbers far beyond 16 bits: large line numbers and counts of blocks."""
    random = rng(22)
    bench = Bench(dut, seed=2)
    await bench.begin()
    fill(bench, random)
    for line, line_blocks, line_n, line_i, pixel, log2_run in (
        ((1 << 24) - 1, 31, 3, 1, 5, 0),
        (511, 0xFFFF, 0, 0, 0x7FFF, 0),
        (0x123450, 96, 2, 5, 0x1238, 3),
        ((1 << 24) - 16, 0xFFF8, 0, 0, 0x7FF8, 2),
    ):
        command = random_store(bench, random, 0) | {
            "line": line,
            "line_blocks": line_blocks,
            "line_n": line_n,
            "line_i": line_i,
            "pixel": pixel,
            "log2_run": log2_run,
            "n_count": 2,
            "i_count": 2,
            "j_count": 3,
        }
        # Move the window to where the blocks go: addresses are modulo 2^address_bits.
        first = line * line_blocks + pixel
        mask = (1 << bench.config.address_bits) - 1
        # The model works without the modulus.
        slots = (bench.base + 4096 - 160 * first) & ~31
        table = (bench.base + WINDOW - 65536 - first) & ~31
        image = bytearray(bench.image)
        expected = expect_store(bench, command | {"slots": slots, "table": table}, image)
        bench.totals = Totals()
        await bench.run(Command(Opcode.STORE, **command | {"slots": slots & mask, "table": table & mask}))
        assert bench.image == image, command
        assert bench.totals == expected.totals
        assert not bench.errors and not expected.errors


@cocotb.test(timeout_time=500, timeout_unit="us")
async def table_words_far_apart(dut):
    """Lengths whose places in the table differ in high address bits only."""
    random = rng(28)
    bench = Bench(dut, seed=8)
    await bench.begin()
    fill(bench, random)
    for log2 in range(5, 14):
        command = random_store(bench, random, 0) | {
            "table": bench.base + WINDOW - 16384,
            "n_count": 1,
            "i_count": 2,
            "j_count": 1,
            "line": 0,
            "line_i": 1,
            "pixel": 0,
            "line_blocks": 1 << log2,
            "log2_run": log2 % (most_run(bench.config) + 1),
        }
        await check(bench, command)


@cocotb.test(timeout_time=500, timeout_unit="us")
async def golden_tensor(dut):
    """Tensors of the golden model's layout, written a plane a command: runs within lines and over several lines."""
    from golden.memory import TensorLayout

    random = rng(23)
    bench = Bench(dut, seed=3, stall=Stall(0.1, 0.2, 0.1))
    await bench.begin()
    beat = bench.config.beat
    table_at = 0x80000
    for channels, line_blocks, log2_run in (
        (beat, 0, 2),
        (24, 0, 2),
        (64, 8, 3),
        (64, 16, 2),
        (130, 0, 2),
        (130, 8, 1),
    ):
        layout = TensorLayout(
            lines=8,
            pixels=7,
            channels=channels,
            beat=beat,
            image_lines=4,
            line_blocks=line_blocks,
            log2_run=log2_run,
        )
        rows = layout.padded_channels // beat
        x = random.standard_normal((8, 7, channels)).astype(np.float32) * (random.random((8, 7, channels)) < 0.6)
        padded = np.zeros((8, 7, layout.padded_channels), np.float32)
        padded[:, :, :channels] = x
        bench.vmem[: 56 * rows] = padded.reshape(-1, beat)
        policy = Policy(1, HALF_LO, HALF_HI, "fp16", "fp16")
        bits, codes, _ = quantize(to_fp16(x, policy.scale), policy)
        slots, table = layout.pack(bits, codes)
        bench.image[: len(slots)] = bytes(len(slots))
        bench.image[table_at : table_at + len(table)] = bytes(len(table))
        for plane in range(layout.planes):
            command = Command(
                Opcode.STORE,
                slots=bench.base,
                table=bench.base + table_at,
                n_count=2,
                i_count=4,
                j_count=7,
                line=4 * plane,
                line_n=4 * layout.planes,
                line_i=1,
                line_blocks=layout.line_blocks,
                log2_block_pixels=layout.block_pixels.bit_length() - 1,
                log2_run=log2_run,
                scale=1,
                lo=HALF_LO,
                hi=HALF_HI,
                source=plane * BLOCK // beat,
                source_n=28 * rows,
                source_i=7 * rows,
                source_j=rows,
            )
            await bench.run(command)
            assert not bench.errors
        assert bytes(bench.image[: len(slots)]) == slots, channels
        assert bytes(bench.image[table_at : table_at + len(table)]) == table, channels


def malformed(config: ChipConfig):
    """(name, command, error) that the unit must refuse."""
    shared = (BLOCK // config.beat).bit_length() - 1
    good = {
        "n_count": 1, "i_count": 1, "j_count": 1, "line_blocks": 1, "lo": 5, "hi": 5,
    }  # fmt: skip
    fields: list[tuple[str, dict]] = [(name, {name: 0}) for name in ("n_count", "i_count", "j_count", "line_blocks")]
    fields += [
        ("lo > hi", {"lo": 6}),
        ("below", {"below": 3}),
        ("slots", {"slots": 16}),
        ("slots by one", {"slots": 0x1001}),
        ("table", {"table": 8}),
        ("too many pixels in a block", {"log2_block_pixels": shared + 1}),
        ("far too many pixels in a block", {"log2_block_pixels": 7}),
        ("pixel within a block", {"log2_block_pixels": shared, "pixel": (1 << shared) // 2}),
        ("pixel within a block of 2", {"log2_block_pixels": 1, "pixel": 3}),
        ("negative pixel within a block", {"log2_block_pixels": 1, "pixel": -1}),
        ("log2_run", {"log2_run": most_run(config) + 1}),
        ("large log2_run", {"log2_run": 7}),
        ("scale", {"scale": 65}),
        ("negative scale", {"scale": -65}),
    ]
    if config.address_bits < 40:
        fields += [(name, {name: 1 << config.address_bits}) for name in ("slots", "table")]
    ranges = [
        ("line", {"line": -1}),
        ("pixel", {"pixel": -1}),
        ("pixel in a block", {"log2_block_pixels": 1, "pixel": -2}),
    ]
    for kind, cases in ((Error.FIELD, fields), (Error.RANGE, ranges)):
        for name, changes in cases:
            yield name, Command(Opcode.STORE, **(good | changes)), kind
    yield "STORE_RAW", Command(Opcode.STORE_RAW, line_count=1, line_rows=1), Error.OPCODE
    yield "LOAD", Command(Opcode.LOAD), Error.OPCODE
    yield "NOP", Command(Opcode.NOP), Error.OPCODE


async def check_refused(bench: Bench, name: str, command: Command, error: Error) -> None:
    """A command that the unit must refuse: one pulse of this error, and no access."""
    bench.errors.clear()
    bench.requests.clear()
    bench.reads = 0
    cycles = await bench.run(command)
    assert cycles <= 4, name
    await ClockCycles(bench.dut.clk, 5)
    assert bench.errors == [error.value], (name, bench.errors)
    assert not bench.requests and not bench.reads, name
    bench.errors.clear()


@cocotb.test(timeout_time=500, timeout_unit="us")
async def malformed_commands(dut):
    """Refused with one pulse of the right error and no access; the next command runs."""
    random = rng(26)
    bench = Bench(dut, seed=6)
    await bench.begin()
    fill(bench, random)
    for name, command, error in malformed(bench.config):
        await check_refused(bench, name, command, error)
        if random.random() < 0.2:
            await check(bench, random_store(bench, random))
    await check(bench, random_store(bench, random))
    # The widest values that are right.
    for changes in ({"scale": 64}, {"scale": -64}, {"lo": 0x7FFF, "hi": 0x7FFF}):
        await check(bench, random_store(bench, random) | changes)


MIXES = {"empty": (1.0, 0.0), "dense fp8": (0.0, 0.0), "dense fp16": (0.0, 1.0), "half zero, 10 % fp16": (0.5, 0.1)}


@cocotb.test(timeout_time=500, timeout_unit="us")
@cocotb.parametrize(log2=[0, 2], run=[0, 3])
async def throughput(dut, log2, run):
    """A row a cycle, or a word a cycle where that binds (the words of the table among them)."""
    random = rng(27)
    bench = Bench(dut, seed=7)
    await bench.begin()
    beat = bench.config.beat
    for name, (zeros, wide) in MIXES.items():
        shape = (4096, beat)
        x = np.where(random.random(shape) < wide, 512.0, 1.5) * random.choice([-1, 1], shape)
        bench.vmem[:4096] = np.where(random.random(shape) < zeros, 0, x)
        command = one_line(bench, 8, run) | {
            "n_count": 2,
            "i_count": 4,
            "j_count": 8 << log2,
            "line_n": 4,
            "log2_block_pixels": log2,
            "source_n": 32 * BLOCK // beat,
            "source_i": 8 * BLOCK // beat,
            "source_j": BLOCK // beat >> log2,
        }
        cycles, expected = await check(bench, command)
        rows = 64 * BLOCK // beat
        print(
            f"throughput {beat}x{bench.config.axi_bits} {name}, {1 << log2} pixels a block, runs of {1 << run}: "
            f"{rows / cycles:.3f} rows/cycle, {bench.words / cycles:.3f} words/cycle, {cycles} cycles for 64 blocks"
        )
        assert cycles <= max(rows, expected.cycles) + 60, name
