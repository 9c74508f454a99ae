"""Tests of the performance counters: random events against sums in Python."""

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge

from lnpu.bus.axi_reader import reader_events_layout
from lnpu.bus.axi_writer import writer_events_layout
from lnpu.config import ChipConfig
from lnpu.ctrl.counters import (
    COUNTERS,
    Counters,
    core_events_layout,
    store_events_layout,
    transfer_events_layout,
)
from lnpu.formats import TensorKind
from verif.agents import pack, start
from verif.runner import parameters, rng

CONFIG = ChipConfig(**parameters()["config"])
UNITS = ("load", "load_dense", "store", "store_raw", "vector", "drain")
BITS = ("busy", "started", *(f"{unit}_busy" for unit in UNITS))
LAYOUTS = {
    "reader": reader_events_layout(),
    "writer": writer_events_layout(),
    "load": transfer_events_layout(),
    "load_dense": transfer_events_layout(),
    "store": store_events_layout(),
    "store_raw": transfer_events_layout(),
}


def width_of(place) -> int:
    return place.shape if isinstance(place.shape, int) else place.shape.width


class Bench:
    """Drives events and adds them up."""

    def __init__(self, dut, seed: int) -> None:
        self.dut, self.random = dut, rng(seed)
        self.model = dict.fromkeys(COUNTERS, 0)
        for name in (*BITS, *LAYOUTS, "cores", "clear", "snapshot", "host_index", "mark_read", "mark_index"):
            getattr(dut, name).value = 0
        self.edge = RisingEdge(dut.clk)

    def _draw(self, layout, extreme: bool) -> dict:
        return {
            name: (1 << width_of(place)) - 1 if extreme else int(self.random.integers(1 << width_of(place)))
            for name, place in layout
        }

    async def events(self, cycles: int, *, extreme: bool = False) -> None:
        """Random events (or the largest possible), then none."""
        dut, model = self.dut, self.model
        for _ in range(cycles):
            bits = {name: 1 if extreme else int(self.random.integers(2)) for name in BITS}
            cores = [self._draw(core_events_layout(), extreme) for _ in range(CONFIG.cores)]
            others = {name: self._draw(layout, extreme) for name, layout in LAYOUTS.items()}
            for name, value in bits.items():
                getattr(dut, name).value = value
            core_width = core_events_layout().size
            dut.cores.value = sum(
                pack(core_events_layout(), core) << i * core_width for i, core in enumerate(cores)
            )  # fmt: skip
            for name, value in others.items():
                getattr(dut, name).value = pack(LAYOUTS[name], value)
            reader, writer, load, load_dense, store, store_raw = others.values()
            model["cycles"] += bits["busy"]
            model["commands"] += bits["started"]
            for unit in UNITS:
                model[f"{unit}_busy"] += bits[f"{unit}_busy"]
            for counter, event in (
                ("core_busy", "busy"), ("mac16", "mac16"), ("mac8", "mac8"), ("skipped_zero", "zeros"),
                ("skipped_padding", "padding"), ("visits", "visit"), ("masked_visits", "masked_visit"),
                ("gated", "gated"),
            ):  # fmt: skip
                model[counter] += sum(core[event] for core in cores)
            model["read_beats"] += reader["beat"]
            model["read_wait"] += reader["waiting"]
            model["write_beats"] += writer["beat"]
            for event in ("zero", "underflow", "fp8", "fp16"):
                model[f"stored_{event}"] += store[event]
            for counter, kind, amount in (
                ("read_bits", reader["kind"], reader["beat"] * CONFIG.axi_bits),
                ("write_bits", writer["kind"], writer["beat"] * CONFIG.axi_bits),
                ("plain_read_bits", load["kind"], 16 * load["plain"]),
                ("plain_read_bits", load_dense["kind"], 16 * load_dense["plain"]),
                ("plain_write_bits", store["kind"], 16 * store["plain"]),
                ("plain_write_bits", store_raw["kind"], 16 * store_raw["plain"]),
            ):
                model[f"{counter}_{TensorKind(kind).name.lower()}"] += amount
            await self.edge
        for name in (*BITS, *LAYOUTS, "cores"):
            getattr(dut, name).value = 0
        await ClockCycles(dut.clk, Counters.LATENCY + 1)

    async def read(self, port: str) -> dict[str, int]:
        """All counters through the `host` or the `mark` port, in random order; the other port is busy too."""
        dut, names, values = self.dut, list(COUNTERS), {}
        for number in self.random.permutation(len(names)):
            if port == "host":
                dut.host_index.value = int(number)
                for _ in range(Counters.HOST_LATENCY // 2):
                    await self._mark(int(self.random.integers(len(names))))
                values[names[number]] = int(dut.host_value.value)
            else:
                dut.host_index.value = int(self.random.integers(len(names)))
                await ClockCycles(dut.clk, int(self.random.integers(3)) + 1)
                values[names[number]] = await self._mark(int(number))
        return {name: values[name] for name in names}

    async def _mark(self, number: int) -> int:
        dut = self.dut
        dut.mark_index.value, dut.mark_read.value = number, 1
        await self.edge
        dut.mark_read.value = 0
        await self.edge
        return int(dut.mark_value.value)


async def _pulse(dut, name: str) -> None:
    getattr(dut, name).value = 1
    await RisingEdge(dut.clk)
    getattr(dut, name).value = 0
    await RisingEdge(dut.clk)


@cocotb.test()
async def list_of_counters(dut):
    """The order of docs/architecture.md."""
    names = [
        "cycles", "commands", "core_busy", "mac16", "mac8", "skipped_zero", "skipped_padding", "visits",
        "masked_visits", "gated", "load_busy", "load_dense_busy",
        "store_busy", "store_raw_busy", "vector_busy", "drain_busy", "read_beats", "write_beats", "read_wait",
        "stored_zero", "stored_underflow", "stored_fp8", "stored_fp16",
    ]  # fmt: skip
    for kind in ("program", "activation", "error", "weight", "gradient", "optimizer", "norm", "other"):
        names += [f"read_bits_{kind}", f"write_bits_{kind}", f"plain_read_bits_{kind}", f"plain_write_bits_{kind}"]
    assert list(COUNTERS) == names


@cocotb.test()
async def random_events(dut):
    bench = Bench(dut, 1)
    await start(dut)
    assert await bench.read("host") == bench.model
    for _ in range(3):
        await bench.events(200)
        await _pulse(dut, "snapshot")
        assert await bench.read("host") == bench.model
        assert await bench.read("mark") == bench.model


@cocotb.test()
async def largest_events(dut):
    bench = Bench(dut, 2)
    await start(dut)
    await bench.events(50, extreme=True)
    assert await bench.read("host") == bench.model


@cocotb.test()
async def clear(dut):
    bench = Bench(dut, 3)
    await start(dut)
    await bench.events(50, extreme=True)
    await bench.events(50)
    await _pulse(dut, "clear")
    bench.model = dict.fromkeys(COUNTERS, 0)
    assert await bench.read("host") == bench.model
    await bench.events(20)
    assert await bench.read("host") == bench.model


@cocotb.test()
async def snapshot(dut):
    """The `mark` port keeps the values that MARK itself changes."""
    bench = Bench(dut, 4)
    await start(dut)
    await bench.events(50)
    await _pulse(dut, "snapshot")
    saved = {name: bench.model[name] for name in ("cycles", "write_beats", "write_bits_other")}
    await bench.events(50)
    assert await bench.read("host") == bench.model
    assert await bench.read("mark") == bench.model | saved


@cocotb.test()
async def wide_counts(dut):
    """Carries run through all 48 bits, and the counter wraps."""
    bench = Bench(dut, 5)
    await start(dut)
    await ClockCycles(dut.clk, Counters.PERIOD)  # totals are zero
    for name in ("cycles", "mac16", "plain_read_bits_activation"):
        dut.totals.words[list(COUNTERS).index(name)].value = (1 << 48) - 1
        bench.model[name] = -1
    await bench.events(1, extreme=True)
    await bench.events(20)
    assert await bench.read("host") == {name: value % (1 << 48) for name, value in bench.model.items()}


@cocotb.test()
async def long_counts(dut):
    """The largest events, for longer than the small counters hold, while both ports take their visits."""
    bench = Bench(dut, 6)
    await start(dut)
    reading = cocotb.start_soon(_read_on(bench))
    await bench.events(4 * Counters.PERIOD, extreme=True)
    reading.cancel()
    await ClockCycles(dut.clk, 2)
    dut.mark_read.value = 0
    assert await bench.read("host") == bench.model
    assert await bench.read("mark") | await bench.read("host") == bench.model


async def _read_on(bench) -> None:
    while True:
        bench.dut.host_index.value = int(bench.random.integers(len(COUNTERS)))
        await bench._mark(int(bench.random.integers(len(COUNTERS))))


@cocotb.test()
async def running_counts(dut):
    """Values that are read while a counter runs are those of a cycle."""
    bench = Bench(dut, 7)
    await start(dut)
    dut.busy.value = 1
    before, cycles = None, 2
    dut.host_index.value = list(COUNTERS).index("cycles")
    for _ in range(3 * Counters.PERIOD):
        await bench.edge
        value, cycles = int(dut.host_value.value), cycles + 1
        if cycles > Counters.HOST_LATENCY + Counters.LATENCY:
            assert cycles - Counters.HOST_LATENCY - Counters.LATENCY <= value <= cycles
            assert before is None or before <= value
            before = value
