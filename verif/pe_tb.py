"""Testbench of `Pe`, and the Python-integer model of exact sums that the testbenches of the cores share."""

from collections import deque
from typing import NamedTuple

import cocotb
import ml_dtypes
import numpy as np
from cocotb.triggers import RisingEdge

from lnpu.formats import PSUM_WORD, psum_layout
from verif.agents import pack, start, unpack
from verif.runner import parameters, rng

F16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
"""Value of every FP16 pattern."""

FP8 = sorted(
    set(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float16).view(np.uint16).tolist())
    - {0x7E00, 0xFE00}
)
"""The FP16 patterns of all E4M3 values but the NaNs."""

CORNERS = [
    sign | magnitude
    for sign in (0, 0x8000)
    for magnitude in (
        0x0000, 0x0001, 0x0002, 0x0200, 0x03FE, 0x03FF, 0x0400, 0x0401, 0x0555, 0x07FF, 0x0800, 0x3BFF, 0x3C00, 0x3C01,
        0x4000, 0x5BFF, 0x6AAA, 0x7800, 0x7BFE, 0x7BFF, 0x7C00, 0x7C01, 0x7DFF, 0x7E00, 0x7FFF,
    )
]  # fmt: skip
"""FP16 patterns at the edges: zeros, subnormals, one, the largest, infinities, NaNs."""


def carried(carries: int, acc_bits: int) -> int:
    """What the `carries` of a packed sum add to its `acc`, modulo 2^acc_bits."""
    bits = (acc_bits - 1) // PSUM_WORD
    return sum((carries >> i & 1) << PSUM_WORD * (i + 1) for i in range(bits)) & ((1 << acc_bits) - 1)


def meaning(word: int, acc_bits: int) -> tuple[int, tuple[bool, bool, bool]]:
    """Value modulo 2^acc_bits and flags (nan, pinf, ninf) of a packed sum, its carries added."""
    fields = unpack(psum_layout(acc_bits), word)
    acc = (fields["acc"] + carried(fields["carries"], acc_bits)) & ((1 << acc_bits) - 1)
    return acc, (bool(fields["nan"]), bool(fields["pinf"]), bool(fields["ninf"]))


class Psum(NamedTuple):
    """An exact partial sum; `acc` in units of 2^-48."""

    acc: int = 0
    nan: bool = False
    pinf: bool = False
    ninf: bool = False

    def plus(self, a: int, b: int) -> "Psum":
        """The sum with the product of two FP16 patterns."""
        with np.errstate(invalid="ignore"):
            product = float(F16[a] * F16[b])  # exact: 22 significant bits
        if product != product:
            return self._replace(nan=True)
        if product in (float("inf"), float("-inf")):
            return self._replace(pinf=self.pinf or product > 0, ninf=self.ninf or product < 0)
        return self._replace(acc=self.acc + int(product * 2.0**48))

    def plus_many(self, pairs) -> "Psum":
        """The sum with several products."""
        psum = self
        for a, b in pairs:
            psum = psum.plus(a, b)
        return psum

    def pack(self, acc_bits: int, carries: int = 0) -> int:
        """Bits of `psum_layout(acc_bits)` that mean this sum, of the many that do those with the given `carries`."""
        acc = self.acc - carried(carries, acc_bits)
        fields = {"acc": acc, "carries": carries, "nan": self.nan, "pinf": self.pinf, "ninf": self.ninf}
        return pack(psum_layout(acc_bits), fields)

    def same(self, word: int, acc_bits: int) -> bool:
        """Whether packed bits mean this sum: `acc` and `carries` have no meaning beside a flag."""
        acc, flags = meaning(word, acc_bits)
        mine = (self.nan, self.pinf, self.ninf)
        return flags == mine and (any(mine) or acc == self.acc & ((1 << acc_bits) - 1))


class Cycle(NamedTuple):
    """Inputs of a cycle; `start` is the sum to restart from."""

    enable: int
    pair: bool
    a: tuple[int, int]
    b: tuple[int, int]
    start: Psum | None = None

    def products(self) -> list[tuple[int, int]]:
        """Factors that count."""
        if not self.pair:
            return [(self.a[0], self.b[0])] if self.enable & 1 else []
        return [(self.a[i], self.b[i]) for i in range(2) if self.enable >> i & 1]


def random_start(random, acc_bits: int) -> Psum:
    """A partial sum whose value leaves room for many products; sometimes with flags."""
    acc = int.from_bytes(random.bytes(16), "little") >> (128 - acc_bits + 2)
    flags = [bool(random.random() < 0.1) for _ in range(3)] if random.random() < 0.2 else [False] * 3
    return Psum(acc - (1 << (acc_bits - 3)), *flags)


def random_fp16(random) -> int:
    """Any FP16 pattern, the edges often; few infinities and NaNs, which would hide everything else in long sums."""
    if random.random() < 0.1:
        return int(random.choice(CORNERS))
    if random.random() < 0.1:
        return int(random.integers(1 << 10)) | int(random.integers(2)) << 15
    return int(random.integers(0x7C00)) | int(random.integers(2)) << 15


