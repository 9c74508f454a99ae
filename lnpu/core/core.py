"""A DL core: walks the visits of a MULTIPLY and streams the elements that are not zero through the line of PEs."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream
from amaranth.lib.wiring import In, Out

from lnpu.config import ChipConfig
from lnpu.core.dense_buffer import DenseBuffer
from lnpu.core.mask_store import MaskStore
from lnpu.core.psum_store import PsumStore
from lnpu.core.sparse_buffer import SparseBuffer
from lnpu.core.zero_skip import ZeroSkip, visit_layout
from lnpu.ctrl.commands import Opcode, layout_of
from lnpu.ctrl.counters import core_events_layout
from lnpu.formats import psum_layout
from lnpu.hdl import Block, place
from lnpu.interfaces import Buffer, Error, buffer_write, command_stream
from lnpu.mem.skid_buffer import SkidBuffer
from lnpu.pe.pe_line import PeLine
from lnpu.tree_sum import tree_sum

__all__ = ["Core", "VisitWalk"]

_COMMAND = layout_of(Opcode.MULTIPLY)
_LOOPS = "nhwrs"
_ADDRESSES = {  # of a visit: loops that move it, and a shape that holds every value of base plus index times stride
    "row": ("nhwrs", signed(25)),
    "psum": ("nhwrs", signed(25)),
    "dense": ("rs", signed(25)),
    "shift": ("rs", signed(20)),
}


class VisitWalk(Block):
    """Walks the visits (n, h, w, r, s) of a MULTIPLY, s innermost, one a cycle.

    Members
    -------
    command : In(layout_of(Opcode.MULTIPLY))
        Stable from `start` to the last visit; every count is at least 1.
    start : In(1)
        The first visit is offered in the cycle after.
    visit : Out(stream.Signature(StructLayout))
        Addresses `row`, `psum`, `dense` and `shift` of the visit, exact.
    """

    def __init__(self) -> None:
        layout = data.StructLayout({name: shape for name, (_, shape) in _ADDRESSES.items()})
        super().__init__({"command": In(_COMMAND), "start": In(1), "visit": Out(stream.Signature(layout))})

    def elaborate(self, platform):
        m = Module()
        command, visit = self.command, self.visit
        active = Signal()
        step = Signal()
        m.d.comb += [visit.valid.eq(active), step.eq(active & visit.ready)]

        last = {}  # loop -> it is at its last index
        moves = {}  # loop -> it takes a step: all the loops inside are at their last index
        wrapped = Const(1)
        for loop in reversed(_LOOPS):
            left = Signal(10, name=f"left_{loop}", reset_less=True)
            last[loop] = Signal(name=f"last_{loop}")
            moves[loop] = Signal(name=f"moves_{loop}")
            m.d.comb += [last[loop].eq(left == 0), moves[loop].eq(wrapped & ~last[loop])]
            with m.If(self.start | (step & wrapped & last[loop])):
                m.d.sync += left.eq(command[f"count_{loop}"] - 1)
            with m.Elif(step & moves[loop]):
                m.d.sync += left.eq(left - 1)
            wrapped = wrapped & last[loop]
        with m.If(self.start):
            m.d.sync += active.eq(1)
        with m.Elif(step & wrapped):
            m.d.sync += active.eq(0)

        for name, (loops, shape) in _ADDRESSES.items():
            # Each loop keeps the address of its current index, with the loops inside at 0.
            at = {loop: Signal(shape, name=f"{name}_{loop}", reset_less=True) for loop in loops}
            start, stride = Signal(shape, name=f"{name}_start"), Signal(signed(13), name=f"{name}_stride")
            m.d.comb += start.eq(command[name])  # if none of its loops moves
            for loop in loops:
                with m.If(moves[loop]):
                    m.d.comb += [start.eq(at[loop]), stride.eq(command[f"{name}_{loop}"])]
            following = Signal(shape, name=f"{name}_next")
            m.d.comb += following.eq(start + stride)
            restart = step
            for loop in reversed(loops):
                with m.If(self.start):
                    m.d.sync += at[loop].eq(command[name])
                with m.Elif(restart):
                    m.d.sync += at[loop].eq(following)
                restart = restart & last[loop]
            m.d.comb += visit.p[name].eq(at[loops[-1]])
        return m


class Core(Block):
    """Executes MULTIPLY commands on its sparse and dense buffers; the results are in its partial-sum store.

    With `masked`, a command computes only the partial sums whose bit in the mask store (page `mask_page`, row and lane
    of the sum) is set. The others' lanes are at rest, and their sums are written as *masked*: `nan`, `pinf` and `ninf`
    all set, `acc` and `carries` 0. No other sum is written with all three: one with `nan` has neither of the others,
    which means the same. Visits of a row without a set bit have no elements. All the commands that add to a row from
    its `initialise` to its DRAIN must use the same mask.

    Parameters
    ----------
    config : ChipConfig
        The chip's configuration.

    Members
    -------
    index : In(4)
        Number of this core: its bit in `write.cores`. Constant.
    command : In(command_stream())
        MULTIPLY commands. One can be taken while another is running; it begins when that one is done. The opcode, the
        wait masks and `cores` are not looked at.
    busy : Out(1)
        From the cycle after a command's handshake until the last partial sum of all that were taken is in the store.
    queued : Out(1)
        A command is running and another one has been taken.
    error : Out(Error)
        For one cycle, while busy: FIELD for a command that is dropped because a count is zero, RANGE (once a command)
        if visits were skipped because an address was outside its buffer. NONE otherwise.
    fill_sparse, fill_dense : In(buffer_write(config))
        Beats of the sparse buffer from the first, of the dense buffer and the mask store from both, taken in every
        cycle. Must not change what the running command reads; the two must not write one page in the same cycle.
    psum_request : In(stream.Signature(12))
        Number of a row of partial sums to read. Ready unless a row of partial sums is being loaded for the PEs.
    psum_hold : In(1)
        The row on `psum` is still needed: until it falls, the core loads no other row (and may have to wait).
    psum : Out(psum_layout(acc_bits)).array(lanes)
        The row of the last handshake on `psum_request`, from the cycle after it for at least as long as `psum_hold`.
    events : Out(core_events_layout())
        `busy`; at the start of a visit `visit` with the numbers of `zeros` and of `padding` in its window, and
        `masked_visit`; `mac16` and `mac8`, products of the elements issued in this cycle: elements times the command's
        `lanes`; `gated`: how many of those (of two cycles before, three with `buffer_registers`) have a masked sum.

    Notes
    -----
    A visit takes max(1, n16 + max(n8 / 2 rounded up, most n8 of a bank)) cycles (see `ZeroSkip`), one if its row is
    masked as a whole, and the next follows without a gap, another row of partial sums included. One cycle is lost where
    a row that must be loaded was left only two visits before and the visit between took a single cycle. A command takes
    8 cycles more than its visits, and one more if it finds the core idle.

    A visit whose `shift` is not in 0 .. depth - 1 has an empty window.
    """

    def __init__(self, *, config: ChipConfig) -> None:
        self.config = config
        super().__init__(
            {
                "index": In(4),
                "command": In(command_stream()),
                "busy": Out(1),
                "queued": Out(1),
                "error": Out(Error),
                "fill_sparse": In(buffer_write(config)),
                "fill_dense": In(buffer_write(config)),
                "psum_request": In(stream.Signature(12)),
                "psum_hold": In(1),
                "psum": Out(psum_layout(config.acc_bits)).array(config.lanes),
                "events": Out(core_events_layout()),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        depth = config.depth
        row_bits, psum_bits = (config.rows - 1).bit_length(), (config.psum_rows - 1).bit_length()
        dense_bits, k_bits = (config.dense_rows - 1).bit_length(), (depth - 1).bit_length()

        sparse = place(m, "sparse", SparseBuffer(config=config))
        dense = place(m, "dense", DenseBuffer(config=config))
        mask = place(m, "mask", MaskStore(config=config))
        store = place(m, "store", PsumStore(config=config))
        line = place(m, "line", PeLine(lanes=config.lanes, acc_bits=config.acc_bits))
        walk = place(m, "walk", VisitWalk())
        skip = place(m, "skip", ZeroSkip(config=config))

        for i, fill in enumerate((self.fill_sparse, self.fill_dense)):
            mine = fill.valid & (fill.cores >> self.index)[0]
            writes = [(dense.write[i], Buffer.DENSE), (mask.write[i], Buffer.MASK)]
            if i == 0:
                writes.append((sparse.write, Buffer.SPARSE))
            for write, buffer in writes:
                m.d.comb += [write.eq(fill), write.valid.eq(mine & (fill.buffer == buffer))]

        command = Signal(_COMMAND, reset_less=True)
        m.d.comb += walk.command.eq(command)

        # Stage W: the walk's visit. Its row's codes are read, and whether its sums are masked; its window is shifted
        # into place.
        look = Signal()  # the visit moves to the next stage
        look_valid = Signal()
        look_done = Signal()
        visit = walk.visit.p
        m.d.comb += look.eq(walk.visit.valid & walk.visit.ready)
        addresses_ok = Signal()
        m.d.comb += [
            addresses_ok.eq(_inside(visit.row, config.rows) & _inside(visit.psum, config.psum_rows)),
            sparse.codes_enable.eq(look & addresses_ok),
            sparse.codes_page.eq(command.sparse_page),
            sparse.codes_row.eq(visit.row),
            mask.any_enable.eq(look & addresses_ok & command.masked),
            mask.any_page.eq(command.mask_page),
            mask.any_row.eq(visit.psum),
        ]
        window = Signal(depth, reset_less=True)
        look_ok = Signal(reset_less=True)
        look_row = Signal(row_bits, reset_less=True)
        look_psum = Signal(psum_bits, reset_less=True)
        look_dense = Signal(dense_bits, reset_less=True)
        k_first = Signal(k_bits + 1, reset_less=True)  # the dense buffer has rows for k_first <= k < k_end
        k_end = Signal(k_bits + 1, reset_less=True)
        room = Signal(signed(26))
        m.d.comb += room.eq(config.dense_rows - visit.dense)
        looked = [
            (window, Mux(_inside(visit.shift, depth), command.kmask[:depth] << visit.shift[:k_bits], 0)),
            (look_ok, addresses_ok),
            (look_row, visit.row),
            (look_psum, visit.psum),
            (look_dense, visit.dense),
            (k_first, Mux(visit.dense < 0, Mux(visit.dense < -depth, depth, -visit.dense), 0)),
            (k_end, Mux(room < 0, 0, Mux(room > depth, depth, room))),
        ]
        codes, mask_any, read_valid = sparse.codes, mask.any, Signal()
        if config.buffer_registers:
            # Stage C: the codes are at the block RAMs, and go to registers.
            read = [(Signal.like(value, name=f"read_{value.name}", reset_less=True), now) for value, now in looked]
            codes, mask_any = Signal.like(codes, reset_less=True), Signal(reset_less=True)
            moves = Signal()
            m.d.comb += [
                walk.visit.ready.eq(~read_valid | moves),
                moves.eq(read_valid & (~look_valid | look_done)),
            ]
            with m.If(look):
                m.d.sync += [value.eq(now) for value, now in read]
            with m.If(moves):
                m.d.sync += [value.eq(before) for (value, _), (before, _) in zip(looked, read, strict=True)]
                m.d.sync += [codes.eq(sparse.codes), mask_any.eq(mask.any)]
            m.d.sync += [
                read_valid.eq(look | (read_valid & ~moves)),
                look_valid.eq(moves | (look_valid & ~look_done)),
            ]
        else:
            m.d.comb += walk.visit.ready.eq(~look_valid | look_done)
            with m.If(look):
                m.d.sync += [value.eq(now) for value, now in looked]
            m.d.sync += look_valid.eq(look | (look_valid & ~look_done))

        # Stage L: the codes have been read; what is left of the visit is its masks.
        nonzero, fp8 = Signal(depth), Signal(depth)
        zeros, padding = Signal(depth), Signal(depth)
        outside = Signal(depth)
        row_masked = Signal()  # late: the store's answer comes through a whole row of bits
        m.d.comb += row_masked.eq(command.masked & ~mask_any)
        for k in range(depth):
            high, low = codes[k][1], codes[k][0]
            m.d.comb += [
                nonzero[k].eq(window[k] & high),
                fp8[k].eq(~low),
                zeros[k].eq(window[k] & ~high & ~low),
                padding[k].eq(window[k] & ~high & low),
                outside[k].eq((k < k_first) | (k >= k_end)),
            ]
        look_error = Signal()
        m.d.comb += look_error.eq(~look_ok | ((nonzero & outside).any() & ~row_masked))
        payload = data.StructLayout(
            {
                "masks": visit_layout(config),
                "row": row_bits,
                "psum": psum_bits,
                "dense": dense_bits,
            }
        )
        queue = place(m, "queue", SkidBuffer(width=payload.size))
        queue_i, queue_o = Signal(payload), Signal(payload)
        m.d.comb += [
            queue_i.masks.nonzero.eq(Mux(row_masked, 0, nonzero)),
            queue_i.masks.fp8.eq(fp8),
            queue_i.row.eq(look_row),
            queue_i.psum.eq(look_psum),
            queue_i.dense.eq(look_dense),
            queue.i.payload.eq(queue_i),
            queue.i.valid.eq(look_valid & ~look_error),
            look_done.eq(look_valid & queue.i.ready),
            Value.cast(queue_o).eq(queue.o.payload),
        ]
        m.d.sync += [
            self.events.visit.eq(look_done & ~look_error),
            self.events.masked_visit.eq(look_done & ~look_error & row_masked),
            self.events.zeros.eq(0),
            self.events.padding.eq(0),
        ]
        with m.If(look_done & ~look_error):
            m.d.sync += [self.events.zeros.eq(tree_sum(zeros)), self.events.padding.eq(tree_sum(padding))]

        # Stage Z: the zero-skip controller walks the masks.
        m.d.comb += [
            skip.visit.payload.eq(queue_o.masks),
            skip.visit.valid.eq(queue.o.valid),
            queue.o.ready.eq(skip.visit.ready),
        ]
        row = Signal(row_bits, reset_less=True)  # of the visit in the controller
        psum = Signal(psum_bits, reset_less=True)
        base = Signal(dense_bits, reset_less=True)
        left = Signal(psum_bits, reset_less=True)  # row of partial sums that the visit replaces in the PEs
        change = Signal(reset_less=True)
        occupied = Signal()  # the PEs hold partial sums that are not in the store
        replaces = Signal(reset_less=True)
        with m.If(skip.visit.valid & skip.visit.ready):
            m.d.sync += [
                row.eq(queue_o.row),
                psum.eq(queue_o.psum),
                base.eq(queue_o.dense),
                left.eq(psum),
                change.eq(~occupied | (psum != queue_o.psum)),
                replaces.eq(occupied & (psum != queue_o.psum)),
                occupied.eq(1),
            ]

        issue = skip.issue.p
        issuing = Signal()
        flush = Signal()
        first = Signal()
        reads = Signal()  # a row must be read for the visit
        blocked = Signal()
        z, a, r, d, e = (_Item(stage, psum_bits) for stage in "zarde")
        ahead = r if config.buffer_registers else a  # of stage D
        m.d.comb += [
            first.eq(skip.issue.valid & issue.first & change),
            reads.eq(first & ~command.initialise),
            # The row is read in stage D: it must not be written then, and nobody may need what is on `psum`.
            blocked.eq(reads & (self.psum_hold | (a.store & (a.left == psum)))),
            skip.issue.ready.eq(~blocked),
            issuing.eq(skip.issue.valid & ~blocked),
            z.load.eq(issuing & first),
            z.read.eq(issuing & reads),
            z.store.eq((issuing & first & replaces) | (flush & occupied)),
            z.psum.eq(psum),
            z.left.eq(Mux(flush, psum, left)),
        ]
        a_enable = Signal(2)
        a_fp16 = Signal(reset_less=True)
        a_k = Signal(data.ArrayLayout(k_bits, 2), reset_less=True)
        a_row = Signal(row_bits, reset_less=True)
        # The dense buffer takes two cycles, and the mask of a row of partial sums that begins is read into a register.
        begins = a if config.buffer_registers else z
        m.d.comb += [
            mask.live_enable.eq(begins.load & command.masked),
            mask.live_page.eq(command.mask_page),
            mask.live_row.eq(begins.psum),
            dense.enable.eq(Mux(issuing, issue.enable, 0)),
            dense.page.eq(command.dense_page),
            *(dense.row[i].eq(base + issue.k[i]) for i in range(2)),
        ]
        m.d.sync += [
            a_enable.eq(Mux(issuing, issue.enable, 0)),
            a_fp16.eq(issue.fp16),
            a_k.eq(issue.k),
            a_row.eq(row),
            a.all.eq(z.all),
        ]

        # Stage A: elements are read.
        m.d.comb += [
            sparse.element_enable.eq(a_enable),
            sparse.element_page.eq(command.sparse_page),
            sparse.element_row.eq(a_row),
            sparse.k.eq(a_k),
            self.events.mac16.eq(Mux(a_fp16 & a_enable[0], command.lanes, 0)),
            self.events.mac8.eq(
                Mux(a_fp16, 0, Mux(a_enable[0], command.lanes, 0) + Mux(a_enable[1], command.lanes, 0))
            ),
        ]
        d_enable = Signal(2)
        d_pair = Signal(reset_less=True)
        d_element, d_rows = sparse.element, dense.value
        if config.buffer_registers:
            # Stage R: the operands are at the block RAMs, and go to registers.
            r_enable, r_pair = Signal(2), Signal(reset_less=True)
            d_element, d_rows = Signal.like(d_element, reset_less=True), Signal.like(d_rows, reset_less=True)
            m.d.sync += [
                r_enable.eq(a_enable),
                r_pair.eq(~a_fp16),
                r.all.eq(a.all),
                d_enable.eq(r_enable),
                d_pair.eq(r_pair),
            ]
            for i in range(2):
                with m.If(r_enable[i]):
                    m.d.sync += [d_element[i].eq(sparse.element[i]), d_rows[i].eq(dense.value[i])]
        else:
            m.d.sync += [d_enable.eq(a_enable), d_pair.eq(~a_fp16)]
        m.d.sync += d.all.eq(ahead.all)

        # Stage D: the operands are at the PEs' inputs; the partial sums to start from are read. `live` is the mask of
        # the row in the PEs: for an item that replaces it, in the item's stage before D for the last time.
        grant = Signal()
        lanes = config.lanes
        live = Signal(lanes, reset_less=True)
        left_live = [Signal(lanes, name=f"{stage}_left_live", reset_less=True) for stage in "de"]
        gated = Signal(lanes)
        with m.If(ahead.load):
            m.d.sync += live.eq(Mux(command.masked, mask.live, -1))
        m.d.comb += [
            gated.eq(~live & Cat(n < command.lanes for n in range(lanes))),
            line.live.eq(live),
            line.enable.eq(d_enable),
            line.pair.eq(d_pair),
            line.a.eq(d_element),
            *(line.b[n].eq(Cat(row[n] for row in d_rows)) for n in range(lanes)),
            line.load.eq(d.load),
            self.psum_request.ready.eq(~(z.read | a.read | r.read | d.read)),
            grant.eq(self.psum_request.valid & self.psum_request.ready),
            store.read_enable.eq(d.read | grant),
            store.read_row.eq(Mux(d.read, d.psum, self.psum_request.payload)),
            *(shown.eq(read) for shown, read in zip(self.psum, store.read, strict=True)),
        ]
        m.d.sync += [
            e.all.eq(d.all),
            Cat(left_live).eq(Cat(live, left_live[0])),
            self.events.gated.eq(0),
        ]
        with m.If(d_enable.any() & gated.any()):
            m.d.sync += self.events.gated.eq(tree_sum(gated) << d_enable.all())

        # Stage E: the PEs take those sums, and show for the last time the ones before. Lane by lane, as in the store:
        # nothing needs the line's sums as one word.
        m.d.comb += [store.write_enable.eq(e.store), store.write_row.eq(e.left)]
        for n in range(lanes):
            psum_o, masked = line.psum_o[n], ~left_live[1][n]
            flags = {
                "nan": psum_o.nan | masked,
                "pinf": (psum_o.pinf & ~psum_o.nan) | masked,
                "ninf": (psum_o.ninf & ~psum_o.nan) | masked,
            }
            written = Cat(flags.get(name, Mux(masked, 0, psum_o[name])) for name, _ in psum_o.shape())
            m.d.comb += [
                Value.cast(line.psum_i[n]).eq(Mux(e.read, Value.cast(store.read[n]), 0)),
                Value.cast(store.write[n]).eq(written),
            ]

        range_error = Signal()  # once a command, in the cycle after the visit's look
        range_seen = Signal()
        m.d.comb += self.events.busy.eq(self.busy)
        m.d.sync += range_error.eq(look_done & look_error & ~range_seen & ~range_error)
        # The next command waits beside the running one.
        following = Signal(_COMMAND, reset_less=True)
        waiting, running, take = Signal(), Signal(), Signal()
        m.d.comb += [
            self.command.ready.eq(~waiting),
            self.busy.eq(running | waiting),
            self.queued.eq(running & waiting),
            running.eq(1),
        ]
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += [Value.cast(following).eq(self.command.payload[: _COMMAND.size]), waiting.eq(1)]
        counts = [command[f"count_{loop}"].any() for loop in _LOOPS]
        with m.If(range_error):
            m.d.comb += self.error.eq(Error.RANGE)
            m.d.sync += range_seen.eq(1)
        with m.FSM(name="state"):
            with m.State("IDLE"):
                m.d.comb += [running.eq(0), take.eq(waiting)]
                with m.If(waiting):
                    m.next = "START"
            with m.State("START"):
                m.d.sync += range_seen.eq(0)
                with m.If(Cat(counts).all()):
                    m.d.comb += walk.start.eq(1)
                    m.next = "WALK"
                with m.Else():
                    m.d.comb += self.error.eq(Error.FIELD)
                    m.next = "IDLE"
            with (
                m.State("WALK"),
                m.If(~(walk.visit.valid | read_valid | look_valid | queue.o.valid | skip.issue.valid)),
            ):
                m.d.comb += flush.eq(1)
                m.d.sync += occupied.eq(0)
                m.next = "FLUSH"
            with m.State("FLUSH"), m.If(~(a.store | r.store | d.store)):
                m.d.comb += take.eq(waiting)
                m.next = "IDLE"
                with m.If(waiting):
                    m.next = "START"
        with m.If(take):
            m.d.sync += [command.eq(following), waiting.eq(0)]
        return m


class _Item:
    """What a cycle does to the partial sums, in the stages Z, A, D and E."""

    def __init__(self, stage: str, row_bits: int) -> None:
        self.load = Signal(name=f"{stage}_load")  # the PEs start another row ...
        self.read = Signal(name=f"{stage}_read")  # ... from the sums in the store, not from zero
        self.store = Signal(name=f"{stage}_store")  # the row before goes to the store
        self.psum = Signal(row_bits, name=f"{stage}_psum", reset_less=True)
        self.left = Signal(row_bits, name=f"{stage}_left", reset_less=True)
        self.all = Cat(self.load, self.read, self.store, self.psum, self.left)


def _inside(address, size: int):
    """Whether a signed `address` is in 0 .. size - 1."""
    return (address >= 0) & (address < size)
