"""Testbench of the DRAIN unit: a store of random partial sums, stalls on every stream, and exact integer arithmetic."""

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import product
from random import Random

import cocotb
from amaranth.lib import data
from cocotb.triggers import RisingEdge

from lnpu.config import ChipConfig
from lnpu.ctrl.commands import Command, Opcode
from lnpu.formats import psum_layout
from lnpu.interfaces import Error, vmem_write
from verif.accumulator_round_tb import expected
from verif.agents import Sink, Source, pack, start, unpack
from verif.runner import parameters, rng

CONFIG = ChipConfig(**parameters()["config"])
ROW = data.ArrayLayout(psum_layout(CONFIG.acc_bits), CONFIG.lanes)
ROW_CARRIES = psum_layout(CONFIG.acc_bits)["carries"].width
WRITE = vmem_write(CONFIG)
BEATS = CONFIG.lanes // CONFIG.beat
MINUS_ZERO = 0x80000000


def random_psum(random: Random) -> dict:
    """A partial sum: of any length, many in the range of FP16, a few with flags, some masked."""
    length = random.choice((random.randrange(1, CONFIG.acc_bits), random.randrange(20, 66)))
    value = random.choice((-1, 1)) * random.getrandbits(length - 1 or 1) if random.random() > 0.05 else 0
    masked = random.random() < 0.1
    flags = {name: int(masked or random.random() < 0.01) for name in ("nan", "pinf", "ninf")}
    return {"acc": value & ((1 << CONFIG.acc_bits) - 1), "carries": random.getrandbits(ROW_CARRIES), **flags}


@dataclass
class Outcome:
    """What a command does."""

    requests: list[tuple[int, int]] = field(default_factory=list)
    writes: list[tuple[int, list[int]]] = field(default_factory=list)
    errors: list[Error] = field(default_factory=list)
    nonfinite: int = 0


class Model:
    """Partial-sum stores with random contents, and what a DRAIN command makes of them."""

    def __init__(self, random: Random) -> None:
        self.sums = [
            [[random_psum(random) for _ in range(CONFIG.lanes)] for _ in range(CONFIG.psum_rows)]
            for _ in range(CONFIG.cores)
        ]

    def run(self, command: Command) -> Outcome:
        """Outcome of a command."""
        f = Command.decode(command.encode()).fields
        out = Outcome()
        legal = (
            f["count_n"] and f["count_h"] and f["count_w"] and f["lane_beats"]
            and f["lane_beat"] + f["lane_beats"] <= BEATS
            and f["core"] < CONFIG.cores
            and (-64 <= f["scale"] <= 64 if f["fp16"] else f["scale"] == 0)
        )  # fmt: skip
        if not legal:
            out.errors.append(Error.FIELD)
            return out
        for n, h, w in product(range(f["count_n"]), range(f["count_h"]), range(f["count_w"])):
            row = f["psum"] + n * f["psum_n"] + h * f["psum_h"] + w * f["psum_w"]
            address = f["vmem"] + n * f["vmem_n"] + h * f["vmem_h"] + w * f["vmem_w"]
            if not 0 <= row < CONFIG.psum_rows:
                out.errors.append(Error.RANGE)
                continue
            out.requests.append((f["core"], row))
            for beat in range(f["lane_beats"]):
                first = (f["lane_beat"] + beat) * CONFIG.beat
                results = [
                    self.result(psum, f) if lane < f["lanes"] else (0, False)
                    for lane, psum in enumerate(self.sums[f["core"]][row][first : first + CONFIG.beat], start=first)
                ]
                out.writes.append(((address + beat) % (1 << 16), [result[0] for result in results]))
                out.nonfinite += any(result[1] for result in results)
        return out

    @staticmethod
    def result(psum: dict, f: dict) -> tuple[int, bool]:
        """What a sum is written as, and whether that is infinite or NaN."""
        if f["masked"] and psum["nan"] and psum["pinf"] and psum["ninf"]:
            return MINUS_ZERO, False
        value, nonfinite = expected(psum, f["shift"], f["scale"], f["fp16"], f["saturate"], CONFIG.acc_bits)
        return 0 if f["masked"] and value == MINUS_ZERO else value, nonfinite


