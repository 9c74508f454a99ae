"""The vector unit's exact sums: `beat` lanes and `sum_rows` rows of sums between commands."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.formats import psum_layout
from lnpu.hdl import Block, Sram, place
from lnpu.interfaces import vmem_row
from lnpu.vector.sum_lane import SUM_FGMP, SumLane

__all__ = ["ExactSums"]


class ExactSums(Block):
    """Adds rows of products to stored rows of exact sums, and reads stored rows out, rounded to FP32.

    Sums and reads use rows `row`, `row + 1`, ... from `start` on; they do not overlap.

    Parameters
    ----------
    config : ChipConfig
        Uses `beat`, `acc_bits` and `sum_rows`.

    Members
    -------
    start : In(1) ; row : In(10)
        Make `row` the next to be summed or read.
    initialise, a_shift, b_shift, fgmp : In
        Sums start from zero instead of from the stored row; scaling and FGMP, see `SumLane`. Stable during work.
    add : In(1)
        Take rows `a` and `b` in this cycle.
    first, last : In(1)
        With `add`: begin with the stored sums; store the sums with this row in LATENCY cycles, and go on with the next
        row.
    a, b : In(vmem_row(config))
    read : In(1)
        Read sums. They enter the rounding pipeline in the next enabled cycle that follows.
    read_next : In(1)
        With `read`: go on with the next row.
    round_enable : In(1)
        The rounding pipeline moves.
    o : Out(vmem_row(config))
        What entered ROUND_LATENCY enabled cycles before, rounded.
    """

    LATENCY = SumLane.LATENCY
    ROUND_LATENCY = SumLane.ROUND_LATENCY

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        row = vmem_row(config)
        super().__init__(
            {
                "start": In(1),
                "row": In(10),
                "initialise": In(1),
                "a_shift": In(signed(8)),
                "b_shift": In(signed(8)),
                "fgmp": In(SUM_FGMP),
                "add": In(1),
                "first": In(1),
                "last": In(1),
                "a": In(row),
                "b": In(row),
                "read": In(1),
                "read_next": In(1),
                "round_enable": In(1),
                "o": Out(row),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        psum = psum_layout(config.acc_bits)
        m.submodules.sums = sums = Sram(depth=config.sum_rows, width=psum.size * config.beat)

        # With `add` in t: halves in t and t + 1, FGMP in t + 2, products and the read of the stored row in t + 3, the
        # sum in t + 4, store in t + 5.
        *_, load = self._delays(m, "load", self.add & self.first & ~self.initialise, self.LATENCY - 2)
        *_, store = self._delays(m, "store", self.add & self.last, self.LATENCY)
        read_row = Signal(10, reset_less=True)
        write_row = Signal(10, reset_less=True)
        with m.If(self.start):
            m.d.sync += [read_row.eq(self.row), write_row.eq(self.row)]
        with m.Else():
            with m.If(load | (self.read & self.read_next)):
                m.d.sync += read_row.eq(read_row + 1)
            with m.If(store):
                m.d.sync += write_row.eq(write_row + 1)
        m.d.comb += [
            sums.r_en.eq(load | self.read),
            sums.r_addr.eq(read_row),
            sums.w_en.eq(store),
            sums.w_addr.eq(write_row),
        ]
        results = []
        for i in range(config.beat):
            lane = place(m, f"lane{i}", SumLane(acc_bits=config.acc_bits))
            stored = sums.r_data.word_select(i, psum.size)
            m.d.comb += [
                lane.add.eq(self.add),
                lane.first.eq(self.first),
                lane.a.eq(self.a[i]),
                lane.b.eq(self.b[i]),
                lane.a_shift.eq(self.a_shift),
                lane.b_shift.eq(self.b_shift),
                lane.fgmp.eq(self.fgmp),
                lane.start.eq(Mux(self.initialise, 0, stored)),
                lane.round_enable.eq(self.round_enable),
                lane.stored.eq(stored),
                self.o[i].eq(lane.o),
            ]
            results.append(lane.sum)
        m.d.comb += sums.w_data.eq(Cat(results))
        return m

    @staticmethod
    def _delays(m: Module, name: str, value, count: int) -> list[Signal]:
        """`value` one to `count` cycles later."""
        delays = []
        for stage in range(1, count + 1):
            delayed = Signal(name=f"{name}{stage}")
            m.d.sync += delayed.eq(value)
            value = delayed
            delays.append(delayed)
        return delays
