"""Testbench of `Core`: whole MULTIPLY commands against a Python-integer model, cycle counts included."""

from itertools import product

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge

from lnpu.config import ChipConfig
from lnpu.ctrl.commands import Command, Opcode
from lnpu.ctrl.counters import core_events_layout
from lnpu.interfaces import Buffer, Error
from verif.agents import start, unpack
from verif.mask_store_tb import Masks
from verif.pe_tb import CORNERS, F16, FP8, meaning
from verif.runner import parameters, rng
from verif.sparse_buffer_tb import BufferWriter
from verif.zero_skip_tb import cycles_of

OVERHEAD = 9
"""Cycles of a command beyond those of its visits, without registers behind the buffers."""

MASKED = 7
"""Flags of a masked sum."""

FP8_NONZERO = [word for word in FP8 if word & 0x7FFF]
LOOPS = "nhwrs"


class Sums:
    """A row of exact sums; `acc` (Python integers) in units of 2^-48."""

    def __init__(self, lanes: int) -> None:
        self.acc = [0] * lanes
        self.flags = [0] * lanes  # bit 0 nan, 1 pinf, 2 ninf

    def add(self, a: int, row: np.ndarray, live: np.ndarray) -> None:
        """Add a times every value of the dense row (FP16 patterns) in the lanes that are live."""
        with np.errstate(invalid="ignore"):
            products = (F16[a] * F16[row]).tolist()
        for n in np.flatnonzero(live).tolist():
            value = products[n]
            if value != value:
                self.flags[n] |= 1
            elif abs(value) == float("inf"):
                self.flags[n] |= 2 if value > 0 else 4
            else:
                self.acc[n] += int(value * 2.0**48)

    def settle(self, live: np.ndarray) -> None:
        """Become what the store holds: lanes that are not live are masked, a NaN is nothing else."""
        for n, lane_live in enumerate(live.tolist()):
            if not lane_live:
                self.acc[n], self.flags[n] = 0, MASKED
            elif self.flags[n] & 1:
                self.flags[n] = 1

    def mismatches(self, dut, acc_bits: int) -> list[str]:
        """Where the row on `psum` differs; the value has no meaning beside a flag, but is 0 where it is masked."""
        found = []
        for n, (acc, flags) in enumerate(zip(self.acc, self.flags, strict=True)):
            got_acc, got = meaning(int(getattr(dut, f"psum__{n}").value), acc_bits)
            got_flags = sum(flag << i for i, flag in enumerate(got))
            if got_flags != flags or (flags in (0, MASKED) and got_acc != acc & ((1 << acc_bits) - 1)):
                found.append(f"lane {n}: {got_acc:#x}/{got_flags}, not {acc & ((1 << acc_bits) - 1):#x}/{flags}")
        return found


class Visit:
    """One visit of a command: its addresses, its elements, and what it counts."""

    def __init__(self, bench: "Bench", fields: dict, index: tuple[int, ...]) -> None:
        steps = dict(zip(LOOPS, index, strict=True))
        row, self.psum, dense, shift = (
            fields.get(name, 0) + sum(steps[loop] * fields.get(f"{name}_{loop}", 0) for loop in loops)
            for name, loops in (("row", LOOPS), ("psum", LOOPS), ("dense", "rs"), ("shift", "rs"))
        )
        config = bench.config
        depth = config.depth
        window = fields["kmask"] << shift if 0 <= shift < depth else 0
        mask = np.array([window >> k & 1 for k in range(depth)], dtype=bool)
        self.in_range = 0 <= row < config.rows and 0 <= self.psum < config.psum_rows
        if not self.in_range:
            return
        page = fields.get("sparse_page", 0)
        codes = np.where(mask, bench.sparse.code[page, row], 255)
        self.zeros, self.padding = int((codes == 0).sum()), int((codes == 1).sum())
        self.live = np.ones(config.lanes, dtype=bool)
        if fields.get("masked"):
            self.live = bench.masks.bits[fields.get("mask_page", 0), self.psum].copy()
        self.masked = not self.live.any()
        codes = np.where(self.masked, 255, codes)
        self.nonzero, self.fp8 = (codes == 2) | (codes == 3), codes == 2
        self.n8, self.n16 = int((codes == 2).sum()), int((codes == 3).sum())
        self.gated = (self.n8 + self.n16) * int((~self.live[: fields["lanes"]]).sum())
        self.cycles = cycles_of(self.nonzero, self.fp8, config.dense_banks)
        self.elements = [(int(bench.sparse.data[page, row, k]), dense + int(k)) for k in np.flatnonzero(self.nonzero)]
        self.in_range = all(0 <= row < config.dense_rows for _, row in self.elements)


