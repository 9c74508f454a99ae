"""Lowering of everything outside the cores: batch norm, pointwise groups, poolings, updates.

Each function emits the commands of one operation of docs/training.md. They share `Workspace`: the vector memory split
into per-channel rows (coefficients) and tiles.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lnpu.compiler.program import Emission, Program, interleaved
from lnpu.compiler.tensor import RawTensor, Tensor
from lnpu.compiler.tiles import Tile, VectorBuilder, run_rows, tiles_of
from lnpu.config import BLOCK
from lnpu.ctrl.commands import VectorOp as Op
from lnpu.formats import F16_INF

__all__ = [
    "ErrorSums",
    "NormTensors",
    "Optimiser",
    "SumRows",
    "Workspace",
    "add_and_mask",
    "add_unmasked",
    "finish_statistics",
    "lower_average_pool",
    "lower_average_pool_grad",
    "lower_group",
    "lower_max_pool",
    "lower_max_pool_grad",
    "lower_norm_grad",
    "lower_statistics",
    "lower_sum_errors",
    "lower_update",
    "lower_vector_update",
    "rounded",
    "statistics_rows",
    "take_statistics",
    "use_running_statistics",
]


def rounded(value: float) -> float:
    """`value` rounded to FP32."""
    return float(np.float32(value))


def reciprocal(count: int) -> float:
    """1 / count, divided in FP32."""
    return float(np.float32(1) / np.float32(count))


@dataclass(frozen=True)
class NormTensors:
    """Per-channel FP32 vectors of a batch norm: parameters, running and saved statistics, gradients, coefficients of
    the error of its input."""

    gamma: RawTensor
    beta: RawTensor
    running_mean: RawTensor
    running_var: RawTensor
    mean: RawTensor
    invstd: RawTensor
    a: RawTensor
    b: RawTensor
    dgamma: RawTensor
    dbeta: RawTensor
    grad_b: RawTensor
    grad_c: RawTensor


@dataclass(frozen=True)
class Optimiser:
    """SGD with momentum and weight decay; see docs/training.md."""

    rate: float
    momentum: float
    decay: float
    loss_scale: float


class Workspace:
    """The vector memory of a program: `coefficients` rows for per-channel vectors, tiles behind them."""

    VECTORS = 20
    """Per-channel vectors (of one channel block) that fit beside the tiles."""

    def __init__(self, program: Program) -> None:
        config = program.config
        self.program = program
        self.vectors = VectorBuilder(program)
        self.beat = config.beat
        self.vector_rows = BLOCK // config.beat
        self.tiles = self.VECTORS * self.vector_rows
        self.end = config.vmem_rows
        if self.end - self.tiles < 4 * self.vector_rows:
            raise ValueError(
                f"vmem_rows must be at least {self.tiles + 4 * self.vector_rows} for training, not {config.vmem_rows}"
            )
        if config.sum_rows < 2 * self.vector_rows:
            raise ValueError(f"sum_rows must be at least {2 * self.vector_rows} for training, not {config.sum_rows}")

    def vector(self, index: int) -> int:
        """Row of per-channel vector `index`."""
        return index * self.vector_rows

    def coefficients(self, first: int, count: int, block: int) -> list[int]:
        """Rows of `count` per-channel vectors of a channel block, and others for the next block, among the vectors from
        `first` on."""
        return [self.vector(first + block % 2 * count + i) for i in range(count)]

    def areas(self, count: int) -> tuple[list[int], int]:
        """`count` equal areas for tiles: their first rows and their size."""
        size = (self.end - self.tiles) // count
        return [self.tiles + i * size for i in range(count)], size

    def stream(
        self,
        tensor: Tensor,
        blocks: Iterable[int],
        operands: int,
        load: Callable[[Tile, list[int]], None],
        compute: Callable[[Tile, list[int]], None],
        store: Callable[[Tile, list[int]], None] | None = None,
        finish: Callable[[int], None] | None = None,
    ) -> None:
        """Run over the tiles of channel blocks in three sets of `operands` areas (four of a single operand; fewer if
        the tiles are large): while one tile is computed, the next is loaded and the one before stored. `finish` follows
        the computation of a block's last tile."""
        program = self.program
        sets = 4 if operands == 1 else 3  # of several operands, smaller tiles cost more than late stores
        while sets > 2 and self.areas(sets * operands)[1] < run_rows(tensor, self.beat):
            sets -= 1
        places, size = self.areas(sets * operands)
        at = [places[i : i + operands] for i in range(0, len(places), operands)]
        tiles = [tile for block in blocks for tile in tiles_of(tensor, self.beat, size, block)]
        stores: list[Emission] = []
        load(tiles[0], at[0])
        for i, tile in enumerate(tiles):
            here = at[i % sets]
            computes = program.record(partial(compute, tile, here))
            if finish is not None and (i + 1 == len(tiles) or tiles[i + 1].begins):
                computes += program.record(partial(finish, tile.block))
            loads = program.record(partial(load, tiles[i + 1], at[(i + 1) % sets])) if i + 1 < len(tiles) else []
            program.play(interleaved(computes, loads, stores))
            stores = program.record(partial(store, tile, here)) if store is not None else []
        program.play(stores)


