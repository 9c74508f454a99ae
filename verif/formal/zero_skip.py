"""The zero-skip controller issues every element of a visit exactly once and nothing else.

The harness remembers the masks of the visit and what has been issued of it. What the controller has left must be the
difference, and `last` must come with the last element. A transfer issues one FP16 element, or leaves one cycle less of
those that the documented formula gives for the FP8 elements that are left: a visit ends after as many transfers as that
says, so there is no deadlock.
"""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out

from lnpu.config import TINY
from lnpu.core.zero_skip import ZeroSkip, issue_layout, visit_layout
from lnpu.hdl import Block, place
from lnpu.tree_sum import tree_sum
from verif.formal.proof import Fault, Proof

__all__ = ["PROOFS"]


class IssuesOnce(Block):
    """A zero-skip controller and the set of what it has issued."""

    def __init__(self, *, depth: int, banks: int) -> None:
        self.config = TINY.replace(depth=depth, dense_banks=banks)
        size = depth // banks
        super().__init__(
            {
                "visit": In(stream.Signature(visit_layout(self.config))),
                "issue": Out(stream.Signature(issue_layout(self.config))),
                **{f"peek_{part}_{bank}": In(size) for part in ("fp16", "fp8") for bank in range(banks)},
                **{f"peek_count_{bank}": In(range(size + 1)) for bank in range(banks)},
                "assume": Out(1),
                "hold": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        depth, banks = self.config.depth, self.config.dense_banks
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
        matches, after = [], []
        counts = [getattr(self, f"peek_count_{bank}") for bank in range(banks)]
        for bank in range(banks):
            after.append(counts[bank] - (now & fp8)[bank::banks].any())
            wide, narrow = ((left & mask)[bank::banks] for mask in (~fp8, fp8))
            matches += [
                getattr(self, f"peek_fp16_{bank}") == wide,
                getattr(self, f"peek_fp8_{bank}") == narrow,
                counts[bank] == tree_sum(narrow),
            ]
        ok = Cat(
            dut.issue.p.first == ~begun,
            (now & ~left) == 0,  # elements of this visit, none for a second time
            dut.issue.p.last == ((left & ~now) == 0),  # none is lost
            (now != 0) | ((nonzero == 0) & ~begun),
            fp16 | (left == 0) | (_pairs(m, "left", counts) == _pairs(m, "after", after) + 1),
            ~enable[1] | enable[0],
            ~enable.all() | (k[0] % banks != k[1] % banks),
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


def _pairs(m: Module, name: str, counts: list[Value]) -> Value:
    """Cycles of FP8 elements, so many of each bank: half of all rounded up, or the most of a bank."""
    cycles = Signal(8, name=f"cycles_{name}_0")
    m.d.comb += cycles.eq((tree_sum(counts) + 1) >> 1)
    for bank, count in enumerate(counts):
        before, cycles = cycles, Signal(8, name=f"cycles_{name}_{bank + 1}")
        m.d.comb += cycles.eq(Mux(count > before, count, before))
    return cycles


def _proof(depth: int, banks: int) -> Proof:
    names = [f"{part}_{bank}" for part in ("fp16", "fp8", "count") for bank in range(banks)]
    return Proof(
        name=f"zero-skip-{depth}x{banks}",
        block=f"ZeroSkip, rows of {depth}, {banks} banks",
        statement="every set bit of the mask is issued once, no other, in the documented number of cycles; no deadlock",
        harness=lambda: IssuesOnce(depth=depth, banks=banks),
        method="induction",
        depth=3,
        peeks={f"peek_{name}": f"dut.{name}" for name in names},
        faults=(Fault("fp8_1[1]", 0), Fault("fp16_0[0]", 0), Fault("count_1[0]", 0)),
        quick=depth == 16,
    )


PROOFS = [_proof(depth, banks) for depth, banks in ((16, 2), (16, 4), (64, 4))]
