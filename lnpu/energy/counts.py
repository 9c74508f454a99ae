"""Events of a program that cost energy, from its commands: products, visits, accesses of SRAMs, elements coded.

What an access is follows from the RTL. A core reads the codes of a whole sparse row for a visit, and a 16-bit element
and a whole dense row for an element issued; FP8 elements issued in pairs read two rows. A dense row is the high bits
and flags of all lanes, and the low bits of banks with an FP16 value. A row of partial sums is written when the next
visit is to another row, and the new one is read unless sums start at zero. A LOAD writes a beat into the buffers of
every core that it names, low bits only of FP16 values. How many elements are not zero is an expectation, as in
`lnpu.compiler.cycles`; every FP16 value is taken to have low bits.
"""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from lnpu.compiler.cycles import Fields, Mix, Pages, block_span
from lnpu.compiler.program import Program
from lnpu.config import BLOCK, ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, READS_B, READS_C, Opcode, Target, VectorOp
from lnpu.formats import LOW_BITS, psum_layout

__all__ = ["count_events", "count_wakes"]

_ARITHMETIC = {
    VectorOp.ADD: ("add32",), VectorOp.ADD_UNMASKED: ("add32",), VectorOp.SUB: ("add32",),
    VectorOp.MUL: ("multiply32",), VectorOp.MULADD: ("multiply32", "add32"),
    VectorOp.MAX: ("add32",), VectorOp.MIN: ("add32",),
    VectorOp.KEEP_EQUAL: ("add32",), VectorOp.GREATER_EQUAL: ("add32",), VectorOp.DIV: ("divide32",),
    VectorOp.SQRT: ("divide32",), VectorOp.SUM: ("sum",),
}  # fmt: skip
"""What an operation of the vector unit does to each element; a comparison counts as an addition."""


def count_events(program: Program, mixes: Mapping[int, Mix], default: Mix | None = None) -> dict[str, float]:
    """Expected numbers of events.

    Parameters
    ----------
    program : Program
    mixes, default : Mix
        What the elements of encoded tensors are, as for `predict_cycles`.

    Returns
    -------
    dict
        `mac16`, `mac8`: products; `gated16`, `gated8`: those of them in masked lanes (a mask's elements that are not
        zero are taken to be positive, as a ReLU's are). `issue16`, `issue8`: elements issued by the cores;
        `pair_cycles`: cycles in which one or two FP8 elements are. `visits`. `decoded_zero`, `decoded_fp8`,
        `decoded_fp16`, and `encoded_...`: elements. `add32`, `multiply32`, `divide32`, `sum`: element operations of the
        vector unit; `drained`: sums rounded. `..._read_bits`, `..._write_bits` of the SRAMs `code`, `sparse`,
        `dense_high`, `dense_low`, `dense_flag`, `mask`, `psum` and `vmem`. `commands`, `program_bits`.
    """
    counter = _Counter(program.config, mixes, default or Mix())
    for command in program.commands:
        counter.take(command.opcode, Fields(command.fields))
    return counter.found


def count_wakes(program: Program) -> list[float]:
    """Core-cycles for which an idle core's clock would run, up to each mark and to the end.

    A beat written to a buffer takes a cycle of every core that it is for, a row of partial sums that DRAIN reads one.
    """
    found = [0.0]
    for command in program.commands:
        f = Fields(command.fields)
        match command.opcode:
            case Opcode.LOAD if f["target"] not in (Target.VMEM.value, Target.VMEM_DENSE.value):
                beats = f["n_count"] * f["i_count"] * f["j_count"] * f["channel_beats"]
                found[-1] += beats * f["cores"].bit_count()
            case Opcode.DRAIN:
                found[-1] += f["count_n"] * f["count_h"] * f["count_w"]
            case Opcode.MARK:
                found.append(0.0)
    return found


