"""Weight gradients of convolutions: input channels and taps are the rows, pixels are summed over, dy is resident."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product, zip_longest
from math import ceil, prod
from operator import itemgetter

from lnpu.compiler.buffers import (
    PageCache,
    block_parts,
    load_sparse,
    loaded_pixels,
    page_regions,
    power_of_two,
    psum_regions,
    real_lanes,
    speed_up_of,
)
from lnpu.compiler.geometry import Axis, Box, Convolution, Taps, boxes_of, cut, forward_axes, most_taps, pairs_inside
from lnpu.compiler.pipeline import Pipeline, Product, Result
from lnpu.compiler.program import COMMAND_CYCLES, Program
from lnpu.compiler.rounding import Epilogue, Rounding
from lnpu.compiler.teams import Share, Teams
from lnpu.compiler.tensor import Tensor
from lnpu.compiler.tiles import Tile, VectorBuilder, inside
from lnpu.config import BLOCK
from lnpu.ctrl.commands import Opcode, Target, VectorOp

__all__ = ["WeightGradLowering"]

_STORED_TOGETHER = 3
"""Tiles: the more, the later the first of them can leave."""

_FINALISTS = 4
"""Kinds of plans, the best by a first estimate, that are compared job by job."""

_BETTER = 0.94
"""What another one than the best by that estimate must need at most of its cycles."""

_WORTH = 0.97
"""Jobs side by side are of one size where they take this share of the cycles, about, or less."""


@dataclass(frozen=True)
class _Plan:
    """How the work is divided.

    Attributes
    ----------
    halo : (int, int)
        Taps whose pixels of x are loaded together.
    taps : (int, int)
        Taps of a job, among those.
    channels : int
        Channels of x of a job.
    box : (int, int, int)
        Images, lines and pixels of dy that are in the buffers at a time.
    """

    halo: tuple[int, int]
    taps: tuple[int, int]
    channels: int
    box: tuple[int, int, int]

    @property
    def sums(self) -> int:
        """Partial-sum rows of a job."""
        return self.taps[0] * self.taps[1] * self.channels


@dataclass(frozen=True)
class _Layout:
    """Where the pixels of a box with its halo are in a row of the sparse buffers.

    Attributes
    ----------
    images, tall, wide : int
        Of the box.
    image : int
        Lines from one image to the next.
    line : int
        Elements from one line to the next. Odd where there is room: then first pixels are in all the banks of dense
        rows in turn, so that FP8 elements find pairs where few pixels of a line count (at the border of images, where a
        tap sees padding).
    """

    images: int
    tall: int
    wide: int
    image: int
    line: int

    @property
    def elements(self) -> int:
        """Elements of a row up to the last pixel."""
        return ((self.images - 1) * self.image + self.tall - 1) * self.line + self.wide


@dataclass(eq=False)
class _Job:
    """What a team sums up: some taps of some channels of x, for a block of output channels.

    `base` is the first channel of x that is loaded, `channel` the first that is used; the job's taps begin at
    (`at_r`, `at_s`) of the halo's.
    """

    block: int
    base: int
    channel: int
    channels: int
    axis_h: Axis
    axis_w: Axis
    halo_r: Taps
    halo_s: Taps
    taps_r: Taps
    taps_s: Taps
    at_r: int
    at_s: int
    place: int = field(init=False)

    @property
    def sums(self) -> int:
        """Partial-sum rows."""
        return len(self.taps_r) * len(self.taps_s) * self.channels

    def size(self, box: Box) -> tuple[int, int]:
        """Lines and pixels of a box with the halo."""
        return box.lines + len(self.halo_r) - 1, box.pixels + len(self.halo_s) - 1

    def source(self) -> tuple:
        """Jobs with the same one use the same pixels of x."""
        return self.base, self.axis_h, self.axis_w, self.halo_r, self.halo_s


class WeightGradLowering:
    """WG: input channels (and taps) are the rows, pixels are summed over, dy is resident.

    Teams share the pixels that they load.
    """

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
        k, s, p = (shape.kernel_height, shape.kernel_width), shape.stride, shape.padding
        self.axes_h = forward_axes(shape.height, shape.out_height, k[0], s, p)
        self.axes_w = forward_axes(shape.width, shape.out_width, k[1], s, p)
        self.teams = Teams(config, out.block_channels, vmem, vmem_end, reserve)
        self.loaded = power_of_two(min(x.padded, BLOCK, config.rows))  # channels of x in a core at a time
        self._elements = min(config.depth, config.dense_rows)  # of a row, and pixels of dy
        self._per_pixel = out.block_channels // config.beat  # rows of the vector memory
        self.plan = self._plan(self.teams.area // self._per_pixel)
        self.pipeline = Pipeline(program, self.plan.sums, ahead=self._bound_by_loads(self.plan))
        self.cache = PageCache()

    def _plan(self, budget: int) -> _Plan:
        """The fewest cycles of the slower of cores and LOAD. `budget`: pixels of `out` that an area holds."""
        config, out = self.config, self.out
        max_r, max_s = most_taps(self.axes_h), most_taps(self.axes_w)
        least = min(out.width, max(config.beat, out.run_pixels))  # a tile holds whole runs
        best: dict[tuple, tuple[tuple[float, int, int], _Plan]] = {}  # of each kind of job

        def cost(plan: _Plan) -> float:
            """Cycles, about."""
            rounds, side_by_side, products, x, dy = self._box_cycles(plan)
            boxes, drain = self._boxes_in_all(plan), self._drain_cycles(plan)
            drains = side_by_side * self.teams.size * drain
            sums = boxes * max(products, x, dy)
            if 2 * plan.sums > config.psum_rows:  # teams drain one after the other, before they go on
                sums += max(drain, drains - products)
            return rounds * (max(sums, drains) + boxes * (x + dy) / 4)

        for halo in sorted({(max_r, max_s), (1, max_s), (1, 1)}):
            for taps_r in {1, halo[0]}:
                for taps_s in {1, halo[1]}:
                    channels = self.loaded
                    while channels >= least:
                        if taps_r * taps_s * channels <= min(config.psum_rows, budget):
                            for box in self._boxes(halo):
                                plan = _Plan(halo, (taps_r, taps_s), channels, box)
                                key = (cost(plan), -channels, -taps_r)  # taps in a column measured faster
                                kind = halo, taps_r * taps_s, channels
                                if kind not in best or key < best[kind][0]:
                                    best[kind] = key, plan
                        channels //= 2
        if not best:
            raise ValueError(
                f"no tile of {out.name} ({least} input channels) fits {config.psum_rows} partial-sum rows, "
                f"{config.rows} sparse rows and {budget} pixels of the vector memory"
            )
        first, *others = [plan for _, plan in sorted(best.values(), key=itemgetter(0))][:_FINALISTS]
        compared = [(_BETTER * self._cycles(first), first), *((self._cycles(other), other) for other in others)]
        return min(compared, key=itemgetter(0))[1]

    def _cycles(self, plan: _Plan) -> float:
        """Cycles of all jobs, about; in plain FP16 without zeros, where the cores are the slowest by far."""
        speed = speed_up_of(self.x)
        return self._round_cycles(plan, self._ordered(plan), 1.0 if speed < 2 else speed)

    def _box_cycles(self, plan: _Plan) -> tuple[int, int, float, float, float]:
        """Rounds, and jobs of one; of a box, cycles, about, of the cores and of the loads of x and of dy."""
        teams = self.teams

        def of_axes(axes: list[Axis], halo: int, taps: int) -> tuple[int, int]:
            """What is loaded of a side of the kernel, and the jobs that this is for."""
            halos = [len(some) for axis in axes for some in cut(axis.taps, halo)]
            return max(1, len(halos)), max(1, sum(-(-count // taps) for count in halos))

        (loads_h, jobs_h), (loads_w, jobs_w) = map(of_axes, (self.axes_h, self.axes_w), plan.halo, plan.taps)
        sources_of_block = -(-self.x.padded // self.loaded) * loads_h * loads_w
        of_block = -(-self.x.padded // self.loaded) * jobs_h * jobs_w * -(-self.loaded // plan.channels)
        jobs = self.out.planes * of_block
        side_by_side = min(teams.count, jobs)
        together = of_block / sources_of_block  # jobs with the same pixels of x
        sources: float = ceil(side_by_side / together)
        if side_by_side % together and together % side_by_side:
            sources += 0.5  # jobs of a round that begin in the middle
        sources = min(sources, sources_of_block)  # jobs of several blocks of dy share x
        x, dy = self._load_cycles(plan)
        products = COMMAND_CYCLES / 2 + plan.sums * (0.5 + prod(plan.box) / speed_up_of(self.x))
        rounds = -(-jobs // teams.count) * len(teams.shares())
        return rounds, side_by_side, products, sources * x, ceil(side_by_side / of_block) * dy

    def _bound_by_loads(self, plan: _Plan) -> bool:
        """Whether a box's loads take longer than its products, by what its plan was chosen by."""
        *_, products, x, dy = self._box_cycles(plan)
        return max(x, dy) > products

    def _boxes_in_all(self, plan: _Plan) -> int:
        images, lines, pixels = plan.box
        shape = self.shape
        return -(-shape.batch // images) * -(-shape.out_height // lines) * -(-shape.out_width // pixels)

    def _load_cycles(self, plan: _Plan) -> tuple[float, float]:
        """Cycles, about, to load a box of x with its halo, and one of dy."""
        shape, teams, beat = self.shape, self.teams, self.config.beat
        images, lines, pixels = plan.box
        source = -(-shape.height // shape.stride), -(-shape.width // shape.stride)
        x = images * loaded_pixels((lines, pixels), plan.halo, source) * self.loaded / beat
        dy = images * lines * (pixels + 1) * teams.chunk / beat
        return COMMAND_CYCLES + x, teams.size * COMMAND_CYCLES + dy

    def _drain_cycles(self, plan: _Plan) -> float:
        """Cycles, about, of a core's DRAIN."""
        return COMMAND_CYCLES + plan.sums * min(self.config.lanes, self.teams.chunk) / self.config.beat

    def _boxes(self, halo: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
        """Images, lines and pixels of dy that fit the buffers."""
        shape = self.shape
        sides_h = [(axis, taps) for axis in self.axes_h for taps in cut(axis.taps, halo[0])]
        sides_w = [(axis, taps) for axis in self.axes_w for taps in cut(axis.taps, halo[1])]
        for pixels in range(1, shape.out_width + 1):
            for lines in range(1, shape.out_height + 1):
                whole = lines == shape.out_height and pixels == shape.out_width
                for images in range(1, shape.batch + 1 if whole else 2):
                    box = Box(0, images, 0, lines, 0, pixels)
                    if any(self._layout(h, w, box).elements > self._elements for h in sides_h for w in sides_w):
                        break
                    yield images, lines, pixels

    def _jobs(self, plan: _Plan) -> Iterator[_Job]:
        for block in range(self.out.planes):
            for base in range(0, self.x.padded, self.loaded):
                loaded = min(self.loaded, self.x.padded - base)
                for axis_h, axis_w in product(self.axes_h, self.axes_w):
                    for halo_r, halo_s in product(cut(axis_h.taps, plan.halo[0]), cut(axis_w.taps, plan.halo[1])):
                        for i, j in product(range(0, len(halo_r), plan.taps[0]), range(0, len(halo_s), plan.taps[1])):
                            for first in range(0, loaded, plan.channels):
                                yield _Job(
                                    block,
                                    base,
                                    base + first,
                                    min(plan.channels, loaded - first),
                                    axis_h,
                                    axis_w,
                                    halo_r,
                                    halo_s,
                                    halo_r[i : i + plan.taps[0]],
                                    halo_s[j : j + plan.taps[1]],
                                    i,
                                    j,
                                )

    def lower(self, epilogue: Epilogue) -> None:
        if self.rounding.fp16:
            self.program.commit(self.out)  # DRAIN rounds at its scale
        jobs = self._ordered(self.plan)
        places, per_job = self.teams.areas, self.plan.sums * self._per_pixel
        for number, job in enumerate(jobs):  # tiles of one round lie close, so that some can be stored as one
            job.place = places[0] + number % len(places) * per_job
        for start in range(0, len(jobs), self.teams.count):
            self._batch(jobs[start : start + self.teams.count], epilogue)
        self.pipeline.run()
        self._zeros(epilogue)

    def _ordered(self, plan: _Plan) -> list[_Job]:
        """The jobs, in order or by size."""
        jobs = list(self._jobs(plan))
        by_size = sorted(jobs, key=self._work, reverse=True)
        speed = speed_up_of(self.x)
        worth = self._round_cycles(plan, by_size, speed) < _WORTH * self._round_cycles(plan, jobs, speed)
        return by_size if worth else jobs

    def _work(self, job: _Job) -> int:
        """Products of a job, to compare it with others: pairs of an output pixel and a tap that sees no padding."""
        shape = self.shape
        lines = pairs_inside(replace(job.axis_h, taps=job.taps_r), shape.height, 0, shape.out_height)
        pixels = pairs_inside(replace(job.axis_w, taps=job.taps_s), shape.width, 0, shape.out_width)
        return shape.batch * lines * pixels * job.channels

    def _round_cycles(self, plan: _Plan, jobs: list[_Job], speed: float) -> float:
        """Cycles of the rounds of these jobs, about. A round takes as long as the largest of its jobs, the loads of
        what they do not share, or their drains: jobs of one size side by side gain where products take the longest."""
        x, dy = self._load_cycles(plan)
        drain = self.teams.size * self._drain_cycles(plan)
        exposed = drain if 2 * plan.sums > self.config.psum_rows else 0  # teams drain before they go on
        boxes, count = self._boxes_in_all(plan), self.teams.count
        rounds = [jobs[start : start + count] for start in range(0, len(jobs), count)]
        return sum(
            max(
                max(map(self._work, batch)) / speed,
                boxes * x * len({job.source() for job in batch}),
                boxes * dy * len({job.block for job in batch}),
                drain * len(batch),
            )
            + exposed * len(batch)
            for batch in rounds
        )

    def _zeros(self, epilogue: Epilogue) -> None:
        """The gradients of taps that see only padding."""
        shape, place = self.shape, self.teams.areas[0]
        useful_r = {r for axis in self.axes_h for r, _ in axis.taps}
        useful_s = {s for axis in self.axes_w for s, _ in axis.taps}
        for tap in range(shape.kernel_height * shape.kernel_width):
            r, s = divmod(tap, shape.kernel_width)
            if r in useful_r and s in useful_s:
                continue
            for block in range(self.out.planes):
                for channel in range(0, self.x.padded, self.plan.channels):
                    channels = min(self.plan.channels, self.x.padded - channel)
                    tile = Tile(0, 1, tap, 1, channel, channels, block, self._per_pixel)
                    VectorBuilder(self.program).vector(VectorOp.KEEP_POSITIVE, place, place, 0.0, inner=tile.size)
                    epilogue(tile, place, False, self.teams.scratch)

    def _batch(self, jobs: list[_Job], epilogue: Epilogue) -> None:
        """Jobs that the teams work on side by side."""
        boxes = list(boxes_of(self.plan.box, self.shape.batch, self.shape.out_height, self.shape.out_width))
        # Where a round is little else than drains and stores, some tiles leave together: a STORE begins from scratch.
        stored = self._tiles(jobs, _STORED_TOGETHER if len(boxes) == 1 else 1)

        def store(tiles: list[tuple[Tile, int]]) -> None:
            for tile, place in tiles:
                epilogue(tile, place, False, self.teams.scratch)

        shares = self.teams.shares()
        for share in shares:
            psum = self.pipeline.begin_round()
            initialise = True
            for box in boxes:
                self._step(jobs, box, share, psum, initialise)
                initialise = False
            self.pipeline.end_round(
                [
                    Result(
                        m,
                        partial(self._drain, m, job, share, psum),
                        partial(store, stored[m]) if share is shares[-1] and stored[m] else None,
                    )
                    for m, job in enumerate(jobs)
                ]
            )

    def _tiles(self, jobs: list[_Job], together: int) -> list[list[tuple[Tile, int]]]:
        """The tiles that are complete after each job, and their places: one or more of each, or one of up to `together`
        jobs whose taps or channels follow each other."""
        result: list[list[tuple[Tile, int]]] = []
        members = 0  # of the last tile
        for job in jobs:
            runs = self._runs(job)
            if members and members < together and len(runs) == 1 and len(result[-1]) == 1:
                (before, place), (tile, at) = result[-1][0], runs[0]
                joined = _joined(before, tile) if place + before.size == at else None
                if joined is not None:
                    result[-1] = []
                    result.append([(joined, place)])
                    members += 1
                    continue
            result.append(runs)
            members = 1
        return result

    def _runs(self, job: _Job) -> list[tuple[Tile, int]]:
        """The tiles of a job, and their places: taps that follow each other make up one."""
        taps = [r * self.shape.kernel_width + s for r, _ in job.taps_r for s, _ in job.taps_s]
        found, first = [], 0
        for index, tap in enumerate(taps):
            if index + 1 < len(taps) and taps[index + 1] == tap + 1:
                continue
            count = index + 1 - first
            tile = Tile(0, 1, taps[first], count, job.channel, job.channels, job.block, self._per_pixel)
            found.append((tile, job.place + first * job.channels * self._per_pixel))
            first = index + 1
        return found

    def _step(self, jobs: list[_Job], box: Box, share: Share, psum: int, initialise: bool) -> None:
        """Products of the pixels of a box, with a share of each job's output channels."""
        teams = self.teams
        sources: dict[tuple, list[int]] = {}  # what is loaded of x -> teams
        errors: dict[tuple[int, tuple[int, int]], list[int]] = {}  # (block, pitches) of dy -> teams
        for m, job in enumerate(jobs):
            sources.setdefault(job.source(), []).append(m)
            errors.setdefault((job.block, self._pitches(job, box)), []).append(m)
        x_pages: dict[int, int] = {}  # of a team
        dy_pages: dict[tuple[int, int], int] = {}  # of a team and a core in it

        def load_x(members: list[int]) -> None:
            page = self._load_x(teams.mask(members, share), box, jobs[members[0]])
            x_pages.update(dict.fromkeys(members, page))

        def load_dy(block: int, pitches: tuple[int, int], members: list[int], o: int) -> None:
            channel, count = share[o]
            page = self._load_dy(teams.mask(members, [o]), box, *pitches, block * BLOCK + channel, count)
            dy_pages.update({(m, o): page for m in members})

        def multiply(m: int) -> None:
            job = jobs[m]
            for o, (channel, count) in share.items():
                lanes = real_lanes(self.dy.channels - job.block * BLOCK - channel, count)
                mask = teams.mask([m], [o])
                self._multiply(mask, job, box, x_pages[m], dy_pages[m, o], lanes, psum, initialise)

        # Loads of different units begin at the same time: nothing comes between them.
        loads_dy = [partial(load_dy, *key, members, o) for key, members in errors.items() for o in share]
        loads_x = [partial(load_x, members) for members in sources.values()]
        self.pipeline.step(
            [partial(_both, *pair) for pair in zip_longest(loads_dy, loads_x)],
            [Product(m, None, partial(multiply, m)) for m in range(len(jobs))],
        )

    def _multiply(
        self, cores: int, job: _Job, box: Box, x_page: int, dy_page: int, lanes: int, psum: int, initialise: bool
    ) -> None:
        per_image, pitch = self._pitches(job, box)
        window = 0  # the pixels of dy, in the pitch of x
        for n in range(box.images):
            for line in range(box.lines):
                window |= ((1 << box.pixels) - 1) << (n * per_image + line * pitch)
        shift = job.at_r * pitch + job.at_s
        self.program.emit(
            Opcode.MULTIPLY,
            reads=page_regions("sparse", cores, x_page) + page_regions("dense", cores, dy_page),
            writes=psum_regions(cores, psum, job.sums),
            cores=cores,
            sparse_page=x_page,
            dense_page=dy_page,
            initialise=int(initialise),
            lanes=lanes,
            count_n=1,
            count_h=1,
            count_w=job.channels,
            count_r=len(job.taps_r),
            count_s=len(job.taps_s),
            row=job.channel - job.base,
            row_w=1,
            psum=psum,
            psum_w=1,
            psum_r=len(job.taps_s) * job.channels,
            psum_s=job.channels,
            dense=-shift,
            dense_r=-pitch,
            dense_s=-1,
            shift=shift,
            shift_r=pitch if len(job.taps_r) > 1 else 0,
            shift_s=1,
            kmask=window,
        )

    def _layout(self, side_h: tuple[Axis, Taps], side_w: tuple[Axis, Taps], box: Box) -> _Layout:
        """Where the pixels of a box are, with the halo of these taps. Padding at the end of a line is that at the
        beginning of the next one, too, and so with lines at the end of an image."""
        tall, shared_h = _padded(*side_h, box.line, box.lines, self.shape.height)
        wide, shared_w = _padded(*side_w, box.pixel, box.pixels, self.shape.width)
        layout = _Layout(box.images, tall, wide, tall - shared_h, wide - shared_w)
        odd = replace(layout, line=layout.line | 1)
        return odd if odd.elements <= self._elements else layout

    def _pitches(self, job: _Job, box: Box) -> tuple[int, int]:
        """Elements from one image to the next, and from one line to the next."""
        layout = self._layout((job.axis_h, job.halo_r), (job.axis_w, job.halo_s), box)
        return layout.image * layout.line, layout.line

    def _load_x(self, cores: int, box: Box, job: _Job) -> int:
        """Columns of x: sparse row = channel, element = pixel of the haloed box."""
        axis_h, axis_w = job.axis_h, job.axis_w
        size, pitches = job.size(box), self._pitches(job, box)
        first_line = (box.line + job.halo_r[0][1]) * axis_h.source_step + axis_h.source_phase
        first_pixel = (box.pixel + job.halo_s[0][1]) * axis_w.source_step + axis_w.source_phase
        content = (box, first_line, first_pixel, size, pitches, job.base)
        page, there = self.cache.page("sparse", cores, content)
        if not there:
            first, steps = (first_line, first_pixel), (axis_h.source_step, axis_w.source_step)
            channels = min(self.loaded, self.x.padded - job.base)
            load_sparse(
                self.program,
                self.cache,
                self.x,
                cores,
                page,
                box,
                first,
                steps,
                size,
                job.base,
                channels,
                pitches=pitches,
                transpose=True,
            )
        return page

    def _load_dy(self, cores: int, box: Box, per_image: int, pitch: int, lane: int, lanes: int) -> int:
        """dy in the pitch of x: dense row = pixel, lane = output channel."""
        page, there = self.cache.page("dense", cores, (box, per_image, pitch, lane))
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
                    dest_n=per_image,
                    dest_i=pitch,
                    dest_j=1,
                    element=part * BLOCK + start - lane,
                )
        return page

    def _drain(self, m: int, job: _Job, share: Share, psum: int) -> None:
        """Round a team's sums, of a share of the job's output channels, into its tile."""
        config, per_pixel = self.config, self._per_pixel
        scale, tensor_out = self.rounding.of(self.out)
        for o, (channel, count) in share.items():
            self.program.emit(
                Opcode.DRAIN,
                reads=psum_regions(self.teams.mask([m], [o]), psum, job.sums),
                writes=[VectorBuilder.rows(job.place, job.sums * per_pixel)],
                core=self.teams.core(m, o),
                count_n=1,
                count_h=1,
                count_w=job.sums,
                lane_beats=count // config.beat,
                lanes=real_lanes(self.dy.channels - job.block * BLOCK - channel, count),
                shift=self.x.scale + self.dy.scale - scale,
                scale=scale if self.rounding.fp16 else 0,
                tensor_a=self.x.state,
                tensor_b=self.dy.state,
                tensor_out=tensor_out,
                fp16=int(self.rounding.fp16),
                saturate=int(self.rounding.saturate),
                psum=psum,
                psum_w=1,
                vmem=job.place + channel // config.beat,
                vmem_w=per_pixel,
            )


def _both(first: Callable[[], None] | None, second: Callable[[], None] | None) -> None:
    for emit in (first, second):
        if emit is not None:
            emit()


def _padded(axis: Axis, taps: Taps, first: int, count: int, size: int) -> tuple[int, int]:
    """Positions of one axis of a box with the halo of these taps, and how many of them are padding at either end."""
    positions = count + len(taps) - 1
    start = (first + taps[0][1]) * axis.source_step + axis.source_phase
    real, end = inside(start, axis.source_step, positions, size)
    return positions, min(real, positions - end)


def _joined(first: Tile, second: Tile) -> Tile | None:
    """Two tiles, one behind the other in the vector memory, as one: of taps or of channels that follow each other."""
    if (first.block, first.rows) != (second.block, second.rows):
        return None
    if (first.pixel, first.pixels) == (second.pixel, second.pixels) and first.line + first.lines == second.line:
        return replace(first, lines=first.lines + second.lines)
    if first.lines == second.lines == 1 and first.line == second.line and first.pixel + first.pixels == second.pixel:
        return replace(first, pixels=first.pixels + second.pixels)
    return None
