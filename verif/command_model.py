"""An executable specification of the commands: runs a program on a memory image, command by command.

Independent of the RTL and of time: each command acts at once, in program order. It checks the compiler without a
simulation, and the chip against something simpler.
"""

from dataclasses import fields

import numpy as np

from golden.controller import Controller, ControllerState, Targets, statistics_of
from golden.exact import ExactSum, exact_matmul, round_sum
from golden.fgmp import CODE_FP8, CODE_PADDING, Policy, quantize, to_fp16
from golden.formats import FP16, canonical_fp32, decode
from golden.memory import decode_slots, encode_slots
from golden.vector import rectified
from lnpu.config import BLOCK, ChipConfig
from lnpu.ctrl.commands import COMMAND_BYTES, Command, Opcode, Target, VectorOp

__all__ = ["CommandModel"]

_BELOW, _ABOVE = ("fp16", "fp8", "zero"), ("fp16", "fp8")


class CommandModel:
    """State of a chip of configuration `config` with external memory `memory` (uint8 array, changed in place)."""

    def __init__(self, config: ChipConfig, memory: np.ndarray) -> None:
        self.config, self.memory = config, memory
        c = config
        self.sparse = np.zeros((c.cores, 2, c.rows, c.depth), np.uint16)
        self.codes = np.zeros((c.cores, 2, c.rows, c.depth), np.uint8)
        self.dense = np.zeros((c.cores, 2, c.dense_rows, c.lanes), np.uint16)
        self.masks = np.zeros((c.cores, 2, c.psum_rows, c.lanes), bool)
        self.psums = [ExactSum.zeros((c.psum_rows, c.lanes)) for _ in range(c.cores)]
        self.masked_sums = np.zeros((c.cores, c.psum_rows, c.lanes), bool)
        self.vmem = np.zeros((c.vmem_rows, c.beat), np.float32)
        self.sums = ExactSum.zeros((c.sum_rows, c.beat))
        self.products = 0
        self.flags = 0  # only bit 1: an infinite or NaN element was stored
        self.controller = Controller(config.tensor_states)

    def run(self, address: int) -> None:
        """Run the program at `address` up to its END."""
        while True:
            command = Command.decode(self.memory[address : address + COMMAND_BYTES].tobytes())
            address += COMMAND_BYTES
            if command.opcode is Opcode.END:
                return
            getattr(self, f"_{command.opcode.name.lower()}")(self._resolve(command.fields))

    def _resolve(self, f: dict) -> dict:
        """The fields with the scales of dynamic tensors added."""
        f = dict(f)
        if f.get("tensor") and "slots" in f:
            state = self.controller.lookup(f["tensor"])
            f["scale"] += state.scale
            f |= {"lo": state.lo, "hi": state.hi}
        for name, shift in (("tensor_a", "a_shift"), ("tensor_b", "b_shift")):
            if f.get(name):
                f[shift if shift in f else "shift"] += self.controller.lookup(f[name]).scale
        if f.get("quantise") and f.get("tensor_a"):
            state = self.controller.lookup(f["tensor_a"])
            f |= {"lo": state.lo, "hi": state.hi}
        if f.get("tensor_out"):
            scale = self.controller.lookup(f["tensor_out"]).scale
            f["shift"] -= scale
            f["scale"] += scale
        return f

    def _state(self, f: dict) -> None:
        self.controller.state(f["tensor"], ControllerState(f["scale"], f["lo"], f["hi"]))

    def _commit(self, f: dict) -> None:
        self.controller.commit(f["tensor"], frozen=bool(f["frozen"]))

    def _adapt(self, f: dict) -> None:
        names = [part.name for part in fields(Targets)]
        record = self.controller.adapt(f["tensor"], Targets(**{name: f[name] for name in names}))
        self.memory[f["address"] : f["address"] + 32] = np.frombuffer(record, np.uint8)

    def _nop(self, f: dict) -> None:
        pass

    def _mark(self, f: dict) -> None:
        pass

    def _walk(self, f: dict, pixel_step: int):
        for n in range(f["n_count"]):
            for i in range(f["i_count"]):
                for j in range(f["j_count"]):
                    yield n, i, j, f["line"] + n * f["line_n"] + i * f["line_i"], f["pixel"] + j * pixel_step

    def _block(self, f: dict, line: int, pixel: int) -> tuple[int, int]:
        """Block of a pixel and its first element there."""
        share = 1 << f["log2_block_pixels"]
        return line * f["line_blocks"] + pixel // share, pixel % share * (BLOCK // share)

    def _address(self, f: dict, block: int) -> int:
        """Where a block begins: behind those before it in its run."""
        first = block - block % (1 << f["log2_run"])
        before = self.memory[f["table"] + first : f["table"] + block]
        return f["slots"] + 160 * first + int(before.sum(dtype=np.int64))

    def _load(self, f: dict) -> None:
        beat = self.config.beat
        blocks: dict[int, tuple] = {}
        for n, i, j, line, pixel in self._walk(f, f["pixel_j"]):
            width = f["channel_beats"] * beat
            if f["i_first"] <= i < f["i_end"] and f["j_first"] <= j < f["j_end"]:
                block, first = self._block(f, line, pixel)
                if block not in blocks:
                    length = self.memory[f["table"] + block :][:1]
                    slot = np.zeros(160, np.uint8)
                    raw = self.memory[self._address(f, block) :][: int(length[0])]
                    slot[: len(raw)] = raw
                    assert length[0], f"block {block} at {f['slots']:#x} was never written"
                    bits, codes, _ = decode_slots(slot[None], length)
                    blocks[block] = bits[0], codes[0]
                first += f["channel"] * beat
                bits, codes = (part[first : first + width] for part in blocks[block])
            else:
                bits = np.full(width, f["fill"] if f["target"] & Target.VMEM.value else 0, np.uint16)
                codes = np.full(width, CODE_PADDING, np.uint8)
            row = f["dest"] + n * f["dest_n"] + i * f["dest_i"] + j * f["dest_j"]
            if f["target"] & Target.VMEM.value:
                values = canonical_fp32((decode(FP16, bits) * 2.0 ** f["scale"]).astype(np.float32))
                self.vmem[row : row + f["channel_beats"]] = values.reshape(-1, beat)
                continue
            column = f["element"] + i * f["element_i"]
            columns = slice(column, column + width)
            index = (columns, row) if f["transpose"] else (row, columns)
            for core in range(self.config.cores):
                if f["cores"] >> core & 1:
                    if f["target"] in (Target.MASK.value, Target.MASK_DENSE.value):
                        assert self.masks[core, f["page"]][index].size == width, "outside the mask store"
                        if column == 0:
                            self.masks[core, f["page"], row] = False
                        self.masks[core, f["page"]][index] = (codes >= CODE_FP8) & (decode(FP16, bits) > 0)
                    elif f["target"] == Target.SPARSE.value:
                        assert self.sparse[core, f["page"]][index].size == width, "outside the sparse buffer"
                        self.sparse[core, f["page"]][index] = bits
                        self.codes[core, f["page"]][index] = codes
                    else:
                        assert self.dense[core, f["page"]][index].size == width, "outside the dense buffer"
                        self.dense[core, f["page"]][index] = bits

    def _store(self, f: dict) -> None:
        beat = self.config.beat
        policy = Policy(f["scale"], f["lo"], f["hi"], _BELOW[f["below"]], _ABOVE[f["above"]])
        rows = (BLOCK >> f["log2_block_pixels"]) // beat
        blocks: dict[int, np.ndarray] = {}
        for n, i, j, line, pixel in self._walk(f, 1):
            block, first = self._block(f, line, pixel)
            row = f["source"] + n * f["source_n"] + i * f["source_i"] + j * f["source_j"]
            x = blocks.setdefault(block, np.zeros(BLOCK, np.float32))
            x[first : first + rows * beat] = self.vmem[row : row + rows].reshape(-1)
        previous = -1
        for block, x in blocks.items():
            follows = block == previous + 1
            assert block % (1 << f["log2_run"]) == 0 or follows, f"block {block} begins in the middle of a run"
            previous = block
            plain = to_fp16(x, policy.scale, bool(f["saturate"]))
            bits, codes, underflow = quantize(plain, policy)
            if (plain & np.uint16(0x7C00) == 0x7C00).any():
                self.flags |= 2
            if f["tensor"]:
                self.controller.store(statistics_of(plain, codes, underflow))
            slots, lengths = encode_slots(bits[None], codes[None])
            size, start = int(lengths[0]), self._address(f, block)
            self.memory[start : start + size] = slots[0, :size]
            self.memory[f["table"] + block] = lengths[0]

    def _raw(self, f: dict):
        size = f["line_rows"] * self.config.beat * 4
        for line in range(f["line_count"]):
            row = f["vmem"] + line * f["vmem_line"]
            yield f["address"] + line * f["pitch"], size, slice(row, row + f["line_rows"])

    def _load_raw(self, f: dict) -> None:
        for address, size, rows in self._raw(f):
            self.vmem[rows] = self.memory[address : address + size].view(np.float32).reshape(-1, self.config.beat)

    def _store_raw(self, f: dict) -> None:
        for address, size, rows in self._raw(f):
            self.memory[address : address + size] = self.vmem[rows].reshape(-1).view(np.uint8)

    def _multiply(self, f: dict) -> None:
        depth = self.config.depth
        initial = f["initialise"]
        for core in range(self.config.cores):
            if not f["cores"] >> core & 1:
                continue
            sparse, codes = self.sparse[core, f["sparse_page"]], self.codes[core, f["sparse_page"]]
            dense, psums = self.dense[core, f["dense_page"]], self.psums[core]
            live = np.ones((self.config.psum_rows, self.config.lanes), bool)
            if f["masked"]:
                live = self.masks[core, f["mask_page"]]
            by_offset: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for n in range(f["count_n"]):
                for h in range(f["count_h"]):
                    for w in range(f["count_w"]):
                        for r in range(f["count_r"]):
                            for s in range(f["count_s"]):
                                row, psum = (
                                    f[name]
                                    + n * f[f"{name}_n"]
                                    + h * f[f"{name}_h"]
                                    + w * f[f"{name}_w"]
                                    + r * f[f"{name}_r"]
                                    + s * f[f"{name}_s"]
                                    for name in ("row", "psum")
                                )
                                base = f["dense"] + r * f["dense_r"] + s * f["dense_s"]
                                shift = f["shift"] + r * f["shift_r"] + s * f["shift_s"]
                                by_offset.setdefault((base, shift), []).append((row, psum))
            rows = np.unique([psum for visits in by_offset.values() for _, psum in visits])
            if initial:
                psums[rows] = ExactSum.zeros((len(rows), self.config.lanes))
                self.masked_sums[core, rows] = ~live[rows]
            assert (self.masked_sums[core, rows] == ~live[rows]).all(), "sums go on under another mask"
            for (base, shift), visits in by_offset.items():
                window = (f["kmask"] << shift) & ((1 << depth) - 1)
                k = np.array([k for k in range(depth) if window >> k & 1], int)
                rows, outs = np.array([(row, psum) for row, psum in visits if live[psum].any()], int).reshape(-1, 2).T
                a = sparse[np.ix_(rows, k)]
                a = np.where(codes[np.ix_(rows, k)] >= 2, a, np.uint16(0))
                self.products += int((a != 0).sum())
                used = (a != 0).any(0)
                if not used.any():
                    continue
                product = exact_matmul(np.ascontiguousarray(a[:, used]), dense[base + k[used]])
                psums[outs] = psums[outs] + product  # masked ones too: nobody looks at them

    def _drain(self, f: dict) -> None:
        beat = self.config.beat
        psums = self.psums[f["core"]]
        lanes = slice(f["lane_beat"] * beat, (f["lane_beat"] + f["lane_beats"]) * beat)
        for n in range(f["count_n"]):
            for h in range(f["count_h"]):
                for w in range(f["count_w"]):
                    psum = f["psum"] + n * f["psum_n"] + h * f["psum_h"] + w * f["psum_w"]
                    row = f["vmem"] + n * f["vmem_n"] + h * f["vmem_h"] + w * f["vmem_w"]
                    rounded = round_sum(
                        psums[psum, lanes], f["shift"], "fp16" if f["fp16"] else "fp32", bool(f["saturate"])
                    )
                    masked = self.masked_sums[f["core"], psum, lanes]
                    if f["fp16"]:
                        rounded = (decode(FP16, rounded) * 2.0 ** f["scale"]).astype(np.float32)
                    if f["masked"]:
                        rounded = np.where(masked, np.float32(-0.0), rounded + np.float32(0))
                    else:
                        rounded = np.where(masked, np.float32(np.nan), rounded)
                    rounded[np.arange(lanes.start, lanes.stop) >= f["lanes"]] = 0
                    self.vmem[row : row + f["lane_beats"]] = canonical_fp32(rounded).reshape(-1, beat)

    def _operand(self, f: dict, name: str) -> np.ndarray:
        """[outer, inner, beat]"""
        if f.get(f"{name}_immediate"):
            value = np.array(f[f"immediate_{name}"], np.uint32).view(np.float32)
            return np.broadcast_to(value, (f["outer"], f["inner"], self.config.beat))
        return self.vmem[self._rows(f, name)]

    @staticmethod
    def _rows(f: dict, name: str) -> np.ndarray:
        outer, inner = np.ogrid[: f["outer"], : f["inner"]]
        return f[name] + outer * f[f"{name}_outer"] + inner * f[f"{name}_inner"]

    def _vector(self, f: dict) -> None:
        op = VectorOp(f["op"])
        if op is VectorOp.SUM:
            a, b = (to_fp16(self._operand(f, name), f[f"{name}_shift"]) for name in "ab")
            if f["quantise"]:
                a, _, _ = quantize(a, Policy(0, f["lo"], f["hi"], _BELOW[f["below"]], _ABOVE[f["above"]]))
            for o in range(f["outer"]):
                for lane in range(self.config.beat):
                    part = exact_matmul(a[o, :, lane][None], np.ascontiguousarray(b[o, :, lane][:, None]))[0, 0]
                    at = (f["sum"] + o, lane)
                    self.sums[at] = part if f["initialise"] else self.sums[at] + part
            return
        if op is VectorOp.SUM_OUT:
            rows = self.sums[f["sum"] : f["sum"] + f["outer"]]
            result = canonical_fp32(round_sum(rows, f["a_shift"] + f["b_shift"], "fp32"))
            if f["rectify"]:
                result = rectified(result)
            self.vmem[f["dst"] + np.arange(f["outer"]) * f["dst_outer"]] = result
            return
        a, b, c = (self._operand(f, name) for name in "abc")
        with np.errstate(all="ignore"):
            nan = np.float32(np.nan)
            either = np.isnan(a) | np.isnan(b)
            result = {
                VectorOp.COPY: lambda: a,
                VectorOp.ADD: lambda: a + b,
                VectorOp.ADD_UNMASKED: lambda: np.where((a == 0) & np.signbit(a), np.float32(0), a + b),
                VectorOp.SUB: lambda: a - b,
                VectorOp.MUL: lambda: a * b,
                VectorOp.MULADD: lambda: canonical_fp32(a * b) + c,
                VectorOp.MAX: lambda: np.where(either, nan, np.where(a > b, a, b)),
                VectorOp.MIN: lambda: np.where(either, nan, np.where(a < b, a, b)),
                VectorOp.KEEP_POSITIVE: lambda: np.where(b > 0, a, np.float32(0)),
                VectorOp.KEEP_EQUAL: lambda: np.where(b == c, a, np.float32(0)),
                VectorOp.DIV: lambda: a / b,
                VectorOp.SQRT: lambda: np.sqrt(a),
                VectorOp.GREATER_EQUAL: lambda: (a >= b).astype(np.float32),
            }[op]()
        if op is not VectorOp.COPY:
            result = canonical_fp32(result.astype(np.float32))
        if f["rectify"]:
            result = rectified(result)
        self.vmem[self._rows(f, "dst")] = np.where(c > 0, result, np.float32(0)) if f["masked"] else result
