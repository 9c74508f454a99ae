"""The zero-skip controller: which elements of a row are streamed in which cycle."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.hdl import Block

__all__ = ["ZeroSkip", "issue_layout", "visit_layout"]


def visit_layout(config: ChipConfig) -> data.StructLayout:
    """Masks of a visit: its elements, and which of them are FP8."""
    return data.StructLayout({"nonzero": config.depth, "fp8": config.depth})


def issue_layout(config: ChipConfig) -> data.StructLayout:
    """Elements of one cycle: k[0], which is even, if enable[0] is set and k[1], which is odd, if enable[1] is."""
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
    """Turns each visit's masks into the cycles that it takes: max(1, n16 + max(n8 even, n8 odd)) transfers on `issue`.

    FP16 elements come first, one a cycle; then FP8 elements, an even and an odd one a cycle. A visit without elements
    takes a cycle with nothing enabled. The next visit is taken in the cycle of the last transfer, so that there is no
    gap between visits.

    Parameters
    ----------
    config : ChipConfig
        Its `depth`.

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
        return f"{self.config.depth}"

    def elaborate(self, platform):
        m = Module()
        half = self.config.depth // 2
        visit, issue = self.visit, self.issue

        # What is left of the visit, even and odd k apart.
        active = Signal()
        first = Signal(reset_less=True)
        fp16 = [Signal(half, name=f"fp16_{parity}", reset_less=True) for parity in ("even", "odd")]
        fp8 = [Signal(half, name=f"fp8_{parity}", reset_less=True) for parity in ("even", "odd")]

        some16 = Signal()
        only = []  # of the elements of this precision and parity, all but the first that is left
        left = []
        m.d.comb += [some16.eq((fp16[0] | fp16[1]).any()), issue.p.fp16.eq(some16), issue.p.first.eq(first)]
        for i, parity in enumerate(("even", "odd")):
            candidates = Signal(half, name=f"candidates_{parity}")
            others = Signal(half, name=f"others_{parity}")
            m.d.comb += [
                candidates.eq(Mux(some16, fp16[i], fp8[i])),
                others.eq(candidates & (candidates - 1)),
            ]
            one_hot = Signal(half, name=f"one_hot_{parity}")
            m.d.comb += one_hot.eq(candidates & ~others)
            encoded = [
                Cat(one_hot[n] for n in range(half) if n >> bit & 1).any() for bit in range((half - 1).bit_length())
            ]
            m.d.comb += issue.p.k[i].eq(Cat(Const(i, 1), *encoded))
            only.append(others)
            left.append(candidates)
        even = left[0].any()
        odd = left[1].any()
        m.d.comb += issue.p.enable.eq(Cat(even, odd & ~(some16 & even)))

        rest16 = [Mux(some16, only[0], 0), Mux(some16, Mux(even, fp16[1], only[1]), 0)]
        rest8 = [Mux(some16, fp8[0], only[0]), Mux(some16, fp8[1], only[1])]
        last = Signal()
        m.d.comb += [
            last.eq(~(rest16[0] | rest16[1] | rest8[0] | rest8[1]).any()),
            issue.p.last.eq(last),
            issue.valid.eq(active),
            visit.ready.eq(~active | (last & issue.ready)),
        ]
        with m.If(active & issue.ready):
            m.d.sync += first.eq(0)
            m.d.sync += [target.eq(rest) for target, rest in zip(fp16 + fp8, rest16 + rest8, strict=True)]
        with m.If(visit.ready):
            m.d.sync += [active.eq(visit.valid), first.eq(1)]
            with m.If(visit.valid):
                for i in range(2):
                    nonzero = Cat(visit.p.nonzero[i::2])
                    is_fp8 = Cat(visit.p.fp8[i::2])
                    m.d.sync += [fp16[i].eq(nonzero & ~is_fp8), fp8[i].eq(nonzero & is_fp8)]
        return m
