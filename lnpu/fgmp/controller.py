"""Dynamic FGMP: a table of the tensors' states, and what decides the next ones from statistics of what was stored."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.ctrl.commands import LAYOUTS, Opcode
from lnpu.hdl import Block, Sram
from lnpu.interfaces import Error, command_stream

__all__ = ["ADAPT_RECORD", "STORE_STATISTICS", "TENSOR_STATE", "FgmpController"]

COUNT_BITS = 24
MAX_SCALE = 64
"""Largest magnitude of a scale that STATE sets."""
SCALE_MIN, SCALE_MAX = -64, 63
"""Where ADAPT saturates scales."""
COUNTS = ("zero", "underflow", "fp8", "fp16")
LO_STEP, HI_STEP = 0x400, 0x100
"""A factor of two in an FP16 pattern, and a quarter of that."""

TENSOR_STATE = data.StructLayout({"scale": signed(8), "lo": 15, "hi": 15})
"""How a tensor is stored: exponent of its scale, FP16 magnitudes (see `Quantizer`)."""

STORE_STATISTICS = data.StructLayout(dict.fromkeys(COUNTS, 7) | {"nonfinite": 1, "top": 5})
"""What became of the elements of a beat: numbers of those that were zero, became zero, or are kept in that precision;
whether one was infinite or NaN; the largest FP16 exponent field (before FGMP) of the finite ones."""

ADAPT_RECORD = data.StructLayout(
    {
        "scale": signed(8),
        "lo": 16,
        "hi": 16,
        "zero": 32,
        "underflow": 32,
        "fp8": 32,
        "fp16": 32,
        "top": 8,
        "nonfinite": 8,
        "tensor": 8,
        "current_scale": signed(8),
        "current_lo": 16,
        "current_hi": 16,
        "reserved": 24,
    }
)
"""What ADAPT tells the host, 32 bytes: the new next state, the statistics that led to it, the tensor, and its current
state, under which it was stored."""
assert ADAPT_RECORD.size == 256


class FgmpController(Block):
    """Current and next state of each tensor; ADAPT, STATE and COMMIT of `lnpu/ctrl/commands.py`.

    The states are {scale 0, lo 0, hi 0} after reset. The rules of ADAPT are in `docs/fgmp.md`; its twin in Python is
    `golden.controller`. `busy` is set for 2 cycles for STATE, 4 for COMMIT, and 42 for ADAPT (6 if there were
    non-finite elements, or nothing but zeros) if the record is taken at once. A lookup in a cycle in which a command
    would read the table adds one.

    A command that it cannot run changes nothing. `error` is then set for one cycle, while `busy` is still set:

    - FIELD: `tensor` is 0 or not in the table; STATE: lo > hi, |scale| > 64; ADAPT: hi_least > hi_most, lo_least >
      lo_most, hi_min > hi_max, lo_min > lo_max, an address that is no multiple of 32 or beyond `address_bits`;
    - OPCODE: none of the three.

    Parameters
    ----------
    config : ChipConfig
        Uses `tensor_states` and `address_bits`.

    Members
    -------
    lookup : In(1); lookup_tensor : In(8)
        Look up the current state of a tensor: in any cycle, one a cycle.
    state : Out(TENSOR_STATE)
        What the table held in the cycle of `lookup`, from `LOOKUP_LATENCY` cycles after it on, until the same number of
        cycles after the next lookup. A later STATE or COMMIT does not change it. A tensor that is 0 or not in the table
        has {0, 0, 0}. Unspecified before the first lookup.
    command : In(command_stream())
        Ready while the block is idle.
    busy : Out(1)
        From the cycle after a command was taken until its effect is in the table and the record has been taken; also
        for `tensor_states` cycles after reset.
    error : Out(Error)
    store : In(STORE_STATISTICS)
        Added up in every cycle; counts saturate at 2^24 - 1. All 0 where nothing is stored. ADAPT takes and clears the
        sums in the first cycle of `busy`: beats up to the cycle before count, those from that cycle on are for the next
        ADAPT. A refused ADAPT leaves the sums alone.
    record : Out(stream.Signature(ADAPT_RECORD))
        One for each ADAPT, after the table has been written.
    record_address : Out(config.address_bits)
        Address of the ADAPT, while `record.valid`.
    """

    LOOKUP_LATENCY = 2

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "lookup": In(1),
                "lookup_tensor": In(8),
                "state": Out(TENSOR_STATE),
                "command": In(command_stream()),
                "busy": Out(1),
                "error": Out(Error),
                "store": In(STORE_STATISTICS),
                "record": Out(stream.Signature(ADAPT_RECORD)),
                "record_address": Out(config.address_bits),
            }
        )

    def _statistics(self, m: Module, take: Signal) -> dict[str, Signal]:
        """Sums of `store`; in a cycle of `take` they move to the registers that are returned."""
        taken = {}
        for name in COUNTS:
            sum_, total = Signal(COUNT_BITS, name=f"sum_{name}"), Signal(COUNT_BITS + 1, name=f"total_{name}")
            m.d.comb += total.eq(sum_ + self.store[name])
            saturated = total[:COUNT_BITS] | total[COUNT_BITS].replicate(COUNT_BITS)
            m.d.sync += sum_.eq(Mux(take, self.store[name], saturated))  # `take` comes last
            taken[name] = Signal(COUNT_BITS, name=f"taken_{name}", reset_less=True)
            with m.If(take):
                m.d.sync += taken[name].eq(sum_)
        top, nonfinite = Signal(5, name="sum_top"), Signal(name="sum_nonfinite")
        taken["top"] = Signal(5, name="taken_top", reset_less=True)
        taken["nonfinite"] = Signal(name="taken_nonfinite", reset_less=True)
        with m.If(take | (self.store.top > top)):
            m.d.sync += top.eq(self.store.top)
        m.d.sync += nonfinite.eq(self.store.nonfinite | (nonfinite & ~take))
        with m.If(take):
            m.d.sync += [taken["top"].eq(top), taken["nonfinite"].eq(nonfinite)]
        return taken

    def elaborate(self, platform):
        m = Module()
        config = self.config
        entries, address_bits = config.tensor_states, config.address_bits
        entry_bits = (entries - 1).bit_length()

        held = Signal(LAYOUTS[Opcode.ADAPT].size, reset_less=True)  # the largest
        adapt, set_state, commit = (
            data.View(LAYOUTS[opcode], held[: LAYOUTS[opcode].size])
            for opcode in (Opcode.ADAPT, Opcode.STATE, Opcode.COMMIT)
        )
        is_adapt, is_state, is_commit = Signal(), Signal(), Signal()
        bad_tensor, bad_state, bad_adapt = Signal(), Signal(), Signal()
        assert all(LAYOUTS[Opcode.ADAPT]["tensor"] == LAYOUTS[op]["tensor"] for op in (Opcode.STATE, Opcode.COMMIT))
        m.d.comb += [
            is_adapt.eq(adapt.opcode == Opcode.ADAPT),
            is_state.eq(adapt.opcode == Opcode.STATE),
            is_commit.eq(adapt.opcode == Opcode.COMMIT),
            bad_tensor.eq((adapt.tensor == 0) | (adapt.tensor >= entries)),
            bad_state.eq(
                (set_state.lo > set_state.hi) | (set_state.scale > MAX_SCALE) | (set_state.scale < -MAX_SCALE)
            ),
            bad_adapt.eq(
                (adapt.hi_least > adapt.hi_most)
                | (adapt.lo_least > adapt.lo_most)
                | (adapt.hi_min > adapt.hi_max)
                | (adapt.lo_min > adapt.lo_max)
                | adapt.address[:5].any()
                | adapt.address[address_bits:].any()
            ),
        ]

        # The table: a lookup goes before a command. Entry 0 is written after reset only, so it stays 0.
        entry = data.StructLayout({"current": TENSOR_STATE, "next": TENSOR_STATE})
        m.submodules.table = table = Sram(depth=entries, width=entry.size, granularity=TENSOR_STATE.size)
        found = Signal(entry)
        sweeping, sweep_entry = Signal(init=1), Signal(entry_bits)
        read = Signal()  # a command wants the entry of its tensor
        written = Signal(entry)
        sets_current, sets_next = Signal(), Signal()
        looked_up, in_table, known = Signal(), Signal(), Signal(reset_less=True)
        m.d.comb += [
            in_table.eq(~sweeping & (self.lookup_tensor < entries)),
            table.r_en.eq(Mux(self.lookup, in_table, read)),
            table.r_addr.eq(Mux(self.lookup, self.lookup_tensor, adapt.tensor)),
            table.w_en.eq(Cat(sweeping | sets_current, sweeping | sets_next)),
            table.w_addr.eq(Mux(sweeping, sweep_entry, adapt.tensor)),
            table.w_data.eq(Mux(sweeping, 0, written)),
            found.eq(table.r_data),
        ]
        m.d.sync += [looked_up.eq(self.lookup), known.eq(in_table)]
        with m.If(looked_up):
            m.d.sync += self.state.eq(Mux(known, found.current, 0))
        with m.If(sweeping):
            m.d.sync += [sweep_entry.eq(sweep_entry + 1), sweeping.eq(sweep_entry != entries - 1)]

        # ADAPT: the entry that is being worked on, and the statistics.
        take = Signal()
        statistics = self._statistics(m, take)
        current = Signal(TENSOR_STATE, reset_less=True)
        scale = Signal(signed(8), reset_less=True)
        lo, hi = Signal(15, reset_less=True), Signal(15, reset_less=True)
        lo_exponent, hi_exponent = lo[10:], hi[10:]
        nonzero, total = Signal(COUNT_BITS + 1), Signal(COUNT_BITS + 2)
        m.d.comb += [
            nonzero.eq(statistics["fp8"] + statistics["fp16"]),
            total.eq(nonzero + statistics["underflow"]),
        ]

        # The scale.
        change, wanted_scale, limited_scale = Signal(signed(6)), Signal(signed(8)), Signal(signed(8))
        with m.If(statistics["nonfinite"]):
            m.d.comb += change.eq(1)
        with m.Elif((statistics["top"] > adapt.top) | (statistics["top"] + adapt.slack < adapt.top)):
            m.d.comb += change.eq(statistics["top"] - adapt.top)
        m.d.comb += [
            wanted_scale.eq(scale + change),
            limited_scale.eq(
                Mux(wanted_scale > SCALE_MAX, SCALE_MAX, Mux(wanted_scale < SCALE_MIN, SCALE_MIN, wanted_scale))
            ),
        ]

        # lo and hi: four comparisons of a count with a share, multiplied out by the bits of the share from the highest
        # down. Of the two comparisons of one limit at most one holds, as least <= most.
        HI_MOST, HI_LEAST, LO_MOST, LO_LEAST = range(4)
        comparison, bit = Signal(2), Signal(3)
        share = Signal(8)
        part, whole = Signal(COUNT_BITS), Signal(COUNT_BITS + 2)
        product = Signal(COUNT_BITS + 2 + 8, reset_less=True)
        above, below = Signal(), Signal()
        crowded = Signal()  # lo and hi are too near for one to move towards the other
        with m.Switch(comparison):
            for case, value in (
                (HI_MOST, adapt.hi_most),
                (HI_LEAST, adapt.hi_least),
                (LO_MOST, adapt.lo_most),
                (LO_LEAST, adapt.lo_least),
            ):
                with m.Case(case):
                    m.d.comb += share.eq(value)
        m.d.comb += [
            part.eq(Mux(comparison[1], statistics["underflow"], statistics["fp16"])),
            whole.eq(Mux(comparison[1], total, nonzero)),
            above.eq((part << 8) > product),
            below.eq((part << 8) < product),
            crowded.eq(lo + Mux(comparison[1], LO_STEP, HI_STEP) > hi),
        ]

        problem = Signal(Error)
        m.d.sync += self.error.eq(problem)
        m.d.comb += self.busy.eq(1)
        with m.FSM(name="command_state"):
            with m.State("IDLE"):
                m.d.comb += [self.busy.eq(sweeping), self.command.ready.eq(~sweeping)]
                with m.If(self.command.valid & self.command.ready):
                    m.d.sync += held.eq(self.command.payload)
                    m.next = "CHECK"
            with m.State("CHECK"):
                with m.If(~(is_adapt | is_state | is_commit)):
                    m.d.comb += problem.eq(Error.OPCODE)
                with m.Elif(bad_tensor | (is_state & bad_state) | (is_adapt & bad_adapt)):
                    m.d.comb += problem.eq(Error.FIELD)
                m.d.comb += take.eq(is_adapt & (problem == Error.NONE))
                m.next = "READ"
                with m.If(problem != Error.NONE):
                    m.next = "REJECT"
                with m.Elif(is_state):
                    m.next = "SET"
            with m.State("REJECT"):
                m.next = "IDLE"
            with m.State("SET"):
                new = Cat(set_state.scale, set_state.lo, set_state.hi)
                m.d.comb += [written.eq(Cat(new, new)), sets_current.eq(1), sets_next.eq(1)]
                m.next = "IDLE"
            with m.State("READ"):
                m.d.comb += read.eq(1)
                with m.If(~self.lookup):
                    m.next = "FOUND"
            with m.State("FOUND"):
                m.d.sync += [
                    current.eq(found.current),
                    scale.eq(found.next.scale),
                    lo.eq(found.next.lo),
                    hi.eq(found.next.hi),
                ]
                m.next = "SCALE"
                with m.If(is_commit):
                    m.next = "COMMIT"
            with m.State("COMMIT"):
                m.d.comb += [
                    written.current.eq(Cat(scale, lo, hi)),
                    written.next.eq(current),
                    sets_current.eq(~commit.frozen),
                    sets_next.eq(commit.frozen),
                ]
                m.next = "IDLE"
            with m.State("SCALE"):
                m.d.sync += [comparison.eq(HI_MOST), bit.eq(0), product.eq(0)]
                with m.If(adapt.adapt_scale & (statistics["nonfinite"] | (total != 0))):
                    m.d.sync += scale.eq(limited_scale)
                with m.If(statistics["nonfinite"] & adapt.adapt_lo & (lo_exponent > adapt.lo_min)):
                    m.d.sync += lo_exponent.eq(Mux(lo_exponent - 1 == adapt.lo_min, adapt.lo_min, lo_exponent - 2))
                m.next = "MULTIPLY"
                with m.If(statistics["nonfinite"] | (total == 0)):
                    m.next = "WRITE"
            with m.State("MULTIPLY"):
                m.d.sync += [
                    product.eq((product << 1) + Mux(share.bit_select(~bit, 1), whole, 0)),
                    bit.eq(bit + 1),
                ]
                with m.If(bit == 7):
                    m.next = "COMPARE"
            with m.State("COMPARE"):
                with m.Switch(comparison):
                    with m.Case(HI_MOST), m.If(adapt.adapt_hi & above & (hi_exponent < adapt.hi_max)):
                        m.d.sync += hi.eq(hi + HI_STEP)
                    with m.Case(HI_LEAST), m.If(adapt.adapt_hi & below & (hi_exponent > adapt.hi_min) & ~crowded):
                        m.d.sync += hi.eq(hi - HI_STEP)
                    with m.Case(LO_MOST), m.If(adapt.adapt_lo & above & (lo_exponent > adapt.lo_min)):
                        m.d.sync += lo.eq(lo - LO_STEP)
                    with m.Case(LO_LEAST), m.If(adapt.adapt_lo & below & (lo_exponent < adapt.lo_max) & ~crowded):
                        m.d.sync += lo.eq(lo + LO_STEP)
                m.d.sync += [comparison.eq(comparison + 1), product.eq(0)]
                m.next = "MULTIPLY"
                with m.If(comparison == LO_LEAST):
                    m.next = "WRITE"
            with m.State("WRITE"):
                m.d.comb += [written.next.eq(Cat(scale, lo, hi)), sets_next.eq(1)]
                m.next = "RECORD"
            with m.State("RECORD"):
                m.d.comb += self.record.valid.eq(1)
                with m.If(self.record.ready):
                    m.next = "IDLE"

        record = self.record.payload
        m.d.comb += [
            record.scale.eq(scale),
            record.lo.eq(lo),
            record.hi.eq(hi),
            *(record[name].eq(value) for name, value in statistics.items()),
            record.tensor.eq(adapt.tensor),
            record.current_scale.eq(current.scale),
            record.current_lo.eq(current.lo),
            record.current_hi.eq(current.hi),
            self.record_address.eq(adapt.address),
        ]
        return m
