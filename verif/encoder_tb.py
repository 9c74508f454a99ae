"""Encoder: packed blocks of every mode against a model of the memory format, with stalls; throughput; statistics."""

from itertools import pairwise

import cocotb
import numpy as np
from cocotb.triggers import ClockCycles, RisingEdge
from cocotb.utils import get_sim_time

from lnpu.config import BLOCK, ChipConfig
from lnpu.fgmp.encoder import block_place, block_size, encoder_events
from verif.agents import Sink, Source, pack, start, unpack
from verif.quantizer_tb import reference
from verif.runner import parameters, rng

HALF_LO, HALF_HI = 0x2000, 0x5C00  # 2^-7 to 256: these become FP8
PERIOD = 10


def encode_block(v: np.ndarray, policy: tuple[int, int, int, int]) -> bytes:
    """The used bytes of the encoded block of 64 FP16 patterns (independent of the golden model)."""
    codes, payload, value, _ = reference(v, *policy)
    present = codes != 0
    wide = codes[present] == 3
    nonzero = 2 if not present.any() else 0 if present.all() else 1
    precision = 0 if not wide.any() else 1 if wide.all() else 2
    if precision == 2 and wide.sum() < -(-len(wide) // 8):
        precision = 3
    out = bytearray([nonzero | precision << 2 | 0xA0])
    if nonzero == 1:
        out += np.packbits(present, bitorder="little").tobytes()
    if precision == 2:
        out += np.packbits(wide, bitorder="little").tobytes()
    if precision == 3:
        out += bytes(np.flatnonzero(wide).tolist())
        out[-1] |= 0x80
    for code, byte, half in zip(codes, payload, value, strict=True):
        if code == 2:
            out.append(int(byte))
        elif code == 3:
            out += int(half).to_bytes(2, "little")
    return bytes(out)


def head_of(block: bytes) -> int:
    """Bytes of an encoded block before its payloads."""
    if block[0] & 3 == 2:
        return 1
    mask = block[1:9] if block[0] & 3 == 1 else bytes([255] * 8)
    count = int.from_bytes(mask, "little").bit_count()
    start, precision = 1 + 8 * (block[0] & 3 == 1), block[0] >> 2 & 3
    if precision == 3:
        return start + next(k for k, byte in enumerate(block[start:], start=1) if byte & 0x80)
    return start + (-(-count // 8) if precision == 2 else 0)


def placed(blocks: list[bytes], flushes: list[bool], step: int) -> list[dict]:
    """The `block_place` of each encoded block, and the `cycles` that its words take at most."""
    places, start = [], 0
    for block, flush in zip(blocks, flushes, strict=True):
        head, end = head_of(block), start + len(block)
        words = -(-end // step) if flush else end // step
        spent = max(1, (start + head) // step + -(-(len(block) - head) // step))
        cycles = words if flush else spent
        assert words <= cycles <= words + 1
        places.append({"start": start, "payload": start + head, "words": words, "flush": flush, "cycles": cycles})
        start = 0 if flush else end % step
    return places


def make_block(random: np.random.Generator, zeros: float, wide: float) -> np.ndarray:
    """64 FP16 patterns: zeros with a probability, of the others FP16 (under the mixed policy) with a probability."""
    narrow = random.integers(HALF_LO, HALF_HI, BLOCK)
    outside = random.integers(HALF_HI + 1, 0x7C00, BLOCK)
    v = np.where(random.random(BLOCK) < wide, outside, narrow) | random.integers(0, 2, BLOCK) << 15
    return np.where(random.random(BLOCK) < zeros, random.integers(0, 2, BLOCK) << 15, v).astype(np.uint16)


def sum_of_tops(v: np.ndarray, beat: int) -> int:
    """Sum over the beats of the largest exponent field of a finite element."""
    exponents = v >> 10 & 31
    return int(np.where(exponents == 31, 0, exponents).reshape(-1, beat).max(1).sum(dtype=np.int64))


def mixture(random: np.random.Generator, blocks: int) -> list[np.ndarray]:
    """Blocks of every mode in random order, among them all-zero, all-dense and raw random patterns."""
    made = []
    for _ in range(blocks):
        match int(random.integers(0, 7)):
            case 0:
                block = make_block(random, 1, 0)
            case 1:
                block = make_block(random, 0, random.choice([0, 1, 0.5, 0.02, 0.98]))
            case 2:
                block = random.integers(0, 1 << 16, BLOCK).astype(np.uint16)
            case 3:  # one non-zero, or all but one
                block = make_block(random, random.integers(0, 2), random.integers(0, 2))
                block[random.integers(0, BLOCK)] = random.choice([0, 0x3C00, 0x7BFF])
            case _:
                block = make_block(random, random.random(), random.choice([0, 1, random.random()]))
        made.append(block)
    return made


class Bench:
    """The encoder with its agents; counts events and checks that waiting words stay."""

    def __init__(self, dut, *, seed: int = 0, stall: tuple[float, float, float] = (0, 0, 0)) -> None:
        chosen = parameters()
        self.config = ChipConfig(beat=chosen["beat"], axi_bits=chosen["axi_bits"], lanes=16)
        self.dut = dut
        self.source = Source(dut, "i", seed=seed, stall=stall[0])
        self.words = Sink(dut, "o", seed=seed + 1, stall=stall[1])
        self.sizes = Sink(dut, "sizes", seed=seed + 2, stall=stall[2])
        self.places = Source(dut, "places", seed=seed + 3, stall=stall[2])
        self.totals = dict.fromkeys(("zero", "underflow", "fp8", "fp16", "nonfinite", "top"), 0)
        self.beats = 0
        cocotb.start_soon(self._watch())

    async def _watch(self) -> None:
        edge = RisingEdge(self.dut.clk)
        layout = encoder_events(self.config)
        waiting = None
        while True:
            await edge
            if int(self.dut.rst.value):
                continue
            event = unpack(layout, int(self.dut.events.value))
            for name, count in event.items():
                self.totals[name] += count
            elements = sum(count for name, count in event.items() if name not in ("nonfinite", "top"))
            assert elements in (0, self.config.beat)
            self.beats += elements != 0
            word = int(self.dut.o__payload.value) if int(self.dut.o__valid.value) else None
            assert waiting is None or word == waiting, "a waiting word changed"
            waiting = None if int(self.dut.o__ready.value) else word

    def policy(self, lo: int, hi: int, below: int, above: int) -> tuple[int, int, int, int]:
        """Set the policy; the encoder must have taken its beats."""
        self.dut.lo.value, self.dut.hi.value, self.dut.below.value, self.dut.above.value = lo, hi, below, above
        return lo, hi, below, above

    def pack_places(self, places: list[dict]) -> list[int]:
        layout = block_place(self.config)
        return [pack(layout, {name: place[name] for name, _ in layout}) for place in places]

    async def encode(
        self, blocks: list[np.ndarray], policy: tuple[int, int, int, int], flushes: list[bool]
    ) -> tuple[int, int]:
        """Send blocks, the last one flushed; check what comes.

        Returns the cycles from the first beat to the last word, and those that the words take at most.
        """
        self.policy(*policy)
        size = 2 * self.config.beat
        raw = b"".join(block.tobytes() for block in blocks)
        expected = [encode_block(block, policy) for block in blocks]
        step = self.config.axi_bits // 8
        places = placed(expected, flushes, step)
        image = b""
        for block, flush in zip(expected, flushes, strict=True):
            image += block
            image += bytes(-len(image) % step if flush else 0)
        assert sum(place["words"] for place in places) == len(image) // step
        begin = get_sim_time("ns")
        cocotb.start_soon(self.places.put(self.pack_places(places)))
        await self.source.put(int.from_bytes(raw[k : k + size], "little") for k in range(0, len(raw), size))
        words = await self.words.get(len(image) // step)
        cycles = (get_sim_time("ns") - begin) / PERIOD
        sizes = [unpack(block_size(), one) for one in await self.sizes.get(len(blocks))]
        assert sizes == [{"length": len(block), "head": head_of(block)} for block in expected]
        got = b"".join(word.to_bytes(step, "little") for word in words)
        assert got == image, f"byte {next(k for k in range(len(image)) if got[k] != image[k])} differs"
        await ClockCycles(self.dut.clk, 20)
        assert not self.words.words and not self.sizes.words, "more words than expected"
        return int(cycles), sum(place["cycles"] for place in places)


MIXED = (HALF_LO, HALF_HI, 2, 0)
POLICIES = [MIXED, (0, 0, 0, 0), (0, 0x7BFF, 0, 1), (HALF_LO, HALF_HI, 1, 0), (0x3000, 0x5000, 0, 1)]


def ends(random: np.random.Generator, blocks: int) -> list[bool]:
    """Which blocks end a run: more and less often by turns, the last one in any case."""
    rates = np.repeat(random.choice([0.05, 0.3, 1.0], -(-blocks // 8), p=[0.5, 0.3, 0.2]), 8)[:blocks]
    return [*(random.random(blocks - 1) < rates[:-1]).tolist(), True]


@cocotb.test(timeout_time=500, timeout_unit="us")
@cocotb.parametrize(stall=[(0, 0, 0), (0.5, 0, 0), (0, 0.6, 0), (0.3, 0.3, 0.9)])
async def every_mode(dut, stall):
    """Blocks of all modes packed in runs of any length, with stalls on every side; statistics add up."""
    random = rng(11)
    bench = Bench(dut, seed=3, stall=stall)
    await start(dut)
    sums = dict.fromkeys(bench.totals, 0)
    sent = 0
    for policy in POLICIES:
        blocks = mixture(random, 40)
        await bench.encode(blocks, policy, ends(random, len(blocks)))
        sent += len(blocks)
        v = np.concatenate(blocks)
        codes, _, _, underflow = reference(v, *policy)
        sums["zero"] += int(((codes == 0) & ~underflow).sum())
        sums["underflow"] += int(underflow.sum())
        sums["fp8"] += int((codes == 2).sum())
        sums["fp16"] += int((codes == 3).sum())
        nonfinite = ((v & 0x7FFF) >= 0x7C00).reshape(-1, bench.config.beat).any(1)
        sums["nonfinite"] += int(nonfinite.sum())
        sums["top"] += sum_of_tops(v, bench.config.beat)
    assert bench.totals == sums
    assert bench.beats == sent * bench.config.block_beats


@cocotb.test(timeout_time=1000, timeout_unit="us")
async def every_count(dut):
    """Every number of non-zeros, with every kind of precision mask and list: all their lengths."""
    random = rng(12)
    bench = Bench(dut)
    await start(dut)
    blocks = []
    for nonzeros in range(BLOCK + 1):
        border = -(-nonzeros // 8)  # FP16 elements from which on a mask is no longer than a list
        for wide in {*range(min(border + 2, nonzeros)), nonzeros // 2, max(nonzeros - 1, 0), nonzeros}:
            block = make_block(random, 0, 0)
            places = random.permutation(BLOCK)
            block[places[:wide]] = 0x7800
            block[places[nonzeros:]] = 0
            blocks.append(block)
    await bench.encode(blocks, MIXED, [True] * len(blocks))
    order = random.permutation(len(blocks))
    await bench.encode([blocks[k] for k in order], MIXED, ends(random, len(blocks)))


@cocotb.test(timeout_time=500, timeout_unit="us")
async def every_start(dut):
    """Short, masked and longest blocks from each byte of a word on; many blocks in a word."""
    random = rng(16)
    bench = Bench(dut)
    await start(dut)
    step = bench.config.axi_bits // 8
    kinds = [make_block(random, *one) for one in ((1, 0), (0, 0), (0, 1), (0, 0.5), (0.5, 0), (0.9, 1))]
    kinds[3][:] = 0x7800
    kinds[3][0] = HALF_LO  # the longest head and block
    kinds[4][1:] = 0  # nothing but a head and one payload
    kinds[4][0] = HALF_LO
    blocks, flushes = [], []
    for block in kinds:
        for first in range(step):
            blocks += [kinds[0]] * first + [block, kinds[int(random.integers(0, 6))]]
            flushes += [False] * (first + 1) + [True]
    await bench.encode(blocks, MIXED, flushes)


@cocotb.test(timeout_time=500, timeout_unit="us")
async def sizes_come_first(dut):
    """Sizes come without places, for a few blocks; a block's words come after its place."""
    random = rng(13)
    bench = Bench(dut)
    bench.sizes.stall = 1.0
    await start(dut)
    bench.policy(*MIXED)
    size = 2 * bench.config.beat
    step = bench.config.axi_bits // 8
    blocks = mixture(random, 20)
    raw = b"".join(block.tobytes() for block in blocks)
    places = placed([encode_block(block, MIXED) for block in blocks], [True] * 20, step)
    counts = np.cumsum([place["words"] for place in places])
    cocotb.start_soon(bench.source.put([int.from_bytes(raw[k : k + size], "little") for k in range(0, len(raw), size)]))
    await ClockCycles(dut.clk, 500)
    assert int(dut.sizes__valid.value) and not int(dut.o__valid.value)
    bench.sizes.stall = 0.0
    await ClockCycles(dut.clk, 500)
    assert 4 <= len(bench.sizes.words) <= 5 and not bench.words.words
    for k, place in enumerate(bench.pack_places(places)):
        await bench.places.put(place)
        await ClockCycles(dut.clk, 60)
        assert len(bench.words.words) == counts[k], k
    # Sizes that are not taken stop the blocks, too.
    bench.sizes.words.clear()
    bench.sizes.stall = 1.0
    cocotb.start_soon(bench.source.put([int.from_bytes(raw[k : k + size], "little") for k in range(0, len(raw), size)]))
    cocotb.start_soon(bench.places.put(bench.pack_places(places)))
    await ClockCycles(dut.clk, 1000)
    assert len(bench.words.words) == counts[-1] + counts[3]
    bench.sizes.stall = 0.0
    assert len(await bench.sizes.get(20)) == 20
    await ClockCycles(dut.clk, 400)
    assert len(bench.words.words) == 2 * counts[-1]


MIXES = {  # zeros, FP16 among the others, policy
    "empty": (1.0, 0.0, MIXED),
    "dense fp8": (0.0, 0.0, MIXED),
    "dense fp16": (0.0, 0.0, (0, 0, 0, 0)),
    "half zero, fp8": (0.5, 0.0, MIXED),
    "half zero, 10 % fp16": (0.5, 0.1, MIXED),
    "dense, 10 % fp16": (0.0, 0.1, MIXED),
    "dense, half fp16": (0.0, 0.5, MIXED),
    "90 % zero, fp16": (0.9, 1.0, MIXED),
}


@cocotb.test(timeout_time=500, timeout_unit="us")
@cocotb.parametrize(run=[1, 8])
async def throughput(dut, run):
    """A beat a cycle, or a word a cycle where that binds."""
    random = rng(14)
    bench = Bench(dut)
    await start(dut)
    step = bench.config.axi_bits // 8
    for name, (zeros, wide, policy) in MIXES.items():
        blocks = [make_block(random, zeros, wide) for _ in range(100)]
        flushes = [k % run == run - 1 or k == 99 for k in range(100)]
        places = placed([encode_block(block, policy) for block in blocks], flushes, step)
        words = sum(place["words"] for place in places)
        cycles, most = await bench.encode(blocks, policy, flushes)
        beats = len(blocks) * bench.config.block_beats
        print(
            f"throughput {bench.config.beat}x{bench.config.axi_bits} runs of {run}, {name}: {beats / cycles:.3f} "
            f"beats/cycle, {words / cycles:.3f} words/cycle"
        )
        # Latency: ten cycles before the first word, and a block to fill.
        assert cycles <= max(beats, most) + bench.config.block_beats + 20, name


@cocotb.test(timeout_time=500, timeout_unit="us")
async def latency(dut):
    """The first word comes six cycles after a block's last beat."""
    bench = Bench(dut)
    await start(dut)
    bench.policy(*MIXED)
    block = make_block(rng(15), 0.3, 0.5).tobytes()
    size = 2 * bench.config.beat
    times = []

    async def watch():
        edge = RisingEdge(dut.clk)
        while True:
            await edge
            if int(dut.i__valid.value) and int(dut.i__ready.value):
                times.append(get_sim_time("ns"))

    cocotb.start_soon(watch())
    encoded = encode_block(np.frombuffer(block, np.uint16), MIXED)
    await bench.places.put(bench.pack_places(placed([encoded], [True], bench.config.axi_bits // 8)))
    await bench.source.put([int.from_bytes(block[k : k + size], "little") for k in range(0, len(block), size)])
    while not (int(dut.o__valid.value) and int(dut.o__ready.value)):
        await RisingEdge(dut.clk)
    cycles = (get_sim_time("ns") - times[-1]) / PERIOD
    assert len(times) == bench.config.block_beats
    assert all(b - a == PERIOD for a, b in pairwise(times))
    print(f"latency {bench.config.beat}x{bench.config.axi_bits}: {cycles} cycles")
    assert cycles == 6
