"""Testbench of AccumulatorRound against exact integer arithmetic."""

from itertools import product
from random import Random

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from lnpu.formats import F16_INF, F16_NAN, F32_NAN, PSUM_WORD, psum_layout
from verif.agents import pack, start
from verif.pe_tb import carried
from verif.runner import parameters, rng

LSB = -48
F32_INF = 0x7F800000


def round_integer(value: int, exponent: int, *, fraction_bits: int, bias: int, saturate: bool) -> int:
    """IEEE pattern of value * 2^exponent, rounded to nearest even; exact whatever the integers."""
    exponent_bits = bias.bit_length() + 1
    sign = int(value < 0) << (fraction_bits + exponent_bits)
    magnitude = abs(value)
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    if magnitude == 0:
        return 0
    highest = max(magnitude.bit_length() - 1 + exponent, 1 - bias)  # exponent of the result, before rounding
    if highest > bias:
        return sign | (infinity - saturate)
    drop = highest - fraction_bits - exponent  # bits below the result's last place
    if drop <= 0:
        quotient = magnitude << -drop
    else:
        quotient, rest = magnitude >> drop, magnitude & ((1 << drop) - 1)
        half = 1 << (drop - 1)
        quotient += rest > half or (rest == half and quotient & 1)
    # The hidden bit adds one to the exponent field.
    pattern = ((highest + bias - 1) << fraction_bits) + quotient
    return sign | (infinity - saturate if pattern >= infinity else pattern)


def expected(psum: dict, shift: int, scale: int, fp16: int, saturate: int, acc_bits: int) -> tuple[int, int]:
    """`o` and `nonfinite`."""
    acc = (psum["acc"] + carried(psum["carries"], acc_bits)) & ((1 << acc_bits) - 1)
    acc -= (acc >> (acc_bits - 1)) << acc_bits
    if psum["nan"] or (psum["pinf"] and psum["ninf"]):
        half, single = F16_NAN, F32_NAN
    elif psum["pinf"] or psum["ninf"]:
        half, single = F16_INF | psum["ninf"] << 15, F32_INF | psum["ninf"] << 31
    else:
        half = round_integer(acc, LSB + shift, fraction_bits=10, bias=15, saturate=bool(saturate))
        single = round_integer(acc, LSB + shift, fraction_bits=23, bias=127, saturate=bool(saturate))
    if fp16:
        value = np.uint16(half).view(np.float16).astype(np.float64)
        single = F32_NAN if np.isnan(value) else int(np.float32(np.ldexp(value, scale)).view(np.uint32))
    return single, int((single & F32_INF) == F32_INF)


def magnitudes(acc_bits: int) -> list[int]:
    """Corner sums: the ends, powers of two, all ones, and ties with and without one more bit."""
    top = (1 << (acc_bits - 1)) - 1
    values = {0, 1, 2, 3, top, top - 1}
    for place in range(0, acc_bits - 1, 5):
        values |= {1 << place, (1 << place) - 1, (1 << place) + 1}
    for bits in (11, 24):
        highest = acc_bits - 2 - bits
        for place in (*range(0, highest, 5), highest):
            for head in (1 << (bits - 1), (1 << (bits - 1)) + 1, (1 << bits) - 1, (1 << bits) - 2):
                tie = (2 * head + 1) << place
                values |= {tie, tie - 1, tie + 1}
    return sorted(value for value in values if 0 <= value <= top)


async def run(dut, cases: list[tuple], stall: float) -> None:
    """Drive (psum, shift, scale, fp16, saturate) and check every result."""
    acc_bits, latency = parameters()["acc_bits"], parameters()["latency"]
    layout = psum_layout(acc_bits)
    edge, random = RisingEdge(dut.clk), Random(1)
    words = [pack(layout, case[0]) for case in cases]
    got: list[tuple[int, int]] = []
    sent = moved = 0
    due: list[int] = []  # what `moved` is when each result is there
    while len(got) < len(cases):
        on = random.random() >= stall
        if on and sent < len(cases):
            dut.psum.value = words[sent]
            _, dut.shift.value, dut.scale.value, dut.fp16.value, dut.saturate.value = cases[sent]
        elif stall:
            dut.psum.value, dut.shift.value = random.getrandbits(layout.size), random.randrange(-2048, 2048)
            dut.fp16.value, dut.saturate.value = random.getrandbits(1), random.getrandbits(1)
        dut.enable.value = on
        await edge
        if len(got) < len(due) and due[len(got)] <= moved:
            got.append((int(dut.o.value), int(dut.nonfinite.value)))
        if on:
            if sent < len(cases):
                due.append(moved + latency)
                sent += 1
            moved += 1
    wrong = []
    for case, result in zip(cases, got, strict=True):
        want = expected(*case, acc_bits)
        if result != want:
            wrong.append(f"{case}: {result[0]:08x} {result[1]}, not {want[0]:08x} {want[1]}")
    assert not wrong, f"{len(wrong)} of {len(cases)} wrong, e.g. {wrong[:5]}"


