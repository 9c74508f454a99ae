"""One FP32 lane of the vector unit."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib.wiring import In, Out

from lnpu.ctrl.commands import VectorOp
from lnpu.formats import F32_NAN
from lnpu.fp.fp32_add import Fp32Add
from lnpu.fp.fp32_compare import equal, greater, is_nan, positive
from lnpu.fp.fp32_multiply import Fp32Multiply
from lnpu.hdl import Block, place

__all__ = ["VectorLane"]

ONE = 0x3F800000


class VectorLane(Block):
    """Computes `op` of a, b and c, one element a cycle.

    Operations that select pass their operand on bit by bit, NaNs too. DIV, SQRT and COPY all give `a`: the quotient or
    root must have been made before.

    Members
    -------
    enable : In(1)
        The pipeline moves; else it holds everything.
    op : In(VectorOp)
        Stable while there are elements in the pipeline.
    a, b, c : In(32)
    o : Out(32)
        The result of the operands of `latency(op)` enabled cycles before.
    """

    enable: In(1)
    op: In(VectorOp)
    a: In(32)
    b: In(32)
    c: In(32)
    o: Out(32)

    @staticmethod
    def latency(op: VectorOp) -> int:
        """Enabled cycles from operands to result."""
        if op in (VectorOp.ADD, VectorOp.SUB, VectorOp.ADD_UNMASKED):
            return Fp32Add.LATENCY
        if op == VectorOp.MUL:
            return Fp32Multiply.LATENCY
        if op == VectorOp.MULADD:
            return Fp32Multiply.LATENCY + Fp32Add.LATENCY
        return 1

    def elaborate(self, platform):
        m = Module()
        multiply = place(m, "multiply", Fp32Multiply())
        add = place(m, "add", Fp32Add())
        muladd = self.op == VectorOp.MULADD

        late_c = self.c
        for stage in range(Fp32Multiply.LATENCY):
            delayed = Signal(32, name=f"c{stage + 1}", reset_less=True)
            with m.If(self.enable):
                m.d.sync += delayed.eq(late_c)
            late_c = delayed
        dropped = Signal()  # +0 is the sum of two of them
        m.d.comb += [
            dropped.eq((self.op == VectorOp.ADD_UNMASKED) & self.a[31] & ~self.a[:31].any()),
            multiply.enable.eq(self.enable),
            multiply.a.eq(self.a),
            multiply.b.eq(self.b),
            add.enable.eq(self.enable),
            add.a.eq(Mux(muladd, multiply.o, Mux(dropped, 0, self.a))),
            add.b.eq(Mux(muladd, late_c, Mux(dropped, 0, self.b))),
            add.subtract.eq(self.op == VectorOp.SUB),
        ]

        # What is selected does not wait for the operation: a with b is compared in any case.
        a_greater, b_greater = Signal(), Signal()
        unordered = Signal()
        m.d.comb += [
            a_greater.eq(greater(m, self.a, self.b)),
            b_greater.eq(greater(m, self.b, self.a)),
            unordered.eq(is_nan(self.a) | is_nan(self.b)),
        ]
        take_a, take_b = Signal(), Signal()
        constant = Signal(32)
        with m.Switch(self.op):
            with m.Case(VectorOp.MAX):
                m.d.comb += [take_a.eq(a_greater), take_b.eq(~a_greater & ~unordered)]
                m.d.comb += constant.eq(Mux(unordered, F32_NAN, 0))
            with m.Case(VectorOp.MIN):
                m.d.comb += [take_a.eq(b_greater), take_b.eq(~b_greater & ~unordered)]
                m.d.comb += constant.eq(Mux(unordered, F32_NAN, 0))
            with m.Case(VectorOp.KEEP_POSITIVE):
                m.d.comb += take_a.eq(positive(self.b))
            with m.Case(VectorOp.KEEP_EQUAL):
                m.d.comb += take_a.eq(equal(self.b, self.c))
            with m.Case(VectorOp.GREATER_EQUAL):
                m.d.comb += constant.eq(Mux(unordered | b_greater, 0, ONE))
            with m.Default():
                m.d.comb += take_a.eq(1)
        selected = Signal(32, reset_less=True)
        with m.If(self.enable):
            m.d.sync += selected.eq(Mux(take_a, self.a, 0) | Mux(take_b, self.b, 0) | constant)

        with m.Switch(self.op):
            with m.Case(VectorOp.ADD, VectorOp.SUB, VectorOp.MULADD, VectorOp.ADD_UNMASKED):
                m.d.comb += self.o.eq(add.o)
            with m.Case(VectorOp.MUL):
                m.d.comb += self.o.eq(multiply.o)
            with m.Default():
                m.d.comb += self.o.eq(selected)
        return m
