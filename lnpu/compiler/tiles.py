"""Tiles: boxes of pixels of a tensor that fit the vector memory, and the transfers between the two."""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lnpu.compiler.program import Program, Region
from lnpu.compiler.tensor import RawTensor, Tensor
from lnpu.ctrl.commands import Opcode, Target, Unit, VectorOp

__all__ = ["STATISTICS", "Tile", "VectorBuilder", "float_bits", "inside", "less_busy", "run_rows", "tiles_of"]

STATISTICS = Region("FGMP statistics")
"""What STORE of a dynamic tensor adds to and ADAPT uses."""

_BELOW = {"fp16": 0, "fp8": 1, "zero": 2}
_ABOVE = {"fp16": 0, "fp8": 1}


@dataclass(frozen=True)
class Tile:
    """Pixels [line, line + lines) x [pixel, pixel + pixels) of `images` images, and one block of their channels.

    In the vector memory a tile is pixel-major, image by image and line by line: `rows` rows a pixel.
    """

    image: int
    images: int
    line: int
    lines: int
    pixel: int
    pixels: int
    block: int
    rows: int

    @property
    def begins(self) -> bool:
        """Whether it is the first of its channel block."""
        return self.image == self.line == self.pixel == 0

    @property
    def count(self) -> int:
        """Pixels."""
        return self.images * self.lines * self.pixels

    @property
    def size(self) -> int:
        """Rows of the vector memory."""
        return self.count * self.rows

    def strides(self) -> tuple[int, int, int]:
        """Vector-memory rows from one image, line, pixel to the next."""
        return self.lines * self.pixels * self.rows, self.pixels * self.rows, self.rows


def less_busy(program: Program, target: Target, target_dense: Target) -> Target:
    """One of two targets that differ in the LOAD unit: that of the unit that has been given less to do."""
    loading = program.loading
    return target_dense if loading[Unit.LOAD_DENSE] < loading[Unit.LOAD] else target


def run_rows(tensor: Tensor, beat: int) -> int:
    """Rows of the vector memory that the smallest tile of `tensor` takes: a run of encoded blocks."""
    return tensor.block_channels // beat * min(tensor.width, tensor.run_pixels) * tensor.run_lines


