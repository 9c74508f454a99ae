"""Testbench of the aligner: blocks at any byte of a memory of random bytes, their words by the rule of LOAD."""

import cocotb
from cocotb.triggers import RisingEdge, with_timeout
from cocotb.utils import get_sim_time

from lnpu.config import ChipConfig
from lnpu.fgmp.decoder import decoder_input
from lnpu.mem.aligner import aligned_block
from verif.agents import Sink, Source, pack, start, unpack
from verif.runner import parameters, rng

CLOCK = 10  # ns


class Bench:
    def __init__(self, dut, seed: int) -> None:
        self.dut = dut
        self.config = ChipConfig(**parameters()["config"])
        self.word = self.config.axi_bits // 8
        self.random = rng(seed)
        self.blocks = Source(dut, "block", seed=seed + 1)
        self.words = Source(dut, "word", seed=seed + 2)
        self.sink = Sink(dut, "o", seed=seed + 3)
        self.memory = self.random.bytes(1 << 14)
        self.i_layout, self.o_layout = aligned_block(self.config), decoder_input(self.config)

    async def start(self):
        await start(self.dut)
        return self

    def plan(self, places: list[tuple[int, int]]):
        """Descriptors, words and output [(bytes that count, last, length)] of blocks [(address, length)]."""
        descriptors, words, wanted, last = [], [], [], None
        for address, length in places:
            touched = sorted({byte // self.word for byte in range(address, address + length)})
            kept = bool(touched) and touched[0] == last
            descriptors.append(pack(self.i_layout, {"length": length, "shift": address % self.word, "kept": kept}))
            if not length:
                wanted.append((bytes(self.word), True, 0))
                continue
            last = touched[-1]
            words += touched[kept:]
            raw = self.memory[address : address + length]
            parts = [raw[k : k + self.word] for k in range(0, length, self.word)]
            wanted += [(part, part is parts[-1], length) for part in parts]
        memory = [self.memory[word * self.word : (word + 1) * self.word] for word in words]
        return descriptors, [int.from_bytes(raw, "little") for raw in memory], wanted

    def random_places(self, count: int) -> list[tuple[int, int]]:
        """Blocks of all kinds: behind the one before, anywhere, again, without length; long and short ones."""
        random, places, end, previous = self.random, [], 0, (0, 1)
        follow, absent = random.choice([0, 0.5, 0.9, 1]), random.choice([0, 0.2])
        longest = random.choice([2, 20, 145])
        for _ in range(count):
            length = int(random.integers(1, longest + 1)) if random.random() < 0.9 else 145
            if random.random() < absent:
                places.append((int(random.integers(self.word)), 0))
                continue
            if random.random() >= follow or end > len(self.memory) - 512:
                end = int(random.integers(len(self.memory) - 512))
                if random.random() < 0.3:
                    end &= -self.word
            previous = (end, length) if random.random() < 0.9 else previous
            end = sum(previous)
            places.append(previous)
        return places

    async def check(self, places, stalls=(0.0, 0.0, 0.0)) -> int:
        """Send everything, compare every word; returns the cycles from the first block to the last word out."""
        descriptors, words, wanted = self.plan(places)
        self.blocks.stall, self.words.stall, self.sink.stall = stalls
        since = get_sim_time("ns")
        sending = [cocotb.start_soon(self.blocks.put(descriptors)), cocotb.start_soon(self.words.put(words))]
        got = [unpack(self.o_layout, word) for word in await self.sink.get(len(wanted), 40 * len(wanted) + 1000)]
        cycles = round((get_sim_time("ns") - since) / CLOCK)
        for task in sending:
            await with_timeout(task, 1000 * CLOCK, "ns")
        for _ in range(8):
            await RisingEdge(self.dut.clk)
        assert not self.sink.words, "more words than blocks have"
        for number, (word, (raw, last, length)) in enumerate(zip(got, wanted, strict=True)):
            actual = word["data"].to_bytes(self.word, "little")[: len(raw)], bool(word["last"]), word["length"]
            assert actual == (raw, last, length), f"word {number}: {actual}, not {(raw, last, length)}"
        return cycles


@cocotb.test()
async def every_shift(dut):
    """Each shift with each length, alone and with the next block behind."""
    bench = await Bench(dut, 10).start()
    for shift in range(bench.word):
        places = []
        for length in range(1, 146):
            at = 512 * (length % 8) + shift
            places += [(at, length), (at + length, 1 + (length * 7) % 145)]
        await bench.check(places)


@cocotb.test()
async def random_blocks(dut):
    """Random blocks with random stalls of all three ports."""
    bench = await Bench(dut, 20).start()
    for number in range(120):
        stalls = [float(bench.random.choice([0, 0, 0.3, 0.8])) for _ in range(3)]
        await bench.check(bench.random_places(60), stalls if number % 4 else (0.0, 0.0, 0.0))


@cocotb.test()
async def throughput(dut):
    """A block of n words that gives k takes max(n, k) cycles, whatever is before; 4 cycles for all."""
    bench = await Bench(dut, 30).start()
    random = bench.random
    for name, gap, length in (
        ("contiguous", 0, None), ("contiguous, 129 bytes", 0, 129), ("contiguous, 65 bytes", 0, 65),
        ("contiguous, 1 byte", 0, 1), ("slots of 160 bytes", 160, 129), ("a gap behind each", 77, None),
    ):  # fmt: skip
        places, at = [], 0
        while at < len(bench.memory) - 512:
            places.append((at, length or int(random.integers(1, 146))))
            at = at + gap if gap == 160 else at + places[-1][1] + gap
        cycles, words, last = 0, 0, None
        for address, size in places:
            first, final = address // bench.word, (address + size - 1) // bench.word
            inputs, outputs = final - first + (first != last), -(-size // bench.word)
            cycles, words, last = cycles + max(inputs, outputs), words + outputs, final
        measured = await bench.check(places)
        dut._log.info(
            f"aligner {bench.config.axi_bits} bits, {name}: {measured} cycles, {cycles} by the rule, {words} words out"
        )
        assert measured <= cycles + 4, f"{name}: {measured} cycles, not {cycles}"
