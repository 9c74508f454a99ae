"""Agents of the testbenches: clock and reset, stream source and sink with random stalls, bit-field packing.

Stream ports of a block are `<name>__payload`, `<name>__valid`, `<name>__ready`; struct payloads are one vector, which
`pack()` and `unpack()` translate by the same Amaranth layouts that the hardware uses.
"""

from collections.abc import Iterable, Iterator
from random import Random
from typing import Any

import cocotb
from amaranth.lib import data
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge

__all__ = ["Sink", "Source", "pack", "start", "unpack"]


async def start(dut, cycles: int = 3) -> None:
    """Start the clock and reset the block; every input must already have a value or get one from an agent."""
    cocotb.start_soon(Clock(dut.clk, 10, "ns").start())
    dut.rst.value = 1
    for _ in range(cycles):
        await RisingEdge(dut.clk)
    dut.rst.value = 0
    await RisingEdge(dut.clk)


def pack(layout, value) -> int:
    """The bits of `value` (nested dicts and sequences of ints) in an Amaranth `layout`."""
    if isinstance(layout, data.Layout):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        word = 0
        for key, item in items:
            place = layout[key]
            word |= pack(place.shape, item) << place.offset
        return word
    width = layout if isinstance(layout, int) else layout.width
    return int(value) & ((1 << width) - 1)


def unpack(layout, word: int) -> Any:
    """Nested dicts and lists of the (unsigned) fields in `word`; inverse of `pack`."""
    if isinstance(layout, data.ArrayLayout):
        width = layout.elem_shape if isinstance(layout.elem_shape, int) else layout.elem_shape.size
        return [unpack(layout.elem_shape, (word >> (i * width)) & ((1 << width) - 1)) for i in range(layout.length)]
    if isinstance(layout, data.Layout):
        return {key: unpack(place.shape, (word >> place.offset) & ((1 << place.width) - 1)) for key, place in layout}
    return word


class Source:
    """Drives a stream into the block; stalls at random with probability `stall` before each transfer."""

    def __init__(self, dut, name: str, *, seed: int = 0, stall: float = 0.0) -> None:
        self._payload = getattr(dut, f"{name}__payload")
        self._valid = getattr(dut, f"{name}__valid")
        self._ready = getattr(dut, f"{name}__ready")
        self._edge = RisingEdge(dut.clk)
        self._random = Random(seed)
        self.stall = stall
        self._valid.value = 0
        self._payload.value = 0

    async def put(self, words: int | Iterable[int]) -> None:
        """Send one word or several; returns when the last has been taken."""
        for word in (words,) if isinstance(words, int) else words:
            while self._random.random() < self.stall:
                await self._edge
            self._payload.value = word
            self._valid.value = 1
            await self._edge
            while not int(self._ready.value):
                await self._edge
            self._valid.value = 0


class Sink:
    """Takes a stream from the block into `words`; is unready at random with probability `stall` in each cycle."""

    def __init__(self, dut, name: str, *, seed: int = 0, stall: float = 0.0) -> None:
        self._payload = getattr(dut, f"{name}__payload")
        self._valid = getattr(dut, f"{name}__valid")
        self._ready = getattr(dut, f"{name}__ready")
        self._edge = RisingEdge(dut.clk)
        self._random = Random(seed)
        self.stall = stall
        self.words: list[int] = []
        self._ready.value = 0
        cocotb.start_soon(self._run())

    async def _run(self) -> None:
        while True:
            ready = self._random.random() >= self.stall
            self._ready.value = int(ready)
            await self._edge
            if ready and int(self._valid.value):
                self.words.append(int(self._payload.value))

    async def get(self, count: int, timeout: int = 100_000) -> list[int]:
        """Wait until `count` words have come and remove them; `TimeoutError` after `timeout` cycles."""
        for _ in range(timeout):
            if len(self.words) >= count:
                taken, self.words[:count] = self.words[:count], []
                return taken
            await self._edge
        raise TimeoutError(f"{len(self.words)} of {count} words after {timeout} cycles")

    def __iter__(self) -> Iterator[int]:
        return iter(self.words)
