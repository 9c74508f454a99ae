"""Tests of the AXI reader (test plan: verif/plans/axi_reader.md)."""

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge
from cocotbext.axi import AxiRamRead, AxiReadBus

from lnpu.bus.axi_reader import reader_events_layout
from lnpu.config import ChipConfig
from lnpu.interfaces import memory_read_signature
from verif.agents import Sink, Source, pack, start, unpack
from verif.axi_agents import OKAY, SLVERR, AxiMemory
from verif.runner import parameters, rng

CONFIG = ChipConfig(**parameters()["config"])
CLIENTS = parameters()["clients"]
BYTES = CONFIG.axi_bits // 8
REQUEST = memory_read_signature(CONFIG).members["request"].signature.members["payload"].shape
RESPONSE = memory_read_signature(CONFIG).members["response"].signature.members["payload"].shape
EVENTS = reader_events_layout()


def bursts_of(address: int, words: int) -> list[tuple[int, int]]:
    """The longest allowed bursts of a request."""
    bursts = []
    while words:
        beats = min(words, CONFIG.burst_beats, (4096 - address % 4096) // BYTES)
        bursts.append((address, beats))
        address, words = address + beats * BYTES, words - beats
    return bursts


class Bench:
    """Reader with a memory, and a source and a sink for each client."""

    def __init__(self, dut, *, seed: int = 1, size: int = 1 << 16, base: int = 0, client_stall=0.0, **memory) -> None:
        self.dut, self.base = dut, base
        self.random = rng(seed)
        self.data = bytearray(self.random.bytes(size))
        self.memory = AxiMemory(dut, "axi", self.data, base=base, max_beats=CONFIG.burst_beats, seed=seed, **memory)
        self.sources = [Source(dut, f"client{i}__request", seed=seed + i, stall=client_stall) for i in range(CLIENTS)]
        self.sinks = [Sink(dut, f"client{i}__response", seed=seed + 9 + i, stall=client_stall) for i in range(CLIENTS)]
        self.taken: list[tuple[int, int, int]] = []  # client, address, words: in the order taken
        self.errors = 0
        self.kinds = [0] * 8
        self.waiting = 0
        cocotb.start_soon(self._watch())

    async def _watch(self) -> None:
        dut, edge = self.dut, RisingEdge(self.dut.clk)
        requests = [
            [getattr(dut, f"client{i}__request__{name}") for name in ("valid", "ready", "payload")]
            for i in range(CLIENTS)
        ]
        while True:
            await edge
            for i, (valid, ready, payload) in enumerate(requests):
                if int(valid.value) and int(ready.value):
                    request = unpack(REQUEST, int(payload.value))
                    self.taken.append((i, request["address"], request["words"]))
            self.errors += int(dut.error.value)
            events = unpack(EVENTS, int(dut.events.value))
            self.kinds[events["kind"]] += events["beat"]
            self.waiting += events["waiting"]

    def expected(self, address: int, words: int) -> list[int]:
        """Responses to a request."""
        first = address - self.base
        return [
            pack(RESPONSE, {
                "data": int.from_bytes(self.data[first + i * BYTES : first + (i + 1) * BYTES], "little"),
                "last": i == words - 1,
            })
            for i in range(words)
        ]  # fmt: skip

    def random_requests(self, count: int, longest: int) -> list[dict]:
        """Requests inside the memory."""
        requests = []
        for _ in range(count):
            words = int(self.random.integers(1, longest + 1))
            first = int(self.random.integers(0, len(self.data) // BYTES - words + 1))
            requests.append({
                "address": self.base + first * BYTES, "words": words, "kind": int(self.random.integers(8)),
            })  # fmt: skip
        return requests

    async def run(self, requests: list[list[dict]]) -> None:
        """Make the requests (a list a client) and check everything that comes back."""
        tasks = [
            cocotb.start_soon(source.put([pack(REQUEST, request) for request in some]))
            for source, some in zip(self.sources, requests, strict=True)
        ]
        expected_kinds = list(self.kinds)
        for sink, some in zip(self.sinks, requests, strict=True):
            words = [word for request in some for word in self.expected(request["address"], request["words"])]
            assert await sink.get(len(words)) == words
            for request in some:
                expected_kinds[request["kind"]] += request["words"]
        for task in tasks:
            await task
        await ClockCycles(self.dut.clk, 10)
        assert all(not sink.words for sink in self.sinks)
        assert self.kinds == expected_kinds
        assert self.memory.idle
        bursts = [burst for _, address, words in self.taken for burst in bursts_of(address, words)]
        assert self.memory.reads == bursts
        assert self.memory.most_reads <= CONFIG.reads_in_flight


async def _random(dut, seed: int, **options) -> Bench:
    bench = Bench(dut, seed=seed, **options)
    await start(dut)
    await bench.run([bench.random_requests(25, 40) for _ in range(CLIENTS)])
    return bench


@cocotb.test()
async def stalls_everywhere(dut):
    await _random(dut, 1, stall=0.4, client_stall=0.3, latency=3)


@cocotb.test()
async def slow_clients(dut):
    await _random(dut, 2, client_stall=0.8)


@cocotb.test()
async def slow_memory(dut):
    bench = await _random(dut, 3, stall={"ar": 0.8, "r": 0.7}, latency=9)
    assert bench.waiting > 100


@cocotb.test()
async def top_of_the_address_space(dut):
    await _random(dut, 4, stall=0.2, base=(1 << CONFIG.address_bits) - (1 << 16))


@cocotb.test()
async def page_boundaries(dut):
    bench = Bench(dut, seed=5, stall=0.1)
    await start(dut)
    requests = []
    longest = min(CONFIG.burst_beats, 4096 // BYTES)
    for before in {1, 2, longest - 1, longest, min(longest + 1, 4096 // BYTES)}:
        for words in (1, before, before + 1, longest, 3 * longest):
            address = 4096 * len(requests) % 32768 + 4096 - before * BYTES
            requests.append({"address": address, "words": words, "kind": 1})
    requests.append({"address": 0, "words": 3 * 4096 // BYTES, "kind": 2})
    await bench.run([requests] + [[] for _ in range(CLIENTS - 1)])


@cocotb.test()
async def longest_request(dut):
    size = 65535 * BYTES if parameters().get("long") else 3000 * BYTES
    bench = Bench(dut, seed=6, size=size)
    await start(dut)
    await bench.run([[{"address": 0, "words": size // BYTES, "kind": 3}]] + [[] for _ in range(CLIENTS - 1)])
    assert bench.kinds[3] == size // BYTES


@cocotb.test()
async def one_word_a_cycle(dut):
    """Without stalls, long requests keep the data channel full, and short ones the address channel."""
    bench = Bench(dut, seed=7, latency=2)
    await start(dut)
    edge, gaps, started = RisingEdge(dut.clk), [0, 0], [False, False]

    async def count_gaps(signal, which: int, until: int) -> None:
        seen = 0
        while seen < until:
            await edge
            if int(signal.value):
                started[which], seen = True, seen + 1
            elif started[which]:
                gaps[which] += 1

    task = cocotb.start_soon(count_gaps(dut.axi__rvalid, 0, 300 * CLIENTS))
    long = [[{"address": 8 * BYTES, "words": 100, "kind": 1}] * 3] * CLIENTS
    await bench.run(long)
    await task
    # Every outstanding burst is accounted for until its last word came, so gaps are due to a limit of few bursts.
    assert CONFIG.reads_in_flight < 4 or gaps[0] == 0
    bench.memory.reads.clear()
    bench.taken.clear()
    if CONFIG.reads_in_flight >= 4 and CLIENTS > 1:
        task = cocotb.start_soon(count_gaps(dut.axi__arvalid, 1, 40 * CLIENTS))
        await bench.run([[{"address": 64 * i, "words": 1, "kind": 1} for i in range(40)]] * CLIENTS)
        await task
        assert gaps[1] == 0


@cocotb.test()
async def limit_of_outstanding_bursts(dut):
    bench = Bench(dut, seed=8, latency=1500)
    await start(dut)
    await bench.run([[{"address": 0, "words": CONFIG.burst_beats, "kind": 1}] * (CONFIG.reads_in_flight + 3)]
                    + [[] for _ in range(CLIENTS - 1)])  # fmt: skip
    assert bench.memory.most_reads == CONFIG.reads_in_flight


@cocotb.test()
async def clients_take_turns(dut):
    bench = Bench(dut, seed=9)
    await start(dut)
    await bench.run([bench.random_requests(20, 30) for _ in range(CLIENTS)])
    order = [client for client, _, _ in bench.taken]
    whole_rounds = order[: 18 * CLIENTS]
    assert all(sorted(whole_rounds[i : i + CLIENTS]) == list(range(CLIENTS))
               for i in range(CLIENTS, len(whole_rounds), CLIENTS))  # fmt: skip


@cocotb.test()
async def error_responses(dut):
    """Words with an error response are delivered all the same, each with a pulse on `error`."""
    bad = set()
    bench = Bench(dut, seed=10, stall=0.2, client_stall=0.2,
                  fail=lambda address, write: SLVERR if address in bad else OKAY)  # fmt: skip
    await start(dut)
    requests = [bench.random_requests(12, 30) for _ in range(CLIENTS)]
    addresses = [r["address"] + i * BYTES for some in requests for r in some for i in range(r["words"])]
    bad.update(int(address) for address in bench.random.choice(addresses, 20))
    await bench.run(requests)
    assert bench.errors == sum(address in bad for address in addresses) > 0
    bench.errors = 0
    bad.clear()
    await bench.run([bench.random_requests(3, 30) for _ in range(CLIENTS)])
    assert bench.errors == 0


@cocotb.test()
async def against_cocotbext_axi(dut):
    """An independent AXI slave: its checks and its memory instead of ours."""
    random = rng(11)
    data = random.bytes(1 << 14)
    sources = [Source(dut, f"client{i}__request") for i in range(CLIENTS)]
    sinks = [Sink(dut, f"client{i}__response", stall=0.2, seed=i) for i in range(CLIENTS)]
    ram = AxiRamRead(AxiReadBus.from_prefix(dut, "axi_"), dut.clk, dut.rst, size=len(data))
    ram.write(0, data)
    await start(dut)
    for source, sink in zip(sources, sinks, strict=True):
        for _ in range(5):
            words = int(random.integers(1, 50))
            address = int(random.integers(len(data) // BYTES - words)) * BYTES
            await source.put(pack(REQUEST, {"address": address, "words": words, "kind": 0}))
            got = [unpack(RESPONSE, word) for word in await sink.get(words)]
            assert b"".join(word["data"].to_bytes(BYTES, "little") for word in got) == data[address:][: words * BYTES]
            assert [word["last"] for word in got] == [0] * (words - 1) + [1]
