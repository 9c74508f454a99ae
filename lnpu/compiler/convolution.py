"""Convolutions on the cores: geometry of the three phases, tiling, and commands.

The array knows only unit strides: visit (n, h, w, r, s) multiplies sparse row base + n.. + h.. + w.. + r.. + s.. . A strided
convolution is cut into *phases*: every stride-th line and pixel of its large side forms a lattice, and between one
phase's lattice and the small side each tap is a constant offset. A fully connected layer is a 1x1 convolution over one
line of `batch` pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lnpu.compiler.program import Program, Region
from lnpu.compiler.tensor import Tensor
from lnpu.compiler.tiles import Tile, VectorBuilder, inside
from lnpu.config import BLOCK
from lnpu.ctrl.commands import Opcode, Target, VectorOp

__all__ = ["Convolution", "Rounding", "lower_forward", "lower_input_grad", "lower_weight_grad"]


@dataclass(frozen=True)
class Convolution:
    """Shape of a convolution: x [batch, channels, height, width], weights [outputs, channels, kernel...].

    Raises
    ------
    ValueError
        If a size is not positive, or the output would be empty.
    """

    batch: int
    channels: int
    height: int
    width: int
    outputs: int
    kernel_height: int
    kernel_width: int
    stride: int = 1
    padding: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "channels", "height", "width", "outputs", "kernel_height", "kernel_width", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)!r}")
        if self.padding < 0:
            raise ValueError(f"padding must be 0 or more, not {self.padding!r}")
        if min(self.out_height, self.out_width) < 1:
            raise ValueError(
                f"the kernel must fit the padded image, not {self.kernel_height}x{self.kernel_width} on "
                f"{self.height + 2 * self.padding}x{self.width + 2 * self.padding}"
            )

    @property
    def out_height(self) -> int:
        """Lines of the output."""
        return (self.height + 2 * self.padding - self.kernel_height) // self.stride + 1

    @property
    def out_width(self) -> int:
        """Pixels of an output line."""
        return (self.width + 2 * self.padding - self.kernel_width) // self.stride + 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of each of its three phases, padding included."""
        taps = self.kernel_height * self.kernel_width
        return self.batch * self.outputs * self.out_height * self.out_width * self.channels * taps