class Bench:
    """The core with a model of its buffers and partial sums."""

    def __init__(self, dut) -> None:
        self.dut = dut
        self.config = config = ChipConfig(**parameters()["config"])
        self.index = config.cores - 1
        self.random = rng()
        self.edge = RisingEdge(dut.clk)
        self.sparse = BufferWriter(dut.fill_sparse, config, config.rows, config.depth, self.random)
        self.dense = BufferWriter(dut.fill_dense, config, config.dense_rows, config.lanes, self.random)
        self.decoy = {
            True: BufferWriter(dut.fill_dense, config, config.dense_rows, config.lanes, self.random),
            False: BufferWriter(dut.fill_sparse, config, config.rows, config.depth, self.random),
        }
        self.masks = Masks(config, self.random)
        self.psums = [Sums(config.lanes) for _ in range(config.psum_rows)]
        self.density, self.mixture = 0.5, 0.5

    async def begin(self) -> None:
        """Reset, fill both buffers and zero the partial sums."""
        dut = self.dut
        dut.index.value = self.index
        dut.command__valid.value = dut.command__payload.value = 0
        dut.psum_request__valid.value = dut.psum_request__payload.value = dut.psum_hold.value = 0
        self.idle()
        await start(dut)
        await self.fill()
        await self.fill_masks()
        await self.run(initialise=1, count_n=self.config.psum_rows, psum_n=1)

    def idle(self) -> None:
        """Noise without `valid` on both ports."""
        self.sparse.idle()
        self.dense.idle()

    def elements(self) -> tuple[np.ndarray, np.ndarray]:
        """A beat of the streamed operand."""
        random, beat = self.random, self.config.beat
        code = np.where(
            random.random(beat) < self.density, np.where(random.random(beat) < self.mixture, 2, 3),
            random.integers(2, size=beat),
        )  # fmt: skip
        fp16 = np.where(
            random.random(beat) < 0.1, random.choice(CORNERS, size=beat), random.integers(0x7C00, size=beat)
        )
        fp16 = np.where((fp16 & 0x7FFF > 0x7C00) & (random.random(beat) < 0.9), 0x3C00, fp16)
        fp16 = np.where(fp16 & 0x7FFF == 0, 0x8001, fp16)
        data = np.choose(code, [0, 0, random.choice(FP8_NONZERO, size=beat), fp16])
        return data, code

    def values(self) -> np.ndarray:
        """A beat of the dense operand; infinities and NaNs are rare."""
        random, beat = self.random, self.config.beat
        some = random.integers(0x7C00, size=beat) | random.integers(2, size=beat) << 15
        some = np.where(random.random(beat) < 0.05, 0, some)
        return np.where(random.random(beat) < 0.001, random.choice(CORNERS, size=beat), some)

    def put(self, dense: bool, page: int, row: int, column: int, transpose: bool, port=None) -> None:
        """Write a random beat, through its usual port or another; sometimes it is for another core."""
        random = self.random
        mine = self.config.cores == 1 or random.random() < 0.9
        cores = 1 << self.index if mine else (1 << self.index) - 1
        if mine and random.random() < 0.3:
            cores = (1 << self.config.cores) - 1
        data, code = (self.values(), random.integers(4, size=self.config.beat)) if dense else self.elements()
        writer = (self.dense if dense else self.sparse) if mine else self.decoy[dense]
        buffer = Buffer.DENSE if dense else Buffer.SPARSE
        writer.beat(page, row, column, transpose, data, code, port=port, buffer=buffer.value, cores=cores)

    def put_mask(self, port: int, page: int, row: int, column: int, mask, *, mine: bool = True) -> None:
        """Write a beat of the mask store through a port of the buffers, or one for other cores."""
        others = ((1 << self.config.cores) - 1) ^ (1 << self.index)
        masks = self.masks if mine else Masks(self.config, self.random)
        cores = int(self.random.integers(1 << self.config.cores)) & others | mine << self.index
        word = masks.beat(page, row, column, mask, cores=cores)
        (self.dut.fill_dense if port else self.dut.fill_sparse).value = word

    async def fill_masks(self, pages=(0, 1)) -> None:
        """Write pages of the mask store, by either port."""
        for beat in self.masks.rows(pages):
            self.idle()
            self.put_mask(int(self.random.integers(2)), *beat)
            await self.edge
        self.idle()

    async def fill(self, pages=(0, 1)) -> None:
        """Write pages of both buffers, along rows or columns at random; the dense ones by either port."""
        beat = self.config.beat
        for writer, dense in ((self.sparse, False), (self.dense, True)):
            for page in pages:
                transpose = bool(self.random.integers(2))
                for row in range(0, writer.rows, beat if transpose else 1):
                    for column in range(0, writer.columns, 1 if transpose else beat):
                        data, code = (self.values(), [3] * beat) if dense else self.elements()
                        buffer = Buffer.DENSE if dense else Buffer.SPARSE
                        fields = {"buffer": buffer.value, "cores": 1 << self.index}
                        self.idle()
                        port = self.dut.fill_sparse if dense and self.random.integers(2) else None
                        writer.beat(page, row, column, transpose, data, code, port=port, **fields)
                        await self.edge
        self.idle()

    def random_write(self, sparse_page: int, dense_page: int, mask_page: int | None) -> None:
        """A beat by each port into pages that the running command does not read; sometimes none."""
        random, beat = self.random, self.config.beat
        self.idle()
        mask_pages = [page for page in (0, 1) if page != mask_page]
        dense_taken = False  # not both ports into one page
        for writer, page, dense in ((self.dense, 1 - dense_page, True), (self.sparse, 1 - sparse_page, False)):
            if random.random() < 0.3:
                continue
            if mask_pages and random.random() < 0.3:
                into = mask_pages.pop(int(random.integers(len(mask_pages))))  # not both ports into one page
                row, column = int(random.integers(self.config.psum_rows)), int(random.integers(self.config.lanes))
                mask, mine = self.masks.random_row()[:beat], bool(random.random() < 0.9)
                self.put_mask(int(dense), into, row, column - column % beat, mask, mine=mine)
                continue
            other = not dense and not dense_taken and random.random() < 0.3
            if other:
                writer, page = self.dense, 1 - dense_page
            dense_taken = dense
            transpose = bool(random.integers(2))
            row, column = int(random.integers(writer.rows)), int(random.integers(writer.columns))
            row, column = (row - row % beat, column) if transpose else (row, column - column % beat)
            self.put(dense or other, page, row, column, transpose, self.dut.fill_sparse if other else None)

    def visits(self, fields: dict) -> list[Visit]:
        """The visits of a command in order."""
        counts = [range(fields[f"count_{loop}"]) for loop in LOOPS]
        return [Visit(self, fields, index) for index in product(*counts)]

    def expected_cycles(self, visits: list[Visit], initialise: bool) -> int:
        """What a command takes while nobody holds it up (no visit out of range)."""
        total = OVERHEAD + 2 * self.config.buffer_registers + sum(visit.cycles for visit in visits)
        for before, between, visit in zip(visits, visits[1:], visits[2:], strict=False):
            again = before.psum == visit.psum != between.psum and between.cycles == 1
            total += again and not initialise
        return total

    async def run(
        self, *, write: bool = False, read: float = 0.0, hold: float = 0.0, check: bool = True, **fields: int
    ) -> None:
        """Run a command; check its cycles, events, errors and partial sums.

        `write`: beats into the other pages in every cycle. `read`: probability of a request for a row of partial sums
        that the command does not touch, `hold`: of holding it on for another cycle.
        """
        dut, config, random = self.dut, self.config, self.random
        fields = {f"count_{loop}": 1 for loop in LOOPS} | {"kmask": 0, "lanes": config.lanes} | fields
        visits = self.visits(fields)
        initialise = bool(fields.get("initialise", 0))
        good = [visit for visit in visits if visit.in_range]
        legal = all(fields[f"count_{loop}"] for loop in LOOPS)
        touched = {visit.psum for visit in good}
        others = [row for row in range(config.psum_rows) if row not in touched]

        noise = int.from_bytes(random.bytes(6), "little") & 0xFFFFFFFFFFFF  # opcode, waits: not the core's business
        dut.command__payload.value = int.from_bytes(Command(Opcode.MULTIPLY, **fields).encode(), "little") ^ noise
        dut.command__valid.value = 1
        await self.edge
        assert int(dut.command__ready.value), "not ready while idle"
        dut.command__valid.value = 0
        dut.command__payload.value = int.from_bytes(random.bytes(64), "little")

        layout = core_events_layout()
        events = dict.fromkeys(layout.members, 0)
        errors: list[int] = []
        answer = None  # the row that `psum` must show in this cycle
        holding = 0
        waited = 0
        while True:
            if write:
                mask_page = fields.get("mask_page", 0) if fields.get("masked") else None
                self.random_write(fields.get("sparse_page", 0), fields.get("dense_page", 0), mask_page)
            request = int(random.choice(others)) if others and not holding and random.random() < read else None
            dut.psum_request__valid.value = int(request is not None)
            dut.psum_request__payload.value = random.integers(4096).item() if request is None else request
            dut.psum_hold.value = int(holding)
            await self.edge
            if answer is not None:
                wrong = self.psums[answer].mismatches(dut, config.acc_bits)
                assert not wrong, f"row {answer} read during the run: {wrong}"
            waited += holding
            if request is not None and int(dut.psum_request__ready.value):
                answer, holding = request, 1
            elif not holding or random.random() >= hold:
                answer, holding = None, 0
            word = int(dut.events.value)
            if word:
                for name, value in unpack(layout, word).items():
                    events[name] += value
            error = int(dut.error.value)
            if error:
                errors.append(error)
            if not int(dut.busy.value):
                assert not error, "an error while idle"
                break
            assert int(dut.command__ready.value) or events["busy"] == 1, "no room for the next command"
            assert not int(dut.queued.value), "queued"
            assert events["busy"] < 100_000, "does not end"
        dut.psum_hold.value = 0
        dut.psum_request__valid.value = 0
        self.idle()

        if not legal:
            assert errors == [Error.FIELD.value], f"errors {errors}"
            visits = good = []
        elif len(good) < len(visits):
            assert errors == [Error.RANGE.value], f"errors {errors}"
        else:
            assert not errors, f"errors {errors}"
            wanted = self.expected_cycles(visits, initialise)
            cycles = events["busy"]
            assert wanted <= cycles <= wanted + waited, f"{cycles} cycles, not {wanted}, in {len(visits)} visits"
        wanted_events = {
            "visit": len(good),
            "mac16": fields["lanes"] * sum(visit.n16 for visit in good),
            "mac8": fields["lanes"] * sum(visit.n8 for visit in good),
            "zeros": sum(visit.zeros for visit in good),
            "padding": sum(visit.padding for visit in good),
            "masked_visit": sum(visit.masked for visit in good),
            "gated": sum(visit.gated for visit in good),
            "busy": events["busy"],
        }
        assert wanted_events == events, f"events {events}, not {wanted_events}"

        self.apply(good, fields)
        if check:
            await self.compare(range(config.psum_rows))

    def apply(self, visits, fields: dict[str, int]) -> None:
        """Do what the visits of a command do to the model's partial sums."""
        previous = None
        page = fields.get("dense_page", 0)
        for visit in visits:
            if fields.get("initialise", 0) and visit.psum != previous:
                self.psums[visit.psum] = Sums(self.config.lanes)
            previous = visit.psum
            for value, row in visit.elements:
                self.psums[visit.psum].add(value, self.dense.data[page, row], visit.live)
            self.psums[visit.psum].settle(visit.live)

    async def run_all(self, commands: list[dict[str, int]]) -> None:
        """Offer commands one behind the other; check cycles, errors and partial sums of them all."""
        dut = self.dut
        wanted, errors, good = 0, [], []
        for fields in commands:
            visits = self.visits(fields)
            inside = [visit for visit in visits if visit.in_range]
            if not all(fields[f"count_{loop}"] for loop in LOOPS):
                errors.append(Error.FIELD.value)
                inside = []
            elif len(inside) < len(visits):
                errors.append(Error.RANGE.value)
            else:
                wanted += self.expected_cycles(visits, bool(fields.get("initialise", 0)))
            good.append(inside)
        seen, taken, behind, queued, busy = [], 0, 0, 0, 0
        while True:
            offer = taken < len(commands) and self.random.random() < 0.7
            dut.command__valid.value = int(offer)
            word = Command(Opcode.MULTIPLY, **commands[taken]).encode() if offer else self.random.bytes(64)
            dut.command__payload.value = int.from_bytes(word, "little")
            await self.edge
            if int(dut.error.value):
                seen.append(int(dut.error.value))
            behind += int(dut.queued.value) > queued  # a command that was taken while another was running
            queued = int(dut.queued.value)
            assert not queued or (taken >= 2 and not int(dut.command__ready.value)), "queued, but there is room"
            if offer and int(dut.command__ready.value):
                taken += 1
            elif taken == len(commands) and not int(dut.busy.value):
                break
            busy += int(dut.busy.value)
            assert busy < 100_000, "does not end"
        self.idle()
        assert seen == errors, f"errors {seen}, not {errors}"
        if not errors:
            assert busy == wanted - behind, f"{busy} cycles, not {wanted} less {behind}"
        for visits, fields in zip(good, commands, strict=True):
            self.apply(visits, fields)
        await self.compare(range(self.config.psum_rows))
        assert behind, "no command waited for another one"

    async def compare(self, rows) -> None:
        """Read rows of partial sums, one a cycle, and check them."""
        dut, width = self.dut, self.config.acc_bits
        before = None
        for row in [*rows, None]:
            dut.psum_request__valid.value = int(row is not None)
            dut.psum_request__payload.value = row or 0
            await self.edge
            assert int(dut.psum_request__ready.value), "not ready while idle"
            if before is not None:
                wrong = self.psums[before].mismatches(dut, width)
                assert not wrong, f"row {before}: {wrong}"
            before = row

    def random_strides(self, name: str, loops: str, counts: dict[str, int], size: int, reach: int) -> dict[str, int]:
        """A base and strides of up to `reach` that stay in 0 .. size - 1, or smaller strides if that cannot be."""
        while True:
            strides = {loop: int(self.random.integers(-reach, reach + 1)) for loop in loops}
            ends = [stride * (counts[loop] - 1) for loop, stride in strides.items()]
            low, high = sum(min(end, 0) for end in ends), sum(max(end, 0) for end in ends)
            if high - low < size:
                base = int(self.random.integers(-low, size - high))
                return {name: base} | {f"{name}_{loop}": stride for loop, stride in strides.items()}
            reach = max(reach - 1, 0)

    def random_command(self) -> dict[str, int]:
        """Any nest of loops inside the buffers; `initialise` only where rows of partial sums are not visited again."""
        random, config = self.random, self.config
        counts = {loop: int(random.choice([1, 1, 2, 3, 4])) for loop in LOOPS}
        fields = {f"count_{loop}": count for loop, count in counts.items()}
        fields |= self.random_strides("row", LOOPS, counts, config.rows, 6)
        fields |= self.random_strides("psum", LOOPS, counts, config.psum_rows, int(random.choice([0, 1, 1, 4])))
        fields |= self.random_strides("shift", "rs", counts, config.depth, 6)
        fields |= self.random_strides("dense", "rs", counts, config.dense_rows - config.depth + 1, 9)
        width = int(random.choice([0, 1, 2, 8, config.depth, config.depth]))
        fields["kmask"] = int.from_bytes(random.bytes(16), "little") if random.integers(2) else (1 << 128) - 1
        fields["kmask"] &= (1 << width) - 1 if width < config.depth else (1 << 128) - 1
        fields["sparse_page"], fields["dense_page"] = random.integers(2, size=2).tolist()
        fields["lanes"] = int(random.integers(config.lanes + 1))
        seen: list[int] = []
        for index in product(*(range(counts[loop]) for loop in LOOPS)):
            psum = fields["psum"] + sum(i * fields[f"psum_{loop}"] for loop, i in zip(LOOPS, index, strict=True))
            if not seen or seen[-1] != psum:
                seen.append(psum)
        fields["initialise"] = int(len(seen) == len(set(seen)) and random.integers(2))
        # Of what goes on, mostly with the mask it had: sums that meet another mask end up as NaNs.
        masked = np.array([self.psums[row].flags for row in set(seen)]) == MASKED
        masks: list[dict[str, int]] = [{}, {"masked": 1}, {"masked": 1, "mask_page": 1}]
        live = [
            self.masks.bits[mask.get("mask_page", 0), list(set(seen))] if mask else np.ones_like(masked)
            for mask in masks
        ]
        same = [mask for mask, bits in zip(masks, live, strict=True) if (bits != masked).all()]
        if fields["initialise"] or not same or random.random() < 0.05:
            same = masks
        return fields | same[int(random.integers(len(same)))]


