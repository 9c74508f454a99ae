"""Testbench of the vector unit: random commands against NumPy float32 and exact sums of Python integers."""

from collections import Counter, defaultdict
from itertools import pairwise
from random import Random

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from golden.fgmp import Policy, quantize
from lnpu.config import TINY
from lnpu.ctrl.commands import Command, Opcode, VectorOp
from lnpu.interfaces import Error
from verif.agents import Source, start
from verif.runner import parameters, rng

CONFIG = TINY.replace(**parameters()["config"])
BEAT = CONFIG.beat
ROW_BYTES = 4 * BEAT
ROUNDS = parameters()["rounds"]  # random commands of each operation in a test
ADDRESSES = 1 << 16
NAN32 = 0x7FC00000
MINUS_ZERO = 0x80000000

READS_B = set(VectorOp) - {VectorOp.COPY, VectorOp.SQRT, VectorOp.SUM_OUT}
READS_C = {VectorOp.MULADD, VectorOp.KEEP_EQUAL}
DIVISIONS = {VectorOp.DIV, VectorOp.SQRT}
SPECIALS = np.array(
    [
        0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC01234, 0x7F800001, 0x00000001, 0x80000001,
        0x007FFFFF, 0x807FFFFF, 0x00800000, 0x80800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0xBF800000, 0x40000000,
        0x3F7FFFFF, 0x3F800001, 0x477FE000, 0xC77FE000, 0x33800000, 0x33000000, 0x33000001, 0x477FF000,
    ],
    dtype=np.uint32,
)  # fmt: skip


def random_values(random: np.random.Generator, shape) -> np.ndarray:
    """FP32 patterns of many kinds, each in a good share: any pattern, moderate, exact in FP16, special."""
    patterns = random.integers(0, 1 << 32, shape, dtype=np.uint32)
    moderate = random.normal(0, 1, shape).astype(np.float32)
    half = random.integers(0, 1 << 16, shape, dtype=np.uint16).view(np.float16)
    near_one = np.float32(1) + random.integers(-8, 8, shape).astype(np.float32) * np.float32(2**-23)
    tiny = random.integers(0, 1 << 24, shape, dtype=np.uint32) | random.integers(0, 2, shape, dtype=np.uint32) << 31
    special = random.choice(SPECIALS, shape)
    with np.errstate(invalid="ignore"):
        kinds = [
            patterns, moderate.view(np.uint32), half.astype(np.float32).view(np.uint32), near_one.view(np.uint32),
            tiny, special,
        ]  # fmt: skip
    return np.choose(random.integers(0, len(kinds), shape), kinds)


def is_nan(x: np.ndarray) -> np.ndarray:
    return np.isnan(x.view(np.float32))


