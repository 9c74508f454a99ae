"""AXI agents of the testbenches: a memory behind an AXI4 master, with protocol checks, and an AXI4-Lite master.

Both look at the signals once a clock edge in one coroutine and touch as few of them as possible, so that they are fast
enough for runs of the whole chip.
"""

from collections import deque
from collections.abc import Callable
from random import Random

import cocotb
from cocotb.triggers import RisingEdge

__all__ = ["DECERR", "OKAY", "SLVERR", "AxiLiteDriver", "AxiMemory"]

OKAY, SLVERR, DECERR = 0, 2, 3

_CHANNELS = ("ar", "r", "aw", "w", "b")


class _Stable:
    """Checks that a channel driven by the block keeps VALID and payload until READY."""

    def __init__(self, name: str, signals: dict) -> None:
        self.name, self.signals = name, signals
        self._waiting: tuple | None = None

    def check(self, valid: int, ready: int) -> dict[str, int] | None:
        """The payload if there is a transfer in this cycle."""
        if not valid:
            assert self._waiting is None, f"{self.name}: VALID fell before READY"
            return None
        values = tuple(int(signal.value) for signal in self.signals.values())
        assert self._waiting in (None, values), f"{self.name}: payload changed before READY"
        self._waiting = None if ready else values
        return dict(zip(self.signals, values, strict=True)) if ready else None


