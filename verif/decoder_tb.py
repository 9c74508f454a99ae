"""Testbench of the FGMP decoder: every block that can be written, and every way to spoil one.

`encode_block` and `decode_block` are a model of their own, written from docs/architecture.md in bytes and lists; the
testbench of LOAD uses it too.
"""

from itertools import pairwise

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge, with_timeout
from cocotb.utils import get_sim_time

from golden.formats import E4M3, decode_scalar
from lnpu.config import ChipConfig
from lnpu.fgmp.decoder import decoder_input
from lnpu.formats import element_beat
from verif.agents import Sink, Source, pack, start, unpack
from verif.runner import parameters, rng

ZERO, PADDING, FP8, FP16 = range(4)
MAGIC = 0xA0
CLOCK = 10  # ns

FP8_TO_FP16 = [int(np.float16(float(decode_scalar(E4M3, byte))).view(np.uint16)) for byte in range(256)]
FP8_BYTES = [byte for byte in range(256) if byte & 0x7F not in (0, 0x7F)]
ELEMENT_ZERO = (ZERO, 0)
OPEN = "open"  # Whatever the decoder makes of a block.


def random_elements(random, zeros: float, fp16: float, count: int = 64) -> list[tuple[int, int]]:
    """Elements (code, pattern; E4M3 pattern for FP8), zeros and FP16 with these probabilities."""
    elements = []
    for kind, share in zip(random.random(count), random.random(count), strict=True):
        if kind < zeros:
            elements.append(ELEMENT_ZERO)
        elif share < fp16:
            elements.append((FP16, int(random.integers(1, 0x8000)) | int(random.integers(2)) << 15))
        else:
            elements.append((FP8, int(random.choice(FP8_BYTES))))
    return elements


