"""Cycles of a program, estimated from its commands and from how full the streamed operands are: no simulation.

Commands start in order, as the command processor starts them; each unit and each core has a time at which it is free.
How long a command keeps its unit follows from its fields. What is approximate: data are an expectation (`Mix`), and
ports that units share (the bus, the vector memory) are not arbitrated cycle by cycle. `verif/tests/test_cycles.py`
compares with the simulated chip.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lnpu.compiler.program import Program
from lnpu.compiler.tensor import Tensor
from lnpu.config import BLOCK, ChipConfig
from lnpu.ctrl.commands import (
    COMMAND_BYTES,
    TAKES_TWO,
    Command,
    Opcode,
    Target,
    Unit,
    VectorOp,
    unit_of,
)
from lnpu.ctrl.counters import COUNTERS

__all__ = ["RESOURCES", "Fields", "Mix", "Pages", "Segment", "block_span", "expected_visit_cycles", "predict_cycles"]

RESOURCES = ("load", "load_dense", "store", "store_raw", "vector", "drain", "fgmp", "cores", "issue")
"""What a command may have to wait for. "issue": the command processor itself."""

# Cycles beside a command's elements, from the chip's simulation with a memory latency of 0.
_ISSUE = 4  # from one command to the next
_LOOKUP = 4  # for each dynamic tensor that a command names
_WAIT = 2  # from the end of what a command waits for to its start
_LOAD, _RAW, _NEXT_LOAD = 22, 10, 26  # until the first element; for the next one behind another, which is fetched ahead
_STORE, _STORE_RAW = 13, 10
_DRAIN, _VECTOR, _MULTIPLY = 10, 9, 8
_NEXT_DRAIN = 3  # from a DRAIN's last row to the next one's first, at least
_DIVIDE = 34  # of an element
_ADAPT, _STATE = 30, 8
_MARK = 16
_WIDE = 1.15  # cycles of a beat where every element is FP16
_BUS = 1.05  # cycles of a word read: bursts are short

_UNIT_NAMES = tuple(unit.name.lower() for unit in Unit)
_TENSORS = ("tensor", "tensor_a", "tensor_b", "tensor_out")


@dataclass(frozen=True)
class Mix:
    """What the elements of an encoded tensor are.

    Parameters
    ----------
    nonzero : float
        Share of the elements of its pixels, channels of padding included, that are not zero.
    fp8 : float
        Share of these in FP8.
    fill : float
        Share of a block that pixels take: less than 1 where lines end within blocks.
    """

    nonzero: float = 1.0
    fp8: float = 1.0
    fill: float = 1.0

    @classmethod
    def of(cls, tensor: Tensor, nonzero: float = 1.0, fp8: float = 1.0) -> "Mix":
        """That of a tensor, of whose real elements `nonzero` are not zero."""
        blocks = -(-tensor.width // tensor.block_pixels)
        fill = tensor.width / (blocks * tensor.block_pixels)
        return cls(nonzero * tensor.channels / tensor.padded, fp8, fill)

    @property
    def block_bytes(self) -> float:
        """Expected length of an encoded block, in bytes."""
        count = BLOCK * self.nonzero * self.fill
        if count == 0:
            return 1.0
        mask = 8 if count < BLOCK else 0
        precisions = 0.0 if self.fp8 in (0, 1) else min(count / 8, count * (1 - self.fp8))
        return 1 + mask + precisions + count * (2 - self.fp8)


@dataclass
class Segment:
    """What happens up to a mark (the last: up to the end).

    Attributes
    ----------
    layer, phase : str
        Those of the mark.
    cycles : float
    commands : int
    busy : dict of str to float
        Cycles in which each unit works, and core-cycles of "cores".
    waits : dict of str to float
        Cycles by what the next command waits for; they add up to `cycles`.
    read_words, write_words : float
        AXI words.
    products, ideal : float
        Expected multiply-accumulates, and the cycles that they take at peak on all lanes of all cores.
    """

    layer: str
    phase: str
    cycles: float = 0.0
    commands: int = 0
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RESOURCES, 0.0))
    waits: dict[str, float] = field(default_factory=lambda: dict.fromkeys(RESOURCES, 0.0))
    read_words: float = 0.0
    write_words: float = 0.0
    products: float = 0.0
    ideal: float = 0.0


def predict_cycles(
    program: Program, mixes: Mapping[int, Mix] | None = None, *, default: Mix | None = None, latency: int = 8
) -> list[Segment]:
    """Estimate a program's cycles, a segment a mark.

    Parameters
    ----------
    program : Program
    mixes : mapping of int to Mix
        Of the encoded tensors, by the address of their length table.
    default : Mix
        Of the others; all FP8 without zeros if there is none.
    latency : int
        Of the memory, in cycles: to the first word of a read, and to the answer to a write.
    """
    return _Model(program, mixes or {}, default or Mix(), latency).run()


class Fields(dict[str, int]):
    """Fields of a command; those that it does not name are 0."""

    def __missing__(self, key: str) -> int:
        return 0


def block_span(f: Mapping[str, int], *, store: bool, word: int, length: float) -> tuple[int, float]:
    """Blocks of a LOAD or STORE, and AXI words of `word` bytes for them and their lengths in the table."""
    if store:
        lines, first, step, pixels = f["n_count"] * f["i_count"], f["pixel"], 1, f["j_count"]
    else:
        lines = f["n_count"] * max(0, f["i_end"] - f["i_first"])
        step, pixels = f["pixel_j"], max(0, f["j_end"] - f["j_first"])
        first = f["pixel"] + f["j_first"] * step
    if not lines or not pixels:
        return 0, 0.0
    shift = f["log2_block_pixels"]
    begin, end = first >> shift, first + (pixels - 1) * step >> shift
    count = min(pixels, end - begin + 1)
    run = f["log2_run"]
    height = lines // f["n_count"]
    if count == f["line_blocks"] and (height == 1 or store or f["line_i"] == 1):  # lines that follow one another
        groups = 1 if f["line_n"] == height else f["n_count"]
        total = lines // groups * count
        runs, table = groups * -(-total >> run), groups * math.ceil(total / word)
    else:
        runs = lines * ((end >> run) - (begin >> run) + 1 if count == end - begin + 1 else count)
        table = math.ceil(lines * max(count / word, min(1.0, f["line_blocks"] / word)))
    blocks = lines * count
    return blocks, blocks * length / word + runs / 2 + table


@lru_cache(maxsize=1 << 16)
def _visit_cycles(counts: tuple[int, ...], mix: Mix) -> float:
    """Expected cycles of a visit with so many elements of each bank that may be non-zero.

    That is E[n16] + E[max(n8 / 2 rounded up, most n8 of a bank)] + P(no element); the second is the sum over m of the
    chance that it is more than m: that not every bank has at most m, with at most 2 m in all.
    """
    count, p = sum(counts), mix.nonzero * mix.fp8
    pairs = 0.0
    for m in range(-(-count // 2)):
        total = np.ones(1)
        for n in counts:
            total = np.convolve(total, _chances(n, p)[: m + 1])
        pairs += 1 - float(total[: 2 * m + 1].sum())
    return count * mix.nonzero * (1 - mix.fp8) + pairs + (1 - mix.nonzero) ** count


@lru_cache(maxsize=1 << 12)
def _chances(n: int, p: float) -> NDArray[np.float64]:
    """Chances of 0 .. n among n, each with chance `p`."""
    return np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])


def expected_visit_cycles(config: ChipConfig, nonzero: float, *, fp8: bool) -> float:
    """Cycles of a visit to a whole row, of whose elements a share `nonzero` is not zero, all of one precision."""
    banks = config.dense_banks
    return _visit_cycles((config.depth // banks,) * banks, Mix(nonzero, float(fp8)))


class Pages:
    """What may be non-zero in the pages of the sparse buffers, and what products take with it.

    Contents are numbered: programs repeat themselves, so each kind of command is worked out once.
    """

    def __init__(self, config: ChipConfig) -> None:
        self.config = config
        empty = np.zeros((config.rows, config.depth), bool)
        self._contents = [(empty, Mix())]
        self._numbers: dict[tuple[bytes, Mix], int] = {(empty.tobytes(), Mix()): 0}
        self._pages: dict[tuple[int, int], int] = {}
        self._loads: dict[tuple, int] = {}
        self._products: dict[tuple, tuple[float, float, float]] = {}

    def load(self, f: Mapping[str, int], mix: Mix) -> None:
        """A LOAD to sparse buffers."""
        names = (
            "n_count", "i_count", "j_count", "i_first", "i_end", "j_first", "j_end", "channel_beats", "transpose",
            "dest", "dest_n", "dest_i", "dest_j", "element",
        )  # fmt: skip
        shape = (*[f[name] for name in names], mix)
        for core in _bits(f["cores"]):
            before = self._pages.get((core, f["page"]), 0)
            key = (before, shape)
            if key not in self._loads:
                self._loads[key] = self._loaded(before, f, mix)
            self._pages[core, f["page"]] = self._loads[key]

    def _loaded(self, before: int, f: Mapping[str, int], mix: Mix) -> int:
        content = self._contents[before][0].copy()
        n, i, j = np.ogrid[: f["n_count"], : f["i_count"], : f["j_count"]]
        at = (f["dest"] + n * f["dest_n"] + i * f["dest_i"] + j * f["dest_j"]).ravel()
        valid = (i >= f["i_first"]) & (i < f["i_end"]) & (j >= f["j_first"]) & (j < f["j_end"])
        valid = np.broadcast_to(valid, (f["n_count"], f["i_count"], f["j_count"])).ravel()
        target = content.T if f["transpose"] else content
        target[at, f["element"] : f["element"] + f["channel_beats"] * self.config.beat] = valid[:, None]
        key = (content.tobytes(), mix)
        if key not in self._numbers:
            self._numbers[key] = len(self._contents)
            self._contents.append((content, mix))
        return self._numbers[key]

    def multiply(self, f: Mapping[str, int], core: int) -> tuple[float, float, float]:
        """Expected cycles of a MULTIPLY's visits, elements, and cycles of these elements at peak."""
        number = self._pages.get((core, f["sparse_page"]), 0)
        names = [f"{name}_{loop}" for name in ("count", "row") for loop in "nhwrs"]
        key = (number, f["row"], f["shift"], f["shift_r"], f["shift_s"], f["kmask"], *[f[name] for name in names])
        if key not in self._products:
            self._products[key] = self._multiplied(number, f)
        return self._products[key]

    def _multiplied(self, number: int, f: Mapping[str, int]) -> tuple[float, float, float]:
        content, mix = self._contents[number]
        depth, banks = self.config.depth, self.config.dense_banks
        n, h, w = np.ogrid[: f["count_n"], : f["count_h"], : f["count_w"]]
        rows = (f["row"] + n * f["row_n"] + h * f["row_h"] + w * f["row_w"]).ravel()
        cycles, elements = 0.0, 0
        for r in range(f["count_r"]):
            for s in range(f["count_s"]):
                window = f["kmask"] << max(0, f["shift"] + r * f["shift_r"] + s * f["shift_s"])
                mask = np.array([window >> k & 1 for k in range(depth)], bool)
                at = np.clip(rows + r * f["row_r"] + s * f["row_s"], 0, self.config.rows - 1)
                seen = content[at] & mask
                elements += int(seen.sum())
                of_banks = np.sort(seen.reshape(len(at), -1, banks).sum(1), axis=1)
                kinds, times = np.unique(of_banks, axis=0, return_counts=True)
                cycles += sum(
                    int(n) * _visit_cycles(tuple(kind), mix) for n, kind in zip(times, kinds.tolist(), strict=True)
                )
        count = elements * mix.nonzero
        return cycles, count, count * (1 - mix.fp8 / 2)


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(16) if mask >> bit & 1]


