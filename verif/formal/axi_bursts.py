"""The AXI master's bursts: no beat lost or duplicated, none across 4 KiB, valid and payload stable until ready.

One client asks for one request after another, of any address and length; memory answers as AXI4 allows, with any
delays. The harness keeps a request's next address and how many words of it are to come, and the length of every burst.
"""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib.wiring import In, Out

from lnpu.bus.axi_reader import PAGE, AxiReader
from lnpu.bus.axi_writer import AxiWriter
from lnpu.config import TINY
from lnpu.hdl import Block, place
from verif.formal.proof import Fault, Proof

__all__ = ["PROOFS"]

CONFIG = TINY.replace(axi_bits=64, burst_beats=4, reads_in_flight=2, writes_in_flight=2)
WORD_BYTES = CONFIG.axi_bits // 8
_ADDRESS = ("addr", "len", "size", "burst", "id", "cache", "prot")


class Bursts(Block):
    """A reader or writer with a client and a memory."""

    def __init__(self, *, write: bool) -> None:
        self.write = write
        super().__init__(
            {
                "ask": In(1),
                "address": In(CONFIG.address_bits),
                "words": In(16),
                "data_valid": In(1),
                "data": In(CONFIG.axi_bits),
                "address_ready": In(1),
                "data_ready": In(1),
                "answer": In(1),
                "assume": Out(1),
                "hold": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        unit = AxiWriter if self.write else AxiReader
        dut = place(m, "dut", unit(config=CONFIG, clients=1))
        axi, client = dut.axi, dut.client0
        channel = "aw" if self.write else "ar"
        valid = getattr(axi, f"{channel}valid")
        ready = getattr(axi, f"{channel}ready")
        length = getattr(axi, f"{channel}len")
        address = getattr(axi, f"{channel}addr")
        request = client.request
        m.d.comb += [
            request.valid.eq(self.ask),
            request.p.address.eq(self.address),
            request.p.words.eq(self.words),
            ready.eq(self.address_ready),
        ]
        asked, burst = Signal(), Signal()
        m.d.comb += [asked.eq(request.valid & request.ready), burst.eq(valid & ready)]

        # Words asked for, words in bursts, words delivered; the bursts whose last beat has not passed.
        wanted = Signal(8)
        in_bursts = Signal(8)
        passed = Signal(8)
        bursts = Signal(8)
        answered = Signal(8)
        following = Signal(CONFIG.address_bits)  # address behind the last burst
        left = Signal(16)
        beat = Signal()
        m.d.sync += [
            wanted.eq(wanted + Mux(asked, self.words, 0)),
            in_bursts.eq(in_bursts + Mux(burst, length + 1, 0)),
            passed.eq(passed + beat),
            bursts.eq(bursts + burst),
        ]
        page = PAGE.bit_length() - 1
        rules = [
            ~valid | (address[:page] + (length + 1) * WORD_BYTES <= PAGE),
            ~valid | (length < CONFIG.burst_beats),
            ~valid | (address[: WORD_BYTES.bit_length() - 1] == 0),
            _stable(m, valid, ready, *(getattr(axi, f"{channel}{field}") for field in _ADDRESS)),
            in_bursts <= wanted,
        ]
        # Requests one at a time: the words of each are covered by adjacent bursts, in order.
        with m.If(asked):
            m.d.sync += [following.eq(self.address), left.eq(self.words)]
        with m.Elif(burst):
            m.d.sync += [following.eq(following + (length + 1) * WORD_BYTES), left.eq(left - length - 1)]
        rules += [~valid | (address == following), ~valid | (length < left)]
        promises = [
            ~self.ask | ((self.words != 0) & (self.words <= 16)),
            ~self.ask | (self.address[: WORD_BYTES.bit_length() - 1] == 0),
            ~self.ask | (left == 0),
        ]
        lengths = [Signal(8, name=f"length{n}") for n in range(4)]
        first, beats = Signal(2), Signal(8)
        final = Signal()
        with m.If(burst), m.Switch(bursts[:2]):
            for n, entry in enumerate(lengths):
                with m.Case(n):
                    m.d.sync += entry.eq(length)
        expected = Signal(8)
        with m.Switch(first):
            for n, entry in enumerate(lengths):
                with m.Case(n):
                    m.d.comb += expected.eq(entry)
        m.d.comb += final.eq(beats == expected)
        with m.If(beat):
            end = axi.wlast if self.write else final
            m.d.sync += [beats.eq(Mux(end, 0, beats + 1)), first.eq(first + end)]
        if self.write:  # data may pass before the address, whose length is then not known yet
            rules.append(~axi.wvalid | (bursts[:2] == first) | (axi.wlast == final))
        if self.write:
            self._write(m, dut, beat, final, bursts, answered, rules, wanted, passed)
        else:
            self._read(m, dut, beat, final, in_bursts, passed, wanted, rules)
        m.d.comb += [self.assume.eq(Cat(promises).all()), self.hold.eq(Cat(rules).all())]
        return m

    def _read(self, m, dut, beat, final, in_bursts, passed, wanted, rules):
        axi, response = dut.axi, dut.client0.response
        delivered = Signal(8)
        ends = Signal(64)  # bit n: word n is the last of its request
        end = Signal(8)
        asked = dut.client0.request.valid & dut.client0.request.ready
        with m.If(asked & (end < 64)):
            m.d.sync += ends.eq(ends | (1 << end[:6]))
        m.d.comb += [
            end.eq(wanted + dut.client0.request.p.words - 1),
            axi.rvalid.eq(self.answer & (passed != in_bursts)),
            axi.rdata.eq(self.data),
            axi.rlast.eq(final),
            beat.eq(axi.rvalid & axi.rready),
            response.ready.eq(self.data_ready),
        ]
        with m.If(response.valid & response.ready):
            m.d.sync += delivered.eq(delivered + 1)
        rules += [
            delivered + response.valid + (~axi.rready & 1) == passed,  # one on offer, one behind it at most
            ~response.valid | (response.p.last == ends.bit_select(delivered[:6], 1)),
            _stable(m, response.valid, response.ready, Value.cast(response.p)),
        ]

    def _write(self, m, dut, beat, final, bursts, answered, rules, wanted, passed):
        axi, source = dut.axi, dut.client0.data
        given = Signal(8)
        ended = Signal(8)
        m.d.comb += [
            axi.wready.eq(self.data_ready),
            beat.eq(axi.wvalid & axi.wready),
            source.valid.eq(self.data_valid & (given != wanted)),
            source.p.data.eq(self.data),
            source.p.strobe.eq(~0),
            axi.bvalid.eq(self.answer & (answered != ended) & (answered != bursts)),
        ]
        m.d.sync += [
            given.eq(given + (source.valid & source.ready)),
            ended.eq(ended + (beat & axi.wlast)),
            answered.eq(answered + axi.bvalid),
        ]
        rules += [
            passed + axi.wvalid == given,
            _stable(m, axi.wvalid, axi.wready, axi.wdata, axi.wstrb, axi.wlast),
        ]


def _stable(m, valid, ready, *payload):
    """`valid`, once set, stays with the same payload until `ready`."""
    now = Cat(payload)
    before, waits = Signal(len(now)), Signal()
    m.d.sync += [before.eq(now), waits.eq(valid & ~ready)]
    return ~waits | (valid & (now == before))


PROOFS = [
    Proof(
        name=name,
        block=block,
        statement="bursts cover each request once, none crosses 4 KiB; no beat lost or duplicated; stable until ready",
        harness=lambda write=write: Bursts(write=write),
        method="bounded",
        depth=8,
        faults=faults,
        quick=False,
    )
    for name, block, write, faults in (
        ("axi-reader", "AxiReader, 64 bits, bursts of 4", False, (Fault("route.pop", 0), Fault("route.push", 0))),
        ("axi-writer", "AxiWriter, 64 bits, bursts of 4", True, (Fault("route.pop", 0),)),
    )
]
