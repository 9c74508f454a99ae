"""The line of PEs in a core."""

from amaranth.hdl import Module, Mux, Value
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.formats import psum_layout
from lnpu.hdl import Block, place
from lnpu.pe.pe import Pe

__all__ = ["PeLine"]


class PeLine(Block):
    """`lanes` PEs with one streamed operand; each has dense operands and a sum of its own. Otherwise as `Pe`.

    A PE that is not live adds nothing, and sees zeros as dense operands, so that its multipliers rest: it keeps the sum
    that it was loaded with.

    Parameters
    ----------
    lanes : int
        Number of PEs.
    acc_bits : int
        Width of a sum.

    Members
    -------
    enable : In(2)
    pair : In(1)
    a : In(ArrayLayout(16, 2))
    load : In(1)
        As in `Pe`, for all PEs.
    b : In(ArrayLayout(16, 2)).array(lanes)
        b[n][i] is b[i] of PE n.
    live : In(lanes)
        Which PEs take the products of this cycle.
    psum_i : In(psum_layout(acc_bits)).array(lanes)
    psum_o : Out(psum_layout(acc_bits)).array(lanes)
    """

    def __init__(self, *, lanes: int, acc_bits: int = 97) -> None:
        if lanes < 1:
            raise ValueError(f"lanes must be at least 1, not {lanes!r}")
        self.lanes, self.acc_bits = lanes, acc_bits
        super().__init__(
            {
                "enable": In(2),
                "pair": In(1),
                "a": In(data.ArrayLayout(16, 2)),
                "load": In(1),
                "b": In(data.ArrayLayout(16, 2)).array(lanes),
                "live": In(lanes),
                "psum_i": In(psum_layout(acc_bits)).array(lanes),
                "psum_o": Out(psum_layout(acc_bits)).array(lanes),
            }
        )

    @property
    def suffix(self) -> str:
        return f"{self.lanes}x{self.acc_bits}"

    def elaborate(self, platform):
        m = Module()
        for n in range(self.lanes):
            pe = place(m, f"pe_{n}", Pe(acc_bits=self.acc_bits))
            m.d.comb += [
                pe.enable.eq(Mux(self.live[n], self.enable, 0)),
                pe.pair.eq(self.pair),
                pe.a.eq(self.a),
                pe.load.eq(self.load),
                pe.b.eq(Mux(self.live[n], Value.cast(self.b[n]), 0)),
                pe.psum_i.eq(self.psum_i[n]),
                self.psum_o[n].eq(pe.psum_o),
            ]
        return m