class _Counter:
    def __init__(self, config: ChipConfig, mixes: Mapping[int, Mix], default: Mix) -> None:
        self.config, self.mixes, self.default = config, mixes, default
        self.pages = Pages(config)
        self._fp16: dict[tuple[int, int], float] = {}  # share of FP16 in the pages of the cores' dense buffers
        self._live: dict[tuple[int, int], float] = {}  # share of ones in the pages of their mask stores
        self.found: dict[str, float] = defaultdict(float)
        self._rows: dict[tuple[int, ...], int] = {}
        self._psum_bits = psum_layout(config.acc_bits).size

    def take(self, opcode: Opcode, f: Fields) -> None:
        found, config = self.found, self.config
        found["commands"] += 1
        found["program_bits"] += 8 * COMMAND_BYTES
        row = 32 * config.beat
        match opcode:
            case Opcode.MULTIPLY:
                self._multiply(f)
            case Opcode.LOAD:
                self._load(f)
            case Opcode.LOAD_RAW:
                found["vmem_write_bits"] += f["line_count"] * f["line_rows"] * row
            case Opcode.STORE_RAW:
                found["vmem_read_bits"] += f["line_count"] * f["line_rows"] * row
            case Opcode.STORE:
                mix = self.mixes.get(f["table"], self.default)
                blocks, _ = block_span(f, store=True, word=config.axi_bits // 8, length=mix.block_bytes)
                found["vmem_read_bits"] += blocks * config.block_beats * row
                self._coded("encoded", blocks, mix)
            case Opcode.DRAIN:
                rows = f["count_n"] * f["count_h"] * f["count_w"]
                found["psum_read_bits"] += rows * config.lanes * self._psum_bits
                found["drained"] += rows * f["lane_beats"] * config.beat
                found["vmem_write_bits"] += rows * f["lane_beats"] * row
            case Opcode.VECTOR:
                self._vector(f, row)

    def _multiply(self, f: Fields) -> None:
        config, found = self.config, self.found
        loops = [f[f"count_{loop}"] for loop in "nhwrs"]
        visits = int(np.prod(loops))
        changes = self._changes(loops, [f[f"psum_{loop}"] for loop in "nhwrs"])
        for core in range(config.cores):
            if not f["cores"] >> core & 1:
                continue
            cycles, elements, ideal = self.pages.multiply(f, core)
            share8 = 2 * (1 - ideal / elements) if elements else 0.0
            n8, n16 = elements * share8, elements * (1 - share8)
            found["mac16"] += n16 * f["lanes"]
            found["mac8"] += n8 * f["lanes"]
            found["issue16"] += n16
            found["issue8"] += n8
            if f["masked"]:
                gated = 1 - self._live[core, f["mask_page"]]
                found["gated16"] += gated * n16 * f["lanes"]
                found["gated8"] += gated * n8 * f["lanes"]
                found["mask_read_bits"] += visits * config.lanes // config.beat + changes * config.lanes
            # Visits of nothing take a cycle too: with FP8 elements they are among these.
            found["pair_cycles"] += max(n8 / 2, cycles - n16) if n8 else 0.0
            found["core_cycles"] += cycles
            found["visits"] += visits
            found["code_read_bits"] += visits * config.depth * 2
            found["sparse_read_bits"] += 16 * elements
            values = config.lanes * elements
            words_low = 1 - (1 - self._fp16.get((core, f["dense_page"]), 0.0)) ** (config.lanes // config.beat)
            found["dense_high_read_bits"] += (16 - LOW_BITS) * values
            found["dense_low_read_bits"] += LOW_BITS * words_low * values
            found["dense_flag_read_bits"] += values
            found["psum_write_bits"] += changes * config.lanes * self._psum_bits
            if not f["initialise"]:
                found["psum_read_bits"] += changes * config.lanes * self._psum_bits

    def _changes(self, loops: list[int], strides: list[int]) -> int:
        """Rows of partial sums that a MULTIPLY takes one after the other."""
        key = (*loops, *strides)
        if key not in self._rows:
            at = np.zeros(loops, np.int64)
            for axis, stride in enumerate(strides):
                shape = [1] * 5
                shape[axis] = -1
                at = at + (stride * np.arange(loops[axis])).reshape(shape)
            self._rows[key] = 1 + int(np.count_nonzero(np.diff(at.ravel())))
        return self._rows[key]

    def _load(self, f: Fields) -> None:
        config, found = self.config, self.found
        mix = self.mixes.get(f["table"], self.default)
        blocks, _ = block_span(f, store=False, word=config.axi_bits // 8, length=mix.block_bytes)
        self._coded("decoded", blocks, mix)
        placed = f["n_count"] * f["i_count"] * f["j_count"] * f["channel_beats"] * config.beat
        cores = f["cores"].bit_count()
        match f["target"]:
            case Target.SPARSE.value:
                self.pages.load(f, mix)
                found["sparse_write_bits"] += 16 * placed * cores
                found["code_write_bits"] += 2 * placed * cores
                found["placed_sparse"] += placed * cores
            case Target.DENSE.value | Target.DENSE_LOAD.value:
                fp16 = mix.nonzero * (1 - mix.fp8)
                found["dense_high_write_bits"] += (16 - LOW_BITS) * placed * cores
                found["dense_low_write_bits"] += LOW_BITS * fp16 * placed * cores
                found["dense_flag_write_bits"] += placed * cores
                for core in range(config.cores):
                    if f["cores"] >> core & 1:
                        self._fp16[core, f["page"]] = fp16
                found["placed_dense"] += placed * cores
            case Target.MASK.value | Target.MASK_DENSE.value:
                found["mask_write_bits"] += placed * cores * (1 + 1 / config.beat)
                for core in range(config.cores):
                    if f["cores"] >> core & 1:
                        self._live[core, f["page"]] = mix.nonzero
            case _:
                found["vmem_write_bits"] += 32 * placed

    def _coded(self, what: str, blocks: float, mix: Mix) -> None:
        """Elements of blocks that are encoded or decoded."""
        elements = blocks * BLOCK
        nonzero = elements * mix.nonzero * mix.fill
        self.found[f"{what}_zero"] += elements - nonzero
        self.found[f"{what}_fp8"] += nonzero * mix.fp8
        self.found[f"{what}_fp16"] += nonzero * (1 - mix.fp8)

    def _vector(self, f: Fields, row: int) -> None:
        found, rows = self.found, f["outer"] * f["inner"]
        op = VectorOp(f["op"])
        reads = rows if op is not VectorOp.SUM_OUT else 0
        same = all(f.get(f"a{part}", 0) == f.get(f"b{part}", 0) for part in ("", "_outer", "_inner"))
        if op in READS_B and not f["b_immediate"] and not same:
            reads += rows if f["b_inner"] else f["outer"]
        if (op in READS_C or f["masked"]) and not f["c_immediate"]:
            reads += rows if f["c_inner"] else f["outer"]
        writes = 0 if op is VectorOp.SUM else f["outer"] if op is VectorOp.SUM_OUT else rows
        found["vmem_read_bits"] += reads * row
        found["vmem_write_bits"] += writes * row
        for kind in _ARITHMETIC.get(op, ()):
            found[kind] += rows * self.config.beat