async def begin(dut) -> Bench:
    bench = Bench(dut)
    await bench.begin()
    return bench


def mixtures():
    """Densities of non-zeros and shares of FP8 among them."""
    return [
        (0.0, 0.5),
        (0.02, 0.5),
        (0.1, 0.9),
        (0.3, 1.0),
        (0.5, 0.0),
        (0.5, 0.5),
        (0.9, 0.95),
        (1.0, 1.0),
        (1.0, 0.0),
    ]


@cocotb.test()
async def forward_and_backward(dut):
    """3x3 convolution of rows of pixels with halos, taps in either order, sums continued in a second command."""
    bench = await begin(dut)
    config, random = bench.config, bench.random
    for density, mixture in mixtures():
        bench.density, bench.mixture = density, mixture
        await bench.fill(pages=(0,))
        taps = 2 if config.dense_rows < 9 * config.depth // 4 else 3
        channels = min(config.depth, config.dense_rows // taps**2)
        pitch = next(p for p in (8, 6, 5, 4) if p * p <= config.rows or p == 4)
        width, height = pitch - taps + 1, min(pitch, config.rows // pitch) - taps + 1
        sign = int(random.choice([-1, 1]))
        fields = {
            "count_h": height, "count_w": width, "count_r": taps, "count_s": taps, "kmask": (1 << channels) - 1,
            "row": 0 if sign == 1 else (taps - 1) * (pitch + 1), "row_h": pitch, "row_w": 1,
            "row_r": sign * pitch, "row_s": sign,
            "psum": int(random.integers(config.psum_rows - height * width + 1)), "psum_h": width, "psum_w": 1,
            "dense_r": taps * channels, "dense_s": channels,
        }  # fmt: skip
        for mask in ({}, {"masked": 1, "mask_page": int(random.integers(2))}):
            await bench.run(initialise=1, **fields | mask, check=False)
            await bench.run(initialise=0, **fields | mask | {"lanes": 3, "count_h": 2}, write=bool(mask))


@cocotb.test()
async def weight_gradient(dut):
    """Channels by rows, pixels by columns: taps move the window, the dense rows and the partial sums."""
    bench = await begin(dut)
    config = bench.config
    for density, mixture in mixtures():
        bench.density, bench.mixture = density, mixture
        await bench.fill(pages=(1,))
        pitch, taps = (4, 2) if config.psum_rows < 36 or config.depth < 32 else (8, 3)
        lines = config.depth // pitch - taps + 1
        window = sum(((1 << (pitch - taps + 1)) - 1) << line * pitch for line in range(lines))
        channels = config.psum_rows // taps**2
        fields = {
            "sparse_page": 1, "dense_page": 1, "count_w": channels, "count_r": taps, "count_s": taps, "kmask": window,
            "row": 1, "row_w": 2, "psum": 0, "psum_w": taps**2, "psum_r": taps, "psum_s": 1,
            "shift_r": pitch, "shift_s": 1, "dense_r": -pitch, "dense_s": -1,
        }  # fmt: skip
        await bench.run(initialise=1, **fields, check=False)
        await bench.run(initialise=0, **fields)


@cocotb.test()
async def random_nests(dut):
    """Any nest of loops, with signed strides, windows and revisited rows of partial sums: exact cycles too."""
    bench = await begin(dut)
    for number in range(parameters()["commands"]):
        if number % 8 == 0:
            bench.density, bench.mixture = (float(bench.random.choice(part)) for part in zip(*mixtures(), strict=True))
            await bench.fill(pages=(number // 8 % 2,))
            await bench.fill_masks(pages=(number // 8 % 2,))
        await bench.run(**bench.random_command(), check=number % 4 == 3)
    await bench.compare(range(bench.config.psum_rows))


@cocotb.test()
async def back_to_back(dut):
    """Commands that are taken while others run: in order, none lost, a cycle less each; bad ones among them."""
    bench = await begin(dut)
    bench.density, bench.mixture = 0.5, 0.5
    await bench.fill()
    for number in range(10):
        commands = [bench.random_command() for _ in range(6)]
        if number % 3 == 2:
            commands[1] |= {"count_h": 0}
            commands[3] |= {"psum": -1}
        await bench.run_all(commands)


@cocotb.test()
async def rows_change_every_visit(dut):
    """Visits of one to three cycles, each with another row of partial sums: loads and stores cost no cycle.

    Without a mask, then with one: rows that are masked as a whole take a cycle between others.
    """
    bench = await begin(dut)
    bench.density, bench.mixture = 1.0, 0.0
    await bench.fill(pages=(0,))
    rows = bench.config.psum_rows
    for width, masked in product((0, 1, 2, 3), (0, 1)):
        mask = {"masked": masked, "mask_page": width % 2, "kmask": (1 << width) - 1}
        await bench.run(initialise=1, **mask, count_n=rows, psum_n=1)
        for initialise in (1, 0):
            fields = mask | {"initialise": initialise, "count_r": 2, "dense_r": 1}
            await bench.run(**fields, count_w=rows // 2, psum=rows - 1, psum_w=-1, psum_r=-(rows // 2))
            await bench.run(**fields, count_w=8, row_w=1, psum=2, psum_w=1)
        # Two or three rows in turn: what is left is read again at once.
        for turn in (2, 3):
            fields = mask | {"count_h": 5, "count_w": turn, "psum": 3, "row_h": 1, "dense_r": 2}
            await bench.run(**fields, psum_w=2, count_r=1)
            await bench.run(**fields, psum_w=-1, count_r=2)


@cocotb.test()
async def masks(dut):
    """What a masked lane is given does not show, whatever it is; rows without live lanes have no elements."""
    bench = await begin(dut)
    config, random = bench.config, bench.random
    depth, lanes, beat = config.depth, config.lanes, config.beat
    bench.density, bench.mixture = 0.7, 1.0
    await bench.fill(pages=(0,))
    # Rows 0 to 3: every second lane, the others, none, all. Dense rows are infinite or NaN in the second half of these.
    even = np.arange(lanes) % 2 == 0
    for row, bits in enumerate((even, ~even, even & ~even, even | ~even)):
        for column in range(0, lanes, beat):
            bench.put_mask(row % 2, 1, row, column, bits[column : column + beat])
            await bench.edge
            bench.idle()
    for row in range(config.dense_rows):
        for column in range(0, lanes, beat):
            odd = random.choice([0x7C00, 0xFC00, 0x7E00], beat)
            values = np.where(even[column : column + beat], random.integers(0x3C00, 0x4000, beat), odd)
            fields = {"buffer": Buffer.DENSE.value, "cores": 1 << bench.index}
            bench.dense.beat(0, row, column, False, values, [3] * beat, **fields)
            await bench.edge
    bench.idle()
    mask = {"masked": 1, "mask_page": 1, "kmask": (1 << depth) - 1}
    for initialise in (1, 0, 0):
        await bench.run(**mask, initialise=initialise, count_w=4, psum_w=1, row_w=1)
    assert not any(np.array(bench.psums[0].flags)[even]), "no live sum of row 0 is infinite or NaN"
    assert set(bench.psums[2].flags) == {MASKED}
    # Nothing of a row without live lanes is read, so its dense rows may be anywhere.
    await bench.run(**mask, initialise=1, psum=2, dense=4095)
    # Lanes beyond those of the command are not counted.
    for count in (0, 1, lanes - 1, lanes):
        await bench.run(**mask, lanes=count, count_w=2, psum_w=1)
    # Without the mask, a masked sum is a NaN from then on.
    await bench.run(kmask=1, psum=2)
    assert set(bench.psums[2].flags) == {1}


@cocotb.test()
async def tiny_shapes(dut):
    """One visit with no, one or all elements; windows beyond the row; `initialise` writes zeros."""
    bench = await begin(dut)
    depth = bench.config.depth
    for density in (0.0, 1.0):
        bench.density = density
        await bench.fill(pages=(0,))
        for kmask, shift in ((0, 0), (1, 0), (1, depth - 1), (3, depth - 1), (1, depth), ((1 << 128) - 1, 0), (1, 255)):
            for initialise in (0, 1):
                await bench.run(kmask=kmask, shift=shift, psum=5, initialise=initialise, check=False)
                await bench.compare([4, 5, 6])
        await bench.run(kmask=1, shift=3, shift_s=-1, count_s=7)


@cocotb.test()
async def errors(dut):
    """Zero counts drop a command; a visit outside a buffer is skipped, and reported once a command."""
    bench = await begin(dut)
    config = bench.config
    depth, rows, dense_rows, psum_rows = config.depth, config.rows, config.dense_rows, config.psum_rows
    bench.density = 0.6
    await bench.fill(pages=(0,))
    kmask = (1 << depth) - 1
    for loop in LOOPS:
        await bench.run(**{f"count_{loop}": 0}, kmask=kmask, check=False)
    await bench.compare(range(psum_rows))
    two = {"kmask": kmask, "check": False}
    await bench.run(**two, row=rows - 2, row_s=1, count_s=4, psum=1)
    await bench.run(**two, row=-2, row_r=1, count_r=4, psum=1)
    await bench.run(**two, row=2, row_w=-1, count_w=4, psum_w=1, initialise=1)
    await bench.run(**two, psum=psum_rows - 2, psum_n=1, count_n=4)
    await bench.run(**two, psum=-2, psum_h=1, count_h=4, initialise=1)
    await bench.run(**two, row=2047, row_n=2047, row_h=2047, count_n=2, count_h=2)
    await bench.run(**two, psum_n=2047, count_n=5, psum_h=-2048, count_h=5)
    await bench.compare(range(psum_rows))
    # A dense row outside the buffer matters only if an element uses it.
    for kmask in (1, 1 << (depth - 1), (1 << depth) - 1, 0):
        two["kmask"] = kmask
        await bench.run(**two, dense=-depth - 2, dense_s=depth // 2 - 1, count_s=5, row_r=1, count_r=3, psum_r=1)
        await bench.run(**two, dense=dense_rows - 2 * depth, dense_s=depth // 2, count_s=6, row_r=1, count_r=3)
        await bench.run(**two, dense=-1, dense_s=1, count_s=3, row_r=1, count_r=3)
        await bench.run(**two, dense=dense_rows - depth - 1, dense_s=1, count_s=3, row_r=1, count_r=3)
        await bench.run(**two, dense=4095, dense_s=4095, count_s=3)
        await bench.run(**two, dense=-4096, dense_s=-4096, count_s=3)
    await bench.compare(range(psum_rows))
    two["kmask"] = 0xFFFF
    for number in range(30):
        fields = bench.random_command()
        for name in ("row", "psum", "dense"):
            fields[name] += int(bench.random.integers(-9, 10))
        await bench.run(**fields, check=number % 5 == 4)


@cocotb.test()
async def writes_meanwhile(dut):
    """Beats into the pages that are not read, and for other cores, in every cycle of commands; cycles stay exact."""
    bench = await begin(dut)
    for number in range(parameters()["commands"] // 2):
        bench.density, bench.mixture = (float(bench.random.choice(part)) for part in zip(*mixtures(), strict=True))
        await bench.run(**bench.random_command(), write=True, check=number % 4 == 3)
    await bench.compare(range(bench.config.psum_rows))


@cocotb.test()
async def reads_meanwhile(dut):
    """Requests for rows of partial sums during commands, held for some cycles; the core may wait for them."""
    bench = await begin(dut)
    bench.density = 0.2
    await bench.fill()
    for number in range(parameters()["commands"] // 2):
        read, hold = ((1.0, 0.0), (0.5, 0.5), (1.0, 0.8), (0.05, 0.9))[number % 4]
        await bench.run(**bench.random_command(), read=read, hold=hold, write=bool(number & 4), check=number % 4 == 3)
    await bench.compare(range(bench.config.psum_rows))
