"""OperandFetch asks for every row of its walk once, in order, and hands each on, once and in order.

The harness walks beside it with counters that go up, and keeps the rows that came in a queue; what the memory grants,
what it holds and when a row is taken are free. There is no deadlock: while rows are to be asked for and there is room
for one, it asks, and while it holds one, it offers it.
"""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib.wiring import In, Out

from lnpu.config import TINY
from lnpu.hdl import Block, place
from lnpu.vector.operand_fetch import OperandFetch
from verif.formal.proof import Fault, Proof

__all__ = ["PROOFS"]

_STABLE = {"base": 16, "inner_stride": 16, "outer_stride": 16, "inner": 16, "outer": 16, "still": 1}
_ROW = 32 * TINY.beat
_PEEKS = {
    "asking": 1,
    "arriving": 1,
    "kept": 2,
    "inner_left": 16,
    "outer_left": 16,
    "first": _ROW,
    "second": _ROW,
    "line": 16,
    "end": 1,
}


class FetchesOnce(Block):
    """An operand fetch, its memory and a queue."""

    def __init__(self) -> None:
        super().__init__(
            {
                "start": In(1),
                **{name: In(width) for name, width in _STABLE.items()},
                "grant": In(1),
                "row": In(_ROW),
                "ready": In(1),
                **{f"peek_{name}": In(width) for name, width in _PEEKS.items()},
                "assume": Out(1),
                "hold": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        dut = place(m, "dut", OperandFetch(config=TINY))
        # The walk's parameters are stable from its start on.
        walk = {name: Signal(width, name=name) for name, width in _STABLE.items()}
        kept = {name: Signal(width, name=f"kept_{name}") for name, width in _STABLE.items()}
        for name, value in walk.items():
            m.d.comb += [
                value.eq(Mux(self.start, getattr(self, name), kept[name])),
                Value.cast(getattr(dut, name)).eq(value),
            ]
            m.d.sync += kept[name].eq(value)
        request, asked, taken = dut.read.request, Signal(), Signal()
        m.d.comb += [
            dut.start.eq(self.start),
            request.ready.eq(self.grant),
            Value.cast(dut.read.row).eq(self.row),
            dut.rows.ready.eq(self.ready),
            asked.eq(request.valid & self.grant),
            taken.eq(dut.rows.valid & self.ready),
        ]

        # Where the walk is: row i of line o, at `address`; `line` is where i = 0 is.
        active = Signal()
        i, o, address, line = (Signal(16, name=name) for name in ("i", "o", "address", "line"))
        last = self.start | walk["still"] | (i + 1 == walk["inner"])
        with m.If(self.start):
            m.d.sync += [active.eq(1), i.eq(0), o.eq(0), address.eq(walk["base"]), line.eq(walk["base"])]
        with m.Elif(asked & last):
            m.d.sync += [
                active.eq(o + 1 != walk["outer"]),
                i.eq(0),
                o.eq(o + 1),
                address.eq(line + walk["outer_stride"]),
                line.eq(line + walk["outer_stride"]),
            ]
        with m.Elif(asked):
            m.d.sync += [i.eq(i + 1), address.eq(address + walk["inner_stride"])]

        # Rows that came: the one asked for in the last cycle, and those before it that were not taken.
        coming = Signal()
        level = Signal(3)
        queue = [Signal(_ROW, name=f"queue{n}") for n in range(2)]
        left = Signal(3)
        m.d.comb += left.eq(level + coming - taken)
        m.d.sync += [coming.eq(asked), level.eq(left)]
        words = [Mux(level == 0, self.row, queue[0]), Mux(level == 1, self.row, queue[1])]
        m.d.sync += [queue[0].eq(Mux(taken, words[1], words[0])), queue[1].eq(words[1])]

        waits, before = Signal(), Signal(16)
        m.d.sync += [waits.eq(request.valid & ~self.grant), before.eq(request.payload)]
        m.d.comb += [
            self.assume.eq(
                ~self.start | (~active & (level == 0) & ~coming & (walk["inner"] != 0) & (walk["outer"] != 0))
            ),
            self.hold.eq(
                Cat(
                    request.valid == (active & (level + coming < 2)),
                    ~request.valid | (request.payload == address),
                    ~waits | (request.valid & (request.payload == before)),
                    level + coming <= 2,
                    dut.rows.valid == (level + coming != 0),
                    ~dut.rows.valid | (Value.cast(dut.rows.payload) == words[0]),
                    # How the state of the block and that of the harness belong together.
                    self.peek_asking == active,
                    self.peek_arriving == coming,
                    self.peek_kept == level,
                    (level == 0) | (self.peek_first == queue[0]),
                    (level < 2) | (self.peek_second == queue[1]),
                    ~active | (self.peek_line == line),
                    ~active | (self.peek_outer_left == (kept["outer"] - o)[:16]),
                    ~active | (o < kept["outer"]),
                    ~active | (self.peek_end == (kept["still"] | (i + 1 == kept["inner"]))),
                    ~active
                    | kept["still"]
                    | ((self.peek_inner_left == (kept["inner"] - i)[:16]) & (i < kept["inner"])),
                ).all()
            ),
        ]
        return m


PROOFS = [
    Proof(
        name="operand-fetch",
        block="OperandFetch, rows of 128 bits",
        statement="rows of the walk asked for and handed on once, in order; room for each; request stays; no deadlock",
        harness=FetchesOnce,
        method="induction",
        depth=8,
        peeks={f"peek_{name}": f"dut.{'walk.' if name == 'line' else ''}{name}" for name in _PEEKS},
        faults=(Fault("arriving", 0), Fault("kept[1]", 0)),
    )
]