def compute(op: VectorOp, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Element-wise operations on patterns; results of arithmetic have canonical NaNs."""
    x, y, z = (value.view(np.float32) for value in (a, b, c))
    zero = np.uint32(0)
    with np.errstate(all="ignore"):
        match op:
            case VectorOp.COPY:
                return a
            case VectorOp.KEEP_POSITIVE:
                return np.where(y > 0, a, zero)
            case VectorOp.KEEP_EQUAL:
                return np.where(y == z, a, zero)
            case VectorOp.GREATER_EQUAL:
                return np.where(x >= y, np.uint32(0x3F800000), zero)
            case VectorOp.MAX | VectorOp.MIN:
                chosen = np.where(x > y if op == VectorOp.MAX else x < y, a, b)
                return np.where(is_nan(a) | is_nan(b), np.uint32(NAN32), chosen)
            case VectorOp.ADD | VectorOp.ADD_UNMASKED:
                result = np.where(a == MINUS_ZERO, np.float32(0), x + y) if op == VectorOp.ADD_UNMASKED else x + y
            case VectorOp.SUB:
                result = x - y
            case VectorOp.MUL:
                result = x * y
            case VectorOp.MULADD:
                result = x * y + z
            case VectorOp.DIV:
                result = x / y
            case VectorOp.SQRT:
                result = np.sqrt(x)
            case _:
                raise ValueError(op)
    assert result.dtype == np.float32
    return np.where(np.isnan(result), np.uint32(NAN32), result.view(np.uint32))


def to_half(x: np.ndarray, shift: int) -> np.ndarray:
    """RNE16(x * 2^-shift) of FP32 patterns. (float64 holds the product exactly.)"""
    with np.errstate(all="ignore"):
        return np.ldexp(x.view(np.float32).astype(np.float64), -shift).astype(np.float16)


def round_single(value: int, exponent: int) -> int:
    """FP32 pattern of the integer `value` * 2^exponent, rounded to nearest even."""
    if value == 0:
        return 0
    magnitude = abs(value)
    lsb = max(magnitude.bit_length() - 1 + exponent - 23, -149)
    if exponent >= lsb:
        quotient = magnitude << (exponent - lsb)
    else:
        drop = lsb - exponent
        quotient, rest = magnitude >> drop, magnitude & ((1 << drop) - 1)
        quotient += rest > 1 << (drop - 1) or (rest == 1 << (drop - 1) and quotient & 1)
    pattern = ((lsb + 149) << 23) + quotient
    return min(pattern, 0x7F800000) | (value < 0) << 31


class ExactSum:
    """Sum of FP16 products in units of 2^-48, and what non-finite operands contributed."""

    def __init__(self) -> None:
        self.value, self.nan, self.pinf, self.ninf = 0, False, False, False

    def add(self, a: np.float16, b: np.float16) -> None:
        if a == 0:
            return
        with np.errstate(invalid="ignore"):
            product = np.float64(a) * np.float64(b)
        if np.isnan(product):
            self.nan = True
        elif np.isinf(product):
            self.pinf |= bool(product > 0)
            self.ninf |= bool(product < 0)
        else:
            self.value += int(np.ldexp(product, 48))

    def rounded(self, shift: int) -> int:
        if self.nan or (self.pinf and self.ninf):
            return NAN32
        if self.pinf or self.ninf:
            return 0xFF800000 if self.ninf else 0x7F800000
        return round_single(self.value, shift - 48)


class Model:
    """Vector memory and sums, and what a command does to them."""

    def __init__(self, random: np.random.Generator) -> None:
        self.memory = random_values(random, (ADDRESSES, BEAT))
        self.sums: dict[int, list[ExactSum]] = {}

    def run(self, fields: dict) -> None:
        fields = defaultdict(int, fields)
        op = VectorOp(fields["op"])
        outer, inner = fields["outer"], fields["inner"]
        if op == VectorOp.SUM:
            a = to_half(self.operand(fields, "a"), fields["a_shift"])
            if fields["quantise"]:
                names = ("fp16", "fp8", "zero")[fields["below"]], ("fp16", "fp8")[fields["above"]]
                kept, _, _ = quantize(a.view(np.uint16), Policy(0, fields["lo"], fields["hi"], *names))
                a = kept.view(np.float16)
            b = to_half(self.operand(fields, "b"), fields["b_shift"])
            for o in range(outer):
                row = fields["sum"] + o
                if fields["initialise"]:
                    self.sums[row] = [ExactSum() for _ in range(BEAT)]
                for lane, total in enumerate(self.sums[row]):
                    for i in range(inner):
                        total.add(a[o, i, lane], b[o, i, lane])
            return
        if op == VectorOp.SUM_OUT:
            shift = fields["a_shift"] + fields["b_shift"]
            rows = [[total.rounded(shift) for total in self.sums[fields["sum"] + o]] for o in range(outer)]
            result = np.repeat(np.array(rows, dtype=np.uint32)[:, None], inner, axis=1)
        else:
            result = compute(op, *(self.operand(fields, name) for name in "abc"))
        if fields["rectify"]:
            result = np.where((result >> 31 != 0) & ~is_nan(result), np.uint32(0), result)
        if fields["masked"] and op != VectorOp.SUM_OUT:
            result = np.where(self.operand(fields, "c").view(np.float32) > 0, result, np.uint32(0))
        for address, row in zip(walk(fields, "dst").ravel(), result.reshape(-1, BEAT), strict=True):
            self.memory[address] = row

    def operand(self, fields: dict, name: str) -> np.ndarray:
        """Patterns of an operand: (outer, inner, beat)."""
        if fields.get(f"{name}_immediate"):
            return np.full((fields["outer"], fields["inner"], BEAT), fields[f"immediate_{name}"], dtype=np.uint32)
        return self.memory[walk(fields, name)]


def walk(fields: dict, name: str) -> np.ndarray:
    """Addresses of an operand or of `dst`: (outer, inner)."""
    o, i = np.ogrid[: fields["outer"], : fields["inner"]]
    base, outer, inner = (fields.get(f"{name}{part}", 0) for part in ("", "_outer", "_inner"))
    return (base + o * outer + i * inner) % ADDRESSES


def memory_operands(op: VectorOp, fields: dict) -> list[str]:
    """Operands that a command reads from the vector memory."""
    masked = fields.get("masked", 0) and op not in (VectorOp.SUM, VectorOp.SUM_OUT)
    reads = {"a": op != VectorOp.SUM_OUT, "b": op in READS_B, "c": op in READS_C or masked}
    return [name for name, used in reads.items() if used and not fields.get(f"{name}_immediate")]


def expected_reads(op: VectorOp, fields: dict) -> dict[str, list[int]]:
    """Addresses that a command reads for each operand, in order."""
    names = memory_operands(op, fields)
    walks = {name: walk(fields, name) for name in names}
    if "b" in names and all(
        fields.get(f"a{part}", 0) == fields.get(f"b{part}", 0) for part in ("", "_outer", "_inner")
    ):
        names.remove("b")  # the row of a serves
    still = {name for name in "bc" if not fields.get(f"{name}_inner", 0)}
    return {
        name: (walks[name][:, :1] if name in still else walks[name]).ravel().tolist() if name in names else []
        for name in "abc"
    }


class Bench:
    """Vector memory beside the unit, with grants at random, and checks of the protocol in every cycle.

    Attributes
    ----------
    stall : float
        Probability, in each cycle, that a request or a write is not taken.
    reads : dict
        Of each operand a list of (cycle, address), the accesses since the last `clear`.
    writes : list of tuple
        (cycle, address) likewise.
    errors : list of tuple
        (cycle, code) likewise.
    busy : int
        Cycles with `busy` likewise.
    """

    def __init__(self, dut, random: np.random.Generator, stall: float = 0.0) -> None:
        self.dut = dut
        self.random = random
        self.stall = stall
        self.model = Model(random)
        self.memory = self.model.memory.copy()
        self.source = Source(dut, "command")
        self.edge = RisingEdge(dut.clk)
        self.clear()
        dut.write__ready.value = 0
        for name in "abc":
            getattr(dut, f"read_{name}__request__ready").value = 0
            getattr(dut, f"read_{name}__row").value = 0

    def clear(self) -> None:
        self.cycle, self.busy = 0, 0
        self.reads = {name: [] for name in "abc"}
        self.writes, self.errors = [], []

    async def start(self) -> None:
        await start(self.dut)
        self._task = cocotb.start_soon(self._run())

    async def _run(self) -> None:
        dut, chance = self.dut, Random(int(self.random.integers(1 << 30)))
        ports = {
            name: [
                getattr(dut, f"read_{name}__{wire}")
                for wire in ("request__valid", "request__payload", "request__ready", "row")
            ]
            for name in "abc"
        }
        write, payload, write_ready = dut.write__valid, dut.write__payload, dut.write__ready
        junk = int.from_bytes(self.random.bytes(ROW_BYTES), "little")
        may_read, may_write = dict.fromkeys("abc", False), False
        asked, offered = dict.fromkeys("abc"), None
        while True:
            await self.edge
            self.cycle += 1
            busy = int(dut.busy.value)
            self.busy += busy
            assert int(dut.command__ready.value) == (not busy)
            if code := int(dut.error.value):
                assert busy
                self.errors.append((self.cycle, code))
            for name, (request, address, _, row) in ports.items():
                row.value = junk  # a row is there for one cycle
                if asked[name] is not None or int(request.value):
                    assert int(request.value), "request withdrawn"
                    here = int(address.value)
                    assert asked[name] in (None, here), "request changed"
                    asked[name] = here
                    if may_read[name]:
                        row.value = int.from_bytes(self.memory[here].tobytes(), "little")
                        self.reads[name].append((self.cycle, here))
                        asked[name] = None
            if offered is not None or int(write.value):
                assert int(write.value), "write withdrawn"
                word = int(payload.value)
                assert offered in (None, word), "write changed"
                offered = word
                if may_write:
                    here = word & 0xFFFF
                    self.memory[here] = np.frombuffer((word >> 16).to_bytes(ROW_BYTES, "little"), dtype="<u4")
                    self.writes.append((self.cycle, here))
                    offered = None
            stall = self.stall
            may_write = chance.random() >= stall
            write_ready.value = may_write
            for name, (_, _, ready, _) in ports.items():
                may_read[name] = chance.random() >= stall
                ready.value = may_read[name]

    async def put(self, fields: dict) -> None:
        """Offer a command, and return when it has been taken."""
        word = int.from_bytes(Command(Opcode.VECTOR, **fields).encode(), "little")
        await self.source.put(word)

    async def idle(self, timeout: int = 50_000) -> None:
        """Wait until the unit is idle."""
        await self.edge
        for _ in range(timeout):
            await self.edge
            if not int(self.dut.busy.value):
                if self._task.done():
                    self._task.result()
                return
        raise TimeoutError("the unit is busy for ever")

    async def run(self, fields: dict) -> None:
        """Run one command, and compare the memory with the model's, the addresses, their order and the errors."""
        self.clear()
        await self.put(fields)
        await self.idle()
        self.model.run(fields)
        self.compare(fields)
        op = VectorOp(fields["op"])
        reads = {name: [address for _, address in accesses] for name, accesses in self.reads.items()}
        assert reads == expected_reads(op, fields), describe(fields)
        writes = [] if op == VectorOp.SUM else walk(fields, "dst").ravel().tolist()
        assert [address for _, address in self.writes] == writes, describe(fields)
        assert not self.errors

    def compare(self, fields: dict) -> None:
        """Compare the memory with the model's."""
        wrong = np.argwhere(self.memory != self.model.memory)
        for address, lane in wrong[:1]:
            got, expected = self.memory[address, lane], self.model.memory[address, lane]
            raise AssertionError(
                f"{describe(fields)}: row {address:#x} lane {lane} (of {len(wrong)} wrong): {got:#010x}, not"
                f" {expected:#010x}"
            )


def describe(fields: dict) -> str:
    return f"{VectorOp(fields['op']).name} {fields}"


def random_command(random: np.random.Generator, op: VectorOp, *, beats: int, initialised: dict) -> dict:
    """A legal command whose `dst` is none of its operands' rows, or one operand's walk.

    `initialised` are the sum rows that hold something, and how many products at most.
    """
    while True:
        outer = int(random.integers(1, 7))
        inner = int(random.integers(1, max(2, beats // outer)))
        if random.random() < 0.2:
            outer, inner = inner, outer
        if op in DIVISIONS:
            outer, inner = min(outer, 2), min(inner, 3)
        fields: dict = {"op": op.value, "outer": outer, "inner": inner}
        for name in ("dst", "a", "b", "c"):
            fields[name] = int(random.choice([random.integers(ADDRESSES), random.integers(64), ADDRESSES - 3]))
            limit = int(random.choice([2, 40, 1 << 15]))
            for loop in ("outer", "inner"):
                fields[f"{name}_{loop}"] = int(random.integers(-limit, limit))
        if random.random() < 0.2:  # b is a
            fields |= {f"b{part}": fields[f"a{part}"] for part in ("", "_outer", "_inner")}
        for name in "bc":
            if random.random() < 0.3:  # a row for all inner indices
                fields[f"{name}_inner"] = 0
            fields[f"{name}_immediate"] = int(random.random() < 0.3)
            fields[f"immediate_{name}"] = int(random_values(random, ()))
        for name in ("a_shift", "b_shift"):
            fields[name] = int(random.choice([0, random.integers(-12, 13), random.integers(-128, 128)]))
        fields["initialise"] = int(random.random() < 0.5)
        fields |= {"rectify": int(random.random() < 0.3), "masked": int(random.random() < 0.3)}
        limits = sorted(int(limit) for limit in random.choice([random.integers(1 << 15), 0x2000, 0x5C00, 0], 2))
        fields |= {"quantise": int(random.random() < 0.5), "lo": limits[0], "hi": limits[1]}
        fields |= {"below": int(random.integers(3)), "above": int(random.integers(2))}
        fields["sum"] = int(random.integers(1 << 10))
        if op in (VectorOp.SUM, VectorOp.SUM_OUT):
            fields["outer"] = outer = min(outer, CONFIG.sum_rows)
            fields["sum"] = int(random.integers(0, CONFIG.sum_rows - outer + 1))
            rows = range(fields["sum"], fields["sum"] + outer)
            starts = op == VectorOp.SUM and fields["initialise"]
            if not starts and not all(row in initialised for row in rows):
                continue
            if op == VectorOp.SUM:
                for row in rows:
                    initialised[row] = True
        operands = memory_operands(op, fields)
        if operands and random.random() < 0.3:
            name = str(random.choice(operands))  # in place
            for part in ("", "_outer", "_inner"):
                fields[f"dst{part}"] = fields[f"{name}{part}"]
        if op == VectorOp.SUM:
            return fields
        target = walk(fields, "dst").ravel()
        unique = len(set(target.tolist())) == len(target)
        apart = [
            (unique and np.array_equal(walk(fields, name).ravel(), target))
            or not np.isin(walk(fields, name), target).any()
            for name in operands
        ]
        if all(apart):
            return fields


async def random_commands(dut, *, stall: float, rounds: int, default_seed: int) -> Bench:
    random = rng(default_seed)
    bench = Bench(dut, random, stall)
    await bench.start()
    initialised: dict = {}
    seen: Counter = Counter()
    for _ in range(rounds):
        ops = [*VectorOp, VectorOp.SUM, VectorOp.SUM_OUT]
        if not initialised:
            ops = [op for op in ops if op != VectorOp.SUM_OUT]
        for op in ops:
            await bench.run(random_command(random, op, beats=24, initialised=initialised))
            seen[op] += 1
    assert all(seen[op] >= rounds - 1 for op in VectorOp)
    return bench


@cocotb.test()
async def random_stalls(dut):
    """Every operation, random walks, values and shifts, with half the requests and writes held up."""
    await random_commands(dut, stall=0.5, rounds=ROUNDS, default_seed=1)


@cocotb.test()
async def random_free(dut):
    """The same with a memory that always grants."""
    await random_commands(dut, stall=0.0, rounds=ROUNDS, default_seed=2)


@cocotb.test()
async def mostly_stalled(dut):
    """The same with a memory that seldom grants."""
    await random_commands(dut, stall=0.9, rounds=2, default_seed=3)


@cocotb.test()
async def special_pairs(dut):
    """Every operation on all pairs of special values, NaN, infinity, zero and subnormal among them."""
    bench = Bench(dut, rng())
    x, y = (grid.ravel() for grid in np.meshgrid(SPECIALS, SPECIALS, indexing="ij"))
    z = np.roll(y, 1) * (np.arange(len(y)) % 3 == 0) + y * (np.arange(len(y)) % 3 != 0)
    padding = -len(x) % BEAT
    rows = (len(x) + padding) // BEAT
    for base, values in zip((0x1000, 0x2000, 0x3000), (x, y, z.astype(np.uint32)), strict=True):
        block = np.pad(values, (0, padding)).reshape(-1, BEAT)
        bench.model.memory[base : base + rows] = bench.memory[base : base + rows] = block
    await bench.start()
    for op in VectorOp:
        if op in (VectorOp.SUM, VectorOp.SUM_OUT):
            continue
        count = rows
        fields = {"op": op.value, "outer": 1, "inner": count}
        for name, base in zip(("a", "b", "c", "dst"), (0x1000, 0x2000, 0x3000, 0x4000), strict=True):
            fields |= {name: base, f"{name}_inner": 1}
        for flags in ({}, {"rectify": 1}, {"masked": 1}, {"rectify": 1, "masked": 1}):
            await bench.run(fields | flags)
    for chunk in range(0, rows, CONFIG.sum_rows):  # a sum of each pair alone
        count = min(CONFIG.sum_rows, rows - chunk)
        fields = {"op": VectorOp.SUM.value, "outer": count, "inner": 1, "initialise": 1}
        for below in (0, 1, 2):
            limits = {"quantise": 1, "lo": 0x2400, "hi": 0x5F00, "below": below} if below else {}
            operands = {"a": 0x1000 + chunk, "b": 0x2000 + chunk, "a_outer": 1, "b_outer": 1}
            await bench.run(fields | operands | limits)
            await bench.run(fields | {"op": VectorOp.SUM_OUT.value, "dst": 0x4000, "dst_outer": 1})


@cocotb.test()
async def long_sums(dut):
    """A sum over several commands, with cancellation and other sums in between, is exact."""
    random = rng()
    bench = Bench(dut, random, 0.2)
    values = random.integers(0, 0x7C00, (256, BEAT), dtype=np.uint16) | random.integers(0, 2, (256, BEAT)) << 15
    singles = values.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    bench.model.memory[:256] = bench.memory[:256] = singles
    await bench.start()
    outer = 4
    base = {"outer": outer, "inner": 16, "a": 0, "a_outer": 32, "a_inner": 1, "b": 128, "b_outer": 16, "b_inner": 2}
    other = {"op": VectorOp.SUM.value, "outer": 2, "inner": 5, "sum": outer, "initialise": 1, "a": 7, "a_inner": 3}
    await bench.run(base | {"op": VectorOp.SUM.value, "initialise": 1})
    await bench.run(other)
    await bench.run(base | {"op": VectorOp.SUM.value, "a": 16})
    # Take all but a little away again: b negated.
    await bench.run({"op": VectorOp.MUL.value, "outer": 1, "inner": 128, "a": 128, "a_inner": 1, "b_immediate": 1,
                     "immediate_b": 0xBF800000, "dst": 512, "dst_inner": 1})  # fmt: skip
    await bench.run(base | {"op": VectorOp.SUM.value, "a": 16, "b": 512, "inner": 15})
    await bench.run(base | {"op": VectorOp.SUM.value, "a": 0, "b": 512})
    for shift in (0, -20, 100):
        out = {"op": VectorOp.SUM_OUT.value, "outer": outer + 2, "inner": 1, "dst": 1000, "dst_outer": -1}
        await bench.run(out | {"a_shift": shift, "b_shift": 3})
    assert all(total.value for row in bench.model.sums.values() for total in row)


@cocotb.test()
async def short_sums(dut):
    """Sums that go on with a stored row in every cycle or every other one, command behind command."""
    random = rng()
    bench = Bench(dut, random)
    values = random.normal(0, 1, (128, BEAT)).astype(np.float32).view(np.uint32)
    bench.model.memory[:128] = bench.memory[:128] = values
    await bench.start()
    for bench.stall in (0.0, 0.4):
        commands = [{"outer": 8, "inner": 1, "sum": 0, "initialise": 1}]
        commands += [{"outer": outer, "inner": inner, "sum": 1} for outer in (6, 1, 7) for inner in (1, 2, 1)]
        for command in commands:
            a, b = random.integers(60, size=2).tolist()
            steps = {"a": a, "a_outer": 7, "a_inner": 1, "b": b, "b_outer": 1, "b_inner": 9}
            await bench.put(fields := command | steps | {"op": VectorOp.SUM.value})
            bench.model.run(fields)
        out = {"op": VectorOp.SUM_OUT.value, "outer": 8, "inner": 1, "dst": 1000, "dst_outer": 1}
        await bench.put(out)
        bench.model.run(out)
        await bench.idle()
        bench.compare(out)
        assert not bench.errors


@cocotb.test()
async def dependent_commands(dut):
    """Commands queued back to back, each of which reads what the one before wrote."""
    random = rng()
    bench = Bench(dut, random)
    await bench.start()
    for bench.stall in (0.0, 0.4):
        commands = []
        ops = [op for op in VectorOp if op not in (VectorOp.SUM, VectorOp.SUM_OUT)]
        for step in range(60):
            source, target = 100 + 10 * (step % 7), 100 + 10 * ((step + 1) % 7)
            op = VectorOp(random.choice([item.value for item in ops]))
            count = int(random.integers(1, 8)) if op not in DIVISIONS else 1
            fields = {"op": op.value, "outer": 1, "inner": count, "dst": target, "dst_inner": 1}
            for name in "abc":
                fields |= {name: source, f"{name}_inner": 1}
            fields["b"] += int(random.integers(0, 3))
            commands.append(fields)
            if step % 5 == 4:  # sums of what was just written, written over it
                common = {"outer": 2, "sum": 3, "a_shift": 1, "inner": 4}
                walk_ = {"a": target, "b": target + 1, "a_inner": 1, "b_inner": 2, "a_outer": 2, "b_outer": 1}
                commands.append(common | walk_ | {"op": VectorOp.SUM.value, "initialise": 1})
                commands.append(common | {"op": VectorOp.SUM_OUT.value, "inner": 1, "dst": target, "dst_outer": 1})
        for fields in commands:
            await bench.put(fields)
            bench.model.run(fields)
        await bench.idle()
        bench.compare(commands[-1])
        assert not bench.errors


@cocotb.test()
async def malformed(dut):
    """A field that cannot be run: FIELD for a cycle, no access; the unit goes on with the next command."""
    random = rng()
    bench = Bench(dut, random, 0.3)
    await bench.start()
    good = {"op": VectorOp.ADD.value, "outer": 2, "inner": 3, "a": 10, "a_inner": 1, "b": 90, "b_outer": 3, "dst": 500,
            "dst_inner": 1, "dst_outer": 3, "sum": 1023}  # fmt: skip
    known = {op.value for op in VectorOp}
    bad = [good | {"op": op} for op in range(32) if op not in known]
    bad += [good | {"op": op.value, "sum": 0, loop: 0} for op in VectorOp for loop in ("outer", "inner")]
    for op in (VectorOp.SUM, VectorOp.SUM_OUT):
        rows = CONFIG.sum_rows
        for first, count in ((rows, 1), (0, rows + 1), (rows - 1, 2), (1023, 1), (1, 65535), (1023, 65535)):
            bad.append(good | {"op": op.value, "sum": first, "outer": count, "initialise": 1})
    for limits in ({"below": 3}, {"lo": 5, "hi": 4}):
        bad.append(good | {"op": VectorOp.SUM.value, "sum": 0, "initialise": 1, "quantise": 1} | limits)
    for fields in bad:
        bench.clear()
        await bench.put(fields)
        await bench.idle()
        assert [code for _, code in bench.errors] == [Error.FIELD.value], fields
        assert not any(bench.reads.values()) and not bench.writes, fields
        assert bench.busy == 1
        if random.random() < 0.2:
            await bench.run(good)
    for op in (VectorOp.SUM, VectorOp.SUM_OUT):  # the last row is still legal
        await bench.run({"op": op.value, "outer": 2, "inner": 1, "sum": CONFIG.sum_rows - 2, "initialise": 1})
    bench.compare(good)


@cocotb.test()
async def throughput(dut):
    """With a memory that always grants: a beat a cycle, no bubble, and a short start and end."""
    bench = Bench(dut, rng())
    await bench.start()
    base = {"outer": 5, "inner": 4}
    for name, address in zip(("a", "b", "c", "dst"), (0, 100, 200, 300), strict=True):
        base |= {name: address, f"{name}_inner": 1, f"{name}_outer": 4}
    beats = 20
    for op in VectorOp:
        if op in DIVISIONS:
            continue
        for immediate in (0, 1):
            fields = base | {"op": op.value, "b_immediate": immediate, "initialise": 1, "sum": 2}
            await bench.run(fields)
            name = f"{op.name}{' immediate' * immediate}"
            for accesses in (*bench.reads.values(), bench.writes):
                gaps = {after - before for (before, _), (after, _) in pairwise(accesses)}
                assert gaps <= {1}, f"{name}: {gaps}, not a beat a cycle"
            dut._log.info(f"{name}: {beats} beats in {bench.busy} cycles")
            assert bench.busy - beats <= 12, f"{name}: {bench.busy} cycles"
    # Rows of b and c for all inner indices, and b that is a.
    still = {"outer": 2, "inner": 30, "b_inner": 0, "c_inner": 0}
    await bench.run(base | still | {"op": VectorOp.MULADD.value})
    assert [len(bench.reads[name]) for name in "abc"] == [60, 2, 2] and bench.busy <= 60 + 12, f"{bench.busy} cycles"
    square = {"b": base["a"], "op": VectorOp.MUL.value}
    await bench.run(base | square)
    assert len(bench.reads["a"]) == beats and bench.busy <= beats + 12, f"{bench.busy} cycles"
    for op in DIVISIONS:
        await bench.run(base | {"op": op.value, "outer": 1})
        dut._log.info(f"{op.name}: 4 beats in {bench.busy} cycles")
        assert bench.busy <= 4 * (33 * BEAT + 4) + 10