class _Model:
    """The event simulation."""

    def __init__(self, program: Program, mixes: Mapping[int, Mix], default: Mix, latency: int) -> None:
        self.program, self.config, self.latency = program, program.config, latency
        self.mixes, self.default = mixes, default
        self.word = self.config.axi_bits // 8
        self.pages = Pages(self.config)
        # When the last command and the one before it are done: of each unit, of each core.
        self.units, self.units_before = [0.0] * len(Unit), [0.0] * len(Unit)
        self.free = [0.0] * len(Unit)  # when each unit can begin the next one
        self.cores, self.cores_before = [0.0] * self.config.cores, [0.0] * self.config.cores
        self.read_free = self.write_free = 0.0
        self.segment = Segment("", "")

    def run(self) -> list[Segment]:
        """Start every command in turn."""
        segments: list[Segment] = []
        marks = iter(self.program.marks)
        words = 8 * COMMAND_BYTES // self.config.axi_bits
        now, begun = 2.0 * self.latency + words, 0.0
        self.segment.waits["issue"] += now
        for command in self.program.commands:
            f = Fields(command.fields)
            lookups = (
                0
                if command.opcode in (Opcode.ADAPT, Opcode.STATE, Opcode.COMMIT)
                else _LOOKUP * sum(f[name] > 0 for name in _TENSORS)
            )
            ready = now + max(_ISSUE, words) + lookups
            self.segment.read_words += words
            self.read_free = max(self.read_free, now) + words
            self.segment.commands += 1
            self.segment.waits["issue"] += ready - now
            self.segment.busy["issue"] += ready - now
            if command.opcode in (Opcode.MARK, Opcode.END):
                start = self._drained(ready)
                if command.opcode is Opcode.MARK:
                    size = -(-8 * len(COUNTERS) // 32) * 32 // self.word
                    self.segment.write_words += size
                    done = start + _MARK + 2 * size + self.latency
                    self.segment.waits["issue"] += done - start
                    mark = next(marks)
                    self.segment.layer, self.segment.phase = mark.layer, mark.phase
                    start = done
                now = start
                self.segment.cycles = now - begun
                segments.append(self.segment)
                self.segment, begun = Segment("", "end"), now
                continue
            cause, start = self._start(command, f, ready)
            if start > ready:
                start += _WAIT
                self.segment.waits[cause] += start - ready
            self._run(command, f, start)
            now = start
        return segments

    def _drained(self, ready: float) -> float:
        """When everything is done; notes what is done last."""
        ends = {name: self.units[bit] for bit, name in enumerate(_UNIT_NAMES)} | {"cores": max(self.cores)}
        cause = max(ends, key=lambda name: ends[name])
        if ends[cause] <= ready:
            return ready
        self.segment.waits[cause] += ends[cause] + _WAIT - ready
        return ends[cause] + _WAIT

    def _start(self, command: Command, f: Mapping[str, int], ready: float) -> tuple[str, float]:
        """What a command waits for the longest, and until when."""
        cause, start = "issue", ready
        waits = [(self.units[bit], _UNIT_NAMES[bit]) for bit in _bits(f["wait_units"])]
        waits += [(self.units_before[bit], _UNIT_NAMES[bit]) for bit in _bits(f["wait_unit_queues"])]
        waits += [(self.cores[core], "cores") for core in _bits(f["wait_cores"])]
        waits += [(self.cores_before[core], "cores") for core in _bits(f["wait_queues"])]
        if command.opcode is Opcode.MULTIPLY:
            waits += [(self.cores_before[core], "cores") for core in _bits(f["cores"])]
        elif command.opcode is not Opcode.NOP:
            unit = unit_of(command.opcode, f)
            ends = self.units_before if unit in TAKES_TWO else self.units
            waits.append((ends[unit], _UNIT_NAMES[unit]))
        for end, name in waits:
            if end > start:
                cause, start = name, end
        return cause, start

    def _run(self, command: Command, f: Mapping[str, int], start: float) -> None:
        """A command begins; notes when it is done."""
        match command.opcode:
            case Opcode.NOP:
                return
            case Opcode.MULTIPLY:
                for core in _bits(f["cores"]):
                    cycles, elements, ideal = self.pages.multiply(f, core)
                    cycles += _MULTIPLY + 2 * self.config.buffer_registers
                    end = max(start + 1, self.cores[core]) + cycles
                    self.cores_before[core], self.cores[core] = self.cores[core], end
                    self.segment.busy["cores"] += cycles
                    self.segment.products += elements * f["lanes"]
                    self.segment.ideal += ideal * f["lanes"] / self.config.macs_fp16
                return
            case Opcode.LOAD | Opcode.LOAD_RAW:
                begin, end = self._load(command, f, start)
            case _:
                begin = max(start, self.free[unit_of(command.opcode, f)])
                end = begin + self._duration(command, f, begin)
        unit = unit_of(command.opcode, f)
        self.free[unit] = end
        if command.opcode is Opcode.DRAIN:  # what it still rounds
            self.free[unit] -= _DRAIN - max(0, _NEXT_DRAIN - f["lane_beats"])
        elif command.opcode in (Opcode.STORE, Opcode.STORE_RAW):  # acknowledges
            self.free[unit] -= self.latency
        begin = max(begin, start, self.units[unit])
        self.units_before[unit], self.units[unit] = self.units[unit], end
        self.segment.busy[_UNIT_NAMES[unit]] += end - begin

    def _load(self, command: Command, f: Mapping[str, int], start: float) -> tuple[float, float]:
        """When a LOAD begins to keep its unit, and when it is done."""
        unit, beat = unit_of(command.opcode, f), self.config.beat
        if command.opcode is Opcode.LOAD_RAW:
            beats = float(f["line_count"] * f["line_rows"])
            words, setup = beats * 4 * beat / self.word, _RAW
        else:
            mix = self.mixes.get(f["table"], self.default)
            blocks, words = block_span(f, store=False, word=self.word, length=mix.block_bytes)
            valid = f["n_count"] * max(0, f["i_end"] - f["i_first"]) * max(0, f["j_end"] - f["j_first"])
            padding = f["n_count"] * f["i_count"] * f["j_count"] - valid
            rate = max(1.0, mix.block_bytes / (2 * BLOCK) * _WIDE)
            beats, setup = padding * f["channel_beats"] + blocks * self.config.block_beats * rate, _LOAD
            if f["target"] == Target.SPARSE.value:
                self.pages.load(f, mix)
        setup += 2 * self.latency if command.opcode is Opcode.LOAD else self.latency
        begin = max(start + setup, self.units[unit] + _NEXT_LOAD + self.latency / 2)
        self.read_free = max(self.read_free, start + setup) + words * _BUS
        self.segment.read_words += words
        return max(start, self.units[unit]), max(begin + beats, self.read_free)

    def _duration(self, command: Command, f: Mapping[str, int], start: float) -> float:
        """Cycles of a command of a unit that takes one at a time."""
        beat = self.config.beat
        match command.opcode:
            case Opcode.STORE | Opcode.STORE_RAW:
                if command.opcode is Opcode.STORE:
                    mix = self.mixes.get(f["table"], self.default)
                    blocks, words = block_span(f, store=True, word=self.word, length=mix.block_bytes)
                    rows, setup = blocks * self.config.block_beats, _STORE + self.config.block_beats
                else:
                    rows, setup = f["line_count"] * f["line_rows"], _STORE_RAW
                    words = rows * 4 * beat / self.word
                self.segment.write_words += words
                self.write_free = max(self.write_free, start + setup) + words
                return max(rows + setup, self.write_free - start) + self.latency
            case Opcode.DRAIN:
                return f["count_n"] * f["count_h"] * f["count_w"] * f["lane_beats"] + _DRAIN
            case Opcode.VECTOR:
                rows = f["outer"] * f["inner"]
                if f["op"] in (VectorOp.DIV.value, VectorOp.SQRT.value):
                    return rows * beat * _DIVIDE + _VECTOR
                return rows + _VECTOR
            case Opcode.ADAPT:
                self.segment.write_words += 32 / self.word
                return _ADAPT + self.latency
            case _:
                return _STATE
