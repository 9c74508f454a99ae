"""The performance counters: their list, and the hardware that counts."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.bus.axi_reader import reader_events_layout
from lnpu.bus.axi_writer import writer_events_layout
from lnpu.config import ChipConfig
from lnpu.formats import TensorKind
from lnpu.hdl import Block, Sram

__all__ = [
    "COUNTERS",
    "COUNTER_BITS",
    "Counters",
    "core_events_layout",
    "store_events_layout",
    "transfer_events_layout",
]

COUNTER_BITS = 48
"""Bits of a counter; it wraps. Read as 64 bits."""

_BY_KIND = {
    "read_bits": "Bits read over the bus",
    "write_bits": "Bits written over the bus",
    "plain_read_bits": "Bits that the same reads take in plain FP16 (raw words: 32 bits each)",
    "plain_write_bits": "Bits that the same writes take in plain FP16 (raw words: 32 bits each)",
}

COUNTERS: dict[str, str] = {
    "cycles": "Cycles in which a program ran",
    "commands": "Commands started, END included",
    "core_busy": "Core-cycles: busy cores, summed over cycles",
    "mac16": "Products of FP16 elements: elements issued times working lanes",
    "mac8": "Products of FP8 elements",
    "skipped_zero": "Zeros skipped in walked masks",
    "skipped_padding": "Padding skipped in walked masks",
    "visits": "Visits of the cores",
    "masked_visits": "Visits of rows of partial sums that are masked as a whole",
    "gated": "Products, counted in mac16 and mac8, whose partial sum is masked: they are not computed",
    "load_busy": "Cycles in which the LOAD unit of sparse buffers and vector memory was busy",
    "load_dense_busy": "Cycles in which the LOAD unit of dense buffers was busy",
    "store_busy": "Cycles in which the STORE unit was busy",
    "store_raw_busy": "Cycles in which the STORE_RAW unit was busy",
    "vector_busy": "Cycles in which the vector unit was busy",
    "drain_busy": "Cycles in which the DRAIN unit was busy",
    "read_beats": "Data words read over the bus",
    "write_beats": "Data words written over the bus",
    "read_wait": "Cycles with a read outstanding and no data",
    "stored_zero": "Elements stored as zero",
    "stored_underflow": "Elements stored as zero that were not zero",
    "stored_fp8": "Elements stored in FP8",
    "stored_fp16": "Elements stored in FP16",
    **{
        f"{name}_{kind.name.lower()}": f"{doc}, kind {kind.name}"
        for kind in TensorKind
        for name, doc in _BY_KIND.items()
    },
}
"""Names of the counters and what they count, in the order of the COUNTER registers and of what MARK writes."""

_SAVED = ("cycles", "write_beats", "write_bits_other")
"""Counters that MARK itself changes."""


def core_events_layout() -> data.StructLayout:
    """What a core reports each cycle.

    `busy`: the core is busy. `visit`: a visit was walked. `mac16`, `mac8`: products, that is elements issued times
    the command's `lanes` (FP8 elements go in pairs). `zeros`, `padding`: elements of those codes in the mask of a
    visit. `masked_visit`: the visit is of a row that is masked as a whole. `gated`: elements issued times masked lanes
    among the command's first `lanes`.
    """
    return data.StructLayout({
        "busy": 1, "visit": 1, "mac16": 8, "mac8": 9, "zeros": 8, "padding": 8, "masked_visit": 1, "gated": 9,
    })  # fmt: skip


def transfer_events_layout() -> data.StructLayout:
    """What a LOAD unit or the STORE_RAW unit reports each cycle: what a transfer of `kind` takes in plain FP16, `plain`
    times 16 bits."""
    return data.StructLayout({"plain": 7, "kind": 3})


def store_events_layout() -> data.StructLayout:
    """What the STORE unit reports each cycle.

    `zero`, `underflow`, `fp8`, `fp16`: elements that were encoded so. `nonfinite`: one was infinite or NaN (not
    counted here; it goes to FLAGS). `plain`, `kind`: as for the LOAD units.
    """
    return data.StructLayout(
        {"zero": 7, "underflow": 7, "fp8": 7, "fp16": 7, "nonfinite": 1, "plain": 7, "kind": 3}
    )  # fmt: skip


class Counters(Block):
    """The performance counters.

    Events are counted at most `Counters.LATENCY` cycles after they were reported.

    The totals are in an SRAM. Before it each counter has a small one, which holds what `PERIOD` cycles can bring; these
    are visited in turn, at least once in `PERIOD` cycles, and added to their totals. A read is a visit out of turn,
    which leaves both as they are: its value is total plus small counter.

    Parameters
    ----------
    config : ChipConfig
        Number of cores, width of the bus.

    Members
    -------
    busy : In(1)
        A program runs.
    started : In(1)
        A command starts in this cycle.
    cores : In(ArrayLayout(core_events_layout(), config.cores))
    load_busy, load_dense_busy, store_busy, store_raw_busy, vector_busy, drain_busy : In(1)
    reader : In(reader_events_layout()); writer : In(writer_events_layout())
    load, load_dense, store_raw : In(transfer_events_layout()); store : In(store_events_layout())
    clear : In(1)
        Set all counters to zero (what is reported in the same cycle may still count).
    snapshot : In(1)
        Save, for the `mark` port, the counters that MARK itself changes: cycles, write_beats, write_bits_other. The
        latter two must not change in the next two cycles, and `mark_read` comes three cycles later at the earliest, of
        a saved counter two.
    host_index : In(range(len(COUNTERS))); host_value : Out(64)
        Value of the counter `host_index`, once that has been the same for `HOST_LATENCY` cycles. A running counter may
        change between its two halves.
    mark_read : In(1); mark_index : In(range(len(COUNTERS))); mark_value : Out(64)
        Value of the counter `mark_index` in the cycle after `mark_read` (not in two successive cycles). Of those that
        `snapshot` saves, the saved value, for as long as they have the index.
    """

    LATENCY = 6
    HOST_LATENCY = 8
    PERIOD = 256
    """Cycles. A visit takes one; the visits in turn get at least a quarter of them, beside MARK's and the host's."""

    assert 4 * (len(COUNTERS) + 1) <= PERIOD

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        index = In(range(len(COUNTERS)))
        super().__init__({
            "busy": In(1),
            "started": In(1),
            "cores": In(data.ArrayLayout(core_events_layout(), config.cores)),
            "load_busy": In(1),
            "load_dense_busy": In(1),
            "store_busy": In(1),
            "store_raw_busy": In(1),
            "vector_busy": In(1),
            "drain_busy": In(1),
            "reader": In(reader_events_layout()),
            "writer": In(writer_events_layout()),
            "load": In(transfer_events_layout()),
            "load_dense": In(transfer_events_layout()),
            "store": In(store_events_layout()),
            "store_raw": In(transfer_events_layout()),
            "clear": In(1),
            "snapshot": In(1),
            "host_index": index,
            "host_value": Out(64),
            "mark_read": In(1),
            "mark_index": index,
            "mark_value": Out(64),
        })  # fmt: skip

    def _sum_of_cores(self, m: Module) -> dict[str, Signal]:
        """Sums of the cores' events, by a registered adder tree."""
        sums = {}
        for name, place in core_events_layout():
            terms = []
            for core in range(self.config.cores):
                term = Signal(place.shape, name=f"core_{core}_{name}", reset_less=True)
                m.d.sync += term.eq(self.cores[core][name])
                terms.append(term)
            level = 0
            while len(terms) > 1:
                level += 1
                pairs = [terms[i : i + 2] for i in range(0, len(terms), 2)]
                terms = []
                for number, pair in enumerate(pairs):
                    width = max(len(term) for term in pair) + (len(pair) > 1)
                    term = Signal(width, name=f"sum_{name}_{level}_{number}", reset_less=True)
                    m.d.sync += term.eq(sum(pair[1:], pair[0]))
                    terms.append(term)
            sums[name] = terms[0]
        return sums

    def elaborate(self, platform):
        m = Module()
        numbers = {name: number for number, name in enumerate(COUNTERS)}

        def registered(value, name: str):
            copy = Signal(value.shape(), name=name, reset_less=True)
            m.d.sync += copy.eq(value)
            return copy

        reader = registered(self.reader, "reader_events")
        writer = registered(self.writer, "writer_events")
        load = registered(self.load, "load_events")
        load_dense = registered(self.load_dense, "load_dense_events")
        store = registered(self.store, "store_events")
        store_raw = registered(self.store_raw, "store_raw_events")
        cores = self._sum_of_cores(m)

        # What each counter counts, and the exponent of its unit.
        increments: dict[str, tuple[Value, int]] = {
            name: (increment, 0)
            for name, increment in {
                "cycles": registered(self.busy, "cycle"),
                "commands": registered(self.started, "command"),
                "core_busy": cores["busy"],
                "mac16": cores["mac16"],
                "mac8": cores["mac8"],
                "skipped_zero": cores["zeros"],
                "skipped_padding": cores["padding"],
                "visits": cores["visit"],
                "masked_visits": cores["masked_visit"],
                "gated": cores["gated"],
                **{
                    f"{unit}_busy": registered(getattr(self, f"{unit}_busy"), f"{unit}_is_busy")
                    for unit in ("load", "load_dense", "store", "store_raw", "vector", "drain")
                },
                "read_beats": reader.beat,
                "write_beats": writer.beat,
                "read_wait": reader.waiting,
                "stored_zero": store.zero,
                "stored_underflow": store.underflow,
                "stored_fp8": store.fp8,
                "stored_fp16": store.fp16,
            }.items()
        }
        word = self.config.axi_bits.bit_length() - 1
        for kind in TensorKind:
            label = kind.name.lower()
            # What the two units of a direction transfer may be of different kinds.
            plain = {}
            for direction, units in (("read", (load, load_dense)), ("write", (store, store_raw))):
                parts = [Mux(unit.kind == kind.value, unit.plain, 0) for unit in units]
                plain[direction] = both = Signal(8, name=f"plain_{direction}_{label}", reset_less=True)
                m.d.sync += both.eq(parts[0] + parts[1])
            increments |= {
                f"read_bits_{label}": (reader.beat & (reader.kind == kind.value), word),
                f"write_bits_{label}": (writer.beat & (writer.kind == kind.value), word),
                f"plain_read_bits_{label}": (plain["read"], 4),
                f"plain_write_bits_{label}": (plain["write"], 4),
            }

        # Visits: of a counter that is to be saved, else for MARK, else for the host and in turn, alternately.
        index, in_turn, for_host = Signal.like(self.host_index), Signal(), Signal()
        turn = Signal.like(index)
        hosts = Signal()
        saving = Signal(len(_SAVED))
        renewing = Signal(init=1)  # totals from that of `turn` on are to be taken as zero
        m.d.sync += saving.eq(Cat(self.snapshot, saving))
        with m.If(self.snapshot):
            m.d.comb += index.eq(numbers[_SAVED[0]])
        for stage, name in enumerate(_SAVED[1:]):
            with m.Elif(saving[stage]):
                m.d.comb += index.eq(numbers[name])
        with m.Elif(self.mark_read):
            m.d.comb += index.eq(self.mark_index)
        with m.Else():
            m.d.sync += hosts.eq(~hosts)
            m.d.comb += [index.eq(Mux(hosts, self.host_index, turn)), for_host.eq(hosts), in_turn.eq(~hosts)]
        with m.If(in_turn):
            m.d.sync += turn.eq(turn + 1)
            with m.If(turn == len(COUNTERS) - 1):
                m.d.sync += [turn.eq(0), renewing.eq(0)]
        with m.If(self.clear):
            m.d.sync += [turn.eq(0), renewing.eq(1)]

        # The visit's cycle: the small counter is taken, in turn it begins anew; the next one: the sum.
        smalls = {}
        for name, (increment, _) in increments.items():
            smalls[name] = small = Signal(len(increment) + self.PERIOD.bit_length() - 1, name=name)
            taken = self.clear | (in_turn & (turn == numbers[name]))
            m.d.sync += small.eq(Mux(taken, 0, small) + increment)
        addend = Signal(COUNTER_BITS, reset_less=True)
        with m.Switch(index):
            for name, number in numbers.items():
                with m.Case(number):
                    m.d.sync += addend.eq(smalls[name] << increments[name][1])
        m.submodules.totals = totals = Sram(depth=1 << len(index), width=COUNTER_BITS)
        visited, adds = Signal.like(index, reset_less=True), Signal()
        zero, again = Signal(reset_less=True), Signal(reset_less=True)
        total, latest = Signal(COUNTER_BITS), Signal(COUNTER_BITS, reset_less=True)
        m.d.sync += [
            visited.eq(index),
            adds.eq(in_turn),
            zero.eq(renewing & (index >= turn)),
            again.eq(adds & (index == visited)),  # its total is being written
            latest.eq(total),
        ]
        m.d.comb += [
            total.eq(Mux(zero, 0, Mux(again, latest, totals.r_data)) + addend),
            totals.r_en.eq(1),
            totals.r_addr.eq(index),
            totals.w_en.eq(adds),
            totals.w_addr.eq(visited),
            totals.w_data.eq(total),
        ]

        is_for_host = Signal()
        m.d.sync += is_for_host.eq(for_host)
        with m.If(is_for_host):
            m.d.sync += self.host_value.eq(total)
        m.d.comb += self.mark_value.eq(total)
        for stage, name in enumerate(_SAVED):
            saved = Signal(COUNTER_BITS, name=f"saved_{name}", reset_less=True)
            with m.If(saving[stage]):
                m.d.sync += saved.eq(total)
            with m.If(self.mark_index == numbers[name]):
                m.d.comb += self.mark_value.eq(saved)
        return m
