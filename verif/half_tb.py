"""Testbench of HalfToSingle and SingleToHalf against NumPy (float64 holds every scaled operand exactly)."""

from random import Random

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge, Timer

from lnpu.formats import F16_NAN, F32_NAN
from verif.agents import start
from verif.fp32_tb import CORNERS
from verif.runner import parameters, rng


async def to_single(dut, inputs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Outputs of HalfToSingle for the inputs, one after the other."""
    step = Timer(1, "ns")
    i, scale, o = dut.i, dut.scale, dut.o
    out = []
    for pattern, exponent in zip(inputs.tolist(), scales.tolist(), strict=True):
        i.value, scale.value = pattern, exponent
        await step
        out.append(int(o.value))
    return np.array(out, np.uint32)


async def to_half(dut, inputs: np.ndarray, scales: np.ndarray, saturate: np.ndarray, stall: float = 0.0) -> np.ndarray:
    """Outputs of SingleToHalf for the inputs, one every enabled cycle; they change while it is disabled."""
    edge, random, latency = RisingEdge(dut.clk), Random(1), parameters()["latency"]
    operands = list(zip(inputs.tolist(), scales.tolist(), saturate.tolist(), strict=True))
    out: list[int] = []
    moved, was_on, last = 0, True, 0
    while len(out) < len(operands):
        on = random.random() >= stall
        if on and moved < len(operands):
            pattern, exponent, flag = operands[moved]
        else:
            pattern, exponent, flag = random.getrandbits(32), random.randrange(-128, 128), random.getrandbits(1)
        dut.i.value, dut.scale.value, dut.saturate.value, dut.enable.value = pattern, exponent, flag, on
        await edge  # what is read now is from before the edge
        now = int(dut.o.value)
        assert was_on or now == last, "the output changes while the unit is disabled"
        if moved >= latency + len(out):
            out.append(now)
        moved += on
        was_on, last = on, now
    return np.array(out, np.uint32)


def compare(inputs: np.ndarray, scales: np.ndarray, got: np.ndarray, want: np.ndarray) -> None:
    """Assert that they are the same patterns."""
    wrong = np.flatnonzero(got != want)
    shown = [f"{inputs[i]:x} scale {scales[i]}: {got[i]:x}, not {want[i]:x}" for i in wrong[:5]]
    assert not wrong.size, f"{wrong.size} of {want.size} wrong, e.g. {shown}"


def single(patterns: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """FP32 patterns of FP16 patterns times 2^scale."""
    values = np.ldexp(patterns.astype(np.uint16).view(np.float16).astype(np.float64), scales)
    with np.errstate(invalid="ignore"):
        exact = values.astype(np.float32)
    assert np.array_equal(exact.astype(np.float64), values, equal_nan=True)
    return np.where(np.isnan(values), np.uint32(F32_NAN), exact.view(np.uint32))


def half(patterns: np.ndarray, scales: np.ndarray, saturate: np.ndarray) -> np.ndarray:
    """FP16 patterns of FP32 patterns times 2^-scale, rounded once."""
    with np.errstate(all="ignore"):
        values = np.ldexp(patterns.view(np.float32).astype(np.float64), -scales)
        rounded = values.astype(np.float16)
    limited = np.where(saturate & np.isinf(rounded) & np.isfinite(values), np.copysign(65504, values), rounded)
    return np.where(np.isnan(values), np.uint16(F16_NAN), limited.astype(np.float16).view(np.uint16))


@cocotb.test(skip=parameters()["unit"] != "half_to_single")
async def every_half(dut):
    """All FP16 patterns: without a scale, then with a random one."""
    random = rng()
    patterns = np.tile(np.arange(1 << 16, dtype=np.uint32), 2)
    scales = np.concatenate([np.zeros(1 << 16, np.int64), random.integers(-64, 65, 1 << 16)])
    compare(patterns, scales, await to_single(dut, patterns, scales), single(patterns, scales))


@cocotb.test(skip=parameters()["unit"] != "half_to_single")
async def half_scales(dut):
    """Every scale with the corners of FP16, also beyond -64 to 64 as far as the result is a normal FP32 number."""
    corners = [0, 1, 2, 3, 0x1FF, 0x200, 0x3FF, 0x400, 0x401, 0x3BFF, 0x3C00, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x7FFF]
    corners += [0x8000 | corner for corner in corners]
    patterns, scales = (array.ravel() for array in np.meshgrid(np.array(corners, np.uint32), np.arange(-102, 113)))
    compare(patterns, scales, await to_single(dut, patterns, scales), single(patterns, scales))


@cocotb.test(skip=parameters()["unit"] != "single_to_half")
async def every_kind_of_single(dut):
    """Random FP32 patterns whose results are of every exponent, and ties; random scale and `saturate`."""
    await start(dut)
    random = rng()
    count = parameters()["count"]
    sign, fraction = random.integers(0, 2, count) << 31, random.integers(0, 1 << 23, count)
    # A third has few significant bits, so that ties and numbers next to them are common.
    few = (0x7FFFFF << random.integers(8, 24, count) & 0x7FFFFF) | random.integers(0, 2, count)
    fraction = np.where(np.arange(count) % 3 == 0, fraction & few, fraction)
    scales = random.integers(-128, 128, count)
    target = random.integers(-30, 20, count)  # exponent of the result
    exponent = np.clip(target + scales + 127, 0, 255)
    patterns = (sign | exponent << 23 | fraction).astype(np.uint32)
    saturate = random.integers(0, 2, count).astype(bool)
    compare(patterns, scales, await to_half(dut, patterns, scales, saturate), half(patterns, scales, saturate))


@cocotb.test(skip=parameters()["unit"] != "single_to_half")
async def disabled_registers_hold(dut):
    """Random patterns near 1, with `enable` low in half and in nine tenths of the cycles."""
    await start(dut)
    random = rng()
    for stall in (0.5, 0.9):
        patterns = random.normal(0, 1, 2000).astype(np.float32).view(np.uint32)
        scales, saturate = random.integers(-20, 20, 2000), random.integers(0, 2, 2000).astype(bool)
        got = await to_half(dut, patterns, scales, saturate, stall)
        compare(patterns, scales, got, half(patterns, scales, saturate))


@cocotb.test(skip=parameters()["unit"] != "single_to_half")
async def boundaries(dut):
    """The neighbourhood of every FP16 number and of every midpoint between two, over the whole range of scales."""
    await start(dut)
    random = rng()
    values = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float64)
    values[-1] = 65536.0
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2])
    points = np.concatenate([points[::7], points[:2100], points[-40:], values[-3:], (values[-3:] + values[-4:-1]) / 2])
    scales = np.resize([0, -64, 64, -128, 127, -104, 100], len(points))
    with np.errstate(over="ignore"):
        patterns = np.ldexp(points, scales).astype(np.float32).view(np.uint32)
    patterns = np.concatenate([patterns + np.uint32(1), patterns, np.where(patterns > 0, patterns - 1, 0)])
    patterns = (patterns | random.integers(0, 2, len(patterns)) << 31).astype(np.uint32)
    scales = np.tile(scales, 3)
    saturate = random.integers(0, 2, len(patterns)).astype(bool)
    compare(patterns, scales, await to_half(dut, patterns, scales, saturate), half(patterns, scales, saturate))


@cocotb.test(skip=parameters()["unit"] != "single_to_half")
async def corners(dut):
    """Corner patterns of FP32 with every fourth scale, saturating and not."""
    await start(dut)
    grid = np.meshgrid(np.array(CORNERS, np.uint32), np.r_[-128:128:4, 127], np.array([False, True]))
    patterns, scales, saturate = (array.ravel() for array in grid)
    compare(patterns, scales, await to_half(dut, patterns, scales, saturate), half(patterns, scales, saturate))