async def play(dut, cycles: list[Cycle], acc_bits: int, random) -> None:
    """Drive `cycles` without a gap and check the sum after every one of them; the first must load."""
    edge = RisingEdge(dut.clk)
    expected: deque = deque([None, None])
    psum = Psum()
    following = 0  # psum_i of the cycle after
    full = (1 << psum_layout(acc_bits)["carries"].width) - 1
    mistakes = 0
    for number, cycle in enumerate([*cycles, None, None]):
        dut.psum_i.value = following
        noise = int.from_bytes(random.bytes(18), "little") & ((1 << psum_layout(acc_bits).size) - 1)
        if cycle is None:
            dut.enable.value, dut.load.value, following = 0, 0, noise
            expected.append(psum)
        else:
            dut.enable.value = cycle.enable
            dut.pair.value = int(cycle.pair)
            dut.a.value = cycle.a[0] | cycle.a[1] << 16
            dut.b.value = cycle.b[0] | cycle.b[1] << 16
            dut.load.value = int(cycle.start is not None)
            following = noise
            if cycle.start is not None:
                following = cycle.start.pack(acc_bits, int(random.choice([0, noise & 15, 15])) & full)
            psum = (psum if cycle.start is None else cycle.start).plus_many(cycle.products())
            expected.append(psum)
        await edge
        # Sampled just before the edge: what holds in this cycle, the sum of two cycles ago.
        want = expected.popleft()
        if want is not None and not want.same(int(dut.psum_o.value), acc_bits):
            mistakes += 1
            if mistakes < 10:
                dut._log.error(
                    f"{cycles[number - 2]}: {int(dut.psum_o.value):#x}, not {want.pack(acc_bits):#x} ({want})"
                )
    assert not mistakes, f"{mistakes} of {len(cycles)} sums are wrong"


async def begin(dut):
    """Idle inputs, clock, reset; the random generator and the accumulator's width."""
    for name in ("enable", "pair", "a", "b", "load", "psum_i"):
        getattr(dut, name).value = 0
    await start(dut)
    return rng(), parameters()["acc_bits"]


@cocotb.test()
async def fp16_corners(dut):
    """Every pair of corner values, FP16 x FP16."""
    random, acc_bits = await begin(dut)
    cycles = [
        Cycle(1 | int(random.integers(4)), False, (a, random_fp16(random)), (b, random_fp16(random)), Psum())
        for a in CORNERS
        for b in CORNERS
    ]
    await play(dut, cycles, acc_bits, random)


@cocotb.test()
async def fp16_random(dut):
    """Random FP16 x FP16 with random sums to start from, one check a product."""
    random, acc_bits = await begin(dut)
    words = random.integers(0x10000, size=(parameters()["products"], 4)).tolist()
    cycles = [
        Cycle(int(random.integers(4)), False, (w[0], w[1]), (w[2], w[3]), random_start(random, acc_bits)) for w in words
    ]
    await play(dut, cycles, acc_bits, random)


@cocotb.test()
async def every_significand(dut):
    """Every significand of one operand against corner values of the other, at the lowest and highest exponents."""
    random, acc_bits = await begin(dut)
    cycles = []
    for exponent in (0, 1, 15, 30):
        for mantissa in range(0, 1024, parameters()["step"]):
            word = exponent << 10 | mantissa | int(random.integers(2)) << 15
            other = int(random.choice(CORNERS))
            a, b = (word, other) if random.integers(2) else (other, word)
            cycles.append(Cycle(1, False, (a, 0), (b, 0), Psum()))
    await play(dut, cycles, acc_bits, random)


@cocotb.test()
async def fp8_pairs(dut):
    """Every E4M3 value in both places against corner FP16 values, with each combination of enables."""
    random, acc_bits = await begin(dut)
    cycles = []
    for a in FP8:
        for b in CORNERS:
            other = (int(random.choice(FP8)), random_fp16(random))
            first, second = ((a, b), other) if random.integers(2) else (other, (a, b))
            enable = int(random.choice([0, 1, 2, 3, 3, 3, 3]))
            cycles.append(Cycle(enable, True, (first[0], second[0]), (first[1], second[1]), Psum()))
    await play(dut, cycles, acc_bits, random)


@cocotb.test()
async def chains(dut):
    """Long sums that mix FP16, pairs, idle cycles and restarts (plain and with products), without a gap."""
    random, acc_bits = await begin(dut)
    cycles = [Cycle(0, False, (0, 0), (0, 0), Psum())]
    for _ in range(parameters()["products"]):
        pair = bool(random.integers(2))
        a = tuple(int(random.choice(FP8)) if pair else random_fp16(random) & 0xFBFF for _ in range(2))
        b = tuple(random_fp16(random) if random.random() < 0.05 else random_fp16(random) & 0xBBFF for _ in range(2))
        restart = random_start(random, acc_bits) if random.random() < 0.05 else None
        cycles.append(Cycle(int(random.integers(4)), pair, a, b, restart))
    await play(dut, cycles, acc_bits, random)


