"""Vector unit: executes VECTOR commands on rows of the vector memory."""

from itertools import pairwise

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.ctrl.commands import READS_B, READS_C, Opcode, VectorOp, layout_of
from lnpu.fp.common import register
from lnpu.fp.fp32_compare import is_nan, positive
from lnpu.fp.fp32_divide import Fp32DivideSqrt
from lnpu.hdl import Block, place
from lnpu.interfaces import Error, command_stream, vmem_read_signature, vmem_row, vmem_write
from lnpu.mem.skid_buffer import SkidBuffer
from lnpu.vector.exact_sums import ExactSums
from lnpu.vector.operand_fetch import OperandFetch
from lnpu.vector.strided_address import StridedAddress
from lnpu.vector.sum_lane import SUM_FGMP
from lnpu.vector.vector_lane import VectorLane

__all__ = ["VectorUnit"]


BEAT = data.StructLayout(
    {
        "valid": 1,
        "first": 1,  # inner = 0
        "end": 1,  # last inner
        "last": 1,  # last beat of the command
    }
)


class VectorUnit(Block):
    """Executes VECTOR commands; `lnpu.ctrl.commands` has the fields and operations.

    A command without DIV or SQRT takes one cycle a beat, as long as the memory grants every cycle: each operand has a
    read port of its own and is read up to two rows ahead. Of an operand b or c whose inner stride is 0, a row is read
    once for all the inner indices; b is not read where its walk is that of a. DIV and SQRT compute one element after
    the other. An operand's rows are read in order, and a beat's row is written after the beat's operands were read:
    `dst` may be the same walk as an operand, but no row may be written that a later beat reads. SUM_OUT ignores a, b
    and c, and writes its row for each inner index. With `rectify`, results below zero and -0 are written as +0; NaNs
    stay. With `masked`, results whose c is not positive are. Nothing but the two loops and the operation is checked
    here; the vector memory checks the addresses.

    Parameters
    ----------
    config : ChipConfig
        Uses `beat`, `acc_bits` and `sum_rows`.

    Members
    -------
    command : In(command_stream())
        Taken only while the unit is idle.
    busy : Out(1)
        Set from the cycle after a command was taken until its last write has been taken or its last sum stored.
    error : Out(Error)
        FIELD for one cycle, while `busy`, where the command was dropped: unknown operation, no beats, sums beyond the
        last row, or below = 3 or lo > hi where a SUM quantises.
    read_a, read_b, read_c : Out(vmem_read_signature(config))
        `row` is looked at only in the cycle after a request was taken.
    write : Out(stream.Signature(vmem_write(config)))
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "command": In(command_stream()),
                "busy": Out(1),
                "error": Out(Error),
                "read_a": Out(vmem_read_signature(config)),
                "read_b": Out(vmem_read_signature(config)),
                "read_c": Out(vmem_read_signature(config)),
                "write": Out(stream.Signature(vmem_write(config))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        row = vmem_row(config)
        command = Signal(layout_of(Opcode.VECTOR), reset_less=True)

        def op_in(*ops):
            return Cat(command.op == op.value for op in ops).any()

        reads_b = Signal()
        reads_c = Signal()
        divides = Signal()
        sums = Signal()
        summing = Signal()
        rounding = Signal()
        m.d.comb += [
            reads_b.eq(op_in(*READS_B) & ~command.b_immediate),
            reads_c.eq((op_in(*READS_C) | (command.masked & ~sums)) & ~command.c_immediate),
            summing.eq(op_in(VectorOp.SUM)),
            rounding.eq(op_in(VectorOp.SUM_OUT)),
            sums.eq(summing | rounding),
            divides.eq(op_in(VectorOp.DIV, VectorOp.SQRT)),
        ]
        valid = Signal()
        m.d.comb += valid.eq(
            op_in(*VectorOp)
            & (command.outer != 0)
            & (command.inner != 0)
            & ~(sums & (command.sum + command.outer > config.sum_rows))
            & ~(summing & command.quantise & ((command.below == 3) | (command.lo > command.hi)))
        )

        start = Signal()
        done = Signal()
        with m.FSM(name="control") as control:
            with m.State("IDLE"):
                m.d.comb += self.command.ready.eq(1)
                with m.If(self.command.valid):
                    m.d.sync += command.eq(self.command.payload)
                    m.next = "START"
            with m.State("START"):
                m.d.comb += start.eq(valid)
                with m.If(valid):
                    m.next = "RUN"
                with m.Else():
                    m.d.comb += self.error.eq(Error.FIELD)
                    m.next = "IDLE"
            with m.State("RUN"), m.If(done):
                m.next = "IDLE"
        m.d.comb += self.busy.eq(~control.ongoing("IDLE"))

        # Beats: `arrived` holds the next one, which is taken on when its operands are there. (That of SUM_OUT are sums,
        # which are read a cycle before.)
        enable = Signal()  # the pipeline behind moves
        dividing = Signal()
        operands_ready = Signal()
        arrived = Signal()
        arrived_beat = Signal(BEAT, reset_less=True)
        asking = Signal()
        ask = Signal()
        take = Signal()
        inner_left = Signal(16, reset_less=True)
        outer_left = Signal(16, reset_less=True)
        first = Signal(reset_less=True)
        end = Signal(reset_less=True)
        single = command.inner == 1
        m.d.comb += [
            take.eq(arrived & enable & ~dividing & operands_ready),
            ask.eq(asking & (~arrived | take)),
        ]
        with m.If(start):
            m.d.sync += [asking.eq(1), inner_left.eq(command.inner), outer_left.eq(command.outer), first.eq(1)]
            m.d.sync += end.eq(single)
        with m.Elif(ask):
            m.d.sync += [inner_left.eq(inner_left - 1), first.eq(end), end.eq(inner_left == 2)]
            with m.If(end):
                m.d.sync += [inner_left.eq(command.inner), outer_left.eq(outer_left - 1), end.eq(single)]
                with m.If(outer_left == 1):
                    m.d.sync += asking.eq(0)
        with m.If(ask):
            m.d.sync += [
                arrived.eq(1),
                arrived_beat.first.eq(first),
                arrived_beat.end.eq(end),
                arrived_beat.last.eq(end & (outer_left == 1)),
            ]
        with m.Elif(take):
            m.d.sync += arrived.eq(0)

        # Operands. Immediate ones stay in their registers for the whole command, others where they do not step.
        b_is_a, still_b, still_c = Signal(), Signal(), Signal()  # still: the row stays over the inner loop
        m.d.comb += [
            b_is_a.eq(
                (command.a == command.b) & (command.a_outer == command.b_outer) & (command.a_inner == command.b_inner)
            ),
            still_b.eq(command.b_inner == 0),
            still_c.eq(command.c_inner == 0),
        ]
        a, b, c = (Signal(row, name=name, reset_less=True) for name in "abc")
        with m.If(start):
            m.d.sync += [value.eq(command.immediate_b) for value in b]
            m.d.sync += [value.eq(command.immediate_c) for value in c]
        shared = Signal(reset_less=True)  # b's rows are those of a
        m.d.sync += shared.eq(reads_b & b_is_a)
        ready = []
        for name, operand, needed, still in (
            ("a", a, ~rounding, Const(0, 1)),
            ("b", b, reads_b & ~b_is_a, still_b),
            ("c", c, reads_c, still_c),
        ):
            fetch = place(m, f"fetch_{name}", OperandFetch(config=config))
            due = Signal(name=f"due_{name}")
            used = Signal(name=f"used_{name}", reset_less=True)
            stays = Signal(name=f"stays_{name}", reset_less=True)
            m.d.sync += [used.eq(needed), stays.eq(still)]
            m.d.comb += [
                fetch.start.eq(start & needed),
                fetch.base.eq(command[name]),
                fetch.inner_stride.eq(command[f"{name}_inner"]),
                fetch.outer_stride.eq(command[f"{name}_outer"]),
                fetch.inner.eq(command.inner),
                fetch.outer.eq(command.outer),
                fetch.still.eq(still),
                due.eq(used & (arrived_beat.first | ~stays)),
                fetch.rows.ready.eq(take & due),
            ]
            wiring.connect(m, fetch.read, wiring.flipped(getattr(self, f"read_{name}")))
            ready.append(~due | fetch.rows.valid)
            with m.If(take & due):
                m.d.sync += operand.eq(fetch.rows.payload)
                if name == "a":
                    with m.If(shared):
                        m.d.sync += b.eq(fetch.rows.payload)
        m.d.comb += operands_ready.eq(Cat(ready).all())

        # Division: the unit takes element 0 of the operands, which rotate by an element at each result. After `beat`
        # results they are in a, in their places.
        divider = place(m, "divider", Fp32DivideSqrt())
        element = Signal(range(config.beat))
        divided = Signal()
        m.d.comb += [
            divider.sqrt.eq(command.op == VectorOp.SQRT.value),
            divider.a.eq(a[0]),
            divider.b.eq(b[0]),
        ]
        with m.FSM(name="division") as division:
            with m.State("IDLE"), m.If(take & divides):
                m.next = "START"
            with m.State("START"):
                m.d.comb += divider.start.eq(1)
                m.next = "WAIT"
            with m.State("WAIT"), m.If(divider.done):
                m.d.sync += [
                    Cat(a).eq(Cat(*list(a)[1:], divider.o)),
                    Cat(b).eq(Cat(*list(b)[1:], b[0])),
                    element.eq(element + 1),
                ]
                m.next = "START"
                with m.If(element == config.beat - 1):
                    m.next = "LAUNCH"
            with m.State("LAUNCH"):
                m.d.comb += divided.eq(1)
                with m.If(enable):
                    m.next = "IDLE"
        m.d.comb += dividing.eq(~division.ongoing("IDLE"))

        # Lanes, and a register behind them. beats[k] goes with the elements that entered the lanes k enabled cycles
        # before.
        exact = place(m, "exact_sums", ExactSums(config=config))
        taps = {op: VectorLane.latency(op) + 1 for op in VectorOp}
        taps[VectorOp.SUM] = ExactSums.LATENCY
        taps[VectorOp.SUM_OUT] = ExactSums.ROUND_LATENCY  # they skip the operand registers
        beats = [Signal(BEAT, name=f"beat{k}") for k in range(max(taps.values()) + 1)]
        with m.If(enable):
            m.d.sync += beats[0].valid.eq(Mux(divides, divided, take))
            m.d.sync += [after.eq(before) for before, after in pairwise(beats)]
        with m.If(take):
            m.d.sync += [beats[0][flag].eq(arrived_beat[flag]) for flag in ("first", "end", "last")]
        with m.If(~self.busy):  # beats whose results were taken are on their way still: past this operation's stage
            m.d.sync += [beat.valid.eq(0) for beat in beats]
        # keeps[k] likewise: which elements' c is positive.
        keeps = [Signal(config.beat, name=f"keep{k}", reset_less=True) for k in range(len(beats))]
        m.d.comb += keeps[0].eq(Cat(positive(x) for x in c))
        with m.If(enable):
            m.d.sync += [after.eq(before) for before, after in pairwise(keeps)]
        result, keep = Signal(BEAT), Signal(config.beat)
        with m.Switch(command.op):
            for op, latency in taps.items():
                with m.Case(op.value):
                    m.d.comb += [result.eq(beats[latency]), keep.eq(keeps[latency])]
        masked = Signal()
        m.d.comb += masked.eq(command.masked & ~sums)

        result_row = Signal(row)
        for i in range(config.beat):
            lane = place(m, f"lane{i}", VectorLane())
            computed = register(m, enable, Mux(rounding, exact.o[i], lane.o), name=f"computed{i}")
            negative = Signal(name=f"negative{i}")  # a zero too, a NaN not
            m.d.comb += [
                lane.enable.eq(enable),
                lane.op.eq(VectorOp(command.op)),
                lane.a.eq(a[i]),
                lane.b.eq(b[i]),
                lane.c.eq(c[i]),
                negative.eq(computed[31] & ~is_nan(computed)),
                result_row[i].eq(Mux((command.rectify & negative) | (masked & ~keep[i]), 0, computed)),
            ]
        m.d.comb += [
            exact.start.eq(start),
            exact.row.eq(command.sum),
            exact.initialise.eq(command.initialise),
            exact.a_shift.eq(command.a_shift),
            exact.b_shift.eq(command.b_shift),
            *(exact.fgmp[name].eq(command[name]) for name in SUM_FGMP.members),
            exact.add.eq(summing & beats[0].valid),
            exact.first.eq(beats[0].first),
            exact.last.eq(beats[0].end),
            exact.a.eq(a),
            exact.b.eq(b),
            exact.read.eq(ask & rounding),
            exact.read_next.eq(end),
            exact.round_enable.eq(enable),
        ]

        # Results go out through a buffer, so `enable` hangs on registers only.
        entry = data.StructLayout({"write": vmem_write(config), "last": 1})
        buffer = place(m, "buffer", SkidBuffer(width=entry.size))
        incoming = Signal(entry)
        outgoing = data.View(entry, buffer.o.payload)
        destination = place(m, "destination", StridedAddress())
        m.d.comb += [
            destination.start.eq(start),
            destination.base.eq(command.dst),
            destination.inner_stride.eq(command.dst_inner),
            destination.outer_stride.eq(command.dst_outer),
            enable.eq(buffer.i.ready),
            destination.step.eq(buffer.i.valid & enable),
            destination.wrap.eq(result.end),
            incoming.write.address.eq(destination.address),
            incoming.write.row.eq(result_row),
            incoming.last.eq(result.last),
            buffer.i.payload.eq(incoming),
            buffer.i.valid.eq(result.valid & ~summing),
            self.write.valid.eq(buffer.o.valid),
            self.write.payload.eq(outgoing.write),
            buffer.o.ready.eq(self.write.ready),
            done.eq(Mux(summing, result.valid & result.last, buffer.o.valid & self.write.ready & outgoing.last)),
        ]
        return m
