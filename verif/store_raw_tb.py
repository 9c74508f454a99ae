"""StoreRawUnit: random lines against a model of memory, byte for byte; malformed commands; throughput."""

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from lnpu.ctrl.commands import Command, Opcode
from lnpu.interfaces import Error
from lnpu.mem.store_raw import store_raw_events
from verif import store_tb
from verif.runner import rng
from verif.store_tb import STALLS, WINDOW, Stall, Totals, check_refused, fill


class Bench(store_tb.Bench):
    """The unit between the models of the STORE unit's bench."""

    def __init__(self, dut, *, seed: int = 0, stall: Stall | None = None) -> None:
        super().__init__(dut, seed=seed, stall=stall)
        self.layout = store_raw_events()
        self.word = self.config.axi_bits // 8
        self.row_words = 4 * self.config.beat // self.word
        self.most = max(1, self.config.burst_beats // self.row_words)  # rows in a request

    def _count(self, event: dict, busy: int) -> None:
        pass


def random_lines(bench: Bench, random: np.random.Generator) -> dict:
    """A STORE_RAW whose lines lie in the window, at any pitch: they may overlap."""
    most = int(random.choice([1, 3, 2 * bench.most, 5 * bench.most]))
    count = int(random.integers(1, 8))
    rows = int(random.integers(1, most + 1))
    size = rows * bench.row_words
    pitch = int(random.integers(0, (WINDOW // bench.word - size) // count))
    match random.integers(3):
        case 0:
            pitch = size  # line after line
        case 1:
            pitch = min(pitch, 2 * size)
    first = int(random.integers(0, WINDOW // bench.word - (count - 1) * pitch - size + 1))
    return {
        "address": (bench.base + bench.word * first) % (1 << bench.config.address_bits),
        "kind": int(random.integers(0, 8)),
        "line_count": count,
        "line_rows": rows,
        "pitch": bench.word * pitch,
        "vmem": int(random.integers(0, 1 << 16)),
        "vmem_line": int(random.integers(-(1 << 15), 1 << 15)),
    }


def lines(bench: Bench, count: int, rows: int) -> dict:
    """A STORE_RAW of lines that follow each other in memory."""
    pitch = rows * bench.row_words * bench.word
    return {
        "address": bench.base,
        "kind": 5,
        "line_count": count,
        "line_rows": rows,
        "pitch": pitch,
        "vmem": 100,
        "vmem_line": 5000,
    }


def expect(bench: Bench, command: dict, expected: bytearray) -> list[tuple[int, int, int]]:
    """Apply a STORE_RAW to the model of memory; returns its requests."""
    mask = (1 << bench.config.address_bits) - 1
    row_bytes = bench.row_words * bench.word
    requests = []
    for line in range(command["line_count"]):
        at = (command["address"] + line * command["pitch"] - bench.base) & mask
        for r in range(command["line_rows"]):
            row = bench.vmem[(command["vmem"] + line * command["vmem_line"] + r) & 0xFFFF].tobytes()
            expected[at + r * row_bytes : at + (r + 1) * row_bytes] = row
        for r in range(0, command["line_rows"], bench.most):
            rows = min(bench.most, command["line_rows"] - r)
            requests.append((at + r * row_bytes, rows * bench.row_words, command["kind"]))
    return requests


async def check(bench: Bench, command: dict) -> int:
    """Run a STORE_RAW and compare memory, requests and events with the model; returns its cycles."""
    expected = bytearray(bench.image)
    requests = expect(bench, command, expected)
    rows = command["line_count"] * command["line_rows"]
    bench.requests.clear()
    bench.reads, bench.words, bench.totals = 0, 0, Totals()
    cycles = await bench.run(Command(Opcode.STORE_RAW, **command))
    assert not bench.errors
    assert bench.image == expected, command
    assert bench.requests == requests
    assert (bench.reads, bench.words) == (rows, rows * bench.row_words)
    assert bench.totals == Totals(plain_bits={command["kind"]: rows * bench.config.beat * 32})
    return cycles


@cocotb.test(timeout_time=500, timeout_unit="us")
@cocotb.parametrize(stall=list(STALLS))
async def random_walks(dut, stall):
    """Lines of one row up to several requests, strides of either sign that wrap."""
    random = rng(31)
    bench = Bench(dut, seed=1, stall=STALLS[stall])
    await bench.begin()
    fill(bench, random)
    for _ in range(20):
        await check(bench, random_lines(bench, random))


@cocotb.test(timeout_time=500, timeout_unit="us")
@cocotb.parametrize(stall=["none", "all"])
async def one_behind_the_other(dut, stall):
    """A command begins when the words of the one before have been sent, however late their answers are."""
    random = rng(36)
    bench = Bench(dut, seed=6, stall=STALLS[stall])
    await bench.begin()
    fill(bench, random)
    bench.latency = 150
    commands = [random_lines(bench, random) for _ in range(25)]
    expected, requests = bytearray(bench.image), []
    for command in commands:
        requests += expect(bench, command, expected)
    await bench.run_all([Command(Opcode.STORE_RAW, **command) for command in commands])
    assert not bench.errors
    assert bench.image == expected
    assert bench.requests == requests
    assert bench.overlaps > 500, f"{bench.overlaps} cycles of a command before the answers of the one before"


@cocotb.test(timeout_time=500, timeout_unit="us")
async def top_of_the_address_space(dut):
    """Addresses are modulo 2^address_bits, within a request, a line and from line to line."""
    random = rng(32)
    bench = Bench(dut, seed=2, stall=Stall(0.1, 0.1, 0.1))
    await bench.begin()
    fill(bench, random)
    size = 1 << bench.config.address_bits
    row_bytes = bench.row_words * bench.word
    bench.base = size - WINDOW // 2
    for before in (1, bench.most, bench.most + 1, 3 * bench.most - 1):
        command = lines(bench, 3, 4 * bench.most)
        await check(bench, command | {"address": size - before * row_bytes})
        await check(bench, command | {"address": size - (before + 4 * bench.most) * row_bytes})


@cocotb.test(timeout_time=500, timeout_unit="us")
async def asks_for_what_it_sends(dut):
    """A request comes when all before have been sent but for the two rows that the unit holds, so others wait for
    hardly more than a burst."""
    random = rng(33)
    bench = Bench(dut, seed=3, stall=Stall(data=0.5))
    await bench.begin()
    fill(bench, random)
    checking = cocotb.start_soon(check(bench, lines(bench, 2, 9 * bench.most + 1)))
    seen = 0
    await RisingEdge(dut.busy)
    while int(dut.busy.value):
        await bench.edge
        if len(bench.requests) > seen:
            seen = len(bench.requests)
            asked = sum(words for _, words, _ in bench.requests[:-1])
            assert asked - bench.words <= 2 * bench.row_words
    await checking
    assert seen == 20


@cocotb.test(timeout_time=500, timeout_unit="us")
async def throughput(dut):
    """A word a cycle, of long lines and of short ones."""
    random = rng(34)
    bench = Bench(dut, seed=4)
    await bench.begin()
    fill(bench, random)
    for rows, count in ((40 * bench.most + 3, 2), (2, 100), (1, 100)):
        cycles = await check(bench, lines(bench, count, rows))
        least = count * max(2, rows * bench.row_words)
        print(
            f"throughput {bench.config.beat}x{bench.config.axi_bits} raw, {rows} rows a line: "
            f"{bench.words / cycles:.3f} words/cycle"
        )
        assert cycles <= least + 24, (rows, cycles, least)


def malformed(bench: Bench):
    """(name, command, error) that the unit must refuse."""
    good = {"line_count": 1, "line_rows": 1}
    cases = [(name, {name: 0}) for name in good]
    for name in ("address", "pitch"):
        cases += [(f"{name} + {by}", {name: by}) for by in (1, bench.word // 2, bench.word + 1)]
    cases += [
        (f"address bit {bit}", {"address": 1 << bit}) for bit in (bench.config.address_bits, 39)
        if bench.config.address_bits <= bit < 40
    ]  # fmt: skip
    for name, changes in cases:
        yield name, Command(Opcode.STORE_RAW, **(good | changes)), Error.FIELD
    for opcode in (Opcode.STORE, Opcode.LOAD_RAW, Opcode.NOP):
        yield opcode.name, Command(opcode), Error.OPCODE


@cocotb.test(timeout_time=500, timeout_unit="us")
async def malformed_commands(dut):
    """Refused with one pulse of the right error and no access; the next command runs."""
    random = rng(35)
    bench = Bench(dut, seed=5)
    await bench.begin()
    fill(bench, random)
    for name, command, error in malformed(bench):
        await check_refused(bench, name, command, error)
        if random.random() < 0.5:
            await check(bench, random_lines(bench, random))
    await check(bench, random_lines(bench, random))
