"""Testbench of the FP32 units against NumPy: Fp32Add, Fp32Multiply, Fp32DivideSqrt and the comparisons."""

from collections import deque
from itertools import product
from random import Random

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge, Timer
from cocotb.utils import get_sim_time

from lnpu.formats import F32_NAN
from verif.agents import start
from verif.runner import parameters, rng

PERIOD = 10  # ns, of the clock that `start` makes

MAGNITUDES = [
    0x00000000, 0x00000001, 0x00000002, 0x00000003, 0x00000100, 0x003FFFFF, 0x00400000, 0x00400001, 0x007FFFFE,
    0x007FFFFF, 0x00800000, 0x00800001, 0x00FFFFFF, 0x01000000, 0x01000001, 0x0B800000, 0x0C000001, 0x1FFFFFFF,
    0x20000000, 0x3E800000, 0x3F000000, 0x3F7FFFFE, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3F800002, 0x3FB504F3,
    0x3FC00000, 0x3FFFFFFF, 0x40000000, 0x40400000, 0x40800000, 0x4B000000, 0x4B000001, 0x4B7FFFFF, 0x4B800000,
    0x4B800001, 0x4C000000, 0x5F7FFFFF, 0x5F800000, 0x7E7FFFFF, 0x7E800000, 0x7EFFFFFF, 0x7F000000, 0x7F7FFFFE,
    0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF,
]  # fmt: skip
CORNERS = MAGNITUDES + [0x80000000 | magnitude for magnitude in MAGNITUDES]


