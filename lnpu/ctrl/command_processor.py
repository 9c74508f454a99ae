"""Fetches a program, starts its commands on the units and ends it."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, TAKES_TWO, UNITS, Opcode, Unit, layout_of
from lnpu.ctrl.counters import COUNTERS, Counters
from lnpu.ctrl.registers import control_signature
from lnpu.fgmp.controller import TENSOR_STATE, FgmpController
from lnpu.formats import TensorKind
from lnpu.hdl import Block, Sram
from lnpu.interfaces import Error, command_stream, memory_read_signature, memory_write_signature

__all__ = ["CommandProcessor"]

_RESOLVED = {
    Opcode.LOAD: ("tensor",),
    Opcode.STORE: ("tensor",),
    Opcode.DRAIN: ("tensor_a", "tensor_b", "tensor_out"),
    Opcode.VECTOR: ("tensor_a", "tensor_b"),
}
"""Fields with numbers of dynamic tensors."""


class CommandProcessor(Block):
    """Runs a program.

    Commands are fetched ahead, into room for `CommandProcessor.PREFETCH` commands, and start in order. A command is
    looked at for a cycle (unknown opcode, bits beyond its fields, cores of MULTIPLY, address of MARK), waits until the
    units and cores of its wait masks are idle (`wait_queues`, `wait_unit_queues`: not queued) and its own unit is ready
    (MULTIPLY: all its cores), and is offered to it in the next cycle. Bits of the wait masks without a unit or core are
    as if it were idle. A command can start every four cycles, but also not faster than one word of the bus a cycle
    brings them.

    The program ends at END, at the first error or by an abort: then nothing more is started, and when every unit is
    idle, prefetched commands have come (and been dropped), and nothing has happened for `CommandProcessor.SETTLE`
    cycles, `control.done` or `control.error` pulses. The code is that of the first error; of errors in one cycle, the
    first of the list of members below. An error that comes after END, but before `done`, counts.

    A command that names dynamic tensors is resolved before it waits: when the FGMP controller is idle, the current
    states of the tensors are looked up, four cycles each, and added to the fields as `lnpu/ctrl/commands.py` says.

    MARK waits for all that too, then writes all counters, 64 bits each, padded with zeros to a multiple of 32 bytes,
    and waits for the acknowledgement. The values are from before its own writes.

    Parameters
    ----------
    config : ChipConfig
        Number of cores, width of the bus.

    Members
    -------
    control : In(control_signature(config))
        A program address that is not a multiple of 64 is error FIELD, a length of 0 is LENGTH. Errors before the first
        command have index 0. OPCODE and FIELD have the index of the faulty command, LENGTH that of the last one.
    fetch : Out(memory_read_signature(config))
        One request a command.
    mark : Out(memory_write_signature(config))
    load, load_dense, store, store_raw, vector, drain, fgmp : Out(command_stream())
        A unit may be ready whether or not `valid` is set, and must stay ready until it takes a command.
    load_busy, load_dense_busy, store_busy, store_raw_busy, vector_busy, drain_busy, fgmp_busy : In(1)
        Must be set at the latest in the second cycle after the one in which the unit took a command.
    load_queued, load_dense_queued, store_queued, store_raw_queued, vector_queued, drain_queued : In(1)
        The unit has a command that it took before the last one. As early as `busy`.
    core_command : Out(512); core_valid : Out(config.cores); core_ready : In(config.cores)
        Streams of the cores, which all have the same payload. The cores of a MULTIPLY take it in the same cycle.
    core_busy : In(config.cores)
        As for the units.
    core_queued : In(config.cores)
        Likewise.
    load_error, load_dense_error, store_error, store_raw_error, vector_error, drain_error, fgmp_error : In(Error)
        `Error.NONE`, or for a cycle the code of an error. At the latest `SETTLE - 3` cycles after the first cycle in
        which `busy` is low.
    core_error : In(ArrayLayout(Error, config.cores))
    vmem_error, read_error, write_error : In(1)
        Pulses, counted as RANGE, READ and WRITE.
    lookup, lookup_tensor, state
        Port of the table of FGMP states (`FgmpController`).
    started : Out(1)
        A command starts in this cycle.
    snapshot : Out(1)
        Pulse before the counters are written: see `Counters`.
    counter_read : Out(1); counter_index : Out(range(len(COUNTERS))); counter_value : In(64)
        After a cycle with `counter_read` the value must be that of the index. Not in two successive cycles.
    """

    PREFETCH = 4
    SETTLE = 8
    assert SETTLE > Counters.LATENCY

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__({
            "control": In(control_signature(config)),
            "fetch": Out(memory_read_signature(config)),
            "mark": Out(memory_write_signature(config)),
            **{unit.name.lower(): Out(command_stream()) for unit in Unit},
            **{f"{unit.name.lower()}_busy": In(1) for unit in Unit},
            **{f"{unit.name.lower()}_queued": In(1) for unit in TAKES_TWO},
            "core_command": Out(8 * COMMAND_BYTES),
            "core_valid": Out(config.cores),
            "core_ready": In(config.cores),
            "core_busy": In(config.cores),
            "core_queued": In(config.cores),
            **{f"{unit.name.lower()}_error": In(Error) for unit in Unit},
            "core_error": In(data.ArrayLayout(Error, config.cores)),
            "vmem_error": In(1),
            "read_error": In(1),
            "write_error": In(1),
            "lookup": Out(1),
            "lookup_tensor": Out(8),
            "state": In(TENSOR_STATE),
            "started": Out(1),
            "snapshot": Out(1),
            "counter_read": Out(1),
            "counter_index": Out(range(len(COUNTERS))),
            "counter_value": In(64),
        })  # fmt: skip

    def _build_fetch(self, m: Module, running: Signal, taken: Signal) -> tuple[Signal, Signal, Signal]:
        """The prefetch. Returns: the next command, whether it is there, and whether no read is outstanding."""
        control, fetch = self.control, self.fetch
        words = 8 * COMMAND_BYTES // self.config.axi_bits  # in a command
        depth = self.PREFETCH * words
        m.submodules.buffer = buffer = Sram(depth=depth, width=self.config.axi_bits)

        # Requests: as long as there is room for the answer
        address = Signal(self.config.address_bits, reset_less=True)
        to_ask = Signal(32, reset_less=True)  # commands
        asking = Signal()
        room = Signal(range(self.PREFETCH + 1))  # for commands, not yet promised to a request
        awaited = Signal(range(self.PREFETCH + 1))  # commands: asked for, not completely there
        ask, release, arrived = Signal(), Signal(), Signal()
        m.d.comb += [
            fetch.request.valid.eq(asking),
            fetch.request.payload.address.eq(address),
            fetch.request.payload.words.eq(words),
            fetch.request.payload.kind.eq(TensorKind.PROGRAM.value),
            fetch.response.ready.eq(1),
            ask.eq(running & ~asking & (to_ask != 0) & (room != 0)),
            arrived.eq(fetch.response.valid & fetch.response.payload.last),
        ]
        with m.If(ask):
            m.d.sync += [asking.eq(1), to_ask.eq(to_ask - 1)]
        with m.If(asking & fetch.request.ready):
            m.d.sync += [asking.eq(0), address.eq(address + COMMAND_BYTES)]
        m.d.sync += [room.eq(room - ask + release), awaited.eq(awaited + ask - arrived)]

        # Answers: through the buffer into `following`, word by word
        write, read = Signal(range(depth), name="write_place"), Signal(range(depth), name="read_place")
        stored = Signal(range(depth + 1))
        following = Signal(8 * COMMAND_BYTES, reset_less=True)
        filled = Signal(range(words + 1))
        reading, read_now = Signal(), Signal()
        complete = Signal()
        m.d.comb += [
            buffer.w_en.eq(fetch.response.valid),
            buffer.w_addr.eq(write),
            buffer.w_data.eq(fetch.response.payload.data),
            buffer.r_en.eq(read_now),
            buffer.r_addr.eq(read),
            complete.eq(filled == words),
            read_now.eq(running & (stored != 0) & ((filled + reading != words) | taken)),
            release.eq(read_now & (read[: words.bit_length() - 1] == words - 1)),
        ]
        m.d.sync += [
            write.eq(write + fetch.response.valid),
            read.eq(read + read_now),
            stored.eq(stored + fetch.response.valid - read_now),
            reading.eq(read_now),
        ]
        with m.If(reading):
            m.d.sync += following.eq(Cat(following, buffer.r_data)[self.config.axi_bits :])
        m.d.sync += filled.eq(Mux(taken, 0, filled + reading))

        with m.If(control.start & ~control.busy):
            m.d.sync += [
                address.eq(control.program),
                to_ask.eq(control.length),
                room.eq(self.PREFETCH),
                write.eq(0),
                read.eq(0),
                stored.eq(0),
                filled.eq(0),
            ]
        idle = Signal(name="fetch_idle")
        m.d.comb += idle.eq(awaited == 0)
        return following, complete, idle

    @staticmethod
    def _bits_of(codes: list[Value]) -> Value:
        """One bit for each error code that is there; none for `Error.NONE`."""
        bits = Const(0, 16)
        for code in codes:
            bits |= Const(1, 16) << code
        return Cat(Const(0, 1), bits[1:16])

    def _build_errors(self, m: Module, failure: Signal) -> None:
        """Collect errors in `control.code` and `control.detail`. `failure`: of the command processor itself."""
        control = self.control
        pulses = [
            *(getattr(self, f"{unit.name.lower()}_error") for unit in Unit),
            *(self.core_error[core] for core in range(self.config.cores)),
            Mux(self.vmem_error, Error.RANGE.value, Error.NONE.value),
            Mux(self.read_error, Error.READ.value, Error.NONE.value),
            Mux(self.write_error, Error.WRITE.value, Error.NONE.value),
        ]
        first, seen = Signal(4), Signal(16)
        first_now, codes = Signal(4), []
        for number, pulse in reversed(list(enumerate(pulses))):
            code = Signal(4, name=f"error_{number}")
            codes.append(code)
            m.d.comb += code.eq(pulse)
            with m.If(code != 0):
                m.d.comb += first_now.eq(code)
        m.d.sync += [first.eq(first_now), seen.eq(self._bits_of(codes))]

        failed = Signal(16)
        m.d.comb += failed.eq(self._bits_of([failure.as_value()]))
        with m.If(control.busy):
            m.d.sync += control.detail.eq(control.detail | seen | failed)
            with m.If(control.code == 0):
                m.d.sync += control.code.eq(Mux(first != 0, first, failure))
        with m.Elif(control.start):
            m.d.sync += [control.detail.eq(0), control.code.eq(0)]

    def _add_state(self, m: Module, opcode: Signal, turn: Signal, views: dict) -> None:
        """Add the state that was looked up to the command's fields."""
        scale = self.state.scale
        load, store = views[Opcode.LOAD], views[Opcode.STORE]
        drain, vector = views[Opcode.DRAIN], views[Opcode.VECTOR]
        with m.Switch(opcode):
            with m.Case(Opcode.LOAD.value):
                m.d.sync += load.scale.eq(load.scale + scale)
            with m.Case(Opcode.STORE.value):
                m.d.sync += [
                    store.scale.eq(store.scale + scale),
                    store.lo.eq(self.state.lo),
                    store.hi.eq(self.state.hi),
                ]
            with m.Case(Opcode.DRAIN.value):
                with m.If(turn == 2):
                    m.d.sync += [drain.shift.eq(drain.shift - scale), drain.scale.eq(drain.scale + scale)]
                with m.Else():
                    m.d.sync += drain.shift.eq(drain.shift + scale)
            with m.Case(Opcode.VECTOR.value):
                with m.If(turn == 0):
                    m.d.sync += vector.a_shift.eq(vector.a_shift + scale)
                    with m.If(vector.quantise):
                        m.d.sync += [vector.lo.eq(self.state.lo), vector.hi.eq(self.state.hi)]
                with m.Else():
                    m.d.sync += vector.b_shift.eq(vector.b_shift + scale)

    def elaborate(self, platform):
        m = Module()
        config, control = self.config, self.control
        cores, units = config.cores, len(Unit)

        command = Signal(8 * COMMAND_BYTES, reset_less=True)
        length, number = Signal(32, reset_less=True), Signal(32, reset_less=True)  # number: commands taken so far
        program_misaligned = Signal(reset_less=True)
        failure = Signal(Error)
        taken, stopping, running = Signal(), Signal(), Signal()
        following, following_complete, fetch_idle = self._build_fetch(m, running, taken)
        self._build_errors(m, failure)
        m.d.comb += stopping.eq(control.code != 0)

        # The command's needs
        opcode = Signal(8)
        header = data.View(layout_of(Opcode.NOP), command[: layout_of(Opcode.NOP).size])
        multiply = data.View(layout_of(Opcode.MULTIPLY), command[: layout_of(Opcode.MULTIPLY).size])
        mark = data.View(layout_of(Opcode.MARK), command[: layout_of(Opcode.MARK).size])
        unit_busy, unit_queued = Signal(units), Signal(units)
        wait_over, own_ready, may_start = Signal(), Signal(), Signal()
        target_units, target_cores = Signal(units), Signal(cores)  # that the command goes to
        m.d.comb += [
            opcode.eq(command[:8]),
            unit_busy.eq(Cat(getattr(self, f"{unit.name.lower()}_busy") for unit in Unit)),
            *(unit_queued[unit].eq(getattr(self, f"{unit.name.lower()}_queued")) for unit in TAKES_TWO),
            wait_over.eq(
                ~(header.wait_units[:units] & unit_busy).any()
                & ~(header.wait_cores[:cores] & self.core_busy).any()
                & ~(header.wait_queues[:cores] & self.core_queued).any()
                & ~(header.wait_unit_queues[:units] & unit_queued).any()
            ),
            own_ready.eq(
                ~(target_units & ~Cat(getattr(self, unit.name.lower()).ready for unit in Unit)).any()
                & ~(target_cores & ~self.core_ready).any()
            ),
            may_start.eq(wait_over & own_ready),
        ]
        bad_opcode, bad_field = Signal(reset_less=True), Signal(reset_less=True)
        with m.Switch(opcode):
            for known in Opcode:
                with m.Case(known.value):
                    m.d.sync += bad_opcode.eq(command[layout_of(known).size :].any())
                    if known in UNITS:
                        m.d.comb += target_units[UNITS[known]].eq(1)
                    if known is Opcode.LOAD:
                        load = data.View(layout_of(known), command[: layout_of(known).size])
                        dense = load.target[0]
                        m.d.comb += [target_units[Unit.LOAD].eq(~dense), target_units[Unit.LOAD_DENSE].eq(dense)]
                    if known is Opcode.MULTIPLY:
                        m.d.comb += target_cores.eq(multiply.cores)
                        m.d.sync += bad_field.eq((multiply.cores == 0) | multiply.cores[cores:].any())
                    elif known is Opcode.MARK:
                        m.d.sync += bad_field.eq(mark.address[:5].any())
                    else:
                        m.d.sync += bad_field.eq(0)
            with m.Default():
                m.d.sync += [bad_opcode.eq(1), bad_field.eq(0)]

        # Dynamic tensors: numbers in the command, one after the other
        tensor, unresolved = Signal(8), Signal()
        turn = Signal(range(3), reset_less=True)
        waited = Signal(range(FgmpController.LOOKUP_LATENCY + 1), reset_less=True)
        m.d.comb += self.lookup_tensor.eq(tensor)
        views = {
            resolved: data.View(layout_of(resolved), command[: layout_of(resolved).size]) for resolved in _RESOLVED
        }
        with m.Switch(opcode):
            for resolved, names in _RESOLVED.items():
                with m.Case(resolved.value):
                    m.d.comb += unresolved.eq(Cat(views[resolved][name] for name in names).any())
                    with m.Switch(turn):
                        for number_, name in enumerate(names):
                            with m.Case(number_):
                                m.d.comb += tensor.eq(views[resolved][name])

        # Streams: `valid` is a matter of the state alone
        offer = Signal()
        for unit in Unit:
            stream = getattr(self, unit.name.lower())
            m.d.comb += [stream.payload.eq(command), stream.valid.eq(offer & target_units[unit])]
        m.d.comb += [self.core_command.eq(command), self.core_valid.eq(Mux(offer, target_cores, 0))]

        # Quiet: everything is idle and has been for SETTLE cycles
        calm, quiet = Signal(range(self.SETTLE)), Signal()
        m.d.comb += quiet.eq(calm == self.SETTLE - 1)
        all_idle = Signal()
        m.d.comb += all_idle.eq(~unit_busy.any() & ~self.core_busy.any() & fetch_idle & self.mark.idle)
        settling = Signal()
        m.d.sync += calm.eq(Mux(all_idle & settling, Mux(quiet, calm, calm + 1), 0))

        # MARK: counters are read one every two cycles and gathered in words of the bus
        per_word = config.axi_bits // 64
        total = -(-len(COUNTERS) // 4) * 4  # counters with their padding
        next_counter = Signal(range(total + 1), reset_less=True)
        gathered = Signal(range(per_word + 1))
        mark_word = Signal(config.axi_bits, reset_less=True)
        m.d.comb += [
            self.counter_index.eq(Mux(next_counter < len(COUNTERS), next_counter, 0)),
            self.mark.request.payload.address.eq(mark.address),
            self.mark.request.payload.words.eq(total // per_word),
            self.mark.request.payload.kind.eq(TensorKind.OTHER.value),
            self.mark.data.payload.data.eq(mark_word),
            self.mark.data.payload.strobe.eq(~Const(0, config.axi_bits // 8)),
        ]

        m.d.comb += control.busy.eq(1)
        with m.FSM(name="state") as fsm:
            with m.State("IDLE"):
                m.d.comb += control.busy.eq(0)
                m.d.sync += [
                    number.eq(0),
                    control.command.eq(0),
                    length.eq(control.length),
                    program_misaligned.eq(control.program[:6].any()),
                ]
                with m.If(control.start):
                    m.next = "BEGIN"
            with m.State("BEGIN"):
                m.next = "NEXT"
                with m.If(program_misaligned):
                    m.d.comb += failure.eq(Error.FIELD)
                    m.next = "STOP"
            with m.State("NEXT"):
                with m.If(stopping):
                    m.next = "STOP"
                with m.Elif(following_complete):
                    m.d.comb += taken.eq(1)
                    m.d.sync += [command.eq(following), number.eq(number + 1)]
                    m.next = "CHECK"
                with m.Elif(number == length):
                    m.d.comb += failure.eq(Error.LENGTH)
                    m.next = "STOP"
            with m.State("CHECK"):
                m.d.sync += turn.eq(0)
                m.next = "WAIT"
                with m.If(unresolved):
                    m.next = "RESOLVE"
            with m.State("RESOLVE"):
                m.d.sync += waited.eq(0)
                with m.If(stopping):
                    m.next = "STOP"
                with m.Elif(tensor == 0):
                    m.d.sync += turn.eq(turn + 1)
                    with m.If(turn == 2):
                        m.next = "WAIT"
                with m.Elif(~self.fgmp_busy):
                    m.d.comb += self.lookup.eq(1)
                    m.next = "RESOLVE_ADD"
            with m.State("RESOLVE_ADD"):
                m.d.sync += waited.eq(waited + 1)
                with m.If(waited == FgmpController.LOOKUP_LATENCY):
                    self._add_state(m, opcode, turn, views)
                    m.d.sync += turn.eq(turn + 1)
                    m.next = "RESOLVE"
                    with m.If(turn == 2):
                        m.next = "WAIT"
            with m.State("WAIT"):
                with m.If(stopping):
                    m.next = "STOP"
                with m.Elif(bad_opcode | bad_field):
                    m.d.comb += failure.eq(Mux(bad_opcode, Error.OPCODE, Error.FIELD))
                    m.d.sync += control.command.eq(number - 1)
                    m.next = "STOP"
                with m.Elif(may_start):
                    m.d.sync += control.command.eq(number - 1)
                    m.next = "START"
            with m.State("START"):
                # The targets were ready in the cycle before, so they are now. The next look at `busy` and `ready` is
                # three cycles later.
                m.d.comb += [offer.eq(1), self.started.eq(1)]
                m.next = "NEXT"
                with m.If(opcode == Opcode.END.value):
                    m.next = "STOP"
                with m.If(opcode == Opcode.MARK.value):
                    m.next = "MARK_WAIT"
            with m.State("MARK_WAIT"):
                m.d.comb += settling.eq(1)
                m.d.sync += [next_counter.eq(0), gathered.eq(0)]
                with m.If(stopping):
                    m.next = "STOP"
                with m.Elif(quiet):
                    m.d.comb += self.snapshot.eq(1)
                    m.next = "MARK_REQUEST"
            with m.State("MARK_REQUEST"):
                m.d.comb += self.mark.request.valid.eq(1)
                with m.If(self.mark.request.ready):
                    m.next = "MARK_READ"
            with m.State("MARK_READ"):  # `counter_index` has the counter's number, `counter_value` will be its value
                with m.If(gathered == per_word):
                    m.d.comb += self.mark.data.valid.eq(1)
                    with m.If(self.mark.data.ready):
                        m.d.sync += gathered.eq(0)
                        with m.If(next_counter == total):
                            m.next = "MARK_FINISH"
                with m.Else():
                    m.d.comb += self.counter_read.eq(1)
                    m.next = "MARK_TAKE"
            with m.State("MARK_TAKE"):
                value = Mux(next_counter < len(COUNTERS), self.counter_value, 0)
                m.d.sync += [
                    mark_word.eq(Cat(mark_word, value)[64:]),
                    gathered.eq(gathered + 1),
                    next_counter.eq(next_counter + 1),
                ]
                m.next = "MARK_READ"
            with m.State("MARK_FINISH"), m.If(self.mark.idle):
                m.next = "NEXT"
            with m.State("STOP"):
                m.d.comb += settling.eq(1)
                with m.If(quiet):
                    m.d.comb += [control.done.eq(~stopping), control.error.eq(stopping)]
                    m.next = "IDLE"
        m.d.comb += running.eq(~fsm.ongoing("IDLE") & ~fsm.ongoing("BEGIN") & ~fsm.ongoing("STOP") & ~stopping)
        with m.If(control.abort & control.busy):
            m.d.comb += failure.eq(Error.ABORTED)
        return m
