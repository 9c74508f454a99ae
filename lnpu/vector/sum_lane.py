"""One lane of the vector unit's exact sums."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.fgmp.quantizer import Quantizer
from lnpu.formats import psum_layout
from lnpu.fp.accumulator_round import AccumulatorRound
from lnpu.fp.half import SingleToHalf
from lnpu.hdl import Block, place
from lnpu.pe.pe import Pe

__all__ = ["SUM_FGMP", "SumLane"]

SUM_FGMP = data.StructLayout({"quantise": 1, "lo": 15, "hi": 15, "below": 2, "above": 1})
"""Whether and how FGMP is applied to what is summed: see `Quantizer`."""


class SumLane(Block):
    """Adds f16(a * 2^-a_shift) * f16(b * 2^-b_shift) exactly to a running sum, and rounds sums to FP32.

    With `fgmp.quantise`, the first factor is what FGMP keeps of it. One that is zero of either sign is skipped: it adds
    nothing, even against infinity or NaN.

    Parameters
    ----------
    acc_bits : int
        Accumulator width.

    Members
    -------
    add : In(1)
        Take `a` and `b` in this cycle t. The sum with them is on `sum` from cycle t + LATENCY on.
    first : In(1)
        With `add`: the sum restarts from `start`, sampled in cycle t + 4.
    a, b : In(32)
    a_shift, b_shift : In(signed(8))
        Stable while elements are under way and while sums are rounded.
    fgmp : In(SUM_FGMP)
        Stable likewise.
    start : In(psum_layout(acc_bits))
    sum : Out(psum_layout(acc_bits))
    round_enable : In(1)
        The rounding pipeline moves.
    stored : In(psum_layout(acc_bits))
        Sum to be rounded.
    o : Out(32)
        RNE(stored * 2^(a_shift + b_shift)) of ROUND_LATENCY enabled cycles before.
    """

    LATENCY = SingleToHalf.LATENCY + 3
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
                "fgmp": In(SUM_FGMP),
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
        stages = []  # of the conversion: whether there is an element in it, and whether it is the first
        add, first = self.add, self.first
        for stage in range(1, SingleToHalf.LATENCY + 1):
            stages.append((add, first))
            add, first = Signal(name=f"add_{stage}"), Signal(name=f"first_{stage}")
            m.d.sync += [add.eq(stages[-1][0]), first.eq(stages[-1][0] & stages[-1][1])]
        converting = Signal()
        m.d.comb += converting.eq(Cat(busy for busy, _ in stages).any())
        halves = []
        for name, value, shift in (("a", self.a, self.a_shift), ("b", self.b, self.b_shift)):
            convert = place(m, f"half_{name}", SingleToHalf())
            m.d.comb += [
                convert.enable.eq(converting),
                convert.i.eq(value),
                convert.scale.eq(shift),
                convert.saturate.eq(0),
            ]
            halves.append(convert.o)
        quantizer = place(m, "quantizer", Quantizer())
        m.d.comb += [
            quantizer.v.eq(halves[0]),
            *(getattr(quantizer, name).eq(self.fgmp[name]) for name in ("lo", "hi", "below", "above")),
        ]
        a, b = Signal(16, reset_less=True), Signal(16, reset_less=True)
        added, load = Signal(), Signal()
        m.d.sync += [added.eq(add), load.eq(first)]
        with m.If(add):
            m.d.sync += [a.eq(Mux(self.fgmp.quantise, quantizer.value, halves[0])), b.eq(halves[1])]
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