def check_sum(space: Workspace, name: str, count: int) -> None:
    """Raise `ValueError` if a sum of `count` products might overflow the accumulators."""
    config = space.program.config
    if count > config.max_terms:
        raise ValueError(
            f"the sums of {name} have {count} terms; acc_bits = {config.acc_bits} allows {config.max_terms}, use more"
        )


@dataclass(frozen=True)
class SumRows:
    """Accumulator rows of a tensor's sums: `sets` sets of a channel block's rows, one after the other, for as many
    blocks at a time as there is room for.

    Attributes
    ----------
    blocks : int
        Successive channel blocks whose sums have rows of their own.
    """

    sets: int
    rows: int
    blocks: int

    @classmethod
    def of(cls, space: Workspace, tensor: Tensor, sets: int) -> "SumRows":
        rows = tensor.block_channels // space.beat
        return cls(sets, rows, space.program.config.sum_rows // (sets * rows))

    def first(self, block: int, number: int) -> int:
        """First row of a set of a channel block."""
        return (block % self.blocks * self.sets + number) * self.rows


def statistics_rows(space: Workspace, y: Tensor) -> SumRows:
    """Where the exact sums of y and of y * y are."""
    return SumRows.of(space, y, 2)


def take_statistics(space: Workspace, y: Tensor, tile: Tile, place: int, *, first: bool) -> None:
    """Add a tile of y to the exact sums of y and of y * y."""
    vectors, at = space.vectors, statistics_rows(space, y)
    common: dict[str, Any] = {"pixels": tile.count, "rows": tile.rows, "initialise": first}
    vectors.sum(at.first(tile.block, 0), place, 1.0, **common, a_of=y)
    vectors.sum(at.first(tile.block, 1), place, place, **common, a_of=y, b_of=y)


def lower_statistics(space: Workspace, y: Tensor, block: int) -> None:
    """Take the sums of a stored tensor."""
    space.stream(
        y,
        [block],
        1,
        lambda tile, at: space.vectors.load(y, tile, at[0]),
        lambda tile, at: take_statistics(space, y, tile, at[0], first=tile.begins),
    )


def finish_statistics(
    space: Workspace, y: Tensor, norm: NormTensors, block: int, *, eps: float, momentum: float
) -> None:
    """From the sums of a channel block to mean, invstd, a, b and the running statistics, in memory."""
    v, rows = space.vectors, y.block_channels // space.beat
    s1, s2, mean, var, invstd, a, b, gamma, beta, running, t = (space.vector(i) for i in range(11))
    count = y.images * y.height * y.width
    check_sum(space, y.name, count)
    inv_n = reciprocal(count)

    def op(which: Op, dst: int, x: int, y: int | float | None = None, z: int | float | None = None) -> None:
        v.vector(which, dst, x, y, z, inner=rows)

    at = statistics_rows(space, y)
    v.sum_out(s1, at.first(block, 0), rows=rows, a_of=y)
    v.sum_out(s2, at.first(block, 1), rows=rows, a_of=y, b_of=y)
    op(Op.MUL, mean, s1, inv_n)
    op(Op.MUL, s2, s2, inv_n)
    op(Op.MUL, t, mean, mean)
    op(Op.SUB, var, s2, t)
    op(Op.MAX, var, var, 0.0)
    _coefficients(space, norm, block, rows, mean, var, invstd, a, b, gamma, beta, eps=eps)
    for running_tensor, statistic in ((norm.running_mean, mean), (norm.running_var, var)):
        if running_tensor is norm.running_var:
            op(Op.MUL, var, var, rounded(count / (count - 1)) if count > 1 else 1.0)
        v.load_raw(running_tensor, running, block=block)
        op(Op.MUL, running, running, rounded(1.0 - momentum))
        op(Op.MUL, t, statistic, rounded(momentum))
        op(Op.ADD, running, running, t)
        v.store_raw(running_tensor, running, block=block)
    for tensor, row in ((norm.mean, mean), (norm.invstd, invstd), (norm.a, a), (norm.b, b)):
        v.store_raw(tensor, row, block=block)


def use_running_statistics(space: Workspace, y: Tensor, norm: NormTensors, block: int, *, eps: float) -> None:
    """Inference: a and b of a channel block from the running statistics."""
    v, rows = space.vectors, y.block_channels // space.beat
    mean, var, invstd, a, b, gamma, beta = (space.vector(i) for i in range(7))
    v.load_raw(norm.running_mean, mean, block=block)
    v.load_raw(norm.running_var, var, block=block)
    _coefficients(space, norm, block, rows, mean, var, invstd, a, b, gamma, beta, eps=eps)
    for tensor, row in ((norm.a, a), (norm.b, b)):
        v.store_raw(tensor, row, block=block)


def _coefficients(
    space: Workspace,
    norm: NormTensors,
    block: int,
    rows: int,
    mean: int,
    var: int,
    invstd: int,
    a: int,
    b: int,
    gamma: int,
    beta: int,
    *,
    eps: float,
) -> None:
    v = space.vectors
    one = space.vector(19)
    v.load_raw(norm.gamma, gamma, block=block)
    v.load_raw(norm.beta, beta, block=block)
    v.vector(Op.ADD, invstd, var, rounded(eps), inner=rows)
    v.vector(Op.SQRT, invstd, invstd, inner=rows)
    v.vector(Op.GREATER_EQUAL, one, invstd, 0.0, inner=rows)  # 1.0: a standard deviation is never negative
    v.vector(Op.DIV, invstd, one, invstd, inner=rows)
    v.vector(Op.MUL, a, gamma, invstd, inner=rows)
    v.vector(Op.MUL, b, mean, a, inner=rows)
    v.vector(Op.SUB, b, beta, b, inner=rows)


def lower_group(
    space: Workspace, source: Tensor, out: Tensor, *, norm: NormTensors | None, other: Tensor | None, relu: bool
) -> None:
    """FF of a pointwise group."""
    v = space.vectors

    def load(tile: Tile, at: list[int]) -> None:
        if norm is not None and tile.begins:
            v.load_raws((norm.a, norm.b), space.coefficients(0, 2, tile.block), block=tile.block)
        v.load(source, tile, at[0])
        if other is not None:
            v.load(other, tile, at[1])

    def compute(tile: Tile, at: list[int]) -> None:
        size: dict[str, Any] = {"outer": tile.count, "inner": tile.rows}
        if norm is not None:
            a, b = space.coefficients(0, 2, tile.block)
            v.vector(Op.MULADD, at[0], at[0], a, b, **size, broadcast="bc", rectify=relu and other is None)
        if other is not None:
            v.vector(Op.ADD, at[0], at[0], at[1], **size, rectify=relu)
        if relu and norm is None and other is None:
            v.vector(Op.MAX, at[0], at[0], 0.0, **size)

    def store(tile: Tile, at: list[int]) -> None:
        v.store(out, tile, at[0])

    space.stream(out, range(out.planes), 1 if other is None else 2, load, compute, store)


class ErrorSums:
    """The sums that batch norms need of an error, taken while it is made: S1 of the error itself (the first set of
    accumulator rows), S2 of it times the input of each batch norm (the sets behind).

    Parameters
    ----------
    space : Workspace
    error : Tensor
        As it is stored: that is what is summed, though the sums are taken before.
    norms : sequence of (Tensor, NormTensors)
        Inputs of the batch norms that the error goes to, and their vectors. There may be none: then nothing is done.
    """

    VECTORS = 8
    """Per-channel vectors that `finish` uses, from the first on."""

    def __init__(self, space: Workspace, error: Tensor, norms: Sequence[tuple[Tensor, NormTensors]]) -> None:
        self.space, self.error, self.norms = space, error, norms
        self.rows = error.block_channels // space.beat
        self.at = SumRows.of(space, error, 1 + len(norms))
        if norms and not self.at.blocks:
            raise ValueError(
                f"sum_rows must be at least {self.at.sets * self.rows} for the {len(norms)} batch norms that the error "
                f"of {error.name} goes to, not {space.program.config.sum_rows}"
            )

    @property
    def inputs(self) -> list[Tensor]:
        """What must be loaded beside a tile of the error."""
        return [y for y, _ in self.norms]

    @property
    def outputs(self) -> list[str]:
        """Names of what `finish` writes."""
        vectors = [(norm.dgamma, norm.dbeta, norm.grad_b, norm.grad_c) for _, norm in self.norms]
        return [tensor.name for tensors in vectors for tensor in tensors]

    def load(self, tile: Tile, inputs: Sequence[int]) -> None:
        """Bring in the tiles of `inputs`, to these rows."""
        for y, row in zip(self.inputs, inputs, strict=True):
            self.space.vectors.load(y, tile, row)

    def add(self, tile: Tile, place: int, inputs: Sequence[int], *, first: bool) -> None:
        """Add a tile at row `place`, with those of `inputs` at these rows."""
        if not self.norms:
            return
        self.space.program.commit(self.error)  # SUM rounds at its scale
        common: dict[str, Any] = {"pixels": tile.count, "rows": tile.rows, "initialise": first, "a_of": self.error}
        common["quantise"] = True
        self.space.vectors.sum(self.at.first(tile.block, 0), place, 1.0, **common)
        for number, (y, at) in enumerate(zip(self.inputs, inputs, strict=True), 1):
            self.space.vectors.sum(self.at.first(tile.block, number), place, at, **common, b_of=y)

    def finish(self, block: int) -> None:
        """From the sums of a channel block to dgamma, dbeta and the coefficients of the error of y, in memory."""
        for number, (y, norm) in enumerate(self.norms, 1):
            self._finish(block, self.at.first(block, number), y, norm)

    def _finish(self, block: int, row: int, y: Tensor, norm: NormTensors) -> None:
        space, v, rows = self.space, self.space.vectors, self.rows
        inv_n = reciprocal(y.images * y.height * y.width)
        s1, s2, mean, invstd, a, big_b, big_c, t = (space.vector(i) for i in range(self.VECTORS))
        v.sum_out(s1, self.at.first(block, 0), rows=rows, a_of=self.error)
        v.sum_out(s2, row, rows=rows, a_of=self.error, b_of=y)
        v.load_raws((norm.mean, norm.invstd, norm.a), (mean, invstd, a), block=block)

        def op(which: Op, dst: int, x: int, y: int | float | None = None) -> None:
            v.vector(which, dst, x, y, inner=rows)

        op(Op.MUL, t, mean, s1)
        op(Op.SUB, t, s2, t)
        op(Op.MUL, t, t, invstd)
        v.store_raw(norm.dgamma, t, block=block)
        v.store_raw(norm.dbeta, s1, block=block)
        op(Op.MUL, t, t, inv_n)  # g1
        op(Op.MUL, s1, s1, inv_n)  # g2
        op(Op.MUL, big_b, a, invstd)
        op(Op.MUL, big_b, big_b, t)
        op(Op.KEEP_POSITIVE, t, t, 0.0)  # zero
        op(Op.SUB, big_b, t, big_b)
        op(Op.MUL, s1, a, s1)
        op(Op.MUL, s2, big_b, mean)
        op(Op.ADD, s1, s1, s2)
        op(Op.SUB, big_c, t, s1)
        v.store_raw(norm.grad_b, big_b, block=block)
        v.store_raw(norm.grad_c, big_c, block=block)


def lower_norm_grad(space: Workspace, dz: Tensor, y: Tensor, norm: NormTensors, sums: ErrorSums) -> None:
    """BP of batch norm: the error of y (`sums.error`), whose coefficients the sums of dz have given."""
    v = space.vectors
    sources = [dz, y, *sums.inputs]

    def load(tile: Tile, at: list[int]) -> None:
        if tile.begins:
            rows = space.coefficients(ErrorSums.VECTORS, 3, tile.block)
            v.load_raws((norm.a, norm.grad_b, norm.grad_c), rows, block=tile.block)
        for source, row in zip(sources, at, strict=True):
            v.load(source, tile, row)

    def compute(tile: Tile, at: list[int]) -> None:
        a, b, c = space.coefficients(ErrorSums.VECTORS, 3, tile.block)
        size: dict[str, Any] = {"outer": tile.count, "inner": tile.rows}
        v.vector(Op.MULADD, at[1], at[1], b, c, **size, broadcast="bc")
        v.vector(Op.MULADD, at[0], at[0], a, at[1], **size, broadcast="b")
        sums.add(tile, at[0], at[2:], first=tile.begins)

    def store(tile: Tile, at: list[int]) -> None:
        v.store(sums.error, tile, at[0])

    space.stream(y, range(y.planes), len(sources), load, compute, store, sums.finish)


def add_unmasked(space: Workspace, tile: Tile, place: int, term: int) -> None:
    """Add the tile at row `term` to the one at `place`, whose masked elements are -0; the sum is zero there."""
    space.vectors.vector(Op.ADD_UNMASKED, place, place, term, outer=tile.count, inner=tile.rows)


def add_and_mask(space: Workspace, tile: Tile, place: int, terms: Sequence[int], mask: int | None) -> None:
    """Add the tiles at rows `terms` to the one at `place`; then it keeps what is positive in the one at `mask`."""
    size: dict[str, Any] = {"outer": tile.count, "inner": tile.rows}
    for row in terms:
        last = mask is not None and row == terms[-1]
        space.vectors.vector(Op.ADD, place, place, row, mask if last else None, **size, masked=last)
    if mask is not None and not terms:
        space.vectors.vector(Op.KEEP_POSITIVE, place, place, mask, **size)


def lower_sum_errors(
    space: Workspace, terms: Sequence[Tensor], mask: Tensor | None, out: Tensor, sums: ErrorSums
) -> None:
    """Error of a tensor from stored terms alone: their sum, masked."""
    v = space.vectors
    operands = [*terms, *([mask] if mask is not None else [])]
    sources = [*operands, *sums.inputs]

    def load(tile: Tile, at: list[int]) -> None:
        for source, row in zip(sources, at, strict=True):
            v.load(source, tile, row)

    def compute(tile: Tile, at: list[int]) -> None:
        add_and_mask(space, tile, at[0], at[1 : len(terms)], at[len(terms)] if mask is not None else None)
        sums.add(tile, at[0], at[len(operands) :], first=tile.begins)

    def store(tile: Tile, at: list[int]) -> None:
        v.store(out, tile, at[0])

    space.stream(out, range(out.planes), len(sources), load, compute, store, sums.finish)


def lower_average_pool(space: Workspace, x: Tensor, out: Tensor) -> None:
    """FF of global average pooling: `out` has one pixel an image."""
    v, config = space.vectors, space.program.config
    pixels, rows = x.height * x.width, x.block_channels // space.beat
    images = min(x.images, config.sum_rows // rows, space.tiles // rows)  # whose sums fit the accumulators and rows
    places, size = space.areas(2)
    for block in range(x.planes):
        for image in range(0, x.images, images):
            count = min(images, x.images - image)
            for i in range(count):
                first = True
                for tile in tiles_of(x, space.beat, size, block):
                    if not tile.image <= image + i < tile.image + tile.images:
                        continue
                    part = Tile(image + i, 1, tile.line, tile.lines, tile.pixel, tile.pixels, block, rows)
                    v.load(x, part, places[i % 2])
                    v.sum(
                        i * rows,
                        places[i % 2],
                        1.0,
                        pixels=part.count,
                        rows=rows,
                        initialise=first,
                        a_of=x,
                    )
                    first = False
            result = space.vector(0)
            v.sum_out(result, 0, rows=count * rows, a_of=x)
            v.vector(Op.MUL, result, result, reciprocal(pixels), inner=count * rows)
            v.store(out, Tile(image, count, 0, 1, 0, 1, block, rows), result)


def lower_average_pool_grad(space: Workspace, error: Tensor, mask: Tensor | None, out: Tensor, sums: ErrorSums) -> None:
    """BP of global average pooling; `out` is the error of its input, masked by `mask` > 0."""
    v, rows = space.vectors, out.block_channels // space.beat
    inv_n = reciprocal(out.height * out.width)
    count = 2 + len(sums.inputs)
    places, size = space.areas(2 * count)
    for block in range(out.planes):
        for i, tile in enumerate(tiles_of(out, space.beat, size, block)):
            e, x, *inputs = places[count * (i % 2) :][:count]
            errors = Tile(tile.image, tile.images, 0, 1, 0, 1, block, rows)
            v.load(error, errors, e)
            if mask is not None:
                v.load(mask, tile, x)
            v.vector(Op.MUL, e, e, inv_n, inner=errors.size)
            each = tile.lines * tile.pixels
            for image in range(tile.images):
                dst = x + image * each * rows
                size_of: dict[str, Any] = {"outer": each, "inner": rows, "broadcast": "a"}
                if mask is not None:
                    v.vector(Op.KEEP_POSITIVE, dst, e + image * rows, dst, **size_of)
                else:
                    v.vector(Op.COPY, dst, e + image * rows, **size_of)
            sums.load(tile, inputs)
            sums.add(tile, x, inputs, first=i == 0)
            v.store(out, tile, x)
        sums.finish(block)


def lower_max_pool(
    space: Workspace, x: Tensor, out: Tensor, winner: Tensor, *, kernel: int, stride: int, padding: int
) -> None:
    """FF of max pooling; `winner` takes the row-major tap index of each output's first maximum."""
    v = space.vectors
    for block in range(out.planes):
        places, size = space.areas(4)
        best, index, value, flag = places
        for tile in tiles_of(out, space.beat, size, block):
            shape: dict[str, Any] = {"outer": tile.count, "inner": tile.rows}
            for tap in range(kernel * kernel):
                r, s = divmod(tap, kernel)
                target = best if tap == 0 else value
                v.load_window(x, tile, target, step=stride, line=r - padding, pixel=s - padding, fill=0x8000 | F16_INF)
                if tap == 0:
                    v.vector(Op.KEEP_POSITIVE, index, best, 0.0, **shape)  # zero
                    continue
                # best >= value: keep; else the index becomes the tap's and best the value.
                v.vector(Op.GREATER_EQUAL, flag, best, value, **shape)
                v.vector(Op.KEEP_POSITIVE, index, index, flag, **shape)
                v.vector(Op.SUB, flag, flag, 1.0, **shape)
                v.vector(Op.MUL, flag, flag, float(-tap), **shape)
                v.vector(Op.ADD, index, index, flag, **shape)
                v.vector(Op.MAX, best, best, value, **shape)
            v.store(out, tile, best)
            v.store(winner, tile, index)


def lower_max_pool_grad(
    space: Workspace,
    error: Tensor,
    winner: Tensor,
    mask: Tensor | None,
    out: Tensor,
    sums: ErrorSums,
    *,
    kernel: int,
    stride: int,
    padding: int,
) -> None:
    """BP of max pooling: each pixel of `out` adds the errors of the windows that it won, in row-major order of taps."""
    v = space.vectors
    for block in range(out.planes):
        places, size = space.areas(4 + len(sums.inputs))
        total, e, w, x, *inputs = places
        for i, tile in enumerate(tiles_of(out, space.beat, size, block)):
            shape: dict[str, Any] = {"outer": tile.count, "inner": tile.rows}
            if mask is not None:
                v.load(mask, tile, x)
            v.vector(Op.KEEP_POSITIVE, total, total, 0.0, **shape)  # zero
            for tap in range(kernel * kernel):
                r, s = divmod(tap, kernel)
                v.vector(Op.KEEP_POSITIVE, e, total, 0.0, **shape)
                if not v.load_lattice(error, tile, e, step=stride, line=padding - r, pixel=padding - s):
                    continue
                v.load_lattice(winner, tile, w, step=stride, line=padding - r, pixel=padding - s)
                v.vector(Op.KEEP_EQUAL, e, e, w, float(tap), **shape)
                v.vector(Op.ADD, total, total, e, **shape)
            if mask is not None:
                v.vector(Op.KEEP_POSITIVE, total, total, x, **shape)
            sums.load(tile, inputs)
            sums.add(tile, total, inputs, first=i == 0)
            v.store(out, tile, total)
        sums.finish(block)


def _sgd(space: Workspace, optimiser: Optimiser, decay: float, w: int, m: int, g: int, rows: int) -> None:
    """One update step on `rows` rows at w, m (updated in place) and g (destroyed)."""
    v = space.vectors
    v.vector(Op.MUL, g, g, rounded(1.0 / optimiser.loss_scale), inner=rows, loss_scaling=1)
    v.vector(Op.MULADD, g, w, rounded(decay), g, inner=rows)
    v.vector(Op.MULADD, m, m, rounded(optimiser.momentum), g, inner=rows)
    v.vector(Op.MULADD, w, m, rounded(-optimiser.rate), w, inner=rows)  # w - m * rate


def lower_update(
    space: Workspace,
    optimiser: Optimiser,
    master: RawTensor,
    momentum: RawTensor | Tensor,
    gradient: Tensor,
    weight: Tensor,
) -> None:
    """Update of a weight tensor: FP32 master, momentum, and the encoded weights for the next step."""
    v = space.vectors

    def load(tile: Tile, at: list[int]) -> None:
        row = tile.line * weight.width + tile.pixel
        v.load(gradient, tile, at[0])
        v.load_raw(master, at[1], row=row, rows=tile.count, block=tile.block)
        if isinstance(momentum, Tensor):
            v.load(momentum, tile, at[2])
        else:
            v.load_raw(momentum, at[2], row=row, rows=tile.count, block=tile.block)

    def compute(tile: Tile, at: list[int]) -> None:
        _sgd(space, optimiser, optimiser.decay, at[1], at[2], at[0], tile.size)

    def store(tile: Tile, at: list[int]) -> None:
        row = tile.line * weight.width + tile.pixel
        v.store_raw(master, at[1], row=row, rows=tile.count, block=tile.block)
        if isinstance(momentum, Tensor):
            v.store(momentum, tile, at[2])
        else:
            v.store_raw(momentum, at[2], row=row, rows=tile.count, block=tile.block)
        v.store(weight, tile, at[1])

    space.stream(weight, range(weight.planes), 3, load, compute, store)


def lower_vector_update(
    space: Workspace, optimiser: Optimiser, value: RawTensor, momentum: RawTensor, gradient: RawTensor
) -> None:
    """Update of a per-channel vector, without weight decay."""
    v = space.vectors
    w, m, g = (space.vector(i) for i in range(3))
    for block in range(-(-value.padded // BLOCK)):
        rows = v.load_raw(value, w, block=block)
        v.load_raw(momentum, m, block=block)
        v.load_raw(gradient, g, block=block)
        _sgd(space, optimiser, 0.0, w, m, g, rows)
        v.store_raw(value, w, block=block)
        v.store_raw(momentum, m, block=block)