class Testbench:
    """Agents on every port, and the rules of streams, `busy`, `error` and `nonfinite`."""

    def __init__(self, dut, model: Model, *, seed: int = 0, stall: float = 0.0) -> None:
        self.dut, self.model = dut, model
        self.random = Random(seed)
        self.edge = RisingEdge(dut.clk)
        self.source = Source(dut, "command", seed=seed, stall=stall)
        self.writes = Sink(dut, "write", seed=seed + 1, stall=stall)
        self.request_stall = stall
        self.rows = [[pack(ROW, row) for row in core] for core in model.sums]
        self.requests: list[tuple[int, int]] = []
        self.errors: list[Error] = []
        self.nonfinite = 0
        self.busy_cycles = self.overlaps = 0
        self.outcomes: deque[Outcome] = deque()  # of the commands that are to be taken
        self.writes_left: list[int] = []  # of each command that was taken, from the first that is not done
        dut.psum_request__ready.value = 0
        self._show(self.random.getrandbits(ROW.size))

    async def begin(self) -> None:
        """Reset, then watch."""
        await start(self.dut)
        cocotb.start_soon(self._psum_store())
        cocotb.start_soon(self._watch())

    def _show(self, row: int) -> None:
        """Put a row of partial sums on the ports of its lanes."""
        width = psum_layout(CONFIG.acc_bits).size
        for n in range(CONFIG.lanes):
            getattr(self.dut, f"psum__{n}").value = row >> n * width & (1 << width) - 1

    async def _psum_store(self) -> None:
        dut, random = self.dut, self.random
        while True:
            ready = random.random() >= self.request_stall
            dut.psum_request__ready.value = int(ready)
            await self.edge
            if ready and int(dut.psum_request__valid.value):
                word = int(dut.psum_request__payload.value)
                core, row = word & 15, word >> 4
                self.requests.append((core, row))
                assert core < CONFIG.cores and row < CONFIG.psum_rows, f"request of core {core}, row {row}"
                self._show(self.rows[core][row])

    async def _watch(self) -> None:
        dut = self.dut
        held = {"write": None, "psum_request": None}
        was_busy = event = taken = False
        while True:
            await self.edge
            for name, payload in held.items():
                valid, ready = (int(getattr(dut, f"{name}__{wire}").value) for wire in ("valid", "ready"))
                now = int(getattr(dut, f"{name}__payload").value)
                assert payload is None or (valid and payload == now), f"{name} changes before it is taken"
                held[name] = now if valid and not ready else None
            busy, error, nonfinite = int(dut.busy.value), int(dut.error.value), int(dut.nonfinite.value)
            ready = int(dut.command__ready.value)
            assert busy or not taken, "not busy in the cycle after the command"
            assert not (was_busy and not busy) or event, "busy without anything to do in its last cycle"
            assert ready or busy, "idle, but not ready"
            self._check_earlier()
            assert busy or not (error or nonfinite or int(dut.write__valid.value) or int(dut.psum_request__valid.value))
            event = bool(error) or bool(int(dut.write__valid.value) and int(dut.write__ready.value))
            if int(dut.write__valid.value) and int(dut.write__ready.value):
                first = next(i for i, left in enumerate(self.writes_left) if left)
                self.writes_left[first] -= 1
            taken = bool(ready and int(dut.command__valid.value))
            if taken:
                self.writes_left.append(len(self.outcomes.popleft().writes))
            was_busy = busy
            self.busy_cycles += busy
            self.nonfinite += nonfinite
            if error:
                self.errors.append(Error(error))

    def _check_earlier(self) -> None:
        """`earlier`: a command before the last one has writes left."""
        while len(self.writes_left) > 1 and not self.writes_left[0]:
            del self.writes_left[0]
        earlier = int(self.dut.earlier.value)
        assert not earlier or any(self.writes_left[:-1]), "earlier, but everything is written"
        if all(self.writes_left[1:]):  # no command that was dropped
            assert earlier == any(self.writes_left[:-1]), f"not earlier, but left: {self.writes_left}"
        self.overlaps += earlier

    async def run(self, commands: list[Command]) -> int:
        """Run the commands back to back, check everything and return for how many cycles the unit was busy."""
        before = self.busy_cycles
        outcomes = [self.model.run(command) for command in commands]
        self.outcomes.extend(outcomes)
        await self.source.put([int.from_bytes(command.encode(), "little") for command in commands])
        for _ in range(100_000):
            await self.edge
            if not int(self.dut.busy.value):
                break
        else:
            raise AssertionError("the unit hangs")
        await self.edge
        want = [write for outcome in outcomes for write in outcome.writes]
        got = [(item["address"], item["row"]) for item in (unpack(WRITE, word) for word in self.writes)]
        for index, (one, other) in enumerate(zip(got, want, strict=False)):
            assert one == other, f"write {index}: {one}, not {other}"
        assert len(got) == len(want), f"{len(got)} writes, not {len(want)}"
        assert self.requests == [request for outcome in outcomes for request in outcome.requests]
        assert self.errors == [error for outcome in outcomes for error in outcome.errors]
        assert self.nonfinite == sum(outcome.nonfinite for outcome in outcomes)
        self.writes.words.clear()
        self.requests.clear()
        self.errors.clear()
        self.nonfinite = 0
        return self.busy_cycles - before


