"""One lane of the vector unit's exact sums."""

from amaranth.hdl import Module, Signal, signed
from amaranth.lib.wiring import In, Out

from lnpu.formats import psum_layout
from lnpu.fp.accumulator_round import AccumulatorRound
from lnpu.fp.half import SingleToHalf
from lnpu.hdl import Block, place
from lnpu.pe.pe import Pe

__all__ = ["SumLane"]


class SumLane(Block):
    """Adds f16(a * 2^-a_shift) * f16(b * 2^-b_shift) exactly to a running sum, and rounds sums to FP32.

    An `a` that is zero of either sign as FP16 is skipped: it adds nothing, even against infinity or NaN.

    Parameters
    ----------
    acc_bits : int
        Accumulator width.

    Members
    -------
    add : In(1)
        Take `a` and `b` in this cycle t. The sum with them is on `sum` from cycle t + LATENCY on.
    first : In(1)
        With `add`: the sum restarts from `start`, sampled in cycle t + 2.
    a, b : In(32)
    a_shift, b_shift : In(signed(8))
        Stable while elements are under way and while sums are rounded.
    start : In(psum_layout(acc_bits))
    sum : Out(psum_layout(acc_bits))
    round_enable : In(1)
        The rounding pipeline moves.
    stored : In(psum_layout(acc_bits))
        Sum to be rounded.
    o : Out(32)
        RNE(stored * 2^(a_shift + b_shift)) of ROUND_LATENCY enabled cycles before.
    """

    LATENCY = 3
    ROUND_LATENCY = AccumulatorRound.LATENCY

    def __init__(self, *, acc_bits: int) -> None:
        self.acc_bits = acc_bits
        super().__init__(
            {
                "add": In(1),
                "first": In(1),
                "a": In(32),
                "b": In(32),
                "a_shift": In(signed(8)),
                "b_shift": In(signed(8)),
                "start": In(psum_layout(acc_bits)),
                "sum": Out(psum_layout(acc_bits)),
                "round_enable": In(1),
                "stored": In(psum_layout(acc_bits)),
                "o": Out(32),
            }
        )

    @property
    def suffix(self) -> str:
        return str(self.acc_bits)

    def elaborate(self, platform):
        m = Module()
        pe = place(m, "pe", Pe(acc_bits=self.acc_bits))
        halves = []
        for name, value, shift in (("a", self.a, self.a_shift), ("b", self.b, self.b_shift)):
            convert = place(m, f"half_{name}", SingleToHalf())
            half = Signal(16, name=f"half_{name}_o", reset_less=True)
            m.d.comb += [convert.i.eq(value), convert.scale.eq(shift), convert.saturate.eq(0)]
            with m.If(self.add):
                m.d.sync += half.eq(convert.o)
            halves.append(half)
        a, b = halves
        added = Signal()
        load = Signal()
        m.d.sync += [added.eq(self.add), load.eq(self.add & self.first)]
        m.d.comb += [
            pe.a[0].eq(a),
            pe.b[0].eq(b),
            pe.pair.eq(0),
            pe.enable.eq(added & (a[:15] != 0)),
            pe.load.eq(load),
            pe.psum_i.eq(self.start),
            self.sum.eq(pe.psum_o),
        ]

        rounder = place(m, "rounder", AccumulatorRound(acc_bits=self.acc_bits))
        m.d.comb += [
            rounder.enable.eq(self.round_enable),
            rounder.psum.eq(self.stored),
            rounder.shift.eq(self.a_shift + self.b_shift),
            rounder.scale.eq(0),
            rounder.fp16.eq(0),
            rounder.saturate.eq(0),
            self.o.eq(rounder.o),
        ]
        return m
