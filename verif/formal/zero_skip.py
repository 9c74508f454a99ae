"""The zero-skip controller issues every element of a visit exactly once and nothing else.

The harness remembers the masks of the visit and what has been issued of it. What the controller has left must be the
difference, `last` must come with the last element, and a transfer that is not the only one of its visit must issue at
least one element: a visit of n elements ends after at most max(1, n) transfers, so there is no deadlock.
"""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out

from lnpu.config import TINY
from lnpu.core.zero_skip import ZeroSkip, issue_layout, visit_layout
from lnpu.hdl import Block, place
from verif.formal.proof import Fault, Proof

__all__ = ["PROOFS"]

_PARTS = ("fp16_even", "fp16_odd", "fp8_even", "fp8_odd")


class IssuesOnce(Block):
    """A zero-skip controller and the set of what it has issued."""

    def __init__(self, *, depth: int) -> None:
        self.config = TINY.replace(depth=depth)
        super().__init__(
            {
                "visit": In(stream.Signature(visit_layout(self.config))),
                "issue": Out(stream.Signature(issue_layout(self.config))),
                **{f"peek_{part}": In(depth // 2) for part in _PARTS},
                "assume": Out(1),
                "hold": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        depth = self.config.depth
        dut = place(m, "dut", ZeroSkip(config=self.config))
        m.d.comb += [
            dut.visit.p.eq(self.visit.p),
            dut.visit.valid.eq(self.visit.valid),
            self.visit.ready.eq(dut.visit.ready),
            self.issue.p.eq(dut.issue.p),
            self.issue.valid.eq(dut.issue.valid),
            dut.issue.ready.eq(self.issue.ready),
            self.assume.eq(1),
        ]
        busy = Signal()
        begun = Signal()
        nonzero = Signal(depth)
        fp8 = Signal(depth)
        issued = Signal(depth)
        now = Signal(depth)
        enable, k, fp16 = dut.issue.p.enable, dut.issue.p.k, dut.issue.p.fp16
        m.d.comb += now.eq(Mux(enable[0], 1 << k[0], 0) | Mux(enable[1], 1 << k[1], 0))
        with m.If(dut.issue.valid & self.issue.ready):
            m.d.sync += [issued.eq(issued | now), begun.eq(1)]
            with m.If(dut.issue.p.last):
                m.d.sync += busy.eq(0)
        with m.If(dut.visit.ready & self.visit.valid):
            m.d.sync += [
                busy.eq(1),
                begun.eq(0),
                nonzero.eq(self.visit.p.nonzero),
                fp8.eq(self.visit.p.fp8),
                issued.eq(0),
            ]
        left = nonzero & ~issued
        remaining = [
            Cat((left & (fp8 if part.startswith("fp8") else ~fp8))[part.endswith("odd") :: 2]) for part in _PARTS
        ]
        matches = [getattr(self, f"peek_{part}") == value for part, value in zip(_PARTS, remaining, strict=True)]
        ok = Cat(
            dut.issue.p.first == ~begun,
            (now & ~left) == 0,  # elements of this visit, none for a second time
            dut.issue.p.last == ((left & ~now) == 0),  # none is lost
            (now != 0) | ((nonzero == 0) & ~begun),  # progress
            ~enable[0] | ~k[0][0],
            ~enable[1] | k[1][0],
            fp16 == ((left & ~fp8) != 0),
            (now & Mux(fp16, fp8, ~fp8)) == 0,  # of the precision that is told
            ~(fp16 & enable.all()),
            *matches,
        ).all()
        m.d.comb += self.hold.eq(
            (dut.issue.valid == busy)  # what was taken is offered, and nothing else
            & (busy | dut.visit.ready)
            & (~busy | ok)
        )
        return m


def _proof(depth: int) -> Proof:
    return Proof(
        name=f"zero-skip-{depth}",
        block=f"ZeroSkip, rows of {depth}",
        statement="every set bit of the mask is issued once, no other; no deadlock",
        harness=lambda: IssuesOnce(depth=depth),
        method="induction",
        depth=3,
        peeks={f"peek_{part}": f"dut.{part}" for part in _PARTS},
        faults=(Fault("fp8_odd[1]", 0), Fault("fp16_even[0]", 0)),
        quick=depth == 16,
    )


PROOFS = [_proof(depth) for depth in (16, 64)]