def random_command(random: Random) -> Command:
    """A legal command; one in four leaves the store now and then."""
    fp16 = random.getrandbits(1)
    lane_beat = random.randrange(BEATS)
    counts = [random.choice((1, 1, 2, 3, 4)) for _ in range(3)]
    reach = CONFIG.psum_rows // 3
    strides = [random.randint(-reach, reach) // count for count in counts]
    lowest = sum(min(0, stride * (count - 1)) for stride, count in zip(strides, counts, strict=True))
    highest = sum(max(0, stride * (count - 1)) for stride, count in zip(strides, counts, strict=True))
    base = random.randint(-lowest, CONFIG.psum_rows - 1 - highest)
    if random.random() < 0.25:
        base = random.randint(-3, CONFIG.psum_rows + 2)
    return Command(
        Opcode.DRAIN,
        core=random.randrange(CONFIG.cores),
        **{f"count_{loop}": count for loop, count in zip("nhw", counts, strict=True)},
        lane_beat=lane_beat,
        lane_beats=random.randint(1, BEATS - lane_beat),
        lanes=random.choice((CONFIG.lanes, 255, random.randint(0, CONFIG.lanes))),
        shift=random.choice((0, random.randint(-30, 30), random.randint(-160, 160), random.randint(-2048, 2047))),
        scale=random.randint(-64, 64) * fp16,
        fp16=fp16,
        saturate=random.getrandbits(1),
        masked=random.getrandbits(1),
        psum=base,
        **{f"psum_{loop}": stride for loop, stride in zip("nhw", strides, strict=True)},
        vmem=random.getrandbits(16),
        **{f"vmem_{loop}": random.choice((0, 1, -7, random.randint(-32768, 32767))) for loop in "nhw"},
    )


async def testbench(dut, **options) -> Testbench:
    """A testbench with a model, out of reset."""
    bench = Testbench(dut, Model(Random(int(rng().integers(1 << 30)))), **options)
    await bench.begin()
    return bench


@cocotb.test()
async def random_commands(dut):
    """Random commands back to back with several rates of stalls."""
    bench = await testbench(dut, seed=1)
    random = Random(int(rng(2).integers(1 << 30)))
    for stall in (0.0, 0.1, 0.5, 0.9):
        bench.source.stall = bench.writes.stall = bench.request_stall = stall
        await bench.run([random_command(random) for _ in range(parameters()["commands"] // 4)])
    assert bench.overlaps > 200, f"{bench.overlaps} cycles of a command before the last writes of the one before"


@cocotb.test()
async def masked(dut):
    """With `masked`, rows of masked sums, of sums that underflow on both sides and of others: where -0 is written."""
    model = Model(Random(int(rng(8).integers(1 << 30))))
    kinds = (
        {"acc": 0, "carries": 0, "nan": 1, "pinf": 1, "ninf": 1},
        {"acc": (1 << CONFIG.acc_bits) - 1, "carries": 0, "nan": 0, "pinf": 0, "ninf": 0},  # -2^-48
        {"acc": 1, "carries": 0, "nan": 0, "pinf": 0, "ninf": 0},
        {"acc": 0, "carries": 0, "nan": 1, "pinf": 0, "ninf": 0},
        {"acc": 0, "carries": 0, "nan": 0, "pinf": 1, "ninf": 1},
        {"acc": 0, "carries": 0, "nan": 0, "pinf": 0, "ninf": 0},
    )
    for row, lane in product(range(CONFIG.psum_rows), range(CONFIG.lanes)):
        model.sums[0][row][lane] = dict(kinds[0 if row == 0 else (row + lane) % len(kinds)])
    bench = Testbench(dut, model)
    await bench.begin()
    written = Counter()
    for is_masked, fp16, lanes in product((1, 0), (0, 1), (CONFIG.lanes, 1)):
        command = Command(
            Opcode.DRAIN, count_n=1, count_h=1, count_w=CONFIG.psum_rows, psum_w=1, vmem_w=BEATS, lane_beats=BEATS,
            lanes=lanes, fp16=fp16, masked=is_masked, shift=0 if fp16 else -110,
        )  # fmt: skip
        outcome = model.run(command)
        for _, row in outcome.writes:
            written.update((is_masked, word) for word in row)
        await bench.run([command])
    assert written[1, MINUS_ZERO] and written[0, MINUS_ZERO] and written[0, 0x7FC00000], f"{written}"


@cocotb.test()
async def stall_one_side(dut):
    """Slow writes with a fast store, and the other way round."""
    bench = await testbench(dut, seed=2)
    random = Random(int(rng(3).integers(1 << 30)))
    for slow_write, slow_store in ((0.8, 0.0), (0.0, 0.8), (0.5, 0.0), (0.0, 0.5)):
        bench.writes.stall, bench.request_stall = slow_write, slow_store
        await bench.run([random_command(random) for _ in range(parameters()["commands"] // 8)])


@cocotb.test()
async def full_rate(dut):
    """A beat a cycle without stalls, also where every beat needs a row of its own."""
    bench = await testbench(dut)
    for lane_beats in range(1, BEATS + 1):
        for lane_beat in range(BEATS - lane_beats + 1):
            command = Command(
                Opcode.DRAIN, count_n=2, count_h=3, count_w=7, lane_beat=lane_beat, lane_beats=lane_beats, fp16=1,
                lanes=CONFIG.lanes,
                psum_w=1, psum_h=1, psum_n=2, vmem=5, vmem_w=lane_beats, vmem_h=7 * lane_beats, vmem_n=21 * lane_beats,
            )  # fmt: skip
            cycles = await bench.run([command])
            assert cycles == 42 * lane_beats + parameters()["latency"], f"{cycles} cycles for {42 * lane_beats} beats"


@cocotb.test()
async def one_behind_the_other(dut):
    """A command's first row comes three cycles after the last one before it, or when that one's beats are taken."""
    bench = await testbench(dut)
    for lane_beats in range(1, BEATS + 1):
        command = Command(
            Opcode.DRAIN, count_n=1, count_h=1, count_w=7, lane_beats=lane_beats, fp16=1, lanes=CONFIG.lanes, psum_w=1,
            vmem_w=lane_beats,
        )  # fmt: skip
        cycles = await bench.run(5 * [command])
        between = max(0, 3 - lane_beats)
        assert cycles == 35 * lane_beats + 4 * between + parameters()["latency"], f"{cycles} cycles, {lane_beats} beats"


@cocotb.test()
async def illegal_fields(dut):
    """Each rule just broken and just kept; a dropped command leaves no trace, and the next one runs."""
    bench = await testbench(dut, seed=4)
    good = {
        "core": CONFIG.cores - 1, "count_n": 1, "count_h": 2, "count_w": 2, "lane_beat": 0, "lane_beats": BEATS,
        "lanes": CONFIG.lanes, "fp16": 1, "scale": 0, "psum_w": 1, "psum_h": 2, "vmem_w": 9, "vmem_h": 30, "shift": 3,
    }  # fmt: skip
    variants: list[dict] = [
        {}, {"count_n": 0}, {"count_h": 0}, {"count_w": 0}, {"lane_beats": 0}, {"lane_beat": 1}, {"lane_beat": 63},
        {"lane_beats": BEATS + 1}, {"lane_beat": 63, "lane_beats": 63}, {"lane_beat": BEATS, "lane_beats": 0},
        {"lane_beat": BEATS - 1, "lane_beats": 1}, {"lane_beat": BEATS, "lane_beats": 1}, {"core": CONFIG.cores},
        {"core": 15}, {"scale": 64}, {"scale": 65}, {"scale": -64}, {"scale": -65}, {"scale": 127}, {"scale": -128},
        {"fp16": 0}, {"fp16": 0, "scale": 1}, {"fp16": 0, "scale": -1}, {"fp16": 0, "scale": -128},
        {"count_n": 0, "psum": -1},
    ]  # fmt: skip
    for stall in (0.0, 0.5):
        bench.source.stall = bench.writes.stall = bench.request_stall = stall
        for variant in variants:
            await bench.run([Command(Opcode.DRAIN, **{**good, **variant}), Command(Opcode.DRAIN, **good)])


@cocotb.test()
async def ranges(dut):
    """Rows outside the store are skipped, wherever they are in the walk; addresses do not wrap."""
    bench = await testbench(dut, seed=5)
    rows = CONFIG.psum_rows
    walks: list[dict] = [
        {"psum": rows - 1}, {"psum": rows}, {"psum": -1}, {"psum": 2047}, {"psum": -2048},
        {"psum": -2, "psum_w": 1, "count_w": 5}, {"psum": rows - 2, "psum_w": 1, "count_w": 5},
        {"psum": 0, "psum_w": -2048, "count_w": 5},
        {"psum": 3, "psum_h": 2047, "psum_w": 1, "count_w": 2, "count_h": 9},
        {"psum": 0, "psum_n": -2048, "psum_h": -2048, "psum_w": -2048, "count_n": 3, "count_h": 3, "count_w": 3},
        {"psum": 5, "psum_n": -2048, "psum_h": 2047, "psum_w": 1, "count_n": 3, "count_h": 3, "count_w": 3},
        {"psum": 2047, "psum_n": 2047, "psum_h": 2047, "psum_w": -1, "count_n": 1023, "count_h": 2, "count_w": 2},
        {"psum": 0, "psum_w": -2048, "count_w": 1023}, {"psum": 2, "psum_n": 2047, "count_n": 1023},
    ]  # fmt: skip
    for stall in (0.0, 0.5):
        bench.source.stall = bench.writes.stall = bench.request_stall = stall
        for walk in walks:
            base = {
                "count_n": 1,
                "count_h": 1,
                "count_w": 1,
                "lane_beats": BEATS,
                "lanes": CONFIG.lanes,
                "fp16": 1,
                "vmem": 65530,
                "vmem_w": 3,
            }
            await bench.run([Command(Opcode.DRAIN, **{**base, **walk})])


@cocotb.test()
async def any_bits(dut):
    """Random bits as commands, but for the size of the counts: the unit never hangs."""
    bench = await testbench(dut, seed=6, stall=0.2)
    random = Random(int(rng(7).integers(1 << 30)))
    commands = []
    for index in range(parameters()["commands"]):
        raw = bytes([Opcode.DRAIN.value]) + random.randbytes(63)
        fields = Command.decode(raw).fields
        for name in ("count_n", "count_h", "count_w"):
            fields[name] &= 3
        if index % 2:  # otherwise hardly any is legal
            fields |= {"core": 0, "scale": 0, "lane_beat": 0, "lane_beats": BEATS, "lanes": CONFIG.lanes}
        commands.append(Command(Opcode.DRAIN, **fields))
    await bench.run(commands)
