"""Feed-forward and back-propagation of convolutions: output pixels are the rows, weights are resident."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

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
from lnpu.compiler.geometry import Axis, Box, Plan, Taps, boxes_of, by_phase, cut, most_taps, pairs_inside
from lnpu.compiler.pipeline import Pipeline, Product, Result
from lnpu.compiler.program import COMMAND_CYCLES, Program
from lnpu.compiler.rounding import Epilogue, Rounding
from lnpu.compiler.teams import Share, Teams
from lnpu.compiler.tensor import Tensor
from lnpu.compiler.tiles import Tile, VectorBuilder, less_busy
from lnpu.config import BLOCK
from lnpu.ctrl.commands import Opcode, Target, VectorOp

__all__ = ["DirectLowering"]

Phase = tuple[list[Axis], list[Axis]]
"""An output phase: its axes, one for each source phase."""


@dataclass(eq=False)
class _Job:
    """A tile to compute: its lattice box and channel block, and where it goes."""

    box: Box
    block: int
    tile: Tile = field(init=False)
    place: int = field(init=False)
    finish: Callable[[], None] = field(init=False)


@dataclass(frozen=True)
class _Part:
    """An output phase in a round: its axes, its first row of partial sums, its (axis, axis, taps, taps) of every source
    phase and tap group, and the lines and pixels of each job that it has."""

    axes_h: list[Axis]
    axes_w: list[Axis]
    psum: int
    groups: list[tuple]
    inside: list[tuple[int, int]]

    @property
    def working(self) -> list[int]:
        """The jobs that have some."""
        return [m for m, (lines, pixels) in enumerate(self.inside) if lines > 0 and pixels > 0]


def _inside(jobs: Sequence[_Job], axes_h: list[Axis], axes_w: list[Axis]) -> list[tuple[int, int]]:
    """Lines and pixels of each job in an output phase: the last box may reach beyond one with fewer positions."""
    return [
        (
            min(job.box.lines, axes_h[0].out_count - job.box.line),
            min(job.box.pixels, axes_w[0].out_count - job.box.pixel),
        )
        for job in jobs
    ]


def _joined(axes: Sequence[Axis]) -> range:
    """Offsets from the lowest to the highest of some axes' taps."""
    offsets = [offset for axis in axes for _, offset in axis.taps] or [0]
    return range(min(offsets), max(offsets) + 1)