def encode_block(elements) -> bytes:
    """The block's bytes."""
    nonzeros = [element for element in elements if element[0] != ZERO]
    if not nonzeros:
        return bytes([MAGIC | 2])
    wide = [int(code == FP16) for code, _ in nonzeros]
    mask_bytes = -(-len(wide) // 8)
    precision = 1 if all(wide) else 0 if not any(wide) else 3 if sum(wide) < mask_bytes else 2
    out = bytearray([MAGIC | precision << 2 | (len(nonzeros) < 64)])
    if len(nonzeros) < 64:
        out += sum(1 << k for k, element in enumerate(elements) if element[0] != ZERO).to_bytes(8, "little")
    if precision == 2:
        out += sum(bit << k for k, bit in enumerate(wide)).to_bytes(mask_bytes, "little")
    if precision == 3:
        out += bytes(k for k, bit in enumerate(wide) if bit)
        out[-1] |= 0x80
    for code, pattern in nonzeros:
        out += pattern.to_bytes(2 if code == FP16 else 1, "little")
    return bytes(out)


def decode_block(raw: bytes):
    """64 (FP16 pattern, code), or None if the block is malformed; `raw` has as many bytes as the table says."""
    if not raw or raw[0] & 0xF0 != MAGIC:
        return None
    mode, precision, position = raw[0] & 3, raw[0] >> 2 & 3, 1
    if mode == 3 or (mode == 2 and precision):
        return None
    mask = (1 << 64) - 1 if mode == 0 else 0
    if mode == 1:
        mask = int.from_bytes(raw[1:9], "little")
        position = 9
        if mask in (0, (1 << 64) - 1):
            return None
    present = [k for k in range(64) if mask >> k & 1]
    wide = [precision == 1] * len(present)
    if precision == 2:
        size = -(-len(present) // 8)
        bits = int.from_bytes(raw[position : position + size], "little")
        position += size
        wide = [bool(bits >> k & 1) for k in range(len(present))]
        if bits >> len(present) or all(wide) or sum(wide) < size:
            return None
    if precision == 3:
        listed = []
        while position < len(raw) and not (listed and listed[-1] & 0x80):
            listed.append(raw[position])
            position += 1
        if not listed or not listed[-1] & 0x80:
            return None
        listed[-1] -= 0x80
        if (
            any(b <= a for a, b in pairwise(listed))
            or listed[-1] >= len(present)
            or len(listed) >= -(-len(present) // 8)
        ):
            return None
        wide = [k in listed for k in range(len(present))]
    if position + sum(1 + one for one in wide) != len(raw):
        return None
    elements = [(0, ZERO)] * 64
    for k, one in zip(present, wide, strict=True):
        pattern = int.from_bytes(raw[position : position + 1 + one], "little")
        position += 1 + one
        if one:
            if pattern & 0x7FFF == 0:
                return None
            elements[k] = (pattern, FP16)
        else:
            if pattern & 0x7F in (0, 0x7F):
                return None
            elements[k] = (FP8_TO_FP16[pattern], FP8)
    return elements


class Bench:
    """Decoder with a source of blocks, a sink of beats and a counter of errors."""

    def __init__(self, dut, seed: int = 0) -> None:
        self.dut = dut
        self.config = ChipConfig(**parameters()["config"])
        self.word = self.config.axi_bits // 8
        self.i_layout, self.o_layout = decoder_input(self.config), element_beat(self.config.beat)
        self.source = Source(dut, "i", seed=seed)
        self.sink = Sink(dut, "o", seed=seed + 1)
        self.random = rng(seed + 2)
        self.errors = 0

    async def start(self):
        await start(self.dut)
        cocotb.start_soon(self._count_errors())
        return self

    async def _count_errors(self):
        edge = RisingEdge(self.dut.clk)
        while True:
            await edge
            self.errors += int(self.dut.error.value)

    def to_words(self, raw: bytes, length: int, words: int | None = None) -> list[int]:
        """Stream words of a block; what is beyond its bytes is random."""
        if words is None:
            words = -(-len(raw) // self.word)
        raw = (raw + self.random.bytes(max(0, words * self.word - len(raw))))[: words * self.word]
        return [
            pack(self.i_layout, {
                "data": int.from_bytes(raw[k * self.word : (k + 1) * self.word], "little"),
                "last": k == words - 1, "length": length,
            })
            for k in range(words)
        ]  # fmt: skip

    def from_words(self, words: list[int]) -> bytes:
        return b"".join((word & (1 << 8 * self.word) - 1).to_bytes(self.word, "little") for word in words)

    def good(self, elements) -> tuple[list[int], list]:
        raw = encode_block(elements)
        expected = [(FP8_TO_FP16[value] if code == FP8 else value, code) for code, value in elements]
        return self.to_words(raw, len(raw)), expected

    def spoilt(self, raw: bytes, length: int | None = None) -> tuple[list[int], list | None]:
        """Any bytes (with random ones behind) and any length: the words, and what the model makes of them."""
        length = len(raw) if length is None else length
        sent = self.to_words(raw, length, max(1, -(-length // self.word)))
        return sent, decode_block(self.from_words(sent)[:length])

    def misframed(self, raw: bytes, length: int, words: int) -> tuple[list[int], str]:
        """A number of words that no block of this length has: open what becomes of it."""
        return self.to_words(raw, length, words), OPEN

    def some_good(self) -> tuple[list[int], list]:
        zeros = self.random.choice([0, 0.05, 0.5, 0.95, 1])
        return self.good(random_elements(self.random, zeros, self.random.choice([0, 0.1, 0.5, 0.9, 1])))

    async def check(self, blocks, *, stall_in: float = 0.0, stall_out: float = 0.0) -> None:
        """Send all blocks, compare all elements and the number of errors."""
        self.source.stall, self.sink.stall, self.errors = stall_in, stall_out, 0
        stream = [word for words, _ in blocks for word in words]
        sending = cocotb.start_soon(self.source.put(stream))
        beats = len(blocks) * self.config.block_beats
        got = [unpack(self.o_layout, word) for word in await self.sink.get(beats, 50 * (len(stream) + beats) + 1000)]
        await with_timeout(sending, 100_000 * CLOCK, "ns")
        self.sink.stall = 0.0
        for _ in range(30):
            await RisingEdge(self.dut.clk)
        assert not self.sink.words, "more beats than blocks have"
        flat = [pair for beat in got for pair in zip(beat["data"], beat["code"], strict=True)]
        for index, (words, expected) in enumerate(blocks):
            wanted = expected or [(0, ZERO)] * 64
            actual = flat[64 * index : 64 * index + 64]
            assert expected is OPEN or actual == wanted, (
                f"block {index} ({'good' if expected else 'malformed'}): {self.from_words(words).hex()}\n"
                f"got {actual}\nnot {wanted}"
            )
        malformed = sum(expected is None for _, expected in blocks)
        unknown = sum(expected is OPEN for _, expected in blocks)
        assert malformed <= self.errors <= malformed + unknown, f"{self.errors} errors for {malformed} malformed blocks"


@cocotb.test()
async def every_mode(dut):
    """Each pair of modes, each number of non-zeros with each precision, all FP8 codes; no stalls."""
    bench = await Bench(dut).start()
    blocks = []
    for count in range(65):
        for fp16 in (0.0, 0.5, 1.0):
            elements = random_elements(bench.random, 0, fp16)
            for k in bench.random.permutation(64)[count:]:
                elements[k] = ELEMENT_ZERO
            blocks.append(bench.good(elements))
    every = FP8_BYTES + FP8_BYTES[:4]
    blocks += [bench.good([(FP8, byte) for byte in every[k : k + 64]]) for k in range(0, 256, 64)]
    special = [1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x7C01]
    blocks.append(bench.good([(FP16, pattern) for pattern in special] + [ELEMENT_ZERO] * 54))
    await bench.check(blocks)


@cocotb.test()
async def random_stalls(dut):
    """Random blocks, with stalls on either side and both."""
    bench = await Bench(dut, seed=10).start()
    for stall_in, stall_out in ((0.0, 0.6), (0.6, 0.0), (0.3, 0.3), (0.0, 0.05), (0.8, 0.8)):
        await bench.check([bench.some_good() for _ in range(30)], stall_in=stall_in, stall_out=stall_out)


@cocotb.test()
async def header_bits(dut):
    """Every bit of header and masks flipped, in blocks of each mode, each followed by a good block."""
    bench = await Bench(dut, seed=20).start()
    for zeros, fp16 in (
        (0, 0),
        (0, 1),
        (0, 0.5),
        (0.4, 0.0),
        (0.4, 1.0),
        (0.4, 0.5),
        (0.06, 0.5),
        (1, 0),
        (0, 0.06),
        (0.1, 0.06),
        (0.5, 0.06),
    ):
        raw = encode_block(random_elements(bench.random, zeros, fp16))
        blocks = []
        for bit in range(8 * min(18, len(raw))):
            spoilt = bytearray(raw)
            spoilt[bit // 8] ^= 1 << bit % 8
            blocks += [bench.spoilt(bytes(spoilt))]
            if bit % 3 == 0:
                blocks += [bench.some_good()]
        await bench.check(blocks, stall_in=0.1 * (zeros == 0.4))


@cocotb.test()
async def lengths(dut):
    """Each other length of blocks of each mode, with the next block's bytes or random ones behind."""
    bench = await Bench(dut, seed=30).start()
    for zeros, fp16 in ((0, 0), (0, 1), (0.4, 0.5), (0.05, 0.5), (0.9, 1), (1, 0), (0, 0.06), (0.2, 0.06)):
        raw = encode_block(random_elements(bench.random, zeros, fp16))
        blocks = [bench.spoilt(raw, length) for length in range(256)]
        assert sum(expected is not None for _, expected in blocks) == 1
        for length in [0, *range(max(0, len(raw) - 9), len(raw) + 10), 145, 146, 255]:
            other = encode_block(random_elements(bench.random, bench.random.random(), 0.5))
            blocks += [bench.spoilt(raw + other + raw, length), bench.some_good()]
        await bench.check(blocks, stall_out=0.2 * (zeros == 0.4))
    # Masks of which a part would pass for the payload that is missing.
    blocks = []
    for count in range(1, 8):
        elements = [(FP8, 0x38) if k % 8 == 0 and k < 8 * count else ELEMENT_ZERO for k in range(64)]
        raw = encode_block(elements)
        for length in range(1, len(raw) + 2):
            blocks += [bench.good(elements), bench.spoilt(raw, length)]
    await bench.check(blocks)


@cocotb.test()
async def framing(dut):
    """Numbers of words that do not fit the length: 64 elements, and the blocks around are as ever."""
    bench = await Bench(dut, seed=35).start()
    for zeros, fp16 in ((0, 0), (0, 1), (0.4, 0.5), (0.05, 0.5), (0.9, 1), (1, 0), (0, 0.06), (0.2, 0.06)):
        raw = encode_block(random_elements(bench.random, zeros, fp16))
        right = -(-len(raw) // bench.word)
        blocks = []
        for words in [*range(1, right + 3), 19, 20, 33, 64, 70]:
            for length in (len(raw), min(255, words * bench.word), 0):
                blocks += [bench.misframed(raw, length, words), bench.some_good()]
        await bench.check(blocks, stall_out=0.2 * (zeros == 0.4))


@cocotb.test()
async def masks(dut):
    """Masked with 0 and 64 non-zeros, mixed that is not, empty with a precision mode, bits behind the mask."""
    bench = await Bench(dut, seed=40).start()
    blocks = []

    def add(mode, precision, mask, bits, payload):
        raw = bytes([MAGIC | precision << 2 | mode]) + mask + bits + payload
        blocks.append(bench.spoilt(raw))
        blocks.append(bench.some_good())

    none, every = bytes(8), b"\xff" * 8
    fp8, fp16 = bytes([0x38] * 64), bytes([0x00, 0x3C] * 64)
    for precision, payload in ((0, fp8), (1, fp16)):
        add(1, precision, every, b"", payload)
        add(1, precision, none, b"", b"")
        add(2, precision, b"", b"", b"")
        add(2, precision, b"", b"", bytes(7))
    add(1, 2, none, b"", b"")
    add(1, 2, every, bytes([1]) + bytes(7), fp8[:63] + fp16[:2])
    add(2, 2, b"", b"", b"")
    add(2, 3, b"", b"", b"")
    add(0, 2, b"", bytes(8), fp8)
    add(0, 2, b"", every, fp16)
    for count in (1, 2, 7, 8, 9, 12, 16, 40, 49, 56, 57, 60, 63):
        mask, size = ((1 << count) - 1).to_bytes(8, "little"), -(-count // 8)
        add(1, 2, mask, bytes(size), fp8[:count])
        add(1, 2, mask, ((1 << count) - 1).to_bytes(size, "little"), fp16[: 2 * count])
        if count > 1:
            add(1, 2, mask, (1).to_bytes(size, "little"), fp16[:2] + fp8[: count - 1])
            add(1, 2, mask, (1 << count - 1).to_bytes(size, "little"), fp8[: count - 1] + fp16[:2])
            for extra in range(count, 8 * size):
                add(1, 2, mask, (1 | 1 << extra).to_bytes(size, "little"), fp16[:2] + fp8[: count - 1])
    assert sum(expected is None for _, expected in blocks) > 30
    await bench.check(blocks)


def block_with_list(mask: int, entries, wide) -> bytes:
    """A block with any list in its header; payloads are FP16 for the ranks in `wide`."""
    raw = bytes([MAGIC | 3 << 2 | (mask != (1 << 64) - 1)])
    if mask != (1 << 64) - 1:
        raw += mask.to_bytes(8, "little")
    return raw + bytes(entries) + b"".join(b"\x34\x52" if k in wide else b"\x38" for k in range(mask.bit_count()))


@cocotb.test()
async def lists(dut):
    """Lists of each size for each number of non-zeros, with stalls too; each way to spoil a list."""
    bench = await Bench(dut, seed=45).start()
    random = bench.random
    good, bad = [], []

    def mask_of(count):
        return sum(1 << int(k) for k in random.permutation(64)[:count])

    def add(mask, entries, wide):
        bad.append(bench.spoilt(block_with_list(mask, entries, wide)))
        assert bad[-1][1] is None
        if random.random() < 0.4:
            bad.append(bench.some_good())

    for count in range(2, 65):
        mask, most = mask_of(count), -(-count // 8) - 1
        for size in {*range(1, most + 1)}:
            for low in (False, True):
                ranks = sorted(random.permutation(count)[:size].tolist())
                if low:  # neighbours, from the first or up to the last
                    ranks = list(range(size)) if size % 2 else list(range(count - size, count))
                entries = [*ranks[:-1], ranks[-1] | 0x80]
                block = bench.spoilt(block_with_list(mask, entries, ranks))
                assert block[1] is not None
                good.append(block)
            if count % 3 and count < 60:
                continue
            for index in range(size):  # bit 6; a last byte too early or late
                add(mask, [one | 0x40 * (k == index) for k, one in enumerate(entries)], ranks)
                add(mask, [one ^ 0x80 * (k == index) for k, one in enumerate(entries)], ranks)
            for index in range(size - 1):  # not ascending: equal, with as many FP16 payloads or as listed; swapped
                twice = [*ranks[: index + 1], ranks[index], *ranks[index + 2 :]]
                add(mask, [*twice[:-1], twice[-1] | 0x80], twice)
                add(mask, [*twice[:-1], twice[-1] | 0x80], ranks)
                swapped = [*ranks[:index], ranks[index + 1], ranks[index], *ranks[index + 2 :]]
                add(mask, [*swapped[:-1], swapped[-1] | 0x80], ranks)
            for beyond in {count, count + 1, 63} - {*range(count)}:  # with a payload less, or as listed
                add(mask, [*ranks[:-1], beyond | 0x80], ranks[:-1])
                add(mask, [*ranks[:-1], beyond | 0x80], ranks)
        for size in range(most + 1, min(count, 9) + 1):  # too long, to the last one of all elements
            ranks = sorted(random.permutation(count)[:size].tolist())
            add(mask, [*ranks[:-1], ranks[-1] | 0x80], ranks)
            add(mask, ranks, ranks)
        for size in range(min(most + 1, count)):  # a mask where a list (or none) would do
            ranks = random.permutation(count)[:size].tolist()
            raw = bytearray(block_with_list(mask, sum(1 << k for k in ranks).to_bytes(most + 1, "little"), ranks))
            raw[0] ^= 1 << 2
            bad.append(bench.spoilt(bytes(raw)))
            assert bad[-1][1] is None
    add(1 << 17, [0x80], [0])
    add(1 << 17, [0x80], [])
    add(0, [0x80], [])
    for tail in (b"", b"\x80", b"\x80\x34\x52"):
        bad.append(bench.spoilt(bytes([MAGIC | 3 << 2 | 2]) + tail))
    await bench.check(good)
    random.shuffle(good)
    for stall_in, stall_out in ((0.0, 0.6), (0.6, 0.0), (0.3, 0.3)):
        await bench.check(good[:120], stall_in=stall_in, stall_out=stall_out)
    await bench.check(bad)
    await bench.check(bad[-400:], stall_in=0.2, stall_out=0.2)


@cocotb.test()
async def payloads(dut):
    """Zero and NaN payloads in every element; any bytes behind the block."""
    bench = await Bench(dut, seed=50).start()
    blocks = []
    for zeros, fp16 in ((0, 0), (0, 1), (0, 0.5), (0.4, 0.0), (0.4, 1.0), (0.4, 0.5)):
        elements = random_elements(bench.random, zeros, fp16)
        for k, (code, _) in enumerate(elements):
            if code != ZERO:
                bad = [0, 0x80, 0x7F, 0xFF][k % 4] if code == FP8 else [0, 0x8000][k % 2]
                raw = encode_block([*elements[:k], (code, bad), *elements[k + 1 :]])
                blocks.append(bench.spoilt(raw))
                assert blocks[-1][1] is None
                if k % 4 == 0:
                    blocks.append(bench.some_good())
    for count in range(64):
        elements = [(FP8, 0x38)] * count + [ELEMENT_ZERO] * (64 - count)
        for byte in (0, 0xFF):
            raw = encode_block(elements)
            blocks.append(bench.spoilt(raw + bytes([byte]) * 40, len(raw)))
            assert blocks[-1][1] is not None
        blocks.append(bench.good(elements))
    await bench.check(blocks)


@cocotb.test()
async def garbage(dut):
    """Random bytes behind any header, good blocks with random bytes changed, any length."""
    bench = await Bench(dut, seed=60).start()
    random = bench.random
    for stall in (0.0, 0.3):
        blocks = []
        for _ in range(250):
            if random.random() < 0.5:
                raw = bytearray(random.bytes(int(random.integers(1, 170))))
                if random.random() < 0.8:
                    raw[0] = MAGIC | int(random.integers(16))
                if random.random() < 0.3:
                    raw[1:9] = encode_block(random_elements(random, random.random(), 0))[1:9]
            else:
                raw = bytearray(encode_block(random_elements(random, random.random(), random.random())))
                for _ in range(int(random.integers(3))):
                    raw[int(random.integers(len(raw)))] = int(random.integers(256))
            blocks.append(bench.spoilt(bytes(raw), None if random.random() < 0.7 else int(random.integers(256))))
            if random.random() < 0.3:
                blocks.append(bench.some_good())
        await bench.check(blocks, stall_in=stall, stall_out=stall)


MIXES = {  # zeros, fp16
    "dense FP16": (0, 1),
    "dense FP8": (0, 0),
    "dense mixed": (0, 0.5),
    "dense few, 5% FP16": (0, 0.05),
    "masked few, 5% zeros, 5% FP16": (0.05, 0.05),
    "masked few, 50% zeros, 5% FP16": (0.5, 0.05),
    "masked mixed, 5% zeros": (0.05, 0.5),
    "masked FP16, 50% zeros": (0.5, 1),
    "masked FP8, 50% zeros": (0.5, 0),
    "masked mixed, 50% zeros": (0.5, 0.5),
    "masked mixed, 90% zeros": (0.9, 0.5),
    "empty": (1, 0),
    "any": None,
}


@cocotb.test()
async def throughput(dut):
    """A word a cycle in or a beat a cycle out, whichever binds, for long runs of blocks of one mix."""
    bench = await Bench(dut, seed=70).start()
    count, worst = 60, 1.0
    for name, mix in MIXES.items():
        blocks = [
            bench.good(random_elements(bench.random, *mix)) if mix else bench.some_good() for _ in range(count)
        ]  # fmt: skip
        words, beats = sum(len(words) for words, _ in blocks), count * bench.config.block_beats
        bench.sink.stall = 0.0
        sending = cocotb.start_soon(bench.source.put([word for words, _ in blocks for word in words]))
        await bench.sink.get(bench.config.block_beats)  # the pipeline is full
        since = get_sim_time("ns")
        await bench.sink.get(beats - bench.config.block_beats)
        cycles = (get_sim_time("ns") - since) / CLOCK
        await sending
        ideal = max(words, beats) * (count - 1) / count
        worst = min(worst, ideal / cycles)
        dut._log.info(
            f"throughput {bench.config.axi_bits} bits, beat {bench.config.beat}, {name}: "
            f"{(beats - bench.config.block_beats) / cycles:.3f} beats a cycle, {words / count:.2f} words a block, "
            f"{ideal / cycles:.3f} of the ideal"
        )
        assert ideal / cycles > (0.9 if mix is None else 0.98), name