class AxiMemory:
    """Memory behind the AXI4 port `prefix` of `dut`: read channels, write channels or both, whichever the port has.

    Addresses outside `data` are answered with DECERR. Every burst that the block issues is checked: INCR, whole words,
    aligned, not across 4 KiB, not longer than `max_beats`, payload and VALID stable until READY, WLAST in the right
    place, ID 0. A violation fails the test.

    Parameters
    ----------
    dut
        Block under test, with a clock `clk` and a reset `rst`.
    prefix : str
        Name of the port: signals are `<prefix>__arvalid` and so on.
    data : bytearray
        Contents, from byte address `base`. Written in place.
    stall : float or dict
        Probability that a channel does nothing in a cycle: one for all, or by channel ("ar", "r", "aw", "w", "b").
    latency : int
        Cycles from a request (the last word of a write) to its first response, at least.
    base : int
        Byte address of `data[0]`.
    fail : callable or None
        ``fail(address, write)`` returns the response for the word (write: the burst) at this address: `OKAY` or not.
    max_beats : int
        Longest burst that is allowed.
    seed : int
        Of the stalls.

    Attributes
    ----------
    reads, writes : list of (address, beats)
        Bursts, in the order in which their addresses were taken.
    read_beats, write_beats : int
        Words transferred.
    most_reads, most_writes : int
        Most bursts that were outstanding at a time.
    early_words : int
        Words of write bursts that were taken before the burst's address.
    """

    def __init__(
        self,
        dut,
        prefix: str,
        data: bytearray,
        *,
        stall: float | dict[str, float] = 0.0,
        latency: int = 1,
        base: int = 0,
        fail: Callable[[int, bool], int] | None = None,
        max_beats: int = 256,
        seed: int = 0,
    ) -> None:
        self.data, self.base, self.latency, self.fail, self.max_beats = data, base, latency, fail, max_beats
        self.stall = dict.fromkeys(_CHANNELS, stall) if isinstance(stall, int | float) else dict(stall)
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        self.read_beats = self.write_beats = self.most_reads = self.most_writes = self.early_words = 0
        self._random = Random(seed)
        self._edge = RisingEdge(dut.clk)
        self._reset = dut.rst
        self._time = 0

        def signal(name: str):
            return getattr(dut, f"{prefix}__{name}", None)

        self._has_read, self._has_write = signal("arvalid") is not None, signal("awvalid") is not None
        if not (self._has_read or self._has_write):
            raise ValueError(f"no AXI port {prefix!r}")
        if self._has_read:
            self._arvalid, self._arready = signal("arvalid"), signal("arready")
            self._rvalid, self._rready, self._rdata = signal("rvalid"), signal("rready"), signal("rdata")
            self._rresp, self._rlast = signal("rresp"), signal("rlast")
            self._bytes = len(self._rdata) // 8
            self._ar = _Stable("AR", {name: signal(f"ar{name}") for name in ("addr", "len", "size", "burst", "id")})
            self._read_queue: deque[tuple[int, int, int]] = deque()  # address, beats left, earliest time
            self._ar_was_ready = self._r_was_valid = False
            for idle in (self._arready, self._rvalid, self._rdata, self._rresp, self._rlast, signal("rid")):
                idle.value = 0
        if self._has_write:
            self._awvalid, self._awready = signal("awvalid"), signal("awready")
            self._wvalid, self._wready = signal("wvalid"), signal("wready")
            self._bvalid, self._bready, self._bresp = signal("bvalid"), signal("bready"), signal("bresp")
            self._bytes = len(signal("wdata")) // 8
            self._aw = _Stable("AW", {name: signal(f"aw{name}") for name in ("addr", "len", "size", "burst", "id")})
            self._w = _Stable("W", {name: signal(f"w{name}") for name in ("data", "strb", "last")})
            self._write_queue: deque[tuple[int, int]] = deque()  # address, beats: whose data are not complete
            self._word_queue: deque[tuple[int, int, int]] = deque()  # data, strobe, last
            self._answer_queue: deque[tuple[int, int]] = deque()  # response, earliest time
            self._write_done = 0  # words of the first burst in the queue
            self._write_response = OKAY
            self._aw_was_ready = self._w_was_ready = self._b_was_valid = False
            for idle in (self._awready, self._wready, self._bvalid, self._bresp, signal("bid")):
                idle.value = 0
        cocotb.start_soon(self._run())

    @property
    def idle(self) -> bool:
        """No burst is outstanding."""
        return not (
            (self._has_read and self._read_queue)
            or (self._has_write and (self._write_queue or self._word_queue or self._answer_queue))
        )

    def _go(self, channel: str) -> bool:
        stall = self.stall.get(channel, 0.0)
        return not stall or self._random.random() >= stall

    def _inside(self, address: int) -> bool:
        return 0 <= address - self.base <= len(self.data) - self._bytes

    def _respond(self, address: int, write: bool) -> int:
        if not self._inside(address):
            return DECERR
        return self.fail(address, write) if self.fail else OKAY

    def _check_burst(self, name: str, burst: dict[str, int]) -> tuple[int, int]:
        address, beats = burst["addr"], burst["len"] + 1
        what = f"{name} burst of {beats} words at {address:#x}"
        assert burst["burst"] == 1, f"{what}: not INCR"
        assert 1 << burst["size"] == self._bytes, f"{what}: not of whole words"
        assert burst["id"] == 0, f"{what}: ID is not 0"
        assert address % self._bytes == 0, f"{what}: not aligned"
        assert beats <= self.max_beats, f"{what}: longer than {self.max_beats}"
        assert address // 4096 == (address + beats * self._bytes - 1) // 4096, f"{what}: crosses 4 KiB"
        return address, beats

    async def _run(self) -> None:
        while True:
            await self._edge
            self._time += 1
            if int(self._reset.value):
                continue
            if self._has_read:
                self._read_cycle()
            if self._has_write:
                self._write_cycle()

    def _read_cycle(self) -> None:
        queue = self._read_queue
        if self._r_was_valid and int(self._rready.value):
            self._r_was_valid = False
            self.read_beats += 1
            address, left, _ = queue.popleft()
            if left > 1:
                queue.appendleft((address + self._bytes, left - 1, self._time))
        burst = self._ar.check(int(self._arvalid.value), self._ar_was_ready)
        if burst is not None:
            address, beats = self._check_burst("read", burst)
            self.reads.append((address, beats))
            queue.append((address, beats, self._time + self.latency - 1))
            self.most_reads = max(self.most_reads, len(queue))

        ready = self._go("ar")
        if ready != self._ar_was_ready:
            self._arready.value = int(ready)
            self._ar_was_ready = ready
        if not self._r_was_valid:
            valid = bool(queue) and self._time >= queue[0][2] and self._go("r")
            self._rvalid.value = int(valid)
            self._r_was_valid = valid
            if valid:
                address, left, _ = queue[0]
                response = self._respond(address, False)
                start = address - self.base
                word = self.data[start : start + self._bytes] if self._inside(address) else b""
                self._rdata.value = int.from_bytes(word, "little")
                self._rresp.value = response
                self._rlast.value = int(left == 1)

    def _write_cycle(self) -> None:
        if self._b_was_valid and int(self._bready.value):
            self._b_was_valid = False
            self._answer_queue.popleft()
        burst = self._aw.check(int(self._awvalid.value), self._aw_was_ready)
        if burst is not None:
            address, beats = self._check_burst("write", burst)
            self.writes.append((address, beats))
            self._write_queue.append((address, beats))
            self.most_writes = max(self.most_writes, len(self._write_queue) + len(self._answer_queue))
        word = self._w.check(int(self._wvalid.value), self._w_was_ready)
        if word is not None:
            self._word_queue.append((word["data"], word["strb"], word["last"]))
            self.write_beats += 1
            self.early_words += not self._write_queue
        while self._write_queue and self._word_queue:
            self._store(*self._word_queue.popleft())

        for channel, ready_signal in (("aw", self._awready), ("w", self._wready)):
            ready = self._go(channel)
            if ready != getattr(self, f"_{channel}_was_ready"):
                ready_signal.value = int(ready)
                setattr(self, f"_{channel}_was_ready", ready)
        if not self._b_was_valid:
            valid = bool(self._answer_queue) and self._time >= self._answer_queue[0][1] and self._go("b")
            self._bvalid.value = int(valid)
            self._b_was_valid = valid
            if valid:
                self._bresp.value = self._answer_queue[0][0]

    def _store(self, word: int, strobe: int, last: int) -> None:
        address, beats = self._write_queue[0]
        place = address + self._write_done * self._bytes
        response = self._respond(place, True)
        self._write_response = max(self._write_response, response)
        if self._inside(place):
            raw, start = word.to_bytes(self._bytes, "little"), place - self.base
            if strobe == (1 << self._bytes) - 1:
                self.data[start : start + self._bytes] = raw
            else:
                for i in range(self._bytes):
                    if strobe >> i & 1:
                        self.data[start + i] = raw[i]
        self._write_done += 1
        assert last == (self._write_done == beats), f"WLAST is {last} on word {self._write_done} of {beats}"
        if last:
            self._write_queue.popleft()
            self._answer_queue.append((self._write_response, self._time + self.latency - 1))
            self._write_done, self._write_response = 0, OKAY