def tiles_of(tensor: Tensor, beat: int, rows: int, block: int) -> Iterator[Tile]:
    """Tiles that cover channel block `block` of `tensor`, each within `rows` rows of the vector memory.

    A tile holds whole runs of encoded blocks, so it can be stored.
    """
    per_pixel = tensor.block_channels // beat
    pixels, lines = min(tensor.width, rows // per_pixel), 1
    if pixels < tensor.width:
        pixels -= pixels % tensor.run_pixels
    if pixels:
        lines = min(tensor.height, rows // (per_pixel * pixels)) if pixels == tensor.width else 1
        if lines < tensor.height:
            lines -= lines % tensor.run_lines
    if not pixels or not lines:
        raise ValueError(f"a run of {tensor.name} takes {run_rows(tensor, beat)} rows, not {rows}")
    images = max(1, min(tensor.images, rows // (per_pixel * pixels * lines))) if lines == tensor.height else 1
    for image in range(0, tensor.images, images):
        for line in range(0, tensor.height, lines):
            for pixel in range(0, tensor.width, pixels):
                yield Tile(
                    image,
                    min(images, tensor.images - image),
                    line,
                    min(lines, tensor.height - line),
                    pixel,
                    min(pixels, tensor.width - pixel),
                    block,
                    per_pixel,
                )


class VectorBuilder:
    """Emits transfers and vector operations, with their regions, into a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.beat = program.config.beat

    @staticmethod
    def rows(start: int, count: int) -> Region:
        """A region of the vector memory."""
        return Region("vmem", start, start + count)

    def load(self, tensor: Tensor, tile: Tile, vmem: int) -> None:
        """Bring a tile of an encoded tensor into the vector memory at row `vmem`."""
        memory = self._lines(tensor, tile)
        self._load(tensor, tile, vmem, step=1, line=tile.line, pixel=tile.pixel, memory=memory)

    def _lines(self, tensor: Tensor, tile: Tile) -> Region:
        """The lines of `tensor` that a tile is in."""
        first = (tile.block * tensor.images + tile.image) * tensor.height + tile.line
        return self.program.memory(tensor, first, first + (tile.images - 1) * tensor.height + tile.lines)

    def load_window(
        self, tensor: Tensor, tile: Tile, vmem: int, *, step: int, line: int, pixel: int, fill: int
    ) -> None:
        """Bring in, for each pixel (i, j) of `tile`, pixel (step * i + line, step * j + pixel) of the same image.

        `tile` lies in another tensor; positions outside `tensor` read as FP16 pattern `fill`.
        """
        self._load(
            tensor, tile, vmem, step=step, line=step * tile.line + line, pixel=step * tile.pixel + pixel, fill=fill
        )

    def load_lattice(self, tensor: Tensor, tile: Tile, vmem: int, *, step: int, line: int, pixel: int) -> bool:
        """The converse: bring in pixel ((i + line) / step, (j + pixel) / step) for each (i, j) of `tile` where that is
        one, or zero outside `tensor`. Other pixels keep what is there. False if there are none."""
        first_i, first_j = -(tile.line + line) % step, -(tile.pixel + pixel) % step
        lines, pixels = -(-(tile.lines - first_i) // step), -(-(tile.pixels - first_j) // step)
        if lines < 1 or pixels < 1:
            return False
        _, stride_i, stride_j = tile.strides()
        part = Tile(tile.image, tile.images, 0, lines, 0, pixels, tile.block, tile.rows)
        self._load(
            tensor,
            part,
            vmem + first_i * stride_i + first_j * stride_j,
            step=1,
            line=(tile.line + first_i + line) // step,
            pixel=(tile.pixel + first_j + pixel) // step,
            strides=(tile.strides()[0], step * stride_i, step * stride_j),
            region=self.rows(vmem, tile.size),
        )
        return True

    def _load(
        self,
        tensor: Tensor,
        tile: Tile,
        vmem: int,
        *,
        step: int,
        line: int,
        pixel: int,
        fill: int = 0,
        strides: tuple[int, int, int] | None = None,
        region: Region | None = None,
        memory: Region | None = None,
    ) -> None:
        """LOAD of a tile's worth of pixels, from (line, pixel) of each image in steps of `step`, by the unit that has
        less to do."""
        dest_n, dest_i, dest_j = strides or tile.strides()
        i_first, i_end = inside(line, step, tile.lines, tensor.height)
        j_first, j_end = inside(pixel, step, tile.pixels, tensor.width)
        target = less_busy(self.program, Target.VMEM, Target.VMEM_DENSE)
        self.program.emit(
            Opcode.LOAD,
            reads=[memory or self.program.memory(tensor)],
            writes=[region or self.rows(vmem, tile.size)],
            **tensor.walk(tile.image, tile.block, line),
            target=target.value,
            scale=tensor.scale,
            fill=fill,
            n_count=tile.images,
            i_count=tile.lines,
            j_count=tile.pixels,
            line_i=step,
            pixel=pixel,
            pixel_j=step,
            i_first=i_first,
            i_end=i_end,
            j_first=j_first,
            j_end=j_end,
            channel_beats=tile.rows,
            dest=vmem,
            dest_n=dest_n,
            dest_i=dest_i,
            dest_j=dest_j,
        )

    def store(self, tensor: Tensor, tile: Tile, vmem: int) -> None:
        """Write a tile from row `vmem` to memory, encoded by the tensor's policy."""
        source_n, source_i, source_j = tile.strides()
        self.program.commit(tensor)
        self.program.emit(
            Opcode.STORE,
            reads=[self.rows(vmem, tile.size)],
            writes=[self._lines(tensor, tile), *([STATISTICS] if tensor.state else [])],
            **tensor.walk(tile.image, tile.block, tile.line),
            scale=tensor.scale,
            **_fgmp(tensor),
            n_count=tile.images,
            i_count=tile.lines,
            j_count=tile.pixels,
            line_i=1,
            pixel=tile.pixel,
            source=vmem,
            source_n=source_n,
            source_i=source_i,
            source_j=source_j,
        )

    def _raw(self, opcode: Opcode, tensor: RawTensor, vmem: int, row: int, rows: int, block: int) -> int:
        """LOAD_RAW or STORE_RAW of `rows` rows of channel block `block`; returns the vector-memory rows."""
        channels = min(tensor.padded, 64)
        lines, line_rows, pitch = rows, channels // self.beat, tensor.pitch
        size = lines * line_rows
        if 4 * channels == pitch and size < 1 << 16:  # lines follow each other: one long line
            lines, line_rows = 1, size
        first = block * tensor.rows + row
        memory, local = [self.program.memory(tensor, first, first + rows)], [self.rows(vmem, size)]
        self.program.emit(
            opcode,
            reads=memory if opcode is Opcode.LOAD_RAW else local,
            writes=local if opcode is Opcode.LOAD_RAW else memory,
            address=tensor.address + row * tensor.pitch + 4 * channels * block,
            kind=tensor.kind.value,
            line_count=lines,
            line_rows=line_rows,
            pitch=pitch,
            vmem=vmem,
            vmem_line=line_rows if lines > 1 else 0,
        )
        return size

    def load_raw(self, tensor: RawTensor, vmem: int, *, row: int = 0, rows: int = 1, block: int = 0) -> int:
        """Bring FP32 words in; returns the vector-memory rows they take."""
        return self._raw(Opcode.LOAD_RAW, tensor, vmem, row, rows, block)

    def load_raws(self, tensors: Iterable[RawTensor], places: Iterable[int], *, block: int) -> None:
        """Bring in per-channel vectors of a channel block, to these rows."""
        for tensor, vmem in zip(tensors, places, strict=True):
            self.load_raw(tensor, vmem, block=block)

    def store_raw(self, tensor: RawTensor, vmem: int, *, row: int = 0, rows: int = 1, block: int = 0) -> int:
        """Write FP32 words back; returns the vector-memory rows they take."""
        return self._raw(Opcode.STORE_RAW, tensor, vmem, row, rows, block)

    def vector(
        self,
        op: VectorOp,
        dst: int,
        a: int,
        b: "int | float | None" = None,
        c: "int | float | None" = None,
        *,
        outer: int = 1,
        inner: int,
        broadcast: str = "",
        rectify: bool = False,
        masked: bool = False,
        loss_scaling: int = 0,
    ) -> None:
        """`op` on `outer` x `inner` rows. A float operand is an immediate; operands named in `broadcast` ("a", "b",
        "c") are per-channel rows, the same for every outer step. `rectify`: results that are not positive become +0;
        `masked`: those whose c is not positive."""
        size = outer * inner
        # With per-channel rows the loops are exchanged: the unit then reads such a row once for all pixels.
        loops = {"outer": inner, "inner": outer} if broadcast else {"outer": outer, "inner": inner}
        fields: dict[str, int] = {}
        reads = []
        for name, operand in (("a", a), ("b", b), ("c", c)):
            if operand is None:
                continue
            if isinstance(operand, float):
                fields |= {f"{name}_immediate": 1, f"immediate_{name}": float_bits(operand)}
                continue
            shared = name in broadcast
            steps = (1, 0 if shared else inner) if broadcast else (inner, 1)
            fields |= {name: operand, f"{name}_outer": steps[0], f"{name}_inner": steps[1]}
            reads.append(self.rows(operand, inner if shared else size))
        self.program.emit(
            Opcode.VECTOR,
            reads=reads,
            writes=[self.rows(dst, size)],
            loss_scaling=loss_scaling,
            op=op.value,
            **loops,
            rectify=int(rectify),
            masked=int(masked),
            dst=dst,
            dst_outer=1 if broadcast else inner,
            dst_inner=inner if broadcast else 1,
            **fields,
        )

    def sum(
        self,
        row: int,
        a: int,
        b: "int | float",
        *,
        pixels: int,
        rows: int,
        initialise: bool,
        a_of: Tensor | None = None,
        b_of: Tensor | None = None,
        quantise: bool = False,
    ) -> None:
        """Add a * b over `pixels` pixels of `rows` rows each to accumulator rows `row` and up, a row a channel beat.
        `quantise`: a is what it will be once it is stored as `a_of`."""
        fields: dict[str, Any] = (
            {"b_immediate": 1, "immediate_b": float_bits(b)}
            if isinstance(b, float)
            else {
                "b": b,
                "b_outer": 1,
                "b_inner": rows,
            }
        )
        if quantise:
            assert a_of is not None
            fields |= {"quantise": 1} | _fgmp(a_of)
        self.program.emit(
            Opcode.VECTOR,
            reads=[self.rows(a, pixels * rows)] + ([] if isinstance(b, float) else [self.rows(b, pixels * rows)]),
            op=VectorOp.SUM.value,
            outer=rows,
            inner=pixels,
            sum=row,
            initialise=int(initialise),
            a=a,
            a_outer=1,
            a_inner=rows,
            **_shifts(a_of, b_of),
            **fields,
        )

    def sum_out(self, dst: int, row: int, *, rows: int, a_of: Tensor | None = None, b_of: Tensor | None = None) -> None:
        """Round accumulator rows to FP32 rows at `dst`."""
        self.program.emit(
            Opcode.VECTOR,
            writes=[self.rows(dst, rows)],
            op=VectorOp.SUM_OUT.value,
            outer=rows,
            inner=1,
            sum=row,
            dst=dst,
            dst_outer=1,
            **_shifts(a_of, b_of),
        )


def _fgmp(tensor: Tensor) -> dict[str, int]:
    """Fields of STORE and SUM that say how a tensor is quantised."""
    policy = tensor.policy
    return {
        "lo": 0 if tensor.state else policy.lo_bits,
        "hi": 0 if tensor.state else policy.hi_bits,
        "below": _BELOW[policy.below],
        "above": _ABOVE[policy.above],
    }


def _shifts(a_of: Tensor | None, b_of: Tensor | None) -> dict[str, Any]:
    """Fields of SUM and SUM_OUT that take the scales of the summed tensors out and put them back."""
    fields: dict[str, Any] = {}
    for name, tensor in (("a", a_of), ("b", b_of)):
        if tensor is not None:
            fields |= {f"{name}_shift": tensor.scale, f"tensor_{name}": tensor.state}
    return fields


def float_bits(value: float) -> int:
    """FP32 pattern of a number that is one; `ValueError` if FP32 does not hold it exactly."""
    word = struct.pack("<f", value)
    if struct.unpack("<f", word)[0] != value:
        raise ValueError(f"an immediate must be an FP32 number, not {value!r}")
    return int.from_bytes(word, "little")


def inside(first: int, step: int, count: int, size: int) -> tuple[int, int]:
    """Range of i in [0, count) for which 0 <= first + step * i < size."""
    low = max(0, -(first // step))
    high = min(count, (size - 1 - first) // step + 1)
    return (low, high) if low < high else (0, 0)
