"""Testbench of the vector memory: every port is watched in every cycle against a model of rows, order and fairness."""

import cocotb
from cocotb.triggers import RisingEdge

from lnpu.config import TINY
from lnpu.interfaces import vmem_write
from verif.agents import Source, pack, start
from verif.runner import parameters, rng

WRITES = ("write_load", "write_load_dense", "write_drain", "write_vector")
READS = ("read_store", "read_store_raw", "read_a", "read_b", "read_c")
HELD = ("read_store", "read_store_raw")
"""Their rows stay until their next ones; the others' are there for one cycle."""

CONFIG = TINY.replace(**parameters()["config"])
ROWS = CONFIG.vmem_rows
BANKS = CONFIG.vmem_banks
LAYOUT = vmem_write(CONFIG)
ROW_BITS = 32 * CONFIG.beat


def bank_of(address: int) -> int:
    """Which bank a row is in."""
    bank = 0
    while address:
        bank, address = bank ^ address % BANKS, address // BANKS
    return bank


class Checker:
    """Samples the ports at every clock edge and compares them with a model.

    Attributes
    ----------
    counts : dict
        Accesses taken, one entry a port.
    """

    def __init__(self, dut) -> None:
        self.dut = dut
        self.memory: dict[int, int] = {}
        self.counts = dict.fromkeys(WRITES + READS, 0)
        self.errors = 0
        self.collisions = 0  # a read and a write of one row in one cycle
        self.together = 0  # cycles in which banks worked side by side: served two writes, or two reads
        self.held = 0  # cycles in which a port's row was checked after another port had read
        self.expected: dict[str, int | None] = dict.fromkeys(READS)
        self._waiting = dict.fromkeys(WRITES + READS, 0)
        self._handles = {
            name: tuple(getattr(dut, f"{name}{middle}__{wire}") for wire in ("valid", "ready", "payload"))
            for names, middle in ((WRITES, ""), (READS, "__request"))
            for name in names
        }
        self._rows = {name: getattr(dut, f"{name}__row") for name in READS}
        self._task = cocotb.start_soon(self._run())

    def _served(self, names) -> list[tuple[str, int]]:
        """Ports of `names` that are served in this cycle and their payloads; one a bank if any asks it."""
        all_served = []
        for bank in range(BANKS):
            served, asked = [], []
            for name in names:
                valid, ready, payload = self._handles[name]
                if int(valid.value) and bank_of(int(payload.value) & 0xFFFF) == bank:
                    asked.append(name)
                    if int(ready.value):
                        served.append((name, int(payload.value)))
                        self.counts[name] += 1
            assert len(served) == bool(asked), f"bank {bank}: {[name for name, _ in served]} of {asked} served"
            for name in asked:
                self._waiting[name] = 0 if served[0][0] == name else self._waiting[name] + 1
                assert self._waiting[name] < len(names), f"{name} starves"
            all_served += served
        self.together += len(all_served) > 1
        return all_served

    async def _run(self) -> None:
        edge = RisingEdge(self.dut.clk)
        error = False
        while True:
            await edge
            if int(self.dut.rst.value):
                continue
            assert int(self.dut.error.value) == error
            self.errors += error
            for name, expected in self.expected.items():
                if expected is not None:
                    assert int(self._rows[name].value) == expected, f"row of {name}"
                    self.held += 1
                if name not in HELD:
                    self.expected[name] = None
            writes, reads = self._served(WRITES), self._served(READS)
            error = False
            for name, address in reads:
                error |= address >= ROWS
                self.expected[name] = self.memory.get(address)
            for _, word in writes:
                address, row = word & 0xFFFF, word >> 16
                error |= address >= ROWS
                if address < ROWS:
                    self.memory[address] = row
                self.collisions += address in [read for _, read in reads]

    def stop(self) -> None:
        """Stop, and raise what the checker has found."""
        if self._task.done():
            self._task.result()
        self._task.cancel()


