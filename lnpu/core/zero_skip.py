"""The zero-skip controller: which elements of a row are streamed in which cycle."""

from functools import reduce
from itertools import combinations
from operator import or_

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.hdl import Block
from lnpu.tree_sum import tree_sum

__all__ = ["ZeroSkip", "issue_layout", "visit_layout"]


def visit_layout(config: ChipConfig) -> data.StructLayout:
    """Masks of a visit: its elements, and which of them are FP8."""
    return data.StructLayout({"nonzero": config.depth, "fp8": config.depth})


def issue_layout(config: ChipConfig) -> data.StructLayout:
    """Elements of one cycle: k[0] if enable[0] is set and k[1], of another bank, if enable[1] is as well."""
    return data.StructLayout(
        {
            "first": 1,  # of the visit
            "last": 1,
            "fp16": 1,  # the (one) element is FP16
            "enable": 2,
            "k": data.ArrayLayout((config.depth - 1).bit_length(), 2),
        }
    )


class ZeroSkip(Block):
    """Turns each visit's masks into transfers on `issue`: max(1, n16 + max(n8 / 2 rounded up, most n8 of a bank)).

    Element k is in bank k mod `dense_banks`, as its row of the dense buffer is, and two elements of a cycle must be of
    different banks. FP16 elements come first, one a cycle; then FP8 elements in pairs, always of the two banks that
    have most left: so no bank is left over that could have been paired. A visit without elements takes a cycle with
    nothing enabled. The next visit is taken in the cycle of the last transfer, so that there is no gap between visits.

    Parameters
    ----------
    config : ChipConfig
        Its `depth` and `dense_banks`.

    Members
    -------
    visit : In(stream.Signature(visit_layout(config)))
    issue : Out(stream.Signature(issue_layout(config)))
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "visit": In(stream.Signature(visit_layout(config))),
                "issue": Out(stream.Signature(issue_layout(config))),
            }
        )

    @property
    def suffix(self) -> str:
        return f"{self.config.depth}x{self.config.dense_banks}"

    def elaborate(self, platform):
        m = Module()
        banks = self.config.dense_banks
        size = self.config.depth // banks
        visit, issue = self.visit, self.issue

        # What is left of the visit in each bank, and how many FP8 elements that is.
        active = Signal()
        first = Signal(reset_less=True)
        fp16 = [Signal(size, name=f"fp16_{b}", reset_less=True) for b in range(banks)]
        fp8 = [Signal(size, name=f"fp8_{b}", reset_less=True) for b in range(banks)]
        count = [Signal(range(size + 1), name=f"count_{b}", reset_less=True) for b in range(banks)]

        # Each bank offers its first element.
        some16 = Signal()
        m.d.comb += [some16.eq(reduce(or_, fp16).any()), issue.p.fp16.eq(some16), issue.p.first.eq(first)]
        offers = Signal(banks)
        others = [Signal(size, name=f"others_{b}") for b in range(banks)]  # all the elements but that
        k = []
        for b in range(banks):
            candidates = Signal(size, name=f"candidates_{b}")
            one_hot = Signal(size, name=f"one_hot_{b}")
            m.d.comb += [
                candidates.eq(Mux(some16, fp16[b], fp8[b])),
                offers[b].eq(candidates.any()),
                others[b].eq(candidates & (candidates - 1)),
                one_hot.eq(candidates & ~others[b]),
            ]
            encoded = [
                Cat(one_hot[n] for n in range(size) if n >> bit & 1).any() for bit in range((size - 1).bit_length())
            ]
            k.append(Cat(Const(b, (banks - 1).bit_length()), *encoded))

        # FP16: the first bank that has an element. FP8: the two banks that have most.
        most, second = Signal(banks), Signal(banks)
        before = [[Signal(name=f"before_{a}_{b}") if a != b else None for b in range(banks)] for a in range(banks)]
        for a in range(banks):
            for b in range(a + 1, banks):
                m.d.comb += [before[a][b].eq(count[a] >= count[b]), before[b][a].eq(~before[a][b])]
        for b in range(banks):
            ahead = [before[a][b] for a in range(banks) if a != b]
            m.d.comb += [most[b].eq(~Cat(ahead).any()), second[b].eq(_exactly_one(ahead))]
        lowest = offers & ~(offers - 1)
        chosen = [Signal(banks, name=f"chosen_{i}") for i in range(2)]
        m.d.comb += [
            chosen[0].eq(Mux(some16, lowest, most & offers)),
            chosen[1].eq(Mux(some16, 0, second & offers)),
            issue.p.enable.eq(Cat(chosen[0].any(), chosen[1].any())),
        ]
        for i in range(2):
            m.d.comb += issue.p.k[i].eq(reduce(or_, (Mux(chosen[i][b], k[b], 0) for b in range(banks))))

        two, three = (_at_least(number, list(offers)) for number in (2, 3))
        last = Signal()
        m.d.comb += [
            last.eq(~Cat(others).any() & ~Mux(some16, two | Cat(fp8).any(), three)),
            issue.p.last.eq(last),
            issue.valid.eq(active),
            visit.ready.eq(~active | (last & issue.ready)),
        ]
        with m.If(active & issue.ready):
            m.d.sync += first.eq(0)
            for b in range(banks):
                with m.If(chosen[0][b] | chosen[1][b]):
                    with m.If(some16):
                        m.d.sync += fp16[b].eq(others[b])
                    with m.Else():
                        m.d.sync += [fp8[b].eq(others[b]), count[b].eq(count[b] - 1)]
        with m.If(visit.ready):
            m.d.sync += [active.eq(visit.valid), first.eq(1)]
            with m.If(visit.valid):
                for b in range(banks):
                    nonzero = Cat(visit.p.nonzero[b::banks])
                    is_fp8 = Cat(visit.p.fp8[b::banks])
                    m.d.sync += [
                        fp16[b].eq(nonzero & ~is_fp8),
                        fp8[b].eq(nonzero & is_fp8),
                        count[b].eq(tree_sum(nonzero & is_fp8)),
                    ]
        return m


def _at_least(number: int, bits: list):
    """Whether so many of a few bits are set."""
    return reduce(or_, (Cat(some).all() for some in combinations(bits, number)), Const(0, 1))


def _exactly_one(bits: list):
    """Whether one of a few bits is set, and no other."""
    return Cat(bits).any() & ~_at_least(2, bits)