class DirectLowering:
    """FF and BP: output pixels are the rows, the sparse operand has a halo, weights are resident.

    Teams share weights where their tiles are of the same channel block, and pixels where they are of the same box; at
    most `most_planes` channel blocks are computed side by side. With `mask`, outputs where its element is not
    positive are masked in the cores; see `masks_outputs`.
    """

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
        mask: Tensor | None = None,
        most_planes: int | None = None,
    ) -> None:
        self.program, self.config = program, program.config
        self.kernel_width = kernel_width
        self.source, self.weight, self.out = source, weight, out
        self.axes_h, self.axes_w = axes_h, axes_w
        self.rounding, self.backward, self.mask = rounding, backward, mask
        self.step = axes_h[0].out_step
        self.depth = power_of_two(min(source.padded, BLOCK, self.config.depth))
        self.cache = PageCache()
        self.teams = Teams(self.config, out.block_channels, vmem, vmem_end, 2 * reserve)
        # The epilogue's areas, for tiles in turn.
        self.scratch = self.teams.scratch[:reserve], self.teams.scratch[reserve:]
        self.phases = [  # of the output, those that some tap reaches
            (some_h, some_w)
            for some_h in by_phase(axes_h)
            for some_w in by_phase(axes_w)
            if any(axis.taps for axis in some_h) and any(axis.taps for axis in some_w)
        ]
        self.all_phases = len(by_phase(axes_h)) * len(by_phase(axes_w))
        self.lattice_h = max(axis.out_count for axis in axes_h)
        self.lattice_w = max(axis.out_count for axis in axes_w)
        self.plan = self._plan(self.teams.count if most_planes is None else most_planes)
        self.pipeline = Pipeline(program, self.plan.sums, ahead=self._bound_by_loads(self.plan))

    def _plan(self, most_planes: int) -> Plan:
        """Tile, tap groups and planes: the fewest cycles of the slowest of cores and LOAD units, and few loads."""
        config, out, step, depth = self.config, self.out, self.step, self.depth
        teams, lattice_h, lattice_w = self.teams, self.lattice_h, self.lattice_w
        max_r, max_s = most_taps(self.axes_h), most_taps(self.axes_w)
        per_pixel = out.block_channels // config.beat
        best: tuple[tuple[float, ...], Plan] | None = None
        widths = {lattice_w} | {w for w in range(1, lattice_w) if (w * step) % out.run_pixels == 0}
        if out.run_lines > 1:
            widths = {lattice_w}
        heights = [
            lines for lines in range(1, lattice_h + 1) if lines == lattice_h or lines * step % out.run_lines == 0
        ]

        # One after the other: a round may be of the last tiles of a plane and the first of the next.
        side_by_side = [
            planes for planes in range(2, min(most_planes, out.planes, teams.count) + 1) if teams.count % planes == 0
        ]

        def cost(plan: Plan) -> float:
            """Cycles, about."""
            rounds, products, sparse, dense = self._round_cycles(plan)
            return rounds * (max(products, sparse, dense) + (sparse + dense) / 4)

        for taps_r, taps_s in sorted({(max_r, max_s), (1, max_s), (1, 1)}):
            if taps_r * taps_s * depth > config.dense_rows:
                continue
            for pixels in widths:
                for lines in heights:
                    if lines < lattice_h and pixels < lattice_w and lines > 8:
                        break
                    all_of_it = lines == lattice_h and pixels == lattice_w
                    for count in range(1, out.images + 1 if all_of_it else 2):
                        outputs = count * lines * pixels
                        if outputs > config.psum_rows or outputs * step * step * per_pixel > teams.area:
                            break
                        for whole, phases in dict.fromkeys(((True, 1), (False, 1), (True, max(1, len(self.phases))))):
                            halo_r, halo_s = self._halo(phases) if whole else (taps_r, taps_s)
                            if count * (lines + halo_r - 1) * (pixels + halo_s - 1) > config.rows:
                                continue
                            if outputs * phases > config.psum_rows:
                                continue
                            for planes in (1, *side_by_side):
                                plan = Plan(count, lines, pixels, taps_r, taps_s, whole, planes, phases)
                                key = (cost(plan), -outputs)
                                if best is None or key < best[0]:
                                    best = key, plan
        if best is None:
            raise ValueError(
                f"no tile of {out.name} ({lattice_h}x{lattice_w} positions, {out.run_pixels} pixels a run) fits "
                f"{config.rows} sparse rows, {config.psum_rows} partial-sum rows, {config.dense_rows} dense rows and "
                f"{teams.area} vector-memory rows"
            )
        return best[1]

    def _round_cycles(self, plan: Plan) -> tuple[int, float, float, float]:
        """Output phases of all rounds; of one, cycles, about, of the cores, of the loads of pixels and of those of
        weights."""
        config, out, depth, teams = self.config, self.out, self.depth, self.teams
        axes_h, axes_w = self.axes_h, self.axes_w
        lattice_h, lattice_w = self.lattice_h, self.lattice_w
        max_r, max_s = most_taps(self.axes_h), most_taps(self.axes_w)
        reached = max(1, len(self.phases))
        # Of one output phase, on average.
        taps = sum(len(axis.taps) for axis in axes_h) * sum(len(axis.taps) for axis in axes_w) / reached
        sources = sum(len(axes) * len(others) for axes, others in self.phases) / reached
        steps_k = -(-self.source.padded // depth)
        chunks = len(teams.shares())
        source = -(-self.source.height // axes_h[0].source_step), -(-self.source.width // axes_w[0].source_step)
        count, lines, pixels, whole = plan.images, plan.lines, plan.pixels, plan.whole
        taps_r, taps_s = plan.taps_r, plan.taps_s
        outputs = count * lines * pixels
        groups = -(-max_r // taps_r) * -(-max_s // taps_s)
        reloads = 1 if whole else groups
        halo = self._halo(plan.phases) if whole else (taps_r, taps_s)
        loaded = loaded_pixels((lines, pixels), halo, source)
        sparse = sources * reloads * (COMMAND_CYCLES + count * loaded * depth / config.beat) / plan.phases
        dense = groups * sources * COMMAND_CYCLES + taps * depth * teams.chunk / config.beat
        of_plane = -(-out.images // count) * -(-lattice_h // lines) * -(-lattice_w // pixels)
        boxes = min(of_plane, teams.count // plan.planes)  # of a round
        if plan.planes > 1:
            rounds = -(-of_plane // boxes) * -(-out.planes // plan.planes) * chunks
            tiles = boxes * plan.planes
            dense *= plan.planes
            sparse *= boxes
        else:
            tiles = min(teams.count, of_plane * out.planes)
            rounds = -(-of_plane * out.planes // teams.count) * chunks
            if of_plane % teams.count:  # some rounds are of two planes or more
                dense *= min(out.planes, 1 + (tiles - 1) / of_plane)
            sparse *= tiles
        sparse *= steps_k
        dense *= steps_k
        products = steps_k * outputs * taps * depth / speed_up_of(self.source)
        if 2 * plan.sums > config.psum_rows:  # teams drain one after the other, before they go on
            drain = COMMAND_CYCLES + outputs * min(config.lanes, out.block_channels) / config.beat
            products += tiles * drain
        return rounds * reached, products, sparse, dense

    def _bound_by_loads(self, plan: Plan) -> bool:
        """Whether a round's loads take longer than its products, by what its plan was chosen by."""
        _, products, sparse, dense = self._round_cycles(plan)
        return max(sparse, dense) > products

    def _halo(self, phases: int) -> tuple[int, int]:
        """Taps whose pixels are loaded together: those of an output phase, or of all."""
        if phases == 1:
            return most_taps(self.axes_h), most_taps(self.axes_w)
        return len(_joined(self.axes_h)), len(_joined(self.axes_w))

    def lower(self, epilogue: Epilogue, after_block: Callable[[int], None] | None) -> None:
        if self.rounding.fp16:
            self.program.commit(self.out)  # DRAIN rounds at its scale
        boxes = list(
            boxes_of(
                (self.plan.images, self.plan.lines, self.plan.pixels), self.out.images, self.lattice_h, self.lattice_w
            )
        )
        batches = self._balanced(self._batches(boxes))
        jobs = [job for batch in batches for job in batch]
        first = {job.block: job for job in reversed(jobs)}
        last = {job.block: job for job in jobs}
        for number, job in enumerate(jobs):
            job.tile = self._tile(job.box, job.block)
            job.place = self.teams.areas[number % len(self.teams.areas)]
            job.finish = self._epilogue(
                job, self.scratch[number % 2], epilogue, after_block, job is first[job.block], job is last[job.block]
            )
        for batch in batches:
            self._batch(batch)
        self.pipeline.run()

    def _batches(self, boxes: list[Box]) -> list[list["_Job"]]:
        """The jobs, a batch for each round: of each channel block all boxes in order."""
        blocks, together = range(self.out.planes), self.plan.planes
        if together == 1:
            jobs = [_Job(box, block) for block in blocks for box in boxes]
            return [jobs[start : start + self.teams.count] for start in range(0, len(jobs), self.teams.count)]
        return [
            [_Job(box, block) for block in some for box in boxes[start : start + self.teams.count // together]]
            for some in (blocks[first : first + together] for first in range(0, len(blocks), together))
            for start in range(0, len(boxes), self.teams.count // together)
        ]

    def _balanced(self, batches: list[list["_Job"]]) -> list[list["_Job"]]:
        """The jobs of each batch in another order: teams that have had less to do (tiles at the border of an image) get
        the larger ones, others take turns. Teams go on by themselves as far as their buffers let them, so what counts
        is what each does over some rounds. Channel blocks stay one after the other. A batch of jobs of one size stays
        as it is: a team may find the pixels of its tile in its buffers still."""
        done = [0] * self.teams.count
        result = []
        for number, batch in enumerate(batches):
            work = {job: self._work(job) for job in batch}
            if len(set(work.values())) == 1:
                result.append(batch)
                continue
            order: list[_Job] = []
            for _, group in groupby(batch, key=lambda job: job.block):
                jobs = list(group)
                turn = number % len(jobs)
                jobs = sorted(jobs[turn:] + jobs[:turn], key=lambda job: work[job], reverse=True)
                teams = range(len(order), len(order) + len(jobs))
                ranked = sorted(teams, key=lambda team: done[team])
                chosen = dict(zip(ranked, jobs, strict=True))
                order += [chosen[team] for team in teams]
            for team, job in enumerate(order):
                done[team] += work[job]
            result.append(order)
        return result

    def _work(self, job: "_Job") -> int:
        """Products of a job, to compare it with others: pairs of an output pixel and a tap that sees no padding."""
        box = job.box
        lines = sum(pairs_inside(axis, self.source.height, box.line, box.lines) for axis in self.axes_h)
        pixels = sum(pairs_inside(axis, self.source.width, box.pixel, box.pixels) for axis in self.axes_w)
        return box.images * lines * pixels

    def _epilogue(
        self,
        job: "_Job",
        scratch: list[int],
        epilogue: Epilogue,
        after_block: Callable[[int], None] | None,
        first: bool,
        last: bool,
    ) -> Callable[[], None]:
        """What to do when a job's tile is complete."""

        def finish() -> None:
            epilogue(job.tile, job.place, first, scratch)
            if last and after_block is not None:
                after_block(job.block)

        return finish

    def _batch(self, jobs: list["_Job"]) -> None:
        """Jobs that the teams work on side by side."""
        shares, phases = self.teams.shares(), self.phases
        rounds = [phases] if self.plan.phases > 1 or not phases else [[phase] for phase in phases]
        for share in shares:
            for some in rounds:
                first, last = share is shares[0] and some is rounds[0], share is shares[-1] and some is rounds[-1]
                self._round(jobs, share, some, first=first, last=last)

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

    def _round(self, jobs: list["_Job"], share: Share, phases: list[Phase], *, first: bool, last: bool) -> None:
        """Some output phases of a share of each job's output channels: add up, then drain."""
        base = self.pipeline.begin_round()
        sums = self.plan.sums // self.plan.phases
        parts = [
            _Part(*phase, base + number * sums, self._groups(*phase), _inside(jobs, *phase))
            for number, phase in enumerate(phases)
        ]
        for k in range(0, self.source.padded, self.depth):
            for part in parts:
                for group in part.groups:
                    self._step(jobs, parts, part, share, k, group, initialise=k == 0 and group is part.groups[0])

        # Where no tap reaches some phases, tiles begin as zeros, each while the one before is drained.
        to_clear = set(range(len(jobs))) if first and len(self.phases) < self.all_phases else set()

        def drain(m: int) -> None:
            for n in to_clear & {m, m + 1}:
                self._clear(jobs[n])
                to_clear.remove(n)
            for part in parts:
                if m in part.working:
                    for o, (channel, count) in share.items():
                        self._drain(self.teams.core(m, o), jobs[m], channel, count, part, *part.inside[m])

        self.pipeline.end_round(
            [Result(m, partial(drain, m), job.finish if last else None) for m, job in enumerate(jobs)]
        )

    def _step(
        self,
        jobs: list["_Job"],
        parts: list["_Part"],
        part: "_Part",
        share: Share,
        k: int,
        group: tuple,
        *,
        initialise: bool,
    ) -> None:
        """Products of elements `k` and on with the weights of a group of taps of a part, one of a round's `parts`."""
        plan, teams = self.plan, self.teams
        axis_h, axis_w, taps_r, taps_s = group
        depth = min(self.depth, self.source.padded - k)
        dense_pages: dict[tuple[int, int], int] = {}  # of a block and a core of a team
        sparse: dict[int, tuple] = {}  # page and geometry of a team
        masks: dict[int, int] = {}  # page of a team

        def load_dense(block: int, o: int) -> None:
            channel, count = share[o]
            mask = teams.mask([m for m in part.working if jobs[m].block == block], [o])
            dense_pages[block, o] = self._load_dense(mask, block * BLOCK + channel, count, k, depth, taps_r, taps_s)

        def load_source(m: int) -> None:
            # Offsets of what is loaded together: by taps of a group, of a phase, or of all phases.
            halo: tuple[Sequence[int], Sequence[int]]
            if plan.phases > 1:
                halo = _joined(self.axes_h), _joined(self.axes_w)
            elif plan.whole:
                halo = _joined([axis_h]), _joined([axis_w])
            else:
                halo = tuple(sorted(f for _, f in taps_r)), tuple(sorted(f for _, f in taps_s))
            lines, pixels = (max(sizes) for sizes in zip(*(other.inside[m] for other in parts), strict=True))
            # Teams with the same pixels share them, side by side: the first of them loads, the others find them there.
            same = [n for n in part.working if jobs[n].box == jobs[m].box] if plan.planes > 1 else [m]
            sharing = teams.mask(same, share)
            sparse[m] = self._load_sparse(
                sharing, jobs[m].box, lines, pixels, k, depth, axis_h, axis_w, halo, taps_r, taps_s
            )
            if self.mask is not None:
                masks[m] = self._load_masks(self.mask, teams.mask([m], share), jobs[m], m, parts)

        def multiply(m: int) -> None:
            block = jobs[m].block
            page, geometry = sparse[m]
            for o, (channel, count) in share.items():
                self._multiply(
                    teams.mask([m], [o]),
                    jobs[m].box.images,
                    *part.inside[m],
                    geometry,
                    len(taps_r),
                    len(taps_s),
                    depth,
                    page,
                    dense_pages[block, o],
                    masks.get(m),
                    real_lanes(self.out.channels - block * BLOCK - channel, count),
                    initialise,
                    part.psum,
                )

        blocks = sorted({jobs[m].block for m in part.working})
        source = None if plan.phases > 1 else (axis_h, axis_w) if plan.whole else group
        self.pipeline.step(
            [partial(load_dense, block, o) for block in blocks for o in share],
            [Product(m, partial(load_source, m), partial(multiply, m)) for m in part.working],
            # Tap groups whose source tiles are the same follow each other.
            key=(jobs[0].block, jobs[0].box, k, source),
        )

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
        halo: tuple[Sequence[int], Sequence[int]],
        taps_r: Taps,
        taps_s: Taps,
    ) -> tuple[int, tuple[int, int, int, int, int]]:
        """Load the box with a halo of these offsets; returns the page and, for the taps, (rows an image, pitch, first
        row, steps)."""
        halo_r, halo_s = halo
        low_r, low_s = halo_r[0], halo_s[0]
        tall, wide = lines + len(halo_r) - 1, pixels + len(halo_s) - 1
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
            size = (tall, wide)
            load_sparse(self.program, self.cache, self.source, cores, page, box, first, steps, size, k, depth)
        return page, geometry

    def _load_masks(self, mask: Tensor, cores: int, job: "_Job", m: int, parts: list["_Part"]) -> int:
        """Load the masks of a job's outputs in a round, each by the unit that has less to do; returns the page."""
        box, step = job.box, self.step
        content = (job.block, box, *((part.axes_h[0].out_phase, part.axes_w[0].out_phase, part.psum) for part in parts))
        page, there = self.cache.page("mask", cores, content)
        if there:
            return page
        for part in parts:
            if m not in part.working:
                continue
            lines, pixels = part.inside[m]
            target = less_busy(self.program, Target.MASK, Target.MASK_DENSE)
            self.program.emit(
                Opcode.LOAD,
                reads=[self.program.memory(mask)],
                writes=page_regions("mask", cores, page),
                **mask.walk(box.image, job.block, box.line * step + part.axes_h[0].out_phase),
                target=target.value,
                page=page,
                cores=cores,
                n_count=box.images,
                i_count=lines,
                j_count=pixels,
                line_i=step,
                pixel=box.pixel * step + part.axes_w[0].out_phase,
                pixel_j=step,
                i_end=lines,
                j_end=pixels,
                channel_beats=mask.block_channels // self.config.beat,
                dest=part.psum,
                dest_n=lines * pixels,
                dest_i=pixels,
                dest_j=1,
            )
        return page

    def _load_dense(self, cores: int, lane: int, lanes: int, k: int, depth: int, taps_r: Taps, taps_s: Taps) -> int:
        """Load weights [tap, k, lane] of output channels `lane` and up, by the unit that has less to do; returns the
        page."""
        content = (lane, lanes, k, taps_r, taps_s)
        page, there = self.cache.page("dense", cores, content)
        if there:
            return page
        weight, beat = self.weight, self.config.beat
        target = less_busy(self.program, Target.DENSE_LOAD, Target.DENSE)
        common = {"target": target.value, "page": page, "cores": cores}
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
            for row, (r, _) in enumerate(taps_r):
                self.program.emit(
                    Opcode.LOAD,
                    reads=[self.program.memory(weight)],
                    writes=page_regions("dense", cores, page),
                    **common,
                    **weight.walk(0, k // BLOCK, r * self.kernel_width + taps_s[0][0]),
                    transpose=1,
                    n_count=1,
                    i_count=len(taps_s),
                    j_count=lanes,
                    line_i=step_s,
                    pixel=lane,
                    pixel_j=1,
                    i_end=len(taps_s),
                    j_end=lanes,
                    channel=(k % BLOCK) // beat,
                    channel_beats=depth // beat,
                    dest_j=1,
                    element=row * len(taps_s) * depth,
                    element_i=depth,
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
        mask_page: int | None,
        lanes: int,
        initialise: bool,
        psum: int,
    ) -> None:
        per_image, pitch, first_row, step_r, step_s = geometry
        reads = page_regions("sparse", cores, sparse_page) + page_regions("dense", cores, dense_page)
        if mask_page is not None:
            reads += page_regions("mask", cores, mask_page)
        self.program.emit(
            Opcode.MULTIPLY,
            reads=reads,
            writes=psum_regions(cores, psum, images * lines * pixels),
            cores=cores,
            sparse_page=sparse_page,
            dense_page=dense_page,
            masked=int(mask_page is not None),
            mask_page=mask_page or 0,
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

    def _clear(self, job: "_Job") -> None:
        """Zeros for a whole tile."""
        VectorBuilder(self.program).vector(VectorOp.KEEP_POSITIVE, job.place, job.place, 0.0, inner=job.tile.size)

    def _drain(self, core: int, job: "_Job", channel: int, lanes: int, part: "_Part", lines: int, pixels: int) -> None:
        """Round the partial sums of one output phase into the tile, from channel `channel` of its block on."""
        beat, step = self.config.beat, self.step
        tile, box = job.tile, job.box
        stride_n, stride_h, stride_w = tile.strides()
        phase_h, phase_w = part.axes_h[0].out_phase, part.axes_w[0].out_phase
        scale, tensor_out = self.rounding.of(self.out)
        self.program.emit(
            Opcode.DRAIN,
            reads=psum_regions(1 << core, part.psum, box.images * lines * pixels),
            writes=[VectorBuilder.rows(job.place, tile.size)],
            core=core,
            count_n=box.images,
            count_h=lines,
            count_w=pixels,
            lane_beats=lanes // beat,
            lanes=real_lanes(self.out.channels - job.block * BLOCK - channel, lanes),
            shift=self.source.scale + self.weight.scale - scale,
            scale=scale if self.rounding.fp16 else 0,
            tensor_a=self.source.state,
            tensor_b=self.weight.state,
            tensor_out=tensor_out,
            fp16=int(self.rounding.fp16),
            saturate=int(self.rounding.saturate),
            masked=int(self.mask is not None),
            psum=part.psum,
            psum_n=lines * pixels,
            psum_h=pixels,
            psum_w=1,
            vmem=job.place + phase_h * stride_h + phase_w * stride_w + channel // beat,
            vmem_n=stride_n,
            vmem_h=step * stride_h,
            vmem_w=step * stride_w,
        )