def number(acc: int, acc_bits: int, carries: int = 0) -> dict:
    """A finite partial sum, as it is with these carries between its words."""
    carries &= (1 << psum_layout(acc_bits)["carries"].width) - 1
    acc -= carried(carries, acc_bits)
    return {"acc": acc & ((1 << acc_bits) - 1), "carries": carries, "nan": 0, "pinf": 0, "ninf": 0}


@cocotb.test()
async def corner_sums(dut):
    """Corner sums of both signs, shifted to the ends of each format, and by extreme amounts."""
    dut.enable.value = 0
    await start(dut)
    acc_bits = parameters()["acc_bits"]
    random = rng()
    cases = []
    for magnitude in magnitudes(acc_bits):
        high = magnitude.bit_length() - 1 + LSB
        for fp16 in (0, 1):
            least, most, fraction = (-14, 15, 10) if fp16 else (-126, 127, 23)
            targets = (
                0,
                least - fraction - 2,
                least - fraction - 1,
                least - fraction,
                least - 2,
                least,
                most,
                most + 1,
            )
            shifts = {max(-2048, min(2047, target - high)) for target in targets} | {0, -2048, 2047}
            chosen = random.permutation(sorted(shifts))[: 5 if magnitude > 3 else None]
            for shift in chosen.tolist():
                acc = -magnitude if random.integers(2) else magnitude
                cases.append(
                    (
                        number(acc, acc_bits, int(random.integers(16))),
                        shift,
                        int(random.integers(-64, 65)) * fp16,
                        fp16,
                        int(random.integers(2)),
                    )
                )
    cases += [
        (number(-1 << (acc_bits - 1), acc_bits, carries), shift, 0, fp16, saturate)  # has no positive counterpart
        for shift, fp16, saturate, carries in product((0, -48, 127 + LSB, -2048, 2047), (0, 1), (0, 1), (0, 5, 15))
    ]
    await run(dut, cases, 0.0)


@cocotb.test()
async def waiting_carries(dut):
    """Sums around zero and around the borders of the words, as they are with every combination of carries."""
    dut.enable.value = 0
    await start(dut)
    acc_bits = parameters()["acc_bits"]
    sums = {
        sign * ((1 << border) + some)
        for border in range(0, acc_bits - 1, PSUM_WORD)
        for some in (-1, 0, 1)
        for sign in (1, -1)
    }
    cases = [
        (number(acc, acc_bits, carries), 48 - 20, 0, fp16, 0)
        for acc, carries, fp16 in product(sorted(sums), range(16), (0, 1))
    ]
    await run(dut, cases, 0.0)


@cocotb.test()
async def random_sums(dut):
    """Random sums whose results are of every exponent of the format and somewhat beyond."""
    dut.enable.value = 0
    await start(dut)
    await run(dut, random_cases(rng(), parameters()["count"], parameters()["acc_bits"]), 0.0)


@cocotb.test()
async def disabled_registers_hold(dut):
    """The same with `enable` low at random, while the inputs change."""
    dut.enable.value = 0
    await start(dut)
    await run(dut, random_cases(rng(2), 2000, parameters()["acc_bits"]), 0.5)


@cocotb.test()
async def specials(dut):
    """Every combination of the flags beside any sum; `saturate` leaves infinities alone."""
    dut.enable.value = 0
    await start(dut)
    acc_bits = parameters()["acc_bits"]
    cases = []
    for nan, pinf, ninf, fp16, saturate, acc, shift in product(
        (0, 1), (0, 1), (0, 1), (0, 1), (0, 1), (0, 1, -1, 1 << 70, -1 << 70), (0, -2048, 2047)
    ):
        psum = {**number(acc, acc_bits), "nan": nan, "pinf": pinf, "ninf": ninf}
        cases.append((psum, shift, 17 * fp16, fp16, saturate))
    await run(dut, cases, 0.0)


def random_cases(random: np.random.Generator, count: int, acc_bits: int) -> list[tuple]:
    """Finite sums with a random length, a quarter of them ties or close to one, in units of 2^-48."""
    source = Random(int(random.integers(1 << 30)))
    cases = []
    for index in range(count):
        fp16 = source.getrandbits(1)
        length = source.randrange(1, acc_bits)
        magnitude = source.getrandbits(length) | 1 << (length - 1)
        if index % 4 == 0:
            keep = source.randrange(1, 13 if fp16 else 26)
            magnitude &= -1 << max(0, length - keep)
            magnitude += source.choice((-1, 0, 0, 1))
        high = magnitude.bit_length() - 1 + LSB
        least, most = (-27, 17) if fp16 else (-152, 129)
        shift = (
            max(-2048, min(2047, source.randint(least, most) - high)) if index % 8 else source.randrange(-2048, 2048)
        )
        acc = -magnitude if source.getrandbits(1) else magnitude
        scale = source.randint(-64, 64) * fp16
        cases.append((number(acc, acc_bits, source.getrandbits(4)), shift, scale, fp16, source.getrandbits(1)))
    return cases
