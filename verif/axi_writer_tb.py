"""Tests of the AXI writer (test plan: verif/plans/axi_writer.md)."""

import cocotb
from cocotb.triggers import ClockCycles, RisingEdge
from cocotbext.axi import AxiRamWrite, AxiWriteBus

from lnpu.bus.axi_writer import writer_events_layout
from lnpu.config import ChipConfig
from lnpu.interfaces import memory_write_signature
from verif.agents import Source, pack, start, unpack
from verif.axi_agents import OKAY, SLVERR, AxiMemory
from verif.runner import parameters, rng

CONFIG = ChipConfig(**parameters()["config"])
CLIENTS = parameters()["clients"]
BYTES = CONFIG.axi_bits // 8
FULL = (1 << BYTES) - 1
REQUEST = memory_write_signature(CONFIG).members["request"].signature.members["payload"].shape
WORD = memory_write_signature(CONFIG).members["data"].signature.members["payload"].shape
EVENTS = writer_events_layout()


def bursts_of(address: int, words: int) -> list[tuple[int, int]]:
    """The longest allowed bursts of a request."""
    bursts = []
    while words:
        beats = min(words, CONFIG.burst_beats, (4096 - address % 4096) // BYTES)
        bursts.append((address, beats))
        address, words = address + beats * BYTES, words - beats
    return bursts


class Bench:
    """Writer with a memory, and sources of requests and data for each client. Each client has its own 1/n of memory."""

    def __init__(self, dut, *, seed: int = 1, size: int = 1 << 16, base: int = 0, client_stall=0.0, **memory) -> None:
        self.dut, self.base = dut, base
        self.random = rng(seed)
        self.data = bytearray(self.random.bytes(size))
        self.model = bytearray(self.data)
        self.share = size // CLIENTS // BYTES * BYTES
        self.memory = AxiMemory(
            dut, "axi", self.data, base=base, max_beats=CONFIG.burst_beats, seed=seed, **memory
        )  # fmt: skip
        self.requests = [
            Source(dut, f"client{i}__request", seed=seed + i, stall=client_stall) for i in range(CLIENTS)
        ]  # fmt: skip
        self.words = [
            Source(dut, f"client{i}__data", seed=seed + 9 + i, stall=client_stall) for i in range(CLIENTS)
        ]  # fmt: skip
        self.taken: list[tuple[int, int, int]] = []  # client, address, words: in the order taken
        self.errors = self.fenced_late = 0
        self.kinds = [0] * 8
        cocotb.start_soon(self._watch())

    async def _watch(self) -> None:
        """Record requests, errors and events; check `idle` of every client in every cycle."""
        dut, edge = self.dut, RisingEdge(self.dut.clk)
        requests = [
            [getattr(dut, f"client{i}__request__{name}") for name in ("valid", "ready", "payload")]
            for i in range(CLIENTS)
        ]
        idle, fence, fenced = (
            [getattr(dut, f"client{i}__{name}") for i in range(CLIENTS)] for name in ("idle", "fence", "fenced")
        )
        for signal in fence:
            signal.value = 0
        words = [[getattr(dut, f"client{i}__data__{name}") for name in ("valid", "ready")] for i in range(CLIENTS)]
        words_left = [0] * CLIENTS  # of the requests that were taken
        past = [0] * CLIENTS  # open requests from before the last fence
        unacknowledged: list[tuple[int, int]] = []  # client, whether it is the last burst of its request
        open_requests = [0] * CLIENTS
        while True:
            await edge
            if int(dut.rst.value):
                continue
            for i in range(CLIENTS):
                assert int(idle[i].value) == (open_requests[i] == 0), f"idle of client {i}"
                assert int(fenced[i].value) == (past[i] == 0), f"fenced of client {i}"
                self.fenced_late += past[i] > 0
            if int(dut.axi__bvalid.value) and int(dut.axi__bready.value):
                client, last = unacknowledged.pop(0)
                open_requests[client] -= last
                past[client] = max(0, past[client] - last)
            for i, (valid, ready, payload) in enumerate(requests):
                words_left[i] -= all(int(signal.value) for signal in words[i])
                if int(fence[i].value):
                    past[i] = open_requests[i]
                if int(valid.value) and int(ready.value):
                    request = unpack(REQUEST, int(payload.value))
                    self.taken.append((i, request["address"], request["words"]))
                    bursts = bursts_of(request["address"], request["words"])
                    unacknowledged += [(i, n == len(bursts) - 1) for n in range(len(bursts))]
                    open_requests[i] += 1
                    words_left[i] += request["words"]
                fence[i].value = int(not words_left[i] and self.random.random() < 0.3)
            self.errors += int(dut.error.value)
            events = unpack(EVENTS, int(dut.events.value))
            self.kinds[events["kind"]] += events["beat"]

    def random_requests(self, client: int, count: int, longest: int, partial: float = 0.3) -> list[dict]:
        """Requests inside the client's share of the memory, with their data as (word, strobe)."""
        requests = []
        for _ in range(count):
            words = int(self.random.integers(1, longest + 1))
            first = int(self.random.integers(0, self.share // BYTES - words + 1))
            requests.append({
                "address": self.base + client * self.share + first * BYTES,
                "words": words,
                "kind": int(self.random.integers(8)),
                "data": [
                    (
                        int.from_bytes(self.random.bytes(BYTES), "little"),
                        int.from_bytes(self.random.bytes(BYTES), "little") & FULL
                        if self.random.random() < partial else FULL,
                    )
                    for _ in range(words)
                ],
            })  # fmt: skip
        return requests

    def _model(self, request: dict) -> None:
        place = request["address"] - self.base
        for word, strobe in request["data"]:
            for i in range(BYTES):
                if strobe >> i & 1:
                    self.model[place + i] = word >> 8 * i & 0xFF
            place += BYTES

    async def run(self, requests: list[list[dict]]) -> None:
        """Make the requests (a list a client) and check everything that arrives."""
        tasks = []
        expected_kinds = list(self.kinds)
        for i, some in enumerate(requests):
            tasks.append(cocotb.start_soon(self.requests[i].put([
                pack(REQUEST, {name: request[name] for name in ("address", "words", "kind")}) for request in some
            ])))  # fmt: skip
            tasks.append(cocotb.start_soon(self.words[i].put([
                pack(WORD, {"data": word, "strobe": strobe}) for request in some for word, strobe in request["data"]
            ])))  # fmt: skip
            for request in some:
                self._model(request)
                expected_kinds[request["kind"]] += request["words"]
        for task in tasks:
            await task
        edge = RisingEdge(self.dut.clk)
        while not all(int(getattr(self.dut, f"client{i}__idle").value) for i in range(CLIENTS)):
            await edge
        assert self.memory.idle
        assert self.data == self.model
        await ClockCycles(self.dut.clk, 3)
        assert self.kinds == expected_kinds
        bursts = [burst for _, address, words in self.taken for burst in bursts_of(address, words)]
        assert self.memory.writes == bursts
        assert self.memory.most_writes <= CONFIG.writes_in_flight


async def _random(dut, seed: int, **options) -> Bench:
    bench = Bench(dut, seed=seed, **options)
    await start(dut)
    await bench.run([bench.random_requests(i, 25, 40) for i in range(CLIENTS)])
    return bench


@cocotb.test()
async def stalls_everywhere(dut):
    await _random(dut, 1, stall=0.4, client_stall=0.3, latency=3)


@cocotb.test()
async def slow_clients(dut):
    await _random(dut, 2, client_stall=0.8)


@cocotb.test()
async def slow_memory(dut):
    await _random(dut, 3, stall={"aw": 0.2, "w": 0.7, "b": 0.8}, latency=9)


@cocotb.test()
async def data_before_address(dut):
    bench = await _random(dut, 4, stall={"aw": 0.95})
    assert bench.memory.early_words > 0


@cocotb.test()
async def address_before_data(dut):
    bench = await _random(dut, 5, stall={"w": 0.9})
    assert bench.memory.early_words == 0


@cocotb.test()
async def fences(dut):
    """`fenced` while requests from before a fence are not acknowledged, and those after it are on their way."""
    bench = await _random(dut, 15, latency=60)
    assert bench.fenced_late > 50


@cocotb.test()
async def top_of_the_address_space(dut):
    await _random(dut, 6, stall=0.2, base=(1 << CONFIG.address_bits) - (1 << 16))


@cocotb.test()
async def page_boundaries(dut):
    bench = Bench(dut, seed=7, stall=0.1, size=CLIENTS << 16)
    await start(dut)
    longest = min(CONFIG.burst_beats, 4096 // BYTES)
    requests = []
    for before in {1, 2, longest - 1, longest, min(longest + 1, 4096 // BYTES)}:
        for words in (1, before, before + 1, longest, 3 * longest):
            (request,) = bench.random_requests(0, 1, 1)
            request["address"] = 4096 * len(requests) % 32768 + 4096 - before * BYTES
            request["words"], request["data"] = words, request["data"] * words
            requests.append(request)
    await bench.run([requests] + [[] for _ in range(CLIENTS - 1)])


@cocotb.test()
async def one_word_a_cycle(dut):
    """Without stalls, W has a word in every cycle from the first to the last."""
    bench = Bench(dut, seed=8, latency=2)
    await start(dut)
    edge, gaps, started = RisingEdge(dut.clk), 0, False
    requests = [bench.random_requests(i, 4, 100) for i in range(CLIENTS)]
    total = sum(request["words"] for some in requests for request in some)

    async def watch() -> None:
        nonlocal gaps, started
        seen = 0
        while seen < total:
            await edge
            if int(dut.axi__wvalid.value):
                started, seen = True, seen + 1
            else:
                gaps += started

    task = cocotb.start_soon(watch())
    await bench.run(requests)
    await task
    assert CONFIG.writes_in_flight < 4 or gaps == 0


@cocotb.test()
async def limit_of_outstanding_bursts(dut):
    bench = Bench(dut, seed=9, latency=1500)
    await start(dut)
    requests = bench.random_requests(0, CONFIG.writes_in_flight + 3, 1)
    await bench.run([requests] + [[] for _ in range(CLIENTS - 1)])
    assert bench.memory.most_writes == CONFIG.writes_in_flight


@cocotb.test()
async def clients_take_turns(dut):
    bench = Bench(dut, seed=10)
    await start(dut)
    await bench.run([bench.random_requests(i, 20, 30) for i in range(CLIENTS)])
    order = [client for client, _, _ in bench.taken]
    rounds = order[: 18 * CLIENTS]
    assert all(sorted(rounds[i : i + CLIENTS]) == list(range(CLIENTS)) for i in range(CLIENTS, len(rounds), CLIENTS))


@cocotb.test()
async def error_responses(dut):
    bad = set()
    bench = Bench(dut, seed=11, stall=0.2, client_stall=0.2,
                  fail=lambda address, write: SLVERR if address in bad else OKAY)  # fmt: skip
    await start(dut)
    requests = [bench.random_requests(i, 12, 30) for i in range(CLIENTS)]
    bursts = [burst for some in requests for r in some for burst in bursts_of(r["address"], r["words"])]
    bad.update(int(address) for address, _ in bench.random.choice(bursts, 6))
    await bench.run(requests)
    expected = sum(any(address + i * BYTES in bad for i in range(beats)) for address, beats in bursts)
    assert bench.errors == expected > 0
    bench.errors = 0
    bad.clear()
    await bench.run([bench.random_requests(i, 3, 30) for i in range(CLIENTS)])
    assert bench.errors == 0


@cocotb.test()
async def error_not_after_idle(dut):
    """In the first cycle of `idle`, a last error is visible."""
    bench = Bench(dut, seed=12, fail=lambda address, write: SLVERR)
    await start(dut)
    (request,) = bench.random_requests(0, 1, 1)
    task = cocotb.start_soon(bench.run([[request]] + [[] for _ in range(CLIENTS - 1)]))
    edge = RisingEdge(dut.clk)
    while int(dut.client0__idle.value):
        await edge
    while not int(dut.client0__idle.value):
        assert not int(dut.error.value)
        await edge
    assert int(dut.error.value)
    await task


@cocotb.test()
async def against_cocotbext_axi(dut):
    """An independent AXI slave: its checks and its memory instead of ours."""
    random = rng(13)
    model = bytearray(1 << 14)
    requests = [Source(dut, f"client{i}__request") for i in range(CLIENTS)]
    words = [Source(dut, f"client{i}__data", stall=0.2, seed=i) for i in range(CLIENTS)]
    ram = AxiRamWrite(AxiWriteBus.from_prefix(dut, "axi_"), dut.clk, dut.rst, size=len(model))
    ram.write(0, bytes(model))
    await start(dut)
    for client in range(CLIENTS):
        for _ in range(5):
            count = int(random.integers(1, 50))
            address = int(random.integers(len(model) // BYTES - count)) * BYTES
            content = random.bytes(count * BYTES)
            model[address : address + len(content)] = content
            await requests[client].put(pack(REQUEST, {"address": address, "words": count, "kind": 0}))
            await words[client].put([
                pack(WORD, {"data": int.from_bytes(content[i : i + BYTES], "little"), "strobe": FULL})
                for i in range(0, len(content), BYTES)
            ])  # fmt: skip
        while not int(getattr(dut, f"client{client}__idle").value):
            await RisingEdge(dut.clk)
    assert ram.read(0, len(model)) == bytes(model)
