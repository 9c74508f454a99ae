"""Quantizer: all 65,536 FP16 patterns under many policies, against ml_dtypes and the golden model."""

import cocotb
import ml_dtypes
import numpy as np
from cocotb.triggers import Timer

from golden.fgmp import Policy, quantize
from verif.runner import parameters, rng

BELOW, ABOVE = ("fp16", "fp8", "zero"), ("fp16", "fp8")
ALL = np.arange(1 << 16, dtype=np.uint16)


def reference(v: np.ndarray, lo: int, hi: int, below: int, above: int):
    """The table of FGMP, written down anew: codes, payload bytes (0 unless FP8), FP16 patterns, underflows."""
    magnitude = (v & 0x7FFF).astype(np.int64)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = v.view(np.float16).astype(np.float32)
        rounded = np.clip(exact, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    beyond = magnitude > int(np.float16(464.0).view(np.uint16))
    kept = np.select(
        [
            magnitude == 0,
            magnitude >= 0x7C00,
            magnitude < lo,
            (magnitude <= hi) & beyond & (above == 0),
            magnitude <= hi,
        ],
        [0, 16, (16, 8, 0)[below], 16, 8],
        (16, 8)[above],
    )
    kept[(kept == 8) & (rounded.astype(np.float32) == 0)] = 0
    codes = np.select([kept == 0, kept == 8], [0, 2], 3)
    payload = np.where(kept == 8, rounded.view(np.uint8), 0)
    value = np.select([kept == 0, kept == 8], [np.zeros_like(v), rounded.astype(np.float16).view(np.uint16)], v)
    return codes, payload, value, (kept == 0) & (magnitude != 0)


def policies():
    """(lo, hi, below, above): the special ones, those at the roundings' edges, random ones."""
    chosen = [(0, 0, 0, 0), (0, 0x7BFF, 0, 1), (0, 0x7FFF, 0, 1), (0, 0x7FFF, 0, 0)]
    chosen += [(0x7FFF, 0x7FFF, below, above) for below in range(3) for above in range(2)]
    edges = [int(np.float16(x).view(np.uint16)) for x in (2**-10, 2**-9, 2**-6, 448, 464, 480)] + [1, 0x3FF, 0x7C00]
    random = rng(5)
    for below in range(3):
        for above in range(2):
            for _ in range(2):
                lo, hi = sorted(int(x) for x in random.choice(edges, 2))
                chosen.append((lo, hi, below, above))
            lo, hi = sorted(int(x) for x in random.integers(0, 0x7C00, 2))
            chosen.append((lo, hi, below, above))
            chosen.append((lo, lo, below, above))
    return chosen


@cocotb.test()
async def every_pattern(dut):
    """Code, payload byte, value and underflow of every pattern."""
    lanes = parameters()["lanes"]
    for lo, hi, below, above in policies():
        dut.lo.value, dut.hi.value, dut.below.value, dut.above.value = lo, hi, below, above
        raw = {name: bytearray() for name in ("code", "fp8", "value", "underflow")}
        for start in range(0, 1 << 16, lanes):
            dut.v.value = int.from_bytes(ALL[start : start + lanes].tobytes(), "little")
            await Timer(1, "ns")
            for name, out in raw.items():
                handle = getattr(dut, name)
                out += int(handle.value).to_bytes(len(handle) // 8, "little")
        code, fp8, underflow = (np.frombuffer(raw[n], np.uint8) for n in ("code", "fp8", "underflow"))
        value = np.frombuffer(raw["value"], np.uint16)
        codes, payloads, values, underflows = reference(ALL, lo, hi, below, above)
        context = f"lo {lo:#x} hi {hi:#x} below {below} above {above}"
        for name, got, expected in (
            ("code", code, codes),
            ("fp8", np.where(codes == 2, fp8, 0), payloads),
            ("value", value, values),
            ("underflow", underflow, underflows),
        ):
            wrong = np.flatnonzero(got != expected)
            assert not len(wrong), (
                f"{context}: {name} of {wrong[0]:#06x} is {got[wrong[0]]:#x}, not {expected[wrong[0]]:#x}"
            )
        bits, golden_codes, golden_underflow = quantize(ALL, Policy(0, lo, hi, BELOW[below], ABOVE[above]))
        assert (bits == values).all() and (golden_codes == codes).all() and (golden_underflow == underflows).all(), (
            context
        )
