"""One FP32 lane of the vector unit."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib.wiring import In, Out

from lnpu.ctrl.commands import VectorOp
from lnpu.formats import F32_NAN
from lnpu.fp.fp32_add import Fp32Add
from lnpu.fp.fp32_compare import equal, greater, is_nan
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

        # One comparison serves all: a with b, b with 0, or b with c.
        left = Signal(32)
        right = Signal(32)
        with m.Switch(self.op):
            with m.Case(VectorOp.KEEP_POSITIVE):
                m.d.comb += [left.eq(self.b), right.eq(0)]
            with m.Case(VectorOp.KEEP_EQUAL):
                m.d.comb += [left.eq(self.b), right.eq(self.c)]
            with m.Case(VectorOp.MIN):
                m.d.comb += [left.eq(self.b), right.eq(self.a)]
            with m.Default():
                m.d.comb += [left.eq(self.a), right.eq(self.b)]
        is_greater = Signal()
        is_equal = Signal()
        unordered = Signal()
        m.d.comb += [
            is_greater.eq(greater(m, left, right)),
            is_equal.eq(equal(left, right)),
            unordered.eq(is_nan(left) | is_nan(right)),
        ]
        selected = Signal(32, reset_less=True)
        with m.If(self.enable), m.Switch(self.op):
            with m.Case(VectorOp.MAX, VectorOp.MIN):
                m.d.sync += selected.eq(Mux(unordered, F32_NAN, Mux(is_greater, self.a, self.b)))
            with m.Case(VectorOp.KEEP_POSITIVE):
                m.d.sync += selected.eq(Mux(is_greater, self.a, 0))
            with m.Case(VectorOp.KEEP_EQUAL):
                m.d.sync += selected.eq(Mux(is_equal, self.a, 0))
            with m.Case(VectorOp.GREATER_EQUAL):
                m.d.sync += selected.eq(Mux(is_greater | is_equal, ONE, 0))
            with m.Default():
                m.d.sync += selected.eq(self.a)

        with m.Switch(self.op):
            with m.Case(VectorOp.ADD, VectorOp.SUB, VectorOp.MULADD, VectorOp.ADD_UNMASKED):
                m.d.comb += self.o.eq(add.o)
            with m.Case(VectorOp.MUL):
                m.d.comb += self.o.eq(multiply.o)
            with m.Default():
                m.d.comb += self.o.eq(selected)
        return m
