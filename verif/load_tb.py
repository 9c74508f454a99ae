"""Testbench of the LOAD unit: a memory with one data bus behind both read ports, and a model of the walk in Python."""

import struct
from collections import Counter

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from cocotb.utils import get_sim_time

from lnpu.config import TINY
from lnpu.ctrl.commands import LAYOUTS, Command, Opcode, Target
from lnpu.interfaces import Buffer, Error, buffer_write, memory_read_signature, vmem_write
from lnpu.mem.load import RAW_ROWS, load_events
from verif.agents import Sink, Source, pack, start, unpack
from verif.decoder_tb import FP8, FP8_TO_FP16, FP16, PADDING, ZERO, decode_block, encode_block, random_elements
from verif.runner import parameters, rng

CLOCK = 10  # ns
SPARSE, DENSE, VMEM, VMEM_DENSE, MASK, MASK_DENSE, DENSE_LOAD = (target.value for target in Target)


BUFFERS = {
    SPARSE: Buffer.SPARSE, DENSE: Buffer.DENSE, DENSE_LOAD: Buffer.DENSE, MASK: Buffer.MASK, MASK_DENSE: Buffer.MASK,
}  # fmt: skip


def positive(pattern: int, code: int) -> int:
    """Whether an element is above zero."""
    return int(code not in (ZERO, PADDING) and bool(np.uint16(pattern).view(np.float16) > 0))


def single(pattern: int, scale: int) -> int:
    """FP32 pattern of FP16 `pattern` times 2^scale."""
    value = np.uint16(pattern).view(np.float16)
    if np.isnan(value):
        return 0x7FC00000
    with np.errstate(over="ignore"):
        return int(np.ldexp(np.float32(value), scale).view(np.uint32))


class Memory:
    """Answers both clients in the order of their requests over one bus: who does not take data blocks the other."""

    def __init__(self, dut, config, seed: int) -> None:
        self.dut, self.config, self.random = dut, config, np.random.default_rng(seed)
        self.word = config.axi_bits // 8
        self.content: dict[int, bytes] = {}  # 8 bytes each
        self.latency, self.stall, self.spread = 10, 0.0, 0
        self.depth = 100  # requests that it accepts before it has answered
        self.table_first = False  # accept no other request while there is one for the table
        signature = memory_read_signature(config)
        self.request_layout = signature.members["request"].signature.members["payload"].shape
        self.response_layout = signature.members["response"].signature.members["payload"].shape
        self.requests: dict[str, list[tuple[int, int, int]]] = {"table": [], "memory": []}
        self.words = 0
        self.blocked = 0  # cycles in which a word waited for its client
        self.largest_backlog = 0
        for client in self.requests:
            getattr(dut, f"{client}__request__ready").value = 0
            getattr(dut, f"{client}__response__valid").value = 0
            getattr(dut, f"{client}__response__payload").value = 0
        cocotb.start_soon(self._run())

    def write(self, address: int, raw: bytes) -> None:
        first = address & ~7
        span = bytearray(self.read(first, (len(raw) + address - first + 7) & ~7))
        span[address - first : address - first + len(raw)] = raw
        for k in range(0, len(span), 8):
            self.content[first + k] = bytes(span[k : k + 8])

    def read(self, address: int, count: int) -> bytes:
        """What is there; where nothing has been written, bytes that depend on the address."""
        first = address & ~7
        parts = [
            self.content.get(place) or struct.pack("<Q", (place * 0x9E3779B97F4A7C15 + 0x5851F42D) % (1 << 64))
            for place in range(first, address + count, 8)
        ]
        return b"".join(parts)[address - first : address - first + count]

    async def _run(self):
        dut, edge = self.dut, RisingEdge(self.dut.clk)
        ports = {
            client: [getattr(dut, f"{client}__{name}") for name in (
                "request__valid", "request__ready", "request__payload",
                "response__valid", "response__ready", "response__payload",
            )]
            for client in self.requests
        }  # fmt: skip
        ready, offered, now, queue = dict.fromkeys(ports, False), None, 0, []
        draws, drawn = self.random.random(4096), 0
        while True:
            await edge
            now += 1
            for client, (valid, _, payload, *_) in ports.items():
                if ready[client] and int(valid.value):
                    request = unpack(self.request_layout, int(payload.value))
                    address, words = request["address"], request["words"]
                    assert words > 0, "request for no words"
                    assert address % self.word == 0, f"misaligned {client} request {address:#x}"
                    self.requests[client].append((address, words, request["kind"]))
                    due = now + self.latency + (int(self.random.integers(self.spread)) if self.spread else 0)
                    queue.append([client, address, words, due])
                    self.largest_backlog = max(self.largest_backlog, len(queue))
            if offered and int(ports[offered][4].value):
                ports[offered][3].value = 0
                offered = None
                self.words += 1
            elif offered:
                self.blocked += 1
            drawn = (drawn + 3) % 4080
            if offered is None and queue and queue[0][3] <= now and draws[drawn] >= self.stall:
                head = queue[0]
                offered = head[0]
                head[2] -= 1
                data = int.from_bytes(self.read(head[1], self.word), "little")
                head[1] += self.word
                ports[offered][5].value = pack(self.response_layout, {"data": data, "last": head[2] == 0})
                ports[offered][3].value = 1
                if head[2] == 0:
                    queue.pop(0)
            for k, (client, port) in enumerate(ports.items()):
                willing = bool(draws[drawn + 1 + k] >= self.stall) and len(queue) < self.depth
                if self.table_first and client == "memory":
                    willing = willing and not int(ports["table"][0].value)
                if willing != ready[client]:
                    ready[client] = willing
                    port[1].value = int(willing)


