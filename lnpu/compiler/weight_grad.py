"""Weight gradients of convolutions: input channels and taps are the rows, pixels are summed over, dy is resident."""

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
from lnpu.compiler.geometry import Axis, Box, Convolution, Plan, Taps, boxes_of, cut, forward_axes
from lnpu.compiler.program import Program
from lnpu.compiler.rounding import Epilogue, Rounding
from lnpu.compiler.tensor import Tensor
from lnpu.compiler.tiles import Tile, VectorBuilder
from lnpu.config import BLOCK
from lnpu.ctrl.commands import Opcode, Target, VectorOp

__all__ = ["WeightGradLowering"]


class WeightGradLowering:
    """WG: input channels (and taps) are the rows, pixels are summed over, dy is resident."""

    def __init__(
        self,
        program: Program,
        shape: Convolution,
        x: Tensor,
        dy: Tensor,
        out: Tensor,
        rounding: Rounding,
        *,
        vmem: int,
        vmem_end: int,
        reserve: int,
    ) -> None:
        self.program, self.config, self.shape = program, program.config, shape
        self.x, self.dy, self.out, self.rounding = x, dy, out, rounding
        config = self.config
        groups = -(-dy.padded // config.lanes)
        self.cores_o = min(config.cores, groups)
        self.cores_m = config.cores // self.cores_o
        k, s, p = (shape.kernel_height, shape.kernel_width), shape.stride, shape.padding
        self.axes_h = forward_axes(shape.height, shape.out_height, k[0], s, p)
        self.axes_w = forward_axes(shape.width, shape.out_width, k[1], s, p)
        per_pixel = out.block_channels // config.beat
        most = min(x.padded, BLOCK, config.rows, config.psum_rows)
        # Two sets of tiles, so that one is being stored while the next is computed; then the epilogue's areas. But one
        # if only then a tile can have all channels of a block of x, which is fetched whole.
        size = {sets: (vmem_end - vmem) // (sets * self.cores_m + reserve) for sets in (2, 1)}
        sets = 1 if size[2] // per_pixel < most <= size[1] // per_pixel else 2
        area, budget = size[sets], size[sets] // per_pixel
        areas = [vmem + i * area for i in range(sets * self.cores_m + reserve)]
        self.sets = [areas[: self.cores_m], areas[(sets - 1) * self.cores_m : sets * self.cores_m]]
        self.scratch = areas[sets * self.cores_m :]
        self.batches = 0
        self.pending: list[Callable[[], None]] = []
        # Channels of x a core holds at a time; a tile of `out` holds whole runs, so at least `run_pixels`.
        self.channels = power_of_two(min(most, budget))
        if self.channels < min(out.width, max(config.beat, out.run_pixels)):
            raise ValueError(f"no tile of {out.name} fits {budget} pixels of the vector memory")
        self.taps, self.tile = self._plan(budget)
        sums = self.taps[0] * self.taps[1] * self.channels
        # With room for two tiles' partial sums, one drains while the other adds up.
        self.psum_bases = [0, sums] if 2 * sums <= config.psum_rows else [0]
        self.sums_taken = 0

    def _plan(self, budget: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Taps of a group and the box of dy's pixels: the fewest elements loaded."""
        config, shape = self.config, self.shape
        max_r = max(1, max(len(axis.taps) for axis in self.axes_h))
        max_s = max(1, max(len(axis.taps) for axis in self.axes_w))
        best = None
        for taps_r in range(1, max_r + 1):
            for taps_s in {1, max_s}:
                if taps_r * taps_s * self.channels > min(config.psum_rows, budget):
                    continue
                for pixels in range(1, shape.out_width + 1):
                    for lines in range(1, shape.out_height + 1):
                        whole = lines == shape.out_height and pixels == shape.out_width
                        for images in range(1, shape.batch + 1 if whole else 2):
                            tall, wide = lines + taps_r - 1, pixels + taps_s - 1
                            halo = images * tall * wide
                            loads = images * tall * (wide + 1)  # a line costs more: words that it has only a part of
                            if halo > min(config.depth, config.dense_rows):
                                break
                            boxes = -(-shape.batch // images) * -(-shape.out_height // lines)
                            boxes *= -(-shape.out_width // pixels)
                            groups = -(-max_r // taps_r) * -(-max_s // taps_s)
                            visits = taps_r * taps_s * self.channels
                            outputs = images * lines * pixels
                            cost = (
                                groups
                                * boxes
                                * (loads * self.channels / 8 + outputs * config.lanes / 8 + visits * (2 + outputs / 3))
                            )
                            if best is None or cost < best[0]:
                                best = cost, (taps_r, taps_s), (images, lines, pixels)
        assert best is not None  # one tap and one pixel always fit
        return best[1], best[2]

    def lower(self, epilogue: Epilogue) -> None:
        if self.rounding.fp16:
            self.program.commit(self.out)  # DRAIN rounds at its scale
        groups = [
            (axis_h, axis_w, taps_r, taps_s)
            for axis_h in self.axes_h
            for axis_w in self.axes_w
            for taps_r in cut(axis_h.taps, self.taps[0])
            for taps_s in cut(axis_w.taps, self.taps[1])
        ]
        jobs = [  # what a group of cores sums up: some taps of some channels
            (group, channel) for group in groups for channel in range(0, self.x.padded, self.channels)
        ]
        for block in range(self.out.planes):
            for start in range(0, len(jobs), self.cores_m):
                self._batch(jobs[start : start + self.cores_m], block, epilogue)
        self._finish()
        self._zeros(epilogue)

    def _zeros(self, epilogue: Epilogue) -> None:
        """The gradients of taps that see only padding."""
        shape, place = self.shape, self.sets[0][0]
        useful_r = {r for axis in self.axes_h for r, _ in axis.taps}
        useful_s = {s for axis in self.axes_w for s, _ in axis.taps}
        for tap in range(shape.kernel_height * shape.kernel_width):
            r, s = divmod(tap, shape.kernel_width)
            if r in useful_r and s in useful_s:
                continue
            for block in range(self.out.planes):
                for channel in range(0, self.x.padded, self.channels):
                    channels = min(self.channels, self.x.padded - channel)
                    tile = Tile(0, 1, tap, 1, channel, channels, block, self.out.block_channels // self.config.beat)
                    VectorBuilder(self.program).vector(VectorOp.KEEP_POSITIVE, place, place, 0.0, inner=tile.size)
                    epilogue(tile, place, False, self.scratch)

    def _finish(self) -> None:
        """The epilogues of the tiles that have been drained."""
        for finish in self.pending:
            finish()
        self.pending.clear()

    def _batch(self, jobs: list, block: int, epilogue: Epilogue) -> None:
        """Jobs that the groups of cores work on side by side, for one block of output channels."""
        config, out = self.config, self.out
        per_pixel = out.block_channels // config.beat
        places = self.sets[self.batches % 2][: len(jobs)]
        self.batches += 1
        low, high = block * BLOCK, min(self.dy.padded, (block + 1) * BLOCK)
        for lane in range(low, high, self.cores_o * config.lanes):
            lanes = [min(config.lanes, high - (lane + o * config.lanes)) for o in range(self.cores_o)]
            psum = self.psum_bases[self.sums_taken % len(self.psum_bases)]
            self.sums_taken += 1
            self._sums(jobs, lane, lanes, psum)
            self._finish()  # of the batch before, while the cores work on this one
            for m, ((_, _, taps_r, taps_s), channel) in enumerate(jobs):
                channels = min(self.channels, self.x.padded - channel)
                for o, count in enumerate(lanes):
                    if count > 0:
                        self._drain(
                            m * self.cores_o + o,
                            places[m] + (lane + o * config.lanes - low) // config.beat,
                            len(taps_r) * len(taps_s) * channels,
                            count,
                            per_pixel,
                            places[m],
                            psum,
                            real_lanes(self.dy.channels - lane - o * config.lanes, count),
                        )
        for m, ((_, _, taps_r, taps_s), channel) in enumerate(jobs):
            channels = min(self.channels, self.x.padded - channel)
            for i, (r, _) in enumerate(taps_r):
                for j, (s, _) in enumerate(taps_s):
                    tap = i * len(taps_s) + j
                    tile = Tile(0, 1, r * self.shape.kernel_width + s, 1, channel, channels, block, per_pixel)
                    place = places[m] + tap * tile.size
                    self.pending.append(partial(epilogue, tile, place, False, self.scratch))

    def _sums(self, jobs: list, lane: int, lanes: list[int], psum: int) -> None:
        """Sums of all pixels, box by box, in partial-sum rows `psum` and up."""
        config, shape = self.config, self.shape
        cache = PageCache()
        images, lines, pixels = self.tile
        initialise = True
        plan = Plan(images, lines, pixels, *self.taps)
        active = [o for o, count in enumerate(lanes) if count > 0]
        for box in boxes_of(plan, shape.batch, shape.out_height, shape.out_width):
            pitches: dict[tuple[int, int], list[int]] = {}  # (tall, wide) of the haloed box -> groups of cores
            for m, ((_, _, taps_r, taps_s), _) in enumerate(jobs):
                pitches.setdefault((box.lines + len(taps_r) - 1, box.pixels + len(taps_s) - 1), []).append(m)
            pages = {
                (pitch, o): self._load_dy(
                    cache, self._mask(members, [o]), box, *pitch, lane + o * config.lanes, lanes[o]
                )
                for pitch, members in pitches.items()
                for o in active
            }
            for m, ((axis_h, axis_w, taps_r, taps_s), channel) in enumerate(jobs):
                channels = min(self.channels, self.x.padded - channel)
                tall, wide = box.lines + len(taps_r) - 1, box.pixels + len(taps_s) - 1
                x_page = self._load_x(
                    cache, self._mask([m], active), box, tall, wide, channel, channels, axis_h, axis_w, taps_r, taps_s
                )
                window = 0
                for n in range(box.images):
                    for line in range(box.lines):
                        window |= ((1 << box.pixels) - 1) << (n * tall * wide + line * wide)
                kinds = {  # lanes that are channels of the tensor, and page
                    o: (
                        real_lanes(self.dy.channels - lane - o * config.lanes, lanes[o]),
                        pages[(tall, wide), o],
                    )
                    for o in active
                }
                for count, page in sorted(set(kinds.values())):
                    mask = self._mask([m], [o for o in active if kinds[o] == (count, page)])
                    self.program.emit(
                        Opcode.MULTIPLY,
                        reads=page_regions("sparse", mask, x_page) + page_regions("dense", mask, page),
                        writes=psum_regions(mask, psum, len(taps_r) * len(taps_s) * channels),
                        cores=mask,
                        sparse_page=x_page,
                        dense_page=page,
                        initialise=int(initialise),
                        lanes=count,
                        count_n=1,
                        count_h=1,
                        count_w=channels,
                        count_r=len(taps_r),
                        count_s=len(taps_s),
                        row_w=1,
                        psum=psum,
                        psum_w=1,
                        psum_r=len(taps_s) * channels,
                        psum_s=channels,
                        dense_r=-wide,
                        dense_s=-1,
                        shift_r=wide if len(taps_r) > 1 else 0,
                        shift_s=1,
                        kmask=window,
                    )
            initialise = False

    def _mask(self, groups_m: Iterable[int], groups_o: Iterable[int]) -> int:
        return sum(1 << (m * self.cores_o + o) for m in groups_m for o in groups_o)

    def _load_x(
        self,
        cache: PageCache,
        cores: int,
        box: Box,
        tall: int,
        wide: int,
        channel: int,
        channels: int,
        axis_h: Axis,
        axis_w: Axis,
        taps_r: Taps,
        taps_s: Taps,
    ) -> int:
        """Columns of x: sparse row = channel, element = pixel of the haloed box."""
        first_line = (box.line + taps_r[0][1]) * axis_h.source_step + axis_h.source_phase
        first_pixel = (box.pixel + taps_s[0][1]) * axis_w.source_step + axis_w.source_phase
        content = (box, first_line, first_pixel, tall, wide, channel)
        page, there = cache.page("sparse", cores, content)
        if not there:
            first, steps = (first_line, first_pixel), (axis_h.source_step, axis_w.source_step)
            size = (tall, wide)
            load_sparse(self.program, self.x, cores, page, box, first, steps, size, channel, channels, transpose=True)
        return page

    def _load_dy(self, cache: PageCache, cores: int, box: Box, tall: int, wide: int, lane: int, lanes: int) -> int:
        """dy in the pitch of x: dense row = pixel, lane = output channel."""
        page, there = cache.page("dense", cores, (box, tall, wide, lane))
        if not there:
            dy, beat = self.dy, self.config.beat
            for part, start, count in block_parts(lane, lanes):
                self.program.emit(
                    Opcode.LOAD,
                    reads=[self.program.memory(dy)],
                    writes=page_regions("dense", cores, page),
                    **dy.walk(box.image, part, box.line),
                    target=Target.DENSE.value,
                    page=page,
                    cores=cores,
                    n_count=box.images,
                    i_count=box.lines,
                    j_count=box.pixels,
                    line_i=1,
                    pixel=box.pixel,
                    pixel_j=1,
                    i_end=box.lines,
                    j_end=box.pixels,
                    channel=start // beat,
                    channel_beats=count // beat,
                    dest_n=tall * wide,
                    dest_i=wide,
                    dest_j=1,
                    element=part * BLOCK + start - lane,
                )
        return page

    def _drain(
        self, core: int, vmem: int, count: int, lanes: int, per_pixel: int, place: int, psum: int, real: int
    ) -> None:
        scale, tensor_out = self.rounding.of(self.out)
        self.program.emit(
            Opcode.DRAIN,
            reads=psum_regions(1 << core, psum, count),
            writes=[VectorBuilder.rows(place, count * per_pixel)],
            core=core,
            count_n=1,
            count_h=1,
            count_w=count,
            lane_beats=lanes // self.config.beat,
            lanes=real,
            shift=self.x.scale + self.dy.scale - scale,
            scale=scale if self.rounding.fp16 else 0,
            tensor_a=self.x.state,
            tensor_b=self.dy.state,
            tensor_out=tensor_out,
            fp16=int(self.rounding.fp16),
            saturate=int(self.rounding.saturate),
            psum=psum,
            psum_w=1,
            vmem=vmem,
            vmem_w=per_pixel,
        )