class AxiLiteDriver:
    """AXI4-Lite master on the port `prefix` of `dut`; checks that responses are stable until they are taken.

    Parameters
    ----------
    dut
        Block under test, with a clock `clk`.
    prefix : str
        Name of the port: signals are `<prefix>__arvalid` and so on.
    stall : float
        Probability of waiting one more cycle before each VALID and each READY of the master.
    seed : int
        Of the stalls.
    """

    def __init__(self, dut, prefix: str, *, stall: float = 0.0, seed: int = 0) -> None:
        self._edge = RisingEdge(dut.clk)
        self._random = Random(seed)
        self.stall = stall
        names = (
            "awvalid awready awaddr awprot wvalid wready wdata wstrb bvalid bready bresp "
            "arvalid arready araddr arprot rvalid rready rdata rresp"
        )
        self._signals = {name: getattr(dut, f"{prefix}__{name}") for name in names.split()}
        for name in ("awvalid", "awaddr", "awprot", "wvalid", "wdata", "wstrb", "bready"):
            self._signals[name].value = 0
        for name in ("arvalid", "araddr", "arprot", "rready"):
            self._signals[name].value = 0

    def _read(self, name: str) -> int:
        return int(self._signals[name].value)

    async def _pause(self) -> None:
        while self._random.random() < self.stall:
            await self._edge

    async def _send(self, channel: str, delay: int = 0, **payload: int) -> None:
        for _ in range(delay):
            await self._edge
        await self._pause()
        for name, value in payload.items():
            self._signals[name].value = value
        self._signals[f"{channel}valid"].value = 1
        await self._edge
        while not self._read(f"{channel}ready"):
            await self._edge
        self._signals[f"{channel}valid"].value = 0

    async def _receive(self, channel: str, *names: str) -> list[int]:
        await self._pause()
        seen = None
        while True:  # READY comes a while after VALID, or before it
            ready = self._random.random() >= self.stall
            self._signals[f"{channel}ready"].value = int(ready)
            await self._edge
            if self._read(f"{channel}valid"):
                values = [self._read(name) for name in names]
                assert seen in (None, values), f"{channel}: response changed before READY"
                seen = values
                if ready:
                    self._signals[f"{channel}ready"].value = 0
                    return values
            else:
                assert seen is None, f"{channel}: VALID fell before READY"

    async def write(self, address: int, value: int, strobe: int = 0xF, *, skew: int = 0) -> int:
        """Write a word; return the response. `skew` cycles pass from address to data (from data to address if < 0)."""
        parts = [
            cocotb.start_soon(self._send("aw", max(0, -skew), awaddr=address)),
            cocotb.start_soon(self._send("w", max(0, skew), wdata=value, wstrb=strobe)),
        ]
        (response,) = await self._receive("b", "bresp")
        for part in parts:
            await part
        return response

    async def read(self, address: int) -> tuple[int, int]:
        """Read a word; return it and the response."""
        part = cocotb.start_soon(self._send("ar", araddr=address))
        value, response = await self._receive("r", "rdata", "rresp")
        await part
        return value, response