class Tensor:
    """Runs of encoded blocks in the memory."""

    def __init__(self, bench, blocks: int = 0, *, log2_run: int | None = None, zeros=None, fp16=None) -> None:
        self.bench, self.random, self.zeros, self.fp16 = bench, bench.random, zeros, fp16
        self.longest_run = min(4, bench.memory.word.bit_length() - 1)
        self.log2_run = int(self.random.integers(self.longest_run + 1)) if log2_run is None else log2_run
        self.runs: dict[int, dict[int, list]] = {}  # elements of the blocks of each run
        self.move(blocks)
        for block in range(blocks):
            self.put(block)

    def move(self, blocks: int) -> None:
        """Choose places for slots and table of that many blocks (before there is any)."""
        top = 1 << self.bench.config.address_bits
        run = 1 << self.log2_run
        blocks = -(-blocks // run) * run
        self.slots = int(self.random.integers(0, (top - 160 * blocks - (1 << 12)) // 32)) * 32
        self.table = int(self.random.integers(0, (top - blocks - 32) // 32)) * 32

    def put(self, block: int) -> None:
        """Make up the run of a block, if it is not there."""
        random, run = self.random, block >> self.log2_run
        if run in self.runs:
            return
        self.runs[run], raws = {}, {}
        for block in range(run << self.log2_run, (run + 1) << self.log2_run):
            zeros = random.choice([0, 0.1, 0.5, 0.9, 1]) if self.zeros is None else self.zeros
            fp16 = random.choice([0, 0.3, 1]) if self.fp16 is None else self.fp16
            elements = random_elements(random, zeros, fp16)
            self.runs[run][block] = [(FP8_TO_FP16[value] if code == FP8 else value, code) for code, value in elements]
            raws[block] = encode_block(elements)
        self.lay(raws, {block: len(raw) for block, raw in raws.items()})

    def lay(self, raws: dict[int, bytes], lengths: dict[int, int]) -> None:
        """Write blocks to where the lengths say that they are."""
        for block, raw in raws.items():
            self.bench.memory.write(self.table + block, bytes([lengths[block]]))
            self.bench.memory.write(self.address(block), raw[: lengths[block]])

    def length(self, block: int) -> int:
        return self.bench.memory.read(self.table + block, 1)[0]

    def address(self, block: int) -> int:
        first = block >> self.log2_run << self.log2_run
        return self.slots + 160 * first + sum(self.bench.memory.read(self.table + first, block - first))

    def words(self, block: int) -> list[int]:
        """Addresses of the words that hold a block; none if its length is impossible."""
        if not 1 <= self.length(block) <= 145:
            return []
        word, address = self.bench.memory.word, self.address(block)
        return sorted({byte // word * word for byte in range(address, address + self.length(block))})

    def elements(self, block: int):
        """What the memory holds, or None."""
        if not self.words(block):
            return None
        return decode_block(self.bench.memory.read(self.address(block), self.length(block)))

    def spoil(self, block: int) -> None:
        """Make a block malformed; those after it in its run are where they were, or where its length now tells."""
        random, memory = self.random, self.bench.memory
        run, old = block >> self.log2_run, self.length(block)
        blocks = list(self.runs[run])
        lengths = {block: self.length(block) for block in blocks}
        raws = {block: memory.read(self.address(block), lengths[block]) for block in blocks}
        kind = random.integers(5)
        if kind < 2:  # a length that cannot be, or another one
            lengths[block] = int(random.choice([0, 146, 147, 160, 192, 255]))
            if kind == 1:
                lengths[block] = int(random.choice([length for length in range(1, 146) if length != old]))
            if random.random() < 0.5:
                self.lay(raws, lengths)
            else:
                memory.write(self.table + block, bytes([lengths[block]]))
        elif kind == 2:
            memory.write(self.address(block), bytes([int(random.integers(256))]))
        elif kind == 3:
            memory.write(self.address(block), random.bytes(old))
        else:
            spoilt = bytearray(raws[block])
            spoilt[int(random.integers(old))] ^= 1 << int(random.integers(8))
            memory.write(self.address(block), bytes(spoilt))


class Bench:
    def __init__(self, dut, seed: int) -> None:
        self.dut = dut
        self.config = TINY.replace(**parameters()["config"])
        self.beat, self.lanes = self.config.beat, self.config.lanes
        self.parts = 64 // self.beat
        self.random = rng(seed)
        self.memory = Memory(dut, self.config, seed + 1)
        self.commands = Source(dut, "command", seed=seed + 2)
        self.sink = Sink(dut, "vmem", seed=seed + 3)
        self.write_layout, self.vmem_layout = buffer_write(self.config), vmem_write(self.config)
        self.events_layout = load_events(self.config)
        self.writes: list[int] = []
        self.errors: Counter[Error] = Counter()
        self.bits: Counter[int] = Counter()
        self.queued = 0  # cycles
        self._restart()

    def _restart(self) -> None:
        """Begin to count commands, and what they write."""
        self.taken = self.effects = self.since_taken = 0
        # Commands taken -> writes at the time when, by `queued`, all but the last of these were done.
        self.done_before: dict[int, int] = {}

    async def start(self):
        await start(self.dut)
        cocotb.start_soon(self._monitor())
        return self

    async def _monitor(self):
        dut, edge = self.dut, RisingEdge(self.dut.clk)
        error, write, events, busy, ready = dut.error, dut.write, dut.events, dut.busy, dut.command__ready
        queued, offered = dut.queued, dut.command__valid
        row_valid, row_ready = dut.vmem__valid, dut.vmem__ready
        valid, events_mask, events_shift = 1, (1 << self.events_layout["bits"].width) - 1, 3
        assert self.write_layout["valid"].offset == 0 and self.events_layout["bits"].offset == events_shift
        while True:
            await edge
            assert int(busy.value) or int(ready.value), "neither busy nor ready for a command"
            self.effects += int(write.value) & valid
            self.effects += int(row_valid.value) and int(row_ready.value)
            self.since_taken += 1
            if int(queued.value):
                assert int(busy.value), "queued while not busy"
                self.queued += 1
            elif self.since_taken >= 2:  # all but the last command are done
                self.done_before.setdefault(self.taken, self.effects)
            if int(offered.value) and int(ready.value):
                self.taken, self.since_taken = self.taken + 1, 0
            if number := int(error.value):
                self.errors[Error(number)] += 1
                assert int(busy.value), "error while not busy"
            if (word := int(write.value)) & valid:
                self.writes.append(word)
                assert int(busy.value), "write while not busy"
            if bits := (event := int(events.value)) >> events_shift & events_mask:
                self.bits[event & 7] += bits

    def expect(self, fields: dict, tensor: Tensor | None):
        """Writes, vector-memory rows, plain bits, errors, block requests, table words of a valid LOAD."""
        f = Counter(fields)
        log2, beat, word = f["log2_block_pixels"], self.beat, self.memory.word
        writes, rows, bits, errors, fetches, words = [], [], 0, Counter(), [], []
        current, last_word, decoded = None, None, {}
        rows_limit, columns_limit = self.size(f["target"])
        for n in range(f["n_count"]):
            for i in range(f["i_count"]):
                for j in range(f["j_count"]):
                    line = f["line"] + n * f["line_n"] + i * f["line_i"]
                    pixel = f["pixel"] + j * f["pixel_j"]
                    row0 = f["dest"] + n * f["dest_n"] + i * f["dest_i"] + j * f["dest_j"]
                    valid = f["i_first"] <= i < f["i_end"] and f["j_first"] <= j < f["j_end"]
                    if valid and (line < 0 or pixel < 0):
                        errors[Error.RANGE] += 1
                        valid = False
                    if valid:
                        block = line * f["line_blocks"] + (pixel >> log2)
                        position = (pixel % (1 << log2)) * (self.parts >> log2) + f["channel"]
                        if current is None or current[0] != block or position <= current[1]:
                            table_word = (tensor.table + block) // word * word
                            if not words or words[-1] != table_word:
                                words.append(table_word)
                            if block not in decoded:
                                decoded[block] = tensor.elements(block), tensor.words(block)
                            elements, holding = decoded[block]
                            wanted = holding[1:] if holding and holding[0] == last_word else holding
                            if wanted:
                                fetches.append((wanted[0], len(wanted), f["kind"]))
                            last_word = holding[-1] if holding else last_word
                            if elements is None:
                                errors[Error.DECODE] += 1
                                elements = [(0, ZERO)] * 64
                        current = block, position
                    for b in range(f["channel_beats"]):
                        if valid:
                            some = elements[(position + b) * beat : (position + b + 1) * beat]
                            bits += 16 * beat
                        else:
                            some = [(f["fill"] if f["target"] & VMEM else 0, PADDING)] * beat
                        if f["target"] & VMEM:
                            if 0 <= row0 + b < self.config.vmem_rows:
                                rows.append((row0 + b, [single(value, f["scale"]) for value, _ in some]))
                            else:
                                errors[Error.RANGE] += 1
                            continue
                        row, column = row0, f["element"] + i * f["element_i"] + beat * b
                        if f["transpose"]:
                            row, column = column, row
                        if 0 <= row < rows_limit and 0 <= column < columns_limit:
                            mask = sum(positive(*element) << e for e, element in enumerate(some))
                            writes.append({
                                "valid": 1, "cores": f["cores"], "buffer": BUFFERS[f["target"]].value,
                                "page": f["page"], "transpose": f["transpose"], "row": row, "column": column,
                                "beat": {"data": [value for value, _ in some], "code": [code for _, code in some]},
                                "mask": mask if f["target"] & MASK else 0,
                            })  # fmt: skip
                        else:
                            errors[Error.RANGE] += 1
        table = [(address, 1, f["kind"]) for address in words]
        return writes, rows, bits, errors, fetches, table

    def size(self, target: int) -> tuple[int, int]:
        """Rows and columns of the buffer of a target; columns of the vector memory do not count."""
        config = self.config
        if target & VMEM:
            return config.vmem_rows, 0
        return {
            Buffer.SPARSE: (config.rows, config.depth),
            Buffer.DENSE: (config.dense_rows, self.lanes),
            Buffer.MASK: (config.psum_rows, self.lanes),
        }[BUFFERS[target]]

    def expect_raw(self, fields: dict):
        """The same of a valid LOAD_RAW."""
        f = Counter(fields)
        row_bytes, rows, errors, bits, requests = 4 * self.beat, [], Counter(), 0, []
        for line in range(f["line_count"]):
            place = (f["address"] + line * f["pitch"]) % (1 << self.config.address_bits)
            raw = self.memory.read(place, row_bytes * f["line_rows"])
            for offset in range(0, len(raw), RAW_ROWS * row_bytes):
                words = min(len(raw) - offset, RAW_ROWS * row_bytes) // self.memory.word
                requests.append((place + offset, words, f["kind"]))
            for row in range(f["line_rows"]):
                address = f["vmem"] + line * f["vmem_line"] + row
                bits += 32 * self.beat
                if 0 <= address < self.config.vmem_rows:
                    rows.append((address, struct.unpack_from(f"<{self.beat}I", raw, row * row_bytes)))
                else:
                    errors[Error.RANGE] += 1
        return [], rows, bits, errors, requests, []

    async def run(self, *commands: Command | int, limit: int = 200_000) -> int:
        """Run commands back to back; returns their cycles from the first's hand-over to `busy` falling."""
        self.writes, self.errors, self.bits, self.sink.words = [], Counter(), Counter(), []
        self._restart()
        for requests in self.memory.requests.values():
            requests.clear()
        words = [c if isinstance(c, int) else int.from_bytes(c.encode(), "little") for c in commands]
        await self.commands.put(words[0])
        since = get_sim_time("ns")
        await self.commands.put(words[1:])
        edge = RisingEdge(self.dut.clk)
        for _ in range(limit):
            await edge
            if not int(self.dut.busy.value):
                break
        else:
            raise TimeoutError(f"busy after {limit} cycles: {commands[-1]}")
        cycles = round((get_sim_time("ns") - since) / CLOCK)
        await edge
        return cycles

    def check(self, expected, fields: dict, what: str) -> None:
        """Compare everything the command did with the model's."""
        writes, rows, bits, errors, fetches, table = expected
        assert set(self.errors) == set(errors), f"{what}: errors {self.errors}, not {errors}"
        assert self.errors[Error.DECODE] == errors[Error.DECODE], f"{what}: {self.errors}, not {errors}"
        assert self.memory.requests["memory"] == fetches, f"{what}: {self.memory.requests['memory']}, not {fetches}"
        assert self.memory.requests["table"] == table, f"{what}: table {self.memory.requests['table']}, not {table}"
        wanted = [pack(self.write_layout, write) for write in writes]
        if self.writes != wanted:
            self._differ(what, self.write_layout, self.writes, wanted)
        wanted = [pack(self.vmem_layout, {"address": address, "row": row}) for address, row in rows]
        if self.sink.words != wanted:
            self._differ(what, self.vmem_layout, self.sink.words, wanted)
        assert self.bits == (Counter({fields.get("kind", 0): bits}) if bits else Counter()), f"{what}: {self.bits}"

    def _differ(self, what: str, layout, got: list[int], wanted: list[int]) -> None:
        """Fail and tell of the first difference."""
        k = next((k for k, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
        first = [unpack(layout, words[k]) if k < len(words) else None for words in (got, wanted)]
        raise AssertionError(f"{what}: {len(got)} writes, not {len(wanted)}; number {k}: {first[0]}, not {first[1]}")

    async def load(self, tensor: Tensor, fields: dict, what: str = "") -> int:
        fields = {"slots": tensor.slots, "table": tensor.table, "log2_run": tensor.log2_run} | fields
        expected, blocked = self.expect(fields, tensor), self.memory.blocked
        cycles = await self.run(Command(Opcode.LOAD, **fields))
        self.check(expected, fields, f"{what} {fields}")
        assert self.memory.blocked == blocked, f"{what}: words of a LOAD blocked others in the memory's data"
        return cycles

    def tile(self, *, channels=64, lines=3, pixels=4, halo=0, target=SPARSE, **more) -> tuple[dict, int]:
        """Fields to load lines x pixels of a plane of that size with a halo around, and the plane's blocks."""
        log2 = max(0, 6 - channels.bit_length() + 1)
        line_blocks = -(-pixels * channels // 64)
        width, height = pixels + 2 * halo, lines + 2 * halo
        beats = min(channels, 64) // self.beat
        step = beats if target & VMEM else 1
        fields = {
            "kind": 1, "n_count": 1, "i_count": height, "j_count": width, "line": -halo, "line_i": 1,
            "pixel": -halo, "pixel_j": 1, "line_blocks": line_blocks, "log2_block_pixels": log2,
            "target": target, "cores": 1, "i_first": halo,
            "i_end": halo + lines, "j_first": halo, "j_end": halo + pixels, "channel_beats": beats,
            "dest_i": width * step, "dest_j": step,
        }  # fmt: skip
        return fields | more, line_blocks * lines

    def random_walk(self, *, in_range: bool = True, target: int | None = None) -> tuple[Tensor, dict]:
        """Any LOAD that is not malformed (to `target`), and the blocks that it needs."""
        random = self.random

        def below(limit: int) -> int:
            return int(random.integers(limit))

        log2 = below(self.parts.bit_length())
        part = self.parts >> log2
        channel = below(part) if random.random() < 0.4 else 0
        beats = 1 + below(part - channel) if random.random() < 0.5 else part - channel
        counts = [1 + below(3), 1 + below(5), 1 + below(7)]
        target = int(random.choice([one.value for one in Target])) if target is None else target
        f = {
            "kind": below(8), "n_count": counts[0], "i_count": counts[1], "j_count": counts[2],
            "line": below(6) - 3, "line_n": below(8), "line_i": below(3), "pixel": below(9) - 4, "pixel_j": below(4),
            "line_blocks": 1 + below(6), "log2_block_pixels": log2, "target": target, "page": below(2),
            "transpose": 0 if target & MASK else below(2), "cores": 1 + below((1 << self.config.cores) - 1),
            "scale": below(129) - 64, "fill": below(1 << 16), "channel": channel, "channel_beats": beats,
        }  # fmt: skip
        for axis, count in (("i", counts[1]), ("j", counts[2])):
            first, end = sorted((below(count + 1), below(count + 1)))
            if random.random() < 0.5:
                first, end = 0, count
            f |= {f"{axis}_first": first, f"{axis}_end": end}
        if in_range or random.random() < 0.7:  # no negative line or pixel where it is read
            f["line"] = max(f["line"], -f["i_first"] * f["line_i"])
            f["pixel"] = max(f["pixel"], -f["j_first"] * f["pixel_j"])
        high, width = self.size(target)
        if target & VMEM:
            f |= {"element": below(1 << 12), "element_i": below(1 << 12)}
            high -= beats
        else:
            run = high if f["transpose"] else width
            high = width if f["transpose"] else high
            f["channel_beats"] = beats = min(beats, run // self.beat)
            spare = run // self.beat - beats
            f["element"] = below(spare + 1) * self.beat
            f["element_i"] = below((spare - f["element"] // self.beat) // counts[1] + 1) * self.beat
        strides = [below(7) - 3 for _ in range(3)]
        offsets = [[k * stride for k in range(count)] for stride, count in zip(strides, counts, strict=True)]
        low, top = sum(min(o) for o in offsets), sum(max(o) for o in offsets)
        if not in_range:
            strides = [below(40) - 20 if random.random() < 0.5 else s for s in strides]
            if random.random() < 0.3:
                strides[below(3)] = int(random.choice([-32768, 32767]))
            if random.random() < 0.3 and not target & VMEM:
                f["element"] = below(4096 // self.beat) * self.beat
            if random.random() < 0.3 and not target & VMEM:
                f["element_i"] = below(4096 // self.beat) * self.beat
            low = 0
        f |= {f"dest_{axis}": stride for axis, stride in zip("nij", strides, strict=True)}
        if in_range and top - low >= high:
            f |= {"dest_n": 0, "dest_i": 0, "dest_j": 0}
            low = top = 0
        f["dest"] = -low + below(max(1, high - (top - low))) if in_range else below(high + 2)

        blocks = set()
        for n in range(counts[0]):
            for i in range(f["i_first"], f["i_end"]):
                for j in range(f["j_first"], f["j_end"]):
                    line = f["line"] + n * f["line_n"] + i * f["line_i"]
                    pixel = f["pixel"] + j * f["pixel_j"]
                    if line >= 0 and pixel >= 0:
                        blocks.add(line * f["line_blocks"] + (pixel >> log2))
        tensor = Tensor(self)
        tensor.move(max(blocks, default=0) + 1)
        for block in sorted(blocks):
            tensor.put(block)
        return tensor, f


@cocotb.test()
async def tiles(dut):
    """Whole tiles with halos, every number of channels and target, without stalls."""
    bench = await Bench(dut, 100).start()
    channels = bench.beat
    while channels <= 64:
        for target in (SPARSE, DENSE, VMEM, VMEM_DENSE, DENSE_LOAD):
            for halo in (0, 1):
                to_dense = target in (DENSE, DENSE_LOAD)
                small = {"pixels": 2, "lines": 2} if to_dense and channels <= bench.lanes else {}
                fields, blocks = bench.tile(channels=channels, halo=halo, target=target, fill=0xC500, scale=3, **small)
                if to_dense:
                    fields["channel_beats"] = min(fields["channel_beats"], bench.lanes // bench.beat)
                await bench.load(Tensor(bench, blocks), fields, f"{channels} channels")
        channels *= 2


@cocotb.test()
async def random_walks(dut):
    """Random walks to every target, with stalls and latencies; negative starts, repeated and skipped pixels."""
    bench = await Bench(dut, 200).start()
    for number in range(110):
        tensor, fields = bench.random_walk()
        bench.memory.stall = bench.sink.stall = bench.random.choice([0, 0, 0.3, 0.7])
        bench.memory.latency = int(bench.random.choice([1, 5, 40]))
        bench.memory.spread = int(bench.random.choice([0, 20]))
        await bench.load(tensor, fields, f"walk {number}")


@cocotb.test()
async def masks(dut):
    """Infinities, NaNs, subnormals and zeros of both signs, and padding: which of them a mask takes as above zero."""
    bench = await Bench(dut, 250).start()
    words = (0x7C00, 0x7C01, 0x7E00, 0x7FFF, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF)
    special = [(FP16, word | sign) for word in words for sign in (0, 0x8000)]
    special += [(FP8, 0x38), (FP8, 0xB8), (ZERO, 0)]
    blocks = bench.config.lanes // bench.beat
    for number in range(12):
        tensor = Tensor(bench, 2, log2_run=0)
        raws = {}
        for block in range(2):
            chosen = bench.random.permutation(np.tile(np.arange(len(special)), 4))[:64]
            raws[block] = encode_block([special[k] for k in chosen])
        tensor.lay(raws, {block: len(raw) for block, raw in raws.items()})
        beats = min(bench.parts, blocks)
        fields = {
            "n_count": 1, "i_count": 1, "j_count": 4, "i_end": 1, "j_first": 1, "j_end": 3, "pixel": -1, "pixel_j": 1,
            "line_blocks": 2, "channel_beats": beats, "target": MASK, "page": number % 2, "cores": 1,
            "dest": number, "dest_j": 1, "element": bench.beat * int(bench.random.integers(blocks - beats + 1)),
        }  # fmt: skip
        await bench.load(tensor, fields, f"mask {number}")
        assert len(bench.writes) == 4 * beats


@cocotb.test()
async def out_of_range(dut):
    """Destinations outside buffers and pixels outside the tensor: RANGE, and everything else as it should be."""
    bench = await Bench(dut, 300).start()
    seen = 0
    for number in range(80):
        tensor, fields = bench.random_walk(in_range=False)
        bench.memory.stall = bench.sink.stall = bench.random.choice([0, 0.3])
        await bench.load(tensor, fields, f"walk {number}")
        seen += Error.RANGE in bench.errors
    assert seen > 20
    # The first and the last place of each buffer, and those next to it.
    config = bench.config
    for target in (SPARSE, DENSE, MASK, DENSE_LOAD):
        rows, columns = bench.size(target)
        for transpose in (0,) if target == MASK else (0, 1):
            run, fixed = (rows, columns) if transpose else (columns, rows)
            for dest in (0, fixed - 1, fixed, 65535):
                for element in (0, run - bench.beat, run, 4096 - bench.beat):
                    fields, blocks = bench.tile(
                        channels=64, lines=1, pixels=1, target=target, transpose=transpose, dest=dest, element=element,
                        channel_beats=1,
                    )  # fmt: skip
                    await bench.load(Tensor(bench, blocks), fields)
                    assert (Error.RANGE in bench.errors) == (dest >= fixed or element >= run)
    for dest, dest_j in ((0, -1), (config.vmem_rows - 1, 1), (config.vmem_rows - 2, 1), (1, -1), (65535, 1)):
        fields, blocks = bench.tile(
            channels=64, lines=1, pixels=2, target=VMEM, channel_beats=1, dest=dest, dest_j=dest_j
        )
        await bench.load(Tensor(bench, blocks), fields)


@cocotb.test()
async def runs(dut):
    """Runs of each length: whole, in part, backwards, strided, again; the words that are asked for, by hand."""
    bench = await Bench(dut, 350).start()
    word = bench.memory.word
    for log2_run in range(min(4, word.bit_length() - 1) + 1):
        for zeros, fp16 in ((1, 0), (0, 0), (0.9, 0.5), (None, None)):
            tensor = Tensor(bench, 67, log2_run=log2_run, zeros=zeros, fp16=fp16)
            walk = bench.tile(lines=1, pixels=64, target=VMEM, line_blocks=100)[0]
            await bench.load(tensor, walk, f"all of runs of {1 << log2_run}")
            # In order, no word is asked for twice.
            asked = [address + word * k for address, words, _ in bench.memory.requests["memory"] for k in range(words)]
            whole = {address for block in range(64) for address in tensor.words(block)}
            assert asked == sorted(whole), f"{log2_run}: {asked}, not {sorted(whole)}"
            if zeros == 1:
                assert len(asked) == 64 >> log2_run
            bench.memory.stall = bench.sink.stall = bench.random.choice([0, 0.4])
            for pixel in range(0, 4 << log2_run, 1 + bench.random.integers(3 << max(0, log2_run - 1))):
                for count, step in ((1, 1), (3, 1), (5, 2), (3, 7), (2, 0)):
                    if pixel + (count - 1) * step < 64:
                        part = {"pixel": pixel, "pixel_j": step, "j_count": count, "j_end": count}
                        await bench.load(tensor, walk | part, f"part of runs of {1 << log2_run}")
            # Lines of one pixel each, several times, in an order that goes back by a wrap of the block's number.
            again = {
                "j_count": 2, "j_end": 2, "pixel_j": 1, "n_count": 3, "line_n": 0, "i_count": 9, "i_end": 9,
                "line_i": 1, "line_blocks": 5, "dest_n": 9,
            }  # fmt: skip
            await bench.load(tensor, walk | again, f"runs of {1 << log2_run} again")
            bench.memory.stall = bench.sink.stall = 0.0


@cocotb.test()
async def bad_blocks(dut):
    """Impossible and wrong lengths, malformed blocks: DECODE for each fetch, zeros, and the next command works."""
    bench = await Bench(dut, 400).start()
    for number in range(80):
        tensor, fields = bench.random_walk()
        for run in list(tensor.runs.values()):
            for block in run:
                if bench.random.random() < 0.3:
                    tensor.spoil(block)
        bench.memory.stall = bench.sink.stall = bench.random.choice([0, 0.3])
        await bench.load(tensor, fields, f"walk {number}")
        if number % 4 == 0:
            await bench.load(*bench.random_walk(), "next")
    bench.memory.stall = bench.sink.stall = 0.0
    fields, blocks = bench.tile(lines=5, pixels=12, channels=64)
    for length in (0, 146, 255):
        tensor = Tensor(bench, blocks)
        bench.memory.write(tensor.table, bytes([length] * blocks))
        await bench.load(tensor, fields, f"only lengths of {length}")
        assert bench.errors[Error.DECODE] == blocks and not bench.memory.requests["memory"]


@cocotb.test()
async def neighbours(dut):
    """One bad block at each place of a run: the others are what they were."""
    bench = await Bench(dut, 450).start()
    walk = bench.tile(lines=1, pixels=16, target=VMEM)[0]
    for log2_run in range(min(4, bench.memory.word.bit_length() - 1) + 1):
        for place in range(1 << log2_run):
            changes = [0, 146, 200, 255, -1, 1, "bytes", "all before"]
            if log2_run > 2:  # there are many places
                changes = bench.random.choice(np.array(changes, dtype=object), 3, replace=False).tolist()
            for change in changes:
                tensor = Tensor(bench, 16, log2_run=log2_run)
                run = tensor.runs[0]
                lengths = {block: tensor.length(block) for block in run}
                raws = {block: bench.memory.read(tensor.address(block), lengths[block]) for block in run}
                bad = set(range(place)) if change == "all before" else {place}
                if change == "all before":  # as far from the run's beginning as can be
                    lengths |= dict.fromkeys(bad, 255)
                elif change == "bytes":
                    raws[place] = bench.random.bytes(lengths[place])
                elif change in (-1, 1):
                    lengths[place] = min(145, max(1, lengths[place] + change))
                else:
                    lengths[place] = change
                tensor.lay(raws, lengths)
                for block, elements in run.items():
                    if block not in bad:
                        assert tensor.elements(block) == elements, f"{change}: block {block} by the model"
                bench.memory.stall = bench.sink.stall = bench.random.choice([0, 0.3])
                what = f"{change} for block {place} of runs of {1 << log2_run}"
                await bench.load(tensor, walk, what)
                # Beginning with it; between two reads of the one before.
                await bench.load(tensor, walk | {"pixel": place, "j_count": 16 - place, "j_end": 16 - place}, what)
                back = {"line_blocks": 1, "n_count": 2, "i_count": 2, "i_end": 2, "j_count": 1, "j_end": 1}
                await bench.load(tensor, walk | back | {"line": max(0, place - 1), "dest_n": 2 * bench.parts}, what)


@cocotb.test()
async def malformed_commands(dut):
    """Each rule broken: FIELD once, nothing read or written, the next command works; the limits themselves are fine."""
    bench = await Bench(dut, 500).start()
    config, word = bench.config, bench.memory.word
    good, _ = bench.tile(channels=64)
    longest = min(4, word.bit_length() - 1)
    tensor = Tensor(bench, 64, log2_run=longest)
    parts, part_bits = bench.parts, bench.parts.bit_length() - 1
    shared = {"log2_block_pixels": 1, "channel_beats": 1}
    bad = [
        {"n_count": 0}, {"i_count": 0, "i_end": 0}, {"j_count": 0, "j_end": 0}, {"line_blocks": 0},
        {"channel_beats": 0}, {"channel_beats": parts + 1}, {"channel": 1}, {"channel_beats": 31, "channel": 31},
        shared | {"channel": parts // 2}, shared | {"channel_beats": parts // 2 + 1},
        {"log2_block_pixels": part_bits + 1, "channel_beats": 1}, {"log2_block_pixels": 7, "channel_beats": 1},
        *({"log2_run": log2} for log2 in range(longest + 1, 8)),
        {"scale": 65}, {"scale": -65}, {"scale": -128}, {"target": VMEM, "scale": 127},
        {"i_end": good["i_count"] + 1}, {"i_first": 3, "i_end": 2}, {"j_end": good["j_count"] + 1}, {"j_first": 4095},
        *({"slots": tensor.slots + (1 << k)} for k in range(5)),
        *({"table": tensor.table + (1 << k)} for k in range(5)),
        {"cores": 0}, {"target": DENSE, "cores": 0}, {"target": MASK, "cores": 0},
        *({"element": 1 << k} for k in range(part_bits) if 1 << k < bench.beat),
        {"target": DENSE, "element": bench.beat - 1}, {"target": MASK, "element": 1}, {"element_i": bench.beat + 1},
        {"target": MASK, "transpose": 1}, {"target": MASK_DENSE, "transpose": 1}, {"target": 6}, {"target": 7},
        {"target": 9}, {"target": 10}, {"target": 12}, {"target": DENSE_LOAD, "cores": 0},
        {"target": DENSE_LOAD, "element": 1},
    ]  # fmt: skip
    if config.cores < 16:
        bad += [{"cores": 1 << config.cores}, {"cores": 0x8001}]
    if config.address_bits < 40:
        bad += [{"slots": 1 << config.address_bits}, {"table": 1 << 39}]
    fine = [
        {}, {"i_first": 1, "i_end": 1}, {"j_first": good["j_count"], "j_end": good["j_count"]},
        shared | {"channel": parts // 2 - 1}, {"log2_block_pixels": part_bits, "channel_beats": 1}, {"scale": 64},
        {"target": MASK, "channel_beats": 1},
        {"target": VMEM, "scale": -64, "cores": 0, "element": 1}, {"target": VMEM_DENSE, "scale": 64, "cores": 0xFFFF},
    ]  # fmt: skip
    for fields in fine:
        await bench.load(tensor, good | fields, "limit")
    for number, broken in enumerate(bad):
        fields = {"slots": tensor.slots, "table": tensor.table} | good | broken
        await bench.run(Command(Opcode.LOAD, **fields))
        bench.check(([], [], 0, Counter({Error.FIELD: 1}), [], []), fields, f"{broken}")
        assert bench.errors[Error.FIELD] == 1
        if number % 8 == 0:
            await bench.load(tensor, good, "next")
    raw = {"address": 4096, "line_count": 1, "line_rows": 1}
    bad = [
        {"line_count": 0}, {"line_rows": 0}, *({"address": 1 << k} for k in range(word.bit_length() - 1)),
        *({"pitch": 1 << k} for k in range(word.bit_length() - 1)),
    ]  # fmt: skip
    for broken in bad:
        await bench.run(Command(Opcode.LOAD_RAW, **(raw | broken)))
        bench.check(([], [], 0, Counter({Error.FIELD: 1}), [], []), {}, f"{broken}")
    for opcode in (Opcode.STORE, Opcode.END, Opcode.MARK):
        await bench.run(Command(opcode))
        bench.check(([], [], 0, Counter({Error.FIELD: 1}), [], []), {}, f"{opcode}")
    await bench.run(0xEE)
    assert bench.errors == Counter({Error.FIELD: 1})
    await bench.load(tensor, good, "next")


async def load_raw(bench, what: str = "", **fields: int) -> int:
    """Run LOAD_RAW and check rows, requests, plain bits and errors."""
    expected = bench.expect_raw(fields)
    cycles = await bench.run(Command(Opcode.LOAD_RAW, **fields))
    bench.check(expected, fields, f"{what} {fields}")
    return cycles


@cocotb.test()
async def raw(dut):
    """LOAD_RAW: random lines, destinations backwards and outside, a line longer than a request, between LOADs."""
    bench = await Bench(dut, 600).start()
    random, word = bench.random, bench.memory.word
    for number in range(40):
        bench.memory.stall = bench.sink.stall = random.choice([0, 0.3, 0.6])
        bench.memory.latency = int(random.choice([1, 5, 40]))
        await load_raw(
            bench,
            f"raw {number}",
            address=int(random.integers(0, 1 << 30)) * word % (1 << bench.config.address_bits - 1),
            kind=int(random.integers(8)), line_count=int(random.integers(1, 6)), line_rows=int(random.integers(1, 9)),
            pitch=int(random.integers(0, 1 << 20)) * word,
            vmem=int(random.choice([0, 100, bench.config.vmem_rows - 6, 65535], p=[0.3, 0.3, 0.3, 0.1])),
            vmem_line=int(random.choice([0, 1, 7, -3, -32768, 32767])),
        )  # fmt: skip
        if number % 8 == 0:
            await bench.load(*bench.random_walk(), "between")
    bench.memory.stall = bench.sink.stall = 0.0
    await load_raw(bench, "one", address=0, line_count=1, line_rows=1)
    cycles = await load_raw(bench, "long", address=word, line_count=2, line_rows=2051, pitch=1 << 17, vmem_line=-1)
    ideal = 2 * 2051 * 4 * bench.beat // word
    dut._log.info(f"LOAD_RAW: {cycles} cycles for {ideal} words")
    assert cycles < ideal * 1.01 + 60


@cocotb.test()
async def back_to_back(dut):
    """Commands that overlap: what each does, in order, as if it ran alone, with bad blocks and commands among them."""
    bench = await Bench(dut, 660).start()
    random = bench.random
    for number in range(40):
        bench.memory.stall = bench.sink.stall = random.choice([0, 0.3])
        bench.memory.latency = int(random.choice([1, 5, 40]))
        commands, kinds, effects = [], Counter(), [0]
        writes, rows, errors, fetches, table = [], [], Counter(), [], []
        for _ in range(int(random.integers(2, 7))):
            effects.append(len(writes) + len(rows))  # of the commands before
            choice = random.random()
            if choice < 0.1:
                commands.append(Command(Opcode.LOAD))  # nothing but zeros
                errors[Error.FIELD] += 1
                continue
            if choice < 0.25:
                fields = {
                    "address": int(random.integers(1 << 16)) * bench.memory.word, "kind": int(random.integers(8)),
                    "line_count": 1 + int(random.integers(3)), "line_rows": 1 + int(random.integers(6)),
                    "pitch": int(random.integers(64)) * bench.memory.word, "vmem": 16, "vmem_line": 9,
                }  # fmt: skip
                commands.append(Command(Opcode.LOAD_RAW, **fields))
                parts = bench.expect_raw(fields)
            else:
                tensor, fields = bench.random_walk(in_range=random.random() < 0.8)
                if random.random() < 0.2:
                    for run in list(tensor.runs.values()):
                        tensor.spoil(next(iter(run)))
                fields = {"slots": tensor.slots, "table": tensor.table, "log2_run": tensor.log2_run} | fields
                commands.append(Command(Opcode.LOAD, **fields))
                parts = bench.expect(fields, tensor)
            for whole, part in zip((writes, rows, fetches, table), (*parts[:2], *parts[4:]), strict=True):
                whole += part
            kinds[fields.get("kind", 0)] += parts[2]
            errors += parts[3]
        await bench.run(*commands)
        assert bench.bits == +kinds, f"sequence {number}: {commands}"
        bench.bits = Counter()
        bench.check((writes, rows, 0, errors, fetches, table), {}, f"sequence {number}: {commands}")
        for taken, done in bench.done_before.items() if not errors[Error.FIELD] else ():
            assert done >= effects[taken], f"sequence {number}: not queued before command {taken - 2} is done"
    assert bench.queued > 500

    # Small tiles from a slow memory: the fetches of one go on while another is brought to its place.
    bench.memory.stall = bench.sink.stall = 0.0
    bench.memory.latency = 30
    fields, blocks = bench.tile(lines=4, pixels=4)
    tensor = Tensor(bench, blocks, zeros=0.5, fp16=0.0)
    fields |= {"slots": tensor.slots, "table": tensor.table, "log2_run": tensor.log2_run}
    alone = await bench.run(Command(Opcode.LOAD, **fields))
    together = await bench.run(*[Command(Opcode.LOAD, **fields)] * 16)
    beats = 16 * bench.parts
    dut._log.info(f"LOAD of {beats} beats: {alone} cycles alone, {together / 16:.0f} of 16 back to back")
    assert together <= 16 * max(beats + 8, alone - 2 * bench.memory.latency + 8) + 2 * bench.memory.latency


@cocotb.test()
async def lone_blocks(dut):
    """Every block has its length in another word of the table: reads of both clients wait for each other on the bus."""
    bench = await Bench(dut, 650).start()
    tensor = Tensor(bench)
    tensor.slots, tensor.table, step = 1 << 20, 1 << 12, 33
    for line in range(60):
        tensor.put(step * line)
    for latency, memory_stall, sink_stall, depth in (
        (1, 0.0, 0.9, 100), (60, 0.0, 0.0, 100), (10, 0.5, 0.5, 8), (5, 0.0, 0.5, 3), (5, 0.0, 0.0, 1),
    ):  # fmt: skip
        fields, _ = bench.tile(channels=64, lines=60, pixels=1, target=VMEM, line_blocks=step)
        bench.memory.latency, bench.memory.stall, bench.memory.depth = latency, memory_stall, depth
        bench.sink.stall, bench.memory.table_first = sink_stall, depth < 4
        cycles = await bench.load(tensor, fields, f"latency {latency}")
        dut._log.info(f"LOAD of lone blocks: {cycles} cycles for 60 with a latency of {latency}")
        assert len(bench.memory.requests["table"]) == 60


@cocotb.test()
async def throughput(dut):
    """No stalls, some latency: a beat or a word a cycle, whichever binds, also where pixels are small."""
    bench = await Bench(dut, 700).start()
    bench.memory.latency = 30
    word, parts = bench.memory.word, bench.parts
    mixes = (
        ("dense FP16", 0, 1), ("dense FP8", 0, 0), ("FP8, half zeros", 0.5, 0), ("mixed, half zeros", 0.5, 0.5),
        ("mixed, 10% FP16", 0, 0.1), ("empty", 1, 0),
    )  # fmt: skip

    async def measure(name: str, zeros: float, fp16: float, log2_run: int, **shape: int) -> tuple[int, int, int]:
        """Cycles, beats placed, and the cycles that the slowest part needs."""
        fields, blocks = bench.tile(target=VMEM, **shape)
        tensor = Tensor(bench, blocks, log2_run=log2_run, zeros=zeros, fp16=fp16)
        bench.memory.words = 0
        cycles = await bench.load(tensor, fields, name)
        beats = fields["i_count"] * fields["j_count"] * fields["channel_beats"]
        leftover = blocks * parts - shape["lines"] * shape["pixels"] * fields["channel_beats"]
        outputs = sum(-(-tensor.length(block) // word) for block in range(blocks))
        # Words of memory, with those of the table; words to decode, behind each other but for words of the table;
        # beats, with those that no pixel needs.
        ideal = max(bench.memory.words, outputs + len(bench.memory.requests["table"]), beats + leftover)
        if word == 8:  # the lengths of 8 blocks at a time
            ideal = max(ideal, blocks * (bench.memory.latency + 16) // 8)
        first = 2 * bench.memory.latency + 145 // word + 40
        assert cycles <= 1.1 * ideal + first, f"{shape} {name}: {cycles} cycles, ideal {ideal}"
        return cycles, beats, ideal

    for log2_run in (0, min(4, word.bit_length() - 1)):
        for name, zeros, fp16 in mixes:
            small, large = [
                await measure(name, zeros, fp16, log2_run, channels=64, lines=lines, pixels=16) for lines in (4, 12)
            ]
            cycles, beats, ideal = (b - a for a, b in zip(small, large, strict=True))
            dut._log.info(
                f"LOAD {bench.config.axi_bits} bits, beat {bench.beat}, runs of {1 << log2_run}, {name}: "
                f"{beats / cycles:.3f} beats a cycle in the steady state, {beats / ideal:.3f} by the slowest part"
            )
            assert cycles <= 1.01 * ideal + 4, f"{name}, runs of {1 << log2_run}: {cycles} cycles, not {ideal}"
            for shape in ((64, 4, 4, 1), (bench.beat, 6, 16, 0), (bench.beat, 4, 8, 1), (16, 5, 7, 1)):
                names = ("channels", "lines", "pixels", "halo")
                await measure(name, zeros, fp16, log2_run, **dict(zip(names, shape, strict=True)))
    assert LAYOUTS[Opcode.LOAD].size <= 512 and bench.memory.largest_backlog >= 3