@dataclass(frozen=True)
class Rounding:
    """How exact sums leave the cores: divided by 2^scale and rounded to FP16 or FP32.

    What comes to the vector memory is the rounded value times 2^scale in FP16, the rounded value in FP32.
    """

    fp16: bool
    scale: int = 0
    saturate: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis of one (output phase, source phase) pair.

    Output position a of the phase is element a * out_step + out_phase of the output; tap r reads element
    (a + offset) * source_step + source_phase of the source.

    Attributes
    ----------
    taps : tuple of (int, int)
        (r, offset), r rising in steps of the stride; offsets rise or fall by one.
    """

    out_phase: int
    out_step: int
    out_count: int
    source_phase: int
    source_step: int
    source_count: int
    taps: tuple[tuple[int, int], ...]


def _forward_axes(size: int, out: int, kernel: int, stride: int, padding: int) -> list[Axis]:
    """FF: one output phase, `stride` source phases."""
    axes = []
    for phase in range(stride):
        taps = tuple((r, (r - padding - phase) // stride) for r in range(kernel) if (r - padding - phase) % stride == 0)
        axes.append(
            Axis(
                0, 1, out, phase, stride, max(0, -(-(size - phase) // stride)), _useful(taps, out, size, phase, stride)
            )
        )
    return axes


def _backward_axes(size: int, out: int, kernel: int, stride: int, padding: int) -> list[Axis]:
    """BP: `stride` output phases (of dx), one source phase (dy)."""
    axes = []
    for phase in range(min(stride, size)):
        taps = tuple((r, (phase + padding - r) // stride) for r in range(kernel) if (phase + padding - r) % stride == 0)
        count = -(-(size - phase) // stride)
        axes.append(Axis(phase, stride, count, 0, 1, out, _useful(taps, count, out, 0, 1)))
    return axes


def _useful(
    taps: tuple[tuple[int, int], ...], count: int, size: int, phase: int, step: int
) -> tuple[tuple[int, int], ...]:
    """Taps that reach the source from some output position (others see only padding)."""
    lattice = max(0, -(-(size - phase) // step))
    return tuple((r, offset) for r, offset in taps if max(0, -offset) < min(count, lattice - offset))


def _cut(taps: tuple[tuple[int, int], ...], size: int) -> list[tuple[tuple[int, int], ...]]:
    return [taps[i : i + size] for i in range(0, len(taps), size)]


@dataclass(frozen=True)
class Box:
    """A tile in lattice coordinates: images, and positions of an output phase (the same for all phases)."""

    image: int
    images: int
    line: int
    lines: int
    pixel: int
    pixels: int


@dataclass(frozen=True)
class Plan:
    """Tile and tap-group sizes."""

    images: int
    lines: int
    pixels: int
    taps_r: int
    taps_s: int


class PageCache:
    """Which tile each page of the buffers of every core holds."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int, int], object] = {}  # (buffer, core, page) -> content
        self._recent: dict[tuple[str, int], int] = {}  # (buffer, core) -> page used last

    def page(self, buffer: str, cores: int, content: object) -> tuple[int, bool]:
        """Page for `content` in these cores, and whether it is there already; else it is taken to be loaded now.

        The page that the first core used last is kept.
        """
        members = [core for core in range(16) if cores >> core & 1]
        there = [p for p in (0, 1) if all(self._held.get((buffer, core, p)) == content for core in members)]
        page = there[0] if there else 1 - self._recent.get((buffer, members[0]), 1)
        for core in members:
            self._held[buffer, core, page] = content
            self._recent[buffer, core] = page
        return page, bool(there)


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
    widths = {lattice_w} | {w for w in range(1, lattice_w) if (w * step) % out.block_pixels == 0}
    for taps_r, taps_s in sorted({(max_r, max_s), (1, max_s), (1, 1)}):
        if taps_r * taps_s * depth > config.dense_rows:
            continue
        for pixels in widths:
            for lines in range(1, lattice_h + 1):
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
                    total = images * lattice_h * lattice_w
                    tiles = -(-images // count) * -(-lattice_h // lines) * -(-lattice_w // pixels)
                    groups = -(-max_r // taps_r) * -(-max_s // taps_s)
                    rounds = -(-tiles // spread)
                    cost = (
                        rounds * halo * groups * (1 + depth / 16) + rounds * outputs * max_r * max_s * depth / 4
                    ) / total
                    key = (cost, -outputs)
                    if best is None or key < best[0]:
                        best = key, Plan(count, lines, pixels, taps_r, taps_s)
    if best is None:
        raise ValueError(
            f"no tile of {out.name} ({lattice_h}x{lattice_w} positions, {out.block_pixels} pixels a block) fits "
            f"{config.rows} sparse rows, {config.psum_rows} partial-sum rows, {config.dense_rows} dense rows and "
            f"{budget} vector-memory rows"
        )
    return best[1]


def _boxes(plan: Plan, images: int, lattice_h: int, lattice_w: int) -> Iterator[Box]:
    for image in range(0, images, plan.images):
        for line in range(0, lattice_h, plan.lines):
            for pixel in range(0, lattice_w, plan.pixels):
                yield Box(
                    image,
                    min(plan.images, images - image),
                    line,
                    min(plan.lines, lattice_h - line),
                    pixel,
                    min(plan.pixels, lattice_w - pixel),
                )


Epilogue = Callable[[Tile, int, bool], None]
"""Called with an output tile, the vector-memory row it is at, and whether it is the first tile of its channel block;
does what is fused onto it and stores it."""


def _check_terms(program: Program, name: str, terms: int) -> None:
    if terms > program.config.max_terms:
        raise ValueError(
            f"{name} must sum up at most {program.config.max_terms} products, which acc_bits = {program.config.acc_bits} "
            f"hold whatever they are, not {terms}"
        )


def lower_forward(
    program: Program,
    shape: Convolution,
    x: Tensor,
    w: Tensor,
    out: Tensor,
    rounding: Rounding,
    epilogue: Epilogue,
    *,
    vmem: int,
    vmem_end: int,
    reserve: int = 0,
    after_block: Callable[[int], None] | None = None,
) -> None:
    """FF: out = x * w. `vmem` to `vmem_end` are the rows of the vector memory that it may use.

    Parameters
    ----------
    reserve : int
        Tiles' worth of vector memory that `epilogue` needs for itself, at the end of the range.
    after_block : callable
        Called with a channel block when all its tiles have been stored.
    """
    k, s, p = (shape.kernel_height, shape.kernel_width), shape.stride, shape.padding
    _check_terms(program, f"{out.name} (feed-forward)", shape.channels * k[0] * k[1])
    _Direct(
        program,
        shape.kernel_width,
        x,
        w,
        out,
        _forward_axes(shape.height, shape.out_height, k[0], s, p),
        _forward_axes(shape.width, shape.out_width, k[1], s, p),
        rounding,
        backward=False,
        vmem=vmem,
        vmem_end=vmem_end,
        reserve=reserve,
    ).lower(epilogue, after_block)


def lower_input_grad(
    program: Program,
    shape: Convolution,
    dy: Tensor,
    w: Tensor,
    out: Tensor,
    rounding: Rounding,
    epilogue: Epilogue,
    *,
    vmem: int,
    vmem_end: int,
    reserve: int = 0,
) -> None:
    """BP: out = dx, the error of the input. Arguments as in `lower_forward`."""
    k, s, p = (shape.kernel_height, shape.kernel_width), shape.stride, shape.padding
    _check_terms(program, f"{out.name} (back-propagation)", shape.outputs * k[0] * k[1])
    _Direct(
        program,
        shape.kernel_width,
        dy,
        w,
        out,
        _backward_axes(shape.height, shape.out_height, k[0], s, p),
        _backward_axes(shape.width, shape.out_width, k[1], s, p),
        rounding,
        backward=True,
        vmem=vmem,
        vmem_end=vmem_end,
        reserve=reserve,
    ).lower(epilogue, None)


class _Direct:
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
        self.vmem = vmem
        self.step = axes_h[0].out_step
        self.depth = _power_of_two(min(source.padded, BLOCK, self.config.depth))
        groups = -(-out.padded // self.config.lanes)
        self.cores_o = min(self.config.cores, groups)
        self.cores_m = self.config.cores // self.cores_o
        self.vectors = VectorBuilder(program)
        self.cache = PageCache()
        budget = (vmem_end - vmem) // (self.cores_m + reserve)
        self.plan = _plan(program, out.images, axes_h, axes_w, self.depth, out, self.step, budget, self.cores_m)
        self.lattice_h = max(axis.out_count for axis in axes_h)
        self.lattice_w = max(axis.out_count for axis in axes_w)

    def lower(self, epilogue: Epilogue, after_block: Callable[[int], None] | None) -> None:
        boxes = list(_boxes(self.plan, self.out.images, self.lattice_h, self.lattice_w))
        for block in range(self.out.pixel_blocks):
            for start in range(0, len(boxes), self.cores_m):
                self._batch(boxes[start : start + self.cores_m], block, epilogue, first=start == 0)
            if after_block is not None:
                after_block(block)

    def _batch(self, boxes: list[Box], block: int, epilogue: Epilogue, *, first: bool) -> None:
        """Boxes that the groups of cores work on side by side, for one channel block of the output."""
        tiles = [self._tile(box, block) for box in boxes]
        places, row = [], self.vmem
        for tile in tiles:
            places.append(row)
            row += tile.size
        chunk = self.cores_o * self.config.lanes
        low, high = block * BLOCK, min(self.out.padded, (block + 1) * BLOCK)
        for channel in range(low, high, chunk):
            for axis_h in self.axes_h_by_phase():
                for axis_w in self.axes_w_by_phase():
                    self._sums(boxes, tiles, places, channel, high, axis_h, axis_w)
        for i, (tile, place) in enumerate(zip(tiles, places, strict=True)):
            epilogue(tile, place, first and i == 0)

    def axes_h_by_phase(self) -> list[list[Axis]]:
        """Vertical axes, grouped by output phase."""
        return _by_phase(self.axes_h)

    def axes_w_by_phase(self) -> list[list[Axis]]:
        """Horizontal axes, grouped by output phase."""
        return _by_phase(self.axes_w)

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
            for taps_r in _cut(axis_h.taps, self.plan.taps_r)
            for taps_s in _cut(axis_w.taps, self.plan.taps_s)
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
                    for count, pages in sorted({(lanes[o], dense_pages[o]) for o in active}):
                        cores = self._mask([m], [o for o in active if (lanes[o], dense_pages[o]) == (count, pages)])
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
                            pages,
                            count,
                            initialise,
                        )
                initialise = False
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
                        empty=not groups,
                    )

    def _mask(self, groups_m, groups_o) -> int:
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
        taps_r,
        taps_s,
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
            source = self.source
            i_first, i_end = inside(first_line, axis_h.source_step, tall, source.height)
            j_first, j_end = inside(first_pixel, axis_w.source_step, wide, source.width)
            self.program.emit(
                Opcode.LOAD,
                reads=[self.program.memory(source)],
                writes=_pages("sparse", cores, page),
                **source.walk(),
                target=Target.SPARSE.value,
                page=page,
                cores=cores,
                n_count=box.images,
                i_count=tall,
                j_count=wide,
                line=box.image * source.height + first_line,
                line_n=source.height,
                line_i=axis_h.source_step,
                pixel=first_pixel,
                pixel_j=axis_w.source_step,
                pixel_block=k // BLOCK,
                i_first=i_first,
                i_end=i_end,
                j_first=j_first,
                j_end=j_end,
                channel=(k % BLOCK) // self.config.beat,
                channel_beats=depth // self.config.beat,
                dest_n=tall * wide,
                dest_i=wide,
                dest_j=1,
            )
        return page, geometry

    def _load_dense(self, cores: int, lane: int, lanes: int, k: int, depth: int, taps_r, taps_s) -> int:
        """Load weights [tap, k, lane] of output channels `lane` and up; returns the page."""
        content = (lane, lanes, k, taps_r, taps_s)
        page, there = self.cache.page("dense", cores, content)
        if there:
            return page
        weight, beat = self.weight, self.config.beat
        common = {
            **weight.walk(),
            "target": Target.DENSE.value,
            "page": page,
            "cores": cores,
        }
        step_r = taps_r[1][0] - taps_r[0][0] if len(taps_r) > 1 else 0
        step_s = taps_s[1][0] - taps_s[0][0] if len(taps_s) > 1 else 0
        first = taps_r[0][0] * self.kernel_width + taps_s[0][0]
        if not self.backward:  # pixel = k, element = lane
            for part, start, count in _block_parts(lane, lanes):
                self.program.emit(
                    Opcode.LOAD,
                    reads=[self.program.memory(weight)],
                    writes=_pages("dense", cores, page),
                    **common,
                    n_count=len(taps_r),
                    i_count=len(taps_s),
                    j_count=depth,
                    line=first,
                    line_n=step_r * self.kernel_width,
                    line_i=step_s,
                    pixel=k,
                    pixel_j=1,
                    pixel_block=part,
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
                        writes=_pages("dense", cores, page),
                        **common,
                        transpose=1,
                        n_count=1,
                        i_count=1,
                        j_count=lanes,
                        line=r * self.kernel_width + s,
                        pixel=lane,
                        pixel_j=1,
                        pixel_block=k // BLOCK,
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
        geometry,
        count_r: int,
        count_s: int,
        depth: int,
        sparse_page: int,
        dense_page: int,
        lanes: int,
        initialise: bool,
    ) -> None:
        per_image, pitch, first_row, step_r, step_s = geometry
        self.program.emit(
            Opcode.MULTIPLY,
            reads=_pages("sparse", cores, sparse_page) + _pages("dense", cores, dense_page),
            writes=_psums(cores),
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
        source, weight = self.source.policy.scale, self.weight.policy.scale
        scale = self.rounding.scale
        self.program.emit(
            Opcode.DRAIN,
            reads=[Region(f"psum {core}")],
            writes=[VectorBuilder.rows(place, tile.size)],
            core=core,
            count_n=box.images,
            count_h=lines,
            count_w=pixels,
            lane_beats=count_rows,
            shift=source + weight - scale,
            scale=scale if self.rounding.fp16 else 0,
            fp16=int(self.rounding.fp16),
            saturate=int(self.rounding.saturate),
            psum_n=lines * pixels,
            psum_h=pixels,
            psum_w=1,
            vmem=vmem,
            vmem_n=stride_n,
            vmem_h=step * stride_h,
            vmem_w=step * stride_w,
        )


def _power_of_two(count: int) -> int:
    """The largest power of two up to `count`."""
    return 1 << (count.bit_length() - 1)


def _by_phase(axes: list[Axis]) -> list[list[Axis]]:
    phases: dict[int, list[Axis]] = {}
    for axis in axes:
        phases.setdefault(axis.out_phase, []).append(axis)
    return list(phases.values())


def _pages(buffer: str, cores: int, page: int) -> list[Region]:
    return [Region(f"{buffer} {core}", page, page + 1) for core in range(16) if cores >> core & 1]


def _psums(cores: int) -> list[Region]:
    return [Region(f"psum {core}") for core in range(16) if cores >> core & 1]


def _block_parts(channel: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(block, first channel in it, channels) of channels `channel` to `channel + count`."""
    end = channel + count
    while channel < end:
        block, start = divmod(channel, BLOCK)
        part = min(end - channel, BLOCK - start)
        yield block, start, part
        channel += part


def lower_weight_grad(
    program: Program,
    shape: Convolution,
    x: Tensor,
    dy: Tensor,
    out: Tensor,
    rounding: Rounding,
    epilogue: Epilogue,
    *,
    vmem: int,
    vmem_end: int,
    reserve: int = 0,
) -> None:
    """WG: out = dw [taps, channels, outputs]. Arguments as in `lower_forward`; tiles are of `out`."""
    _check_terms(program, f"{out.name} (weight gradient)", shape.batch * shape.out_height * shape.out_width)
    _WeightGrad(program, shape, x, dy, out, rounding, vmem=vmem, vmem_end=vmem_end, reserve=reserve).lower(epilogue)


class _WeightGrad:
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
        self.vmem = vmem
        config = self.config
        groups = -(-dy.padded // config.lanes)
        self.cores_o = min(config.cores, groups)
        self.cores_m = config.cores // self.cores_o
        k, s, p = (shape.kernel_height, shape.kernel_width), shape.stride, shape.padding
        self.axes_h = _all_taps(_forward_axes(shape.height, shape.out_height, k[0], s, p), k[0], s, p)
        self.axes_w = _all_taps(_forward_axes(shape.width, shape.out_width, k[1], s, p), k[1], s, p)
        per_pixel = out.block_channels // config.beat
        budget = (vmem_end - vmem) // (self.cores_m + reserve) // per_pixel
        # Channels of x a core holds at a time; a tile of `out` holds whole blocks, so at least `block_pixels`.
        self.channels = _power_of_two(min(x.padded, BLOCK, config.rows, config.psum_rows, budget))
        if self.channels < min(out.width, max(config.beat, out.block_pixels)):
            raise ValueError(f"no tile of {out.name} fits {budget} pixels of the vector memory")
        self.taps, self.tile = self._plan(budget)
        self.vectors = VectorBuilder(program)

    def _plan(self, budget: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """Taps of a group and the box of dy's pixels: the fewest elements loaded."""
        config, shape = self.config, self.shape
        max_r = max(len(axis.taps) for axis in self.axes_h)
        max_s = max(len(axis.taps) for axis in self.axes_w)
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
                                * (halo * self.channels / 8 + outputs * config.lanes / 8 + visits * (2 + outputs / 3))
                            )
                            if best is None or cost < best[0]:
                                best = cost, (taps_r, taps_s), (images, lines, pixels)
        assert best is not None  # one tap and one pixel always fit
        return best[1], best[2]

    def lower(self, epilogue: Epilogue) -> None:
        groups = [
            (axis_h, axis_w, taps_r, taps_s)
            for axis_h in self.axes_h
            for axis_w in self.axes_w
            for taps_r in _cut(axis_h.taps, self.taps[0])
            for taps_s in _cut(axis_w.taps, self.taps[1])
        ]
        jobs = [  # what a group of cores sums up: some taps of some channels
            (group, channel) for group in groups for channel in range(0, self.x.padded, self.channels)
        ]
        for block in range(self.out.pixel_blocks):
            for start in range(0, len(jobs), self.cores_m):
                self._batch(jobs[start : start + self.cores_m], block, epilogue)

    def _batch(self, jobs: list, block: int, epilogue: Epilogue) -> None:
        """Jobs that the groups of cores work on side by side, for one block of output channels."""
        config, out = self.config, self.out
        per_pixel = out.block_channels // config.beat
        places, row = [], self.vmem
        for (_, _, taps_r, taps_s), channel in jobs:
            places.append(row)
            row += len(taps_r) * len(taps_s) * min(self.channels, self.x.padded - channel) * per_pixel
        low, high = block * BLOCK, min(self.dy.padded, (block + 1) * BLOCK)
        for lane in range(low, high, self.cores_o * config.lanes):
            lanes = [min(config.lanes, high - (lane + o * config.lanes)) for o in range(self.cores_o)]
            self._sums(jobs, lane, lanes)
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
                        )
        for m, ((_, _, taps_r, taps_s), channel) in enumerate(jobs):
            channels = min(self.channels, self.x.padded - channel)
            for i, (r, _) in enumerate(taps_r):
                for j, (s, _) in enumerate(taps_s):
                    tap = i * len(taps_s) + j
                    tile = Tile(0, 1, r * self.shape.kernel_width + s, 1, channel, channels, block, per_pixel)
                    epilogue(tile, places[m] + tap * tile.size, False)

    def _sums(self, jobs: list, lane: int, lanes: list[int]) -> None:
        config, shape = self.config, self.shape
        cache = PageCache()
        images, lines, pixels = self.tile
        initialise = True
        plan = Plan(images, lines, pixels, *self.taps)
        for box in _boxes(plan, shape.batch, shape.out_height, shape.out_width):
            active = [o for o, count in enumerate(lanes) if count > 0]
            for m, ((axis_h, axis_w, taps_r, taps_s), channel) in enumerate(jobs):
                channels = min(self.channels, self.x.padded - channel)
                tall, wide = box.lines + len(taps_r) - 1, box.pixels + len(taps_s) - 1
                cores = sum(1 << (m * self.cores_o + o) for o in active)
                x_page = self._load_x(cache, cores, box, tall, wide, channel, channels, axis_h, axis_w, taps_r, taps_s)
                pages = {}
                for o in active:
                    pages[o] = self._load_dy(
                        cache, 1 << (m * self.cores_o + o), box, tall, wide, lane + o * config.lanes, lanes[o]
                    )
                window = 0
                for n in range(box.images):
                    for line in range(box.lines):
                        window |= ((1 << box.pixels) - 1) << (n * tall * wide + line * wide)
                for count, page in sorted({(lanes[o], pages[o]) for o in active}):
                    mask = sum(1 << (m * self.cores_o + o) for o in active if (lanes[o], pages[o]) == (count, page))
                    self.program.emit(
                        Opcode.MULTIPLY,
                        reads=_pages("sparse", mask, x_page) + _pages("dense", mask, page),
                        writes=_psums(mask),
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
                        psum_w=1,
                        psum_r=len(taps_s) * channels,
                        psum_s=channels,
                        dense_r=-wide,
                        dense_s=-1,
                        shift_r=wide,
                        shift_s=1,
                        kmask=window,
                    )
            initialise = False

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
        taps_r,
        taps_s,
    ) -> int:
        """Columns of x: sparse row = channel, element = pixel of the haloed box."""
        first_line = (box.line + taps_r[0][1]) * axis_h.source_step + axis_h.source_phase
        first_pixel = (box.pixel + taps_s[0][1]) * axis_w.source_step + axis_w.source_phase
        content = (box, first_line, first_pixel, tall, wide, channel)
        page, there = cache.page("sparse", cores, content)
        if not there:
            x = self.x
            i_first, i_end = inside(first_line, axis_h.source_step, tall, x.height)
            j_first, j_end = inside(first_pixel, axis_w.source_step, wide, x.width)
            self.program.emit(
                Opcode.LOAD,
                reads=[self.program.memory(x)],
                writes=_pages("sparse", cores, page),
                **x.walk(),
                target=Target.SPARSE.value,
                transpose=1,
                page=page,
                cores=cores,
                n_count=box.images,
                i_count=tall,
                j_count=wide,
                line=box.image * x.height + first_line,
                line_n=x.height,
                line_i=axis_h.source_step,
                pixel=first_pixel,
                pixel_j=axis_w.source_step,
                pixel_block=channel // BLOCK,
                i_first=i_first,
                i_end=i_end,
                j_first=j_first,
                j_end=j_end,
                channel=(channel % BLOCK) // self.config.beat,
                channel_beats=channels // self.config.beat,
                dest_n=tall * wide,
                dest_i=wide,
                dest_j=1,
            )
        return page

    def _load_dy(self, cache: PageCache, cores: int, box: Box, tall: int, wide: int, lane: int, lanes: int) -> int:
        """dy in the pitch of x: dense row = pixel, lane = output channel."""
        page, there = cache.page("dense", cores, (box, tall, wide, lane))
        if not there:
            dy, beat = self.dy, self.config.beat
            for part, start, count in _block_parts(lane, lanes):
                self.program.emit(
                    Opcode.LOAD,
                    reads=[self.program.memory(dy)],
                    writes=_pages("dense", cores, page),
                    **dy.walk(),
                    target=Target.DENSE.value,
                    page=page,
                    cores=cores,
                    n_count=box.images,
                    i_count=box.lines,
                    j_count=box.pixels,
                    line=box.image * dy.height + box.line,
                    line_n=dy.height,
                    line_i=1,
                    pixel=box.pixel,
                    pixel_j=1,
                    pixel_block=part,
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

    def _drain(self, core: int, vmem: int, count: int, lanes: int, per_pixel: int, place: int) -> None:
        scale = self.rounding.scale
        self.program.emit(
            Opcode.DRAIN,
            reads=[Region(f"psum {core}")],
            writes=[VectorBuilder.rows(place, count * per_pixel)],
            core=core,
            count_n=1,
            count_h=1,
            count_w=count,
            lane_beats=lanes // self.config.beat,
            shift=self.x.policy.scale + self.dy.policy.scale - scale,
            scale=scale if self.rounding.fp16 else 0,
            fp16=int(self.rounding.fp16),
            saturate=int(self.rounding.saturate),
            psum_w=1,
            vmem=vmem,
            vmem_w=per_pixel,
        )


def _all_taps(axes: list[Axis], kernel: int, stride: int, padding: int) -> list[Axis]:
    """The axes with every tap, those that see only padding too: their gradient is zero, and must be written."""
    return [
        replace(
            axis,
            taps=tuple(
                (r, (r - padding - axis.source_phase) // stride)
                for r in range(kernel)
                if (r - padding - axis.source_phase) % stride == 0
            ),
        )
        for axis in axes
    ]
