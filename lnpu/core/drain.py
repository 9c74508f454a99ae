"""Unit that rounds the cores' exact partial sums into the vector memory."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.ctrl.commands import Opcode, layout_of
from lnpu.formats import psum_layout
from lnpu.fp.accumulator_round import AccumulatorRound
from lnpu.hdl import Block, place
from lnpu.interfaces import Error, command_stream, vmem_row, vmem_write
from lnpu.mem.skid_buffer import SkidBuffer

__all__ = ["Drain"]

_COMMAND = layout_of(Opcode.DRAIN)
_LOOPS = "nhw"
_ROUNDING = data.StructLayout(
    {"number": 2, **{name: _COMMAND[name].shape for name in ("lanes", "shift", "scale", "fp16", "saturate", "masked")}}
)
_MINUS_ZERO = 1 << 31
_PSUM_ADDRESS = signed(24)  # holds base + 3 * 1023 * stride exactly


class Drain(Block):
    """Runs DRAIN commands: reads rows of partial sums, rounds each sum once and writes the vector memory.

    For every (n, h, w), w innermost: reads partial-sum row `psum` + strides of core `core`, and writes its lane beats
    `lane_beat` to `lane_beat + lane_beats - 1` to consecutive vector memory rows from `vmem` + strides (modulo 2^16;
    the vector memory checks the range). A beat a cycle while `write` is ready and `psum_request` answers at once: the
    next row is asked for in the cycle that takes the last beat of the one before, and a command's first row at the
    earliest three cycles after the last one of the command before.

    With `masked`, a sum that is masked (its `nan`, `pinf` and `ninf` are all set, see `lnpu.core.core`) is written as
    -0, and a sum that rounds to -0 as +0, so that -0 says just that. Without, a masked sum is a NaN like others.

    Parameters
    ----------
    config : ChipConfig
        Uses `cores`, `lanes`, `beat`, `psum_rows` and `acc_bits`.

    Members
    -------
    command : In(command_stream())
        Ready unless rows of a command are still to be asked for. The opcode and the wait masks are not looked at.
    busy : Out(1)
        From the cycle after the command's handshake to the cycle of the last write's handshake.
    earlier : Out(1)
        Not all results of the commands before the last one that was taken are written. (If that one was dropped, it may
        be 0 all the same.)
    error : Out(Error)
        For one cycle, while busy: FIELD for a command that is dropped (a zero count, lanes or core that do not exist,
        a scale beyond -64 to 64, or other than 0 for FP32); RANGE for every partial-sum row outside the store, which is
        skipped. NONE otherwise.
    psum_request : Out(stream.Signature(data.StructLayout({"core": 4, "row": 12})))
    psum_hold : Out(1)
        The row on `psum` is needed in the next cycle too.
    psum : In(psum_layout(config.acc_bits)).array(config.lanes)
        The row of the last handshake on `psum_request`, from the cycle after it for as long as `psum_hold`.
    write : Out(stream.Signature(vmem_write(config)))
    nonfinite : Out(1)
        For one cycle, while busy: a result is infinite or NaN (a masked sum is not).
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "command": In(command_stream()),
                "busy": Out(1),
                "earlier": Out(1),
                "error": Out(Error),
                "psum_request": Out(stream.Signature(data.StructLayout({"core": 4, "row": 12}))),
                "psum_hold": Out(1),
                "psum": In(psum_layout(config.acc_bits)).array(config.lanes),
                "write": Out(stream.Signature(vmem_write(config))),
                "nonfinite": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        command = Signal(_COMMAND, reset_less=True)

        # Pipeline: the row on `psum`, the beat selected from it, the rounding, the buffer of the write stream.
        enable = Signal()  # all of it up to the buffer moves
        present = Signal()  # beats of the row on `psum` are still to be taken
        valid = [Signal(name=f"valid_{i}") for i in range(1 + AccumulatorRound.LATENCY)]
        address = [Signal(16, name=f"address_{i}", reset_less=True) for i in range(len(valid))]
        row_address = Signal(16, reset_less=True)  # of the next beat of the row on `psum`
        lane_beat = Signal(6, reset_less=True)
        beats_left = Signal(6, reset_less=True)  # after this one
        # What belongs to a command goes with its rows: the next one begins behind them.
        number = Signal(2)  # of the last command; a beat in the buffer may hide one of the command after it
        row_of, beat_of = Signal(_ROUNDING, reset_less=True), Signal(_ROUNDING, reset_less=True)  # on `psum`, selected
        numbers = [Signal(2, name=f"number_{i}", reset_less=True) for i in range(AccumulatorRound.LATENCY)]
        last_beat = Signal()
        row_done = Signal()
        m.d.comb += [
            last_beat.eq(beats_left == 0),
            row_done.eq(~present | (enable & last_beat)),
            self.psum_hold.eq(present & ~(enable & last_beat)),
        ]

        # The walk over (n, h, w).
        walking = Signal()
        step = Signal()
        inside = Signal()
        last = self._count(m, command, walking, step)
        psum_address = self._address(m, command, walking, step, last, "psum", _PSUM_ADDRESS)
        vmem_address = self._address(m, command, walking, step, last, "vmem", 16)
        request = self.psum_request
        m.d.comb += [
            inside.eq((psum_address >= 0) & (psum_address < config.psum_rows)),
            request.payload.core.eq(command.core),
            request.payload.row.eq(psum_address),
            request.valid.eq(walking & inside & row_done),
            step.eq(walking & (~inside | (request.valid & request.ready))),
        ]

        legal = Signal()
        m.d.comb += legal.eq(
            command.count_n.any()
            & command.count_h.any()
            & command.count_w.any()
            & command.lane_beats.any()
            & (command.lane_beat + command.lane_beats <= config.lanes // config.beat)
            & (command.core < config.cores)
            & Mux(command.fp16, (command.scale >= -64) & (command.scale <= 64), command.scale == 0)
        )

        working = Signal()
        write_layout = data.StructLayout({"write": vmem_write(config), "number": 2})
        skid = place(m, "write_buffer", SkidBuffer(width=write_layout.size))
        skid_i, skid_o = Signal(write_layout), Signal(write_layout)
        in_flight = [(present, row_of.number), (skid.o.valid, skid_o.number)]
        in_flight += zip(valid, [beat_of.number, *numbers], strict=True)
        m.d.comb += [
            self.busy.eq(working | Cat(there for there, _ in in_flight).any()),
            self.earlier.eq(Cat(there & (whose != number) for there, whose in in_flight).any()),
            self.command.ready.eq(~working),
        ]
        with m.FSM(name="state"):
            with m.State("IDLE"), m.If(self.command.valid & self.command.ready):
                m.d.sync += [Value.cast(command).eq(self.command.payload[: _COMMAND.size]), number.eq(number + 1)]
                m.next = "CHECK"
            with m.State("CHECK"):
                m.d.comb += working.eq(1)
                with m.If(legal):
                    m.next = "WALK"
                with m.Else():
                    m.d.comb += self.error.eq(Error.FIELD)
                    m.next = "IDLE"
            with m.State("WALK"):
                m.d.comb += [working.eq(1), walking.eq(1)]
                with m.If(~inside):
                    m.d.comb += self.error.eq(Error.RANGE)
                with m.If(step & last["n"] & last["h"] & last["w"]):
                    m.next = "IDLE"

        with m.If(request.valid & request.ready):
            m.d.sync += [
                present.eq(1),
                row_address.eq(vmem_address),
                lane_beat.eq(command.lane_beat),
                beats_left.eq(command.lane_beats - 1),
                row_of.number.eq(number),
                *(row_of[name].eq(command[name]) for name in _ROUNDING.members if name != "number"),
            ]
        with m.Elif(enable):
            m.d.sync += [
                present.eq(present & ~last_beat),
                row_address.eq(row_address + 1),
                lane_beat.eq(lane_beat + 1),
                beats_left.eq(beats_left - 1),
            ]

        # Select a beat, and round it.
        psum_bits = psum_layout(config.acc_bits).size
        selected = Signal(data.ArrayLayout(psum_bits, config.beat), reset_less=True)
        # Zero weights times infinity would make NaN of padding.
        lane = Cat(Const(0, config.beat.bit_length() - 1), lane_beat)
        kept = Signal(config.beat)
        m.d.comb += kept.eq(Cat(lane + i < row_of.lanes for i in range(config.beat)))
        with m.If(enable & present), m.Switch(lane_beat):
            for number in range(config.lanes // config.beat):
                with m.Case(number):
                    for i in range(config.beat):
                        psum = Value.cast(self.psum[number * config.beat + i])
                        m.d.sync += selected[i].eq(Mux(kept[i], psum, 0))
        with m.If(enable):
            m.d.sync += [
                Cat(valid).eq(Cat(present, valid[:-1])),
                Cat(address).eq(Cat(row_address, address[:-1])),
                beat_of.eq(row_of),
                Cat(numbers).eq(Cat(beat_of.number, numbers[:-1])),
            ]
        results = Signal(vmem_row(config))
        nonfinite = Signal(config.beat)
        masked = [Signal(config.beat, name=f"masked_{i}", reset_less=True) for i in range(AccumulatorRound.LATENCY)]
        masking = [Signal(name=f"masking_{i}", reset_less=True) for i in range(AccumulatorRound.LATENCY)]
        masked_now = Signal(config.beat)
        with m.If(enable):
            m.d.sync += [
                Cat(masked).eq(Cat(masked_now, masked[:-1])),
                Cat(masking).eq(Cat(beat_of.masked, masking[:-1])),
            ]
        for i in range(config.beat):
            rounder = place(m, f"round_{i}", AccumulatorRound(config.acc_bits))
            is_masked, rounded = masked[-1][i], rounder.o
            minus_zero = rounded[31] & ~rounded[:31].any()
            m.d.comb += [
                rounder.enable.eq(enable),
                Value.cast(rounder.psum).eq(selected[i]),
                masked_now[i].eq(beat_of.masked & rounder.psum.nan & rounder.psum.pinf & rounder.psum.ninf),
                *(getattr(rounder, name).eq(beat_of[name]) for name in ("shift", "scale", "fp16", "saturate")),
                results[i].eq(Mux(is_masked, _MINUS_ZERO, Mux(masking[-1] & minus_zero, 0, rounded))),
                nonfinite[i].eq(rounder.nonfinite & ~is_masked),
            ]
        m.d.comb += [
            skid_i.write.address.eq(address[-1]),
            skid_i.write.row.eq(results),
            skid_i.number.eq(numbers[-1]),
            skid.i.payload.eq(skid_i),
            Value.cast(skid_o).eq(skid.o.payload),
            skid.i.valid.eq(valid[-1]),
            enable.eq(skid.i.ready),
            self.nonfinite.eq(valid[-1] & enable & nonfinite.any()),
            self.write.payload.eq(skid_o.write),
            self.write.valid.eq(skid.o.valid),
            skid.o.ready.eq(self.write.ready),
        ]
        return m

    @staticmethod
    def _count(m: Module, command, walking: Signal, step: Signal) -> dict[str, Signal]:
        """Counters of the loops; whether each is at its last index."""
        last = {loop: Signal(name=f"last_{loop}") for loop in _LOOPS}
        carry = step
        for loop in reversed(_LOOPS):
            index = Signal(10, name=f"index_{loop}", reset_less=True)
            m.d.comb += last[loop].eq(index == command[f"count_{loop}"] - 1)
            with m.If(~walking):
                m.d.sync += index.eq(0)
            with m.Elif(carry):
                m.d.sync += index.eq(Mux(last[loop], 0, index + 1))
            carry = carry & last[loop]
        return last

    @staticmethod
    def _address(
        m: Module, command, walking: Signal, step: Signal, last: dict[str, Signal], name: str, shape
    ) -> Signal:
        """Address base + index * stride of every loop; each loop keeps the address of its own inner loops' start."""
        starts = {loop: Signal(shape, name=f"{name}_{loop}", reset_less=True) for loop in _LOOPS}
        following = Signal(shape, name=f"{name}_next")
        for loop in _LOOPS:  # the innermost loop that goes on, wins
            stride = command[f"{name}_{loop}"]
            inner = [last[other] for other in _LOOPS[_LOOPS.index(loop) + 1 :]]
            with m.If(~last[loop] if loop != "n" else 1):
                m.d.comb += following.eq(starts[loop] + stride)
            with m.If(~walking):
                m.d.sync += starts[loop].eq(command[name])
            with m.Elif(step & Cat(inner).all() if inner else step):
                m.d.sync += starts[loop].eq(following)
        return starts["w"]