def operands(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of corners, then `count` random pairs: of every kind of exponent, close to each other, and ties."""
    corners = np.array(list(product(CORNERS, CORNERS)), np.uint32).T
    a, b = random.integers(0, 1 << 32, (2, count), dtype=np.uint32)
    kind = np.arange(count) % 8
    sign_b = b & np.uint32(0x80000000)
    # 1, 2: exponents within 30 of each other
    near = (a >> 23 & 0xFF).astype(np.int64) + random.integers(-30, 31, count)
    b = np.where((kind == 1) | (kind == 2), sign_b | np.clip(near, 0, 254).astype(np.uint32) << 23 | b & 0x7FFFFF, b)
    # 3: massive cancellation in a sum or difference
    close = (a & 0x7FFFFFFF).astype(np.int64) + random.integers(-3, 4, count)
    b = np.where(kind == 3, sign_b | np.clip(close, 0, 0x7F7FFFFF).astype(np.uint32), b)
    # 4: few significant bits: exact results and ties
    few = np.uint32(0xFFFFFFFF) << random.integers(8, 24, count, dtype=np.uint32)
    a, b = np.where(kind == 4, a & few, a), np.where(kind == 4, b & (few | 0x7F800000), b)
    # 5, 6: products (and quotients) at the lower and the upper end of the range
    want = np.where(kind == 5, random.integers(-25, 3, count), random.integers(251, 257, count))
    exponent = (a >> 23 & 0xFF).astype(np.int64)
    for_product, for_quotient = want + 127 - exponent, exponent + 127 - want
    other = np.where(random.integers(0, 2, count) == 1, for_product, for_quotient)
    usable = ((kind == 5) | (kind == 6)) & (other >= 0) & (other < 255)
    b = np.where(usable, sign_b | np.clip(other, 0, 254).astype(np.uint32) << 23 | b & 0x7FFFFF, b)
    # 7: subnormals
    b = np.where(kind == 7, b & np.uint32(0x80FFFFFF), b)
    order = random.permutation(count)
    return np.concatenate([corners[0], a[order]]), np.concatenate([corners[1], b[order]])


def canonical(values: np.ndarray) -> np.ndarray:
    """Patterns of float32 values, with the canonical NaN."""
    return np.where(np.isnan(values), np.uint32(F32_NAN), values.view(np.uint32)).astype(np.uint32)


def check(operation: str, a: np.ndarray, b: np.ndarray, got: list[int]) -> None:
    """Compare with NumPy."""
    x, y = a.view(np.float32), b.view(np.float32)
    with np.errstate(all="ignore"):
        want = {
            "add": lambda: x + y, "subtract": lambda: x - y, "multiply": lambda: x * y, "divide": lambda: x / y,
            "sqrt": lambda: np.sqrt(x),
        }[operation]()  # fmt: skip
    want = canonical(want)
    wrong = np.flatnonzero(want != np.array(got, np.uint32))
    shown = [f"{operation} {a[i]:08x} {b[i]:08x}: {got[i]:08x}, not {want[i]:08x}" for i in wrong[:5]]
    assert not wrong.size, f"{wrong.size} of {want.size} wrong, e.g. {shown}"


async def pipelined(dut, latency: int, vectors: list[tuple[int, int]], stall: float, **inputs: int) -> list[int]:
    """Results of a pipelined unit, an operand pair every enabled cycle; the operands change while it is disabled."""
    edge, random = RisingEdge(dut.clk), Random(1)
    a, b, enable, o = dut.a, dut.b, dut.enable, dut.o
    results: list[int] = []
    due: deque[int] = deque()  # what `moved` is when each result is there
    moved = 0
    queue = iter(vectors)
    pending = next(queue)
    was_on, last = True, 0
    for name, value in inputs.items():
        getattr(dut, name).value = value
    while len(results) < len(vectors):
        on = random.random() >= stall
        if on and pending:
            a.value, b.value = pending
        else:
            a.value, b.value = random.getrandbits(32), random.getrandbits(32)
        enable.value = on
        await edge  # what is read now is from before the edge
        now = int(o.value)
        assert was_on or now == last, "the output changes while the unit is disabled"
        if due and due[0] <= moved:
            due.popleft()
            results.append(now)
        if on:
            if pending:
                due.append(moved + latency)
                pending = next(queue, None)
            moved += 1
        was_on, last = on, now
    return results


@cocotb.test(skip=parameters()["unit"] not in ("add", "multiply"))
async def every_kind_of_operand(dut):
    """Corner pairs and random pairs, a pair a cycle."""
    dut.enable.value = 0
    unit, latency = parameters()["unit"], parameters()["latency"]
    await start(dut)
    a, b = operands(rng(), parameters()["count"])
    vectors = list(zip(a.tolist(), b.tolist(), strict=True))
    if unit == "multiply":
        check("multiply", a, b, await pipelined(dut, latency, vectors, 0.0))
    else:
        check("add", a, b, await pipelined(dut, latency, vectors, 0.0, subtract=0))
        check("subtract", a, b, await pipelined(dut, latency, vectors, 0.0, subtract=1))


@cocotb.test(skip=parameters()["unit"] not in ("add", "multiply"))
async def disabled_registers_hold(dut):
    """The same with `enable` low at random, while the operands change."""
    dut.enable.value = 0
    unit, latency = parameters()["unit"], parameters()["latency"]
    await start(dut)
    a, b = operands(rng(2), 2000)
    a, b = a[-3000:], b[-3000:]
    vectors = list(zip(a.tolist(), b.tolist(), strict=True))
    inputs = {"subtract": 0} if unit == "add" else {}
    check(unit, a, b, await pipelined(dut, latency, vectors, 0.5, **inputs))


@cocotb.test(skip=parameters()["unit"] != "divide")
async def divide_and_square_root(dut):
    """Corner pairs and random pairs: quotients, then square roots; each starts in the cycle of the last one's done."""
    dut.start.value = 0
    await start(dut)
    edge, done = RisingEdge(dut.clk), RisingEdge(dut.done)
    a, b = operands(rng(), parameters()["count"])
    roots = np.unique(np.concatenate([np.array(CORNERS, np.uint32), a[len(CORNERS) ** 2 :]]))
    for operation, x, y in (("divide", a, b), ("sqrt", roots, roots[::-1].copy())):
        dut.sqrt.value = int(operation == "sqrt")
        got = []
        for one, other in zip(x.tolist(), y.tolist(), strict=True):
            dut.a.value, dut.b.value, dut.start.value = one, other, 1
            await edge
            dut.start.value = 0
            await done
            got.append(int(dut.o.value))
        check(operation, x, y, got)


@cocotb.test(skip=parameters()["unit"] != "divide")
async def divide_timing(dut):
    """`done` after LATENCY cycles whatever the operands, `busy` until then, `start` ignored while busy, `o` held."""
    random, edge = Random(3), RisingEdge(dut.clk)
    dut.start.value = 0
    await start(dut)
    one, held = 0x3F800000, None
    for a, b, root in [(0, 0, 0), (one, one, 0), (1, 0x7F7FFFFF, 0), (0x7F7FFFFF, 1, 0), (1, 0, 1), (0x80000001, 0, 1)]:
        dut.a.value, dut.b.value, dut.sqrt.value, dut.start.value = a, b, root, 1
        await edge
        assert not int(dut.busy.value)
        begin = get_sim_time("ns")
        for cycle in range(1, parameters()["latency"] + 1):
            dut.a.value, dut.b.value = random.getrandbits(32), random.getrandbits(32)
            dut.sqrt.value, dut.start.value = random.getrandbits(1), cycle < parameters()["latency"]
            await edge
            finished = cycle == parameters()["latency"]
            assert int(dut.done.value) == finished and int(dut.busy.value) == (not finished), f"cycle {cycle}"
            if held is not None and not finished:
                assert int(dut.o.value) == held, "the result is not held"
        assert get_sim_time("ns") - begin == PERIOD * parameters()["latency"]
        held = int(dut.o.value)
        check("sqrt" if root else "divide", np.array([a], np.uint32), np.array([b], np.uint32), [held])
        for _ in range(random.randrange(4)):
            await edge
            assert not int(dut.done.value) and not int(dut.busy.value) and int(dut.o.value) == held


@cocotb.test(skip=parameters()["unit"] != "compare")
async def comparisons(dut):
    """greater, equal and is_nan of corner pairs and random pairs, equal ones among them."""
    a, b = operands(rng(), parameters()["count"])
    b = np.where(np.arange(len(b)) % 16 == 15, a ^ (rng(4).integers(0, 2, len(b), dtype=np.uint32) << 31), b)
    step = Timer(1, "ns")
    got = []
    for one, other in zip(a.tolist(), b.tolist(), strict=True):
        dut.a.value, dut.b.value = one, other
        await step
        got.append(int(dut.o.value))
    x, y = a.view(np.float32), b.view(np.float32)
    with np.errstate(all="ignore"):
        want = (x > y) + 2 * (x == y) + 4 * np.isnan(x)
    wrong = np.flatnonzero(want != np.array(got))
    assert not wrong.size, [f"{a[i]:08x} {b[i]:08x}: {got[i]}, not {want[i]}" for i in wrong[:5]]
