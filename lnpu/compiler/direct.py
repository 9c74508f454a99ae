"""Feed-forward and back-propagation of convolutions: output pixels are the rows, weights are resident."""

from collections.abc import Callable, Iterable
from functools import partial

from lnpu.compiler.buffers import (
    PageCache,
    block_parts,
    load_sparse,
    page_regions,
    power_of_two,
    psum_regions,
    real_lanes,
)
from lnpu.compiler.geometry import Axis, Box, Plan, Taps, boxes_of, by_phase, cut
from lnpu.compiler.program import Program
from lnpu.compiler.rounding import Epilogue, Rounding
from lnpu.compiler.tensor import Tensor
from lnpu.compiler.tiles import Tile, VectorBuilder
from lnpu.config import BLOCK
from lnpu.ctrl.commands import Opcode, Target, VectorOp

__all__ = ["DirectLowering"]


def _plan(
    program: Program,
    images: int,
    axes_h: list[Axis],
    axes_w: list[Axis],
    depth: int,
    out: Tensor,
    step: int,
    budget: int,
    spread: int,
) -> Plan:
    """Choose the tile and the tap groups: the fewest sparse rows loaded for each output.

    Parameters
    ----------
    depth : int
        Elements k of a tile's rows, which with the taps of a group must fit the dense buffer.
    step : int
        Output pixels a lattice position covers on each axis.
    budget : int
        Vector-memory rows that one output tile may take.
    spread : int
        Tiles that run side by side; a tile should leave work for the others.
    """
    config = program.config
    lattice_h = max(axis.out_count for axis in axes_h)
    lattice_w = max(axis.out_count for axis in axes_w)
    max_r = max(1, max(len(axis.taps) for axis in axes_h))
    max_s = max(1, max(len(axis.taps) for axis in axes_w))
    per_pixel = out.block_channels // config.beat
    best: tuple[tuple[float, ...], Plan] | None = None
    widths = {lattice_w} | {w for w in range(1, lattice_w) if (w * step) % out.run_pixels == 0}
    if out.run_lines > 1:
        widths = {lattice_w}
    heights = [lines for lines in range(1, lattice_h + 1) if lines == lattice_h or lines * step % out.run_lines == 0]
    for taps_r, taps_s in sorted({(max_r, max_s), (1, max_s), (1, 1)}):
        if taps_r * taps_s * depth > config.dense_rows:
            continue
        for pixels in widths:
            for lines in heights:
                if lines < lattice_h and pixels < lattice_w and lines > 8:
                    break
                whole = lines == lattice_h and pixels == lattice_w
                for count in range(1, images + 1 if whole else 2):
                    outputs = count * lines * pixels
                    halo = count * (lines + taps_r - 1) * (pixels + taps_s - 1)
                    if outputs > config.psum_rows or halo > config.rows:
                        break
                    if outputs * step * step * per_pixel > budget:
                        break
                    # A line costs more than its pixels: words that it has only a part of.
                    loads = count * (lines + taps_r - 1) * (pixels + taps_s)
                    total = images * lattice_h * lattice_w
                    tiles = -(-images // count) * -(-lattice_h // lines) * -(-lattice_w // pixels)
                    groups = -(-max_r // taps_r) * -(-max_s // taps_s)
                    rounds = -(-tiles // spread)
                    cost = (
                        rounds * loads * groups * (1 + depth / 16) + rounds * outputs * max_r * max_s * depth / 4
                    ) / total
                    key = (cost, -outputs)
                    if best is None or key < best[0]:
                        best = key, Plan(count, lines, pixels, taps_r, taps_s)
    if best is None:
        raise ValueError(
            f"no tile of {out.name} ({lattice_h}x{lattice_w} positions, {out.run_pixels} pixels a run) fits "
            f"{config.rows} sparse rows, {config.psum_rows} partial-sum rows, {config.dense_rows} dense rows and "
            f"{budget} vector-memory rows"
        )
    return best[1]


class DirectLowering:
    """FF and BP: output pixels are the rows, the sparse operand has a halo, weights are resident."""

    def __init__(
        self,
        program: Program,
        kernel_width: int,
        source: Tensor,
        weight: Tensor,
        out: Tensor,
        axes_h: list[Axis],
        axes_w: list[Axis],
        rounding: Rounding,
        *,
        backward: bool,
        vmem: int,
        vmem_end: int,
        reserve: int,
    ) -> None:
        self.program, self.config = program, program.config
        self.kernel_width = kernel_width
        self.source, self.weight, self.out = source, weight, out
        self.axes_h, self.axes_w = axes_h, axes_w
        self.rounding, self.backward = rounding, backward
        self.step = axes_h[0].out_step
        self.depth = power_of_two(min(source.padded, BLOCK, self.config.depth))
        groups = -(-out.padded // self.config.lanes)
        self.cores_o = min(self.config.cores, groups)
        self.cores_m = self.config.cores // self.cores_o
        self.cache = PageCache()
        # Two sets of tiles, so that one is being finished while the next is computed; then the epilogue's areas.
        budget = (vmem_end - vmem) // (2 * self.cores_m + reserve)
        areas = [vmem + i * budget for i in range(2 * self.cores_m + reserve)]
        self.sets = [areas[: self.cores_m], areas[self.cores_m : 2 * self.cores_m]]
        self.scratch = areas[2 * self.cores_m :]
        self.batches = 0
        self.pending: list[Callable[[], None]] = []
        self.plan = _plan(program, out.images, axes_h, axes_w, self.depth, out, self.step, budget, self.cores_m)
        outputs = self.plan.images * self.plan.lines * self.plan.pixels
        # With room for two tiles' partial sums, one drains while the other adds up.
        self.psum_bases = [0, outputs] if 2 * outputs <= self.config.psum_rows else [0]
        self.sums_taken = 0
        self.lattice_h = max(axis.out_count for axis in axes_h)
        self.lattice_w = max(axis.out_count for axis in axes_w)

    def lower(self, epilogue: Epilogue, after_block: Callable[[int], None] | None) -> None:
        if self.rounding.fp16:
            self.program.commit(self.out)  # DRAIN rounds at its scale
        boxes = list(boxes_of(self.plan, self.out.images, self.lattice_h, self.lattice_w))
        for block in range(self.out.planes):
            for start in range(0, len(boxes), self.cores_m):
                self._batch(boxes[start : start + self.cores_m], block, epilogue, first=start == 0)
            self._finish()
            if after_block is not None:
                after_block(block)

    def _finish(self) -> None:
        """The epilogues of the tiles that have been drained."""
        for finish in self.pending:
            finish()
        self.pending.clear()

    def _batch(self, boxes: list[Box], block: int, epilogue: Epilogue, *, first: bool) -> None:
        """Boxes that the groups of cores work on side by side, for one channel block of the output."""
        tiles = [self._tile(box, block) for box in boxes]
        places = self.sets[self.batches % 2][: len(tiles)]
        self.batches += 1
        chunk = self.cores_o * self.config.lanes
        low, high = block * BLOCK, min(self.out.padded, (block + 1) * BLOCK)
        for channel in range(low, high, chunk):
            for axis_h in by_phase(self.axes_h):
                for axis_w in by_phase(self.axes_w):
                    self._sums(boxes, tiles, places, channel, high, axis_h, axis_w)
        for i, (tile, place) in enumerate(zip(tiles, places, strict=True)):
            self.pending.append(partial(epilogue, tile, place, first and i == 0, self.scratch))

    def _tile(self, box: Box, block: int) -> Tile:
        step, out = self.step, self.out
        line, pixel = box.line * step, box.pixel * step
        return Tile(
            box.image,
            box.images,
            line,
            min(box.lines * step, out.height - line),
            pixel,
            min(box.pixels * step, out.width - pixel),
            block,
            out.block_channels // self.config.beat,
        )

    def _groups(self, axes_h: list[Axis], axes_w: list[Axis]) -> list[tuple]:
        """(axis, axis, taps, taps) of every source phase and tap group of an output phase."""
        return [
            (axis_h, axis_w, taps_r, taps_s)
            for axis_h in axes_h
            for axis_w in axes_w
            for taps_r in cut(axis_h.taps, self.plan.taps_r)
            for taps_s in cut(axis_w.taps, self.plan.taps_s)
        ]

    def _sums(
        self,
        boxes: list[Box],
        tiles: list[Tile],
        places: list[int],
        channel: int,
        high: int,
        axes_h: list[Axis],
        axes_w: list[Axis],
    ) -> None:
        """One output phase: accumulate over channels and taps, then drain."""
        config = self.config
        inside = [  # the last box may reach beyond a phase with fewer positions
            (min(box.lines, axes_h[0].out_count - box.line), min(box.pixels, axes_w[0].out_count - box.pixel))
            for box in boxes
        ]
        groups = self._groups(axes_h, axes_w)
        lanes = [min(config.lanes, high - (channel + o * config.lanes)) for o in range(self.cores_o)]
        psum = self.psum_bases[self.sums_taken % len(self.psum_bases)]
        self.sums_taken += 1
        initialise = True
        for k in range(0, self.source.padded, self.depth):
            for axis_h, axis_w, taps_r, taps_s in groups:
                depth = min(self.depth, self.source.padded - k)
                dense_pages = {}
                for o, count in enumerate(lanes):
                    if count > 0:
                        mask = self._mask(range(len(boxes)), [o])
                        dense_pages[o] = self._load_dense(
                            mask, channel + o * config.lanes, count, k, depth, taps_r, taps_s
                        )
                for m, box in enumerate(boxes):
                    lines, pixels = inside[m]
                    if lines < 1 or pixels < 1:
                        continue
                    active = [o for o, count in enumerate(lanes) if count > 0]
                    mask = self._mask([m], active)
                    sparse_page, geometry = self._load_sparse(
                        mask, box, lines, pixels, k, depth, axis_h, axis_w, taps_r, taps_s
                    )
                    real = {o: real_lanes(self.out.channels - channel - o * config.lanes, lanes[o]) for o in active}
                    for count, page in sorted({(real[o], dense_pages[o]) for o in active}):
                        cores = self._mask([m], [o for o in active if (real[o], dense_pages[o]) == (count, page)])
                        self._multiply(
                            cores,
                            box.images,
                            lines,
                            pixels,
                            geometry,
                            len(taps_r),
                            len(taps_s),
                            depth,
                            sparse_page,
                            page,
                            count,
                            initialise,
                            psum,
                        )
                initialise = False
        self._finish()  # of the batch before, while the cores work on this one
        for m, (tile, place) in enumerate(zip(tiles, places, strict=True)):
            lines, pixels = inside[m]
            if lines < 1 or pixels < 1:
                continue
            for o, count in enumerate(lanes):
                if count > 0:
                    self._drain(
                        m * self.cores_o + o,
                        tile,
                        place,
                        channel + o * config.lanes,
                        count,
                        boxes[m],
                        lines,
                        pixels,
                        axes_h[0].out_phase,
                        axes_w[0].out_phase,
                        psum,
                        empty=not groups,
                    )

    def _mask(self, groups_m: Iterable[int], groups_o: Iterable[int]) -> int:
        return sum(1 << (m * self.cores_o + o) for m in groups_m for o in groups_o)

    def _load_sparse(
        self,
        cores: int,
        box: Box,
        lines: int,
        pixels: int,
        k: int,
        depth: int,
        axis_h: Axis,
        axis_w: Axis,
        taps_r: Taps,
        taps_s: Taps,
    ) -> tuple[int, tuple[int, int, int, int, int]]:
        """Load the box with the halo of these taps; returns the page and (rows an image, pitch, first row, steps)."""
        low_r, low_s = min(f for _, f in taps_r), min(f for _, f in taps_s)
        tall, wide = lines + len(taps_r) - 1, pixels + len(taps_s) - 1
        first_line = (box.line + low_r) * axis_h.source_step + axis_h.source_phase
        first_pixel = (box.pixel + low_s) * axis_w.source_step + axis_w.source_phase
        first_row = (taps_r[0][1] - low_r) * wide + (taps_s[0][1] - low_s)
        step_r = (taps_r[1][1] - taps_r[0][1]) * wide if len(taps_r) > 1 else 0
        step_s = taps_s[1][1] - taps_s[0][1] if len(taps_s) > 1 else 0
        geometry = (tall * wide, wide, first_row, step_r, step_s)
        content = (
            box.image,
            box.images,
            first_line,
            first_pixel,
            tall,
            wide,
            k,
            axis_h.source_step,
            axis_w.source_step,
        )
        page, there = self.cache.page("sparse", cores, content)
        if not there:
            first, steps = (first_line, first_pixel), (axis_h.source_step, axis_w.source_step)
            load_sparse(self.program, self.source, cores, page, box, first, steps, (tall, wide), k, depth)
        return page, geometry

    def _load_dense(self, cores: int, lane: int, lanes: int, k: int, depth: int, taps_r: Taps, taps_s: Taps) -> int:
        """Load weights [tap, k, lane] of output channels `lane` and up; returns the page."""
        content = (lane, lanes, k, taps_r, taps_s)
        page, there = self.cache.page("dense", cores, content)
        if there:
            return page
        weight, beat = self.weight, self.config.beat
        common = {"target": Target.DENSE.value, "page": page, "cores": cores}
        step_r = taps_r[1][0] - taps_r[0][0] if len(taps_r) > 1 else 0
        step_s = taps_s[1][0] - taps_s[0][0] if len(taps_s) > 1 else 0
        first = taps_r[0][0] * self.kernel_width + taps_s[0][0]
        if not self.backward:  # pixel = k, element = lane
            for part, start, count in block_parts(lane, lanes):
                self.program.emit(
                    Opcode.LOAD,
                    reads=[self.program.memory(weight)],
                    writes=page_regions("dense", cores, page),
                    **common,
                    **weight.walk(0, part, first) | {"line_n": step_r * self.kernel_width},
                    n_count=len(taps_r),
                    i_count=len(taps_s),
                    j_count=depth,
                    line_i=step_s,
                    pixel=k,
                    pixel_j=1,
                    i_end=len(taps_s),
                    j_end=depth,
                    channel=start // beat,
                    channel_beats=count // beat,
                    dest_n=len(taps_s) * depth,
                    dest_i=depth,
                    dest_j=1,
                    element=part * BLOCK + start - lane,
                )
        else:  # pixel = lane, element = k
            for r, _ in taps_r:
                for s, _ in taps_s:
                    tap = ((r - taps_r[0][0]) // max(1, step_r)) * len(taps_s) + (s - taps_s[0][0]) // max(1, step_s)
                    self.program.emit(
                        Opcode.LOAD,
                        reads=[self.program.memory(weight)],
                        writes=page_regions("dense", cores, page),
                        **common,
                        **weight.walk(0, k // BLOCK, r * self.kernel_width + s),
                        transpose=1,
                        n_count=1,
                        i_count=1,
                        j_count=lanes,
                        pixel=lane,
                        pixel_j=1,
                        i_end=1,
                        j_end=lanes,
                        channel=(k % BLOCK) // beat,
                        channel_beats=depth // beat,
                        dest_j=1,
                        element=tap * depth,
                    )
        return page

    def _multiply(
        self,
        cores: int,
        images: int,
        lines: int,
        pixels: int,
        geometry: tuple[int, int, int, int, int],
        count_r: int,
        count_s: int,
        depth: int,
        sparse_page: int,
        dense_page: int,
        lanes: int,
        initialise: bool,
        psum: int,
    ) -> None:
        per_image, pitch, first_row, step_r, step_s = geometry
        self.program.emit(
            Opcode.MULTIPLY,
            reads=page_regions("sparse", cores, sparse_page) + page_regions("dense", cores, dense_page),
            writes=psum_regions(cores, psum, images * lines * pixels),
            cores=cores,
            sparse_page=sparse_page,
            dense_page=dense_page,
            initialise=int(initialise),
            lanes=lanes,
            count_n=images,
            count_h=lines,
            count_w=pixels,
            count_r=count_r,
            count_s=count_s,
            row=first_row,
            row_n=per_image,
            row_h=pitch,
            row_w=1,
            row_r=step_r,
            row_s=step_s,
            psum=psum,
            psum_n=lines * pixels,
            psum_h=pixels,
            psum_w=1,
            dense_r=count_s * depth,
            dense_s=depth,
            kmask=(1 << depth) - 1,
        )

    def _drain(
        self,
        core: int,
        tile: Tile,
        place: int,
        channel: int,
        lanes: int,
        box: Box,
        lines: int,
        pixels: int,
        phase_h: int,
        phase_w: int,
        psum: int,
        *,
        empty: bool,
    ) -> None:
        """Round the partial sums of one output phase into the tile."""
        beat, step = self.config.beat, self.step
        stride_n, stride_h, stride_w = tile.strides()
        vmem = place + phase_h * stride_h + phase_w * stride_w + (channel % BLOCK) // beat
        count_rows = lanes // beat
        if empty:  # no tap reaches this phase: its outputs are zero
            for n in range(box.images):
                for line in range(lines):
                    for row in range(count_rows):
                        self.program.emit(
                            Opcode.VECTOR,
                            reads=[VectorBuilder.rows(place, tile.size)],
                            writes=[VectorBuilder.rows(place, tile.size)],
                            op=VectorOp.KEEP_POSITIVE.value,
                            outer=1,
                            inner=pixels,
                            b_immediate=1,
                            dst=vmem + n * stride_n + line * step * stride_h + row,
                            dst_inner=step * stride_w,
                            a=place,
                        )
            return
        scale, tensor_out = self.rounding.of(self.out)
        self.program.emit(
            Opcode.DRAIN,
            reads=psum_regions(1 << core, psum, box.images * lines * pixels),
            writes=[VectorBuilder.rows(place, tile.size)],
            core=core,
            count_n=box.images,
            count_h=lines,
            count_w=pixels,
            lane_beats=count_rows,
            lanes=real_lanes(self.out.channels - channel, lanes),
            shift=self.source.scale + self.weight.scale - scale,
            scale=scale if self.rounding.fp16 else 0,
            tensor_a=self.source.state,
            tensor_b=self.weight.state,
            tensor_out=tensor_out,
            fp16=int(self.rounding.fp16),
            saturate=int(self.rounding.saturate),
            psum=psum,
            psum_n=lines * pixels,
            psum_h=pixels,
            psum_w=1,
            vmem=vmem,
            vmem_n=stride_n,
            vmem_h=step * stride_h,
            vmem_w=step * stride_w,
        )