def sources_of(dut, stalls: dict[str, float]) -> dict[str, Source]:
    """What drives each port; those that `stalls` does not name stay idle."""
    return {
        name: Source(dut, name if name in WRITES else f"{name}__request", seed=i, stall=stalls.get(name, 1.0))
        for i, name in enumerate(WRITES + READS)
    }


def word_to(address: int, random) -> int:
    """What a write port takes to write a random row there."""
    return int.from_bytes(random.bytes(ROW_BITS // 8), "little") << 16 | address


async def traffic(dut, *, stalls: dict[str, float], count: int, addresses) -> Checker:
    """Random accesses on every port of `stalls`, `count` each, at addresses that `addresses()` draws."""
    random = rng()
    sources = sources_of(dut, stalls)
    await start(dut)
    checker = Checker(dut)
    tasks = []
    for name in stalls:
        if name in WRITES:
            words = [word_to(addresses(random), random) for _ in range(count)]
            assert pack(LAYOUT, {"address": words[0] & 0xFFFF, "row": [0] * CONFIG.beat}) == words[0] & 0xFFFF
        else:
            words = [addresses(random) for _ in range(count)]
        tasks.append(cocotb.start_soon(sources[name].put(words)))
    for task in tasks:
        await task
    for _ in range(5):
        await RisingEdge(dut.clk)
    checker.stop()
    return checker


def few(random) -> int:
    """An address among few, so that reads meet rows that have been written; the memory's ends are among them."""
    return int(random.choice([0, 1, 2, 3, 5, 64, ROWS - 2, ROWS - 1]))


def any_address(random) -> int:
    """Mostly inside the memory, sometimes just beyond it or far out."""
    if random.random() < 0.2:
        return int(random.choice([ROWS, ROWS + 1, 0x8000, 0xFFFF]))
    return few(random)


@cocotb.test()
async def random_traffic(dut):
    """Every port at its own pace; data, order, hold of the rows, one access a cycle and bank."""
    stalls = dict(zip(WRITES + READS, (0.5, 0.4, 0.7, 0.3, 0.6, 0.5, 0.2, 0.4, 0.8), strict=True))
    checker = await traffic(dut, stalls=stalls, count=600, addresses=few)
    assert checker.collisions > 50
    assert checker.held > 500


@cocotb.test()
async def rare_reads(dut):
    """STORE and STORE_RAW seldom read and keep their rows while another port reads in every cycle."""
    stalls = {"write_load": 0.5, "read_store": 0.95, "read_store_raw": 0.9, "read_a": 0.0, "read_b": 0.3}
    await traffic(dut, stalls=stalls, count=300, addresses=few)


@cocotb.test()
async def saturated(dut):
    """With every port asking in every cycle each has its share, exactly, no cycle is lost, and banks work together."""
    checker = await traffic(dut, stalls=dict.fromkeys(WRITES + READS, 0.0), count=200, addresses=few)
    assert set(checker.counts.values()) == {200}
    assert checker.together > 150


@cocotb.test()
async def every_row(dut):
    """No two rows share a place, and each has one: all are written, then all are read."""
    random = rng()
    sources = sources_of(dut, {"write_vector": 0.0, "read_a": 0.0})
    await start(dut)
    checker = Checker(dut)
    await sources["write_vector"].put([word_to(address, random) for address in range(ROWS)])
    await sources["read_a"].put(list(range(ROWS)))
    for _ in range(5):
        await RisingEdge(dut.clk)
    checker.stop()
    assert checker.held == ROWS


@cocotb.test()
async def outside(dut):
    """Addresses beyond the last row: error in the cycle after the access, writes dropped, rows inside untouched."""
    stalls = dict.fromkeys(WRITES + READS, 0.4)
    checker = await traffic(dut, stalls=stalls, count=400, addresses=any_address)
    assert checker.errors > 100
