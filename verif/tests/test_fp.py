"""The floating-point units against NumPy and exact integers."""

import pytest
from amaranth.hdl import Cat, Module
from amaranth.lib.wiring import In, Out

from lnpu.fp.accumulator_round import AccumulatorRound
from lnpu.fp.fp32_add import Fp32Add
from lnpu.fp.fp32_compare import equal, greater, is_nan
from lnpu.fp.fp32_divide import Fp32DivideSqrt
from lnpu.fp.fp32_multiply import Fp32Multiply
from lnpu.fp.half import HalfToSingle, SingleToHalf
from lnpu.hdl import Block
from verif.runner import run


class CompareHarness(Block):
    """Bits of `o`: a > b, a == b, a is a NaN."""

    combinational = True
    a: In(32)
    b: In(32)
    o: Out(3)

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.o.eq(Cat(greater(m, self.a, self.b), equal(self.a, self.b), is_nan(self.a)))
        return m


def test_add():
    run(Fp32Add(), "verif.fp32_tb", unit="add", latency=Fp32Add.LATENCY, count=24_000)


def test_multiply():
    run(Fp32Multiply(), "verif.fp32_tb", unit="multiply", latency=Fp32Multiply.LATENCY, count=48_000)


def test_divide():
    run(Fp32DivideSqrt(), "verif.fp32_tb", unit="divide", latency=Fp32DivideSqrt.LATENCY, count=20_000)


def test_compare():
    run(CompareHarness(), "verif.fp32_tb", unit="compare", count=24_000)


def test_half_to_single():
    run(HalfToSingle(), "verif.half_tb", unit="half_to_single")


def test_single_to_half():
    run(SingleToHalf(), "verif.half_tb", unit="single_to_half", latency=SingleToHalf.LATENCY, count=60_000)


@pytest.mark.parametrize(("acc_bits", "count"), [(97, 30_000), (84, 6_000), (128, 6_000)])
def test_accumulator_round(acc_bits, count):
    run(
        AccumulatorRound(acc_bits), "verif.accumulator_round_tb",
        acc_bits=acc_bits, latency=AccumulatorRound.LATENCY, count=count,
    )  # fmt: skip