@cocotb.test()
async def largest_sums(dut):
    """The largest products of either sign fill the accumulator, and empty it again."""
    random, acc_bits = await begin(dut)
    room = (1 << (acc_bits - 1)) - 1
    largest = int(F16[0x7BFF] ** 2 * 2.0**48)
    cycles = []
    for sign in (0, 0x8000):
        edge = room - 40 * largest
        cycles.append(Cycle(0, False, (0, 0), (0, 0), Psum(-edge if sign else edge)))
        cycles += [Cycle(1, False, (0x7BFF, 0), (0x7BFF ^ sign, 0))] * 40
        cycles += [Cycle(1, False, (0x7BFF, 0), (0x7BFF ^ sign ^ 0x8000, 0))] * 40
        cycles.append(Cycle(0, False, (0, 0), (0, 0), Psum(-1 if sign else 0)))
        cycles += [Cycle(3, True, (0x5F00, 0x5F00), (1 ^ sign, 1))] * 10
        cycles += [Cycle(1, False, (1, 0), (1 ^ sign, 0))] * 10
    await play(dut, cycles, acc_bits, random)


def product_of(bit: int, negative: bool) -> tuple[int, int]:
    """FP16 factors whose product is 2^bit (0 to 78) in units of 2^-48, or minus that."""
    exponents = min(bit, 39), bit - min(bit, 39)
    a, b = (1 << e if e < 10 else (e - 9) << 10 for e in exponents)
    return a | negative << 15, b


@cocotb.test()
async def carry_chains(dut):
    """A carry or borrow through all the words at once, a border a cycle, and back."""
    random, acc_bits = await begin(dut)
    none = Cycle(0, False, (0, 0), (0, 0))
    cycles = []
    for bit in range(79):
        for low in (0, -1, (1 << bit) - 1, -(1 << bit)):
            for negative in (False, True):
                there, back = (product_of(bit, sign) for sign in (negative, not negative))
                cycles.append(none._replace(start=Psum(low)))
                for a, b in (there, back, back, there):
                    cycles.append(Cycle(1, False, (a, 0), (b, 0)))
                    cycles += [none] * int(random.integers(5))
    await play(dut, cycles, acc_bits, random)


@cocotb.test()
async def carries_meet(dut):
    """Products just around the borders of the words, pairs of both signs, on sums whose words are all ones or zeros."""
    random, acc_bits = await begin(dut)
    full = (1 << acc_bits - 2) - 1
    cycles = []
    for _ in range(parameters()["products"] // 8):
        words = [int(random.choice([0, (1 << PSUM_WORD) - 1, 1, 1 << PSUM_WORD - 1])) for _ in range(5)]
        acc = sum(word << PSUM_WORD * i for i, word in enumerate(words)) & full
        cycles.append(Cycle(0, False, (0, 0), (0, 0), Psum(acc - int(random.integers(2)) * (full + 1))))
        for _ in range(7):
            border = min(78, PSUM_WORD * int(random.integers(1, 3)) + int(random.integers(-3, 3)))
            if random.integers(2):
                a, b = zip(*(product_of(border, bool(random.integers(2))) for _ in range(2)), strict=True)
                cycles.append(Cycle(1, False, a, b))
            else:  # E4M3 from 1.875 * 2^-3 to 2^4
                a = tuple(int(random.integers(12, 20)) << 10 | int(random.choice([0, 7])) << 7 for _ in range(2))
                b = tuple(random_fp16(random) & 0xFBFF & ~0x4000 | 0x1000 for _ in range(2))
                signs = [int(random.integers(2)) << 15 for _ in range(2)]
                cycles.append(Cycle(3, True, (a[0] | signs[0], a[1] | signs[1]), b))
    await play(dut, cycles, acc_bits, random)


@cocotb.test()
async def cancellation(dut):
    """Sums that cross zero again and again, in every cycle or with single idle ones between."""
    random, acc_bits = await begin(dut)
    cycles = [Cycle(0, False, (0, 0), (0, 0), Psum())]
    for _ in range(parameters()["products"] // 8):
        a, b = (random_fp16(random) & 0xFBFF for _ in range(2))
        for sign in (0, 0x8000, 0x8000, 0):
            cycles.append(Cycle(1, False, (a ^ sign, 0), (b, 0)))
            if random.random() < 0.2:
                cycles.append(Cycle(0, False, (0, 0), (0, 0)))
    await play(dut, cycles, acc_bits, random)


@cocotb.test()
async def idle(dut):
    """Without enables the sum holds, whatever the operands and `psum_i` do."""
    random, acc_bits = await begin(dut)
    cycles = [Cycle(0, False, (0, 0), (0, 0), random_start(random, acc_bits)._replace(nan=False))]
    for _ in range(500):
        words = random.integers(0x10000, size=4).tolist()
        cycles.append(Cycle(int(random.integers(2)) << 1, False, (words[0], words[1]), (words[2], words[3])))
    await play(dut, cycles, acc_bits, random)
