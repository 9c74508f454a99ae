"""The performance counters: their list, and the hardware that counts."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data
from amaranth.lib.wiring import In, Out

from lnpu.bus.axi_reader import reader_events_layout
from lnpu.bus.axi_writer import writer_events_layout
from lnpu.config import ChipConfig
from lnpu.formats import TensorKind
from lnpu.hdl import Block

__all__ = [
    "COUNTERS",
    "COUNTER_BITS",
    "Counters",
    "core_events_layout",
    "load_events_layout",
    "store_events_layout",
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
    "load_busy": "Cycles in which the LOAD unit of sparse buffers and vector memory was busy",
    "load_dense_busy": "Cycles in which the LOAD unit of dense buffers was busy",
    "store_busy": "Cycles in which the STORE unit was busy",
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


def core_events_layout() -> data.StructLayout:
    """What a core reports each cycle.

    `busy`: the core is busy. `visit`: a visit was walked. `mac16`, `mac8`: products, that is elements issued times
    the command's `lanes` (FP8 elements go in pairs). `zeros`, `padding`: elements of those codes in the mask of a
    visit.
    """
    return data.StructLayout({"busy": 1, "visit": 1, "mac16": 8, "mac8": 9, "zeros": 8, "padding": 8})


def load_events_layout() -> data.StructLayout:
    """What the LOAD unit reports each cycle: `plain` bits that a transfer of `kind` takes in plain FP16."""
    return data.StructLayout({"plain": 16, "kind": 3})


def store_events_layout() -> data.StructLayout:
    """What the STORE unit reports each cycle.

    `zero`, `underflow`, `fp8`, `fp16`: elements that were encoded so. `nonfinite`: one was infinite or NaN (not
    counted here; it goes to FLAGS). `plain`, `kind`: as for the LOAD unit.
    """
    return data.StructLayout(
        {"zero": 7, "underflow": 7, "fp8": 7, "fp16": 7, "nonfinite": 1, "plain": 16, "kind": 3}
    )  # fmt: skip


class Counters(Block):
    """The performance counters.

    Events are counted at most `Counters.LATENCY` cycles after they were reported.

    Bits on the bus are kept as words, so that a counter of words needs just an increment; they are read as bits.

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
    load_busy, load_dense_busy, store_busy, vector_busy, drain_busy : In(1)
    reader : In(reader_events_layout()); writer : In(writer_events_layout())
    load, load_dense : In(load_events_layout()); store : In(store_events_layout())
    clear : In(1)
        Set all counters to zero (what is reported in the same cycle may still count).
    snapshot : In(1)
        Save, for the `mark` port, the counters that MARK itself changes: cycles, write_beats, write_bits_other.
    host_index : In(range(len(COUNTERS))); host_value : Out(64)
        Value of the counter `host_index` of the cycle before. A running counter may change between its two halves.
    mark_index : In(range(len(COUNTERS))); mark_value : Out(64)
        Likewise, but saved values for the counters that `snapshot` saves.
    """

    LATENCY = 6

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
            "vector_busy": In(1),
            "drain_busy": In(1),
            "reader": In(reader_events_layout()),
            "writer": In(writer_events_layout()),
            "load": In(load_events_layout()),
            "load_dense": In(load_events_layout()),
            "store": In(store_events_layout()),
            "clear": In(1),
            "snapshot": In(1),
            "host_index": index,
            "host_value": Out(64),
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
        word_shift = self.config.axi_bits.bit_length() - 1

        def registered(value, name: str):
            copy = Signal(value.shape(), name=name, reset_less=True)
            m.d.sync += copy.eq(value)
            return copy

        reader = registered(self.reader, "reader_events")
        writer = registered(self.writer, "writer_events")
        load = registered(self.load, "load_events")
        load_dense = registered(self.load_dense, "load_dense_events")
        store = registered(self.store, "store_events")
        cores = self._sum_of_cores(m)

        values = {}  # of the counters, as they are read
        increments = {
            "cycles": registered(self.busy, "cycle"),
            "commands": registered(self.started, "command"),
            "core_busy": cores["busy"],
            "mac16": cores["mac16"],
            "mac8": cores["mac8"],
            "skipped_zero": cores["zeros"],
            "skipped_padding": cores["padding"],
            "visits": cores["visit"],
            **{
                f"{unit}_busy": registered(getattr(self, f"{unit}_busy"), f"{unit}_is_busy")
                for unit in ("load", "load_dense", "store", "vector", "drain")
            },
            "read_beats": reader.beat,
            "write_beats": writer.beat,
            "read_wait": reader.waiting,
            "stored_zero": store.zero,
            "stored_underflow": store.underflow,
            "stored_fp8": store.fp8,
            "stored_fp16": store.fp16,
        }
        for name, increment in increments.items():
            values[name] = count = Signal(COUNTER_BITS, name=name)
            m.d.sync += count.eq(count + increment)
            with m.If(self.clear):
                m.d.sync += count.eq(0)

        # What the two LOAD units ask for may be of different kinds.
        counts = []
        for member in TensorKind:
            label = f"plain_read_bits_{member.name.lower()}"
            values[label] = count = Signal(COUNTER_BITS, name=label)
            counts.append(count)
            bits = [Mux(unit.kind == member.value, unit.plain, 0) for unit in (load, load_dense)]
            increment = Signal(len(load.plain) + 1, name=f"{label}_increment", reset_less=True)
            m.d.sync += [increment.eq(bits[0] + bits[1]), count.eq(count + increment)]
        with m.If(self.clear):
            m.d.sync += [count.eq(0) for count in counts]

        # One adder serves the counters of all kinds: a cycle's events are of one kind.
        for name, kind, increment, shift in (
            ("read_bits", reader.kind, reader.beat, word_shift),
            ("write_bits", writer.kind, writer.beat, word_shift),
            ("plain_write_bits", store.kind, store.plain, 0),
        ):
            old = Signal(COUNTER_BITS - shift, name=f"{name}_old")
            new = Signal.like(old, name=f"{name}_new")
            m.d.comb += new.eq(old + increment)
            counts = []
            with m.Switch(kind):
                for member in TensorKind:
                    label = f"{name}_{member.name.lower()}"
                    count = Signal.like(old, name=label)
                    counts.append(count)
                    values[label] = Cat(Const(0, shift), count)
                    with m.Case(member.value):
                        m.d.comb += old.eq(count)
                        m.d.sync += count.eq(new)
            with m.If(self.clear):
                m.d.sync += [count.eq(0) for count in counts]

        saved = {}
        for name in ("cycles", "write_beats", "write_bits_other"):
            saved[name] = Signal(COUNTER_BITS, name=f"saved_{name}", reset_less=True)
            with m.If(self.snapshot):
                m.d.sync += saved[name].eq(values[name])

        for index, value, source in (
            (self.host_index, self.host_value, values),
            (self.mark_index, self.mark_value, values | saved),
        ):
            with m.Switch(index):
                for number, name in enumerate(COUNTERS):
                    with m.Case(number):
                        m.d.sync += value.eq(source[name])
        return m
