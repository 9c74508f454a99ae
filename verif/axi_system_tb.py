"""Testbench of the example system's interconnect and RAM: two masters at random, every channel stalled.

A master writes and reads only where the other one does not, in regions of 256 bytes that alternate, and in none that a
burst of its own still uses; so what a region holds is known from the order of its master's writes.
Responses must come in the order of a master's requests; what the interconnect offers the RAM stays until it is taken.
"""

from collections import deque
from itertools import pairwise

import cocotb
from cocotb.triggers import RisingEdge

from verif.agents import start
from verif.runner import parameters, rng

BYTES, REGION, OKAY, DECERR = 8, 256, 0, 3
REQUESTS = {
    "ar": {"addr": 32, "len": 8, "id": 1},
    "aw": {"addr": 32, "len": 8, "id": 1},
    "w": {"data": 64, "strb": 8, "last": 1},
}
SLAVE_FIELDS = {"ar": ("addr", "len", "id"), "aw": ("addr", "id"), "w": ("data", "strb", "last")}


class Master:
    """Random bursts of one master, and what they must give.

    Attributes
    ----------
    memory : bytearray
        What is in the RAM, as far as this master wrote it.
    finished : int
        Bursts whose last response came.
    """

    def __init__(self, bench: "Bench", number: int, bursts: int) -> None:
        self.bench, self.number, self.left, self.random = bench, number, bursts, bench.random
        self.memory = bench.memory
        self.queues = {channel: deque() for channel in REQUESTS}
        self.offered: dict[str, dict | None] = dict.fromkeys(REQUESTS)
        self.reads: deque[list[int]] = deque()  # ID, address, beats, beats seen
        self.writes: deque[tuple[int, int, int]] = deque()  # ID, response, region
        self.busy: set[int] = set()  # regions that are being written
        self.finished = self.errors = 0

    def plan(self) -> None:
        """Begin one more burst, if there is room for it."""
        random = self.random
        if not self.left or len(self.reads) + len(self.writes) >= self.bench.most or random.random() < 0.3:
            return
        outside = random.random() < 0.1
        region = 2 * int(random.integers(self.bench.size // REGION // 2)) + self.number
        if region in self.busy:
            return
        first = int(random.integers(REGION // BYTES))
        beats = int(random.choice([1, 2, int(random.integers(1, REGION // BYTES - first + 1))]))
        beats = min(beats, REGION // BYTES - first)
        address = region * REGION + first * BYTES
        if outside:
            address |= 1 << int(random.integers(self.bench.size.bit_length() - 1, 32))
        name = int(random.integers(2))
        self.left -= 1
        if random.random() < 0.5:
            self.queues["ar"].append({"addr": address, "len": beats - 1, "id": name})
            self.reads.append([name, address, beats, 0])
            self.busy.add(region)  # nothing is written there meanwhile
            return
        self.busy.add(region)
        self.queues["aw"].append({"addr": address, "len": beats - 1, "id": name})
        self.writes.append((name, DECERR if outside else OKAY, region))
        for beat in range(beats):
            data, strobe = random.bytes(BYTES), int(random.integers(256))
            self.queues["w"].append(
                {"data": int.from_bytes(data, "little"), "strb": strobe, "last": int(beat == beats - 1)}
            )
            if not outside:
                for byte in range(BYTES):
                    if strobe >> byte & 1:
                        self.memory[address + beat * BYTES + byte] = data[byte]

    def read_beat(self, data: int, response: int, last: int, name: int) -> None:
        assert self.reads, f"master {self.number}: a word that nobody asked for"
        expected = self.reads[0]
        wanted, address, beats, seen = expected
        assert name == wanted, f"master {self.number}: read ID {name}, not {wanted}"
        assert last == (seen == beats - 1), f"master {self.number}: RLAST {last} with word {seen} of {beats}"
        outside = address >= self.bench.size
        assert response == (DECERR if outside else OKAY), f"master {self.number}: response {response} at {address:#x}"
        at = address + seen * BYTES
        if not outside:
            kept = int.from_bytes(self.memory[at : at + BYTES], "little")
            assert data == kept, f"master {self.number}: {data:#x} at {at:#x}, not {kept:#x}"
        expected[3] += 1
        if last:
            self.reads.popleft()
            self.busy.discard((address % self.bench.size) // REGION)
            self.done(outside)

    def write_response(self, response: int, name: int) -> None:
        assert self.writes, f"master {self.number}: a write response that nobody waits for"
        wanted, expected, region = self.writes.popleft()
        assert (name, response) == (wanted, expected), f"master {self.number}: {(name, response)}"
        self.busy.discard(region)
        self.done(expected == DECERR)

    def done(self, outside: bool) -> None:
        self.finished += 1
        self.errors += outside


class Bench:
    """Both masters; the slave's gates.

    `stall`: probability that a channel rests in a cycle, by channel of the masters (`ar`), of the slave (`slave_ar`).
    """

    def __init__(self, dut, seed: int, *, bursts: tuple[int, int], stall: dict[str, float], most: int = 6) -> None:
        self.dut, self.random, self.stall, self.most = dut, rng(seed), stall, most
        self.size = 1 << parameters()["log2_bytes"]
        self.memory = bytearray(self.size)
        self.waiting: dict[str, tuple[int, ...]] = {}
        self.masters = [Master(self, number, count) for number, count in enumerate(bursts)]

    def rests(self, channel: str) -> bool:
        return self.random.random() < self.stall.get(channel, 0.0)

    def check_stable(self, channel: str) -> None:
        """What the interconnect offers the RAM does not change before it is taken."""
        dut = self.dut
        before = self.waiting.pop(channel, None)
        valid = int(getattr(dut, f"s_{channel}valid").value)
        if before is not None:
            assert valid, f"{channel}: VALID fell before READY"
        if not valid:
            return
        payload = tuple(int(getattr(dut, f"s_{channel}{field}").value) for field in SLAVE_FIELDS[channel])
        assert before in (None, payload), f"{channel}: payload changed before READY"
        if not (int(getattr(dut, f"s_{channel}ready").value) and int(getattr(dut, f"slave_{channel}go").value)):
            self.waiting[channel] = payload

    async def fill(self) -> None:
        """Known contents everywhere: write all regions once, by the masters that own them."""
        for master in self.masters:
            for region in range(master.number, self.size // REGION, 2):
                master.queues["aw"].append({"addr": region * REGION, "len": REGION // BYTES - 1, "id": 0})
                master.writes.append((0, OKAY, region))
                master.busy.add(region)
                for beat in range(REGION // BYTES):
                    data = self.random.bytes(BYTES)
                    at = region * REGION + beat * BYTES
                    self.memory[at : at + BYTES] = data
                    master.queues["w"].append(
                        {"data": int.from_bytes(data, "little"), "strb": 255, "last": int(beat == REGION // BYTES - 1)}
                    )

    async def run(self, limit: int = 200_000) -> int:
        """Until everything is answered; cycles."""
        dut = self.dut
        edge = RisingEdge(dut.clk)
        driven = dict.fromkeys(REQUESTS)
        for cycle in range(limit):
            for master in self.masters:
                master.plan()
                for channel, queue in master.queues.items():
                    if master.offered[channel] is None and queue and not self.rests(channel):
                        master.offered[channel] = queue.popleft()
            for channel, fields in REQUESTS.items():
                offers = [master.offered[channel] for master in self.masters]
                if driven[channel] != offers:
                    driven[channel] = offers
                    getattr(dut, f"m_{channel}valid").value = sum(
                        (offer is not None) << n for n, offer in enumerate(offers)
                    )
                    for field, width in fields.items():
                        getattr(dut, f"m_{channel}{field}").value = sum(
                            ((offer or {}).get(field, 0)) << n * width for n, offer in enumerate(offers)
                        )
            ready = {channel: sum((not self.rests(channel)) << number for number in range(2)) for channel in ("r", "b")}
            for channel, value in ready.items():
                getattr(dut, f"m_{channel}ready").value = value
            for channel in ("ar", "aw", "w", "r", "b"):
                getattr(dut, f"slave_{channel}go").value = int(not self.rests(f"slave_{channel}"))
            await edge
            for channel in REQUESTS:
                taken = int(getattr(dut, f"m_{channel}ready").value)
                for master in self.masters:
                    if master.offered[channel] is not None and taken >> master.number & 1:
                        master.offered[channel] = None
                self.check_stable(channel)
            valid = int(dut.m_rvalid.value)
            assert valid != 3, "a word for both masters"
            for master in self.masters:
                if valid & ready["r"] & 1 << master.number:
                    master.read_beat(
                        *(int(getattr(dut, f"m_r{field}").value) for field in ("data", "resp", "last", "id"))
                    )
            valid = int(dut.m_bvalid.value)
            assert valid != 3, "a response for both masters"
            for master in self.masters:
                if valid & ready["b"] & 1 << master.number:
                    master.write_response(int(dut.m_bresp.value), int(dut.m_bid.value))
            if not any(master.left or master.reads or master.writes for master in self.masters):
                return cycle
        raise AssertionError(f"not all was answered: {[(m.left, len(m.reads), len(m.writes)) for m in self.masters]}")


async def prepare(dut, seed: int, **options) -> Bench:
    bench = Bench(dut, seed, **options)
    for channel, fields in REQUESTS.items():
        for name in ("valid", *fields):
            getattr(dut, f"m_{channel}{name}").value = 0
    for name in ("m_rready", "m_bready", *(f"slave_{channel}go" for channel in ("ar", "aw", "w", "r", "b"))):
        getattr(dut, name).value = 0
    await start(dut)
    await bench.fill()
    return bench


EVERY = ("ar", "aw", "w", "r", "b", *(f"slave_{channel}" for channel in ("ar", "aw", "w", "r", "b")))


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.3, 0.8])
async def both_masters(dut, stall):
    """Interleaved bursts of both, all channels stalled alike."""
    bench = await prepare(dut, 10, bursts=(250, 250), stall=dict.fromkeys(EVERY, stall))
    await bench.run()
    assert [master.finished for master in bench.masters] == [250 + bench.size // REGION // 2] * 2
    assert all(master.errors > 10 for master in bench.masters)


@cocotb.test()
@cocotb.parametrize(channel=EVERY)
async def one_channel(dut, channel):
    """One channel is slow, the others are not."""
    bench = await prepare(dut, 20, bursts=(150, 150), stall={channel: 0.85})
    await bench.run()


@cocotb.test()
async def one_master(dut):
    """The other one is silent."""
    for number in range(2):
        bursts = (200, 0) if number == 0 else (0, 200)
        bench = await prepare(dut, 30 + number, bursts=bursts, stall=dict.fromkeys(EVERY, 0.2))
        await bench.run()
        assert bench.masters[number].finished == 200 + bench.size // REGION // 2


@cocotb.test()
async def many_writes(dut):
    """More writes granted than the interconnect remembers, whose data come late."""
    bench = await prepare(dut, 40, bursts=(300, 300), stall={"w": 0.9, "slave_b": 0.5}, most=40)
    await bench.run()


@cocotb.test()
async def both_get_their_turn(dut):
    """With both always asking, neither gets more than one address ahead of the other."""
    bench = await prepare(dut, 50, bursts=(0, 0), stall={})
    await bench.run()
    for master in bench.masters:
        for _ in range(200):
            master.queues["ar"].append({"addr": master.number * REGION, "len": 0, "id": 0})
            master.reads.append([0, master.number * REGION, 1, 0])
    counts: list[int] = []

    async def watch():
        while True:
            await RisingEdge(dut.clk)
            taken = int(dut.m_arready.value) & int(dut.m_arvalid.value)
            counts.extend(number for number in range(2) if taken >> number & 1)

    task = cocotb.start_soon(watch())
    await bench.run()
    task.cancel()
    assert len(counts) == 400
    assert all(first != second for first, second in pairwise(counts[:399]))
